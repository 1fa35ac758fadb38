"""Operators that change a tensor's dtype or its private layout."""

from __future__ import annotations

import enum
import warnings
from typing import Any

import torch

from npu_sim import recorded
from npu_sim.npu import _config

Format = recorded.enumeration("torch_npu.Format", enum.IntEnum)
# Formats that keep a tensor as it is; the others are private to the NPU.
_PLAIN = ("NCHW", "NHWC", "ND", "HWCN", "NDHWC", "NCDHW", "NC", "NCL")


def get_npu_format(tensor: torch.Tensor) -> Any:
    """A tensor's layout; private ones are not simulated."""
    return Format(torch.ops.npu.get_npu_format(tensor))


def _get_npu_format(input: torch.Tensor) -> int:
    return int(Format.ND)


def _check_format(number: int) -> None:
    if Format(number).name in _PLAIN:
        return
    if _config.option("ALLOW_INTERNAL_FORMAT") == "enable":
        raise recorded.refusal(f"the private tensor layout {Format(number).name}")
    warnings.warn(
        "Cannot create tensor with internal format while allow_internal_format=False, "
        "tensor will be created with base format.",
        stacklevel=2,
    )


def npu_format_cast(
    input: torch.Tensor,
    acl_format: int,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    _check_format(acl_format)
    return input.clone()


def npu_format_cast_(
    input: torch.Tensor,
    acl_format: int,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    _check_format(acl_format)
    return input


def npu_format_cast_like(
    input: torch.Tensor,
    dst: torch.Tensor,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    return input.clone()


# torch_npu's own numbers for dtypes start at 256; torch turns a torch.dtype into a smaller one.
_DTYPES: dict[int, torch.dtype] = {
    number: getattr(torch, name)
    for name, number in recorded.constants().items()
    if isinstance(getattr(torch, name, None), torch.dtype)
} | {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}


def _dtype(number: int) -> torch.dtype:
    if number not in _DTYPES:
        raise recorded.refusal(f"a cast to dtype number {number}")
    return _DTYPES[number]


def npu_dtype_cast(input: torch.Tensor, dtype: int, input_dtype: int | None = None) -> torch.Tensor:
    return input.to(_dtype(dtype), copy=True)


def _setup_dtype_cast(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _backward_dtype_cast(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return grad.to(ctx.dtype), None, None


def _backward_format_cast(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return grad, None


KERNELS: dict[str, Any] = {
    "get_npu_format": _get_npu_format,
    "npu_dtype_cast": npu_dtype_cast,
    "npu_format_cast": npu_format_cast,
    "npu_format_cast.Tensor": npu_format_cast_like,
    "npu_format_cast_.acl_format": npu_format_cast_,
}
GRADIENTS: dict[str, Any] = {
    "npu_dtype_cast": (_backward_dtype_cast, _setup_dtype_cast),
    "npu_format_cast": (_backward_format_cast, None),
}
