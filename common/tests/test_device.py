"""Choosing a device, why one cannot be used, its switches; NPUs and GPUs are stand-ins here."""

import importlib.metadata
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zoo_common import device as devices
from zoo_common import npu_env
from zoo_common.errors import UserError

CPU = torch.device("cpu")
MakeNpu = Callable[..., None]

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def install_torch_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeNpu:
    """Writes a package torch_npu with the given code, beside a CPU build of torch 2.14.1."""

    def install(code: str, version: str = "2.14.0", torch_version: str = "2.14.1+cpu") -> None:
        package = tmp_path / "site/torch_npu"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        information = tmp_path / f"site/torch_npu-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Name: torch-npu\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch, "__version__", torch_version)
        monkeypatch.setenv(npu_env.ROOT_VARIABLE, str(tmp_path / "root"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_RT_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)

    # Another test of this process may have imported one, which must not be lost to the next.
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if of_torch_npu(name)}
    yield install
    for name in filter(of_torch_npu, list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(held)


def of_torch_npu(module: str) -> bool:
    return module.partition(".")[0] == "torch_npu"


def library_missing(name: str) -> str:
    text = f"{name}: cannot open shared object file: No such file or directory"
    return f"raise ImportError({text!r}, name='_C')"


def cards(number: int) -> str:
    return f"import types\nnpu = types.SimpleNamespace(device_count=lambda: {number})"


def why_not(name: str) -> str:
    with pytest.raises(UserError) as error:
        devices.resolve(name)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


@needs_no_gpu
@pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is not None, reason="this machine has torch_npu"
)
def test_cpu_is_taken_where_there_is_nothing_else() -> None:
    assert devices.resolve() == devices.resolve("cpu") == devices.resolve("CPU:0", 3) == CPU
    assert [devices.count(kind) for kind in ("npu", "cuda", "cpu")] == [0, 0, 1]


@pytest.mark.parametrize(
    "name", ["tpu", "", "npu:", "npu:-1", "npu:x", "cpu:1", "auto:1", "npu:1:2"]
)
def test_no_such_device(name: str) -> None:
    assert "choose auto, npu, cuda or cpu" in why_not(name)


def test_torch_npu_absent() -> None:
    if importlib.util.find_spec("torch_npu"):
        pytest.skip("this machine has torch_npu")
    message = why_not("npu")
    assert "torch_npu is not installed" in message
    assert "CPU build" in message and "torch==2.14.0+cpu" in message
    assert "torch-npu==2.14.0" in message


def test_cuda_build_of_torch_is_found_before_torch_npu_is_imported(
    install_torch_npu: MakeNpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_torch_npu("raise AssertionError('this import would have aborted the process')")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    message = why_not("npu")
    assert "torch 2.14.1+cpu is a CUDA build" in message
    assert "install the CPU build of torch" in message


def test_versions_that_do_not_fit(install_torch_npu: MakeNpu) -> None:
    install_torch_npu("raise AssertionError('not to be imported')", version="2.12.0.post3")
    message = why_not("npu")
    assert "torch_npu 2.12.0.post3 is made for torch 2.12, and this is torch 2.14.1+cpu" in message


def test_cann_absent(install_torch_npu: MakeNpu, tmp_path: Path) -> None:
    install_torch_npu(library_missing("libhccl.so"))
    for _ in range(2):  # a second try must not give another error
        message = why_not("npu")
        assert "torch_npu 2.14.0 is installed, but CANN is not: libhccl.so is missing" in message
        assert "source test/env_npu.sh" in message


def test_cann_installed_but_not_sourced(install_torch_npu: MakeNpu, tmp_path: Path) -> None:
    install_torch_npu(library_missing("libascendcl.so"))
    home = tmp_path / "root/usr/local/Ascend/ascend-toolkit"
    (home / "latest").mkdir(parents=True)
    (home / "set_env.sh").touch()
    message = why_not("npu")
    assert f"libascendcl.so is not found, since {home}/set_env.sh was not sourced" in message
    assert "run: source test/env_npu.sh" in message


def test_cann_sourced_but_without_the_library(
    install_torch_npu: MakeNpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_torch_npu(library_missing("libge_runner.so"))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    message = why_not("npu")
    assert f"the CANN in {tmp_path} does not bring libge_runner.so" in message


def test_driver_absent(install_torch_npu: MakeNpu) -> None:
    install_torch_npu(library_missing("libascend_hal.so"))
    assert "NPU driver's libascend_hal.so is missing" in why_not("npu")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "raise ImportError('libtorch_npu.so: undefined symbol: _ZN3c10')",
            "torch_npu 2.14.0 does not fit torch 2.14.1+cpu or the installed CANN",
        ),
        ("import not_a_package", "torch_npu 2.14.0 needs the Python package not_a_package"),
        (
            "raise Exception('ASCEND_OPP_PATH : /x/opp does not exist. Please check')",
            "torch_npu 2.14.0 finds only a part of CANN (ASCEND_OPP_PATH names nothing",
        ),
        (
            "raise RuntimeError('Two accelerators cannot be used at the same time: x.\\nmore')",
            "torch 2.14.1+cpu has another accelerator already, and torch allows none beside",
        ),
    ],
)
def test_other_failures_of_the_import(install_torch_npu: MakeNpu, code: str, message: str) -> None:
    install_torch_npu(code)
    assert message in why_not("npu")


