"""What people meet who set up an NPU: through the doctor and the launcher, with stand-ins.

Each machine is a torch_npu that fails as the real one was seen to fail, beside torch made to look
like its CPU build, and a file system with or without CANN, a driver and cards.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from zoo_common import versions_npu
from zoo_common.doctor.npu import judge_visible

TESTS = Path(__file__).parent
CPU_BUILD = TESTS.parent / "npu_sim/npu_sim/standin/sitecustomize.py"

MISSING = """
import os, pathlib
paths = os.environ.get("LD_LIBRARY_PATH", "").split(":")
if not any(pathlib.Path(path, "{0}").exists() for path in paths if path):
    text = "{0}: cannot open shared object file: No such file or directory"
    raise ImportError(text, name="_C", path="torch_npu/_C.so")
"""
WORKS = """
import types
import torch
npu = types.ModuleType("torch.npu")
npu.device_count = lambda: {0}
npu.get_device_name = lambda device: "Ascend910B2"
npu.get_device_properties = lambda device: types.SimpleNamespace(total_memory=64 * 2**30)
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
"""


class Findings(NamedTuple):
    """What the doctor said: its exit code, and its lines by part."""

    code: int
    document: dict[str, Any]

    def of(self, part: str, status: str | None = None) -> str:
        """Texts and advice of a part, of one status if asked for."""
        return "\n".join(
            f"{line['text']} -> {line['advice']}"
            for line in self.document["lines"]
            if line["part"] == part and status in (None, line["status"])
        )


class NpuMachine:
    """A machine to be: a directory for packages and one that stands for /."""

    def __init__(self, path: Path) -> None:
        self.site, self.root = path / "site", path / "root"
        self.site.mkdir()
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("ASCEND", "HCCL", "NPU"))},
            "PYTHONPATH": str(self.site),
            "ZOO_NPU_ENV_ROOT": str(self.root),
            "HOME": str(path / "home"),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        for name in ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD", "ZOO_TEST_DEVICE"):
            self.environ.pop(name, None)

    def install_torch_npu(self, code: str, version: str = "2.14.0", cpu_build: bool = True) -> None:
        """A package torch_npu that runs ``code``, loaded by torch itself as the real one is."""
        (self.site / "torch_npu").mkdir()
        (self.site / "torch_npu/__init__.py").write_text(code + "\ndef _autoload():\n    pass\n")
        info = self.site / f"torch_npu-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu=torch_npu:_autoload\n")
        if cpu_build:
            shutil.copy(CPU_BUILD, self.site)

    def install_cann(self, version: str, *libraries: str, sourced: bool = False) -> Path:
        """CANN with these libraries and a set_env.sh; returns its home."""
        base = self.root / "usr/local/Ascend/ascend-toolkit"
        home = base / "latest"
        (home / "lib64").mkdir(parents=True)
        for library in libraries:
            (home / "lib64" / library).touch()
        (home / "ascend_toolkit_install.info").write_text(f"version={version}\n")
        (base / "set_env.sh").write_text(
            f'echo sourcing\nexport ASCEND_HOME_PATH="{home}"\n'
            f'export LD_LIBRARY_PATH="{home}/lib64:${{LD_LIBRARY_PATH}}"\n'
        )
        if sourced:
            self.environ |= {
                "ASCEND_HOME_PATH": str(home),
                "LD_LIBRARY_PATH": str(home / "lib64"),
            }
        return home

    def install_driver(self, version: str, cards: int, smi: str = "") -> None:
        """A driver's version file, device files of cards, and npu-smi."""
        for part in ("driver", "firmware"):
            info = self.root / f"usr/local/Ascend/{part}/version.info"
            info.parent.mkdir(parents=True)
            info.write_text(f"Version={version}\n")
        (self.root / "dev").mkdir()
        for card in range(cards):
            (self.root / f"dev/davinci{card}").touch()
        (self.root / "dev/davinci_manager").touch()
        program = self.root / "usr/local/sbin/npu-smi"
        program.parent.mkdir(parents=True)
        says = smi or f"printf '\\tTotal Count                    : {cards}\\n'"
        program.write_text(f"#!/bin/sh\n{says}\n")
        program.chmod(0o755)

    def run(self, *words: str, cwd: Path = TESTS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=cwd,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def doctor(self, *words: str) -> Findings:
        done = self.run("-m", "zoo_common.doctor", "--json", *words)
        assert done.stdout, done.stderr
        return Findings(done.returncode, json.loads(done.stdout))

    def launch_error(self, tmp_path: Path) -> str:
        """What the launcher says instead of starting; one sentence and no traceback."""
        toy = tmp_path / "toy model"
        shutil.copytree(TESTS / "toy", toy, ignore=shutil.ignore_patterns("output"))
        done = self.run("-m", "zoo_common.launch", "train_1p", "--device=npu", cwd=toy)
        assert done.returncode == 2, done.stdout + done.stderr
        (sentence,) = done.stderr.strip().splitlines()
        assert sentence.startswith("error: Device npu cannot be used: ")
        return sentence


@pytest.fixture
def machine(tmp_path: Path) -> NpuMachine:
    path = tmp_path / "a machine"
    path.mkdir()
    return NpuMachine(path)


def test_a_machine_that_works_has_no_problem(machine: NpuMachine) -> None:
    machine.install_torch_npu(MISSING.format("libhccl.so") + WORKS.format(2), "2.14.0")
    machine.install_cann("9.1.0", "libhccl.so", sourced=True)
    machine.install_driver("26.0.RC1", 2)
    machine.environ["ASCEND_RT_VISIBLE_DEVICES"] = "0,1"
    found = machine.doctor("--device=npu")
    problems = [line for line in found.document["lines"] if line["status"] == "problem"]
    assert (found.code, problems) == (0, [])
    assert (found.document["device"], found.document["ok"]) == ("npu", True)
    assert "npu:0 Ascend910B2, 64 GB" in found.of("torch_npu", "ok")
    assert "no CANN is documented for torch_npu 2.14.0" in found.of("CANN", "note")
    assert "26.0.RC1, firmware 26.0.RC1: fits CANN 9.1.0" in found.of("driver", "ok")
    assert "the driver shows 2" in found.of("cards") and "torch_npu shows 2" in found.of("cards")
    assert "counts 2" in found.of("npu-smi", "ok")
    assert "sourced" in found.of("set_env", "ok") and "libhccl.so found" in found.of("HCCL", "ok")
    assert machine.doctor().document["device"] == "npu"


def test_torch_npu_without_cann(machine: NpuMachine, tmp_path: Path) -> None:
    machine.install_torch_npu(MISSING.format("libhccl.so"))
    found = machine.doctor()
    assert found.code == 1
    assert "CANN is not: libhccl.so is missing" in found.of("torch_npu", "problem")
    assert "no CANN found" in found.of("CANN", "problem")
    assert "install CANN 9.1" in found.of("CANN")
    assert "a plain `import torch` fails here as well" in found.of("autoload", "note")
    assert "CANN is not: libhccl.so is missing" in machine.launch_error(tmp_path)


def test_a_failing_autoload_does_not_reach_the_zoo(machine: NpuMachine, tmp_path: Path) -> None:
    """Torch imports torch_npu by itself, which fails for good; the zoo is not harmed by it."""
    machine.install_torch_npu(MISSING.format("libhccl.so"))
    machine.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
    alone = machine.run("-c", "import torch")
    assert "Failed to load the backend extension: torch_npu" in alone.stderr
    assert machine.doctor("--device=cpu").code == 0
    assert "libhccl.so is missing" in machine.launch_error(tmp_path)


@pytest.mark.parametrize("library", ["libascendcl.so", "libge_runner.so"])
def test_cann_that_lacks_a_library(machine: NpuMachine, tmp_path: Path, library: str) -> None:
    machine.install_torch_npu(MISSING.format(library), "2.12.0")
    shutil.rmtree(machine.site / "torch_npu-2.12.0.dist-info")
    machine.install_cann("9.1.0", "libhccl.so", sourced=True)
    found = machine.doctor()
    assert found.code == 1
    assert f"does not bring {library}" in found.of("torch_npu", "problem")
    assert f"does not bring {library}" in machine.launch_error(tmp_path)


def test_cann_that_is_not_sourced(machine: NpuMachine, tmp_path: Path) -> None:
    """The doctor looks at what a run's script would see, since that sources it."""
    machine.install_torch_npu(MISSING.format("libhccl.so") + WORKS.format(1))
    machine.install_cann("9.1.0", "libhccl.so")
    machine.install_driver("26.0.RC1", 1)
    sentence = machine.launch_error(tmp_path)
    assert "libhccl.so is not found, since" in sentence and "was not sourced" in sentence
    found = machine.doctor()
    assert found.code == 0, found.document
    assert "is not sourced in this shell" in found.of("set_env", "note")
    assert "npu:0 Ascend910B2" in found.of("torch_npu", "ok")
    assert "libhccl.so found" in found.of("HCCL", "ok")


def test_cuda_build_of_torch(machine: NpuMachine, tmp_path: Path) -> None:
    machine.install_torch_npu("import os; os.abort()", cpu_build=False)
    (machine.site / "sitecustomize.py").write_text(
        CPU_BUILD.read_text().replace("module.cuda = None", "module.cuda = '13.0'")
    )
    found = machine.doctor()
    assert found.code == 1
    assert "CUDA 13.0 build" in found.of("torch")
    assert "aborts the process -> install the CPU build" in found.of("torch_npu", "problem")
    assert "is a CUDA build" in machine.launch_error(tmp_path)


def test_an_import_that_aborts_is_told_and_survived(machine: NpuMachine) -> None:
    machine.install_torch_npu("import os; os.abort()")
    found = machine.doctor()
    assert found.code == 1
    assert "its import was ended by SIGABRT" in found.of("torch_npu", "problem")
    assert found.of("torchvision", "ok")
    assert found.of("data", "ok")


def test_no_card(machine: NpuMachine, tmp_path: Path) -> None:
    machine.install_torch_npu(WORKS.format(0))
    machine.install_driver("26.0.RC1", 0)
    machine.environ["ASCEND_RT_VISIBLE_DEVICES"] = "1, 0"
    found = machine.doctor("--device=npu")
    assert found.code == 1
    assert "the driver shows no card" in found.of("torch_npu", "problem")
    assert "the driver shows none (no /dev/davinci0)" in found.of("cards", "problem")
    assert found.of("ASCEND_RT_VISIBLE_DEVICES", "problem")
    assert not found.of("autoload")
    assert "the driver shows no card" in machine.launch_error(tmp_path)


@pytest.mark.simulator
def test_no_card_on_the_simulated_npu() -> None:
    words = ["-m", "npu_sim", "--cards", "0", "python", "-m", "zoo_common.doctor", "--json"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240)
    found = Findings(done.returncode, json.loads(done.stdout))
    assert found.code == 1
    assert "the driver shows no card" in found.of("torch_npu", "problem")


def test_versions_that_do_not_fit(machine: NpuMachine, tmp_path: Path) -> None:
    machine.install_torch_npu("raise AssertionError('not to be imported')", "2.13.0")
    found = machine.doctor()
    assert found.code == 1
    assert "2.13.0, made for torch 2.13.0, and this is torch 2.14" in found.of("torch_npu")
    assert "torch-npu==2.14.0" in found.of("torch_npu", "problem")
    assert "torch_npu 2.13.0 is made for torch 2.13" in machine.launch_error(tmp_path)


def test_cann_that_is_too_old(machine: NpuMachine, tmp_path: Path) -> None:
    machine.install_torch_npu("raise ImportError('libtorch_npu.so: undefined symbol: aclrtX')")
    machine.install_cann("8.0.0", "libhccl.so", sourced=True)
    machine.install_driver("23.0.3", 1)
    found = machine.doctor()
    assert found.code == 1
    assert "CANN 8.0.0 is too old for torch_npu 2.14.0 (from 8.5 on)" in found.of("CANN", "problem")
    assert "CANN 8.0.0 is too old for torch_npu 2.14.0" in found.of("torch_npu", "problem")
    sentence = machine.launch_error(tmp_path)
    assert "CANN 8.0.0 is too old for torch_npu 2.14.0" in sentence and "install CANN" in sentence


def test_a_gpu_is_the_accelerator(machine: NpuMachine, tmp_path: Path) -> None:
    machine.install_torch_npu(
        "raise RuntimeError('Two accelerators cannot be used at the same time in PyTorch: npu and "
        "cuda. You can reinstall the cpu version of PyTorch')"
    )
    found = machine.doctor()
    assert found.code == 1
    assert "torch allows none beside torch_npu 2.14.0" in found.of("torch_npu", "problem")
    assert "install the CPU build of torch" in machine.launch_error(tmp_path)


def test_a_driver_that_hangs_is_given_up(
    machine: NpuMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo_common.doctor import Machine, npu

    machine.install_driver("22.0.1", 1, smi="sleep 60")
    machine.install_cann("9.1.0", "libhccl.so")
    monkeypatch.setattr(npu, "_NPU_SMI_S", 0.3)
    here = Machine("npu", environ=machine.environ)
    here.__dict__["facts"] = {}  # torch plays no part in this
    assert "no answer" in npu.npu_smi(here).text
    (line,) = npu.driver(here)
    assert (line.status, "too old for CANN 9.1.0" in line.text) == ("problem", True)
    (machine.root / "dev/davinci0").chmod(0)
    if os.geteuid():  # root may open anything
        assert "may not open davinci0" in npu.cards(here)[0].text


def test_a_laptop_has_no_problem_and_npu_asked_for_is_one(machine: NpuMachine) -> None:
    found = machine.doctor()
    assert (found.code, found.document["device"]) == (0, "cpu")
    assert "not a machine for NPUs" in found.of("NPU", "note")
    asked = machine.doctor("--device=npu")
    assert asked.code == 1
    assert "pip install torch==2.14.0+cpu" in asked.of("torch_npu", "problem")


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("0", "ok"),
        ("0,3,7", "ok"),
        ("7,3", "problem"),
        ("1,1", "problem"),
        ("0, 1", "problem"),
        ("", "problem"),
        ("0,8", "problem"),
        ("0,x", "problem"),
    ],
)
def test_visible_devices(value: str, status: str) -> None:
    assert judge_visible(value, 8, "problem").status == status


