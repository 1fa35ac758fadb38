"""Keeps less for the backward pass: what a batch norm and a ReLU give is made anew there.

Of conv, norm and ReLU in a row autograd keeps two maps of one size: the norm's input, and the
ReLU's output for the next convolution. The second follows from the first, bit for bit, in one pass
over memory. Chen et al., Training Deep Nets with Sublinear Memory Cost,
https://arxiv.org/abs/1604.06174 and Rota Bulò et al., In-Place Activated BatchNorm,
https://arxiv.org/abs/1712.02616.

Shape letters: B images, C channels, H W cells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F


def behind_norm(
    norm: nn.BatchNorm2d, maps_BCHW: Tensor, work: Callable[[Tensor], Tensor], *, recompute: bool
) -> Tensor:
    """``work(relu(norm(maps)))``.

    Args:
        norm: a batch norm; where its statistics are not this process's alone nothing is made anew.
        maps_BCHW: the norm's input.
        work: what uses the ReLU's output, which it must not change.
        recompute: do not keep that output.
    """
    normed_BCHW = norm(maps_BCHW)
    # A norm over several processes would need them again; bfloat16 is normalised in float32.
    plain = getattr(norm, "is_alone", True) and maps_BCHW.dtype is not torch.bfloat16
    if not (recompute and plain and norm.training and normed_BCHW.requires_grad):
        return work(F.relu_(normed_BCHW))
    again = _Again(norm, maps_BCHW.detach(), normed_BCHW.data_ptr())
    with saved_tensors_hooks(again.pack, again.unpack):
        return work(F.relu_(normed_BCHW))


class _Again:
    """Stands for the output of a norm and a ReLU in what autograd keeps.

    Args:
        norm: gives weight and bias, which do not change until the backward pass.
        maps_BCHW: its input, which it keeps in any case.
        address: of the output.
    """

    def __init__(self, norm: nn.BatchNorm2d, maps_BCHW: Tensor, address: int) -> None:
        self._norm = norm
        self._maps_BCHW = maps_BCHW
        self._address = address
        self._users = 0
        self._made: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | None:
        """None for the output; other tensors as they are."""
        if tensor.data_ptr() != self._address or tensor.shape != self._maps_BCHW.shape:
            return tensor
        self._users += 1
        return None

    def unpack(self, packed: Tensor | None) -> Tensor:
        """The way back; the output lives until its last user has it."""
        if packed is not None:
            return packed
        made = self._made
        if made is None:
            norm = self._norm
            with torch.no_grad():
                normed = F.batch_norm(
                    self._maps_BCHW, None, None, norm.weight, norm.bias, True, 0.0, norm.eps
                )
                made = F.relu_(normed)
        self._users -= 1
        self._made = made if self._users else None
        return made
