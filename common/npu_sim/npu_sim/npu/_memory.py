"""Memory of the cards."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch

from npu_sim.npu import _lazy
from npu_sim.npu._device import Device, checked_index, get_device_properties, index_of
from npu_sim.npu._errors import ErrCode, pta_error

_fractions: dict[int, float] = {}


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """Free and total bytes of a card."""
    index = checked_index(device)
    _lazy.lazy_init()
    free, total = torch._C._accelerator_getMemoryInfo(index)
    return int(free), int(total)


def memory_stats_as_nested_dict(device: Device = None) -> dict[str, Any]:
    """Counters of a card's memory as a tree; nothing before the NPU has started."""
    if not _lazy.is_initialized():
        return {}
    stats: dict[str, Any] = torch._C._accelerator_getDeviceStats(index_of(device, optional=True))
    return stats


def memory_stats(device: Device = None) -> OrderedDict[str, Any]:
    """Counters of a card's memory, such as ``allocated_bytes.all.peak``."""
    found = {}

    def collect(prefix: str, value: Any) -> None:
        if not isinstance(value, dict):
            found[prefix] = value
            return
        for key, part in value.items():
            collect(f"{prefix}.{key}" if prefix else key, part)

    collect("", memory_stats_as_nested_dict(device))
    return OrderedDict(sorted(found.items()))


def _bytes(device: Device, kind: str, moment: str) -> int:
    return int(memory_stats(device).get(f"{kind}_bytes.all.{moment}", 0))


def memory_allocated(device: Device = None) -> int:
    """Bytes that tensors hold."""
    return _bytes(device, "allocated", "current")


def max_memory_allocated(device: Device = None) -> int:
    """Most bytes that tensors have held since the start or the last reset."""
    return _bytes(device, "allocated", "peak")


def memory_reserved(device: Device = None) -> int:
    """Bytes taken from the card."""
    return _bytes(device, "reserved", "current")


def max_memory_reserved(device: Device = None) -> int:
    """Most bytes taken from the card since the start or the last reset."""
    return _bytes(device, "reserved", "peak")


def reset_peak_memory_stats(device: Device = None) -> None:
    """Starts the peaks anew."""
    torch._C._accelerator_resetPeakStats(index_of(device, optional=True))


def reset_accumulated_memory_stats(device: Device = None) -> None:
    """Starts the sums anew."""
    torch._C._accelerator_resetAccumulatedStats(index_of(device, optional=True))


def _deprecated(old: str, new: str) -> None:
    warnings.warn(
        f"torch_npu.npu.{old} is deprecated; use torch_npu.npu.{new}.",
        DeprecationWarning,
        stacklevel=3,
    )


def reset_max_memory_allocated(device: Device = None) -> None:
    """Deprecated: :func:`reset_peak_memory_stats`."""
    _deprecated("reset_max_memory_allocated", "reset_peak_memory_stats")
    reset_peak_memory_stats(device)


def reset_max_memory_cached(device: Device = None) -> None:
    """Deprecated: :func:`reset_peak_memory_stats`."""
    _deprecated("reset_max_memory_cached", "reset_peak_memory_stats")
    reset_peak_memory_stats(device)


def memory_cached(device: Device = None) -> int:
    """Deprecated: :func:`memory_reserved`."""
    _deprecated("memory_cached", "memory_reserved")
    return memory_reserved(device)


def max_memory_cached(device: Device = None) -> int:
    """Deprecated: :func:`max_memory_reserved`."""
    _deprecated("max_memory_cached", "max_memory_reserved")
    return max_memory_reserved(device)


def empty_cache() -> None:
    """Gives memory back that no tensor holds."""
    if _lazy.is_initialized():
        torch._C._accelerator_emptyCache()


def get_allocator_backend() -> str:
    """Which allocator serves tensors."""
    return "native"


def get_per_process_memory_fraction(device: Device = None) -> float:
    """Part of a card's memory that this process may use."""
    _lazy.lazy_init()
    return _fractions.get(index_of(device, optional=True), 1.0)


def set_per_process_memory_fraction(fraction: float, device: Device = None) -> None:
    """Limits this process to a part of a card's memory, from 0 to 1."""
    from npu_sim import set_memory_limit

    _lazy.lazy_init()
    index = index_of(device, optional=True)
    if not isinstance(fraction, float):
        raise TypeError(
            "Invalid type for fraction argument, must be `float`" + pta_error(ErrCode.TYPE)
        )
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"Invalid fraction value: {fraction}. Allowed range: 0~1" + pta_error(ErrCode.VALUE)
        )
    _fractions[index] = fraction
    set_memory_limit(index, int(get_device_properties(index).total_memory * fraction))


def _row(title: str, cells: list[str]) -> str:
    return f"| {title:<21} | " + " | ".join(f"{cell:>10}" for cell in cells) + " |"


def memory_summary(device: Device = None, abbreviated: bool = False) -> str:
    """The counters of a card's memory as a table."""
    _lazy.lazy_init()
    index = index_of(device, optional=True)
    stats = memory_stats(index)
    moments = ("current", "peak", "allocated", "freed")
    lines = [
        f"PyTorch NPU memory summary, device ID {index}, NPU OOMs: {stats.get('num_ooms', 0)}",
        _row("Metric", ["Cur Usage", "Peak Usage", "Tot Alloc", "Tot Freed"]),
    ]
    for key, title in (
        ("allocated_bytes", "Allocated memory"),
        ("active_bytes", "Active memory"),
        ("reserved_bytes", "NPU reserved memory"),
        ("allocation", "Allocations"),
    ):
        for pool in ("all",) if abbreviated else ("all", "large_pool", "small_pool"):
            values = [stats.get(f"{key}.{pool}.{moment}", 0) for moment in moments]
            if key.endswith("_bytes"):
                cells = [f"{value // 1024} KB" for value in values]
            else:
                cells = [str(value) for value in values]
            lines.append(_row(title if pool == "all" else f"  {pool}", cells))
    return "\n".join(lines) + "\n"