def test_versions_are_ordered_and_found() -> None:
    rising = ["8.0.RC2", "8.0.RC3", "8.0.0", "8.3.RC1", "8.5.0", "9.1.0-beta.3", "9.1.0", "9.1.1"]
    keys = [versions_npu.order(version) for version in rising]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)  # type: ignore[type-var]
    assert versions_npu.order("unknown") is None
    assert versions_npu.find("2.14.0+simulated") == versions_npu.RELEASES[0]
    assert versions_npu.cann_for("2.7.1.post8") == "9.1.0"
    assert versions_npu.cann_for("2.7.1.post11") == "9.1"
    assert versions_npu.cann_for("2.6.0") == "8.2.RC1"
    assert versions_npu.torchvision_for("2.6.0") == "0.21"


@pytest.mark.parametrize(
    ("torch_npu", "cann", "status"),
    [
        ("2.12.0", "9.1.0", "ok"),
        ("2.12.0", "8.5.0", "ok"),
        ("2.12.0", "9.1.1", "ok"),
        ("2.12.0", "8.3.RC1", "problem"),
        ("2.12.0", "10.0.0", "note"),
        ("2.6.0", "8.3.RC1", "ok"),
        ("2.6.0", "8.0.RC1", "problem"),
        ("2.6.0", "8.5.0", "note"),
        ("2.14.0", "9.1.0", "note"),
        ("2.14.0", "8.3.RC1", "problem"),
        ("2.12.0", "weird", "note"),
    ],
)
def test_which_cann_fits(torch_npu: str, cann: str, status: str) -> None:
    assert versions_npu.judge_cann(torch_npu, cann).status == status
