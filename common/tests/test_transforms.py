"""Images, boxes and mask outlines go through the same geometry."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from pycocotools import mask as mask_utils

from zoo_common.detection.bitmasks import Masks
from zoo_common.detection.masks import polygons_to_edges, rle_to_edges
from zoo_common.detection.transforms import (
    RandomCrop,
    RandomFlip,
    RandomJitter,
    RandomResize,
    Sample,
    check_sides,
    clip_boxes,
    crop,
    drop_empty,
    flip,
    jitter,
    outline_box,
    resize,
    resize_image,
    shortest_edge_size,
)
from zoo_common.errors import UserError


def smooth(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Blurred noise, since white noise has no grey level in the middle of two others."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)


def triangle(*points: float) -> tuple[list[NDArray[np.float64]], list[NDArray[np.int64]]]:
    edges, rings = polygons_to_edges([list(points)])
    return [edges], [rings]


@pytest.fixture
def sample() -> Sample:
    edges, rings = triangle(10, 5, 30, 5, 10, 25)
    return Sample(smooth(48, 64), np.array([[10.0, 5, 30, 25]]), np.array([3]), edges, rings)


# ---------------------------------------------------------------------------- resize


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((480, 640), 800, (800, 1067)),  # 1066.67 is rounded
        ((640, 480), 800, (1067, 800)),
        ((480, 480), 640, (640, 640)),
        ((427, 640), 800, (800, 1199)),
        ((300, 640), 800, (625, 1333)),  # the long side decides
        ((640, 300), 800, (1333, 625)),
        ((1, 5000), 800, (1, 1333)),
        ((123, 456), 0, (123, 456)),
        ((3, 5), 0, (3, 5)),
        ((2, 5), 1, (1, 3)),  # 2.5 is rounded up
    ],
)
def test_size_by_the_short_side(
    size: tuple[int, int], short: int, expected: tuple[int, int]
) -> None:
    assert shortest_edge_size(*size, short, 1333) == expected


@pytest.mark.parametrize("size", [(800, 1067), (704, 939), (640, 853), (240, 320), (100, 133)])
def test_the_quick_resize_is_pillows_but_for_one_grey_level(size: tuple[int, int]) -> None:
    image = smooth(480, 640)
    pillow = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    expected = np.asarray(pillow).astype(int)
    assert np.array_equal(resize_image(image, *size, exact=True), expected)
    gap = np.abs(resize_image(image, *size) - expected)
    assert gap.max() <= 1
    assert (gap > 0).mean() < 0.01


def test_resize_scales_each_axis_by_itself(sample: Sample) -> None:
    result = resize(sample, 96, 65)
    assert result.image_HWC.shape == (96, 65, 3)
    x, y = 65 / 64, 2.0
    np.testing.assert_array_equal(result.boxes_N4, [[10 * x, 5 * y, 30 * x, 25 * y]])
    assert result.edges is not None and sample.edges is not None
    np.testing.assert_array_equal(result.edges[0], sample.edges[0] * [x, y, x, y])
    assert sample.boxes_N4[0, 0] == 10  # a new sample: the old one may belong to the data set
    assert resize(sample, 48, 64) is sample


def test_flip_turns_everything_around(sample: Sample) -> None:
    result = flip(resize(sample, 96, 128))
    plain = resize(sample, 96, 128).image_HWC
    assert np.array_equal(result.image_HWC, plain[:, ::-1])
    np.testing.assert_array_equal(result.boxes_N4, [[128 - 60, 10, 128 - 20, 50]])
    assert result.edges is not None
    np.testing.assert_array_equal(
        result.edges[0], [[108, 10, 68, 10], [68, 10, 108, 50], [108, 50, 108, 10]]
    )
    twice = flip(result)
    np.testing.assert_array_equal(twice.boxes_N4, resize(sample, 96, 128).boxes_N4)
    assert np.array_equal(twice.image_HWC, plain)


def test_boxes_are_clipped_and_empty_objects_dropped() -> None:
    boxes = [[-5, -5, 10, 10], [50, 40, 70, 60], [64, 0, 80, 9], [5, 5, 5, 9], [1, 1, 1.000005, 2]]
    sample = Sample(smooth(48, 64), np.array(boxes, float), np.arange(5))
    result = drop_empty(clip_boxes(sample))
    np.testing.assert_array_equal(result.boxes_N4, [[0, 0, 10, 10], [50, 40, 64, 48]])
    np.testing.assert_array_equal(result.labels_N, [0, 1])


def test_an_object_without_outline_has_no_mask_to_learn(sample: Sample) -> None:
    assert sample.edges is not None and sample.rings is not None
    two = sample._replace(
        boxes_N4=np.repeat(sample.boxes_N4, 2, axis=0),
        labels_N=np.array([1, 2]),
        edges=[np.zeros((0, 4)), *sample.edges],
        rings=[np.zeros(0, np.int64), *sample.rings],
    )
    result = drop_empty(two)
    assert result.labels_N.tolist() == [2]
    assert result.edges is not None and len(result.edges) == 1
    np.testing.assert_array_equal(result.edges[0], sample.edges[0])
    assert len(drop_empty(two._replace(edges=None, rings=None)).labels_N) == 2


# ---------------------------------------------------------------------------- crop


def test_crop_moves_cuts_and_drops(sample: Sample) -> None:
    far = Sample(
        sample.image_HWC,
        np.array([[10.0, 5, 30, 25], [40, 30, 60, 40]]),
        np.array([3, 4]),
    )
    result = crop(far, 10, 15, 20, 20)
    assert np.array_equal(result.image_HWC, sample.image_HWC[10:30, 15:35])
    np.testing.assert_array_equal(result.boxes_N4, [[0, 0, 15, 15]])
    assert result.labels_N.tolist() == [3]


def test_the_box_of_a_cropped_outline_is_that_of_what_is_left(sample: Sample) -> None:
    result = crop(sample, 10, 15, 20, 20)
    # The hypotenuse x + y = 35 meets the window at (25, 10) and (15, 20).
    np.testing.assert_allclose(result.boxes_N4, [[0, 0, 10, 10]], atol=1e-12)
    assert result.edges is not None
    np.testing.assert_array_equal(result.edges[0][0], [-5, -5, 15, -5])
    # The box reaches into this window, the triangle does not.
    assert len(crop(sample, 20, 20, 20, 20).labels_N) == 0
    assert len(crop(sample._replace(edges=None, rings=None), 20, 20, 20, 20).labels_N) == 1


def test_masks_go_where_their_image_goes(sample: Sample) -> None:
    """One mask is that of the image's bright pixels, before and after."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[6:26, 10:30] = 255
    mask = (image[..., 0] > 0).astype(np.uint8)
    masks = Masks.of([mask, np.eye(48, 64, -44, np.uint8)], 48, 64)
    boxes = np.array([[10.0, 6, 30, 26], [0, 40, 9, 48]])
    sample = Sample(image, boxes, np.array([3, 4]), masks=masks)
    counts = []
    for change in (
        lambda sample: sample,
        lambda sample: resize(sample, 96, 192),
        flip,
        lambda sample: flip(crop(sample, 0, 5, 48, 59)),
        lambda sample: crop(sample, 0, 0, 30, 40),
        lambda sample: crop(flip(resize(sample, 24, 32)), 0, 10, 20, 22),
    ):
        changed = change(sample)
        assert changed.masks is not None
        found = changed.masks.moments()
        assert len(found) == len(changed.labels_N) == len(changed.boxes_N4)
        bright_y, bright_x = np.nonzero(changed.image_HWC[..., 0] > 127)
        expected = [len(bright_x), bright_x.sum(), bright_y.sum()]
        np.testing.assert_allclose(found[0], expected, rtol=0.02)
        counts.append(len(found))
    assert counts == [2, 2, 2, 1, 1, 1]  # the second's box, or its mask, is not in the window
    assert drop_empty(sample) is sample
    empty = Masks.of([np.zeros((48, 64), np.uint8), mask], 48, 64)
    kept = drop_empty(sample._replace(masks=empty))
    assert kept.labels_N.tolist() == [4] and kept.masks is not None
    assert kept.masks.moments()[:, 0].tolist() == [400]


