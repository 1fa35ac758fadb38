"""Cards: choosing one, waiting for it, asking what it is."""

from __future__ import annotations

import os
import re
import warnings
from types import TracebackType
from typing import Any, NoReturn

import torch

from npu_sim.npu import _lazy
from npu_sim.npu._errors import ErrCode, pta_error

# The rest of the name keeps a record of a simulated run from passing for one of hardware.
NAME = "Ascend910B2 (simulated)"
SOC_VERSION = 221
CORES = 24
DEFAULT_MEMORY = 64 * 2**30

Device = Any  # torch.device, str, int, or None for the current card


def index_of(device: Device, optional: bool = False, allow_cpu: bool = False) -> int:
    """A card's number.

    Args:
        device: ``torch.device``, ``npu:1``, a number, or None.
        optional: a device without number, and None, mean the current card.
        allow_cpu: a CPU is -1.

    Raises:
        ValueError: it is no NPU.
    """
    if isinstance(device, int):
        return device
    if isinstance(device, device_context):
        return device.idx
    if device is not None:
        device = torch.device(device)
        if allow_cpu and device.type == "cpu":
            return -1
        if device.type != "npu":
            what = "npu or cpu" if allow_cpu else "npu"
            raise ValueError(
                f"Expected a {what} device, but got: {device}" + pta_error(ErrCode.VALUE)
            )
        if device.index is not None:
            return int(device.index)
    if optional:
        return current_device()
    raise ValueError(f"Expected a npu device with a specified index, but got: {device}")


def checked_index(device: Device) -> int:
    """The number of a card that is there; None means the current one."""
    index = index_of(device, optional=True)
    if not 0 <= index < _lazy.device_count():
        raise AssertionError("Invalid device id" + pta_error(ErrCode.VALUE))
    return index


def current_device() -> int:
    """Number of the current card."""
    _lazy.lazy_init()
    return int(torch._C._accelerator_hooks_get_current_device())


def _set(index: int) -> None:
    if index >= _lazy.device_count():
        raise RuntimeError(
            f"SetDevice failed: there is no card {index}, this process sees "
            f"{_lazy.device_count()}" + pta_error(ErrCode.ACL)
        )
    torch._C._accelerator_hooks_set_current_device(index)


def set_device(device: Device) -> None:
    """Makes a card the current one."""
    index = index_of(device, optional=True)
    if index >= 0:
        _set(index)


class device_context:  # noqa: N801 torch_npu's name for it is device
    """Makes a card the current one within a block; None and negative numbers change nothing."""

    def __init__(self, device: Device) -> None:
        self.idx = index_of(device, optional=True)
        self.prev_idx = -1

    def __enter__(self) -> None:
        if self.idx >= 0:
            self.prev_idx = int(torch._C._accelerator_hooks_get_current_device())
            _set(self.idx)
            _lazy.lazy_init()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.idx >= 0:
            _set(max(self.prev_idx, 0))


device_context.__name__ = device_context.__qualname__ = "device"


class device_of(device_context):  # noqa: N801 torch_npu's name
    """Makes the card of a tensor or storage the current one within a block."""

    def __init__(self, obj: Any) -> None:
        super().__init__(obj.get_device() if obj.is_npu else -1)


def synchronize(device: Device = None) -> None:
    """Waits until a card has done what it was given."""
    _lazy.lazy_init()
    with device_context(device):
        torch.accelerator.synchronize()


def can_device_access_peer(device_id: Device, peer_device_id: Device) -> bool:
    """Whether two cards reach each other's memory."""
    for what, device in (("", device_id), ("peer ", peer_device_id)):
        if not 0 <= index_of(device, optional=True) < _lazy.device_count():
            raise AssertionError(f"Invalid {what}device id" + pta_error(ErrCode.VALUE))
    return True


class _NPUDeviceProperties:
    """What a card is; the attributes are those of torch_npu, without the CUDA-like ones."""

    def __init__(self) -> None:
        self.name = NAME
        self.total_memory = int(os.environ.get("NPU_SIM_MEMORY") or DEFAULT_MEMORY)
        self.cube_core_num = CORES
        self.vector_core_num = CORES * 2
        self.multi_processor_count = CORES

    def __repr__(self) -> str:
        memory = self.total_memory // 2**20
        return f"_NPUDeviceProperties(name='{self.name}', total_memory={memory}MB)"


def get_device_name(device_name: Device = None) -> str:
    """The card's model."""
    checked_index(device_name)
    return NAME


def get_device_properties(device_name: Device = None) -> _NPUDeviceProperties:
    """The card's model, memory in bytes, and cores."""
    checked_index(device_name)
    _lazy.lazy_init()
    return _NPUDeviceProperties()


def get_soc_version() -> int:
    """The chip's number in torch_npu."""
    _lazy.lazy_init()
    return SOC_VERSION


def get_device_capability(device: Device = None) -> tuple[int, int] | None:
    """What the user has set in TORCH_NPU_DEVICE_CAPABILITY, as an NPU has no such number."""
    note = (
        "torch.npu.get_device_capability says what TORCH_NPU_DEVICE_CAPABILITY is set to, "
        "and nothing of the NPU"
    )
    written = os.environ.get("TORCH_NPU_DEVICE_CAPABILITY", "")
    match = re.fullmatch(r"(\d+)\.(\d+)", written)
    if match is None:
        state = f"'{written}', which is not major.minor" if written else "not set"
        warnings.warn(f"{note}; it is {state}.", stacklevel=2)
        return None
    warnings.warn(f"{note}.", stacklevel=2)
    return int(match[1]), int(match[2])


def is_bf16_supported(including_emulation: bool = False) -> bool:
    """Whether bfloat16 can be used."""
    _lazy.lazy_init()
    return True


def current_blas_handle() -> None:
    """NPUs have none."""
    warnings.warn("NPU does not use blas handle.", stacklevel=2)


def get_npu_overflow_flag() -> NoReturn:
    """Exists for older chips only."""
    raise RuntimeError(
        "Unsupported api when soc_version >= Ascend910B1, please use npu_check_overflow"
        + pta_error(ErrCode.NOT_SUPPORT)
    )


def clear_npu_overflow_flag() -> None:
    """Does nothing on this chip."""
    warnings.warn(
        "When soc_version >= Ascend910B1, clear_npu_overflow_flag is useless. Please remove it.",
        stacklevel=2,
    )


device = device_context
