"""The COCO layout of the sample data set: what its files say is what its pictures show."""

import contextlib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from zoo_common import sample
from zoo_common.errors import UserError
from zoo_common.sample.__main__ import main
from zoo_common.sample.coco import CATEGORY_IDS
from zoo_common.sample.draw import draw, visible_masks
from zoo_common.sample.outline import outline
from zoo_common.sample.scenes import COLOURS, TEXTURES, Scene, SceneObject, compose_several

# What pycocotools' decode() says with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TRAIN, VAL, SIZE = 120, 80, (160, 128)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.make(tmp_path_factory.mktemp("coco"), layout="coco", train=TRAIN, val=VAL)


def opened(root: Path, kind: str, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(root / "annotations" / f"{kind}_{split}2017.json")


def pictures(root: Path, split: str) -> Iterator[tuple[Scene, dict[str, Any], list[Any]]]:
    """The scenes, composed anew, with what the file says of them."""
    coco = opened(root, "instances", split)
    for number, image in enumerate(coco.dataset["images"]):
        scene = compose_several(0, split, number, *SIZE)
        yield scene, image, coco.imgToAnns[image["id"]]


def filled(segmentation: Any, height: int, width: int) -> np.ndarray:
    rles = coco_mask.frPyObjects(segmentation, height, width)
    if isinstance(rles, list):
        rles = coco_mask.merge(rles)
    return coco_mask.decode(rles).astype(bool)


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


# Outlines


def random_masks() -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for _ in range(400):
        height, width = random.integers(1, 40, 2)
        grain = random.integers(1, 6)
        coarse = random.random((height // grain + 1, width // grain + 1)) < random.random()
        yield np.kron(coarse, np.ones((grain, grain)))[:height, :width] > 0
    for _ in range(100):
        width, height = map(int, random.integers(10, 90, 2))
        hills = random.random((height // 8 + 2, width // 8 + 2)).astype(np.float32)
        smooth = Image.fromarray(hills).resize((width, height), Image.Resampling.BICUBIC)
        yield np.asarray(smooth) > random.uniform(0.3, 0.7)


def test_outlines_filled_by_pycocotools_are_the_masks():
    """Noise with islands in holes of islands, pixels that touch at corners, smooth hills."""
    holes = parts = 0
    for mask in random_masks():
        polygons = outline(mask)
        if not mask.any():
            assert polygons == []
            continue
        assert (filled(polygons, *mask.shape) == mask).all()
        assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)
        assert {2 * value % 1 for polygon in polygons for value in polygon} == {0}
        parts += len(polygons) > 1
        # The ends of a seam are passed twice.
        corners = [list(zip(polygon[::2], polygon[1::2], strict=True)) for polygon in polygons]
        holes += any(len(set(points)) < len(points) for points in corners)
    assert parts > 50
    assert holes > 50


def test_outlines_of_plain_masks():
    bar = np.zeros((9, 12), dtype=bool)
    bar[3, 2:11] = True
    (polygon,) = outline(bar)
    assert len(polygon) <= 2 * 8
    xs, ys = polygon[::2], polygon[1::2]
    assert (min(xs), max(xs), min(ys), max(ys)) == (2, 11, 3, 4)

    halves = np.ones((9, 12), dtype=bool)
    halves[:, 5] = False
    assert len(outline(halves)) == 2

    ring = np.ones((20, 20), dtype=bool)
    ring[8:12, 8:12] = False
    (polygon,) = outline(ring)
    assert (filled([polygon], 20, 20) == ring).all()

    corners = np.eye(3, dtype=bool)
    assert len(outline(corners)) == 1


# What the files say


def test_tree_and_files(root):
    instances, captions = (opened(root, kind, "train") for kind in ("instances", "captions"))
    held_out = opened(root, "instances", "val")
    assert sorted(path.name for path in root.iterdir()) == [
        "annotations",
        "manifest.json",
        "train2017",
        "val2017",
    ]
    for split, coco, count in (("train", instances, TRAIN), ("val", held_out, VAL)):
        folder = root / f"{split}2017"
        assert {path.name for path in folder.iterdir()} == {
            image["file_name"] for image in coco.dataset["images"]
        }
        assert len(coco.imgs) == count
        for image in coco.dataset["images"]:
            assert image["file_name"] == f"{image['id']:012d}.jpg"
            with Image.open(folder / image["file_name"]) as picture:
                assert (picture.format, picture.mode) == ("JPEG", "RGB")
                assert picture.size == (image["width"], image["height"])
        shapes = Counter((image["width"], image["height"]) for image in coco.dataset["images"])
        assert set(shapes) == {(160, 128), (128, 160)}
        assert min(shapes.values()) > count / 4
    assert instances.dataset["images"] == captions.dataset["images"]
    assert instances.dataset["categories"] == held_out.dataset["categories"]
    assert not set(instances.imgs) & set(held_out.imgs)
    assert not set(instances.anns) & set(held_out.anns)
    assert all("info" in coco.dataset for coco in (instances, captions)), "loadRes() copies it"


def test_ids_are_no_row_numbers(root):
    coco = opened(root, "instances", "train")
    assert [category["name"] for category in coco.dataset["categories"]] == list(sample.CLASSES)
    ids = [category["id"] for category in coco.dataset["categories"]]
    assert ids == sorted(set(ids)) and min(ids) == 1 and max(ids) == 90
    images = list(coco.imgs)
    gaps = {after - before for before, after in pairwise(images)}
    assert len(gaps) > 2 and min(gaps) > 0
    annotations = [item["id"] for item in coco.dataset["annotations"]]
    assert len(set(annotations)) == len(annotations) and min(annotations) > 0


def test_annotations_are_the_visible_parts(root):
    found = Counter()
    for scene, image, annotations in (*pictures(root, "train"), *pictures(root, "val")):
        masks = visible_masks(scene)
        members = [number for number, item in enumerate(scene.objects) if item.in_crowd]
        wanted = {
            number: (scene.objects[number], masks[number])
            for number in range(len(masks))
            if number not in members
        }
        if members:
            wanted[-1] = (scene.objects[members[0]], masks[members].any(axis=0))
        for item in annotations:
            mask = filled(item["segmentation"], image["height"], image["width"])
            (number,) = [key for key, (_, other) in wanted.items() if (mask == other).all()]
            truth, _ = wanted.pop(number)
            rows, columns = np.nonzero(mask)
            left, top, width, height = item["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert item["area"] == mask.sum()
            assert item["image_id"] == image["id"]
            assert item["category_id"] == CATEGORY_IDS[truth.shape]
            assert item["iscrowd"] == isinstance(item["segmentation"], dict) == truth.in_crowd
            found["crowds"] += item["iscrowd"]
            found["parts"] += not item["iscrowd"] and len(item["segmentation"]) > 1
            found["border"] += left == 0 or top == 0
            found["covered"] += item["area"] < 0.8 * truth.scale**2
            found["holes"] += truth.shape == "ring" and len(item["segmentation"]) == 1
        for truth, mask in wanted.values():
            assert mask.sum() < max(8, 0.15 * truth.scale**2)
            found["left out"] += 1
        found["empty"] += not annotations
    blocks = (TRAIN + VAL) // 40
    assert (found["crowds"], found["empty"]) == (2 * blocks, blocks)
    for fact in ("parts", "border", "covered", "holes", "left out"):
        assert found[fact] > 0, (fact, found)


def test_scenes_vary():
    scenes = [compose_several(0, "train", number, 160, 128) for number in range(400)]
    objects = [item for scene in scenes for item in scene.objects if not item.in_crowd]
    counts = Counter(sum(not item.in_crowd for item in scene.objects) for scene in scenes)
    assert set(counts) == set(range(7)) and counts[0] == 10
    shapes = Counter(item.shape for item in objects)
    assert set(shapes) == set(sample.CLASSES) and min(shapes.values()) > 0.06 * len(objects)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.texture for item in objects} == set(TEXTURES)
    small = sum(item.scale < 32 for item in objects) / len(objects)
    assert 0.2 < small < 0.6, "COCO's small and medium objects both occur"
    for scene in scenes:
        named = [item.colour for item in scene.objects if not item.in_crowd]
        crowd = {(item.shape, item.colour) for item in scene.objects if item.in_crowd}
        assert len(set(named)) == len(named)
        assert len(crowd) <= 1 and not {colour for _, colour in crowd} & set(named)


def test_pixels_and_annotations_of_version_1_are_pinned(tmp_path):
    assert sample.VERSION == 1, "a new version needs new digests"
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for number in range(20):
            digest.update(draw(compose_several(0, split, number, 160, 128)).tobytes())
    assert digest.hexdigest() == "ccc34c232cc2857479f1ee29b379f7c0334e718e1f62373f633c85eb3ce5e232"
    made = sample.make(tmp_path, layout="coco", train=40, val=40)
    digest = hashlib.sha256()
    for path in sorted((made / "annotations").iterdir()):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == "a0e0bf0c5e48bec3e3e0553df57c7a9b747de011c4e7d7491bbdc6cb0722327c"


# Captions

_ONE = re.compile(
    rf"\ban? (?:(small|large) )?(?:({'|'.join(TEXTURES)}) )?({'|'.join(COLOURS)}) "
    rf"({'|'.join(sample.CLASSES)})\b"
)
_NUMBERS = ("one", "two", "three", "four", "five", "six")
_MANY = re.compile(rf"\bmany tiny ({'|'.join(COLOURS)}) ({'|'.join(sample.CLASSES)})(?:es|s)\b")


def described(groups: tuple[Any, ...], item: SceneObject, side: int) -> bool:
    size, texture, colour, shape = groups
    return (
        (item.colour, item.shape) == (colour, shape)
        and texture in (None, item.texture)
        and (size != "small" or item.scale < 0.3 * side)
        and (size != "large" or item.scale > 0.4 * side)
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_captions_tell_what_is_there(root, split):
    captions = opened(root, "captions", split)
    told = Counter()
    for scene, image, annotations in pictures(root, split):
        sentences = [item["caption"] for item in captions.imgToAnns[image["id"]]]
        assert len(sentences) == 5
        masks = visible_masks(scene)
        boxes = {}
        for item in annotations:
            if not item["iscrowd"]:
                mask = filled(item["segmentation"], image["height"], image["width"])
                number = next(k for k, other in enumerate(masks) if (mask == other).all())
                boxes[number] = item["bbox"]
        crowded = any(item["iscrowd"] for item in annotations)
        side = min(scene.width, scene.height)
        for sentence in sentences:
            words = sentence
            matched = []
            for match in _ONE.finditer(sentence):
                (number,) = [k for k in boxes if described(match.groups(), scene.objects[k], side)]
                matched.append(number)
                words = words.replace(match.group(), "*", 1)
            many = _MANY.search(sentence)
            if many:
                assert crowded
                member = next(item for item in scene.objects if item.in_crowd)
                assert many.groups() == (member.colour, member.shape)
                words = words.replace(many.group(), "*")
            # What is not an object's name names none.
            assert not re.search("|".join((*sample.CLASSES, *COLOURS)), words), sentence
            told[words] += 1
            if words in ("* left of *", "* right of *", "* above *", "* below *"):
                one, other = ((x + w / 2, y + h / 2) for x, y, w, h in map(boxes.get, matched))
                right, down = one[0] - other[0], one[1] - other[1]
                assert {
                    "* left of *": right < -abs(down),
                    "* right of *": right > abs(down),
                    "* above *": -down >= abs(right),
                    "* below *": down >= abs(right),
                }[words]
            elif words.endswith(" of the picture") and matched:
                x, y, wide, high = boxes[matched[0]]
                column = 3 * (x + wide / 2) / scene.width
                row = 3 * (y + high / 2) / scene.height
                assert ("left" in words, "right" in words) == (column < 1, column >= 2)
                assert ("top" in words, "bottom" in words) == (row < 1, row >= 2)
                assert ("middle" in words) == (1 <= row < 2 and 1 <= column < 2)
            elif "dark background, " in words:
                assert words.split()[0] == _NUMBERS[len(boxes) - 1]
        listed = [match.groups() for match in _ONE.finditer(sentences[0])]
        assert len(listed) == len(boxes)
        assert bool(_MANY.search(sentences[0])) == crowded
        assert bool(annotations) == bool(listed or crowded)
    for form in ("* left of *", "* right of *", "* above *", "* below *"):
        assert told[form] > 3
    assert len(told) > 20


# That it can be learnt and scored


def scores(truth: COCO, detections: list[dict[str, Any]], kind: str) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        scoring = COCOeval(truth, truth.loadRes(detections), kind)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return np.asarray(scoring.stats)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_scoring_knows_the_crowds(root, kind):
    """All objects found, and each visible member of a crowd too, which is no false alarm."""
    truth = opened(root, "instances", "val")
    found: list[tuple[int, int, Any]] = []
    members = 0
    for scene, image, annotations in pictures(root, "val"):
        found += [
            (image["id"], item["category_id"], truth.annToRLE(item))
            for item in annotations
            if not item["iscrowd"]
        ]
        for item, mask in zip(scene.objects, visible_masks(scene), strict=True):
            if item.in_crowd and mask.any():
                rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                found.append((image["id"], CATEGORY_IDS[item.shape], rle))
                members += 1
    assert members > 20
    key, value = {
        "segm": ("segmentation", lambda rle: rle),
        "bbox": ("bbox", lambda rle: coco_mask.toBbox(rle).tolist()),
    }[kind]
    detections = [
        {"image_id": image, "category_id": category, "score": 1.0, key: value(rle)}
        for image, category, rle in found
    ]
    stats = scores(truth, detections, kind)
    # AP, and AP of small and medium objects; there are no large ones.
    assert (stats[0], stats[3], stats[4], stats[5]) == pytest.approx((1, 1, 1, -1))


def test_guesses_score_near_nothing(root):
    """Boxes of the right sizes, anywhere, of any class."""
    truth = opened(root, "instances", "val")
    known = list(opened(root, "instances", "train").anns.values())
    random = np.random.default_rng(0)
    guesses = []
    for image in truth.imgs.values():
        for _ in range(20):
            _, _, width, height = random.choice(known)["bbox"]
            left = random.uniform(0, max(1, image["width"] - width))
            top = random.uniform(0, max(1, image["height"] - height))
            guesses.append(
                {
                    "image_id": image["id"],
                    "category_id": int(random.choice(list(CATEGORY_IDS.values()))),
                    "bbox": [left, top, width, height],
                    "score": random.uniform(),
                }
            )
    assert scores(truth, guesses, "bbox")[1] < 0.02


# That it is the same everywhere, and nothing is twice


def test_bytes_do_not_depend_on_workers_place_or_count(tmp_path):
    one = contents(sample.make(tmp_path / "a", layout="coco", train=30, val=9))
    assert one == contents(sample.make(tmp_path / "b c", layout="coco", train=30, val=9, workers=3))
    more_root = sample.make(tmp_path, layout="coco", train=42, val=20)
    more = contents(more_root)
    shots = {name: data for name, data in one.items() if name.endswith(".jpg")}
    assert len(shots) == 39
    assert all(more[name] == data for name, data in shots.items())
    few = json.loads(one["annotations/instances_train2017.json"])
    many = json.loads(more["annotations/instances_train2017.json"])
    assert many["annotations"][: len(few["annotations"])] == few["annotations"]
    other = contents(sample.make(tmp_path, layout="coco", train=30, val=9, seed=1))
    assert not set(shots.values()) & set(other.values())


def test_held_out_pictures_are_no_training_pictures(root):
    shots = [path.read_bytes() for path in root.rglob("*.jpg")]
    assert len(set(shots)) == len(shots) == TRAIN + VAL
    seen = {(item.shape, item.centre) for s, _, _ in pictures(root, "train") for item in s.objects}
    new = {(item.shape, item.centre) for s, _, _ in pictures(root, "val") for item in s.objects}
    assert new and not seen & new


def test_a_complete_set_is_used_again(tmp_path):
    options = {"layout": "coco", "train": 4, "val": 2, "size": 64}
    made = sample.make(tmp_path, **options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert sample.make(tmp_path, **options) == made
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (made / "annotations" / "captions_val2017.json").unlink()
    with pytest.raises(UserError, match=r"annotations should hold 4 files and holds 3"):
        sample.make(tmp_path, **options)


@pytest.mark.parametrize("size", [32, (640, 480), (33, 150)])
def test_other_sizes(tmp_path, size):
    made = sample.make_at(tmp_path, layout="coco", train=20, val=20, size=size)
    coco = opened(made, "instances", "train")
    assert len(coco.anns) > 30
    long, short = (max(size), min(size)) if isinstance(size, tuple) else (size, size)
    for image in coco.imgs.values():
        assert sorted((image["width"], image["height"])) == [short, long]
    for item in coco.anns.values():
        assert coco.annToMask(item).sum() == item["area"] >= 8


def test_command_makes_it(tmp_path, capsys):
    out = tmp_path / "set"
    assert main(["--layout=coco", "--out", str(out), "--train=6", "--val=3", "--size=48x40"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(out),
        "    annotations/         4 files",
        "    train2017/           6 files",
        "    val2017/             3 files",
    ]
    assert contents(out) == contents(
        sample.make(tmp_path, layout="coco", train=6, val=3, size=(48, 40))
    )
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "4000 for imagenet, 1000 for coco" in text
    assert "224x224 for imagenet, 160x128 for coco" in text
