"""`kv_cache_dtype="fp8"`: what is stored, what is computed from it, and that no feature of the engine changes an answer."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch
from coded_steps import SCALES, make_coded_step, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import CHUNKS, DECODES, OPTIONS, TOLERANCE, Layer, make_step
from test_parity import assert_whole, greedy, random_model, serve, shipped_model, some_prompts
from typer.testing import CliRunner

from pagedlit import cli
from pagedlit.compute import model_runner
from pagedlit.compute.attention import (
    LayerKind,
    dense_attention,
    forward_context,
    get_backend,
    paged_attention,
    paged_attention_reference,
    register_backend,
)
from pagedlit.compute.kv_cache import DeviceMemory, KVCache, LayerSpec, bytes_per_block, gpu_blocks, split_kv, torch_copier
from pagedlit.compute.model_runner import ModelRunner, UnsupportedModel, measured_scales, own_logits
from pagedlit.compute.quantize import E4M3, E4M3_MAX, HEADROOM, decode, encode, parts_of_256, scales_for, storage_dtype
from pagedlit.llm import LLM
from pagedlit.memory.copy_on_write import BlockCopy
from pagedlit.tiny import questions

BACKENDS = ["reference", "cpu"]
GB = 2**30


# the format


def nearest(numbers: torch.Tensor) -> torch.Tensor:
    """e4m3 by search: the nearest of all finite numbers; of two equally near ones that with the even code."""
    numbers = numbers.clamp(-1000, 1000)
    finite = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    distance = (finite - numbers.abs()[:, None]).abs()
    best = distance.min(dim=1).values
    is_best = distance == best[:, None]
    codes = torch.where(is_best.sum(1) == 1, is_best.int().argmax(1), (is_best & (torch.arange(127) % 2 == 0)).int().argmax(1))
    return finite[codes].copysign(numbers)


def test_encode_rounds_to_nearest_even_and_saturates():
    finite = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    numbers = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, torch.randn(500) * torch.logspace(-4, 3, 500), torch.tensor([449.0, 1e9, torch.inf])])
    numbers = torch.cat([numbers, -numbers]).float()
    assert torch.equal(encode(numbers[:, None, None]).double().flatten(), nearest(numbers.double()))
    assert encode(torch.full((1, 1, 2), torch.nan)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_code_is_read_back(dtype):
    """NaN too, and without it, by the fast way and by the exact one; also where the codes do not lie side by side."""
    codes = torch.arange(256, dtype=torch.uint8)
    for some in (codes, codes[:127], codes[128:255], codes[128:], codes[:128], codes[:127].view(127, 1).expand(127, 3), codes.view(16, 16)[:, :7]):
        got = parts_of_256(some, torch.empty(some.shape, dtype=dtype), torch.empty(some.shape, dtype=torch.int16))
        expected = some.clone().view(E4M3).double()
        assert torch.equal((got.double() * 256).nan_to_num(7), expected.nan_to_num(7))
    rows = codes.view(E4M3).view(32, 2, 4)
    assert torch.equal(decode(rows, SCALES[0])[..., 0].nan_to_num(7), (rows.float() * SCALES[0][:, None])[..., 0].nan_to_num(7))
    assert decode(rows.float()).dtype == torch.float32 and torch.equal(decode(rows).nan_to_num(7), rows.float().nan_to_num(7))


@given(st.floats(2.0**-50, 2.0**50))
@settings(max_examples=200, deadline=None)
def test_scales_are_powers_of_two_with_room(largest):
    scale = float(scales_for(torch.tensor([largest], dtype=torch.float64))[0])
    top = torch.tensor(largest, dtype=torch.float64).float().item() / scale
    assert torch.frexp(torch.tensor(scale)).mantissa == 0.5 and E4M3_MAX / HEADROOM / 2 < top <= E4M3_MAX / HEADROOM


def test_heads_without_a_maximum_get_scale_one():
    assert scales_for(torch.tensor([0.0, torch.inf, torch.nan])).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name, expected", [("auto", torch.bfloat16), ("fp8", E4M3), ("fp8_e4m3", E4M3)])
def test_names(name, expected):
    assert storage_dtype(name, torch.bfloat16) == expected


# the op


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dims", [(8, 8), (12, 8)], ids=["together", "apart"])
def test_equals_the_oracle_over_what_is_stored(backend, options, dims):
    for lengths, scales in ((DECODES, SCALES), (CHUNKS, SCALES), (CHUNKS, None)):
        step = make_coded_step(lengths, scales, dims=dims)
        torch.testing.assert_close(step.run(backend, **options).double(), step.expected(**options), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_dtypes_and_block_sizes(dtype, block_size):
    step = make_coded_step(CHUNKS, dtype=dtype, block_size=block_size)
    caches, tolerance = [[cache.clone() for cache in step.kv_cache] for _ in BACKENDS], max(TOLERANCE[dtype], 2e-5)
    for backend, cache in zip(BACKENDS, caches):
        out = step.run_over(cache, backend)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), step.expected(), rtol=tolerance, atol=tolerance)
    assert same_bits(*caches)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_piece_or_several(backend):
    """A prompt in one chunk, in two or three, or token by token: the same codes, and the same outputs up to the order of sums."""
    whole = make_coded_step([(0, 11)], spare=0)
    table, kv_cache = whole.metadata.block_tables.tolist(), [cache.clone() for cache in whole.kv_cache]
    expected = whole.run_over(kv_cache, backend)
    for cuts in ([0, 4, 11], [0, 3, 10, 11], list(range(12))):
        again, outs = [cache.clone() for cache in whole.kv_cache], []
        for start, stop in zip(cuts, cuts[1:]):
            part = make_coded_step([(start, stop - start)], spare=3)
            part.metadata.block_tables.copy_(torch.tensor(table[: len(part.metadata.block_tables)]))
            part.metadata.slot_mapping.copy_(whole.metadata.slot_mapping[start:stop])
            part.query, part.key, part.value = (x[start:stop] for x in (whole.query, whole.key, whole.value))
            outs.append(part.run_over(again, backend))
        torch.testing.assert_close(torch.cat(outs), expected, rtol=1e-5, atol=1e-6)
        assert same_bits(kv_cache, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_spoils_its_own_sequence_alone_and_is_remembered(backend):
    step = make_coded_step([(3, 1), (2, 4), (5, 2)])
    step.key[1], kv_cache = torch.nan, [cache.clone() for cache in step.kv_cache]
    out = step.run_over(kv_cache, backend)
    assert out[1:5].isnan().all() and not out[[0, 5, 6]].isnan().any()
    step.key[1] = 0
    step.metadata.slot_mapping[1:4] = -1  # the next step reads what the last one has stored
    step.metadata.plans.clear()
    assert step.run_over(kv_cache, backend)[1:5].isnan().all()


def test_what_does_not_fit_is_refused():
    step, plain = make_coded_step([(3, 1), (5, 2)]), make_step([(3, 1)])
    key_scales, value_scales = step.scales

    def run(kv_cache=step.kv_cache, query=step.query, metadata=step.metadata, **scales):
        return paged_attention_reference(query, step.key, step.value, kv_cache, metadata, 0.3, **scales)

    with pytest.raises(ValueError, match="both K and V"):
        run(key_scales=key_scales)
    with pytest.raises(ValueError, match="expected one float32 for each of 2 heads, got .3,. torch.float32"):
        run(key_scales=torch.ones(3), value_scales=value_scales)
    with pytest.raises(ValueError, match="value_scales: expected one float32"):
        run(key_scales=key_scales, value_scales=value_scales.double())
    with pytest.raises(ValueError, match="positive and finite"):
        run(key_scales=key_scales, value_scales=value_scales * 0)
    with pytest.raises(ValueError, match="key_scales are for a cache of torch.float8_e4m3fn; this one is torch.float32"):
        paged_attention_reference(plain.query, plain.key, plain.value, plain.kv_cache, plain.metadata, 0.3, None, None, None, key_scales, value_scales)
    with pytest.raises(ValueError, match="a cache of torch.float16 .* for queries of torch.float32"):
        run([cache.half() for cache in step.kv_cache])
    with pytest.raises(ValueError, match="kv_cache_dtype='int4': must be one of 'auto', 'fp8', 'fp8_e4m3'"):
        LLM(kv_cache_dtype="int4")


def test_tables_that_do_not_fit_are_refused():
    step = make_step([(3, 1), (5, 2)])

    def refused(**numbers):
        metadata = make_step([(3, 1), (5, 2)]).metadata
        for name, (place, number) in numbers.items():
            getattr(metadata, name)[place] = number
        with pytest.raises(ValueError) as error:
            paged_attention_reference(step.query, step.key, step.value, step.kv_cache, metadata, 0.3)
        return str(error.value)

    assert "sequence 1 has 9 tokens, its block table room for 8" in refused(seq_lens=(1, 9))
    assert "block 6 is not in a pool of 6 blocks of 4 slots" in refused(block_tables=(2, 6))
    assert "block -1 is not" in refused(block_tables=(0, -1))
    assert "slot 24 is not" in refused(slot_mapping=(0, 24)) and "slot -2 is not" in refused(slot_mapping=(1, -2))


@pytest.mark.parametrize("dims", [(8, 8), (12, 8)], ids=["one cache tensor", "two"])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["window and sinks"]], ids=["plain", "options"])
def test_opcheck(dims, options):
    """The whole check over the codes as bytes, since it cannot compare numbers of e4m3."""
    step = make_coded_step(CHUNKS, dims=dims)
    kv_cache = [cache.view(torch.uint8).clone() for cache in step.kv_cache]
    scales = dict(zip(("key_scales", "value_scales"), step.scales))
    with forward_context(step.metadata, "cpu"):
        torch.library.opcheck(torch.ops.pagedlit.paged_attention.default, (step.query, step.key, step.value, kv_cache, 0.3), options | scales)


def test_the_op_hands_scales_on():
    step = make_coded_step(CHUNKS)
    for backend in BACKENDS:
        with forward_context(step.metadata, backend):
            out = paged_attention(step.query, step.key, step.value, [cache.clone() for cache in step.kv_cache], 0.3, None, None, None, *step.scales)
        torch.testing.assert_close(out.double(), step.expected(), rtol=2e-5, atol=2e-5)
    for pair in ((step.scales[0], None), (None, step.scales[1])):
        with forward_context(step.metadata, "reference"), pytest.raises(ValueError, match="both K and V"):
            paged_attention(step.query, step.key, step.value, step.kv_cache, 0.3, None, None, None, *pair)


def test_layers_are_grouped_by_what_they_are_computed_in():
    """Eight megabytes of float32 and not of codes: that is what has to stay in the processor's cache."""
    kinds = [LayerKind.of(step.kv_cache, None, torch.float32) for step in (make_step([(3, 1)]), make_coded_step([(3, 1)]))]
    assert kinds[0] == kinds[1] and kinds[0].row_bytes == 64


