"""Settings of all tests."""

import os

import pytest

# Tests import torch before zoo_common does; see zoo_common/__init__.py for why this is off.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test marked ``cards(N)`` where the device of the tests has fewer than N."""
    kind = os.environ.get("ZOO_TEST_DEVICE", "cpu")
    mark = item.get_closest_marker("cards")
    if mark is None or kind == "cpu":
        return
    from zoo_common import device

    if device.count(kind) < mark.args[0]:
        pytest.skip(f"needs {mark.args[0]} {kind} cards, and there are {device.count(kind)}")
