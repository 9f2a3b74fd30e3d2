"""Scheduling policies: nobody waits for ever, nobody is chased for ever, a long prompt lets the others through, and looking is cheap."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_world import VOCAB_SIZE, Oracle, check_whole, drain, fail_once, greedy, make_engine, random_move, random_params, random_prompt

from pagedlit.memory.allocator import BlockAllocator
from pagedlit.memory.prefix_cache import PrefixCache
from pagedlit.serving import scheduler as scheduler_module
from pagedlit.serving.engine import Engine, toy_reference
from pagedlit.serving.policy import FirstComeFirstServed, LongestPrefixMatch, get_policy, num_known_tokens
from pagedlit.serving.scheduler import RunnerOutput, Priority, Scheduler, SchedulerState, SchedulingPolicy
from pagedlit.serving.sequence import InvalidRequest, RequestTooLong, SamplingParams, Sequence, SequenceStatus, namespace_of

POLICIES: dict[str, Callable[[], SchedulingPolicy]] = {
    "default": lambda: None,
    "fcfs": FirstComeFirstServed,
    "ageing 0": lambda: Priority(0),
    "ageing 5": lambda: Priority(5),
    "ageing 1000": Priority,
    "lpm": LongestPrefixMatch,
    "impatient lpm": lambda: LongestPrefixMatch(patience=3, window=2),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


class Strict(FirstComeFirstServed):
    """Priorities without ageing: what chapter 06 shows to starve."""

    def order(self, seq: Sequence, step: int) -> tuple[int, int]:
        return seq.params.priority, seq.arrival


class Greedy(LongestPrefixMatch):
    """The longest prefix without patience."""

    def choose(self, state: SchedulerState) -> Sequence:
        return max(state.waiting, key=lambda seq: num_known_tokens(state.cache, seq))


def make_scheduler(num_blocks: int = 16, block_size: int = 4, **limits: object) -> Scheduler:
    return Scheduler(PrefixCache(BlockAllocator(num_blocks), block_size), **limits)


def add(scheduler: Scheduler, seq_id: int, prompt: int | list[int], max_tokens: int = 4, **params: object) -> Sequence:
    """A sequence in line; a prompt given as a number has that many tokens, found in no other prompt."""
    tokens = [1000 * (seq_id + 1) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    seq = Sequence(seq_id, array("i", tokens), len(tokens), greedy(max_tokens, **params), arrival=seq_id)
    scheduler.add(seq)
    return seq


def step(scheduler: Scheduler) -> dict[int, int]:
    """One step; returns how many tokens each sequence got."""
    batch = scheduler.schedule()
    shares = {seq.seq_id: num_tokens for seq, num_tokens in scheduler.scheduled}
    if batch:
        scheduler.update(RunnerOutput([7] * len(batch.logits_rows)))
    scheduler.check_invariants()
    return shares


def a_seq(seq_id: int, **params: object) -> Sequence:
    return Sequence(seq_id, array("i", [1]), 1, greedy(**params), arrival=seq_id)


# places


@each_policy
def test_places_are_unique_and_kept(policy: Callable[[], SchedulingPolicy]) -> None:
    """Through preemption, forks and failing steps; a child gets a place of its own."""
    for seed in range(12):
        rng = random.Random(seed)
        engine = life_engine(rng, policy())
        oracle, places = Oracle(engine), {}
        for _ in range(60):
            random_move(rng, engine, oracle)
            for seq_id, seq in engine.sequences.items():
                assert places.setdefault(seq_id, seq.order) == seq.order
        assert len(set(places.values())) == len(places)
        drain(engine, oracle)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(-3, 3)), min_size=2, max_size=40), st.integers(0, 50))
def test_a_level_is_worth_so_many_steps(arrivals: list[tuple[int, int]], ageing: int) -> None:
    """Whoever is overtaken by a later one was overtaken within `ageing` steps for each level between them."""
    policy, seqs = Priority(ageing), []
    for seq_id, (step, priority) in enumerate(sorted(arrivals)):
        seq = a_seq(seq_id, priority=priority)
        seq.order = policy.order(seq, step)
        seqs.append((step, seq))
    for earlier_step, earlier in seqs:
        for later_step, later in seqs:
            if earlier.arrival < later.arrival and later.order < earlier.order:
                assert later_step - earlier_step <= ageing * (earlier.params.priority - later.params.priority)


def test_default_is_priority_with_ageing() -> None:
    policy = make_scheduler().policy
    assert isinstance(policy, Priority) and policy.ageing == 1000
    assert policy.order(a_seq(3, priority=-2), 7) == (-1993, 3)
    assert FirstComeFirstServed().order(a_seq(3, priority=-2), 7) == LongestPrefixMatch().order(a_seq(3), 7) == (7, 3)


def test_bad_policies_are_refused() -> None:
    for bad in (lambda: Priority(-1), lambda: LongestPrefixMatch(patience=-1), lambda: LongestPrefixMatch(window=0)):
        with pytest.raises(ValueError, match="-1|window=0"):
            bad()
    with pytest.raises(ValueError, match="'sjf': must be one of fcfs, priority, lpm"):
        get_policy("sjf")
    assert [type(get_policy(name)) for name in ("fcfs", "priority", "lpm")] == [FirstComeFirstServed, Priority, LongestPrefixMatch]


@each_policy
def test_a_policy_keeps_nothing(policy: Callable[[], SchedulingPolicy]) -> None:
    """One policy may serve many schedulers, and leaks nothing."""
    one = policy() or Priority()
    before = dict(vars(one))
    for seed in range(6):
        engine = life_engine(random.Random(seed), one)
        live(random.Random(seed), engine)
    assert vars(one) == before


# no livelock


@each_policy
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_seqs", [2, 3, 5])
def test_equals_that_need_more_than_half_the_pool(policy: Callable[[], SchedulingPolicy], caching: bool, num_seqs: int) -> None:
    """They cannot chase each other: the first never gives way, the others at most once for each that leaves or gives way before them."""
    engine = make_engine(9, 4, enable_prefix_caching=caching, policy=policy())
    oracle = Oracle(engine)
    for i in range(num_seqs):
        oracle.began(engine.add_request([i, 1, 2, 3] * 2, greedy(16)))
    seqs = list(engine.sequences.values())
    drain(engine, oracle, max_steps=num_seqs * (8 + 16))
    assert [seq.num_preemptions for seq in seqs[:2]] == [0, 1]
    assert all(seq.num_preemptions <= 2**i for i, seq in enumerate(seqs)) and sum(seq.num_preemptions for seq in seqs) < 2 * num_seqs
    check_whole(engine)


def life_engine(rng: random.Random, policy: SchedulingPolicy | None, **limits: object) -> Engine:
    """A tiny pool, so that preemption is the rule."""
    block_size = rng.choice([1, 2, 4, 16])
    limits = {"max_num_batched_tokens": rng.choice([1, 3, 7, 64]), "max_num_seqs": rng.choice([1, 2, 8])} | limits
    num_blocks = rng.randint(max(2, 24 // block_size), 60 // block_size + 4)
    return make_engine(num_blocks, block_size, policy=policy, max_prefill_chunk=rng.choice([None, 1, 2, 5]), **limits)


def num_tokens_left(engine: Engine) -> int:
    """Tokens that the unfinished sequences may have in the end."""
    return sum(seq.num_prompt_tokens + seq.params.max_tokens for seq in engine.sequences.values())


def live(rng: random.Random, engine: Engine, num_moves: int = 60) -> Oracle:
    """Requests, forks, aborts and failures in any order; then everything ends, in a bounded number of steps."""
    oracle = Oracle(engine)
    for _ in range(num_moves):
        random_move(rng, engine, oracle)
        engine.check_invariants()
    drain(engine, oracle, max_steps=2 * num_tokens_left(engine) + 1)
    check_whole(engine)
    return oracle


@each_policy
def test_every_life_ends(policy: Callable[[], SchedulingPolicy]) -> None:
    """Every text is right, no block is lost, and the steps are bounded by the tokens."""
    for seed in range(30):
        rng = random.Random(seed)
        live(rng, life_engine(rng, policy()))


requests = st.lists(
    st.tuples(
        st.integers(1, 20),  # prompt tokens
        st.integers(1, 14),  # answer tokens
        st.integers(-2, 2),  # priority
        st.integers(0, 30),  # arrival
        st.booleans(),  # whether it is forked in its third step
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    requests=requests, name=st.sampled_from(list(POLICIES)), num_blocks=st.integers(9, 20), budget=st.integers(1, 40),
    num_seqs=st.integers(1, 6), chunk=st.one_of(st.none(), st.integers(1, 12)), caching=st.booleans(),
)  # fmt: skip
def test_every_request_finishes_in_bounded_steps_and_preemptions(
    requests: list[tuple[int, int, int, int, bool]], name: str, num_blocks: int, budget: int, num_seqs: int, chunk: int | None, caching: bool
) -> None:
    engine = make_engine(
        num_blocks, 4, max_num_batched_tokens=budget, max_num_seqs=num_seqs, max_prefill_chunk=chunk, enable_prefix_caching=caching,
        policy=POLICIES[name](),
    )  # fmt: skip
    oracle, every = Oracle(engine), []
    forks: dict[int, list[int]] = {}
    for now in range(31):
        for num_prompt_tokens, num_tokens, priority, arrival, is_forked in requests:
            if arrival == now:
                seq_id = engine.add_request([i % 3 for i in range(num_prompt_tokens)], greedy(num_tokens, priority=priority))
                forks.setdefault(now + 3, []).extend([seq_id] * is_forked)
                every.append(add_to(oracle, engine, seq_id))
        for seq_id in forks.pop(now, []):
            if seq_id in engine.sequences:
                every.append(add_to(oracle, engine, engine.fork(seq_id)))
        oracle.check(engine.step())
    drain(engine, oracle, max_steps=2 * num_tokens_left(engine) + 1)
    assert all(seq.finish_reason == "length" for seq in every)
    assert max(seq.num_preemptions for seq in every) < 2 * len(every) + 1
    check_whole(engine)


def add_to(oracle: Oracle, engine: Engine, seq_id: int) -> Sequence:
    oracle.began(seq_id)
    return engine.sequences[seq_id]


# nobody starves


def stream_until_done(engine: Engine, calm: int, urgent: Callable[[int], SamplingParams], num_steps: int, prompt: int = 8) -> int | None:
    """Urgent requests arrive in every second step, for ever; when is the calm one done?"""
    for now in range(num_steps):
        if now % 2 == 0 and now:
            engine.add_request([now % 4, now // 4 % 4, *[1] * (prompt - 2)], urgent(now))
        engine.step()
        if calm not in engine.sequences:
            return now
    return None


@pytest.mark.parametrize(("policy", "limit"), [(Strict(), None), (Priority(10), 15), (Priority(40), 44), (Priority(200), 204), (Priority(0), 7)])
def test_calm_request_under_endless_urgent_ones(policy: SchedulingPolicy, limit: int | None) -> None:
    """Without ageing it never comes back; with it, within the ageing and its own time."""
    engine = make_engine(6, 4, vocab_size=26, max_num_seqs=2, policy=policy, enable_prefix_caching=False)
    calm = engine.add_request([0] * 8, greedy(8, priority=1))
    done = stream_until_done(engine, calm, lambda now: greedy(4), 600)
    assert done == limit if limit is None else done is not None and done <= limit + 8


@each_policy
def test_nobody_starves_under_an_endless_stream(policy: Callable[[], SchedulingPolicy]) -> None:
    """A request that is unpopular and, by one level, not urgent, among urgent ones with a popular prompt that use up every seat."""
    engine = make_engine(8, 4, max_num_seqs=1, policy=policy())
    for _ in range(3):
        engine.add_request([1] * 8, greedy(3))
    calm = engine.add_request([3, 2] * 5, greedy(6, priority=1))
    for now in range(1100):
        if now % 3 == 0:
            engine.add_request([1] * 8, greedy(3))
        engine.step()
        if calm not in engine.sequences:
            return
    raise AssertionError("starved")


@pytest.mark.parametrize(("policy", "is_served"), [(Greedy(), False), (LongestPrefixMatch(patience=20), True), (LongestPrefixMatch(patience=300), True)])
def test_outsider_among_popular_prompts(policy: LongestPrefixMatch, is_served: bool) -> None:
    """One seat, and always somebody whose prompt is known."""
    scheduler = make_scheduler(12, max_num_seqs=1, policy=policy)
    add(scheduler, 0, list(range(16)))
    outsider = add(scheduler, 9999, 8)
    for now in range(1, 500):
        add(scheduler, now, list(range(16)))
        step(scheduler)
        if outsider.finish_reason:
            assert is_served and now <= policy.patience + 3 * 4
            return
    assert not is_served


def test_urgent_ones_still_overtake() -> None:
    for policy, first in ((Priority(), [0, 9, 1, 2, 3]), (FirstComeFirstServed(), [0, 1, 2, 3, 9]), (LongestPrefixMatch(), [0, 1, 2, 3, 9])):
        scheduler, log = make_scheduler(max_num_seqs=1, policy=policy), []
        scheduler.events.subscribe(log.append)
        for i in range(4):
            add(scheduler, i, 3, 2)
        step(scheduler)
        add(scheduler, 9, 3, 2, priority=-1)
        while step(scheduler):
            pass
        assert [event.seq_id for event in log if event.kind == "finished"] == first


# the longest prefix


class Checked(LongestPrefixMatch):
    """Compares what is remembered with a match from the first token on."""

    def choose(self, state: SchedulerState) -> Sequence:
        for seq in state.waiting:
            known = num_known_tokens(state.cache, seq)
            assert known == state.cache.match(seq.token_ids, namespace_of(seq)).num_tokens
        return super().choose(state)


def test_what_is_remembered_agrees_with_a_fresh_match() -> None:
    """Also when blocks have been evicted, tails extended, roots forgotten, weights exchanged."""
    for seed in range(40):
        rng = random.Random(seed)
        engine = life_engine(rng, Checked(), max_num_seqs=rng.choice([1, 2]))
        oracle = Oracle(engine)
        for _ in range(80):
            random_move(rng, engine, oracle)
            if rng.random() < 0.05:
                engine.scheduler.cache.clear(new_weights=rng.random() < 0.5)
        drain(engine, oracle)
        check_whole(engine)


def test_a_look_goes_on_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(64)
    add(scheduler, 0, list(range(200)), 1)
    step(scheduler)
    seq = Sequence(1, array("i", range(200)), 200, greedy())
    assert num_known_tokens(scheduler.cache, seq) == 200 and seq.cursor is not None and seq.cursor.depth == 50
    monkeypatch.setattr(PrefixCache, "match", None)
    monkeypatch.setattr(PrefixCache, "roots", {}, raising=False)
    assert num_known_tokens(scheduler.cache, seq) == 200
    other = Sequence(2, array("i", range(200)), 200, greedy(cache_salt="other"))
    assert num_known_tokens(scheduler.cache, other) == 0, "salts are walls here, too"


def test_longest_prefix_is_first_and_the_preempted_before_it() -> None:
    scheduler = make_scheduler(16, max_num_seqs=1, policy=LongestPrefixMatch(window=3))
    add(scheduler, 0, list(range(12)), 1)
    step(scheduler)
    cold, warm, hot, beyond = add(scheduler, 1, 8), add(scheduler, 2, [*range(5), 99]), add(scheduler, 3, [*range(9), 99]), add(scheduler, 4, [*range(12)])
    assert scheduler.policy.choose(scheduler) is hot and scheduler.waiting == [cold, warm, hot, beyond]
    warm.status = SequenceStatus.PREEMPTED
    assert scheduler.policy.choose(scheduler) is warm
    warm.status = SequenceStatus.WAITING
    scheduler.num_steps += 1001
    assert scheduler.policy.choose(scheduler) is cold


def test_among_equals_the_earliest() -> None:
    scheduler = make_scheduler(16, policy=LongestPrefixMatch())
    seqs = [add(scheduler, i, 4) for i in range(3)]
    assert scheduler.policy.choose(scheduler) is seqs[0]


def test_hits_of_interleaved_prompts() -> None:
    """Four documents in turns, and a pool that keeps two: first come hits nothing, longest prefix reads each document once."""

    def hits(policy: SchedulingPolicy) -> int:
        scheduler, log = make_scheduler(12, max_num_seqs=2, policy=policy), []
        scheduler.events.subscribe(log.append)
        for i in range(40):
            add(scheduler, i, [*range(100 * (i % 4), 100 * (i % 4) + 16), 9000 + i], 3)
        while step(scheduler):
            pass
        return sum(event.num_tokens for event in log if event.kind == "hit")

    assert hits(FirstComeFirstServed()) == 0 and hits(LongestPrefixMatch()) == 36 * 16


def test_nothing_is_remembered_of_the_dead() -> None:
    scheduler = make_scheduler(16, max_num_seqs=1, policy=LongestPrefixMatch())
    add(scheduler, 0, list(range(12)), 8)
    step(scheduler), step(scheduler)
    seq = add(scheduler, 1, list(range(12)))
    num_known_tokens(scheduler.cache, seq)
    assert seq.cursor is not None
    scheduler.finish(seq, "abort")
    assert seq.cursor is None


# a long prompt among others


def gaps(scheduler: Scheduler, writers: list[Sequence], book: Sequence) -> list[int]:
    """Tokens of each step until the book's first token; every writer gets its own in each of them."""
    sizes = []
    while not book.num_output_tokens:
        shares = step(scheduler)
        assert all(shares[seq.seq_id] == 1 for seq in writers)
        sizes.append(sum(shares.values()))
    return sizes


