"""The way of images from disk to device: order, randomness, damage, workers, batches.

Nothing here depends on what went before in a run. Step s lies in epoch e = s // steps_per_epoch;
the order of epoch e is a function of (seed, e), and the random augmentation of an item is a
function of (seed, e, index). So the data position of a run is its step number alone, one stream
serves the whole run, and neither the number of workers nor that of processes changes a picture.
Only where the global batch changed in an epoch, the rest of that epoch depends on what was met of
it before, see ``elastic.Met``.

Shape letters: B images, C channels (RGB), H W pixels, D numbers that a transform left behind.
"""

from __future__ import annotations

import os
import random
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from zoo_common.beats import beat
from zoo_common.damage import Damaged, DamagedItems, DamagedShare
from zoo_common.data_workers import WorkerInit, check_shared_memory
from zoo_common.elastic import Met
from zoo_common.errors import UserError
from zoo_common.images import DamagedImageError, read_image

_CPU = torch.device("cpu")


# ---------------------------------------------------------------------------- order


class Draw(NamedTuple):
    """One item of one epoch: all that its picture depends on, beside the run's seed."""

    epoch: int
    index: int  # type: ignore[assignment]  # tuple.index is of no use here


class StepSampler:
    """The batches of one process over a whole run, as lists of ``Draw``; a batch sampler.

    The global batch of a step is a contiguous slice of the epoch's order, and rank r takes its
    r-th part, so that the global batch does not depend on the number of processes. What does not
    fill a global batch at the end of an epoch is dropped from that epoch.

    Attributes:
        met: What other processes met of an epoch; where its order depends on their number, the
            order goes on with what they left.

    Args:
        size: Number of items.
        batch_size: Items a step of this process.
        rank: This process, 0 to world_size - 1.
        world_size: Number of processes.
        seed: Decides the order together with the epoch.
        start_step: The first step to yield.
        total_steps: The step to stop before; None for an endless stream.
        shuffle: False takes the items in their own order in each epoch.

    Raises:
        UserError: Fewer items than one global batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int = 0,
        total_steps: int | None = None,
        shuffle: bool = True,
    ) -> None:
        assert 0 <= rank < world_size
        self.steps_per_epoch = steps_per_epoch(size, batch_size, world_size)
        self.met: tuple[Met, ...] = ()
        self.start_step = start_step
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.global_batch = batch_size * world_size
        self._size = size
        self._rank = rank
        self._seed = seed
        self._shuffle = shuffle

    def __len__(self) -> int:
        """Steps from ``start_step`` to ``total_steps``; a TypeError for an endless stream."""
        if self.total_steps is None:
            raise TypeError("an endless stream has no length")
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[Draw]]:
        step, epoch, order = self.start_step, -1, np.empty(0, np.int64)
        while self.total_steps is None or step < self.total_steps:
            now, position = divmod(step, self.steps_per_epoch)
            if now != epoch:
                epoch, order = now, self.order(now)
            begin = position * self.global_batch + self._rank * self.batch_size
            yield [Draw(epoch, int(i)) for i in order[begin : begin + self.batch_size]]
            step += 1

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The items of an epoch, one global batch after the other; what is left over is last."""
        if not self._shuffle:
            return np.arange(self._size)
        # Sorting raw Philox words, which numpy promises never to change, keeps the order of an
        # epoch the same under any numpy; Generator.permutation has no such promise.
        key = epoch << 64 | _unsigned(self._seed)
        return np.argsort(np.random.Philox(key=key).random_raw(self._size))


def steps_per_epoch(size: int, batch_size: int, world_size: int) -> int:
    """Whole global batches in a data set.

    Raises:
        UserError: There is none.
    """
    steps = size // (batch_size * world_size)
    if steps == 0:
        raise UserError(
            f"the training set has {size} images, fewer than one global batch of "
            f"{batch_size * world_size} ({batch_size} images x {world_size} processes); "
            "use a smaller batch size or fewer processes"
        )
    return steps


def shard(size: int, rank: int, world_size: int) -> range:
    """The items of one process in evaluation: every item in exactly one process, no padding."""
    return range(rank, size, world_size)


# ---------------------------------------------------------------------------- randomness


