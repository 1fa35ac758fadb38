"""CLIP's ResNet: three convolutions as a stem, blurred strides, attention in place of a mean.

Paper: Radford et al., https://arxiv.org/abs/2103.00020, section 2.4. Follows
https://github.com/Sense-GVT/DeCLIP (Apache-2.0) at 5d99a855,
prototype/model/image_encoder/modified_resnet.py; parameter names are the same. Differences:

- Attention pooling computes the one query that is used, where upstream computes 50.
- ``fc`` is there for published weights only: upstream uses it for maps that are not 7 wide,
  which none of its recipes has. It is not trained.

Shape letters: B images, C channels, H W cells of a map, T = H W + 1 tokens, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from declip.recompute import behind_norm

EXPANSION = 4
"""Channels of a block's output for each of its inner ones."""

STRIDE = 32
"""Pixels of a cell of the last map."""

_FC_INPUTS = 2048

Norm = Callable[[int], nn.BatchNorm2d]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; strides are taken by mean pooling.

    Args:
        inputs: channels that come in.
        width: channels inside; ``EXPANSION`` times as many come out.
        stride: pixels to a side that become one.
        norm: makes a batch norm for so many channels.
        recompute: make outputs of norms anew in the backward pass: "on", "off", or "auto", on CPUs.
    """

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm, recompute: str) -> None:
        super().__init__()
        self.recompute = recompute
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.avgpool = _pool(stride)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", _pool(stride))
            self.downsample.add_module("0", nn.Conv2d(inputs, outputs, 1, bias=False))
            self.downsample.add_module("1", norm(outputs))

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4 width, H / stride, W / stride)."""
        shortcut = maps_BCHW if self.downsample is None else self.downsample(maps_BCHW)
        again = _is_on(self.recompute, maps_BCHW)
        inner = behind_norm(self.bn1, self.conv1(maps_BCHW), self.conv2, recompute=again)
        inner = behind_norm(self.bn2, inner, self._narrow, recompute=again)
        result: Tensor = self.bn3(inner)
        return F.relu_(result.add_(shortcut))

    def _narrow(self, maps_BCHW: Tensor) -> Tensor:
        result: Tensor = self.conv3(self.avgpool(maps_BCHW))
        return result


class AttentionPool2d(nn.Module):
    """One attention whose query is the mean of a map, over the map's cells and the mean.

    Args:
        side: H and W of the map.
        width: C.
        heads: a divisor of C.
        embed_dim: D.
    """

    def __init__(self, side: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        std = 1 / math.sqrt(width)
        self.positional_embedding = nn.Parameter(std * torch.randn(side * side + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=std)

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """(B, C, side, side) to (B, D)."""
        cells_BTC = maps_BCHW.flatten(2).transpose(1, 2)
        tokens_BTC = torch.cat([cells_BTC.mean(dim=1, keepdim=True), cells_BTC], dim=1)
        tokens_BTC = tokens_BTC + self.positional_embedding.to(tokens_BTC.dtype)
        query, keys, values = (
            layer(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in (
                (self.q_proj, tokens_BTC[:, :1]),
                (self.k_proj, tokens_BTC),
                (self.v_proj, tokens_BTC),
            )
        )
        pooled = F.scaled_dot_product_attention(query, keys, values)
        features_BD: Tensor = self.c_proj(pooled.transpose(1, 2).flatten(1))
        return features_BD


class ModifiedResNet(nn.Module):
    """CLIP's ResNet.

    Args:
        input_size: side of the images in pixels, a multiple of ``STRIDE``.
        depths: blocks of the four stages; (3, 4, 6, 3) is ResNet-50.
        width: inner channels of the first stage.
        heads: of the attention pooling, a divisor of 32 ``width``.
        embed_dim: D, features of an image.
        norm: makes a batch norm for so many channels.
        recompute: make outputs of norms anew in the backward pass, which takes less memory and
            more time: "on", "off", or "auto", on CPUs.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        *,
        input_size: int,
        depths: Sequence[int],
        width: int,
        heads: int,
        embed_dim: int,
        norm: Norm = nn.BatchNorm2d,
        recompute: str = "auto",
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = norm(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = norm(width)
        self.avgpool = nn.AvgPool2d(2)
        inputs = width
        for stage, depth in enumerate(depths):
            inner = width << stage
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(inputs, inner, stride, norm, recompute))
                inputs = EXPANSION * inner
                # A block begins as its shortcut.
                nn.init.zeros_(blocks[-1].get_parameter("bn3.weight"))
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool2d(input_size // STRIDE, inputs, heads, embed_dim)
        self.fc = nn.Linear(_FC_INPUTS, embed_dim)
        self.fc.requires_grad_(False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images (B, 3, input_size, input_size) to features (B, D)."""
        again = _is_on(self.recompute, images_BCHW)
        maps = self.conv1(images_BCHW)
        for bn, work in (
            (self.bn1, self.conv2),
            (self.bn2, self.conv3),
            (self.bn3, self.avgpool),
        ):
            maps = behind_norm(bn, maps, work, recompute=again)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = stage(maps)
        features_BD: Tensor = self.attnpool(maps)
        return features_BD


def _is_on(recompute: str, maps_BCHW: Tensor) -> bool:
    return maps_BCHW.device.type == "cpu" if recompute == "auto" else recompute == "on"


def _pool(stride: int) -> nn.Module:
    return nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
