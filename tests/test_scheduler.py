"""The scheduler by itself: order, budgets, admission, preemption, leaving; and the bugs that other engines' users have met."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Callable, Iterable

import pytest
from toy_world import check_batch, greedy

from pagedlit.memory import allocator
from pagedlit.memory.allocator import BlockAllocator
from pagedlit.memory.prefix_cache import PrefixCache
from pagedlit.serving import scheduler as scheduler_module
from pagedlit.serving.scheduler import ForwardBatch, RunnerOutput, Scheduler
from pagedlit.serving.sequence import InvalidRequest, RequestTooLong, SamplingParams, Sequence, SequenceStatus, namespace_of, stop_reason_of


def make_scheduler(num_blocks: int = 16, block_size: int = 4, enabled: bool = True, **limits: object) -> Scheduler:
    return Scheduler(PrefixCache(BlockAllocator(num_blocks), block_size, enabled=enabled), **limits)


def add(scheduler: Scheduler, seq_id: int, prompt: int | list[int], max_tokens: int = 8, **params: object) -> Sequence:
    """A sequence in line; a prompt given as a number has that many tokens, found in no other prompt."""
    tokens = [1000 * (seq_id + 1) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    seq = Sequence(seq_id, array("i", tokens), len(tokens), greedy(max_tokens, **params), arrival=seq_id)
    scheduler.add(seq)
    return seq


def step(scheduler: Scheduler, token_id: int = 7) -> dict[int, int]:
    """One step; returns how many tokens each sequence got."""
    batch = scheduler.schedule()
    if batch is None:
        return {}
    check_batch(batch, scheduler.cache.num_blocks)
    assert len(batch.token_ids) <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    shares = {seq.seq_id: num_tokens for seq, num_tokens in scheduler.scheduled}
    scheduler.update(RunnerOutput([token_id] * len(batch.logits_rows)))
    scheduler.check_invariants()
    return shares


def run(scheduler: Scheduler, max_steps: int = 500) -> list[dict[int, int]]:
    """Step until nothing is left to do."""
    steps = []
    while shares := step(scheduler):
        steps.append(shares)
        assert len(steps) < max_steps, "a livelock"
    return steps


def finish_order(scheduler: Scheduler) -> Callable[[], list[int]]:
    """Listen; call the result for the ids in the order in which they finished."""
    log: list = []
    scheduler.events.subscribe(log.append)
    return lambda: [event.seq_id for event in log if event.kind == "finished"]


# sequences and their parameters


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "hot"}, {"temperature": True},
        {"top_p": 0}, {"top_p": 1.01}, {"top_p": float("nan")}, {"top_k": -2}, {"top_k": 1.5}, {"min_p": -0.1}, {"min_p": 2},
        {"seed": 0.5}, {"seed": True}, {"max_tokens": 0}, {"max_tokens": None}, {"max_tokens": 2.0}, {"stop_token_ids": 5},
        {"stop_token_ids": "5"}, {"stop_token_ids": [-1]}, {"cache_salt": 5}, {"priority": None}, {"priority": 0.5}, {"n": 0}, {"n": True},
        {"ignore_eos": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_parameter_is_named(bad: dict[str, object]) -> None:
    (name,) = bad
    with pytest.raises(InvalidRequest, match=rf"^{name}=.*: must be "):
        SamplingParams(**bad)


def test_nothing_is_accepted_and_ignored() -> None:
    with pytest.raises(TypeError, match="temperatur"):
        SamplingParams(temperatur=0)
    for senseless in (
        {"n": 0}, {"n": True}, {"n": 10**9}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": 3}, {"logprobs": -1}, {"prompt_logprobs": 1.5}, {"min_tokens": -1},
        {"min_tokens": 17}, {"presence_penalty": 3}, {"frequency_penalty": float("nan")}, {"repetition_penalty": 0}, {"repetition_penalty": None},
    ):
        with pytest.raises(InvalidRequest, match="must"):
            SamplingParams(**senseless)
    params = SamplingParams(n=2, stop=["."], logprobs=1, min_tokens=3, presence_penalty=0.5, repetition_penalty=1.1)
    assert params.penalizes and params.stop_strings == (".",)


def test_good_parameters_are_kept() -> None:
    params = SamplingParams(temperature=0.5, top_p=1, top_k=-1, min_p=1, seed=-3, stop_token_ids=(1, 2), cache_salt="", priority=-5)
    assert (params.top_k, params.seed, params.priority, params.max_tokens) == (-1, -3, -5, 16)


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(RequestTooLong(9, 8)))
    assert (error.num_tokens, error.max_model_len) == (9, 8) and "9 tokens" in str(error) and isinstance(error, ValueError)


def test_stop_reasons() -> None:
    def reason(tokens: list[int], max_model_len: int = 99, **params: object) -> tuple[str, int | None] | None:
        return stop_reason_of(Sequence(0, array("i", tokens), 2, SamplingParams(**params)), frozenset({0}), max_model_len)

    assert reason([1, 1, 5]) is None
    assert reason([1, 1, 0]) == ("stop", None)
    assert reason([1, 1, 0], ignore_eos=True) is None
    assert reason([1, 1, 5], stop_token_ids=[4, 5]) == ("stop", 5)
    assert reason([1, 1, 0], ignore_eos=True, stop_token_ids=[0]) == ("stop", 0)
    assert reason([1, 1, 5, 6], max_tokens=2) == ("length", None)
    assert reason([1, 1, 5, 6], max_model_len=4) == ("length", None)
    assert reason([1, 1, 5, 0], max_tokens=2) == ("stop", None), "a stop token at the limit still counts as one"


def test_namespaces_are_tagged() -> None:
    """A salt is no other kind of key, whatever string it is (a LoRA name equal to a salt must not hit)."""
    salted = Sequence(0, array("i", [1]), 1, SamplingParams(cache_salt="french"))
    plain = Sequence(0, array("i", [1]), 1, SamplingParams())
    empty = Sequence(0, array("i", [1]), 1, SamplingParams(cache_salt=""))
    assert namespace_of(salted) == ("cache_salt", "french") and len({namespace_of(salted), namespace_of(plain), namespace_of(empty)}) == 3


# the batch


def test_batch_is_viewed_without_a_copy() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 6), add(scheduler, 1, 3)
    batch = scheduler.schedule()
    for name, code in {"slot_mapping": "q", "seeds": "Q"}.items():
        assert memoryview(getattr(batch, name)).format == code
    for name in ("token_ids", "positions", "query_start_loc", "seq_lens", "block_tables", "block_table_start", "logits_rows", "output_lens"):
        assert memoryview(getattr(batch, name)).format == "i" and getattr(batch, name).itemsize == 4
    assert batch.query_start_loc.tolist() == [0, 6, 9] and batch.seq_lens.tolist() == [6, 3] and batch.logits_rows.tolist() == [5, 8]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2] and batch.block_table_start.tolist() == [0, 2, 3]


def test_only_the_last_chunk_is_sampled() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, 0, 10)
    rows = []
    for _ in range(4):
        batch = scheduler.schedule()
        rows.append((batch.positions.tolist(), batch.logits_rows.tolist(), batch.output_lens.tolist()))
        scheduler.update(RunnerOutput([7] * len(batch.logits_rows)))
    assert rows == [([0, 1, 2, 3], [], []), ([4, 5, 6, 7], [], []), ([8, 9], [1], [0]), ([10], [0], [1])]


@pytest.mark.parametrize("limits", [{"max_num_batched_tokens": 0}, {"max_num_seqs": 0}])
def test_budgets_must_be_positive(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        make_scheduler(**limits)


# the budget


def test_long_prefill_does_not_keep_decodes_waiting() -> None:
    """Gallery 11: behind a prompt of 600 tokens, every decode still gets its token in every step, and no step grows."""
    scheduler = make_scheduler(num_blocks=300, max_num_batched_tokens=16)
    decodes = [add(scheduler, i, 3, max_tokens=60) for i in range(4)]
    step(scheduler), step(scheduler)
    add(scheduler, 9, 600)
    for _ in range(40):
        shares = step(scheduler)
        assert all(shares[seq.seq_id] == 1 for seq in decodes)
        assert shares[9] == 12, "what the decodes leave goes to the prefill, and no more"


def test_long_prefill_takes_all_when_alone() -> None:
    scheduler = make_scheduler(num_blocks=300, max_num_batched_tokens=16)
    add(scheduler, 0, 600, max_tokens=1)
    steps = run(scheduler)
    assert [shares[0] for shares in steps] == [16] * 37 + [8]


def test_prefill_in_front_leaves_the_decodes_their_tokens() -> None:
    """The same when the long prompt is more urgent than the decodes."""
    scheduler = make_scheduler(num_blocks=300, max_num_batched_tokens=8)
    for i in range(3):
        add(scheduler, i, 2, max_tokens=50, priority=1)
    step(scheduler)
    add(scheduler, 9, 100, priority=0)
    step(scheduler)
    assert scheduler.running[0].seq_id == 9 and step(scheduler) == {9: 5, 0: 1, 1: 1, 2: 1}


def test_first_in_order_always_moves() -> None:
    """More decodes than budget, and a prefill in front of them: it gets one token a step instead of none."""
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=3)
    parent = add(scheduler, 1, 2, max_tokens=50, priority=1)
    step(scheduler)
    first = add(scheduler, 0, 8, priority=0)
    step(scheduler)
    for seq_id in (2, 3):
        scheduler.fork(parent, fork_of(parent, seq_id))
    while first.num_behind > 1:
        assert step(scheduler)[0] == 1


def fork_of(parent: Sequence, seq_id: int) -> Sequence:
    return Sequence(seq_id, parent.token_ids[:], parent.num_prompt_tokens, parent.params, arrival=seq_id)


def test_step_is_never_empty_while_somebody_waits() -> None:
    """The budget was kept for decodes that preempted each other: once, that left a step without any token."""
    scheduler = make_scheduler(num_blocks=20, block_size=1, enabled=False, max_num_batched_tokens=3, max_num_seqs=4)
    parent = add(scheduler, 0, 1, max_tokens=40, priority=1)
    step(scheduler)
    add(scheduler, 1, 6, max_tokens=40, priority=0)
    step(scheduler)
    for seq_id in range(2, 40, 2):
        children = [fork_of(parent, seq_id), fork_of(parent, seq_id + 1)]
        for child in children:
            scheduler.fork(parent, child)
        assert step(scheduler), "sequences wait, but none can run"
        for child in children:
            scheduler.finish(child, "abort")
    run(scheduler)


# admission


def test_seats_are_limited() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(3):
        add(scheduler, i, 2, max_tokens=2)
    assert [set(shares) for shares in run(scheduler)] == [{0, 1}, {0, 1}, {2}, {2}]


def test_admission_counts_what_is_owed() -> None:
    """Two prompts that are read in chunks and do not fit together: the second waits until the first one is done."""
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=4, enabled=False)
    add(scheduler, 0, 16, max_tokens=2), add(scheduler, 1, 12, max_tokens=2)
    steps = run(scheduler)
    assert all(len(shares) == 1 for shares in steps) and len(steps) == 4 + 1 + 3 + 1
    assert sum(shares.get(0, 0) for shares in steps) == 17, "nothing was computed twice"


def test_small_prompts_do_not_overtake_a_large_one() -> None:
    """No starvation: whoever is first in line goes in first, however well the others would fit."""
    scheduler = make_scheduler(num_blocks=8, enabled=False)
    add(scheduler, 0, 12, max_tokens=8)
    step(scheduler)
    add(scheduler, 1, 20, max_tokens=1)
    for i in range(2, 6):
        add(scheduler, i, 2, max_tokens=1)
    order = finish_order(scheduler)
    steps = run(scheduler)
    assert next(i for i, shares in enumerate(steps) if 1 in shares) <= next(i for i, shares in enumerate(steps) if 2 in shares)
    assert order()[:2] == [0, 1]


def test_no_prefix_is_searched_for_while_no_block_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(num_blocks=4, enabled=False)
    add(scheduler, 0, 13, max_tokens=4)
    step(scheduler)
    add(scheduler, 1, 8)
    monkeypatch.setattr(PrefixCache, "match", None)
    step(scheduler), step(scheduler)


def test_prompt_that_can_never_fit_fails_alone() -> None:
    """Gallery 5: larger than the pool, or than max_model_len."""
    scheduler = make_scheduler(num_blocks=4)
    seq = add(scheduler, 0, 5)
    with pytest.raises(RequestTooLong, match="16 tokens .* max_model_len=16; shorten it, or raise"):
        add(scheduler, 1, 16)
    with pytest.raises(RequestTooLong):
        add(make_scheduler(max_model_len=8), 0, 8)
    run(scheduler)
    assert seq.finish_reason == "length" and seq.num_output_tokens == 8


def test_lone_sequence_that_outgrows_the_pool_ends_at_its_size() -> None:
    """Gallery 5: it may take every block, and then it is over."""
    scheduler = make_scheduler(num_blocks=3)
    seq = add(scheduler, 0, 2, max_tokens=100)
    run(scheduler)
    assert (len(seq.token_ids), seq.finish_reason, seq.num_preemptions) == (12, "length", 0)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_sequence_of_the_pools_size_fits_beside_its_own_cached_tail(block_size: int) -> None:
    """The same prompt again, when the whole pool is its cached copy: a partial hit must not need one block too many."""
    scheduler = make_scheduler(num_blocks=48 // block_size, block_size=block_size)
    for seq_id in range(3):
        seq = add(scheduler, seq_id, list(range(40)), max_tokens=100)
        run(scheduler)
        assert len(seq.token_ids) == 48 and seq.num_preemptions == 0
        assert seq.num_cached_tokens == (0 if seq_id == 0 else 32 if block_size == 16 else 39)


# preemption


def crowded(enabled: bool = False, **limits: object) -> tuple[Scheduler, list[Sequence]]:
    """Three sequences that fit when they come in, and not when they have grown."""
    scheduler = make_scheduler(num_blocks=9, enabled=enabled, **limits)
    return scheduler, [add(scheduler, i, 8, max_tokens=9) for i in range(3)]


def test_last_in_order_is_preempted_and_keeps_its_place() -> None:
    """Gallery 12: who came later waits behind it, though it has been waiting longer."""
    scheduler, seqs = crowded()
    order = finish_order(scheduler)
    while not seqs[2].num_preemptions:
        step(scheduler)
    add(scheduler, 3, 6, max_tokens=9)
    assert [seq.seq_id for seq in scheduler.waiting] == [2, 3] and seqs[2].status is SequenceStatus.PREEMPTED
    steps = run(scheduler)
    first = {seq_id: next(i for i, shares in enumerate(steps) if seq_id in shares) for seq_id in (2, 3)}
    assert first[2] <= first[3] and order() == [0, 1, 2, 3] and [seq.num_preemptions for seq in seqs] == [0, 0, 1]


def test_preempted_sequence_is_prefilled_again() -> None:
    """Gallery 7: it has generated tokens, and still it is many tokens behind, not one."""
    scheduler, seqs = crowded()
    while not seqs[2].num_preemptions:
        step(scheduler)
    num_tokens = len(seqs[2].token_ids)
    assert num_tokens > seqs[2].num_prompt_tokens and seqs[2].num_behind == num_tokens
    shares = next(shares for shares in iter(lambda: step(scheduler), {}) if 2 in shares)
    assert shares[2] == num_tokens


def test_preempted_sequence_resumes_from_the_cache() -> None:
    """With caching, what was computed before is mostly still there: the one in front needed three blocks of it."""
    scheduler = make_scheduler(num_blocks=20)
    seqs = [add(scheduler, i, 32, max_tokens=20) for i in range(2)]
    while not seqs[1].num_preemptions:
        step(scheduler)
    assert seqs[1].num_behind == len(seqs[1].token_ids) == 41
    shares = next(shares for shares in iter(lambda: step(scheduler), {}) if 1 in shares)
    assert shares == {1: 41 - 28} and seqs[1].num_cached_tokens == 0, "a later hit is not counted as the prompt's"


def test_equal_priorities_do_not_preempt_each_other_for_ever() -> None:
    """Gallery 12: the first in order is never preempted, so somebody always gets done."""
    scheduler = make_scheduler(num_blocks=5, block_size=2, enabled=False, max_num_batched_tokens=3)
    seqs = [add(scheduler, i, 4, max_tokens=6) for i in range(6)]
    order = finish_order(scheduler)
    run(scheduler, max_steps=200)
    assert order() == list(range(6)) and seqs[0].num_preemptions == 0


def test_urgent_sequence_gets_the_next_seat_and_the_last_block() -> None:
    """Gallery 12: no priority inversion at max_num_seqs among those who wait, nor when blocks run out."""
    scheduler = make_scheduler(num_blocks=6, enabled=False, max_num_seqs=2)
    order = finish_order(scheduler)
    seqs = [add(scheduler, 0, 8, max_tokens=3, priority=1), add(scheduler, 1, 8, max_tokens=9, priority=1)]
    step(scheduler)
    seqs += [add(scheduler, 2, 4, max_tokens=2, priority=1), add(scheduler, 3, 7, max_tokens=12, priority=0)]
    run(scheduler)
    assert order()[:2] == [0, 3], "3 overtook 2 in line"
    assert [seq.num_preemptions for seq in seqs] == [0, 1, 0, 0], "1 gave its blocks to 3"


def test_no_one_is_admitted_in_a_step_that_preempts() -> None:
    scheduler, seqs = crowded()
    add(scheduler, 3, 1, max_tokens=1, priority=-1)
    while not seqs[2].num_preemptions:
        num_running = len(scheduler.running)
        step(scheduler)
    assert len(scheduler.running) == num_running - 1


def test_decode_that_loses_its_blocks_is_not_in_the_batch() -> None:
    scheduler, seqs = crowded()
    while not seqs[2].num_preemptions:
        shares = step(scheduler)
    assert set(shares) == {0, 1}


# the prefix cache


def test_full_prompt_hit_recomputes_the_last_token_alone() -> None:
    """Gallery 6: into a block that somebody else reads, which is therefore copied."""
    scheduler = make_scheduler()
    prompt = list(range(8))
    first = add(scheduler, 0, prompt, max_tokens=8)
    step(scheduler)
    second = add(scheduler, 1, prompt, max_tokens=8)
    batch = scheduler.schedule()
    assert second.num_cached_tokens == 7 and [share.num_tokens for share in scheduler.scheduled] == [1, 1]
    ((src, dst, num_tokens),) = batch.copies
    assert src == first.table.block_ids[1] and dst == second.table.block_ids[1] and num_tokens == 3
    scheduler.update(RunnerOutput([7, 7]))
    assert second.table.block_ids[1] == src, "the copy turned out equal, and was given up for the cached block"
    scheduler.check_invariants()


def test_nothing_is_published_before_it_is_written() -> None:
    """Gallery 8: while the step is in flight, nobody can hit it."""
    scheduler = make_scheduler()
    add(scheduler, 0, 9)
    scheduler.schedule()
    assert not scheduler.cache.nodes
    scheduler.update(RunnerOutput([7]))
    assert len(scheduler.cache.nodes) == 2


def test_some_of_a_batch_hit() -> None:
    """Gallery 9: hits of all kinds beside misses, admitted in one step."""
    scheduler = make_scheduler(num_blocks=32)
    add(scheduler, 0, list(range(8)), max_tokens=1)
    step(scheduler)
    prompts = {1: list(range(8)) + [50], 2: 5, 3: list(range(6)) + [60, 61], 4: [70, 71], 5: list(range(8))}
    seqs = {seq_id: add(scheduler, seq_id, prompt) for seq_id, prompt in prompts.items()}
    assert step(scheduler) == {1: 1, 2: 5, 3: 2, 4: 2, 5: 1}
    assert {seq_id: seq.num_cached_tokens for seq_id, seq in seqs.items()} == {1: 8, 2: 0, 3: 6, 4: 0, 5: 7}


def test_coarse_blocks_hit_too() -> None:
    """Gallery 18: a block of 256 tokens never fills up in a chat, and is reused all the same."""
    scheduler = make_scheduler(num_blocks=4, block_size=256)
    add(scheduler, 0, list(range(40)), max_tokens=3)
    run(scheduler)
    seq = add(scheduler, 1, list(range(30)) + [99])
    step(scheduler)
    assert seq.num_cached_tokens == 30


@pytest.mark.parametrize(("salt", "hit"), [("a", 7), ("b", 0), (None, 0)])
def test_salts_are_walls(salt: str | None, hit: int) -> None:
    """Gallery 2: the same salt hits, another one does not."""
    scheduler = make_scheduler()
    add(scheduler, 0, list(range(8)), cache_salt="a")
    run(scheduler)
    seq = add(scheduler, 1, list(range(8)), cache_salt=salt)
    step(scheduler)
    assert seq.num_cached_tokens == hit


def test_new_weights_forget_the_old_ones_kv() -> None:
    """Gallery 3: also the KV of a sequence that was running when the weights changed."""
    scheduler = make_scheduler()
    old = add(scheduler, 0, list(range(8)), max_tokens=6)
    step(scheduler)
    scheduler.cache.clear(new_weights=True)
    run(scheduler)
    assert old.finish_reason == "length" and not scheduler.cache.nodes
    seq = add(scheduler, 1, list(range(8)))
    step(scheduler)
    assert seq.num_cached_tokens == 0 and len(scheduler.cache.nodes) == 2


def test_hits_never_count_more_than_the_prompt() -> None:
    """A forked sequence that has to wait carries generated tokens, which the cache may know: they are no part of its prompt."""
    scheduler = make_scheduler(max_num_seqs=1)
    parent = add(scheduler, 0, 4, max_tokens=9)
    for _ in range(6):
        step(scheduler)
    child = fork_of(parent, 1)
    scheduler.fork(parent, child)
    assert child.status is SequenceStatus.WAITING
    run(scheduler)
    assert child.num_cached_tokens == 4 and child.finish_reason == "length"


# leaving, and failing


def in_state(state: str) -> tuple[Scheduler, Sequence]:
    """A scheduler with a sequence in the named state, and others around it."""
    scheduler, (_, other, seq) = crowded(enabled=True, max_num_batched_tokens=20)
    if state == "mid-prefill":
        step(scheduler)
        assert 1 < seq.num_behind < len(seq.token_ids)
    elif state in ("running", "forked"):
        step(scheduler), step(scheduler)
        assert seq.num_behind == 1
    elif state in ("preempted", "preempted mid-prefill"):
        while not seq.num_preemptions:
            step(scheduler)
    if state == "forked":
        scheduler.fork(seq, seq := fork_of(seq, 9))
        assert seq.table is not None and seq.table.block_ids == scheduler.running[2].table.block_ids
    if state == "just finished":
        scheduler.finish(other, "abort")
        return scheduler, other
    return scheduler, seq


@pytest.mark.parametrize("state", ["waiting", "mid-prefill", "running", "preempted", "forked", "just finished"])
def test_abort_in_every_state_leaks_nothing(state: str) -> None:
    """Gallery 4."""
    scheduler, seq = in_state(state)
    scheduler.finish(seq, "abort")
    scheduler.finish(seq, "error")
    assert (seq.status, seq.finish_reason, seq.table, seq.cursor) == (SequenceStatus.FINISHED, "abort", None, None)
    scheduler.check_invariants()
    run(scheduler)
    scheduler.cache.clear()
    assert scheduler.cache.allocator.num_free == scheduler.cache.num_blocks


def test_failed_step_is_taken_back() -> None:
    """Its sequences go back to their places, what it touched is not published, what was published before is hit again."""
    scheduler, seqs = crowded(enabled=True)
    step(scheduler)
    assert len(scheduler.cache.nodes) == 6
    late = add(scheduler, 3, 2)
    for seq in seqs:
        seq.token_ids.extend([1, 2, 3])  # as if three tokens had come in: the next step would fill a block
    scheduler.schedule()
    scheduler.rollback()
    scheduler.check_invariants()
    assert scheduler.waiting == [*seqs, late] and not scheduler.running and len(scheduler.cache.nodes) == 6
    assert scheduler.cache.num_free == scheduler.cache.num_blocks
    assert step(scheduler)[0] == 4, "eight of its twelve tokens are in the cache"


def test_rollback_of_an_admission() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 0, 6)
    scheduler.schedule()
    scheduler.rollback()
    scheduler.check_invariants()
    assert scheduler.waiting == [seq] and not scheduler.cache.nodes and scheduler.cache.allocator.num_free == 16
    assert run(scheduler)[0] == {0: 6}


def test_schedule_insists_on_an_update() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 6)
    scheduler.schedule()
    with pytest.raises(AssertionError, match="not updated"):
        scheduler.schedule()


# forks


def test_fork_takes_no_block_even_when_none_is_free() -> None:
    """Gallery 13: there is nothing in it that could fail half-way."""
    scheduler = make_scheduler(num_blocks=3)
    parent = add(scheduler, 0, 10, max_tokens=2)
    step(scheduler)
    assert scheduler.cache.num_free == 0
    child = fork_of(parent, 1)
    scheduler.fork(parent, child)
    scheduler.check_invariants()
    assert child.table.block_ids == parent.table.block_ids and child.cursor is parent.cursor and child.num_behind == 1
    run(scheduler)
    assert (parent.finish_reason, child.finish_reason) == ("length", "length")


def test_fork_without_a_seat_waits() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    parent = add(scheduler, 0, 5, max_tokens=4)
    step(scheduler)
    child = fork_of(parent, 1)
    scheduler.fork(parent, child)
    assert child.status is SequenceStatus.WAITING and child.table is None and scheduler.waiting == [child]
    run(scheduler)
    assert child.num_output_tokens == 4


def test_one_of_two_copies() -> None:
    """The first writer copies the shared block; the second is then alone with the original."""
    scheduler = make_scheduler(enabled=False)
    parent = add(scheduler, 0, 5, max_tokens=4)
    step(scheduler)
    scheduler.fork(parent, fork_of(parent, 1))
    batch = scheduler.schedule()
    assert len(batch.copies) == 1 and batch.copies[0].num_tokens == 1
    scheduler.update(RunnerOutput([7, 8]))
    scheduler.check_invariants()


# events


def test_events_tell_the_story() -> None:
    scheduler = make_scheduler(num_blocks=4)
    log: list = []
    scheduler.events.subscribe(log.append)
    add(scheduler, 0, list(range(6)), max_tokens=2)
    run(scheduler)
    assert [event.kind for event in log if event.block_ids or event.seq_id is not None] == [
        "allocated", "scheduled", "shared", "published", "scheduled", "shared", "published", "released", "finished",
    ]  # fmt: skip
    assert [(e.seq_id, e.num_tokens, e.step) for e in log if e.kind == "scheduled"] == [(0, 6, 0), (0, 1, 1)]
    assert [(e.num_tokens, e.block_ids) for e in log if e.kind == "published"] == [(4, (0,)), (3, (1,))]
    assert log[-1].seq_id == 0 and log[-1].num_tokens == 8
    log.clear()
    add(scheduler, 1, list(range(6)) + [8, 9], max_tokens=1)
    run(scheduler)
    hit, copied = next(e for e in log if e.kind == "hit"), next(e for e in log if e.kind == "copied")
    assert (hit.seq_id, hit.num_tokens, hit.block_ids) == (1, 6, (0, 1)) and copied.num_tokens == 2
    assert next(e for e in log if e.kind == "scheduled").num_tokens == 2


def test_preemptions_and_evictions_are_told() -> None:
    scheduler, seqs = crowded(enabled=True)
    log: list = []
    stop = scheduler.events.subscribe(log.append)
    run(scheduler)
    assert sum(e.kind == "preempted" and e.seq_id == 2 for e in log) == seqs[2].num_preemptions == 1
    assert any(e.kind == "evicted" for e in log) and sum(e.kind == "finished" for e in log) == 3
    stop()
    num_events = len(log)
    add(scheduler, 7, 3)
    run(scheduler)
    assert len(log) == num_events


def test_silent_stream_makes_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a listener no `Event` is created: not by the scheduler, not by the memory manager."""

    def refuse(*args: object) -> None:
        raise AssertionError("an event was made, and nobody listens")

    monkeypatch.setattr(allocator, "Event", refuse)
    scheduler, seqs = crowded(enabled=True)
    step(scheduler)
    scheduler.fork(seqs[0], fork_of(seqs[0], 9))
    run(scheduler)
    assert seqs[2].num_preemptions
    scheduler.events.subscribe(print)
    with pytest.raises(AssertionError, match="nobody listens"):
        add(scheduler, 5, 3), step(scheduler)


