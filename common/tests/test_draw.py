"""Drawing of detections, looked at through pixels."""

import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from zoo_common.detection.draw import (
    class_colour,
    draw_detections,
)

# What pycocotools' decode() says with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GREY = (100, 100, 100)
COCO = ("person", "bicycle", "car", "dog", "traffic light", "stop sign", "dining table", "vase")


def canvas(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def drawn(image: Image.Image, *args: Any, **options: Any) -> np.ndarray:
    return np.asarray(draw_detections(image, *args, **options))


def changed(pixels: np.ndarray) -> np.ndarray:
    return (pixels != GREY).any(axis=2)


def rle(mask: np.ndarray) -> dict[str, Any]:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


# Drawing


def test_box_is_drawn_in_the_class_colour_and_nothing_else_is():
    before = canvas(400, 300)
    pixels = drawn(before, np.array([[100.0, 80.0, 300.0, 250.0]]), ["dog"], [0.9])
    colour = class_colour("dog")
    for x, y in ((100, 150), (299, 150), (200, 249)):
        assert tuple(pixels[y, x]) == colour
    # The label stands on top of the box, at its left.
    touched = changed(pixels)
    rows, columns = np.nonzero(touched)
    assert (columns.min(), columns.max(), rows.max()) == (100, 299, 249)
    assert 50 < rows.min() < 75
    assert not touched[90:240, 110:290].any()
    assert not touched[: rows.min()].any()
    assert before.getcolors() == [(400 * 300, GREY)], "the given picture stays as it is"


def test_masks_are_translucent_and_stay_in_their_boxes():
    mask = np.zeros((2, 300, 400), dtype=bool)
    mask[0, 120:200, 130:220] = True
    mask[1] = True
    boxes = np.array([[100.0, 80.0, 300.0, 250.0], [310.0, 200.0, 380.0, 280.0]])
    plain = drawn(canvas(400, 300), boxes, ["dog", "car"], [0.9, 0.8])
    pixels = drawn(canvas(400, 300), boxes, ["dog", "car"], [0.9, 0.8], mask)
    differs = (plain != pixels).any(axis=2)
    wanted = mask[0].copy()
    wanted[200:280, 310:380] = True
    assert not (differs & ~wanted).any()
    assert differs[120:200, 130:220].all()
    assert differs[225:270, 320:370].all()
    for place, label in (((150, 150), "dog"), ((250, 350), "car")):
        mixed, colour = pixels[place].astype(int), np.array(class_colour(label))
        share = (mixed - 100) / (colour - 100)
        assert share == pytest.approx(0.45, abs=0.05)


def test_frames_may_be_left_out():
    mask = np.zeros((1, 300, 400), dtype=bool)
    mask[0, 150:200, 150:200] = True
    box = np.array([[100.0, 80.0, 300.0, 250.0]])
    framed = changed(drawn(canvas(400, 300), box, ["dog"], [0.9], mask))
    plain = changed(drawn(canvas(400, 300), box, ["dog"], [0.9], mask, frames=False))
    assert framed[150, 100] and not plain[150, 100]
    assert plain[79].any(), "the label stands where the box would have been"
    assert plain[80:].sum() == 50 * 50


def test_run_lengths_draw_what_arrays_draw():
    random = np.random.default_rng(0)
    masks = random.random((3, 120, 200)) < 0.5
    boxes = np.array([[10.2, 20.7, 90.1, 100.9], [50, 30, 250, 90], [-20, -5, 30, 200]])
    labels, scores = ["dog", "car", "vase"], [0.6, 0.9, 0.7]
    arrays = drawn(canvas(200, 120), boxes, labels, scores, masks)
    lists = drawn(canvas(200, 120), boxes, labels, scores, [rle(mask) for mask in masks])
    lazy = drawn(canvas(200, 120), boxes, labels, scores, (rle(mask) for mask in masks))
    assert (arrays == lists).all() and (arrays == lazy).all()


def test_low_scores_are_left_out_and_the_surest_is_on_top():
    boxes = np.array([[20.6, 40.6, 179.4, 109.4]] * 3)
    masks = np.ones((3, 120, 200), dtype=bool)
    labels = ["dog", "car", "vase"]
    two = drawn(canvas(200, 120), boxes, labels, [0.9, 0.5, 0.49], masks)
    same = drawn(canvas(200, 120), boxes[:2], labels[:2], [0.9, 0.5], masks[:2])
    assert (two == same).all()
    # Every pixel that a box touches belongs to it, and a score at the threshold is enough.
    lower = changed(drawn(canvas(200, 120), boxes[:1], ["dog"], [0.5], masks[:1]))[60:]
    rows, columns = np.nonzero(lower)
    assert (columns.min(), columns.max(), rows.max()) == (20, 179, 49)
    all_three = drawn(canvas(200, 120), boxes, labels, [0.9, 0.5, 0.49], masks, score_threshold=0.2)
    assert (two != all_three).any()
    assert tuple(all_three[109, 100]) == class_colour("dog")
    assert tuple(drawn(canvas(200, 120), boxes, labels, [0.5, 0.6, 0.7])[109, 100]) == (
        class_colour("vase")
    )
    assert not changed(drawn(canvas(200, 120), boxes, labels, [0.1] * 3, masks)).any()


def test_colours_belong_to_names_and_differ():
    first = drawn(canvas(300, 200), np.array([[20.0, 50, 90, 90]]), ["dog"], [0.9])
    other = drawn(canvas(300, 200), np.array([[20.0, 50, 90, 90]] * 2), ["car", "dog"], [0.5, 0.9])
    assert tuple(first[89, 50]) == tuple(other[89, 50]) == class_colour("dog")
    colours = [class_colour(name) for name in COCO]
    assert len(set(colours)) == len(COCO)
    assert class_colour("dog") == (245, 61, 165), "stable from version to version"


@pytest.mark.parametrize("size", [(24, 16), (64, 48), (160, 128), (640, 480), (4000, 3000)])
def test_labels_are_readable_at_any_size(size):
    """The text takes a part of the picture that can be read, and stands inside it."""
    width, height = size
    box = np.array([[0.7 * width, 0.6 * height, 0.95 * width, 0.9 * height]])
    pixels = drawn(canvas(*size), box, ["dog"], [0.9])
    colour = class_colour("dog")
    filled = (pixels == colour).all(axis=2)
    written = ((pixels != colour) & (pixels != GREY)).any(axis=2) & changed(pixels)
    rows, columns = np.nonzero(written)
    assert len(rows) > 10, "there is text"
    high = rows.max() - rows.min() + 1
    assert max(5, 0.012 * min(size)) < high < max(13, 0.06 * min(size))
    assert filled[rows.min() : rows.max(), columns.min() : columns.max()].any()
    if size != (24, 16):
        assert columns.max() < width - 1, "it is whole"


@pytest.mark.parametrize("sure", [0, 1])
def test_labels_do_not_cover_each_other(sure):
    boxes = np.array([[40.0, 60.0, 200.0, 150.0], [42.0, 60.0, 190.0, 140.0]])
    labels = ["dog", "vase"]
    both = drawn(canvas(300, 200), boxes, labels, [0.9 - 0.1 * sure, 0.8 + 0.1 * sure])
    for k in range(2):
        alone = drawn(canvas(300, 200), boxes[k : k + 1], labels[k : k + 1], [0.9])
        label = (alone == class_colour(labels[k])).all(axis=2)
        again = (both == class_colour(labels[k])).all(axis=2)
        assert again.sum() > 0.85 * label.sum()
        # The surest one has the place that it would have alone.
        assert (again[label].mean() > 0.9) == (k == sure)


@pytest.mark.parametrize(
    "box",
    [
        [-50.0, -50.0, 20.0, 20.0],
        [-10.0, -10.0, 500.0, 500.0],
        [299.5, 199.5, 300.0, 200.0],
        [50.0, 50.0, 50.0, 50.0],
        [400.0, 300.0, 450.0, 350.0],
    ],
)
def test_boxes_beyond_the_picture(box):
    masks = np.ones((1, 200, 300), dtype=bool)
    pixels = drawn(canvas(300, 200), np.array([box]), ["dog"], [0.9], masks)
    assert pixels.shape == (200, 300, 3)
    assert changed(pixels).any()


def test_nothing_found_and_other_modes():
    nothing = np.zeros((0, 4))
    assert not changed(drawn(canvas(30, 20), nothing, [], [], np.zeros((0, 20, 30), bool))).any()
    assert not changed(drawn(canvas(30, 20), nothing, [], [], [])).any()
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        picture = Image.new(mode, (60, 50))
        result = draw_detections(picture, np.array([[5.0, 30, 50, 45]]), ["dog"], [0.9])
        assert (result.mode, result.size) == ("RGB", (60, 50))
    strange = "a small\nred  dog é 犬"
    assert changed(drawn(canvas(300, 90), np.array([[5.0, 60, 50, 85]]), [strange], [0.9])).any()


def test_a_hundred_masks_of_a_large_picture_are_quick():
    random = np.random.default_rng(0)
    image = canvas(4000, 3000)
    corners = random.uniform(0, 1, (100, 2)) * (3200, 2200)
    boxes = np.concatenate([corners, corners + random.uniform(200, 800, (100, 2))], axis=1)
    runs = []
    for left, top, right, bottom in boxes.astype(int).tolist():
        outside = [left * 3000 + top] + [bottom - top, 3000 - bottom + top] * (right - left)
        outside[-1] = 4000 * 3000 - sum(outside[:-1])
        runs.append({"size": [3000, 4000], "counts": outside})
    masks = coco_mask.frPyObjects(runs, 3000, 4000)
    labels, scores = [f"class {k}" for k in range(100)], random.uniform(0.5, 1, 100)
    draw_detections(canvas(64, 64), boxes[:1] / 64, labels[:1], scores[:1])
    start = time.process_time()
    pixels = drawn(image, boxes, labels, scores, masks)
    assert time.process_time() - start < 4
    assert changed(pixels).mean() > 0.5
