"""The benchmarks of kernels and engine without a GPU: grids, arithmetic, checks that find wrong kernels, rivals' arguments, files and commands."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import types
import weakref
from contextlib import nullcontext
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")
from pagedlit import kernels_cli
from pagedlit.bench import device as devices
from pagedlit.bench import engine, kernel_checks, kernels, tuning
from pagedlit.bench.cli import bench_app, tables
from pagedlit.bench.device import Deadline, NoDevice, Stopwatch, decode_bytes, device_for, extend_flops, race, saved_reports, slug, verdict
from pagedlit.bench.kernel_checks import Layer, assemble, by_formula, by_torch, check_layer, draw, random_tables, worst_error
from pagedlit.bench.kernels import Point, flashinfer_call, run_kernels, sdpa_call
from pagedlit.kernels import cache_write
from pagedlit.kernels.decode import DecodeConfig, decode_config

ROOT = Path(__file__).parent.parent
RUNNER = CliRunner(env={"FORCE_COLOR": None, "COLUMNS": "200"})
CPU, SMALL = torch.device("cpu"), Layer(4, 2, 16, 4)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


# Floors and clocks


def test_floors_count_what_attention_must_do():
    assert decode_bytes([3, 5], 2, 16, 4) == 2 * 8 * 2 * 16 * 4
    for past, new in ((0, 1), (5, 1), (0, 7), (3, 4)):
        seen = sum(past + row + 1 for row in range(new))
        assert extend_flops([(past, new)], 3, 8) == 2 * 2 * seen * 3 * 8


def test_contenders_race_in_turns():
    order: list[str] = []
    seconds = race({name: lambda name=name: order.append(name) for name in "ABC"}, Stopwatch(CPU), 4)
    assert "".join(order) == "ABC" + "ABCBCACABABC" and {name: len(each) for name, each in seconds.items()} == dict.fromkeys("ABC", 4)


def test_a_deadline_lists_what_it_cuts_off():
    deadline = Deadline(0.0)
    assert not deadline.allows("a", 1) and not deadline.allows("b") and deadline.skipped == ["a: no time left", "b: no time left"]
    assert Deadline(60).allows("c", 50)


def test_verdicts():
    assert [verdict("x", 2.0, value)["verdict"] for value in (2.0, 1.99, None)] == ["met", "not met", "not measured"]


@without_gpu
def test_a_missing_device_is_told():
    with pytest.raises(NoDevice, match="--device cpu"):
        device_for()
    assert device_for("cpu") == CPU
    for app, command in ((bench_app, "kernels"), (bench_app, "engine"), (kernels_cli.kernels_app, "tune")):
        done = RUNNER.invoke(app, [command])
        assert done.exit_code == 2 and "no CUDA device" in done.output and "Traceback" not in done.output


class Cuda:
    """Stands in for torch.cuda: a queue whose clock is the number of things that were put into it."""

    def __init__(self, monkeypatch):
        self.log: list[str] = []
        here = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                here.log.append("mark")
                self.time = len(here.log)

            def elapsed_time(self, end):
                assert here.log[-1] == "wait"
                return 1e3 * (end.time - self.time)

        class Graph:
            def replay(self):
                here.log.append("replay")

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        gpu = types.SimpleNamespace(L2_cache_size=50e6, total_memory=80e9, multi_processor_count=132, major=9, minor=0)
        fakes = {
            "Event": Event, "CUDAGraph": Graph, "synchronize": lambda *device: self.log.append("wait"), "Stream": lambda device: stream,
            "current_stream": lambda device: stream, "stream": lambda it: nullcontext(), "graph": lambda graph: nullcontext(),
            "get_device_properties": lambda device: gpu, "get_device_name": lambda *device: "Imaginary", "is_available": lambda: True,
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_calls_on_a_device_are_timed_between_marks_and_waited_for_once(monkeypatch):
    cuda, stopwatch = Cuda(monkeypatch), Stopwatch(CPU)
    stopwatch.device = torch.device("cuda")
    monkeypatch.setattr(stopwatch, "other_data", types.SimpleNamespace(sum=lambda: cuda.log.append("flush")))
    seconds = stopwatch.time([lambda: cuda.log.append("A"), lambda: cuda.log.extend("BB")])
    assert cuda.log == ["flush", "mark", "A", "mark", "flush", "mark", "B", "B", "mark", "wait"] and seconds == [2.0, 3.0]


def test_a_graph_is_recorded_after_warming_up(monkeypatch):
    cuda = Cuda(monkeypatch)
    replay = devices.graphed(lambda: cuda.log.append("call"), torch.device("cuda"))
    assert cuda.log == ["call"] * 3 + ["wait", "call"]
    replay()
    assert cuda.log[-1] == "replay"


def test_a_replay_keeps_what_the_graph_points_to(monkeypatch):
    """Its memory lives as long as the call that holds it: nobody else does, once `ready` has returned."""
    Cuda(monkeypatch)
    bench, plan = replace(kernels.make_bench(CPU, kernels.TINY), device=torch.device("cuda")), torch.zeros(3)
    alive = weakref.ref(plan)
    contenders = kernels.ready(bench, "x", lambda plan=plan: lambda: plan.sum())
    del plan
    gc.collect()
    assert alive() is not None
    contenders.clear()
    gc.collect()
    assert alive() is None


def test_facts_of_a_device(monkeypatch):
    Cuda(monkeypatch)
    facts = devices.device_facts(device_for())
    assert facts["device"] == "Imaginary" and facts["capability"] == "9.0" and facts["L2 MB"] == 50 and facts["memory GB"] == 80
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 0))
    assert kernels.room(torch.device("cuda"), 0.5) == 5 * 2**30


# Checks


@pytest.mark.parametrize("options", kernel_checks.OPTIONS)
@pytest.mark.parametrize("layer", [SMALL, Layer(6, 2, 24, 8, torch.float16), Layer(4, 2, 16, 4, cache_dtype=torch.float8_e4m3fn)], ids=str)
def test_the_formula_is_right(layer, options):
    """Against the oracle of chapter 10's tests, which has no blocks and loops over heads."""
    from test_attention import oracle_row

    lengths = [(9, 1), (0, 6), (300, 2), (3, 1)]
    step, options = draw(layer, lengths, 5, CPU, options), dict(kernel_checks.OPTIONS[options])
    if "sinks" in options:
        options["sinks"] = step.options["sinks"]
    scales = [step.options.get(name, torch.ones(2)).double() for name in ("key_scales", "value_scales")]
    out, row = by_formula(step), 0
    for table, (past, new) in zip(step.block_tables.tolist(), lengths):
        blocks = [block for block in table if block >= 0]
        assert len(blocks) == -(-(past + new) // layer.block_size)
        key, value = (torch.cat([cache[b].double().transpose(0, 1) for b in blocks]) * scale[:, None] for cache, scale in zip((step.key_cache, step.value_cache), scales))
        assert key[past + new :].isnan().all() and not key[: past + new].isnan().any()
        for position in range(past, past + new):
            expected = oracle_row(step.query[row], key[: position + 1], value[: position + 1], step.scale, **options)
            torch.testing.assert_close(out[row], expected, rtol=1e-9, atol=1e-9)
            row += 1
    assert worst_error(by_torch(step), out) < kernel_checks.LIMITS[layer.dtype]


def test_steps_are_fresh_and_repeat():
    a, b, c = (draw(SMALL, [(5, 1)], seed, CPU) for seed in (1, 1, 2))
    assert torch.equal(a.query, b.query) and not torch.equal(a.query, c.query)
    tables = random_tables([(7, 1), (0, 1)], 4, 3, torch.Generator())
    assert sorted(tables.flatten().tolist()) == [-1, 0, 1, 2]
    full = draw(SMALL, [(7, 1), (1, 1)], 0, CPU)  # a sequence that ends with its last block
    assert int((~full.value_cache[:, 0, :, 0].isnan()).sum()) == 8 + 2


WRONG = {
    "a NaN": lambda step: by_torch(step).index_fill(0, torch.tensor([0]), torch.nan),
    "one row": lambda step: by_torch(step).index_fill(0, torch.tensor([1]), 0.0),
    "one head": lambda step: by_torch(step).index_fill(1, torch.tensor([3]), 0.0),
    "the scale": lambda step: by_torch(replace(step, scale=2 * step.scale)),
    "a token short": lambda step: by_torch(replace(step, seq_lens=step.seq_lens - (step.seq_lens > 1).int())),
    "the table": lambda step: by_torch(replace(step, block_tables=step.block_tables.flip(0).clamp(min=0))),
    "softcap": lambda step: by_torch(replace(step, options={k: v for k, v in step.options.items() if k != "softcap"})),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_kernel_is_reported(mistake):
    row = check_layer(WRONG[mistake], SMALL, [(100, 1), (3, 1), (40, 1)], 2, CPU, "decode")
    assert row["verdict"] == "WRONG" and row["worst error"] > row["limit"] and row["inputs"] == 10 and row["check"].startswith("decode")


def test_other_bits_and_crashes_are_reported():
    drifting = check_layer(lambda step: by_torch(step) * (1 + 0.01 * torch.rand(())), SMALL, [(9, 1)] * 3, 3, CPU)
    assert drifting["verdict"] == "NOT THE SAME BITS" and drifting["same bits"] < drifting["inputs"]
    assert check_layer(lambda step: 1 / 0, SMALL, [(9, 1)], 1, CPU)["verdict"].startswith("ZeroDivisionError")
    report = run_kernels(CPU, kernels.TINY, attention=WRONG["a token short"])
    assert {row["verdict"] for row in report.rows if row.get("inputs")} == {"WRONG"} and any("decode" in row for row in report.rows)


def test_several_processes_compile_and_end_in_time(monkeypatch):
    started: list[list[str]] = []

    class Process:
        def __init__(self, command, stderr):
            started.append(command)
            self.log = []

        def wait(self, timeout=None):
            if timeout is not None and len(started) == 4 and "(1, 4)" in started[1][2] and not self.log:
                self.log.append("late")
                raise kernel_checks.subprocess.TimeoutExpired("x", timeout)

        def kill(self):
            assert self.log == ["late"]

    monkeypatch.setattr(kernel_checks.subprocess, "Popen", Process)
    monkeypatch.setattr(kernel_checks.os, "cpu_count", lambda: 6)
    assert kernel_checks.compile_all(0.1) == 4 and [command[2][-12:] for command in started] == [f"e_part({i}, 4)" for i in range(4)]
    monkeypatch.setattr(kernel_checks.os, "cpu_count", lambda: 2)
    assert kernel_checks.compile_all() == 0 and len(started) == 4


def test_a_memory_checker_is_asked(tmp_path, monkeypatch):
    gpu, tool = torch.device("cuda"), tmp_path / "compute-sanitizer"
    monkeypatch.setattr(kernel_checks.shutil, "which", lambda name: str(tool) if tool.exists() else None)
    assert "not installed" in kernel_checks.sanitizer_row(gpu)["verdict"]
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 3 errors'\ntest \"$PYTORCH_NO_CUDA_MEMORY_CACHING$2$3$4\" = 1memcheck--error-exitcode1\n")
    tool.chmod(0o755)
    assert kernel_checks.sanitizer_row(gpu)["verdict"] == "right"
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 3 errors'\nexit 1\n")
    assert "WRONG: ========= ERROR SUMMARY: 3 errors" in kernel_checks.sanitizer_row(gpu)["verdict"]
    tool.write_text("#!/bin/sh\nexec sleep 9\n")
    assert "not finished" in kernel_checks.sanitizer_row(gpu, 0.2)["verdict"]


# The kernels' benchmark


def test_points():
    points = kernels.FULL.points()
    assert len(points) == len(set(points)) == 216 and points[0] == Point(1, 512, Layer())
    wanted = {(b, c, h, s, k) for b in (1, 8, 32, 128, 256) for c in (512, 2048, 8192, 32768) for h in ("32/8", "32/32", "64/8") for s in (16, 64)
              for k in (False, True) if b > 1 or not k}  # fmt: skip
    assert {(p.batch, p.context, p.layer.heads, p.layer.block_size, p.is_skewed) for p in points} == wanted
    skewed = Point(8, 2048, Layer(), True)
    assert skewed.lengths()[0] == (8191, 1) and sum(past + new for past, new in skewed.lengths()) in range(8 * 2048 - 8, 8 * 2048 + 1)
    assert Point(8, 2048, Layer()).num_bytes == 2 * 8 * 2048 * 8 * 128 * 2


class Wrapper:
    """Stands in for FlashInfer's wrappers: computes what their documentation says, from what they are given."""

    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert layout == "NHD"

    def attend(self, query, cache, qo_indptr):
        (indptr, indices, last), (heads, kv_heads, dim, size), out = self.ragged, self.sizes, torch.zeros_like(query)
        assert cache.shape[1:] == (2, size, kv_heads, dim) and query.shape[1:] == (heads, dim) and self.options["q_data_type"] == query.dtype
        for s in range(len(last)):
            pages = indices[indptr[s] : indptr[s + 1]].long()
            length = (len(pages) - 1) * size + int(last[s])
            key, value = (cache[pages, i].flatten(0, 1)[:length].double().repeat_interleave(heads // kv_heads, 1) for i in range(2))
            rows = slice(int(qo_indptr[s]), int(qo_indptr[s + 1]))
            logits = torch.einsum("mhd,lhd->hml", query[rows].double(), key) * self.options["sm_scale"]
            mask = torch.ones(logits.shape[1:], dtype=torch.bool).tril(length - logits.shape[1])
            out[rows] = torch.einsum("hml,lhd->mhd", logits.masked_fill(~mask, -inf).softmax(-1), value).to(query.dtype)
        return out


class Decode(Wrapper):
    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **options):
        self.ragged, self.sizes, self.options = (indptr, indices, last_page_len), (num_qo_heads, num_kv_heads, head_dim, page_size), options

    def run(self, query, cache):
        return self.attend(query, cache, range(len(query) + 1))


class Prefill(Wrapper):
    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk, page_size, causal, **options):
        assert causal
        self.qo_indptr, self.ragged = qo_indptr, (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self.sizes, self.options = (num_qo_heads, num_kv_heads, head_dim_qk, page_size), options

    def run(self, query, cache):
        return self.attend(query, cache, self.qo_indptr.tolist())


@pytest.fixture
def flashinfer(monkeypatch):
    module = types.ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper, module.BatchPrefillWithPagedKVCacheWrapper = Decode, Prefill
    monkeypatch.setitem(sys.modules, "flashinfer", module)


def in_memory(layer, lengths):
    """A step over a stretch of memory that ends within a block."""
    memory = devices.random_like_kv(2 * 4001, CPU)
    block = layer.num_kv_heads * 2 * layer.block_size * layer.head_dim
    pool = memory[: len(memory) // block * block].view(-1, layer.num_kv_heads, 2, layer.block_size, layer.head_dim)
    generator = torch.Generator().manual_seed(0)
    return assemble(layer, lengths, pool, random_tables(lengths, layer.block_size, len(pool), generator), generator), memory


@pytest.mark.parametrize("lengths", [[(6, 1), (0, 1), (7, 1)], [(3, 2), (0, 5), (7, 1)]], ids=["decode", "extend"])
def test_flashinfer_is_given_the_same_work(flashinfer, lengths):
    step, memory = in_memory(SMALL, lengths)
    call, seen = flashinfer_call(step, memory, torch.zeros(8))
    assert worst_error(call(), by_formula(seen)) < 2e-2
    bench = kernels.make_bench(CPU, kernels.TINY)
    bench.memory = memory.repeat(4000)  # the check wants 39 blocks of a real layer
    assert kernels.flashinfer_check(bench)["verdict"] == "right"


def test_flashinfer_compiles_while_our_kernels_are_checked(flashinfer, monkeypatch):
    """All three kernels that are raced are asked for, in a process that is waited for as long as can be spared."""
    kernels.warm_flashinfer(CPU)
    log: list[object] = []

    class Process:
        def __init__(self, command, **streams):
            log.append(command[2])

        def wait(self, timeout):
            log.append(timeout)
            raise kernels.subprocess.TimeoutExpired("x", timeout)

    bench = kernels.make_bench(CPU, kernels.TINY)
    monkeypatch.setattr(kernels.subprocess, "Popen", Process)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "check_rows", lambda bench: iter([{"check": len(log)}]))
    assert next(kernels.first_rows(bench)) == {"check": 0}
    bench.device = torch.device("cuda")
    monkeypatch.setattr(kernels, "flashinfer_check", lambda bench: {"check": len(log)})
    assert list(kernels.first_rows(bench)) == [{"check": 1}, {"check": 2}] and "warm_flashinfer(" in log[0] and 0 < log[1] < 0.55 * 60
    assert bench.notes == ["FlashInfer was still compiling when the checks were done"]


def test_flashinfer_may_be_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    bench = kernels.make_bench(CPU, kernels.TINY)
    step = bench.step(SMALL, [(5, 1)])
    assert kernels.ready(bench, "FlashInfer", lambda: flashinfer_call(step, bench.memory, bench.workspace)[0]) == {} and "FlashInfer: ModuleNotFoundError" in bench.notes[0]
    assert "ModuleNotFoundError" in kernels.flashinfer_check(bench)["verdict"]
    assert kernels.ratio({"pagedlit": [1.0]}, "FlashInfer") is None


@pytest.mark.parametrize("lengths", [[(7, 1)] * 3, [(0, 8)] * 2], ids=["decode", "extend"])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_torch_is_given_the_same_work(lengths, heads):
    step, memory = in_memory(Layer(*heads, 16, 4), lengths)
    size = len(lengths) * heads[1] * 8 * 16
    key, value = memory[: 2 * size].view(2, len(lengths), heads[1], 8, 16)
    contiguous = replace(step, key_cache=key.reshape(-1, heads[1], 8, 16), value_cache=value.reshape(-1, heads[1], 8, 16), block_tables=torch.arange(len(lengths)).int()[:, None])
    out = sdpa_call(step, memory)()
    assert worst_error(out.transpose(1, 2).flatten(0, 1), by_formula(contiguous)) < 2e-2
    for odd in ([(7, 1), (6, 1)], [(3, 2)] * 2):
        assert sdpa_call(in_memory(Layer(*heads, 16, 4), odd)[0], memory) is None


def test_a_contender_that_fails_is_left_out():
    bench = kernels.make_bench(CPU, kernels.TINY)
    assert kernels.ready(bench, "x", lambda: None) == {} and kernels.ready(bench, "y", lambda: lambda: 1 / 0) == {} and "y: ZeroDivisionError" in bench.notes[0]


def test_what_is_cut_off_is_listed(monkeypatch):
    report = run_kernels(CPU, replace(kernels.TINY, seconds=0.0))
    skipped = [row["skipped"] for row in report.rows if "skipped" in row]
    assert len(skipped) == 2 + 1 + 2 + 6 and all("no time left" in line for line in skipped) and not any("decode" in row for row in report.rows)
    huge = replace(kernels.TINY, batches=(5000,), contexts=(4096,), extends=(), cascade=(3, 16, 5))
    report = run_kernels(CPU, huge)
    assert sum("does not fit" in row.get("skipped", "") for row in report.rows) == 2
    monkeypatch.setattr(kernels, "cascade_row", lambda bench: 1 / 0)
    assert {"note": "cascade: ZeroDivisionError: division by zero"} in run_kernels(CPU, kernels.TINY).rows


def test_cascade_is_found_by_name_or_said_to_be_absent(monkeypatch):
    monkeypatch.setattr(kernels, "shared_attention", lambda: None)
    bench = kernels.make_bench(CPU, kernels.TINY)
    assert kernels.cascade_row(bench)["times as fast"] > 0
    bench.device = torch.device("cuda")
    row = kernels.cascade_row(bench)
    assert "not there" in row["cascade"] and row["times as fast"] is None
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pagedlit.kernels.cascade", types.SimpleNamespace(paged_decode_shared=lambda *a: a))
    step = draw(SMALL, [(5, 1)], 0, CPU)
    assert kernels.shared_attention()(step)[0] is step.query
    monkeypatch.setitem(sys.modules, "pagedlit.kernels.cascade", types.SimpleNamespace())
    assert kernels.shared_attention() is None


def test_shared_steps_share():
    bench = kernels.make_bench(CPU, kernels.TINY)
    step = kernels.shared_step(bench, SMALL, 3, 16, 5)
    assert torch.equal(step.block_tables[:, :4], step.block_tables[:1, :4].expand(3, 4)) and len(set(step.block_tables[:, 4:].flatten().tolist())) == 6


# The engine's benchmark


def test_rooflines_count_bytes():
    model = engine.random_model("tiny", CPU)
    assert engine.step_bytes(model) == 4 * sum(p.numel() for p in model.parameters())  # tied: the embedding is read as the output layer
    assert engine.token_bytes(model.config, 4) == 2 * 2 * 2 * 16 * 4
    assert engine.roofline(1000, 10, 4, 25.0, 8000.0) == 4 * 8000 / 2000
    with torch.device("meta"):
        untied = engine.AutoModelForCausalLM.from_config(engine.shape_config("Llama-3.1-8B"), dtype=torch.bfloat16)
    assert engine.step_bytes(untied) == 2 * (8_030_261_248 - 128_256 * 4096)
    assert {name: engine.token_bytes(engine.shape_config(name)) for name in engine.FULL.models} == {"Llama-3.1-8B": 131_072, "Qwen3-0.6B": 114_688, "Llama-3.2-1B": 32_768}


def test_settings_are_those_that_llm_knows():
    assert engine.known_settings({"block_size": 4, "no such setting": 1}) == {"block_size": 4}
    assert engine.settings_for(torch.device("cuda"))["attention_backend"] == "triton"


def test_rivals_are_cut_off_and_failures_told(monkeypatch):
    def never():
        raise TimeoutError("3 of 256 requests finished within 2 s")

    rate, remark = engine.lap(never, 100)
    assert rate > 0 and remark == "at most: 3 of 256 requests finished within 2 s"
    assert engine.lap(lambda: [[1, 2]], 3)[1] == "generated 2 tokens instead of 3" and engine.lap(lambda: [[1, 2]], 2)[1] == ""
    monkeypatch.setattr(engine, "rivals", lambda *a: iter([("broken", lambda: 1 / 0)]))
    size = replace(engine.TINY, batches=(1,))
    report = engine.run_engine(CPU, size)
    assert report.rows[-1]["contender"] == "broken" and report.rows[-1]["ratio"] is None and "ZeroDivisionError" in report.rows[-1]["remark"]
    monkeypatch.setattr(engine, "decode_rows", lambda *a: 1 / 0)
    monkeypatch.setattr(engine, "serving_rows", lambda *a: iter([{"workload": "still measured"}]))
    assert engine.run_engine(CPU, size).rows == [{"note": "ZeroDivisionError: division by zero"}, {"workload": "still measured"}]


def test_hf_continuous_batching_stops_at_its_limit():
    work, model = engine.Workload([[5, 6]], [4]), engine.random_model("tiny", CPU)
    with engine.hf_continuous(model, work, 64, -1.0) as serve, pytest.raises(TimeoutError, match="0 of 1 requests"):
        serve()


def test_promises_of_the_engine():
    rows = [{"model": "Llama-3.1-8B", "share": 0.8}, {"model": "Llama-3.1-8B", "share": 0.6}, {"contender": "HF continuous batching", "ratio": 7.0}]
    assert [row["verdict"] for row in engine.promises(rows)] == ["not met", "met"]
    assert [row["verdict"] for row in engine.promises([])] == ["not measured", "not measured"]


# Tuning


def test_tuned_configurations_are_found_by_the_device_they_were_written_for(tmp_path, monkeypatch):
    query, cache = torch.empty(1, 8, 128, dtype=torch.bfloat16, device="meta"), torch.empty(1, 2, 16, 128, dtype=torch.bfloat16, device="meta")
    name = tuning.situation("decode", query, cache, 128)
    path = tuning.write_table("NVIDIA Imaginary (80 GB)", {name: {"num_stages": 4}, "extend x": {}}, tmp_path / "configs")
    tuning.write_table("NVIDIA Imaginary (80 GB)", {"other": {"rows": 64}}, tmp_path / "configs")
    assert json.loads(path.read_text()) == {name: {"num_stages": 4}, "other": {"rows": 64}}
    monkeypatch.setattr(cache_write, "__file__", str(tmp_path / "cache_write.py"))
    cache_write.tuned_table.cache_clear()
    default = decode_config(query, cache, cache, native_e4m3=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Imaginary (80 GB)")
    on_gpu = cache_write.tuned(torch.device("cuda"), name)
    assert on_gpu == {"num_stages": 4} and default._replace(**on_gpu).num_stages == 4 != default.num_stages
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Another")
    assert cache_write.tuned(torch.device("cuda"), name) == {} == cache_write.tuned(CPU, name)
    cache_write.tuned_table.cache_clear()


def test_tuning_keeps_what_gains_enough(tmp_path, monkeypatch):
    default = DecodeConfig()
    slow = tuning.best(default, [default._replace(num_stages=4)], lambda c: [1.0, 0.98 if c.num_stages == 4 else 1.0], Deadline(9))
    assert slow == (default, 1.0)
    assert tuning.best(default, [default._replace(num_stages=4)], lambda c: [inf] if c.num_stages == 4 else [1.0], Deadline(9))[0] == default
    monkeypatch.setattr(tuning, "times", lambda bench, kind, points, config: [1.0 + 0.1 * abs(config.num_stages - 2)] * len(points))
    monkeypatch.setattr(tuning, "device_name", lambda device: "Made up")
    monkeypatch.setattr(tuning, "configs_folder", lambda: tmp_path)
    told: list[str] = []
    monkeypatch.setattr(tuning, "SITUATIONS", {what: tuple((layer._replace(head_dim=16, block_size=4), lengths) for layer, lengths in points)
                                               for what, points in list(tuning.SITUATIONS.items())[::2]})  # fmt: skip
    monkeypatch.setattr(tuning, "QUICK", kernels.TINY)
    path = tuning.tune(CPU, told.append, 60)
    assert path == tmp_path / "Made_up.json" and {tuple(v) for v in json.loads(path.read_text()).values()} == {("num_stages",)} and len(told) == 2
    for module in ("decode", "extend"):  # what was found before is not the measure of what is found now
        monkeypatch.setattr(f"pagedlit.kernels.{module}.tuned", lambda *situation: {"num_stages": 2})
    before = path.read_text()
    assert tuning.tune(CPU, told.append, 60) == path and path.read_text() == before
    monkeypatch.setattr(tuning, "times", lambda bench, kind, points, config: [1.0] * len(points))
    monkeypatch.setattr(cache_write, "tuned_table", lambda name: json.loads(path.read_text()))
    assert tuning.tune(CPU, told.append, 60) == path and json.loads(path.read_text()) == {} and tuning.tune(CPU, told.append, 60) is None


def test_what_cannot_run_takes_forever():
    bench = kernels.make_bench(CPU, kernels.TINY)
    assert tuning.times(bench, "decode", [(SMALL, [(5, 1)])], DecodeConfig()) == [inf]  # compiled kernels do not take a CPU's tensors


# Commands and files


@pytest.fixture(scope="module")
def reports():
    """What both benchmarks find on a CPU."""
    return {"kernels": run_kernels(CPU, kernels.TINY), "engine": engine.run_engine(CPU, engine.TINY)}


def test_every_kind_of_row_is_there(reports):
    kinds = {name: [next(iter(row)) for row in report.rows] for name, report in reports.items()}
    assert kinds["kernels"] == ["check"] * 4 + ["cascade"] + ["extend"] * 2 + ["decode"] * 6 + ["check"]
    assert kinds["engine"] == ["model"] * 2 + ["workload"] * 3
    decode = [row for row in reports["kernels"].rows if "decode" in row]
    assert all(row["us"] > 0 and row["share of copy"] > 0 and row["x FlashInfer"] is None for row in decode) and len({tuple(row) for row in decode}) == 1
    assert all(row["x SDPA"] > 0 for row in decode if row["decode"] == "uniform")
    assert all(0 < row["share"] < 1 for row in reports["engine"].rows if "model" in row)
    assert not any(row["remark"] for row in reports["engine"].rows if "workload" in row)


@pytest.mark.parametrize("name", ["kernels", "engine"])
def test_commands_print_tables_and_keep_json(name, tmp_path, monkeypatch, reports):
    def known(device, size, progress, keep):
        assert device == CPU and size is (kernels if name == "kernels" else engine).TINY
        keep(reports[name])
        return reports[name]

    monkeypatch.setattr(kernels if name == "kernels" else engine, f"run_{name}", known)
    path = tmp_path / "x.json"
    done = RUNNER.invoke(bench_app, [name, "--quick", "--device", "cpu", "--json", str(path)])
    assert done.exit_code == 0, done.output
    kept = json.loads(path.read_text())
    assert kept["benchmark"] == name and kept["settings"]["device"] and "commit" in kept["environment"] and "triton" in kept["settings"]
    assert all(text in done.output for text in tables(kept["rows"])) and not any("promise" in row for row in kept["rows"])


def test_results_are_kept_by_device(tmp_path, reports):
    assert slug("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3" and devices.results_folder() == ROOT / "kernels/results"
    (tmp_path / "GPU").mkdir()
    for bench, found in ((kernels, reports["kernels"]), (engine, reports["engine"])):
        report = replace(found, rows=found.rows + bench.promises(found.rows))
        report.save(tmp_path / f"GPU/{report.benchmark}.json")
        kept = saved_reports(report.benchmark, tmp_path)
        text = bench.summary(kept["GPU"])
        assert list(kept) == ["GPU"] and report.settings["device"] in text and "not measured" in text
    assert saved_reports("kernels", tmp_path / "nothing") == {}


def test_the_decode_grid_is_shown_as_tables(monkeypatch, reports):
    report = {"rows": [row for row in reports["kernels"].rows if row.get("batch") != 1 or row["context"] != 40]}
    text = kernels.pivots(report, "us")
    assert text.count("us, uniform lengths, heads 4/2, blocks of 4") == 1 and text.count("us, skewed lengths") == 1
    assert [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|      40")][0] == ["      40 ", "       - "]
    monkeypatch.setattr(kernels, "saved_reports", lambda name: {"GPU": report, "other": {"rows": []}})
    assert "3 x (16 shared + 5)" in kernels.all_tables() and "1 x 24 after 0" in kernels.all_tables() and "x SDPA, skewed" in kernels.all_tables()


@pytest.mark.parametrize("name", ["kernels", "engine"])
def test_kept_results_can_be_shown(name):
    """Of GPUs that have run the benchmarks, if any."""
    for kept in saved_reports(name).values():
        assert kept["schema"] == 1 and (kernels if name == "kernels" else engine).summary(kept)


def test_a_copy_without_git_is_told_its_commit(tmp_path, monkeypatch):
    from pagedlit.bench import report

    monkeypatch.setattr(report.pagedlit, "__file__", str(tmp_path / "pagedlit/__init__.py"))
    monkeypatch.setenv("PAGEDLIT_COMMIT", "abc1234")
    assert report.commit() == "abc1234"


@without_gpu
def test_the_script_for_a_gpu_machine_says_what_is_missing():
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([ROOT / ".ci/gpu", "kernels"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert {"tests", "kernels", "engine"} <= set(re.findall(r"\w+", (ROOT / ".ci/gpu").read_text().splitlines()[1]))
