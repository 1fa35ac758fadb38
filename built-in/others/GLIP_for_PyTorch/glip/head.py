"""The head: the tower, and for each cell of each level a box, its centerness and its words.

Paper: Li et al., https://arxiv.org/abs/2112.03857. Follows https://github.com/microsoft/GLIP (MIT)
at 9dda955, maskrcnn_benchmark/modeling/rpn/vldyhead.py; parameter names are the same.

Shape letters: B images, C channels, H W cells of a level, A cells of all levels (each has one
anchor), T tokens, L width of a word.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glip.cross_attention import LIMIT
from glip.language import Words
from glip.tower import Tower

LEVELS = 5


class Predictions(NamedTuple):
    """What the head says of the anchors of all levels, one level after the other, row by row.

    Attributes:
        logits_BAT: of each token.
        deltas_BA4: boxes relative to their anchors.
        centerness_BA: logits.
    """

    logits_BAT: Tensor
    deltas_BA4: Tensor
    centerness_BA: Tensor


class Scale(nn.Module):
    """A learnt factor, shape (1,)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape."""
        return inputs * self.scale


class VLDyHead(nn.Module):
    """The head.

    Args:
        tower: fusion and dynamic convolutions.
        channels: C.
        words_width: L.
        fusion: compare cells with the words that the tower gives, not with BERT's.
        prior: probability of a token at the beginning.
        log_scale: logarithm of the divisor of products, at the beginning.
    """

    def __init__(
        self,
        tower: Tower,
        *,
        channels: int,
        words_width: int,
        fusion: bool,
        prior: float = 0.01,
        log_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.dyhead_tower = tower
        self.bbox_pred = nn.Conv2d(channels, 4, 1)
        self.centerness = nn.Conv2d(channels, 1, 1)
        for layer in (self.bbox_pred, self.centerness):
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.dot_product_projection_text = nn.Linear(words_width, channels)
        self.log_scale = nn.Parameter(torch.tensor([log_scale]))
        self.bias_lang = nn.Parameter(torch.zeros(words_width))
        self.bias0 = nn.Parameter(torch.tensor([-math.log((1 - prior) / prior)]))
        self.scales = nn.ModuleList(Scale() for _ in range(LEVELS))

    def forward(self, levels: list[Tensor], words: Words) -> Predictions:
        """Predictions for levels (B, C, H, W), finest first."""
        levels, fused = self.dyhead_tower(levels, words)
        # Without fusion upstream zeroes padding; with it, padding has numbers of its own.
        units_BTL = F.normalize(fused.hidden_BTC if self.fusion else words.embedded(), dim=-1)
        tokens_BTC = self.dot_product_projection_text(units_BTL / 2) / self.log_scale.exp()
        # A matrix of one column: the gradient of a vector's product has no bfloat16 on NPUs.
        bias_BT = (units_BTL @ self.bias_lang[:, None])[..., 0] + self.bias0
        deltas = [
            scale(self.bbox_pred(level)) for scale, level in zip(self.scales, levels, strict=True)
        ]
        cells_BAC = _join(levels)
        logits_BAT = cells_BAC @ tokens_BTC.transpose(1, 2) + bias_BT[:, None]
        return Predictions(
            logits_BAT.clamp(-LIMIT, LIMIT),
            _join(deltas),
            _join([self.centerness(level) for level in levels])[..., 0],
        )


def _join(levels: list[Tensor]) -> Tensor:
    """Maps (B, C, H, W) to (B, A, C)."""
    return torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)
