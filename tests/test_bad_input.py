"""Whatever is asked, and whatever the model does: a typed error for the request concerned, right tokens for all others, nothing leaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_llm import FALLBACK, TOKENIZER
from test_options import BYTES, LONG, MODEL, VOCAB, build, check, greedy, recite, reciting_room
from transformers import LlamaConfig, LlamaForCausalLM

from pagedlit.compute import model_runner
from pagedlit.compute.sampler import BadLogits
from pagedlit.compute.text import UndecodableAnswer
from pagedlit.llm import LLM
from pagedlit.serving.engine import RequestFailed
from pagedlit.serving.sequence import InvalidRequest, RequestTooLong, SamplingParams

MAX_LEN, POOL = 40, 48  # tokens
WORLD = dict(block_size=4, num_blocks=POOL // 4, max_num_batched_tokens=9, max_model_len=MAX_LEN)
GOOD = [LONG[:13], LONG[:13] + [5], [8]]
NAN, INF = math.nan, math.inf


def llm_of(**options: Any) -> LLM:
    return build([], **WORLD | options)


def assert_whole(llm: LLM) -> None:
    """Nothing is held; without the cache, every block is free; and the next request is served right."""
    llm.engine.check_invariants()
    assert not llm.has_unfinished_requests() and not llm.engine.sequences and not llm.by_seq_id and not llm.engine.suspects
    assert llm.stats().num_free_blocks == llm.stats().num_blocks
    assert_right(llm.generate(GOOD, greedy(), use_tqdm=False))
    llm.engine.scheduler.cache.clear()
    assert llm.engine.scheduler.cache.allocator.num_free == llm.stats().num_blocks


def assert_right(outputs: list) -> None:
    for output in outputs:
        check(output, greedy(n=len(output.outputs)), [])


def assert_failed(output: Any, error: type[Exception], words: str) -> None:
    """An output that says what went wrong, and nothing else."""
    assert isinstance(output.error, error) and words in str(output.error), output.error
    assert output.finished and all(answer.finish_reason == "error" for answer in output.outputs)


# The caller's mistakes: prompts


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BAD_PROMPTS = {  # name: prompt, type of the error, and what its message says
    "no ids": ([], InvalidRequest, "empty"),
    "no ids in a dict": ({"prompt_token_ids": []}, InvalidRequest, "empty"),
    "empty text": ("", InvalidRequest, "empty"),
    "no messages": ({"messages": []}, InvalidRequest, "chat"),
    "longer than max_model_len": ([5] * MAX_LEN, RequestTooLong, f"max_model_len={MAX_LEN}"),
    "longer than the pool": ([5] * 1000, RequestTooLong, "1000 tokens"),
    "id beyond the vocabulary": ([5, VOCAB], InvalidRequest, f"0..{VOCAB - 1}"),
    "huge id": ([5, 2**70], InvalidRequest, "not a token id"),
    "negative id": ([5, -1], InvalidRequest, "-1"),
    "bool id": ([5, True], InvalidRequest, "True"),
    "float id": ([5, 1.0], InvalidRequest, "1.0"),
    "NumPy ids": ([5, np.int64(5)], InvalidRequest, "not a token id"),
    "text id": ([5, "a"], InvalidRequest, "'a'"),
    "None among ids": ([5, None], InvalidRequest, "None"),
    "nested ids": ([[5]], InvalidRequest, "not a token id"),
    "None": (None, InvalidRequest, "NoneType"),
    "a number": (5.5, InvalidRequest, "float"),
    "bytes": (b"abc", InvalidRequest, "bytes"),
    "a set": ({5, 6}, InvalidRequest, "set"),
    "a tensor": (torch.tensor([5, 6]), InvalidRequest, "Tensor"),
    "unknown field": ({"prompt_ids": [5]}, InvalidRequest, "'prompt_ids'"),
    "unknown field beside a known one": ({"prompt_token_ids": [5], "images": []}, InvalidRequest, "'images'"),
    "no field": ({}, InvalidRequest, "NoneType"),
    "ids as text": ({"prompt": [5]}, InvalidRequest, "list"),
    "text as ids": ({"prompt_token_ids": "abc"}, InvalidRequest, "str"),
    "half a surrogate pair": ("\ud800", InvalidRequest, "refuses"),
    "messages without a role": ({"messages": [{"content": "a"}]}, InvalidRequest, "refuses"),
    "messages that are text": ({"messages": "Hi"}, InvalidRequest, "refuses"),
    "messages that are None": ({"messages": None}, InvalidRequest, "refuses"),
}


class Silent:
    """The shipped tokenizer, but its texts begin with nothing, and its ids fit the tiny model."""

    chat_template, eos_token_id = TOKENIZER.chat_template, None
    apply_chat_template = staticmethod(TOKENIZER.apply_chat_template)

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[i % VOCAB for i in TOKENIZER(text, add_special_tokens=False).input_ids])

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return TOKENIZER.decode(token_ids, **options)


def texts_of(llm: LLM) -> LLM:
    llm.tokenizer = Silent()
    return llm


@pytest.mark.parametrize("prompt, error, words", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompt(prompt, error, words):
    """Raised by `add_request`; in the output of `generate` and `stream`; the others of the call are served."""
    llm = texts_of(llm_of())
    with pytest.raises(error, match=".*".join(words.split("."))):
        llm.add_request(prompt, greedy())
    assert not llm.requests and not llm.by_seq_id and not llm.engine.sequences
    prompts = [GOOD[0], prompt, GOOD[1], {"prompt_token_ids": GOOD[2]}]
    ended = [output for output in llm.stream(prompts, greedy()) if output.finished]
    for outputs in (llm.generate(prompts, greedy(n=2), use_tqdm=False), sorted(ended, key=lambda output: int(output.request_id.split("-")[1]))):
        [failure] = [output for output in outputs if output.error is not None]
        assert_failed(failure, error, words)
        assert failure.outputs[0].text == "" and failure.outputs[0].token_ids == []
        served = [output for output in outputs if output.error is None]
        assert len(served) == 3 and sorted(output.prompt_token_ids for output in served) == sorted(GOOD)
        for output in served:
            check(output, greedy(n=len(output.outputs)), [])
    llm.tokenizer = None
    assert_whole(llm)


# The caller's mistakes: parameters

HUGE = 10**400  # an int that no float can hold
BAD_PARAMS = [
    *[("n", value) for value in (0, -1, 1.0, True, None, "2", NAN)],
    *[("temperature", value) for value in (-0.1, NAN, INF, -INF, True, None, "1", 1j, HUGE)],
    *[("top_p", value) for value in (0, -0.1, 1.01, NAN, INF, True, None, HUGE)],
    *[("top_k", value) for value in (-2, 1.5, NAN, True, None)],
    *[("min_p", value) for value in (-0.1, 1.1, NAN, True, None)],
    *[("seed", value) for value in (1.5, True, "a", NAN)],
    *[("max_tokens", value) for value in (0, -1, 2.0, True, None, NAN)],
    *[("min_tokens", value) for value in (-1, 17, 2.0, True, None)],
    *[("stop", value) for value in ("", ["a", ""], [None], 5, b"a", {"a"}, [["a"]])],
    *[("stop_token_ids", value) for value in ([-1], [1.0], [True], ["a"], 5, "5", {5}, [None])],
    *[("ignore_eos", value) for value in (1, None, "yes")],
    *[(name, value) for name in ("logprobs", "prompt_logprobs") for value in (-1, True, 1.5, "1", NAN)],
    *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, NAN, INF, True, None, HUGE)],
    *[("repetition_penalty", value) for value in (0, -1, NAN, INF, True, None, HUGE)],
    *[("cache_salt", value) for value in (5, b"a", ["a"])],
    *[("priority", value) for value in (1.5, None, True, NAN)],
]


@pytest.mark.parametrize("name, value", [pytest.param(*case, id=f"{case[0]}={str(case[1])[:12]!r}") for case in BAD_PARAMS])
def test_bad_parameter(name, value):
    with pytest.raises(InvalidRequest, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name, value", [("temperature", 1e-320), ("temperature", 1e308), ("seed", -(2**100)), ("seed", 2**100), ("top_k", 10**30), ("priority", HUGE), ("max_tokens", 10**30), ("top_p", 1e-300), ("min_p", 1), ("stop", []), ("stop", ()), ("stop_token_ids", [])], ids=lambda value: str(value)[:12])
def test_extreme_parameters_are_served(name, value):
    llm = llm_of()
    [output] = llm.generate(LONG, SamplingParams(**dict(n=2, seed=1) | {name: value}), use_tqdm=False)
    room = MAX_LEN - len(LONG)
    assert output.error is None and len(output.outputs[1].token_ids) == (room if name == "max_tokens" else min(16, room))
    assert_whole(llm)


UNFIT = {  # name: parameters that are fine by themselves, but not for this model, and what the message says
    "logprobs beyond the vocabulary": (dict(logprobs=VOCAB + 1), "only 61 tokens"),
    "prompt_logprobs beyond the vocabulary": (dict(prompt_logprobs=VOCAB + 1), "only 61 tokens"),
    "stop token beyond the vocabulary": (dict(stop_token_ids=[3, VOCAB]), "61 is not a token id"),
    "stop string without a tokenizer": (dict(stop="a"), "needs a tokenizer"),
}


@pytest.mark.parametrize("options, words", UNFIT.values(), ids=UNFIT)
def test_parameters_that_do_not_fit_the_model(options, words):
    llm, params = llm_of(), SamplingParams(**options)
    with pytest.raises(InvalidRequest, match=words):
        llm.add_request(LONG, params)
    good, bad, last = llm.generate([GOOD[0], LONG, GOOD[1]], [greedy(), params, greedy(n=2)], use_tqdm=False)
    assert_failed(bad, InvalidRequest, words)
    assert_right([good, last])
    assert_whole(llm)


@pytest.mark.parametrize("wrong", [{"max_tokens": 3}, "greedy", 3, [greedy()], SamplingParams], ids=str)
def test_what_are_no_sampling_parameters(wrong):
    llm = llm_of()
    for call in (lambda: llm.add_request(LONG, wrong), lambda: llm.generate([LONG, LONG], [greedy(), wrong], use_tqdm=False)):
        with pytest.raises(TypeError, match="SamplingParams"):
            call()
    assert_whole(llm)


def test_a_request_id_in_use():
    llm = llm_of()
    llm.add_request(GOOD[0], greedy(n=2), request_id="mine")
    with pytest.raises(InvalidRequest, match="'mine' is in use"):
        llm.add_request(GOOD[1], greedy(), request_id="mine")
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert_right(outputs[-1:])
    assert_whole(llm)


@pytest.mark.parametrize("n, seats", [(2, 1), (7, 2), (30, 256), (30, 3)])
def test_more_answers_than_the_engine_holds_are_served_in_turn(n, seats):
    llm = llm_of(max_num_seqs=seats)
    assert_right(llm.generate([GOOD[0], LONG, GOOD[1]], [greedy(), greedy(n=n), greedy()], use_tqdm=False))
    assert_whole(llm)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"block_size": 0}, ValueError), ({"block_size": True}, ValueError), ({"num_blocks": -1}, ValueError), ({"num_blocks": 2.0}, ValueError),
        ({"max_model_len": 0}, ValueError), ({"max_num_seqs": 0}, ValueError), ({"max_num_seqs": True}, ValueError), ({"max_num_seqs": 1.5}, ValueError),
        ({"max_num_batched_tokens": 0}, ValueError), ({"max_num_batched_tokens": NAN}, ValueError), ({"max_num_batched_tokens": "9"}, ValueError),
        ({"max_num_seqs": None}, ValueError), ({"max_num_batched_tokens": None}, ValueError),
        ({"seed": None}, ValueError), ({"seed": "a"}, ValueError), ({"seed": 1.5}, ValueError), ({"seed": True}, ValueError),
        ({"attention_backend": "none"}, ValueError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_engine_options(options, error):
    """Said when the engine is made, by name, and not by the first request."""
    with pytest.raises(error, match=next(iter(options)).replace("_", ".")):
        LLM(MODEL, **dict(num_blocks=8) | options)


# The tokenizer's failures


class Failing(Silent):
    """Fails where it is told to."""

    def __init__(self, where: str, token_id: int = -1) -> None:
        self.where, self.token_id = where, token_id

    def __call__(self, text: str, **options: Any) -> Any:
        if self.where == "encode" and "!" in text:
            raise RuntimeError("no such word")
        return super().__call__(text, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        if self.where == "template" and "!" in messages[0]["content"]:
            raise RuntimeError("no such role")
        return "Hi"

    def decode(self, token_ids: Any, **options: Any) -> str:
        if self.where == "decode" and self.token_id in token_ids:
            raise RuntimeError("no such token")
        return TOKENIZER.decode(token_ids, **options)


@pytest.mark.parametrize("where", ["encode", "template"])
def test_a_tokenizer_that_refuses(where):
    llm = llm_of()
    llm.tokenizer = Failing(where)
    bad, good = ("a!", "a") if where == "encode" else ({"messages": [{"role": "user", "content": text}]} for text in ("!", "a"))
    with pytest.raises(InvalidRequest, match="no such"):
        llm.add_request(bad)
    first, failure, last = llm.generate([good, bad, GOOD[0]], greedy(), use_tqdm=False)
    assert_failed(failure, InvalidRequest, "no such")
    assert failure.error.__cause__ is not None
    assert_right([first, last])
    llm.tokenizer = None
    assert_whole(llm)


@pytest.mark.parametrize("stop", [None, "zz"])
@pytest.mark.parametrize("how", ["generate", "stream", "step"])
@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("n", [1, 2])
def test_a_token_that_the_tokenizer_cannot_decode(stop, how, logprobs, n):
    """Only the request that says it ends with an error, with the tokens that were said; the others do not notice."""
    room = reciting_room()
    a, b, bad = (BYTES[ord(letter)] for letter in "ab!")
    room.tokenizer = Failing("decode", bad)
    good, bad_one = recite(room, [[a, b, a]] * 2, seed=1, stop=stop), recite(room, [[a, b, a, b]] * (n - 1) + [[a, b, bad, b]], seed=7, stop=stop, logprobs=None)
    pairs = [([1, 2], good), ([3, 4], bad_one), ([5], good)]
    outputs = everything(room, pairs, how)
    for index in (0, 2):
        assert outputs[index].error is None and [answer.text for answer in outputs[index].outputs] == ["aba"] * 2
    assert isinstance(outputs[1].error, UndecodableAnswer) and "no such token" in str(outputs[1].error) and outputs[1].finished
    assert outputs[1].outputs[-1].finish_reason == "error" and outputs[1].outputs[-1].token_ids[:3] == [a, b, bad]
    assert [answer.text for answer in outputs[1].outputs[:-1]] == ["abab"] * (n - 1), "its other answers stand"
    assert not room.engine.sequences and not room.requests and not room.by_seq_id
    room.engine.check_invariants()
    [output] = room.generate([1, 2], good, use_tqdm=False)
    assert output.outputs[0].text == "aba"


def everything(llm: Any, pairs: list, how: str) -> list:
    """The last output of each request, in order."""
    prompts, params = [prompt for prompt, _ in pairs], [each for _, each in pairs]
    if how == "generate":
        return llm.generate(prompts, params, use_tqdm=False)
    if how == "stream":
        last = {output.request_id: output for output in llm.stream(prompts, params)}
        return [next(output for output in last.values() if output.prompt_token_ids == prompt) for prompt in prompts]
    ids, last = [llm.add_request(prompt, each) for prompt, each in pairs], {}
    while llm.has_unfinished_requests():
        last |= {output.request_id: output for output in llm.step()}
    return [last[request_id] for request_id in ids]


# The model's failures


@dataclass
class Fault:
    """What goes wrong in the model's forward, when, and for whom."""

    kind: str  # raise, nan, inf, masked; or kv: the sequence's new keys and values become NaN, and all that follows from them
    phase: str  # first chunk, last chunk, decode
    forever: bool = False  # or just once
    everybody: bool = False  # or only sequences that begin with `POISON`
    is_over: bool = False

    def strikes(self, seq: Any, start: int, num_tokens: int) -> bool:
        """Whether this sequence's share of a step, from this position on, is the one."""
        if self.is_over or not (self.everybody or seq.token_ids[0] == POISON[0]):
            return False
        if self.phase == "decode":
            return max(seq.num_output_tokens, start + num_tokens - seq.num_prompt_tokens) >= 3
        return start == 0 if self.phase == "first chunk" else start + num_tokens >= seq.num_prompt_tokens


