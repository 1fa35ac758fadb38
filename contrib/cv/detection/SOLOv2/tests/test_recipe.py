"""The learning rate at each step, and what SGD is given."""

import pytest
import torch
from torch import nn

from solov2.config import SolverConfig
from solov2.recipe import base_lr, build_optimizer, set_lr

PER_EPOCH = 7330
"""Steps of an epoch of COCO's 117,266 images with objects on 8 cards of 2."""


def rate(step: int, config: SolverConfig, per_epoch: int = PER_EPOCH, world_size: int = 8) -> float:
    optimizer = build_optimizer(nn.Linear(1, 1), config)
    lr = set_lr(optimizer, step, config, per_epoch, world_size)
    assert [group["lr"] for group in optimizer.param_groups] == [lr]
    return lr


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.0001),
        (1, 0.0001198),  # 0.01 * (1 - (499 / 500) * 0.99)
        (50, 0.00109),
        (250, 0.00505),
        (499, 0.0099802),
        (500, 0.01),
        (9 * PER_EPOCH - 1, 0.01),
        (9 * PER_EPOCH, 0.001),
        (11 * PER_EPOCH - 1, 0.001),
        (11 * PER_EPOCH, 0.0001),
        (12 * PER_EPOCH - 1, 0.0001),
    ],
)
def test_the_rate_of_the_1x_schedule(step: int, lr: float) -> None:
    """By mmcv 0.2.16's formula; mmcv prints rate and step, so logs can be laid side by side."""
    assert rate(step, SolverConfig()) == pytest.approx(lr, rel=1e-12)


def test_warm_up_goes_on_when_the_rate_falls_within_it() -> None:
    config = SolverConfig(steps=[1], warmup_iters=4, warmup_ratio=0.5)
    rates = [rate(step, config, per_epoch=2) / 0.01 for step in range(5)]
    assert rates == pytest.approx([0.5, 0.625, 0.075, 0.0875, 0.1])
    assert rate(0, SolverConfig(warmup_iters=0)) == 0.01


@pytest.mark.parametrize(("cards", "lr"), [(1, 0.00125), (4, 0.005), (8, 0.01), (16, 0.02)])
def test_autoscale_fits_the_rate_to_the_cards(cards: int, lr: float) -> None:
    assert rate(500, SolverConfig(autoscale_lr=True), world_size=cards) == pytest.approx(lr)
    assert rate(0, SolverConfig(autoscale_lr=True), world_size=cards) == pytest.approx(lr / 100)
    assert base_lr(SolverConfig(), cards) == 0.01


def test_everything_that_is_trained_decays_in_one_group() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Linear(1, 1))
    model[2].requires_grad_(False)
    (group,) = build_optimizer(model, SolverConfig()).param_groups
    assert len(group["params"]) == 4
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)


def test_a_step_moves_weights_as_the_published_update_does() -> None:
    """Velocity v = 0.9 v + (g + 1e-4 w), w -= lr v, the second time with the next step's rate."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    config = SolverConfig(warmup_iters=2, warmup_ratio=0.5)
    optimizer = build_optimizer(layer, config)
    w, v = 1.0, 0.0
    for step, lr in enumerate((0.005, 0.0075, 0.01)):
        layer.weight.grad = torch.full_like(layer.weight, 3.0)
        set_lr(optimizer, step, config, PER_EPOCH, 8)
        optimizer.step()
        v = 0.9 * v + 3.0 + 1e-4 * w
        w -= lr * v
        assert layer.weight.item() == pytest.approx(w, rel=1e-14)
