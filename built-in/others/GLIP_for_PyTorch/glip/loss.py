"""The losses: focal on tokens, GIoU on boxes, cross-entropy on centerness.

Papers: Li et al., https://arxiv.org/abs/2112.03857; Lin et al., https://arxiv.org/abs/1708.02002;
Rezatofighi et al., https://arxiv.org/abs/1902.09630; Tian et al., https://arxiv.org/abs/1904.01355.
Follows https://github.com/microsoft/GLIP (MIT) at 9dda955, maskrcnn_benchmark/modeling/rpn/loss.py
and layers/sigmoid_focal_loss.py. All shapes are fixed: what does not count is multiplied by 0.

Shape letters: B images, A anchors, Q slots for boxes, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from glip import anchors
from glip.config import LossConfig
from glip.head import Predictions
from glip.targets import Matches
from zoo_common.distributed import mean_across

EPS = 1e-7


def token_loss(
    logits_BAT: Tensor, targets_BAT: Tensor, mask_BT: Tensor, alpha: float, gamma: float
) -> Tensor:
    """The sum of the focal losses of all anchors and all tokens but padding."""
    cross = F.binary_cross_entropy_with_logits(logits_BAT, targets_BAT, reduction="none")
    right = torch.where(targets_BAT > 0, logits_BAT, -logits_BAT).sigmoid()
    weights = torch.where(targets_BAT > 0, alpha, 1 - alpha)
    losses = weights * (1 - right) ** gamma * cross
    return (losses * mask_BT[:, None]).sum()


def giou_loss(predicted: Tensor, boxes: Tensor) -> Tensor:
    """1 - GIoU (...) of boxes (..., 4); here a side is x2 - x1, without the pixel more."""
    high = torch.maximum(predicted[..., :2], predicted[..., 2:])
    low = predicted[..., :2]
    common = _area(
        (torch.minimum(high, boxes[..., 2:]) - torch.maximum(low, boxes[..., :2])).clamp(min=0)
    )
    around = _area(torch.maximum(high, boxes[..., 2:]) - torch.minimum(low, boxes[..., :2])) + EPS
    union = _area(high - low) + _area(boxes[..., 2:] - boxes[..., :2]) - common + EPS
    return 1 - common / union + (around - union) / around


def _area(sides: Tensor) -> Tensor:
    """Products (...) of sides (..., 2); the gradient of torch's ``prod`` reads the device."""
    return sides[..., 0] * sides[..., 1]


def centerness_targets(anchors_A4: Tensor, boxes_BA4: Tensor, positive_BA: Tensor) -> Tensor:
    """How central an anchor lies in its box, (B, A), 0 to 1; 0 for an anchor of none."""
    middles_A2 = anchors.centers(anchors_A4)
    before, behind = middles_A2 - boxes_BA4[..., :2], boxes_BA4[..., 2:] - middles_A2
    smaller, larger = torch.minimum(before, behind), torch.maximum(before, behind)
    safe = torch.where(positive_BA[..., None], smaller / larger, 0)
    return _area(safe).sqrt()


def losses(
    predictions: Predictions,
    matches: Matches,
    anchors_A4: Tensor,
    boxes_BQ4: Tensor,
    tokens_BQT: Tensor,
    mask_BT: Tensor,
    config: LossConfig,
) -> dict[str, Tensor]:
    """The three losses, each its sum over what counts on the mean of all ranks.

    Args:
        predictions: the head's.
        matches: what each anchor learns.
        anchors_A4: xyxy.
        boxes_BQ4: xyxy.
        tokens_BQT: which tokens of the caption mean the box.
        mask_BT: True for tokens, False for padding.
        config: weights and exponents.
    """
    slots, positive_BA = matches
    boxes_BA4 = boxes_BQ4.gather(1, slots[..., None].expand(-1, -1, 4))
    count = positive_BA.sum().to(anchors_A4.dtype)
    targets_BAT = (
        tokens_BQT.to(anchors_A4.dtype).gather(
            1, slots[..., None].expand(-1, -1, tokens_BQT.shape[2])
        )
        * positive_BA[..., None]
    )
    if config.no_object:
        targets_BAT[..., -1] = torch.where(positive_BA, targets_BAT[..., -1], 1)
    central_BA = centerness_targets(anchors_A4, boxes_BA4, positive_BA)
    # The count and the sum of float32 numbers from 0 to 1 lose nothing that matters in float32.
    totals = mean_across(torch.stack([count, central_BA.sum()]).float()).to(anchors_A4.dtype)
    positives, central = totals[0].clamp(min=1), totals[1].clamp(min=EPS)
    decoded_BA4 = anchors.decode(predictions.deltas_BA4, anchors_A4)
    boxes = (giou_loss(decoded_BA4, boxes_BA4) * central_BA).sum() / central
    centerness = F.binary_cross_entropy_with_logits(
        predictions.centerness_BA,
        central_BA,
        weight=positive_BA.to(anchors_A4.dtype),
        reduction="sum",
    )
    tokens = token_loss(predictions.logits_BAT, targets_BAT, mask_BT, config.alpha, config.gamma)
    return {
        "token": tokens / positives,
        "box": config.box_weight * boxes,
        "centerness": centerness / positives,
    }