POISON = [33] + LONG[:17]  # two chunks of at most nine tokens


def install(monkeypatch: Any, llm: LLM, fault: Fault) -> None:
    """Let a fault strike in this engine's steps."""
    before: Callable = model_runner.step_logits

    def step_logits(runner: Any, layers: Any, batch: Any) -> torch.Tensor:
        in_flight = [step.shares for step in getattr(llm.engine.scheduler, "steps", ()) if step.batch is batch]
        shares = in_flight[0] if in_flight else llm.engine.scheduler.scheduled
        starts = [batch.positions[row] for row in batch.query_start_loc[:-1]]
        struck = [s for s, (seq, num_tokens) in enumerate(shares) if fault.strikes(seq, starts[s], num_tokens)]
        if struck and fault.kind == "raise":
            fault.is_over = not fault.forever
            raise RuntimeError("a bad kernel")
        logits = before(runner, layers, batch).clone()
        for s in struck:
            rows = range(*batch.query_start_loc[s : s + 2])
            if fault.kind == "kv":
                blocks, offsets = zip(*(divmod(slot, runner.block_size) for slot in batch.slot_mapping[rows.start : rows.stop]))
                for layer in runner.kv_cache.layers:
                    for tensor in layer:
                        tensor[list(blocks), :, ..., list(offsets), :] = NAN
            for r, row in enumerate(batch.logits_rows):
                if row in rows:
                    logits[r] = {"nan": NAN, "kv": NAN, "inf": INF, "masked": -INF}[fault.kind]
        fault.is_over = fault.is_over or bool(struck) and not fault.forever
        return logits

    monkeypatch.setattr(model_runner, "step_logits", step_logits)


