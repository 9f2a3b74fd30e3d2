"""The package as a user meets it: a cheap import, one version, and a wheel and an sdist that work in empty environments."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import pagedlit

ROOT = Path(__file__).parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*cache", ".git", ".triton-*", ".whl", ".venv", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "_proc", "_docs")


def clean_environment() -> dict[str, str]:
    """The environment without anything that points Python at this checkout, and without the network's models."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))}
    return env | {"HF_HUB_OFFLINE": "1"}


def python(code: str, *flags: str) -> str:
    """What a fresh process prints that runs `code` against this checkout."""
    env = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *flags, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_settings_ini_is_the_one_place_of_the_version(settings):
    written = re.search(r'^__version__ = "(.*)"$', (ROOT / "pagedlit/__init__.py").read_text(), re.MULTILINE)
    assert written and written[1] == settings["version"]
    for file in ("setup.py", "pyproject.toml", "Makefile", ".ci/constraints.txt"):
        assert not re.search(r"(?<![\d.=])" + re.escape(settings["version"]) + r"(?![\d.])", (ROOT / file).read_text()), file


def test_requirements_leave_nbdev_to_developers(settings):
    names = {re.match(r"[\w-]+", r)[0] for r in settings["requirements"].split()}
    assert names == {"torch", "transformers", "triton", "numpy", "tqdm", "typer"}
    source = "".join(p.read_text() for p in (ROOT / "pagedlit").rglob("*.py"))
    assert not re.search(r"^\s*(?:import|from)\s+(?:nbdev|fastcore|execnb)\b", source, re.MULTILINE)


def test_every_direct_requirement_has_a_tested_version(settings):
    pinned = {re.match(r"[\w-]+", line)[0].lower() for line in (ROOT / ".ci/constraints.txt").read_text().splitlines() if line[0] != "#"}
    wanted = " ".join(settings[key] for key in ("requirements", "notebook_requirements", "dev_requirements")).split()
    assert {re.match(r"[\w-]+", r)[0] for r in wanted} <= pinned


def test_import_is_cheap():
    timed = "import sys, time; t = time.perf_counter(); import pagedlit; print(time.perf_counter() - t)"
    assert min(float(python(timed)) for _ in range(5)) < 0.2
    heavy = python("import sys, pagedlit; dir(pagedlit); print([m for m in ('torch', 'numpy', 'transformers', 'triton') if m in sys.modules])")
    assert heavy == "[]"


def test_public_names_resolve_lazily():
    assert python("import sys, pagedlit; pagedlit.SamplingParams(); print('torch' in sys.modules)") == "False"
    assert python("import pagedlit; from pagedlit.llm import LLM; print(pagedlit.LLM is LLM, 'LLM' in vars(pagedlit))") == "True True"
    assert python("from pagedlit import CompletionOutput, RequestOutput; print(RequestOutput.__name__)") == "RequestOutput"
    assert python("import pagedlit; print(hasattr(pagedlit, 'Nothing'), set(pagedlit.__all__) <= set(dir(pagedlit)))") == "False True"


def test_type_checkers_see_the_names_that_are_looked_up_lazily():
    """The `if TYPE_CHECKING:` imports and the table behind `__getattr__` say the same; cli.py, under mypy, uses them as types."""
    nodes = ast.walk(ast.parse((ROOT / "pagedlit/__init__.py").read_text()))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1]
    typed = {alias.name: f"pagedlit.{node.module}" for node in imports for alias in node.names}
    assert typed == pagedlit._PUBLIC and set(typed) == set(pagedlit.__all__)


def test_readme_is_rendered_from_the_index():
    subprocess.run([sys.executable, ROOT / ".ci/readme.py", "--check"], check=True)


def test_kernel_hub_project_links_to_the_package():
    link = ROOT / "kernels/torch-ext/paged_attention"
    assert link.is_symlink() and link.resolve() == ROOT / "pagedlit/kernels"
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that is built from it, from a copy of this tree."""
    tree, out = tmp_path_factory.mktemp("build") / "pagedlit", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


@pytest.mark.install
def test_wheel_holds_the_library_and_the_model_and_nothing_else(distributions):
    names = zipfile.ZipFile(distributions["wheel"]).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pagedlit"}
    assert any(name.startswith("pagedlit/tiny/") and name.endswith(".safetensors") for name in names)
    assert {"pagedlit/py.typed", "pagedlit/tiny/model/config.json", "pagedlit/kernels/__init__.py"} <= set(names)
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "pagedlit").rglob("*.py")}
    assert sources <= set(names)
    assert not any("/tests/" in name or name.endswith((".ipynb", ".pyc")) for name in names)


@pytest.mark.install
def test_sdist_holds_the_book(distributions):
    names = {name.split("/", 1)[-1] for name in tarfile.open(distributions["sdist"]).getnames()}
    assert {"settings.ini", "LICENSE", "README.md", "nbs/index.ipynb", "tests/test_packaging.py", ".ci/constraints.txt"} <= names
    assert not any(name.startswith((".venv", ".git", "build/")) for name in names)


@pytest.mark.install
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_demo_runs_in_an_empty_environment(kind, distributions, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    bin_dir = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    env = clean_environment()
    command = [bin_dir / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / ".ci/constraints.txt", distributions[kind]]
    subprocess.run(command, check=True, cwd=tmp_path, env=env)
    done = subprocess.run([bin_dir / "pagedlit", "demo"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "block" in done.stdout
    shutil.rmtree(tmp_path / "env")  # torch and triton are large
