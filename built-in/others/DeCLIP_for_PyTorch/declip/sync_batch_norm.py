"""Batch normalisation over the images of several ranks, on any kind of device.

torch.nn.SyncBatchNorm refuses CPU tensors and knows no NPUs' kernels of its own. The forward pass
exchanges each rank's mean, variance and count, the backward pass two sums a channel: a collective
each. Ioffe and Szegedy, Batch Normalization, arXiv:1502.03167; the ranks' moments are merged as in
Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances
(1979), which loses nothing where a mean is large against its deviation.

Shape letters: B images, C channels, H W pixels, R ranks that share statistics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from declip.gather import rank, stack_ranks, world_size
from declip.losses import wide
from zoo_common.errors import UserError

_OVER = (0, 2, 3)  # of (B, C, H, W): all but channels


class SyncBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of a group of consecutive ranks.

    Its keys are nn.BatchNorm2d's. In evaluation, and where a rank is alone, it is one. Statistics
    are float32 under half-precision inputs. Gradients keep DistributedDataParallel's convention:
    an input's is that of the sum of the ranks' losses; weight and bias get this rank's share, so
    that the mean over the ranks is the gradient of the mean of their losses.

    Args:
        channels: C.
        ranks: how many processes share statistics: 1: each has its own; 0 or more than there are:
            all. Every process makes its layers in the same order.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.

    Raises:
        UserError: the processes do not fall into groups of ``ranks``.
    """

    momentum: float

    def __init__(
        self, channels: int, ranks: int = 0, *, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.ranks = ranks
        _group(ranks)

    @property
    def has_shared_statistics(self) -> bool:
        """Whether all processes of the run keep the same running statistics."""
        return self.ranks == 0 or self.ranks >= world_size()

    @property
    def is_alone(self) -> bool:
        """Whether training statistics are those of this process's images alone."""
        return _group(self.ranks) is None

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalises a feature map, and in training moves the running statistics."""
        group = _group(self.ranks) if self.training else None
        if group is None:
            return super().forward(_for_kernel(images_BCHW)).to(images_BCHW.dtype)
        mean_C, variance_C, count = _statistics(images_BCHW.detach(), group)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            unbiased_C = variance_C * (count / (count - 1))
            for running_C, now_C in ((self.running_mean, mean_C), (self.running_var, unbiased_C)):
                assert running_C is not None
                running_C.lerp_(now_C.to(running_C.dtype), self.momentum)
        normalized_BCHW: Tensor = _Normalize.apply(
            images_BCHW, self.weight, self.bias, mean_C, variance_C, count, group, self.eps
        )
        return normalized_BCHW


def _group(ranks: int) -> dist.ProcessGroup | None:
    """The processes that share statistics with this one; None if it is alone."""
    everyone = world_size()
    if everyone == 1 or ranks == 1:
        return None
    assert dist.group.WORLD is not None
    if ranks == 0 or ranks >= everyone:
        return dist.group.WORLD
    if everyone % ranks:
        raise UserError(
            f"Batch statistics of {ranks} processes each do not divide the {everyone} processes of "
            "the run: take a divisor for model.sync_batch_norm, or 0 for one group."
        )
    return _consecutive(dist.group.WORLD, ranks)


@functools.cache
def _consecutive(everyone: dist.ProcessGroup, ranks: int) -> dist.ProcessGroup:
    """The one of the groups of ``ranks`` consecutive processes that this one is in.

    Every process takes part in making every group.
    """
    groups: list[Any] = [
        dist.new_group(list(range(first, first + ranks)))
        for first in range(0, everyone.size(), ranks)
    ]
    own: dist.ProcessGroup = groups[rank() // ranks]
    return own


def _statistics(images_BCHW: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of the group's images, (C,), and its pixels a channel, (1,)."""
    values_BCHW = wide(images_BCHW)
    variance_C, mean_C = torch.var_mean(values_BCHW, dim=_OVER, correction=0)
    channels = len(mean_C)
    count = mean_C.new_full((1,), values_BCHW.numel() // channels)
    received = stack_ranks(torch.cat([mean_C, variance_C, count]), group)
    means_RC, variances_RC, counts_R1 = torch.split(received, [channels, channels, 1], dim=1)
    total = counts_R1.sum(dim=0)
    mean_C = (means_RC * counts_R1).sum(dim=0) / total
    squares_RC = variances_RC + (means_RC - mean_C).square()
    return mean_C, (squares_RC * counts_R1).sum(dim=0) / total, total


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images_BCHW: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        mean_C: Tensor,
        variance_C: Tensor,
        count: Tensor,
        group: dist.ProcessGroup,
        eps: float,
    ) -> Tensor:
        ctx.group, ctx.eps = group, eps
        ctx.save_for_backward(images_BCHW, weight_C, mean_C, variance_C, count)
        values_BCHW = _for_kernel(images_BCHW)
        out_BCHW = F.batch_norm(values_BCHW, mean_C, variance_C, weight_C, bias_C, eps=eps)
        return out_BCHW.to(images_BCHW.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        images_BCHW, weight_C, mean_C, variance_C, count = ctx.saved_tensors
        scale_C = (variance_C + ctx.eps).rsqrt()
        units_BCHW = (wide(images_BCHW) - _per_channel(mean_C)) * _per_channel(scale_C)
        gradient = wide(gradient_BCHW)
        own = torch.cat([(gradient * units_BCHW).sum(dim=_OVER), gradient.sum(dim=_OVER)])
        weight_grad_C, bias_grad_C = own.to(weight_C.dtype).chunk(2)
        whole = own.clone()
        dist.all_reduce(whole, group=ctx.group)
        along_C, mean_grad_C = (whole / count).chunk(2)
        gradient = gradient - _per_channel(mean_grad_C) - units_BCHW * _per_channel(along_C)
        gradient = gradient * _per_channel(weight_C * scale_C)
        nothing = (None,) * 5
        return gradient.to(images_BCHW.dtype), weight_grad_C, bias_grad_C, *nothing


def _for_kernel(images_BCHW: Tensor) -> Tensor:
    """In a format that batch normalisation has kernels for: on NPUs bfloat16 is none."""
    return images_BCHW.float() if images_BCHW.dtype is torch.bfloat16 else images_BCHW


def _per_channel(values_C: Tensor) -> Tensor:
    """A number a channel, to be used on (B, C, H, W)."""
    return values_C[:, None, None]
