"""Paged attention against a float64 oracle that knows no blocks, over a cache whose every unused slot holds NaN."""

from __future__ import annotations

import threading
from array import array
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pagedlit.compute import attention
from pagedlit.compute.attention import (
    AttentionMetadata,
    CPUBackend,
    LayerKind,
    Workspace,
    count_sharers,
    current_context,
    dense_attention,
    forward_context,
    get_backend,
    padded_block_tables,
    paged_attention,
    paged_attention_reference,
    register_backend,
)
from pagedlit.compute.kv_cache import KVCache, LayerSpec, write_kv
from pagedlit.serving.scheduler import ForwardBatch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BACKENDS = ["reference", "cpu"]


@dataclass
class Step:
    """A random step: what the op gets, and the same sequences without blocks."""

    metadata: AttentionMetadata
    kv_cache: list[Tensor]
    query: Tensor  # [T, Hq, Dk]
    key: Tensor  # [T, Hkv, Dk]
    value: Tensor  # [T, Hkv, Dv]
    keys: list[Tensor]  # per sequence [L, Hkv, Dk]
    values: list[Tensor]  # per sequence [L, Hkv, Dv]

    def run(self, backend, **options) -> Tensor:
        """The backend's answer over a copy of the cache."""
        kv_cache = [cache.clone() for cache in self.kv_cache]
        return get_backend(backend)(self.query, self.key, self.value, kv_cache, self.metadata, options.pop("scale", 0.3), **options)

    def expected(self, scale=0.3, **options) -> Tensor:
        """The oracle's answer, in float64."""
        out = torch.zeros(*self.query.shape[:2], self.value.shape[2], dtype=torch.float64)
        starts = self.metadata.query_start_loc.tolist()
        for s, (key, value) in enumerate(zip(self.keys, self.values)):
            for row in range(starts[s], starts[s + 1]):
                position = len(key) - (starts[s + 1] - row)
                out[row] = oracle_row(self.query[row], key[: position + 1], value[: position + 1], scale, **options)
        return out


