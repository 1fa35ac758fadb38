"""Settings of autocast."""

from __future__ import annotations

import torch

from npu_sim.npu._device import is_bf16_supported


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What autocast can compute in."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    return dtypes if is_bf16_supported() else [torch.float16, torch.float32]


def is_autocast_enabled() -> bool:
    """Whether autocast is on here."""
    return torch.is_autocast_enabled("npu")


def set_autocast_enabled(enable: bool) -> None:
    """Turns autocast on or off."""
    torch.set_autocast_enabled("npu", enable)


def get_autocast_dtype() -> torch.dtype:
    """What autocast computes in."""
    return torch.get_autocast_dtype("npu")


def set_autocast_dtype(dtype: torch.dtype) -> None:
    """Sets what autocast computes in."""
    torch.set_autocast_dtype("npu", dtype)
