"""Part I runs on the standard library alone: a fresh process imports and uses it with everything else blocked."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

BLOCK = '''
import importlib, pkgutil, sys

class Block:
    """Refuses every import from outside the standard library and this package."""

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top != "pagedlit":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
for name in ("torch", "numpy", "transformers", "triton"):
    assert name not in sys.modules
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "blocked" in str(error)
    else:
        raise AssertionError(f"{name} was not blocked")

names = ["pagedlit", "pagedlit.viz"]
for floor in ("memory", "serving"):
    package = importlib.import_module("pagedlit." + floor)
    names += [f"pagedlit.{floor}.{m.name}" for m in pkgutil.iter_modules(package.__path__)]
for name in names:
    importlib.import_module(name)
'''

RUN = '''
from pagedlit import SamplingParams
from pagedlit.serving.engine import ToyRunner, build_engine, toy_reference

engine = build_engine(ToyRunner(num_blocks=12, block_size=4), num_blocks=12, block_size=4)
prompts = {engine.add_request(p, SamplingParams(temperature=0, max_tokens=6)): p for p in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 9, 9], [7])}
finished = list(engine.drain())
assert {seq.seq_id for seq in finished} == set(prompts)
for seq in finished:
    assert list(seq.token_ids) == prompts[seq.seq_id] + toy_reference(prompts[seq.seq_id], 6)
engine.check_invariants()
'''


def run(code: str) -> str:
    """What a fresh process prints; it sees this checkout and no third-party package."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_part_one_imports_nothing_else():
    names = run(BLOCK + "print(*names)").split()
    chapters = {"contiguous", "allocator", "block_table", "copy_on_write", "prefix_cache", "sequence", "scheduler", "engine"}
    assert chapters <= {name.rpartition(".")[2] for name in names}


def test_an_engine_runs_on_the_standard_library_alone():
    run(BLOCK + RUN)
