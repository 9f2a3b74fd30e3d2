"""These tests run only where Triton interprets: tests/test_kernels.py starts them.

`PAGEDLIT_KERNELS=folder` runs them on the kernels of a Kernel Hub project instead: what `kernels.get_local_kernel` loads from there takes
the place of `pagedlit.kernels`, before any test imports it.
"""

import importlib
import os
import sys
from pathlib import Path

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def put_in_place(folder: str) -> None:
    """Load the kernels from a folder, under every name by which the tests know them."""
    from kernels import get_local_kernel

    import pagedlit

    loaded = get_local_kernel(Path(folder))
    names = sorted(path.stem for path in Path(loaded.__file__).parent.glob("*.py") if path.stem != "__init__")
    sys.modules["pagedlit.kernels"] = pagedlit.kernels = loaded
    for name in names:
        sys.modules[f"pagedlit.kernels.{name}"] = importlib.import_module(f".{name}", loaded.__name__)


if os.environ.get("PAGEDLIT_KERNELS"):
    put_in_place(os.environ["PAGEDLIT_KERNELS"])
