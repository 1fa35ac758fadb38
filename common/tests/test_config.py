"""Configs: what YAML and options set, and what is said when they are wrong."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from zoo_common.config import (
    LaunchConfig,
    PrecisionConfig,
    RunConfig,
    load_config,
    section,
    setting,
    to_yaml,
)
from zoo_common.errors import UserError


@dataclass
class Data:
    path: str = setting("", "directory", kind="path")
    batch_size: int = setting(8, "images", at_least=1)
    sizes: list[int] = setting([4, 5], "sizes")
    mirror: bool = setting(True, "mirror")


@dataclass
class Config:
    data: Data = section(Data)
    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


CARD = {
    "--opt-level": "precision.opt_level",
    "SOLVER.IMS_PER_BATCH": "data.batch_size",
    "--mirror": "data.mirror",
}


def load(*words: str) -> Config:
    return load_config(Config, words, CARD)


@pytest.mark.parametrize(
    "words",
    [
        ["--batch_size=3"],
        ["--batch_size", "3"],
        ["--batch-size=3"],
        ["SOLVER.IMS_PER_BATCH", "3"],
        ["data.batch_size=3"],
        ["--batch_size=7", "--batch-size", "3"],
    ],
)
def test_every_way_to_write_an_option_sets_the_same_field(words: list[str]) -> None:
    assert load(*words).data.batch_size == 3


def test_flags_switches_and_options_whose_value_may_be_left_out() -> None:
    config = load("--hf32", "--mirror=0", "--resume", "--profile", "--opt-level=O1")
    assert config.run.float32 == "hf32"
    assert config.data.mirror is False
    assert config.run.resume == "last"
    assert config.run.profile == 10
    assert config.precision.opt_level == "O1"  # the later word wins over --hf32's O0
    assert load("--mirror").data.mirror is True
    assert load("--resume", "a b.pth").run.resume == "a b.pth"


def test_lists_come_from_text_and_are_not_shared() -> None:
    assert load("data.sizes=[1, 2]").data.sizes == [1, 2]
    load().data.sizes.append(9)
    assert load().data.sizes == [4, 5]


@pytest.mark.parametrize("path", ["/a b", "/q'\"", "/x;rm -rf y", "/${HOME}", "/a: [b]", "/é=ö"])
def test_paths_arrive_as_they_were_written(path: str, tmp_path: Path) -> None:
    config = load(f"--data_path={path}")
    assert config.data.path == path
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load("--config", str(tmp_path / "c.yaml")).data.path == path


def test_yaml_builds_on_its_base_and_options_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {batch_size: 2, mirror: false}\nrun: {seed: 5}\n")
    (tmp_path / "top.yaml").write_text("_base_: base.yaml\ndata:\n  batch_size: 4\n")
    config = load("--config", str(tmp_path / "top.yaml"), "--seed=6")
    assert (config.data.batch_size, config.data.mirror, config.run.seed) == (4, False, 6)


def test_yaml_reads_an_exponent_without_a_dot_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("precision: {clip_grad: 1e-4}\n")
    assert load("--config", str(tmp_path / "c.yaml")).precision.clip_grad == 1e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bach_size=3"], "Unknown option '--bach_size=3': did you mean --batch_size?"),
        (["--qqqqqq"], "--help lists what is known"),
        (["data.batchsize=3"], "did you mean data.batch_size?"),
        (["SOLVER.IMS_PER_BACH", "3"], "did you mean SOLVER.IMS_PER_BATCH?"),
        (["stray"], "Unknown option 'stray'"),
        (["--batch_size"], "--batch_size needs a value"),
        (["--batch_size", "--seed=1"], "--batch_size needs a value"),
        (["--hf32=1"], "--hf32 takes no value"),
        (["--batch_size=0"], "--batch_size=0: data.batch_size must be at least 1, but is 0"),
        (["--batch_size=two"], "data.batch_size must be of type int, but got 'two'"),
        (["--batch_size=2.5"], "data.batch_size must be of type int, but got '2.5'"),
        (["--master_port=70000"], "must be at most 65535"),
        (["--mirror=perhaps"], "'perhaps' is neither true nor false"),
        (["--opt-level=O4"], "must be one of O0, O1, O2, but is 'O4'"),
        (["precision.clip_grad=nan"], "must be a finite number"),
        (["--config"], "--config needs a value"),
        (["--config=/nowhere.yaml"], "Cannot read the config /nowhere.yaml"),
    ],
)
def test_a_wrong_command_line_is_named(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        load(*words)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {batch_sise: 3}", "did you mean data.batch_size?"),
        ("data: {batch_size: [3]}", "data.batch_size must be of type int"),
        ("data: {batch_size: 3\n", "is not valid YAML"),
        ("- 1\n", "holds no mapping"),
        ("data: {batch_size: 3, batch_size: 4}", "stands twice"),
        ("_base_: c.yaml", "is its own _base_"),
        ("run: {seed: -1}", "run.seed in "),
    ],
)
def test_a_wrong_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load("--config", str(tmp_path / "c.yaml"))
    assert said in str(error.value)
    assert "c.yaml" in str(error.value)
