"""Configs: what YAML and options set, and what is said when they are wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from zoo_common.config import (
    CardKey,
    CardOptions,
    Given,
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
    sizes: list[int] = setting([4, 5], "sizes", at_least=1)
    pairs: list[list[int]] = setting([[1, 2]], "pairs")
    shape: str = setting("auto", "shape", choices=("auto", "on", "off"))
    mirror: bool = setting(True, "mirror")


@dataclass
class Config:
    data: Data = section(Data)
    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


def _level(value: Any, given: Given) -> Mapping[str, Any]:
    """LEVEL counts only while LEVELS is on."""
    return {"precision.opt_level": given.get("LEVEL", "O1") if given.get("LEVELS", 1) else "O0"}


def _only_two(value: Any, given: Given) -> Mapping[str, Any]:
    if value != 2:
        raise ValueError(f"{value!r} is not supported, only 2.")
    return {}


def _twice(value: Any, given: Given) -> Mapping[str, Any]:
    return {"data.batch_size": 2 * value}


CARD: CardOptions = {
    "--opt-level": "precision.opt_level",
    "SOLVER.IMS_PER_BATCH": "data.batch_size",
    "INPUT.SIZES": "data.sizes",
    "INPUT.PAIRS": "data.pairs",
    "INPUT.MIRROR": "data.mirror",
    "OUTPUT_DIR": "run.output_dir",
    "LEVEL": CardKey(("precision.opt_level",), _level),
    "LEVELS": CardKey(("precision.opt_level",), _level),
    "VERSION": CardKey((), _only_two),
    "--twice": CardKey(("data.batch_size",), _twice, bare="4"),
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


def test_a_card_key_may_have_a_value_that_is_left_out() -> None:
    assert load("--twice").data.batch_size == 8
    assert load("--twice", "--seed=1").data.batch_size == 8
    assert load("--twice", "3").data.batch_size == load("--twice=3").data.batch_size == 6
    with pytest.raises(UserError, match="VERSION needs a value"):
        load("VERSION")


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


@pytest.mark.parametrize(
    ("key", "text", "path", "value"),
    [
        ("SOLVER.IMS_PER_BATCH", "3", "batch_size", 3),
        ("INPUT.SIZES", "(7, 8)", "sizes", [7, 8]),
        ("INPUT.SIZES", "[7, 8]", "sizes", [7, 8]),
        ("INPUT.PAIRS", "[(7, 8)]", "pairs", [[7, 8]]),
        ("INPUT.MIRROR", "False", "mirror", False),
        ("INPUT.MIRROR", "0", "mirror", False),
    ],
)
def test_a_card_key_means_the_same_in_words_and_in_yaml(
    key: str, text: str, path: str, value: Any, tmp_path: Path
) -> None:
    *sections, name = key.split(".")
    nested = f'{{{name}: "{text}"}}' if "(" in text else f"{{{name}: {text}}}"
    file = tmp_path / "c.yaml"
    file.write_text("".join(f"{section}: " for section in sections) + nested)
    for words in ([key, text], [f"{key}={text}"], [f"--config-file={file}"]):
        assert getattr(load(*words).data, path) == value


def test_a_card_key_for_a_text_takes_it_as_it_stands() -> None:
    assert load("OUTPUT_DIR", "007").run.output_dir == "007"
    assert load("OUTPUT_DIR", "(1, 2)").run.output_dir == "(1, 2)"


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["LEVEL", "O2"], "O2"),
        (["LEVELS", "1"], "O1"),
        (["LEVELS", "1", "LEVEL", "O2"], "O2"),
        (["LEVELS", "0", "LEVEL", "O2"], "O0"),
        (["LEVEL", "O2", "LEVELS", "0"], "O0"),
        (["LEVEL", "O2", "--opt-level=O1"], "O1"),
        (["--opt-level=O1", "LEVEL", "O2"], "O2"),
    ],
)
def test_card_keys_see_one_another_and_later_words_win(words: list[str], level: str) -> None:
    assert load(*words).precision.opt_level == level


def test_card_keys_and_fields_of_stacked_files_win_in_the_order_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    low, middle, top = (tmp_path / name for name in ("low.yaml", "middle.yaml", "top.yaml"))
    low.write_text("data: {batch_size: 2, mirror: false}\nSOLVER: {IMS_PER_BATCH: 3}\nVERSION: 1\n")
    middle.write_text("_BASE_: ~/low.yaml\ndata: {sizes: [9]}\nVERSION: 2\n")
    top.write_text("_base_: middle.yaml\ndata: {batch_size: 4}\n")
    batches = [load(f"--config={file}").data.batch_size for file in (middle, top)]
    assert batches == [3, 4]
    assert load(f"--config={top}").data.sizes == [9]
    assert load(f"--config={top}", "SOLVER.IMS_PER_BATCH", "5").data.batch_size == 5
    with pytest.raises(UserError, match=r"VERSION in .*low.yaml: 1 is not supported, only 2"):
        load(f"--config={low}")


def test_yaml_words_for_truth_are_texts_where_a_text_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {shape: off}\n")
    config = load("--config", str(tmp_path / "c.yaml"))
    assert config.data.shape == "off"
    (tmp_path / "d.yaml").write_text(to_yaml(config))
    assert load("--config", str(tmp_path / "d.yaml")).data.shape == "off"


def test_nested_lists_are_not_shared() -> None:
    Data().pairs[0].append(9)
    assert Data().pairs == [[1, 2]]


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
        (["VERSION", "1"], "VERSION: 1 is not supported, only 2."),
        (["VERSIO", "2"], "did you mean VERSION?"),
        (["INPUT.SIZES"], "INPUT.SIZES needs a value"),
        (["INPUT.SIZES", "(3, 0)"], "data.sizes must be at least 1, but is 0"),
        (["INPUT.SIZES", "(3, x)"], "data.sizes must be of type list"),
        (["data.sizes=[3, 0]"], "data.sizes=[3, 0] must be at least 1, but is 0"),
        (["data.pairs=[[.nan]]"], "data.pairs must be of type list"),
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
        ("SOLVER: {IMS_PER_BACH: 3}", "did you mean SOLVER.IMS_PER_BATCH?"),
        ("SOLVER: {IMS_PER_BATCH: 0}", "SOLVER.IMS_PER_BATCH in "),
        ("VERSION: !!python/tuple [2]", "is not valid YAML"),
        ("data: {batch_size: [3]}", "data.batch_size must be of type int"),
        ("data: {batch_size: 3\n", "is not valid YAML"),
        ("run: {spike_factor: 1" + 400 * "0" + "}", "run.spike_factor must be of type float"),
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
