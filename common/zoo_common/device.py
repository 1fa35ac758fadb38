"""The device of a run: finding it, saying why it is not there, setting its switches.

The rest of the zoo holds a ``torch.device`` and does not ask which kind it is. This is the only
module that imports torch_npu, and only when an NPU is asked for: torch_npu needs CANN's libraries
to import at all, and beside a CUDA build of torch it aborts the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import random
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from zoo_common import npu_env, versions_npu
from zoo_common.errors import UserError

_ALIASES = {"gpu": "cuda", "gp": "cuda"}
_MB = 2**20
_GB = 2**30
_M_MMAP_THRESHOLD = -3  # of malloc.h

_log = logging.getLogger(__name__)


def resolve(name: str = "auto", index: int | None = None) -> torch.device:
    """The device that a process of this machine runs on.

    Args:
        name: ``auto`` (npu, else cuda, else cpu), ``npu``, ``cuda`` (also ``gpu``, and ``gp`` as
            on the Twins card) or ``cpu``; ``npu:2`` and ``cuda:2`` say which card is the first.
        index: the process's place among this machine's processes (its local rank, after the
            first card to use); counted from the card in ``name``. A CPU has no cards.

    Raises:
        UserError: no such device name, the device cannot be used (the message says why), or there
            are fewer cards.
    """
    kind, first = _parse(name)
    if kind == "auto":
        kind = _best_kind()
    elif reason := reason_against(kind):
        raise UserError(f"Device {name} cannot be used: {reason}.")
    if kind == "cpu":
        return torch.device("cpu")
    card = first + (index or 0)
    cards = count(kind)
    if not 0 <= card < cards:
        shown = f"{kind}:0" if cards == 1 else f"{kind}:0 to {kind}:{cards - 1}"
        raise UserError(
            f"Device {kind}:{card} is not there: this machine shows {cards} "
            f"({shown}); start fewer processes or choose another --device_id."
        )
    return torch.device(kind, card)


def wants_static_shapes(setting: str, device: torch.device) -> bool:
    """Whether a run keeps its shapes fixed; a CPU gains nothing from it.

    Args:
        setting: ``on``, ``off``, or ``auto``: on accelerators, which compile for each shape.
        device: that it runs on.
    """
    return device.type != "cpu" if setting == "auto" else setting == "on"


def _parse(name: str) -> tuple[str, int]:
    """Splits a device name in kind and first card."""
    match = re.fullmatch(r"([a-z]+)(?::(\d{1,4}))?", name.strip().lower())
    kind = _ALIASES.get(match[1], match[1]) if match else ""
    number = int(match[2]) if match and match[2] else 0
    if kind not in ("auto", "npu", "cuda", "cpu") or (kind in ("auto", "cpu") and number):
        raise UserError(
            f"--device={name} is no device: choose auto, npu, cuda or cpu; "
            "npu and cuda take a card number as in npu:1."
        )
    return kind, number


def _torch_npu_is_installed() -> bool:
    return "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None


def _best_kind() -> str:
    if not _torch_npu_is_installed():
        return "cuda" if _cuda_reason() is None else "cpu"
    reason = _npu_reason()
    if reason is None:
        return "npu"
    kind = "cuda" if _cuda_reason() is None else "cpu"
    # Who installed torch_npu wants an NPU: slow training on another device must not be a surprise.
    if os.environ.get("RANK", "0") == "0":
        _log.warning("--device=auto takes %s, because npu cannot be used: %s.", kind, reason)
    return kind


def reason_against(kind: str) -> str | None:
    """Why devices of this kind cannot be used, or None when they can."""
    if kind == "npu":
        return _npu_reason()
    return _cuda_reason() if kind == "cuda" else None


def _cuda_reason() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch, "
            "or choose another --device"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is '{visible}'"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "no NVIDIA driver" in str(error):
            return "no NVIDIA driver was found; install it, or choose another --device"
        return f"{_first_sentence(error)}; check nvidia-smi{hint}"
    return f"the driver shows no GPU; check nvidia-smi{hint}"


def _npu_reason() -> str | None:
    if reason := _torch_npu_reason():
        return reason
    if _loaded_npus() > 0:
        return None
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is not None:
        return (
            "the driver shows no card; ASCEND_RT_VISIBLE_DEVICES is "
            f"'{visible}', which must list numbers of npu-smi info in ascending order"
        )
    return "the driver shows no card; check npu-smi info, and that a container was given its cards"


def _loaded_npus() -> int:
    """Cards that torch_npu shows; it must be imported."""
    return int(importlib.import_module("torch_npu").npu.device_count())


def _torch_npu_reason() -> str | None:
    """Imports torch_npu; says what is wrong when that cannot work."""
    if "torch_npu" in sys.modules:
        return None
    if not _torch_npu_is_installed():
        return (
            "torch_npu is not installed; install it beside the CPU build of the same version of "
            f"torch: {versions_npu.install_command()}"
        )
    torch_version = str(torch.__version__)
    version = _installed("torch-npu") or "(unknown version)"
    # Must be known before the import, which a CUDA build answers with an abort, not an exception.
    if torch.version.cuda is not None:
        return (
            f"torch {torch_version} is a CUDA build, and torch_npu beside it aborts the process; "
            "install the CPU build of torch"
        )
    if version[0].isdigit() and _series(version) != _series(torch_version):
        return (
            f"torch_npu {version} is made for torch {_series(version)}, and this is torch "
            f"{torch_version}; install torch-npu and torch of the same version"
        )
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # where a part of CANN is missing torch_npu raises just that
        return _import_reason(error, version)
    return None


def _import_reason(error: Exception, version: str) -> str:
    """Tells why the import of torch_npu failed."""
    text, what = str(error), f"torch_npu {version}"
    if library := re.search(r"(lib[\w.+-]+): cannot open shared object file", text):
        return _library_reason(library[1], version)
    if "undefined symbol" in text:
        return _cann_too_old(version) or (
            f"{what} does not fit torch {torch.__version__} or the installed CANN "
            f"({_first_sentence(error)}); install versions that belong together"
        )
    if part := re.search(r"(ASCEND_\w+_PATH) : .* does not exist", text):
        return (
            f"{what} finds only a part of CANN ({part[1]} names nothing that is there); install "
            "CANN's toolkit and operator package, then run: source test/env_npu.sh"
        )
    if "Two accelerators" in text:
        return (
            f"torch {torch.__version__} has another accelerator already, and torch allows none "
            f"beside {what}; install the CPU build of torch"
        )
    if isinstance(error, ModuleNotFoundError):
        return f"{what} needs the Python package {error.name}; install it"
    return f"importing {what} failed ({_first_sentence(error)})"


def _cann_too_old(version: str) -> str | None:
    """Says that the CANN here is older than what this torch_npu works with, if it is."""
    cann = npu_env.find_cann()
    release = cann and npu_env.cann_version(cann)
    if not release:
        return None
    verdict = versions_npu.judge_cann(version, release)
    return f"{verdict.text}; {verdict.advice}" if verdict.status == "problem" else None


def _library_reason(library: str, version: str) -> str:
    what = f"torch_npu {version}"
    if library.startswith("libascend_hal"):
        return (
            f"{what} is installed, but the NPU driver's {library} is missing; install the driver, "
            "or give the container /usr/local/Ascend/driver"
        )
    cann = npu_env.find_cann()
    if cann is None:
        return (
            f"{what} is installed, but CANN is not: {library} is missing; install CANN, then run: "
            "source test/env_npu.sh"
        )
    if cann.set_env is None:
        return _cann_too_old(version) or (
            f"{what} is installed, but the CANN in {cann.home} does not bring {library}, or "
            "LD_LIBRARY_PATH has lost it; source its set_env.sh again, or install the CANN release "
            "that belongs to torch_npu"
        )
    return (
        f"{what} and CANN are installed, but {library} is not found, since {cann.set_env} was not "
        "sourced; run: source test/env_npu.sh"
    )


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.split(r"[.;:](?:\s|$)", lines[0])[0].strip() or lines[0]


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def count(kind: str) -> int:
    """How many devices of a kind this process can use; a CPU is one.

    Args:
        kind: ``npu``, ``cuda`` or ``cpu``.
    """
    assert kind in ("npu", "cuda", "cpu"), kind
    if reason_against(kind) is not None:
        return 0
    if kind == "npu":
        return _loaded_npus()
    return torch.cuda.device_count() if kind == "cuda" else 1


def describe(device: torch.device) -> str:
    """One line for people, such as ``cpu, 2 threads`` or ``npu:0 Ascend910B2, 64 GB``."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'' if threads == 1 else 's'}"
    module = _module(device)
    memory = module.get_device_properties(device).total_memory / _GB
    return f"{device} {module.get_device_name(device)}, {memory:.0f} GB"


