"""Random steps for the kernels, made by the tests of chapter 10: poisoned pools, shuffled blocks, and a float64 oracle without blocks."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from test_attention import Step, make_step, share
from torch import Tensor

from pagedlit.compute.attention import padded_block_tables
from pagedlit.compute.kv_cache import split_kv, write_kv
from pagedlit.kernels import cascade as cascade_module
from pagedlit.kernels import decode as decode_module
from pagedlit.kernels import extend as extend_module
from pagedlit.kernels.decode import DecodeConfig, DecodeScratch
from pagedlit.kernels.extend import ExtendConfig, max_extend_items

CONFIG = DecodeConfig()
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}  # bfloat16 is silently wrong in the interpreter: the compile gate has it


def guarded(tensor: Tensor) -> Tensor:
    """A copy in the middle of a larger pool of NaN: whoever reads one block beside it finds NaN, and not the heap."""
    pool = tensor.new_full((len(tensor) + 2, *tensor.shape[1:]), torch.nan)
    pool[1:-1] = tensor
    return pool[1:-1]


def written(step: Step) -> tuple[Tensor, Tensor]:
    """K and V of the step's cache after the step's write."""
    cache = split_kv([guarded(tensor) for tensor in step.kv_cache])
    write_kv(*cache, step.key, step.value, step.metadata.slot_mapping)
    return cache


def decoding_rows(step: Step) -> list[int]:
    """The rows of sequences that have one."""
    starts = step.metadata.query_start_loc.tolist()
    return [a for a, b in zip(starts, starts[1:]) if b == a + 1]


def run_decode(
    step: Step, cache: tuple[Tensor, Tensor], places: int = 4, config: DecodeConfig = CONFIG, module: ModuleType = decode_module,
    scale: float = 0.3, sliding_window: int | None = None, **options: object,
) -> Tensor:  # fmt: skip
    """Plan and decode twice (the counters must be clean after the first), with every buffer poisoned."""
    metadata, num_heads, value_dim = step.metadata, step.query.shape[1], step.value.shape[2]
    tables = F.pad(padded_block_tables(metadata), (0, 4, 0, 1), value=-1)
    items = torch.full((metadata.num_seqs + places, 8), 12345, dtype=torch.int32)
    starts = torch.arange(metadata.num_seqs, dtype=torch.int32) * tables.shape[1]
    module.plan_launch(items, metadata.query_start_loc, metadata.seq_lens, starts, places, config, sliding_window).run()
    scratch = DecodeScratch.empty(len(items) + 8, num_heads, value_dim, "cpu")
    outs = []
    for _ in range(2):
        scratch.partial_out.fill_(torch.nan), scratch.partial_stats.fill_(torch.nan)
        out = torch.full((*step.query.shape[:2], value_dim), torch.nan, dtype=step.query.dtype)
        module.decode_launch(step.query, *cache, out, tables, items, scratch, config, scale, **options).run()
        outs.append(out)
    assert torch.equal(outs[0].nan_to_num(7), outs[1].nan_to_num(7)), "the same launch twice gave different bits"
    assert not scratch.arrivals.any(), "a counter was left behind"
    return outs[0]


def check_decode(step: Step, places: int = 4, config: DecodeConfig = CONFIG, module: ModuleType = decode_module, **options: object) -> None:
    """Rows of decoding sequences equal the oracle; no other row is touched."""
    out, expected, rows = run_decode(step, written(step), places, config, module, **options), step.expected(**options), decoding_rows(step)
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out[rows].double(), expected[rows], rtol=tolerance, atol=tolerance)
    others = [row for row in range(len(out)) if row not in rows]
    assert out[others].isnan().all(), "a row of a sequence that does not decode was written"


PREFIX_CONFIG = ExtendConfig(rows=16, tile=16)


def run_shared(
    step: Step, cache: tuple[Tensor, Tensor], places: int = 4, config: DecodeConfig = CONFIG, prefix_places: int = 3,
    prefix_config: ExtendConfig = PREFIX_CONFIG, module: ModuleType = cascade_module, scale: float = 0.3, sliding_window: int | None = None,
    min_tokens: int = 16, min_saved: int = 0, min_part: int = 16, times: int = 2, softcap: float | None = None, sinks: Tensor | None = None, **scales: Tensor,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """Group and plan, then decode twice, with every buffer poisoned; also the tokens that are read for each sequence by its group."""
    metadata, num_heads, value_dim, group = step.metadata, step.query.shape[1], step.value.shape[2], step.query.shape[1] // cache[0].shape[1]
    tables = F.pad(padded_block_tables(metadata), (0, 4, 0, 1), value=-1)
    starts = torch.arange(metadata.num_seqs, dtype=torch.int32) * tables.shape[1]
    items, groups = (torch.full((n, 8), 12345, dtype=torch.int32) for n in (metadata.num_seqs + places, metadata.num_seqs))
    plan = module.PrefixPlan.empty(metadata.num_seqs, prefix_places, prefix_config, "cpu")
    for tensor, poison in zip(plan, (12345, 0, 0)):  # members and places that nobody wrote must be wrong, but not crash the interpreter
        tensor.fill_(poison)
    num_places = len(items) + plan.max_partials(group)
    scratch = DecodeScratch(*(torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in DecodeScratch.empty(num_places, num_heads, value_dim, "cpu")))
    rows, lens, block_size, layer = metadata.query_start_loc, metadata.seq_lens, metadata.block_size, (step.query, *cache)
    outs = []
    for launch in (
        *module.group_launches(groups, rows, lens, starts, tables, block_size, min_tokens),
        module.prefix_plan_launch(plan, groups, starts, block_size, group, len(items), sliding_window, min_tokens, min_saved, min_part),
        module.plan_launch(items, rows, lens, starts, places, config, sliding_window, plan.prefixes),
    ):
        launch.run()
    for _ in range(times):
        scratch.partial_out.fill_(torch.nan), scratch.partial_stats.fill_(torch.nan)
        module.prefix_launch(*layer, tables, rows, plan, scratch, scale, softcap, **scales).run()
        out = torch.full((*step.query.shape[:2], value_dim), torch.nan, dtype=step.query.dtype)
        module.decode_launch(*layer, out, tables, items, scratch, config, scale, softcap, sinks, **scales, has_prefixes=True).run()
        outs.append(out)
    assert torch.equal(outs[0].nan_to_num(7), outs[-1].nan_to_num(7)), "the same launches twice gave different bits"
    assert not scratch.arrivals.any(), "a counter was left behind"
    assert scratch.partial_out[-1].isnan().all(), "a partial result lies behind the room that was asked for"
    return outs[0], plan.prefixes[:, 0].tolist()


def check_shared(step: Step, shared: list[int] | None = None, **options: object) -> list[int]:
    """Rows of decoding sequences equal the oracle, no other row is touched, and so many tokens are read for each sequence by its group."""
    out, tokens = run_shared(step, written(step), **options)
    formula = {name: options[name] for name in ("scale", "sliding_window", "softcap", "sinks") if name in options}
    expected, rows, tolerance = step.expected(**formula), decoding_rows(step), TOLERANCE[out.dtype]
    torch.testing.assert_close(out[rows].double(), expected[rows], rtol=tolerance, atol=tolerance)
    others = [row for row in range(len(out)) if row not in rows]
    assert out[others].isnan().all(), "a row of a sequence that does not decode was written"
    assert shared is None or tokens == shared, f"read by groups: {tokens}"
    return tokens


def run_extend(
    step: Step, cache: tuple[Tensor, Tensor], config: ExtendConfig, min_rows: int, module: ModuleType = extend_module,
    scale: float = 0.3, **options: object,
) -> Tensor:  # fmt: skip
    """Plan and extend, with every buffer poisoned."""
    metadata, group = step.metadata, step.query.shape[1] // cache[0].shape[1]
    tables = F.pad(padded_block_tables(metadata), (0, 4, 0, 1), value=-1)
    items = torch.full((max_extend_items(len(step.query), metadata.num_seqs, group, config), 8), 12345, dtype=torch.int32)
    starts = torch.arange(metadata.num_seqs, dtype=torch.int32) * tables.shape[1]
    module.extend_plan_launch(items, metadata.query_start_loc, metadata.seq_lens, starts, group, config, min_rows).run()
    out = torch.full((*step.query.shape[:2], step.value.shape[2]), torch.nan, dtype=step.query.dtype)
    module.extend_launch(step.query, *cache, out, tables, items, config, scale, **options).run()
    return out


def check_extend(step: Step, config: ExtendConfig, min_rows: int = 1, module: ModuleType = extend_module, **options: object) -> None:
    """Rows of sequences with at least `min_rows` new ones equal the oracle; no other row is touched."""
    out, expected = run_extend(step, written(step), config, min_rows, module, **options), step.expected(**options)
    left_out = decoding_rows(step) if min_rows > 1 else []
    rows, tolerance = [row for row in range(len(out)) if row not in left_out], TOLERANCE[out.dtype]
    torch.testing.assert_close(out[rows].double(), expected[rows], rtol=tolerance, atol=tolerance)
    assert out[left_out].isnan().all(), "a row that is left to the decode kernel was written"


__all__ = [
    "CONFIG", "PREFIX_CONFIG", "TOLERANCE", "check_decode", "check_extend", "check_shared", "decoding_rows", "guarded", "make_step", "run_decode",
    "run_extend", "run_shared", "share", "written",
]  # fmt: skip
