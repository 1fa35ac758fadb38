"""Streams of detection batches from an index of images with objects, such as COCO's.

The machinery is that of ``zoo_common.data``: the data position of a run is its step number, what
is drawn for an item is a function of (seed, epoch, item), and neither the number of workers nor
that of processes changes a picture. An image file that is missing, broken or of another size than
its annotations say is damaged: replaced by the next one in training, left out in evaluation,
counted, and limited. EXIF orientation is applied, as detectron2 does.

A training item is that of detectron2's DatasetMapper with its default augmentation
(https://github.com/facebookresearch/detectron2, Apache-2.0, at 02b5c4e2): resize by a drawn short
side, flip, clip boxes, drop empty ones and crowds. Differences, and why:

- Batches of one orientation are formed over all processes and end with the epoch, where
  detectron2's are formed in each process from an endless stream: so an epoch has whole steps, and
  a run can resume at any of them.
- A file of another size than its annotations say is damaged, where detectron2 ends the run.
- The resize; see ``transforms``.

Shape letters: N images of a data set or objects of an image, B images of a batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import BatchSampler

from zoo_common.damage import Damaged, DamagedItems
from zoo_common.data import (
    AnyBatch,
    AnyBatchT,
    BatchStream,
    Draw,
    ImageFiles,
    ImageItems,
    Items,
    StepSampler,
    kept_rng,
    seed_rng,
    shard,
)
from zoo_common.detection.batching import (
    Collate,
    DetectionBatch,
    Entry,
    Size,
    StaticShapes,
    too_many_edges,
    too_many_objects,
)
from zoo_common.detection.bitmasks import Masks
from zoo_common.detection.coco import Objects, Outline
from zoo_common.detection.transforms import (
    Augment,
    RandomFlip,
    RandomResize,
    Sample,
    check_sides,
    clip_boxes,
    drop_empty,
    resize,
    shortest_edge_size,
)
from zoo_common.elastic import Met
from zoo_common.images import DamagedImageError, read_image

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # Python's own has no default before 3.13

    FinishedT = TypeVar("FinishedT", bound=AnyBatch, default=DetectionBatch)

_CPU = torch.device("cpu")
_DIVISIBILITY = 32
_DRAW_BITS = 63  # of a number that fits int64


class DetectionSource(ImageFiles, Protocol):
    """Images with objects: ``zoo_common.detection.coco.CocoIndex``, or what looks like it."""

    @property
    def most_objects(self) -> int:
        """The most objects of an image, crowds aside."""

    @property
    def most_edges(self) -> int:
        """The most edges of an outline, crowds aside."""

    def image_id(self, index: int) -> int:
        """The image's number in the annotations."""

    def size(self, index: int) -> Size:
        """Height and width by the annotations."""

    def sizes(self) -> NDArray[np.int32]:
        """Those of all images, [N, 2]."""

    def objects(self, index: int) -> Objects:
        """The image's objects."""

    def outlines(self, index: int) -> list[Outline]:
        """Their outlines, in the same order."""

    def mask_runs(self, index: int) -> NDArray[np.int64]:
        """What they cover in the file, as ``bitmasks.Masks`` takes it, [K, 4]."""

    def trainable(self) -> NDArray[np.int64]:
        """The images that have an object that is no crowd."""


# ---------------------------------------------------------------------------- order


