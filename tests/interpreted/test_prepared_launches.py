"""What the benchmark times: the launches that the checked entrances make, taken apart and run again."""

from __future__ import annotations

import pytest
import torch

from pagedlit.bench import kernel_checks
from pagedlit.bench.kernel_checks import LIMITS, Layer, by_formula, by_triton, check_layer, draw, prepare, worst_error
from pagedlit.kernels.cache_write import Launch


@pytest.mark.parametrize("lengths", [[(130, 1), (3, 1), (0, 1)], [(30, 9), (0, 20), (5, 1)]], ids=["decode", "extend"])
def test_launches_can_be_run_again(lengths):
    run = Launch.run
    step = draw(Layer(4, 2, 16, 16, torch.float16), lengths, 0, torch.device("cpu"))
    prepared = prepare(by_triton, step)
    expected = prepared.out.clone()
    assert Launch.run is run and worst_error(expected, by_formula(step)) < LIMITS[torch.float16]
    prepared.out.fill_(torch.nan)
    prepared.plan()
    assert prepared.out.isnan().all()
    prepared.attend()
    assert torch.equal(prepared.out, expected)


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=str)
def test_the_checker_passes_the_kernels(cache_dtype):
    layer = Layer(4, 2, 16, 16, torch.float16, cache_dtype)
    row = check_layer(by_triton, layer, [(20, 1), (0, 1)], 1, torch.device("cpu"), "decode")
    assert row["verdict"] == "right" and row["inputs"] == 5


@pytest.mark.parametrize("kind", ["decode", "extend"])
def test_a_replay_must_write_every_element(kind, monkeypatch):
    """The launches are run again in place of a graph; a kernel that leaves its output alone is found out."""
    cuda, draw_on_cpu = torch.device("cuda"), draw
    monkeypatch.setattr(kernel_checks, "draw", lambda layer, lengths, seed, device: draw_on_cpu(layer, lengths, seed, torch.device("cpu")))
    monkeypatch.setattr(kernel_checks, "graphed", lambda call, device: call)
    monkeypatch.setattr(kernel_checks, "LENGTHS", {"decode": [(20, 1), (0, 1)], "extend": [(20, 3), (0, 1)]})
    layer = Layer(4, 2, 16, 16, torch.float16)
    assert kernel_checks.replay_row(by_triton, kind, layer, cuda)["verdict"] == "right"
    monkeypatch.setattr(kernel_checks, "LAYER_KERNELS", ("extend_plan_kernel", "plan_kernel"))
    monkeypatch.setattr(kernel_checks, "graphed", lambda call, device: lambda: None)
    assert kernel_checks.replay_row(by_triton, kind, layer, cuda)["verdict"] == "NOT THE SAME BITS"


def test_every_variant_is_run_once_by_somebody(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(kernel_checks, "by_triton", lambda step: ran.append(step))
    for part in range(7):
        kernel_checks.compile_part(part, 7, "cpu")
    assert len(ran) == 150 and not capsys.readouterr().err
    monkeypatch.undo()
    kernel_checks.compile_part(3, 150, "cpu")
    monkeypatch.setattr(kernel_checks, "by_triton", lambda step: 1 / 0)
    kernel_checks.compile_part(3, 150, "cpu")
    assert "division by zero" in capsys.readouterr().err
