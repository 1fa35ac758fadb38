"""Matrix NMS: section 3.3 of SOLOv2 (arXiv:2003.10152), batched and with static shapes.

A mask is suppressed by the surer masks of its class, each the less the more it is suppressed
itself. With f(iou) = exp(-sigma iou^2) (gaussian) or 1 - iou (linear), the score of mask j is
multiplied by

    min over i surer than j, of its class:  f(iou_ij) / f(max over k surer than i: iou_ki)

and by no more than 1 (equation 5 of the paper). Nothing is removed here and the device is not
read. It gives what WXinlong/SOLO's mmdet/core/post_processing/matrix_nms.py gives, and differs
where that has no number:

- The linear kernel divides 0 by 0 for the third of three identical masks. WXinlong/SOLO's score is
  NaN then, which no threshold lets pass; here it is 0, which the first of the three makes it.
- Masks without a pixel overlap with nothing.

B images, N masks, X pixels of a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_common.detection.ops_reference import no_autocast

# Rows of the overlaps at a time, of which only the columns from the diagonal on are computed.
_ROWS = 64
# Elements of a temporary: what stays in a core's cache, and what an accelerator's memory bears.
_CPU_CHUNK = 1 << 20
_DEVICE_CHUNK = 1 << 26


def matrix_nms(
    masks_BNX: Tensor,
    labels_BN: Tensor,
    scores_BN: Tensor,
    areas_BN: Tensor,
    valid_BN: Tensor,
    kernel: str,
    sigma: float,
) -> Tensor:
    """The scores after suppression.

    Args:
        masks_BNX: 0 or 1, bool, integer or floating; by falling score in each image. Of equal
            scores the first counts as the surer.
        labels_BN: classes.
        scores_BN: 0 to 1.
        areas_BN: pixels of each mask.
        valid_BN: which slots hold a mask; the others, wherever they stand, suppress nothing.
        kernel: "gaussian" or "linear".
        sigma: of the gaussian kernel, the larger the stricter.

    Returns:
        (B, N), float32 (float64 if the scores are), 0 in empty slots; not sorted.
    """
    count = masks_BNX.shape[1]
    kind = torch.promote_types(scores_BN.dtype, torch.float32)
    if count == 0:
        return scores_BN.to(kind)
    order_N = torch.arange(count, device=masks_BNX.device)
    related_BNN = (order_N[:, None] < order_N) & (labels_BN[:, :, None] == labels_BN[:, None])
    related_BNN &= valid_BN[:, :, None] & valid_BN[:, None]

    areas_BN = areas_BN.to(kind)
    shared_BNN = intersections(masks_BNX).to(kind)
    unions_BNN = (areas_BN[:, :, None] + areas_BN[:, None] - shared_BNN).clamp(min=1)
    iou_BNN = torch.where(related_BNN, shared_BNN / unions_BNN, 0)
    compensation_BN1 = iou_BNN.amax(1)[:, :, None]
    if kernel == "gaussian":
        # A quotient of exponentials is the exponential of the difference.
        excess_BN = (iou_BNN.square() - compensation_BN1.square()).amax(1).clamp(min=0)
        decay_BN = torch.exp(-sigma * excess_BN)
    else:
        assert kernel == "linear", kernel
        # What a copy of a surer mask would do, that one has done.
        copies_BN1 = compensation_BN1 == 1
        kept_BN1 = torch.where(copies_BN1, 1, 1 - compensation_BN1)
        decay_BN = torch.where(copies_BN1, 1, (1 - iou_BNN) / kept_BN1).amin(1).clamp(max=1)
    return torch.where(valid_BN, scores_BN.to(kind) * decay_BN, 0)


def intersections(masks_BNX: Tensor) -> Tensor:
    """The pixels that each mask shares with itself and with those after it.

    Args:
        masks_BNX: 0 or 1, of fewer than 2^24 pixels: sums in float32 are exact.

    Returns:
        float32 (B, N, N), from the diagonal on; what lies below means nothing.
    """
    images, count, pixels = masks_BNX.shape
    assert pixels < 1 << 24, pixels
    device = masks_BNX.device
    budget = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, budget // max(images * count, 1))
    shared_BNN = torch.zeros((images, count, count), device=device)
    with no_autocast(device.type):
        for at in range(0, pixels, step):
            part_BNX = masks_BNX[:, :, at : at + step].float()
            for row in range(0, count, _ROWS):
                rows_BRX, columns_BCX = part_BNX[:, row : row + _ROWS], part_BNX[:, row:]
                shared_BNN[:, row : row + _ROWS, row:].baddbmm_(rows_BRX, columns_BCX.mT)
    return shared_BNN
