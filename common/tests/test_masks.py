"""Outlines, training targets and pasted masks against pycocotools and the definition."""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.nn import functional as F

from zoo_common import device
from zoo_common.detection.masks import (
    paste,
    paste_rles,
    polygons_to_edges,
    rasterize_in_boxes,
    rle_to_edges,
    upsampled_rles,
)
from zoo_common.errors import UserError

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
RINGS = 4

pytestmark = [
    pytest.mark.device,
    # pycocotools' decode() under numpy 2; the zoo does not call it.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

Polygons = list[list[float]]

# ------------------------------------------------------------------------------------------------
# Training targets.


def expected(polygons: Polygons, box: np.ndarray, size: int) -> np.ndarray:
    """What detectron2's rasterize_polygons_within_box and pycocotools give."""
    if not polygons:
        return np.zeros((size, size), bool)
    scale = size / np.maximum(box[2:] - box[:2], 0.1)
    moved = [((np.reshape(p, (-1, 2)) - box[:2]) * scale).ravel().tolist() for p in polygons]
    rle = mask_utils.merge(mask_utils.frPyObjects(moved, size, size))
    mask: np.ndarray = mask_utils.decode(rle)
    return mask.astype(bool)


def stairs(rng: np.random.Generator) -> np.ndarray:
    """Edges that are horizontal and vertical in turn."""
    points = rng.integers(0, 60, (10, 2)).astype(float)
    points[1::2, 0] = points[0::2, 0]
    points[2::2, 1] = points[1:-1:2, 1]
    return points


SHAPES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "anywhere": lambda rng: rng.uniform(-10, 60, (rng.integers(3, 14), 2)),
    "whole pixels": lambda rng: rng.integers(-5, 60, (rng.integers(3, 14), 2)).astype(float),
    "halves": lambda rng: rng.integers(-10, 120, (rng.integers(3, 14), 2)) / 2,
    "tenths, on the rounding": lambda rng: rng.integers(-10, 600, (rng.integers(3, 14), 2)) / 10,
    "stairs": stairs,
    "points twice": lambda rng: np.repeat(rng.integers(0, 60, (5, 2)).astype(float), 2, axis=0),
    "there and back": lambda rng: rng.uniform(0, 60, (5, 2))[[0, 1, 2, 3, 2, 4]],
    "far outside": lambda rng: rng.uniform(-1000, 1000, (rng.integers(3, 14), 2)),
    "about a pixel": lambda rng: rng.uniform(0, 60, 2) + rng.uniform(-0.8, 0.8, (5, 2)),
}


