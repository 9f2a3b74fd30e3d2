"""Extend against a float64 oracle, over pools whose every unused slot holds NaN and tables padded with -1."""

from __future__ import annotations

import pytest
import torch
from kernel_steps import TOLERANCE, check_extend, make_step, run_extend, written

from pagedlit.compute.attention import padded_block_tables
from pagedlit.kernels.extend import ExtendConfig, extend_config, extend_plan_launch, max_extend_items, paged_extend

SMALL = ExtendConfig(rows=32, tile=32)  # chunks of several tiles at small sizes
CHUNKS = [(0, 1), (0, 17), (40, 24), (63, 2), (64, 33), (3, 1), (90, 40)]  # edges of tiles and blocks, inside and on them
FEW = [(30, 9), (0, 20), (5, 1)]
SINKS = torch.linspace(-2, 3, 20)
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 20},
    "window of one": {"sliding_window": 1},
    "window larger than all": {"sliding_window": 1000},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": SINKS[:4]},
    "all": {"sliding_window": 50, "softcap": 1.5, "sinks": SINKS[:4], "scale": 0.7},
}


@pytest.mark.parametrize("min_rows", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_options(options, min_rows, dtype):
    check_extend(make_step(CHUNKS if min_rows == 2 else FEW, 16, dims=(32, 32), dtype=dtype), SMALL, min_rows, **options)


@pytest.mark.parametrize("block_size", [1, 8, 12, 64, 256])
def test_block_sizes(block_size):
    check_extend(make_step(FEW, block_size, dims=(16, 16)), SMALL, **OPTIONS["all"])


@pytest.mark.parametrize("group", [1, 3, 8, 16, 20])
def test_groups(group):
    step = make_step(FEW, 16, heads=(2 * group, 2), dims=(16, 16))
    check_extend(step, SMALL, sinks=torch.linspace(-2, 2, 2 * group))


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (256, 256), (192, 128), (5, 7)], ids=str)
def test_head_dims(dims):
    check_extend(make_step(FEW[:2], 16, dims=dims), SMALL, scale=dims[0] ** -0.5)


@pytest.mark.parametrize("config", [ExtendConfig(), ExtendConfig(tile=128), ExtendConfig(rows=16, tile=16)])
def test_configurations(config):
    check_extend(make_step(CHUNKS[:5], 32, dims=(16, 16)), config, **OPTIONS["all"])


@pytest.mark.parametrize("native", [True, False])
def test_e4m3(native):
    step = make_step(FEW, 16, dims=(32, 32))
    scales = torch.tensor([0.01, 0.02]), torch.tensor([0.005, 0.03])
    codes = [(tensor / scale[:, None, None]).to(torch.float8_e4m3fn) for tensor, scale in zip(written(step), scales)]
    for scale, per_seq in zip(scales, (step.keys, step.values)):
        per_seq[:] = [(rows / scale[:, None]).to(torch.float8_e4m3fn).double() * scale[:, None] for rows in per_seq]
    out = run_extend(step, codes, SMALL._replace(native_e4m3=native), 1, key_scales=scales[0], value_scales=scales[1])
    torch.testing.assert_close(out.double(), step.expected(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("min_rows", [1, 2])
@pytest.mark.parametrize("num_seqs", [1, 5, 200])
def test_plan_covers_every_row_once(num_seqs, min_rows):
    random = torch.Generator().manual_seed(num_seqs)
    num_rows = torch.randint(0, 40, (num_seqs,), generator=random, dtype=torch.int32)
    starts = torch.nn.functional.pad(num_rows.cumsum(0, dtype=torch.int32), (1, 0))
    seq_lens = num_rows + torch.randint(0, 50, (num_seqs,), generator=random, dtype=torch.int32)
    items = torch.full((max_extend_items(int(starts[-1]), num_seqs, 4, SMALL), 8), 777, dtype=torch.int32)
    extend_plan_launch(items, starts, seq_lens, starts * 100, 4, SMALL, min_rows).run()
    expected = [
        [int(starts[s]) + first, int(starts[s]) * 100, int(seq_lens[s] - num_rows[s]) + first, min(8, int(num_rows[s]) - first)]
        for s in range(num_seqs) if num_rows[s] >= min_rows for first in range(0, int(num_rows[s]), 8)
    ]  # fmt: skip
    assert items[: len(expected), :4].tolist() == expected and (items[len(expected) :, 0] == -1).all()


def test_checked_entrance():
    step = make_step(FEW, 16, dims=(16, 16))
    metadata, cache = step.metadata, written(step)
    arguments = [step.query, *cache, padded_block_tables(metadata), metadata.query_start_loc, metadata.seq_lens, 0.3]
    torch.testing.assert_close(paged_extend(*arguments, 5, 2.0, SINKS[:4]).double(), step.expected(sliding_window=5, softcap=2.0, sinks=SINKS[:4]), rtol=1e-5, atol=1e-5)
    mistakes = {
        "query_start_loc goes from 0 to 30, with 29 rows": (0, step.query[:29]),
        "sequence 0 has 9 new rows and 8 tokens": (5, torch.tensor([8, 20, 6], dtype=torch.int32)),
        "expected [4] int32": (4, metadata.query_start_loc.long()),
        "its table room for 48": (5, torch.tensor([49, 20, 6], dtype=torch.int32)),
        "3 query heads cannot share 2": (0, step.query[:, :3]),
    }
    for message, (place, wrong) in mistakes.items():
        with pytest.raises(ValueError) as error:
            paged_extend(*arguments[:place], wrong, *arguments[place + 1 :])
        assert message in str(error.value)
    assert extend_config(*[tensor.half() for tensor in (step.query, *cache)]).tokens(4) == 32
