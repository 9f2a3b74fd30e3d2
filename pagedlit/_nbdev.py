"""Mends the build of the documentation; settings.ini names it under `procs`, and nothing else uses it.

nbdev's writer of notebooks takes every value under the key `source` for the text of a cell. In the state of a
linked widget that value is a list, and the build fails. A list that answers `splitlines` passes unchanged.
"""


class _Lines(list[object]):
    """A list that stands where text is expected."""

    def splitlines(self, keepends: bool = False) -> list[object]:
        return list(self)


def _mend(node: object) -> None:
    """Replace each list under a key `source`, at any depth below `node`."""
    if isinstance(node, dict):
        for key, value in node.items():
            _mend(value)
            if key == "source" and isinstance(value, list):
                node[key] = _Lines(value)


class WidgetState:
    """The nbdev processor: mends the metadata of a notebook when all of its cells are processed."""

    def __init__(self, nb: dict[str, object]) -> None:
        self.nb = nb

    def end(self) -> None:
        _mend(self.nb["metadata"])
