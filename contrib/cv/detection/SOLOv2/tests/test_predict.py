"""python3 -m solov2.predict as a user starts it: what it draws, and what it refuses."""

import os
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from detector_runs import ABSENT, DEVICE
from PIL import Image

from solov2 import predict
from solov2.config import CARD_OPTIONS, Config
from solov2.model import build_model
from zoo_common import checkpoint
from zoo_common.config import load_config, to_yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from solo_runs import predict as predict_in_a_shell
from solo_runs import write_recipe

NAMES = "cat\nbig dog\n"
IN_MMDET = {
    "mask_feat_head.conv_pred.0.": "mask_head.mask_feature_head.conv_pred.",
    "mask_feat_head.": "mask_head.mask_feature_head.",
    "bbox_head.cate_convs.": "mask_head.cls_convs.",
    "bbox_head.solo_cate.": "mask_head.conv_cls.",
    "bbox_head.solo_kernel.": "mask_head.conv_kernel.",
    "bbox_head.": "mask_head.",
}
"""How names begin here and in WXinlong/SOLO, and in mmdet 3; the first that fits counts."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: settings, weights (nobody trained these) and class names."""
    at = tmp_path_factory.mktemp("the run's output")
    config = load_config(Config, [f"--config={write_recipe(at / 'tiny.yaml')}"], CARD_OPTIONS)
    torch.manual_seed(0)
    checkpoint.save(at / "checkpoints" / "best.pth", {"model": build_model(config, 2).state_dict()})
    (at / "config.yaml").write_text(to_yaml(config))
    (at / "checkpoints" / "classes.txt").write_text(NAMES)
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
    return [f"--checkpoint={best}", f"--device={DEVICE}", "--score=0", "--out=out"]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.array(picture.convert("RGB"))


def test_each_picture_is_drawn_with_the_names_of_the_run(
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
    assert [line.partition(":")[0] for line in lines] == [
        f"mine/{name}" for name in ("clear.png", "turned.jpg", "wide & grey.jpeg")
    ]
    assert all(" x cat" in line or " x big dog" in line for line in lines)
    assert {file: file.read_bytes() for file in pictures.iterdir()} == before


def test_what_was_drawn_may_be_drawn_again_and_a_high_score_draws_nothing(
    pictures: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main([str(pictures / "clear.png"), *words]) == 0
    first = Path("out/clear.png").read_bytes()
    assert predict.main([str(pictures / "clear.png"), *words, "--score=1"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert Path("out/clear.png").read_bytes() != first


def test_boxes_are_drawn_when_asked_for(pictures: Path, words: Sequence[str]) -> None:
    given = [str(pictures / "clear.png"), *words]
    assert predict.main(given) == 0
    without = pixels(Path("out/clear.png"))
    assert predict.main([*given, "--boxes"]) == 0
    assert not np.array_equal(pixels(Path("out/clear.png")), without)


def test_settings_and_names_can_be_given(
    pictures: Path, words: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("Katze\nHund\n", encoding="utf-8")
    more = ["--classes=names.txt", "test.max_per_img=1"]
    assert predict.main([str(pictures / "clear.png"), *words, *more]) == 0
    found = capsys.readouterr().out
    assert ": 1 x Katze;" in found or ": 1 x Hund;" in found


@pytest.mark.parametrize("writer", ["this zoo", "WXinlong/SOLO", "mmdet"])
def test_a_checkpoint_by_itself_needs_its_recipe(
    writer: str,
    pictures: Path,
    words: Sequence[str],
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As others publish them; then it draws what it draws beside its settings."""
    given = [str(pictures / "clear.png"), *words]
    (tmp_path / "names.txt").write_text("class 0\nclass 1\n")
    assert predict.main([*given, "--classes=names.txt"]) == 0
    expected = pixels(Path("out/clear.png"))

    best = output / "checkpoints" / "best.pth"
    weights = torch.load(best, weights_only=True)["model"]
    meta = {"epoch": 12, "CLASSES": ("a", "b")}
    if writer == "this zoo":
        shutil.copy(best, "alone.pth")
    elif writer == "WXinlong/SOLO":
        torch.save({"meta": meta, "state_dict": weights}, "alone.pth")
    else:
        named = {in_mmdet(name): value for name, value in weights.items()}
        torch.save({"meta": meta, "state_dict": named}, "alone.pth")
    more = [*given, "--checkpoint=alone.pth"]
    assert predict.main(more) == 2
    assert "give the weights and the config that belong together" in capsys.readouterr().err
    assert predict.main([*more, f"--config-file={output}/tiny.yaml"]) == 0
    assert " x class " in capsys.readouterr().out
    assert np.array_equal(pixels(Path("out/clear.png")), expected)


def in_mmdet(name: str) -> str:
    for ours, theirs in IN_MMDET.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


REFUSED = {
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
    "evil pickle": (["mine"], ["--checkpoint=evil.pkl"], "evil.pkl was refused"),
    "evil .pth": (["mine"], ["--checkpoint=evil.pth"], "evil.pth was refused"),
    "names of others": (["mine"], ["--classes=three.txt"], "There are 3 class names, but"),
    "no names": (["mine"], ["--classes=none.txt"], "--classes: cannot read none.txt"),
    "names in bytes": (["mine"], ["--classes=half.pth"], "half.pth is no UTF-8 text"),
    "misspelt setting": (["mine"], ["test.update_thresh=0.4"], "test.update_thr"),
    "unknown kernel": (["mine"], ["test.kernel=lineal"], "test.kernel"),
    "a picture behind options": (["mine"], ["x.jpg"], "x.jpg"),
    "absent device": (["mine"], [f"--device={ABSENT}"], ABSENT),
    "score in percent": (["mine"], ["--score=50"], "--score must be between 0 and 1"),
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
    for name in ("empty", "other", "taken"):
        (tmp_path / name).mkdir()
    shutil.copy(pictures / "turned.jpg", tmp_path / "other" / "clear.jpg")
    (tmp_path / "taken" / "clear.png").write_bytes(b"somebody's work")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "half.jpg").write_bytes((pictures / "turned.jpg").read_bytes()[:2000])
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    evil = {"state_dict": _Evil(tmp_path / "ran")}
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(evil))
    torch.save(evil, tmp_path / "evil.pth")
    whole = (output / "checkpoints" / "best.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[:9999])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    given, more, said = REFUSED[case]
    assert predict.main([*given, *words, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("solov2.predict: ") and said in error[-1]
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
