"""Targets against a plain loop over objects, levels and cells that follows the paper's rules."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from solov2.config import HeadConfig
from solov2.targets import Targets, prepare
from zoo_common.detection.batching import Collate, DetectionBatch, Entry
from zoo_common.detection.bitmasks import Masks
from zoo_common.detection.transforms import Sample, drop_empty

Mask = NDArray[np.uint8]
HEAD = HeadConfig(
    grids=[20, 18, 12, 8, 6],
    scale_ranges=[[1, 24], [12, 48], [24, 96], [48, 192], [96, 1024]],
    pair_slots=[8, 64],
)


class Picture(NamedTuple):
    """Objects of an image; masks have its size."""

    masks: list[Mask]
    boxes: list[list[float]]
    labels: list[int]


def rectangle(size: tuple[int, int], x0: int, y0: int, x1: int, y1: int) -> Mask:
    mask_HW = np.zeros(size, np.uint8)
    mask_HW[y0:y1, x0:x1] = 1
    return mask_HW


def tight(mask_HW: Mask) -> list[float]:
    rows, columns = np.nonzero(mask_HW)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def picture(masks: list[Mask], labels: list[int] | None = None) -> Picture:
    boxes = [tight(mask) if mask.any() else [3.0, 3.0, 9.0, 9.0] for mask in masks]
    return Picture(masks, boxes, labels or list(range(len(masks))))


def draw(generator: np.random.Generator, count: int) -> Picture:
    """Ellipses, rectangles and noise, with boxes that need not be tight."""
    size = (int(generator.integers(40, 200)), int(generator.integers(40, 200)))
    rows, columns = np.mgrid[: size[0], : size[1]]
    masks, boxes = [], []
    for _ in range(count):
        y, x = generator.uniform(0, size[0]), generator.uniform(0, size[1])
        tall, wide = generator.uniform(2, 90, 2)
        distance = np.stack([(rows - y) / tall, (columns - x) / wide])
        norm = np.abs(distance).max(0) if generator.random() < 0.5 else np.hypot(*distance)
        mask_HW = (norm < 0.5) & (generator.random(size) < generator.choice([0.3, 1.0]))
        mask_HW[int(y), int(x)] = True
        masks.append(mask_HW.astype(np.uint8))
        box = np.array(tight(masks[-1])) + generator.uniform(-3, 3, 4) * (generator.random() < 0.5)
        boxes.append(box.clip(0, 200).tolist())
    boxes = [[x0, y0, max(x0, x1) + 1, max(y0, y1) + 1] for x0, y0, x1, y1 in boxes]
    return Picture(masks, boxes, generator.integers(0, 7, count).tolist())


def batch_of(pictures: list[Picture], sizes: Sequence[tuple[int, ...]]) -> DetectionBatch:
    entries = []
    for index, (content, (height, width)) in enumerate(zip(pictures, sizes, strict=True)):
        sample = Sample(
            image_HWC=np.zeros((height, width, 3), np.uint8),
            boxes_N4=np.array(content.boxes, np.float64).reshape(-1, 4),
            labels_N=np.array(content.labels, np.int64),
            masks=Masks.of(content.masks, height, width),
        )
        entries.append(Entry(drop_empty(sample), (height, width), index, str(index)))
    return Collate(None, divisibility=32, masks=False, quarter_masks=True)(entries, [])


def cell(position: np.float32, extent: int, grid: int) -> int:
    """In float32, as upstream; a position on a border is in the cell behind it."""
    return int((position / np.float32(extent)) / np.float32(1 / grid))


class Expected(NamedTuple):
    """Of one image: labels of all cells, and (cell, object) pairs in upstream's order."""

    labels: list[int]
    pairs: list[tuple[int, int]]


def expect(content: Picture, extent: tuple[int, int], head: HeadConfig) -> Expected:
    objects = [i for i, mask in enumerate(content.masks) if mask.any()]
    labels: list[int] = []
    pairs = []
    for grid, (lowest, highest) in zip(head.grids, head.scale_ranges, strict=True):
        first = len(labels)
        labels += [-1] * grid**2
        for slot, index in enumerate(objects):
            x0, y0, x1, y1 = np.array(content.boxes[index], np.float32)
            if not lowest <= np.sqrt((x1 - x0) * (y1 - y0)) <= highest:
                continue
            rows, columns = np.nonzero(content.masks[index])
            spans = []
            for places, side, length in (
                (rows, y1 - y0, extent[0]),
                (columns, x1 - x0, extent[1]),
            ):
                center = np.float32(places.sum() / len(places))
                half = np.float32(0.5) * side * np.float32(head.sigma)
                middle = cell(center, length, grid)
                low = max(0, cell(center - half, length, grid), middle - 1)
                high = min(grid - 1, cell(center + half, length, grid), middle + 1)
                spans.append(range(low, high + 1))
            for row in spans[0]:
                for column in spans[1]:
                    place = first + row * grid + column
                    labels[place] = content.labels[index]
                    pairs.append((place, slot))
    return Expected(labels, pairs)


def compare(pictures: list[Picture], sizes: Sequence[tuple[int, ...]], *, static: bool) -> Targets:
    batch = batch_of(pictures, sizes)
    targets = prepare(batch, HEAD, static=static)
    height, width = batch.extent_2.tolist()
    for image, content in enumerate(pictures):
        expected = expect(content, (height, width), HEAD)
        assert targets.labels_BS[image].tolist() == expected.labels
        count = len(expected.pairs)
        valid_P = targets.valid_BP[image]
        assert valid_P.tolist() == [True] * count + [False] * (len(valid_P) - count)
        found = torch.stack([targets.cells_BP[image], targets.objects_BP[image]], dim=1)
        assert [tuple(pair) for pair in found[:count].tolist()] == expected.pairs
        assert not found[count:].any()
    return targets


