"""Order of the tests: those that install the distributions come last."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models of the tests are tiny: a second thread only waits


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the order, except that the slow install tests move to the end."""
    items.sort(key=lambda item: item.get_closest_marker("install") is not None)
