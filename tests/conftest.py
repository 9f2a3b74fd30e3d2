"""What holds for all tests: one thread, a handler for Ctrl-C, and the install tests last."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models of the tests are tiny: a second thread only waits


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the order, except that the slow install tests move to the end."""
    items.sort(key=lambda item: item.get_closest_marker("install") is not None)


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """Python's own handler, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
