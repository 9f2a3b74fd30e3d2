"""Products through oneDNN: right up to rounding, for the length of a step, and for plain layers only."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pagedlit import LLM, SamplingParams
from pagedlit.bench.cpu import random_llama
from pagedlit.compute import linear
from pagedlit.compute.linear import FastLinears, fast_forward, is_faster, is_plain, is_usable, min_numel, onednn_linear

with torch.inference_mode():
    HAS_OP = is_usable()
needs_op = pytest.mark.skipif(not HAS_OP, reason="this torch has no oneDNN linear")


def switched(model: nn.Module, rows: int = 0) -> FastLinears:
    """As on a machine where oneDNN is faster, from so many rows on."""
    linears = FastLinears(nn.Sequential())
    linears.forwards = {m: partial(fast_forward, m, rows * m.in_features) for m in model.modules() if isinstance(m, nn.Linear)}
    return linears


@needs_op
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70), st.integers(1, 200), st.integers(1, 200), st.booleans(), st.integers(0, 1000))
def test_it_is_the_same_product(rows, num_inputs, num_outputs, has_bias, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(1, rows, num_inputs), torch.randn(num_outputs, num_inputs)
    bias = torch.randn(num_outputs) if has_bias else None
    with torch.inference_mode():
        got, expected = onednn_linear(x, weight, bias), F.linear(x, weight, bias)
    assert got.shape == expected.shape and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_op
def test_inputs_of_any_layout():
    x, weight = torch.randn(24, 64).t().contiguous().t(), torch.randn(32, 64)
    with torch.inference_mode():
        for each in (x, x[::2], x[:, None], x[0]):
            torch.testing.assert_close(onednn_linear(each, weight), F.linear(each, weight), rtol=1e-4, atol=1e-4)


def test_it_is_usable_only_without_gradients_and_autocast():
    assert not is_usable()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert not is_usable()
    with torch.no_grad():
        assert is_usable() == HAS_OP


def test_torch_may_forbid_it(monkeypatch):
    with torch.inference_mode():
        torch.backends.mkldnn.enabled = False
        try:
            assert not is_usable()
        finally:
            torch.backends.mkldnn.enabled = True


def test_without_the_op_nothing_happens(monkeypatch):
    layer = nn.Linear(64, 64)
    linears = switched(layer)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    is_faster.cache_clear()
    with torch.inference_mode():
        assert not is_usable()
        with linears.on():
            assert "forward" not in layer.__dict__
    assert not is_faster(1) and not FastLinears(layer).forwards
    is_faster.cache_clear()


class Adapted(nn.Linear):
    """A layer that adds something of its own."""


def test_only_plain_layers_are_touched():
    layers = [nn.Linear(4, 4) for _ in range(6)]
    layers[0].register_forward_hook(lambda module, args, output: None)
    layers[1].register_forward_pre_hook(lambda module, args: None)
    layers[2].forward = lambda x: x
    layers[3].bfloat16()
    layers[4].weight = nn.Parameter(torch.randn(4, 4).t())
    layers[5].weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    torch.nn.utils.parametrizations.weight_norm(parametrised := nn.Linear(4, 4))
    assert not any(map(is_plain, [*layers, parametrised, Adapted(4, 4), nn.Identity(), nn.Bilinear(4, 4, 4)]))
    assert is_plain(nn.Linear(4, 4)) and is_plain(nn.Linear(4, 4, bias=False))
    owned = layers[2].forward
    with torch.inference_mode(), switched(nn.Sequential(*layers)).on():
        pass
    assert layers[2].__dict__["forward"] is owned


@needs_op
def test_layers_are_led_around_within_the_with_alone():
    model = nn.Sequential(nn.Linear(64, 64), Adapted(64, 64))
    linears = switched(model)
    with torch.inference_mode():
        with pytest.raises(KeyError), linears.on():
            assert "forward" in model[0].__dict__ and "forward" not in model[1].__dict__
            raise KeyError
        model[0].register_forward_hook(lambda module, args, output: None)  # after the runner was made
        with linears.on():
            assert "forward" not in model[0].__dict__
    with linears.on():  # gradients are on
        assert model(torch.randn(8, 64)).requires_grad
    assert not any("forward" in layer.__dict__ for layer in model)


@needs_op
def test_small_products_are_bit_for_bit_torch_s_own():
    layer = nn.Linear(512, 2048)
    linears = switched(layer)
    linears.forwards = {layer: partial(fast_forward, layer, min_numel(layer))}
    with torch.inference_mode():
        for rows in (1, 3):
            x = torch.randn(1, rows, 512)
            expected = layer(x)
            with linears.on():
                assert torch.equal(layer(x), expected)
        double, x = nn.Linear(8, 8).double(), torch.randn(64, 8, dtype=torch.float64)
        assert torch.equal(fast_forward(double, 0, x), double(x))


def test_the_verdict_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "best_time", lambda function: calls.append(function) or 1.0 / len(calls))
    is_faster.cache_clear()
    assert is_faster(1) == HAS_OP and is_faster(1) == HAS_OP and len(calls) == 2 * HAS_OP
    monkeypatch.setattr(linear, "best_time", lambda function: 1.0)
    is_faster.cache_clear()
    assert not is_faster(1) and not FastLinears(nn.Linear(8, 8)).forwards
    is_faster.cache_clear()


@needs_op
def test_an_engine_generates_the_same_text_and_leaves_its_model_alone():
    model = random_llama(2, 128, 512)
    prompts = [[(7 * i + j) % 500 + 3 for j in range(5 + 9 * i)] for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    texts = []
    for linears in (FastLinears(nn.Sequential()), switched(model)):
        llm = LLM(model, num_blocks=64)
        llm.runner.linears = linears
        texts.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
        assert not any("forward" in module.__dict__ for module in model.modules())
    assert texts[0] == texts[1]
