"""Streams of detection batches: order, resuming, processes, damage, and what an item is."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from zoo_common.damage import Damaged
from zoo_common.data import BatchStream, StepSampler
from zoo_common.detection.batching import DetectionBatch, StaticShapes, suggest_buckets
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.detection.loading import GroupedSampler, build_eval_stream, build_train_stream
from zoo_common.detection.transforms import RandomCrop, RandomJitter, shortest_edge_size
from zoo_common.errors import UserError

LANDSCAPE, PORTRAIT = (48, 64), (64, 48)
CROWD = {"size": [48, 64], "counts": [100, 200, 48 * 64 - 300]}


def square(x: float, y: float, side: float) -> dict[str, Any]:
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {"bbox": [x, y, side, side], "area": side * side, "segmentation": [polygon]}


def write_data(root: Path, sizes: list[tuple[int, int]], objects: dict[int, Any]) -> CocoIndex:
    """Images numbered from 1 as (height, width), each with one object unless said otherwise."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes, start=1):
        name = f"{number:03}.jpg"
        pixels = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(root / "images" / name)
        images.append({"id": 1000 + number, "file_name": name, "height": height, "width": width})
        for shape in objects.get(number, [square(4, 6, 20)]):
            place = {"id": len(annotations) + 1, "image_id": 1000 + number}
            annotations.append({"category_id": 7, "iscrowd": 0, **shape, **place})
    categories = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return open_index(root / "instances.json", root / "images", masks=True, cache=root)


@pytest.fixture
def index(tmp_path: Path) -> CocoIndex:
    """Of 22 images a third is portrait, 5 has no object and 6 a crowd only."""
    sizes = [PORTRAIT if i % 3 == 0 else LANDSCAPE for i in range(22)]
    crowd = {**square(0, 0, 9), "iscrowd": 1, "segmentation": CROWD}
    return write_data(
        tmp_path, sizes, {2: [square(1, 1, 9), square(30, 20, 15), crowd], 5: [], 6: [crowd]}
    )


OPTIONS: dict[str, Any] = {
    "min_sizes": [32, 40, 48],
    "max_size": 80,
    "masks": True,
    "batch_size": 4,
    "workers": 0,
    "seed": 3,
}


def train(index: CocoIndex, **options: Any) -> BatchStream[DetectionBatch]:
    return build_train_stream(index, **(OPTIONS | options))


def evaluate(index: CocoIndex, **options: Any) -> BatchStream[DetectionBatch]:
    defaults: dict[str, Any] = {"min_size": 48, "max_size": 80, "batch_size": 4, "workers": 0}
    return build_eval_stream(index, **(defaults | options))


def content(batch: DetectionBatch) -> list[object]:
    """Everything in a batch, to compare."""
    return [v.tolist() if isinstance(v, torch.Tensor) else v for v in batch]


def take(stream: BatchStream[DetectionBatch], steps: int) -> list[list[object]]:
    batches = [content(batch) for _, batch in zip(range(steps), stream, strict=False)]
    stream.close()
    return batches


def images(stream: BatchStream[DetectionBatch]) -> Iterator[tuple[int, torch.Tensor, list[Any]]]:
    """Each image without its padding, with its boxes."""
    for batch in stream:
        for row, (height, width) in enumerate(batch.sizes_B2.tolist()):
            yield (
                int(batch.image_ids_B[row]),
                batch.images_BCHW[row, :, :height, :width],
                batch.boxes_BQ4[row][batch.valid_BQ[row]].tolist(),
            )


# ---------------------------------------------------------------------------- order


def grouped(groups: list[int], batch_size: int, **options: int) -> GroupedSampler:
    options = {"rank": 0, "world_size": 1, "seed": 1} | options
    return GroupedSampler(np.array(groups), batch_size, **options)


