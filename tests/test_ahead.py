"""Planning ahead: every text is right, although the engine does not know the last token when it plans for the next one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from zlib import crc32

import pytest
import toy_world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_properties import EngineMachine, params, prompts
from test_mutations import make
from toy_world import FlakyDevice, check_whole, fail_once, greedy, make_ahead_engine, make_engine, random_life

from pagedlit.serving import ahead
from pagedlit.serving.ahead import AheadEngine, AheadScheduler, InFlight, Step, ToyDevice, build_ahead_engine, fill_in
from pagedlit.serving.engine import BrokenRunner, Engine, RequestFailed, build_engine, toy_reference
from pagedlit.serving.scheduler import ForwardBatch, RunnerOutput
from pagedlit.serving.sequence import SamplingParams, Sequence, SequenceStatus

A, B = [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 0, 0]


def alone(prompt: list[int], max_tokens: int, vocab_size: int = 26) -> list[int]:
    return toy_reference(prompt, max_tokens, vocab_size)


def serve(engine: Engine) -> dict[int, list[int]]:
    """Drain, checking all the way; the answers by sequence id."""
    answers = {}
    while engine.sequences:
        answers |= {seq.seq_id: seq.output_token_ids for seq in engine.step() if seq.status is SequenceStatus.FINISHED}
        engine.check_invariants()
    assert not isinstance(engine, AheadEngine) or not engine.scheduler.steps
    return answers


# any life


class AheadMachine(EngineMachine):
    """The same life, with a step in flight at every moment."""

    make = staticmethod(make_ahead_engine)


TestAheadEngine = AheadMachine.TestCase
TestAheadEngine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def live(num_lives: int = 80) -> None:
    """The same random lives every time."""
    for seed in range(num_lives):
        random_life(random.Random(seed), make=make_ahead_engine)


def test_random_lives() -> None:
    for seed in range(80, 200):
        random_life(random.Random(seed), make=make_ahead_engine)


# the same as without


class Remembering(FlakyDevice):
    """A toy whose penalties depend on every token said before, as they were when the step was submitted."""

    def submit(self, batch: ForwardBatch) -> toy_world.FlakyStep:
        copies = {r: history._replace(token_ids=history.token_ids[:]) for r, history in batch.histories.items()}
        return super().submit(replace(batch, histories=copies))

    def sample(self, batch: ForwardBatch, r: int) -> int:
        token_id, history = super().sample(batch, r) + batch.output_lens[r], batch.histories.get(r)
        if history is not None and batch.sampling[r].penalizes:
            token_id += crc32(history.token_ids.tobytes())
        token_id %= self.vocab_size
        return token_id if history is None or token_id not in history.banned else token_id + 1


any_params = st.builds(
    replace, params, n=st.sampled_from([1, 1, 1, 2, 3]), presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
    prompt_logprobs=st.sampled_from([None, None, 0]), min_tokens=st.sampled_from([0, 1]),
)  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(st.tuples(st.integers(0, 6), prompts, any_params), min_size=1, max_size=8),
    block_size=st.integers(1, 8), num_tokens=st.integers(30, 120), budget=st.integers(1, 40), num_seqs=st.integers(1, 8), caching=st.booleans(),
)  # fmt: skip
def test_same_answers_as_the_engine_that_waits(
    requests: list, block_size: int, num_tokens: int, budget: int, num_seqs: int, caching: bool
) -> None:
    """Penalties, min_tokens, several answers, chunks, hits, preemptions; requests arrive in the middle of other answers."""
    answers = []
    for build in (build_engine, build_ahead_engine):
        num_blocks = -(-num_tokens // block_size)
        engine = build(
            Remembering(num_blocks, block_size, 4), num_blocks, block_size, max_num_batched_tokens=budget, max_num_seqs=num_seqs,
            enable_prefix_caching=caching, eos_token_ids=[3],
        )  # fmt: skip
        seqs: list[Sequence] = []
        for num_steps, prompt, each in requests:
            seq = engine.sequences[engine.add_request(prompt, each)]
            seqs += [seq, *seq.forks]
            for _ in range(num_steps):
                engine.step()
                engine.check_invariants()
        serve(engine)
        check_whole(engine)
        answers.append([(seq.output_token_ids, seq.finish_reason, seq.stop_reason, seq.prompt_logprobs) for seq in seqs])
    assert answers[0] == answers[1]


def test_nobody_looks_early() -> None:
    """Two steps are in the queue before the first of them has been computed; every plan but the first was made without its tokens."""
    runner = ToyDevice(16, 4)
    waiting: list[int] = []
    submit = runner.submit
    runner.submit = lambda batch: (submit(batch), waiting.append(sum(step.output is None for step in runner.queue)))[0]  # type: ignore[method-assign]
    engine = build_ahead_engine(runner, 16, 4)
    seq_id = engine.add_request(A, greedy(8))
    assert serve(engine) == {seq_id: alone(A, 8)}
    assert waiting == [1] + [2] * 7 and engine.scheduler.num_ahead == 7 and engine.scheduler.num_steps == 8


def test_fill_in() -> None:
    batch = ForwardBatch(4)
    batch.token_ids.extend([5, -1, 7, -3, -1, -2])
    assert fill_in(batch.token_ids, [10, -1, 12]).tolist() == [5, 10, 7, 12, 10, 0], "a row that failed is filled with anything"


# who has a row


def rows(engine: AheadEngine) -> list[list[int]]:
    """Who has a row, by step."""
    seen: list[list[int]] = []
    submit = engine.runner.submit
    engine.runner.submit = lambda batch: (seen.append(list(batch.seq_ids)), submit(batch))[1]  # type: ignore[method-assign]
    return seen


def test_who_ends_by_length_has_no_row_too_many() -> None:
    engine = make_ahead_engine(16, 4, 26)
    seen = rows(engine)
    short, long = engine.add_request(A, greedy(3)), engine.add_request(B, greedy(5))
    assert serve(engine) == {short: alone(A, 3), long: alone(B, 5)}
    assert seen == [[short, long]] * 3 + [[long]] * 2


def test_max_model_len_is_known_ahead_too() -> None:
    engine = make_ahead_engine(16, 4, 26, max_model_len=12)
    seen = rows(engine)
    seq_id = engine.add_request(A, greedy(100))
    assert serve(engine) == {seq_id: alone(A, 3)} and seen == [[seq_id]] * 3


def test_who_stops_has_one_row_too_many() -> None:
    answer = alone(A, 20)
    engine = make_ahead_engine(16, 4, 26, eos_token_ids=[answer[4]])
    seen = rows(engine)
    first, second = engine.add_request(A, greedy(20)), engine.add_request(B, greedy(9, ignore_eos=True))
    stop = answer.index(answer[4]) + 1
    assert serve(engine) == {first: answer[:stop], second: alone(B, 9)}
    assert sum(first in each for each in seen) == stop + 1 and sum(second in each for each in seen) == 9
    check_whole(engine)


def test_last_step_is_not_waited_for_when_nobody_is_left() -> None:
    answer = alone(A, 20)
    engine = make_ahead_engine(16, 4, 26, eos_token_ids=[answer[4]])
    seq_id = engine.add_request(A, greedy(20))
    assert serve(engine) == {seq_id: answer[: answer.index(answer[4]) + 1]} and len(engine.runner.queue) <= 1
    other = engine.add_request(B, greedy(3, ignore_eos=True))
    assert serve(engine) == {other: alone(B, 3)}, "what is left in the queue is computed before, and disturbs nobody"


def test_admission_is_planned_ahead() -> None:
    """Who comes while a step runs is in the next one that is planned, beside tokens that are not known yet."""
    engine = make_ahead_engine(16, 4, 26)
    first = engine.add_request(A, greedy(9))
    engine.step()
    seen = rows(engine)
    second = engine.add_request(B, greedy(4))
    engine.step()
    assert seen == [[first, second]] and engine.scheduler.num_ahead == 2
    assert serve(engine) == {first: alone(A, 9), second: alone(B, 4)}


def test_chunks_are_planned_ahead() -> None:
    engine = make_ahead_engine(16, 4, 26, max_num_batched_tokens=2)
    seq_id = engine.add_request(A + A, greedy(3))
    assert serve(engine) == {seq_id: alone(A + A, 3)}
    assert engine.scheduler.num_ahead == engine.scheduler.num_steps - 1 == 9 + 2 - 1


@pytest.mark.parametrize("why", ["penalty", "steered"])
def test_who_needs_to_know_sits_out_every_other_step(why: str) -> None:
    """From the first token on; the last token of a prompt is known."""
    engine = make_ahead_engine(24, 4, 26, max_num_batched_tokens=10)
    seen = rows(engine)
    other = engine.add_request(B, greedy(9))
    seq = engine.sequences[engine.add_request(A, greedy(3, presence_penalty=1.0 if why == "penalty" else 0))]
    seq.steered = why == "steered"
    assert serve(engine) == {other: alone(B, 9), seq.seq_id: alone(A, 3)}
    mine = [seq.seq_id in each for each in seen]
    assert mine == [True, True, False, True, False, True] + [False] * 3 and all(other in each for each in seen)
    assert engine.scheduler.num_ahead == len(seen) - 1


@pytest.mark.parametrize("why", ["penalty", "steered"])
def test_if_most_need_to_know_all_wait(why: str) -> None:
    engine = make_ahead_engine(24, 4, 26)
    seen = rows(engine)
    seqs = [engine.sequences[engine.add_request(A, greedy(4, presence_penalty=float(why == "penalty" and i > 0)))] for i in range(3)]
    for seq in seqs[1:]:
        seq.steered = why == "steered"
    assert set(map(tuple, serve(engine).values())) == {tuple(alone(A, 4))} and engine.scheduler.num_ahead == 0
    assert seen == [[0, 1, 2]] * 4


def test_pool_that_is_full_waits_and_preempts() -> None:
    engine = make_ahead_engine(9, 2, 26)
    log = toy_world.record(engine)
    answers = {engine.add_request(prompt, greedy(8)): prompt for prompt in (A[:4], B[:4], A[2:6])}
    assert serve(engine) == {seq_id: alone(prompt, 8) for seq_id, prompt in answers.items()}
    assert any(event.kind == "preempted" for event in log) and 0 < engine.scheduler.num_ahead < engine.scheduler.num_steps - 1
    check_whole(engine)


def test_sampled_answers_of_a_request_split_off_while_the_first_is_ahead() -> None:
    texts = []
    for build in (make_engine, make_ahead_engine):
        engine = build(24, 4, 26)
        engine.add_request(A, SamplingParams(n=4, max_tokens=6, seed=3))
        texts.append(serve(engine))
    assert texts[0] == texts[1] and len(texts[0]) == 4 and len(set(map(tuple, texts[0].values()))) == 4
    assert engine.scheduler.num_ahead == engine.scheduler.num_steps - 1


# forks, aborts and failures between steps


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 6])
def test_fork_of_what_is_in_flight(block_size: int, num_steps: int) -> None:
    engine = make_ahead_engine(64, block_size, 26, max_num_batched_tokens=5)
    parent = engine.add_request(A, greedy(10))
    for _ in range(num_steps):
        engine.step()
    known = engine.sequences[parent].token_ids.tolist()
    child = engine.fork(parent)
    assert engine.sequences[child].token_ids.tolist() == known
    grandchild = engine.fork(child)
    engine.check_invariants()
    assert serve(engine) == dict.fromkeys((parent, child, grandchild), alone(A, 10))
    check_whole(engine)


def test_abort_in_flight_frees_its_blocks_at_once() -> None:
    for num_steps in range(12):
        engine = make_ahead_engine(8, 4, 26, max_num_batched_tokens=6)
        answers = {engine.add_request(prompt, greedy(8)): prompt for prompt in (A, B)}
        for _ in range(num_steps):
            engine.step()
        engine.abort(0)
        engine.check_invariants()
        others = {engine.add_request(prompt, greedy(5)): prompt for prompt in (A[:6], A)}
        served = serve(engine)
        assert served.pop(1, alone(B, 8)) == alone(B, 8)
        assert {seq_id: served[seq_id] for seq_id in others} == {seq_id: alone(prompt, 5) for seq_id, prompt in others.items()}
        check_whole(engine)
        assert answers


@pytest.mark.parametrize("when", ["early", "late", "lost"])
def test_failing_step_costs_time_and_nothing_else(when: str) -> None:
    engine = make_ahead_engine(12, 4, 26, max_num_batched_tokens=6)
    prompts = {engine.add_request(prompt, greedy(7)): prompt for prompt in (A, B)}
    answers: dict[int, list[int]] = {}
    for _ in range(200):
        if engine.sequences:
            moved = fail_once(engine, when) + engine.step() + (engine.step() if engine.sequences else [])
            engine.check_invariants()
            answers |= {seq.seq_id: seq.output_token_ids for seq in moved if seq.status is SequenceStatus.FINISHED}
    assert answers == {seq_id: alone(prompt, 7) for seq_id, prompt in prompts.items()}
    check_whole(engine)


@pytest.mark.parametrize("at_submit", [True, False])
def test_only_the_guilty_one_fails(at_submit: bool) -> None:
    class Poisoned(ToyDevice):
        def submit(self, batch: ForwardBatch) -> ahead.ToyStep:
            if at_submit and 99 in batch.token_ids:
                raise MemoryError("too much")
            return super().submit(batch)

        def compute(self, batch: ForwardBatch) -> RunnerOutput:
            if 99 in batch.token_ids:
                raise MemoryError("too much")
            return super().compute(batch)

    engine = build_ahead_engine(Poisoned(32, 4), 32, 4)
    good = {engine.add_request(prompt, greedy(9)): prompt for prompt in (A, B)}
    for _ in range(3):
        engine.step()
    bad = engine.sequences[engine.add_request([0, 99, 0], greedy(9, n=2))]
    late = engine.add_request(A + B, greedy(4))
    served = serve(engine)
    assert isinstance(bad.error, RequestFailed) and isinstance(bad.error.__cause__, MemoryError) and bad.finish_reason == "error"
    assert {seq_id: served[seq_id] for seq_id in good} == {seq_id: alone(prompt, 9) for seq_id, prompt in good.items()}
    assert served[late] == alone(A + B, 4)
    check_whole(engine)


def test_bad_row_ends_its_own_sequence() -> None:
    """Its row in the step after is thrown away, whatever it brings."""

    class BadRow(ToyDevice):
        def compute(self, batch: ForwardBatch) -> RunnerOutput:
            output = super().compute(batch)
            bad = [r for r, row in enumerate(batch.logits_rows) if batch.seq_ids[[s > row for s in batch.query_start_loc].index(True) - 1] == 0]
            errors = {r: ValueError("bad row") for r in bad if batch.output_lens[r] >= 2}
            return RunnerOutput([-1 if r in errors else token_id for r, token_id in enumerate(output.token_ids)], errors=errors)

    engine = build_ahead_engine(BadRow(16, 4), 16, 4)
    bad, good = (engine.sequences[engine.add_request(prompt, greedy(7))] for prompt in (A, B))
    assert serve(engine)[good.seq_id] == alone(B, 7)
    assert bad.finish_reason == "error" and isinstance(bad.error, ValueError) and bad.output_token_ids == alone(A, 2) and not good.error
    check_whole(engine)


def test_logprobs_stay_with_their_sequences() -> None:
    """After rows of the gone have been thrown away, too."""

    class Rating(ToyDevice):
        def compute(self, batch: ForwardBatch) -> RunnerOutput:
            output = super().compute(batch)
            asked = [r for r, each in enumerate(batch.sampling) if each.logprobs is not None]
            return output._replace(logprobs={r: {output.token_ids[r]: r} for r in asked})

    engine = build_ahead_engine(Rating(32, 4), 32, 4)
    stop = alone(A, 3)[2]
    seqs = [engine.sequences[engine.add_request(A, greedy(9, stop_token_ids=[stop]))]]
    seqs += [engine.sequences[engine.add_request(prompt, greedy(9, logprobs=0))] for prompt in (B, A + B)]
    serve(engine)
    for seq in seqs[1:]:
        assert [list(each) for each in seq.logprobs] == [[token_id] for token_id in seq.output_token_ids] and len(seq.logprobs) == 9
    assert seqs[0].finish_reason == "stop" and not seqs[0].logprobs


@pytest.mark.parametrize("where", ["submit", "result"])
def test_interrupt_takes_back_both_steps(where: str) -> None:
    class Interrupted(ToyDevice):
        def submit(self, batch: ForwardBatch) -> ahead.ToyStep:
            if where == "submit" and self.queue:
                raise KeyboardInterrupt
            return super().submit(batch)

        def compute(self, batch: ForwardBatch) -> RunnerOutput:
            if where == "result":
                raise KeyboardInterrupt
            return super().compute(batch)

    engine = build_ahead_engine(Interrupted(8, 4), 8, 4)
    seq_id = engine.add_request(A, greedy(3))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check_invariants()
    assert not engine.scheduler.steps and not engine.suspects
    engine.runner = ToyDevice(8, 4)
    assert serve(engine) == {seq_id: alone(A, 3)}


@pytest.mark.parametrize("extra", [-1, 1])
def test_runner_that_returns_another_number_of_tokens(extra: int) -> None:
    class Miscounting(ToyDevice):
        def compute(self, batch: ForwardBatch) -> RunnerOutput:
            token_ids = super().compute(batch).token_ids
            return RunnerOutput(token_ids[:-1] if extra < 0 else [*token_ids, 1])

    engine = build_ahead_engine(Miscounting(16, 4), 16, 4)
    ids = [engine.add_request(A, greedy(1)), engine.add_request(B, greedy(1))]
    with pytest.raises(BrokenRunner, match=f"{2 + extra} tokens for 2 rows"):
        engine.step()
    engine.check_invariants()
    engine.runner = ToyDevice(16, 4)
    assert serve(engine) == dict(zip(ids, [alone(A, 1), alone(B, 1)], strict=True))


def copying_engine() -> tuple[AheadEngine, int]:
    """An engine with a sequence whose last block is being copied by the step in flight."""
    engine = build_ahead_engine(ToyDevice(8, 16), 8, 16)
    first = engine.add_request(A[:6], greedy(20))
    engine.step(), engine.step()
    second = engine.fork(first)
    engine.step()
    [copy] = engine.scheduler.steps[0].batch.copies
    for seq_id in (first, second):
        if copy.dst in engine.sequences[seq_id].table.block_ids:
            return engine, seq_id
    raise AssertionError("nobody owns the copy")


@pytest.mark.parametrize("what", ["abort", "fork"])
def test_copy_that_is_under_way_is_not_relied_on(what: str) -> None:
    """The step that copies is lost. Who ended meanwhile has not published the block; who split off has not read it."""
    engine, seq_id = copying_engine()
    tokens = engine.sequences[seq_id].token_ids.tolist()
    child = engine.fork(seq_id) if what == "fork" else None
    if child is None:
        engine.abort(seq_id)
    else:
        for seq in engine.sequences.values():  # the child's step is not planned ahead: it would be taken back as well
            seq.steered = seq.seq_id != child
    step, device = engine.scheduler.steps[0], engine.runner
    device.queue.clear()
    step.pending = type("Lost", (), {"result": lambda self: (_ for _ in ()).throw(MemoryError("lost"))})()
    assert engine.step() == [] and engine.suspects
    other = engine.add_request(tokens + [1], greedy(5))
    answers = serve(engine)
    assert answers[other] == alone(tokens + [1], 5)
    assert child is None or answers[child] == answers[seq_id] == alone(A[:6], 20)
    check_whole(engine)


# mistakes on purpose


def publish_ahead(look_ahead: Callable) -> Callable:
    """What the step in flight computes is published when the next one is planned."""

    def careless(step: Step, max_model_len: int) -> None:
        look_ahead(step, max_model_len)
        for seq, _ in step.wanted():
            if seq.table is not None:
                seq.cursor = seq.table.pool.publish(seq.cursor, seq.table, seq.token_ids, seq.num_computed_tokens)

    return careless


def release_ahead(schedule_ahead: Callable) -> Callable:
    """The blocks that the step ahead has been given are given back with the rest of what was looked up."""

    def careless(self: AheadScheduler) -> ForwardBatch | None:
        before = {seq: len(seq.table) for seq in self.running}
        batch = schedule_ahead(self)
        for seq, num_blocks in before.items():
            ahead.trim(seq.table, num_blocks * self.block_size)
        return batch

    return careless


def last_step_only(rollback: Callable) -> Callable:
    """Only the step that has failed is taken back."""

    def careless(self: InFlight) -> None:
        kept, self.steps = self.steps[1:], self.steps[:1]
        rollback(self)
        self.steps = kept

    return careless


def count_the_living(sampled_rows: Callable) -> Callable:
    """The rows of the gone are not counted."""

    def careless(self: Step) -> dict[int, int]:
        living = [s for s in sampled_rows(self) if self.shares[s].seq.status is not SequenceStatus.FINISHED]
        return {s: place for place, s in enumerate(living)}

    return careless


def keep_forks(look_ahead: Callable) -> Callable:
    """The answers that are about to split off are asked for a second token, in the first one's name."""

    def careless(step: Step, max_model_len: int) -> None:
        forks = [(seq, seq.forks) for seq, _ in step.wanted()]
        look_ahead(step, max_model_len)
        for seq, each in forks:
            seq.forks = each

    return careless


