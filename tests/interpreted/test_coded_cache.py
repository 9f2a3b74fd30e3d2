"""Backend "triton" over an eight-bit cache, and its block copies, against chapters 09 and 10: the same bits, the same sums."""

from __future__ import annotations

import random

import pytest
import torch
from coded_steps import SCALES, make_coded_step, same_bits
from test_attention import CHUNKS, DECODES, OPTIONS
from transformers import LlamaConfig, LlamaForCausalLM

from pagedlit.compute import model_runner, triton_backend
from pagedlit.compute.attention import forward_context
from pagedlit.compute.kv_cache import KVCache, LayerSpec, torch_copier
from pagedlit.compute.quantize import E4M3
from pagedlit.compute.triton_backend import BlockCopier, StepPlan
from pagedlit.llm import LLM
from pagedlit.memory.copy_on_write import BlockCopy
from pagedlit.serving.sequence import SamplingParams


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decodes", "mixed"])
@pytest.mark.parametrize("scales", [SCALES, None], ids=["scales", "no scales"])
def test_equals_the_oracle_and_writes_the_same_bits(options, lengths, scales):
    step = make_coded_step(lengths, scales, dims=(12, 8))
    caches = [[cache.clone() for cache in step.kv_cache] for _ in range(2)]
    outs = [step.run_over(cache, backend, **options).double() for cache, backend in zip(caches, ("triton", "cpu"))]
    for out in outs:
        torch.testing.assert_close(out, step.expected(**options), rtol=2e-5, atol=2e-5)
    assert same_bits(*caches)


def test_prefixes_are_read_together(monkeypatch):
    """Three decodes begin with the same 256 tokens: read once for all, with the scales of each head."""
    monkeypatch.setattr(triton_backend, "tokens_that_pay", lambda *cache: 1)
    step = make_coded_step([(300, 1), (290, 1), (280, 1)], block_size=16, dims=(16, 16))
    metadata = step.metadata
    for start in metadata.block_table_start[1:3].tolist():
        metadata.block_tables[start : start + 16] = metadata.block_tables[:16]
    expected, metadata.num_sharers = step.run("cpu"), 3
    torch.testing.assert_close(step.run("triton"), expected, rtol=2e-5, atol=2e-6)
    [plan] = [plan for plan in metadata.plans.values() if isinstance(plan, StepPlan)]
    assert plan.prefix is not None and plan.prefix.items[0, 3] == 256


def test_the_same_bits_at_every_edge_of_the_format():
    """Ties, both ends, zeros and NaN of either sign, through scales that are powers of two and through others."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    finite = codes[codes.isfinite()].sort().values
    numbers = torch.cat([codes, -codes, (finite[1:] + finite[:-1]) / 2, torch.tensor([449.0, 464.0, 480.0, -1e9, torch.inf, -torch.inf, 2.0**-10, -(2.0**-10)])])
    numbers = torch.cat([numbers, torch.randn(1024 - len(numbers)) * 100])
    for scales in (torch.ones(2), torch.tensor([0.125, 64.0]), torch.tensor([0.3, 1.7])):
        step = make_coded_step([(0, 64)], torch.stack([scales, scales.flip(0)]), dims=(8, 8))
        step.key = (numbers.view(64, 2, 8) * scales[:, None]).contiguous()
        step.value = (numbers.view(64, 2, 8).flip(0) * scales.flip(0)[:, None]).contiguous()
        caches = [[cache.clone() for cache in step.kv_cache] for _ in range(2)]
        for cache, backend in zip(caches, ("triton", "reference")):
            step.run_over(cache, backend)
        assert same_bits(*caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, E4M3], ids=str)
def test_copies_in_all_layers(dtype):
    """Chains, circles and fans, layers of two shapes, rows of odd width."""
    rng, specs = random.Random(0), [LayerSpec(2, 8, 8), LayerSpec(1, 5, 3), LayerSpec(2, 8, 8)]
    pools = [KVCache(specs, 12, 4, dtype, "cpu", make_copier) for make_copier in (BlockCopier, torch_copier)]
    for first, second in zip(*([tensor for layer in pool.layers for tensor in layer] for pool in pools)):
        first.copy_(torch.randn(first.shape)), second.copy_(first)
    for _ in range(5):
        copies = [BlockCopy(rng.randrange(12), dst, 4) for dst in rng.sample(range(12), 7)]
        for pool in pools:
            pool.apply_copies(copies)
    for first, second in zip(*([tensor for layer in pool.layers for tensor in layer] for pool in pools)):
        assert same_bits([first], [second])


def test_opcheck():
    step = make_coded_step([(5, 1), (3, 2)])
    kv_cache = [cache.view(torch.uint8).clone() for cache in step.kv_cache]  # opcheck cannot compare numbers of e4m3
    arguments = (step.query, step.key, step.value, kv_cache, 0.3, None, None, None, *step.scales)
    with forward_context(step.metadata, "triton"):
        torch.library.opcheck(torch.ops.pagedlit.paged_attention.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_an_engine_says_the_same_over_both(monkeypatch):
    """Chunks, a fork's copies and eight bits, through the kernels and through torch."""
    monkeypatch.setattr(model_runner, "CALIBRATION_LENS", (12, 6))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=31, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    answers = []
    for backend in ("triton", "cpu"):
        llm = LLM(model, num_blocks=16, block_size=4, max_num_batched_tokens=8, kv_cache_dtype="fp8", attention_backend=backend)
        params = [SamplingParams(temperature=0, max_tokens=3, n=n) for n in (2, 1)]
        outputs = llm.generate([[3, 4, 5, 6, 7, 8], [3, 4, 5, 9]], params, use_tqdm=False)
        answers.append([answer.token_ids for output in outputs for answer in output.outputs])
        assert llm.stats().num_copies > 0 and isinstance(llm.runner.kv_cache.copy, BlockCopier) == (backend == "triton")
    assert answers[0] == answers[1]
