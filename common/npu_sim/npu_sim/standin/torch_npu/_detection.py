"""Operators of detection: overlaps of boxes and non-maximum suppression."""

from __future__ import annotations

from typing import Any

import torch


def _overlaps(bboxes: torch.Tensor, gtboxes: torch.Tensor, mode: int) -> torch.Tensor:
    """IoU, or with mode 1 the overlap's part of the box; boxes (N, 4) xyxy give (M, N)."""
    if mode not in (0, 1):
        raise RuntimeError(f"mode must be 0 (IoU) or 1 (IoF), but got {mode}")
    boxes, others = bboxes.float()[None, :, :], gtboxes.float()[:, None, :]
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(
        boxes[..., :2], others[..., :2]
    )
    common = sides.clamp_min(0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    if mode == 0:
        area = area + (others[..., 2:] - others[..., :2]).prod(-1) - common
    return torch.where(area > 0, common / area.clamp_min(1e-12), 0.0)


def npu_iou(bboxes: torch.Tensor, gtboxes: torch.Tensor, mode: int = 0) -> torch.Tensor:
    """Overlaps of (N, 4) boxes with (M, 4) ground truth, (M, N)."""
    return _overlaps(bboxes, gtboxes, mode).to(bboxes.dtype)


def npu_nms_v4(
    input: torch.Tensor,
    scores: torch.Tensor,
    max_output_size: float,
    iou_threshold: torch.Tensor,
    scores_threshold: torch.Tensor,
    pad_to_max_output_size: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-maximum suppression of (N, 4) boxes xyxy above a score.

    Returns:
        Kept indices, best first, padded with 0 when asked; and how many they are. Both int32.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > scores_threshold]
    suppresses = (_overlaps(input[order], input[order], 0) > iou_threshold).tolist()
    limit = int(max_output_size)
    kept: list[int] = []
    for index in range(len(suppresses)):
        if len(kept) < limit and not any(suppresses[other][index] for other in kept):
            kept.append(index)
    chosen = order[torch.tensor(kept, dtype=torch.int64, device=order.device)].int()
    if pad_to_max_output_size:
        chosen = torch.nn.functional.pad(chosen, (0, limit - len(kept)))
    return chosen, torch.tensor(len(kept), dtype=torch.int32, device=input.device)


KERNELS: dict[str, Any] = {"npu_iou": npu_iou, "npu_nms_v4": npu_nms_v4}
GRADIENTS: dict[str, Any] = {}
