"""The planner: known figures, the model's own answers, the engine's own sums, and what is said when nothing can be said."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import REFUSED, RIGHT, config_of
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging
from typer.testing import CliRunner

from pagedlit.cli import app
from pagedlit.compute.kv_cache import DeviceMemory, KVCache, NoRoomForCache, bytes_per_block, gpu_blocks
from pagedlit.compute.model_needs import (
    BadConfig, LayerNeed, ModelNeeds, UnknownArchitecture, Weights, ask_layers, ask_model, build_on_meta, count_weights, name_of_dtype, needs_by_formula, read_config,
)  # fmt: skip
from pagedlit.compute.model_runner import discover_layers, settle_windows
from pagedlit.planner import (
    Plan, UnknownGPU, decode_step, find_gpu, in_units, largest_model, longest_context, parse_memory, plan, smallest_tp, speeds, wanted_bytes, windowed_bytes,
)  # fmt: skip
from pagedlit.serving.cost_model import DEVICES, MODELS, CostModel, Device, Load, ModelShape
from pagedlit.tiny import MODEL_PATH

ROOT = Path(__file__).parent.parent
KB, MB, GB = 1 << 10, 1 << 20, 1 << 30
LLAMA_70B = dict(
    model_type="llama", dtype="bfloat16", hidden_size=8192, intermediate_size=28672, vocab_size=128256, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, max_position_embeddings=131072,
)  # fmt: skip
LLAMA_7B = dict(model_type="llama", dtype="float16")  # the defaults are Llama-2-7B


@pytest.fixture(autouse=True)
def quiet():
    """Some default configs of transformers name tokens beyond their own vocabulary, and it says so."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def big():
    return plan(LLAMA_70B, gpu="h100", tp=8)


# known figures


def test_llama_3_70b_on_eight_gpus():
    made = plan(LLAMA_70B, gpu="h100", tp=8, context=500, max_context=4096, concurrency=100)
    assert made.kv_bytes_per_token == 40 * KB and 128 * 1024 * made.kv_bytes_per_token == 5 * GB
    assert replace(made, tp=1).kv_bytes_per_token == 320 * KB and replace(made, tp=16).kv_bytes_per_token == 40 * KB, "a rank holds a whole head"
    assert made.needs.weights.total == 70_553_706_496 and made.weight_bytes == 70_553_706_496 * 2 // 8
    assert "80 layers x 1 KV head (of 8) x 2 x 128 x 2 bytes = 40.0 KB" in "\n".join(made.equations())
    assert f"{500 / 4096:.0%}" == "12%" and made.num_paged(500) // made.num_reserved == 8 and made.fits


def test_a_7b_multi_head_model():
    made = plan(LLAMA_7B, gpu="a100-40g", context=500, max_context=2048, concurrency=10)
    assert made.kv_bytes_per_token == 512 * KB and 2048 * made.kv_bytes_per_token == 1024 * MB
    rows = dict(line.split(" = ")[::2] for line in made.equations())
    assert rows["in use, paged"] == "98.5%" and rows["in use, reserved"] == "24.4%"
    assert made.num_reserved * 2048 <= made.num_blocks * 16 < (made.num_reserved + 1) * 2048


