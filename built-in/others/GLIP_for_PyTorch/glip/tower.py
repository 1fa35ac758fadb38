"""The tower of the head: fusion, a layer of BERT and a dynamic convolution, several times.

Papers: Dai et al., Dynamic Head, https://arxiv.org/abs/2106.08322; Chen et al., Dynamic ReLU,
https://arxiv.org/abs/2003.10027. Follows https://github.com/microsoft/GLIP (MIT) at 9dda955,
maskrcnn_benchmark/modeling/rpn/vldyhead.py and layers/dyrelu.py; parameter names are the same.

Shape letters: B images, C channels, H W cells of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig

from glip.anchors import wide
from glip.fusion import BertEncoderLayer, VLFuse
from glip.language import Words
from glip.recompute import recomputed
from zoo_common.detection import ops

TAPS = 9
GROUPS = 16
COARSER, SAME, FINER = 0, 1, 2
"""Where a part of a level comes from."""


class DyReLU(nn.Module):
    """The larger of two lines of each channel, which the map's mean decides.

    Args:
        channels: C.
        reduction: C over the hidden width.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(),
            nn.Linear(channels // reduction, 4 * channels),
        )

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        lines = gate(self.fc(maps_BCHW.mean(dim=(2, 3))))[..., None, None]
        slope1, shift1, slope2, shift2 = (lines - 0.5).chunk(4, dim=1)
        return torch.maximum(
            maps_BCHW * (2 * slope1 + 1) + shift1, maps_BCHW * (2 * slope2) + shift2
        )


class ModulatedDeformConv(nn.Module):
    """A 3x3 convolution that takes offsets and factors of its samples from outside."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        bound = 1 / math.sqrt(TAPS * inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, maps_BCHW: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Maps (B, outputs, H / stride, W / stride), rounded up."""
        _, _, height, width = maps_BCHW.shape
        size = (-(-height // self.stride), -(-width // self.stride))
        return ops.deform_conv2d(
            maps_BCHW,
            reread(offset, size),
            self.weight,
            self.bias,
            stride=self.stride,
            padding=1,
            mask=reread(mask, size),
        )


class Conv3x3Norm(nn.Module):
    """Holds a deformable convolution and the group norm behind it under their published names."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = ModulatedDeformConv(inputs, outputs, stride)
        self.bn = nn.GroupNorm(GROUPS, outputs)


class DyConv(nn.Module):
    """Each level from itself and its neighbours, whose parts are weighed by their means.

    Args:
        channels: C of all levels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # In the order of COARSER, SAME and FINER.
        self.DyConv = nn.ModuleList(Conv3x3Norm(channels, channels, stride) for stride in (1, 1, 2))
        self.AttnConv = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 1, 1), nn.ReLU())
        self.relu = DyReLU(channels)
        self.offset = nn.Conv2d(channels, 3 * TAPS, 3, padding=1)
        weigh = self.AttnConv[1]
        assert isinstance(weigh, nn.Conv2d) and weigh.bias is not None
        nn.init.normal_(weigh.weight, std=0.01)
        nn.init.zeros_(weigh.bias)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, C, H, W), finest first, to levels of the same sizes."""
        outputs = []
        for number, level in enumerate(levels):
            places = self.offset(level)
            offset, mask = places[:, : 2 * TAPS], wide(places[:, 2 * TAPS :]).sigmoid()
            sources = [(SAME, level)]
            if number > 0:
                sources.append((FINER, levels[number - 1]))
            if number + 1 < len(levels):
                sources.append((COARSER, levels[number + 1]))
            parts = [self.DyConv[way].conv(source, offset, mask) for way, source in sources]
            outputs.append(recomputed(self._join, *parts, [way for way, _ in sources]))
        return outputs

    def _join(self, *given: Any) -> Tensor:
        """The level of the convolutions' outputs, and of the numbers of these convolutions."""
        *parts, ways = given
        total: Tensor | None = None
        for part, way in zip(parts, ways, strict=True):
            normed = self.DyConv[way].bn(part)
            if way == COARSER:
                size = parts[0].shape[2:]
                normed = F.interpolate(normed, size=size, mode="bilinear", align_corners=True)
            weighed = normed * gate(self.AttnConv(normed))
            total = weighed if total is None else total + weighed
        assert total is not None
        joined: Tensor = self.relu(total / len(parts))
        return joined


class Tower(nn.Sequential):
    """Layers that take and give (levels, words).

    Args:
        channels: C of the levels.
        blocks: how many times.
        fusion: with fusion and BERT's layer before each dynamic convolution.
        bert: settings of BERT.
        embed_dim: inner width of the fusion.
        heads: of the fusion.
        dropout: of the fusion.
    """

    def __init__(
        self,
        channels: int,
        blocks: int,
        bert: BertConfig,
        *,
        fusion: bool,
        embed_dim: int,
        heads: int,
        dropout: float,
    ) -> None:
        layers: list[nn.Module] = []
        for _ in range(blocks):
            if fusion:
                layers.append(
                    VLFuse(channels, bert.hidden_size, embed_dim, heads, 1 / blocks, dropout)
                )
                layers.append(BertEncoderLayer(bert))
            layers.append(DyConv(channels))
        super().__init__(*layers)

    def forward(self, levels: list[Tensor], words: Words) -> tuple[list[Tensor], Words]:
        """Levels and words, fused."""
        for layer in self:
            if isinstance(layer, VLFuse):
                levels, words = layer(levels, words)
            elif isinstance(layer, BertEncoderLayer):
                words = layer(words)
            else:
                levels = layer(levels)
        return levels, words


def gate(numbers: Tensor) -> Tensor:
    """Factors from 0 to 1; NPUs compute them in no other half-precision format than float16."""
    return F.hardsigmoid(wide(numbers)).to(numbers.dtype)


def reread(places: Tensor, size: tuple[int, int]) -> Tensor:
    """Offsets or factors (B, N, h, w) as the convolution of a map of another size reads them.

    Upstream gives the offsets of a level to the convolution of the coarser level, too. Its kernel
    takes the memory of an image as if it were of the smaller size, and published weights were
    trained so.
    """
    batch, numbers, height, width = places.shape
    if (height, width) == size:
        return places
    assert height * width >= size[0] * size[1]
    return places.flatten(1)[:, : numbers * size[0] * size[1]].view(batch, numbers, *size)
