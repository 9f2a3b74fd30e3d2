"""The KV cache tensors: sizes, layouts, writes by slot, copies of blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedlit.compute import kv_cache
from pagedlit.compute.kv_cache import (
    CPU_CACHE_TOKENS,
    DeviceMemory,
    KVCache,
    LayerSpec,
    NoRoomForCache,
    available_memory,
    blocks_that_fit,
    bytes_per_block,
    cpu_blocks,
    gpu_blocks,
    slot_index,
    split_kv,
    write_kv,
)
from pagedlit.memory.copy_on_write import BlockCopy

GB = 2**30
SAME, APART = LayerSpec(2, 8, 8), LayerSpec(2, 12, 8)


@pytest.mark.parametrize("spec", [SAME, APART], ids=["together", "apart"])
def test_layouts(spec):
    cache = KVCache([spec, spec], num_blocks=5, block_size=4, dtype=torch.float32)
    assert cache.key(1).shape == (5, 2, 4, spec.key_dim) and cache.value(1).shape == (5, 2, 4, spec.value_dim)
    assert cache.num_bytes == sum(t.numel() * t.itemsize for layer in cache.layers for t in layer)
    assert cache.num_bytes == 5 * bytes_per_block([spec, spec], 4, torch.float32)
    if spec is SAME:
        assert [tuple(t.shape) for t in cache.layers[0]] == [(5, 2, 2, 4, 8)]
    assert len({t.untyped_storage().data_ptr() for layer in cache.layers for t in layer}) == 2 * len(cache.layers[0])
    cache.key(0).fill_(1), cache.value(0).fill_(2)
    key, value = split_kv(cache.layers[0])
    assert bool((key == 1).all()) and bool((value == 2).all())


def test_layers_may_differ():
    cache = KVCache([SAME, APART, LayerSpec(1, 4, 4)], 3, 2, torch.bfloat16)
    assert [cache.key(i).shape[-1] for i in range(3)] == [8, 12, 4]
    assert cache.num_bytes == 3 * 2 * 2 * (2 * 16 + 2 * 20 + 8)


@given(data=st.data(), block_size=st.integers(1, 9), spec=st.sampled_from([SAME, APART]))
@settings(max_examples=60, deadline=None)
def test_write_puts_every_row_in_its_slot(data, block_size, spec):
    """Any distinct slots, in any order, some of them -1, and fewer slots than rows."""
    num_blocks = data.draw(st.integers(1, 6))
    slots = data.draw(st.lists(st.integers(-1, num_blocks * block_size - 1), max_size=20, unique_by=lambda s: s if s >= 0 else object()))
    cache = KVCache([spec], num_blocks, block_size, torch.float32)
    expected = {}
    for name, part in (("key", cache.key(0)), ("value", cache.value(0))):
        part.fill_(-7.0)
        expected[name] = part.clone()
    num_rows = len(slots) + data.draw(st.integers(0, 2))
    key, value = torch.randn(num_rows, 2, spec.key_dim), torch.randn(num_rows, 2, spec.value_dim)
    write_kv(cache.key(0), cache.value(0), key, value, torch.tensor(slots, dtype=torch.int64))
    for row, slot in enumerate(slots):
        if slot >= 0:
            for name, rows in (("key", key), ("value", value)):
                for head in range(2):
                    expected[name][slot // block_size, head, slot % block_size] = rows[row, head]
    assert torch.equal(cache.key(0), expected["key"]) and torch.equal(cache.value(0), expected["value"])


def test_write_converts_to_the_cache_dtype():
    cache = KVCache([SAME], 1, 4, torch.bfloat16)
    write_kv(cache.key(0), cache.value(0), torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.tensor([2], dtype=torch.int32))
    assert bool((cache.key(0)[0, :, 2] == 1).all())


def test_slot_index_selects_rows_only_where_it_must():
    assert slot_index(torch.tensor([5, 0]), 4)[0] is None
    rows, block_ids, offsets = slot_index(torch.tensor([-1, 5, -1, 0]), 4)
    assert (rows.tolist(), block_ids.tolist(), offsets.tolist()) == ([1, 3], [1, 0], [1, 0])


@given(data=st.data(), num_blocks=st.integers(1, 8), spec=st.sampled_from([SAME, APART]))
@settings(max_examples=60, deadline=None)
def test_copies_take_effect_together(data, num_blocks, spec):
    """Chains, swaps and fans: the tokens that arrive are what the source held before the step; other blocks stay as they are."""
    blocks = st.integers(0, num_blocks - 1)
    destinations = data.draw(st.lists(blocks, unique=True))
    copies = [BlockCopy(data.draw(blocks), dst, data.draw(st.integers(1, 3))) for dst in destinations]
    cache = KVCache([spec, spec], num_blocks, 3, torch.float32)
    for layer in cache.layers:
        for tensor in layer:
            tensor.copy_(torch.randn(tensor.shape))
    before = [[tensor.clone() for tensor in layer] for layer in cache.layers]
    cache.apply_copies(copies)
    for layer, old in zip(cache.layers, before):
        for tensor, old_tensor in zip(layer, old):
            for src, dst, num_tokens in copies:
                assert torch.equal(tensor[dst, ..., :num_tokens, :], old_tensor[src, ..., :num_tokens, :])
            untouched = [block for block in range(num_blocks) if block not in destinations]
            assert torch.equal(tensor[untouched], old_tensor[untouched])


def test_two_copies_into_one_block_are_a_bug():
    cache = KVCache([SAME], 3, 2, torch.float32)
    with pytest.raises(AssertionError, match="two copies into one block"):
        cache.apply_copies([BlockCopy(0, 2, 1), BlockCopy(1, 2, 1)])


def test_gpu_pool_takes_what_the_share_leaves():
    memory = DeviceMemory(free=70 * GB, total=80 * GB)
    assert gpu_blocks(GB, memory) == 62  # 72 - 10 in use
    assert gpu_blocks(GB, memory, 0.5) == 30
    assert gpu_blocks(GB, memory, 0.9, reserved=2 * GB) == 60
    with pytest.raises(NoRoomForCache, match=r"a block takes 1.0 GB, 0 bytes are left .*10% of 80.0 GB, less 10.0 GB in use"):
        gpu_blocks(GB, memory, 0.1)
    for share in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match="memory_utilization"):
            gpu_blocks(GB, memory, share)


def test_gpu_is_asked_for_its_memory(monkeypatch):
    """The CUDA path, with a driver that answers from here."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GB, 4 * GB))
    per_block = bytes_per_block([SAME], 16, torch.float16)
    assert blocks_that_fit([SAME], 16, torch.float16, "cuda:0", 0.75) == 2 * GB // per_block


