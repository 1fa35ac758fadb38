"""SOLOv2's losses, in float32 on purpose: classes of grid cells, and masks of their kernels.

Lin et al., Focal Loss, arXiv:1708.02002; Milletari et al., V-Net (dice), arXiv:1606.04797; Wang et
al., SOLOv2, arXiv:2003.10152, section 3.3.2.

Shape letters: B images, S grid cells of all levels, K classes, E mask features, Q object slots,
P pair slots, H W cells of the mask features, N of them in one line.
"""

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss  # type: ignore[import-untyped]

from solov2.config import LossConfig
from solov2.targets import Targets

DICE_EPS = 1e-3  # added to each of the two sums of squares


def class_loss(logits_BSK: Tensor, labels_BS: Tensor, config: LossConfig) -> Tensor:
    """Focal loss over all cells and classes, divided by the positive cells and one more."""
    logits_BSK = wide(logits_BSK)
    classes_K = torch.arange(logits_BSK.shape[-1], device=labels_BS.device)
    targets_BSK = (labels_BS[..., None] == classes_K).to(logits_BSK.dtype)
    total: Tensor = sigmoid_focal_loss(
        logits_BSK, targets_BSK, alpha=config.alpha, gamma=config.gamma, reduction="sum"
    )
    return config.class_weight * total / ((labels_BS >= 0).sum() + 1)


def mask_loss(
    kernels_BSE: Tensor,
    features_BEHW: Tensor,
    masks_BQHW: Tensor,
    targets: Targets,
    config: LossConfig,
    inside_HW: Tensor | None,
) -> Tensor:
    """Dice loss between the mask that each positive cell's kernel draws and its object's.

    Where a batch has no positive cell it is 0, with gradients of 0.

    Args:
        kernels_BSE: the cells' kernels.
        features_BEHW: what they are applied to.
        masks_BQHW: uint8, 1 in an object.
        targets: the pairs of cells and objects.
        config: weight, and what the sum is divided by.
        inside_HW: bool, the cells that count; None: all.
    """
    pairs_BPE = take_rows(kernels_BSE, targets.cells_BP)
    logits_BPN = wide(pairs_BPE @ features_BEHW.flatten(2))
    drawn_BPN = logits_BPN.sigmoid()
    if inside_HW is not None:
        drawn_BPN = drawn_BPN * inside_HW.flatten()
    masks_BPN = take_rows(masks_BQHW.flatten(2), targets.objects_BP).to(drawn_BPN.dtype)
    common_BP = (drawn_BPN * masks_BPN).sum(dim=2)
    squares_BP = drawn_BPN.square().sum(dim=2) + masks_BPN.sum(dim=2) + 2 * DICE_EPS
    losses_BP = 1 - 2 * common_BP / squares_BP
    valid_BP = targets.valid_BP
    count = (targets.labels_BS >= 0).sum() if config.mask_average == "cells" else valid_BP.sum()
    return config.mask_weight * (losses_BP * valid_BP).sum() / count.clamp(min=1)


def wide(tensor: Tensor) -> Tensor:
    """In the format of losses: float32, or float64 where the network computes in it."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def take_rows(values_BNX: Tensor, index_BM: Tensor) -> Tensor:
    """Rows of each image: [B, N, X] and [B, M] give [B, M, X]."""
    images, count, length = values_BNX.shape
    first_B1 = torch.arange(images, device=index_BM.device)[:, None] * count
    # Whole rows at once: gather would want an index for each of their elements.
    rows_RX = values_BNX.reshape(-1, length).index_select(0, (index_BM + first_B1).flatten())
    return rows_RX.view(images, -1, length)
