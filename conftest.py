"""Settings of all tests."""

import os

import pytest

# Tests import torch before zoo_common does; see zoo_common/__init__.py for why this is off.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

# Helpers whose assertions shall tell what they compared, as those of tests do.
pytest.register_assert_rewrite(
    "detector_runs", "predict_runs", "config_checks", "rank_runs", "script_runs"
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what this machine cannot run: a test for more cards, or for the simulated NPU."""
    if item.get_closest_marker("simulator"):
        from npu_sim import build

        if reason := build.reason_against():
            pytest.skip(reason)
    kind = os.environ.get("ZOO_TEST_DEVICE", "cpu")
    mark = item.get_closest_marker("cards")
    if mark is None or kind == "cpu":
        return
    from zoo_common import device

    if device.count(kind) < mark.args[0]:
        pytest.skip(f"needs {mark.args[0]} {kind} cards, and there are {device.count(kind)}")
