"""Every option of a request, in every state of the engine, against `model.generate` or a plain loop without any cache."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llm import TOKENIZER, assert_idle, press_ctrl_c, toy_room
from toy_world import record
from transformers import LlamaConfig, LlamaForCausalLM

from pagedlit.compute.sampler import sample
from pagedlit.llm import LLM, PromptServer
from pagedlit.serving.engine import ToyRunner, build_engine, mix_seed, toy_reference
from pagedlit.serving.scheduler import RunnerOutput
from pagedlit.serving.sequence import SamplingParams
from pagedlit.tiny import questions

VOCAB, NUM_NEW = 61, 12
RNG = random.Random(2)
LONG = [RNG.randrange(3, VOCAB) for _ in range(23)]
PROMPTS = [[7], LONG, LONG[:14] + [5, 6, 9]]
NEIGHBOURS = [LONG[:19] + [4], [9, 8, 7, 6]]


def greedy(max_tokens: int = NUM_NEW, **others: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


def tiny_model() -> LlamaForCausalLM:
    """Random weights large enough that every token of the context counts."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=128, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(20 if "embed" in name else 12)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


MODEL = tiny_model()


@torch.inference_mode()
def logits_after(token_ids: list[int]) -> torch.Tensor:  # [T, V]
    """The model's own forward over all of it."""
    return MODEL(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


@cache
def continuation(prompt: tuple[int, ...]) -> list[int]:
    """What the model itself says, greedily."""
    return MODEL.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)[0, len(prompt) :].tolist()


EOS = [continuation(tuple(PROMPTS[1]))[4], continuation(tuple(PROMPTS[2]))[5]]  # tokens that are met
STOP = [continuation(tuple(PROMPTS[1]))[6], continuation(tuple(PROMPTS[0]))[4]]


def next_token(token_ids: list[int], num_prompt_tokens: int, params: SamplingParams, seed: int, eos: list[int]) -> tuple[int, torch.Tensor]:
    """The definition: the token, and the log-probabilities that the model itself gave to all tokens."""
    raw = logits_after(token_ids)[-1]
    logits, output = raw.clone(), token_ids[num_prompt_tokens:]
    for token_id in set(token_ids):
        theta = params.repetition_penalty
        logits[token_id] = logits[token_id] * theta if logits[token_id] < 0 else logits[token_id] / theta
    for token_id, times in Counter(output).items():
        logits[token_id] -= params.frequency_penalty * times + params.presence_penalty
    if len(output) < params.min_tokens:
        logits[[*(params.stop_token_ids or []), *([] if params.ignore_eos else eos)]] = -math.inf
    if params.temperature == 0:
        return int(logits.argmax()), raw.double().log_softmax(0)
    filters = SamplingParams(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
    return int(sample(logits[None], [filters], [seed], [len(output)])[0]), raw.double().log_softmax(0)


def key(params: SamplingParams) -> tuple:
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in vars(params).items() if name in SamplingParams.__dataclass_fields__)


PLAIN: dict = {}


def plain(prompt: list[int], params: SamplingParams, seed: int, eos: list[int]) -> tuple:
    """One answer, without cache, batch or engine: tokens, log-probabilities, finish reason, stop reason."""
    if (place := (tuple(prompt), key(params), seed, tuple(eos))) not in PLAIN:
        token_ids, rows, end = list(prompt), [], None
        while end is None:
            token_id, row = next_token(token_ids, len(prompt), params, seed, eos)
            token_ids.append(token_id)
            rows.append(row)
            if len(rows) > params.min_tokens and token_id in eos and not params.ignore_eos:
                end = "stop", None
            elif len(rows) > params.min_tokens and token_id in (params.stop_token_ids or ()):
                end = "stop", token_id
            elif len(rows) == params.max_tokens:
                end = "length", None
        PLAIN[place] = token_ids[len(prompt) :], rows, *end
    return PLAIN[place]


def check_ranked(ours: dict, token_id: int, row: torch.Tensor, num_tops: int) -> None:
    """A token's log-probabilities against a row of all of them: its own, then the most likely, in falling order."""
    tops = row.topk(num_tops).indices.tolist()
    assert list(ours) == [token_id, *(top for top in tops if top != token_id)]
    for each, logprob in ours.items():
        assert logprob.logprob == pytest.approx(row[each].item(), abs=2e-4)
        assert logprob.rank == 1 + int((row > row[each]).sum()) and logprob.decoded_token is None


def check(output, params: SamplingParams, eos: list[int]) -> None:
    """An output against the definition, in everything that it says."""
    prompt = output.prompt_token_ids
    assert output.finished and output.error is None and len(output.outputs) == params.n
    for index, answer in enumerate(output.outputs):
        seed = params.seed or 0
        token_ids, rows, finish_reason, stop_reason = plain(prompt, params, mix_seed(seed, index) if index else seed, eos)
        assert answer.token_ids == token_ids and answer.index == index
        assert (answer.finish_reason, answer.stop_reason) == (finish_reason, stop_reason)
        if params.logprobs is None:
            assert answer.logprobs is None and answer.cumulative_logprob is None
            continue
        for ours, token_id, row in zip(answer.logprobs, token_ids, rows, strict=True):
            check_ranked(ours, token_id, row, params.logprobs)
        total = sum(row[token_id].item() for token_id, row in zip(token_ids, rows, strict=True))
        assert answer.cumulative_logprob == pytest.approx(total, abs=2e-3)
    check_prompt_logprobs(output, params)