FAULTS = [
    *[Fault("raise", phase, forever) for phase in ("first chunk", "last chunk", "decode") for forever in (False, True)],
    *[Fault(kind, phase, forever) for kind in ("nan", "inf", "masked") for phase in ("last chunk", "decode") for forever in (False, True)],
    *[Fault("kv", phase) for phase in ("first chunk", "last chunk", "decode")],
]


def name_of(fault: Fault) -> str:
    return f"{fault.kind}, {fault.phase}, {'always' if fault.forever else 'once'}"


def assert_ends_alone(output, fault):
    """What a fault does to the request that it strikes: nothing, if it raises but once; otherwise an error of its own."""
    if fault.kind == "raise" and not fault.forever:
        assert_right([output])
    else:
        assert_struck(output, RequestFailed if fault.kind == "raise" else BadLogits, "a bad kernel" if fault.kind == "raise" else "no finite maximum")


@pytest.mark.parametrize("how, n, caching", [("generate", 1, True), ("stream", 2, True), ("step", 2, False)])
@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
def test_the_model_fails_on_one_request(monkeypatch, fault, n, caching, how):
    """Its neighbours, of which some share its beginning, say exactly what they would have said."""
    llm, fault = llm_of(num_blocks=40, enable_prefix_caching=caching), Fault(fault.kind, fault.phase, fault.forever)
    install(monkeypatch, llm, fault)
    pairs = [(GOOD[0], greedy()), (POISON, greedy(n=n)), (GOOD[1], greedy(n=2)), (LONG, greedy())]
    outputs = everything(llm, pairs, how)
    failure = outputs.pop(1)
    assert_right(outputs)
    assert_ends_alone(failure, fault)
    monkeypatch.undo()
    [again] = llm.generate([POISON], greedy(n=n), use_tqdm=False)
    assert_right([again])
    assert_whole(llm)


