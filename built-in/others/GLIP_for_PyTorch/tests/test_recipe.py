"""Learning rates, AdamW's groups, the lengths of a run and the average of the weights."""

import copy

import pytest
import torch
from torch import nn

from glip.config import Config, SolverConfig
from glip.recipe import (
    WeightAverage,
    build_optimizer,
    lr_factor,
    planned_steps,
    set_lr,
    settings_of,
    total_steps,
)
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig

CPU = torch.device("cpu")


def test_a_run_is_as_long_as_planned_or_as_the_first_limit() -> None:
    config = Config()
    assert planned_steps(config.solver, 100) == 2400
    assert total_steps(config, 100) == 2400
    config.solver.early_stop = 2000
    assert total_steps(config, 100) == 2000
    config.run.max_steps = 30
    assert total_steps(config, 100) == 30
    config.solver.max_epoch, config.run.max_steps, config.solver.early_stop = 0, 0, 0
    assert total_steps(config, 100) == 40_000


def test_the_rate_of_the_card() -> None:
    """Its plan is longer than its run, which stops long before the rate falls."""
    config = SolverConfig()
    planned = 24 * 14_658
    assert lr_factor(0, config, planned) == pytest.approx(0.001)
    assert lr_factor(1000, config, planned) == pytest.approx(0.5005)
    assert lr_factor(2000, config, planned) == 1
    assert lr_factor(35_000, config, planned) == 1
    first, second = round(0.67 * planned), round(0.89 * planned)
    assert lr_factor(first - 1, config, planned) == 1
    assert lr_factor(first, config, planned) == pytest.approx(0.1)
    assert lr_factor(second, config, planned) == pytest.approx(0.01)


def test_a_fall_of_one_or_more_is_a_step() -> None:
    config = SolverConfig(steps=[0.5, 90], warmup_iters=10, warmup_method="constant")
    factors = [lr_factor(step, config, 100) for step in (9, 10, 49, 50, 89, 90)]
    assert factors == pytest.approx([0.001, 1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("name", "rate", "decay"),
    [
        ("rpn.head.dyhead_tower.0.b_attn.attn.v_proj.weight", 1.0, 0.1),
        ("rpn.head.bbox_pred.bias", 2.0, 0.0),
        ("rpn.head.bias_lang", 2.0, 0.0),
        ("rpn.head.log_scale", 1.0, 0.1),
        ("backbone.body.layers.0.blocks.0.attn.qkv.weight", 0.5, 0.1),
        ("backbone.body.layers.0.blocks.0.attn.relative_position_bias_table", 1.0, 0.0),
        ("backbone.body.layers.0.blocks.0.norm1.weight", 0.5, 0.05),
        ("backbone.fpn.fpn_inner2.weight", 1.0, 0.1),
        ("language_backbone.body.model.embeddings.word_embeddings.weight", 0.25, 0.1),
        ("language_backbone.body.model.encoder.layer.0.output.LayerNorm.weight", 0.25, 0.05),
        ("language_backbone.body.model.encoder.layer.0.output.dense.bias", 0.5, 0.0),
    ],
)
def test_a_parameter_has_upstreams_rate_and_decay(name: str, rate: float, decay: float) -> None:
    config = SolverConfig(
        base_lr=1.0,
        lang_lr=0.25,
        backbone_lr_factor=0.5,
        weight_decay=0.1,
        weight_decay_norm_factor=0.5,
    )
    assert settings_of(name, config) == (rate, decay)


def test_equal_settings_share_a_group_whose_rate_follows_the_plan_also_after_a_resume() -> None:
    model = nn.ModuleDict(
        {"language_backbone": nn.Linear(2, 2), "rpn": nn.Linear(2, 2), "fpn": nn.Linear(2, 2)}
    )
    model["fpn"].bias.requires_grad_(False)
    config = SolverConfig(base_lr=1.0, lang_lr=0.5, warmup_iters=0)
    first = build_optimizer(model, config)
    shown = [(g["lr"], g["weight_decay"], len(g["params"])) for g in first.param_groups]
    assert shown == [(0.5, 1e-4, 1), (1.0, 0.0, 1), (1.0, 1e-4, 2), (2.0, 0.0, 1)]
    assert set_lr(first, 66, config, 100) == 1
    again = build_optimizer(model, config)
    again.load_state_dict(first.state_dict())
    for optimizer in (first, again):
        assert set_lr(optimizer, 67, config, 100) == pytest.approx(0.1)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.05, 0.1, 0.1, 0.2])


def test_rates_follow_the_processes_of_a_resumed_run() -> None:
    model = nn.ModuleDict({"language_backbone": nn.Linear(2, 2, False), "rpn": nn.Linear(2, 2)})
    before = SolverConfig(base_lr=1.0, lang_lr=0.5, warmup_iters=0)
    now = SolverConfig(base_lr=0.75, lang_lr=0.375, warmup_iters=0)
    first = build_optimizer(model, before)
    set_lr(first, 0, before, 100)
    fewer = build_optimizer(model, now)
    fewer.load_state_dict(first.state_dict())
    assert set_lr(fewer, 0, now, 100) == 0.75
    assert [group["lr"] for group in fewer.param_groups] == [0.375, 0.75, 1.5]


def stepped(model: nn.Module, level: str, count: int) -> tuple[Precision, WeightAverage]:
    """A model after steps that each add 1 to its weight."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = PrecisionConfig(opt_level=level, dtype="bfloat16")
    precision = Precision(config, model, optimizer, CPU)
    average = WeightAverage(precision, 0.5)
    for _ in range(count):
        loss = model(torch.ones(1, 1)).float().sum()
        precision.step(-loss)
        average.update()
    return precision, average


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_the_average_keeps_its_share_of_each_step(level: str) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    precision, average = stepped(model, level, 3)
    assert precision.model_state_dict()["weight"].item() == 3
    # 0.5 * (0.5 * (0.5 * 0 + 0.5) + 1) + 1.5
    assert average.state_dict()["weight"].item() == 2.125
    with average.in_model():
        assert model.weight.item() == 2.125
        assert precision.model_state_dict()["weight"].item() == 2.125
    assert model.weight.item() == 3


def test_the_average_goes_on_where_it_was() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    _, average = stepped(model, "O0", 2)
    saved = copy.deepcopy(average.state_dict())
    _, other = stepped(nn.Linear(1, 1, bias=False), "O0", 1)
    other.load_state_dict(saved)
    assert other.state_dict()["weight"].item() == saved["weight"].item() == 1.25


def test_the_weights_come_back_after_an_error() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    _, average = stepped(model, "O0", 1)
    with pytest.raises(RuntimeError, match="no score"), average.in_model():
        raise RuntimeError("no score")
    assert model.weight.item() == 1
