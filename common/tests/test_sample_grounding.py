"""The grounding layout of the sample data set: phrases mean the boxes of what they name."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from zoo_common import layouts, sample
from zoo_common.sample.captions import NUMBERS, plural, size_word
from zoo_common.sample.coco import scene_of, visible
from zoo_common.sample.grounding import BERT, vocabulary
from zoo_common.sample.layout import Picture
from zoo_common.sample.scenes import COLOURS, TEXTURES, SceneObject

TRAIN, VAL, SIZE = 70, 20, (80, 64)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options: dict[str, Any] = {"train": TRAIN, "val": VAL, "size": SIZE}
    return sample.make(tmp_path_factory.mktemp("grounding"), layout="grounding", **options)


def read(root: Path, kind: str, split: str) -> dict[str, Any]:
    path = root / "annotations" / f"{kind}_{split}2017.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def fits(words: list[str], item: SceneObject, side: int) -> bool:
    """Whether each word of a phrase is true of an object."""
    shape = words[-1]
    own = {item.colour, item.texture, size_word(item, side), "a", "an", "the", "largest", *NUMBERS}
    return shape in (item.shape, plural(item.shape)) and set(words[:-1]) <= own


def test_phrases_mean_what_they_name(root: Path) -> None:
    told = Counter()
    for split, count in (("train", TRAIN), ("val", VAL)):
        grounded, coco = read(root, "grounding", split), read(root, "instances", split)
        by_image: dict[int, list[Any]] = {}
        for item in grounded["annotations"]:
            by_image.setdefault(item["image_id"], []).append(item)
        assert len({item["id"] for item in grounded["annotations"]}) == len(grounded["annotations"])
        for number in range(count):
            scene = scene_of(Picture(0, split, number, *SIZE))
            side = min(scene.width, scene.height)
            picture = coco["images"][number]
            captions = [
                item for item in grounded["images"] if item["original_img_id"] == picture["id"]
            ]
            seen = {
                tuple(s.sight.box_xyxy): s.sight.item
                for s in visible(scene)
                if not s.sight.item.in_crowd
            }
            assert len(captions) == (2 if seen else 0)
            for caption in captions:
                assert caption["file_name"] == picture["file_name"]
                meant: dict[tuple[int, int], list[SceneObject]] = {}
                for item in by_image[caption["id"]]:
                    x, y, w, h = item["bbox"]
                    (span,) = item["tokens_positive"]
                    meant.setdefault(tuple(span), []).append(seen[x, y, x + w, y + h])
                rest = caption["caption"]
                for (begin, end), found in meant.items():
                    phrase = caption["caption"][begin:end]
                    rest = rest.replace(phrase, "*", 1)
                    words = phrase.split()
                    assert all(fits(words, item, side) for item in found)
                    same = [item for item in seen.values() if fits(words, item, side)]
                    if "largest" in words:
                        assert found == [max(same, key=lambda item: item.scale)] and len(same) > 1
                    elif not caption["sentence_id"]:
                        colour, shape = found[0].colour, found[0].shape
                        sized = [size_word(item, side) for item in found]
                        assert len(set(sized)) == 1
                        assert len(found) == sum(
                            (i.colour, i.shape, size_word(i, side)) == (colour, shape, sized[0])
                            for i in seen.values()
                        )
                    else:
                        assert len(found) == len(same)
                    if words[0] in NUMBERS:
                        assert NUMBERS.index(words[0]) == len(found)
                    told["largest" in words, len(found) > 1, len(words)] += 1
                if caption["sentence_id"]:
                    assert set(rest.split(". ")) == {"*"}
                else:
                    assert set(re.split(", | and ", rest)) == {"*"}
                    assert sum(map(len, meant.values())) == len(seen)
    assert {largest for largest, _, _ in told} == {True, False}
    assert {several for _, several, _ in told} == {True, False}
    assert {words for _, _, words in told} == {1, 3, 4}


def test_it_is_coco_with_more_in_it(root: Path, tmp_path: Path) -> None:
    coco = sample.make(tmp_path, layout="coco", train=TRAIN, val=VAL, size=SIZE)
    files = [path.relative_to(coco) for path in coco.rglob("*") if path.is_file()]
    assert all(
        (coco / path).read_bytes() == (root / path).read_bytes()
        for path in files
        if path.name != "manifest.json"
    )
    more = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert more - {path.as_posix() for path in files} == {
        "annotations/grounding_train2017.json",
        "annotations/grounding_val2017.json",
        "bert-sample/config.json",
        "bert-sample/vocab.txt",
    }


def test_the_vocabulary_has_every_word(root: Path) -> None:
    words = (root / BERT / "vocab.txt").read_text().splitlines()
    assert words == vocabulary() and len(words) == len(set(words))
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    config = json.loads((root / BERT / "config.json").read_text())
    assert config["vocab_size"] == len(words) and config["model_type"] == "bert"
    said = {
        word
        for split in ("train", "val")
        for image in read(root, "grounding", split)["images"]
        for word in re.findall(r"\w+|[.,]", image["caption"])
    }
    assert said <= set(words)
    assert {*sample.CLASSES, *COLOURS, *TEXTURES} <= set(words)


def test_a_run_finds_and_makes_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layouts.resolve("grounding", str(root)) == root
    assert layouts.resolve("coco", str(root)) == root
    made: list[str] = []

    def make(layout: str, progress: object) -> Path:
        made.append(layout)
        return root

    monkeypatch.setattr(sample, "make", make)
    assert layouts.resolve("grounding", "sample") == root
    assert layouts.resolve("coco", "sample") == root
    assert made == ["grounding", "coco"]
