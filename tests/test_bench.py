"""The benchmarks at tiny sizes: that they run, compare what they should, and say what they found. Never how long anything takes."""

import json
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pagedlit.bench import control_plane, cpu
from pagedlit.bench.cli import bench_app, tables
from pagedlit.bench.control_plane import BLOCK_SIZE, NaivePool, NaiveSequence, cached_lens, hash_next, naive_admit, naive_fork, naive_release
from pagedlit.bench.cpu import BARS, DifferentOutputs, Shape, Workload, compete, num_ties, random_llama, ready, static_batches, verdicts
from pagedlit.bench.report import Report, environment, median_ratio, spread, table, take_turns

ROOT = Path(__file__).parent.parent
RUNNER = CliRunner(env={"FORCE_COLOR": None, "COLUMNS": "200"})


@pytest.fixture(scope="module")
def model():
    return random_llama(1, 128, 512)


# Reports


def test_contenders_take_turns_and_are_cleaned_up():
    order = []
    contenders = {name: lambda name=name: nullcontext(partial(order.append, name)) for name in "ABC"}
    laps, results = take_turns(contenders, 4)
    assert "".join(order) == "ABCBCACABABC" and set(results) == set("ABC")
    assert all(len(each) == 4 and all(lap.seconds >= 0 and lap.cpu_seconds >= 0 for lap in each) for each in laps.values())


def test_ratios_are_taken_within_a_round():
    assert median_ratio([2, 40, 6], [1, 20, 3]) == 2 and spread([1, 2, 3]) == 1
    with pytest.raises(ValueError):
        median_ratio([1, 2], [1])


def test_a_report_is_a_table_and_json(tmp_path):
    report = Report("test", {"size": (1, 2)}, [{"who": "A", "seconds": 1234.5, "ratio": None}, {"who": "B", "seconds": 0.01234, "ratio": 2.0}])
    report.save(tmp_path / "x.json")
    kept = json.loads((tmp_path / "x.json").read_text())
    assert kept["schema"] == 1 and kept["rows"][1] == {"who": "B", "seconds": 0.01234, "ratio": 2.0} and kept["settings"] == {"size": [1, 2]}
    assert set(kept["environment"]) == set(environment()) >= {"cpu", "num_cpus", "load", "python", "torch", "transformers", "commit", "date"}
    lines = table(report.rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and "| A   |   1,234 |     - |" in lines


# The control plane


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 2), st.integers(1, 50)), min_size=1, max_size=12))
def test_both_managers_find_the_same_whole_blocks(cuts):
    stem = control_plane.random_tokens(80, seed=0)
    prompts = [stem[:cut] + [1 + branch] * size for cut, branch, size in cuts]
    ours, naive = cached_lens(prompts, num_blocks=200)
    assert ours == naive


def test_both_managers_find_the_same_after_eviction_of_everything():
    prompts = [control_plane.random_tokens(64, seed) for seed in (0, 1, 2, 0)]
    assert cached_lens(prompts, num_blocks=5) == ([0, 0, 0, 0], [0, 0, 0, 0])  # the first prompt is gone when it comes again
    assert cached_lens(prompts, num_blocks=40) == ([0, 0, 0, 48], [0, 0, 0, 48])


def test_the_naive_pool_keeps_its_books():
    rng, pool, seqs = random.Random(0), NaivePool(64), []
    for _ in range(300):
        if seqs and (rng.random() < 0.5 or len(pool.free) < 12):
            naive_release(pool, seqs.pop(rng.randrange(len(seqs))))
        elif seqs and rng.random() < 0.3:
            seqs.append(naive_fork(pool, rng.choice(seqs)))
        else:
            seqs.append(NaiveSequence([rng.randrange(2) for _ in range(rng.randrange(1, 90))]))
            naive_admit(pool, seqs[-1])
        held = [block_id for seq in seqs for block_id in seq.table]
        assert all(block.ref_count == held.count(block.block_id) for block in pool.blocks)
        assert set(pool.free) == {block.block_id for block in pool.blocks if block.ref_count == 0}


