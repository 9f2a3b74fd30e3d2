"""Beam search: the answers and scores of `generate(num_beams=k)`, whatever the pool, the blocks and the company; and nothing is left behind."""

from __future__ import annotations

import signal
from array import array
from bisect import bisect_right
from collections import Counter
from math import exp, inf, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import GPT2, build
from test_parity import random_model as parity_model
from toy_world import FlakyRunner, check_whole

from pagedlit.llm import LLM, BeamSearcher
from pagedlit.serving.beam_search import BeamSearch, BeamSearchOutput, BeamSearchParams, is_decided, score_of
from pagedlit.serving.engine import BrokenRunner, Engine, RequestFailed, build_engine, mix_seed, toy_reference, toy_value
from pagedlit.serving.scheduler import ForwardBatch, RunnerOutput
from pagedlit.serving.sequence import InvalidRequest, Logprob, RequestTooLong, SamplingParams

EOS, VOCAB_SIZE = 3, 8
A, B, C = [1, 2, 0, 4, 5, 6, 7, 1, 2], [1, 2, 0, 4, 5, 0, 0], [7]
NEVER = "never"


# a toy with a distribution, and beam search over lists


def toy_rates(values: array, vocab_size: int) -> list[float]:
    """Log-probabilities that depend on every value."""
    weights = [4 * mix_seed(values[-1] ^ sum(values), token_id) / 2**64 for token_id in range(vocab_size)]
    total = log(sum(map(exp, weights)))
    return [weight - total for weight in weights]


class ToyBeams(FlakyRunner):
    """A toy that checks its batches, says how likely each token was, and cannot compute some token sequences."""

    cannot: tuple[int, ...] | None = None

    def run(self, batch: ForwardBatch) -> RunnerOutput:
        output = super().run(batch)
        if self.cannot is not None and any(self.tokens(batch, s)[-1:] == self.cannot[-1:] for s in range(len(batch.seq_ids))):
            raise MemoryError("not that one")
        asked = [r for r, params in enumerate(batch.sampling) if params.logprobs is not None]
        return output._replace(logprobs={r: self.rate(batch, r) for r in asked})

    def tokens(self, batch: ForwardBatch, s: int) -> tuple[int, ...]:
        return tuple(batch.token_ids[batch.query_start_loc[s] : batch.query_start_loc[s + 1]])

    def rate(self, batch: ForwardBatch, r: int) -> dict[int, Logprob]:
        s = bisect_right(batch.query_start_loc, batch.logits_rows[r]) - 1
        rates = toy_rates(self.read(batch, s, batch.seq_lens[s]), self.vocab_size)
        best = sorted(range(self.vocab_size), key=lambda token_id: -rates[token_id])[: batch.sampling[r].logprobs]
        return {token_id: Logprob(rates[token_id], rank) for rank, token_id in enumerate(best, 1)}


def toy_values(tokens: list[int]) -> array:
    values = array("I")
    for position, token_id in enumerate(tokens):
        values.append(toy_value(values[-1] if values else 0, position, token_id))
    return values


def reference(prompt, k, max_tokens, length_penalty=1.0, early_stopping=False, eos=frozenset({EOS}), vocab_size=VOCAB_SIZE):
    """`_beam_search` of transformers 5, written again over lists, with all continuations of all beams: (tokens, score), best first."""
    running, done = [(0.0, list(prompt))], []
    for length in range(1, max_tokens + 1):
        found = sorted(
            ((total + rate, i, token_id) for i, (total, tokens) in enumerate(running) for token_id, rate in enumerate(toy_rates(toy_values(tokens), vocab_size))),
            key=lambda each: (-each[0], each[1], each[2]),
        )
        stops = [token_id in eos or length == max_tokens for _, _, token_id in found]
        done += [(total / length**length_penalty, [*running[i][1], token_id]) for (total, i, token_id), stop in list(zip(found, stops))[:k] if stop]
        done = sorted(done, key=lambda each: -each[0])[:k]
        running = [(total, [*running[i][1], token_id]) for (total, i, token_id), stop in zip(found, stops) if not stop][:k]
        if not running or len(done) == k and (early_stopping is True or k == 1):
            break
        hoped = max_tokens if early_stopping == NEVER and length_penalty > 0 else length
        worst = done[-1][0] if len(done) == k else -inf
        if running[0][0] / hoped**length_penalty <= worst:
            break
    return [(tokens, score) for score, tokens in done]


