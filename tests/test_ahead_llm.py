"""Planning ahead over a real model: the same answers as the model itself gives, whatever is asked, and whatever fails."""

from __future__ import annotations

from typing import Any

import pytest
import test_llm
import torch
from test_bad_input import FAULTS, GOOD, POISON, Fault, assert_ends_alone, assert_right, assert_whole, install, llm_of, name_of
from test_options import EOS, LONG, MODEL, NUM_NEW, OPTIONS, PROMPTS, WORLDS, build, check, greedy, plain, serve_among_others

from pagedlit.compute.model_runner import HostCopy, ModelRunner, known_tokens
from pagedlit.compute.sampler import NO_TOKEN
from pagedlit.llm import LLM, PromptServer
from pagedlit.serving.ahead import AheadEngine, ToyDevice, build_ahead_engine
from pagedlit.serving.beam_search import BeamSearchParams
from pagedlit.serving.engine import Engine
from pagedlit.serving.sequence import SamplingParams
from pagedlit.tiny import SYSTEM_PROMPT


def ahead_of(llm: LLM) -> int:
    """Steps that were planned ahead."""
    assert isinstance(llm.engine, AheadEngine)
    return llm.engine.scheduler.num_ahead


def test_who_plans_ahead() -> None:
    """On a CPU nobody does, unless asked."""
    assert type(build([], num_blocks=8).engine) is type(build([], num_blocks=8, async_scheduling=False).engine) is Engine
    assert isinstance(build([], num_blocks=8, async_scheduling=True).engine, AheadEngine)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("world", ["blocks of 3", "two seats"])
def test_option(option: str, world: str) -> None:
    """Every option against a plain loop without cache, batch or engine; small pools preempt, small budgets cut prompts into chunks."""
    given, has_eos = OPTIONS[option]
    eos, params = EOS if has_eos else [], SamplingParams(max_tokens=NUM_NEW, **given)
    llm = build(eos, **WORLDS[world], async_scheduling=True)
    serve_among_others(llm, params, eos)
    assert ahead_of(llm) > 0 and not llm.engine.scheduler.steps


def test_greedy_is_what_generate_says() -> None:
    llm = build([], block_size=4, num_blocks=40, max_num_batched_tokens=16, async_scheduling=True)
    want = [MODEL.generate(torch.tensor([p]), max_new_tokens=NUM_NEW, do_sample=False)[0, len(p) :].tolist() for p in PROMPTS]
    for _ in range(2):  # from a cache that knows nothing, and from one that knows all
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, greedy(), use_tqdm=False)] == want
    assert ahead_of(llm) >= llm.stats().num_steps - 2 - 2


def test_beam_search_among_others() -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    outputs = []
    for is_ahead in (False, True):
        llm = build([], block_size=4, num_blocks=60, async_scheduling=is_ahead)
        llm.add_request(LONG, greedy(30))  # which could be planned ahead, if it were alone
        outputs.append([[(each.tokens, round(each.score, 4)) for each in output.sequences] for output in llm.beam_search(PROMPTS, params)])
        while llm.has_unfinished_requests():
            [output] = llm.step()
        check(output, greedy(30), [])
    assert outputs[0] == outputs[1] and 0 < ahead_of(llm) < 30


@pytest.mark.parametrize("stop", [None, "slot", ["block", "zzz"]])
def test_stop_strings_of_the_shipped_model(stop: Any) -> None:
    """Found in the text after the step, when the next one runs already."""
    conversations = [
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
        for question in ("What is a block table?", "What is a slot?", "What is preemption?")
    ]
    told = []
    for is_ahead in (False, True):
        llm = LLM(num_blocks=128, async_scheduling=is_ahead)
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=48, stop=stop), use_tqdm=False)
        told.append([(each.text, each.token_ids, each.finish_reason, each.stop_reason) for output in outputs for each in output.outputs])
        assert llm.stats().num_free_blocks == 128 and not llm.engine.sequences
    assert told[0] == told[1] and (stop is None or any(reason == "stop" for *_, reason, _ in told[0]))