@contextmanager
def kept_rng() -> Iterator[None]:
    """Puts back the states of Python's, numpy's and torch's CPU generators; takes 60 us."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_rng(seed: int, epoch: int, index: int) -> None:
    """Seeds the same generators for one item of one epoch; takes 10 us."""
    packed = struct.pack("<Qqq", _unsigned(seed), epoch, index)
    # Three seeds, since numpy and torch turn the same one into the same Mersenne twister.
    for_python, for_torch, for_numpy = struct.unpack(
        "<QQL", blake2b(packed, digest_size=20).digest()
    )
    random.seed(for_python)
    np.random.seed(for_numpy)
    # torch.manual_seed would also seed the accelerators, and takes 100 us.
    torch.default_generator.manual_seed(for_torch)


def _unsigned(seed: int) -> int:
    return seed % (1 << 64)


# ---------------------------------------------------------------------------- items


class ImageFiles(Protocol):
    """A list of image files."""

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """The path of an image's file."""

    def item_id(self, index: int) -> str:
        """The image's name for people."""


class ImageSource(ImageFiles, Protocol):
    """A list of labelled image files, for example ``zoo_common.imagenet.FolderIndex``."""

    def label(self, index: int) -> int:
        """The image's class number."""


class Pixels(NamedTuple):
    """What a transform makes of an image.

    ``draws`` are whole numbers that it drew for a later part on the device, such as where to
    erase; always as many for one transform.
    """

    image_HWC: NDArray[np.uint8]
    draws: tuple[int, ...] = ()


Transform = Callable[[Image.Image], Pixels]


class AnyBatch(Protocol):
    """What a stream needs to know of a batch."""

    @property
    def item_ids(self) -> list[str]:
        """The names of the images; an empty list is a batch without any, and is passed over."""

    @property
    def damaged(self) -> list[Damaged]:
        """Images that were met and left out while the batch was made."""


AnyBatchT = TypeVar("AnyBatchT", bound=AnyBatch)
AnyBatchT_co = TypeVar("AnyBatchT_co", bound=AnyBatch, covariant=True)


class Items(Protocol[AnyBatchT_co]):
    """What makes the batches of a stream; each worker has a copy."""

    def __getitems__(self, wanted: Any, /) -> AnyBatchT_co:
        """A batch of what the sampler asks for."""

    def batch_bytes(self, batch_size: int) -> int:
        """The most memory that a batch of so many images takes."""


class Batch(NamedTuple):
    """Images of one size with their labels.

    Attributes:
        images_BCHW: uint8, RGB, 0 to 255.
        labels_B: int64 class numbers.
        draws_BD: int64, what the transform drew for the device; stays in host memory, so that
            reading it never waits for the device.
        item_ids: The images' names, in the order of the batch.
        damaged: Images that were met and left out while this batch was made.
    """

    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    draws_BD: torch.Tensor
    item_ids: list[str]
    damaged: list[Damaged]

    def to(self, device: torch.device) -> Batch:
        """The batch with images and labels on a device; does not wait if they are pinned."""
        pinned = self.images_BCHW.is_pinned()
        return self._replace(
            images_BCHW=self.images_BCHW.to(device, non_blocking=pinned),
            labels_B=self.labels_B.to(device, non_blocking=pinned),
        )


