"""Deformable convolution for CPUs, in operators that torch has fast and in threads.

The samples of all taps are weighted sums of four pixels each, which is what an embedding bag
gives: a lookup, a sum and both gradients in vector instructions. One matrix product makes the
output of them. torchvision's kernel does the backward pass by scalar additions in one thread and
takes several times as long: ``python tools/bench/deform_conv.py``.

Zhu et al., Deformable ConvNets v2, https://arxiv.org/abs/1811.11168.

Shape letters: B images, C input channels, H W pixels, D groups of channels that move together, K
taps, L output pixels, G groups of weights, X = K C / G inputs of a product, O output channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zoo_common.detection.ops_reference import Convolution, corners_and_shares

_CHUNK_ELEMENTS = 2**20
"""Samples that the forward pass has at once: they stay in a cache."""


def deform_conv2d(
    images_BCHW: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    settings: Convolution,
) -> Tensor:
    """Differentiable deformable convolution; see ``ops.deform_conv2d``."""
    output_LO: Tensor = _DeformConv.apply(images_BCHW, offset, weight, bias, mask, settings)
    rows, columns = offset.shape[2:]
    return output_LO.view(len(images_BCHW), rows, columns, -1).permute(0, 3, 1, 2)


class _DeformConv(torch.autograd.Function):
    """Makes the samples anew in the backward pass: they are nine times as large as the input."""

    @staticmethod
    def forward(
        ctx: Any,
        images_BCHW: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        settings: Convolution,
    ) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(images_BCHW, offset, weight, mask)
        samples = Samples.plan(images_BCHW, offset, mask, weight, settings)
        matrices_GOX = _as_matrices(weight, samples.groups)
        batch, _, pixels = samples.corners.shape[:3]
        # The output itself, of which the parts are views: autograd lets it be changed in place.
        output_LO = images_BCHW.new_empty(batch * pixels, len(weight))
        output_BLGO = output_LO.view(batch, pixels, *matrices_GOX.shape[:2])
        step = max(1, _CHUNK_ELEMENTS // (batch * matrices_GOX[0, 0].numel() * samples.groups))
        for first in range(0, pixels, step):
            part = slice(first, first + step)
            product_GLO = samples.take(part) @ matrices_GOX.transpose(1, 2)
            rows = output_BLGO[:, part]
            rows.copy_(product_GLO.transpose(0, 1).reshape(rows.shape))
        return output_LO if bias is None else output_LO.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_LO: Tensor) -> tuple[Tensor | None, ...]:
        images, offset, weight, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad
        images = images.detach().requires_grad_(needed[0])
        offset = offset.detach().requires_grad_(needed[1])
        mask = None if mask is None else mask.detach().requires_grad_(needed[4])
        with torch.enable_grad():
            samples_GLX = Samples.plan(images, offset, mask, weight, ctx.settings).take()
        groups = len(samples_GLX)
        gradient_GLO = gradient_LO.view(len(gradient_LO), groups, -1).transpose(0, 1)
        if samples_GLX.requires_grad:
            torch.autograd.backward(samples_GLX, gradient_GLO @ _as_matrices(weight, groups))
        weight_gradient = None
        if needed[2]:
            matrices_GOX = gradient_GLO.transpose(1, 2) @ samples_GLX.detach()
            weight_gradient = _as_weight(matrices_GOX, weight.shape)
        bias_gradient = gradient_LO.sum(dim=0) if needed[3] else None
        mask_gradient = None if mask is None else mask.grad
        return images.grad, offset.grad, weight_gradient, bias_gradient, mask_gradient, None


class Samples(NamedTuple):
    """What the taps see, to be taken.

    Attributes:
        table: rows of pixels, (B D H W, C / D).
        corners: the four rows of each sample, (B, D, L, K, 4).
        shares: theirs in it.
        groups: G.
    """

    table: Tensor
    corners: Tensor
    shares: Tensor
    groups: int

    @classmethod
    def plan(
        cls,
        images_BCHW: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        settings: Convolution,
    ) -> Samples:
        """From what ``ops.deform_conv2d`` takes."""
        batch, channels, height, width = images_BCHW.shape
        kernel = (weight.shape[2], weight.shape[3])
        moved_BDK2L = offset.reshape(batch, -1, kernel[0] * kernel[1], 2, offset[0, 0].numel())
        moving = moved_BDK2L.shape[1]
        pixels = images_BCHW.reshape(batch, moving, -1, height, width).permute(0, 1, 3, 4, 2)
        corners, shares = corners_and_shares(
            moved_BDK2L, mask, offset.shape, kernel, images_BCHW, settings
        )
        table = pixels.reshape(-1, channels // moving)
        return cls(table, corners, shares, channels // weight.shape[1])

    def take(self, part: slice = slice(None)) -> Tensor:
        """The samples of some output pixels: (G, B L, K C / G), taps outside of channels."""
        corners, shares = self.corners[:, :, part], self.shares[:, :, part]
        bags = F.embedding_bag(
            corners.reshape(-1, 4),
            self.table,
            mode="sum",
            per_sample_weights=shares.reshape(-1, 4),
        )
        batch, moving, pixels, taps, _ = corners.shape
        if moving == self.groups == 1:
            return bags.view(1, batch * pixels, -1)
        samples_BLKC = bags.view(batch, moving, pixels, taps, -1).permute(0, 2, 3, 1, 4)
        split = samples_BLKC.reshape(batch * pixels, taps, self.groups, -1)
        return split.permute(2, 0, 1, 3).flatten(2)


def _as_matrices(weight: Tensor, groups: int) -> Tensor:
    """(O, C / G, kh, kw) to (G, O / G, K C / G), in the order of the samples."""
    flat = weight.flatten(2).transpose(1, 2).flatten(1)
    return flat.view(groups, -1, flat.shape[1])


def _as_weight(matrices_GOX: Tensor, shape: torch.Size) -> Tensor:
    """The way back of :func:`_as_matrices`."""
    flat = matrices_GOX.flatten(0, 1).view(shape[0], shape[2] * shape[3], shape[1])
    return flat.transpose(1, 2).reshape(shape)
