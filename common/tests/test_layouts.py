"""``--data_path`` for COCO: what is accepted, and an error that helps for every bad tree."""

import subprocess
import sys
from pathlib import Path

import pytest

from zoo_common import sample
from zoo_common.errors import UserError
from zoo_common.layouts import TREES, CocoFiles, check_coco, resolve

PARTS = (
    "annotations/instances_train2017.json",
    "annotations/instances_val2017.json",
    "train2017/000000000009.jpg",
    "val2017/000000000139.jpg",
)


def plant(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if file.endswith(".json") else "")
    root.mkdir(exist_ok=True)
    return root


@pytest.mark.parametrize("below", ["", "coco2017", "coco"])
def test_either_level_of_the_tree_is_accepted(tmp_path: Path, below: str) -> None:
    plant(tmp_path / "my data" / below, *PARTS)
    assert resolve("coco", str(tmp_path / "my data")) == tmp_path / "my data" / below


def test_evaluation_needs_no_training_files(tmp_path: Path) -> None:
    plant(tmp_path, "annotations/instances_val2017.json", "val2017/1.jpg")
    assert check_coco(tmp_path, CocoFiles(train_json=None, train_images=None)) == tmp_path
    with pytest.raises(UserError, match=r"instances_train2017\.json, no train2017"):
        check_coco(tmp_path)


def test_a_data_set_of_ones_own_is_checked_by_its_own_names(tmp_path: Path) -> None:
    root = plant(tmp_path / "own", "a/train.json", "val.json", "pictures/1.png")
    elsewhere = plant(tmp_path / "elsewhere", "2.png")
    files = CocoFiles("a/train.json", "pictures", "val.json", str(elsewhere))
    assert resolve("coco", str(root), coco_files=files) == root
    absolute = CocoFiles(*(str(root / part) for part in ("a/train.json", "pictures")), None, None)
    assert resolve("coco", "", coco_files=absolute) / absolute.train_json == root / "a/train.json"
    with pytest.raises(UserError) as caught:
        resolve("coco", str(root), coco_files=CocoFiles("a/train.json", "images", "val.json", "."))
    assert "holds no images;" in str(caught.value)
    assert "images/<image>" in str(caught.value).split("Expected:\n")[1]


BAD_TREES = {
    "absent": ([], "nowhere", "'{root}/nowhere' does not exist"),
    "a file": (["coco.zip"], "coco.zip", "'{root}/coco.zip' is a file"),
    "empty": ([], "", "'{root}' is empty"),
    "no val": ([PARTS[0], PARTS[2]], "", "holds no annotations/instances_val2017.json, no val2017"),
    "no images": ([*PARTS[:3], "val2017/x/y"], "val2017/x", "begins higher up, so give '{root}'"),
    "too high": (
        [f"set/{part}" for part in PARTS],
        "",
        "one level below, so give '{root}/set'",
    ),
    "too low": ([*PARTS], "annotations", "begins higher up, so give '{root}'"),
    "packed": (
        [*PARTS[:3], "val2017.zip"],
        "",
        "'{root}' holds no val2017; unpack val2017.zip there",
    ),
    "packed below": (
        [f"coco/{part}" for part in (*PARTS[:3], "val2017.zip")],
        "",
        "'{root}/coco' holds no val2017; unpack val2017.zip there",
    ),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_bad_trees_are_explained(tmp_path: Path, name: str) -> None:
    files, below, part = BAD_TREES[name]
    root = plant(tmp_path / "a b", *files)
    with pytest.raises(UserError) as caught:
        resolve("coco", str(root / below))
    sentence, tree = str(caught.value).split(". Expected:\n")
    assert tree == TREES["coco"]
    assert "\n" not in sentence
    assert part.replace("{root}", str(root)) in sentence


def test_empty_parts_are_told(tmp_path: Path) -> None:
    plant(tmp_path, *PARTS)
    (tmp_path / PARTS[0]).write_text("")
    (tmp_path / PARTS[2]).unlink()
    with pytest.raises(UserError, match=r"train2017\.json, which is empty, train2017, which is em"):
        resolve("coco", str(tmp_path))


def test_a_run_without_data_names_the_tree() -> None:
    with pytest.raises(UserError) as caught:
        resolve("coco", "")
    assert TREES["coco"] in str(caught.value)
    assert "--data_path=sample" in str(caught.value)


def test_the_sample_is_made_in_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(layout: str, progress: object) -> Path:
        assert layout == "coco"
        return plant(tmp_path, *PARTS)

    monkeypatch.setattr(sample, "make", make)
    assert resolve("coco", "sample") == tmp_path
    with pytest.raises(UserError, match="digits has no coco layout"):
        resolve("coco", "digits")


def test_checking_needs_no_torch() -> None:
    code = "import sys, zoo_common.layouts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
