"""Which kernels are tested: those of the package, or those of the folder that PAGEDLIT_KERNELS names."""

import os
from pathlib import Path

import pagedlit
from pagedlit.kernels import cache_write, decode, extend


def test_where_from():
    folder = os.environ.get("PAGEDLIT_KERNELS") or Path(pagedlit.__file__).parent / "kernels"
    assert all(Path(module.__file__).is_relative_to(folder) for module in (cache_write, decode, extend))
    assert decode.require is cache_write.require and extend.store_result is decode.store_result, "modules of two packages are mixed"
    assert ("pagedlit" in decode.__name__) == ("PAGEDLIT_KERNELS" not in os.environ)
