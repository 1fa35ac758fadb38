"""Boxes as deltas from reference boxes: Girshick et al., R-CNN, arXiv:1311.2524, appendix C.

Boxes are xyxy in pixels; deltas are (dx, dy, dw, dh) times weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LOG_SCALE = math.log(1000.0 / 16)
"""A delta grows a side 62.5-fold at the most, as in detectron2 (modeling/box_regression.py)."""


def _center_size(boxes_N4: Tensor) -> tuple[Tensor, Tensor]:
    size_N2 = boxes_N4[..., 2:] - boxes_N4[..., :2]
    return boxes_N4[..., :2] + 0.5 * size_N2, size_N2


def encode(references_N4: Tensor, boxes_N4: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas [..., 4] that lead from references to boxes; of sides that are not positive: 0.

    Empty slots hold such boxes; what comes of them is masked out, but must be finite.
    """
    center_N2, size_N2 = _center_size(references_N4)
    to_center_N2, to_size_N2 = _center_size(boxes_N4)
    real_N2 = (size_N2 > 0) & (to_size_N2 > 0)
    size_N2 = torch.where(real_N2, size_N2, 1.0)
    to_size_N2 = torch.where(real_N2, to_size_N2, 1.0)
    moved_N2 = (to_center_N2 - center_N2) / size_N2
    moved_N2 = torch.where(real_N2, moved_N2, 0.0)
    deltas_N4 = torch.cat([moved_N2, (to_size_N2 / size_N2).log()], dim=-1)
    return torch.stack([deltas_N4[..., i] * weight for i, weight in enumerate(weights)], dim=-1)


def decode(references_N4: Tensor, deltas_N4: Tensor, weights: Sequence[float]) -> Tensor:
    """Boxes [..., 4], always in float32, as detectron2 decodes them."""
    deltas_N4 = deltas_N4.float()
    dx, dy, dw, dh = (deltas_N4[..., i] / weight for i, weight in enumerate(weights))
    center_N2, size_N2 = _center_size(references_N4.float())
    center_N2 = center_N2 + torch.stack([dx, dy], dim=-1) * size_N2
    half_N2 = torch.stack([dw, dh], dim=-1).clamp(max=MAX_LOG_SCALE).exp() * size_N2 * 0.5
    return torch.cat([center_N2 - half_N2, center_N2 + half_N2], dim=-1)


def box_loss(pred_N4: Tensor, target_N4: Tensor, beta: float) -> Tensor:
    """Smooth L1 of each box, summed over its deltas; ``beta`` 0 is plain L1."""
    if beta == 0:
        return (pred_N4 - target_N4).abs().sum(dim=-1)
    return F.smooth_l1_loss(pred_N4, target_N4, reduction="none", beta=beta).sum(dim=-1)
