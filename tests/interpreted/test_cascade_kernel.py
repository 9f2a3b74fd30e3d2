"""Decode over shared prefixes against the float64 oracle: poisoned pools, shuffled blocks, and groups that the tables alone give away."""

from __future__ import annotations

import pytest
import torch
from kernel_steps import CONFIG, PREFIX_CONFIG, check_shared, decoding_rows, guarded, make_step, run_decode, run_shared, share, written
from test_attention import Step

from pagedlit.compute.attention import padded_block_tables
from pagedlit.compute.kv_cache import split_kv
from pagedlit.kernels.cascade import MIN_PART, PrefixPlan, group_launches, paged_decode_shared, prefix_config, prefix_plan_launch, tokens_that_pay
from pagedlit.kernels.decode import DecodeConfig
from pagedlit.kernels.extend import ExtendConfig

SINKS = torch.linspace(-2, 3, 20)
LENGTHS = [(100, 1), (70, 1), (0, 5), (0, 1), (130, 1), (63, 1), (64, 1), (80, 3)]  # 5 of them share 64 tokens (two do not decode), 2 share 32


def shared_step(block_size: int = 16, **shape: object) -> Step:
    """A group of three and a group of two; a prefill begins with the blocks of the first group too."""
    step = make_step(LENGTHS, block_size, **{"dims": (16, 16), **shape})
    share(step, 1, [0, 4, 7], 64 // block_size)
    share(step, 5, [6], max(1, 32 // block_size))
    return step


SHARED = [64, 64, 0, 0, 64, 32, 32, 0]
OPTIONS = {
    "plain": ({}, SHARED),
    "softcap": ({"softcap": 2.0}, SHARED),
    "sinks": ({"sinks": SINKS[:4]}, SHARED),
    "a window that hides nothing": ({"sliding_window": 131}, SHARED),
    "a window that hides a token of one member": ({"sliding_window": 130}, [0, 0, 0, 0, 0, 32, 32, 0]),
    "a window that hides everything": ({"sliding_window": 5}, [0] * 8),
    "all": ({"sliding_window": 100, "softcap": 1.5, "sinks": SINKS[:4], "scale": 0.7}, [0, 0, 0, 0, 0, 32, 32, 0]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    options, shared = OPTIONS[name]
    check_shared(shared_step(dtype=torch.float16 if name in ("plain", "all") else torch.float32), shared, **options)


@pytest.mark.parametrize(("places", "prefix_places"), [(1, 1), (30, 30)])
def test_places(places, prefix_places):
    check_shared(shared_step(), SHARED, places=places, prefix_places=prefix_places)


@pytest.mark.parametrize("block_size", [1, 12, 64])
def test_block_sizes(block_size):
    """A prefix ends at a whole block, and what is read together at a whole tile before it."""
    shared = [n // 16 * 16 for n in (64 // block_size * block_size, max(1, 32 // block_size) * block_size)]
    want = [shared[0], shared[0], 0, 0, shared[0], min(shared[1], 48), min(shared[1], 48), 0]
    step = shared_step(block_size)
    if block_size == 64:  # sequence 5 has 64 tokens: its only block is whole
        want[5:7] = 64, 64
    check_shared(step, want, sinks=SINKS[:4])


@pytest.mark.parametrize(("group", "rows"), [(1, 16), (7, 32), (20, 32)])
def test_groups_of_heads(group, rows):
    check_shared(shared_step(heads=(2 * group, 2)), SHARED, prefix_config=ExtendConfig(rows=rows, tile=16), sinks=torch.linspace(-2, 2, 2 * group))


@pytest.mark.parametrize("dims", [(80, 80), (256, 256), (192, 128), (5, 7)], ids=str)
def test_head_dims(dims):
    check_shared(shared_step(dims=dims), SHARED, scale=dims[0] ** -0.5)


@pytest.mark.parametrize(("config", "prefix"), [
    (DecodeConfig(num_slices=1), ExtendConfig(rows=64, tile=32)), (CONFIG, ExtendConfig(rows=128, tile=64)), (DecodeConfig(num_slices=2), ExtendConfig(rows=32, tile=16)),
])  # fmt: skip
def test_configurations(config, prefix):
    shared = [n // prefix.tile * prefix.tile for n in SHARED]
    check_shared(shared_step(), shared, config=config, prefix_config=prefix, sinks=SINKS[:4])


def test_groups_span_tiles_of_members():
    """Seven members, four to a tile; the others of the tile are not there."""
    step = make_step([(40 + i, 1) for i in range(7)] + [(60, 1)], 16, dims=(16, 16))
    share(step, 3, [0, 1, 2, 4, 5, 6], 2)
    check_shared(step, [32] * 7 + [0])
    check_shared(step, [32] * 7 + [0], prefix_places=1, prefix_config=ExtendConfig(rows=32, tile=16))


@pytest.mark.parametrize("native", [True, False])
def test_e4m3(native):
    step = shared_step(dims=(32, 32))
    scales = torch.tensor([0.01, 0.02]), torch.tensor([0.005, 0.03])
    restored = [tensor.clone() for tensor in written(step)]
    cache = [torch.full_like(tensor, torch.nan, dtype=torch.float8_e4m3fn) for tensor in restored]
    for codes, tensor, scale, per_seq in zip(cache, restored, scales, (step.keys, step.values)):
        codes.copy_((tensor / scale[:, None, None]).to(torch.float8_e4m3fn))
        per_seq[:] = [(rows / scale[:, None]).to(torch.float8_e4m3fn).double() * scale[:, None] for rows in per_seq]
    config, prefix = CONFIG._replace(native_e4m3=native), PREFIX_CONFIG._replace(native_e4m3=native)
    out, shared = run_shared(step, cache, config=config, prefix_config=prefix, key_scales=scales[0], value_scales=scales[1])
    rows = decoding_rows(step)
    torch.testing.assert_close(out[rows].double(), step.expected()[rows], rtol=2e-5, atol=2e-5)
    assert shared == SHARED


def test_one_block_differs_in_the_middle():
    """Tables that agree at the depth that was tried, but not before it: only what really is equal is shared."""
    step = make_step([(120, 1), (110, 1), (90, 1)], 16, dims=(16, 16))
    share(step, 0, [1, 2], 5)
    own, first = step.metadata.block_tables, int(step.metadata.block_table_start[1])
    spare = next(i for i in range(len(step.kv_cache[0])) if i not in own.tolist())
    for tensor in step.kv_cache:
        tensor[spare] = tensor[own[first + 2]]
    own[first + 2] = spare  # the same numbers in another block
    check_shared(step, [32, 32, 32])


def test_every_sequence_takes_the_depth_that_spares_most():
    """Six share 32 tokens, and two of them 96: for these the long prefix spares more, for the others the short one."""
    step = make_step([(100, 1)] * 6, 16, dims=(16, 16))
    share(step, 0, [1, 2, 3, 4, 5], 2)
    share(step, 4, [5], 6)
    check_shared(step, [32, 32, 32, 32, 96, 96])


def test_identical_tables():
    """Whole blocks to the very end: what is left for each sequence is nothing."""
    step = make_step([(63, 1), (63, 1), (10, 1)], 16, heads=(2, 1), dims=(16, 16))
    share(step, 0, [1], 4)
    for name in ("keys", "values"):
        rows = getattr(step, name)
        rows[1] = rows[0]
    step.key[1], step.value[1], step.metadata.slot_mapping[1] = step.key[0], step.value[0], step.metadata.slot_mapping[0]
    check_shared(step, [64, 64, 0], sinks=SINKS[:2])


def test_what_does_not_pay_is_not_grouped():
    step = shared_step()
    spared = 2 * 64 + 32
    check_shared(step, SHARED, min_saved=spared)
    check_shared(step, [0] * 8, min_saved=spared + 1)
    check_shared(step, [64, 64, 0, 0, 64, 0, 0, 0], min_tokens=33)
    check_shared(step, [0] * 8, min_tokens=65)


def test_without_groups_the_bits_are_those_of_the_decode_kernel():
    step = make_step(LENGTHS, 16, dims=(16, 16))
    out, shared = run_shared(step, written(step), places=5)
    assert torch.equal(out.nan_to_num(7), run_decode(step, written(step), 5).nan_to_num(7)) and not any(shared)


def test_padding_of_a_batch():
    """Rows with no token among the members, and a step of one sequence."""
    step = make_step([(40, 1), (0, 1), (40, 1)], 16, dims=(16, 16))
    share(step, 0, [2], 2)
    step.metadata.seq_lens = torch.tensor([41, 0, 41], dtype=torch.int32)
    out, shared = run_shared(step, written(step))
    expected = step.expected()
    torch.testing.assert_close(out[[0, 2]].double(), expected[[0, 2]], rtol=2e-5, atol=2e-5)
    assert (out[1] == 0).all() and shared == [32, 0, 32]
    check_shared(make_step([(40, 1)], 16, dims=(16, 16)), [0])


def plan_of(tables: torch.Tensor, seq_lens: torch.Tensor, places: int, config: ExtendConfig, group: int = 4, min_tokens: int = 16) -> PrefixPlan:
    """Of sequences that all decode, in blocks of 16; first places begin at 1000."""
    num_seqs = len(seq_lens)
    rows, groups = torch.arange(num_seqs + 1, dtype=torch.int32), torch.full((num_seqs, 8), 777, dtype=torch.int32)
    starts, plan = rows[:-1] * tables.shape[1], PrefixPlan.empty(num_seqs, places, config, "cpu")
    for tensor in plan[:3]:
        tensor.fill_(777)
    for launch in group_launches(groups, rows, seq_lens, starts, tables, 16, min_tokens):
        launch.run()
    prefix_plan_launch(plan, groups, starts, 16, group, 1000, None, min_tokens).run()
    return plan


@pytest.mark.parametrize(("num_seqs", "places"), [(2, 7), (40, 1), (40, 100), (200, 7)])
def test_plan_covers_every_prefix_once(num_seqs, places):
    """Each member of a group gets every shared token once; places are distinct and within the room that was asked for."""
    random, config = torch.Generator().manual_seed(num_seqs), ExtendConfig(rows=16, tile=64)
    depth = torch.randint(0, 60, (num_seqs,), generator=random)
    tables = torch.arange(num_seqs * 64, dtype=torch.int32).view(num_seqs, 64)
    first = torch.randint(0, num_seqs, (1 + num_seqs // 8,), generator=random)
    for s in range(num_seqs):
        tables[s, : depth[s]] = tables[first[s % len(first)], : depth[s]]
    seq_lens = torch.full((num_seqs,), 64 * 16, dtype=torch.int32)
    plan = plan_of(tables, seq_lens, places, config)
    items = [item[:7] for item in plan.items.tolist() if item[0] >= 0]
    tokens, first_place, parts = (column.tolist() for column in plan.prefixes.T)
    grouped = [s for s in range(num_seqs) if tokens[s]]
    assert sorted(plan.members[: len(grouped)].tolist()) == grouped and all(item[6] == len(items) for item in plan.items.tolist())
    assert grouped or num_seqs == 2
    used, reads = [first_place[s] + part for s in grouped for part in range(parts[s])], {s: [] for s in grouped}
    assert sorted(used) == list(range(1000, 1000 + len(used))) and len(used) <= plan.max_partials(4)
    for listed, start, begin, end, part, num_members, _ in items:
        for s in plan.members[listed : listed + num_members].tolist():
            reads[s].append((part, begin, end))
            assert torch.equal(tables[s, : end // 16], tables.flatten()[start : start + end // 16])
    for s, spans in reads.items():
        spans.sort()
        assert [part for part, *_ in spans] == list(range(parts[s])) and spans[0][1] == 0 and spans[-1][2] == tokens[s]
        assert all(a[2] == b[1] and a[2] - a[1] >= MIN_PART for a, b in zip(spans, spans[1:]))
    total = sum((end - begin) for _, _, begin, end, *_ in items)
    assert len(items) <= places + num_seqs and all(end - begin <= max(MIN_PART, -(-total // (64 * places)) * 64) for _, _, begin, end, *_ in items)


def arguments():
    step = make_step([(70, 1), (80, 1)], 16, dims=(16, 16))
    share(step, 0, [1], 4)
    return step, [step.query, *written(step), padded_block_tables(step.metadata), step.metadata.seq_lens, 0.3]


def test_checked_entrance():
    step, given = arguments()
    options = {"sliding_window": 100, "softcap": 2.0, "sinks": SINKS[:4]}
    for min_saved in (0, None):
        out = paged_decode_shared(*given, *options.values(), min_tokens=32, min_saved=min_saved)
        torch.testing.assert_close(out.double(), step.expected(**options), rtol=2e-5, atol=2e-5)
    assert paged_decode_shared(step.query[:0], *given[1:3], given[3][:0], given[4][:0], 0.3).shape == (0, 4, 16)
    with pytest.raises(ValueError, match="names block 99"):
        paged_decode_shared(*given[:3], given[3].fill_(99), *given[4:])
    with pytest.raises(ValueError, match="2 query heads share a KV head: a tile has 1 rows"):
        paged_decode_shared(*arguments()[1], prefixes=ExtendConfig(rows=1))


def test_defaults():
    meta = {"device": "meta", "dtype": torch.bfloat16}
    narrow, wide, uneven = (torch.empty(1, 8, 16, dim, **meta) for dim in (128, 256, 192))
    assert tokens_that_pay(narrow, narrow) == 16_000_000 // 4096
    query = torch.empty(1, 32, 128, **meta)
    assert prefix_config(query, narrow, narrow) == ExtendConfig()
    assert prefix_config(query, wide, wide).tile == 16 and prefix_config(query, uneven, narrow).num_stages == 3
    assert prefix_config(query.float(), wide, wide).rows == 32


def test_nan_of_one_member_stays_there():
    step = shared_step()
    expected, _ = run_shared(step, written(step))
    step.query[0] = torch.nan
    out, _ = run_shared(step, [guarded(tensor) for tensor in written(step)])
    assert out[0].isnan().all() and torch.equal(out[1:].nan_to_num(7), expected[1:].nan_to_num(7))
    assert split_kv(step.kv_cache)[0].isnan().any()
