"""What the predict program of every detector does; each model's tests derive from it.

The program looks for pictures of the user's, draws what it finds into others, and tells what it
cannot do in a sentence.
"""

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from detector_runs import ABSENT, DEVICE, run_command
from PIL import Image
from torch import nn

from zoo_common import checkpoint
from zoo_common.config import CardOptions, load_config, to_yaml

NAMES = ("clear.png", "turned.jpg", "wide & grey.jpeg")
SIZES = {"clear.png": (60, 90, 3), "turned.png": (90, 60, 3), "wide & grey.png": (20, 300, 3)}
"""What is drawn of the pictures, as users see them: height, width, colours."""

Refusal = tuple[Sequence[str], Sequence[str], str]
"""The pictures, further words after the usual ones, and a part of the answer."""

REFUSED: dict[str, Refusal] = {
    "no picture": (["none.jpg"], [], "none.jpg is not there"),
    "no picture in a directory": (["empty"], [], "empty holds no picture"),
    "a text": (["text.jpg"], [], "text.jpg is no picture"),
    "half a picture": (["half.jpg"], [], "half.jpg is damaged"),
    "its own input": (["mine/clear.png"], ["--out=mine"], "is one of the pictures"),
    "somebody's file": (["mine/clear.png"], ["--out=taken"], "was not drawn here"),
    "two of one name": (["mine/clear.png", "other/clear.jpg"], [], "would become clear.png"),
    "a file to write into": (["mine"], ["--out=text.jpg/x"], "Cannot write text.jpg/x/clear.png"),
    "no checkpoint": (["mine"], ["--checkpoint=no.pth"], "there is no checkpoint file no.pth"),
    "half a checkpoint": (["mine"], ["--checkpoint=half.pth"], "half.pth is truncated"),
    "a picture behind options": (["mine"], ["x.jpg"], "x.jpg"),
    "absent device": (["mine"], [f"--device={ABSENT}"], ABSENT),
    "score in percent": (["mine"], ["--score=50"], "--score must be between 0 and 1"),
}
REFUSED_OF_CLOSED_SET: dict[str, Refusal] = {
    "evil pickle": (["mine"], ["--checkpoint=evil.pkl"], "evil.pkl was refused"),
    "evil .pth": (["mine"], ["--checkpoint=evil.pth"], "evil.pth was refused"),
    "names of others": (["mine"], ["--classes=three.txt"], "There are 3 class names, but"),
    "no names": (["mine"], ["--classes=none.txt"], "--classes: cannot read none.txt"),
    "names in bytes": (["mine"], ["--classes=half.pth"], "half.pth is no UTF-8 text"),
}


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.array(picture.convert("RGB"))


def contents(root: Path) -> dict[Path, bytes]:
    """All files below a directory."""
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


