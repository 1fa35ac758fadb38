"""Detection batches: padding, slots, and what does not fit."""

import os

import numpy as np
import pytest
import torch

from zoo_common import device
from zoo_common.damage import Damaged
from zoo_common.detection.batching import (
    Collate,
    DetectionBatch,
    Entry,
    StaticShapes,
    suggest_buckets,
)
from zoo_common.detection.bitmasks import Masks
from zoo_common.detection.transforms import Sample, shortest_edge_size
from zoo_common.errors import UserError

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
SHAPES = StaticShapes(((64, 96), (96, 64), (96, 96)), slots=3, edge_slots=(16, 8))


def entry(number: int, height: int, width: int, *edge_counts: int, rings: int = 1) -> Entry:
    """An image with as many objects as edge counts; every value follows from the number."""
    rng = np.random.default_rng(number)
    count = len(edge_counts)
    sample = Sample(
        rng.integers(1, 256, (height, width, 3), dtype=np.uint8),
        rng.uniform(0, min(height, width), (count, 4)),
        rng.integers(1, 9, count),
        [rng.uniform(0, 9, (edges, 4)) for edges in edge_counts],
        [np.arange(edges) % rings for edges in edge_counts],
        Masks.of(
            [rng.integers(0, 2, (height, width), np.uint8) for _ in range(count)], height, width
        ),
    )
    return Entry(sample, (2 * height, 2 * width), 100 + number, f"{number}.jpg")


def collate(
    *entries: Entry,
    shapes: StaticShapes | None = None,
    masks: bool = True,
    quarter_masks: bool = False,
) -> DetectionBatch:
    return Collate(shapes, divisibility=32, masks=masks, quarter_masks=quarter_masks)(entries, [])


def test_a_natural_batch_is_as_large_as_what_is_in_it() -> None:
    first, second = entry(1, 40, 70, 5, 3), entry(2, 50, 33, 4)
    damaged = [Damaged("3.jpg", "gone")]
    batch = Collate(None, divisibility=32, masks=True)([first, second], damaged)
    assert batch.images_BCHW.shape == (2, 3, 64, 96)
    assert batch.images_BCHW.dtype == torch.uint8
    assert batch.images_BCHW.is_contiguous()
    assert batch.sizes_B2.tolist() == [[40, 70], [50, 33]]
    assert batch.originals_B2.tolist() == [[80, 140], [100, 66]]
    assert batch.extent_2.tolist() == [64, 96]
    assert batch.image_ids_B.tolist() == [101, 102]
    assert batch.item_ids == ["1.jpg", "2.jpg"]
    assert batch.damaged == damaged
    assert batch.valid_BQ.tolist() == [[True, True], [True, False]]
    for row, one in enumerate((first, second)):
        height, width = one.sample.size
        image = batch.images_BCHW[row].permute(1, 2, 0).numpy()
        assert np.array_equal(image[:height, :width], one.sample.image_HWC)
        assert not image[height:].any() and not image[:, width:].any()
        count = len(one.sample.labels_N)
        boxes = one.sample.boxes_N4.astype(np.float32)
        assert np.array_equal(batch.boxes_BQ4[row, :count].numpy(), boxes)
        assert batch.labels_BQ[row, :count].tolist() == one.sample.labels_N.tolist()
        assert not batch.boxes_BQ4[row, count:].any() and not batch.labels_BQ[row, count:].any()


def test_outlines_fill_slots_and_leave_the_rest_marked() -> None:
    entries = [entry(1, 40, 70, 5, 3, rings=2), entry(2, 50, 33)]
    batch = collate(*entries)
    assert batch.edges_BQE4 is not None and batch.rings_BQE is not None
    assert batch.edges_BQE4.shape == (2, 2, 5, 4)
    assert batch.edges_BQE4.dtype == torch.float32
    assert batch.ring_slots == 2
    assert batch.rings_BQE.tolist() == [
        [[0, 1, 0, 1, 0], [0, 1, 0, -1, -1]],
        [[-1] * 5, [-1] * 5],
    ]
    outlines = entries[0].sample.edges
    assert outlines is not None
    for slot, edges in enumerate(outlines):
        found = batch.edges_BQE4[0, slot, : len(edges)].numpy()
        assert np.array_equal(found, edges.astype(np.float32))
    assert not batch.edges_BQE4[1].any()
    without = collate(*entries, masks=False)
    assert without.edges_BQE4 is None and without.rings_BQE is None


