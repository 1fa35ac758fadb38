"""The simulated device works beside the other tests, which run on the CPU in this process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import npu_sim

TESTS = Path(__file__).parent
HANDFUL = (
    "test_device_basics.py::test_a_training_step_has_the_numbers_of_the_cpu",
    "test_device_basics.py::test_devices_do_not_mix",
    "test_device_memory.py::test_beyond_the_limit",
    "test_device_random.py::test_the_generator_of_the_cpu_is_left_alone",
    "test_device_recording.py::test_operators_are_those_of_torch_npu",
    "test_device_recording.py::test_waits",
    "test_device_processes.py",
)


@pytest.mark.simulator
@pytest.mark.skipif("NPU_SIM_CARDS" in os.environ, reason="this process has the device")
def test_a_handful_of_its_tests() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [str(TESTS / test) for test in HANDFUL],
        env={**npu_sim.environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