def oracle_row(query, key, value, scale, sliding_window=None, softcap=None, sinks=None) -> Tensor:
    """One query row over the keys up to itself: the window is a slice, nothing is masked, heads are a loop. [Hq, Dv]"""
    if sliding_window is not None:
        key, value = key[-sliding_window:], value[-sliding_window:]
    group, out = query.shape[0] // key.shape[1], []
    for h in range(query.shape[0]):
        logits = key[:, h // group].double() @ query[h].double() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.exp()
        total = weights.sum() + (0 if sinks is None else sinks[h].double().exp())
        out.append(weights @ value[:, h // group].double() / total)
    return torch.stack(out)


def make_step(lengths, block_size=4, heads=(4, 2), dims=(8, 8), dtype=torch.float32, seed=0, spare=3) -> Step:
    """`lengths` = (tokens in the cache before, new tokens) of each sequence; the rest of the pool is poisoned."""
    random = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads), (key_dim, value_dim) = heads, dims

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    needed = [-(-(past + new) // block_size) for past, new in lengths]
    num_blocks = sum(needed) + spare
    cache = KVCache([LayerSpec(num_kv_heads, key_dim, value_dim)], num_blocks, block_size, dtype)
    for tensor in cache.layers[0]:
        tensor.fill_(torch.nan)
    ids = iter(torch.randperm(num_blocks, generator=random).tolist())
    batch, keys, values = ForwardBatch(block_size), [], []
    for (past, new), count in zip(lengths, needed):
        table = [next(ids) for _ in range(count)]
        slots = [table[p // block_size] * block_size + p % block_size for p in range(past + new)]
        keys.append(normal(past + new, num_kv_heads, key_dim))
        values.append(normal(past + new, num_kv_heads, value_dim))
        write_kv(cache.key(0), cache.value(0), keys[-1][:past], values[-1][:past], torch.tensor(slots[:past], dtype=torch.int64))
        batch.slot_mapping.extend(slots[past:])
        batch.query_start_loc.append(batch.query_start_loc[-1] + new)
        batch.seq_lens.append(past + new)
        batch.block_tables.extend(table)
        batch.block_table_start.append(len(batch.block_tables))

    def new_rows(parts, heads, dim):
        rows = [part[past:] for part, (past, _) in zip(parts, lengths)]
        return torch.cat(rows) if rows else torch.empty(0, heads, dim, dtype=dtype)

    key, value = new_rows(keys, num_kv_heads, key_dim), new_rows(values, num_kv_heads, value_dim)
    query = normal(len(key), num_heads, key_dim)
    return Step(AttentionMetadata.from_batch(batch), cache.layers[0], query, key, value, keys, values)


def share(step: Step, leader: int, others: list[int], num_blocks: int) -> None:
    """Let sequences begin with the leading blocks of another one; the blocks that they held instead are poisoned."""
    metadata, num_tokens = step.metadata, num_blocks * step.metadata.block_size
    first = metadata.block_table_start.tolist()
    for s in others:
        own, shared = (metadata.block_tables[first[i] : first[i] + num_blocks] for i in (s, leader))
        before = own.long()
        own.copy_(shared)
        for tensor in step.kv_cache:
            tensor[before[~torch.isin(before, metadata.block_tables)]] = torch.nan
        for per_seq in (step.keys, step.values):
            per_seq[s][:num_tokens] = per_seq[leader][: min(num_tokens, len(per_seq[s]))]


def check(step: Step, backends=BACKENDS, **options) -> None:
    """Every backend equals the oracle, and none lets a NaN through."""
    expected = step.expected(**options)
    for backend in backends:
        out = step.run(backend, **options)
        tolerance = TOLERANCE[out.dtype]
        assert out.dtype == step.query.dtype and out.shape == expected.shape
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda m, name=backend: f"{name}: {m}")


DECODES = [(0, 1), (1, 1), (3, 1), (4, 1), (7, 1), (8, 1), (30, 1)]
CHUNKS = [(0, 1), (0, 5), (3, 1), (4, 4), (5, 3), (2, 9), (7, 1), (0, 8), (15, 6)]  # edges of blocks of 4, inside and on them
SINKS = torch.linspace(-2, 3, 8)
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "window larger than all": {"sliding_window": 1000},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": SINKS[:4]},
    "all": {"sliding_window": 6, "softcap": 1.5, "sinks": SINKS[:4], "scale": 0.7},
    "window and sinks": {"sliding_window": 6, "sinks": SINKS[:4]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decodes", "mixed"])
@pytest.mark.parametrize("dims", [(8, 8), (12, 8), (5, 7)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_options(options, lengths, dims, dtype):
    check(make_step(lengths, dims=dims, dtype=dtype), **options)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 64, 256])
@pytest.mark.parametrize("options", [{}, OPTIONS["window"], OPTIONS["all"]], ids=["plain", "window", "all"])
def test_block_sizes(block_size, options):
    check(make_step([*CHUNKS, (63, 1), (64, 1), (60, 10), (255, 2)], block_size), **options)


@pytest.mark.parametrize("group", range(1, 9))
def test_groups_of_query_heads(group):
    for num_kv_heads in (1, 3):
        step = make_step(CHUNKS, heads=(group * num_kv_heads, num_kv_heads))
        check(step)
        check(step, softcap=3.0, sinks=torch.linspace(-1, 1, group * num_kv_heads))


@pytest.mark.parametrize("head_dim", [1, 2, 33, 64, 192])
def test_head_dims(head_dim):
    check(make_step(CHUNKS, dims=(head_dim, head_dim)), scale=0.1)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40) | st.just(1)).filter(sum), max_size=6),
    block_size=st.integers(1, 20),
    window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.floats(0.5, 5),
    sinks=st.none() | st.just(SINKS),
    heads=st.sampled_from([(8, 8), (8, 2), (8, 1)]),
    dims=st.sampled_from([(4, 4), (6, 4)]),
    workspace=st.sampled_from([1, 2_000, 20_000, 2**24]),  # bytes: forces groups of one sequence, and of a few heads
    tile=st.sampled_from([3, 256]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_any_step(lengths, block_size, window, softcap, sinks, heads, dims, workspace, tile, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WORKSPACE_BYTES", workspace)
        patch.setattr(attention, "TILE_ROWS", tile)
        step = make_step(lengths, block_size, heads, dims, torch.float64, seed)
        check(step, sliding_window=window, softcap=softcap, sinks=sinks)


def test_long_chunk_is_tiled():
    step = make_step([(100, 600), (0, 700)], block_size=16, heads=(2, 1))
    check(step)
    check(step, sliding_window=50)


def test_dense_attention_equals_sdpa():
    torch.manual_seed(0)
    query, key, value = torch.randn(6, 8, 16), torch.randn(6, 2, 16), torch.randn(6, 2, 16)
    by_head = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = F.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(dense_attention(query, key, value, 16**-0.5), expected)


def test_window_is_the_one_of_transformers():
    """Token i sees j with i - j < window, as the mask function of transformers says."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    positions, sees = torch.arange(12), sliding_window_causal_mask_function(5)
    expected = torch.tensor([[bool(sees(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(12)] for i in range(12)])
    assert torch.equal(attention.visible(positions, positions, 5), expected)


def test_sinks_and_softcap_are_those_of_transformers():
    """Against the eager formulas of GPT-OSS and Gemma 2."""
    from types import SimpleNamespace

    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

    torch.manual_seed(1)
    query, key, value = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    by_head = [x.transpose(0, 1)[None] for x in (query, key, value)]
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    module = SimpleNamespace(num_key_value_groups=2, sinks=SINKS[:4], training=False, head_dim=8)
    with_sinks = gpt_oss(module, *by_head, mask, scaling=0.4)[0][0]
    torch.testing.assert_close(dense_attention(query, key, value, 0.4, sinks=SINKS[:4]), with_sinks)
    with_softcap = gemma2(module, *by_head, mask, scaling=0.4, softcap=1.5)[0][0]
    torch.testing.assert_close(dense_attention(query, key, value, 0.4, softcap=1.5), with_softcap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_the_cache(backend):
    step = make_step(CHUNKS)
    kv_cache = [cache.clone() for cache in step.kv_cache]
    get_backend(backend)(step.query, step.key, step.value, kv_cache, step.metadata, 0.3)
    expected = [cache.clone() for cache in step.kv_cache]
    write_kv(*expected[0].unbind(2), step.key, step.value, step.metadata.slot_mapping)
    torch.testing.assert_close(kv_cache, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [(3, 1)], [(0, 1)], [(4, 3)]], ids=["no sequence", "one token", "first token", "chunk"])
def test_padding_rows_give_zeros(backend, lengths):
    """Rows behind the last sequence (T is padded to a fixed size) are neither written nor attended to."""
    step = make_step(lengths)
    num_rows = len(step.query)
    padded = [F.pad(x, (0, 0, 0, 0, 0, 2), value=torch.nan) for x in (step.query, step.key, step.value)]
    kv_cache = [cache.clone() for cache in step.kv_cache]
    out = get_backend(backend)(*padded, kv_cache, step.metadata, 0.3)
    assert torch.equal(out[num_rows:], torch.zeros(2, 4, 8))
    torch.testing.assert_close(out[:num_rows].double(), step.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_slots(backend):
    """Slot -1: the row attends, but its K and V are not written."""
    step = make_step([(0, 3)])
    step.metadata.slot_mapping = step.metadata.slot_mapping.clone()
    step.metadata.slot_mapping[1] = -1
    kv_cache = [cache.clone() for cache in step.kv_cache]
    get_backend(backend)(step.query, step.key, step.value, kv_cache, step.metadata, 0.3)
    assert int(kv_cache[0][:, 0, 0, :, 0].isnan().logical_not().sum()) == 2


def test_a_row_does_not_notice_its_batch():
    """The same sequences alone and in a crowd; float32, by rounding at most."""
    lengths = [(n, 1) for n in (200, 3, 77, 150, 9, 400)] + [(30, 20), (0, 40)]
    step = make_step(lengths, block_size=16, heads=(8, 2), dims=(64, 64))
    together, starts = step.run("cpu"), step.metadata.query_start_loc.tolist()
    for s, (past, new) in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        alone = make_step([(past, new)], block_size=16, heads=(8, 2), dims=(64, 64))
        blocks = step.metadata.block_tables[step.metadata.block_table_start[s] : step.metadata.block_table_start[s + 1]].long()
        alone.kv_cache = [torch.full_like(cache, torch.nan) for cache in alone.kv_cache]
        own = alone.metadata.block_tables.long()
        alone.kv_cache[0][own] = step.kv_cache[0][blocks]
        alone.query, alone.key, alone.value = step.query[rows], step.key[rows], step.value[rows]
        torch.testing.assert_close(alone.run("cpu"), together[rows], rtol=1e-5, atol=1e-6)


def test_nan_of_one_sequence_stays_there():
    """A sequence with NaN in its K and V does not touch its neighbours in the group."""
    step = make_step(DECODES)
    expected = step.run("cpu")
    step.key, step.value = step.key.clone(), step.value.clone()
    step.key[2] = step.value[2] = torch.nan
    out = step.run("cpu")
    assert out[2].isnan().all()
    others = [row for row in range(len(DECODES)) if row != 2]
    torch.testing.assert_close(out[others], expected[others], rtol=0, atol=0)


def test_layers_share_the_plan():
    step = make_step(CHUNKS)
    step.run("cpu")
    plans = dict(step.metadata.plans)
    step.run("cpu")
    assert plans == step.metadata.plans and len(plans) == 2  # slots, and one kind of layer
    step.run("cpu", sliding_window=5)
    assert len(step.metadata.plans) == 3


def test_window_reads_only_its_blocks():
    step = make_step([(1000, 1), (990, 10)], block_size=16)
    step.run("cpu", sliding_window=20)
    plan = step.metadata.plans[LayerKind.of(step.kv_cache, 20)]
    assert [group.is_chunk for group in plan] == [False, True]
    assert all(group.gather.shape[-1] <= 3 for group in plan)


def test_groups_bound_padding_and_memory():
    lengths = [(n, 1) for n in (2000, 1990, 1000, 30, 20, 10, 1500, 1950)]
    step = make_step(lengths, block_size=16, heads=(8, 8), dims=(128, 128))
    step.run("cpu")
    sizes = [group.gather.numel() * 16 * 128 * 4 for group in step.metadata.plans[LayerKind.of(step.kv_cache, None)]]
    assert max(sizes) <= attention.WORKSPACE_BYTES
    assert sum(sizes) <= 1.4 * sum(-(-(past + 1) // 16) * 16 for past, _ in lengths) * 8 * 2 * 128 * 4


def test_metadata_views_the_batch():
    batch = ForwardBatch(4, slot_mapping=array("q", [5]), query_start_loc=array("i", [0, 1]), seq_lens=array("i", [2]),
                         block_tables=array("i", [1]), block_table_start=array("i", [0, 1]))  # fmt: skip
    metadata = AttentionMetadata.from_batch(batch)
    batch.slot_mapping[0], batch.seq_lens[0] = 6, 3
    assert metadata.slot_mapping.tolist() == [6] and metadata.seq_lens.tolist() == [3]
    assert (metadata.max_query_len, metadata.max_seq_len, metadata.num_seqs) == (1, 2, 1)
    empty = AttentionMetadata.from_batch(ForwardBatch(4))
    assert (empty.max_query_len, empty.max_seq_len, empty.num_seqs) == (0, 0, 0)
    assert padded_block_tables(empty).shape == (0, 0)


def test_padded_block_tables():
    step = make_step([(0, 1), (8, 1), (3, 4)])
    tables = step.metadata.block_tables.tolist()
    assert padded_block_tables(step.metadata).tolist() == [[tables[0], -1, -1], tables[1:4], [*tables[4:6], -1]]
    assert padded_block_tables(step.metadata).dtype == torch.int32


def test_wrong_shapes_are_named():
    step = make_step([(3, 1)])
    run = [step.query, step.key, step.value, step.kv_cache, step.metadata, 0.3]
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        paged_attention_reference(step.query[:, :3], *run[1:])
    with pytest.raises(ValueError, match="of value"):
        paged_attention_reference(*run[:2], step.value[..., :3], *run[3:])
    with pytest.raises(ValueError, match="of key"):
        paged_attention_reference(run[0], torch.cat([step.key] * 2), *run[2:])
    with pytest.raises(ValueError, match="query rows have 7 elements, key rows 8"):
        paged_attention_reference(step.query[..., :7], *run[1:])


class Layer(nn.Module):
    """As a model calls the op."""

    def __init__(self, kv_cache: list[Tensor], **options) -> None:
        super().__init__()
        self.kv_cache, self.options = kv_cache, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return paged_attention(query * 2, key + 1, value, self.kv_cache, 0.3, **self.options) + 1


@pytest.mark.parametrize("dims", [(8, 8), (12, 8)], ids=["one cache tensor", "two"])
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
def test_opcheck(dims, options):
    step = make_step(CHUNKS, dims=dims)
    options = {key: value for key, value in options.items() if key != "scale"}
    with forward_context(step.metadata, "cpu"):
        torch.library.opcheck(
            torch.ops.pagedlit.paged_attention.default, (step.query, step.key, step.value, step.kv_cache, 0.3), options
        )


@pytest.mark.parametrize("dims", [(8, 8), (12, 8)], ids=["one cache tensor", "two"])
def test_fullgraph_compile(dims):
    """No graph break; the same output and the same cache as eagerly; steps of other lengths need no new compilation each."""
    torch._dynamo.reset()
    step = make_step(CHUNKS, dims=dims)
    layer = Layer(step.kv_cache, sliding_window=6, sinks=SINKS[:4])
    before = [cache.clone() for cache in step.kv_cache]
    with torch.no_grad(), forward_context(step.metadata):
        expected = layer(step.query, step.key, step.value)
        written = [cache.clone() for cache in step.kv_cache]
        for cache, old in zip(step.kv_cache, before):
            cache.copy_(old)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        out = compiled(step.query, step.key, step.value)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(step.kv_cache, written, equal_nan=True)


def test_context_is_required_and_nests():
    step = make_step([(0, 2)])
    arguments = (step.query, step.key, step.value, step.kv_cache, 0.3)
    with pytest.raises(RuntimeError, match="outside"):
        paged_attention(*arguments)
    outer, inner = AttentionMetadata.from_batch(ForwardBatch(4)), step.metadata
    with forward_context(outer), pytest.raises(ZeroDivisionError):
        with forward_context(inner, "reference") as context:
            assert current_context() is context and context.backend is paged_attention_reference
            torch.testing.assert_close(paged_attention(*arguments).double(), step.expected(), rtol=1e-5, atol=1e-5)
            raise ZeroDivisionError
        pytest.fail("the exception passes")  # pragma: no cover
    with pytest.raises(RuntimeError, match="outside"):
        current_context()


def test_threads_do_not_share_contexts_or_workspaces():
    """Two engines in two threads: each sees its own step, and gathers into memory of its own."""
    workspace, seen = Workspace(), {}

    def look():
        seen["buffer"] = workspace.take(10, torch.float32)
        with pytest.raises(RuntimeError, match="outside"):
            current_context()
        seen["done"] = True

    with forward_context(AttentionMetadata.from_batch(ForwardBatch(4))):
        buffer = workspace.take(10, torch.float32)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen["done"] and seen["buffer"].data_ptr() != buffer.data_ptr()


def test_backends_by_name():
    with pytest.raises(ValueError, match="no attention backend 'cuda'; there are .*cpu.*reference"):
        get_backend("cuda")
    backend = CPUBackend()
    register_backend("mine", backend)
    try:
        assert get_backend("mine") is backend
    finally:
        del attention._backends["mine"]


def test_inference_mode_inside_and_outside():
    """A buffer made inside inference mode serves a call outside of it, and the other way round."""
    backend, step = CPUBackend(), make_step(DECODES)
    expected = step.expected()
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            cache = [tensor.clone() for tensor in step.kv_cache]
            out = backend(step.query, step.key, step.value, cache, step.metadata, 0.3)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_workspace_is_reused():
    workspace = Workspace()
    first = workspace.take(100, torch.float32)
    assert workspace.take(50, torch.float32).data_ptr() == first.data_ptr()
    assert len(workspace.take(200, torch.float32)) == 200 and len(workspace.take(1, torch.bfloat16)) == 1


def test_decoding_sequences_with_equal_leading_blocks_are_counted():
    """The hint for backends that read shared prefixes once: decodes only, long enough, and the same block at the same depth."""
    batch = ForwardBatch(4)
    for table, new, length in (([1, 2, 3], 1, 9), ([1, 2, 4], 1, 10), ([1, 2], 1, 7), ([1, 2, 5], 3, 9), ([6, 7], 1, 8), ([6, 7, 8], 1, 9), ([], 1, 0)):
        batch.query_start_loc.append(batch.query_start_loc[-1] + new)
        batch.seq_lens.append(length)
        batch.block_tables.extend(table)
        batch.block_table_start.append(len(batch.block_tables))
        batch.slot_mapping.extend([0] * new)
    assert [count_sharers(batch, n) for n in (1, 4, 5, 8, 9, 100)] == [3, 3, 2, 2, 0, 0]
    assert count_sharers(ForwardBatch(16), 256) == 0
    assert AttentionMetadata.from_batch(batch).num_sharers == 0  # 256 tokens are asked for