def test_global_batches_are_of_one_group_as_far_as_possible() -> None:
    groups = [int(i % 5 == 0) for i in range(103)]  # 82 and 21
    sampler = grouped(groups, 8, total_steps=24)
    assert sampler.steps_per_epoch == 12  # 10 and 2 whole batches, 2 + 5 items are left over
    batches = [[draw.index for draw in batch] for batch in sampler]
    for epoch in (batches[:12], batches[12:]):
        seen = [i for batch in epoch for i in batch]
        assert len(seen) == len(set(seen)) == 96
        assert [len({groups[i] for i in batch}) for batch in epoch] == [1] * 12
        kinds = [groups[batch[0]] for batch in epoch]
        assert sum(kinds) == 2
        assert kinds[-2:] != [1, 1]  # in their turn, not after all others
    assert batches[:12] != batches[12:]


def test_leftovers_make_mixed_batches() -> None:
    groups = [0] * 13 + [1] * 6  # batches of 6: two and one, and one image is left over
    for seed in range(5):
        seen = [[d.index for d in b] for b in grouped(groups, 6, seed=seed, total_steps=3)]
        assert len({i for batch in seen for i in batch}) == 18
    groups = [0] * 15 + [1] * 5 + [2] * 4
    missed = set()
    for seed in range(20):
        seen = [[d.index for d in b] for b in grouped(groups, 6, seed=seed, total_steps=4)]
        assert len({i for batch in seen for i in batch}) == 24
        mixed = [
            [groups[i] for i in batch] for batch in seen if len({groups[i] for i in batch}) > 1
        ]
        assert len(mixed) == 2
        assert all(kinds == sorted(kinds) for kinds in mixed)
        short = [[d.index for d in b] for b in grouped(groups, 10, seed=seed, total_steps=2)]
        missed |= {groups[i] for i in set(range(24)) - {i for batch in short for i in batch}}
    assert missed == {0, 1, 2}  # no group is always the one that is cut