def newest_first(work: Callable) -> Callable:
    """The device computes what was submitted last."""

    def careless(self: ToyDevice) -> None:
        self.queue.rotate(1)
        work(self)

    return careless




def write_late(compute: Callable) -> Callable:
    """What a step writes arrives once more, after the next step."""

    def careless(self: ToyDevice, batch: ForwardBatch) -> RunnerOutput:
        output = compute(self, batch)
        for slot, value in getattr(self, "late", {}).items():
            self.pool[slot] = value
        self.late = {slot: self.pool[slot] for slot in batch.slot_mapping}
        return output

    return careless


MISTAKES: dict[str, tuple[object, str, Callable]] = {  # what goes wrong: where, and how
    "blocks are published ahead": (ahead, "look_ahead", publish_ahead),
    "blocks of the step ahead are given back": (AheadScheduler, "schedule_ahead", release_ahead),
    "the rows of the gone are taken in": (ahead, "without_the_gone", lambda f: lambda step, output: output),
    "the gone are waited for as if they were there": (Step, "wanted", lambda f: lambda self: self.shares),
    "the rows of the gone are not counted": (Step, "sampled_rows", count_the_living),
    "the wrong row of the step before": (ahead, "placeholder", lambda f: lambda row: f(row ^ 1)),
    "tokens of two steps before": (ToyDevice, "compute", lambda f: stale_tokens(f)),
    "writes come late": (ToyDevice, "compute", write_late),
    "steps take effect out of order": (ToyDevice, "work", newest_first),
    "placeholders are not filled in": (ahead, "fill_in", lambda f: lambda token_ids, sampled: f(token_ids, [0] * 99)),
    "answers that split off are asked twice": (ahead, "look_ahead", keep_forks),
    "a child keeps the blocks of the step ahead": (ahead, "trim", lambda f: lambda table, num_tokens: None),
    "a failed step leaves the next one in flight": (InFlight, "rollback", last_step_only),
    "a full pool is not noticed": (ahead, "num_blocks_wanted", lambda f: lambda scheduler: 0),
}


