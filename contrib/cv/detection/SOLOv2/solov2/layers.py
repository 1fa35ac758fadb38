"""The convolutions of SOLOv2, with the normalisation behind them.

Names of modules are those of WXinlong/SOLO and so of its checkpoints: in the ResNet, ``conv1`` and
``bn1`` stand side by side; elsewhere ``conv`` and ``gn`` in a block of their own.

What differs, with the same numbers: a batch normalisation with fixed statistics is multiplied into
the weights of its convolution, through which its own weights get their gradients. That saves a
pass over every activation, and the memory of one. And an image may be padded beyond what its batch
needs (:class:`zoo_common.detection.extent.Extent`): what lies there counts in no mean, and is zero
in front of every operator that looks at neighbours.

Shape letters: B images, C channels, H W cells of a map, S cells of all maps, M some of them,
G groups.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from solov2 import fused
from zoo_common import winograd
from zoo_common.detection import ops
from zoo_common.detection.extent import Extent

GROUPS = 32  # of group normalisation, everywhere in SOLOv2


class DeformableConv(nn.Conv2d):
    """A convolution that moves its samples: version 1, or version 2, which weighs them too.

    Dai et al., arXiv:1703.06211; Zhu et al., arXiv:1811.11168. A plain convolution,
    ``conv_offset``, tells row and column of each sample and, in version 2, its weight before the
    sigmoid; it starts at zero, so that version 1 starts as the plain convolution.
    """

    def __init__(self, *args: Any, version: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.taps = taps
        self.modulated = version == "v2"
        self.conv_offset = nn.Conv2d(
            self.in_channels,
            taps * (3 if self.modulated else 2),
            (self.kernel_size[0], self.kernel_size[1]),
            (self.stride[0], self.stride[1]),
            (self.kernel_size[0] // 2, self.kernel_size[1] // 2),
        )
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns [B, out channels, H / stride, W / stride]."""
        return convolve(self, x_BCHW, self.weight, self.bias)


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, deformable: str = ""
) -> nn.Conv2d:
    """A convolution without bias that keeps the size but for the stride; ``deformable``: v1, v2."""
    if deformable:
        return DeformableConv(
            inputs, outputs, kernel, stride, kernel // 2, bias=False, version=deformable
        )
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def convolve(layer: nn.Conv2d, x_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``layer`` computes, with other weights."""
    if not torch.is_autocast_enabled(x_BCHW.device.type):
        weight = weight.to(x_BCHW.dtype)
        bias = None if bias is None else bias.to(x_BCHW.dtype)
    if not isinstance(layer, DeformableConv):
        return F.conv2d(x_BCHW, weight, bias, layer.stride, layer.padding)
    moves_BTHW = layer.conv_offset(x_BCHW)
    mask_BTHW = None
    if layer.modulated:
        mask_BTHW = moves_BTHW[:, 2 * layer.taps :].sigmoid()
        moves_BTHW = moves_BTHW[:, : 2 * layer.taps]
    stride, padding = layer.stride[0], layer.kernel_size[0] // 2
    return ops.deform_conv2d(
        x_BCHW, moves_BTHW, weight, bias, stride=stride, padding=padding, mask=mask_BTHW
    )


def convolve_all(layer: nn.Conv2d, maps: list[Tensor]) -> list[Tensor]:
    """What ``layer`` makes of each map; together, since on a CPU many tiles make it quicker."""
    if layer.kernel_size == (3, 3) and not isinstance(layer, DeformableConv):
        return winograd.conv3x3(maps, layer.weight, layer.bias)
    return [layer(map_BCHW) for map_BCHW in maps]


def convolve_at(layer: nn.Conv2d, maps: list[Tensor], cells_BM: Tensor) -> Tensor:
    """What a 3x3 ``layer`` of stride 1 computes at some cells, [B, M, outputs].

    Args:
        layer: the convolution.
        maps: [B, channels, H, W], of any sizes.
        cells_BM: int64, counted through all maps, each row by row.
    """
    lines = [map_BCHW.permute(0, 2, 3, 1).flatten(1, 2) for map_BCHW in maps]
    zeros_B1C = torch.zeros_like(lines[0][:, :1])  # beyond the border
    lines_BSC = torch.cat([*lines, zeros_B1C], dim=1)
    windows, first, outside = [], 0, lines_BSC.shape[1] - 1
    for map_BCHW in maps:
        height, width = map_BCHW.shape[-2:]
        cells_HW = torch.arange(first, first + height * width).view(height, width)
        bordered_HW = F.pad(cells_HW, (1, 1, 1, 1), value=outside)
        windows.append(bordered_HW.unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 9))
        first += height * width
    seen_BX = torch.cat(windows)[cells_BM].flatten(1)
    images_B1 = torch.arange(len(lines_BSC))[:, None]
    taps_BMX = lines_BSC[images_B1, seen_BX].view(*cells_BM.shape, -1)
    return F.linear(taps_BMX, layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias)


class FixedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics are constants; its weights are trained.

    It is given the convolution in front of it, and takes its place.
    """

    running_mean: Tensor
    running_var: Tensor

    def forward(  # type: ignore[override]
        self,
        layer: nn.Conv2d,
        x_BCHW: Tensor,
        *,
        plus_BCHW: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """The normalised output of ``layer``, plus a map; it may be changed in place."""
        if torch.is_grad_enabled():
            fused.forget(layer)
        sources = (layer.weight, self.weight, self.bias, self.running_mean, self.running_var)
        if fused.suits(x_BCHW, layer, sources):
            return fused.convolve(layer, x_BCHW, sources, lambda: self.fold(layer), plus_BCHW, relu)
        y_BCHW = convolve(layer, x_BCHW, *self.fold(layer))
        return fused.finish(y_BCHW, plus_BCHW, relu)

    def fold(self, layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Weight and bias of ``layer`` with the normalisation multiplied in."""
        scale_C = self.weight * (self.running_var + self.eps).rsqrt()
        shift_C = self.bias - self.running_mean * scale_C
        return layer.weight * scale_C.view(-1, 1, 1, 1), shift_C


class ConvGroupNorm(nn.GroupNorm):
    """Group normalisation in the place of :class:`FixedBatchNorm`."""

    def forward(  # type: ignore[override]
        self,
        layer: nn.Conv2d,
        x_BCHW: Tensor,
        *,
        plus_BCHW: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """The normalised output of ``layer``, plus a map."""
        return fused.finish(super().forward(layer(x_BCHW)), plus_BCHW, relu)


def norm(kind: str, channels: int) -> FixedBatchNorm | ConvGroupNorm:
    """The normalisation of the ResNet: ``BN`` with fixed statistics, or ``GN``."""
    return FixedBatchNorm(channels) if kind == "BN" else ConvGroupNorm(GROUPS, channels)


@torch.no_grad()
def measure_norms(network: nn.Module, images_BCHW: Tensor) -> int:
    """Gives fixed statistics the values of these images, layer after layer.

    For a network without loaded weights: its constants are those of no data, so that each residual
    block adds to the size of the activations, and the first steps end in NaN.

    Returns:
        How many were set.
    """

    def measure(layer: nn.Module, inputs: tuple[nn.Conv2d, Tensor]) -> None:
        assert isinstance(layer, FixedBatchNorm)
        y_BCHW = inputs[0](inputs[1])
        layer.running_mean.copy_(y_BCHW.mean(dim=(0, 2, 3)))
        layer.running_var.copy_(y_BCHW.var(dim=(0, 2, 3)))

    layers = [module for module in network.modules() if isinstance(module, FixedBatchNorm)]
    handles = [layer.register_forward_pre_hook(measure) for layer in layers]
    network(images_BCHW)
    for handle in handles:
        handle.remove()
    return len(layers)


class ConvBlock(nn.Module):
    """A convolution, group normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, deformable: str = "") -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, kernel, deformable=deformable)
        self.gn = nn.GroupNorm(GROUPS, outputs)
        nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, maps: list[Tensor], inside_HW: Tensor | None = None) -> list[Tensor]:
        """Returns a map [B, outputs, H, W] for each.

        Args:
            maps: they share the weights; zero where ``inside_HW`` is false.
            inside_HW: bool, the cells whose mean and variance count; None for all. What the
                others hold afterwards is zero.
        """
        convolved = convolve_all(self.conv, maps)
        if inside_HW is None:
            return [F.relu_(self.gn(map_BCHW)) for map_BCHW in convolved]
        return [
            F.relu(group_norm(map_BCHW, self.gn, inside_HW)) * inside_HW for map_BCHW in convolved
        ]


