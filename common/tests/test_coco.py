"""COCO instances: equal to pycocotools, every oddity counted or refused, caches never stale."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from zoo_common.cache_files import Stamp
from zoo_common.detection import coco_json
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.detection.masks import decode_rle
from zoo_common.errors import UserError

Json = dict[str, Any]

HEIGHT, WIDTH = 40, 60
SQUARE = [5.0, 6.0, 15.0, 6.0, 15.0, 16.0, 5.0, 16.0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_DATA_DIR", str(tmp_path / "zoo data"))
    return tmp_path / "zoo data"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were parsed, in turn."""
    parsed: list[Path] = []
    parse = coco_json.parse

    def count(data: bytes, path: Path) -> Any:
        parsed.append(path)
        return parse(data, path)

    monkeypatch.setattr(coco_json, "parse", count)
    return parsed


def image(number: int = 1, **more: Any) -> Json:
    return {"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH} | more


def thing(number: int = 1, **more: Any) -> Json:
    """An annotation; a value of None takes the field away."""
    fields = {
        "id": number,
        "image_id": 1,
        "category_id": 3,
        "bbox": [5.0, 6.0, 10.0, 10.0],
        "area": 100.0,
        "iscrowd": 0,
        "segmentation": [SQUARE],
    }
    return {key: value for key, value in (fields | more).items() if value is not None}


def data_set(*things: Json, images: list[Json] | None = None) -> Json:
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": images or [image()],
        "annotations": list(things),
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
    }


def write(path: Path, content: Json) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def open_one(tmp_path: Path, *things: Json, masks: bool = False) -> CocoIndex:
    return open_index(write(tmp_path / "a.json", data_set(*things)), None, masks=masks)