def versions() -> dict[str, str]:
    """Versions that a result depends on, where known; names no host, user or path."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": _installed("torchvision"),
        "torch_npu": _installed("torch-npu"),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    if cann := npu_env.find_cann():
        found["cann"] = npu_env.cann_version(cann)
    found["driver"] = npu_env.driver_version()
    return {name: version for name, version in found.items() if version is not None}


class Switch(NamedTuple):
    """A setting of torch, torch_npu or a library under them.

    Attributes:
        target: what is set: a torch attribute, a torch function to call, or a variable.
        kinds: the device types that it is set for.
        option: the argument of :func:`configure` that decides it.
        values: the value for each value of the option; one that is not listed leaves the default.
        reason: why it is set.
    """

    target: str
    kinds: tuple[str, ...]
    option: str
    values: Mapping[object, object]
    reason: str


class Applied(NamedTuple):
    """A switch that was set, its value, and why."""

    name: str
    value: object
    reason: str


_ON_OFF: dict[object, object] = {"auto": False, "off": False, "on": True}
_HF32: dict[object, object] = {"fp32": False, "hf32": True}
_ALL = ("npu", "cuda", "cpu")

SWITCHES = (
    Switch(
        "torch.npu.set_compile_mode",
        ("npu",),
        "jit_compile",
        _ON_OFF,
        "Uses the operators compiled in CANN. Compiling each shape at its first use costs minutes, "
        "is the default on older cards, and rules out TASK_QUEUE_ENABLE=2.",
    ),
    Switch(
        "torch.npu.config.allow_internal_format",
        ("npu",),
        "internal_format",
        _ON_OFF,
        "Keeps tensors in their plain layout; private layouts can change the precision and add "
        "conversions around operators that do not know them.",
    ),
    Switch(
        "torch.npu.conv.allow_hf32",
        ("npu",),
        "float32",
        _HF32,
        "HF32 keeps fewer bits of the factors of float32 convolutions; NPUs use it by default.",
    ),
    Switch(
        "torch.npu.matmul.allow_hf32",
        ("npu",),
        "float32",
        _HF32,
        "HF32 for float32 matrix products; NPUs do not use it by default.",
    ),
    Switch(
        "torch.backends.cudnn.allow_tf32",
        ("cuda",),
        "float32",
        _HF32,
        "TF32, CUDA's like of HF32, for float32 convolutions; on by default.",
    ),
    Switch(
        "torch.backends.cuda.matmul.allow_tf32",
        ("cuda",),
        "float32",
        _HF32,
        "TF32 for float32 matrix products; off by default.",
    ),
    Switch(
        "torch.backends.cudnn.benchmark",
        ("cuda",),
        "deterministic",
        {False: True, True: False},
        "A run has few shapes, so timing the algorithms once a shape pays; the choice can differ "
        "from run to run.",
    ),
    Switch(
        "CUBLAS_WORKSPACE_CONFIG",
        ("cuda",),
        "deterministic",
        {True: ":4096:8"},
        "Without it cuBLAS may take another algorithm in each run.",
    ),
    Switch(
        "HCCL_DETERMINISTIC",
        ("npu",),
        "deterministic",
        {True: "true"},
        "Sums over ranks are added in a fixed order.",
    ),
    Switch(
        "torch.use_deterministic_algorithms",
        _ALL,
        "deterministic",
        {True: True},
        "Operators give the same bits in each run, and those that cannot raise an error; slower.",
    ),
)


def configure(
    device: torch.device,
    *,
    float32: str = "auto",
    deterministic: bool = False,
    jit_compile: str = "auto",
    internal_format: str = "auto",
) -> list[Applied]:
    """Makes ``device`` the current one and sets its switches, before anything runs on it.

    Compile mode and determinism hold for what has not run yet, and the variables are read when
    libraries start, so a program calls this first, and before the process group is made.
    Variables that the user has set are kept.

    Args:
        device: from :func:`resolve`.
        float32: what float32 convolutions and matrix products may be computed in: ``auto`` leaves
            the device's default, ``fp32`` asks for full float32, ``hf32`` allows HF32 (TF32 on
            CUDA, nothing on a CPU). The original's ``--hf32`` left matrix products alone.
        deterministic: same bits in each run on the same machine; slower.
        jit_compile: ``on`` compiles operators for each shape on an NPU; ``auto`` is ``off``.
        internal_format: ``on`` allows an NPU's private tensor layouts; ``auto`` is ``off``.

    Returns:
        What was set, in order.

    Raises:
        UserError: an option has no such value.
    """
    options = {
        "float32": float32,
        "deterministic": deterministic,
        "jit_compile": jit_compile,
        "internal_format": internal_format,
    }
    for option, allowed in (
        ("float32", ("auto", "fp32", "hf32")),
        ("jit_compile", ("auto", "on", "off")),
        ("internal_format", ("auto", "on", "off")),
    ):
        if options[option] not in allowed:
            raise UserError(
                f"{option}={options[option]} is no choice: use {', '.join(allowed[:-1])} or "
                f"{allowed[-1]}."
            )
    if device.type != "cpu":
        # Without it torch_npu's first call would take memory of card 0 in every process.
        _module(device).set_device(device)
    applied = []
    for switch in SWITCHES:
        value = switch.values.get(options[switch.option])
        if device.type in switch.kinds and value is not None:
            applied.append(Applied(switch.target, _put(switch.target, value), switch.reason))
    return applied


def _put(target: str, value: object) -> object:
    """Sets a switch; returns the value that holds, which for a variable may be the user's."""
    if not target.startswith("torch."):
        return os.environ.setdefault(target, str(value))
    *path, name = target.split(".")[1:]
    owner: Any = torch
    for part in path:
        owner = getattr(owner, part)
    # torch_npu's config attribute can be written, not read.
    function = getattr(owner, name, None)
    if callable(function):
        function(value)
    else:
        setattr(owner, name, value)
    return value


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seeds Python's, NumPy's and torch's random numbers, on the CPU and on all devices.

    Each rank draws its own numbers (dropout, drop path), unrelated to those of any other rank and
    seed: ``seed + rank`` would give rank 1 of seed 0 the numbers of rank 0 of seed 1. Weights are
    the same on all ranks nonetheless, since :func:`zoo_common.distributed.wrap` sends rank 0's.

    Args:
        seed: 0 or more.
        rank: global rank of this process.

    Raises:
        UserError: a negative seed.
    """
    if seed < 0:
        raise UserError(f"--seed={seed} must be 0 or more.")
    for_python, for_numpy, for_torch = np.random.SeedSequence((seed, rank)).generate_state(
        3, np.uint64
    )
    random.seed(int(for_python))
    np.random.seed(int(for_numpy) % 2**32)
    # Some device generators take a signed number.
    torch.manual_seed(int(for_torch) % 2**63)


def _module(device: torch.device) -> Any:
    """``torch.npu`` or ``torch.cuda``; torch.accelerator lacks memory statistics before 2.9."""
    return torch.get_device_module(device)


def memory_format(device: torch.device) -> torch.memory_format:
    """The order in memory of images and convolution weights that a device is quickest with.

    Channels last on CPUs and GPUs. NPUs have layouts of their own, which start from the
    contiguous one.
    """
    return torch.contiguous_format if device.type == "npu" else torch.channels_last


def give_back_memory(device: torch.device, above_mb: int = 8) -> None:
    """Lets a process on the CPU return freed blocks above a size to the system at once.

    glibc keeps blocks of up to 32 MB, between others that are in use: a ResNet's training took a
    tenth more memory so. Asking the system for each block anew costs 2 to 5 % of the time. Where
    the C library is another one nothing happens.

    Args:
        device: the run's; memory of accelerators is no concern of glibc.
        above_mb: the size in MiB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, above_mb << 20)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type != "cpu":
        _module(device).synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory in use since the start or the last reset, in MiB.

    On an accelerator it is the memory of tensors; on a CPU the resident memory of this process,
    data loader workers not included.
    """
    if device.type != "cpu":
        return float(_module(device).max_memory_allocated(device)) / _MB
    status = Path("/proc/self/status")
    # Not getrusage where it can be helped: it also remembers the parent at the time of the fork.
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MB


def reset_peak_memory(device: torch.device) -> None:
    """Starts :func:`peak_memory_mb` anew; on a CPU only Linux can."""
    if device.type != "cpu":
        _module(device).reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def profiler(
    device: torch.device, directory: Path, steps: int, warmup_steps: int
) -> Iterator[Callable[[], None]]:
    """Profiles some steps of a run and writes a trace that TensorBoard and Perfetto read.

    Args:
        device: what the steps run on; NPUs have a profiler of their own.
        directory: where the trace goes.
        steps: how many steps to profile; 0 profiles nothing.
        warmup_steps: steps to leave out before, at least one.

    Yields:
        A function to call after each step.
    """
    if steps == 0:
        yield lambda: None
        return
    api: ModuleType = (
        importlib.import_module("torch_npu.profiler") if device.type == "npu" else torch.profiler
    )
    activities = [api.ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(getattr(api.ProfilerActivity, device.type.upper()))
    # By keyword: torch_npu's schedule has another order of arguments.
    schedule = api.schedule(
        wait=0, warmup=1, active=steps, repeat=1, skip_first=max(0, warmup_steps - 1)
    )
    handler = api.tensorboard_trace_handler(str(directory), worker_name="rank0")
    with api.profile(activities=activities, schedule=schedule, on_trace_ready=handler) as profile:
        yield profile.step
