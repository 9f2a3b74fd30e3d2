"""The loop, the toy, and the text: whatever the engine does with blocks, each sequence says what it would have said alone."""

from __future__ import annotations

from array import array

import pytest
from toy_world import check_whole, fail_once, greedy, make_engine, record

from pagedlit.memory.copy_on_write import BlockCopy
from pagedlit.serving.engine import BrokenRunner, Engine, RequestFailed, ToyRunner, build_engine, mix_seed, to_tokens, toy_reference, toy_text, toy_token, toy_value
from pagedlit.serving.scheduler import ForwardBatch, RunnerOutput
from pagedlit.serving.sequence import InvalidRequest, RequestTooLong, SamplingParams, Sequence, SequenceStatus

A, B = [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 0, 0]


def serve(engine: Engine) -> dict[int, list[int]]:
    """Drain, checking all the way; the answers by sequence id."""
    answers = {}
    while engine.sequences:
        answers |= {seq.seq_id: seq.output_token_ids for seq in engine.step() if seq.status is SequenceStatus.FINISHED}
        engine.check_invariants()
    return answers


def alone(prompt: list[int], max_tokens: int, vocab_size: int = 26, **kwargs: object) -> list[int]:
    return toy_reference(prompt, max_tokens, vocab_size, **kwargs)


# the toy


def test_value_depends_on_the_whole_prefix() -> None:
    first = toy_value(toy_value(0, 0, 5), 1, 6)
    assert first != toy_value(toy_value(0, 0, 4), 1, 6), "another token before it"
    assert first != toy_value(toy_value(0, 0, 5), 2, 6), "another position"
    assert first != toy_value(toy_value(0, 0, 5), 1, 7), "another token"


def test_token_depends_on_every_value_and_on_the_seed_only_when_sampling() -> None:
    values, other = array("I", [1, 2, 3]), array("I", [1, 9, 3])
    sampled = SamplingParams()
    assert toy_token(values, 0, greedy(), 10**6) != toy_token(other, 0, greedy(), 10**6)
    assert toy_token(values, 1, greedy(), 10**6) == toy_token(values, 2, greedy(), 10**6)
    assert toy_token(values, 1, sampled, 10**6) != toy_token(values, 2, sampled, 10**6)


def test_reference_continues_itself() -> None:
    assert alone(A, 8) == alone(A, 3) + alone(A + alone(A, 3), 5) and alone(A, 0) == []


def test_toy_copies_read_all_sources_first() -> None:
    """A copy's source may be another one's destination: the chain 0 -> 1, 1 -> 2 must not drag block 0 through."""
    runner = ToyRunner(3, 2)
    runner.pool = array("I", [10, 11, 20, 21, 30, 31])
    runner.copy(ForwardBatch(2, copies=[BlockCopy(0, 1, 2), BlockCopy(1, 2, 1)]))
    assert runner.pool.tolist() == [10, 11, 10, 11, 20, 31]


def test_toy_writes_everything_before_it_reads() -> None:
    """As a layer of a real model does: a sequence that writes into another's block garbles it in the same step."""
    engine = build_engine(runner := ToyRunner(8, 4), 8, 4)
    engine.add_request(A, greedy(2)), engine.add_request(B, greedy(2))
    batch = engine.scheduler.schedule()
    good = ToyRunner(8, 4).run(batch).token_ids
    batch.slot_mapping[-1] = batch.slot_mapping[0]
    bad = runner.run(batch).token_ids
    assert good[0] == alone(A, 1)[0] and bad[0] != good[0] and bad[1] != good[1]


def test_text() -> None:
    assert toy_text([0, 25, 26]) == "aza"


# seeds and requests


