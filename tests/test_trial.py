"""The trial that kernels have to pass before a GPU gets them unasked: who agrees with the reference is taken, and nobody else."""

from dataclasses import replace

import pytest
import torch
from test_parity import random_model

from pagedlit.compute import model_runner
from pagedlit.compute.attention import get_backend, paged_attention_reference, register_backend
from pagedlit.compute.model_runner import ModelRunner, trial_error, trusted_backend

NAMES = ["llama", "gemma2", "gpt_oss"]


def forgets_the_last_key(query, key, value, kv_cache, metadata, *formula):
    short = replace(metadata, seq_lens=(metadata.seq_lens - 1).clamp(min=1), plans={})
    return paged_attention_reference(query, key, value, kv_cache, short, *formula)


def loses_a_part(query, key, value, kv_cache, metadata, *formula):
    """Long sequences are cut off where a second program would have gone on, in decode steps alone."""
    is_decode, end = metadata.max_query_len == 1, metadata.max_seq_len // 2
    short = replace(metadata, seq_lens=metadata.seq_lens.clamp(max=end), plans={}) if is_decode else metadata
    return paged_attention_reference(query, key, value, kv_cache, short, *formula)


def swaps_sequences(query, key, value, kv_cache, metadata, *formula):
    out = paged_attention_reference(query, key, value, kv_cache, metadata, *formula)
    return out.roll(1, 0) if metadata.max_query_len == 1 else out


def gives_nan(query, key, value, kv_cache, metadata, *formula):
    return paged_attention_reference(query, key, value, kv_cache, metadata, *formula) * torch.nan


def forgets_the_scales(query, key, value, kv_cache, metadata, *formula):
    return paged_attention_reference(query, key, value, kv_cache, metadata, *formula[:4])


def runner_of(name, dtype=torch.float32, **options):
    return ModelRunner(random_model(name).to(dtype), num_blocks=8, attention_backend="reference", **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8"}, {"max_model_len": 24}], ids=str)
def test_who_agrees_is_taken(name, options, recwarn):
    runner = runner_of(name, **options)
    assert trusted_backend(runner, "cpu") is get_backend("cpu") and not recwarn.list
    assert runner.backend is paged_attention_reference, "the trial leaves the runner as it was"


def test_half_precision_is_no_crime(recwarn):
    assert trusted_backend(runner_of("llama", torch.bfloat16), "cpu") is get_backend("cpu") and not recwarn.list


@pytest.mark.parametrize("backend", [forgets_the_last_key, loses_a_part, swaps_sequences, gives_nan], ids=lambda backend: backend.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_who_is_wrong_is_not(backend, dtype):
    register_backend("accused", backend)
    runner = runner_of("llama", dtype)
    assert not trial_error(runner, backend) <= (1e-2 if dtype == torch.float32 else 0.1)
    with pytest.warns(RuntimeWarning, match="accused.*not those of the reference"):
        assert trusted_backend(runner, "accused") is paged_attention_reference


def test_the_trial_is_over_a_cache_of_the_dtype_that_it_will_have():
    register_backend("accused", forgets_the_scales)
    runner = runner_of("llama", kv_cache_dtype="fp8")
    runner.scales = [scales * 2**7 for scales in runner.scales]  # so coarse that it shows who forgets them
    with pytest.warns(RuntimeWarning, match="accused.*not those of the reference"):
        assert trusted_backend(runner, "accused") is paged_attention_reference


def test_who_fails_says_why():
    def fails(*args):
        raise RuntimeError("no kernel image")

    register_backend("accused", fails)
    with pytest.warns(RuntimeWarning, match="RuntimeError: no kernel image"):
        assert trusted_backend(runner_of("llama"), "accused") is paged_attention_reference


@pytest.mark.parametrize(("asked", "expected"), [("auto", "cpu"), ("reference", "reference")])
def test_nobody_is_tried_who_was_asked_for_or_needs_no_trial(asked, expected, monkeypatch):
    monkeypatch.setattr(model_runner, "trusted_backend", lambda *args: pytest.fail("a trial on a CPU"))
    assert ModelRunner(random_model("llama"), num_blocks=8, attention_backend=asked).backend is get_backend(expected)