def test_cpu_pool_is_modest(monkeypatch):
    assert cpu_blocks(1024, 16, available=64 * GB) == CPU_CACHE_TOKENS // 16
    assert cpu_blocks(GB, 16, available=64 * GB) == 16
    assert cpu_blocks(1024, 10**9, available=64 * GB) == 1
    with pytest.raises(NoRoomForCache, match="25% of 2.0 GB available"):
        cpu_blocks(GB, 16, available=2 * GB)
    assert blocks_that_fit([SAME], 16, torch.float32, "cpu") == CPU_CACHE_TOKENS // 16
    monkeypatch.setattr(kv_cache, "available_memory", lambda: 2**20)
    assert blocks_that_fit([SAME], 16, torch.float32, "cpu") == 2**18 // bytes_per_block([SAME], 16, torch.float32)


def test_available_memory_is_plausible():
    assert 2**27 < available_memory() < 2**50


def test_impossible_pools():
    for size in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(ValueError, match="at least one block"):
            KVCache([SAME], *size, torch.float32)
    with pytest.raises(NoRoomForCache, match="use fewer blocks"):
        KVCache([SAME], 2**44, 16, torch.float32)


def test_specs_are_values():
    assert LayerSpec(2, 8, 8) == SAME and len({LayerSpec(2, 8, 8), SAME}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAME.key_dim = 3
    assert SAME.bytes_per_token(torch.bfloat16) == 64
