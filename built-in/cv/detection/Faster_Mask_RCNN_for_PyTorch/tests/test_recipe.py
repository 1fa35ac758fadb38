"""The learning rate and the groups of SGD."""

import pytest
import torch
from torch import nn

from rcnn.config import SolverConfig
from rcnn.recipe import build_optimizer, lr_factor, set_lr


def test_the_rate_of_the_1x_schedule() -> None:
    config = SolverConfig()
    assert lr_factor(0, config) == pytest.approx(0.001)
    assert lr_factor(500, config) == pytest.approx(0.5005)
    assert lr_factor(1000, config) == 1
    assert lr_factor(59_999, config) == 1
    assert lr_factor(60_000, config) == pytest.approx(0.1)
    assert lr_factor(80_000, config) == pytest.approx(0.01)
    assert lr_factor(80_000, SolverConfig(steps=[])) == 1
    assert lr_factor(10, SolverConfig(warmup_method="constant")) == 0.001


def test_groups_have_their_own_decay_and_rate() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Linear(1, 1))
    model[2].requires_grad_(False)
    config = SolverConfig(weight_decay_bias=0.5, bias_lr_factor=2.0)
    groups = build_optimizer(model, config).param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (0.02, 1e-4, 1),  # the convolution's weight
        (0.04, 0.5, 2),  # both biases
        (0.02, 0.0, 1),  # the norm's weight
    ]
    assert len(build_optimizer(model, SolverConfig(weight_decay_norm=1e-4)).param_groups) == 1


def test_rates_follow_the_schedule_also_after_a_resume() -> None:
    model = nn.Linear(1, 1)
    config = SolverConfig(bias_lr_factor=2.0)
    first = build_optimizer(model, config)
    assert set_lr(first, 500, config) == pytest.approx(0.02 * 0.5005)
    again = build_optimizer(model, config)
    again.load_state_dict(first.state_dict())
    for optimizer in (first, again):
        set_lr(optimizer, 60_000, config)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.002, 0.004])
    assert isinstance(first, torch.optim.SGD)


def test_rates_follow_the_processes_of_a_resumed_run() -> None:
    model = nn.Linear(1, 1)
    before, now = SolverConfig(bias_lr_factor=2.0), SolverConfig(base_lr=0.01, bias_lr_factor=2.0)
    first = build_optimizer(model, before)
    set_lr(first, 2000, before)
    fewer = build_optimizer(model, now)
    fewer.load_state_dict(first.state_dict())
    assert set_lr(fewer, 2000, now) == 0.01
    assert [g["lr"] for g in fewer.param_groups] == [0.01, 0.02]
    again = build_optimizer(model, before)
    again.load_state_dict(fewer.state_dict())
    set_lr(again, 2000, before)
    assert [g["lr"] for g in again.param_groups] == [0.02, 0.04]