def random_data_set(seed: int = 0) -> Json:
    """Polygons, both kinds of run lengths, crowds; ids, images and categories out of order."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:20].tolist()
    images = [
        image(n, height=int(rng.integers(8, 50)), width=int(rng.integers(8, 50))) for n in ids
    ]
    things = []
    for number in rng.permutation(10_000)[:120].tolist():
        picture = images[int(rng.integers(1, len(images)))]
        height, width = picture["height"], picture["width"]
        mask = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        kind = rng.integers(4)
        segmentation: Any = {"size": [height, width], "counts": rle["counts"].decode()}
        if kind == 1:
            flat = np.concatenate([[0], mask.T.ravel().astype(int), [2]])
            segmentation["counts"] = np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()
        if kind > 1:
            rings = rng.uniform(0, min(height, width), (int(rng.integers(1, 4)), 10))
            segmentation = [[round(value, 2) for value in ring] for ring in rings.tolist()]
        corner = rng.uniform(0, min(height, width) / 2, 2).round(2)
        things.append(
            thing(
                number,
                image_id=picture["id"],
                category_id=int(rng.choice([3, 90])),
                bbox=[*corner.tolist(), *rng.uniform(1, 4, 2).round(2).tolist()],
                area=float(rng.uniform(1, 16)),
                iscrowd=int(kind < 2 and rng.random() < 0.5),
                segmentation=segmentation,
            )
        )
    return data_set(*things, images=images)


def plain_counts(rle: Json) -> bytes:
    counts = rle["counts"]
    return counts if isinstance(counts, bytes) else counts.encode()


# ------------------------------------------------------------------ what is read


def test_objects_are_those_of_pycocotools(tmp_path: Path) -> None:
    path = write(tmp_path / "instances.json", random_data_set())
    reference, index = COCO(str(path)), open_index(path, None)
    assert [index.image_id(i) for i in range(len(index))] == sorted(reference.imgs)
    assert index.category_ids == sorted(reference.cats) == [3, 90]
    assert index.classes == ["car", "toothbrush"]
    for i in range(len(index)):
        expected = reference.imgToAnns[index.image_id(i)]
        objects = index.objects(i)
        assert objects.ids_N.tolist() == [item["id"] for item in expected]
        assert [index.category_ids[label] for label in objects.labels_N] == [
            item["category_id"] for item in expected
        ]
        assert objects.crowd_N.tolist() == [item["iscrowd"] == 1 for item in expected]
        areas = [item["area"] for item in index.annotation_dicts(i)]
        assert areas == [item["area"] for item in expected]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in expected)]
        expected_N4 = np.array(corners, np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(objects.boxes_N4, expected_N4)
    assert index.problems == {}
    counts = [
        sum(not item["iscrowd"] for item in reference.imgToAnns[n]) for n in sorted(reference.imgs)
    ]
    assert index.most_objects == max(counts)
    assert index.trainable().tolist() == np.flatnonzero(counts).tolist()


def test_outlines_are_those_of_the_masks(tmp_path: Path) -> None:
    path = write(tmp_path / "instances.json", random_data_set(1))
    reference, index = COCO(str(path)), open_index(path, None)
    most = 0
    for i in range(len(index)):
        height, width = index.size(i)
        outlines = index.outlines(i)
        expected = reference.imgToAnns[index.image_id(i)]
        assert len(outlines) == len(expected)
        for outline, item in zip(outlines, expected, strict=True):
            assert outline.edges.shape == (len(outline.rings), 4)
            if item["iscrowd"]:
                assert len(outline.edges) == 0
                continue
            most = max(most, len(outline.edges))
            if isinstance(item["segmentation"], list):
                for number, ring in enumerate(item["segmentation"]):
                    starts = outline.edges[outline.rings == number, :2]
                    assert starts.ravel().tolist() == ring
            else:
                # Parity of the borders above a pixel.
                toggles = np.zeros((height + 1, width), int)
                for x0, y0, x1, _ in outline.edges.astype(int):
                    toggles[y0, x0:x1] += 1
                covered = toggles[:-1].cumsum(axis=0) % 2 == 1
                np.testing.assert_array_equal(
                    covered, decode_rle(item["segmentation"], height, width)
                )
    assert index.most_edges == most


def test_masks_are_those_of_pycocotools(tmp_path: Path) -> None:
    content = random_data_set(3)
    far = [-30.0, -20.0, 900.0, 7.0, 3.0, 700.0]  # reaches out of its image
    crossed = [far, [*far[2:], *far[:2]], [1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 9.0, 9.0]]
    owner = content["images"][3]["id"]
    content["annotations"].append(thing(20_000, image_id=owner, segmentation=crossed))
    path = write(tmp_path / "instances.json", content)
    reference, index = COCO(str(path)), open_index(path, None)
    covered = 0
    for i in range(len(index)):
        items = reference.imgToAnns[index.image_id(i)]
        runs = index.mask_runs(i)
        assert runs.dtype == np.int64 and runs.shape == (len(runs), 4)
        assert (np.diff(runs[:, 0]) >= 0).all() and (runs[:, 2] < runs[:, 3]).all()
        masks = np.zeros((len(items), *index.size(i)), int)
        for number, column, first, after in runs.tolist():
            masks[number, first:after, column] += 1
        for item, mask in zip(items, masks, strict=True):
            np.testing.assert_array_equal(mask, (not item["iscrowd"]) * reference.annToMask(item))
            covered += mask.sum()
    assert covered > 10_000


def test_ground_truth_is_the_file(tmp_path: Path) -> None:
    content = random_data_set(2)
    content["annotations"].append(
        thing(
            20_000, image_id=content["images"][3]["id"], bbox=[-5, -5, 1, 99.5], segmentation=None
        )
    )
    reference = COCO(str(write(tmp_path / "instances.json", content)))
    ours = COCO()
    ours.dataset = open_index(tmp_path / "instances.json", None).to_coco_dict()
    ours.createIndex()
    assert sorted(ours.anns) == sorted(reference.anns)
    for number, expected in reference.anns.items():
        found = dict(ours.anns[number])
        if "segmentation" in expected:
            rles = [coco.annToRLE(coco.anns[number]) for coco in (ours, reference)]
            assert plain_counts(rles[0]) == plain_counts(rles[1])
            found["segmentation"] = expected["segmentation"]
        assert found == expected
    for number, expected in reference.imgToAnns.items():
        assert [item["id"] for item in ours.imgToAnns[number]] == [item["id"] for item in expected]
    assert ours.imgs == reference.imgs
    assert ours.cats == reference.cats
    plain = open_index(tmp_path / "instances.json", None).to_coco_dict(outlines=False)
    assert not any("segmentation" in item for item in plain["annotations"])


def test_keypoints_are_instances_too(tmp_path: Path) -> None:
    index = open_one(tmp_path, thing(keypoints=[1, 2, 2] * 17, num_keypoints=17))
    assert len(index.objects(0).ids_N) == 1


def test_numbers_may_be_written_in_any_way(tmp_path: Path) -> None:
    content = data_set(thing(iscrowd=True, area=7), images=[image(height=40.0, width="60")])
    index = open_index(write(tmp_path / "a.json", content), None)
    assert index.size(0) == (40, 60)
    assert index.objects(0).crowd_N.tolist() == [True]


def test_a_set_without_objects_opens(tmp_path: Path) -> None:
    index = open_one(tmp_path)
    assert index.objects(0).boxes_N4.shape == (0, 4)
    assert index.outlines(0) == []
    assert (index.most_objects, index.most_edges, len(index.trainable())) == (0, 0, 0)


# ------------------------------------------------------------------ what is odd

ODDITIES: dict[str, tuple[Json, str, int]] = {
    "no width": (thing(bbox=[5, 5, 0, 4]), "empty_boxes", 0),
    "negative": (thing(bbox=[5, 5, 4, -4]), "empty_boxes", 0),
    "a thousandth of nothing": (thing(bbox=[50, 5, 1e-6, 4]), "empty_boxes", 0),
    "outside": (thing(bbox=[WIDTH + 1, 5, 4, 4]), "outside_boxes", 0),
    "above": (thing(bbox=[5, -9, 4, 4]), "outside_boxes", 0),
    "at the border": (thing(bbox=[WIDTH, 5, 4, 4]), "outside_boxes", 0),
    "over the border": (thing(bbox=[-5, 30, 10, 20]), "clipped_boxes", 1),
    "ignored": (thing(ignore=1), "ignored", 0),
    "area 0": (thing(area=0), "zero_areas", 1),
    "no area": (thing(area=None), "no_areas", 1),
    "no outline": (thing(segmentation=None), "no_outlines", 1),
    "an empty outline": (thing(segmentation=[]), "no_outlines", 1),
    "a line": (thing(segmentation=[SQUARE, [1, 1, 2, 2]]), "short_polygons", 1),
    "half a point": (thing(segmentation=[SQUARE, SQUARE[:-1]]), "short_polygons", 1),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_oddities_are_counted(tmp_path: Path, name: str) -> None:
    odd, problem, objects = ODDITIES[name]
    index = open_one(tmp_path, odd, thing(2))
    assert index.problems == {problem: 1}
    assert len(index.describe().splitlines()) == 2
    assert (
        len(index.objects(0).ids_N) == len(index.outlines(0)) == index.most_objects == objects + 1
    )
    assert index.to_coco_dict()["annotations"][0]["bbox"] == [float(value) for value in odd["bbox"]]


def test_boxes_are_clipped_to_the_image(tmp_path: Path) -> None:
    index = open_one(tmp_path, thing(bbox=[-5, 30, 10, 20]), thing(2, bbox=[50.5, 0, 9.504, 1]))
    assert index.objects(0).boxes_N4.tolist() == [[0, 30, 5, 40], [50.5, 0, 60, 1]]
    assert index.problems == {"clipped_boxes": 1}  # the second is rounding


def test_objects_without_outline_are_left_out_where_masks_are_wanted(tmp_path: Path) -> None:
    rle = {"size": [HEIGHT, WIDTH], "counts": [5, 10, HEIGHT * WIDTH - 15]}
    things = [
        thing(1, segmentation=None),
        thing(2, segmentation=[[1, 1, 2, 2]]),
        thing(3, segmentation=rle, iscrowd=1),
        thing(4),
        thing(5, segmentation=rle),
    ]
    assert open_one(tmp_path, *things).objects(0).ids_N.tolist() == [1, 2, 3, 4, 5]
    index = open_one(tmp_path, *things, masks=True)
    assert index.objects(0).ids_N.tolist() == [3, 4, 5]
    assert [len(outline.edges) for outline in index.outlines(0)] == [0, 4, 2]
    assert index.most_objects == 2
    assert index.problems == {"no_outlines": 2, "short_polygons": 1}
    assert "2 objects have no outline: left out" in index.describe()


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [HEIGHT, WIDTH], "counts": [5, 5]},
        {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": ""},
        {"size": [HEIGHT, WIDTH], "counts": "not an RLE"},
        {"size": [HEIGHT, WIDTH], "counts": "ooooooooooooooooooooooooooooooooo0"},
    ],
)
def test_damaged_run_lengths_are_no_outline(tmp_path: Path, rle: Json) -> None:
    index = open_one(tmp_path, thing(segmentation=rle), thing(2))
    assert index.problems == {"unfit_rles": 1, "no_outlines": 1}
    assert [len(outline.edges) for outline in index.outlines(0)] == [0, 4]


def test_crowds_alone_do_not_make_an_image_trainable(tmp_path: Path) -> None:
    images = [image(number) for number in (1, 2, 3)]
    content = data_set(thing(1, image_id=2, iscrowd=1), thing(2, image_id=3), images=images)
    index = open_index(write(tmp_path / "a.json", content), None)
    assert index.trainable().tolist() == [2]
    assert index.objects(1).crowd_N.tolist() == [True]
    assert [len(outline.edges) for outline in index.outlines(1)] == [0]
    assert "3 images (1 without annotations), 2 annotations (1 crowd regions)" in index.describe()


# ------------------------------------------------------------------ what is refused


def without(name: str) -> Json:
    content = data_set(thing())
    del content[name]
    return content


def captions() -> Json:
    return without("categories") | {"annotations": [{"id": 1, "image_id": 1, "caption": "a car"}]}


def panoptic() -> Json:
    segments = [{"id": 1, "bbox": [1, 1, 2, 2], "category_id": 3}]
    return data_set({"image_id": 1, "file_name": "1.png", "segments_info": segments})


TEXT = json.dumps(data_set(thing(17)))
BAD_FILES: dict[str, tuple[str | Json | list[Json], str]] = {
    "empty": ("", "a.json is empty; give a COCO instances file"),
    "truncated": (TEXT[:-30], f"ends in the middle, after {len(TEXT) - 30} bytes"),
    "not JSON": ("<html>", "is not valid JSON .*begins with b'<html>'"),
    "NaN": (TEXT.replace("100.0", "NaN"), "is not valid JSON"),
    "detections": ([{"image_id": 1, "score": 0.5}], "is no COCO file but a list, as of detections"),
    "a number": ("3", "is no COCO file but it begins with b'3'"),
    "captions": (captions(), "holds captions and no instances"),
    "panoptic": (panoptic(), "holds panoptic segments and no instances"),
    "image info": (without("annotations"), "lists images without annotations"),
    "no categories": (without("categories"), r"has no categories \(it has info, licenses"),
    "no images": (data_set() | {"images": []}, "lists no images"),
    "no bbox": (data_set(thing(17, bbox=None)), "id 17 of its annotations .*`bbox`"),
    "a short bbox": (data_set(thing(17, bbox=[1, 2, 3])), "id 17 of its annotations .*length 4"),
    "a huge bbox": (data_set(thing(17, bbox=[1, 2, 1e308, 3])), "Annotation 17 .*than any picture"),
    "no id": (data_set(thing(), thing(17, id=None)), "number 2 of its annotations .*`id`"),
    "no size": (data_set(images=[image(5) | {"height": 0}]), "id 5 of its images .*>= 1"),
    "annotations of a kind": (data_set() | {"annotations": {}}, "its annotations are no list"),
    "image twice": (data_set(images=[image(5)] * 2), "has image id 5 twice"),
    "category twice": (
        data_set() | {"categories": [{"id": 4, "name": name} for name in "ab"]},
        "has category id 4 twice",
    ),
    "annotation twice": (data_set(thing(17), thing(17)), "has annotation id 17 twice"),
    "unknown image": (
        data_set(thing(1), thing(17, image_id=8)),
        r"Annotation 17 .*image_id 8, which the file does not list \(1 such",
    ),
    "unknown category": (
        data_set(thing(17, category_id=4)),
        "Annotation 17 .*category_id 4, which the file does not list",
    ),
    "a flat polygon": (data_set(thing(17, segmentation=SQUARE)), "Annotation 17 .*segmentation"),
    "a negative run": (
        data_set(thing(17, segmentation={"size": [4, 4], "counts": [-1, 17]})),
        "Annotation 17 .*segmentation",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_explained(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        open_index(path, None)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.json cannot be read \(No such file"):
        open_index(tmp_path / "no.json", None)


def test_missing_images_are_an_error_unless_allowed(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "sub/c.jpg", "sub/d.jpg"]
    images = [image(n, file_name=name) for n, name in enumerate(names)]
    content = data_set(thing(1, image_id=1), thing(2, image_id=2), images=images)
    path = write(tmp_path / "a.json", content)
    for name in ("b.jpg", "sub/d.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    with pytest.raises(UserError, match=r"2 of the 4 images .* first is .*images/a\.jpg"):
        open_index(path, tmp_path / "images")
    index = open_index(path, tmp_path / "images", allow_missing=True)
    assert [index.item_id(i) for i in range(len(index))] == ["b.jpg", "sub/d.jpg"]
    assert all(Path(index.path(i)).is_file() for i in range(2))
    assert index.problems == {"missing_images": 2}
    assert index.trainable().tolist() == [0]
    assert index.sizes().tolist() == [[HEIGHT, WIDTH]] * 2
    assert index.objects(0).ids_N.tolist() == [1]
    assert [item["id"] for item in index.to_coco_dict()["images"]] == [1, 3]
    with pytest.raises(UserError, match="4 of the 4 images"):
        open_index(path, tmp_path / "nowhere", allow_missing=True)


# ------------------------------------------------------------------ the cache


def label_of_first(index: CocoIndex) -> int:
    return int(index.objects(0).labels_N[0])


def test_the_cache_is_used_and_read_only(tmp_path: Path, builds: list[Path]) -> None:
    path = write(tmp_path / "a.json", data_set(thing()))
    first, second = open_index(path, None), open_index(path, None)
    assert len(builds) == 1
    assert first.fingerprint == second.fingerprint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.json.zoo-cache"]
    with pytest.raises(ValueError, match="read-only"):
        second._mapped.arrays["labels"][0] = 1


@pytest.mark.parametrize("pause_s", [0.0, 0.1])  # 0: within a tick of the file system's clock
@pytest.mark.parametrize("keep_time", [False, True])
def test_a_changed_file_is_read_again(
    tmp_path: Path, builds: list[Path], *, keep_time: bool, pause_s: float
) -> None:
    path = write(tmp_path / "a.json", data_set(thing(category_id=3)))
    content = path.read_text()
    for _ in range(3):
        for old, new in ((3, 8), (8, 3)):
            time.sleep(pause_s)
            label = label_of_first(open_index(path, None))
            assert label == {3: 0, 8: 1}[old]
            status = path.stat()
            content = content.replace(f'"category_id": {old}', f'"category_id": {new}')
            path.write_text(content.replace('"id": 90', '"id": 8 '))
            assert path.stat().st_size == status.st_size
            if keep_time:
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(builds) == 6


def test_a_coarse_clock_hides_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(status: os.stat_result) -> Stamp:
        tick = 2_000_000_000
        times = (time // tick * tick for time in (status.st_mtime_ns, status.st_ctime_ns))
        return Stamp(status.st_size, *times)

    monkeypatch.setattr(Stamp, "of", coarse)
    content = data_set(thing()) | {"categories": [{"id": n, "name": "car"} for n in (3, 8)]}
    path = write(tmp_path / "a.json", content)
    assert label_of_first(open_index(path, None)) == 0
    path.write_text(path.read_text().replace('"category_id": 3', '"category_id": 8'))
    assert label_of_first(open_index(path, None)) == 1


def test_a_copied_data_set_is_not_read_again(tmp_path: Path, builds: list[Path]) -> None:
    path = write(tmp_path / "one" / "a.json", data_set(thing()))
    open_index(path, None)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copy)
    assert label_of_first(open_index(tmp_path / "two" / "a.json", None)) == 0
    assert len(builds) == 1


def test_after_a_while_the_file_itself_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.json", data_set(thing()))
    open_index(path, None)
    time.sleep(0.1)
    open_index(path, None)  # now its times vouch for it
    content, sha256 = path.read_bytes(), hashlib.sha256

    def refuse(data: bytes) -> Any:
        assert data != content
        return sha256(data)

    monkeypatch.setattr(hashlib, "sha256", refuse)
    assert label_of_first(open_index(path, None)) == 0


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def change_byte(place: Callable[[bytes], int]) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[place(data)] ^= 1
        file.write_bytes(data)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        empty,
        change_byte(lambda data: 0),
        change_byte(lambda data: 9),
        change_byte(lambda data: data.index(b"toothbrush")),
        change_byte(lambda data: data.index(np.array(SQUARE).tobytes())),
        change_byte(lambda data: data.index(b"1.jpg")),
    ],
)
def test_a_damaged_cache_is_built_again(
    tmp_path: Path, builds: list[Path], damage: Callable[[Path], None]
) -> None:
    path = write(tmp_path / "a.json", data_set(thing()))
    open_index(path, None)
    damage(tmp_path / "a.json.zoo-cache")
    index = open_index(path, None)
    assert len(builds) == 2
    assert index.classes == ["car", "toothbrush"]
    assert index.outlines(0)[0].edges[:, :2].ravel().tolist() == SQUARE
    assert index.item_id(0) == "1.jpg"


def test_a_cache_of_other_rules_is_built_again(
    tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.json", data_set(thing()))
    open_index(path, None)
    monkeypatch.setattr(coco_json, "VERSION", "another")
    open_index(path, None)
    assert len(builds) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_data_set_is_cached_elsewhere(
    tmp_path: Path, own_cache: Path, builds: list[Path]
) -> None:
    path = write(tmp_path / "set" / "a.json", data_set(thing()))
    path.parent.chmod(0o555)
    try:
        assert [label_of_first(open_index(path, None)) for _ in range(2)] == [0, 0]
    finally:
        path.parent.chmod(0o755)
    assert len(builds) == 1
    assert len(list((own_cache / "annotation-caches").iterdir())) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs a directory of the kernel's")
def test_where_nobody_may_write_the_cache_goes_elsewhere(
    tmp_path: Path, own_cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with write(tmp_path / "a.json", data_set(thing())).open() as stream:
        path = Path(f"/proc/self/fd/{stream.fileno()}")  # root cannot write there either
        assert [label_of_first(open_index(path, None)) for _ in range(2)] == [0, 0]
        assert len(builds) == 1
        assert [file.suffix for file in (own_cache / "annotation-caches").iterdir()] == [
            ".zoo-cache"
        ]
        monkeypatch.setenv("ZOO_DATA_DIR", "/proc/version")
        with pytest.raises(UserError, match=r"in /proc/self/fd \(.* or in /proc/version/"):
            open_index(path, None)


def test_a_data_set_that_the_zoo_made_stays_as_it_was_made(own_cache: Path) -> None:
    path = write(own_cache / "sample" / "annotations" / "a.json", data_set(thing()))
    open_index(path, None)
    assert list(path.parent.iterdir()) == [path]
    assert len(list((own_cache / "annotation-caches").iterdir())) == 1


def test_the_cache_can_be_put_into_a_directory(tmp_path: Path, builds: list[Path]) -> None:
    path = write(tmp_path / "set" / "a.json", data_set(thing()))
    for _ in range(2):
        open_index(path, None, cache=tmp_path / "caches")
    assert len(builds) == len(list((tmp_path / "caches").iterdir())) == 1
    assert list(path.parent.iterdir()) == [path]


BUILDER = """
import sys, time
from pathlib import Path
from zoo_common.detection import coco_cache, coco_json
from zoo_common.detection.coco import open_index

