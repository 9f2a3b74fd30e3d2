"""Decode against a float64 oracle, over pools whose every unused slot holds NaN and tables padded with -1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kernel_steps import CONFIG, TOLERANCE, check_decode, decoding_rows, make_step, run_decode, written

from pagedlit.compute.attention import padded_block_tables
from pagedlit.kernels import cache_write, decode
from pagedlit.kernels.decode import SINCE_3_8, DecodeConfig, decode_config, num_places, paged_decode, plan_launch, situation
from pagedlit.kernels.extend import ExtendConfig
from pagedlit.kernels.report import report

LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]  # edges of slices, blocks and tiles, inside and on them
DECODES = [(n - 1, 1) for n in LENGTHS if n]
MIXED = [(63, 1), (0, 5), (0, 1), (130, 1), (7, 3), (64, 1)]
SINKS = torch.linspace(-2, 3, 20)
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 50},
    "window on an edge": {"sliding_window": 64},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": SINKS[:4]},
    "all": {"sliding_window": 70, "softcap": 1.5, "sinks": SINKS[:4], "scale": 0.7},
}


@pytest.mark.parametrize(("places", "dtype"), [(1, torch.float32), (6, torch.float32), (20, torch.float16)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, places, dtype):
    check_decode(make_step(DECODES if places == 6 else MIXED, 16, dims=(32, 32), dtype=dtype), places, **options)


@pytest.mark.parametrize("block_size", [1, 8, 12, 16, 32, 64, 256])
def test_block_sizes(block_size):
    for options in ({}, OPTIONS["all"]):
        check_decode(make_step(MIXED, block_size, dims=(16, 16)), **options)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 16, 20])
def test_groups(group):
    step = make_step(MIXED[:4], 16, heads=(2 * group, 2), dims=(16, 16))
    check_decode(step, 5)
    check_decode(step, 5, sinks=torch.linspace(-2, 2, 2 * group), softcap=3.0)


@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (5, 7)], ids=str)
def test_head_dims(dims):
    check_decode(make_step(MIXED[:4], 16, dims=dims), 5, scale=dims[0] ** -0.5, sinks=SINKS[:4])


@pytest.mark.parametrize("config", [
    DecodeConfig(num_slices=1), DecodeConfig(num_slices=8), DecodeConfig(slice_tokens=32), DecodeConfig(num_slices=2, slice_tokens=64),
])  # fmt: skip
def test_configurations(config):
    check_decode(make_step(DECODES, 32, dims=(16, 16)), 6, config, **OPTIONS["all"])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_e4m3(native, dtype):
    """K and V in eight bits with a scale for each head; the oracle gets what the codes say."""
    step = make_step(MIXED, 16, dims=(32, 32), dtype=dtype)
    scales = torch.tensor([0.01, 0.02]), torch.tensor([0.005, 0.03])
    restored = [tensor.clone() for tensor in written(step)]
    cache = [torch.full_like(tensor, torch.nan, dtype=torch.float8_e4m3fn) for tensor in restored]
    for codes, tensor, scale, per_seq in zip(cache, restored, scales, (step.keys, step.values)):
        codes.copy_((tensor.float() / scale[:, None, None]).to(torch.float8_e4m3fn))
        per_seq[:] = [(rows.float() / scale[:, None]).to(torch.float8_e4m3fn).double() * scale[:, None] for rows in per_seq]
    out = run_decode(step, cache, 5, CONFIG._replace(native_e4m3=native), key_scales=scales[0], value_scales=scales[1])
    rows = decoding_rows(step)
    torch.testing.assert_close(out[rows].double(), step.expected()[rows], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_length_zero_gives_zeros():
    """Padding of a batch: a row, and no token."""
    step = make_step([(3, 1), (0, 1), (40, 1)], 16, dims=(16, 16))
    step.metadata.seq_lens = step.metadata.seq_lens.clone()
    step.metadata.seq_lens[1] = 0
    for options in ({}, {"sinks": SINKS[:4]}, {"sliding_window": 3}):
        out = run_decode(step, written(step), 3, **options)
        assert (out[1] == 0).all() and not out.isnan().any()


def test_strides():
    """Queries cut out of a larger tensor, and transposed, as a model gives them; K and V in tensors of their own."""
    step = make_step(MIXED, 16, dims=(24, 24))
    step.query = torch.randn(4, len(step.query), 40)[..., :24].transpose(0, 1)
    check_decode(step)
    check_decode(make_step(MIXED, 16, dims=(24, 16)))


def test_nan_of_one_sequence_stays_there():
    step = make_step(MIXED, 16, dims=(16, 16))
    expected = run_decode(step, written(step))
    step.key[decoding_rows(step)[2]] = step.value[decoding_rows(step)[2]] = torch.nan
    out, rows = run_decode(step, written(step)), decoding_rows(step)
    assert out[rows[2]].isnan().all()
    others = [row for row in rows if row != rows[2]]
    assert torch.equal(out[others], expected[others])


def test_pool_beyond_two_to_the_31_elements():
    cache = torch.empty(70_000, 8, 16, 256, dtype=torch.float8_e4m3fn)
    block_ids, query = torch.tensor([[69_999, 3]], dtype=torch.int32), torch.randn(1, 8, 256)
    key = torch.randn(20, 8, 256).to(torch.float8_e4m3fn)
    cache[69_999], cache[3, :, :4] = key[:16].transpose(0, 1), key[16:].transpose(0, 1)
    out = paged_decode(query, cache, cache, block_ids, torch.tensor([20], dtype=torch.int32), 1 / 16)
    weights = (torch.einsum("hd,lhd->hl", query[0].double(), key.double()) / 16).softmax(-1)
    torch.testing.assert_close(out[0].double(), torch.einsum("hl,lhd->hd", weights, key.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("places", [1, 7, 200])
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("num_seqs", [1, 5, 300])
def test_plan_covers_every_token_once(places, window, num_seqs):
    """Parts are equal, in order, without gap or overlap; they fit the buffer; sequences that prefill have none."""
    random = torch.Generator().manual_seed(num_seqs)
    seq_lens = torch.randint(0, 500, (num_seqs,), generator=random, dtype=torch.int32)
    num_rows = torch.randint(0, 3, (num_seqs,), generator=random, dtype=torch.int32)
    starts = torch.nn.functional.pad(num_rows.cumsum(0, dtype=torch.int32), (1, 0))
    items = torch.full((num_seqs + places, 8), 777, dtype=torch.int32)
    plan_launch(items, starts, seq_lens, starts * 100, places, CONFIG, window).run()
    used = [item[:6] for item in items.tolist() if item[0] >= 0]
    lengths = {int(starts[s]): int(seq_lens[s]) for s in range(num_seqs) if num_rows[s] == 1}
    first = {row: max(0, length - (window or 10**6)) for row, length in lengths.items()}
    tiles = sum(-(-length // 64) - first[row] // 64 for row, length in lengths.items())
    size = max(1, -(-tiles // places)) * 64
    assert all(row < 0 for row, *_ in items[len(used) :].tolist()) and [row for row, *_ in used] == sorted(row for row, *_ in used)
    for row, length in lengths.items():
        parts = [item for item in used if item[0] == row]
        assert [part[4:] for part in parts] == [[i, len(parts)] for i in range(len(parts))] and all(part[1] == row * 100 for part in parts)
        assert parts[0][2] == first[row] and parts[-1][3] == length
        assert all(a[3] == b[2] == first[row] // 64 * 64 + (i + 1) * size for i, (a, b) in enumerate(zip(parts, parts[1:])))
    assert {item[0] for item in used} == set(lengths)


def arguments(lengths=(20, 3)):
    step = make_step([(n - 1, 1) for n in lengths], 16, dims=(16, 16))
    return [step.query, *written(step), padded_block_tables(step.metadata), step.metadata.seq_lens, 0.3]


def test_checked_entrance_computes():
    step = make_step([(19, 1), (2, 1)], 16, dims=(16, 16))
    tables = padded_block_tables(step.metadata)
    out = paged_decode(step.query, *written(step), tables, step.metadata.seq_lens, 0.3, 5, 2.0, SINKS[:4])
    torch.testing.assert_close(out.double(), step.expected(sliding_window=5, softcap=2.0, sinks=SINKS[:4]), rtol=1e-5, atol=1e-5)
    assert paged_decode(step.query[:0], *written(step), tables[:0], step.metadata.seq_lens[:0], 0.3).shape == (0, 4, 16)


MISTAKES = {
    "query is torch.int64": lambda a: a.__setitem__(0, a[0].long()),
    "a cache of torch.float32 with queries of torch.float16": lambda a: a.__setitem__(0, a[0].half()),
    "3 query heads cannot share 2 KV heads": lambda a: a.__setitem__(0, a[0][:, :3]),
    "query rows have 8 elements, key rows 16": lambda a: a.__setitem__(0, a[0][..., :8]),
    "names block 99; the pool has": lambda a: a[3].__setitem__((0, 1), 99),
    "names block -1": lambda a: a[3].__setitem__((0, 0), -1),
    "has 49 tokens, its table room for 32": lambda a: a[4].__setitem__(0, 49),
    "has -1 tokens": lambda a: a[4].__setitem__(1, -1),
    "1 query rows for 2 sequences": lambda a: a.__setitem__(0, a[0][:1]),
    "expected [S, n] int32": lambda a: a.__setitem__(3, a[3].long()),
    "expected [S] int32": lambda a: a.__setitem__(4, a[4].long()),
    "sliding_window=0": lambda a: a.append(0),
    "softcap=0": lambda a: a.extend([None, 0]),
    "sinks: expected one for each of 4": lambda a: a.extend([None, None, SINKS[:3]]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_checked_entrance_refuses(message):
    wrong = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments()]
    MISTAKES[message](wrong)
    with pytest.raises(ValueError) as error:
        paged_decode(*wrong)
    assert message in str(error.value)


def test_defaults():
    meta = {"device": "meta"}
    cache = torch.empty(1, 2, 16, 128, **meta)
    assert decode_config(torch.empty(1, 2, 128, **meta), cache, cache).num_slices == 1
    assert decode_config(torch.empty(1, 2, 128, dtype=torch.float16, **meta), cache, cache) == (DecodeConfig(programs_per_sm=2) if SINCE_3_8 else DecodeConfig(maxnreg=168))
    assert num_places(torch.device("cpu"), 8, CONFIG) == 12


def test_report_needs_a_compiler():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        report([90], ["plan"])


def test_measured_configurations_are_found_by_device_name(tmp_path, monkeypatch):
    query, cache = torch.empty(1, 2, 128, dtype=torch.bfloat16), torch.empty(1, 2, 16, 128, dtype=torch.bfloat16)
    assert situation("decode", query, cache, 128) == "decode bfloat16 bfloat16 128"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/NVIDIA_H100_80GB_HBM3.json").write_text('{"decode bfloat16 bfloat16 128": {"num_stages": 4}}')
    monkeypatch.setattr(cache_write, "__file__", str(tmp_path / "cache_write.py"))
    cache_write.tuned_table.cache_clear()
    assert cache_write.tuned_table("NVIDIA H100 80GB HBM3")["decode bfloat16 bfloat16 128"] == {"num_stages": 4}
    monkeypatch.setattr(decode, "tuned", lambda device, name: cache_write.tuned_table("NVIDIA H100 80GB HBM3").get(name, {}))
    assert decode_config(query, cache, cache).num_stages == 4
    assert cache_write.tuned_table("another") == {} == cache_write.tuned(torch.device("cpu"), "decode bfloat16 bfloat16 128")
    cache_write.tuned_table.cache_clear()


def test_shipped_configurations_name_fields_that_exist():
    for path in (Path(decode.__file__).parent / "configs").glob("*.json"):
        for name, fields in json.loads(path.read_text()).items():
            {"decode": DecodeConfig, "extend": ExtendConfig, "prefix": ExtendConfig}[name.split()[0]]()._replace(**fields)
