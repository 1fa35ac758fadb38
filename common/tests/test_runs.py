"""What a model directory says of its runs, as the launcher reads it."""

import sys
from pathlib import Path

import pytest

from zoo_common import runs
from zoo_common.errors import UserError

CONFIG = """
from dataclasses import dataclass

from zoo_common.config import CardKey, LaunchConfig, RunConfig, section, setting
from zoo_common.errors import UserError


@dataclass
class DataConfig:
    batch_size: int = setting(16, "images of all processes", at_least=1)


@dataclass
class Config:
    data: DataConfig = section(DataConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


CARD_OPTIONS = {
    "SOLVER.IMS_PER_BATCH": "data.batch_size",
    "VERSION": CardKey((), lambda value, given: {}),
    "--first": CardKey(("run.device_id",), lambda value, given: {}, help="the first card"),
}
THEIR_CONFIGS = {"first_8gpu.py": "configs/first.yaml"}


def check(config, world_size, kind):
    if kind != "eval" and config.data.batch_size % world_size:
        raise UserError(f"{config.data.batch_size} images, {world_size} processes")
"""

RUNS = """
network: Checked
package: checked_model
runs:
  train: {help: Trains, entry: checked_model.train, devices: 8, kind: acc, config: c.yaml}
  eval: {help: Evaluates, entry: checked_model.evaluate, devices: 3, kind: eval, config: c.yaml}
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Model:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "runs.yaml").write_text(RUNS)
    (tmp_path / "checked_model").mkdir()
    (tmp_path / "checked_model" / "__init__.py").touch()
    (tmp_path / "checked_model" / "config.py").write_text(CONFIG)
    (tmp_path / "c.yaml").write_text("SOLVER: {IMS_PER_BATCH: 32}\nVERSION: 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "checked_model", raising=False)
    monkeypatch.delitem(sys.modules, "checked_model.config", raising=False)
    return runs.load(tmp_path)


def test_a_models_own_check_sees_all_processes_and_the_kind(model: runs.Model) -> None:
    train = model.run("train")
    assert model.config(train, []).data.batch_size == 32
    assert model.config(train, ["SOLVER.IMS_PER_BATCH", "48", "--nnodes=2"]).data.batch_size == 48
    with pytest.raises(UserError, match="24 images, 16 processes"):
        model.config(train, ["SOLVER.IMS_PER_BATCH", "24", "--nnodes=2"])
    with pytest.raises(UserError, match="32 images, 5 processes"):
        model.config(train, ["--processes=5"])
    assert model.config(model.run("eval"), []).data.batch_size == 32


def test_a_model_without_a_recipe_for_fewer_machines_takes_one_number(model: runs.Model) -> None:
    train = model.run("train")
    with pytest.raises(UserError, match=r"--nnodes=1:2: Checked has no recipe .* give one number"):
        model.config(train, ["--nnodes=1:2"])
    evaluate = model.config(model.run("eval"), ["--nnodes=1:2"])
    assert (evaluate.launch.nnodes, evaluate.launch.processes) == ("1:2", 3)


def test_a_config_in_python_is_answered_with_the_file_that_has_its_recipe(
    model: runs.Model,
) -> None:
    train = model.run("train")
    with pytest.raises(
        UserError, match=r"a/first_8gpu\.py: .* its recipe is configs/first\.yaml\.$"
    ):
        model.config(train, ["--config=a/first_8gpu.py"])
    with pytest.raises(UserError, match=r"other\.py: .* give a YAML file"):
        model.config(train, ["--config", "other.py"])


def test_options_are_those_that_set_something(model: runs.Model) -> None:
    names = {option.name: option.targets for option in model.options()}
    assert names["SOLVER.IMS_PER_BATCH"] == ("data.batch_size",)
    assert "VERSION" not in names
    assert {option.name: option.help for option in model.options()}["--first"] == "the first card"
    model.config(model.run("train"), ["VERSION", "2"])
    with pytest.raises(UserError, match=r"did you mean VERSION\?"):
        model.config(model.run("train"), ["VERSIO", "2"])
