"""Which anchors and proposals are compared with which object, in tensors of fixed shape.

Ren et al., Faster R-CNN, arXiv:1506.01497, section 3.1.2, with detectron2's rules
(modeling/{matcher,sampling}.py, modeling/roi_heads/roi_heads.py).

Shape letters: B images, N candidates (anchors or proposals), Q target slots, S sample slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zoo_common.detection import boxes

Sampler = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Chooses among candidates: (candidates_BN bool, limit_B, slots) -> (index_BS, chosen_BS).

At most ``limit`` of each image's candidates, in the first slots; ``slots`` is a bound of it.
"""


class Matches(NamedTuple):
    """The object of each candidate.

    Attributes:
        index_BN: slot of the object with the highest IoU; any where an image has no object.
        iou_BN: that IoU; 0 where an image has no object.
        best_BN: whether the candidate has some object's highest IoU, which is more than 0.
    """

    index_BN: Tensor
    iou_BN: Tensor
    best_BN: Tensor


def match(gt_boxes_BQ4: Tensor, gt_valid_BQ: Tensor, candidates_BN4: Tensor) -> Matches:
    """Finds the object that overlaps each candidate most; the first one where several do.

    Args:
        gt_boxes_BQ4: objects, xyxy.
        gt_valid_BQ: which slots hold one.
        candidates_BN4: xyxy; [1, N, 4] serves all images.
    """
    iou_BQN = boxes.iou(gt_boxes_BQ4, candidates_BN4)
    # -1 in empty slots, so that an object of IoU 0 comes before them.
    iou_BQN = torch.where(gt_valid_BQ[:, :, None], iou_BQN, -1.0)
    iou_BN, index_BN = iou_BQN.max(dim=1)
    highest_BQ1 = iou_BQN.amax(dim=2, keepdim=True)
    best_BN = ((iou_BQN == highest_BQ1) & (highest_BQ1 > 0)).any(dim=1)
    return Matches(index_BN, iou_BN.clamp(min=0), best_BN)


def sample_at_random(candidates_BN: Tensor, limit_B: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Every subset of the right size is as probable as any other."""
    slots = min(slots, candidates_BN.shape[1])
    # float32 has 2^24 values below 1; ties between candidates are broken by topk, evenly enough.
    draw_BN = torch.rand(candidates_BN.shape, device=candidates_BN.device)
    draw_BN = torch.where(candidates_BN, draw_BN, -1.0)
    drawn_BS, index_BS = draw_BN.topk(slots, dim=1)
    within_BS = torch.arange(slots, device=limit_B.device) < limit_B[:, None]
    return index_BS, within_BS & (drawn_BS >= 0)


class Samples(NamedTuple):
    """The candidates in a loss: foreground in the first slots, then background, then none.

    Attributes:
        index_BS: which candidate.
        positive_BS: slots with foreground.
        valid_BS: slots with either.
    """

    index_BS: Tensor
    positive_BS: Tensor
    valid_BS: Tensor


def sample(
    positive_BN: Tensor, negative_BN: Tensor, *, slots: int, positive_slots: int, choose: Sampler
) -> Samples:
    """Takes up to ``positive_slots`` of the foreground and fills up with background.

    Args:
        positive_BN: bool, foreground candidates.
        negative_BN: bool, background candidates.
        slots: candidates of an image in the loss.
        positive_slots: the most of them that are foreground.
        choose: the rule of choice.
    """
    limit_B = torch.full((len(positive_BN),), positive_slots, device=positive_BN.device)
    fg_BS, fg_valid_BS = choose(positive_BN, limit_B, positive_slots)
    count_B = fg_valid_BS.sum(dim=1)
    bg_BS, bg_valid_BS = choose(negative_BN, slots - count_B, slots)
    # Slot j holds foreground j, and from the end of the foreground on background j - count.
    slot_BS = torch.arange(slots, device=count_B.device).expand(len(count_B), -1)
    positive_BS = slot_BS < count_B[:, None]
    behind_BS = (slot_BS - count_B[:, None]).clamp(min=0)
    of_fg_BS = slot_BS.clamp(max=fg_BS.shape[1] - 1)
    of_bg_BS = behind_BS.clamp(max=bg_BS.shape[1] - 1)
    index_BS = torch.where(positive_BS, fg_BS.gather(1, of_fg_BS), bg_BS.gather(1, of_bg_BS))
    background_BS = bg_valid_BS.gather(1, of_bg_BS) & (behind_BS < bg_BS.shape[1])
    return Samples(index_BS, positive_BS, positive_BS | (~positive_BS & background_BS))


def wide(tensor: Tensor) -> Tensor:
    """In the format of losses and boxes: float32, or float64 where the network computes in it."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def take(values_BNX: Tensor, index_BS: Tensor) -> Tensor:
    """Rows of each image: [B, N, ...] and [B, S] give [B, S, ...]."""
    shape = (*index_BS.shape, *values_BNX.shape[2:])
    index = index_BS.reshape(*index_BS.shape, *[1] * (values_BNX.dim() - 2)).expand(shape)
    return values_BNX.expand(len(index_BS), *values_BNX.shape[1:]).gather(1, index)