def test_every_op_of_the_package_is_checked():
    """opcheck runs above and in test_attention on the one op that there is."""
    assert [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pagedlit::")] == ["pagedlit::paged_attention"]


def test_fullgraph_compile():
    torch._dynamo.reset()
    step = make_coded_step(CHUNKS)
    caches = [[cache.clone() for cache in step.kv_cache] for _ in range(2)]
    layers = [Layer(cache, key_scales=step.scales[0], value_scales=step.scales[1]) for cache in caches]
    with torch.no_grad(), forward_context(step.metadata):
        compiled = torch.compile(layers[1], fullgraph=True, dynamic=True, backend="aot_eager")
        outs = [layer(step.query, step.key, step.value) for layer in (layers[0], compiled)]
    torch.testing.assert_close(*outs)
    assert same_bits(*caches)


# the pool


def test_sizes_follow():
    layers = [LayerSpec(2, 8, 8), LayerSpec(2, 12, 8)]
    sizes = [bytes_per_block(layers, 16, dtype) for dtype in (torch.float32, torch.float16, E4M3)]
    assert sizes == [16 * 72 * 4, 16 * 72 * 2, 16 * 72]
    memory = DeviceMemory(free=70 * GB, total=80 * GB)
    assert [gpu_blocks(size, memory) * size // GB for size in sizes] == [61, 61, 61]
    assert [gpu_blocks(size, memory) // gpu_blocks(sizes[0], memory) for size in sizes] == [1, 2, 4]
    cache = KVCache(layers, 5, 16, E4M3)
    assert cache.num_bytes == 5 * sizes[2] == sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in layer)


def test_the_copier_is_whom_the_maker_brings():
    seen = []

    def make_copier(tensors):
        copy = torch_copier(tensors)
        return lambda copies: (seen.append((len(tensors), copies)), copy(copies))

    cache = KVCache([LayerSpec(2, 8, 8), LayerSpec(2, 12, 8)], 4, 2, E4M3, "cpu", make_copier)
    for layer in cache.layers:
        for tensor in layer:
            tensor.copy_(torch.randn(tensor.shape))
    before = cache.key(1)[0].float()
    cache.apply_copies([]), cache.apply_copies([BlockCopy(0, 3, 2)])
    assert seen == [(3, [BlockCopy(0, 3, 2)])] and torch.equal(cache.key(1)[3].float(), before)


# the engine


@pytest.fixture(scope="module", params=["shipped", "llama", "gemma2", "gpt_oss"])
def case(request):
    """A model, prompts, and the answers over an eight-bit cache, each prompt alone and in one piece."""
    model = shipped_model() if request.param == "shipped" else random_model(request.param)
    prompts = some_prompts(model.config.vocab_size)
    llm = LLM(model, num_blocks=16, kv_cache_dtype="fp8", enable_prefix_caching=False)
    return model, prompts, [serve(llm, [prompt])[0] for prompt in prompts]


def test_answers_differ_from_the_exact_ones_at_most_in_some_tokens(case):
    model, prompts, want = case
    exact = serve(LLM(model, num_blocks=128), prompts)
    same = [next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), len(pair[0])) for pair in zip(exact, want)]
    assert sum(same) >= 0.25 * sum(map(len, want)), "before answers part, a good share of them is the same"


