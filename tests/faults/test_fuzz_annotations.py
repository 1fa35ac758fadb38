"""Annotations and lists of pictures: COCO's JSON and its cache, grounding, captions, classes."""

import json
import os
import shutil
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import amounts, as_json, feed, spoiled, spoiled_json, spoiled_tree
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from zoo_common.detection.classes import class_names
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.detection.coco_eval import CocoEvaluator, check_outlines
from zoo_common.detection.coco_json import parse
from zoo_common.errors import UserError

WORDS = [
    b'"counts"', b'"size":[0,0]', b'"segmentation":[[]]', b"1e400", b"-1", b"NaN", b"Infinity",
    b'"id":1,', b'"\\ud800"', b'"image_id":9223372036854775808', b'"bbox":[0,0,1e308,1e308]', b",",
]  # fmt: skip


def rle() -> dict[str, Any]:
    mask = np.zeros((12, 10), np.uint8, order="F")
    mask[2:5, 3:9] = 1
    coded = coco_mask.encode(mask)
    return {"size": [12, 10], "counts": coded["counts"].decode()}


def coco() -> dict[str, Any]:
    box = {"bbox": [1.0, 2.0, 5.0, 4.0], "area": 20.0, "iscrowd": 0}
    square = [1.0, 2.0, 6.0, 2.0, 6.0, 6.0, 1.0, 6.0]
    outlines = [[square], rle(), {"size": [12, 10], "counts": [30, 20, 70]}, [square, square[:6]]]
    annotations = [
        {"id": number, "image_id": 1 + number % 2, "category_id": 3, "segmentation": outline, **box}
        for number, outline in enumerate(outlines)
    ]
    annotations[1]["iscrowd"] = 1
    return {
        "info": {"year": 2017},
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "height": 12, "width": 10}
            for number in (1, 2)
        ],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 7, "name": "d"}],
    }


def use(index: CocoIndex) -> None:
    """Asks an index for all that a training asks for."""
    for number in range(len(index)):
        index.item_id(number)
        index.objects(number)
        index.outlines(number)
        index.mask_runs(number)
        index.annotation_dicts(number)
    index.trainable()
    index.describe()
    assert index.most_objects >= 0 and index.most_edges >= 0