def check_prompt_logprobs(output, params: SamplingParams) -> None:
    """Those of the prompt, against one forward over all of it."""
    prompt, ours = output.prompt_token_ids, output.prompt_logprobs
    if params.prompt_logprobs is None:
        assert ours is None
        return
    rows = logits_after(prompt).double().log_softmax(1)
    assert len(ours) == len(prompt) and ours[0] is None
    for position in range(1, len(prompt)):
        check_ranked(ours[position], prompt[position], rows[position - 1], params.prompt_logprobs)


WORLDS = {  # how the engine is set up; the small pools preempt, the small budgets cut prompts into chunks
    "roomy": dict(block_size=16, num_blocks=64),
    "blocks of 1": dict(block_size=1, num_blocks=50, max_num_batched_tokens=9),
    "blocks of 3": dict(block_size=3, num_blocks=17, max_num_batched_tokens=8),
    "blocks of 16": dict(block_size=16, num_blocks=4, max_num_batched_tokens=7),
    "no prefix cache": dict(block_size=3, num_blocks=17, max_num_batched_tokens=8, enable_prefix_caching=False),
    "two seats": dict(block_size=4, num_blocks=64, max_num_seqs=2),
}

MIXED_PENALTIES = dict(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.4)
OPTIONS = {  # name: parameters beyond max_tokens; and whether the model has end-of-sequence tokens
    "greedy": (dict(temperature=0), False),
    "n=2 greedy": (dict(temperature=0, n=2), False),
    "n=4 greedy": (dict(temperature=0, n=4), False),
    "n=2 sampled": (dict(n=2, seed=3), False),
    "n=4 sampled, filtered": (dict(n=4, seed=2**63 + 5, top_k=9, top_p=0.9, min_p=0.01, temperature=1.7), False),
    "n=3, ends at different tokens": (dict(n=3, seed=8, temperature=2.0), True),
    "logprobs=0": (dict(temperature=0, logprobs=0), False),
    "logprobs=1, sampled": (dict(logprobs=1, seed=4), False),
    "logprobs=5, n=2": (dict(logprobs=5, seed=4, n=2), False),
    "logprobs of all tokens": (dict(logprobs=VOCAB, temperature=0), False),
    "prompt_logprobs=0": (dict(temperature=0, prompt_logprobs=0), False),
    "prompt_logprobs=3, n=2, logprobs=2": (dict(prompt_logprobs=3, seed=5, n=2, logprobs=2), False),
    "eos": (dict(temperature=0), True),
    "ignore_eos": (dict(temperature=0, ignore_eos=True), True),
    "stop_token_ids": (dict(temperature=0, stop_token_ids=STOP), False),
    "stop_token_ids beside eos, n=2": (dict(temperature=0, stop_token_ids=STOP, n=2), True),
    "stop_token_ids, ignore_eos": (dict(temperature=0, stop_token_ids=STOP, ignore_eos=True), True),
    "an eos among stop_token_ids, ignored as eos": (dict(temperature=0, stop_token_ids=EOS[:1], ignore_eos=True), True),
    "min_tokens": (dict(temperature=0, min_tokens=8), True),
    "min_tokens, stop_token_ids, n=2": (dict(seed=6, min_tokens=5, stop_token_ids=STOP, n=2, logprobs=1), True),
    "min_tokens = max_tokens": (dict(temperature=0, min_tokens=NUM_NEW, stop_token_ids=STOP), True),
    "repetition_penalty": (dict(temperature=0, repetition_penalty=1.4), False),
    "repetition_penalty below 1": (dict(temperature=0, repetition_penalty=0.8), False),
    "presence_penalty": (dict(temperature=0, presence_penalty=2.0), False),
    "frequency_penalty": (dict(temperature=0, frequency_penalty=1.5), False),
    "all penalties, n=3, min_tokens": (dict(seed=7, n=3, min_tokens=4, logprobs=1, **MIXED_PENALTIES), True),
}


def build(eos: list[int], **world: object) -> LLM:
    MODEL.generation_config.eos_token_id = eos or None
    try:
        return LLM(MODEL, **world)
    finally:
        MODEL.generation_config.eos_token_id = None


def serve_among_others(llm: LLM, params: SamplingParams, eos: list[int], prompts: list[list[int]] = PROMPTS) -> list:
    """The prompts with these parameters, among ordinary requests that are checked as well; then nothing is held."""
    others = [greedy(), SamplingParams(seed=11, max_tokens=9, top_k=20)]
    pairs = [(NEIGHBOURS[0], others[0]), *((prompt, params) for prompt in prompts), (NEIGHBOURS[1], others[1])]
    outputs = llm.generate([prompt for prompt, _ in pairs], [each for _, each in pairs], use_tqdm=False)
    for output, (_, each) in zip(outputs, pairs, strict=True):
        check(output, each, eos)
    assert_idle(llm)
    return outputs[1:-1]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option, world):
    """From a cache that knows parts of the prompts, among others; in two worlds once more, when it knows all of them."""
    given_params, has_eos = OPTIONS[option]
    eos, params = EOS if has_eos else [], SamplingParams(max_tokens=NUM_NEW, **given_params)
    llm = build(eos, **WORLDS[world])
    llm.generate(LONG[:18], greedy(1), use_tqdm=False)
    first = serve_among_others(llm, params, eos)
    again = llm.generate(PROMPTS, params, use_tqdm=False) if world in ("roomy", "blocks of 3") else []
    for output in again:
        check(output, params, eos)
    assert_idle(llm)
    hits = [output.num_cached_tokens for output in (*first, *again)]
    if params.prompt_logprobs is not None or not llm.engine.scheduler.cache.enabled:
        assert not any(hits), "every token of the prompt had to be computed"
    else:
        assert sum(hits) > 0
    if option == "prompt_logprobs=0" and world in ("roomy", "two seats"):
        [later] = llm.generate(LONG, greedy(), use_tqdm=False)
        assert later.num_cached_tokens == len(LONG) - 1, "what it computed is there for others"
        check(later, greedy(), eos)