@pytest.mark.parametrize("static", [False, True], ids=["natural", "static"])
def test_random_objects(static: bool) -> None:
    generator = np.random.default_rng(5)
    pairs = 0
    for _ in range(25):
        pictures = [draw(generator, int(generator.integers(0, 12))) for _ in range(3)]
        sizes = [p.masks[0].shape if p.masks else (50, 70) for p in pictures]
        pairs += int(compare(pictures, sizes, static=static).valid_BP.sum())
    assert pairs > 2000


def test_centres_on_borders_of_cells() -> None:
    size = (160, 160)  # cells of 8, 8.9, 13.3, 20 and 26.7 pixels
    middles = [(8, 8), (40, 80), (80, 80), (120, 20), (140, 152), (60, 100), (20, 8), (100, 140)]
    for half in (1, 4, 7, 20):
        masks = [
            rectangle(size, max(0, x - half), max(0, y - half), x + half + 1, y + half + 1)
            for x, y in middles
        ]
        compare([picture(masks)], [size], static=False)
    # The rule itself: the centre 80 of 160 is in cell 10 of 20, though 1 / 20 is more in float32.
    head = HeadConfig(grids=[20], scale_ranges=[[1, 2048]], sigma=1.0)
    content = picture([rectangle(size, 30, 30, 131, 131)])
    targets = prepare(batch_of([content], [size]), head, static=False)
    assert {index % 20 for index in targets.cells_BP[0].tolist()} == {9, 10, 11}


def test_an_object_has_at_most_nine_cells_of_a_level() -> None:
    size = (64, 64)
    content = picture([rectangle(size, 0, 0, 64, 64)])
    head = HeadConfig(grids=[40], scale_ranges=[[1, 2048]], sigma=1.0)
    targets = prepare(batch_of([content], [size]), head, static=False)
    middle = 31.5 * 40 // 64
    assert int(targets.valid_BP.sum()) == 9
    assert targets.cells_BP[0, 4] == middle * 40 + middle


def test_cells_end_at_the_border_of_the_image() -> None:
    size = (64, 96)
    masks = [rectangle(size, x, y, x + 2, y + 2) for x, y in [(0, 0), (94, 62)]]
    content = picture(masks)._replace(boxes=[[0.0, 0.0, 96.0, 64.0]] * 2)
    targets = compare([content], [size], static=False)
    assert targets.valid_BP.all()


def test_the_last_object_names_a_cell_and_all_keep_their_pairs() -> None:
    size = (64, 64)
    same = rectangle(size, 20, 20, 40, 40)
    targets = compare([picture([same, same, same], [4, 6, 2])], [size], static=False)
    assert set(targets.labels_BS.unique().tolist()) == {-1, 2}
    valid = targets.valid_BP[0]
    assert torch.bincount(targets.objects_BP[0][valid]).unique().numel() == 1
    assert int((targets.labels_BS >= 0).sum()) * 3 == int(valid.sum())


def test_objects_that_no_cell_draws() -> None:
    size = (64, 96)
    nothing = np.zeros(size, np.uint8)
    far_too_small = picture([rectangle(size, 5, 5, 60, 60)])._replace(boxes=[[5, 5, 5.5, 5.5]])
    pictures = [picture([]), picture([nothing]), far_too_small]
    targets = compare(pictures, [size] * 3, static=True)
    assert not targets.valid_BP.any()
    assert targets.valid_BP.shape[1] == HEAD.pair_slots[0]


def test_an_empty_mask_takes_no_slot() -> None:
    size = (64, 64)
    masks = [np.zeros(size, np.uint8), rectangle(size, 20, 20, 40, 40)]
    targets = compare([picture(masks, [1, 3])], [size], static=False)
    assert not targets.objects_BP.any()
    assert targets.labels_BS.max() == 3


def test_slots_hold_the_fullest_image() -> None:
    size = (64, 64)
    few, many = ([rectangle(size, 8, 8, 30, 30)] * count for count in (1, 6))

    def slots(pictures: list[list[Mask]], *, static: bool) -> int:
        content = [picture(masks) for masks in pictures]
        found: Tensor = compare(content, [size] * len(content), static=static).valid_BP
        return found.shape[1]

    one = slots([few], static=False)
    assert slots([many], static=False) == slots([few, many], static=False) == 6 * one
    assert (slots([few], static=True), slots([few, many], static=True)) == (8, 64)
    assert one <= 8 < 6 * one <= 64
    # More than the largest number of slots: a multiple of it.
    assert slots([many * 3], static=True) == -(-18 * one // 64) * 64 > 64


def test_a_quarter_of_the_mask() -> None:
    generator = np.random.default_rng(0)
    mask_HW = (generator.random((50, 70)) < 0.5).astype(np.uint8)
    batch = batch_of([picture([mask_HW])], [(50, 70)])
    padded_HW = np.zeros((64, 96), np.uint8)
    padded_HW[:50, :70] = mask_HW
    middles = padded_HW.reshape(16, 4, 24, 4)[:, 1:3, :, 1:3].sum(axis=(1, 3))
    assert batch.masks_BQHW is not None
    assert batch.centers_BQ2 is not None
    assert batch.masks_BQHW[0, 0].tolist() == (middles >= 2).tolist()
    rows, columns = np.nonzero(mask_HW)
    assert batch.centers_BQ2[0, 0].tolist() == pytest.approx([columns.mean(), rows.mean()])