@pytest.mark.parametrize(("chunk", "num_steps", "size"), [(None, 30, 2048), (512, 118, 520), (256, 235, 264)])
def test_prompt_of_60000_tokens_does_not_keep_writers_waiting(chunk: int | None, num_steps: int, size: int) -> None:
    """The pace of the writers is four times as even at 512, for 2 % more until the long prompt's first token."""
    scheduler = make_scheduler(4600, 16, max_prefill_chunk=chunk)
    writers = [add(scheduler, i, 16, 1000) for i in range(8)]
    step(scheduler)
    sizes = gaps(scheduler, writers, add(scheduler, 8, [5] * 60_000))
    assert len(sizes) == num_steps and max(sizes) == size
    assert sum(max(256, s) for s in sizes) < 1.04 * 60_240


@pytest.mark.parametrize(("limits", "pace", "wait"), [({"max_prefill_chunk": None}, 2008, 60_240), ({}, 518, 61_096)], ids=["unbounded", "default"])
def test_pace_of_writers_on_the_toy(limits: dict[str, None], pace: int, wait: int) -> None:
    """The same with a runner that notices every wrong slot. A step costs the larger of 256 and its tokens: time per output token
    of eight writers while 60,000 tokens are read, and time to the first token after those."""
    engine, costs = make_engine(4600, 16, **limits), []
    run = engine.runner.run
    engine.runner.run = lambda batch: costs.append(max(256, len(batch.token_ids))) or run(batch)
    prompts = [[i % 4] * (i + 1) for i in range(8)] + [[1, 2, 3] * 20_000]
    for prompt in prompts[:8]:
        engine.add_request(prompt, greedy(130))
    engine.step()
    costs.clear()
    book = engine.sequences[engine.add_request(prompts[8], greedy(2))]
    while not book.num_output_tokens:
        assert len(engine.step()) >= 8, "a writer got no token"
    assert (round(sum(costs) / len(costs)), sum(costs)) == (pace, wait)
    for seq in [book, *engine.drain()]:
        assert seq.output_token_ids == toy_reference(prompts[seq.seq_id], seq.num_output_tokens, VOCAB_SIZE)
    check_whole(engine)