def assert_struck(output: Any, error: type[Exception], words: str) -> None:
    """At least one of its answers failed, and those that did not are right."""
    assert isinstance(output.error, error) and words in str(output.error) and output.finished
    assert {answer.finish_reason for answer in output.outputs} <= {"error", "length"}
    assert any(answer.finish_reason == "error" for answer in output.outputs)
    whole = everything(build([], num_blocks=40), [(output.prompt_token_ids, greedy())], "generate")[0].outputs[0].token_ids
    for answer in output.outputs:
        assert answer.token_ids == whole[: len(answer.token_ids)] and (answer.finish_reason == "error" or answer.token_ids == whole)


@pytest.mark.parametrize("fault", [Fault("raise", "first chunk", True, True), Fault("nan", "last chunk", True, True), Fault("inf", "decode", True, True), Fault("raise", "decode", False, True), Fault("kv", "first chunk", False, True)], ids=name_of)
def test_the_model_fails_on_everybody(monkeypatch, fault):
    """Every request ends, with its error; when the model works again, so does the engine."""
    llm, fault = llm_of(num_blocks=40), Fault(fault.kind, fault.phase, fault.forever, True)
    install(monkeypatch, llm, fault)
    outputs = llm.generate([GOOD[0], POISON, LONG], [greedy(), greedy(n=2), greedy()], use_tqdm=False)
    if fault.forever:
        for output in outputs:
            assert_struck(output, RequestFailed if fault.kind == "raise" else BadLogits, "")
    monkeypatch.undo()
    assert_right(llm.generate([POISON, GOOD[0], LONG], greedy(n=2), use_tqdm=False))
    assert_whole(llm)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("block_size", [3, 4, 5, 16])