def test_chunks_hits_copies_preemption_and_mixed_batches(case):
    model, prompts, want = case
    llm = LLM(model, num_blocks=11, max_num_batched_tokens=24, kv_cache_dtype="fp8")
    assert serve(llm, prompts) == want
    assert serve(llm, prompts) == want, "and with what the cache has kept"
    stats = llm.stats()
    assert stats.num_preemptions and stats.num_cached_tokens and stats.num_copies


def test_backends_forks_and_blocks_of_three(case):
    model, prompts, want = case
    llm = LLM(model, num_blocks=48, block_size=3, kv_cache_dtype="fp8_e4m3", attention_backend="reference")
    [output] = llm.generate([prompts[1]], greedy(n=3), use_tqdm=False)
    assert [answer.token_ids for answer in output.outputs] == [want[1]] * 3 and llm.stats().num_copies
    engine = llm.engine
    first = engine.add_request(prompts[3], greedy())
    for _ in range(4):
        engine.step()
    second = engine.fork(first)
    assert {seq.seq_id: seq.output_token_ids for seq in engine.drain()} == {first: want[3], second: want[3]}
    assert_whole(llm)


def test_scales_depend_on_the_model_alone(case):
    """Two engines agree; requests change nothing; and real prompts stay within the room that the probes leave."""
    model, prompts, _ = case
    llm, exact = LLM(model, num_blocks=64, kv_cache_dtype="fp8"), LLM(model, num_blocks=64, enable_prefix_caching=False)
    before = torch.cat([scales.flatten() for scales in llm.runner.kv_cache.scales])
    serve(llm, prompts)
    after, again = (torch.cat([scales.flatten() for scales in each]) for each in (llm.runner.kv_cache.scales, measured_scales(exact.runner)))
    assert torch.equal(before, after) and torch.equal(before, again)
    for layer in exact.runner.kv_cache.layers:
        for tensor in layer:
            tensor.zero_()
    serve(exact, prompts)
    for layer, scales in zip(exact.runner.kv_cache.layers, llm.runner.kv_cache.scales):
        for part, scale in zip(split_kv(layer), scales):
            assert (part.abs().amax(dim=(0, 2, 3)) <= scale * E4M3_MAX).all(), "a number of a prompt saturates"


