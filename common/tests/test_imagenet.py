"""The ImageNet layout: numbering as torchvision's, and an error that helps for every bad tree."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from zoo_common.errors import UserError
from zoo_common.imagenet import EXPECTED_TREE, build_index, check_tree

ODD_NAME = "a b'c\";$(x) ünï€"


def plant(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return plant(
        tmp_path / ODD_NAME,
        "train/n02/1.JPEG",
        "train/n02/10.jpg",
        "train/n02/9.jpg",
        "train/n02/notes.txt",
        "train/n02/deep/z.png",
        "train/n02/deep-er/a.png",
        "train/n02/deep/er/b.WebP",
        f"train/N10/{ODD_NAME}.jpg",
        "train/n1/x.ppm",
        "train/loose.jpg",
        "val/n02/a.jpg",
        "val/N10/b.jpg",
        "val/n1/c.jpg",
    )


def test_index_has_the_order_and_the_numbers_of_torchvision(tree: Path) -> None:
    index = build_index(tree, "train")
    reference = ImageFolder(str(tree / "train"))
    assert index.class_to_idx == reference.class_to_idx == {"N10": 0, "n02": 1, "n1": 2}
    listed = [(index.path(i), index.label(i)) for i in range(len(index))]
    assert listed == reference.samples
    assert all(Path(path).is_file() for path, _ in listed)
    assert index.item_id(0) == f"train/N10/{ODD_NAME}.jpg"


def test_index_survives_pickling_for_spawned_workers_and_is_small(tmp_path: Path) -> None:
    plant(tmp_path, *(f"train/n01440764/n01440764_{i:05}.JPEG" for i in range(2000)))
    index = build_index(tmp_path, "train")
    blob = pickle.dumps(index)
    assert len(blob) < 40 * len(index)
    assert pickle.loads(blob).path(1999) == index.path(1999)


def test_names_that_are_not_utf8_can_be_opened_and_printed(tmp_path: Path) -> None:
    plant(tmp_path, "train/a/ok.jpg")
    (tmp_path / "train" / "a" / os.fsdecode(b"\xff.jpg")).touch()
    index = build_index(tmp_path, "train")
    assert Path(index.path(1)).is_file()
    assert index.item_id(1).encode("utf-8") == b"train/a/\\xff.jpg"


def test_check_accepts_the_tree_in_any_spelling(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_tree(tree).classes == ("N10", "n02", "n1")
    assert check_tree(f"{tree}/").root == tree
    monkeypatch.setenv("HOME", str(tree.parent))
    assert check_tree(f"~/{ODD_NAME}").root == tree
    monkeypatch.chdir(tree)
    assert check_tree(".").splits == ("train", "val")


def test_evaluation_needs_no_training_images(tmp_path: Path) -> None:
    plant(tmp_path, "val/a/1.jpg", "val/b/1.jpg")
    assert check_tree(tmp_path, ["val"]).classes == ("a", "b")
    assert len(build_index(tmp_path, "val")) == 2


BAD_TREES = {
    "absent": ([], "nowhere", ["'{root}/nowhere' does not exist"]),
    "a file": (["x.tar"], "x.tar", ["'{root}/x.tar' is a file", "train and val"]),
    "empty": ([], "", ["'{root}' is empty"]),
    "only train": (["train/a/1.jpg"], "", ["'{root}' holds no val directory", "images of val"]),
    "neither": (["a/1.jpg"], "", ["holds no train or val directory"]),
    "other name": (
        ["train/a/1.jpg", "validation/a/1.jpg"],
        "",
        ["holds no val directory, but validation; rename or link it to val"],
    ),
    "one level too high": (
        ["ImageNet2012/train/a/1.jpg", "ImageNet2012/val/a/1.jpg"],
        "",
        ["one level below, so give '{root}/ImageNet2012'"],
    ),
    "one level too low": (
        ["train/a/1.jpg", "val/a/1.jpg"],
        "train",
        ["begins higher up, so give '{root}'"],
    ),
    "a class folder": (
        ["train/a/1.jpg", "val/a/1.jpg"],
        "train/a",
        ["begins higher up, so give '{root}'"],
    ),
    "classes differ": (
        [f"train/{c}/1.jpg" for c in "abcdefgh"] + ["val/a/1.jpg", "val/x/1.jpg"],
        "",
        ["differ: 7 only in train (b, c, d, e, f, ...), 1 only in val (x)"],
    ),
    "empty class": (
        ["train/a/1.jpg", "train/b/1.txt", "val/a/1.jpg", "val/b/1.jpg"],
        "",
        ["1 of 2 class folders of '{root}/train' hold no image (b)"],
    ),
    "no image": (
        ["train/a/1.txt", "train/b/2.gif", "val/a/1.jpg", "val/b/1.jpg"],
        "",
        ["'{root}/train' holds 2 class folders and no image", ".jpeg"],
    ),
    "flat val": (
        ["train/a/1.jpg", "val/ILSVRC2012_val_00000001.JPEG"],
        "",
        ["'{root}/val' holds images, but no class folders", "folder of its class"],
    ),
    "empty split": (["train/a/1.jpg", "val/.keep"], "", ["'{root}/val' holds no class folders"]),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_bad_trees_are_explained(tmp_path: Path, name: str) -> None:
    files, below, parts = BAD_TREES[name]
    root = plant(tmp_path / ODD_NAME, *files)
    root.mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        check_tree(root / below)
    sentence, tree = str(caught.value).split(". Expected:\n")
    assert tree == EXPECTED_TREE
    assert "\n" not in sentence
    for part in parts:
        assert part.replace("{root}", str(root)) in sentence


def test_unreadable_folders_are_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if str(path).endswith("n02"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"train/n02' cannot be read \(Permission denied\)"):
        check_tree(tree)


def test_checking_needs_no_torch() -> None:
    code = "import sys, zoo_common.imagenet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