class GroupedSampler(StepSampler):
    """A ``StepSampler`` whose global batches are of one group each, as far as possible.

    The epoch's order is dealt to one pile a group; a pile that has reached a global batch becomes
    the next step. What the piles hold at the end of the epoch makes mixed batches, so that there
    are as many steps as without groups, and in a mixed batch items of a group stand together.
    Where part of the epoch was met in global batches of another size, the rest is dealt anew.

    Args:
        groups_N: The group number of each item, from 0.
        batch_size: Items a step of this process.
        rank: This process, 0 to world_size - 1.
        world_size: Number of processes.
        seed: Decides the order together with the epoch.
        start_step: The first step to yield.
        total_steps: The step to stop before; None for an endless stream.

    Raises:
        UserError: Fewer items than one global batch.
    """

    def __init__(
        self,
        groups_N: NDArray[np.int64],
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int = 0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(
            len(groups_N),
            batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            start_step=start_step,
            total_steps=total_steps,
        )
        self._groups_N = groups_N

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The items of an epoch, one global batch after the other; what is left over is not in."""
        met = [part for part in self.met if part.epoch == epoch]
        return self._order(super().order(epoch), self.global_batch, met)

    def _order(
        self, order_N: NDArray[np.int64], size: int, met: Sequence[Met]
    ) -> NDArray[np.int64]:
        """The same for any size of a global batch; in the place of what was met stands that."""
        while met and met[-1].global_batch == size:  # by other ranks, but in the same batches
            met = met[:-1]
        if not met:
            return self._dealt(order_N, size)
        last = met[-1]
        gone = self._order(order_N, last.global_batch, met[:-1])[: last.stop * last.global_batch]
        rest = self._dealt(order_N[~np.isin(order_N, gone)], size)
        return np.concatenate([np.resize(gone, last.steps_of(size) * size), rest])

    def _dealt(self, order_N: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Items in batches of one group each."""
        group_N = self._groups_N[order_N]
        # Positions in the order, pile by pile, and the place of each in its pile.
        dealt_N = np.argsort(group_N, kind="stable")
        counts = np.bincount(group_N)
        place_N = np.arange(len(dealt_N)) - np.repeat(np.cumsum(counts) - counts, counts)
        whole_N = place_N < np.repeat(counts // size * size, counts)
        left = np.sort(dealt_N[~whole_N])
        mixed = left[: len(left) // size * size].reshape(-1, size)
        together = np.argsort(group_N[mixed], axis=1, kind="stable")
        batches = np.concatenate(
            [dealt_N[whole_N].reshape(-1, size), np.take_along_axis(mixed, together, axis=1)]
        )
        ready = batches.max(axis=1)
        in_turn: NDArray[np.int64] = order_N[batches[np.argsort(ready)].reshape(-1)]
        return in_turn


# ---------------------------------------------------------------------------- items


@dataclass(frozen=True)
class _Chosen:
    """Some images of a source; their positions here are 0, 1, ..."""

    source: DetectionSource
    numbers_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers_N)

    def number(self, position: int) -> int:
        """The image's number in the source."""
        return int(self.numbers_N[position])

    def path(self, position: int) -> str:
        """The path of an image's file."""
        return self.source.path(self.number(position))

    def item_id(self, position: int) -> str:
        """The image's name for people."""
        return self.source.item_id(self.number(position))

    def sizes(self) -> NDArray[np.int32]:
        """Heights and widths by the annotations, [N, 2]."""
        return self.source.sizes()[self.numbers_N]

    def portraits(self) -> NDArray[np.int64]:
        """1 for images that are higher than wide, 0 for others, [N]."""
        sizes_N2 = self.sizes()
        return (sizes_N2[:, 0] > sizes_N2[:, 1]).astype(np.int64)


class _DetectionItems(ImageItems):
    """What the data sets of training and evaluation share; a worker gets a copy."""

    def __init__(
        self, chosen: _Chosen, collate: Collate, extents: Sequence[Size], max_damaged: int
    ) -> None:
        super().__init__(chosen, max_damaged)
        self._chosen = chosen
        self._collate = collate
        self._extents = extents

    def read(self, index: int) -> Image.Image:
        """One image, upright.

        Raises:
            DamagedImageError: It cannot be read, or its objects are those of another size.
        """
        image = read_image(self._chosen.path(index), upright=True)
        height, width = self._chosen.source.size(self._chosen.number(index))
        if image.size != (width, height):
            raise DamagedImageError(
                f"it is {image.height} x {image.width} (height x width), but {height} x {width} "
                "by the annotations"
            )
        return image

    def batch_bytes(self, batch_size: int) -> int:
        """The most memory of a batch of one orientation; mixed ones are rare."""
        source = self._chosen.source
        return self._collate.most_bytes(
            batch_size, self._extents, source.most_objects, source.most_edges
        )

    def _entry(self, position: int, original: Size, sample: Sample, draw: int = 0) -> Entry:
        number = self._chosen.number(position)
        return Entry(
            sample,
            original,
            self._chosen.source.image_id(number),
            self._chosen.item_id(position),
            number,
            draw,
        )


class TrainItems(_DetectionItems):
    """Makes training batches from lists of ``Draw``.

    In the place of a damaged image comes the next one of the data set that can be read, with its
    own objects, so that a batch always has its full size.
    """

    def __init__(
        self,
        chosen: _Chosen,
        collate: Collate,
        extents: Sequence[Size],
        max_damaged: int,
        *,
        augments: Sequence[Augment],
        seed: int,
    ) -> None:
        super().__init__(chosen, collate, extents, max_damaged)
        self._augments = augments
        self._seed = seed

    def __getitems__(self, draws: Sequence[Draw]) -> DetectionBatch:
        entries: list[Entry] = []
        damaged: list[Damaged] = []
        with kept_rng():
            for draw in draws:
                image, position = self.read_or_next(draw.index, damaged)
                seed_rng(self._seed, draw.epoch, draw.index)
                sample = self._sample(image, position)
                for augment in self._augments:
                    sample = augment(sample)
                sample = drop_empty(clip_boxes(sample))
                original = image.height, image.width
                drawn = random.getrandbits(_DRAW_BITS)
                entries.append(self._entry(position, original, sample, drawn))
        return self._collate(entries, damaged)

    def _sample(self, image: Image.Image, position: int) -> Sample:
        number = self._chosen.number(position)
        objects = self._chosen.source.objects(number)
        sample = Sample(np.array(image), objects.boxes_N4.astype(np.float64), objects.labels_N)
        if self._collate.masks:
            outlines = self._chosen.source.outlines(number)
            sample = sample._replace(
                edges=[outline.edges for outline in outlines],
                rings=[outline.rings for outline in outlines],
            )
        if self._collate.quarter_masks:
            runs_K4 = self._chosen.source.mask_runs(number)
            sample = sample._replace(
                masks=Masks.of_runs(runs_K4, len(objects.labels_N), *sample.size)
            )
        return sample.select(~objects.crowd_N)


class EvalItems(_DetectionItems):
    """Makes evaluation batches from lists of positions; damaged images are left out."""

    def __init__(
        self,
        chosen: _Chosen,
        collate: Collate,
        extents: Sequence[Size],
        max_damaged: int,
        *,
        min_size: int,
        max_size: int,
        exact_resize: bool,
    ) -> None:
        super().__init__(chosen, collate, extents, max_damaged)
        self._min_size = min_size
        self._max_size = max_size
        self._exact_resize = exact_resize

    def __getitems__(self, positions: Sequence[int]) -> DetectionBatch:
        entries: list[Entry] = []
        damaged: list[Damaged] = []
        for position in positions:
            image = self.read_or_note(position, damaged)
            if image is None:
                continue
            sample = Sample(np.array(image), np.zeros((0, 4)), np.zeros(0, np.int64))
            new = shortest_edge_size(*sample.size, self._min_size, self._max_size)
            resized = resize(sample, *new, exact=self._exact_resize)
            entries.append(self._entry(position, sample.size, resized))
        return self._collate(entries, damaged)


class _Finished(Generic[AnyBatchT]):
    """Batches as a model makes them of those with images and objects."""

    def __init__(
        self, items: Items[DetectionBatch], finish: Callable[[DetectionBatch], AnyBatchT]
    ) -> None:
        self._items = items
        self._finish = finish

    def __getitems__(self, wanted: Any) -> AnyBatchT:
        return self._finish(self._items.__getitems__(wanted))

    def batch_bytes(self, batch_size: int) -> int:
        """The most memory of a batch, without what ``finish`` adds."""
        return self._items.batch_bytes(batch_size)


# ---------------------------------------------------------------------------- streams


def build_train_stream(
    index: DetectionSource,
    *,
    min_sizes: Sequence[int],
    max_size: int,
    sampling: str = "choice",
    flip: float = 0.5,
    augments: Sequence[Augment] = (),
    masks: bool,
    quarter_masks: bool = False,
    finish: Callable[[DetectionBatch], FinishedT] | None = None,
    keep_empty: bool = False,
    static: StaticShapes | None = None,
    divisibility: int = _DIVISIBILITY,
    group_by_aspect: bool = True,
    exact_resize: bool = False,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    total_steps: int | None = None,
    workers: int = 4,
    prefetch_factor: int = 2,
    max_damaged: int = 10,
    device: torch.device = _CPU,
) -> BatchStream[FinishedT]:
    """The training batches of one process for a whole run.

    The arguments from ``batch_size`` on are those of ``zoo_common.data.build_loader``, and these
    are detection's:
        index: The images and their objects.
        min_sizes: Short sides to draw from, in pixels; see ``RandomResize``.
        max_size: What the long side must not exceed.
        sampling: "choice", or "range" for ``min_sizes`` as the lowest and the highest.
        flip: Probability of turning left and right around.
        augments: What is done to a sample before resize and flip; picklable.
        masks: Whether batches have outlines; objects without one are dropped, so that the index
            should have been opened with masks.
        quarter_masks: Likewise for masks at a quarter of their size, and their centres.
        finish: Makes of each batch what the stream gives, in the process that loads; picklable.
            The check of shared memory does not count what it adds.
        keep_empty: Also train on images without objects, as background.
        static: The shapes that batches may have; None for natural ones.
        divisibility: Naturally padded sides, and the extent, are multiples of it.
        group_by_aspect: Batches of one orientation, as far as possible.
        exact_resize: Pillow's resize even where torch has a faster one.

    Raises:
        UserError: A value out of its range, fewer images than one global batch, an image that the
            static shapes do not hold, too little shared memory; later, too many damaged images.
    """
    chosen = _Chosen(index, np.arange(len(index)) if keep_empty else index.trainable())
    static = static and _resolve(static, index, masks=masks)
    collate = Collate(static, divisibility=divisibility, masks=masks, quarter_masks=quarter_masks)
    random_resize = RandomResize(min_sizes, max_size, sampling=sampling, exact=exact_resize)
    groups_N = chosen.portraits() * group_by_aspect
    items = TrainItems(
        chosen,
        collate,
        _extents(chosen, groups_N, max(min_sizes), max_size, collate, any_aspect=bool(augments)),
        max_damaged,
        augments=[*augments, random_resize, RandomFlip(flip)],
        seed=seed,
    )
    batches = GroupedSampler(
        groups_N,
        batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_step=start_step,
        total_steps=total_steps,
    )
    # One image at least must be left to put in the place of the others.
    damaged = DamagedItems(min(max_damaged, len(groups_N) - 1), "replaced by the next one")
    made = _finished(items, finish)
    return BatchStream(
        made, batches, damaged, workers=workers, prefetch_factor=prefetch_factor, device=device
    )


def build_eval_stream(
    index: DetectionSource,
    *,
    min_size: int,
    max_size: int,
    static: StaticShapes | None = None,
    divisibility: int = _DIVISIBILITY,
    exact_resize: bool = False,
    finish: Callable[[DetectionBatch], FinishedT] | None = None,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 4,
    prefetch_factor: int = 2,
    max_damaged: int = 10,
    device: torch.device = _CPU,
) -> BatchStream[FinishedT]:
    """The evaluation batches of one process: over all processes, every image exactly once.

    Images come sorted by aspect, and batches have no objects: one slot, which is empty. The last
    batch may be smaller, and processes may have one batch more or less. Damaged images are left
    out, logged, and found in ``BatchStream.damaged``. Arguments and errors are those of
    ``build_train_stream``; of ``static`` the buckets count, and ``min_size`` 0 leaves images in
    the size that they have.
    """
    check_sides([min_size], max_size, lowest=0)
    chosen = _Chosen(index, np.array(shard(len(index), rank, world_size), np.int64))
    sizes_N2 = chosen.sizes()
    if static is not None:
        static = replace(static, slots=1)
    collate = Collate(static, divisibility=divisibility, masks=False)
    items = EvalItems(
        chosen,
        collate,
        _extents(chosen, chosen.portraits(), min_size, max_size, collate),
        max_damaged,
        min_size=min_size,
        max_size=max_size,
        exact_resize=exact_resize,
    )
    by_aspect = np.argsort(sizes_N2[:, 0] / sizes_N2[:, 1], kind="stable").tolist()
    batches = BatchSampler(by_aspect, batch_size, drop_last=False)
    damaged = DamagedItems(max_damaged, "left out")
    made = _finished(items, finish)
    return BatchStream(
        made, batches, damaged, workers=workers, prefetch_factor=prefetch_factor, device=device
    )


def _finished(
    items: Items[DetectionBatch], finish: Callable[[DetectionBatch], FinishedT] | None
) -> Items[FinishedT]:
    if finish is None:
        return cast("Items[FinishedT]", items)  # the default of the type
    return _Finished(items, finish)


def _resolve(static: StaticShapes, index: DetectionSource, *, masks: bool) -> StaticShapes:
    """The shapes with what they leave to the data set, which they are checked to hold.

    Raises:
        UserError: An image has more objects or edges than there are slots.
    """
    slots = max(1, index.most_objects) if static.slots is None else static.slots
    largest = max(static.edge_slots, default=0)
    if index.most_objects > slots or (masks and index.most_edges > largest):
        for number in range(len(index)):
            crowd_N = index.objects(number).crowd_N
            count = int((~crowd_N).sum())
            if count > slots:
                raise too_many_objects(index.item_id(number), index.image_id(number), count, slots)
            if masks:
                edges = [
                    len(o.edges)
                    for o, c in zip(index.outlines(number), crowd_N, strict=True)
                    if not c
                ]
                if max(edges, default=0) > largest:
                    raise too_many_edges(
                        index.item_id(number), index.image_id(number), max(edges), largest
                    )
    return replace(static, slots=slots)


def _extents(
    chosen: _Chosen,
    groups_N: NDArray[np.int64],
    short: int,
    max_size: int,
    collate: Collate,
    *,
    any_aspect: bool = False,
) -> list[Size]:
    """The extent of each group's batches with the largest images, after the resize.

    With ``any_aspect``, as after a crop, it is that of any image.

    Raises:
        UserError: No bucket holds a batch of any of the images.
    """
    if any_aspect:
        return [(max_size, max_size)]
    unique, first, inverse = np.unique(
        chosen.sizes(), axis=0, return_index=True, return_inverse=True
    )
    resized = [shortest_edge_size(int(h), int(w), short, max_size) for h, w in unique]
    if resized:
        collate.check_fit(resized, lambda i: chosen.item_id(int(first[i])))
    kinds = [np.unique(inverse.reshape(-1)[groups_N == group]) for group in np.unique(groups_N)]
    return [collate.extent([resized[i] for i in kind]) for kind in kinds]
