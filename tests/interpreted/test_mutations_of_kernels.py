"""Does the net hold? Each documented mistake is made in the source of the kernels, one at a time, and a short run must notice it."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_steps import CONFIG, check_decode, check_extend, check_shared, make_step, run_decode, share, written

import pagedlit.kernels
from pagedlit.compute.kv_cache import write_kv as write_by_torch
from pagedlit.kernels.extend import ExtendConfig
from pagedlit.memory.copy_on_write import BlockCopy

SOURCE = Path(pagedlit.kernels.__file__).parent
numbers = itertools.count()
SINKS = torch.linspace(-2, 3, 4)


def mutant(folder: Path, module: str, old: str, new: str, load: str = "") -> ModuleType:
    """The package of kernels under another name, with one place of one module changed (it must exist once): that module, or `load`."""
    text = (SOURCE / f"{module}.py").read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{text.count(old)} times in {module}.py: {old}"
    name = f"mutant_{next(numbers)}"
    shutil.copytree(SOURCE, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / name / f"{module}.py").write_text(text.replace(old, new), encoding="utf-8")
    load = load or module
    for part in ("", f".{load}"):
        where = folder / name / (f"{part[1:]}.py" if part else "__init__.py")
        spec = importlib.util.spec_from_file_location(name + part, where)
        assert spec and spec.loader
        sys.modules[name + part] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(folder))
        try:
            spec.loader.exec_module(sys.modules[name + part])
        finally:
            sys.path.remove(str(folder))
    return sys.modules[f"{name}.{load}"]


def decode_net(module: ModuleType) -> None:
    """Two steps that use every option, split and not."""
    lengths = [(63, 1), (0, 1), (130, 1), (7, 3), (64, 1)]
    check_decode(make_step(lengths, 16, heads=(6, 2), dims=(24, 16)), 5, CONFIG, module, softcap=2.0, sinks=torch.linspace(-1, 4, 6), scale=0.7)
    check_decode(make_step(lengths, 16, dims=(16, 16)), 5, CONFIG, module, sliding_window=70, sinks=SINKS)
    check_decode(make_step([(150, 1), (3, 1)], 12, heads=(2, 1), dims=(16, 16)), 9, CONFIG, module)  # three parts
    empty = make_step([(0, 1), (20, 1)], 16, heads=(2, 1), dims=(16, 16))
    empty.metadata.seq_lens = torch.tensor([0, 21], dtype=torch.int32)
    assert (run_decode(empty, written(empty), 1, CONFIG, module)[0] == 0).all()


def shared_net(module: ModuleType) -> None:
    """Two that share a block which one has not filled; three in two tiles of two, in two parts, and a prefill with the same blocks; a window."""
    for options, shared in (
        ({"softcap": 2.0, "sinks": torch.linspace(-1, 4, 10), "scale": 0.7}, [32, 32, 96, 96, 0, 96]),
        ({"sliding_window": 130, "min_saved": 33}, [0] * 6),
    ):
        step = make_step([(63, 1), (39, 1), (118, 1), (130, 1), (100, 3), (120, 1)], 16, heads=(10, 2), dims=(24, 16))
        share(step, 0, [1], 3)
        share(step, 2, [5], 7)
        share(step, 2, [3, 4], 6)
        check_shared(step, shared, places=7, prefix_places=4, times=1, module=module, **options)


def extend_net(module: ModuleType) -> None:
    """Two steps that use every option, with and without decodes."""
    config = ExtendConfig(rows=32, tile=16)
    check_extend(make_step([(40, 9), (0, 20), (5, 1)], 16, heads=(6, 2), dims=(24, 16)), config, 1, module, softcap=2.0, sinks=torch.linspace(-1, 4, 6), scale=0.7)
    check_extend(make_step([(40, 9), (0, 20), (5, 1)], 12, dims=(16, 16)), config, 2, module, sliding_window=7, sinks=SINKS)


def write_net(module: ModuleType) -> None:
    """Scattered rows and slots of -1, in the pool's dtype and in eight bits; copies with a chain, a swap and a part of a block."""
    got, expected = ([torch.zeros(8, 3, 4, dim) for dim in (24, 20)] for _ in range(2))  # the first and the last block are not in the pool
    key, value, slots = torch.randn(4, 3, 24), torch.randn(4, 3, 20), torch.tensor([3, -1, 22, 9])
    module.write_kv_launch(*(pool[1:-1] for pool in got), key, value, slots).run()
    write_by_torch(*(pool[1:-1] for pool in expected), key, value, slots)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    rows = torch.stack([torch.randn(8, 64), torch.randn(8, 64) * 0.003, torch.randn(8, 64) * 200])
    codes, scale = torch.zeros(3, 8, 1, 64).to(torch.float8_e4m3fn), torch.full((8,), 0.25)
    module.write_kv_launch(codes, codes.clone(), rows, rows, torch.arange(3), scale, scale).run()
    assert torch.equal(codes[:, :, 0].float(), (rows * 4).clamp(-448, 448).to(torch.float8_e4m3fn).float())
    pool = torch.arange(8.0).view(8, 1, 1, 1).repeat(1, 2, 4, 2)
    module.copy_blocks([pool], [BlockCopy(0, 1, 4), BlockCopy(1, 2, 4), BlockCopy(5, 6, 4), BlockCopy(6, 5, 4), BlockCopy(3, 7, 2)])
    assert pool[:, 1, 1, 1].tolist() == [0, 0, 1, 3, 4, 6, 5, 3] and pool[7, :, 2:].eq(7).all()


