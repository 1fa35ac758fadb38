"""Rows of all ranks, with exact gradients and one message a direction.

Shape letters: G groups of rows (views, or texts of a caption), B rows of this rank, N = W B rows of
all W ranks, D features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Both got another name in torch 2.14, and the old ones warn since.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size() -> int:
    """The number of ranks of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def stack_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """A tensor of every rank, (W, *shape), without gradient.

    Args:
        tensor: of the same shape on every rank.
        group: whose ranks; by default those of the run.
    """
    sent = tensor.detach().contiguous()
    ranks = dist.get_world_size(group)
    received = sent.new_empty(ranks * sent.numel())
    _all_gather(received, sent.flatten(), group=group)
    return received.view(ranks, *sent.shape)


def gather_rows(*groups_GBD: Tensor) -> tuple[Tensor, ...]:
    """The rows of all ranks, in order of rank; all groups travel in one message.

    The gradient of a row is the sum of what all ranks ask of it, also in one message: a rank
    receives that of its own rows only. So if each rank's loss is the mean over its own rows, the
    mean of the ranks' weight gradients, as DistributedDataParallel makes it, is the gradient of
    the mean over the rows of all ranks.

    Args:
        groups_GBD: any number of tensors (G, B, D) of one format and one B and D; all ranks give
            the same shapes.

    Returns:
        A tensor (G, N, D) for each.
    """
    if world_size() == 1:
        return groups_GBD
    gathered: tuple[Tensor, ...] = _Gather.apply(*groups_GBD)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *groups_GBD: Tensor) -> tuple[Tensor, ...]:
        ctx.sizes = [len(rows_GBD) for rows_GBD in groups_GBD]
        received_WGBD = stack_ranks(torch.cat(groups_GBD))
        parts = torch.split(received_WGBD, ctx.sizes, dim=1)
        return tuple(part_WGBD.transpose(0, 1).flatten(1, 2) for part_WGBD in parts)

    @staticmethod
    def backward(ctx: Any, *gradients_GND: Tensor) -> tuple[Tensor, ...]:
        ranks = world_size()
        parts = [torch.unflatten(part_GND, 1, (ranks, -1)) for part_GND in gradients_GND]
        sent_WGBD = torch.cat([part_GWBD.transpose(0, 1) for part_GWBD in parts], dim=1)
        own_GBD = torch.empty_like(sent_WGBD[0])
        _reduce_scatter(own_GBD.view(-1), sent_WGBD.view(-1))
        return torch.split(own_GBD, ctx.sizes)