def group_norm(x_BCHW: Tensor, layer: nn.GroupNorm, inside_HW: Tensor) -> Tensor:
    """Group normalisation by the mean and variance of some of the cells.

    In float32 on purpose, whatever the format of ``x_BCHW``; float64 stays.
    """
    wide = x_BCHW if x_BCHW.dtype is torch.float64 else x_BCHW.float()
    batch, _, height, width = wide.shape
    x_BGCHW = wide.reshape(batch, layer.num_groups, -1, height, width)
    inside_HW = inside_HW.to(wide.dtype)
    count = inside_HW.sum() * x_BGCHW.shape[2]
    over = (2, 3, 4)
    mean_BG = (x_BGCHW * inside_HW).sum(over, keepdim=True) / count
    centred_BGCHW = x_BGCHW - mean_BG
    variance_BG = (centred_BGCHW.square() * inside_HW).sum(over, keepdim=True) / count
    y_BCHW = (centred_BGCHW * (variance_BG + layer.eps).rsqrt()).flatten(1, 2)
    y_BCHW = y_BCHW * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    normed: Tensor = y_BCHW.to(x_BCHW.dtype)
    return normed


def resize(
    map_BCHW: Tensor, size: tuple[int, int], cells_2: Tensor | None = None, to: Tensor | None = None
) -> Tensor:
    """Bilinear interpolation, as ``F.interpolate`` with ``align_corners=False``.

    Args:
        map_BCHW: the map.
        size: height and width to make.
        cells_2: int64, height and width of the part of ``map_BCHW`` that is resized; None: all.
        to: int64, height and width of the part of the result that it becomes; beyond it the
            result is of no use. None: all of ``size``.
    """
    if cells_2 is None:
        if map_BCHW.shape[-2:] == size:
            return map_BCHW
        return F.interpolate(map_BCHW, size=size, mode="bilinear", align_corners=False)
    wide = map_BCHW if map_BCHW.dtype is torch.float64 else map_BCHW.float()
    for dim in (0, 1):
        there = size[dim] if to is None else to[dim]
        taps = _taps(size[dim], cells_2[dim], there, wide.dtype)
        wide = _interpolate(wide, dim - 2, *taps)
    return wide.to(map_BCHW.dtype)