def test_abort_and_closed_streams() -> None:
    llm = llm_of(num_blocks=40, async_scheduling=True)
    kept = llm.add_request(LONG, greedy())
    for num_steps in range(1, 8):
        gone = llm.add_request(GOOD[0], greedy(n=2))
        outputs = [llm.step() for _ in range(num_steps)]
        output = llm.abort(gone)
        assert output is None or {answer.finish_reason for answer in output.outputs} <= {"abort", "length"}
        for answer in output.outputs if output else ():
            assert answer.token_ids == plain(GOOD[0], greedy(), 0, [])[0][: len(answer.token_ids)]
        stream = llm.stream(GOOD, greedy())
        next(stream)
        stream.close()
        llm.engine.check_invariants()
        assert outputs
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.request_id == kept and output.finished:
                check(output, greedy(), [])
    assert_whole(llm)


def ahead_room(num_blocks: int = 64, block_size: int = 4, **limits: Any) -> PromptServer:
    """Requests over the toy, planned ahead."""
    return PromptServer(build_ahead_engine(ToyDevice(num_blocks, block_size), num_blocks, block_size, **limits), None, 26)


@pytest.mark.parametrize("first", [1, 12, 23])
def test_ctrl_c_at_any_line(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_llm, "toy_room", ahead_room)
    test_llm.test_ctrl_c_at_any_line_aborts_ones_own_requests_alone(first)


@pytest.mark.parametrize("seed", range(8))
def test_any_mixture_of_callers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_llm, "toy_room", ahead_room)
    test_llm.test_any_mixture_of_callers.hypothesis.inner_test(seed)


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
def test_the_model_fails_on_one_request(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    llm, fault = llm_of(num_blocks=40, async_scheduling=True), Fault(fault.kind, fault.phase, fault.forever)
    install(monkeypatch, llm, fault)
    pairs = [(GOOD[0], greedy()), (POISON, greedy(n=2)), (GOOD[1], greedy(n=2)), (LONG, greedy())]
    outputs = llm.generate([prompt for prompt, _ in pairs], [each for _, each in pairs], use_tqdm=False)
    failure = outputs.pop(1)
    assert_right(outputs)
    assert_ends_alone(failure, fault)
    monkeypatch.undo()
    assert_whole(llm)


# the runner


def test_known_tokens() -> None:
    sampled = torch.tensor([10, NO_TOKEN, 12])
    assert known_tokens(torch.tensor([5, -1, 7, -3, -1, -2]), sampled).tolist() == [5, 10, 7, 12, 10, 0]
    assert known_tokens(torch.tensor([5, 0]), sampled).tolist() == [5, 0]


def test_host_copy_on_a_cpu_is_the_tensor() -> None:
    tensor = torch.tensor([1, 2])
    assert HostCopy(tensor).read() is tensor


def test_submit_does_not_need_the_tokens() -> None:
    """The host may read them whenever it likes: here one step late, from a batch that never held them."""
    runner = ModelRunner(MODEL, block_size=4, num_blocks=32)
    submitted = []
    submit = runner.submit
    runner.submit = lambda batch: (submitted.append(list(batch.token_ids)), submit(batch))[1]  # type: ignore[method-assign]
    engine = build_ahead_engine(runner, 32, 4)
    seq = engine.sequences[engine.add_request(LONG, greedy(5))]
    list(engine.drain())
    assert seq.output_token_ids == plain(LONG, greedy(5), 0, [])[0]
    assert submitted == [LONG] + [[-1]] * 4 and runner.sampled.tolist() == seq.output_token_ids[-1:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    told = []
    for is_ahead in (False, None):
        llm = build([], block_size=4, num_blocks=40, max_num_batched_tokens=16, device="cuda", async_scheduling=is_ahead)
        params = [greedy(logprobs=1), SamplingParams(seed=3, n=2, max_tokens=NUM_NEW), greedy(prompt_logprobs=0)]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        told.append([[answer.token_ids for answer in output.outputs] for output in outputs])
    MODEL.cpu()
    assert told[0] == told[1] and ahead_of(llm) > 0