def test_driver_shows_no_card(install_torch_npu: MakeNpu, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_npu(cards(0))
    assert "the driver shows no card; check npu-smi info" in why_not("npu")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7,3")
    message = why_not("npu:1")
    assert "ASCEND_RT_VISIBLE_DEVICES is '7,3'" in message and "ascending" in message
    assert devices.count("npu") == 0


def test_card_out_of_range(install_torch_npu: MakeNpu) -> None:
    install_torch_npu(cards(2))
    assert devices.count("npu") == 2
    assert "npu:5 is not there: this machine shows 2 (npu:0 to npu:1)" in why_not("npu:5")
    with pytest.raises(UserError, match="npu:2 is not there"):
        devices.resolve("npu:1", index=1)
    with pytest.raises(UserError, match="npu:8 is not there"):
        devices.resolve("npu", index=8)


def test_auto_says_when_an_installed_torch_npu_is_passed_over(
    install_torch_npu: MakeNpu, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_torch_npu(library_missing("libhccl.so"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    assert devices.resolve("auto") == CPU
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "auto takes cpu, because npu cannot be used" in caplog.text
    assert "libhccl.so" in caplog.text
    monkeypatch.setenv("RANK", "1")
    devices.resolve("auto")
    assert len(caplog.records) == 1


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """CUDA with two cards; returns what set_device was called with."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in GPU")
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return calls


def test_cuda_and_its_other_names(two_gpus: list[object]) -> None:
    for name in ("cuda", "gpu", "gp", "GPU:0"):
        assert devices.resolve(name) == torch.device("cuda:0")
    assert devices.resolve("cuda", index=1) == devices.resolve("gp:1") == torch.device("cuda:1")
    assert devices.describe(torch.device("cuda:1")) == "cuda:1 Stand-in GPU, 80 GB"
    assert "cuda:2 is not there: this machine shows 2" in why_not("cuda:2")
    if importlib.util.find_spec("torch_npu") is None:
        assert devices.resolve("auto", index=1) == torch.device("cuda:1")


def test_why_cuda_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(text: str) -> Callable[[], None]:
        def init() -> None:
            raise RuntimeError(text)

        return init

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "init", fail_with("Found no NVIDIA driver on your system. X"))
    assert "no NVIDIA driver was found" in why_not("cuda")
    monkeypatch.setattr(torch.cuda, "init", fail_with("The driver is too old (found 1). Update"))
    assert "The driver is too old (found 1); check nvidia-smi" in why_not("gpu")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "shows no GPU; check nvidia-smi; CUDA_VISIBLE_DEVICES is ''" in why_not("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "is a build without CUDA; install a CUDA build of torch" in why_not("cuda")


# What an NPU run does first, on a stand-in that records; torch's device name is changed for good
# by it, so this needs a process of its own.
NPU_RUN = """
import json, os, sys, types
import torch
torch.version.cuda = None
torch.__version__ = "2.14.0+cpu"
from zoo_common import device as devices, distributed
import torch.distributed as dist

index = devices.resolve("auto", index=1)
applied = devices.configure(index, float32=sys.argv[1], deterministic=sys.argv[2] == "True",
                            jit_compile=sys.argv[3], internal_format=sys.argv[3])
devices.seed_everything(1)
devices.synchronize(index)
devices.reset_peak_memory(index)
memory = devices.peak_memory_mb(index)
torch.npu.calls.append(["memory", memory])
dist.init_process_group = lambda backend, timeout, device_id: torch.npu.calls.append(
    ["init", backend, timeout.total_seconds(), str(device_id)])
distributed.start(index)
print(json.dumps({"device": str(index), "describe": devices.describe(index),
                  "calls": torch.npu.calls, "names": [a.name for a in applied],
                  "versions": devices.versions(), "hccl": os.environ.get("HCCL_DETERMINISTIC")}))
"""

FAKE_TORCH_NPU = """
import types
import torch

class Npu(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append([name, *map(str, args)])

class Flags:
    def __init__(self, name):
        object.__setattr__(self, "name", name)
    def __getattr__(self, name):
        raise AttributeError("write-only")
    def __setattr__(self, name, value):
        assert type(value) is bool
        npu.calls.append([self.name + "." + name, str(value)])

npu = Npu("torch.npu")
npu.calls = []
npu.conv, npu.matmul, npu.config = Flags("conv"), Flags("matmul"), Flags("config")
npu.device_count = lambda: 2
npu.is_available = lambda: True
npu._is_in_bad_fork = lambda: False
npu.manual_seed_all = lambda seed: npu.calls.append(["manual_seed_all"])
npu.get_device_name = lambda device: "Ascend910B2"
npu.get_device_properties = lambda device: types.SimpleNamespace(total_memory=65464 * 2**20)
npu.max_memory_allocated = lambda device: 3 * 2**20
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
"""


def run_on_npu(tmp_path: Path, float32: str, deterministic: bool, on: str) -> dict[str, object]:
    environ = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "OMP_NUM_THREADS": "1",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for name in ("HCCL_DETERMINISTIC", "HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT"):
        environ.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NPU_RUN, float32, str(deterministic), on],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_npu_run(install_torch_npu: MakeNpu, tmp_path: Path) -> None:
    install_torch_npu(FAKE_TORCH_NPU)
    home = tmp_path / "root/usr/local/Ascend/cann"
    home.mkdir(parents=True)
    (home / "set_env.sh").touch()
    (home / "ascend_cann_install.info").write_text("version=9.1.0\n")
    told = run_on_npu(tmp_path, "auto", False, "auto")
    assert told["device"] == "npu:1"
    assert told["describe"] == "npu:1 Ascend910B2, 64 GB"
    assert told["calls"] == [
        ["set_device", "npu:1"],
        ["set_compile_mode", "False"],
        ["config.allow_internal_format", "False"],
        ["manual_seed_all"],
        ["synchronize", "npu:1"],
        ["reset_peak_memory_stats", "npu:1"],
        ["memory", 3.0],
        ["set_device", "npu:1"],
        ["init", "cpu:gloo,npu:hccl", 1928.0, "npu:1"],
    ]
    assert told["hccl"] is None
    assert told["names"] == ["torch.npu.set_compile_mode", "torch.npu.config.allow_internal_format"]
    versions = told["versions"]
    assert versions["torch_npu"] == "2.14.0" and versions["cann"] == "9.1.0"
    assert "driver" not in versions and "cuda" not in versions
    told = run_on_npu(tmp_path, "fp32", True, "on")
    assert told["calls"][:5] == [
        ["set_device", "npu:1"],
        ["set_compile_mode", "True"],
        ["config.allow_internal_format", "True"],
        ["conv.allow_hf32", "False"],
        ["matmul.allow_hf32", "False"],
    ]
    assert told["hccl"] == "true"
    assert told["names"][-1] == "torch.use_deterministic_algorithms"


@pytest.fixture
def torch_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts torch's global switches back after a test."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(deterministic)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("torch_settings")
def test_switches_on_cuda(two_gpus: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda:1")
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    applied = devices.configure(card)
    assert two_gpus == [card]
    assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == (*before, True)
    assert [a[:2] for a in applied] == [("torch.backends.cudnn.benchmark", True)]
    assert applied[0].reason
    devices.configure(card, float32="hf32")
    assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, True)
    devices.configure(card, float32="fp32", deterministic=True)
    assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == (False, False, False)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    applied = devices.configure(card, deterministic=True)
    assert ":16:8" in [a.value for a in applied], "the user's value is kept, and told"


@pytest.mark.usefixtures("torch_settings")
def test_switches_on_the_cpu() -> None:
    applied = devices.configure(CPU, float32="hf32", deterministic=True)
    assert [a.name for a in applied] == ["torch.use_deterministic_algorithms"]
    assert torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert devices.configure(CPU) == []


@pytest.mark.parametrize("option", ["float32", "jit_compile", "internal_format"])
def test_unknown_value_of_a_switch(option: str) -> None:
    with pytest.raises(UserError, match=f"{option}=yes is no choice: use auto, "):
        devices.configure(CPU, **{option: "yes"})


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds() -> None:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seen = {}
        for seed, rank in ((0, 0), (0, 1), (1, 0), (2**40, 0)):
            devices.seed_everything(seed, rank)
            seen[seed, rank] = draw()
            devices.seed_everything(seed, rank)
            assert draw() == seen[seed, rank]
        for numbers in zip(*seen.values(), strict=True):
            assert len(set(numbers)) == len(seen), "two ranks or seeds draw the same"
        with pytest.raises(UserError, match="--seed=-1 must be 0 or more"):
            devices.seed_everything(-1)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def test_describe_and_versions() -> None:
    threads = torch.get_num_threads()
    assert devices.describe(CPU) == f"cpu, {threads} thread" + ("s" if threads > 1 else "")
    versions = devices.versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == str(torch.__version__)
    assert versions["torchvision"] == importlib.metadata.version("torchvision")
    assert all(type(value) is str for value in versions.values())


_PEAK = """
import torch
from zoo_common import device as devices

cpu = torch.device("cpu")
devices.reset_peak_memory(cpu)
before = devices.peak_memory_mb(cpu)
block = torch.ones(64 * 2**18)  # 64 MiB
assert 60 < devices.peak_memory_mb(cpu) - before < 80
del block
devices.reset_peak_memory(cpu)
assert devices.peak_memory_mb(cpu) - before < 30
devices.synchronize(cpu)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
def test_peak_memory_of_the_cpu() -> None:
    """In a process of its own: what other tests leave behind may be freed at any time."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_profiler_writes_a_trace_of_the_asked_steps(tmp_path: Path) -> None:
    with devices.profiler(CPU, tmp_path / "off", 0, 3) as step:
        step()
    assert not (tmp_path / "off").exists()
    with devices.profiler(CPU, tmp_path / "on", 2, 3) as step:
        for _ in range(8):
            with torch.profiler.record_function("a training step"):
                torch.ones(8).sum()
            step()
    (trace,) = (tmp_path / "on").iterdir()
    assert trace.name.startswith("rank0.")
    events = json.loads(trace.read_text())["traceEvents"]
    assert len([e for e in events if e.get("name") == "a training step"]) == 2


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("auto", (False, True)), ("on", (True, True)), ("off", (False, False))],
)
def test_static_shapes_are_for_accelerators_unless_asked_for(
    setting: str, expected: tuple[bool, bool]
) -> None:
    kinds = (CPU, torch.device("privateuseone"))
    assert tuple(devices.wants_static_shapes(setting, kind) for kind in kinds) == expected