def toy_engine(num_blocks: int = 64, block_size: int = 4, **limits: object) -> Engine:
    limits = {"eos_token_ids": [EOS], **limits}
    return build_engine(ToyBeams(num_blocks, block_size, VOCAB_SIZE), num_blocks, block_size, **limits)


def begin(engine: Engine, prompt: list[int], *args: object, **kwargs: object) -> BeamSearch:
    search = BeamSearch(engine, BeamSearchParams(*args, **kwargs))
    search.begin(prompt)
    return search


def run(engine: Engine, *searches: BeamSearch, every: int = 1, max_steps: int = 5000) -> dict[int, list[int]]:
    """Step until nothing is left to do, checking all the way; the answers of the other sequences."""
    others = {}
    for step in range(max_steps):
        if not engine.sequences:
            return others
        moved, mine = engine.step(), {beam.seq for search in searches for beam in search.beams}
        for search in searches:
            search.after_step(moved)
        others |= {seq.seq_id: seq.output_token_ids for seq in moved if seq.finish_reason and seq not in mine}
        if step % every == 0:
            engine.check_invariants()
    raise AssertionError(f"not done after {max_steps} steps: a livelock")


def assert_same(output: BeamSearchOutput, want: list[tuple[list[int], float]]) -> None:
    assert output.error is None and [each.tokens for each in output.sequences] == [tokens for tokens, _ in want]
    assert [each.score for each in output.sequences] == pytest.approx([score for _, score in want], abs=1e-9)


# what is asked, and what is worth what


@pytest.mark.parametrize(
    "bad",
    [
        dict(beam_width=0), dict(beam_width=True), dict(beam_width=2.0), dict(beam_width=None), dict(max_tokens=0), dict(max_tokens="9"),
        dict(length_penalty=inf), dict(length_penalty=float("nan")), dict(length_penalty=17), dict(length_penalty="1"), dict(early_stopping=1),
        dict(early_stopping=0), dict(early_stopping=None), dict(early_stopping="always"), dict(ignore_eos=1), dict(cache_salt=3), dict(priority=0.5),
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused_by_name(bad: dict) -> None:
    with pytest.raises(InvalidRequest, match=f"^{next(iter(bad))}="):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **bad})


def test_scores() -> None:
    assert score_of(-6.0, 4, 1) == -1.5 and score_of(-6.0, 4, 0) == -6.0 and score_of(-6.0, 4, -1) == -24.0 and score_of(-6.0, 4, 2) == -0.375


def test_a_search_that_lacks_answers_is_never_decided() -> None:
    for early_stopping in (True, False, NEVER):
        assert not is_decided(BeamSearchParams(2, 9, early_stopping=early_stopping), [-0.1], -99.0, 3, 9)


def test_never_hopes_for_the_length_that_flatters_most() -> None:
    """The longest one if the penalty is positive; otherwise a longer answer is only worse."""
    for penalty, scores, decided in ((1.0, [-1.0, -1.5], False), (2.0, [-1.0, -1.5], False), (-1.0, [-20.0, -30.0], False), (-1.0, [-20.0, -25.0], True)):
        assert is_decided(BeamSearchParams(2, 20, length_penalty=penalty, early_stopping=NEVER), scores, -6.4, 4, 20) is decided


def test_four_beams_find_what_greedy_misses() -> None:
    better = 0
    for seed in range(20):
        prompt = [mix_seed(seed, i) % VOCAB_SIZE for i in range(5)]
        [greedy], [wide, *_] = reference(prompt, 1, 8, eos=frozenset()), reference(prompt, 4, 8, eos=frozenset())
        better += wide[1] > greedy[1]
    assert better > 10


# the toy: any pool, any company


@pytest.mark.parametrize("early_stopping", [True, False, NEVER])
@pytest.mark.parametrize("length_penalty", [0, 1.0, 2.0, -1])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_equals_the_reference(k: int, length_penalty: float, early_stopping: bool | str) -> None:
    rules = dict(length_penalty=length_penalty, early_stopping=early_stopping)
    engine = toy_engine()
    searches = [begin(engine, prompt, k, 12, **rules) for prompt in (A, B, C)]
    run(engine, *searches)
    for search, prompt in zip(searches, (A, B, C)):
        assert_same(search.output, reference(prompt, k, 12, **rules))
    check_whole(engine)


