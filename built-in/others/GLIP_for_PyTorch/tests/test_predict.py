"""python3 -m glip.predict as a user starts it: what it draws, and what it refuses."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from detector_runs import ABSENT, DEVICE
from PIL import Image

from glip import predict
from glip.config import CARD_OPTIONS, Config
from glip.model import build_model
from zoo_common import checkpoint
from zoo_common.config import load_config, to_yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from glip_runs import predict as predict_in_a_shell
from glip_runs import write_recipe

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: settings and weights (nobody trained these)."""
    at = tmp_path_factory.mktemp("the run's output")
    config = load_config(Config, [f"--config={write_recipe(at / 'tiny.yaml')}"], CARD_OPTIONS)
    torch.manual_seed(0)
    checkpoint.save(at / "checkpoints" / "best.pth", {"model": build_model(config).state_dict()})
    (at / "config.yaml").write_text(to_yaml(config))
    return at


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
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
def words(output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.chdir(tmp_path)
    best = output / "checkpoints" / "best.pth"
    text = "--text=a red cup. the Large dog."
    return [f"--checkpoint={best}", f"--device={DEVICE}", "--score=0", "--out=out", text]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.array(picture.convert("RGB"))


def test_each_picture_is_drawn_and_what_was_found_is_listed(
    pictures: Path, words: Sequence[str], tmp_path: Path
) -> None:
    before = {file: file.read_bytes() for file in pictures.iterdir()}
    done = predict_in_a_shell("mine", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = {file.name: pixels(file) for file in (tmp_path / "out").iterdir()}
    sizes = {"clear.png": (60, 90, 3), "turned.png": (90, 60, 3), "wide & grey.png": (20, 300, 3)}
    assert {name: picture.shape for name, picture in drawn.items()} == sizes
    assert not np.array_equal(drawn["clear.png"], pixels(pictures / "clear.png"))
    lines = done.stdout.splitlines()
    heads = [line for line in lines if not line.startswith("  ")]
    assert [line.partition(":")[0] for line in heads] == [
        f"mine/{name}" for name in ("clear.png", "turned.jpg", "wide & grey.jpeg")
    ]
    counted = [part.split(";")[0] for line in heads for part in line.split(": ")[1].split(", ")]
    assert {part.split(" x ")[1] for part in counted} <= {"a red cup", "the Large dog"}
    found = [line for line in lines if line.startswith("  ")]
    assert len(found) == sum(int(part.split(" x ")[0]) for part in counted) > 20
    scores = [float(line.split()[0]) for line in found[:10]]
    assert scores == sorted(scores, reverse=True)
    for line in found[:10]:
        left, top, right, bottom = map(int, line.rpartition(": ")[2].split())
        assert 0 <= left < right <= 90 and 0 <= top < bottom <= 60, line
    assert {file: file.read_bytes() for file in pictures.iterdir()} == before


def test_what_was_drawn_may_be_drawn_again_and_a_high_score_draws_nothing(
    pictures: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main([str(pictures / "clear.png"), *words]) == 0
    first = Path("out/clear.png").read_bytes()
    assert predict.main([str(pictures / "clear.png"), *words, "--score=1"]) == 0
    assert capsys.readouterr().out.endswith("nothing found; drawn in out/clear.png\n")
    assert Path("out/clear.png").read_bytes() != first


def test_settings_can_be_given_and_words_change_what_is_found(
    pictures: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(pictures / "clear.png"), *words, "test.max_per_img=1"]
    scores = []
    for text in ("cup. ", "horse. ", "stop sign. "):
        assert predict.main([*given, f"--text={text}"]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert f": 1 x {text[:-2]}; drawn" in first
        scores.append(second)
    assert len(set(scores)) == 3


@pytest.mark.parametrize("writer", ["this zoo", "microsoft/GLIP"])
def test_a_checkpoint_by_itself_needs_its_recipe(
    writer: str,
    pictures: Path,
    words: Sequence[str],
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As others publish them; then it draws what it draws beside its settings."""
    given = [str(pictures / "clear.png"), *words]
    assert predict.main(given) == 0
    expected = pixels(Path("out/clear.png"))
    best = output / "checkpoints" / "best.pth"
    if writer == "this zoo":
        shutil.copy(best, "alone.pth")
    else:
        weights = torch.load(best, weights_only=True)["model"]
        weights = {f"module.{name}": value for name, value in weights.items()}
        torch.save({"model": weights, "iteration": 9}, "alone.pth")
    more = [*given, "--checkpoint=alone.pth"]
    recipe = f"--config-file={output}/tiny.yaml"
    assert predict.main([*more, recipe, "model.tower_blocks=2"]) == 2
    told = capsys.readouterr().err
    assert "alone.pth" in told and "belongs to other settings" in told
    assert predict.main([*more, recipe]) == 0
    assert np.array_equal(pixels(Path("out/clear.png")), expected)


REFUSED = {
    "no picture": (["none.jpg"], [], "none.jpg is not there"),
    "no picture in a directory": (["empty"], [], "empty holds no picture"),
    "half a picture": (["half.jpg"], [], "half.jpg is damaged"),
    "its own input": (["mine/clear.png"], ["--out=mine"], "is one of the pictures"),
    "somebody's file": (["mine/clear.png"], ["--out=taken"], "was not drawn here"),
    "a file to write into": (["mine"], ["--out=text.jpg/x"], "Cannot write text.jpg/x/clear.png"),
    "no checkpoint": (["mine"], ["--checkpoint=no.pth"], "there is no checkpoint file no.pth"),
    "half a checkpoint": (["mine"], ["--checkpoint=half.pth"], "half.pth is truncated"),
    "evil .pth": (
        ["mine"],
        ["--checkpoint=evil.pth", "--config=tiny.yaml"],
        "evil.pth was refused",
    ),
    "no BERT": (["mine"], ["model.bert=nowhere"], "nowhere"),
    "misspelt setting": (["mine"], ["test.nms_thresh=0.4"], "test.nms_thr"),
    "a picture behind options": (["mine"], ["x.jpg"], "x.jpg"),
    "absent device": (["mine"], [f"--device={ABSENT}"], ABSENT),
    "score in percent": (["mine"], ["--score=50"], "--score must be between 0 and 1"),
    "no text": (["mine"], ["--text="], "--text is empty"),
    "a phrase twice": (["mine"], ["--text=dog. a cat. Dog"], "'Dog' occurs twice in --text"),
    "a long text": (["mine"], ["--text=" + "dog " * 40 + ". "], "than the 32 of model.max_tokens"),
}


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_told_in_a_sentence(
    case: str,
    pictures: Path,
    words: Sequence[str],
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("empty", "taken"):
        (tmp_path / name).mkdir()
    (tmp_path / "taken" / "clear.png").write_bytes(b"somebody's work")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "half.jpg").write_bytes((pictures / "turned.jpg").read_bytes()[:2000])
    write_recipe(tmp_path / "tiny.yaml")
    evil = {"model": _Evil(tmp_path / "ran")}
    torch.save(evil, tmp_path / "evil.pth")
    whole = (output / "checkpoints" / "best.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[:9999])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    given, more, said = REFUSED[case]
    assert predict.main([*given, *words, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("glip.predict: ") and said in error[-1]
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