def test_a_quarter_of_the_bytes():
    plain, coded = (LLM(num_blocks=64, kv_cache_dtype=name) for name in ("auto", "fp8"))
    assert plain.runner.kv_cache.num_bytes == 4 * coded.runner.kv_cache.num_bytes and plain.runner.kv_cache.scales is None


def test_what_is_stored_is_the_models_own_k_and_v(case):
    """In the first layer, which sees the same in both engines: within a sixteenth, or half a step at the lower end."""
    model, prompts, _ = case
    llms = [LLM(model, num_blocks=8, kv_cache_dtype=name, enable_prefix_caching=False) for name in ("auto", "fp8")]
    blocks = []
    for llm in llms:
        seq = llm.engine.sequences[llm.engine.add_request(prompts[1], greedy(2))]
        llm.engine.step()
        blocks.append(list(seq.table.block_ids))
    for exact, coded, scales in zip(split_kv(llms[0].runner.kv_cache.layers[0]), split_kv(llms[1].runner.kv_cache.layers[0]), llms[1].runner.kv_cache.scales[0]):
        rows, codes = (part[ids].transpose(1, 2).flatten(0, 1)[: len(prompts[1])] for part, ids in ((exact, blocks[0]), (coded, blocks[1])))
        assert ((decode(codes, scales) - rows).abs() <= (rows.abs() / 16).maximum(scales[:, None] * 2.0**-10) * 1.0001).all()


