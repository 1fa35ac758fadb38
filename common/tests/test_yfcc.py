"""``--data_path`` for captioned pictures: what is accepted, and an error that helps otherwise."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo_common import sample
from zoo_common.errors import UserError
from zoo_common.layouts import TREES, resolve, resolve_yfcc
from zoo_common.preflight import check_data
from zoo_common.runs import RunSpec
from zoo_common.yfcc import Parts, check_tree, val_images

TRAIN = ("yfcc15m_clean_open_data.json", "yfcc15m_clean_open_data/1/2.jpg")
VAL = ("val_official.json", "imagenet_val/ILSVRC2012_val_00000001.JPEG")
PARTS = TRAIN + VAL
BOTH = Parts()
JUST_TRAIN, JUST_VAL = Parts(val=False), Parts(train=False)


def plant(root: Path, *files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if path.suffix == ".json" else "")
    return root


@pytest.mark.parametrize("below", ["", "dataset"])
@pytest.mark.parametrize("name", ["imagenet_val", "imagenet_valid"])
def test_either_level_and_either_name_are_accepted(tmp_path: Path, below: str, name: str) -> None:
    plant(tmp_path / "my data" / below, *TRAIN, VAL[0], f"{name}/1.JPEG")
    root = resolve("yfcc", str(tmp_path / "my data"))
    assert root == tmp_path / "my data" / below
    assert val_images(root) == root / name


def test_only_what_a_run_reads_is_needed(tmp_path: Path) -> None:
    train, val = plant(tmp_path / "a", *TRAIN), plant(tmp_path / "b", *VAL)
    assert check_tree(train, JUST_TRAIN) == train
    assert check_tree(val, JUST_VAL) == val
    with pytest.raises(UserError, match=r"holds no val_official\.json, no imagenet_val;"):
        check_tree(train)
    with pytest.raises(UserError, match=r"holds no yfcc15m_clean_open_data\.json, no yfcc15m_cl"):
        check_tree(val)


BAD_TREES = {
    "absent": ([], "nowhere", "'{root}/nowhere' does not exist"),
    "a file": (["val_official.json"], "val_official.json", "json' is a file"),
    "empty": ([], "", "'{root}' is empty"),
    "no list": (PARTS[1:], "", "holds no yfcc15m_clean_open_data.json;"),
    "no pictures": ((*PARTS[:1], *VAL), "", "holds no yfcc15m_clean_open_data;"),
    "too high": ([f"set/{part}" for part in PARTS], "", "so give '{root}/set'"),
    "too low": (PARTS, "yfcc15m_clean_open_data", "begins higher up, so give '{root}'"),
    "packed": ((*PARTS[:3], "val.zip"), "", "holds no imagenet_val; unpack val.zip there"),
    "folders": (
        (*PARTS[:3], "imagenet_val/n01440764/1.JPEG"),
        "",
        "imagenet_val, whose pictures must lie in it and not in directories below",
    ),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_bad_trees_are_explained(tmp_path: Path, name: str) -> None:
    files, below, part = BAD_TREES[name]
    root = plant(tmp_path / "a b", *files)
    with pytest.raises(UserError) as caught:
        resolve("yfcc", str(root / below))
    sentence, tree = str(caught.value).split(". Expected:\n")
    assert tree == TREES["yfcc"]
    assert "\n" not in sentence
    assert part.replace("{root}", str(root)) in sentence
    for name_of_part in (*PARTS[::2], "imagenet_valid/", "bpe_simple_vocab_16e6.txt.gz"):
        assert name_of_part in tree


def test_empty_parts_are_told(tmp_path: Path) -> None:
    plant(tmp_path, *PARTS)
    (tmp_path / TRAIN[0]).write_text("")
    (tmp_path / VAL[1]).unlink()
    with pytest.raises(UserError, match=r"data\.json, which is empty, imagenet_val, which is em"):
        resolve("yfcc", str(tmp_path))


def test_a_run_without_data_names_the_tree() -> None:
    with pytest.raises(UserError) as caught:
        resolve_yfcc("", "", BOTH)
    assert TREES["yfcc"] in str(caught.value)
    with pytest.raises(UserError, match="digits has no yfcc layout"):
        resolve_yfcc("digits", "", BOTH)


def test_the_validation_part_can_be_elsewhere(tmp_path: Path) -> None:
    train, val = plant(tmp_path / "a", *TRAIN), plant(tmp_path / "b" / "dataset", *VAL)
    assert resolve_yfcc(str(train), str(tmp_path / "b"), BOTH) == (str(train), str(val))
    assert resolve_yfcc("", str(val), JUST_VAL) == ("", str(val))
    assert resolve_yfcc(str(val), "", JUST_VAL) == (str(val), "")
    with pytest.raises(UserError, match=r"a' holds no val_official"):
        resolve_yfcc(str(train), "", BOTH)
    with pytest.raises(UserError, match=r"a' holds no val_official"):
        resolve_yfcc(str(train), str(train), BOTH)


def test_shards_need_a_validation_part_of_their_own(tmp_path: Path) -> None:
    plant(tmp_path / "shards", "000.tar", "001.tar")
    val = str(plant(tmp_path / "val", *VAL))
    pattern = str(tmp_path / "shards" / "{000..001}.tar")
    assert resolve_yfcc(pattern, val, BOTH) == (pattern, val)
    assert resolve_yfcc(pattern, val, JUST_VAL) == (pattern, val)
    assert resolve_yfcc(pattern, "", JUST_TRAIN) == (pattern, "")
    # It may hold the vocabulary, and nothing else that is read.
    assert resolve_yfcc(pattern, str(tmp_path), JUST_TRAIN) == (pattern, str(tmp_path))
    with pytest.raises(UserError, match=r"are shards, .*: give data\.val_path=DIR") as caught:
        resolve_yfcc(pattern, "", BOTH)
    assert TREES["yfcc"] in str(caught.value)
    with pytest.raises(UserError, match=r"1 of the 3 shards .* are missing"):
        resolve_yfcc(pattern.replace("001", "002"), val, BOTH)


def run(kind: str, path: Path, *, every: int = 0, at_end: bool = False) -> tuple[str, str]:
    """What a run's settings are after the check before its start."""
    spec = RunSpec(help="", entry="", devices=1, kind=kind, config="", layout="yfcc")
    config = SimpleNamespace(
        data=SimpleNamespace(path=str(path), val_path=""),
        evaluate=SimpleNamespace(every=every, at_end=at_end),
        run=SimpleNamespace(output_dir=str(path.parent / "output")),
    )
    check_data(spec, config)
    return config.data.path, config.data.val_path


def test_a_run_is_checked_for_what_it_does(tmp_path: Path) -> None:
    train = plant(tmp_path / "a", *TRAIN)
    val = plant(tmp_path / "b" / "dataset", *VAL)
    both = plant(tmp_path / "c", *PARTS)
    assert run("perf", train) == (str(train), "")
    assert run("eval", tmp_path / "b") == (str(val), "")
    assert run("acc", both, every=5) == (str(both), "")
    for settings in ({"every": 5}, {"at_end": True}):
        with pytest.raises(UserError, match="holds no val_official"):
            run("acc", train, **settings)


def test_the_sample_is_made_in_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(layout: str, progress: object) -> Path:
        assert layout == "yfcc"
        return plant(tmp_path / "sample", *PARTS)

    monkeypatch.setattr(sample, "make", make)
    made = str(tmp_path / "sample")
    assert resolve_yfcc("sample", "", BOTH) == (made, "")
    plant(tmp_path, "0.tar")
    shards = str(tmp_path / "0.tar")
    assert resolve_yfcc(shards, "sample", BOTH) == (shards, made)


def test_checking_needs_no_torch() -> None:
    code = "import sys, zoo_common.yfcc; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