def test_what_was_computed_wrong_is_not_found_again_after_a_preemption(monkeypatch, block_size, num_steps):
    """The keys of the first chunk go bad, and it is cached, a partly filled block among it, before the last chunk tells."""
    llm, fault = llm_of(block_size=block_size, num_blocks=40, max_num_batched_tokens=7), Fault("kv", "first chunk")
    install(monkeypatch, llm, fault)
    request_id = llm.add_request(POISON, greedy(n=2))
    for _ in range(num_steps):
        llm.step()
    bystander = llm.engine.add_request([8], greedy(2))
    llm.engine.suspects = [llm.engine.sequences[bystander]]  # which is run alone: the others give their blocks back
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert outputs[-1].request_id == request_id and isinstance(outputs[-1].error, BadLogits)
    list(llm.engine.drain())
    [again] = llm.generate([POISON], greedy(n=2), use_tqdm=False)
    assert_right([again])
    assert again.num_cached_tokens == 0
    assert_whole(llm)


def test_a_weight_that_is_not_a_number():
    """A prompt with a bad token fails each time, by itself, and what follows it is in no cache; its beginning is."""
    model = LlamaForCausalLM(LlamaConfig(**MODEL.config.to_dict())).eval()
    model.load_state_dict(MODEL.state_dict())
    model.generation_config.eos_token_id = None
    llm = LLM(model, **WORLD)
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = NAN
    for _ in range(3):
        outputs = llm.generate([GOOD[0], LONG[:9] + [60] + LONG[9:], GOOD[1], [60]], greedy(n=2), use_tqdm=False)
        assert_right([outputs[0], outputs[2]])
        for output in (outputs[1], outputs[3]):
            assert_failed(output, BadLogits, "NaN")
    keys = [np.frombuffer(node.key, dtype=np.int32) for node in llm.engine.scheduler.cache.nodes.values()]
    assert not any(60 in key for key in keys)
    assert_whole(llm)


