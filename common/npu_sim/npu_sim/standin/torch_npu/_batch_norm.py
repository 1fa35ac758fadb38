"""The two operators by which torch_npu synchronises batch norm over ranks."""

from __future__ import annotations

from typing import Any

import torch


def batch_norm_reduce(input: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and sums of squares of each channel, in float32.

    Args:
        input: (B, C, H, W).
        eps: not used.
    """
    if input.dim() != 4:
        raise RuntimeError(f"batch_norm_reduce takes a 4-D input, but got {input.dim()}-D")
    values = input.float()
    return values.sum((0, 2, 3)), values.square().sum((0, 2, 3))


def batch_norm_gather_stats_update(
    input: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse deviation over all ranks; moves the running statistics.

    Args:
        input: not used but for its device.
        mean: (ranks, C) sums, whatever the name says.
        invstd: (ranks, C) sums of squares.
        running_mean: (C,), changed in place.
        running_var: (C,), changed in place; it takes the unbiased variance.
        momentum: weight of the new statistics.
        eps: added to the variance.
        counts: (ranks,) values a channel.
    """
    count = counts.sum()
    average = mean.sum(0) / count
    variance = (invstd.sum(0) / count - average.square()).clamp_min(0)
    if running_mean is not None:
        running_mean.lerp_(average.to(running_mean.dtype), momentum)
    if running_var is not None:
        unbiased = variance * (count / (count - 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return average, torch.rsqrt(variance + eps)


KERNELS: dict[str, Any] = {
    "batch_norm_gather_stats_update": batch_norm_gather_stats_update,
    "batch_norm_reduce": batch_norm_reduce,
}
GRADIENTS: dict[str, Any] = {}