class PredictContract:
    """What holds for every detector.

    Attributes:
        program: the module that a user starts.
        schema: the model's config.
        card_options: its further names of settings.
        recipe: settings of a narrow network.
        options: what the program is always given beside a checkpoint and the like.
        labels: what it may find.
        classes: the names that a run leaves beside its weights.
        lists_objects: whether each object has a line of its own below its picture's.
        weights_key: what holds the weights in the checkpoints that others publish.
    """

    program: ClassVar[ModuleType]
    schema: ClassVar[type[Any]]
    card_options: ClassVar[CardOptions]
    recipe: ClassVar[Mapping[str, Any]]
    options: ClassVar[Sequence[str]] = ()
    labels: ClassVar[Sequence[str]]
    classes: ClassVar[Sequence[str]] = ()
    lists_objects: ClassVar[bool] = False
    weights_key: ClassVar[str] = "model"

    @classmethod
    def build(cls, config: Any) -> nn.Module:
        """The network of the settings."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def output(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """What a run leaves: settings, weights (nobody trained these) and class names."""
        at = tmp_path_factory.mktemp("the run's output")
        (at / "tiny.yaml").write_text(yaml.safe_dump(cls.recipe))
        config = load_config(cls.schema, [f"--config={at / 'tiny.yaml'}"], cls.card_options)
        torch.manual_seed(0)
        weights = {"model": cls.build(config).state_dict()}
        checkpoint.save(at / "checkpoints" / "best.pth", weights)
        (at / "config.yaml").write_text(to_yaml(config))
        if cls.classes:
            names = "".join(f"{name}\n" for name in cls.classes)
            (at / "checkpoints" / "classes.txt").write_text(names)
        return at

    @pytest.fixture
    def pictures(self, tmp_path: Path) -> Path:
        """A directory with a few kinds of pictures."""
        at = tmp_path / "mine"
        at.mkdir()
        dice = np.random.default_rng(0)
        noise = Image.fromarray(dice.integers(0, 255, (60, 90, 3), dtype=np.uint8))
        turned = Image.Exif()
        turned[0x0112] = 6
        noise.save(at / "turned.jpg", exif=turned)
        noise.convert("RGBA").save(at / "clear.png")
        noise.convert("L").resize((300, 20)).save(at / "wide & grey.jpeg")
        return at

    @pytest.fixture
    def words(self, output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
        """The usual options, in a directory where ``out`` is for the drawn pictures."""
        monkeypatch.chdir(tmp_path)
        best = output / "checkpoints" / "best.pth"
        given = [f"--checkpoint={best}", f"--device={DEVICE}", "--score=0", "--out=out"]
        return [*given, *self.options]

    @pytest.fixture
    def assert_refused(
        self,
        pictures: Path,
        words: Sequence[str],
        output: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> Callable[[Refusal], None]:
        """One sentence, the code of a user's mistake, and no file changed or written."""
        for name in ("empty", "other", "taken"):
            (tmp_path / name).mkdir()
        shutil.copy(pictures / "turned.jpg", tmp_path / "other" / "clear.jpg")
        (tmp_path / "taken" / "clear.png").write_bytes(b"somebody's work")
        (tmp_path / "text.jpg").write_text("no picture")
        (tmp_path / "half.jpg").write_bytes((pictures / "turned.jpg").read_bytes()[:2000])
        (tmp_path / "three.txt").write_text("a\nb\nc\n")
        shutil.copy(output / "tiny.yaml", tmp_path)
        evil = {self.weights_key: _Evil(tmp_path / "ran")}
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(evil))
        torch.save(evil, tmp_path / "evil.pth")
        whole = (output / "checkpoints" / "best.pth").read_bytes()
        (tmp_path / "half.pth").write_bytes(whole[:9999])
        before = contents(tmp_path)

        def check(refusal: Refusal) -> None:
            given, more, said = refusal
            assert self.program.main([*given, *words, *more]) == 2
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert last.startswith(f"{self.program.__name__}: "), last
            assert said in last, last
            assert contents(tmp_path) == before

        return check

    def test_each_picture_is_drawn_and_what_was_found_is_counted(
        self, pictures: Path, words: Sequence[str], tmp_path: Path
    ) -> None:
        before = contents(pictures)
        command = [sys.executable, "-m", self.program.__name__, "mine", *words]
        done = run_command(command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        drawn = {file.name: pixels(file) for file in (tmp_path / "out").iterdir()}
        assert {name: picture.shape for name, picture in drawn.items()} == SIZES
        assert not np.array_equal(drawn["clear.png"], pixels(pictures / "clear.png"))
        lines = done.stdout.splitlines()
        heads = [line for line in lines if not line.startswith("  ")]
        assert [line.partition(":")[0] for line in heads] == [f"mine/{name}" for name in NAMES]
        found = [part for line in heads for part in line.split(": ")[1].split(";")[0].split(", ")]
        assert {part.split(" x ")[1] for part in found} <= set(self.labels)
        objects = sum(int(part.split(" x ")[0]) for part in found)
        assert len(lines) - len(heads) == (objects if self.lists_objects else 0)
        assert contents(pictures) == before

    def test_what_was_drawn_may_be_drawn_again_and_a_high_score_draws_nothing(
        self, pictures: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = [str(pictures / "clear.png"), *words]
        assert self.program.main(given) == 0
        first = Path("out/clear.png").read_bytes()
        assert self.program.main([*given, "--score=1"]) == 0
        assert capsys.readouterr().out.endswith("nothing found; drawn in out/clear.png\n")
        assert Path("out/clear.png").read_bytes() != first

    @pytest.mark.parametrize("case", REFUSED)
    def test_what_cannot_be_done_is_told_in_a_sentence(
        self, case: str, assert_refused: Callable[[Refusal], None]
    ) -> None:
        assert_refused(REFUSED[case])


class ClosedSetPredictContract(PredictContract):
    """What holds for detectors of a closed set of classes, whose names lie beside the weights."""

    classes = labels = ("cat", "big dog")

    @pytest.mark.parametrize("case", REFUSED_OF_CLOSED_SET)
    def test_weights_and_names_that_do_not_fit_are_told_in_a_sentence(
        self, case: str, assert_refused: Callable[[Refusal], None]
    ) -> None:
        assert_refused(REFUSED_OF_CLOSED_SET[case])