# cost


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Count the calls of a function of the scheduler's module."""
    calls, function = [0], getattr(scheduler_module, name)

    def counted(*args: object) -> object:
        calls[0] += 1
        return function(*args)

    monkeypatch.setattr(scheduler_module, name, counted)
    return calls


@pytest.mark.parametrize("state", ["waiting", "running"])
@pytest.mark.parametrize("order", [iter, reversed])
def test_leaving_does_not_search_the_queue(state: str, order: Callable[[list], Iterable], monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 sequences leave, in either direction: each is found by bisection."""
    scheduler = make_scheduler(num_blocks=4096, max_num_seqs=4096, max_num_batched_tokens=8192)
    seqs = [add(scheduler, i, 2) for i in range(4096)]
    if state == "running":
        batch = scheduler.schedule()
        scheduler.update(RunnerOutput([7] * len(batch.logits_rows)))
    calls = count_calls(monkeypatch, "by_order")
    for seq in order(seqs):
        scheduler.finish(seq, "abort")
    assert calls[0] <= 13 * 4096
    scheduler.check_invariants()


def test_quiet_decode_step_asks_for_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nobody in line, a step does not add up what is owed."""
    scheduler = make_scheduler()
    add(scheduler, 0, 6)
    step(scheduler)
    calls = count_calls(monkeypatch, "num_owed_blocks")
    step(scheduler)
    assert calls == [0]


def test_batch_of_nothing() -> None:
    assert make_scheduler().schedule() is None and len(ForwardBatch(4).query_start_loc) == 1
