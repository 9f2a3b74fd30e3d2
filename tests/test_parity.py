"""Greedy float32 output equals `model.generate`, token for token, with everything switched on that could break it."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GptOssConfig, LlamaConfig, MistralConfig, Qwen3Config

from pagedlit.llm import LLM
from pagedlit.serving.sequence import SamplingParams, SequenceStatus
from pagedlit.tiny import MODEL_PATH

NUM_NEW = 20
COMMON = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
WINDOWED = dict(head_dim=16, sliding_window=8)
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**COMMON, **WINDOWED, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**COMMON, **WINDOWED, query_pre_attn_scalar=16),
    "gpt_oss": lambda: GptOssConfig(**COMMON, **WINDOWED, num_local_experts=4, num_experts_per_tok=2),
}


def random_model(name):
    """A tiny model whose random weights are large enough that every token of the context counts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            elif "sinks" in parameter_name:
                parameter.normal_()
    model.generation_config.eos_token_id = None
    return model


def shipped_model():
    model = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # go on to the end: more tokens to compare
    return model


def some_prompts(vocab_size):
    """Mixed lengths, of which some share a prefix with another up to the middle of a block, or all of it."""
    rng = random.Random(1)
    prompts = [[rng.randrange(3, vocab_size) for _ in range(length)] for length in (1, 50, 17, 5, 33, 48, 2, 31)]
    return prompts + [prompts[1] + [5, 6], prompts[1][:-3] + [7], prompts[1], prompts[4][:20]]


def generate_one_by_one(model, prompts):
    """The oracle: the model's own greedy generation, each prompt alone."""
    outputs = [model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False) for prompt in prompts]
    return [output[0, len(prompt) :].tolist() for output, prompt in zip(outputs, prompts)]


@pytest.fixture(scope="module", params=["shipped", *CONFIGS])
def case(request):
    """A model, prompts, and what the model itself generates, before anything here has touched it."""
    model = shipped_model() if request.param == "shipped" else random_model(request.param)
    prompts = some_prompts(model.config.vocab_size)
    return model, prompts, generate_one_by_one(model, prompts)


def greedy(max_tokens=NUM_NEW, n=1):
    return SamplingParams(temperature=0, max_tokens=max_tokens, n=n)


def serve(llm, prompts):
    """The answers; some prompts of a batch are answered twice, from one prefill, and both say the same."""
    outputs = llm.generate(prompts, [greedy(n=2 if i % 6 == 4 else 1) for i in range(len(prompts))], use_tqdm=False)
    assert not any(output.error for output in outputs)
    assert all(answer.token_ids == output.outputs[0].token_ids for output in outputs for answer in output.outputs)
    assert_whole(llm)
    return [output.outputs[0].token_ids for output in outputs]


def assert_whole(llm):
    """Nothing is held any more, and nothing has leaked."""
    llm.engine.check_invariants()
    assert llm.stats().num_free_blocks == llm.stats().num_blocks


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_mixed_lengths_in_one_batch(case, backend):
    model, prompts, want = case
    llm = LLM(model, num_blocks=128, attention_backend=backend, enable_prefix_caching=False)
    assert serve(llm, prompts) == want
    assert llm.stats().num_cached_tokens == llm.stats().num_preemptions == 0


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_chunked_prefill_cold_and_warm_cache_and_preemption(case, block_size):
    model, prompts, want = case
    llm = LLM(model, block_size=block_size, num_blocks=144 // block_size + 2, max_num_batched_tokens=24)
    assert serve(llm, prompts) == want
    cold = llm.stats()
    assert cold.num_preemptions > 0, "the pool is meant to be too small"
    assert serve(llm, prompts) == want
    assert llm.stats().num_cached_tokens > cold.num_cached_tokens, "the second time is meant to hit"
    assert block_size == 1 or llm.stats().num_copies > 0, "some hit is meant to end inside a block"


def test_warm_cache_hits_whole_prompts_and_parts_of_blocks(case):
    model, prompts, want = case
    llm = LLM(model, block_size=16, num_blocks=256)
    for prompt, tokens in zip(prompts, want):
        assert serve(llm, [prompt]) == [tokens]
    [full, part] = llm.generate([prompts[1], prompts[1][:-3] + [9]], greedy(1), use_tqdm=False)
    assert full.num_cached_tokens == len(prompts[1]) - 1, "all but the last token"
    assert part.num_cached_tokens == len(prompts[1]) - 3, "all but what differs, inside a block"
    assert serve(llm, [prompts[1] + want[1] + [11]])  # the next turn of a conversation
    assert llm.stats().num_copies > 0


def test_next_turn_hits_generated_tokens(case):
    model, prompts, want = case
    llm = LLM(model, block_size=16, num_blocks=64)
    serve(llm, [prompts[4]])
    turn = prompts[4] + want[4] + [11, 12]
    [output] = llm.generate([turn], greedy(), use_tqdm=False)
    assert output.num_cached_tokens == len(prompts[4]) + NUM_NEW - 1, "all that was computed: the last sampled token was not"
    assert output.outputs[0].token_ids == generate_one_by_one(model, [turn])[0]


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_fork_in_any_phase(case, num_steps):
    model, prompts, want = case
    llm = LLM(model, block_size=16, num_blocks=24, max_num_batched_tokens=32)
    engine, answers = llm.engine, {}
    numbers = {engine.add_request(prompts[i], greedy()): i for i in (1, 4, 0)}
    for _ in range(num_steps):
        engine.step()
    for seq_id in list(numbers):
        if seq_id in engine.sequences:
            numbers[engine.fork(seq_id)] = numbers[seq_id]
            engine.check_invariants()
    for seq in engine.drain():
        assert seq.status is SequenceStatus.FINISHED
        answers[seq.seq_id] = seq.output_token_ids
    assert len(answers) == len(numbers) == 6
    assert all(answers[seq_id] == want[i] for seq_id, i in numbers.items())
    assert_whole(llm)


def test_the_model_still_generates_by_itself(case):
    model, prompts, want = case
    LLM(model, num_blocks=16)
    assert generate_one_by_one(model, prompts[:3]) == want[:3]
