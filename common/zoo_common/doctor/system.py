"""Memory, cores, limits, disks and environment variables."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from zoo_common.doctor.lines import NOTE, OK, PROBLEM, Line, size
from zoo_common.doctor.machine import Machine

_GB = 2**30
LEAST_SHM = _GB // 2
LEAST_FREE_DISK = _GB
ENOUGH_FREE_DISK = 10 * _GB
_ENOUGH_FILES = 4096
_ENOUGH_MEMORY = 4 * _GB


def _number(path: Path) -> int | None:
    """The number in a file of the kernel, None for "max" or no file."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def memory(machine: Machine) -> list[Line]:
    """Memory that a run can have: the machine's, or the container's."""
    try:
        rows = (machine.system / "proc/meminfo").read_text().splitlines()
    except OSError:
        return [Line("memory", NOTE, "how much there is cannot be seen on this system")]
    entries = {row.split(":")[0]: int(row.split()[1]) * 1024 for row in rows if ":" in row}
    total, free = entries["MemTotal"], entries["MemAvailable"]
    limit = _number(machine.system / "sys/fs/cgroup/memory.max") or _number(
        machine.system / "sys/fs/cgroup/memory/memory.limit_in_bytes"
    )
    text = f"{size(free)} free of {size(total)}"
    if limit is not None and limit < total:
        free = min(free, limit)
        text += f"; this container may have {size(limit)}"
    if free < _ENOUGH_MEMORY:
        return [Line("memory", NOTE, text, "end other programs, or lower --batch_size")]
    return [Line("memory", OK, text)]


def cores(machine: Machine) -> list[Line]:
    """The cores that this process may use."""
    there = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    text = f"{mine} of {there}" if mine < there else f"{there}"
    lines = []
    if mine < machine.ranks:
        advice = "give the container or this shell more cores (taskset -p shows them)"
        text = f"{text} for {machine.ranks} ranks"
        lines.append(Line("cores", NOTE, text, advice))
    else:
        lines.append(Line("cores", OK, text))
    threads = machine.environ.get("OMP_NUM_THREADS")
    if threads is None:
        return lines  # the launcher gives each rank its share
    share = max(1, mine // machine.ranks)
    if not threads.isdigit() or not int(threads):
        text = f"OMP_NUM_THREADS='{threads}' is no number"
        lines.append(Line("cores", PROBLEM, text, "unset it: the launcher sets it"))
    elif int(threads) > share:
        text = f"OMP_NUM_THREADS={threads} is more than the {share} core(s) that each rank has"
        lines.append(Line("cores", NOTE, text, "unset it: the launcher sets it"))
    return lines


def shared_memory(machine: Machine) -> list[Line]:
    """/dev/shm, through which data workers hand over batches."""
    if sys.platform != "linux":
        return []
    try:
        usage = shutil.disk_usage(machine.system / "dev/shm")
    except OSError:
        text = "there is no /dev/shm, through which data workers hand over batches"
        return [Line("shared memory", PROBLEM, text, "mount it, or set data.workers=0")]
    text = f"{size(usage.free)} free of {size(usage.total)} in /dev/shm"
    if usage.free < LEAST_SHM:
        advice = "start the container with --shm-size=16g or --ipc=host, or set data.workers=0"
        return [Line("shared memory", PROBLEM, f"{text}: data workers die", advice)]
    return [Line("shared memory", OK, text)]


def limits(machine: Machine) -> list[Line]:
    """Limits of open files, processes and locked memory."""
    import resource  # not there on every system

    def both(limit: int) -> tuple[str, int]:
        soft, _ = resource.getrlimit(limit)
        return ("unlimited", sys.maxsize) if soft == resource.RLIM_INFINITY else (str(soft), soft)

    files, count = both(resource.RLIMIT_NOFILE)
    processes, _ = both(resource.RLIMIT_NPROC)
    locked, _ = both(resource.RLIMIT_MEMLOCK)
    locked = locked if locked == "unlimited" else size(int(locked))
    text = f"open files {files}, processes {processes}, locked memory {locked}"
    if count < _ENOUGH_FILES:
        advice = "if workers say 'too many open files': ulimit -n $(ulimit -Hn)"
        return [Line("limits", NOTE, text, advice)]
    return [Line("limits", OK, text)]


def disk(machine: Machine) -> list[Line]:
    """Room where runs write, and where temporary files go."""
    lines = []
    output = machine.output_dir.expanduser().absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    for what, path in (("output", there), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(path).free
        text = f"{what}: {size(free)} free in {path}"
        if not os.access(path, os.W_OK):
            text = f"{what}: {path} cannot be written"
            lines.append(Line("disk", PROBLEM, text, "choose another place by --output_dir"))
        elif free < LEAST_FREE_DISK:
            lines.append(Line("disk", PROBLEM, text, "make room, or choose another disk"))
        elif free < ENOUGH_FREE_DISK and what == "output":
            advice = "checkpoints of a long run need more: choose another disk by --output_dir"
            lines.append(Line("disk", NOTE, text, advice))
        else:
            lines.append(Line("disk", OK, text))
    return lines


def variables(machine: Machine) -> list[Line]:
    """Environment variables that are known to hurt."""
    environ, lines = machine.environ, []

    def say(status: str, text: str, advice: str) -> None:
        lines.append(Line("variables", status, text, advice))

    if machine.kind == "npu":
        trouble = machine.npu_trouble
        if "PYTORCH_ALLOC_CONF" in environ and "PYTORCH_NPU_ALLOC_CONF" in environ:
            text = "PYTORCH_ALLOC_CONF and PYTORCH_NPU_ALLOC_CONF are both set: torch_npu ends"
            say(trouble, text, "unset one of them")
        queue = environ.get("TASK_QUEUE_ENABLE")
        if queue is not None and queue not in ("0", "1", "2"):
            say(trouble, f"TASK_QUEUE_ENABLE='{queue}' is not 0, 1 or 2", "set it to 2 or unset it")
        if environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
            text = "ASCEND_LAUNCH_BLOCKING=1 makes every operator wait: slow, for debugging"
            say(NOTE, text, "unset it for training")
        if environ.get("PYTORCH_NO_NPU_MEMORY_CACHING"):
            text = "PYTORCH_NO_NPU_MEMORY_CACHING turns the memory cache off: slow"
            say(NOTE, text, "unset it for training")
    card = environ.get("ASCEND_DEVICE_ID")
    if card and not card.isdigit():
        text = f"ASCEND_DEVICE_ID='{card}' is no card number, and runs take it as --device_id"
        say(PROBLEM, text, "set it to 0 or unset it")
    if environ.get("CUDA_VISIBLE_DEVICES") == "" and machine.asked == "cuda":
        say(NOTE, "CUDA_VISIBLE_DEVICES is empty: no GPU is shown", "unset it")
    if any(
        environ.get(name) for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    ):
        text = "a proxy is set; only downloads of weights use it"
        say(NOTE, text, "unset http_proxy and https_proxy if it cannot be reached")
    return lines or [Line("variables", OK, "none that is known to hurt")]
