"""Optimizer, learning rates and the average of the weights, as microsoft/GLIP trains.

Follows https://github.com/microsoft/GLIP (MIT) at 9dda955: maskrcnn_benchmark/solver/build.py and
lr_scheduler.py, utils/ema.py and engine/trainer.py; the numbers are the same.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glip.config import Config, ModelConfig, SolverConfig
from zoo_common.amp import Precision


def largest_kept_block_mb(config: ModelConfig) -> int:
    """MiB of the largest freed block that a process on the CPU keeps, see ``give_back_memory``.

    A fusion makes scores of 6 MiB many times a step; to ask for each anew took a fifth of the time.
    """
    return 8 if config.fusion else 1


def planned_steps(config: SolverConfig, per_epoch: int) -> int:
    """Steps that the learning rate is planned for, whether or not the run gets so far."""
    return config.max_epoch * per_epoch if config.max_epoch else config.max_iter


def total_steps(config: Config, per_epoch: int) -> int:
    """Steps of the run: as planned, or less by ``solver.early_stop`` or ``run.max_steps``.

    Args:
        config: for the lengths.
        per_epoch: steps of a pass over the training data.
    """
    planned = planned_steps(config.solver, per_epoch)
    return min(planned, config.solver.early_stop or planned, config.run.max_steps or planned)


def settings_of(name: str, config: SolverConfig) -> tuple[float, float]:
    """The learning rate and the decay of a parameter, by its name.

    A bias is what has "bias" in its name: the tables of Swin's relative positions are among them,
    and they do not decay; a norm is what has "norm" in it.
    """
    rate, decay = config.base_lr, config.weight_decay
    if "language_backbone" in name:
        rate = config.lang_lr
    elif "backbone.body" in name:
        rate *= config.backbone_lr_factor
    if "bias" in name:
        rate *= config.bias_lr_factor
        decay = config.weight_decay_bias
    if "norm" in name.lower():
        decay *= config.weight_decay_norm_factor
    return rate, decay


def build_optimizer(model: nn.Module, config: SolverConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; the model is on its device.

    Parameters of equal settings share a group, in the order of the model. On a CPU it is
    PyTorch's fused one, since the default there walks the parameters one by one; elsewhere
    PyTorch's default: torch_npu's fused one does not work with a loss scale.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(settings_of(name, config), []).append(parameter)
    on_cpu = next(model.parameters()).device.type == "cpu"
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        lr=config.base_lr,
        fused=True if on_cpu else None,
    )


def lr_factor(step: int, config: SolverConfig, planned: int) -> float:
    """Share of the full rates that step number ``step`` (from 0) of ``planned`` is taken at.

    Warm-up grows from ``warmup_factor`` to 1 in ``warmup_iters`` steps, linearly or at once; each
    of ``steps``, as a share of ``planned`` below 1, multiplies by ``gamma``.
    """
    falls = [round(fall * planned) if fall < 1 else int(fall) for fall in config.steps]
    factor = config.gamma ** bisect_right(sorted(falls), step)
    if step >= config.warmup_iters:
        return factor
    if config.warmup_method == "constant":
        return config.warmup_factor * factor
    done = step / config.warmup_iters
    return factor * (config.warmup_factor * (1 - done) + done)


def set_lr(
    optimizer: torch.optim.Optimizer, step: int, config: SolverConfig, planned: int
) -> float:
    """Sets the rates of step number ``step`` (from 0); returns that of most weights."""
    factor = lr_factor(step, config, planned)
    for group in optimizer.param_groups:
        # Groups come from a checkpoint, whose run may have had another number of processes.
        share = config.base_lr / group.setdefault("for_base_lr", config.base_lr)
        group["lr"] = group["base_lr"] * share * factor
    return config.base_lr * factor


class WeightAverage:
    """The exponential average of all trained and frozen parameters, float32.

    It begins at the weights that training starts from and counts every step, a skipped one too.

    Args:
        precision: owner of the weights; under O2 the average is that of the masters.
        decay: share of the average that a step keeps.
    """

    def __init__(self, precision: Precision, decay: float) -> None:
        self._precision = precision
        self._decay = decay
        # The live tensors: optimizers and checkpoints change them in place.
        weights = precision.model_state_dict()
        self._live = {name: weights[name] for name, _ in precision.model.named_parameters()}
        self._average = {name: weight.clone() for name, weight in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step."""
        torch._foreach_lerp_(
            list(self._average.values()), list(self._live.values()), 1 - self._decay
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by the model's names."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what :meth:`state_dict` gave."""
        for name, average in self._average.items():
            average.copy_(state[name])

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the average for weights inside, as evaluation wants it."""
        before = {name: weight.clone() for name, weight in self._live.items()}
        self._precision.load_model_state_dict(self._average, strict=False)
        try:
            yield
        finally:
            self._precision.load_model_state_dict(before, strict=False)