def test_nothing_is_left_to_say():
    """Every token banned: an error of that request."""
    llm = llm_of()
    nothing = greedy(min_tokens=2, stop_token_ids=list(range(VOCAB)), n=2)
    good, bad = llm.generate([GOOD[0], LONG], [greedy(), nothing], use_tqdm=False)
    assert_failed(bad, BadLogits, "every token masked")
    assert_right([good])
    assert_whole(llm)


def test_log_probabilities_of_a_request_that_fails(monkeypatch):
    llm = llm_of(num_blocks=40)
    install(monkeypatch, llm, Fault("nan", "decode", True))
    params = greedy(n=2, logprobs=1, prompt_logprobs=1)
    bad, good = llm.generate([POISON, LONG], params, use_tqdm=False)
    check(good, params, [])
    assert_struck(bad, BadLogits, "")
    for answer in bad.outputs:
        assert len(answer.logprobs) == len(answer.token_ids) == 3 and math.isfinite(answer.cumulative_logprob)
    assert len(bad.prompt_logprobs) == len(POISON)
    assert_whole(llm)


def test_a_tokenizer_without_a_template():
    llm = LLM(tokenizer=FALLBACK, num_blocks=8)
    with pytest.raises(InvalidRequest, match="chat template"):
        llm.add_request(CHAT)
    [output] = llm.chat(CHAT["messages"], use_tqdm=False)
    assert_failed(output, InvalidRequest, "chat template")
