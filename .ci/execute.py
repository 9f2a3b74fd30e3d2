#!/usr/bin/env python
"""Execute notebooks, each in a kernel process of its own, and store their outputs.

    python .ci/execute.py nbs/02_allocator.ipynb            # execute and store
    python .ci/execute.py --check nbs/*.ipynb               # execute only: fails where a cell fails

What is stored is a fixed point: executing again, or `nbdev_clean`, changes nothing unless an output changed.
A notebook whose title cell or front matter says `skip_exec: true` is left out, unless `--all` is given. A cell with
`#| eval: false`, or with one of the `tst_flags` of settings.ini that `--flags` does not name, keeps its outputs as they are.
"""

import argparse
import configparser
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}
MACHINE_PATH = re.compile(r"/(?:home|root|tmp|work|Users|opt|usr|var)/[\w.-]+|[A-Z]:\\\\|site-packages")


def kernel_environment(check: bool, scratch: str) -> dict[str, str]:
    """The environment of a kernel: this checkout first on the path, no network, no progress bars, no personal set-up."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "MPLBACKEND", "IN_TEST")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    env.update(
        IPYTHONDIR=scratch, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1",
        TOKENIZERS_PARALLELISM="false", PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1", COLUMNS="100", NO_COLOR="1",
        PYDEVD_DISABLE_FILE_VALIDATION="1",
    )  # fmt: skip
    return env | {"IN_TEST": "1"} if check else env


def skip_notebook(nb: nbformat.NotebookNode) -> bool:
    """Does the title cell or the front matter say `skip_exec: true`?"""
    head = "\n".join(c.source for c in nb.cells[:2] if c.cell_type in ("markdown", "raw"))
    return re.search(r"^(?:-\s+)?skip_exec:\s*true\s*$", head, re.MULTILINE) is not None


def skip_cell(source: str, flags: set[str]) -> bool:
    """Does a directive keep this cell from running? `flags` are the test flags that are switched on."""
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    off = set(config["DEFAULT"]["tst_flags"].split()) - flags
    directives = re.findall(r"^#\|\s*(.+?)\s*$", source, re.MULTILINE)
    return any(d in off or re.fullmatch(r"eval:\s*false", d) for d in directives)


def execute(nb: nbformat.NotebookNode, check: bool, timeout: int, flags: set[str]) -> None:
    """Run every cell of `nb` in a new kernel of this interpreter, in nbs/; raises CellExecutionError at the first failure."""
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        cell.metadata.pop("tags", None)
        if cell.cell_type == "code" and skip_cell(cell.source, flags):
            cell.metadata["tags"] = ["skip-execution"]
    # No kernel folders: the spec is then ipykernel's own, which starts this very interpreter.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        nb, km=manager, timeout=timeout, allow_errors=False, record_timing=False, coalesce_streams=True, store_widget_state=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(ROOT / "nbs")}},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        client.execute(env=kernel_environment(check, scratch))


def normalised(nb: nbformat.NotebookNode) -> str:
    """The text to store: cleaned as `nbdev_clean` does it, and with widget ids that do not change from run to run."""
    from nbdev.clean import clean_nb

    models = list(nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {}))  # in order of creation
    text = nbformat.writes(nb)
    for i, model_id in enumerate(models):
        text = text.replace(model_id, f"{i:032x}")
    nb = json.loads(text)  # here every multi-line text is a list of lines
    clean_nb(nb)
    nb["metadata"]["kernelspec"] = KERNELSPEC
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def problems(nb: dict) -> list[str]:
    """What a committed notebook must not hold: errors, warnings, paths of this machine, sources that are not lists of lines."""
    found = []
    for number, cell in enumerate(nb["cells"]):
        where = f"cell {number}: "
        if not isinstance(cell["source"], list) or any(not line.endswith("\n") for line in cell["source"][:-1]):
            found.append(where + "the source is not a list of lines")
        for output in cell.get("outputs", []):
            text = json.dumps({k: v for k, v in output.get("data", output).items() if not k.startswith("image/png")})
            if output["output_type"] == "error":
                found.append(where + "an error is stored")
            elif output.get("name") == "stderr":
                found.append(where + "stderr is stored: " + "".join(output["text"])[:200])
            elif "Warning:" in text:
                found.append(where + "a warning is stored")
            if path := MACHINE_PATH.search(text):
                found.append(where + "a path of this machine is stored: " + path.group())
    return found


def run(path: Path, check: bool, timeout: int, flags: set[str], everything: bool) -> bool:
    """Execute one notebook and, unless `check`, store it; returns whether all is well."""
    nb = nbformat.read(path, as_version=4)
    if skip_notebook(nb) and not everything:
        print(f"{path.name}: skipped (skip_exec)", flush=True)
        return True
    began = time.perf_counter()
    try:
        execute(nb, check, timeout, flags)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"{path.name}: FAILED\n{error}", flush=True)
        return False
    print(f"{path.name}: executed in {time.perf_counter() - began:.1f} s", flush=True)
    if check:
        return True
    text = normalised(nb)
    if text != path.read_text(encoding="utf-8"):
        path.write_text(text, encoding="utf-8")
    found = problems(json.loads(text))
    for problem in found:
        print(f"{path.name}: {problem}", flush=True)
    return not found


def main() -> int:
    """Read the command line and execute; 0 when every notebook is well."""
    parser = argparse.ArgumentParser(description="Execute notebooks and store their outputs.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="store nothing; only fail where a cell fails")
    parser.add_argument("--all", action="store_true", help="also the notebooks that say skip_exec")
    parser.add_argument("--flags", nargs="*", default=[], help="test flags to switch on (gpu, slow)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take")
    args = parser.parse_args()
    results = [run(path, args.check, args.timeout, set(args.flags), args.all) for path in args.notebooks]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