@amounts
def test_coco(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"

    def read_coco(data: bytes) -> None:
        path.write_bytes(data)
        cache = tmp_path / "cache"
        for left in cache.glob("*"):
            left.unlink()
        for masks in (False, True):
            use(open_index(path, None, masks=masks, cache=cache))

    read_coco(as_json(coco()))
    feed(read_coco, spoiled_json([coco()], WORDS), amount, tmp_path)


@amounts
def test_coco_scores(amount: int, tmp_path: Path) -> None:
    """The evaluation draws the outlines with pycocotools' C, from the JSON or from its index."""
    path, cache = tmp_path / "instances.json", tmp_path / "cache"
    box_14, one = np.array([[1.0, 2.0, 6.0, 6.0]]), np.array([0.9])

    def score(source: Path | CocoIndex, size: tuple[int, int]) -> None:
        evaluator = CocoEvaluator(source)
        whole = coco_mask.frPyObjects({"size": size, "counts": [0, size[0] * size[1]]}, *size)
        evaluator.add(1, box_14, one, np.array([0]), [whole])
        evaluator.summarize()

    def read_ground_truth(data: bytes) -> None:
        path.write_bytes(data)
        for left in cache.glob("*"):
            left.unlink()
        index = open_index(path, None, masks=True, cache=cache)
        check_outlines(index)
        sizes = {index.image_id(number): index.size(number) for number in range(len(index))}
        size = sizes.get(1, (12, 10))
        score(index, size)
        score(path, size)

    read_ground_truth(as_json(coco()))
    feed(read_ground_truth, spoiled_json([coco()], WORDS), amount, tmp_path)


@amounts
def test_caches_of_coco(amount: int, tmp_path: Path) -> None:
    """A cache that is not whole is built anew, so that none is ever refused, and none is wrong."""
    path, cache = tmp_path / "instances.json", tmp_path / "cache"
    path.write_bytes(as_json(coco()))
    time.sleep(0.1)  # until a change would show in its times
    wanted = parse(path.read_bytes(), path).arrays
    open_index(path, None, cache=cache)
    (place,) = cache.iterdir()
    valid = place.read_bytes()

    def read_cache(data: bytes) -> None:
        place.write_bytes(data)
        index = open_index(path, None, cache=cache)
        use(index)
        for name, array in wanted.items():
            np.testing.assert_array_equal(index._arrays[name], array)
        if place.read_bytes() != data:
            raise UserError("built anew")

    read_cache(valid)
    feed(read_cache, st.just(valid) | spoiled([valid], [b"|O"]), amount, tmp_path)


@amounts
def test_forged_caches_of_coco(amount: int, tmp_path: Path) -> None:
    """One with a checksum that fits: whoever can write it could as well write the annotations."""
    path, cache = tmp_path / "instances.json", tmp_path / "cache"
    path.write_bytes(as_json(coco()))
    time.sleep(0.1)
    open_index(path, None, cache=cache)
    (place,) = cache.iterdir()
    valid = place.read_bytes()
    preamble = struct.Struct("<8sQQ")
    magic, length, _ = preamble.unpack(valid[: preamble.size])
    header = json.loads(valid[preamble.size :][:length])
    arrays = valid[preamble.size + length :]
    assert [header["arrays"][0][1]] == ["<i8"]

    def read_forged(tree: Any) -> None:
        text = as_json(tree)
        place.write_bytes(preamble.pack(magic, len(text), zlib.crc32(text)) + text + arrays)
        before = place.stat().st_ino
        open_index(path, None, cache=cache)
        if place.stat().st_ino != before:
            raise UserError("built anew")

    objects = json.loads(json.dumps(header))
    objects["arrays"][0][1] = "|O"
    with pytest.raises(UserError, match="anew"):
        read_forged(objects)
    inputs = st.just(header) | spoiled_tree([header, objects])
    feed(read_forged, inputs, amount, tmp_path, (UserError, KeyError))  # arrays that are not there


@amounts
def test_grounding(amount: int, tmp_path: Path) -> None:
    from glip.grounding import open_grounding

    class Encoder:
        """Counts letters, where GLIP's counts tokens."""

        max_tokens = 40

        def fits(self, text: str) -> bool:
            return len(text) <= self.max_tokens

    path = tmp_path / "mixed.json"
    images = tmp_path / "images"
    images.mkdir()
    tree = coco()
    for image in tree["images"]:
        image |= {"caption": "a cat and a dog", "data_source": ""}
        (images / image["file_name"]).touch()
    for annotation in tree["annotations"]:
        annotation["tokens_positive"] = [[2, 5], [12, 15]]
        del annotation["segmentation"]
    other = json.loads(json.dumps(tree))
    other["annotations"][0]["tokens_positive"] = []

    def read_grounding(data: bytes) -> None:
        path.write_bytes(data)
        for left in tmp_path.glob("*.zoo-cache"):
            left.unlink()
        index = open_grounding(path, images, Encoder())
        use(index)
        for number in range(len(index)):
            index.caption(number)

    read_grounding(as_json(tree))
    feed(read_grounding, spoiled_json([tree, other], WORDS), amount, tmp_path)


@amounts
def test_classes(amount: int, tmp_path: Path) -> None:
    given, checkpoint = tmp_path / "names.txt", tmp_path / "last.pth"
    beside = tmp_path / "classes.txt"

    def read_classes(data: bytes) -> None:
        given.write_bytes(data)
        beside.write_bytes(data)
        for file in (given, None):
            assert len(class_names(checkpoint, file, 3)) == 3

    names = b"cat\ndog\ncow\n"
    feed(read_classes, spoiled([names, "é\n人\nx".encode()], [b"\x0c", b"\x85"]), amount, tmp_path)


ROWS = [
    {"filename": "a/1.jpg", "caption": "a cat"},
    {"filename": "yfcc15m_clean_open_data/2.jpg", "caption": ["a dog", "more"]},
    {"filename": "3.jpg", "caption": "é, 人", "url": "x"},
]


def lines(rows: list[Any]) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


def captions(valid: list[Any]) -> Any:
    return spoiled_json([valid]).map(
        lambda data: data if not data.startswith(b"[{") else as_lines(data)
    )


def as_lines(data: bytes) -> bytes:
    """A list as a line for each item, where it still is one."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return data.replace(b"}, {", b"}\n{")
    return lines(rows)


@amounts
def test_captions(amount: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from declip import index_build
    from declip.index import open_index as open_captions

    # Each list is left alone from now on, so that there is nothing to wait for.
    monkeypatch.setattr("declip.index.wait_until_settled", index_build.read_stamp)
    root = tmp_path / "data"
    images = root / "yfcc15m_clean_open_data"
    (images / "a").mkdir(parents=True)
    for name in ("a/1.jpg", "2.jpg", "3.jpg"):
        (images / name).touch()
    path = root / "yfcc15m_clean_open_data.json"
    cache = tmp_path / "cache"

    def read_captions(data: bytes) -> None:
        path.write_bytes(data)
        shutil.rmtree(cache, ignore_errors=True)
        index = open_captions(root, max_damaged=0.5, cache=cache)
        for number in range(len(index)):
            assert index.caption(number).strip()
            assert Path(os.path.normpath(index.path(number))).is_relative_to(images)

    read_captions(lines(ROWS))
    feed(read_captions, captions(ROWS), amount, tmp_path)


@amounts
def test_indexes_of_captions(amount: int, tmp_path: Path) -> None:
    """The Arrow file that is made of the list; a damaged one is built anew."""
    from declip.index import CaptionIndex
    from declip.index import open_index as open_captions

    root = tmp_path / "data"
    images = root / "yfcc15m_clean_open_data"
    (images / "a").mkdir(parents=True)
    for name in ("a/1.jpg", "2.jpg", "3.jpg"):
        (images / name).touch()
    (root / "yfcc15m_clean_open_data.json").write_bytes(lines(ROWS))
    built = open_captions(root, cache=tmp_path / "cache")
    valid = built.file.read_bytes()
    place = tmp_path / "index"

    def read_index(data: bytes) -> None:
        place.write_bytes(data)
        index = CaptionIndex(place, images)
        for number in range(len(index)):
            index.caption(number)
            index.item_id(number)

    inputs = spoiled([valid], [b"ARROW1", b"filename", b"declip.index"])
    feed(read_index, inputs, amount, tmp_path, (ValueError, OSError))


VAL_ROWS = [
    {"filename": "1.jpg", "label": 0, "label_name": "cat"},
    {"filename": "2.jpg", "label": "1", "label_name": "dog"},
]


@amounts
def test_validation_lists(amount: int, tmp_path: Path) -> None:
    from declip.index import open_val_index

    (tmp_path / "imagenet_val").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "imagenet_val" / name).touch()

    def read_val(data: bytes) -> None:
        (tmp_path / "val_official.json").write_bytes(data)
        index = open_val_index(tmp_path)
        for number in range(len(index)):
            index.path(number)
            assert index.classes[index.label(number)]

    read_val(lines(VAL_ROWS))
    feed(read_val, captions(VAL_ROWS), amount, tmp_path)


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DATA_DIR", str(tmp_path / "zoo data"))