@pytest.mark.parametrize("shapes", [None, SHAPES])
def test_masks_fill_slots_at_a_quarter_of_the_padded_size(shapes: StaticShapes | None) -> None:
    entries = [entry(1, 40, 70, 5, 3), entry(2, 50, 33), entry(3, 64, 33, 1)]
    batch = collate(*entries, shapes=shapes, masks=False, quarter_masks=True)
    assert batch.edges_BQE4 is None
    masks_BQHW, centers_BQ2 = batch.masks_BQHW, batch.centers_BQ2
    assert masks_BQHW is not None and masks_BQHW.dtype == torch.uint8
    assert centers_BQ2 is not None and centers_BQ2.dtype == torch.float32
    assert masks_BQHW.shape == (3, 3 if shapes else 2, 16, 24)
    assert centers_BQ2.shape == (3, 3 if shapes else 2, 2)
    for row, one in enumerate(entries):
        masks = one.sample.masks
        assert masks is not None
        expected = np.zeros((masks.objects, 16, 24), np.uint8)
        masks.write_quarters(expected)
        assert np.array_equal(masks_BQHW[row, : masks.objects].numpy(), expected)
        moments = masks.moments()
        centers = (moments[:, 1:] / moments[:, :1]).astype(np.float32)
        assert np.array_equal(centers_BQ2[row, : masks.objects].numpy(), centers)
        assert not masks_BQHW[row, masks.objects :].any()
        assert not centers_BQ2[row, masks.objects :].any()
    without = collate(*entries)
    assert without.masks_BQHW is None and without.centers_BQ2 is None
    nothing = collate(quarter_masks=True)
    assert nothing.masks_BQHW is not None and nothing.masks_BQHW.shape == (0, 1, 8, 8)


def test_sides_without_quarters_are_refused() -> None:
    with pytest.raises(UserError, match="multiples of 6 have no quarters"):
        Collate(None, divisibility=6, masks=False, quarter_masks=True)
    assert Collate(None, divisibility=6, masks=False).extent([(5, 7)]) == (6, 12)


@pytest.mark.device
def test_a_batch_goes_to_its_device_whole_but_for_the_ids() -> None:
    batch = collate(entry(1, 40, 70, 5), entry(2, 40, 70), quarter_masks=True).to(DEVICE)
    assert batch.rings_BQE is not None and batch.rings_BQE.dtype == torch.int64
    places = {
        name: value.device.type
        for name, value in batch._asdict().items()
        if isinstance(value, torch.Tensor)
    }
    stay = ("image_ids_B", "numbers_B", "flipped_B", "draws_B")
    assert {places.pop(name) for name in stay} == {"cpu"}
    assert list(places.values()) == [DEVICE.type] * 11
    without = collate(entry(1, 40, 70, 5), masks=False).to(DEVICE)
    assert without.edges_BQE4 is None and without.masks_BQHW is None


@pytest.mark.parametrize("masks", [True, False])
def test_parts_of_a_batch_hold_its_images_in_order(masks: bool) -> None:
    entries = [entry(n, 40 + n, 70, 5, 3) for n in range(4)]
    batch = collate(*entries, masks=masks, quarter_masks=not masks)
    parts = batch.chunk(2)
    assert [part.item_ids for part in parts] == [["0.jpg", "1.jpg"], ["2.jpg", "3.jpg"]]
    per_image = ("images_BCHW", "sizes_B2", "boxes_BQ4", "valid_BQ", "edges_BQE4", "image_ids_B")
    for name in (*per_image, "masks_BQHW", "centers_BQ2", "numbers_B", "flipped_B", "draws_B"):
        values = [getattr(part, name) for part in parts]
        whole = getattr(batch, name)
        if whole is None:
            assert values == [None, None]
        else:
            assert torch.equal(torch.cat(values), whole)
    assert all(part.extent_2 is batch.extent_2 for part in parts)
    assert batch.chunk(1)[0].item_ids == batch.item_ids


def test_empty_batches_and_images_have_slots() -> None:
    nothing = collate()
    assert nothing.images_BCHW.shape == (0, 3, 32, 32)
    assert nothing.boxes_BQ4.shape == (0, 1, 4)
    background = collate(entry(1, 40, 70))
    assert background.valid_BQ.tolist() == [[False]]
    assert background.edges_BQE4 is not None
    assert background.edges_BQE4.shape == (1, 1, 1, 4)


# ---------------------------------------------------------------------------- static shapes


@pytest.mark.parametrize(
    ("sizes", "padded", "extent"),
    [
        ([(64, 96)], (64, 96), [64, 96]),
        ([(10, 10), (20, 30)], (64, 96), [32, 32]),  # of two with the same area, the lower one
        ([(65, 50)], (96, 64), [96, 64]),
        ([(64, 20), (20, 96)], (64, 96), [64, 96]),
        ([(96, 10), (10, 96)], (96, 96), [96, 96]),
    ],
)
def test_the_smallest_bucket_that_holds_a_batch(
    sizes: list[tuple[int, int]], padded: tuple[int, int], extent: list[int]
) -> None:
    entries = [entry(i, *size, 5) for i, size in enumerate(sizes)]
    batch = collate(*entries, shapes=SHAPES)
    assert tuple(batch.images_BCHW.shape[2:]) == padded
    assert batch.extent_2.tolist() == extent
    assert batch.sizes_B2.tolist() == [list(size) for size in sizes]


