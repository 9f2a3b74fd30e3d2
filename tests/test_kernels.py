"""The Triton kernels without a GPU: what needs a mode of Triton of its own runs in a child process."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pagedlit import kernels_cli

pytest.importorskip("triton")
from pagedlit.kernels.report import Facts, Row, problems, report, table_of

TESTS = Path(__file__).parent


def test_kernels_in_the_interpreter():
    """All of tests/interpreted, in one process in which Triton interprets its kernels (the choice is made when it is imported)."""
    if version("triton") < "3.7" and int(version("numpy").split(".")[1]) >= 4:
        pytest.skip("the interpreter of triton 3.6 cannot loop up to a loaded number with numpy 2.4 or newer")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=5", str(TESTS / "interpreted")]
    done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def compiled():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")


COSTLY = ("decode bf16 d128", "decode bf16 d256", "decode e4m3 d128", "decode bf16 d128 prefixes", "prefix bf16 d128", "prefix bf16 d256", "extend bf16 d128", "extend e4m3 d128")


@pytest.mark.parametrize("capability", [90, 80, 100])
def test_compile_gate(capability):
    """What is shipped compiles within the limits: all of it for sm_90, the heaviest kernels for the others."""
    rows = report([capability], None if capability == 90 else COSTLY)
    assert problems(rows) == [], table_of(rows)
    assert all(row.facts.spills == 0 for row in rows) or not version("triton").startswith("3.7"), table_of(rows)


def test_decode_loop_stays_lean():
    """What the design rests on: three programs a multiprocessor (two since triton 3.8), warps that do not wait for each other, K and V 16 bytes at a time."""
    (row,) = report([90], ["decode bf16 d128"])
    facts = row.facts
    assert facts.registers <= (168 if version("triton") < "3.8" else 184) and facts.loop <= 450 and facts.loop_barriers <= 2 and facts.wide_loads >= 48 and facts.tensor_core == 32


def test_prefixes_cost_the_decode_loop_nothing():
    """Three programs a multiprocessor, as without them; and the kernel that reads them multiplies whole tiles."""
    decode, prefix = (row.facts for row in report([90], ["decode bf16 d128 prefixes", "prefix bf16 d128"]))
    assert decode.registers <= 168 and decode.loop <= 450 and decode.loop_barriers <= 2 and decode.spills == 0
    assert 0 < prefix.tensor_core <= 32 and prefix.loop_barriers <= 2 and prefix.spills == 0


def test_extend_uses_the_tensor_cores_of_sm_90():
    (row,) = report([90], ["extend bf16 d128"])
    assert 0 < row.facts.tensor_core <= 32  # HGMMA multiplies a whole tile; HMMA would need hundreds
    assert row.facts.loop_barriers <= (2 if version("triton") < "3.8" else 3)


def test_problems_are_named():
    good = Facts(100, 0, 1000, 4, 8, 2, 100, 2, 0)
    assert problems([Row("decode bf16", 90, good), Row("plan", 90, good._replace(wide_loads=0)), Row("decode fp32", 90, good._replace(tensor_core=0))]) == []
    bad = Facts(255, 30, 300_000, 0, 8, 0, 100, 2, 3)
    assert len(problems([Row("extend bf16", 80, bad)])) == 5


def test_report_on_the_command_line():
    done = CliRunner().invoke(kernels_cli.kernels_app, ["report", "--sm", "90", "--name", "write bf16", "--json"])
    assert done.exit_code == 0 and [row["name"] for row in json.loads(done.stdout)] == ["write bf16"]
    assert "write bf16" in CliRunner().invoke(kernels_cli.kernels_app, ["report", "--sm", "90", "--name", "write bf16"]).stdout
    assert CliRunner().invoke(kernels_cli.kernels_app, ["report", "--name", "nothing"]).exit_code == 2


def test_kernels_know_nothing_of_the_rest():
    """torch, triton, the standard library, and relative imports within the folder."""
    for path in (TESTS.parent / "pagedlit/kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and node.module and node.module.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}), path
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names} for alias in node.names), path
