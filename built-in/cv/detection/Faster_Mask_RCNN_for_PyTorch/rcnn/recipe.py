"""Optimizer and learning rate of detectron2's R-CNN recipes (solver/{build,lr_scheduler}.py)."""

from bisect import bisect_right

import torch
from torch import nn

from rcnn.config import SolverConfig

NORMS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def build_optimizer(model: nn.Module, config: SolverConfig) -> torch.optim.SGD:
    """SGD over what is trained; norms and biases have decays, biases a rate of their own.

    Parameters of equal settings share a group, in the order of the model.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            decay = config.weight_decay_norm if isinstance(module, NORMS) else config.weight_decay
            factor = 1.0
            if name == "bias":
                factor = config.bias_lr_factor
                decay = decay if config.weight_decay_bias < 0 else config.weight_decay_bias
            groups.setdefault((factor, decay), []).append(parameter)
    return torch.optim.SGD(
        [
            {"params": parameters, "lr": config.base_lr * factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()
        ],
        lr=config.base_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        foreach=True,
    )


def lr_factor(step: int, config: SolverConfig) -> float:
    """Share of the base rate that finished step number ``step`` (from 0) was taken at.

    Warm-up grows from ``warmup_factor`` to 1 in ``warmup_iters`` steps, linearly or at once;
    each of ``steps`` multiplies by ``gamma``.
    """
    factor = config.gamma ** bisect_right(sorted(config.steps), step)
    if step >= config.warmup_iters:
        return factor
    if config.warmup_method == "constant":
        return config.warmup_factor * factor
    done = step / config.warmup_iters
    return factor * (config.warmup_factor * (1 - done) + done)


def set_lr(optimizer: torch.optim.Optimizer, step: int, config: SolverConfig) -> float:
    """Sets the rates of step number ``step`` (from 0); returns that of the weights."""
    factor = lr_factor(step, config)
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        # Groups come from a checkpoint, whose run may have had another number of processes.
        share = config.base_lr / group.setdefault("for_base_lr", config.base_lr)
        group["lr"] = group["base_lr"] * share * factor
    return config.base_lr * factor
