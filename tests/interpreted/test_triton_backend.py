"""Backend "triton" through the op, against the oracle and the reference, as tests/test_attention.py does for the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_attention import CHUNKS, DECODES, OPTIONS, make_step, share
from test_graphs import decodes, poison
from transformers import LlamaConfig, LlamaForCausalLM

from pagedlit.compute import attention, model_runner, triton_backend
from pagedlit.compute.attention import AttentionMetadata, forward_context, get_backend, paged_attention, paged_attention_reference
from pagedlit.compute.kv_cache import write_kv
from pagedlit.compute.static_batch import StaticBatch
from pagedlit.compute.triton_backend import StepPlan, plan_prefixes
from pagedlit.kernels import cascade
from pagedlit.llm import LLM
from pagedlit.serving.sequence import SamplingParams


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


def test_recorded_memory_is_what_the_next_step_writes_to_until_it_is_outgrown():
    step, larger = make_step([(30, 1), (3, 1)]), make_step([(9, 1)] * 3, heads=(32, 2), dims=(64, 64))
    backend = get_backend("triton")
    step.run("triton")
    (kept,) = backend.recorded_memory().values()
    step.run("triton")
    assert backend.scratch.buffers[step.query.device] is kept
    larger.run("triton")
    assert backend.scratch.buffers[step.query.device] is not kept and not kept.arrivals.any()


def test_a_static_batch_gives_what_the_batch_gives_and_zeros():
    """Padding, garbage behind the tables and in all buffers, and a plan that follows the lengths."""
    static, generator = StaticBatch(8, 64, 4, max_seq_len=32), torch.Generator().manual_seed(0)
    cache = torch.randn(64, 2, 2, 4, 8, generator=generator)
    for lengths in ([3, 9, 1], [16, 1, 2, 7, 5], [4]):
        batch = decodes(lengths, seed=len(lengths))
        poison(static)
        size = static.fill(batch)
        rows = [torch.randn(size, heads, 8, generator=generator) for heads in (4, 2, 2)]
        want_cache, got_cache = cache.clone(), cache.clone()
        metadata = AttentionMetadata.from_batch(batch)
        want = paged_attention_reference(*(x[: len(lengths)] for x in rows), [want_cache], metadata, 0.35, sliding_window=6)
        static.steps[size].plans.clear()
        got = get_backend("triton")(*rows, [got_cache], static.steps[size], 0.35, sliding_window=6)
        torch.testing.assert_close(got[: len(lengths)], want, rtol=2e-5, atol=2e-5)
        assert not got[len(lengths) :].any() and torch.equal(got_cache, want_cache)


def test_layers_of_different_sizes_share_the_scratch():
    for heads, dims in (((4, 2), (8, 8)), ((8, 2), (24, 24)), ((2, 2), (8, 8)), ((4, 1), (16, 40))):
        step = make_step([(200, 1), (3, 1)], 16, heads, dims)
        torch.testing.assert_close(step.run("triton").double(), step.expected(), rtol=2e-5, atol=2e-5)


def test_refuses_what_the_kernels_do_not_cover():
    step = make_step([(3, 1)], dims=(300, 300))
    with pytest.raises(ValueError, match="rows of 300 elements"):
        step.run("triton")
    with pytest.raises(ValueError, match="64 query heads share a KV head: a tile has 32 rows"):
        make_step([(0, 5)], heads=(64, 1)).run("triton")


def test_op_passes_opcheck_and_compiles_into_one_graph():
    step = make_step(CHUNKS)
    arguments = (step.query, step.key, step.value, [step.kv_cache[0].clone()], 0.3)
    with forward_context(step.metadata, "triton"):
        torch.library.opcheck(torch.ops.pagedlit.paged_attention.default, arguments, test_utils=("test_schema", "test_faketensor"))
        compiled = torch.compile(lambda *a: paged_attention(*a) * 2, fullgraph=True, backend="eager")
        out = compiled(*arguments)
    torch.testing.assert_close(out.double(), 2 * step.expected(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 400, "softcap": 2.0, "sinks": torch.linspace(-2, 3, 4)}, {"sliding_window": 50}], ids=str)
def test_shared_prefixes(options, monkeypatch):
    """Decodes and a prefill with the same blocks, through the op's backend: planned when the metadata says that there may be some."""
    monkeypatch.setattr(cascade, "LAUNCH_BYTES", 0)
    step = make_step([(300, 1), (270, 1), (20, 1), (280, 3), (330, 1)], 16, dims=(12, 8))
    share(step, 0, [1, 3, 4], 16)
    step.metadata.num_sharers = 2
    torch.testing.assert_close(step.run("triton", **options).double(), step.expected(**options), rtol=2e-5, atol=2e-5)
    (plan,) = (plan for plan in step.metadata.plans.values() if isinstance(plan, StepPlan))
    assert plan.prefix.prefixes[:, 0].tolist() == ([0] * 5 if options.get("sliding_window") == 50 else [256, 256, 0, 0, 256])


def test_heads_that_fill_no_tile_are_not_grouped():
    step = make_step([(300, 1), (270, 1)], 16, heads=(64, 1), dims=(8, 8))
    share(step, 0, [1], 16)
    step.metadata.num_sharers = 1
    torch.testing.assert_close(step.run("triton").double(), step.expected(), rtol=2e-5, atol=2e-5)


def test_kernels_pass_the_trial(monkeypatch, recwarn):
    """What a GPU does when a model is loaded, with shorter sequences."""
    monkeypatch.setattr(model_runner, "TRIAL_LENS", (40, 13, 5)), monkeypatch.setattr(model_runner, "TRIAL_ENDS", (24, None, None))
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=128, initializer_range=0.3)).eval()
    runner = model_runner.ModelRunner(model, block_size=8, num_blocks=8, attention_backend="reference")
    assert model_runner.trusted_backend(runner, "triton") is get_backend("triton") and not recwarn.list


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_tokens_of_answers_to_one_prompt(backend, monkeypatch):
    """From the scheduler to the sampler: sequences that share cached blocks are grouped, and say the same as with the reference."""
    groups = []
    monkeypatch.setattr(cascade, "LAUNCH_BYTES", 0), monkeypatch.setattr(triton_backend, "SHARED_LEN", 16), monkeypatch.setattr(attention, "SHARED_LEN", 16)
    monkeypatch.setattr(triton_backend, "plan_prefixes", lambda *a: groups.append(plan_prefixes(*a)) or groups[-1])
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=128, initializer_range=0.3)).eval()
    llm = LLM(model, block_size=8, num_blocks=40, attention_backend=backend)
    prefix = [int(token) for token in torch.randint(3, 97, (37,))]
    llm.generate(prefix, SamplingParams(max_tokens=1))
    got = llm.generate([[*prefix, 5], [*prefix, 6, 7], [8, 9]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    answers = [output.outputs[0].token_ids for output in got]
    expected = [model.generate(torch.tensor([[*prompt]]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()
                for prompt in ([*prefix, 5], [*prefix, 6, 7], [8, 9])]  # fmt: skip
    assert answers == expected
    if backend == "triton":
        assert [plan.prefixes[:, 0].tolist() for plan in groups if plan][-1] == [32, 32, 0]
