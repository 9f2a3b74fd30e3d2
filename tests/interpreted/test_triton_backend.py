"""Backend "triton" through the op, against the oracle and the reference, as tests/test_attention.py does for the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_attention import CHUNKS, DECODES, OPTIONS, make_step

import pagedlit.compute.triton_backend  # noqa: F401  registers it
from pagedlit.compute.attention import forward_context, get_backend, paged_attention
from pagedlit.compute.kv_cache import write_kv


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decodes", "mixed"])
def test_options(options, lengths):
    step = make_step(lengths, dims=(12, 8))
    torch.testing.assert_close(step.run("triton", **options).double(), step.expected(**options), rtol=2e-5, atol=2e-5)


def test_writes_the_cache():
    step = make_step(CHUNKS)
    kv_cache, expected = ([cache.clone() for cache in step.kv_cache] for _ in range(2))
    get_backend("triton")(step.query, step.key, step.value, kv_cache, step.metadata, 0.3)
    write_kv(*expected[0].unbind(2), step.key, step.value, step.metadata.slot_mapping)
    torch.testing.assert_close(kv_cache, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", [[], [(3, 1)], [(4, 3)]], ids=["no sequence", "one token", "chunk"])
def test_padding_rows_give_zeros(lengths):
    step = make_step(lengths)
    padded = [F.pad(x, (0, 0, 0, 0, 0, 2), value=torch.nan) for x in (step.query, step.key, step.value)]
    out = get_backend("triton")(*padded, [cache.clone() for cache in step.kv_cache], step.metadata, 0.3)
    assert torch.equal(out[len(step.query) :], torch.zeros(2, 4, 8))
    torch.testing.assert_close(out[: len(step.query)].double(), step.expected(), rtol=1e-5, atol=1e-5)


def test_layers_of_a_kind_share_a_plan():
    step = make_step(CHUNKS)
    for options in ({}, {}, {"sliding_window": 5}, {"softcap": 2.0}):
        step.run("triton", **options)
    assert len(step.metadata.plans) == 2


def test_layers_of_different_sizes_share_the_scratch():
    for heads, dims in (((4, 2), (8, 8)), ((8, 2), (24, 24)), ((2, 2), (8, 8)), ((4, 1), (16, 40))):
        step = make_step([(200, 1), (3, 1)], 16, heads, dims)
        torch.testing.assert_close(step.run("triton").double(), step.expected(), rtol=2e-5, atol=2e-5)


def test_refuses_what_the_kernels_do_not_cover():
    step = make_step([(3, 1)], dims=(300, 300))
    with pytest.raises(ValueError, match="rows of 300 elements"):
        step.run("triton")


def test_op_passes_opcheck_and_compiles_into_one_graph():
    step = make_step(CHUNKS)
    arguments = (step.query, step.key, step.value, [step.kv_cache[0].clone()], 0.3)
    with forward_context(step.metadata, "triton"):
        torch.library.opcheck(torch.ops.pagedlit.paged_attention.default, arguments, test_utils=("test_schema", "test_faketensor"))
        compiled = torch.compile(lambda *a: paged_attention(*a) * 2, fullgraph=True, backend="eager")
        out = compiled(*arguments)
    torch.testing.assert_close(out.double(), 2 * step.expected(), rtol=2e-5, atol=2e-5)