def test_a_hash_is_not_trusted():
    pool, tokens = NaivePool(4), list(range(BLOCK_SIZE + 1))
    block_hash, _ = hash_next(NaiveSequence(tokens[:]))
    pool.keep(0, block_hash, [99] * BLOCK_SIZE)
    assert naive_admit(pool, NaiveSequence(tokens)) == 0


def test_the_control_plane_is_measured():
    told = []
    report = control_plane.run_control_plane(control_plane.TINY, told.append)
    assert [row["operation"].split(" (")[0] for row in report.rows] == [
        "decode step", "memory of a cached token", "decode step", "decode step", "admit a cached prompt", "fork", "abort",
    ]  # fmt: skip
    assert len({tuple(row) for row in report.rows}) == 1 and len(told) == 5
    assert all(row["pagedlit"] > 0 and row["naive"] > 0 and row["ratio"] > 0 for row in report.rows)
    assert [row["goal"] for row in report.rows] == [1.0, None, None, None, 2.0, None, None]


def test_both_engines_decode_the_same_lengths():
    ours, naive = control_plane.decoding_engines(5, 64)
    begin = {seq.seq_id: len(seq.token_ids) for seq in ours.scheduler.running}
    lens = [len(seq.token_ids) for seq in naive.running]
    for _ in range(20):
        ours.step()
        naive.step()
    assert [len(seq.token_ids) - begin[seq.seq_id] for seq in ours.scheduler.running] == [20] * 5
    assert [len(seq.token_ids) - length for seq, length in zip(naive.running, lens)] == [20] * 5
    ours.check_invariants()


# Throughput


def test_workloads_are_as_described_and_repeat():
    for shape in cpu.SHAPES.values():
        work = Workload.draw(shape, 1000)
        assert work == Workload.draw(shape, 1000) != Workload.draw(shape, 1000, seed=1)
        assert len(work.prompts) == shape.num_requests
        assert all(shape.prompt_len[0] <= len(prompt) - shape.prefix_len <= shape.prompt_len[1] for prompt in work.prompts)
        assert all(shape.output_len[0] <= size <= shape.output_len[1] for size in work.output_lens)
        assert len({tuple(prompt[: shape.prefix_len]) for prompt in work.prompts}) == 1
        assert max(map(len, work.prompts)) + max(work.output_lens) <= shape.max_len
    assert [cpu.SHAPES[name].num_requests for name in "ac"] == [64, 64]


def test_static_batches_of_any_size_generate_the_same(model):
    work = Workload.draw(Shape("", (2, 9), (1, 6), num_requests=5), 512)
    outputs = [static_batches(model, work, size) for size in (1, 2, 5)]
    assert outputs[0] == outputs[1] == outputs[2] and [len(each) for each in outputs[0]] == work.output_lens


@pytest.mark.parametrize("forge", ["other token", "too short", "too long", "missing"])
def test_different_outputs_are_an_error(model, forge):
    work = Workload([[5, 6, 7, 8], [9, 10, 11]], [4, 4])
    right = static_batches(model, work, 2)
    wrong = {"other token": right[1][:2] + [right[1][2] ^ 1, right[1][3]], "too short": right[1][:3], "too long": [*right[1], 1], "missing": []}
    contenders = {"right": ready(static_batches, model, work, 2), "wrong": ready(lambda: [right[0], wrong[forge]])}
    with pytest.raises(DifferentOutputs, match="request 1"):
        compete("x", model, work, contenders, 1)
    with pytest.raises(ValueError):
        num_ties(model, work, right, right[:1])


