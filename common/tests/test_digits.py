"""The handwritten digits: content, split, and life without scikit-learn."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from zoo_common import digits
from zoo_common.errors import UserError


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return digits.make(tmp_path_factory.mktemp("digits"))


def read(tree: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pictures (N, 40, 40, 3), their labels by folder, and their places in the source."""
    paths = sorted((tree / split).glob("*/*.png"))
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            pictures.append(np.asarray(picture))
    labels = np.array([int(path.parent.name) for path in paths])
    return np.stack(pictures), labels, np.array([int(path.stem.split("_")[1]) for path in paths])


def test_pictures_hold_the_whole_of_the_source(tree):
    source = load_digits()
    seen = []
    for split, count in (("train", 1437), ("val", 360)):
        pictures, labels, places = read(tree, split)
        assert pictures.shape == (count, 40, 40, 3)
        assert (pictures == pictures[..., :1]).all()
        assert (labels == source.target[places]).all()
        # The middle of each block is the original pixel.
        assert (pictures[:, 2::5, 2::5, 0] == source.images[places] * 255 // 16).all()
        seen += places.tolist()
    assert sorted(seen) == list(range(1797))


def test_the_split_is_fixed_and_stratified(tree):
    _, labels, places = read(tree, "val")
    assert np.bincount(labels).tolist() == [36] * 10
    digest = hashlib.sha256(",".join(str(place) for place in sorted(places)).encode())
    assert digest.hexdigest() == "283ef70ba57eb8e6ef266c11eca3be1c854fe6c7e1596675b44fb4f8f6ec8a0f"


def test_held_out_digits_can_be_told_from_the_others(tree):
    """A nearest neighbour does; a wrong label or a picture in the wrong place would show."""
    train, train_labels, _ = read(tree, "train")
    val, val_labels, _ = read(tree, "val")
    x = train[:, 2::5, 2::5, 0].reshape(len(train), -1).astype(np.float64)
    z = val[:, 2::5, 2::5, 0].reshape(len(val), -1).astype(np.float64)
    distances = (x**2).sum(axis=1) - 2 * z @ x.T
    assert (train_labels[distances.argmin(axis=1)] == val_labels).mean() > 0.95


def test_without_scikit_learn(tree, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r'pip install "zoo-common\[digits\]"'):
        digits.make(tmp_path)
    assert not list(tmp_path.iterdir())
    assert digits.make(tree.parent) == tree


def test_it_is_made_once_and_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA_DIR", str(tmp_path))
    tree = digits.make()
    assert tree.parent == tmp_path
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert digits.make() == tree
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / f"digits-v{digits.VERSION}").mkdir()
    (tmp_path / f"digits-v{digits.VERSION}" / "mine").touch()
    with pytest.raises(UserError, match="holds something else"):
        digits.make(tmp_path)
