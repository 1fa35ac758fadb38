"""The captioned layout of the sample data set: captions tell what is there, in known words."""

import gzip
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo_common import sample
from zoo_common.errors import UserError
from zoo_common.sample.draw import draw
from zoo_common.sample.merges import learn_merges
from zoo_common.sample.scenes import COLOURS, TEXTURES, compose
from zoo_common.yfcc import check_tree

TRAIN, VAL = 300, 40
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("yfcc")
    return sample.make(place, layout="yfcc", train=TRAIN, val=VAL, size=64)


def rows(root: Path, name: str = "yfcc15m_clean_open_data.json") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name).read_text().splitlines()]


def captions(row: dict[str, Any]) -> list[str]:
    said = row["caption"]
    return said if isinstance(said, list) else [said]


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def merges(root: Path) -> list[tuple[str, str]]:
    heading, *lines = gzip.decompress((root / VOCABULARY).read_bytes()).decode().splitlines()
    assert heading.startswith("#version")
    pairs = [line.split(" ") for line in lines]
    assert all(len(pair) == 2 for pair in pairs)
    return [(left, right) for left, right in pairs]


def tokens(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The word's tokens, by the rule of CLIP's tokenizer: the pair that was learnt first joins."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        place = pairs.index(best)
        parts[place : place + 2] = ["".join(best)]
    return parts


def test_the_tree_is_the_cards(root: Path) -> None:
    assert check_tree(root) == root
    assert sorted(path.name for path in root.iterdir()) == [
        VOCABULARY,
        "imagenet_val",
        "manifest.json",
        "val_official.json",
        "yfcc15m_clean_open_data",
        "yfcc15m_clean_open_data.json",
    ]
    for row in rows(root):
        with Image.open(root / "yfcc15m_clean_open_data" / row["filename"]) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (64, 64))
    assert len({row["filename"] for row in rows(root)}) == TRAIN
    names = {row["filename"] for row in rows(root, "val_official.json")}
    assert names == {f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, VAL + 1)}
    assert names == {path.name for path in (root / "imagenet_val").iterdir()}


def test_labels_are_the_main_objects(root: Path) -> None:
    held_out = rows(root, "val_official.json")
    for number, row in enumerate(held_out):
        assert row["label_name"] == compose(0, "val", number, 64, 64).label
        assert sample.CLASSES[row["label"]] == row["label_name"]
    assert set(Counter(row["label"] for row in held_out).values()) == {VAL // 10}


def test_captions_tell_what_is_there(root: Path) -> None:
    told: Counter[str] = Counter()
    sentences = set()
    for number, row in enumerate(rows(root)):
        scene = compose(0, "train", number, 64, 64)
        for place, sentence in enumerate(captions(row)):
            words = re.findall("[a-z]+", sentence.lower())
            named = [word for word in words if word in sample.CLASSES]
            assert set(named) <= {item.shape for item in scene.objects}
            pattern = rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(sample.CLASSES)})\b"
            for colour, shape in re.findall(pattern, sentence.lower()):
                known = [item for item in scene.objects if item.shape == shape]
                assert not colour or colour in {item.colour for item in known}
            if not place:
                told["main"] += bool(named) and named[0] == scene.label
                told["none"] += not named
                told["colour"] += any(word in COLOURS for word in words)
                told["texture"] += any(word in TEXTURES for word in words)
                told["more"] += len(named) > 1
                told["where"] += "left" in words or "right" in words or "middle" in words
                told["capital"] += sentence[0].isupper()
                told["stop"] += sentence.endswith(".")
                sentences.add(sentence)
        told["lists"] += isinstance(row["caption"], list)
    assert told["main"] + told["none"] == TRAIN, "what is named first is the main object"
    assert told["main"] > 0.9 * TRAIN
    for fact in ("none", "colour", "texture", "more", "where", "capital", "stop", "lists"):
        assert 2 < told[fact] < 0.6 * TRAIN, (fact, told)
    assert len(sentences) > 0.6 * TRAIN


def test_every_word_is_one_token(root: Path) -> None:
    pairs = merges(root)
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    assert len(ranks) == len(pairs)
    text = " ".join(sentence for row in rows(root) for sentence in captions(row))
    words = {*re.findall("[a-z]+", text.lower()), *sample.CLASSES}
    words |= {"a", "photo", "of", "the", "many", "bad", "origami", "sculpture", "video", "game"}
    assert len(words) > 70
    for word in words:
        assert tokens(word, ranks) == [word + "</w>"]
    assert len(tokens("xylophone", ranks)) > 1


def test_merges_join_the_most_frequent_pair_first() -> None:
    assert learn_merges({"aab": 2, "ab": 1}) == [("a", "b</w>"), ("a", "ab</w>")]
    assert learn_merges({"ba": 1, "ab": 1}) == [("a", "b</w>"), ("b", "a</w>")]
    assert learn_merges({"aaaa": 1}) == [("a", "a"), ("a", "a</w>"), ("aa", "aa</w>")]
    assert learn_merges({"a": 3}) == []


def test_version_1_is_pinned(root: Path) -> None:
    assert sample.VERSION == 1, "a new version needs a new digest"
    with Image.open(root / "yfcc15m_clean_open_data" / "000/000000003.jpg") as picture:
        drawn = draw(compose(0, "train", 3, 64, 64)).astype(int)
        assert np.abs(np.asarray(picture) - drawn).mean() < 8
    texts = hashlib.sha256()
    for name in ("yfcc15m_clean_open_data.json", "val_official.json"):
        texts.update((root / name).read_bytes())
    texts.update("".join(map(" ".join, merges(root))).encode())
    assert texts.hexdigest() == "cf63bf7ee3a81b8f6242d6f536b640fb9145c1ee0d6383fee12e597a5d4f8b18"


def test_bytes_do_not_depend_on_workers_or_place(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layout": "yfcc", "train": 30, "val": 10, "size": 48}
    one = contents(sample.make(tmp_path / "a", **options))
    assert one == contents(sample.make(tmp_path / "b c", workers=3, **options))
    other = contents(sample.make(tmp_path / "a", seed=1, **options))
    differing = {name for name in one if one[name] != other.get(name)}
    assert "yfcc15m_clean_open_data.json" in differing
    assert len(differing) > 40


def test_pictures_are_spread_over_folders(tmp_path: Path) -> None:
    made = sample.make(tmp_path, layout="yfcc", train=1001, val=10, size=32)
    folders = made / "yfcc15m_clean_open_data"
    counts = {folder.name: len(list(folder.iterdir())) for folder in folders.iterdir()}
    assert counts == {"000": 1000, "001": 1}


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("val_official.json", r"val_official\.json should hold 1 files and holds 0; delete"),
        (VOCABULARY, r"vocab.* should hold 1 files and holds 0"),
        ("imagenet_val/ILSVRC2012_val_00000001.JPEG", r"imagenet_val should hold 10 files"),
    ],
)
def test_a_damaged_set_is_told(tmp_path: Path, lost: str, message: str) -> None:
    options: dict[str, Any] = {"layout": "yfcc", "train": 10, "val": 10, "size": 32}
    made = sample.make(tmp_path, **options)
    assert sample.make(tmp_path, **options) == made
    (made / lost).unlink()
    with pytest.raises(UserError, match=message):
        sample.make(tmp_path, **options)


def test_the_command_makes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zoo_common.sample", "--layout=yfcc", "--out", str(tmp_path)]
    command += ["--train=20", "--val=10", "--size=32"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines() == [
        str(tmp_path),
        "    imagenet_val/                   10 files",
        "    yfcc15m_clean_open_data/000/    20 files",
    ]