def test_mix_seed_is_splitmix64() -> None:
    assert [mix_seed(0, i) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert all(0 <= mix_seed(seed, 3) < 2**64 for seed in (-1, 2**64, 2**70, -(2**65)))


@pytest.mark.parametrize("bad", [[], [1, -1], [1, 2**31], ["a"], "abc", [1.5], None, 5, [[1]]], ids=str)
def test_bad_prompt_is_refused(bad: object) -> None:
    engine = make_engine(4, 4)
    with pytest.raises(InvalidRequest):
        engine.add_request(bad)
    assert not engine.sequences and not engine.scheduler.waiting


def test_prompts_of_many_kinds() -> None:
    assert to_tokens([1, 2]) == to_tokens((1, 2)) == to_tokens(array("q", [1, 2])) == to_tokens(range(1, 3)) == to_tokens(b"\x01\x02") == array("i", [1, 2])
    tokens = array("i", [1, 2])
    assert to_tokens(tokens) is not tokens, "the caller's array stays the caller's"


def test_request_that_never_fits_leaves_the_others_alone() -> None:
    """Gallery 5."""
    engine = make_engine(4, 4, 26)
    seq_id = engine.add_request(A, greedy(4))
    with pytest.raises(RequestTooLong):
        engine.add_request([1] * 16)
    assert serve(engine) == {seq_id: alone(A, 4)}
    check_whole(engine)


def test_unknown_limit_raises() -> None:
    """Gallery 21."""
    with pytest.raises(TypeError, match="max_seqs"):
        build_engine(ToyRunner(4, 4), 4, 4, max_seqs=3)


def test_sampling_is_reproducible_whatever_the_batch() -> None:
    params = SamplingParams(seed=11, max_tokens=8)
    engine = make_engine(32, 4, 26)
    first = engine.add_request(A, params)
    alone_text = serve(engine)[first]
    engine = make_engine(9, 4, 26, max_num_batched_tokens=5)
    ids = [engine.add_request(A, params) if i == 2 else engine.add_request([i] * 7, SamplingParams(max_tokens=8)) for i in range(4)]
    assert serve(engine)[ids[2]] == alone_text == alone(A, 8, seed=11, params=params)


def test_seeds_differ_between_requests_and_between_engines() -> None:
    def texts(seed: int) -> list[list[int]]:
        engine = make_engine(32, 4, 26, seed=seed)
        ids = [engine.add_request(A, SamplingParams(max_tokens=8)) for _ in range(3)]
        answers = serve(engine)
        return [answers[seq_id] for seq_id in ids]

    assert texts(0) == texts(0) and len({tuple(text) for text in texts(0) + texts(1)}) == 6


# the text is right


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("budget", [1, 4, 64])
@pytest.mark.parametrize("caching", [True, False])
def test_text_equals_the_unpaged_reference(block_size: int, budget: int, caching: bool) -> None:
    engine = make_engine(-(-48 // block_size), block_size, 26, max_num_batched_tokens=budget, enable_prefix_caching=caching)
    prompts = {engine.add_request(prompt, greedy(11)): prompt for prompt in (A, B, [7], A[:5], A, A + B)}
    assert serve(engine) == {seq_id: alone(prompt, 11) for seq_id, prompt in prompts.items()}
    check_whole(engine)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_hit_path_and_miss_path_agree(block_size: int) -> None:
    """Gallery 10: cold, warm, and warm by a partly matching block."""
    engine = make_engine(64, block_size, 26)
    cold = engine.add_request(A, greedy(9))
    assert serve(engine)[cold] == alone(A, 9)
    log = record(engine)
    warm, partial = engine.add_request(A, greedy(9)), engine.add_request(B, greedy(9))
    assert serve(engine) == {warm: alone(A, 9), partial: alone(B, 9)}
    assert [event.num_tokens for event in log if event.kind == "hit"] == [8, 5]


def test_conversation_starts_at_its_first_new_token() -> None:
    """The generated tokens are cached as well: the next turn computes its own tokens, and the last token of the answer."""
    engine = make_engine(32, 4, 26)
    first = engine.add_request(A, greedy(6))
    turn = A + serve(engine)[first] + [3, 1, 4]
    second = engine.add_request(turn, greedy(5))
    seq = engine.sequences[second]
    assert serve(engine)[second] == alone(turn, 5) and seq.num_cached_tokens == len(turn) - 4


def test_some_of_a_batch_hit() -> None:
    """Gallery 9, with the text."""
    engine = make_engine(64, 4, 26)
    engine.add_request(A, greedy(3))
    serve(engine)
    prompts = [A + [4], [9, 9], A[:6] + [0], A, [8] * 11]
    ids = [engine.add_request(prompt, greedy(7)) for prompt in prompts]
    answers = serve(engine)
    assert [answers[seq_id] for seq_id in ids] == [alone(prompt, 7) for prompt in prompts]


def test_preemption_does_not_change_the_text() -> None:
    for caching in (True, False):
        engine = make_engine(9, 2, 26, enable_prefix_caching=caching)
        log = record(engine)
        prompts = {engine.add_request(prompt, greedy(8)): prompt for prompt in (A[:4], B[:4], A[2:6])}
        assert serve(engine) == {seq_id: alone(prompt, 8) for seq_id, prompt in prompts.items()}
        assert any(event.kind == "preempted" for event in log)
        check_whole(engine)


def test_new_weights_in_the_middle() -> None:
    """Gallery 3: clearing the cache takes no block from a running sequence."""
    engine = make_engine(16, 4, 26)
    seq_id = engine.add_request(A, greedy(8))
    engine.step()
    engine.scheduler.cache.clear(new_weights=True)
    assert serve(engine) == {seq_id: alone(A, 8)} and not engine.scheduler.cache.nodes


def test_lone_sequence_that_outgrows_the_pool() -> None:
    """Gallery 5."""
    engine = make_engine(3, 4, 26)
    seq_id = engine.add_request(A, greedy(100))
    seq = engine.sequences[seq_id]
    assert serve(engine) == {seq_id: alone(A, 3)} and seq.finish_reason == "length"
    check_whole(engine)


def test_max_model_len_ends_an_answer() -> None:
    engine = make_engine(16, 4, 26, max_model_len=12)
    seq_id = engine.add_request(A, greedy(100))
    assert serve(engine) == {seq_id: alone(A, 3)}


def test_end_of_sequence_token_ends_an_answer() -> None:
    answer = alone(A, 20)
    engine = make_engine(16, 4, 26, eos_token_ids=[answer[4]])
    first, second = engine.add_request(A, greedy(20)), engine.add_request(A, greedy(20, ignore_eos=True))
    stop = answer.index(answer[4]) + 1
    assert serve(engine) == {first: answer[:stop], second: answer}


# forks


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_fork_continues_the_same_tokens(block_size: int) -> None:
    engine = make_engine(64, block_size, 26)
    parent = engine.add_request(A, greedy(12))
    for _ in range(4):
        engine.step()
    begun = engine.sequences[parent].token_ids.tolist()
    child, other = engine.fork(parent), engine.fork(parent, SamplingParams(seed=3, max_tokens=12))
    seed = engine.sequences[other].seed
    answers = serve(engine)
    assert answers[parent] == answers[child] == alone(A, 12)
    assert A + answers[other] == begun + alone(begun, len(A) + 12 - len(begun), seed=seed, params=SamplingParams())
    assert answers[other][:3] == answers[parent][:3] and answers[other] != answers[parent]
    check_whole(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6])
def test_fork_at_any_time(num_steps: int) -> None:
    """Before admission, mid-prefill, at the first token, later; and with a pool that is too small for both."""
    for num_blocks in (6, 32):
        engine = make_engine(num_blocks, 4, 26, max_num_batched_tokens=5)
        parent = engine.add_request(A, greedy(10))
        for _ in range(num_steps):
            engine.step()
        child = engine.fork(parent)
        assert serve(engine) == {parent: alone(A, 10), child: alone(A, 10)}
        check_whole(engine)


def test_fork_copies_once_and_only_what_is_valid() -> None:
    engine = make_engine(32, 4, 26, enable_prefix_caching=False)
    parent = engine.add_request(A, greedy(8))
    engine.step()
    log = record(engine)
    engine.fork(parent), engine.fork(parent)
    engine.step()
    assert [event.num_tokens for event in log if event.kind == "copied"] == [1, 1], "three share the block; the last to write keeps it"


def test_fork_of_a_tree() -> None:
    engine = make_engine(40, 3, 26)
    ids = [engine.add_request(A, greedy(14))]
    for _ in range(4):
        engine.step()
        ids += [engine.fork(seq_id) for seq_id in ids]
    assert serve(engine) == dict.fromkeys(ids, alone(A, 14)) and len(ids) == 16
    check_whole(engine)


def test_fork_of_what_is_not_there() -> None:
    engine = make_engine(16, 4, 26)
    seq_id = engine.add_request(A, greedy(2))
    serve(engine)
    with pytest.raises(InvalidRequest, match=f"sequence {seq_id} is not running or waiting"):
        engine.fork(seq_id)


def test_fork_stays_within_its_tenant() -> None:
    """Gallery 2: a child with another salt would publish its parent's blocks under a wall it is not behind."""
    engine = make_engine(16, 4, 26)
    parent = engine.add_request(A, greedy(9, cache_salt="a"))
    engine.step()
    for salt in (None, "b"):
        with pytest.raises(InvalidRequest, match="keeps its parent's salt"):
            engine.fork(parent, greedy(9, cache_salt=salt))
    assert list(engine.sequences) == [parent]
    engine.fork(parent, greedy(5, cache_salt="a"))
    serve(engine)


def test_fork_with_no_tokens_left() -> None:
    engine = make_engine(16, 4, 26)
    parent = engine.add_request(A, greedy(9))
    for _ in range(3):
        engine.step()
    with pytest.raises(InvalidRequest, match="max_tokens=3: the parent has generated 3 already"):
        engine.fork(parent, greedy(3))
    child = engine.fork(parent, greedy(4))
    assert len(serve(engine)[child]) == 4


# abort, failure


def test_abort_in_every_state() -> None:
    """Gallery 4: waiting, mid-prefill, decoding, preempted, forked, just finished; the others go on as if nothing had been."""
    for num_steps in range(14):
        for victim in range(4):
            engine = make_engine(6, 4, 26, max_num_batched_tokens=6, max_num_seqs=3)
            prompts = {engine.add_request(prompt, greedy(8)): prompt for prompt in (A, B, A[:3])}
            for _ in range(num_steps):
                engine.step()
            if engine.sequences:
                parent = min(engine.sequences)
                prompts[engine.fork(parent)] = prompts[parent]
            seq = engine.abort(victim)
            assert victim not in engine.sequences and (seq is None or seq.finish_reason == "abort")
            engine.check_invariants()
            for seq_id, answer in serve(engine).items():
                assert answer == alone(prompts[seq_id], 8)
            check_whole(engine)


def test_abort_of_a_finished_or_unknown_sequence() -> None:
    engine = make_engine(8, 4, 26)
    seq_id = engine.add_request(A, greedy(1))
    serve(engine)
    assert engine.abort(seq_id) is None and engine.abort(99) is None


def test_aborted_work_is_not_lost() -> None:
    """What had been computed stays in the cache: the user who presses stop and asks again hits it."""
    engine = make_engine(16, 4, 26)
    first = engine.add_request(A, greedy(9))
    for _ in range(3):
        engine.step()
    engine.abort(first)
    second = engine.add_request(A, greedy(9))
    seq = engine.sequences[second]
    assert serve(engine)[second] == alone(A, 9) and seq.num_cached_tokens == 8


@pytest.mark.parametrize("when", ["early", "late"])
def test_failing_step_costs_time_and_nothing_else(when: str) -> None:
    engine = make_engine(8, 4, 26, max_num_batched_tokens=6)
    prompts = {engine.add_request(prompt, greedy(7)): prompt for prompt in (A, B)}
    answers: dict[int, list[int]] = {}
    for _ in range(100):
        if engine.sequences:
            moved = fail_once(engine, when) + engine.step()
            engine.check_invariants()
            answers |= {seq.seq_id: seq.output_token_ids for seq in moved if seq.status is SequenceStatus.FINISHED}
    assert answers == {seq_id: alone(prompt, 7) for seq_id, prompt in prompts.items()}
    check_whole(engine)


def test_interrupt_is_rolled_back_too() -> None:
    class Interrupted(ToyRunner):
        def run(self, batch: ForwardBatch) -> RunnerOutput:
            raise KeyboardInterrupt

    engine = build_engine(Interrupted(8, 4), 8, 4)
    seq_id = engine.add_request(A, greedy(3))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check_invariants()
    engine.runner = ToyRunner(8, 4)
    assert serve(engine) == {seq_id: alone(A, 3)}


@pytest.mark.parametrize("extra", [-1, 1])
def test_runner_that_returns_another_number_of_tokens(extra: int) -> None:
    """It must not be taken in half."""

    class Miscounting(ToyRunner):
        def run(self, batch: ForwardBatch) -> RunnerOutput:
            token_ids = super().run(batch).token_ids
            return RunnerOutput(token_ids[:-1] if extra < 0 else [*token_ids, 1])

    engine = build_engine(Miscounting(16, 4), 16, 4)
    ids = [engine.add_request(A, greedy(3)), engine.add_request(B, greedy(3))]
    with pytest.raises(BrokenRunner, match=f"{2 + extra} tokens for 2 rows"):
        engine.step()
    engine.check_invariants()
    engine.runner = ToyRunner(16, 4)
    assert serve(engine) == dict(zip(ids, [alone(A, 3), alone(B, 3)], strict=True))


def test_step_reports_who_moved() -> None:
    engine = make_engine(16, 4, 26, max_num_batched_tokens=10)
    first, second = engine.add_request(A, greedy(2)), engine.add_request(B, greedy(2))
    assert [seq.seq_id for seq in engine.step()] == [first], "the second is not through with its prompt"
    assert [seq.seq_id for seq in engine.step()] == [first, second] and list(engine.sequences) == [second]
    assert [seq.seq_id for seq in engine.drain()] == [second] and engine.step() == []


def test_check_invariants_finds_a_leak_and_a_stranger() -> None:
    engine = make_engine(16, 4, 26)
    seq_id = engine.add_request(A, greedy(5))
    engine.step()
    engine.scheduler.cache.allocate(1)
    with pytest.raises(AssertionError, match="leaked"):
        engine.check_invariants()
    engine = make_engine(16, 4, 26)
    seq_id = engine.add_request(A, greedy(5))
    del engine.sequences[seq_id]
    with pytest.raises(AssertionError, match="disagree"):
        engine.check_invariants()


def test_sequences_are_compared_by_identity() -> None:
    first, second = (Sequence(0, array("i", [1]), 1, SamplingParams()) for _ in range(2))
    assert first != second


def test_failure_leaves_the_toy_readable() -> None:
    """`FlakyRunner` itself: it fails once, then works."""
    engine = make_engine(8, 4, 26)
    engine.add_request(A, greedy(1))
    fail_once(engine, "early")
    assert len(engine.step()) == 1


class Poisoned(ToyRunner):
    """Cannot compute token 25; in `rows` mode it returns an error for the row alone, else it raises."""

    in_rows = False

    def run(self, batch: ForwardBatch) -> RunnerOutput:
        output, bad = super().run(batch), {}
        for r, row in enumerate(batch.logits_rows):
            s = next(s for s in range(len(batch.seq_ids)) if batch.query_start_loc[s] <= row < batch.query_start_loc[s + 1])
            if 25 in batch.token_ids[batch.query_start_loc[s] : batch.query_start_loc[s + 1]]:
                bad[r] = ValueError("25")
        if bad and not self.in_rows:
            raise bad.popitem()[1]
        return output._replace(errors=bad)


@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_request_that_the_model_cannot_compute_ends_alone(in_rows: bool, n: int) -> None:
    """Among others, in small pools: the others get their texts, the pool is whole, and nothing wrong stays in the cache."""
    engine = build_engine(runner := Poisoned(12, 4), 12, 4, max_num_batched_tokens=9)
    runner.in_rows = in_rows
    prompts = {engine.add_request(prompt, greedy(5)): prompt for prompt in (A, B)}
    bad = engine.add_request([*A, 3, 25], greedy(5, n=n))
    prompts |= {engine.add_request(prompt, greedy(5)): prompt for prompt in ([*A, 3, 4], B)}
    ended = {}
    while engine.sequences:
        ended |= {seq.seq_id: seq for seq in engine.step() if seq.status is SequenceStatus.FINISHED}
        engine.check_invariants()
    errors = [ended.pop(seq_id) for seq_id in range(bad, bad + n)]
    for seq in errors:
        assert seq.finish_reason == "error" and seq.output_token_ids == [] and isinstance(seq.error, ValueError if in_rows else RequestFailed)
    if not in_rows:
        assert isinstance(errors[0].error.__cause__, ValueError)
    for seq_id, prompt in prompts.items():
        answer = alone(prompt, 5)
        if 25 in answer[:-1]:
            continue
        assert ended[seq_id].output_token_ids == answer and ended[seq_id].error is None
    keys = [node.key for node in engine.scheduler.cache.nodes.values()]
    assert not any((25).to_bytes(4, "little") in [key[i : i + 4] for i in range(0, len(key), 4)] for key in keys)
    check_whole(engine)


def test_model_that_always_raises_ends_every_request() -> None:
    class Broken(ToyRunner):
        def run(self, batch: ForwardBatch) -> RunnerOutput:
            raise OSError("gone")

    engine = build_engine(Broken(8, 4), 8, 4)
    ids = {engine.add_request(prompt, greedy(5)) for prompt in (A, B, A)}
    ended = {seq.seq_id: seq for seq in engine.drain()}
    assert set(ended) == ids and all(str(seq.error).endswith("OSError: gone") for seq in ended.values())
    check_whole(engine)


@pytest.mark.parametrize("num_blocks", [6, 9, 40])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 8])
def test_several_answers(num_blocks: int, enable_prefix_caching: bool, max_num_seqs: int) -> None:
    """n = 5 where five do not fit at a time, and with fewer seats than answers: one prompt computed, five texts, each with its seed."""
    engine = make_engine(num_blocks, 4, 26, max_num_seqs=max_num_seqs, enable_prefix_caching=enable_prefix_caching)
    log = record(engine)
    first = engine.add_request(A, SamplingParams(n=5, seed=3, max_tokens=9))
    answers = serve(engine)
    seeds = [3, *(mix_seed(3, index) for index in range(1, 5))]
    expected = [toy_reference(A, 9, 26, seed, SamplingParams()) for seed in seeds]
    assert [answers[first + i] for i in range(5)] == expected
    if num_blocks == 40 and max_num_seqs == 8:
        assert sum(e.num_tokens for e in log if e.kind == "scheduled") == len(A) + 5 * 8
    check_whole(engine)