def draw_boxes(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    kinds = [
        lambda: rng.uniform(-5, 60, 4),
        lambda: rng.integers(-5, 60, 4).astype(float),
        lambda: np.array([0.0, 0, size, size]),
        lambda: np.array([5.0, 7, 5 + 2 * size, 7 + 3 * size]),
        lambda: rng.integers(0, 240, 4) / 4,
        lambda: rng.uniform(-500, 500, 4),
        lambda: rng.integers(0, 60, 2).astype(float)[[0, 1, 0, 1]],
    ]
    boxes = np.array([kinds[n % len(kinds)]() for n in range(count)])
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    return np.concatenate([low, high], axis=1)


def pack(objects: list[Polygons], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Edges and rings in shuffled slots; what is in an empty slot must not matter."""
    outlines = [polygons_to_edges(polygons) for polygons in objects]
    slots = max(len(rings) for _, rings in outlines) + 3
    edges = rng.uniform(0, 60, (len(objects), slots, 4))
    edges[:, 0] = np.nan
    rings = np.full((len(objects), slots), -1)
    for number, (edge, ring) in enumerate(outlines):
        places = 1 + rng.permutation(slots - 1)[: len(ring)]
        edges[number, places], rings[number, places] = edge, ring
    return torch.from_numpy(edges), torch.from_numpy(rings)


def draw_objects(rng: np.random.Generator, count: int, shapes: list[str]) -> list[Polygons]:
    return [
        [SHAPES[rng.choice(shapes)](rng).ravel().tolist() for _ in range(rng.integers(0, RINGS))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [7, 28])
def test_targets_equal_pycocotools(shape: str, size: int) -> None:
    rng = np.random.default_rng(size)
    objects, boxes = draw_objects(rng, 350, [shape]), draw_boxes(rng, 350, size)
    edges, rings = pack(objects, rng)
    masks = rasterize_in_boxes(edges, rings, torch.from_numpy(boxes), size, ring_slots=RINGS)
    right = np.stack([expected(*pair, size) for pair in zip(objects, boxes, strict=True)])
    assert masks.dtype == torch.bool and right.any()
    np.testing.assert_array_equal(masks.numpy(), right)


def test_targets_in_float32_differ_in_rare_pixels() -> None:
    rng = np.random.default_rng(0)
    objects, boxes = draw_objects(rng, 700, list(SHAPES)), draw_boxes(rng, 700, 28)
    edges, rings = pack(objects, rng)
    single = (
        edges.float().to(DEVICE),
        rings.to(DEVICE),
        torch.from_numpy(boxes).float().to(DEVICE),
    )
    masks = rasterize_in_boxes(*single, 28, ring_slots=RINGS).cpu()
    exact = rasterize_in_boxes(edges, rings, torch.from_numpy(boxes), 28, ring_slots=RINGS)
    assert (masks != exact).double().mean() < 1e-4
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(DEVICE.type, dtype):
            assert torch.equal(rasterize_in_boxes(*single, 28, ring_slots=RINGS).cpu(), masks)


def test_targets_do_not_depend_on_slots_or_on_the_other_regions() -> None:
    rng = np.random.default_rng(1)
    count = 1200  # more than are worked on at a time
    objects, boxes = draw_objects(rng, count, ["anywhere"]), draw_boxes(rng, count, 28)
    edges, rings = pack(objects, rng)
    corners = torch.from_numpy(boxes)
    together = rasterize_in_boxes(edges, rings, corners, 28, ring_slots=RINGS)
    wider = F.pad(edges, (0, 0, 0, 100)), F.pad(rings, (0, 100), value=-1)
    assert torch.equal(rasterize_in_boxes(*wider, corners, 28, ring_slots=9), together)
    for some in (slice(0, 1), slice(701, 711), slice(count - 1, count)):
        part = (edges[some], rings[some], corners[some])
        assert torch.equal(rasterize_in_boxes(*part, 28, ring_slots=RINGS), together[some])
    none = rasterize_in_boxes(edges[:0], rings[:0], corners[:0], 28, ring_slots=RINGS)
    assert none.shape == (0, 28, 28)


def test_targets_never_read_the_device() -> None:
    """Tensors without values, which nothing can be read from."""
    edges = torch.empty((5, 9, 4), device="meta")
    rings = torch.empty((5, 9), dtype=torch.int64, device="meta")
    masks = rasterize_in_boxes(edges, rings, edges[:, 0], 14, ring_slots=2)
    assert masks.shape == (5, 14, 14) and masks.dtype == torch.bool


# ------------------------------------------------------------------------------------------------
# Edges.


def test_polygons_that_cover_nothing_are_left_out() -> None:
    triangle = [0.0, 0, 10, 0, 0, 10]
    edges, rings = polygons_to_edges([[1.0, 1, 2, 2], triangle, [0.0] * 7, [], triangle])
    assert edges.tolist() == [[0, 0, 10, 0], [10, 0, 0, 10], [0, 10, 0, 0]] * 2
    assert rings.tolist() == [0] * 3 + [1] * 3
    edges, rings = polygons_to_edges([])
    assert edges.shape == (0, 4) and rings.shape == (0,)


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = torch.from_numpy(rng.uniform(size=(1, 1, 5, 6)))
    return F.interpolate(noise, (height, width), mode="bilinear")[0, 0].numpy() > 0.5


def test_rle_outlines_give_the_mask_back() -> None:
    rng = np.random.default_rng(2)
    size = 40
    stripes = np.zeros((size, size), bool)
    stripes[:, 3:7] = True  # one run over four columns
    stripes[-5:, 7] = stripes[:5, 8] = True  # joined with its neighbours
    masks = [blobs(rng, size, size) for _ in range(20)]
    masks += [rng.random((size, size)) < 0.5, stripes, stripes & False, stripes | True]
    for mask in masks:
        rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
        steps = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=True))
        counts = np.diff(steps, prepend=0).tolist()
        texts = [rle["counts"], rle["counts"].decode(), [*counts, size**2 - sum(counts)]]
        for text in texts:
            edges, rings = rle_to_edges({"size": [size, size], "counts": text}, size, size)
            assert (rings == 0).all() and len(rings) == len(edges)
            whole = torch.tensor([[0.0, 0, size, size]])
            batch = (torch.from_numpy(edges)[None].float(), torch.from_numpy(rings)[None], whole)
            back = rasterize_in_boxes(*batch, size, ring_slots=1)[0]
            np.testing.assert_array_equal(back.numpy(), mask)


def test_rle_outlines_join_neighbouring_columns() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 10:25] = 1
    edges, _ = rle_to_edges(mask_utils.encode(np.asfortranarray(mask)), 20, 30)
    assert edges.tolist() == [[10, 4, 25, 4], [10, 9, 25, 9]]


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [20, 30], "counts": [600]}, r"size \[20, 30\], but its image is 30 x 20"),
        ({"counts": [600]}, "size None"),
        ({"size": [30, 20], "counts": [100, 100]}, "do not add up"),
        ({"size": [30, 20], "counts": [700, -100]}, "is broken"),
        ({"size": [30, 20], "counts": b"12"}, "is broken"),
        ({"size": [30, 20], "counts": "a_very_long_and_wrong_text"}, "is broken"),
        ({"size": [30, 20], "counts": 5}, "is broken"),
        ({"size": [30, 20]}, "is broken"),
    ],
)
def test_broken_rles_are_refused(rle: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rle_to_edges(rle, 30, 20)


# ------------------------------------------------------------------------------------------------
# Pasting.

HEIGHT, WIDTH = 60, 90


def draw_masks(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    masks = F.interpolate(coarse, (28, 28), mode="bicubic").clamp(0, 1)[:, 0]
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT]) * 1.4
    corners = corners - 0.2 * torch.tensor([WIDTH, HEIGHT])
    return masks, torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def covered(mask: np.ndarray, box: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels are covered and which are too close to call, by the definition in float64."""
    side = len(mask)
    padded = np.pad(mask.astype(np.float64), 1)

    def weights(low: float, high: float, pixels: int) -> np.ndarray:
        at = (np.arange(pixels) + 0.5 - low) / (high - low) * side - 0.5
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(-1, side + 1)))

    x0, y0, x1, y1 = box
    values = weights(y0, y1, HEIGHT) @ padded @ weights(x0, x1, WIDTH).T
    return values >= threshold, np.abs(values - threshold) < 1e-4


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_pasted_masks_follow_the_definition(threshold: float) -> None:
    masks, boxes = draw_masks(80)
    pasted = paste(masks.to(DEVICE), boxes.to(DEVICE), HEIGHT, WIDTH, threshold).cpu().numpy()
    close_calls = 0
    for mask, box, got in zip(masks.numpy(), boxes.double().numpy(), pasted, strict=True):
        right, close = covered(mask, box, threshold)
        close_calls += close.sum()
        np.testing.assert_array_equal(got | close, right | close)
    assert pasted.any() and close_calls < 1e-3 * pasted.size


