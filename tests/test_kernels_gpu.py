"""The Triton kernels on a GPU: the grid of options in every dtype against float64, the same bits twice, and graph replay. Skipped elsewhere."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from coded_steps import SCALES, make_coded_step, same_bits
from test_attention import make_step, share

from pagedlit.compute.attention import AttentionMetadata, get_backend
from pagedlit.compute.kv_cache import KVCache, LayerSpec, torch_copier
from pagedlit.memory.copy_on_write import BlockCopy
from pagedlit.tiny import questions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
LENGTHS = {
    "decodes": [(0, 1), (1, 1), (62, 1), (63, 1), (64, 1), (2000, 1), (5000, 1), (17, 1)],
    "mixed": [(300, 1), (0, 700), (500, 130), (1000, 1), (63, 65), (0, 1), (40, 2)],
}
SINKS = torch.linspace(-2, 3, 64)


def options_of(name: str, num_heads: int) -> dict[str, object]:
    return {
        "plain": {}, "window": {"sliding_window": 200}, "softcap": {"softcap": 3.0}, "sinks": {"sinks": SINKS[:num_heads]},
        "all": {"sliding_window": 1000, "softcap": 2.0, "sinks": SINKS[:num_heads]},
    }[name]  # fmt: skip


def on_gpu(metadata: AttentionMetadata) -> AttentionMetadata:
    tensors = {name: value.cuda() for name, value in vars(metadata).items() if isinstance(value, torch.Tensor)}
    return replace(metadata, **tensors, plans={})


def run(step, options):
    """The backend's answer on the device, twice."""
    import pagedlit.compute.triton_backend  # noqa: F401  registers it

    metadata, tensors = on_gpu(step.metadata), [x.cuda() for x in (step.query, step.key, step.value)]
    options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    backend, cache = get_backend("triton"), [tensor.cuda() for tensor in step.kv_cache]
    first, second = (backend(*tensors, cache, metadata, 0.1, **options) for _ in range(2))
    assert torch.equal(first, second), "the same launch twice gave different bits"
    return first.cpu()