@pytest.mark.parametrize("world", [world for world in WORLDS if "max_num_batched_tokens" in WORLDS[world]])
def test_the_small_worlds_preempt_and_cut(world):
    llm = build([], **WORLDS[world])
    log = record(llm.engine)
    outputs = serve_among_others(llm, SamplingParams(max_tokens=NUM_NEW, n=2, seed=1, prompt_logprobs=1), [])
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    chunks = Counter(event.seq_id for event in log if event.kind == "scheduled" and event.num_tokens > 1)
    assert max(chunks.values()) > 1


def test_every_option_is_met_where_it_bites():
    """The table would show little if answers repeated one token, if none ended early, or if no penalty changed a token."""
    said = [continuation(tuple(prompt)) for prompt in PROMPTS + NEIGHBOURS]
    assert all(len(set(tokens)) > 6 for tokens in said) and continuation((5, *LONG[1:])) != said[1], "the whole context counts"

    def answers(**options):
        eos = EOS if options.pop("eos", False) else []
        return [plain(prompt, SamplingParams(max_tokens=NUM_NEW, **options), options.get("seed", 0), eos) for prompt in PROMPTS]

    base = [tokens for tokens, *_ in answers(temperature=0)]
    assert {end for *_, end, _ in answers(temperature=0, eos=True)} == {"stop", "length"}
    assert {reason for *_, reason in answers(temperature=0, stop_token_ids=STOP)} >= set(STOP)
    for options in (dict(repetition_penalty=1.4), dict(repetition_penalty=0.8), dict(presence_penalty=2.0), dict(frequency_penalty=1.5), dict(min_tokens=8, eos=True)):
        assert [tokens for tokens, *_ in answers(temperature=0, **options)] != base, options


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (dict(), dict()),
        (dict(stop_token_ids=STOP), dict(eos_token_id=STOP)),
        (dict(eos=EOS), dict(eos_token_id=EOS)),
        (dict(eos=EOS, stop_token_ids=STOP), dict(eos_token_id=EOS + STOP)),
        (dict(eos=EOS, ignore_eos=True), dict()),
        (dict(eos=EOS, min_tokens=8), dict(eos_token_id=EOS, min_new_tokens=8)),
        (dict(eos=EOS, min_tokens=3, stop_token_ids=STOP), dict(eos_token_id=EOS + STOP, min_new_tokens=3)),
        (dict(repetition_penalty=1.4), dict(repetition_penalty=1.4)),
        (dict(repetition_penalty=0.8), dict(repetition_penalty=0.8)),
        (dict(repetition_penalty=1.2, eos=EOS, min_tokens=6), dict(repetition_penalty=1.2, eos_token_id=EOS, min_new_tokens=6)),
    ],
    ids=str,
)  # fmt: skip
def test_the_model_itself_says_the_same(ours, theirs):
    """Where `generate` has the option: the engine, the plain loop above, and it."""
    eos = ours.get("eos", [])
    params = greedy(n=2, **{name: value for name, value in ours.items() if name != "eos"})
    want = [MODEL.generate(torch.tensor([p]), max_new_tokens=NUM_NEW, do_sample=False, **theirs)[0, len(p) :].tolist() for p in PROMPTS]
    assert [plain(prompt, params, 0, eos)[0] for prompt in PROMPTS] == want
    for world in ("roomy", "blocks of 3"):
        outputs = serve_among_others(build(eos, **WORLDS[world]), params, eos)
        assert [[answer.token_ids for answer in output.outputs] for output in outputs] == [[tokens] * 2 for tokens in want]


# several answers


def test_one_prefill_for_all_answers_and_shared_blocks():
    """Counted in the event stream: the prompt's tokens once, then one token an answer and step."""
    llm = build([], block_size=4, num_blocks=64)
    log = record(llm.engine)
    request_id = llm.add_request(LONG, SamplingParams(n=4, seed=1, max_tokens=NUM_NEW))
    llm.step()
    assert llm.engine.scheduler.cache.num_blocks - llm.stats().num_free_blocks == 6, "ceil(23 / 4) blocks for four answers"
    llm.step()
    assert 64 - llm.stats().num_free_blocks == 5 + 4, "the full ones shared, and a last one each"
    while llm.has_unfinished_requests():
        [output] = llm.step()
    check(output, SamplingParams(n=4, seed=1, max_tokens=NUM_NEW), [])
    assert output.request_id == request_id
    assert sum(event.num_tokens for event in log if event.kind == "scheduled") == len(LONG) + 4 * (NUM_NEW - 1)
    assert sum(event.kind == "copied" for event in log) == llm.stats().num_copies == 3, "the last to write keeps the original"


def test_a_prompt_that_is_cached_whole_forks_from_the_middle_of_a_block():
    llm = build([], block_size=16, num_blocks=16)
    for _ in range(2):
        [output] = llm.generate(LONG, SamplingParams(n=3, seed=2, max_tokens=NUM_NEW), use_tqdm=False)
        check(output, SamplingParams(n=3, seed=2, max_tokens=NUM_NEW), [])
    assert output.num_cached_tokens == len(LONG) - 1


