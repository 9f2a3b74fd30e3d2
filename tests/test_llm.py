"""Text in, text out: detokenisation, prompts, mailboxes, and that whoever leaves takes his requests with him."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pagedlit.compute.text import Detokenizer
from pagedlit.llm import LLM, Finished, PromptServer, eos_token_ids, pair_up, stats_of, tokenize, uninterrupted
from pagedlit.serving.engine import BrokenRunner, ToyRunner, build_engine, toy_reference
from pagedlit.serving.sequence import InvalidRequest, RequestTooLong, SamplingParams
from pagedlit.tiny import MODEL_PATH, SYSTEM_PROMPT, questions

TOKENIZER = AutoTokenizer.from_pretrained(str(MODEL_PATH))
A, B, C = [1, 2, 3], [4, 5], [7, 8, 9, 10, 11]


def greedy(max_tokens: int = 6, **others: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


def toy_room(num_blocks: int = 64, block_size: int = 4, runner: type[ToyRunner] = ToyRunner, **limits: object) -> PromptServer:
    """Requests over the toy: 26 tokens, no tokenizer."""
    return PromptServer(build_engine(runner(num_blocks, block_size), num_blocks, block_size, **limits), None, 26)


def assert_idle(room: PromptServer) -> None:
    """Nothing in flight, nothing unread, no block held."""
    room.engine.check_invariants()
    cache = room.engine.scheduler.cache
    assert not room.has_unfinished_requests() and not room.engine.sequences and not room.by_seq_id
    assert cache.num_free == cache.num_blocks


def tokens_of(output):
    return output.outputs[0].token_ids


# the detokeniser


def grow(tokenizer, token_ids: list[int], stops: list[int]) -> list[str]:
    """The texts after each of `stops` tokens, and at the end."""
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.update(token_ids[:stop], finished=False) for stop in stops]
    return [*texts, detokenizer.update(token_ids, finished=True)]


def assert_grows(texts: list[str]) -> None:
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:]))


def stops_for(token_ids: list[int], seed: int) -> list[int]:
    """One token at a time, or several, as when nobody looked for a while."""
    rng, stop, stops = random.Random(seed), 0, []
    while stop < len(token_ids):
        stop = min(len(token_ids), stop + rng.choice([1, 1, 1, 2, 5]))
        stops.append(stop)
    return stops


PIECES = ["a", " ", "\n", "é", "e\u0301", "ï", "☕", "👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "漢字", "नि", "한국", "\u200d", "\ufe0f", "\x00", "​", "<|eos|>", "<|user|>", "block table"]
texts = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@settings(deadline=None, max_examples=150)
@given(texts, st.integers(0, 99))
def test_text_grows_by_whole_characters(text, seed):
    token_ids = TOKENIZER(text, add_special_tokens=False).input_ids
    shown = grow(TOKENIZER, token_ids, stops_for(token_ids, seed))
    assert_grows(shown)
    assert shown[-1] == TOKENIZER.decode(token_ids, skip_special_tokens=True)
    assert not any(each.endswith("\ufffd") for each in shown[:-1])
    if "\ufffd" not in text:
        assert not any("\ufffd" in each for each in shown)
    if "<|" not in text:
        assert shown[-1] == text


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(st.integers(0, 12), st.integers(0, 767)), max_size=40), st.integers(0, 99))
def test_text_grows_whatever_a_byte_level_model_says(token_ids, seed):
    """Malformed UTF-8 and special tokens included."""
    shown = grow(TOKENIZER, token_ids, stops_for(token_ids, seed))
    assert_grows(shown)
    assert shown[-1] == TOKENIZER.decode(token_ids, skip_special_tokens=True)
    assert not any(each.endswith("\ufffd") for each in shown[:-1])


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words that carry their space, single letters, and one token for each byte."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "a", "b", "▁is"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=False)


FALLBACK = byte_fallback_tokenizer()
WORDS = [FALLBACK.convert_tokens_to_ids(word) for word in ("▁Hello", "▁world", "a", "b", "▁is", "▁", "</s>")]
spoken = st.lists(st.one_of(st.sampled_from(WORDS).map(lambda i: [i]), st.characters(codec="utf-8").map(lambda c: [2 + b for b in c.encode()])), max_size=20)


@settings(deadline=None, max_examples=150)
@given(spoken, st.integers(0, 99))
def test_text_grows_with_byte_fallback_where_the_bytes_are_well_formed(pieces, seed):
    token_ids = sum(pieces, [])
    shown = grow(FALLBACK, token_ids, stops_for(token_ids, seed))
    assert shown[-1] == FALLBACK.decode(token_ids, skip_special_tokens=True)
    assert_grows(shown)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, len(FALLBACK) - 1), max_size=30), st.integers(0, 99))
def test_the_end_is_right_with_byte_fallback_whatever_the_bytes(token_ids, seed):
    """Its decoder judges a run of bytes as a whole, so what was shown may have been another text: the end counts."""
    assert grow(FALLBACK, token_ids, stops_for(token_ids, seed))[-1] == FALLBACK.decode(token_ids, skip_special_tokens=True)


def test_spaces_between_words_are_kept_and_the_first_is_not():
    hello, world, special = WORDS[0], WORDS[1], WORDS[-1]
    assert grow(FALLBACK, [hello, world, special, world], [1, 2, 3, 4]) == ["Hello", "Hello world", "Hello world", "Hello world world", "Hello world world"]


def test_an_answer_that_ends_in_half_a_character():
    token_ids = TOKENIZER("naïve ☕", add_special_tokens=False).input_ids[:-1]
    shown = grow(TOKENIZER, token_ids, list(range(len(token_ids) + 1)))
    assert shown[-2] == "naïve " and shown[-1] == TOKENIZER.decode(token_ids) == "naïve \ufffd"


def test_decoding_is_linear():
    class Counter:
        num_decoded = 0

        def decode(self, token_ids, **kwargs):
            self.num_decoded += len(token_ids)
            return TOKENIZER.decode(token_ids, **kwargs)

    counter, token_ids = Counter(), TOKENIZER(SYSTEM_PROMPT * 10).input_ids[:1000]
    grow(counter, token_ids, list(range(1, 1001)))
    assert counter.num_decoded < 5 * len(token_ids)


def test_no_tokenizer_no_text():
    assert grow(None, [1, 2], [1, 2]) == ["", "", ""]


# prompts


def test_forms_of_a_prompt():
    ids, conversation = TOKENIZER("Hi there").input_ids, [{"role": "user", "content": "Hi"}]
    assert tokenize("Hi there", TOKENIZER, 768) == tokenize({"prompt": "Hi there"}, TOKENIZER, 768) == ("Hi there", ids)
    for form in (ids, tuple(ids), {"prompt_token_ids": ids}):
        assert tokenize(form, None, 768) == (None, ids)
    assert tokenize({"prompt_token_ids": ids, "prompt": "Hi there"}, None, 768) == ("Hi there", ids)
    text, chat_ids = tokenize({"messages": conversation}, TOKENIZER, 768)
    assert text == TOKENIZER.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert chat_ids == TOKENIZER.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert chat_ids.count(TOKENIZER.bos_token_id) == 1


@pytest.mark.parametrize(
    "prompt",
    [[], (), {}, None, 7, 1.5, b"abc", bytearray(b"abc"), [768], [-1], [1, None], [True], [1.0], ["a"], [[1]], {1, 2}, "\ud800", torch.tensor([1]),
     {"prompt": [1]}, {"prompt_token_ids": "a"}, {"promt": "a"}, {"prompt": "a", "images": 1}, {"prompt": None},
     {"messages": []}, {"messages": [{"content": "a"}]}, {"messages": "a"}, {"messages": [3]}, {"messages": None}],
    ids=repr,
)  # fmt: skip
def test_what_is_no_prompt(prompt):
    with pytest.raises(InvalidRequest):
        tokenize(prompt, TOKENIZER, 768)


def test_text_needs_a_tokenizer_and_chat_a_template():
    with pytest.raises(InvalidRequest, match="needs a tokenizer"):
        tokenize("a", None, 768)
    for tokenizer in (None, FALLBACK):
        with pytest.raises(InvalidRequest, match="chat template"):
            tokenize({"messages": [{"role": "user", "content": "a"}]}, tokenizer, 768)


def test_the_cause_of_a_refusal_is_kept():
    with pytest.raises(InvalidRequest, match="chat template refuses") as caught:
        tokenize({"messages": [{"content": "a"}]}, TOKENIZER, 768)
    assert caught.value.__cause__ is not None


def test_one_prompt_or_several_one_set_of_parameters_or_several():
    p, q = greedy(1), greedy(2)
    assert pair_up("a", p) == pair_up(["a"], [p]) == [("a", p)]
    assert pair_up([1, 2], p) == pair_up([[1, 2]], p) == [([1, 2], p)]
    assert pair_up({"prompt": "a"}, None) == [({"prompt": "a"}, None)]
    assert pair_up(["a", [1], {"prompt": "b"}], p) == [("a", p), ([1], p), ({"prompt": "b"}, p)]
    assert pair_up(("a", "b"), [p, None]) == [("a", p), ("b", None)] and pair_up([], p) == []
    assert pair_up(["a", "b"], [p, q]) == [("a", p), ("b", q)]
    with pytest.raises(ValueError, match="2 prompts but 3 sampling parameters"):
        pair_up(["a", "b"], [p, p, p])


# all at once


def test_generate_answers_in_the_order_of_the_prompts():
    room, prompts, lengths = toy_room(), [A, B, C, A], [9, 1, 5, 3]
    outputs = room.generate(prompts, [greedy(n) for n in lengths], use_tqdm=False)
    assert [tokens_of(output) for output in outputs] == [toy_reference(p, n) for p, n in zip(prompts, lengths)]
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert all(output.finished and output.error is None and output.outputs[0].finish_reason == "length" for output in outputs)
    assert len({output.request_id for output in outputs}) == 4
    assert room.generate([], greedy(), use_tqdm=False) == []
    assert_idle(room)


def test_a_request_that_cannot_be_served_fails_alone():
    room = toy_room(num_blocks=8)
    outputs = room.generate([A, [5] * 40, B, [26], [], "text", C], greedy(), use_tqdm=False)
    assert [type(output.error).__name__ for output in outputs] == [
        "NoneType", "RequestTooLong", "NoneType", "InvalidRequest", "InvalidRequest", "InvalidRequest", "NoneType",
    ]  # fmt: skip
    for output, prompt in zip(outputs, [A, None, B, None, None, "text", C]):
        assert output.finished and len(output.outputs) == 1
        if output.error is None:
            assert tokens_of(output) == toy_reference(prompt, 6)
        else:
            assert (output.outputs[0].finish_reason, output.outputs[0].text, tokens_of(output)) == ("error", "", [])
            assert isinstance(output.error, InvalidRequest) and output.num_cached_tokens == 0
    assert outputs[5].prompt == "text" and (outputs[1].error.num_tokens, outputs[1].error.max_model_len) == (40, 32)
    assert room.finished.num_requests == 3, "those that were served"
    assert_idle(room)


def test_unknown_arguments_raise():
    room = toy_room()
    for call in (room.generate, room.stream, room.chat, room.add_request, LLM):
        with pytest.raises(TypeError, match="best_of"):
            call([A], best_of=2)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)
    assert_idle(room)


@pytest.mark.parametrize("wrong", [{"max_tokens": 3}, "greedy", 3])
def test_what_are_no_sampling_parameters_raises_and_leaves_nothing(wrong):
    room = toy_room()
    with pytest.raises(TypeError):
        room.add_request(A, wrong)
    with pytest.raises(TypeError):
        room.generate([A, B, C], [greedy(), wrong, greedy()], use_tqdm=False)
    with pytest.raises(TypeError):
        list(room.stream([A, B, C], [greedy(), wrong, greedy()]))
    assert_idle(room)


def test_an_exception_while_prompts_are_put_in_line_leaves_nothing():
    class Interrupted:
        def __call__(self, text, **kwargs):
            raise KeyboardInterrupt

    room = toy_room()
    room.tokenizer = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        room.generate([A, B, "text", C], greedy(), use_tqdm=False)
    assert_idle(room)


def test_progress_goes_to_stderr_and_counts_every_prompt(capsys):
    room = toy_room()
    room.generate([A, [26], B], greedy())
    shown = capsys.readouterr()
    assert shown.out == "" and "3/3" in shown.err
    room.generate([A], greedy(), use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def test_environment_may_switch_the_bar_off():
    """tqdm reads the environment when it is imported: so, in a fresh process."""
    run = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_llm import A, greedy, toy_room; toy_room().generate([A], greedy())"
    env = os.environ | {"TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", run], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "requests" not in done.stderr


# streams


def test_stream_shows_every_step():
    outputs = list(toy_room().stream(A, greedy(5)))
    assert [tokens_of(output) for output in outputs] == [toy_reference(A, n) for n in range(1, 6)]
    assert [output.finished for output in outputs] == [False] * 4 + [True]
    assert [output.outputs[0].finish_reason for output in outputs] == [None] * 4 + ["length"]


def test_outputs_are_snapshots():
    first, *_, last = toy_room().stream(A, greedy(5))
    assert len(tokens_of(first)) == 1 and first.metrics.finished_time is None
    assert len(tokens_of(last)) == 5 and last.metrics.finished_time is not None


def test_a_stream_begins_with_the_first_next():
    room = toy_room()
    stream = room.stream([A, B], greedy())
    assert_idle(room)
    stream.close()
    assert_idle(room)


def test_interleaved_streams_lose_nothing():
    room = toy_room()
    first, second = [], []
    for a, b in zip_longest(room.stream(A, greedy(9)), room.stream([B, C], greedy(4))):
        first.append(a)
        second.append(b)
    assert [tokens_of(output) for output in filter(None, first)][-1] == toy_reference(A, 9)
    ends = [tokens_of(output) for output in filter(None, second) if output.finished]
    assert sorted(ends) == sorted([toy_reference(B, 4), toy_reference(C, 4)])
    assert_idle(room)


def test_generate_while_other_requests_are_in_flight():
    room = toy_room()
    mine = room.add_request(A, greedy(20), request_id="mine")
    assert tokens_of(room.step()[0]) == toy_reference(A, 1)
    [output] = room.generate(B, greedy(5), use_tqdm=False)
    assert tokens_of(output) == toy_reference(B, 5)
    [moved] = room.step()
    assert moved.request_id == mine and tokens_of(moved) == toy_reference(A, 6), "handed out at once, without another step"
    [output] = room.generate(C, greedy(40), use_tqdm=False)
    [moved] = room.step()
    assert moved.finished and tokens_of(moved) == toy_reference(A, 20), "it ended meanwhile, and was kept"
    assert_idle(room)


def test_generate_inside_a_stream():
    room = toy_room()
    for output in room.stream(A, greedy(4)):  # noqa: B007 (the last one is looked at below)
        [inner] = room.generate(B, greedy(2), use_tqdm=False)
        assert tokens_of(inner) == toy_reference(B, 2)
    assert output.finished and tokens_of(output) == toy_reference(A, 4)
    assert_idle(room)


def test_step_leaves_the_outputs_of_a_stream_alone():
    room = toy_room()
    stream = room.stream([A, B], greedy(4))
    next(stream)
    while room.has_unfinished_requests():
        assert room.step() == []
    rest = list(stream)
    assert sorted(tokens_of(output) for output in rest if output.finished) == sorted([toy_reference(A, 4), toy_reference(B, 4)])
    assert_idle(room)


@pytest.mark.parametrize("num_read", [1, 2, 3, 5])
def test_closing_a_stream_aborts_what_is_unfinished(num_read):
    room = toy_room()
    stream = room.stream([A, [26], B, C], [greedy(2), greedy(), greedy(50), greedy(50)])
    for _ in range(num_read):
        next(stream)
    assert room.engine.sequences
    stream.close()
    assert_idle(room)


def test_leaving_the_loop_closes_the_stream():
    room = toy_room()
    for _ in room.stream([A, B], greedy(50)):
        break
    gc.collect()
    assert_idle(room)


def test_an_exception_thrown_into_a_stream_aborts():
    room = toy_room()
    stream = room.stream([A, B], greedy(50))
    next(stream)
    with pytest.raises(KeyError):
        stream.throw(KeyError())
    assert_idle(room)


def test_aborting_a_request_that_another_loop_follows():
    room, seen = toy_room(), []
    for output in room.stream([A, B], greedy(8)):
        seen.append(output)
        if len(seen) == 5:
            aborted = room.abort(seen[0].request_id)
            assert aborted.finished and aborted.outputs[0].finish_reason == "abort"
    mine = [output for output in seen if output.request_id == seen[0].request_id]
    others = [output for output in seen if output.request_id != seen[0].request_id]
    assert mine[-1].outputs[0].finish_reason == "abort" and tokens_of(mine[-1]) == toy_reference(A, len(tokens_of(mine[-1])))
    assert tokens_of(others[-1]) == toy_reference(B, 8), "the other one goes on"
    assert_idle(room)


# driving the loop


@pytest.mark.parametrize("num_steps", range(5))
def test_abort_in_any_state(num_steps):
    room = toy_room(num_blocks=8, max_num_batched_tokens=4)
    ids = [room.add_request(prompt, greedy(20)) for prompt in (C * 2, A, B)]
    for _ in range(num_steps):
        room.step()
    for request_id in ids:
        output = room.abort(request_id)
        assert output.finished and output.outputs[0].finish_reason == "abort"
        assert room.abort(request_id) is None and room.abort("nobody") is None
    assert {output.request_id for output in room.step()} >= set(ids), "whoever follows them is told"
    assert_idle(room)


def test_request_ids_never_collide():
    room = toy_room()
    mine = room.add_request(A, greedy(), request_id="request-1")
    others = [room.add_request(B, greedy()) for _ in range(4)]
    assert len({mine, *others}) == 5
    rejected = room.generate([26], use_tqdm=False)[0].request_id
    assert rejected not in {mine, *others}
    with pytest.raises(InvalidRequest, match="'request-1' is in use"):
        room.add_request(C, greedy(), request_id="request-1")
    while room.requests:
        room.advance()
    with pytest.raises(InvalidRequest, match="in use"):
        room.add_request(C, greedy(), request_id="request-1")  # its output was not read yet
    assert {output.request_id for output in room.step()} == {mine, *others}
    assert room.add_request(C, greedy(), request_id="request-1") == "request-1"
    assert room.add_request(C, greedy(), request_id="") == ""
    room.generate(A, greedy(), use_tqdm=False)
    room.step()
    assert_idle(room)


def test_a_refused_request_leaves_nothing():
    room = toy_room(num_blocks=4)
    for prompt in ([5] * 16, [26], []):
        with pytest.raises(InvalidRequest):
            room.add_request(prompt)
    with pytest.raises(RequestTooLong):
        room.add_request([5] * 99)
    assert_idle(room)


def test_a_closed_stream_spares_a_request_that_took_over_an_id():
    room = toy_room()
    stream = room.stream([A, B], [greedy(1), greedy(9)])
    done = next(output.request_id for output in stream if output.finished)
    mine = room.add_request(C, greedy(5), request_id=done)
    stream.close()
    while room.has_unfinished_requests():
        [output] = room.step()
    assert output.request_id == mine and tokens_of(output) == toy_reference(C, 5)
    assert_idle(room)


class FailingRunner(ToyRunner):
    """Raises once, at its `fails_at`-th step."""

    fails_at, error, num_steps = 0, RuntimeError("out of luck"), 0

    def run(self, batch):
        self.num_steps += 1
        if self.num_steps == self.fails_at:
            raise self.error
        return super().run(batch)


@pytest.mark.parametrize("error", [BrokenRunner("out of luck"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("fails_at", [1, 2, 4])
@pytest.mark.parametrize("how", ["generate", "stream"])
def test_an_exception_in_the_middle_aborts_ones_own_requests_alone(error, fails_at, how):
    room = toy_room(runner=FailingRunner)
    room.engine.runner.fails_at, room.engine.runner.error = fails_at, error
    mine = room.add_request(C, greedy(12))
    with pytest.raises(type(error)) as caught:
        room.generate([A, B], greedy(8), use_tqdm=False) if how == "generate" else list(room.stream([A, B], greedy(8)))
    assert set(room.requests) == {mine} and len(room.engine.sequences) == 1, "although the traceback is still alive"
    assert caught.tb is not None
    room.engine.check_invariants()
    assert tokens_of(room.generate(A, greedy(), use_tqdm=False)[0]) == toy_reference(A, 6)
    outputs = []
    while room.has_unfinished_requests():
        outputs += room.step()
    assert tokens_of(outputs[-1]) == toy_reference(C, 12)
    assert_idle(room)


def press_ctrl_c(at_line: int, call) -> bool:
    """Call, with Ctrl-C pressed at the n-th line that the package executes; whether it came so far."""
    num_lines = 0

    def trace(frame, event, arg):
        nonlocal num_lines
        if "pagedlit" not in frame.f_code.co_filename:
            return None
        num_lines += event == "line"
        if num_lines == at_line:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("first", range(1, 30))
def test_ctrl_c_at_any_line_aborts_ones_own_requests_alone(first):
    for at_line in range(first, 10_000, 29 * 7):
        room = toy_room(num_blocks=24, max_num_batched_tokens=16)
        mine = room.add_request(C, greedy(12))
        if not press_ctrl_c(at_line, lambda room=room: room.generate([A, B], greedy(), use_tqdm=False)):
            break
        assert set(room.requests) <= {mine}
        room.engine.check_invariants()
        assert tokens_of(room.generate(A, greedy(), use_tqdm=False)[0]) == toy_reference(A, 6)
        outputs = []
        while room.has_unfinished_requests():
            outputs += room.step()
        assert tokens_of(outputs[-1]) == toy_reference(C, 12)
        assert_idle(room)
    assert at_line > 500, "the call was over too soon"


def test_a_second_ctrl_c_goes_through():
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done = "waits"
        signal.raise_signal(signal.SIGINT)
        done = "waits for ever"
    assert done == "waits" and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_of_others_is_left_alone():
    def handler(signum, frame):
        raise ZeroDivisionError

    signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(ZeroDivisionError), uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    outputs = []
    thread = threading.Thread(target=lambda: outputs.extend(toy_room().generate(A, greedy(), use_tqdm=False)))
    thread.start()
    thread.join()
    assert tokens_of(outputs[0]) == toy_reference(A, 6), "signals belong to the main thread, serving does not"


@pytest.mark.parametrize("how", ["generate", "stream"])
def test_an_exception_outside_the_loop_aborts_while_its_traceback_is_alive(how, monkeypatch):
    """A suspended generator that a traceback keeps alive would else clean up when the garbage collector finds it."""

    def interrupted(self, *args):
        raise KeyboardInterrupt

    room = toy_room()
    monkeypatch.setattr("pagedlit.llm.tqdm.update" if how == "generate" else "pagedlit.llm.Request.output", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        room.generate([A, B], greedy(8)) if how == "generate" else next(room.stream([A, B], greedy(8)))
    assert_idle(room)
    assert caught.tb is not None


def test_an_exception_between_a_step_and_its_report_hangs_nobody(monkeypatch):
    room = toy_room()
    mine = room.add_request(A, greedy(1))

    def interrupted(room, request):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedlit.llm.deliver", interrupted)
    with pytest.raises(KeyboardInterrupt):
        room.step()
    assert not room.engine.sequences and mine in room.requests, "it has ended, and nobody was told"
    [output] = room.step()
    assert output.request_id == mine and tokens_of(output) == toy_reference(A, 1)
    assert_idle(room)


def test_stepping_the_engine_underneath_hangs_nobody():
    room = toy_room()
    stream = room.stream([A, B], greedy(4))
    next(stream)
    list(room.engine.drain())
    assert sorted(tokens_of(output) for output in stream if output.finished) == sorted([toy_reference(A, 4), toy_reference(B, 4)])
    room.add_request(A, greedy(), request_id="a")
    room.engine.abort(next(iter(room.engine.sequences)))
    [output] = room.step()
    assert output.outputs[0].finish_reason == "abort"
    assert_idle(room)


def test_sequences_of_the_engine_below_are_left_alone():
    room = toy_room()
    room.engine.add_request(A, greedy(3))
    assert tokens_of(room.generate(B, greedy(5), use_tqdm=False)[0]) == toy_reference(B, 5)
    assert_idle(room)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**9))
def test_any_mixture_of_callers(seed):
    """Streams, calls, loops and aborts, in random order over a small pool: everybody gets his own, and all of it."""
    rng, room = random.Random(seed), toy_room(num_blocks=24, max_num_batched_tokens=16, max_num_seqs=4)
    streams, expected, ended, aborted = [], {}, {}, set()

    def some_prompt() -> list[int]:
        return [rng.randrange(3) for _ in range(rng.randint(1, 12))]

    def take(output) -> None:
        want = toy_reference(output.prompt_token_ids, len(tokens_of(output)))
        assert tokens_of(output) == want and output.request_id not in ended, "nothing comes after the end"
        if output.finished:
            ended[output.request_id] = output.outputs[0].finish_reason

    for _ in range(40):
        move = rng.choice(["add", "stream", "read", "read", "read", "step", "step", "generate", "abort", "close"])
        if move == "add":
            expected[room.add_request(some_prompt(), greedy(rng.randint(1, 9)))] = True
        elif move == "stream":
            streams.append(room.stream([some_prompt() for _ in range(rng.randint(1, 3))], greedy(rng.randint(1, 9))))
        elif move == "read" and streams:
            stream = rng.choice(streams)
            output = next(stream, None)
            streams.remove(stream) if output is None else take(output)
        elif move == "step":
            for output in room.step():
                assert output.request_id in expected
                take(output)
        elif move == "generate":
            for output in room.generate([some_prompt(), some_prompt()], greedy(3), use_tqdm=False):
                take(output)
                assert len(tokens_of(output)) == 3
        elif move == "abort" and room.requests:
            request_id = rng.choice(list(room.requests))
            aborted.add(request_id)
            room.abort(request_id)
        elif move == "close" and streams:
            streams.pop(rng.randrange(len(streams))).close()
        room.engine.check_invariants()
    for stream in streams:
        for output in stream:
            take(output)
    while room.has_unfinished_requests():
        for output in room.step():
            take(output)
    assert set(expected) <= set(ended) and all(ended[i] == ("abort" if i in aborted else "length") for i in expected)
    assert_idle(room)


def test_totals():
    room = toy_room(num_blocks=16, max_num_batched_tokens=8)
    room.generate([A * 3, A * 3 + B], greedy(10), use_tqdm=False)
    stats = stats_of(room.engine.scheduler, 3, room.finished)
    assert (stats.num_requests, stats.num_prompt_tokens, stats.num_generated_tokens, stats.num_copies) == (2, 20, 20, 3)
    assert (stats.num_running, stats.num_waiting, stats.num_blocks, stats.num_free_blocks, stats.kv_usage) == (0, 0, 16, 16, 0.0)
    room.generate(A * 3, greedy(1), use_tqdm=False)
    assert stats_of(room.engine.scheduler, 0, room.finished).num_cached_tokens - stats.num_cached_tokens == 8
    room.add_request(A, greedy(3))
    room.step()
    stats = stats_of(room.engine.scheduler, 0, Finished())
    assert stats.num_running == 1 and stats.kv_usage == 1 / 16


def test_metrics():
    room = toy_room(num_blocks=6, max_num_batched_tokens=16)
    outputs = room.generate([A, B, C], greedy(12), use_tqdm=False)
    for output in outputs:
        metrics = output.metrics
        assert metrics.arrival_time <= metrics.first_token_time < metrics.finished_time
    assert sum(output.metrics.num_preemptions for output in outputs) > 0, "the pool is meant to be too small"
    assert room.finished.num_preemptions == sum(output.metrics.num_preemptions for output in outputs)


# with a model


@pytest.fixture(scope="module")
def llm():
    return LLM(num_blocks=128)


def random_llama(**config: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(**sizes | config)).eval()


def test_answers_of_the_shipped_model(llm):
    asked = questions()[:6]
    conversations = [[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": each["question"]}] for each in asked]
    outputs = llm.chat(conversations, greedy(80), use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == [each["answer"] for each in asked]
    assert all(output.outputs[0].finish_reason == "stop" and SYSTEM_PROMPT in output.prompt for output in outputs)
    assert tokens_of(outputs[0])[-1] == llm.tokenizer.eos_token_id
    assert_idle(llm)


def test_streamed_text_is_the_generated_text(llm):
    prompt = {"messages": [{"role": "user", "content": questions()[0]["question"]}]}
    shown = [output.outputs[0].text for output in llm.stream(prompt, greedy(60))]
    assert_grows(shown)
    assert shown[-1] == llm.generate(prompt, greedy(60), use_tqdm=False)[0].outputs[0].text == questions()[0]["answer"]


def test_the_next_turn_starts_where_the_last_one_ended(llm):
    conversation = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": questions()[7]["question"]}]
    [first] = llm.chat(conversation, greedy(80), use_tqdm=False)
    conversation += [{"role": "assistant", "content": first.outputs[0].text}, {"role": "user", "content": questions()[8]["question"]}]
    [second] = llm.chat(conversation, greedy(80), use_tqdm=False)
    assert second.outputs[0].text == questions()[8]["answer"]
    assert second.num_cached_tokens == len(first.prompt_token_ids) + len(tokens_of(first)) - 1
    assert llm.chat_prompt(conversation) == second.prompt_token_ids


def test_one_conversation_or_several(llm):
    one = [{"role": "user", "content": "What is a slot?"}]
    assert len(llm.chat(one, greedy(2), use_tqdm=False)) == 1 and len(llm.chat([one, one], greedy(2), use_tqdm=False)) == 2
    assert llm.chat([], greedy(2), use_tqdm=False) == []
    good, bad = llm.chat([one, [{"content": "no role"}]], greedy(2), use_tqdm=False)
    assert good.error is None and isinstance(bad.error, InvalidRequest)
    with pytest.raises(InvalidRequest):
        llm.chat_prompt([])


def test_seeds(llm):
    def say(engine, *prompts, **params):
        return [tokens_of(output) for output in engine.generate(list(prompts), SamplingParams(max_tokens=12, **params), use_tqdm=False)]

    first, second, other = (LLM(num_blocks=64, seed=seed) for seed in (3, 3, 4))
    answers = say(first, "a", "b")
    assert answers == say(second, "a", "b") != say(other, "a", "b")
    assert say(llm, "a", seed=5) == [say(llm, "b", "c", "a", seed=5)[2]] and say(llm, "a", seed=5) != say(llm, "a", seed=6)


def test_a_loaded_model_without_tokenizer():
    llm = LLM(random_llama(), num_blocks=16)
    ids, text, chat = llm.generate([[3, 4, 5], "text", {"messages": [{"role": "user", "content": "a"}]}], greedy(4), use_tqdm=False)
    assert len(tokens_of(ids)) == 4 and ids.outputs[0].text == "" and ids.prompt is None
    assert isinstance(text.error, InvalidRequest) and isinstance(chat.error, InvalidRequest)
    assert [output.outputs[0].text for output in llm.stream([3, 4, 5], greedy(2))] == ["", ""]
    assert_idle(llm)


def test_lengths_are_limited_by_the_model_the_pool_and_the_caller():
    model = random_llama()
    model.generation_config.eos_token_id = None
    for options, limit in (({"num_blocks": 64}, 64), ({"num_blocks": 2}, 32), ({"num_blocks": 64, "max_model_len": 20}, 20)):
        llm = LLM(model, **options)
        long, full = llm.generate([[3] * limit, [3] * (limit - 2)], greedy(50), use_tqdm=False)
        assert isinstance(long.error, RequestTooLong) and long.error.max_model_len == limit
        assert len(tokens_of(full)) == 2 and full.outputs[0].finish_reason == "length"
        assert_idle(llm)


def test_dtype_of_a_loaded_model():
    assert LLM(random_llama(), num_blocks=4).runner.kv_cache.layers[0][0].dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16"):
        llm = LLM(random_llama(), num_blocks=4, dtype=dtype, device="cpu")
        assert llm.model.dtype == llm.runner.kv_cache.layers[0][0].dtype == torch.bfloat16
        assert len(tokens_of(llm.generate([3, 4], greedy(2), use_tqdm=False)[0])) == 2


def test_dtype_and_tokenizer_of_a_named_model():
    llm = LLM(MODEL_PATH, tokenizer=str(MODEL_PATH), dtype="bfloat16", num_blocks=4)
    assert llm.model.dtype == torch.bfloat16 and llm.tokenizer.decode(TOKENIZER("Hi").input_ids, skip_special_tokens=True) == "Hi"
    assert LLM(tokenizer=FALLBACK, num_blocks=4).tokenizer is FALLBACK


@pytest.mark.parametrize("options", [{"block_size": 0}, {"num_blocks": 0}, {"num_blocks": 1.5}, {"max_model_len": 0}, {"max_model_len": -1}], ids=repr)
def test_sizes_are_checked_before_the_model_is_read(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LLM("no/such-model", **options)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="Linear"):
        LLM(torch.nn.Linear(2, 2))


def test_end_of_sequence_tokens():
    model = random_llama()
    for value, want in ((7, [7]), ([7, 8], [7, 8]), (None, [])):
        model.generation_config.eos_token_id = value
        assert eos_token_ids(model, None) == want
    assert eos_token_ids(model, TOKENIZER) == [TOKENIZER.eos_token_id]
    model.generation_config = None
    assert eos_token_ids(model, None) == []


def test_prefix_caching_can_be_switched_off():
    llm = LLM(num_blocks=32, enable_prefix_caching=False)
    for _ in range(2):
        assert llm.generate("What is a slot?" * 5, greedy(2), use_tqdm=False)[0].num_cached_tokens == 0
    assert llm.stats().num_cached_blocks == 0


def test_two_engines_over_one_model_do_not_disturb_each_other():
    model, params = random_llama(), greedy(8)
    model.generation_config.eos_token_id = None
    first, second = LLM(model, num_blocks=8, block_size=4), LLM(model, num_blocks=8, block_size=4)
    want = tokens_of(first.generate([3, 4, 5, 6, 7, 8], params, use_tqdm=False)[0])
    second.generate([9, 8, 7, 6, 5, 4], params, use_tqdm=False)
    [again] = first.generate([3, 4, 5, 6, 7, 8], params, use_tqdm=False)
    assert again.num_cached_tokens > 0 and tokens_of(again) == want


@pytest.mark.parametrize("model", [None, "loaded"])
@pytest.mark.parametrize("dtype", ["float33", "nn", 32, None])
def test_dtype_that_is_none(model, dtype):
    with pytest.raises(ValueError, match="must be 'auto', or a torch dtype"):
        LLM(LLM(num_blocks=8).model if model else None, dtype=dtype)


@pytest.mark.parametrize("name", ["lru", "fifo", "lfu", "second-chance", "reuse-bonus"])
def test_answers_do_not_depend_on_the_eviction_policy(name):
    model, params = LLM(num_blocks=8).model, greedy(12, ignore_eos=True)
    prompts = [[*range(5, 45), i] for i in range(5)] + [[*range(60, 100)]] * 2
    llm = LLM(model, num_blocks=12, eviction_policy=name)
    for _ in range(2):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [tokens_of(output) for output in outputs] == [tokens_of(output) for output in LLM(model).generate(prompts, params, use_tqdm=False)]
    assert llm.stats().num_free_blocks == 12


@pytest.mark.parametrize("options", [{"eviction_policy": "mru"}, {"scheduling_policy": "lifo"}, {"max_prefill_chunk": 0}], ids=str)
def test_policies_that_do_not_exist(options):
    with pytest.raises(ValueError):
        LLM(**options)