def replayed(steps, num_sharers=0):
    """What a graph gives for each step that was recorded with the first: its buffers are loaded, and plans are made again on the device."""
    import pagedlit.compute.triton_backend  # noqa: F401

    backend, metadata = get_backend("triton"), on_gpu(replace(steps[0].metadata, num_sharers=num_sharers))
    metadata.block_tables = torch.zeros(600, dtype=torch.int32, device="cuda")
    static = [x.cuda().clone() for x in (steps[0].query, steps[0].key, steps[0].value, steps[0].kv_cache[0])]

    def load(step):
        fresh = on_gpu(step.metadata)
        for name in ("slot_mapping", "query_start_loc", "seq_lens", "block_table_start"):
            getattr(metadata, name).copy_(getattr(fresh, name))
        metadata.block_tables[: len(fresh.block_tables)] = fresh.block_tables
        for buffer, new in zip(static, (step.query, step.key, step.value, step.kv_cache[0])):
            buffer.copy_(new)

    def forward():
        metadata.plans.clear()
        return backend(*static[:3], static[3:], metadata, 0.1)

    load(steps[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for step in (*steps[1:], steps[0], *steps[1:]):
        load(step)
        graph.replay()
        yield step, out.cpu().double()


@pytest.mark.parametrize("name", ["plain", "window", "softcap", "sinks", "all"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("dim", "heads", "block_size"), [(64, (8, 8), 16), (128, (32, 8), 16), (128, (16, 2), 64), (80, (6, 2), 8), (256, (4, 2), 32)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_options(dtype, dim, heads, block_size, lengths, name):
    step, options = make_step(lengths, block_size, heads, (dim, dim), dtype), options_of(name, heads[0])
    torch.testing.assert_close(run(step, options).double(), step.expected(0.1, **options), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def pool_of(lengths):
    """A step in a pool of 400 blocks, whatever it uses."""
    return make_step(lengths, 16, (8, 2), (64, 64), torch.float16, spare=400 - sum(-(-(a + b) // 16) for a, b in lengths))


def test_graph_replay_follows_the_lengths():
    """Captured at one set of lengths, replayed at others: the plan is made again, on the device."""
    steps = [pool_of(lengths) for lengths in ([(100, 1), (3, 1), (2000, 1)], [(1500, 1), (900, 1), (0, 1)])]
    for step, out in replayed(steps):
        torch.testing.assert_close(out, step.expected(0.1), rtol=5e-3, atol=5e-3)


def test_graph_replay_follows_the_groups(monkeypatch):
    """Recorded without any group, replayed with one, with another and with none; recorded with a group, replayed without."""
    monkeypatch.setattr("pagedlit.kernels.cascade.LAUNCH_BYTES", 0)
    none, first, second = (pool_of([(1500, 1), (900, 1), (1200, 1)]) for _ in range(3))
    share(first, 0, [1, 2], 50), share(second, 2, [1], 30)
    for steps in ([none, first, second], [first, none, second]):
        for step, out in replayed(steps, num_sharers=1):
            torch.testing.assert_close(out, step.expected(0.1), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["plain", "window", "all"])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("heads", "dim"), [((8, 2), 64), ((32, 8), 128), ((8, 1), 256), ((4, 4), 80)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_shared_prefixes(dtype, dim, heads, block_size, name, monkeypatch):
    """Two groups, one of them in several tiles of members, with a stranger, a prefill and a row of padding between them."""
    monkeypatch.setattr("pagedlit.kernels.cascade.LAUNCH_BYTES", 0)
    lengths = [(700 + 13 * i, 1) for i in range(40)] + [(0, 1), (300, 60), (1500, 1), (1400, 1), (640, 30)]
    step, options = make_step(lengths, block_size, heads, (dim, dim), dtype), options_of(name, heads[0])
    if name == "all":
        options["sliding_window"] = 1501  # hides nothing of what is shared; the window of 200 hides all of it
    share(step, 3, [i for i in range(40) if i not in (3, 7)] + [44], 640 // block_size)
    share(step, 42, [43], 1280 // block_size)
    step.metadata.num_sharers = 39
    torch.testing.assert_close(run(step, options).double(), step.expected(0.1, **options), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_shared_prefixes_in_e4m3(dtype):
    """64 sequences with one prefix of 8,192 tokens, in eight bits: as the decode kernel by itself."""
    from pagedlit.kernels.cascade import paged_decode_shared
    from pagedlit.kernels.decode import paged_decode

    tables = torch.arange(64 * 520, dtype=torch.int32, device="cuda").view(64, 520)
    tables[:, :512] = tables[0, :512].clone()
    cache, scales = torch.randn(64 * 520, 2, 2, 16, 128, device="cuda").to(torch.float8_e4m3fn), torch.tensor([0.3, 0.5], device="cuda")
    step = torch.randn(64, 8, 128, dtype=dtype, device="cuda"), cache[:, :, 0], cache[:, :, 1], tables
    lens = torch.randint(8192, 8320, (64,), dtype=torch.int32, device="cuda")
    options = {"scale": 128**-0.5, "key_scales": scales, "value_scales": scales}
    together, again = (paged_decode_shared(*step, lens, **options) for _ in range(2))
    assert torch.equal(together, again), "the same launches twice gave different bits"
    torch.testing.assert_close(together, paged_decode(*step, lens, **options), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_eight_bit_cache_holds_the_bits_of_a_cpu(dtype, lengths):
    import pagedlit.compute.triton_backend  # noqa: F401

    step = make_coded_step(lengths, SCALES, block_size=16, heads=(8, 2), dims=(64, 64), dtype=dtype)
    cache, expected = [tensor.cuda() for tensor in step.kv_cache], [tensor.clone() for tensor in step.kv_cache]
    tensors, scales = [x.cuda() for x in (step.query, step.key, step.value)], [scale.cuda() for scale in step.scales]
    out = get_backend("triton")(*tensors, cache, on_gpu(step.metadata), 0.3, None, None, None, *scales)
    torch.testing.assert_close(out.cpu().double(), step.expected(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    step.run_over(expected, "cpu")
    assert same_bits([tensor.cpu() for tensor in cache], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_copies_in_all_layers(dtype):
    from pagedlit.compute.triton_backend import BlockCopier

    rng, specs = random.Random(0), [LayerSpec(2, 64, 64), LayerSpec(1, 24, 16), LayerSpec(2, 64, 64)]
    pools = [KVCache(specs, 50, 16, dtype, "cuda", make_copier) for make_copier in (BlockCopier, torch_copier)]
    for first, second in zip(*([tensor for layer in pool.layers for tensor in layer] for pool in pools)):
        first.copy_(torch.randn(first.shape)), second.copy_(first)
    copies = [BlockCopy(rng.randrange(50), dst, 16) for dst in rng.sample(range(50), 30)]
    for pool in pools:
        pool.apply_copies(copies)
    assert all(same_bits(a, b) for a, b in zip(pools[0].layers, pools[1].layers))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_answers_of_the_shipped_model(kv_cache_dtype):
    """On the device by the kernels, and by the reference on a CPU."""
    from pagedlit.llm import LLM
    from pagedlit.serving.sequence import SamplingParams

    chats = [[{"role": "user", "content": each["question"]}] for each in questions()[:8]]
    texts = []
    for device, backend in (("cuda", "triton"), ("cpu", "reference")):
        llm = LLM(dtype="float32", device=device, num_blocks=64, attention_backend=backend, kv_cache_dtype=kv_cache_dtype)
        texts.append([each.outputs[0].text for each in llm.chat(chats, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)])
    assert texts[0] == texts[1]