def test_short_prompt_gets_past_a_long_one() -> None:
    """It arrives behind 600 tokens and gets its first token in the same step; unbounded, it waits for all of them."""
    for chunk, first in ((None, 37), (12, 0), (8, 0)):
        scheduler = make_scheduler(200, max_num_batched_tokens=16, max_prefill_chunk=chunk)
        add(scheduler, 0, 600), add(scheduler, 1, 4)
        assert next(i for i in range(100) if 1 in step(scheduler)) == first


def test_alone_a_prompt_fills_the_budget() -> None:
    scheduler = make_scheduler(200, max_num_batched_tokens=16, max_prefill_chunk=4)
    add(scheduler, 0, 100)
    assert step(scheduler) == {0: 16}
    add(scheduler, 1, 100)
    assert step(scheduler) == {0: 4, 1: 4}, "each has its chunk"
    scheduler.finish(scheduler.running[0], "abort")
    assert step(scheduler) == {1: 16}


def test_chunk_is_bounded_by_what_decodes_leave() -> None:
    scheduler = make_scheduler(200, max_num_batched_tokens=6, max_prefill_chunk=4)
    for i in range(4):
        add(scheduler, i, 1, 20)
    step(scheduler)
    add(scheduler, 4, 50)
    assert step(scheduler) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2}
    assert make_scheduler(max_prefill_chunk=None).max_prefill_chunk == 2048 and make_scheduler().max_prefill_chunk == 512
    with pytest.raises(ValueError, match="max_prefill_chunk=0"):
        make_scheduler(max_prefill_chunk=0)