def stale_tokens(compute: Callable) -> Callable:
    """The device fills in what it sampled one step too early."""

    def careless(self: ToyDevice, batch: ForwardBatch) -> RunnerOutput:
        now, before = self.sampled, getattr(self, "before", self.sampled)
        self.before = now
        self.sampled = before if len(before) >= len(now) else now
        return compute(self, batch)

    return careless


def test_there_are_as_many_as_the_chapter_says() -> None:
    assert len(MISTAKES) == 14


def test_without_a_mistake_all_is_well() -> None:
    live()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(mistake, monkeypatch, MISTAKES)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError, StopIteration, RuntimeError, toy_world.BadBatch)):
        live()


GARBLES = [  # the text alone gives them away
    "blocks are published ahead", "placeholders are not filled in", "the wrong row of the step before", "tokens of two steps before",
    "writes come late", "steps take effect out of order", "the rows of the gone are not counted",
]


@pytest.mark.parametrize("mistake", GARBLES)
def test_text_alone_gives_it_away(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "check_invariants", lambda self: None)
    monkeypatch.setattr(toy_world, "check_batch", lambda batch, num_blocks: None)
    make(mistake, monkeypatch, MISTAKES)
    with pytest.raises(AssertionError, match=r"sequence \d+: .* is not"):
        live()


def test_penalties_that_do_not_wait_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for _ in range(2):
        engine = build_ahead_engine(Remembering(16, 4), 16, 4)
        engine.add_request(A, greedy(6, presence_penalty=1.0))
        answers.append(serve(engine))
        monkeypatch.setattr(ahead, "needs_to_know", lambda seq: seq.steered)
    assert answers[0] != answers[1] and engine.scheduler.num_ahead


@pytest.mark.parametrize("what", ["abort", "fork"])
def test_relying_on_a_copy_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "is_being_copied", lambda *args: False)
    with pytest.raises(AssertionError):
        test_copy_that_is_under_way_is_not_relied_on(what)