def test_some_end_early_and_some_at_the_last_token() -> None:
    """The cases above are not all alike."""
    outputs = {str([reference(prompt, k, 12, 2.0, rule) for prompt in (A, B, C) for k in (2, 3, 4)]) for rule in (True, False, NEVER)}
    assert len(outputs) == 3
    lengths = {len(tokens) - len(prompt) for prompt in (A, B, C) for tokens, _ in reference(prompt, 3, 12)}
    assert len(lengths) > 2


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 3}, {"max_num_seqs": 1}, {"max_num_seqs": 3}], ids=str)
def test_small_pools_and_budgets(block_size: int, caching: bool, limits: dict) -> None:
    """Room for one and a half beams; beams are preempted, computed again, and held meanwhile."""
    engine = toy_engine(-(-21 // block_size) + 2, block_size, enable_prefix_caching=caching, **limits)
    searches = [begin(engine, A, 4, 12, ignore_eos=True), begin(engine, B, 3, 10)]
    ordinary = engine.add_request([*C, 1], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    others = run(engine, *searches)
    assert_same(searches[0].output, reference(A, 4, 12, eos=frozenset()))
    assert_same(searches[1].output, reference(B, 3, 10))
    assert others == {ordinary: toy_reference([*C, 1], 8, VOCAB_SIZE)}
    check_whole(engine)


def test_beams_are_preempted_and_forked_while_they_wait() -> None:
    engine = toy_engine(6, 4)
    engine.scheduler.events.subscribe((log := []).append)
    search = begin(engine, A, 4, 12, ignore_eos=True)
    run(engine, search)
    assert sum(event.kind == "preempted" for event in log) > 5
    assert_same(search.output, reference(A, 4, 12, eos=frozenset()))


prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12)
rules = st.fixed_dictionaries(
    dict(
        beam_width=st.integers(1, 6), max_tokens=st.integers(1, 9), length_penalty=st.sampled_from([-1, 0, 0.5, 1, 2]),
        early_stopping=st.sampled_from([True, False, NEVER]), ignore_eos=st.booleans(), cache_salt=st.sampled_from([None, "a"]), priority=st.integers(-1, 1),
    )
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(prompts, rules), min_size=1, max_size=3), st.sampled_from([1, 2, 3, 5]), st.integers(0, 12), st.integers(1, 12),
    st.integers(1, 6), st.booleans(), st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=3), st.integers(0, 30),
)  # fmt: skip
def test_any_searches_in_any_engine(tasks, block_size, spare, budget, max_num_seqs, caching, eos, fails_at) -> None:
    """Several searches at once, pools that hold little more than one beam, several end tokens, and a step that fails once."""
    engine = toy_engine(
        -(-22 // block_size) + spare, block_size, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, enable_prefix_caching=caching, eos_token_ids=sorted(eos)
    )
    searches = [begin(engine, prompt, **given_rules) for prompt, given_rules in tasks]
    step = 0
    while not all(search.finished for search in searches):
        if step == fails_at:
            engine.runner.fails = "late"
        moved, step = engine.step(), step + 1
        for search in searches:
            search.after_step(moved)
        engine.check_invariants()
        assert step < 5000, "a livelock"
    for search, (prompt, each) in zip(searches, tasks):
        want = reference(
            prompt, each["beam_width"], each["max_tokens"], each["length_penalty"], each["early_stopping"], frozenset() if each["ignore_eos"] else frozenset(eos)
        )
        assert_same(search.output, want)
    check_whole(engine)


def test_equal_scores_are_resolved_by_beam_and_then_by_token(monkeypatch) -> None:
    """With all tokens alike, the beams are those with the smallest tokens, in order."""
    monkeypatch.setattr(ToyBeams, "rate", lambda self, batch, r: {t: Logprob(-2.0, 1) for t in reversed(range(VOCAB_SIZE))})
    engine = toy_engine(eos_token_ids=[])
    search = begin(engine, C, 3, 2)
    run(engine, search)
    assert [each.output_token_ids for each in search.output.sequences] == [[0, 0], [0, 1], [0, 2]]
    assert [each.cum_logprob for each in search.output.sequences] == [-4.0] * 3


def test_what_an_answer_holds() -> None:
    engine = toy_engine()
    search = begin(engine, A, 3, 12)
    run(engine, search)
    reasons = set()
    for each in search.output.sequences:
        assert each.tokens[: len(A)] == A and each.output_token_ids == each.tokens[len(A) :] and each.num_prompt_tokens == len(A)
        assert len(each.logprobs) == len(each.output_token_ids)
        assert each.cum_logprob == pytest.approx(sum(rated[t].logprob for t, rated in zip(each.output_token_ids, each.logprobs)))
        assert each.finish_reason == ("stop" if each.tokens[-1] == EOS else "length") and EOS not in each.output_token_ids[:-1]
        reasons.add(each.finish_reason)
    assert "stop" in reasons


def test_the_model_length_ends_it_like_max_tokens() -> None:
    """As `generate(max_length=...)` does, for the stopping rule too."""
    for rule in (False, NEVER):
        engine = toy_engine(max_model_len=16)
        search = begin(engine, A, 3, 100, early_stopping=rule, length_penalty=2.0)
        run(engine, search)
        assert_same(search.output, reference(A, 3, 16 - len(A), 2.0, rule))


def test_the_model_length_is_what_never_hopes_for() -> None:
    """The answers are the same, but they come as soon as nothing can be better."""

    def num_steps(max_tokens: int) -> list[int]:
        engines = [toy_engine(max_model_len=len(prompt) + 12) for prompt in (A, B, C)]
        for engine, prompt in zip(engines, (A, B, C)):
            run(engine, begin(engine, prompt, 2, max_tokens, early_stopping=NEVER, length_penalty=0.5))
        return [engine.scheduler.num_steps for engine in engines]

    assert num_steps(100) == num_steps(12) and min(num_steps(12)) < 12


def test_the_prompt_is_computed_once_and_blocks_are_shared() -> None:
    engine = toy_engine(enable_prefix_caching=False, eos_token_ids=[])
    engine.scheduler.events.subscribe((log := []).append)
    search = begin(engine, A, 4, 10)
    for _ in range(4):
        search.after_step(engine.step())
    tables = [beam.seq.table.block_ids for beam in search.beams]
    assert len({tuple(table[:2]) for table in tables}) == 1 and len(search.beams) == 4
    run(engine, search)
    assert sum(event.num_tokens for event in log if event.kind == "scheduled") == len(A) + 4 * 9
    num_forks = sum(event.kind == "finished" for event in log) - 1
    assert 0 < sum(event.kind == "copied" for event in log) <= num_forks


def test_salts_wall_searches_off() -> None:
    engine = toy_engine()
    first = begin(engine, A, 2, 4, cache_salt="alice")
    run(engine, first)
    for salt, hit in (("bob", 0), ("alice", len(A) - 1)):
        search = begin(engine, A, 2, 4, cache_salt=salt)
        search.after_step(engine.step())
        assert search.beams[0].seq.num_cached_tokens == hit
        run(engine, search)
        assert_same(search.output, reference(A, 2, 4))


# ends that nobody wants


@pytest.mark.parametrize("num_blocks", [5, 64])
def test_abort_at_every_step(num_blocks: int) -> None:
    num_steps = 0
    while True:
        engine = toy_engine(num_blocks)
        search, other = begin(engine, A, 3, 8, ignore_eos=True), begin(engine, B, 2, 6)
        for _ in range(num_steps):
            moved = engine.step()
            search.after_step(moved), other.after_step(moved)
        was_finished = search.finished
        search.abort()
        engine.check_invariants()
        if not was_finished:
            assert search.finished and search.output.sequences == [] and search.output.error is None
        search.abort()
        search.after_step([])
        run(engine, search, other)
        assert_same(other.output, reference(B, 2, 6))
        check_whole(engine)
        if was_finished:
            assert_same(search.output, reference(A, 3, 8, eos=frozenset()))
            break
        num_steps += 1
    assert num_steps >= 8


def test_abort_between_step_and_choice_and_before_the_beginning() -> None:
    engine = toy_engine()
    BeamSearch(engine, BeamSearchParams(2, 4)).abort()
    search = begin(engine, A, 3, 8)
    engine.step()
    search.abort()
    check_whole(engine)


def test_somebody_aborts_a_beam() -> None:
    engine = toy_engine(eos_token_ids=[])
    search = begin(engine, A, 3, 8)
    for _ in range(3):
        search.after_step(engine.step())
    engine.abort(search.beams[1].seq.seq_id)
    search.after_step(engine.step())
    assert search.finished and search.output.sequences == []
    check_whole(engine)


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("num_blocks", [6, 64])
def test_a_step_that_fails_once_changes_nothing(when: str, num_blocks: int) -> None:
    for num_steps in range(9):
        engine = toy_engine(num_blocks)
        search = begin(engine, A, 3, 8, ignore_eos=True)
        for _ in range(num_steps):
            search.after_step(engine.step())
        engine.runner.fails = when
        run(engine, search)
        assert_same(search.output, reference(A, 3, 8, eos=frozenset()))
        check_whole(engine)


@pytest.mark.parametrize("num_blocks", [6, 64])
def test_a_beam_that_cannot_be_computed_ends_its_search_alone(num_blocks: int) -> None:
    """Token 0 is one that some beam takes sooner or later."""
    engine = toy_engine(num_blocks)
    engine.runner.cannot = (0,)
    search = begin(engine, A, 4, 12, ignore_eos=True)
    ordinary = engine.add_request([7, 7], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    want = toy_reference([7, 7], 3, VOCAB_SIZE)
    assert 0 not in want
    others = run(engine, search)
    assert search.output.sequences == [] and isinstance(search.output.error, RequestFailed) and isinstance(search.output.error.__cause__, MemoryError)
    assert others[ordinary] == want
    check_whole(engine)


def test_a_row_without_a_distribution_ends_its_search_alone(monkeypatch) -> None:
    """As a model's NaNs do: the step succeeds, and one row of it has an error."""
    plain, error = ToyBeams.run, ValueError("no finite logits")

    def with_errors(self: ToyBeams, batch: ForwardBatch) -> RunnerOutput:
        output = plain(self, batch)
        bad = [r for r, row in enumerate(batch.logits_rows) if batch.token_ids[row] == 0 and batch.sampling[r].logprobs is not None]
        return output._replace(errors=dict.fromkeys(bad, error))

    monkeypatch.setattr(ToyBeams, "run", with_errors)
    engine = toy_engine()
    search, other = begin(engine, A, 4, 12, ignore_eos=True), begin(engine, C, 1, 3)
    run(engine, search, other)
    assert search.output.error is error and search.output.sequences == []
    assert_same(other.output, reference(C, 1, 3))
    check_whole(engine)


def test_a_broken_runner_raises_and_leaves_the_rest_to_abort(monkeypatch) -> None:
    engine = toy_engine()
    search = begin(engine, A, 3, 8)
    search.after_step(engine.step())
    monkeypatch.setattr(ToyBeams, "run", lambda self, batch: RunnerOutput([]))
    with pytest.raises(BrokenRunner):
        engine.step()
    search.abort()
    check_whole(engine)


def test_a_prompt_that_never_fits() -> None:
    engine = toy_engine(3, 4)
    with pytest.raises(RequestTooLong):
        begin(engine, [1] * 12, 2, 4)
    with pytest.raises(InvalidRequest):
        begin(engine, [], 2, 4)
    check_whole(engine)
    search = begin(engine, [1] * 9, 2, 40)  # the pool ends it
    run(engine, search)
    assert_same(search.output, reference([1] * 9, 2, 3))


# through `LLM`, on the toy


def toy_room(num_blocks: int = 64, **limits: object) -> BeamSearcher:
    return BeamSearcher(toy_engine(num_blocks, **limits), None, VOCAB_SIZE)


def assert_idle(room: BeamSearcher) -> None:
    assert not room.has_unfinished_requests() and not room.by_seq_id
    check_whole(room.engine)


def test_llm_errors_stand_in_their_place() -> None:
    room = toy_room(8)
    outputs = room.beam_search([A, [1] * 40, [VOCAB_SIZE], "text", {"prompt_token_ids": B}, []], BeamSearchParams(3, 6))
    assert [type(output.error) for output in outputs] == [type(None), RequestTooLong, InvalidRequest, InvalidRequest, type(None), InvalidRequest]
    assert all(output.sequences == [] for output in outputs if output.error)
    assert_same(outputs[0], reference(A, 3, 6))
    assert_same(outputs[4], reference(B, 3, 6))
    assert_idle(room)
    assert room.beam_search([], BeamSearchParams(3, 6)) == []
    [output] = room.beam_search(A, BeamSearchParams(3, 6), use_tqdm=True)
    assert_same(output, reference(A, 3, 6))
    for wrong in (None, SamplingParams()):
        with pytest.raises(TypeError, match="BeamSearchParams"):
            room.beam_search(A, wrong)


def test_llm_others_in_flight_get_their_mail() -> None:
    room = toy_room(10)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    mine = room.add_request([7, 7], params)
    stream = room.stream([5, 5], params)
    next(stream)
    [output] = room.beam_search([A], BeamSearchParams(4, 8))
    assert_same(output, reference(A, 4, 8))
    *_, last = stream
    assert last.outputs[0].token_ids == toy_reference([5, 5], 9, VOCAB_SIZE)
    while room.has_unfinished_requests():
        for each in room.step():
            assert each.request_id == mine
    assert each.outputs[0].token_ids == toy_reference([7, 7], 9, VOCAB_SIZE)
    assert_idle(room)


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("pressed", [True, False])
def test_llm_interrupted_at_every_step(monkeypatch, at: int, pressed: bool) -> None:
    """By Ctrl-C in the middle of a step, or by an exception that is nobody's request: the searches are released, the others go on."""
    room, plain, runs = toy_room(), ToyBeams.run, []
    mine = room.add_request([7, 7], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))

    def interrupted(self: ToyBeams, batch: ForwardBatch) -> RunnerOutput:
        runs.append(batch)
        output = plain(self, batch)
        if len(runs) != at:
            return output
        if pressed:
            signal.raise_signal(signal.SIGINT)
            return output
        return RunnerOutput([])

    monkeypatch.setattr(ToyBeams, "run", interrupted)
    with pytest.raises(KeyboardInterrupt if pressed else BrokenRunner):
        room.beam_search([A, B], BeamSearchParams(3, 12, ignore_eos=True))
    room.engine.check_invariants()
    assert len(room.engine.sequences) == 1, "only the ordinary request is left"
    while room.has_unfinished_requests():
        [output] = room.step()
    assert output.request_id == mine and output.outputs[0].token_ids == toy_reference([7, 7], 12, VOCAB_SIZE)
    assert_idle(room)


def test_llm_text() -> None:
    """In the wheel's model: the text is of the answer alone, without special tokens, and each token has its own."""
    llm = LLM(num_blocks=64)
    prompt = {"messages": [{"role": "user", "content": "What is a slot?"}]}
    [output] = llm.beam_search(prompt, BeamSearchParams(2, 24))
    for each in output.sequences:
        assert each.text == llm.tokenizer.decode(each.output_token_ids, skip_special_tokens=True) != ""
        assert each.logprobs[0][each.output_token_ids[0]].decoded_token == llm.tokenizer.decode(each.output_token_ids[:1])
    assert llm.stats().num_free_blocks == 64


# against `generate`

PROMPTS = [[5, 9, 3, 77, 21, 8, 8, 40, 11, 30, 2], [5, 9, 3, 77, 21, 6], [66]]
NUM_NEW = 12
RULES = [(k, penalty, early) for k in (2, 3, 4) for penalty in (0.0, 1.0, 2.0, -1.0) for early in (False, True, NEVER)]
RULES += [(1, 1.0, early) for early in (False, True, NEVER)]


def often(model, num: int) -> list[int]:
    """The tokens that a wide search takes most often: as the ends of sequences they make many end early."""
    model.generation_config.eos_token_id = None
    counts = Counter()
    for prompt in PROMPTS:
        rows = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, num_beams=6, num_return_sequences=6, do_sample=False)
        counts.update(rows[:, len(prompt) + 2 :].flatten().tolist())
    return [token_id for token_id, _ in counts.most_common(num)]