def test_slots_are_fixed_and_edges_of_a_few_lengths() -> None:
    lengths = {}
    for edges in (0, 1, 8, 9, 16):
        batch = collate(entry(1, 40, 70, *[edges] * bool(edges)), shapes=SHAPES)
        assert batch.edges_BQE4 is not None
        assert batch.boxes_BQ4.shape == (1, 3, 4)
        assert batch.edges_BQE4.shape[:2] == (1, 3)
        lengths[edges] = batch.edges_BQE4.shape[2]
    assert lengths == {0: 8, 1: 8, 8: 8, 9: 16, 16: 16}
    rings = [
        collate(entry(1, 40, 70, 16, rings=r), shapes=SHAPES).ring_slots for r in (1, 4, 5, 16)
    ]
    assert rings == [4, 4, 16, 16]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [entry(1, 90, 40), entry(2, 40, 97), entry(3, 40, 40)],
            r"no bucket holds a batch with 1.jpg \(90 x 40\) and 2.jpg \(40 x 97\).*there are "
            r"64 x 96, 96 x 64, 96 x 96 \(height x width\); add",
        ),
        ([entry(5, 200, 300)], r"with 5.jpg \(200 x 300\), resized"),
        ([entry(4, 40, 40, 1, 1, 1, 1)], r"image 104 \(4.jpg\) has 4 objects.* the 3 target slots"),
        ([entry(6, 40, 40, 3, 17)], r"image 106 \(6.jpg\) has an outline of 17 edges.* the 16 of"),
    ],
)
def test_what_does_not_fit_is_named(entries: list[Entry], message: str) -> None:
    with pytest.raises(UserError, match=message):
        collate(*entries, shapes=SHAPES)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (StaticShapes(((64, 100),)), "multiples of 32"),
        (StaticShapes(((0, 0),)), "multiples of 32"),
        (StaticShapes(()), r"buckets=\[\]"),
        (StaticShapes(((64, 64),), edge_slots=()), r"edge_slots=\[\]"),
        (StaticShapes(((64, 64),), edge_slots=(0,)), r"edge_slots=\[0\]"),
        (StaticShapes(((64, 64),), slots=0), "slots=0"),
    ],
)
def test_shapes_that_are_none_are_refused(shapes: StaticShapes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Collate(shapes, divisibility=32, masks=True)


def test_memory_is_foretold() -> None:
    for shapes, quarter_masks in ((SHAPES, False), (None, False), (SHAPES, True), (None, True)):
        collator = Collate(shapes, divisibility=32, masks=True, quarter_masks=quarter_masks)
        batch = collator([entry(1, 90, 60, 8, 8, 8), entry(2, 96, 64)], [])
        taken = sum(
            tensor.nbytes
            for tensor in (*batch[:8], batch.masks_BQHW, batch.centers_BQ2)
            if isinstance(tensor, torch.Tensor) and tensor.numel() > 4
        )
        assert collator.most_bytes(2, [(96, 64), (64, 64)], objects=3, edges=8) == taken


# ---------------------------------------------------------------------------- buckets


def test_suggested_buckets_of_the_recipe() -> None:
    assert suggest_buckets((640, 672, 704, 736, 768, 800), 1333) == (
        (800, 1088),
        (1088, 800),
        (800, 1344),
        (1344, 800),
        (1088, 1088),
        (1344, 1344),
    )


@pytest.mark.parametrize(
    ("min_sizes", "max_size"), [((640, 800), 1333), ((800,), 800), ((100,), 120), ((50, 33), 2000)]
)
def test_suggested_buckets_hold_every_output_of_the_resize(
    min_sizes: tuple[int, ...], max_size: int
) -> None:
    buckets = suggest_buckets(min_sizes, max_size)
    assert len(buckets) <= 6
    assert all(side % 32 == 0 for bucket in buckets for side in bucket)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 700, (500, 2)).tolist():
        for short in min_sizes:
            new = shortest_edge_size(height, width, short, max_size)
            oriented = [b for b in buckets if b[0] >= new[0] and b[1] >= new[1]]
            assert oriented
            if height != width:  # never more than its orientation needs
                smallest = min(oriented, key=lambda size: size[0] * size[1])
                assert smallest[0] * smallest[1] < max(b[0] * b[1] for b in buckets) or (
                    len(buckets) == 1
                )