@pytest.mark.parametrize("world", WORLDS)
def test_more_answers_than_seats_and_blocks(world):
    """Eleven answers, where neither the pool nor the seats hold them at a time."""
    params = SamplingParams(n=11, seed=4, max_tokens=NUM_NEW)
    llm = build([], **WORLDS[world])
    check(serve_among_others(llm, params, [], [LONG])[0], params, [])


def test_streams_of_several_answers_grow_together():
    llm, params = build([], **WORLDS["blocks of 3"]), SamplingParams(n=3, seed=4, max_tokens=NUM_NEW)
    shown = [[answer.token_ids for answer in output.outputs] for output in llm.stream(LONG, params)]
    for before, after in itertools.pairwise(shown):
        assert all(longer[: len(shorter)] == shorter for shorter, longer in zip(before, after, strict=True)) and before != after
    assert all(shown[0]), "the first tokens come together"


def test_answers_differ_and_are_the_same_again_whatever_else_is_served():
    params = SamplingParams(n=4, seed=21, max_tokens=NUM_NEW)
    said = []
    for world, others in (("roomy", []), ("blocks of 3", NEIGHBOURS), ("two seats", [LONG, LONG])):
        llm = build([], **WORLDS[world])
        *_, output = llm.generate([*others, PROMPTS[2]], [*[SamplingParams(max_tokens=5)] * len(others), params], use_tqdm=False)
        said.append([answer.token_ids for answer in output.outputs])
    assert said[0] == said[1] == said[2] and len(set(map(tuple, said[0]))) == 4


def test_requests_without_a_seed_have_each_their_own_of_the_engine_s():
    """The documented derivation: mix_seed(the engine's, the sequence's id), ids counting every answer."""
    for engine_seed in (0, 9):
        llm = build([], seed=engine_seed, **WORLDS["blocks of 3"])
        outputs = llm.generate([LONG, LONG, [7]], [SamplingParams(n=2), SamplingParams(), SamplingParams(n=3)], use_tqdm=False)
        for output, first_id in zip(outputs, (0, 2, 3), strict=True):
            own = mix_seed(engine_seed, first_id)
            seeds = [mix_seed(own, index) if index else own for index in range(len(output.outputs))]
            want = [plain(output.prompt_token_ids, SamplingParams(), seed, [])[0] for seed in seeds]
            assert [answer.token_ids for answer in output.outputs] == want


def test_greedy_tokens_have_rank_1():
    [output] = build([], **WORLDS["blocks of 3"]).generate(LONG, greedy(logprobs=2, n=2), use_tqdm=False)
    for answer in output.outputs:
        assert all(each[token_id].rank == 1 and list(each)[0] == token_id for each, token_id in zip(answer.logprobs, answer.token_ids, strict=True))
        assert all(len(each) == 2 for each in answer.logprobs), "the chosen token is not named twice"


@pytest.mark.parametrize("option", ["logprobs", "prompt_logprobs"])
def test_logprobs_while_the_answer_grows(option):
    """As many as there are tokens, and never taken back; of a prompt as far as it has been computed."""
    llm = build([], **WORLDS["blocks of 3"])
    params, before = SamplingParams(n=2, seed=3, max_tokens=6, **{option: 1}), None
    for output in llm.stream([LONG, PROMPTS[2]], params):
        for answer in output.outputs if option == "logprobs" else ():
            assert len(answer.logprobs) == len(answer.token_ids)
        if option == "prompt_logprobs":
            check_prompt_logprobs(output, params)
        if before is not None and before.request_id == output.request_id and option == "logprobs":
            assert all(new.logprobs[: len(old.logprobs)] == old.logprobs for old, new in zip(before.outputs, output.outputs, strict=True))
        before = output
    assert_idle(llm)


def test_an_output_s_lists_are_the_reader_s_own():
    """Whoever changes what was handed out changes nothing in the engine."""
    llm = build([], **WORLDS["roomy"])
    params = greedy(logprobs=1, prompt_logprobs=1)
    for output in llm.stream(LONG, params):
        last = [list(output.outputs[0].token_ids), list(output.outputs[0].logprobs), list(output.prompt_logprobs)]
        output.outputs[0].token_ids.clear(), output.outputs[0].logprobs.clear(), output.prompt_logprobs.clear()
    assert [len(each) for each in last] == [NUM_NEW, NUM_NEW, len(LONG)]


@pytest.mark.parametrize("num_steps", range(1, 9))
def test_prompt_logprobs_preempted_in_the_middle(num_steps):
    """By hand, after so many steps, whatever had been computed: no token is rated twice, none is left out."""
    llm = build([], block_size=3, num_blocks=40, max_num_batched_tokens=5)
    params = SamplingParams(n=2, seed=1, max_tokens=5, prompt_logprobs=2, logprobs=0)
    llm.generate(LONG[:10], greedy(1), use_tqdm=False)
    request_id = llm.add_request(LONG, params)
    for _ in range(num_steps):
        llm.step()
    bystander = llm.engine.add_request([8, 8, 8], greedy(2))
    llm.engine.suspects = [llm.engine.sequences[bystander]]  # which is run alone: all others give their blocks back
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
        llm.engine.check_invariants()
    assert outputs[-1].request_id == request_id and outputs[-1].metrics.num_preemptions > 0
    check(outputs[-1], params, [])
    assert_idle(llm)


# stop strings: a runner that recites, so that any text can be said


