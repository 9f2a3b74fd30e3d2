#!/usr/bin/env python
"""Build the Kernel Hub project of `kernels/` as Hugging Face's kernel-builder does for kernels without compiled parts.

    python .ci/hub.py                # writes kernels/build/torch-cpu and kernels/build/torch-cuda
    python .ci/hub.py ../project     # writes them into another folder's build/

What is built loads with `kernels.get_local_kernel(Path("kernels"))`. A variant is the Python package itself, with a `metadata.json` beside it.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def settings(project: Path) -> dict[str, Any]:
    """build.toml."""
    try:
        import tomllib as toml
    except ModuleNotFoundError:  # Python 3.10; tomlkit comes with `kernels`
        import tomlkit as toml
    return toml.loads((project / "build.toml").read_text(encoding="utf-8"))


def build(project: Path = ROOT / "kernels", out: Path | None = None) -> list[Path]:
    """Write a variant for each backend of `project` into `out`/build; returns their folders."""
    config = settings(project)
    general, suffixes = config["general"], {f".{ext}" for ext in config["torch-noarch"]["pyext"]}
    package = general["name"].replace("-", "_")
    source = project / "torch-ext" / package
    files = sorted(path for path in source.rglob("*") if path.suffix in suffixes and path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:10]
    variants = []
    for backend in general["backends"]:
        variant = (out or project) / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for path in files:
            target = variant / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        facts = {name: general[name] for name in ("name", "version", "license")}
        facts |= {"id": f"_{package}_{backend}_{digest}", "python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


if __name__ == "__main__":
    for folder in build(out=Path(sys.argv[1]) if len(sys.argv) > 1 else None):
        print(folder)
