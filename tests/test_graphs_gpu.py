"""CUDA graphs, compiled layers and measured memory on a GPU. Skipped elsewhere."""

from __future__ import annotations

import random

import pytest
import torch
from test_graphs import decodes, poison
from test_parity import greedy, some_prompts
from transformers import AutoModelForCausalLM, LlamaConfig

from pagedlit.compute.attention import get_backend
from pagedlit.compute.compiled_layers import CompiledLayers
from pagedlit.compute.graphs import CudaGraphs
from pagedlit.compute.model_runner import ModelRunner, step_logits
from pagedlit.compute.startup import Startup, largest_step, recorded_steps, small_layers
from pagedlit.llm import LLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def llama(dtype=torch.float32, vocab_size=97):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().cuda()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def runner():
    runner = ModelRunner(llama(torch.bfloat16), block_size=4, num_blocks=64, attention_backend="triton")
    for part in runner.kv_cache.layers:
        part[0].normal_()
    runner.shortcut = recorded_steps(runner, 16, CudaGraphs(runner.device))
    return runner


def random_steps(count):
    rng = random.Random(0)
    return [decodes([rng.randrange(1, 17) for _ in range(rng.randrange(1, 16))], seed=i) for i in range(count)]


def test_replay_equals_the_step_bit_for_bit(runner):
    decoder = runner.shortcut
    for batch in random_steps(30):
        poison(decoder.static)
        replayed = decoder(batch).clone()
        size = decoder.static.fill(batch)
        decoder.logits.fill_(torch.nan)
        decoder.step(size)  # the same kernels, launched by Python
        assert torch.equal(replayed, decoder.logits[: len(batch.seq_lens)])


def test_replay_equals_the_plain_forward(runner):
    for batch in random_steps(10):
        replayed, plain = runner.shortcut(batch).float(), step_logits(runner, runner.layers, batch).float()
        torch.testing.assert_close(replayed, plain, rtol=0.05, atol=0.05)


def test_recordings_outlive_a_larger_scratch(runner):
    batch = random_steps(1)[0]
    before = runner.shortcut(batch).clone()
    rows = [torch.randn(300, heads, 256, device="cuda", dtype=torch.bfloat16) for heads in (32, 2, 2)]
    steps = decodes([1] * 60), torch.randn(64, 2, 2, 4, 256, device="cuda", dtype=torch.bfloat16)
    from pagedlit.compute.attention import AttentionMetadata

    get_backend("triton")(*rows, [steps[1]], AttentionMetadata.from_batch(steps[0], "cuda"), 0.1)
    for _ in range(20):
        torch.full((1 << 20,), 7.0, device="cuda")  # whoever gets freed memory writes into it
    assert torch.equal(runner.shortcut(batch), before)


def test_recordings_outlive_those_of_others(runner):
    """A graph that is dropped frees the cuBLAS workspaces of the stream that it was captured on."""
    batch = random_steps(1)[0]
    before = runner.shortcut(batch).clone()
    other = ModelRunner(llama(torch.bfloat16), block_size=4, num_blocks=64, attention_backend="triton")
    recorded_steps(other, 16, CudaGraphs(other.device))
    torch.cuda.empty_cache()
    torch.full((1 << 26,), 7.0, device="cuda")
    assert torch.equal(runner.shortcut(batch), before)
    torch.cuda.synchronize()


def test_a_step_that_waits_is_not_recorded_and_nothing_is_left_of_the_try(runner):
    record, number = CudaGraphs(runner.device), torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        record(lambda: number.item())
    main = torch.cuda.current_stream()
    assert main == torch.cuda.default_stream() and number.item() == 1
    replay = record(lambda: number.add_(1))
    replay()
    assert number.item() == 4, "two warm-ups and a replay"
    torch.cuda.empty_cache()


def test_the_graphs_share_their_memory():
    model = llama(torch.bfloat16)
    runner = ModelRunner(model, block_size=4, num_blocks=64, attention_backend="triton")
    sizes = []

    class Watched(CudaGraphs):
        def __call__(self, step):
            replay = super().__call__(step)
            torch.cuda.empty_cache()
            sizes.append(torch.cuda.memory_reserved())
            return replay

    recorded_steps(runner, 64, Watched(runner.device))
    assert sizes[-1] - sizes[0] < 16 << 20, "eleven sizes in the memory of the first"


@pytest.mark.parametrize("compile_model", [False, True])
def test_engine_with_graphs_equals_generate(compile_model, monkeypatch):
    from functools import partial

    from pagedlit import llm as llm_module

    model = llama()
    prompts = some_prompts(97)
    want = [model.generate(torch.tensor([p], device="cuda"), max_new_tokens=20, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    monkeypatch.setattr(llm_module, "Startup", partial(Startup, compile_model=compile_model))
    llm = LLM(model, block_size=4, num_blocks=60, max_num_batched_tokens=24, max_num_seqs=16, attention_backend="triton")
    assert llm.runner.shortcut is not None and (llm.runner.compiled is not None) == compile_model
    for _ in range(2):
        outputs = llm.generate(prompts, greedy(), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == want
    assert llm.runner.shortcut.num_replays.total() > 10 and llm.stats().num_preemptions


def test_enforce_eager_and_other_backends_record_nothing():
    eager, reference = LLM(llama(), num_blocks=16, attention_backend="triton", enforce_eager=True), LLM(llama(), num_blocks=16, attention_backend="reference")
    assert eager.runner.shortcut is eager.runner.compiled is reference.runner.shortcut is None


def test_compiled_layers_write_into_the_pool():
    runner = ModelRunner(llama(), block_size=4, num_blocks=16, attention_backend="triton")
    batch, inner, seen = largest_step(9, 3, 9, 4), runner.backend, []
    layers = small_layers(runner, batch)

    def spy(query, key, value, kv_cache, *rest):
        seen.extend(part.data_ptr() for part in kv_cache)
        return inner(query, key, value, kv_cache, *rest)

    runner.backend, runner.compiled = spy, CompiledLayers(runner.model, [call.module for call in runner.calls])
    step_logits(runner, layers, batch)
    assert seen == [part.data_ptr() for _, layer in layers for part in layer.kv_cache]


def test_the_largest_step_fits_beside_the_pool():
    torch.cuda.empty_cache()
    model = llama(torch.bfloat16, vocab_size=32_000)
    llm = LLM(model, memory_utilization=0.8, max_num_batched_tokens=4096, max_num_seqs=128, attention_backend="triton")
    free, total = torch.cuda.mem_get_info()
    assert free < 0.3 * total, "the pool takes its share"
    runner = llm.runner
    for _ in range(3):
        batch = largest_step(4096, 128, 512, 16)
        batch.slot_mapping = type(batch.slot_mapping)("q", [-1] * len(batch.token_ids))
        runner.run(batch)
    assert torch.cuda.mem_get_info()[0] > 0.18 * total, "what was promised to others is left to them"
