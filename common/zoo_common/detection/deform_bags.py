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

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zoo_common.detection.ops_reference import Convolution, corners_and_shares


def deform_conv2d(
    images_BCHW: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    settings: Convolution,
) -> Tensor:
    """Differentiable deformable convolution; see ``ops.deform_conv2d``."""
    output_LO: Tensor = _DeformConv.apply(images_BCHW, offset, weight, mask, settings)
    if bias is not None:
        output_LO = output_LO + bias
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
        mask: Tensor | None,
        settings: Convolution,
    ) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(images_BCHW, offset, weight, mask)
        samples_GLX = take_samples(images_BCHW, offset, mask, weight, settings)
        product_GLO = samples_GLX @ _as_matrices(weight, len(samples_GLX)).transpose(1, 2)
        return product_GLO.transpose(0, 1).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_LO: Tensor) -> tuple[Tensor | None, ...]:
        images, offset, weight, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad
        images = images.detach().requires_grad_(needed[0])
        offset = offset.detach().requires_grad_(needed[1])
        mask = None if mask is None else mask.detach().requires_grad_(needed[3])
        with torch.enable_grad():
            samples_GLX = take_samples(images, offset, mask, weight, ctx.settings)
        groups = len(samples_GLX)
        gradient_GLO = gradient_LO.view(len(gradient_LO), groups, -1).transpose(0, 1)
        if samples_GLX.requires_grad:
            torch.autograd.backward(samples_GLX, gradient_GLO @ _as_matrices(weight, groups))
        weight_gradient = None
        if needed[2]:
            matrices_GOX = gradient_GLO.transpose(1, 2) @ samples_GLX.detach()
            weight_gradient = _as_weight(matrices_GOX, weight.shape)
        return images.grad, offset.grad, weight_gradient, None if mask is None else mask.grad, None


def take_samples(
    images_BCHW: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    settings: Convolution,
) -> Tensor:
    """What the taps see: (G, B L, K C / G), taps outside of channels."""
    batch, channels, height, width = images_BCHW.shape
    kernel = (weight.shape[2], weight.shape[3])
    taps = kernel[0] * kernel[1]
    moved_BDK2L = offset.reshape(batch, -1, taps, 2, offset.shape[2] * offset.shape[3])
    moving = moved_BDK2L.shape[1]
    pixels = images_BCHW.reshape(batch, moving, -1, height, width).permute(0, 1, 3, 4, 2)
    corners, shares = corners_and_shares(
        moved_BDK2L, mask, offset.shape, kernel, images_BCHW, settings
    )
    bags = F.embedding_bag(
        corners.view(-1, 4),
        pixels.reshape(-1, channels // moving),
        mode="sum",
        per_sample_weights=shares.view(-1, 4),
    )
    groups = channels // weight.shape[1]
    if moving == groups == 1:
        return bags.view(1, -1, taps * channels)
    samples_BLKC = bags.view(batch, moving, -1, taps, channels // moving).permute(0, 2, 3, 1, 4)
    split = samples_BLKC.reshape(-1, taps, groups, channels // groups)
    return split.permute(2, 0, 1, 3).flatten(2)


def _as_matrices(weight: Tensor, groups: int) -> Tensor:
    """(O, C / G, kh, kw) to (G, O / G, K C / G), in the order of the samples."""
    flat = weight.flatten(2).transpose(1, 2).flatten(1)
    return flat.view(groups, -1, flat.shape[1])


def _as_weight(matrices_GOX: Tensor, shape: torch.Size) -> Tensor:
    """The way back of :func:`_as_matrices`."""
    flat = matrices_GOX.flatten(0, 1).view(shape[0], shape[2] * shape[3], shape[1])
    return flat.transpose(1, 2).reshape(shape)