class Reciter(ToyRunner):
    """Says a given text for each seed, token after token; through the pool of the toy, whose own tokens nobody sees."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.scripts: dict[int, list[int]] = {}

    def run(self, batch):
        super().run(batch)
        return RunnerOutput([self.scripts[seed][num] if num < len(self.scripts[seed]) else 1 for seed, num in zip(batch.seeds, batch.output_lens)])


def reciting_room(num_blocks: int = 64, block_size: int = 4, **limits: object) -> PromptServer:
    room = PromptServer(build_engine(Reciter(num_blocks, block_size), num_blocks, block_size, **limits), TOKENIZER, 768)
    return room


def recite(room: PromptServer, scripts: list[list[int]], seed: int = 5, **options: object) -> SamplingParams:
    """Parameters of a request whose answers are these."""
    for index, script in enumerate(scripts):
        room.engine.runner.scripts[mix_seed(seed, index) if index else seed] = script
    return SamplingParams(**dict(n=len(scripts), seed=seed, max_tokens=max(1, *map(len, scripts))) | options)


def tokens_for(text: str, seed: int) -> list[int]:
    """A text in tokens, cut at random places into pieces that the tokenizer encodes on their own; some in single bytes."""
    rng, token_ids, data = random.Random(seed), [], text.encode()
    while data:
        size = rng.choice([1, 2, 3, 8, 30])
        head, data = data[:size], data[size:]
        try:
            token_ids += TOKENIZER(head.decode(), add_special_tokens=False).input_ids
        except UnicodeDecodeError:
            token_ids += [BYTES[byte] for byte in head]
    return token_ids


def byte_tokens() -> dict[int, int]:
    """The token of each byte that occurs in valid UTF-8, found by encoding characters that the tokenizer has no token for."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table: the other bytes come after these
    letters = {byte: chr(byte) for byte in alphabet} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in alphabet)}
    return {byte: TOKENIZER.convert_tokens_to_ids(letter) for byte, letter in letters.items()}


BYTES = byte_tokens()


def test_texts_are_cut_into_tokens_at_any_byte():
    text = "the prefix cache of a block table, naïve ☕ 👩‍🚀 漢字"
    cuts = [tokens_for(text, seed) for seed in range(20)]
    assert all(TOKENIZER.decode(token_ids) == text for token_ids in cuts) and len(set(map(tuple, cuts))) > 10


def shown_of(token_ids: list[int], finished: bool) -> str:
    """The text of some tokens; of an unfinished answer, without the bytes of half a character."""
    text = TOKENIZER.decode(token_ids, skip_special_tokens=True)
    return text if finished else text.rstrip("\ufffd")


def cut(token_ids: list[int], stops: list[str], min_tokens: int) -> tuple[list[int], str, str | None]:
    """Plainly: token by token, look for a stop string that ends in what is new; the text ends before it, the tokens after it."""
    num_seen = 0
    for num_tokens in range(1, len(token_ids) + 1):
        text = shown_of(token_ids[:num_tokens], num_tokens == len(token_ids))
        found = [(start, stop) for stop in stops for start in range(len(text)) if text.startswith(stop, start) and start + len(stop) > num_seen]
        if found and num_tokens > min_tokens:
            start, stop = min(found, key=lambda each: each[0])
            return token_ids[:num_tokens], text[:start], stop
        num_seen = len(text)
    return token_ids, shown_of(token_ids, True), None


def check_streamed(room: PromptServer, params: SamplingParams, scripts: list[list[int]]) -> None:
    """Every answer is what `cut` says, and no text shown on the way has to be taken back."""
    outputs = list(room.stream([3, 4, 5, 6, 7], params))
    for index, script in enumerate(scripts):
        token_ids, text, stop = cut(script[: params.max_tokens], list(params.stop_strings), params.min_tokens)
        answer = outputs[-1].outputs[index]
        assert (answer.token_ids, answer.text, answer.stop_reason) == (token_ids, text, stop)
        assert answer.finish_reason == ("stop" if stop else "length")
        for output in outputs:
            assert text.startswith(output.outputs[index].text), "shown too early"
    assert outputs[-1].finished and not any(output.finished for output in outputs[:-1])
    assert_idle(room)


LETTERS = st.text(st.sampled_from("ab é☕👩🚀\u200d漢"), min_size=1, max_size=24)


@settings(deadline=None, max_examples=120)
@given(st.lists(LETTERS, min_size=1, max_size=3), st.data())
def test_stop_strings_in_any_text(texts, data):
    """One or several, overlapping or not, over tokens that end in the middle of characters; `n` answers, each with an end of its own."""
    scripts = [tokens_for(text, data.draw(st.integers(0, 99))) for text in texts]
    starts = [(text, data.draw(st.integers(0, len(text) - 1))) for text in texts]
    stops = [text[start : start + data.draw(st.integers(1, 5))] for text, start in starts]
    stops += data.draw(st.lists(st.text("ab é☕👩", min_size=1, max_size=3), max_size=2))
    room = reciting_room(num_blocks=data.draw(st.sampled_from([16, 64])), max_num_batched_tokens=4)
    min_tokens = data.draw(st.integers(0, 4))
    num_tokens = max(*map(len, scripts), min_tokens, 1)
    scripts = [script + [BYTES[ord("b")]] * (num_tokens - len(script)) for script in scripts]
    params = recite(room, scripts, stop=stops, min_tokens=min_tokens)
    check_streamed(room, params, scripts)