@torch.no_grad()
def score_alone(model, tokens: list[int], num_prompt_tokens: int) -> float:
    """The mean log-probability of an answer."""
    rates = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    return sum(rates[i - 1, tokens[i]].item() for i in range(num_prompt_tokens, len(tokens))) / (len(tokens) - num_prompt_tokens)


def generate(model, prompt: list[int], k: int, length_penalty: float, early_stopping: bool | str) -> list[tuple[list[int], float]]:
    """What the model's own beam search finds, without the padding: (tokens, score), best first."""
    if k == 1:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)[0].tolist()
        return [(tokens, score_alone(model, tokens, len(prompt)))]
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_NEW, num_beams=k, num_return_sequences=k, do_sample=False, length_penalty=length_penalty,
        early_stopping=early_stopping, return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    lengths = len(prompt) + (found.beam_indices >= 0).sum(1)
    return [(row[:n].tolist(), score) for row, n, score in zip(found.sequences, lengths.tolist(), found.sequences_scores.tolist())]


def random_model(name: str):
    return build("gpt2", GPT2) if name == "gpt2" else parity_model(name)


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "gpt2"])
def case(request):
    """A model, what ends its answers, and what it finds by itself, before anything here has touched it."""
    model = random_model(request.param)
    eos = often(model, 2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
    want = {(i, *rule): generate(model, prompt, *rule) for i, prompt in enumerate(PROMPTS) for rule in RULES}
    return model, want, frozenset(eos)


def test_the_cases_are_worth_comparing(case) -> None:
    """Answers end early and late, and the rules lead to different ones."""
    model, want, eos = case
    answers = [(len(tokens) - len(PROMPTS[key[0]]), tokens[-1] in eos) for key, found in want.items() for tokens, _ in found]
    assert any(ended and length < NUM_NEW for length, ended in answers) and any(not ended for _, ended in answers)
    assert len({length for length, _ in answers}) > 3
    by_rule = {rule: str([want[(i, *rule)] for i in range(len(PROMPTS))]) for rule in RULES if rule[0] == 4}
    assert len(set(by_rule.values())) >= 4


def assert_agree(search: BeamSearch, want: list[tuple[list[int], float]]) -> None:
    assert search.output.error is None and [each.tokens for each in search.output.sequences] == [tokens for tokens, _ in want]
    assert [each.score for each in search.output.sequences] == pytest.approx([score for _, score in want], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("block_size", "num_slots", "caching", "every"),
    [(16, 4096, True, 1), (16, 4096, False, 5), (16, 48, True, 4), (3, 60, False, 7), (3, 60, True, 4), (1, 40, True, 7)],
)
def test_equals_generate(case, block_size: int, num_slots: int, caching: bool, every: int) -> None:
    """All rules at once in one engine, and ordinary requests beside them; small pools preempt."""
    model, want, eos = case
    llm = LLM(model, block_size=block_size, num_blocks=num_slots // block_size, enable_prefix_caching=caching, max_num_batched_tokens=64)
    keys = list(want)[::every]
    searches = [begin(llm.engine, PROMPTS[i], k, NUM_NEW, length_penalty=penalty, early_stopping=early) for i, k, penalty, early in keys]
    greedy = {llm.engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=NUM_NEW)): i for i, prompt in enumerate(PROMPTS)}
    llm.engine.scheduler.events.subscribe((log := []).append)
    others = run(llm.engine, *searches, every=20)
    for key, search in zip(keys, searches):
        assert_agree(search, want[key])
    assert {i: PROMPTS[i] + others[seq_id] for seq_id, i in greedy.items()} == {i: want[i, 1, 1.0, False][0][0] for i in greedy.values()}
    num_preempted = sum(event.kind == "preempted" for event in log)
    assert num_preempted > 10 or num_slots == 4096
    check_whole(llm.engine)


def test_ignore_eos_and_max_model_len_equal_generate(case) -> None:
    """`max_model_len` cuts answers as `max_length` does."""
    model, _, eos = case
    llm = LLM(model, num_blocks=64, max_model_len=17)
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(3, 99, ignore_eos=True, length_penalty=0.0))
    model.generation_config.eos_token_id = None
    try:
        for output, prompt in zip(outputs, PROMPTS):
            rows = model.generate(torch.tensor([prompt]), max_length=17, num_beams=3, num_return_sequences=3, do_sample=False, length_penalty=0.0)
            assert [each.tokens for each in output.sequences] == rows.tolist() and {each.finish_reason for each in output.sequences} == {"length"}
    finally:
        model.generation_config.eos_token_id = sorted(eos)