parse = coco_json.parse

def slowly(data, path):
    print("built", flush=True)
    time.sleep(0.5)
    return parse(data, path)

coco_json.parse = slowly
print("ready", flush=True)
sys.stdin.readline()
index = open_index(Path(sys.argv[1]), None)
print(index.objects(0).boxes_N4.tolist())
"""


def start_builder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_of_processes_that_build_at_once_one_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", data_set(thing()))
    processes = [start_builder(path) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert sorted(map(len, outputs)) == [1, 2]
    assert {output[-1] for output in outputs} == {"[[5.0, 6.0, 15.0, 16.0]]"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.json.zoo-cache"]


def test_a_killed_builder_is_replaced_and_cleared_away(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", data_set(thing()))
    process = start_builder(path)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "built\n"
    process.kill()
    process.communicate()
    (tmp_path / ".a.json.zoo-cache.0123456789ab").write_text("half of it")
    assert label_of_first(open_index(path, None)) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.json.zoo-cache"]


def test_pickling_passes_on_the_path(tmp_path: Path) -> None:
    content = data_set(thing(), images=[image(number) for number in range(1, 2000)])
    path = write(tmp_path / "a.json", content)
    index = open_index(path, None)
    blob = pickle.dumps(index)
    assert len(blob) < 1000
    copy = pickle.loads(blob)
    assert copy.objects(0).boxes_N4.tolist() == index.objects(0).boxes_N4.tolist()
    write(path, content | {"annotations": []})
    open_index(path, None)
    assert len(index.objects(0).ids_N) == 1  # what is mapped stays as it was
    with pytest.raises(UserError, match="was changed or deleted while in use"):
        pickle.loads(blob)
