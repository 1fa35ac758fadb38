"""Optimizer, learning rate and the limits of the logits' scale, as in the published runs.

Follows https://github.com/Sense-GVT/DeCLIP (Apache-2.0) at 5d99a855: prototype/utils/misc.py
(``param_group_all``), prototype/lr_scheduler/scheduler.py and prototype/solver/declip_solver.py;
the numbers are the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from declip.config import LossConfig, OptimizerConfig
from declip.model import CLIP

_NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
_SCALE = "logit_scale"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Three optimizer groups: with decay, without (norms and biases), and the logits' scale.

    A bias is what a layer calls so: that of attention's input projection, which torch keeps as
    ``in_proj_bias``, decays, as do positions and embeddings. Frozen parameters are in the groups
    too, as upstream; without a gradient AdamW leaves them alone.

    Returns:
        The groups, each with ``params``, ``weight_decay`` and ``names``.
    """
    norms = {
        f"{module_name}.weight"
        for module_name, module in model.named_modules()
        if isinstance(module, _NORMS)
    }
    decayed: dict[str, Any] = {"params": [], "weight_decay": weight_decay, "names": []}
    plain: dict[str, Any] = {"params": [], "weight_decay": 0.0, "names": []}
    scale: dict[str, Any] = {"params": [], "weight_decay": 0.0, "names": []}
    for name, parameter in model.named_parameters():
        if name == _SCALE:
            group = scale
        else:
            group = plain if name in norms or name.endswith(".bias") else decayed
        group["params"].append(parameter)
        group["names"].append(name)
    return [decayed, plain, scale]


def build_optimizer(model: CLIP, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; the model is on its device.

    On a CPU it is PyTorch's fused one, since the default there walks the parameters one by one;
    elsewhere PyTorch's default: torch_npu's fused one does not work with a loss scale.
    """
    on_cpu = model.logit_scale.device.type == "cpu"
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True if on_cpu else None,
    )


def lr_of_step(step: int, config: OptimizerConfig, steps: int) -> float:
    """The learning rate that step number ``step`` (from 1) of ``steps`` is taken at.

    It rises linearly from ``lr`` at the first step to ``peak_lr`` at step ``warmup_steps``, and
    falls along half a cosine to ``min_lr`` at step ``steps``.
    """
    if step < config.warmup_steps:
        done = (step - 1) / (config.warmup_steps - 1)
        return config.lr + (config.peak_lr - config.lr) * done
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    share = (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.peak_lr - config.min_lr) * share


def set_lr(
    optimizer: torch.optim.Optimizer, step: int, config: OptimizerConfig, steps: int
) -> float:
    """Sets the rate of step number ``step`` (from 1) of ``steps`` and returns it."""
    rate = lr_of_step(step, config, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


@torch.no_grad()
def clamp_scale(model: CLIP, optimizer: torch.optim.Optimizer, config: LossConfig) -> None:
    """Keeps ``logit_scale``, a logarithm, within its limits; reads nothing back to the host.

    Upstream does so before the optimizer's step, which matters in the first one alone, and after.
    """
    # Under O2 the optimizer's is the float32 master, of which the model holds a copy.
    (scale,) = optimizer.param_groups[-1]["params"]
    scale.clamp_(config.scale_min, config.scale_max)
    if scale is not model.logit_scale:
        model.logit_scale.copy_(scale)
