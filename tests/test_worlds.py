"""Each model's recipe on fewer machines than it is written for."""

from pathlib import Path
from typing import Any

import pytest

from zoo_common import runs
from zoo_common.config import Field, fields_of
from zoo_common.errors import UserError
from zoo_common.runs import Model, RunSpec

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(
    file.parent.parent
    for group in ("built-in", "contrib")
    for file in (ROOT / group).glob("**/test/runs.yaml")
)
FOLLOWS = {
    "rcnn": {"solver.base_lr"},
    "glip": {"solver.base_lr", "solver.lang_lr"},
    "declip": {"optimizer.lr", "optimizer.peak_lr", "optimizer.min_lr"},
    "solov2": {"solver.base_lr"},
}
"""Learning rates by package; those of Twins are written for 512 images."""
STAYS = {
    "run.warmup_steps": "what throughput leaves out is a matter of the machine",
    "run.log_every": "lines are read by people",
    "run.profile": "a trace is of so many steps",
    "run.skip_bad_steps": "a limit on damage",
}
WORDS = ["--nnodes=2:4", "--processes=1", "--batch_size=24"]


@pytest.fixture(params=MODELS, ids=[directory.name for directory in MODELS])
def model(request: pytest.FixtureRequest) -> Model:
    """A model directory."""
    return runs.load(request.param)


def training(model: Model) -> list[RunSpec]:
    return [spec for spec in model.runs.values() if spec.kind != "eval"]


def leaf(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part)
    return config


def test_nothing_changes_on_all_machines_nor_where_their_number_is_fixed(model: Model) -> None:
    assert model.for_world is not None
    for spec in training(model):
        for nnodes, nodes in (("2:4", 4), ("4", 3), ("1", 1)):
            config = model.config(spec, [*WORDS, f"--nnodes={nnodes}"])
            assert model.for_world(config, nodes) == config


def test_every_count_of_steps_and_every_rate_follows_the_images_of_a_step(model: Model) -> None:
    assert model.for_world is not None
    package = model.schema.__module__.partition(".")[0]
    for spec in training(model):
        config = model.config(spec, [*WORDS, "--max_steps=400", "--save_every=40"])
        half = model.for_world(config, 2)
        for item in fields_of(model.schema):
            before, after = leaf(config, item.path), leaf(half, item.path)
            where = f"{package}, {spec.config}: {item.path}"
            if item.path in ("solver.ema", "optimizer.ema"):
                assert after**2 == pytest.approx(before), where
            elif counts_steps(item):
                assert after == doubled(before), where
            elif follows(item, config):
                assert after == before / 2, where
            else:
                assert after == before, where


def counts_steps(item: Field) -> bool:
    """Whether a setting is a number of steps, by what it says of itself."""
    return "steps" in item.help and item.path not in STAYS


def follows(item: Field, config: Any) -> bool:
    """Whether a setting is of the images of a step, and does not count the cards itself."""
    if item.path == "data.batch_size":
        return "all cards" in item.help
    package = type(config).__module__.partition(".")[0]
    by_itself = package == "solov2" and config.solver.autoscale_lr
    return item.path in FOLLOWS.get(package, ()) and not by_itself


def doubled(value: Any) -> Any:
    if isinstance(value, list):  # falls of the rate, of which those below 1 are shares of the plan
        return [item * 2 if item >= 1 else item for item in value]
    return value * 2


def test_settings_must_fit_each_number_of_machines(model: Model) -> None:
    package = model.schema.__module__.partition(".")[0]
    spec = training(model)[0]
    if package in ("rcnn", "glip"):
        with pytest.raises(UserError, match="batch_size=26"):
            model.config(spec, ["--nnodes=2:4", "--processes=1", "--batch_size=26"])
        evaluates = next(spec for spec in model.runs.values() if spec.kind == "eval")
        model.config(evaluates, ["--nnodes=2:4", "--processes=1", "data.batch_size=26"])
    if package == "declip":
        words = ["--config=configs/clip_r50.yaml", "--processes=2", "model.sync_batch_norm=4"]
        assert model.config(spec, [*words, "--nnodes=4"]).model.sync_batch_norm == 4
        with pytest.raises(UserError, match="does not divide the 6 processes"):
            model.config(spec, [*words, "--nnodes=2:4"])
    with pytest.raises(UserError, match="must be a number of machines"):
        model.config(spec, ["--nnodes=4:2"])