def test_rles_are_those_of_the_pasted_masks() -> None:
    masks, boxes = draw_masks(80)
    full, tall, wide = torch.ones(4, 28, 28), float(HEIGHT), float(WIDTH)
    edges = [
        [10.0, -40, 50, 3 * tall],
        [-wide, -tall, 2 * wide, 2 * tall],
        [5, 5, 5.4, 5.3],
        [500, 0, 600, 9],
    ]
    masks = torch.cat([masks, full])  # columns full from top to bottom, all, tiny, outside
    boxes = torch.cat([boxes, torch.tensor(edges)])
    for threshold in (0.5, 0.2):
        arguments = (masks.to(DEVICE), boxes.to(DEVICE), HEIGHT, WIDTH, threshold)
        rles, pasted = paste_rles(*arguments), paste(*arguments).cpu().numpy()
        for rle, mask in zip(rles, pasted, strict=True):
            assert rle == mask_utils.encode(np.asfortranarray(mask, np.uint8))
        assert pasted[-3].all() and not pasted[-1].any() and pasted[-4].all(0).any()


def test_no_mask_pastes_nothing() -> None:
    nothing = (torch.zeros(0, 28, 28), torch.zeros(0, 4), HEIGHT, WIDTH)
    assert paste(*nothing).shape == (0, HEIGHT, WIDTH)
    assert paste_rles(*nothing) == []