def test_a_pool_is_sized_by_what_it_stores(monkeypatch):
    seen = []
    monkeypatch.setattr(model_runner, "blocks_that_fit", lambda layers, block_size, dtype, *others: seen.append(dtype) or 8)
    model = random_model("llama")
    assert [LLM(model, kv_cache_dtype=name).stats().num_blocks for name in ("auto", "fp8")] == [8, 8] and seen == [torch.float32, E4M3]


def test_half_precision_models():
    model = shipped_model().bfloat16()
    for backend in BACKENDS:
        assert_whole(llm := LLM(model, num_blocks=64, kv_cache_dtype="fp8", attention_backend=backend))
        assert serve(llm, [[5, 6, 7, 8]])


def test_quality_on_the_shipped_model():
    """Next-token distributions over questions and answers: KL divergence, and how often the first choice is the same."""
    model, llm = shipped_model(), LLM(num_blocks=64, kv_cache_dtype="fp8")
    texts = [llm.tokenizer(each["question"] + " " + each["answer"]).input_ids for each in questions()[:8]]
    divergence, agreement = [], []
    for ids in texts:
        expected = torch.stack([own_logits(model, [array("i", ids[:stop])])[0] for stop in range(len(ids) - 8, len(ids))]).log_softmax(-1)
        got = torch.stack([coded_logits(llm, ids[:stop]) for stop in range(len(ids) - 8, len(ids))]).log_softmax(-1)
        divergence.append((expected.exp() * (expected - got)).sum(-1))
        agreement.append(expected.argmax(-1) == got.argmax(-1))
    assert torch.cat(divergence).mean() < 0.02 and torch.cat(agreement).float().mean() >= 0.95


def coded_logits(llm, ids):
    """The logits after a prompt, over the eight-bit cache, from their log-probabilities."""
    [output] = llm.generate([ids], replace(greedy(1), logprobs=llm.vocab_size), use_tqdm=False)
    rated = output.outputs[0].logprobs[0]
    return torch.tensor([rated[token_id].logprob for token_id in range(llm.vocab_size)])


def test_attention_error_does_not_depend_on_size():
    """About three percent of float64, whatever the magnitude of K and V."""
    torch.manual_seed(0)
    query, rows = torch.randn(64, 4, 64), torch.randn(2, 512, 4, 64)
    for size in (1e-4, 1.0, 1e3):
        key, value = rows[0], rows[1] * size
        scales = [scales_for(x.abs().amax(dim=(0, 2))) for x in (key, value)]
        exact = dense_attention(query.double(), key.double(), value.double(), 0.125)
        coded = dense_attention(query, *(decode(encode(x, s), s) for x, s in zip((key, value), scales)), 0.125)
        assert 0.01 < float((coded - exact).norm() / exact.norm()) < 0.05


def test_a_wrong_model_is_still_refused():
    """The check at load runs over a cache of the model's own dtype, so that it is as strict as ever."""

    def slightly_wrong(query, key, value, kv_cache, metadata, scale, *options):
        return get_backend("cpu")(query, key, value, kv_cache, metadata, scale * 1.05, *options)

    register_backend("slightly wrong", slightly_wrong)
    with pytest.raises(UnsupportedModel, match="relative error"):
        ModelRunner(random_model("llama"), num_blocks=8, attention_backend="slightly wrong", kv_cache_dtype="fp8")


def test_on_the_command_line():
    done = CliRunner().invoke(cli.app, ["generate", "What is a block table?", "--max-tokens", "4", "--kv-cache-dtype", "fp8"])
    assert done.exit_code == 0 and done.stdout.strip()
    done = CliRunner().invoke(cli.app, ["generate", "Hello", "--kv-cache-dtype", "fp7"])
    assert done.exit_code == 1 and "must be one of 'auto', 'fp8'" in done.stderr
