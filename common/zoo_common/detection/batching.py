"""Batches for detectors: images of many sizes and their objects in tensors of few shapes.

A device that prepares itself for each new shape (an NPU compiles, cuDNN searches) wants the same
shapes in every step: ``StaticShapes`` pads images to a bucket of a small fixed set, objects to
a fixed number of slots, and outlines to one of a few lengths. Without it a batch is as large as
what is in it, which costs a CPU least.

Shape letters: B images, C channels (RGB), H W pixels, N objects of an image, Q object slots,
E edge slots. masks_BQHW alone has a quarter of the padded height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo_common.damage import Damaged
from zoo_common.detection.transforms import Sample, shortest_edge_size
from zoo_common.errors import UserError

Size = tuple[int, int]  # height, width

_FEWEST_RINGS = 4


class DetectionBatch(NamedTuple):
    """Images padded to one size with their objects.

    Attributes:
        images_BCHW: uint8, RGB, 0 to 255; padded at the bottom and on the right with 0.
        sizes_B2: int64, height and width of each image in it.
        extent_2: int64, the height and width that the images need: their maxima, rounded up to
            the size divisibility. What lies beyond is as if it were not there.
        boxes_BQ4: float32, xyxy in pixels of the resized image; 0 in empty slots.
        labels_BQ: int64, class numbers; 0 in empty slots.
        valid_BQ: bool, which slots hold an object; those come first.
        edges_BQE4: float32, mask outlines in pixels of the resized image (see ``masks``), 0 in
            empty slots; None when no masks are asked for.
        rings_BQE: The ring of each edge in its object, -1 in empty slots; int16 in transit and
            int64 after ``to``. None together with the edges.
        image_ids_B: int64, COCO's image ids; stays in host memory, so that reading it never
            waits for the device.
        item_ids: File names, for people.
        damaged: Images that were met and left out while this batch was made.
        originals_B2: int64, height and width of each image as its file has it.
        ring_slots: More than any ring number in this batch; with static shapes a power of 4.
        masks_BQHW: uint8, 0 or 1, the objects' masks at a quarter of the padded height and width
            (see ``bitmasks``); all 0 in empty slots, and for an object of which nothing is left
            at this size. None when they are not asked for.
        centers_BQ2: float32, x and y of each mask's centre of mass at the image's full size, in
            pixels, of which the first is at 0; 0 in empty slots. None together with those masks.
        numbers_B: int64, the place of each image in its data set; this and the next two are for
            what a model adds where batches are made, and stay in host memory.
        flipped_B: bool, which images have left and right turned around.
        draws_B: int64, a random number for each image of a training batch, from the generator of
            its other draws; 0 in evaluation.
    """

    images_BCHW: Tensor
    sizes_B2: Tensor
    extent_2: Tensor
    boxes_BQ4: Tensor
    labels_BQ: Tensor
    valid_BQ: Tensor
    edges_BQE4: Tensor | None
    rings_BQE: Tensor | None
    image_ids_B: Tensor
    item_ids: list[str]
    damaged: list[Damaged]
    originals_B2: Tensor
    ring_slots: int
    masks_BQHW: Tensor | None = None
    centers_BQ2: Tensor | None = None
    numbers_B: Tensor | None = None
    flipped_B: Tensor | None = None
    draws_B: Tensor | None = None

    def to(self, device: torch.device) -> DetectionBatch:
        """The batch with all but the image ids on a device; does not wait if it is pinned."""
        pinned = self.images_BCHW.is_pinned()

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=pinned)

        return self._replace(
            images_BCHW=move(self.images_BCHW),
            sizes_B2=move(self.sizes_B2),
            extent_2=move(self.extent_2),
            boxes_BQ4=move(self.boxes_BQ4),
            labels_BQ=move(self.labels_BQ),
            valid_BQ=move(self.valid_BQ),
            edges_BQE4=None if self.edges_BQE4 is None else move(self.edges_BQE4),
            rings_BQE=None if self.rings_BQE is None else move(self.rings_BQE).long(),
            originals_B2=move(self.originals_B2),
            masks_BQHW=None if self.masks_BQHW is None else move(self.masks_BQHW),
            centers_BQ2=None if self.centers_BQ2 is None else move(self.centers_BQ2),
        )

    def chunk(self, parts: int) -> list[DetectionBatch]:
        """The batch in parts of equal size; the extent is that of the whole."""
        size = len(self.item_ids) // parts
        whole = ("extent_2", "damaged", "ring_slots")
        each = [name for name in self._fields if name not in whole]

        def part(first: int) -> DetectionBatch:
            values = {name: getattr(self, name) for name in each}
            cut: dict[str, Any] = {
                name: None if value is None else value[first : first + size]
                for name, value in values.items()
            }
            return self._replace(**cut)

        return [part(first) for first in range(0, size * parts, size)]


@dataclass(frozen=True)
class StaticShapes:
    """The shapes that batches may have.

    Attributes:
        buckets: Padded sizes (height, width); a batch takes the one of least area that holds it.
        slots: Objects of an image; None takes the most that an image of the data set has.
        edge_slots: Edges of an object; a batch takes the least that holds its longest outline.
    """

    buckets: tuple[Size, ...]
    slots: int | None = None
    edge_slots: tuple[int, ...] = (64, 256, 1024, 4096)


class Entry(NamedTuple):
    """One image of a batch to be, with its place in the data set and a random number."""

    sample: Sample
    original: Size
    image_id: int
    item_id: str
    number: int = 0
    draw: int = 0


def round_up(value: int, divisibility: int) -> int:
    """The next multiple of ``divisibility``."""
    return -(-value // divisibility) * divisibility


def suggest_buckets(
    min_sizes: Sequence[int], max_size: int, divisibility: int = 32
) -> tuple[Size, ...]:
    """A few padded sizes that hold every batch of images resized by their short side.

    With S the highest short side, L the longest side and M the long side of a 4:3 image of short
    side S: S x M and M x S hold most photographs, S x L and L x S all images of one orientation,
    M x M a batch of 4:3 images of both orientations, and L x L anything.

    Args:
        min_sizes: The short sides; the highest counts.
        max_size: What the long side does not exceed.
        divisibility: All sides are multiples of it.

    Returns:
        At most six sizes (height, width), by area.
    """
    short = min(max(min_sizes), max_size)
    middle = min(max(shortest_edge_size(3, 4, short, max_size)), max_size)
    s, m, l = (round_up(side, divisibility) for side in (short, middle, max_size))  # noqa: E741
    sizes = {(s, m), (m, s), (s, l), (l, s), (m, m), (l, l)}
    return tuple(sorted(sizes, key=lambda size: (size[0] * size[1], size)))


class Collate:
    """Makes a batch of samples.

    Args:
        shapes: The shapes that batches may have; None for natural ones. Without ``slots`` there
            are as many as the batch needs.
        divisibility: Naturally padded sides, and the extent, are multiples of it.
        masks: Whether batches have outlines.
        quarter_masks: Whether they have masks at a quarter of their size, and centres.

    Raises:
        UserError: A bucket side is no multiple of ``divisibility``, or a count is no count; or
            quarters are wanted and ``divisibility`` is no multiple of 4.
    """

    def __init__(
        self,
        shapes: StaticShapes | None,
        *,
        divisibility: int,
        masks: bool,
        quarter_masks: bool = False,
    ) -> None:
        if quarter_masks and divisibility % 4:
            raise UserError(
                f"sides that are multiples of {divisibility} have no quarters, at which masks are "
                "wanted; give a multiple of 4, for example 32"
            )
        if shapes is not None:
            _check_shapes(shapes, divisibility)
        self._shapes = shapes
        self._divisibility = divisibility
        self.masks = masks
        self.quarter_masks = quarter_masks

    def __call__(self, entries: Sequence[Entry], damaged: list[Damaged]) -> DetectionBatch:
        """The batch of these images, in their order; there may be none.

        Raises:
            UserError: An image that the shapes do not hold.
        """
        samples = [entry.sample for entry in entries]
        sizes = [sample.size for sample in samples]
        extent = self.extent(sizes)
        height, width = self.check_fit(sizes, lambda i: entries[i].item_id)
        slots = self._slots(entries)
        boxes_BQ4 = np.zeros((len(entries), slots, 4), np.float32)
        labels_BQ = np.zeros((len(entries), slots), np.int64)
        valid_BQ = np.zeros((len(entries), slots), bool)
        for row, sample in enumerate(samples):
            count = len(sample.labels_N)
            boxes_BQ4[row, :count] = sample.boxes_N4
            labels_BQ[row, :count] = sample.labels_N
            valid_BQ[row, :count] = True
        edges_BQE4, rings_BQE = self._outlines(entries, slots) if self.masks else (None, None)
        masks_BQHW, centers_BQ2 = None, None
        if self.quarter_masks:
            masks_BQHW, centers_BQ2 = _quarters(samples, slots, height // 4, width // 4)
        return DetectionBatch(
            images_BCHW=_stack_images(samples, height, width),
            sizes_B2=_integers(sizes),
            extent_2=torch.tensor(extent),
            boxes_BQ4=torch.from_numpy(boxes_BQ4),
            labels_BQ=torch.from_numpy(labels_BQ),
            valid_BQ=torch.from_numpy(valid_BQ),
            edges_BQE4=edges_BQE4,
            rings_BQE=rings_BQE,
            image_ids_B=torch.tensor([entry.image_id for entry in entries], dtype=torch.int64),
            item_ids=[entry.item_id for entry in entries],
            damaged=damaged,
            originals_B2=_integers([entry.original for entry in entries]),
            ring_slots=self._ring_slots(samples),
            masks_BQHW=masks_BQHW,
            centers_BQ2=centers_BQ2,
            numbers_B=torch.tensor([entry.number for entry in entries], dtype=torch.int64),
            flipped_B=torch.tensor([sample.flipped for sample in samples], dtype=torch.bool),
            draws_B=torch.tensor([entry.draw for entry in entries], dtype=torch.int64),
        )

    def extent(self, sizes: Sequence[Size]) -> Size:
        """The smallest multiples of the divisibility that hold images of these sizes."""
        if not sizes:
            return self._divisibility, self._divisibility
        heights, widths = zip(*sizes, strict=True)
        return (
            round_up(max(heights), self._divisibility),
            round_up(max(widths), self._divisibility),
        )

    def fit(self, extent: Size) -> Size | None:
        """The size to which a batch of this extent is padded; None if no bucket holds it."""
        if self._shapes is None:
            return extent
        fitting = [b for b in self._shapes.buckets if b[0] >= extent[0] and b[1] >= extent[1]]
        return min(fitting, key=lambda size: (size[0] * size[1], size), default=None)

    def check_fit(self, sizes: Sequence[Size], item_id: Callable[[int], str]) -> Size:
        """The size to which images of these sizes are padded together.

        Args:
            sizes: Of the images.
            item_id: The name of one of them, for the error.

        Raises:
            UserError: No bucket holds them.
        """
        padded = self.fit(self.extent(sizes))
        if padded is not None:
            return padded
        assert self._shapes is not None
        numbers = range(len(sizes))
        extremes = dict.fromkeys(max(numbers, key=lambda i: sizes[i][side]) for side in (0, 1))
        named = " and ".join(f"{item_id(i)} ({sizes[i][0]} x {sizes[i][1]})" for i in extremes)
        buckets = ", ".join(f"{height} x {width}" for height, width in self._shapes.buckets)
        raise UserError(
            f"no bucket holds a batch with {named}, resized as said in brackets: there are "
            f"{buckets} (height x width); add a larger one"
        )

    def most_bytes(self, batch_size: int, extents: Sequence[Size], objects: int, edges: int) -> int:
        """The most memory that a batch takes.

        Args:
            batch_size: Images.
            extents: Extents of batches; the largest counts.
            objects: The most objects of an image.
            edges: The most edges of an object.
        """
        padded = [self.fit(extent) or extent for extent in extents]
        pixels = max((height * width for height, width in padded), default=0)
        if self._shapes is not None:
            objects = self._shapes.slots or objects
            edges = min((e for e in self._shapes.edge_slots if e >= edges), default=edges)
        object_bytes = 4 * 4 + 8 + 1
        object_bytes += edges * (4 * 4 + 2) if self.masks else 0
        object_bytes += pixels // 16 + 2 * 4 if self.quarter_masks else 0
        return batch_size * (3 * pixels + objects * object_bytes)

    def _slots(self, entries: Sequence[Entry]) -> int:
        most = max(entries, key=lambda entry: len(entry.sample.labels_N), default=None)
        count = len(most.sample.labels_N) if most is not None else 0
        if self._shapes is None or self._shapes.slots is None:
            return max(1, count)
        if most is not None and count > self._shapes.slots:
            raise too_many_objects(most.item_id, most.image_id, count, self._shapes.slots)
        return self._shapes.slots

    def _outlines(self, entries: Sequence[Entry], slots: int) -> tuple[Tensor, Tensor]:
        longest = self._edge_slots(entries)
        edges_BQE4 = np.zeros((len(entries), slots, longest, 4), np.float32)
        rings_BQE = np.full((len(entries), slots, longest), -1, np.int16)
        for row, entry in enumerate(entries):
            sample = entry.sample
            assert sample.edges is not None and sample.rings is not None
            for slot, (edges, rings) in enumerate(zip(sample.edges, sample.rings, strict=True)):
                edges_BQE4[row, slot, : len(edges)] = edges
                rings_BQE[row, slot, : len(rings)] = rings
        return torch.from_numpy(edges_BQE4), torch.from_numpy(rings_BQE)

    def _edge_slots(self, entries: Sequence[Entry]) -> int:
        counts = [
            max((len(edges) for edges in entry.sample.edges or []), default=0) for entry in entries
        ]
        most = max(counts, default=0)
        if self._shapes is None:
            return max(1, most)
        fitting = [slots for slots in self._shapes.edge_slots if slots >= most]
        if not fitting:
            entry = entries[counts.index(most)]
            raise too_many_edges(entry.item_id, entry.image_id, most, max(self._shapes.edge_slots))
        return min(fitting)

    def _ring_slots(self, samples: Sequence[Sample]) -> int:
        outlines = [rings for sample in samples for rings in sample.rings or [] if len(rings)]
        count = 1 + max((int(rings.max()) for rings in outlines), default=0)
        if self._shapes is None:
            return count
        slots = _FEWEST_RINGS
        while slots < count:
            slots *= 4
        return slots


def too_many_objects(item_id: str, image_id: int, count: int, slots: int) -> UserError:
    """The error of an image with more objects than slots."""
    return UserError(
        f"image {image_id} ({item_id}) has {count} objects, more than the {slots} target slots; "
        "give more slots, or none to take the number from the data set"
    )


def too_many_edges(item_id: str, image_id: int, count: int, slots: int) -> UserError:
    """The error of an outline with more edges than slots."""
    return UserError(
        f"an object of image {image_id} ({item_id}) has an outline of {count} edges, more than "
        f"the {slots} of the largest edge slots; give a larger number of edge slots"
    )


def _check_shapes(shapes: StaticShapes, divisibility: int) -> None:
    sides = [side for bucket in shapes.buckets for side in bucket]
    if not sides or any(side < 1 or side % divisibility for side in sides):
        raise UserError(
            f"buckets={list(shapes.buckets)} are no sizes to pad to; give (height, width) pairs "
            f"whose sides are multiples of {divisibility}"
        )
    if shapes.slots is not None and shapes.slots < 1:
        raise UserError(
            f"slots={shapes.slots} is no number of objects; give a larger one, or none to take the "
            "number from the data set"
        )
    if not shapes.edge_slots or min(shapes.edge_slots) < 1:
        raise UserError(
            f"edge_slots={list(shapes.edge_slots)} are no numbers of edges; give (64, 256, 1024), "
            "for example"
        )


def _stack_images(samples: Sequence[Sample], height: int, width: int) -> Tensor:
    images_BCHW = np.empty((len(samples), 3, height, width), np.uint8)
    for row, sample in enumerate(samples):
        h, w = sample.size
        # Only what the image leaves is set to 0: writing all of it twice would cost as much as
        # half of the resize.
        images_BCHW[row, :, :h, w:] = 0
        images_BCHW[row, :, h:] = 0
        np.copyto(images_BCHW[row, :, :h, :w], sample.image_HWC.transpose(2, 0, 1))
    return torch.from_numpy(images_BCHW)


def _quarters(
    samples: Sequence[Sample], slots: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The masks in this size, a quarter of the batch's, and the centres of the full ones."""
    masks_BQHW = np.zeros((len(samples), slots, height, width), np.uint8)
    centers_BQ2 = np.zeros((len(samples), slots, 2), np.float32)
    for row, sample in enumerate(samples):
        assert sample.masks is not None
        moments_N3 = sample.masks.moments()
        count = len(moments_N3)
        centers_BQ2[row, :count] = moments_N3[:, 1:] / np.maximum(moments_N3[:, :1], 1)
        sample.masks.write_quarters(masks_BQHW[row, :count])
    return torch.from_numpy(masks_BQHW), torch.from_numpy(centers_BQ2)


def _integers(pairs: Sequence[Size]) -> Tensor:
    array_B2: NDArray[np.int64] = np.array(pairs, np.int64).reshape(-1, 2)
    return torch.from_numpy(array_B2)
