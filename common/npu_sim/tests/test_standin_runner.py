"""``python -m npu_sim``: what the command finds, and what is said of wrong options."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import npu_sim

SHOW = (
    "import json, os; print(json.dumps({name: os.environ.get(name) for name in "
    "('NPU_SIM_CARDS', 'NPU_SIM_MEMORY', 'NPU_SIM_NATIVE', 'ZOO_TEST_DEVICE', "
    "'CUDA_VISIBLE_DEVICES', 'TORCH_DEVICE_BACKEND_AUTOLOAD', 'PYTHONPATH')}))"
)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    outside = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("NPU_SIM_") and name != "PYTHONPATH"
    }
    return subprocess.run(
        [sys.executable, "-m", "npu_sim", *arguments],
        env={**outside, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_variables() -> None:
    done = run("--cards", "1", "--memory", "1.5G", "python", "-c", SHOW, PYTHONPATH="/mine:/other")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "simulated NPU: 1 card of 1.5 GB; nothing here ran on hardware\n"
    found = eval(done.stdout, {"null": None})
    assert found == {
        "NPU_SIM_CARDS": "1",
        "NPU_SIM_MEMORY": str(3 * 2**29),
        "NPU_SIM_NATIVE": None,
        "ZOO_TEST_DEVICE": "npu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "PYTHONPATH": f"{Path(npu_sim.__file__).parent / 'standin'}:/mine:/other",
    }


def test_defaults_and_children() -> None:
    done = run(
        "bash", "-c", f"exec '{sys.executable}' -m npu_sim --native 2.6 python -c \"$0\"", SHOW
    )
    assert done.returncode == 0, done.stderr
    assert "2 cards of 64 GB" in done.stderr
    found = eval(done.stdout, {"null": None})
    assert (found["NPU_SIM_CARDS"], found["NPU_SIM_NATIVE"]) == ("2", "2.6")
    # The stand-in is on the path once, however often the runner is nested.
    assert found["PYTHONPATH"].split(os.pathsep) == [found["PYTHONPATH"]]


def test_a_program_sees_npus() -> None:
    code = (
        "import torch; from importlib.metadata import version\n"
        "assert torch.version.cuda is None\n"
        "import torch_npu\n"
        "print(torch_npu.__version__, version('torch-npu'), torch.npu.device_count(),\n"
        "      torch.npu.get_device_properties(0).total_memory, torch.ones(2).npu().device)"
    )
    done = run("--cards", "3", "--memory", "2G", "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2.14.0+simulated"] * 2 + ["3", str(2**31), "npu:0"]


@pytest.mark.parametrize(
    ("version", "ways"), [("2.1", {"decomposed", "cpu_fallback"}), ("2.14", {"native"})]
)
def test_only_the_kernels_of_a_version(version: str, ways: set[str]) -> None:
    code = (
        "import torch, torch_npu, npu_sim\n"
        "with npu_sim.record() as recording:\n"
        "    numbers = torch.ones(2, dtype=torch.int32, device='npu')\n"
        "    torch.bitwise_left_shift(numbers, numbers)\n"
        "print({operator.name: operator.way for operator in recording.operators})"
    )
    done = run("--native", version, "python", "-W", "ignore", "-c", code)
    found = eval(done.stdout)
    assert {found[name] for name in found if "shift" in name} == ways, found


def test_the_command_keeps_its_exit_code_and_signals() -> None:
    assert run("python", "-c", "raise SystemExit(7)").returncode == 7
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert run("python3", "-c", code).returncode == -signal.SIGTERM
    # An option after the command is the command's.
    assert run("python", "-c", "import sys; print(sys.argv[1:])", "--cards", "9").stdout == (
        "['--cards', '9']\n"
    )


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'NPU_SIM_CARDS' in os.environ:\n    print('mine ran')\n"
    )
    done = run("python", "-c", "pass", PYTHONPATH=str(tmp_path))
    assert done.stdout == "mine ran\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command was given; add one, as in: python -m npu_sim python train.py."),
        (["--memory", "64Q", "python"], "64Q is no amount of memory such as 64G or 512M."),
        (["--memory", "0G", "python"], "0G is no amount of memory"),
        (["--cards", "two", "python"], "two is no number of cards from 0 to 16."),
        (["--cards", "17", "python"], "17 is no number of cards from 0 to 16."),
        (
            ["--native", "1.8", "python"],
            "1.8 is no recorded version of torch_npu; choose one of 2.",
        ),
        (["--card", "1", "python"], "--card"),
        (["no-such-command", "x"], "the command no-such-command was not found"),
        (["./README.md"], "may not be executed"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("npu_sim: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("--cards", "--memory", "--native", "Nothing runs on hardware", "train.py"):
        assert word in done.stdout


def test_environment() -> None:
    variables = npu_sim.environment(cards=0, memory=2**30)
    assert (variables["NPU_SIM_CARDS"], variables["NPU_SIM_MEMORY"]) == ("0", str(2**30))
    assert set(os.environ) - set(variables) <= {"NPU_SIM_MEMORY", "NPU_SIM_NATIVE"}
    for options in ({"cards": -1}, {"cards": 17}, {"memory": 0}):
        with pytest.raises(ValueError, match="must be"):
            npu_sim.environment(**options)