def test_one_stop_string_cuts_at_its_first_occurrence():
    """The simplest reference: say it all, then cut."""
    text = "one two, three; two again"
    for stop in ("two", "t", "e", " ", ", ", "; t", "one", "again", "n", "absent", text, text + "!"):
        for seed in range(4):
            room = reciting_room()
            [output] = room.generate([1, 2], recite(room, [tokens_for(text, seed)], stop=stop), use_tqdm=False)
            place = text.find(stop)
            assert output.outputs[0].text == (text if place < 0 else text[:place])
            assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (("length", None) if place < 0 else ("stop", stop))


def test_a_stop_string_with_the_very_last_token_stops():
    script = tokens_for("abc", 0) if len(tokens_for("abc", 0)) == 3 else [BYTES[ord(c)] for c in "abc"]
    for stop, reason in (("c", "stop"), ("bc", "stop"), ("abc", "stop"), ("abcd", "length")):
        room = reciting_room()
        check_streamed(room, recite(room, [script], stop=stop), [script])
        [output] = room.generate([1], recite(room, [script], stop=stop), use_tqdm=False)
        assert output.outputs[0].finish_reason == reason


def test_what_is_held_back_is_shown_in_the_end():
    """A beginning of a stop string at the end of a text that ends for another reason: by length, by a token, by abort."""
    script = [BYTES[ord(c)] for c in "xaba"]
    room = reciting_room()
    assert [o.outputs[0].text for o in room.stream([1], recite(room, [script], stop="abac"))] == ["x", "x", "x", "xaba"]
    [output] = room.generate([1], recite(room, [[*script, 9]], stop="abac", stop_token_ids=[script[-1]], min_tokens=3), use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("xaba", script[-1])
    request_id = room.add_request([1], recite(room, [script], stop="abac"))
    assert [room.step()[0].outputs[0].text for _ in range(3)] == ["x", "x", "x"]
    assert room.abort(request_id).outputs[0].text == "xab"
    room.step()
    assert_idle(room)


def test_a_stop_string_wins_over_the_other_ends_of_the_same_token():
    b = BYTES[ord("b")]
    room = reciting_room(eos_token_ids=[b])
    for options in (dict(stop_token_ids=[b], ignore_eos=True), dict()):
        [output] = room.generate([1], recite(room, [[BYTES[ord("a")], b]], stop="b", **options), use_tqdm=False)
        assert (output.outputs[0].text, output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("a", "stop", "b")
        assert output.outputs[0].token_ids == [BYTES[ord("a")], b]


def test_end_of_sequence_and_stop_tokens_beside_stop_strings():
    """Whichever comes first."""
    a, b, c = (BYTES[ord(letter)] for letter in "abc")
    room = reciting_room(eos_token_ids=[c])
    for script, text, reason in (([a, b, c], "a", "b"), ([a, c, b], "ac", None), ([a, a, a], "aaa", None)):
        [output] = room.generate([1], recite(room, [script], stop=["b"]), use_tqdm=False)
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == (text, reason)
    [output] = room.generate([1], recite(room, [[a, c, b]], stop=["b"], ignore_eos=True), use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("ac", "b")
    [output] = room.generate([1], recite(room, [[a, c, b]], stop=["b"], ignore_eos=True, stop_token_ids=[c]), use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].stop_reason, output.outputs[0].token_ids) == ("ac", c, [a, c])


def test_answers_end_where_their_own_text_does():
    """The first ends with its first token, while the others go on from its blocks; in pools that preempt, and with one seat."""
    scripts = [[BYTES[ord(c)] for c in text] for text in ("#abcdefgh", "abcdef#gh", "ab#######", "abcdefghi")]
    for num_blocks, seats, caching in ((64, 8, True), (5, 8, True), (5, 8, False), (64, 1, True), (64, 2, False)):
        room = reciting_room(num_blocks, max_num_seqs=seats, enable_prefix_caching=caching)
        params = recite(room, scripts, stop=["#"])
        check_streamed(room, params, scripts)
        [output] = room.generate([3, 4, 5, 6, 7], params, use_tqdm=False)
        assert [answer.text for answer in output.outputs] == ["", "abcdef", "ab", "abcdefghi"]
        assert [answer.finish_reason for answer in output.outputs] == ["stop"] * 3 + ["length"]


def test_logprobs_are_kept_up_to_the_stop_string():
    llm = LLM(num_blocks=64)
    prompt = {"messages": [{"role": "user", "content": questions()[0]["question"]}]}
    [output] = llm.generate(prompt, greedy(60, logprobs=1, n=2, stop=[questions()[0]["answer"][12:20]]), use_tqdm=False)
    for answer in output.outputs:
        assert answer.text == questions()[0]["answer"][:12] and len(answer.logprobs) == len(answer.token_ids)
        named = [each[token_id].decoded_token for each, token_id in zip(answer.logprobs, answer.token_ids, strict=True)]
        assert "".join(named).startswith(answer.text + answer.stop_reason)
        assert answer.cumulative_logprob == pytest.approx(sum(each[t].logprob for each, t in zip(answer.logprobs, answer.token_ids, strict=True)))


def test_stop_strings_of_the_shipped_model():
    """Every short piece of an answer as a stop string, all in one batch, in a pool that preempts."""
    llm = LLM(num_blocks=24, max_num_batched_tokens=32)
    asked = questions()[1]
    prompt, answer = {"messages": [{"role": "user", "content": asked["question"]}]}, asked["answer"]
    stops = [answer[start : start + size] for start in range(0, len(answer) - 6, 9) for size in (1, 3, 6)]
    outputs = llm.generate([prompt] * len(stops), [greedy(80, stop=stop) for stop in stops], use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == [answer[: answer.find(stop)] for stop in stops]
    assert all(output.outputs[0].stop_reason == stop and output.outputs[0].finish_reason == "stop" for output, stop in zip(outputs, stops))
    assert_idle(llm)


# salts, priorities, seeds, metrics


def test_a_salt_keeps_prefixes_apart():
    llm = build([], block_size=4, num_blocks=64)
    hits = []
    for salt in (None, None, "a", "a", "b", None, ""):
        [output] = llm.generate(LONG, greedy(n=2, cache_salt=salt), use_tqdm=False)
        check(output, greedy(n=2, cache_salt=salt), [])
        hits.append(output.num_cached_tokens)
    whole = len(LONG) - 1
    assert hits == [0, whole, 0, whole, 0, whole, 0]
    mixed = llm.generate([LONG + [5]] * 4, [greedy(cache_salt=salt) for salt in ("a", "c", None, "c")], use_tqdm=False)
    assert [output.num_cached_tokens for output in mixed][:3] == [len(LONG), 0, len(LONG)]


@pytest.mark.parametrize("n", [1, 3])
def test_lower_priority_values_go_first(n):
    llm = build([], block_size=4, num_blocks=64, max_num_seqs=n, enable_prefix_caching=False)
    order, priorities = [], [5, 0, -3, 0, 9]
    ids = [llm.add_request(LONG, SamplingParams(n=n, seed=1, max_tokens=3, priority=priority)) for priority in priorities]
    while llm.has_unfinished_requests():
        order += [output.request_id for output in llm.step() if output.finished]
    assert order == [ids[i] for i in (2, 1, 3, 0, 4)]


def test_the_lowest_priority_is_preempted():
    llm = build([], **WORLDS["blocks of 3"])
    outputs = llm.generate([LONG, PROMPTS[2]], [greedy(20, priority=1), greedy(20, priority=0)], use_tqdm=False)
    assert [output.metrics.num_preemptions > 0 for output in outputs] == [True, False]
    for output, priority in zip(outputs, (1, 0), strict=True):
        check(output, greedy(20, priority=priority), [])


def test_metrics_are_in_order():
    """Compared by order alone: how long anything takes depends on the machine."""
    llm = build([], block_size=4, num_blocks=64, max_num_seqs=1)
    outputs = llm.generate([LONG] * 3, SamplingParams(n=2, seed=1, max_tokens=4), use_tqdm=False)
    for output in outputs:
        m = output.metrics
        assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
        assert m.queue_time == m.first_scheduled_time - m.arrival_time and m.num_cached_tokens == output.num_cached_tokens
    first, second, third = (output.metrics for output in outputs)
    assert first.queue_time < second.queue_time < third.queue_time, "one seat: they wait for each other"
    assert first.finished_time <= second.first_scheduled_time and second.finished_time <= third.first_scheduled_time
    assert [m.num_cached_tokens for m in (first, second, third)] == [0, len(LONG) - 1, len(LONG) - 1]


def test_metrics_of_a_request_on_its_way():
    llm = build([], block_size=4, num_blocks=64, max_num_seqs=1)
    first, second = (llm.add_request(LONG, greedy(3)) for _ in range(2))
    waiting = llm.abort(second).metrics
    assert waiting.first_scheduled_time is waiting.first_token_time is waiting.queue_time is None and waiting.finished_time is not None
    running = next(output for output in llm.step() if output.request_id == second).metrics
    assert running == waiting, "what abort returned and what step reports"
    moved = {output.request_id: output.metrics for output in llm.step()}
    assert moved[first].finished_time is None and moved[first].first_token_time is not None
    llm.generate([8], greedy(9), use_tqdm=False)


def test_preemptions_and_hits_are_counted_once_a_request():
    llm = build([], **WORLDS["blocks of 3"])
    log = record(llm.engine)
    llm.generate(LONG[:12], greedy(1), use_tqdm=False)
    [output] = llm.generate([LONG], SamplingParams(n=4, seed=1, max_tokens=NUM_NEW), use_tqdm=False)
    assert output.num_cached_tokens == output.metrics.num_cached_tokens == 12
    assert output.metrics.num_preemptions == sum(event.kind == "preempted" for event in log) > 0
    assert llm.stats().num_preemptions == output.metrics.num_preemptions and llm.stats().num_cached_tokens == 12


@pytest.mark.parametrize("call", [SamplingParams, lambda **options: LLM(MODEL, **options), lambda **options: build([], num_blocks=4).generate([3], **options)], ids=["SamplingParams", "LLM", "generate"])
@pytest.mark.parametrize("name", ["best_of", "max_new_tokens", "do_sample", "length_penalty", "stop_strings", "num_return_sequences"])
def test_unknown_arguments_raise(call, name):
    with pytest.raises(TypeError, match=name):
        call(**{name: 2})


# states that are hard to meet


def toy_answers(prompt: list[int], params: SamplingParams) -> list[list[int]]:
    seeds = [mix_seed(params.seed, index) if index else params.seed for index in range(params.n)]
    return [toy_reference(prompt, params.max_tokens, 26, seed, params) for seed in seeds]


MANY, TOY_PROMPT = SamplingParams(n=4, seed=2, max_tokens=7), [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_blocks, seats", [(64, 8), (6, 8), (64, 2), (64, 1)])
@pytest.mark.parametrize("num_steps", range(8))
def test_abort_of_several_answers_in_any_state(num_steps, num_blocks, seats, caching):
    """Waiting, in the middle of the prompt, just split and not yet written, waiting for a seat, preempted, some finished."""
    room = toy_room(num_blocks, max_num_seqs=seats, max_num_batched_tokens=5, enable_prefix_caching=caching)
    other = room.add_request([9, 9], SamplingParams(temperature=0, max_tokens=12))
    mine = room.add_request(TOY_PROMPT, MANY)
    for _ in range(num_steps):
        room.step()
    if mine in room.requests:
        output = room.abort(mine)
        room.engine.check_invariants()
        assert output.finished and {answer.finish_reason for answer in output.outputs} <= {"abort", "length"}
        for answer, want in zip(output.outputs, toy_answers(TOY_PROMPT, MANY), strict=True):
            assert answer.token_ids == want[: len(answer.token_ids)]
        assert room.abort(mine) is None and len(room.engine.sequences) == (other in room.requests) == len(room.by_seq_id)
    outputs = []
    while room.has_unfinished_requests():
        outputs += room.step()
        room.engine.check_invariants()
    assert [o.outputs[0].token_ids for o in outputs if o.request_id == other][-1:] in ([], [toy_reference([9, 9], 12)])
    [output] = room.generate(TOY_PROMPT, MANY, use_tqdm=False)
    assert [answer.token_ids for answer in output.outputs] == toy_answers(TOY_PROMPT, MANY)
    assert_idle(room)


@pytest.mark.parametrize("victim", range(4))
@pytest.mark.parametrize("num_steps", range(1, 7))
def test_one_answer_ended_from_below_leaves_its_siblings(num_steps, victim):
    """As a stop string does: in each state, the parent among them; with and without seats, blocks and a cache."""
    for num_blocks, seats, caching in ((64, 8, True), (6, 8, True), (6, 8, False), (64, 2, True), (64, 1, False)):
        room = toy_room(num_blocks, max_num_seqs=seats, max_num_batched_tokens=9, enable_prefix_caching=caching)
        mine = room.add_request(TOY_PROMPT, MANY)
        request = room.requests[mine]
        for _ in range(num_steps):
            room.step()
        room.engine.finish(request.answers[victim].seq.seq_id, "stop", "by hand")
        room.engine.check_invariants()
        while room.has_unfinished_requests():
            room.step()
            room.engine.check_invariants()
        for index, (answer, want) in enumerate(zip(request.output().outputs, toy_answers(TOY_PROMPT, MANY), strict=True)):
            assert answer.token_ids == (want[: len(answer.token_ids)] if index == victim else want)
        assert_idle(room)


@pytest.mark.parametrize("num_read", range(1, 12, 2))
def test_closing_a_stream_of_several_answers(num_read):
    for seats in (1, 2, 8):
        room = toy_room(12, max_num_seqs=seats, max_num_batched_tokens=5)
        stream = room.stream([TOY_PROMPT, [3, 1], TOY_PROMPT[:5]], MANY)
        for _ in range(num_read):
            next(stream)
        stream.close()
        assert_idle(room)
        [output] = room.generate(TOY_PROMPT, MANY, use_tqdm=False)
        assert [answer.token_ids for answer in output.outputs] == toy_answers(TOY_PROMPT, MANY)


def test_a_request_is_unfinished_until_its_last_answer_is():
    scripts = [[BYTES[ord(c)] for c in text] for text in ("#", "a#", "aaaa")]
    room = reciting_room()
    room.add_request([1], recite(room, scripts, stop="#"), request_id="mine")
    seen = []
    while room.has_unfinished_requests():
        [output] = room.step()
        seen.append((output.finished, [answer.finish_reason for answer in output.outputs]))
    assert seen == [
        (False, ["stop", None, None]), (False, ["stop", "stop", None]), (False, ["stop", "stop", None]), (True, ["stop", "stop", "length"]),
    ]  # fmt: skip
    assert room.step() == [] and room.abort("mine") is None


@pytest.mark.parametrize("first", range(1, 20))
def test_ctrl_c_at_any_line_with_several_answers_and_stop_strings(first):
    """Nothing of the interrupted call stays; who else was there goes on."""
    scripts = [[BYTES[ord(c)] for c in text] for text in ("ab#cd", "abcde")]
    for at_line in range(first, 10_000, 20 * 11):
        room = reciting_room(24, max_num_batched_tokens=8)
        params, mine = recite(room, scripts, stop="#"), recite(room, [[BYTES[ord("z")]] * 8], seed=99)
        other = room.add_request([2, 3], mine)
        if not press_ctrl_c(at_line, lambda room=room, params=params: room.generate([[1, 2, 3, 4, 5]] * 2, params, use_tqdm=False)):
            break
        assert set(room.requests) <= {other}
        room.engine.check_invariants()
        outputs = []
        while room.has_unfinished_requests():
            outputs += room.step()
        assert outputs[-1].request_id == other and outputs[-1].outputs[0].text == "z" * 8
        assert_idle(room)
    assert at_line > 500, "the call was over too soon"


def test_the_text_of_a_finished_answer_is_not_decoded_again_and_again(monkeypatch):
    """While its siblings go on, an answer that has ended costs nothing."""
    room, num_decoded = reciting_room(), 0
    decode = TOKENIZER.decode

    def counted(token_ids, **options):
        nonlocal num_decoded
        num_decoded += len(token_ids) if isinstance(token_ids, list) else 1
        return decode(token_ids, **options)

    scripts = [[BYTES[ord("a")]] * 50 + [BYTES[ord("#")]] * 100, [BYTES[ord("b")]] * 150]
    params = recite(room, scripts, stop="#")
    monkeypatch.setattr(room.tokenizer, "decode", counted)
    room.generate([1], params, use_tqdm=False)
    assert num_decoded < 8 * 200
