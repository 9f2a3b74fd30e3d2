"""The kernels that change the cache, against chapter 9."""

from __future__ import annotations

import random

import pytest
import torch

from pagedlit.compute.kv_cache import KVCache, LayerSpec, split_kv
from pagedlit.compute.kv_cache import copy_blocks as copy_by_torch
from pagedlit.compute.kv_cache import write_kv as write_by_torch
from pagedlit.kernels.cache_write import SCRATCH, copy_blocks, copy_targets, ordered_moves, write_kv, write_kv_launch
from pagedlit.memory.copy_on_write import BlockCopy


def pools(heads=3, dims=(24, 24), block_size=4, dtype=torch.float32, num_blocks=6):
    """Two equal layers, poisoned."""
    layers = KVCache([LayerSpec(heads, *dims)] * 2, num_blocks, block_size, dtype).layers
    for layer in layers:
        for tensor in layer:
            tensor.fill_(torch.nan)
    return split_kv(layers[0]), split_kv(layers[1])


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("heads", "dims"), [(1, (8, 8)), (3, (24, 40)), (8, (128, 128)), (5, (80, 80)), (40, (64, 64)), (2, (256, 192))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_write(block_size, heads, dims, dtype):
    got, expected = pools(heads, dims, block_size, dtype)
    slots = torch.randperm(6 * block_size)[:5].long()
    slots[torch.rand(len(slots)) < 0.3] = -1
    key, value = (torch.randn(heads, 7, dim + 3).to(dtype)[..., :dim].transpose(0, 1) for dim in dims)  # strided, as a model gives it
    write_kv(*got, key, value, slots)
    write_by_torch(*expected, key, value, slots)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_scales", [False, True])
def test_write_e4m3(slot_dtype, with_scales):
    cache = [torch.zeros(4, 3, 4, 24).to(torch.float8_e4m3fn) for _ in range(2)]
    key, value, slots = torch.randn(5, 3, 24) * 100, torch.randn(5, 3, 24), torch.tensor([3, -1, 15, 0, 9], dtype=slot_dtype)
    key[0, 0, 0], key[2, 1, 1] = 1e6, torch.nan
    scales = (torch.rand(3) + 0.5, torch.rand(3) / 100) if with_scales else (None, None)
    write_kv(*cache, key, value, slots, *scales)
    for stored, rows, scale in zip(cache, (key, value), scales):
        scaled = rows if scale is None else rows / scale[:, None]
        expected = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(stored[slot // 4, :, slot % 4].float().nan_to_num(7), expected[row].float().nan_to_num(7))
        assert int((stored.float() != 0).sum()) <= 4 * 3 * 24


def test_write_beyond_two_to_the_31_elements():
    """The pool's memory is never touched, save for one block at its end."""
    cache = torch.empty(70_000, 8, 16, 256, dtype=torch.float8_e4m3fn)
    assert cache.numel() > 2**31
    key, slot = torch.randn(1, 8, 256), torch.tensor([69_999 * 16 + 5])
    write_kv_launch(cache, cache, key, key, slot).run()
    assert torch.equal(cache[69_999, :, 5].float(), key[0].clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_writing_nothing():
    got, expected = pools()
    empty = torch.empty(0, 3, 24)
    write_kv(*got, empty, empty, torch.empty(0, dtype=torch.int64))
    torch.testing.assert_close(got, expected, equal_nan=True)


MISTAKES = {
    "slot 24 of a pool of 24 slots": lambda c, k, s: (*c, k, k, s + 23),
    "two rows go to one slot": lambda c, k, s: (*c, k, k, s * 0),
    "key has (heads, dim) (2, 24)": lambda c, k, s: (*c, k[:, :2], k, s),
    "float rows, contiguous": lambda c, k, s: (*c, k.long(), k, s),
    "3 slots for 2 K rows": lambda c, k, s: (*c, k, k, torch.tensor([1, 2, 3])),
    "give scales for both": lambda c, k, s: (*c, k, k, s, torch.ones(3)),
    "expected one float32 for each of 3 heads": lambda c, k, s: (*c, k, k, s, torch.ones(2), torch.ones(3)),
    "expected [num_blocks": lambda c, k, s: (c[0][0], c[1], k, k, s),
    "key_cache is torch.float32, value_cache torch.float16": lambda c, k, s: (c[0], c[1].half(), k, k, s),
    "do not lie side by side": lambda c, k, s: (c[0].transpose(1, 2), c[1].transpose(1, 2), k, k, s),
    "key_cache is torch.int32": lambda c, k, s: (c[0].int(), c[1].int(), k, k, s),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_write_refuses(message):
    (cache, expected), key, slots = pools(), torch.randn(2, 3, 24), torch.tensor([0, 1])
    with pytest.raises(ValueError) as error:
        write_kv(*MISTAKES[message](cache, key, slots))
    assert message in str(error.value)
    torch.testing.assert_close(cache, expected, equal_nan=True)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_copies_take_effect_together(seed, dtype):
    rng = random.Random(seed)
    specs = [LayerSpec(3, 24, 24), LayerSpec(2, 7, 20), LayerSpec(3, 24, 24), LayerSpec(8, 64, 64)]
    cache = KVCache(specs, 8, 4, dtype)
    tensors = [tensor for layer in cache.layers for tensor in layer]
    for tensor in tensors:
        tensor.view(torch.uint8).random_(255)
    before = [tensor.clone() for tensor in tensors]
    copies = [BlockCopy(rng.randrange(8), dst, 4 if seed % 2 else rng.randint(1, 4)) for dst in rng.sample(range(8), rng.randint(0, 8))]
    copy_blocks(tensors, copies)
    for now, old in zip(tensors, before):
        expected = old.view(torch.uint8).clone()
        for src, dst, n in copies:
            expected[dst, ..., :n, :] = old.view(torch.uint8)[src, ..., :n, :]
        assert torch.equal(now.view(torch.uint8), expected)
    if seed % 2 and copies and dtype != torch.float8_e4m3fn:
        copy_by_torch(before, copies)
        assert all(torch.equal(a.nan_to_num(3), b.nan_to_num(3)) for a, b in zip(tensors, before))


def test_a_cycle_goes_through_the_scratch():
    assert ordered_moves([(0, 1, 4), (1, 2, 4), (2, 0, 4)])[0][1] == SCRATCH
    assert ordered_moves([(0, 1, 4), (1, 2, 4)]) == [(1, 2, 4), (0, 1, 4)]
    assert ordered_moves([(3, 3, 4)]) == []


def test_layers_of_one_shape_share_a_launch():
    cache = KVCache([LayerSpec(2, 8, 8)] * 5, 3, 4, torch.float16)
    targets = copy_targets([layer[0] for layer in cache.layers])
    assert [len(target.pointers) for target in targets] == [5] and targets[0].block_words == 2 * 2 * 4 * 8 // 2


@pytest.mark.parametrize(("copies", "message"), [
    ([(0, 1, 4), (2, 1, 4)], "two copies into one block"), ([(0, 8, 4)], "copy 0 -> 8 in a pool of 8 blocks"),
    ([(-1, 0, 4)], "copy -1 -> 0"), ([(0, 1, 5)], "of 5 tokens: a block has 4"), ([(0, 1, 0)], "of 0 tokens"),
])  # fmt: skip
def test_copy_refuses(copies, message):
    with pytest.raises(ValueError, match=message):
        copy_blocks([torch.zeros(8, 2, 2, 4, 8)], copies)
    with pytest.raises(ValueError, match="not contiguous"):
        copy_blocks([torch.zeros(8, 2, 4, 8).transpose(1, 2)], [(0, 1, 1)])
