"""Masks that follow their image are those of the original's way, which draws each in full."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zoo_common.detection.bitmasks import Masks
from zoo_common.detection.coco import CocoIndex, open_index

Pixels = NDArray[np.uint8]


def nearest(old: int, new: int) -> list[int]:
    """The pixels that OpenCV's INTER_NEAREST takes."""
    return [min(int(np.floor(x * (1 / (new / old)))), old - 1) for x in range(new)]


def quarter(mask: Pixels, height: int, width: int) -> Pixels:
    """A mask padded to a size and brought to a quarter of it, (height / 4, width / 4)."""
    padded = np.zeros((height, width))
    padded[: mask.shape[0], : mask.shape[1]] = mask
    blocks = padded.reshape(height // 4, 4, width // 4, 4)
    return (blocks[:, 1:3, :, 1:3].mean(axis=(1, 3)) >= 0.5).astype(np.uint8)


def draw(masks: Masks, height: int, width: int) -> Pixels:
    quarters = np.zeros((masks.objects, height // 4, width // 4), np.uint8)
    masks.write_quarters(quarters)
    return quarters


def check(masks: Masks, full: list[Pixels]) -> None:
    """Compares quarters, for paddings of two sizes, and moments with those of pixels."""
    height, width = full[0].shape
    for more in (0, 32):
        padded = -(-height // 32) * 32 + more, -(-width // 32) * 32 + more
        expected = [quarter(mask, *padded) for mask in full]
        np.testing.assert_array_equal(draw(masks, *padded), expected)
    y, x = np.mgrid[:height, :width]
    moments = [(mask.sum(), (mask * x).sum(), (mask * y).sum()) for mask in full]
    np.testing.assert_array_equal(masks.moments(), moments)


def random_mask(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Nothing, noise, or a box with holes that may be a pixel or the whole image."""
    share = rng.choice([0, 0.002, 0.3, 0.8, 1])
    mask = (rng.random((height, width)) < share).astype(np.uint8)
    if rng.random() < 0.7:
        (top, bottom), (left, right) = (
            np.sort(rng.integers(0, side + 1, 2)) for side in (height, width)
        )
        outside = np.ones((height, width), bool)
        outside[top:bottom, left:right] = False
        mask[outside] = 0
    return mask


@pytest.mark.parametrize("seed", range(40))
def test_any_chain_of_transforms_is_that_of_full_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 90, 2).tolist()
    full = [random_mask(rng, height, width) for _ in range(6)]
    masks = Masks.of(full, height, width)
    check(masks, full)
    for step in rng.integers(0, 4, 4):
        height, width = full[0].shape
        if step == 0:
            size = rng.integers(1, 150, 2).tolist()
            masks = masks.resize(*size)
            rows, columns = nearest(height, size[0]), nearest(width, size[1])
            full = [mask[rows][:, columns] for mask in full]
        elif step == 1:
            masks = masks.flip()
            full = [mask[:, ::-1] for mask in full]
        elif step == 2:
            top, left = int(rng.integers(height)), int(rng.integers(width))
            size = [int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))]
            masks = masks.crop(top, left, *size)
            full = [mask[top : top + size[0], left : left + size[1]] for mask in full]
        else:
            keep = rng.random(len(full)) < 0.9
            keep[0] = True
            masks = masks.select(keep)
            full = [mask for mask, kept in zip(full, keep, strict=True) if kept]
        check(masks, full)


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        (3, 7, {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2}),
        (7, 3, {0: 0, 1: 2, 2: 4}),
        # Places where the quotient is whole, and rounding decides.
        (612, 939, {312: 203, 313: 203, 314: 204, 626: 407, 938: 611}),
        (500, 1066, {532: 249, 533: 249, 534: 250}),
        (480, 704, {0: 0, 22: 15, 44: 30, 352: 240, 703: 479}),
    ],
)
@pytest.mark.parametrize("upright", [True, False])
def test_resize_takes_the_pixels_that_opencv_4_and_5_take(
    old: int, new: int, taken: dict[int, int], upright: bool
) -> None:
    for place, source in taken.items():
        mask = np.zeros((old, 1), np.uint8)
        mask[source] = 1
        size = (new, 1) if upright else (1, new)
        mask = mask if upright else mask.T
        resized = Masks.of([mask], *mask.shape).resize(*size)
        cut = resized.crop(place, 0, 1, 1) if upright else resized.crop(0, place, 1, 1)
        assert cut.moments().tolist() == [[1, 0, 0]], place


def test_a_quarter_needs_two_of_the_four_pixels_in_the_middle() -> None:
    for number in range(1 << 4):
        mask = np.ones((4, 4), np.uint8)
        mask[1:3, 1:3] = [[number & 1, number >> 1 & 1], [number >> 2 & 1, number >> 3]]
        drawn = draw(Masks.of([mask, 1 - mask], 4, 4), 4, 4)
        ones = number.bit_count()
        assert drawn.ravel().tolist() == [ones >= 2, ones <= 2]


def test_a_mask_that_the_quarter_misses_has_a_centre() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[8, :] = 1  # the first row of a block
    masks = Masks.of([mask], 20, 30)
    assert masks.moments().tolist() == [[30, 29 * 30 / 2, 8 * 30]]
    assert not draw(masks, 32, 32).any()
    drawn = draw(masks.crop(7, 0, 13, 30), 32, 32)[0]  # now it is the second
    assert np.argwhere(drawn).tolist() == [[0, x] for x in range(7)]


def test_centres_are_exact_where_float32_is_not() -> None:
    """Sums of millions of places; the largest side of a recipe is 1333."""
    height, width = 5000, 4000
    runs = np.zeros((width, 4), np.int64)
    runs[:, 1], runs[:, 3] = np.arange(width), height - 1
    moments = Masks.of_runs(runs, 1, height, width).moments()
    assert moments.tolist() == [
        [
            width * (height - 1),
            (height - 1) * (width * (width - 1) // 2),
            width * ((height - 1) * (height - 2) // 2),
        ]
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda masks: masks.select(np.zeros(1, bool)),
        lambda masks: masks.crop(0, 0, 3, 3),
    ],
)
def test_nothing_is_drawn_of_nothing(change: Callable[[Masks], Masks]) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[4:7, 4:7] = 1
    nothing = change(Masks.of([mask], 8, 8))
    assert nothing.moments().tolist() == [[0, 0, 0]] * nothing.objects
    assert not draw(nothing, 32, 32).any()
    empty = Masks.of([], 8, 8).resize(16, 16).flip()
    assert empty.moments().shape == (0, 3) and draw(empty, 32, 32).shape == (0, 8, 8)


# ---------------------------------------------------------------------------- of annotations

HEIGHT, WIDTH = 40, 60
SQUARE = [5.0, 6.0, 15.0, 6.0, 15.0, 16.0, 5.0, 16.0]


def index_of(directory: Path, *segmentations: Any, masks: bool = False) -> CocoIndex:
    """One image with these objects; those of a tuple are crowd regions."""
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {
                "id": number,
                "image_id": 1,
                "category_id": 3,
                "bbox": [5, 6, 10, 10],
                "iscrowd": int(isinstance(segmentation, tuple)),
                "segmentation": segmentation[0]
                if isinstance(segmentation, tuple)
                else segmentation,
            }
            for number, segmentation in enumerate(segmentations, start=1)
        ],
        "categories": [{"id": 3, "name": "car"}],
    }
    (directory / "instances.json").write_text(json.dumps(content))
    return open_index(directory / "instances.json", None, masks=masks, cache=directory)


def masks_of(index: CocoIndex) -> Masks:
    return Masks.of_runs(index.mask_runs(0), len(index.objects(0).ids_N), HEIGHT, WIDTH)


def test_what_has_no_outline_has_no_mask_and_a_union_counts_a_pixel_once(tmp_path: Path) -> None:
    inside = [8.0, 9.0, 12.0, 9.0, 12.0, 13.0]
    rle = {"size": [HEIGHT, WIDTH], "counts": [6, 0, 0, 2, 0, 3, HEIGHT * WIDTH - 11]}
    segmentations = [
        None,
        [[1, 1, 9, 9], SQUARE, inside, SQUARE[:-1]],
        (rle,),
        [[70, 5, 90, 5, 80, 20]],
        rle,
        {"size": [3, 3], "counts": [4, 5]},
    ]
    moments = masks_of(index_of(tmp_path, *segmentations)).moments()
    assert moments[:, 0].tolist() == [0, 100, 0, 0, 5, 0]
    assert moments[1].tolist() == [100, 950, 1050]
    assert moments[4].tolist() == [5, 0, 6 + 7 + 8 + 9 + 10]
    kept = masks_of(index_of(tmp_path, *segmentations, masks=True)).moments()
    assert kept[:, 0].tolist() == [100, 0, 0, 5]
    assert masks_of(index_of(tmp_path, (rle,))).moments().tolist() == [[0, 0, 0]]


def test_a_vertex_beyond_reason_costs_no_memory(tmp_path: Path) -> None:
    """Of such an edge pycocotools would make points that take gigabytes."""
    outlines = [[[5.0, 5.0, far, 5.0, far, 15.0, 5.0, 15.0]] for far in (1e4, 1e9, 1e300)]
    near, *others = masks_of(index_of(tmp_path, *outlines)).moments().tolist()
    assert near[0] == 10 * (WIDTH - 5)
    assert others == [near, near]
