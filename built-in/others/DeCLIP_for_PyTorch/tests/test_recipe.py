"""What AdamW is given, the learning rate at each step, and the limits of the scale."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from declip.config import Config, LossConfig, OptimizerConfig, config_from_upstream
from declip.model import CLIP, build_model
from declip.recipe import build_optimizer, clamp_scale, lr_of_step, parameter_groups, set_lr
from zoo_common import device as devices
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig

pytestmark = pytest.mark.device

DEVICE = devices.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
FIXTURES = Path(__file__).resolve().parent / "fixtures"


def case_of(network: str) -> dict:
    return json.loads((FIXTURES / f"declip_{network}_tiny.json").read_text())


def config_of(case: dict) -> Config:
    return config_from_upstream(case["config"], case["mlp_widths"])


def tiny() -> CLIP:
    config = config_of(case_of("vit"))
    torch.manual_seed(0)
    return build_model(config.model, config.loss, vocab_size=40).to(DEVICE)


def give_gradients(model: CLIP, size: float = 1.0) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, size)


@pytest.mark.parametrize("network", ["vit", "r50"])
def test_each_parameter_decays_as_upstream(network: str) -> None:
    case = case_of(network)
    config = config_of(case)
    groups = parameter_groups(build_model(config.model, config.loss, vocab_size=40), 0.1)
    ours = {name: group["weight_decay"] for group in groups for name in group["names"]}
    theirs = {
        name: group["weight_decay"] for group in case["optim_groups"] for name in group["names"]
    }
    assert ours == theirs
    assert groups[-1]["names"] == ["logit_scale"]


def test_each_step_has_upstreams_rate() -> None:
    case = case_of("vit")
    config, steps = OptimizerConfig(), case["cosine"]["max_iter"]
    for step, rate in case["lr"].items():
        assert lr_of_step(int(step), config, steps) == pytest.approx(rate, rel=1e-12)
    assert lr_of_step(steps, config, steps) == 0


def test_short_schedules_have_a_rate_at_every_step() -> None:
    for warmup in (0, 1, 2, 3):
        config = OptimizerConfig(lr=1.0, peak_lr=2.0, min_lr=0.5, warmup_steps=warmup)
        rates = [lr_of_step(step, config, 4) for step in (1, 2, 3, 4)]
        assert rates[-1] == 0.5 and rates[max(warmup, 1) - 1] == pytest.approx(
            2.0 if warmup else 0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2
        )
    assert lr_of_step(1, OptimizerConfig(warmup_steps=0), 1) == 0


def test_the_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(tiny(), OptimizerConfig())
    assert set_lr(optimizer, 2500, OptimizerConfig(), 128001) == 1e-3
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_adamw_is_fused_on_a_cpu_and_steps_as_the_plain_one() -> None:
    model, plain = tiny(), tiny()
    config = OptimizerConfig(lr=0.01)
    fused = build_optimizer(model, config)
    assert fused.defaults["fused"] is (True if DEVICE.type == "cpu" else None)
    wanted = torch.optim.AdamW(
        parameter_groups(plain, 0.1), lr=0.01, betas=(0.9, 0.98), eps=1e-8, foreach=False
    )
    for size in (1.0, -0.3, 0.01):
        for network, optimizer in ((model, fused), (plain, wanted)):
            give_gradients(network, size)
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
@pytest.mark.parametrize(("before", "after"), [(2.0, 3.0), (4.5, 4.5), (7.0, 6.0)])
def test_the_scale_stays_within_its_limits(level: str, before: float, after: float) -> None:
    """Also under O2, where the optimizer has a copy of its own, which a checkpoint holds."""
    model = tiny()
    torch.nn.init.constant_(model.logit_scale, before)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.0))
    precision = Precision(
        PrecisionConfig(opt_level=level, dtype="bfloat16"), model, optimizer, DEVICE
    )
    clamp_scale(model, optimizer, LossConfig())
    assert model.logit_scale.item() == after
    assert precision.model_state_dict()["logit_scale"].item() == after
    precision.step(model.logit_scale.float().sum())
    assert model.logit_scale.item() == after
