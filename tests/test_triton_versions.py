"""The compile gate and some interpreter tests with other versions of Triton, where `make tritons` has installed them (.triton-3.6.0, ..)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(ROOT.glob(".triton-*"))


def run(folder: Path, selection: str, *tests: str, **more: str) -> None:
    """pytest in a process that finds that Triton first, with a cache of its own."""
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "cache")} | more
    version = f"import triton; assert triton.__version__ == {folder.name.removeprefix('.triton-')!r}, triton.__file__"
    subprocess.run([sys.executable, "-c", version], cwd=ROOT, env=env, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *tests]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(not FOLDERS, reason="make tritons installs other versions of Triton to test with")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_compile_gate(folder):
    run(folder, "compile_gate or lean or tensor_cores", "tests/test_kernels.py")


@pytest.mark.skipif(not FOLDERS, reason="make tritons installs other versions of Triton to test with")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_interpreter(folder):
    if folder.name < ".triton-3.7" and not (folder / "numpy").exists():
        pytest.skip("the interpreter of triton 3.6 cannot loop up to a loaded number with numpy 2.4 or newer")
    some = "(test_options and plain) or copies or entrance or write_e4m3 or defaults"
    run(folder, some, "tests/interpreted", "--ignore=tests/interpreted/test_triton_backend.py", TRITON_INTERPRET="1")
