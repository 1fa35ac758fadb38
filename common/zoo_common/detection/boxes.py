"""Arithmetic on boxes: area, overlap, clipping, and the way back to the original image.

A box is x0, y0, x1, y1 in pixels, its right and bottom edge excluded: a box of one pixel is 1 wide.
Boxes with no or negative extent are empty; they have area 0 and overlap nothing, and no function
makes a NaN of them.

Geometry is computed in float32 on purpose, also inside autocast: half precision cannot tell
neighbouring pixels apart beyond 256 (bfloat16) or 2048 (float16). float64 stays float64.

Shapes: B images, N and M boxes, K detections; ``...`` is any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def area(boxes_N4: Tensor) -> Tensor:
    """Areas in square pixels, (..., N) of boxes (..., N, 4); 0 for empty boxes."""
    x0, y0, x1, y1 = _geometry(boxes_N4).unbind(-1)
    return (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0)


def iou(a_N4: Tensor, b_M4: Tensor) -> Tensor:
    """Intersection over union of each box with each other one, in [0, 1].

    Args:
        a_N4: (..., N, 4).
        b_M4: (..., M, 4) with leading dimensions that broadcast to those of ``a_N4``.

    Returns:
        (..., N, M); 0 where boxes do not overlap, so also for empty boxes.
    """
    dtype = torch.promote_types(_geometry_dtype(a_N4), _geometry_dtype(b_M4))
    a, b = a_N4.to(dtype), b_M4.to(dtype)
    ax0, ay0, ax1, ay1 = a.unsqueeze(-2).unbind(-1)
    bx0, by0, bx1, by1 = b.unsqueeze(-3).unbind(-1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp_(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp_(min=0)
    intersection = width * height
    union = area(a).unsqueeze(-1) + area(b).unsqueeze(-2) - intersection
    # Dividing by 1 where nothing overlaps keeps 0 / 0 out of the gradient too.
    overlaps = intersection > 0
    return torch.where(overlaps, intersection, 0) / torch.where(overlaps, union, 1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes with their edges moved into the image; a box wholly outside becomes empty.

    Args:
        boxes: (..., N, 4).
        sizes: (..., 2) height and width in pixels of the image of each set of N boxes.
    """
    boxes = _geometry(boxes)
    limits = _corners(sizes.to(boxes.dtype))
    return torch.minimum(boxes.clamp(min=0), limits.unsqueeze(-2))


def to_original(boxes_BK4: Tensor, sizes_B2: Tensor, originals_B2: Tensor) -> Tensor:
    """Boxes found in resized images, in pixels of the original files and clipped to them.

    Args:
        boxes_BK4: boxes in pixels of the resized images.
        sizes_B2: (height, width) of the resized images, without padding.
        originals_B2: (height, width) of the files.
    """
    boxes_BK4 = _geometry(boxes_BK4)
    scales_B2 = originals_B2.to(boxes_BK4.dtype) / sizes_B2.to(boxes_BK4.dtype)
    return clip(boxes_BK4 * _corners(scales_B2).unsqueeze(-2), originals_B2)


def _corners(height_width: Tensor) -> Tensor:
    """(..., 2) height and width values as (..., 4), one for each of x0, y0, x1, y1."""
    width_height = height_width.flip(-1)
    return torch.cat([width_height, width_height], -1)


def _geometry_dtype(boxes: Tensor) -> torch.dtype:
    return torch.float64 if boxes.dtype is torch.float64 else torch.float32


def _geometry(boxes: Tensor) -> Tensor:
    return boxes.to(_geometry_dtype(boxes))
