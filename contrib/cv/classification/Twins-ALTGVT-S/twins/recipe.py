"""The training recipe: what decays, how fast weights move, how images are mixed, the loss.

Follows ``main.py`` and ``engine.py`` of https://github.com/Meituan-AutoML/Twins (c1ff6714,
Apache-2.0) and the pieces of timm 0.3.2 that they call; the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from twins.model import Twins
from zoo_common.errors import UserError

REFERENCE_BATCH = 512  # images a step for which a recipe's learning rate is written


def scaled_lr(lr: float, global_batch: int) -> float:
    """The learning rate for ``global_batch`` images a step over all cards (linear scaling)."""
    return lr * global_batch / REFERENCE_BATCH


def schedule_lr(
    t: float,
    *,
    lr: float,
    epochs: float,
    warmup_epochs: float = 5,
    warmup_lr: float = 1e-6,
    min_lr: float = 1e-5,
) -> float:
    """The learning rate ``t`` epochs (may be a fraction) into a cosine schedule with warm-up.

    Warm-up rises linearly from ``warmup_lr``. The cosine counts from epoch 0, so what warm-up
    covers of it is skipped, as in timm.
    """
    if t < warmup_epochs:
        return warmup_lr + t * (lr - warmup_lr) / warmup_epochs
    if t >= epochs:
        return min_lr
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * t / epochs)) / 2


def lr_of_epoch(epoch: int, **schedule: float) -> float:
    """The learning rate that upstream trains ``epoch`` (from 0) with; keywords of schedule_lr.

    Upstream steps its scheduler after an epoch, with that epoch's number, so each epoch gets its
    predecessor's value and the first value is used twice.
    """
    return schedule_lr(max(epoch - 1, 0), **schedule)


def parameter_groups(model: Twins, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: without decay (biases, norms, the PEG's convolutions) and with it.

    Each has ``params``, ``weight_decay`` and ``names``; frozen parameters are in neither.
    """
    exempt = model.no_weight_decay()
    plain: dict[str, Any] = {"params": [], "weight_decay": 0.0, "names": []}
    decayed: dict[str, Any] = {"params": [], "weight_decay": weight_decay, "names": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = plain if parameter.ndim == 1 or name in exempt else decayed
            group["params"].append(parameter)
            group["names"].append(name)
    return [plain, decayed]


def build_optimizer(
    model: Twins,
    *,
    lr: float,
    name: str = "adamw",
    weight_decay: float = 0.05,
    momentum: float = 0.9,
    eps: float = 1e-8,
    betas: Sequence[float] = (0.9, 0.999),
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over ``parameter_groups``; ``lr`` is already scaled.

    Args:
        model: On its device.
        lr: Learning rate.
        name: ``adamw``, ``sgd`` (with Nesterov's momentum, as timm's) or any name of timm's
            ``create_optimizer_v2``.
        weight_decay: Of the second group.
        momentum: Of those that have one.
        eps: Of AdamW.
        betas: Of AdamW.
        fused: Whether to take PyTorch's fused AdamW or SGD. None takes it on the CPU, where the
            default walks the parameters one by one, and PyTorch's default elsewhere: on NPUs the
            fused one does not work with a loss scale.

    Raises:
        UserError: Neither PyTorch nor timm has an optimizer of that name.
    """
    groups = parameter_groups(model, weight_decay)
    if fused is None and next(model.parameters()).device.type == "cpu":
        fused = True
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
    if name == "sgd":
        nesterov = momentum > 0
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, momentum=momentum)
    except ValueError as error:
        raise UserError(
            f"there is no optimizer {name!r}: take adamw, sgd or a name of "
            "timm.optim.list_optimizers()."
        ) from error


@dataclass(frozen=True)
class MixDraw:
    """What one batch is mixed with.

    Attributes:
        lam: Share of an image's own label; of its own pixels too.
        drawn_lam: The share before cutmix's box was cut at the image's border.
        box: Cutmix's box (top, bottom, left, right) in pixels, end exclusive; None for mixup.
    """

    lam: float
    drawn_lam: float
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Mixing:
    """Mixup and cutmix of neighbours in a batch, with smoothed soft targets.

    Draws what ``Mixup(mode="batch")`` of timm 0.3.2 draws after ``np.random.seed(seed)`` (newer
    ones round the box differently), but from a generator of its own, so that a step's mix depends
    on its seed alone. Two differences in how the draw is used:

    * timm mixes image i with image B - 1 - i, this one with its neighbour (0 with 1, 2 with 3):
      then the pairs are the same however many processes share the global batch.
    * No image is sliced: a box of another size at every step would be new shapes at every step
      on an NPU.

    Attributes:
        num_classes: Length of a target.
        mixup: Alpha of mixup's beta distribution; 0 for none.
        cutmix: Alpha of cutmix's; 0 for none.
        probability: Share of batches that are mixed.
        switch_probability: Share of cutmix among these where both are on.
        smoothing: Label smoothing of the targets.
    """

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch_probability: float = 0.5
    smoothing: float = 0.1

    def draw(self, seed: int, height: int, width: int) -> MixDraw:
        """The mix of a batch of height x width pixels."""
        random = np.random.RandomState(seed)
        if random.rand() >= self.probability:
            return MixDraw(lam=1.0, drawn_lam=1.0, box=None)
        if self.mixup > 0 and self.cutmix > 0:
            use_cutmix = random.rand() < self.switch_probability
        else:
            use_cutmix = self.cutmix > 0
        alpha = self.cutmix if use_cutmix else self.mixup
        lam = random.beta(alpha, alpha)
        if not use_cutmix or lam == 1:
            return MixDraw(lam=lam, drawn_lam=lam, box=None)
        side = math.sqrt(1 - lam)
        half_height, half_width = int(height * side) // 2, int(width * side) // 2
        row, column = random.randint(height), random.randint(width)
        top, bottom = max(row - half_height, 0), min(row + half_height, height)
        left, right = max(column - half_width, 0), min(column + half_width, width)
        kept = 1 - (bottom - top) * (right - left) / (height * width)
        return MixDraw(lam=kept, drawn_lam=lam, box=(top, bottom, left, right))

    def __call__(
        self, images_BCHW: Tensor, labels_B: Tensor, *, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Mixed images and their targets (B, num_classes), float32, on the inputs' devices.

        Raises:
            UserError: The number of images is odd.
        """
        if len(images_BCHW) % 2:
            raise UserError(
                f"mixup and cutmix mix pairs of images, but the batch has {len(images_BCHW)}: "
                "take an even batch size, or set mixup and cutmix to 0."
            )
        height, width = images_BCHW.shape[-2:]
        draw = self.draw(seed, height, width)
        own_HW, other_HW = _shares(draw, images_BCHW)
        mixed_BCHW = images_BCHW * own_HW + _neighbours(images_BCHW) * other_HW
        targets = F.one_hot(labels_B.long(), self.num_classes) * (1.0 - self.smoothing)
        targets = targets + self.smoothing / self.num_classes
        return mixed_BCHW, targets * draw.lam + _neighbours(targets) * (1 - draw.lam)


def _shares(draw: MixDraw, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each pixel is its own image's and its neighbour's; both (H, W).

    Made where the images are, since a copy from the host would wait for the device.
    """
    height, width = images_BCHW.shape[-2:]
    top, bottom, left, right = draw.box or (0, 0, 0, 0)
    row_H1 = torch.arange(height, device=images_BCHW.device)[:, None]
    column_W = torch.arange(width, device=images_BCHW.device)
    inside_HW = (row_H1 >= top) & (row_H1 < bottom) & (column_W >= left) & (column_W < right)
    share = draw.lam if draw.box is None else 1.0
    own_HW = images_BCHW.new_full((height, width), share).masked_fill(inside_HW, 0.0)
    other_HW = images_BCHW.new_full((height, width), 1 - share).masked_fill(inside_HW, 1.0)
    return own_HW, other_HW


def _neighbours(values: Tensor) -> Tensor:
    """Swaps entries 0 and 1, 2 and 3, ... of the first dimension."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for one process's ``Mixing`` in one step, well spread over all three numbers."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


class ClassificationLoss(nn.Module):
    """Cross entropy in at least float32, averaged over the batch.

    Args:
        smoothing: Label smoothing for integer labels. Soft targets (of ``Mixing``, already
            smoothed) are taken as they are.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits_BN: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits (B, classes) and labels (B,) or soft targets (B, classes)."""
        if logits_BN.dtype in (torch.float16, torch.bfloat16):
            logits_BN = logits_BN.float()
        if targets.is_floating_point():
            return F.cross_entropy(logits_BN, targets)
        return F.cross_entropy(logits_BN, targets, label_smoothing=self.smoothing)
