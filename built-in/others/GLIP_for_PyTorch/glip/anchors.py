"""Anchors and boxes as maskrcnn_benchmark counts them: the last pixel belongs to a box.

Follows https://github.com/microsoft/GLIP (MIT) at 9dda955,
maskrcnn_benchmark/modeling/rpn/anchor_generator.py and vldyhead.py. A box from x1 to x2 is
x2 - x1 + 1 pixels wide.

Shape letters: A anchors of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)
ANCHOR_STRIDES = 8
"""Side of an anchor in strides of its level."""

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MAX_LOG = math.log(1000 / 16)
"""Largest logarithm of a box's side over its anchor's."""


def wide(tensor: Tensor) -> Tensor:
    """In the format of geometry and losses: float32, or float64 where the network has that."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def make_anchors(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Anchors (A, 4), xyxy in pixels, float32; one for each cell of levels of (height, width)."""
    levels = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y_H = (torch.arange(height, device=device) + 0.5) * stride
        x_W = (torch.arange(width, device=device) + 0.5) * stride
        x, y = x_W.repeat(height), y_H.repeat_interleave(width)
        half = ANCHOR_STRIDES * stride / 2
        levels.append(torch.stack([x - half, y - half, x + half - 1, y + half - 1], dim=1))
    return torch.cat(levels)


def centers(boxes: Tensor) -> Tensor:
    """Middles (..., 2) of boxes (..., 4)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def decode(deltas: Tensor, anchors_A4: Tensor) -> Tensor:
    """Boxes (..., A, 4) of deltas to anchors (A, 4)."""
    sides = anchors_A4[:, 2:] - anchors_A4[:, :2] + 1
    weights = (
        torch.full_like(deltas[..., :1], WEIGHTS[0]),
        torch.full_like(deltas[..., :1], WEIGHTS[2]),
    )
    middle = centers(anchors_A4) + deltas[..., :2] / weights[0] * sides
    reach = ((deltas[..., 2:] / weights[1]).clamp(max=MAX_LOG).exp() * sides - 1) / 2
    return torch.cat([middle - reach, middle + reach], dim=-1)


def areas(boxes: Tensor) -> Tensor:
    """Pixels (...) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0] + 1) * (boxes[..., 3] - boxes[..., 1] + 1)


def ious(anchors_A4: Tensor, boxes_BQ4: Tensor) -> Tensor:
    """Shares (B, A, Q) that anchors and boxes have in common."""
    ours, theirs = anchors_A4[None, :, None], boxes_BQ4[:, None]
    low = torch.maximum(ours[..., :2], theirs[..., :2])
    high = torch.minimum(ours[..., 2:], theirs[..., 2:])
    common = (high - low + 1).clamp(min=0).prod(dim=-1)
    return common / (areas(ours) + areas(theirs) - common)
