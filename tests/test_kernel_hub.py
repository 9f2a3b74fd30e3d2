"""The Kernel Hub project in `kernels/`: it builds, Hugging Face's `kernels` loads it, and what it loads passes the same interpreter tests."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("hub", ROOT / ".ci/hub.py")
hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)

interpreted = pytest.mark.skipif(
    version("triton") < "3.7" and int(version("numpy").split(".")[1]) >= 4,
    reason="the interpreter of triton 3.6 cannot loop up to a loaded number with numpy 2.4 or newer",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project, built."""
    folder = tmp_path_factory.mktemp("hub")
    hub.build(out=folder)
    return folder


def test_build_toml_is_what_the_builder_wants():
    settings = hub.settings(ROOT / "kernels")
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", settings["general"]["name"]), "the builder takes no underscores"
    assert set(settings["general"]) == {"name", "version", "edition", "license", "backends"} and set(settings["torch-noarch"]) == {"pyext"}


def test_a_variant_is_the_package_with_its_metadata(project):
    source = {path.name for path in (ROOT / "pagedlit/kernels").glob("*.py")}
    for backend in ("cpu", "cuda"):
        variant = project / f"build/torch-{backend}"
        assert {path.name for path in variant.glob("*.py")} == source and not list(variant.rglob("*.pyc"))
        facts = json.loads((variant / "metadata.json").read_text())
        assert facts["name"] == "paged-attention" and facts["backend"] == {"type": backend} and facts["id"].isidentifier()
    ids = {json.loads(path.read_text())["id"] for path in project.glob("build/*/metadata.json")}
    assert len(ids) == 2 and hub.build(out=project) and ids == {json.loads(path.read_text())["id"] for path in project.glob("build/*/metadata.json")}


ALONE = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
kernels = get_local_kernel(Path(sys.argv[1]))
assert not any(name.split(".")[0] in ("pagedlit", "transformers") for name in sys.modules), "it does not load alone"
assert set(kernels.__all__) <= set(dir(kernels))
query, key, value = torch.randn(2, 4, 16), torch.randn(3, 2, 8, 16), torch.randn(3, 2, 8, 16)
tables, seq_lens = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32), torch.tensor([11, 5], dtype=torch.int32)
out = kernels.paged_decode(query, key, value, tables, seq_lens, 0.25)
for s, length in enumerate(seq_lens.tolist()):
    k, v = (torch.cat([pool[block] for block in tables[s].clamp(min=0)], 1)[:, :length].repeat_interleave(2, 0) for pool in (key, value))
    torch.testing.assert_close(out[s], (torch.einsum("hd,hld->hl", query[s], k) / 4).softmax(-1).unsqueeze(1).bmm(v)[:, 0], rtol=1e-5, atol=1e-5)
try:
    kernels.nothing
except AttributeError:
    print("alone")
"""


def child(arguments: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python where Triton interprets, without the network."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@interpreted
def test_it_loads_alone_and_computes(project):
    pytest.importorskip("kernels")
    script = project / "alone.py"  # a file: Python then puts its folder on the path, and not this checkout
    script.write_text(ALONE)
    done = child([str(script), str(project)])
    assert done.stdout.strip() == "alone", done.stdout + done.stderr


@interpreted
def test_it_passes_the_interpreter_tests(project):
    """Some of tests/interpreted; with the environment variable, pytest runs any of them so."""
    pytest.importorskip("kernels")
    some = "where_from or (test_options and sinks) or (copies and dtype1) or entrance_computes or write_e4m3"
    done = child(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", some, "tests/interpreted", "--ignore=tests/interpreted/test_triton_backend.py"],
                 PAGEDLIT_KERNELS=str(project))  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def test_names_of_the_package_are_looked_up_when_they_are_used():
    code = "import sys, pagedlit.kernels as k; print('triton' in sys.modules, sorted(k.__all__) == k.__all__, hasattr(k, 'nothing'))"
    assert child(["-c", code]).stdout.split() == ["False", "True", "False"]
    import pagedlit.kernels

    assert {name: getattr(pagedlit.kernels, name).__module__ for name in pagedlit.kernels.__all__} == {
        name: f"pagedlit.kernels.{module}" for name, module in pagedlit.kernels._MODULES.items()
    }
