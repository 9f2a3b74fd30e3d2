"""Triton kernels as plain functions on tensors. Needs torch and triton, and nothing else of this package.

The functions that check their arguments are here; those that an engine calls are in the modules. Names are looked up when they are first
used, so that importing this package imports neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache_write import copy_blocks, write_kv
    from .cascade import paged_decode_shared
    from .decode import DecodeConfig, paged_decode
    from .extend import ExtendConfig, paged_extend

__all__ = ["DecodeConfig", "ExtendConfig", "copy_blocks", "paged_decode", "paged_decode_shared", "paged_extend", "write_kv"]

_MODULES = {
    "copy_blocks": "cache_write", "write_kv": "cache_write", "DecodeConfig": "decode", "paged_decode": "decode",
    "paged_decode_shared": "cascade", "ExtendConfig": "extend", "paged_extend": "extend",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    """What is there, and what can be looked up."""
    return sorted({*globals(), *__all__})