MISTAKES = {  # what goes wrong: the module, the text, what it becomes
    "V is read beyond the length": ("decode", "mask=seen & (e < VALUE_DIM)", "mask=(e < VALUE_DIM)"),
    "logits are not masked": ("decode", "tl.where(tl.permute(seen, (0, 2, 1)), bend(logits * scale, softcap, HAS_SOFTCAP), HIDDEN)", "bend(logits * scale, softcap, HAS_SOFTCAP)"),
    "a token too many": ("decode", "(end - begin).to(tl.uint32)", "(end - begin + 1).to(tl.uint32)"),
    "a token too few": ("decode", "tl.minimum(begin + part_tiles * TILE, seq_len)", "tl.minimum(begin + part_tiles * TILE, seq_len - 1)"),
    "the window is one too wide": ("decode", "tl.maximum(seq_len - window, 0)", "tl.maximum(seq_len - window - 1, 0)"),
    "the scale is forgotten": ("decode", "bend(logits * scale,", "bend(logits,"),
    "exp2 of natural logits": ("decode", "return logits * LOG2E", "return logits"),
    "the softcap is dropped": ("decode", "if HAS_SOFTCAP:", "if False:"),
    "the result is not shrunk": ("decode", "acc * shrink[:, :, None], input_precision", "acc, input_precision"),
    "the sum is not shrunk": ("decode", "total * shrink + tl.sum(weights, 2)", "total + tl.sum(weights, 2)"),
    "block ids are not carried": ("decode", "mask=ahead < end, other=0)", "mask=ahead < 0, other=0)"),
    "the next block's id comes too early": ("decode", "block_tables + ahead // BLOCK_SIZE", "block_tables + (ahead + SLICE) // BLOCK_SIZE"),
    "K's head is wrong": ("decode", "key_cache + kv_head.to(tl.int64) * key_head_stride", "key_cache"),
    "V's rows are K's": ("decode", "value_lanes = value_cache + (lanes * VALUE_DIM)", "value_lanes = value_cache + (lanes * KEY_DIM)"),
    "slices are added without their shares": ("decode", "tl.sum(slice_acc * shares[:, :, None], 0)", "tl.sum(slice_acc, 0)"),
    "nobody merges": ("decode", "== num_parts - 1:", "== num_parts:"),
    "the merge does not wait": ("decode", "== num_parts - 1:", "== num_parts - 2:"),
    "the counter is not reset": ("decode", "tl.store(counter, 0)", "tl.store(counter, num_parts)"),
    "parts are merged without their shares": ("decode", "tl.sum(part_acc * shares[:, :, None], 0)", "tl.sum(part_acc, 0)"),
    "parts of the neighbour are merged": ("decode", "partial_stats, out, sinks, item - part, num_parts", "partial_stats, out, sinks, item, num_parts"),
    "the sink takes no share": ("decode", "total * shrink + tl.exp2(sink - new_best), acc", "total * shrink, acc"),
    "the sink of another head": ("decode", "tl.load(sinks + heads,", "tl.load(sinks + heads * 0,"),
    "an item for a sequence that prefills": ("decode", "num_rows == 1, tl.cdiv", "num_rows >= 1, tl.cdiv"),
    "empty sequences have no item": ("decode", "tl.maximum(tl.cdiv(tiles, part_tiles), 1), 0)", "tl.cdiv(tiles, part_tiles), 0)"),
    "shared: own tokens begin at the first": ("decode", "begin = tl.maximum(begin, tl.load(prefixes + seqs * 3,", "begin = tl.maximum(begin, 0 * tl.load(prefixes + seqs * 3,"),
    "shared: a sequence with one part does not merge": ("decode", "parts += num_before", "parts += tl.where(parts == 1, 0, num_before)"),
    "shared: parts of the prefix are left out": ("decode", "item - part, num_parts, fields, num_before,", "item - part, num_parts - num_before, fields, 0,"),
    "shared: the prefix is merged from own places": ("decode", "tl.load(fields + 6) + parts", "first_item + parts"),
    "shared: a prefill joins a group": ("cascade", "here = (num_rows == 1) &", "here = (num_rows >= 1) &"),
    "shared: the deepest is taken": ("cascade", "depth - depth / tl.maximum(num_same, 1).to(tl.float32)", "depth.to(tl.float32)"),
    "shared: tables are not compared": ("cascade", "tl.min(tl.where(differ, column, num_blocks), 0)", "num_blocks"),
    "shared: a block that is not full": ("cascade", "tl.load(seq_lens + leader)) // BLOCK_SIZE", "tl.load(seq_lens + leader)) // BLOCK_SIZE + 1"),
    "shared: one member speaks for all": ("cascade", "tl.atomic_min(groups", "tl.atomic_xchg(groups"),
    "shared: the shortest decides on the window": ("cascade", "tl.atomic_max(groups", "tl.atomic_min(groups"),
    "shared: the window is one too wide": ("cascade", "longest <= window", "longest - 1 <= window"),
    "shared: two members have one rank": ("cascade", "same & (others < seq)", "same & (others < seq - 1)"),
    "shared: every part begins at the first token": ("cascade", "part * part_tiles * TILE", "part * 0"),
    "shared: a part runs into the next": ("cascade", "tl.minimum(begin + part_tiles * TILE, num_tokens)", "num_tokens"),
    "shared: every tile has the first members": ("cascade", "tl.where(used, listed + done, -1)", "tl.where(used, listed, -1)"),
    "shared: two members have one place": ("cascade", "its_place + rank * parts", "its_place + rank"),
    "shared: two groups have one place": ("cascade", "first_place + its_place +", "first_place +"),
    "shared: two groups have one list": ("cascade", "members + its_list + rank", "members + rank"),
    "shared: two parts have one place": ("cascade", "other=0) + tl.load(fields + 4)", "other=0)"),
    "shared: a program takes one item": ("cascade", "tl.load(items + 6), tl.num_programs(1)):", "tl.load(items + 6), 99):"),
    "shared: rows beyond the members are stored": ("cascade", "(r // GROUP_PADDED < tl.load(fields + 5)) &", ""),
    "shared: nobody asks whether it pays": ("cascade", "num_saved >= min_saved", "num_saved >= 0"),
    "extend: the future is seen": ("extend", "(distance >= 0) &", "(distance >= -1) &"),
    "extend: a token does not see itself": ("extend", "(distance >= 0) &", "(distance >= 1) &"),
    "extend: the window is one too wide": ("extend", "(distance < window)", "(distance <= window)"),
    "extend: the window begins a tile late": ("extend", "tl.maximum(position - window + 1, 0) // TILE * TILE", "tl.maximum(position - window + TILE, 0) // TILE * TILE"),
    "extend: the diagonal is not masked": ("extend", "(position + 1) // TILE * TILE", "(position + TILE) // TILE * TILE"),
    "extend: V is read beyond the length": ("extend", "value_mask & inside", "value_mask"),
    "extend: the end of a tile of rows": ("extend", "end = position + num_rows", "end = position + num_rows - 1"),
    "extend: heads are mixed up": ("extend", "kv_head * GROUP + r % GROUP_PADDED", "kv_head * GROUP + r // GROUP_PADDED"),
    "extend: every tile begins at the chunk's position": ("extend", "- num_rows + first, mask", "- num_rows, mask"),
    "extend: the result is not shrunk": ("extend", "acc * shrink[:, None], input_precision", "acc, input_precision"),
    "extend: the scale is forgotten": ("extend", "input_precision=PRECISION) * scale,", "input_precision=PRECISION),"),
    "extend: decodes are taken too": ("extend", "num_rows >= min_rows", "num_rows >= 1"),
    "slot -1 is written": ("cache_write", "if slot >= 0:", "if slot >= -1:"),
    "a slot too late": ("cache_write", "slot % BLOCK_SIZE * DIM", "(slot + 1) % BLOCK_SIZE * DIM"),
    "heads are mixed up": ("cache_write", "heads * cache_head_stride", "(num_heads - 1 - heads) * cache_head_stride"),
    "e4m3 is cut off, not rounded": ("cache_write", "(bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20", "bits >> 20"),
    "tiny numbers are taken for normal ones": ("cache_write", "tl.where(magnitude < 0.015625, tiny, normal)", "normal"),
    "no saturation": ("cache_write", "tl.minimum(tl.abs(x), 448.0)", "tl.abs(x)"),
    "the scale multiplies": ("cache_write", "tl.div_rn(rows.to(tl.float32), tl.load", "(rows.to(tl.float32) * tl.load"),
    "a part of a block is copied whole": ("cache_write", "num_tokens = tl.load(moves + 3 * move + 2)", "num_tokens = BLOCK_SIZE"),
    "copies run in the order given": ("cache_write", "moves = torch.tensor(ordered_moves(copies)", "moves = torch.tensor(copies"),
    "the scratch is lost": ("cache_write", "tl.where(dst >= 0, scratch, data)", "scratch"),
}
NETS = {"decode": decode_net, "extend": extend_net, "cache_write": write_net, "cascade": shared_net}


@pytest.mark.parametrize("net", NETS)
def test_without_a_mistake_the_run_passes(net, tmp_path):
    NETS[net](mutant(tmp_path, net, '"""Triton', '"""A copy of: Triton'))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_caught(mistake, tmp_path):
    net = "cascade" if mistake.startswith("shared:") else MISTAKES[mistake][0]
    module = mutant(tmp_path, *MISTAKES[mistake], net)
    with pytest.raises(AssertionError):
        NETS[net](module)