def test_groups_change_nothing_when_there_is_one() -> None:
    plain = StepSampler(50, 4, rank=0, world_size=2, seed=5, total_steps=20)
    options = {"rank": 0, "world_size": 2, "seed": 5, "total_steps": 20}
    assert list(grouped([0] * 50, 4, **options)) == list(plain)
    assert list(grouped([1] * 50, 4, **options)) == list(plain)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(world_size: int) -> None:
    groups = [int(i % 3 == 0) for i in range(60)]
    alone = list(grouped(groups, 12, total_steps=10))
    ranks = [
        list(grouped(groups, 12 // world_size, rank=r, world_size=world_size, total_steps=10))
        for r in range(world_size)
    ]
    assert alone == [
        [draw for batch in step for draw in batch] for step in zip(*ranks, strict=True)
    ]


# ---------------------------------------------------------------------------- training stream


def test_workers_and_resuming_do_not_change_the_batches(index: CocoIndex) -> None:
    whole = take(train(index), 8)
    assert len({str(batch) for batch in whole}) == 8
    for workers in (0, 2):
        stream = train(index, workers=workers)
        assert stream.steps_per_epoch == 5
        stream.seek(3)
        assert take(stream, 5) == whole[3:]
    assert take(train(index, seed=4), 1) != whole[:1]


def test_a_picture_does_not_depend_on_the_number_of_processes(index: CocoIndex) -> None:
    alone = [list(images(train(index, total_steps=3, batch_size=4)))]
    ranks = [
        list(images(train(index, total_steps=3, batch_size=2, rank=rank, world_size=2)))
        for rank in (0, 1)
    ]
    for step in range(3):
        joined = ranks[0][2 * step : 2 * step + 2] + ranks[1][2 * step : 2 * step + 2]
        for one, other in zip(alone[0][4 * step : 4 * step + 4], joined, strict=True):
            assert one[0] == other[0] and one[2] == other[2]
            assert torch.equal(one[1], other[1])


def test_batches_have_one_orientation(index: CocoIndex) -> None:
    def mixed(**options: Any) -> int:
        stream = train(index, total_steps=48, batch_size=5, **options)
        return sum(len({h > w for h, w in b.sizes_B2.tolist()}) > 1 for b in stream)

    # An epoch has 12 landscape and 8 portrait images: 2 + 1 batches of one kind, and a mixed one.
    assert mixed() == 12
    assert mixed(group_by_aspect=False) > 30


def test_an_item_is_the_file_resized_and_flipped_with_its_objects(index: CocoIndex) -> None:
    flips = 0
    shorts, draws = set(), set()
    for batch in train(index, total_steps=60, batch_size=1, exact_resize=True):
        (height, width), original = (
            batch.sizes_B2[0].tolist(),
            tuple(batch.originals_B2[0].tolist()),
        )
        number = int(batch.image_ids_B[0]) - 1001
        assert index.size(number) == original
        shorts.add(min(height, width))
        assert (height, width) == shortest_edge_size(*original, min(height, width), 80)
        with Image.open(index.path(number)) as image:
            expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        found = batch.images_BCHW[0, :, :height, :width].permute(1, 2, 0).numpy()
        flipped = not np.array_equal(found, expected)
        assert np.array_equal(found[:, ::-1] if flipped else found, expected)
        flips += flipped
        assert batch.flipped_B is not None and batch.flipped_B.tolist() == [flipped]
        assert batch.numbers_B is not None and batch.numbers_B.tolist() == [number]
        assert batch.draws_B is not None
        draws.add(int(batch.draws_B))
        scale = np.array([width / original[1], height / original[0]] * 2)
        boxes = index.objects(number).boxes_N4[~index.objects(number).crowd_N] * scale
        if flipped:
            boxes = np.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1
            )
        assert batch.valid_BQ.all() and batch.labels_BQ.unique().tolist() == [1]
        np.testing.assert_allclose(batch.boxes_BQ4[0], boxes, rtol=1e-6)
        assert batch.edges_BQE4 is not None and batch.rings_BQE is not None
        assert batch.rings_BQE.unique().tolist() == [0]
        corners = batch.edges_BQE4[0].reshape(len(boxes), -1, 2)  # a square is its own box
        np.testing.assert_allclose(corners.amin(dim=1), boxes[:, :2], rtol=1e-5)
        np.testing.assert_allclose(corners.amax(dim=1), boxes[:, 2:], rtol=1e-5)
    assert shorts == {32, 40, 48}
    assert 15 < flips < 45
    assert len(draws) == 60


def test_images_without_objects_are_left_out_or_background(index: CocoIndex) -> None:
    seen = {int(i) for batch in train(index, total_steps=20) for i in batch.image_ids_B}
    assert seen == {1000 + n for n in range(1, 23)} - {1005, 1006}
    kept = train(index, total_steps=20, keep_empty=True)
    valid = {
        int(number): bool(valid.any())
        for batch in kept
        for number, valid in zip(batch.image_ids_B, batch.valid_BQ, strict=True)
    }
    assert {number for number, any_valid in valid.items() if not any_valid} == {1005, 1006}
    assert len(valid) == 22


def test_augments_come_before_the_resize(index: CocoIndex) -> None:
    augments = [RandomCrop(0.5, 0.5), RandomJitter(0.5, 0, 0)]
    stream = train(index, total_steps=10, augments=augments)
    sizes = {tuple(size) for batch in stream for size in batch.sizes_B2.tolist()}
    assert len(sizes) > 10
    assert all(min(size) in (32, 40, 48) or max(size) == 80 for size in sizes)
    again = train(index, total_steps=10, augments=augments, workers=1)
    assert take(stream, 3) == take(again, 3)


def test_without_masks_there_are_no_outlines(index: CocoIndex) -> None:
    (batch,) = train(index, total_steps=1, masks=False)
    assert batch.edges_BQE4 is None and batch.rings_BQE is None
    assert batch.valid_BQ.any(dim=1).all()


# ---------------------------------------------------------------------------- masks


def masked(index: CocoIndex, **options: Any) -> BatchStream[DetectionBatch]:
    return train(index, masks=False, quarter_masks=True, **options)


def test_quarter_masks_and_centres_are_those_of_the_item(index: CocoIndex) -> None:
    """A square is its own box, so that its centre and its area follow from that."""
    flipped = set()
    for batch in masked(index, total_steps=40, batch_size=2):
        assert batch.edges_BQE4 is None
        assert batch.masks_BQHW is not None and batch.centers_BQ2 is not None
        height, width = batch.images_BCHW.shape[2:]
        slots = batch.valid_BQ.shape[1]
        assert batch.masks_BQHW.shape == (2, slots, height // 4, width // 4)
        boxes = batch.boxes_BQ4
        middles = (boxes[..., :2] + boxes[..., 2:] - 1) / 2  # of pixels, the first is at 0
        offsets = (batch.centers_BQ2 - middles)[batch.valid_BQ]
        assert offsets.abs().max() <= 1
        areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1) / 16
        assert torch.allclose(batch.masks_BQHW.sum((2, 3)).float(), areas, rtol=0.5, atol=4)
        assert not batch.masks_BQHW[~batch.valid_BQ].any()
        rows, columns = torch.arange(height // 4), torch.arange(width // 4)
        for mask, (x0, y0, x1, y1) in zip(
            batch.masks_BQHW[batch.valid_BQ], boxes[batch.valid_BQ].tolist(), strict=True
        ):
            inside_rows = (4 * rows + 4 > y0) & (4 * rows < y1)
            inside = inside_rows[:, None] & (4 * columns + 4 > x0) & (4 * columns < x1)
            assert not mask[~inside].any() and mask.any()
        flipped |= set((boxes[:, 0, 0] > 10).tolist())
    assert flipped == {False, True}


def test_quarter_masks_are_the_same_in_any_worker_and_process(index: CocoIndex) -> None:
    assert take(masked(index, workers=2), 4) == take(masked(index), 4)
    plain = take(train(index, masks=False), 4)
    at = DetectionBatch._fields.index("masks_BQHW")  # and the centres after it
    for with_masks, without in zip(take(masked(index), 4), plain, strict=True):
        assert [with_masks.pop(at), with_masks.pop(at)] != [None, None]
        assert [without.pop(at), without.pop(at)] == [None, None]
        assert with_masks == without


def test_objects_of_which_the_resize_leaves_no_pixel_are_dropped(tmp_path: Path) -> None:
    """A line between the columns that are taken, and a polygon outside of its image."""
    line = {"bbox": [31, 2, 1, 40], "area": 40, "segmentation": [[31, 2, 32, 2, 32, 42, 31, 42]]}
    outside = {**square(40, 4, 20), "segmentation": [[99, 4, 120, 4, 120, 9]]}
    crowd = {**square(0, 0, 9), "iscrowd": 1, "segmentation": CROWD}
    index = write_data(tmp_path, [LANDSCAPE] * 2, {1: [outside, crowd, line, square(8, 8, 16)]})
    counts = set()
    for batch in masked(index, total_steps=20, batch_size=1, min_sizes=[24, 96], max_size=200):
        assert batch.masks_BQHW is not None and batch.centers_BQ2 is not None
        count = int(batch.valid_BQ.sum())
        assert (batch.centers_BQ2[batch.valid_BQ] > 0).all()
        if batch.image_ids_B.tolist() == [1001]:
            counts.add((min(batch.sizes_B2[0].tolist()), count))
            assert batch.masks_BQHW[0, count - 1].any()
    assert counts == {(24, 1), (96, 2)}
    # Nothing but what vanishes: the image stays, without an object.
    bare = write_data(tmp_path / "bare", [LANDSCAPE], {1: [line]})
    (batch,) = masked(bare, total_steps=1, batch_size=1, min_sizes=[24])
    assert not batch.valid_BQ.any() and batch.masks_BQHW is not None
    assert not batch.masks_BQHW.any()


def test_static_shapes_hold_the_masks_of_the_fullest_image(index: CocoIndex) -> None:
    static = StaticShapes(suggest_buckets([32, 40, 48], 80))
    for batch in masked(index, static=static, total_steps=10):
        assert batch.masks_BQHW is not None and batch.centers_BQ2 is not None
        height, width = batch.images_BCHW.shape[2:]
        assert batch.masks_BQHW.shape == (4, 2, height // 4, width // 4)
        assert batch.centers_BQ2.shape == (4, 2, 2)


def test_damage_is_replaced_with_its_own_masks(index: CocoIndex) -> None:
    bad = spoil(index)
    for batch in masked(index, total_steps=10, max_damaged=3):
        assert batch.masks_BQHW is not None
        assert batch.masks_BQHW.amax((2, 3)).bool().equal(batch.valid_BQ)
        assert not set(batch.item_ids) & set(bad)
    with pytest.raises(UserError, match="more than the 2 that are allowed"):
        list(masked(index, total_steps=10, max_damaged=2))


# ---------------------------------------------------------------------------- finish


class Counted(NamedTuple):
    """A model's own batch."""

    count: int  # type: ignore[assignment]
    item_ids: list[str]
    damaged: list[Damaged]


def count_objects(batch: DetectionBatch) -> Counted:
    return Counted(int(batch.valid_BQ.sum()), batch.item_ids, batch.damaged)


def refuse(batch: DetectionBatch) -> Counted:
    raise UserError(f"{len(batch.item_ids)} images are too many.")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_can_be_finished_where_they_are_made(index: CocoIndex, workers: int) -> None:
    stream = build_train_stream(
        index, **(OPTIONS | {"workers": workers, "total_steps": 3}), finish=count_objects
    )
    expected = [count_objects(batch) for batch in train(index, total_steps=3)]
    assert list(stream) == expected
    assert stream.steps_per_epoch == 5
    spoil(index)
    options: dict[str, Any] = {"min_size": 48, "max_size": 80, "batch_size": 1}
    found = list(build_eval_stream(index, workers=workers, finish=count_objects, **options))
    # What is damaged makes an empty batch, which is counted and passed over.
    assert len(found) == 19 and {batch.count for batch in found} == {0}
    refusing = build_train_stream(index, **(OPTIONS | {"workers": workers}), finish=refuse)
    with pytest.raises(UserError, match=r"^4 images are too many\.$"):
        next(iter(refusing))


# ---------------------------------------------------------------------------- static shapes


def test_static_shapes_have_few_sizes_and_the_data_sets_slots(index: CocoIndex) -> None:
    static = StaticShapes(suggest_buckets([32, 40, 48], 80), edge_slots=(8, 4))
    shapes = set()
    for batch in train(index, static=static, total_steps=50, batch_size=2):
        assert batch.edges_BQE4 is not None
        shapes.add(tuple(batch.images_BCHW.shape[2:]))
        assert batch.valid_BQ.shape == (2, 2)
        assert batch.edges_BQE4.shape == (2, 2, 4, 4)
        assert batch.ring_slots == 4
    assert shapes == {(64, 64)}  # what 48 x 64 and 64 x 48 have in common
    given = StaticShapes(static.buckets, slots=5)
    (batch,) = train(index, static=given, total_steps=1)
    assert batch.valid_BQ.shape == (4, 5)


@pytest.mark.parametrize(
    ("static", "message"),
    [
        (StaticShapes(((96, 96),), slots=1), r"image 1002 \(002.jpg\) has 2 objects.* 1 target"),
        (StaticShapes(((96, 96),), edge_slots=(3,)), r"image 1001 \(001.jpg\) .* of 4 edges"),
        (
            StaticShapes(((32, 64), (64, 32))),
            r"no bucket holds a batch with 001.jpg \(43 x 32\) and 002.jpg \(32 x 43\)",
        ),
    ],
)
def test_what_will_not_fit_is_said_before_the_first_step(
    index: CocoIndex, static: StaticShapes, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(index, static=static, min_sizes=[32])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_only_a_batch_shows_comes_as_one_sentence(index: CocoIndex, workers: int) -> None:
    stream = train(
        index,
        static=StaticShapes(((32, 32),)),
        augments=[RandomCrop(0.9, 0.9)],
        workers=workers,
        total_steps=2,
    )
    with pytest.raises(UserError, match=r"^no bucket holds a batch with [^\n]*$"):
        list(stream)


# ---------------------------------------------------------------------------- damage


def spoil(index: CocoIndex) -> dict[str, str]:
    """Damages three files in three ways; returns their names and what is said of them."""
    names = {index.item_id(i): Path(index.path(i)) for i in (1, 7, 8)}
    truncated, missing, other = names.values()
    truncated.write_bytes(truncated.read_bytes()[:-40])
    missing.unlink()
    Image.new("RGB", (50, 50)).save(other)
    reasons = ("truncated", "No such file", r"50 x 50 (height x width), but 48 x 64 by")
    return dict(zip(names, reasons, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_replaced_in_training(
    index: CocoIndex, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    bad = spoil(index)
    stream = train(index, total_steps=10, workers=workers, max_damaged=3)
    with caplog.at_level(logging.WARNING):
        batches = list(stream)
    assert all(len(batch.item_ids) == 4 for batch in batches)
    assert not {name for batch in batches for name in batch.item_ids} & set(bad)
    assert set(stream.damaged.found) == set(bad)
    for name, reason in bad.items():
        assert reason in stream.damaged.found[name]
    assert len(caplog.records) == 3
    with pytest.raises(UserError, match="more than the 2 that are allowed"):
        list(train(index, total_steps=10, workers=workers, max_damaged=2))


def test_damaged_images_are_left_out_of_evaluation(index: CocoIndex) -> None:
    bad = spoil(index)
    stream = evaluate(index, max_damaged=3)
    names = sorted(name for batch in stream for name in batch.item_ids)
    assert names == sorted({index.item_id(i) for i in range(22)} - set(bad))
    assert set(stream.damaged.found) == set(bad)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    index = write_data(tmp_path, [LANDSCAPE] * 4 + [PORTRAIT] * 4, {})
    lying = np.random.default_rng(0).integers(0, 256, (*LANDSCAPE, 3), dtype=np.uint8)
    for orientation, path in enumerate(map(index.path, range(8)), start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(lying).save(path, "PNG", exif=exif)
    found = {number - 1001: image for number, image, _ in images(evaluate(index, min_size=0))}
    assert len(found) == 8
    assert len({image.numpy().tobytes() for image in found.values()}) == 8
    for number, image in found.items():
        with Image.open(index.path(number)) as file:
            expected = np.asarray(ImageOps.exif_transpose(file))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_image_once(index: CocoIndex, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        stream = evaluate(index, rank=rank, world_size=world_size, workers=rank % 2)
        ids = [int(i) for batch in stream for i in batch.image_ids_B]
        assert ids == [int(i) for batch in stream for i in batch.image_ids_B]  # a second time
        seen += ids
    assert sorted(seen) == [1000 + n for n in range(1, 23)]


def test_evaluation_pictures(index: CocoIndex) -> None:
    batches = list(evaluate(index, exact_resize=True))
    mixed = [len({h > w for h, w in b.sizes_B2.tolist()}) > 1 for b in batches]
    assert sum(mixed) <= 1
    for batch in batches:
        assert not batch.valid_BQ.any() and batch.valid_BQ.shape[1] == 1
        assert batch.edges_BQE4 is None
        for row, name in enumerate(batch.item_ids):
            number = int(batch.image_ids_B[row]) - 1001
            assert name == index.item_id(number)
            assert tuple(batch.originals_B2[row].tolist()) == index.size(number)
            height, width = batch.sizes_B2[row].tolist()
            assert (height, width) == shortest_edge_size(*index.size(number), 48, 80)
            with Image.open(index.path(number)) as image:
                expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
            found = batch.images_BCHW[row, :, :height, :width].permute(1, 2, 0)
            assert np.array_equal(found.numpy(), expected)
    static = evaluate(index, static=StaticShapes(((96, 96),)))
    assert {tuple(batch.images_BCHW.shape[2:]) for batch in static} == {(96, 96)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_sizes": []}, r"short sides \[\]"),
        ({"flip": 2}, "flip=2"),
        ({"batch_size": 21}, "has 20 images, fewer than one global batch of 21"),
    ],
)
def test_values_out_of_range_are_refused(
    index: CocoIndex, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(index, **options)
    with pytest.raises(UserError, match="longest side 0"):
        evaluate(index, max_size=0)