class Normalize(nn.Module):
    """uint8 images of 0 to 255 to float32, (image / 255 - mean) / std by channel.

    Args:
        mean: By channel, for values in [0, 1].
        std: By channel, for values in [0, 1].
    """

    mean_C11: torch.Tensor
    std_C11: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean_C11", mean), ("std_C11", std)):
            tensor = torch.tensor(values, dtype=torch.float32).mul_(255).view(-1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns float32 [B, C, H, W], a new tensor."""
        return images_BCHW.to(torch.float32).sub_(self.mean_C11).div_(self.std_C11)


class ImageItems:
    """Reads images for batches and notes the damaged ones.

    Args:
        files: The images.
        max_damaged: How many damaged images one process accepts.
    """

    def __init__(self, files: ImageFiles, max_damaged: int) -> None:
        self._files = files
        self._max_damaged = max_damaged

    def read(self, index: int) -> Image.Image:
        """One image.

        Raises:
            DamagedImageError: It cannot be used.
        """
        return read_image(self._files.path(index))

    def read_or_note(self, index: int, damaged: list[Damaged]) -> Image.Image | None:
        """One image; None for a damaged one, which is added to ``damaged``."""
        try:
            return self.read(index)
        except DamagedImageError as error:
            damaged.append(Damaged(self._files.item_id(index), str(error)))
            return None

    def read_or_next(self, index: int, damaged: list[Damaged]) -> tuple[Image.Image, int]:
        """One image, or the next one that can be read, and its number."""
        for offset in range(self._max_damaged + 1):
            near = (index + offset) % len(self._files)
            image = self.read_or_note(near, damaged)
            if image is not None:
                return image, near
        # More damage than the run allows: the main process ends it when it counts this batch.
        return Image.new("RGB", (8, 8)), index


class _LabelledItems(ImageItems):
    """What the data sets of training and evaluation share."""

    def __init__(self, source: ImageSource, transform: Transform, max_damaged: int) -> None:
        super().__init__(source, max_damaged)
        self._source = source
        self._transform = transform

    def blank(self) -> Pixels:
        """What the transform makes of a black image; has the shape of every item."""
        with kept_rng():
            return self._transform(Image.new("RGB", (8, 8)))

    def batch_bytes(self, batch_size: int) -> int:
        """The memory of a batch's images."""
        return self.blank().image_HWC.nbytes * batch_size

    def _batch(self, pixels: list[Pixels], indices: list[int], damaged: list[Damaged]) -> Batch:
        like = pixels[0] if pixels else self.blank()
        height, width, channels = like.image_HWC.shape
        images_BCHW = np.empty((len(pixels), channels, height, width), np.uint8)
        draws_BD = np.empty((len(pixels), len(like.draws)), np.int64)
        for row, item in enumerate(pixels):
            np.copyto(images_BCHW[row], item.image_HWC.transpose(2, 0, 1))
            draws_BD[row] = item.draws
        return Batch(
            images_BCHW=torch.from_numpy(images_BCHW),
            labels_B=torch.tensor([self._source.label(i) for i in indices], dtype=torch.int64),
            draws_BD=torch.from_numpy(draws_BD),
            item_ids=[self._source.item_id(i) for i in indices],
            damaged=damaged,
        )


class TrainItems(_LabelledItems):
    """Makes training batches from lists of ``Draw``.

    In the place of a damaged image comes the next one of the data set that can be read, with its
    own label, so that a batch always has its full size.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, max_damaged: int, seed: int
    ) -> None:
        super().__init__(source, transform, max_damaged)
        self._seed = seed

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        pixels: list[Pixels] = []
        indices: list[int] = []
        damaged: list[Damaged] = []
        with kept_rng():
            for draw in draws:
                image, index = self.read_or_next(draw.index, damaged)
                seed_rng(self._seed, draw.epoch, draw.index)
                pixels.append(self._transform(image))
                indices.append(index)
        return self._batch(pixels, indices, damaged)


class EvalItems(_LabelledItems):
    """Makes evaluation batches from lists of indices; damaged images are left out."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        pixels: list[Pixels] = []
        kept: list[int] = []
        damaged: list[Damaged] = []
        for index in indices:
            image = self.read_or_note(index, damaged)
            if image is not None:
                pixels.append(self._transform(image))
                kept.append(index)
        return self._batch(pixels, kept, damaged)


# ---------------------------------------------------------------------------- loading


class _Refusal(NamedTuple):
    """In the place of a batch: the message of a ``UserError``."""

    message: str


class _Guarded(Dataset[Any]):
    """Hands a ``UserError`` over as a value, since torch would add a worker's traceback to it."""

    def __init__(self, items: Items[AnyBatch]) -> None:
        self._items = items

    def __getitems__(self, wanted: Any) -> Any:
        try:
            return self._items.__getitems__(wanted)
        except UserError as error:
            return _Refusal(str(error))


class BatchStream(Generic[AnyBatchT]):
    """Batches of one process in order, with damaged images counted as they pass.

    Iterating begins anew each time: training at its start step, evaluation at the first image.

    Args:
        items: Makes the batches.
        batches: What is in them.
        damaged: Counts the damaged images.
        workers: Data worker processes; 0 loads in this process.
        prefetch_factor: Batches that each worker makes in advance.
        device: Where the batches are going; memory is pinned for an accelerator.

    Raises:
        UserError: Too little shared memory for the workers.
    """

    def __init__(
        self,
        items: Items[AnyBatchT],
        batches: StepSampler | BatchSampler,
        damaged: DamagedItems | DamagedShare,
        *,
        workers: int,
        prefetch_factor: int,
        device: torch.device,
    ) -> None:
        self.damaged = damaged
        self._batches = batches
        self._worker_init = WorkerInit()
        self._iterator: Iterator[Any] | None = None
        if workers:
            needed = items.batch_bytes(batches.batch_size) * workers * (prefetch_factor + 1)
            check_shared_memory(needed, workers)
        self._loader: DataLoader[Any] = DataLoader(
            _Guarded(items),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,
            # Pinned memory needs an accelerator; mps has none that torch can pin for.
            pin_memory=device.type not in ("cpu", "mps"),
            worker_init_fn=self._worker_init,
            prefetch_factor=prefetch_factor if workers else None,
            generator=torch.Generator(),  # or else each start draws from the caller's
        )
        # A stream that is lost in a reference cycle, such as that of an exception, is closed
        # before the garbage collector has torch end the workers.
        weakref.finalize(self, self._worker_init.close)

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch in training."""
        assert isinstance(self._batches, StepSampler)
        return self._batches.steps_per_epoch

    def seek(self, step: int, met: tuple[Met, ...] = ()) -> None:
        """Sets the step at which the next iteration of a training stream begins.

        Args:
            step: Finished steps, in steps of this stream.
            met: What other processes met of its epoch.
        """
        assert isinstance(self._batches, StepSampler)
        self._batches.start_step = step
        self._batches.met = met

    def __iter__(self) -> Iterator[AnyBatchT]:
        self.close()
        self._worker_init.open()
        self._iterator = iter(self._loader)
        return self

    def __next__(self) -> AnyBatchT:
        try:
            while self._iterator is not None:
                beat("waiting for a batch")
                made = next(self._iterator)
                if isinstance(made, _Refusal):
                    raise UserError(made.message)
                batch: AnyBatchT = made
                self.damaged.add(batch.damaged)
                if batch.item_ids:  # every image of an evaluation batch may be damaged
                    beat("work on a batch", working=True)
                    return batch
        except BaseException:  # the end of the data, too much damage, an error in a worker
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """Ends the workers."""
        self._worker_init.close()
        self._iterator = None


def affordable_workers(wanted: int, local_world_size: int) -> int:
    """Worker processes for one process of a run: no more than its share of the machine's cores.

    Args:
        wanted: what the user asks for; 0 stays 0.
        local_world_size: processes of the run on this machine.
    """
    return min(wanted, max(1, (os.cpu_count() or 1) // local_world_size))


def build_loader(
    source: ImageSource,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    total_steps: int | None = None,
    shuffle: bool = True,
    workers: int = 0,
    prefetch_factor: int = 2,
    max_damaged: int = 10,
    device: torch.device = _CPU,
) -> BatchStream[Batch]:
    """The training batches of one process, for the whole run.

    Args:
        source: The images.
        transform: Makes an image ready; a picklable callable that draws from the global
            generators of Python, numpy or torch.
        batch_size: Images a step of this process.
        rank: This process, 0 to world_size - 1.
        world_size: Number of processes.
        seed: Decides order and augmentation.
        start_step: The first step, to resume; ``BatchStream.seek`` changes it later.
        total_steps: The step to stop before; None for an endless stream.
        shuffle: False takes the images in the order of the source.
        workers: Data worker processes; 0 loads in this process. Does not change the batches.
        prefetch_factor: Batches that each worker makes in advance.
        max_damaged: Damaged images that this process accepts before it ends the run.
        device: Where the batches are going; memory is pinned for an accelerator.

    Raises:
        UserError: Fewer images than one global batch, or too little shared memory for the
            workers; while iterating, more damaged images than allowed.
    """
    items = TrainItems(source, transform, max_damaged, seed)
    batches = StepSampler(
        len(source),
        batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_step=start_step,
        total_steps=total_steps,
        shuffle=shuffle,
    )
    # One image at least must be left to put in the place of the others.
    damaged = DamagedItems(min(max_damaged, len(source) - 1), "replaced by the next one")
    return BatchStream(
        items, batches, damaged, workers=workers, prefetch_factor=prefetch_factor, device=device
    )


def build_eval_loader(
    source: ImageSource,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    prefetch_factor: int = 2,
    max_damaged: int = 10,
    device: torch.device = _CPU,
) -> BatchStream[Batch]:
    """The evaluation batches of one process: over all processes, every image exactly once.

    The last batch may be smaller, and processes may have one batch more or less. Damaged images
    are left out, logged, and found in ``BatchStream.damaged``. Arguments and errors are those of
    ``build_loader``.
    """
    items = EvalItems(source, transform, max_damaged)
    batches = BatchSampler(shard(len(source), rank, world_size), batch_size, drop_last=False)
    damaged = DamagedItems(max_damaged, "left out")
    return BatchStream(
        items, batches, damaged, workers=workers, prefetch_factor=prefetch_factor, device=device
    )


def _as_it_is(batch: Any) -> Any:
    """Batches come whole from the data set, so there is nothing to collate."""
    return batch
