"""Operators that torch writes as several: RMS norm, SwiGLU, rotary positions.

Each has its gradient as an operator of its own, which autograd calls, as on the real one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def npu_rms_norm(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``input / rms * gamma`` and 1 / rms in float32, over gamma's dimensions."""
    dims = tuple(range(-gamma.dim(), 0))
    values = input.float()
    rstd = torch.rsqrt(values.square().mean(dims, keepdim=True) + epsilon)
    return (values * rstd * gamma.float()).to(input.dtype), rstd


def npu_rms_norm_backward(
    dy: torch.Tensor, input: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and gamma; gamma's is float32."""
    dims = tuple(range(-gamma.dim(), 0))
    normed = input.float() * rstd
    grad = dy.float() * gamma.float()
    of_input = rstd * (grad - normed * (grad * normed).mean(dims, keepdim=True))
    rows = tuple(range(input.dim() - gamma.dim()))
    of_gamma = dy.float() * normed
    return of_input.to(input.dtype), of_gamma.sum(rows) if rows else of_gamma


def _setup_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_rms_norm(ctx: Any, grad: torch.Tensor, _: None) -> tuple[Any, ...]:
    input, gamma, rstd = ctx.saved_tensors
    of_input, of_gamma = torch.ops.npu.npu_rms_norm_backward(grad, input, gamma, rstd)
    return of_input, of_gamma.to(gamma.dtype), None


def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """SiLU of the first half times the second half of a dimension."""
    first, second = _halves(input, dim)
    return (functional.silu(first) * second).to(input.dtype)


def _halves(input: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    if input.size(dim) % 2:
        raise RuntimeError(f"npu_swiglu takes an even size in dim {dim}, but got {input.size(dim)}")
    first, second = input.float().chunk(2, dim)
    return first, second


def npu_swiglu_backward(
    grad_output: torch.Tensor, input: torch.Tensor, dim: int = -1
) -> torch.Tensor:
    first, second = _halves(input, dim)
    gate = torch.sigmoid(first)
    grad = grad_output.float()
    of_first = grad * second * gate * (1 + first * (1 - gate))
    return torch.cat((of_first, grad * first * gate), dim).to(input.dtype)


def _setup_swiglu(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.dim = inputs[1]


def _backward_swiglu(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return torch.ops.npu.npu_swiglu_backward(grad, *ctx.saved_tensors, ctx.dim), None


def _rotated(values: torch.Tensor, mode: str) -> torch.Tensor:
    """Each pair (a, b) of the last dimension becomes (-b, a)."""
    if mode == "half":
        first, second = values.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-values[..., 1::2], values[..., ::2]), -1).flatten(-2)


def npu_rotary_mul(
    input: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    """``input * cos + rotated(input) * sin`` of 4-D tensors whose last size is even, under 896."""
    if rotary_mode not in ("half", "interleave"):
        raise RuntimeError(f"rotary_mode must be half or interleave, but got {rotary_mode}")
    if rotate is not None:
        raise RuntimeError("npu_rotary_mul takes no rotate matrix on this chip")
    if input.dim() != 4 or input.size(-1) % 2 or input.size(-1) >= 896:
        raise RuntimeError(
            "npu_rotary_mul takes a 4-D input whose last size is even and under 896, but got "
            f"{tuple(input.shape)}"
        )
    return input * r1 + _rotated(input, rotary_mode) * r2


def npu_rotary_mul_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, cos and sin."""
    # The rotation's inverse is its negative.
    of_input = grad * r1 - _rotated(grad * r2, rotary_mode)
    of_r1 = (grad * input).sum_to_size(r1.shape)
    return of_input, of_r1, (grad * _rotated(input, rotary_mode)).sum_to_size(r2.shape)


def _setup_rotary(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.mode = inputs[3]


def _backward_rotary(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grads = torch.ops.npu.npu_rotary_mul_backward(grad, *ctx.saved_tensors, ctx.mode)
    return *grads, None, None


KERNELS: dict[str, Any] = {
    "npu_rms_norm": npu_rms_norm,
    "npu_rms_norm_backward": npu_rms_norm_backward,
    "npu_rotary_mul": npu_rotary_mul,
    "npu_rotary_mul_backward": npu_rotary_mul_backward,
    "npu_swiglu": npu_swiglu,
    "npu_swiglu_backward": npu_swiglu_backward,
}
GRADIENTS: dict[str, Any] = {
    "npu_rms_norm": (_backward_rms_norm, _setup_rms_norm),
    "npu_rotary_mul": (_backward_rotary, _setup_rotary),
    "npu_swiglu": (_backward_swiglu, _setup_swiglu),
}