# the one that was refused


def test_blocked_prompt_is_not_matched_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again when a block comes free or is published, and not while others just write."""
    scheduler, calls = make_scheduler(12, block_size=16, max_num_seqs=4), []
    first = add(scheduler, 0, 60, 60)
    step(scheduler)
    match = PrefixCache.match
    monkeypatch.setattr(PrefixCache, "match", lambda self, *args, **kwargs: calls.append(1) or match(self, *args, **kwargs))
    add(scheduler, 1, 150, 4)
    for _ in range(40):
        step(scheduler)
    assert len(calls) == 1 and not first.finish_reason
    while not first.finish_reason:
        step(scheduler)
    step(scheduler)
    assert [seq.seq_id for seq in scheduler.running] == [1] and len(calls) <= 3


def test_refusing_without_a_look_is_never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens, `ask_for_room` answers what `find_room` would; and often enough it does not have to look."""
    ask_for_room, find_room, count = scheduler_module.ask_for_room, scheduler_module.find_room, {"asked": 0, "looked": 0}

    def looking(*args: object) -> object:
        count["looked"] += 1
        return find_room(*args)

    def checked(state: SchedulerState, seq: Sequence, num_owed: int) -> object:
        count["asked"] += 1
        answer, expected = ask_for_room(state, seq, num_owed), find_room(state.cache, seq, num_owed)
        assert (answer is None) == (expected is None), "somebody was refused for whom there was room"
        assert answer is None or (answer.block_ids, answer.num_tokens) == (expected.block_ids, expected.num_tokens)
        return answer

    monkeypatch.setattr(scheduler_module, "find_room", looking)
    monkeypatch.setattr(scheduler_module, "ask_for_room", checked)
    for seed in range(80):
        rng = random.Random(seed)
        policy = rng.choice([None, FirstComeFirstServed(), LongestPrefixMatch()])
        live(rng, life_engine(rng, policy, max_num_seqs=8, max_num_batched_tokens=rng.choice([7, 64])))
    assert count["looked"] < 0.9 * count["asked"], count


