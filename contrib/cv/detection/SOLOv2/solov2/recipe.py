"""Optimizer and learning rate of SOLOv2's recipes, as mmdet 1.0 and mmcv 0.2.16 run them.

A step schedule by epochs; within it a linear warm-up by steps (mmcv/runner/hooks/lr_updater.py).
"""

from bisect import bisect_right

import torch
from torch import nn

from solov2.config import SolverConfig

REFERENCE_PROCESSES = 8
"""Cards that a recipe's learning rate is written for."""


def base_lr(config: SolverConfig, world_size: int) -> float:
    """The rate after warm-up; ``autoscale_lr`` fits it to the processes on all machines."""
    if config.autoscale_lr:
        return config.base_lr * world_size / REFERENCE_PROCESSES
    return config.base_lr


def build_optimizer(model: nn.Module, config: SolverConfig) -> torch.optim.SGD:
    """SGD over what is trained, in one group: norms and biases decay like the rest."""
    return torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.base_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def lr_factor(step: int, config: SolverConfig, steps_per_epoch: int) -> float:
    """Share of the rate after warm-up that step number ``step`` (from 0) is taken at.

    Each of the epochs ``steps`` multiplies by ``gamma`` once it begins. For ``warmup_iters`` steps
    the factor is 1 - (1 - step / warmup_iters) * (1 - warmup_ratio) of that.
    """
    factor = config.gamma ** bisect_right(sorted(config.steps), step // steps_per_epoch)
    if step >= config.warmup_iters:
        return factor
    missing = (1 - step / config.warmup_iters) * (1 - config.warmup_ratio)
    return factor * (1 - missing)


def set_lr(
    optimizer: torch.optim.Optimizer,
    step: int,
    config: SolverConfig,
    steps_per_epoch: int,
    world_size: int,
) -> float:
    """Sets the rate of step number ``step`` (from 0) and returns it."""
    rate = base_lr(config, world_size) * lr_factor(step, config, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