def _taps(
    size: int, cells: Tensor, there: Tensor | int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of ``size`` places the cell before it, the one behind, and the share of that."""
    places = torch.arange(size, device=cells.device, dtype=dtype) + 0.5
    position = ((cells.to(dtype) / there) * places - 0.5).clamp(min=0)
    before = position.floor()
    last = cells - 1
    low = torch.minimum(before.long(), last)
    high = torch.minimum(low + 1, last)
    return low, high, position - before


def _interpolate(map_BCHW: Tensor, dim: int, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    shape = [1, 1, -1, 1] if dim == -2 else [1, 1, 1, -1]
    share = share.view(shape)
    before, behind = map_BCHW.index_select(dim, low), map_BCHW.index_select(dim, high)
    return before * (1 - share) + behind * share


def coordinates(like_BCHW: Tensor, cells_2: Tensor | None = None) -> Tensor:
    """Columns and rows of a map's cells, from -1 to 1, [B, 2, H, W].

    Args:
        like_BCHW: gives size, device and dtype.
        cells_2: int64, height and width of the part that goes from -1 to 1; None: all.
    """
    batch, _, height, width = like_BCHW.shape
    device, dtype = like_BCHW.device, like_BCHW.dtype
    wide = torch.promote_types(dtype, torch.float32)

    def line(length: int, dim: int) -> Tensor:
        if cells_2 is None:
            return torch.linspace(-1, 1, length, device=device, dtype=wide)
        step = 2 / (cells_2[dim] - 1).clamp(min=1).to(wide)
        return torch.arange(length, device=device, dtype=wide) * step - 1

    x_HW = line(width, 1).expand(height, width)
    y_HW = line(height, 0)[:, None].expand(height, width)
    return torch.stack([x_HW, y_HW]).to(dtype).expand(batch, 2, height, width)


def inside_of(extent: Extent | None, stride: int, map_BCHW: Tensor) -> Tensor | None:
    """Which cells of a map of this stride count, bool [H, W]; None: all."""
    if extent is None:
        return None
    return extent.inside(stride, map_BCHW.shape[-2], map_BCHW.shape[-1])