def test_room_that_comes_from_adopting_a_block() -> None:
    """No block comes free, but one that is cached and idle is put to use, so that it need not be kept for the one that waits."""
    scheduler = make_scheduler(12, max_num_batched_tokens=20)
    add(scheduler, 0, list(range(16)), 1), add(scheduler, 1, list(range(16)), 9)
    assert step(scheduler) == {0: 16, 1: 4}
    scheduler.max_prefill_chunk = 4
    add(scheduler, 2, list(range(40)), 1)
    assert step(scheduler) == {1: 4} and scheduler.refused is not None
    assert step(scheduler) == {1: 4, 2: 4}


def test_failed_steps_and_impossible_requests_change_nothing() -> None:
    """A rollback puts everybody back at their places; a request that is refused gets none."""
    for policy in POLICIES.values():
        engine = make_engine(8, 4, policy=policy())
        oracle = Oracle(engine)
        for i in range(3):
            oracle.began(engine.add_request(random_prompt(random.Random(i), 10), random_params(random.Random(i))))
        with pytest.raises(RequestTooLong):
            engine.add_request([1] * 40)
        with pytest.raises(InvalidRequest):
            engine.fork(77)
        places = {seq_id: seq.order for seq_id, seq in engine.sequences.items()}
        fail_once(engine, "late")
        assert {seq.seq_id: seq.order for seq in engine.scheduler.waiting} == places
        drain(engine, oracle)
        check_whole(engine)
