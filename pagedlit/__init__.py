"""Paged attention you can read and run: `from pagedlit import LLM, SamplingParams`.

`import pagedlit` is cheap: the public names are looked up on first use, and only `LLM` and the
outputs load torch. The floors of the package, each importing only those before it:
`memory`, `serving` (both standard library alone), `kernels`, `compute`, and on top `llm` and `cli`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "pagedlit.llm",
    "SamplingParams": "pagedlit.serving.sequence",
    "BeamSearchParams": "pagedlit.serving.beam_search",
    "BeamSearchOutput": "pagedlit.serving.beam_search",
    "RequestOutput": "pagedlit.llm",
    "CompletionOutput": "pagedlit.llm",
}

__all__ = ["LLM", "SamplingParams", "BeamSearchParams", "BeamSearchOutput", "RequestOutput", "CompletionOutput"]

if TYPE_CHECKING:
    from .llm import LLM, CompletionOutput, RequestOutput
    from .serving.beam_search import BeamSearchOutput, BeamSearchParams
    from .serving.sequence import SamplingParams
else:  # hidden from type checkers, for which any misspelt name would exist otherwise

    def __getattr__(name: str) -> object:
        """Import the module that defines a public name, once, at the first use of that name."""
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
