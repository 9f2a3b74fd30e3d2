"""`pagedlit simulate`: what it prints, what it refuses, and that it is quick to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pagedlit.cli import app
from pagedlit.serving.cost_model import get_cost_model
from pagedlit.serving.reservation import Reserve
from pagedlit.serving.simulator import simulate
from pagedlit.serving.workload import load_trace, poisson, synthetic

ROOT = Path(__file__).parent.parent


def invoke(*args: str):
    """The command, in this process."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["simulate", *args])


def facts(*args: str) -> dict:
    """What it prints as JSON."""
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_it_prints_the_report_of_simulate():
    result = invoke("--num-requests", "40", "--rate", "6", "--gpu", "L4", "--seed", "3")
    report = simulate(synthetic(40, 6.0, seed=3), get_cost_model("L4", "Llama-3.1-8B"), eviction_policy="reuse-bonus")
    assert result.exit_code == 0 and result.output.strip() == report.table()
    assert invoke("--num-requests", "40", "--rate", "6", "--gpu", "L4", "--seed", "3").output == result.output


def test_json_has_counts_averages_and_percentiles():
    found = facts("--num-requests", "40", "--memory", "pow2", "--max-model-len", "4096", "--model", "OPT-13B", "--gpu", "A100-40G")
    report = simulate(synthetic(40, 4.0), memory=Reserve("pow2"), max_model_len=4096)
    assert (found["num_requests"], found["num_steps"], found["seconds"]) == (report.num_requests, report.num_steps, report.seconds)
    assert found["mean"] == report.mean._asdict() and found["mean"]["reserved"] > 0 and set(found["ttft"]) == {"p50", "p90", "p99"}


def test_traces_keep_their_times_unless_a_rate_is_given(tmp_path):
    path = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:15:{second:02}.0000000,{100 + second},{5 + second}\n" for second in range(30))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    cost = get_cost_model("H100", "Llama-3.1-8B")
    assert facts(str(path), "--eviction-policy", "lru")["seconds"] == simulate(path, cost).seconds > 29
    assert facts(str(path), "--num-requests", "10")["num_requests"] == 10
    assert facts(str(path), "--rate", "50")["seconds"] == simulate(poisson(load_trace(path), 50.0), cost).seconds < 10


def test_conversations_hit_the_cache():
    found = facts("--profile", "conversations", "--num-requests", "60")
    assert found["num_requests"] == 60 and found["num_hit_tokens"] > 0
    assert facts("--profile", "conversations", "--num-requests", "60", "--no-prefix-caching")["num_hit_tokens"] == 0


def test_a_picture_is_written(tmp_path):
    result = invoke("--num-requests", "20", "--plot", str(tmp_path / "run.svg"))
    assert result.exit_code == 0 and ElementTree.parse(tmp_path / "run.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    "args,message",
    [
        (["--gpu", "B100"], "choose one of"), (["--model", "GPT-9"], "choose one of"), (["--memory", "most"], "choose one of"),
        (["--memory", "max"], "max_model_len"), (["--policy", "fair"], "must be one of"), (["--eviction-policy", "mru"], "choose one of"),
        (["--profile", "llama"], "choose one of"), (["nowhere.csv"], "nowhere.csv"), (["trace.txt"], ".csv or .jsonl"),
        (["--gpu", "L4", "--model", "Llama-3-70B"], "leaves no room"), (["--rate", "0"], "rate"), (["--num-requests", "0"], "num-requests"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(args, message):
    result = invoke(*args)
    assert result.exit_code == 2 and message in result.output, result.output


def test_it_loads_no_torch():
    code = "import sys; from pagedlit.cli import main; sys.argv = ['pagedlit', 'simulate', '--num-requests', '5']\ntry:\n    main()\n"
    code += "except SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "| requests served / refused | 5 / 0 |" in done.stdout, done.stderr


def test_a_trace_without_requests_is_refused_and_names_come_in_any_case(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    result = invoke(str(tmp_path / "empty.jsonl"))
    assert result.exit_code == 2 and "has no requests" in result.output
    assert facts("--num-requests", "5", "--gpu", "h100") == facts("--num-requests", "5", "--gpu", "H100")