# ------------------------------------------------------------------------------------------------
# Masks of whole images at a low resolution.


def draw_whole(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth probabilities: blobs of all sizes, many at a border."""
    dice = torch.Generator().manual_seed(seed)
    y_H1, x_W = torch.arange(height)[:, None], torch.arange(width)
    centers_K2 = torch.rand(count, 2, generator=dice) * torch.tensor([height, width])
    radii_K = 1 + torch.rand(count, generator=dice).square() * width / 2
    coarse = torch.randn(count, 1, height // 6 + 2, width // 6 + 2, generator=dice)
    uneven_KHW = F.interpolate(coarse, (height, width), mode="bicubic")[:, 0]
    cy_K, cx_K = centers_K2.unbind(1)
    away_KHW = torch.hypot(y_H1 - cy_K[:, None, None], x_W - cx_K[:, None, None])
    steep = 0.5 + 4 * torch.rand(count, 1, 1, generator=dice)
    return (steep * (radii_K[:, None, None] - away_KHW + uneven_KHW)).sigmoid()


def chain(
    masks_KHW: Tensor, resized: tuple[int, int], original: tuple[int, int], threshold: float
) -> Tensor:
    """Upsampled to the padded image, cropped, resized to the file, each in full."""
    height, width = masks_KHW.shape[1:]
    full = F.interpolate(masks_KHW[None], (4 * height, 4 * width), mode="bilinear")
    image = full[..., : resized[0], : resized[1]]
    return F.interpolate(image, original, mode="bilinear")[0] > threshold


WHOLE = {
    "smaller": ((32, 48), (120, 190), (90, 143)),
    "larger": ((24, 32), (96, 128), (301, 411)),
    "the same": ((24, 32), (91, 125), (91, 125)),
    "much smaller": ((40, 56), (150, 221), (17, 23)),
    "taller and narrower": ((40, 24), (159, 96), (211, 60)),
    "one pixel high": ((8, 32), (1, 121), (1, 240)),
    "more than a band": ((24, 32), (96, 127), (700, 931)),
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_upsampled_masks_are_those_of_the_chain_in_full(case: str, threshold: float) -> None:
    shape, resized, original = WHOLE[case]
    count = 12 if case == "more than a band" else 60
    masks = draw_whole(count, *shape)
    masks[0], masks[1], masks[2] = 1, 0, 0.5  # all, none, just not or all
    masks[3, 0, 0] = masks[4, -1, -1] = 1
    right = chain(masks, resized, original, threshold).numpy()
    rles = upsampled_rles(masks.to(DEVICE), resized, original, threshold=threshold)
    for rle, mask in zip(rles, right, strict=True):
        assert rle == mask_utils.encode(np.asfortranarray(mask, np.uint8))
    assert right[0].all() and not right[1].any() and right[2].all() == (threshold < 0.5)
    assert right.any((1, 2)).sum() > 5


def test_pixels_at_the_threshold_are_those_of_the_chain() -> None:
    """Values at and around 0.5, on which the last bit decides."""
    dice = torch.Generator().manual_seed(5)
    steps = torch.randint(-3, 4, (40, 16, 24), generator=dice)
    masks = 0.5 + steps * 2.0**-24
    resized, original = (61, 90), (67, 83)
    right = chain(masks, resized, original, 0.5).numpy()
    assert 0.2 < right.mean() < 0.8
    for rle, mask in zip(upsampled_rles(masks, resized, original), right, strict=True):
        assert rle == mask_utils.encode(np.asfortranarray(mask, np.uint8))


def test_upsampling_stays_float64() -> None:
    """As far from the threshold as float32 does not tell."""
    masks = torch.full((2, 8, 12), 0.5, dtype=torch.float64)
    masks[0] += 1e-12
    rles = upsampled_rles(masks, (30, 45), (60, 90))
    assert [int(mask_utils.area(rle)) for rle in rles] == [60 * 90, 0]
    assert mask_utils.area(upsampled_rles(masks.half(), (30, 45), (60, 90))).sum() == 0


def test_no_mask_is_upsampled_to_nothing() -> None:
    assert upsampled_rles(torch.zeros(0, 8, 8), (30, 30), (60, 60)) == []