def test_an_object_whose_mask_the_resize_skips_is_dropped() -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 33] = 1
    masks = Masks.of([mask, 1 - mask], 48, 64)
    boxes = np.array([[33.0, 0, 34, 48], [0, 0, 64, 48]])
    sample = Sample(smooth(48, 64), boxes, np.array([5, 6]), masks=masks)
    assert drop_empty(resize(sample, 96, 128)).labels_N.tolist() == [5, 6]
    assert drop_empty(resize(sample, 24, 32)).labels_N.tolist() == [6]
    assert drop_empty(resize(sample._replace(masks=None), 24, 32)).labels_N.tolist() == [5, 6]


def box_of(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    y, x = np.nonzero(mask)
    if len(x) == 0:
        return np.zeros(4)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], float)


def covered(polygons: list[NDArray[np.float64]], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points (..., 2) lie in any of the polygons, by counting the edges above."""
    x, y = points[..., 0, None], points[..., 1, None]
    result = np.zeros(points.shape[:-1], bool)
    for polygon in polygons:
        (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
        spans = (x0 <= x) != (x1 <= x)
        above = y0 + (x - x0) / (x1 - x0) * (y1 - y0) < y
        result |= (spans & above).sum(axis=-1) % 2 == 1
    return result


def test_outline_boxes_are_those_of_the_covered_points() -> None:
    """Against a grid of points: stars that cross themselves, overlaps, partly outside."""
    side, fine = 16, 20
    grid = np.stack(np.meshgrid(*[(np.arange(side * fine) + 0.5) / fine] * 2), axis=-1)
    gaps = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        polygons = [rng.uniform(-12, 28, (rng.integers(3, 9), 2)) for _ in range(1 + seed % 2)]
        expected = box_of(covered(polygons, grid)) / fine
        edges, rings = polygons_to_edges([polygon.reshape(-1).tolist() for polygon in polygons])
        box = outline_box(edges, rings, side, side)
        if expected.any():
            outwards = np.concatenate([expected[:2] - box[:2], box[2:] - expected[2:]])
            assert outwards.min() > -1 / fine
            gaps.extend(outwards)  # tips between the points
    assert len(gaps) > 150
    assert np.quantile(np.abs(gaps), 0.95) < 2 / fine


def test_the_box_of_an_outline_with_thousands_of_edges() -> None:
    angle = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    circle = np.stack([14 + 5 * np.cos(angle), 8 + 5 * np.sin(angle)], axis=1)
    edges, rings = polygons_to_edges([circle.reshape(-1).tolist()])
    np.testing.assert_allclose(outline_box(edges, rings, 16, 16), [9, 3, 16, 13], atol=1e-5)
    np.testing.assert_allclose(outline_box(edges, rings, 99, 99), [9, 3, 19, 13], atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools with numpy 2
@pytest.mark.parametrize("seed", range(10))
def test_outline_boxes_of_run_lengths_are_exact(seed: int) -> None:
    mask = np.random.default_rng(seed).random((30, 40)) < 0.02
    mask[8:20, 10:14] = True
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    edges, rings = rle_to_edges(rle, 30, 40)
    top, left, height, width = 9, 7 + seed, 6, 11  # the border of the bar is above and below
    window = mask[top : top + height, left : left + width]
    moved = edges - [left, top, left, top]
    np.testing.assert_array_equal(outline_box(moved, rings, height, width), box_of(window))


# ---------------------------------------------------------------------------- colours


def test_jitter_is_pillows(sample: Sample) -> None:
    image = Image.fromarray(sample.image_HWC)
    expected = ImageEnhance.Color(
        ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.3)).enhance(0.6)
    ).enhance(1.7)
    result = jitter(sample, 1.3, 0.6, 1.7)
    assert np.array_equal(result.image_HWC, np.asarray(expected))
    assert result.boxes_N4 is sample.boxes_N4
    assert jitter(sample, 1, 1, 1) is sample


# ---------------------------------------------------------------------------- draws


def test_random_resize_draws_from_choices_or_a_range(sample: Sample) -> None:
    random.seed(0)
    choice = {RandomResize([24, 36, 96], 100)(sample).size for _ in range(60)}
    assert choice == {(24, 32), (36, 48), (75, 100)}
    between = {RandomResize([24, 28], 100, sampling="range")(sample).size[0] for _ in range(99)}
    assert between == {24, 25, 26, 27, 28}


def test_random_flip_and_crop_draw_from_python(sample: Sample) -> None:
    random.seed(0)
    assert RandomFlip(0)(sample) is sample
    assert np.array_equal(RandomFlip(1)(sample).image_HWC, sample.image_HWC[:, ::-1])
    seen = [RandomFlip(0.5)(sample) is sample for _ in range(200)]
    assert 70 < sum(seen) < 130
    sizes = np.array([RandomCrop(0.5, 0.25)(sample).size for _ in range(300)])
    assert sizes.min(axis=0).tolist() == [24, 16]
    assert sizes.max(axis=0).tolist() == [48, 64]
    assert RandomCrop(1, 1)(sample).size == (48, 64)


def test_random_jitter_stays_in_its_strength(sample: Sample) -> None:
    grey = sample._replace(image_HWC=np.full((4, 4, 3), 100, np.uint8))
    values = {int(RandomJitter(0.2, 0, 0)(grey).image_HWC[0, 0, 0]) for _ in range(200)}
    assert min(values) < 85 and max(values) > 115
    assert values <= set(range(80, 121))
    assert RandomJitter(0, 0, 0)(grey) is grey


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomResize([640, 672, 704], 1333, sampling="range"), "'range' and the lowest"),
        (lambda: RandomResize([640], 1333, sampling="chance"), "by 'chance'"),
        (lambda: RandomResize([], 1333), r"short sides \[\]"),
        (lambda: RandomResize([0], 1333), r"short sides \[0\]"),
        (lambda: check_sides([640], 0), "longest side 0"),
        (lambda: RandomFlip(1.5), "flip=1.5"),
        (lambda: RandomCrop(0, 0.5), "a crop to 0"),
        (lambda: RandomJitter(0.1, -1, 0), "negative"),
    ],
)
def test_values_out_of_range_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_any_array_that_numpy_makes_of_an_image_will_do(sample: Sample) -> None:
    """Read-only, reversed and transposed memory: torch refuses or warns of each."""
    image = sample.image_HWC
    expected = flip(resize(sample, 96, 128)).image_HWC
    frozen = image.copy()
    frozen.flags.writeable = False
    by_channel = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
    for same in (frozen, image[:, ::-1].copy()[:, ::-1], by_channel):
        result = flip(resize(sample._replace(image_HWC=same), 96, 128))
        assert np.array_equal(result.image_HWC, expected)
    assert torch.from_numpy(expected).dtype == torch.uint8
