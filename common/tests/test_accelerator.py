"""zoo_common on the accelerator that the tests run on, in this process.

``bash ci/test_npu_sim.sh common/tests/test_accelerator.py`` runs this on the simulated NPU; without
one it is skipped. What does not depend on the device is tested in test_device.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zoo_common import device as devices
from zoo_common.errors import UserError

KIND = os.environ.get("ZOO_TEST_DEVICE", "cpu")

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(KIND == "cpu", reason="for accelerators: run bash ci/test_npu_sim.sh"),
]


@pytest.fixture
def card() -> Iterator[torch.device]:
    """Card 0, the current one before and after."""
    first = devices.resolve(KIND)
    devices.configure(first)
    yield first
    devices.configure(first)


def test_auto_takes_it(card: torch.device) -> None:
    assert devices.resolve("auto") == card == torch.device(KIND, 0)
    count = devices.count(KIND)
    assert count >= 1
    with pytest.raises(UserError, match=rf"Device {KIND}:{count} is not there: this machine shows"):
        devices.resolve(KIND, index=count)


def test_it_is_described(card: torch.device) -> None:
    assert devices.describe(card).startswith(f"{KIND}:0 ")
    assert devices.describe(card).endswith(" GB")
    assert f"torch_{KIND}" in devices.versions()


@pytest.mark.cards(2)
def test_the_chosen_card_is_the_current_one(card: torch.device) -> None:
    second = devices.resolve(f"{KIND}:1")
    devices.configure(second)
    assert torch.ones(1, device=KIND).device == second


def test_switches_reach_it(card: torch.device) -> None:
    module = torch.get_device_module(card)
    before = module.conv.allow_hf32, module.matmul.allow_hf32
    try:
        applied = devices.configure(card, float32="fp32")
        assert (module.conv.allow_hf32, module.matmul.allow_hf32) == (False, False)
        assert module.is_jit_compile_false()
        assert all(switch.reason for switch in applied)
        devices.configure(card, float32="hf32", jit_compile="on")
        assert (module.conv.allow_hf32, module.matmul.allow_hf32) == (True, True)
        assert not module.is_jit_compile_false()
    finally:
        module.conv.allow_hf32, module.matmul.allow_hf32 = before


def test_seeds_are_its_own(card: torch.device) -> None:
    drawn = {}
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        devices.seed_everything(seed, rank)
        drawn[seed, rank] = torch.rand((), device=card).item()
        devices.seed_everything(seed, rank)
        assert torch.rand((), device=card).item() == drawn[seed, rank]
    assert len(set(drawn.values())) == 3


def test_memory_in_use_has_a_peak(card: torch.device) -> None:
    devices.synchronize(card)
    devices.reset_peak_memory(card)
    before = devices.peak_memory_mb(card)
    block = torch.ones(64 * 2**18, device=card)  # 64 MiB
    assert 64 <= devices.peak_memory_mb(card) - before < 80
    assert block.sum().item() == len(block)
    del block
    devices.reset_peak_memory(card)
    assert devices.peak_memory_mb(card) - before < 1


def test_a_profile_is_written(card: torch.device, tmp_path: Path) -> None:
    with devices.profiler(card, tmp_path / "on", 2, 3) as step:
        for _ in range(8):
            with torch.profiler.record_function("a training step"):
                torch.ones(8, device=card).sum()
            step()
    (trace,) = (tmp_path / "on").rglob("trace_view.json")
    events = json.loads(trace.read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    assert len([event for event in events if event.get("name") == "a training step"]) == 2


FULL = """
import torch
from zoo_common import device as devices

def main(argv):
    card = devices.resolve("npu")
    torch.ones(1, device=card)
    torch.empty(5 * 2**26, device=card)
"""


@pytest.mark.skipif("NPU_SIM_CARDS" not in os.environ, reason="real cards have what they have")
def test_a_full_card_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text(FULL)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "zoo_common.worker", "full"],
        env={**os.environ, "NPU_SIM_MEMORY": str(2**29), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: The card has no memory for 1.25 GiB more: take a smaller --batch_size, or half "
        "precision with --amp=O1 or O2."
    )