def test_ties_are_counted_where_logits_are_equal(model):
    work = Workload([[5, 6, 7, 8]], [2])
    right = static_batches(model, work, 1)
    with torch.no_grad():
        before = model.lm_head.weight[right[0][0] ^ 1].clone()
        model.lm_head.weight[right[0][0] ^ 1] = model.lm_head.weight[right[0][0]]
        assert num_ties(model, work, [[right[0][0], 1]], [[right[0][0] ^ 1, 1]]) == 1
        model.lm_head.weight[right[0][0] ^ 1] = before


def test_the_engine_competes_with_both():
    told = []
    report = cpu.run_cpu(cpu.WORKLOADS, cpu.TINY, told.append)
    laps = [row for row in report.rows if "contender" in row]
    assert [row["workload"] for row in laps] == ["a"] * 5 + ["b"] * 5 + ["c"] * 5 + ["memory"] * 3 and len(told) == 5
    for row in laps:
        done, total = map(int, row["same outputs"].split("/")) if row["ratio"] else (0, 1)
        assert row["ratio"] and 0 <= total - done <= 1, row
    assert {row["contender"] for row in laps if row["ratio"] == 1} == {"pagedlit"}
    shares = {row["part"]: row["share"] for row in report.rows if "part" in row}
    assert abs(sum(shares.values()) - 1) < 1e-6 and shares["linear layers"] > 0 and shares["gathering from the cache"] > 0
    assert len([row for row in report.rows if "at least" in row]) == len(BARS)


def test_a_contender_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "hf_config", lambda *args: 1 / 0)
    report = cpu.run_cpu(["a"], cpu.TINY)
    failed = [row for row in report.rows if row.get("contender", "").startswith("HF")]
    assert len(failed) == 1 and "ZeroDivisionError" in failed[0]["contender"] and failed[0]["ratio"] is None
    assert len([row for row in report.rows if "at least" in row]) == 1


def test_verdicts_name_the_better_of_the_static_ones():
    rows = [{"workload": "a", "contender": who, "ratio": ratio, "CPU ratio": ratio + 1} for who, ratio in (("static, x", 3.0), ("static, y", 2.0))]
    assert verdicts(rows) == [{"workload": "a", "at least": 1.6, "times as fast as": "static, y", "ratio": 2.0, "CPU ratio": 3.0}]


# The commands


def test_commands_print_tables_and_write_json(tmp_path, monkeypatch):
    monkeypatch.setattr(control_plane, "QUICK", control_plane.TINY)
    monkeypatch.setattr(cpu, "QUICK", cpu.TINY)
    for command, more in (("control-plane", []), ("cpu", ["--workload", "memory", "--rounds", "1"])):
        path = tmp_path / f"{command}.json"
        result = RUNNER.invoke(bench_app, [command, "--quick", "--json", str(path), *more])
        assert result.exit_code == 0, result.output
        kept = json.loads(path.read_text())
        assert kept["benchmark"] == command and kept["rows"] and all(text in result.output for text in tables(kept["rows"]))


@pytest.mark.parametrize("args", [["cpu", "--workload", "d"], ["cpu", "--json", "nowhere/x.json"], ["control-plane", "--json", "nowhere/x.json"]])
def test_what_is_wrong_is_known_before_anything_runs(args):
    result = RUNNER.invoke(bench_app, args)
    assert result.exit_code == 2 and ("nowhere" in result.output or "workloads are" in result.output)


def test_the_commands_are_light_until_they_run():
    code = "import sys, pagedlit.bench.cli; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["cpu", "control_plane"])
def test_committed_results_are_complete(name):
    kept = json.loads((ROOT / f"nbs/results/{name}.json").read_text())
    assert kept["schema"] == 1 and kept["benchmark"] == name.replace("_", "-") and kept["environment"]["cpu"]
    if name == "cpu":
        assert {row["workload"] for row in kept["rows"] if "contender" in row} == {"a", "b", "c", "memory"}
        assert kept["settings"]["share"] == 1.0 and 30e6 <= kept["settings"]["parameters"] <= 60e6