@pytest.mark.parametrize(
    "config, num_params, kv_bytes",  # parameters as published; KV of a token in 16 bits, worked out by hand
    [
        (dict(model_type="llama"), 6_738_415_616, 512 * KB),
        (dict(model_type="gpt2"), 124_439_808, 2 * 12 * 768 * 2),
        (dict(model_type="opt"), 125_239_296, 2 * 12 * 768 * 2),
        (dict(model_type="gpt_neox"), 20_554_567_680, 2 * 44 * 6144 * 2),
        (dict(model_type="gemma2"), 2_614_341_888, 2 * 26 * 4 * 256 * 2),
        (dict(model_type="phi3"), 3_821_079_552, 2 * 32 * 32 * 96 * 2),
        (dict(model_type="mixtral"), 46_702_792_704, 2 * 32 * 8 * 128 * 2),
        (dict(model_type="gpt_oss"), 116_829_156_672, 2 * 36 * 8 * 64 * 2),
        (dict(model_type="deepseek_v3"), 671_026_404_352, 61 * 128 * (192 + 128) * 2),
        (dict(model_type="falcon", multi_query=True), 6_921_720_704, 2 * 32 * 1 * 64 * 2),
        (dict(model_type="gpt_bigcode", n_embd=2048, n_head=16, n_layer=24, vocab_size=49280, n_positions=2048), 1_124_886_528, 2 * 24 * 128 * 2),
        (dict(model_type="mistral", num_key_value_heads=8, intermediate_size=14336), 7_241_732_096, 128 * KB),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_weights_and_cache_of_known_models(config, num_params, kv_bytes):
    made = plan(config | {"dtype": "bfloat16"})
    assert made.needs.weights.total == num_params and made.kv_bytes_per_token == kv_bytes


def test_the_known_shapes_are_those_of_the_cost_model():
    for name, config in (("Llama-2-7B", LLAMA_7B), ("Llama-3-70B", LLAMA_70B)):
        made = plan(config)
        assert (made.weight_bytes, made.kv_bytes_per_token) == (MODELS[name].weight_bytes, MODELS[name].kv_bytes_per_token)


# the model's own answers


@pytest.mark.parametrize("name", RIGHT)
def test_a_model_without_memory_answers_as_a_real_one(name):
    model_type, given = RIGHT[name]
    real, on_meta = AutoModelForCausalLM.from_config(config_of(model_type, **given)), build_on_meta(config_of(model_type, **given))
    calls = settle_windows(real, discover_layers(real))
    assert [need[1:] for need in ask_layers(on_meta)] == [(c.spec.num_kv_heads, c.spec.key_dim, c.spec.value_dim, c.sliding_window) for c in calls]
    weights = count_weights(on_meta)
    assert weights.total == sum(weight.numel() for weight in real.parameters())
    assert 0 <= weights.num_idle < weights.total and 0 < weights.num_active <= weights.total - weights.num_idle
    assert bool(weights.num_expert) == any(".experts." in part for part, _ in real.named_parameters())
    assert ask_model(config_of(model_type, **given)).notes == ()


@pytest.mark.parametrize("name", ["gemma2", "deepseek-v3, latent", "gpt-bigcode, one KV head", "gemma4, two head sizes, shared KV"])
def test_the_pool_is_what_was_planned(name):
    model_type, given = RIGHT[name]
    model = AutoModelForCausalLM.from_config(config_of(model_type, **given))
    made = plan(config_of(model_type, **given), memory=GB, block_size=8)
    specs = [call.spec for call in discover_layers(model)]
    assert KVCache(specs, 5, 8, model.dtype).num_bytes == 5 * 8 * made.kv_bytes_per_token
    in_memory = sum(weight.nbytes for weight in model.parameters())
    assert made.weight_bytes == in_memory
    assert made.num_blocks == gpu_blocks(bytes_per_block(specs, 8, model.dtype), DeviceMemory(GB - in_memory, GB), 0.9)


def test_what_this_engine_refuses_is_planned_with_a_note():
    for name in ("hybrid", "chunked attention", "dynamic rotary embedding", "no interface", "no interface, alibi"):
        model_type, given, why = REFUSED[name]
        (note,) = ask_model(config_of(model_type, **given)).notes
        assert note.startswith("this engine refuses the model: ")
        if name not in ("chunked attention", "no interface, alibi"):
            assert why.split(" .")[0].split("=")[0] in note, name
    assert "the layers are those of its config" in ask_model(config_of("gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=4)).notes[0]
    with pytest.raises(UnknownArchitecture, match="no paged cache"):
        ask_model(config_of("mamba", num_hidden_layers=2, hidden_size=32))


def test_the_formula_knows_the_dialects():
    falcon = dict(model_type="falcon", num_attention_heads=8, hidden_size=64, num_hidden_layers=3, vocab_size=99)
    assert needs_by_formula(read_config(falcon | {"multi_query": True}))[0] == (8, 1, 8, 8, None)
    assert needs_by_formula(read_config(falcon | {"num_kv_heads": 2, "new_decoder_architecture": True})) == [(8, 2, 8, 8, None)] * 3
    for model_type in ("llama", "gpt2", "deepseek_v3", "bloom", "qwen3"):
        config = read_config({"model_type": model_type})
        by_formula = needs_by_formula(config)
        assert not (asked := ask_layers(build_on_meta(config)) if model_type != "bloom" else []) or asked == by_formula


def test_experts_idle_rows_and_dtypes():
    mixtral = ask_model({"model_type": "mixtral", "dtype": "bfloat16"}).weights
    assert round(mixtral.num_active / 1e9, 1) == 12.7 and mixtral.num_idle == 32000 * 4096
    assert mixtral.num_expert == 32 * 8 * 3 * 4096 * 14336 and (mixtral.num_experts, mixtral.experts_per_token) == (8, 2)
    made = plan({"model_type": "mixtral", "dtype": "bfloat16"}, tp=2)
    for batch, num_read in ((1, mixtral.num_active), (1000, mixtral.total - mixtral.num_idle)):
        step = decode_step(made, batch, 100)
        assert step.num_bytes == pytest.approx(num_read + batch * 100 * 64 * KB) and step.num_flops == pytest.approx(batch * (mixtral.num_active + 100 * 32 * 32 * 256))
    tied = ask_model({"model_type": "llama", "tie_word_embeddings": True})
    assert tied.weights.num_idle == 0 and tied.dtype == "float32", "a tied table is read in full, as the head; without a dtype it is float32"
    assert ask_model({"model_type": "gpt_oss"}).weights.num_expert == 36 * 128 * (3 * 2880 * 2880 + 3 * 2880), "with their biases"
    quantised = ask_model({"model_type": "gpt_oss", "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}})
    assert quantised.dtype == "bfloat16" and "quantised (mxfp4)" in quantised.notes[0]
    assert name_of_dtype("torch.float8_e4m3fn") == name_of_dtype("fp8") == "fp8" and plan(LLAMA_7B, dtype="float32").kv_bytes_per_token == 1024 * KB
    with pytest.raises(ValueError, match="float32, bfloat16, float16, fp8"):
        plan(LLAMA_7B, kv_dtype="int4")


@pytest.mark.parametrize("num_experts, chosen, num_tokens", [(4, 2, 2), (4, 1, 3), (3, 3, 2), (5, 2, 1)])
def test_expected_experts(num_experts, chosen, num_tokens):
    touched = [len(set().union(*each)) for each in product(combinations(range(num_experts), chosen), repeat=num_tokens)]
    weights = Weights(100, 10, 60, num_experts, chosen)
    assert weights.share_touched(num_tokens) == pytest.approx(sum(touched) / len(touched) / num_experts)
    assert weights.num_read(num_tokens) == pytest.approx(30 + 60 * weights.share_touched(num_tokens))


# configs: three forms, and what is wrong with them


def test_three_forms_of_a_config(tmp_path):
    from transformers import AutoConfig

    forms = (MODEL_PATH, str(MODEL_PATH), MODEL_PATH / "config.json", json.loads((MODEL_PATH / "config.json").read_text()), AutoConfig.from_pretrained(MODEL_PATH))
    plans = [plan(form, memory=GB) for form in forms]
    assert len({(each.weight_bytes, each.num_blocks, each.needs.layers) for each in plans}) == 1
    assert plans[0].needs.name == str(MODEL_PATH) and plans[3].needs.name == plans[4].needs.name == "llama"


def test_a_hub_id(monkeypatch):
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name: (LLAMA_70B, {}))
    assert plan("somebody/llama").needs.name == "somebody/llama" and plan("gpt2").kv_bytes_per_token == 320 * KB


def test_configs_that_are_none(tmp_path):
    with pytest.raises(UnknownArchitecture, match=r"'lama' is no causal.*similar: llama.*known are: .*gemma3.*qwen3_moe"):
        plan({"model_type": "lama"})
    with pytest.raises(UnknownArchitecture, match="'None'"):
        plan({"hidden_size": 3})
    with pytest.raises(UnknownArchitecture, match="'clip'"):
        plan({"model_type": "clip"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadConfig, match="not JSON"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(BadConfig, match="no JSON object"):
        plan(tmp_path)
    for wrong in (dict(hidden_size="wide"), dict(num_attention_heads=0), dict(hidden_act="none of these")):
        with pytest.raises(BadConfig, match="llama config"):
            plan({"model_type": "llama", **wrong})
    for missing in ("/no/such/folder", "no_such.json", "./here", str(tmp_path / "nothing")):
        with pytest.raises(FileNotFoundError, match="no such config.json"):
            plan(missing)


# GPUs and memory


@pytest.mark.parametrize(
    "name, known",
    [("h100", "H100"), ("H100-80GB", "H100"), ("NVIDIA H100 80GB", "H100"), ("h100-sxm", "H100"), ("H200", "H200"), ("l4", "L4"), ("NVIDIA L4", "L4"),
     ("a100-80g", "A100-80G"), ("A100 80GB", "A100-80G"), ("a100_40gb", "A100-40G"), ("a100-4", "A100-40G")],
)  # fmt: skip
def test_names_of_gpus(name, known):
    assert find_gpu(name) is DEVICES[known]


@pytest.mark.parametrize("name, why", [("a100", "A100-40G or A100-80G: say which"), ("b100", "no GPU that is known"), ("", "no GPU"), ("h", "H100 or H200"), ("h100-40gb", "no GPU")])
def test_unknown_gpus(name, why):
    with pytest.raises(UnknownGPU, match=why) as caught:
        find_gpu(name)
    assert all(known in str(caught.value) for known in DEVICES)


def test_memory_and_units():
    assert parse_memory("80GB") == parse_memory("80gib") == parse_memory(" 80 ") == 80 * GB and parse_memory("1.5 TB") == 1536 * GB and parse_memory("512MB") == 512 * MB
    for text in ("", "80 bananas", "-1GB", "0", "GB"):
        with pytest.raises(ValueError, match="size of a memory"):
            parse_memory(text)
    assert [in_units(size) for size in (0, 1023, 40 * KB, 3 * MB, -2 * GB)] == ["0 bytes", "1,023 bytes", "40.0 KB", "3.0 MB", "-2.0 GB"]


def test_a_device_of_ones_own_and_memory_beside_a_gpu():
    mine = Device("mine", 12, 1e12, 1e14, "")
    assert plan(LLAMA_7B, gpu=mine).memory_bytes == 12 * GB and plan(LLAMA_7B, gpu="h100", memory=40 * GB).memory_bytes == 40 * GB
    assert not list(speeds(plan(LLAMA_7B, memory=40 * GB))) and plan(LLAMA_7B, memory=40 * GB).num_blocks == plan(LLAMA_7B, gpu="a100-40g").num_blocks
    bare = plan(LLAMA_7B)
    assert (bare.num_blocks, bare.fits, bare.as_dict()["cache_bytes"]) == (0, False, None) and len(bare.equations()) == 2 and "note" not in bare.table()


@pytest.mark.parametrize(
    "wrong",
    [dict(tp=0), dict(tp=3), dict(context=0), dict(context=3000), dict(max_context=4096), dict(concurrency=0), dict(block_size=0), dict(memory_utilization=1.5),
     dict(memory_utilization=0), dict(reserved=-1), dict(memory=-1), dict(context=500, max_context=400)],
    ids=str,
)  # fmt: skip
def test_sizes_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("reserved", "sizes").removesuffix("=").replace("memory", "memory|sizes")):
        plan(LLAMA_7B, **{"memory": 40 * GB, **wrong})


# the sums


LAYERS = st.lists(
    st.builds(LayerNeed, st.just(16), st.sampled_from([1, 2, 4, 16]), st.sampled_from([8, 24]), st.sampled_from([8, 16]), st.sampled_from([None, 1, 7, 100])), min_size=1, max_size=4
)
PLANS = st.builds(
    Plan,
    st.builds(
        ModelNeeds, st.just("name"), st.just("type"), st.sampled_from(["float32", "bfloat16"]), st.builds(Weights, st.integers(100_000, 10**7), st.integers(0, 10**4), st.just(50_000), st.just(8), st.just(2)),
        LAYERS.map(tuple), st.sampled_from([None, 4096]), st.sampled_from([0, 9]), st.just(()),
    ),
    st.integers(0, 1 << 28), st.sampled_from([1, 2, 8]), st.sampled_from(["float32", "bfloat16", "fp8"]), st.sampled_from([1, 16, 48]),
    st.floats(0.1, 1), st.integers(0, 1 << 20), st.sampled_from([None, *DEVICES.values()]), st.integers(1, 500), st.integers(500, 4096), st.integers(1, 64),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(PLANS)
def test_the_sums_hold_together(made):
    block = made.block_size * made.kv_bytes_per_token
    assert made.num_blocks * block <= max(0, made.cache_bytes) < (made.num_blocks + 1) * block
    assert made.tp * made.weight_bytes >= made.needs.weights.total * {"float32": 4, "bfloat16": 2}[made.needs.dtype] > made.tp * (made.weight_bytes - 1)
    assert made.fits == (0 < wanted_bytes(made) <= made.num_blocks * block)
    assert made.num_paged(made.max_context) <= made.num_paged(made.context) and made.num_paged(made.max_context) <= made.num_reserved
    assert made.num_reserved * made.max_context <= made.num_blocks * made.block_size < (made.num_reserved + 1) * made.max_context
    for count in (1, made.concurrency):
        longest = longest_context(made, count)
        assert not longest or made.num_paged(longest) >= count
    assert windowed_bytes(made, made.context) <= made.blocks_for(made.context) * block
    assert json.loads(json.dumps(made.as_dict())) == made.as_dict() and all(text in made.table() for text in ("weights", "KV of a token"))
    if made.fits:
        assert largest_model(made) >= made.needs.weights.total - made.tp
    if tp := smallest_tp(made):
        assert replace(made, tp=tp).fits and not any(replace(made, tp=less).fits for less in (1, 2, 4, 8) if less < tp)


@settings(max_examples=100, deadline=None)
@given(PLANS)
def test_speeds_are_bounded_and_ordered(made):
    found = list(speeds(made))
    assert bool(found) == bool(made.device and made.num_paged(made.context))
    assert all(0 < speed.likely < speed.bound for speed in found)
    assert all(a.batch_size < b.batch_size for a, b in zip(found, found[1:]))
    assert not found or found[-1].batch_size == made.num_paged(made.context)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 200))
def test_a_window_touches_as_many_blocks_as_is_said(window, block_size, context):
    needs = ModelNeeds("name", "type", "float32", Weights(1, 0, 0, 0, 0), (LayerNeed(1, 1, 1, 1, window),), None, 0, ())
    made = Plan(needs, 0, 1, "float32", block_size, 0.9, 0, None, context, context, 1)
    touched = max((stop - 1) // block_size - max(0, stop - window) // block_size + 1 for stop in range(1, context + 1))
    said = windowed_bytes(made, context) // (block_size * made.kv_bytes_per_token)
    assert touched <= said and (said == touched or context < window + block_size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tp", [1, 4])
def test_the_roofline_is_that_of_the_cost_model(big, device, tp):
    made = replace(big, tp=tp)
    shape = ModelShape("", made.needs.weights.num_active, 80, 64, 8, 128)
    for cost, kind in ((CostModel(DEVICES[device], shape, tp), CostModel), (CostModel(DEVICES[device], shape, tp, 1, 1, 0), None)):
        for batch, context in ((1, 1), (7, 300), (300, 4096), (1000, 10)):
            seconds = cost.seconds(Load(batch, batch * (context - 1), batch * context))
            assert decode_step(made, batch, context).tokens_per_second(DEVICES[device], kind) == pytest.approx(batch / seconds)


def test_what_limits_a_step(big):
    assert [(speed.batch_size, speed.limit) for speed in speeds(replace(big, context=500)) if speed.batch_size in (1, 256, 1024)] == [(1, "memory"), (256, "memory"), (1024, "compute")]


def test_an_8_bit_cache(big):
    half, full = replace(big, kv_dtype="fp8"), big
    assert 2 * half.kv_bytes_per_token == full.kv_bytes_per_token and half.scale_bytes == 80 * 2 * 4 and full.scale_bytes == 0
    assert full.cache_bytes - half.cache_bytes == half.scale_bytes
    assert 2 * full.num_blocks - 1 <= half.num_blocks <= 2 * full.num_blocks + 1 and "KV scales" in half.table()


def test_windows_are_read_but_not_forgotten():
    gemma = plan(dict(model_type="gemma2", dtype="bfloat16"), gpu="l4", context=8192, max_context=8192)
    assert gemma.kv_bytes_per_token == 2 * 26 * 4 * 256 * 2, "every token in every layer"
    assert windowed_bytes(gemma, 8192) == (13 * 8192 + 13 * (4096 + 16)) * 2 * 4 * 256 * 2 and "windowed, 8,192" in gemma.table()
    assert decode_step(gemma, 1, 8192).num_bytes - decode_step(gemma, 1, 4096).num_bytes == 13 * 4096 * 2 * 4 * 256 * 2, "behind the window nothing is read"
    assert decode_step(gemma, 1, 8192).num_flops - decode_step(gemma, 1, 4096).num_flops == 13 * 4096 * 8 * (256 + 256) * 2, "and nothing computed"


def test_what_does_not_fit_says_what_would(big):
    most = big.num_paged(big.context)
    assert replace(big, concurrency=most).fits and not replace(big, concurrency=most + 1).fits
    made = replace(big, tp=1)
    assert not made.fits and made.num_blocks == 0 and "tp=4 is enough" in replace(made, context=4096, concurrency=32).table()
    with pytest.raises(NoRoomForCache):
        gpu_blocks(16 * made.kv_bytes_per_token, DeviceMemory(0, 80 * GB), 0.9)
    falcon = plan(dict(model_type="falcon", multi_query=True, num_attention_heads=71), gpu="l4")
    assert smallest_tp(falcon) is None and "no power of two" in falcon.table()


# the command


def run(*args: object):
    return CliRunner().invoke(app, ["plan", *map(str, args)])


def test_the_command_plans(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    options = ("--gpu", "h100", "--tp", "8", "--context", "500", "--max-context", "4k", "--concurrency", "100")
    result = run(tmp_path, *options)
    assert (result.exit_code, result.stderr) == (0, "") and "= 80 layers x 1 KV head (of 8) x 2 x 128 x 2 bytes" in result.stdout
    figures = json.loads(run(tmp_path / "config.json", *options, "--json").stdout)
    expected = plan(LLAMA_70B, gpu="h100", tp=8, context=500, max_context=4096, concurrency=100).as_dict()
    assert figures == expected | {"model": str(tmp_path / "config.json")}
    assert run(tmp_path, "--memory", "80GB", "--kv-dtype", "fp8", "--reserved", "1GB").exit_code == 1, "it does not fit"
    assert run(tmp_path).exit_code == 0


@pytest.mark.parametrize(
    "args, code, text",
    [
        ((MODEL_PATH, "--gpu", "tpu"), 2, "known are A100-40G, A100-80G, H100, H200, L4"),
        ((MODEL_PATH, "--gpu", "h100", "--tp", "3"), 2, "does not divide"),
        ((MODEL_PATH, "--kv-dtype", "int3"), 2, "choose one of float32"),
        (("/no/config.json",), 1, "no such config.json"),
        (("no/such-model",), 1, "no/such-model: no such path"),
        (("not a name",), 1, "not a name: no such path"),
    ],
    ids=lambda value: "",
)
def test_the_command_says_what_is_wrong_in_one_line(args, code, text, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run(*args)
    assert result.exit_code == code and result.stdout == "" and text in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_the_command_lists_the_architectures(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen33"}')
    result = run(tmp_path)
    assert result.exit_code == 2 and "similar: qwen3" in result.stderr and "starcoder2" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("option", [("--context", "many"), ("--memory", "80 bananas"), ("--tp", "0"), ("--concurrency", "x")], ids=" ".join)
def test_wrong_usage(option):
    result = run(MODEL_PATH, *option)
    assert result.exit_code == 2 and "Usage" in result.stderr


def test_importing_the_planner_loads_no_torch():
    code = "import sys, pagedlit.planner, pagedlit.plan_cli; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
