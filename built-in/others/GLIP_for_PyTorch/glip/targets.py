"""ATSS: which anchors learn which box.

Paper: Zhang et al., https://arxiv.org/abs/1912.02424, algorithm 1. Follows
https://github.com/microsoft/GLIP (MIT) at 9dda955, maskrcnn_benchmark/modeling/rpn/loss.py. All
shapes are fixed: boxes stand in slots.

Shape letters: B images, A anchors of all levels, Q slots for boxes, K candidates of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glip import anchors

MARGIN = 0.01
"""How far inside its box the middle of an anchor must lie, in pixels."""


class Matches(NamedTuple):
    """What each anchor learns.

    Attributes:
        slots_BA: int64, the slot of its box; 0 for an anchor of none.
        positive_BA: bool, whether it has a box.
    """

    slots_BA: Tensor
    positive_BA: Tensor


@torch.no_grad()
def match(
    anchors_A4: Tensor,
    cells: Sequence[int],
    boxes_BQ4: Tensor,
    valid_BQ: Tensor,
    candidates: int,
) -> Matches:
    """Matches anchors with boxes.

    Args:
        anchors_A4: of all levels, xyxy.
        cells: anchors of each level.
        boxes_BQ4: xyxy; the last pixel belongs to a box.
        valid_BQ: which slots hold a box.
        candidates: nearest anchors of a level that are looked at.
    """
    shares_BAQ = anchors.ious(anchors_A4, boxes_BQ4)
    middles_A2 = anchors.centers(anchors_A4)
    away_BAQ2 = middles_A2[None, :, None] - anchors.centers(boxes_BQ4)[:, None]
    distances_BAQ = away_BAQ2.square().sum(dim=-1).sqrt()
    nearest, first = [], 0
    for count in cells:
        level = distances_BAQ[:, first : first + count]
        nearest.append(level.topk(min(candidates, count), dim=1, largest=False).indices + first)
        first += count
    nearest_BKQ = torch.cat(nearest, dim=1)
    shares_BKQ = shares_BAQ.gather(1, nearest_BKQ)
    least_B1Q = shares_BKQ.mean(dim=1, keepdim=True) + shares_BKQ.std(dim=1, keepdim=True)
    middles_BKQ2 = middles_A2[nearest_BKQ]
    inside_BKQ = (
        torch.cat(
            [middles_BKQ2 - boxes_BQ4[:, None, :, :2], boxes_BQ4[:, None, :, 2:] - middles_BKQ2], -1
        )
        .amin(dim=-1)
        .gt(MARGIN)
    )
    taken_BKQ = (shares_BKQ >= least_B1Q) & inside_BKQ & valid_BQ[:, None]
    scores_BAQ = torch.full_like(shares_BAQ, -1.0).scatter(
        1, nearest_BKQ, torch.where(taken_BKQ, shares_BKQ, -1.0)
    )
    best_BA, slots_BA = scores_BAQ.max(dim=2)
    positive_BA = best_BA > -1
    return Matches(torch.where(positive_BA, slots_BA, 0), positive_BA)