def test_several_answers_of_one_token() -> None:
    engine = make_engine(8, 4, 26)
    first = engine.add_request(A, greedy(1, n=3))
    assert [(seq.seq_id, seq.finish_reason) for seq in engine.step()] == [(first + i, "length") for i in range(3)]
    check_whole(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_abort_of_several_answers(num_steps: int) -> None:
    """Before the first token, whoever would split off ends with the first; afterwards each is on its own."""
    engine = make_engine(16, 4, 26)
    first = engine.add_request(A, SamplingParams(n=3, max_tokens=9))
    seqs = [engine.sequences[first], *engine.sequences[first].forks]
    for _ in range(num_steps):
        engine.step()
    engine.abort(first)
    engine.check_invariants()
    assert [seq.finish_reason for seq in seqs] == (["abort"] * 3 if num_steps == 0 else ["abort", None, None])
    serve(engine)
    assert all(seq.status is SequenceStatus.FINISHED for seq in seqs)
    check_whole(engine)


def test_answers_with_a_seed_do_not_depend_on_the_engine() -> None:
    answers = []
    for num_before in (0, 3):
        engine = make_engine(64, 4, 26)
        for _ in range(num_before):
            engine.add_request(B, greedy(2))
        first = engine.add_request(A, SamplingParams(n=3, seed=7))
        texts = serve(engine)
        answers.append([texts[first + i] for i in range(3)])
    assert answers[0] == answers[1] and len(set(map(tuple, answers[0]))) == 3


@pytest.mark.parametrize("num_blocks", [6, 8, 30])
def test_held_sequences(num_blocks: int) -> None:
    """A held sequence gets no tokens, gives way if the others cannot move otherwise, and goes on when it is let go."""
    engine = make_engine(num_blocks, 4, 26)
    held = engine.add_request(A, greedy(9))
    engine.step()
    seq = engine.sequences[held]
    seq.held = True
    assert engine.step() == [], "everybody is held"
    others = {engine.add_request([*B, i], greedy(9)): [*B, i] for i in range(3)}
    answers = {}
    while len(engine.sequences) > 1:
        answers |= {each.seq_id: each.output_token_ids for each in engine.step() if each.finish_reason}
        engine.check_invariants()
    assert answers == {i: alone(prompt, 9) for i, prompt in others.items()} and seq.num_output_tokens == 1
    seq.held = False
    assert serve(engine) == {held: alone(A, 9)}
    check_whole(engine)


def test_prompt_logprobs_are_asked_for_once_each() -> None:
    """Cached tokens too, in chunks, through preemption; checked by `FlakyRunner`, which rates every token it is asked for."""
    engine = make_engine(10, 4, 26, max_num_batched_tokens=3)
    engine.add_request(A, greedy(3))
    serve(engine)
    seqs = [engine.sequences[engine.add_request(prompt, greedy(12, prompt_logprobs=0))] for prompt in (A, B, A)]
    plain = engine.sequences[engine.add_request(A, greedy(3))]
    serve(engine)
    for seq in seqs:
        assert [list(each) for each in seq.prompt_logprobs] == [[token_id] for token_id in seq.token_ids[1 : seq.num_prompt_tokens]]
        assert seq.num_cached_tokens == 0
    assert  plain.num_cached_tokens > 0 and plain.prompt_logprobs == []
