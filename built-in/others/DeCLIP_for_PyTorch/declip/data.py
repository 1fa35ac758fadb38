"""The pairs of image and caption of a run, from its config: batches for training, and pictures to
be classified.

The order of pairs and all that is drawn for one are functions of the seed, the epoch and the pair,
see ``zoo_common.data``; neither workers nor processes change a batch.

Shape letters: V views of an image, B images, C channels (RGB), H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from declip.batch import Batch
from declip.config import Config
from declip.eda import Eda
from declip.index import CaptionIndex, open_index
from declip.shards import ShardSampler, open_shards
from declip.texts import ItemText, Texts
from declip.tokenizer import Tokenizer
from declip.views import EvalTransform, OneView, TwoViews
from zoo_common import data, shard_names
from zoo_common.damage import Damaged, DamagedShare
from zoo_common.data import (
    BatchStream,
    Draw,
    ImageSource,
    StepSampler,
    affordable_workers,
    build_eval_loader,
    kept_rng,
    seed_rng,
)
from zoo_common.device import wants_static_shapes
from zoo_common.errors import UserError
from zoo_common.images import DamagedImageError, read_image
from zoo_common.run import Run

_CPU = torch.device("cpu")
_TRIES = 32


class CaptionedImages(Protocol):
    """Images with captions; those of ``declip.shards`` are one."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """A picture as RGB.

        Raises:
            DamagedImageError: It cannot be read.
        """

    def caption(self, index: int) -> str:
        """Its caption.

        Raises:
            DamagedImageError: It cannot be read, or is none.
        """

    def item_id(self, index: int) -> str:
        """The image's name for people."""


class CaptionFiles:
    """Image files with their captions from an index.

    Args:
        index: Where the files are, and what they show.
    """

    def __init__(self, index: CaptionIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def item_id(self, index: int) -> str:
        """The image's name for people."""
        return self._index.item_id(index)

    def caption(self, index: int) -> str:
        """Its caption."""
        return self._index.caption(index)

    def image(self, index: int) -> Image.Image:
        """A picture as RGB.

        Raises:
            DamagedImageError: Its file is missing or cannot be decoded.
        """
        return read_image(self._index.path(index))


class CaptionItems:
    """Makes training batches from lists of ``Draw``.

    In the place of a damaged pair, whose image or caption cannot be read, comes one that lies
    behind it in the list: the next one, or the one 2, 4, 8, ... further on, since missing files
    come in long runs. So a batch always has its full size. Only the pair that was drawn counts as
    damaged, and so the share of damage is that of the whole list.

    Args:
        images: What to learn from.
        views: Makes the views of an image.
        texts: Makes the token rows of a caption.
        static: Whether all batches have tensors of the same shapes.
        seed: Decides what is drawn, together with epoch and pair.
    """

    def __init__(
        self, images: CaptionedImages, views: OneView, texts: Texts, *, static: bool, seed: int
    ) -> None:
        self._images = images
        self._views = views
        self._texts = texts
        self._static = static
        self._seed = seed

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        side = self._views.input_size
        images_VBCHW = np.empty((self._views.views, len(draws), 3, side, side), np.uint8)
        texts: list[ItemText] = []
        item_ids: list[str] = []
        damaged: list[Damaged] = []
        with kept_rng():
            for row, draw in enumerate(draws):
                image, caption, index = self._read_or_another(draw.index, damaged)
                seed_rng(self._seed, draw.epoch, draw.index)
                images_VBCHW[:, row] = self._views(image)
                texts.append(self._texts(caption))
                item_ids.append(self._images.item_id(index))
        tokens_UBT, ends_UB, masked = self._texts.collate(texts, self._static)
        return Batch(torch.from_numpy(images_VBCHW), tokens_UBT, ends_UB, masked, item_ids, damaged)

    def batch_bytes(self, batch_size: int) -> int:
        """The memory of a batch's tensors, at the most."""
        with kept_rng():
            texts = [self._texts("a word")] * batch_size
        tokens_UBT, ends_UB, masked = self._texts.collate(texts, static=True)
        text_bytes: int = sum(tensor.nbytes for tensor in (tokens_UBT, ends_UB, *(masked or ())))
        return self._views.views * batch_size * 3 * self._views.input_size**2 + text_bytes

    def _read_or_another(self, index: int, damaged: list[Damaged]) -> tuple[Image.Image, str, int]:
        """A pair, or one in its place, and its number."""
        try:
            return *self._read(index), index
        except DamagedImageError as error:
            reason = str(error)
        damaged.append(Damaged(self._images.item_id(index), reason))
        for power in range(_TRIES):
            other = (index + (1 << power)) % len(self._images)
            try:
                return *self._read(other), other
            except DamagedImageError:
                continue
        raise UserError(
            f"{damaged[-1].item_id} cannot be read ({reason}), and nor can any of {_TRIES} other "
            "images that were tried in its place: check that data.path holds the images of its "
            "list."
        )

    def _read(self, index: int) -> tuple[Image.Image, str]:
        caption = self._images.caption(index)
        return self._images.image(index), caption


def open_train(
    config: Config, tokenizer: Tokenizer, run: Run, total_steps: int
) -> BatchStream[Batch]:
    """This process's training batches to the last step of the run, from files or from shards.

    Args:
        config: For the data, and for what the losses need of them.
        tokenizer: Makes token rows.
        run: Tells process and device.
        total_steps: The step to stop before.

    Raises:
        UserError: See ``open_index``, ``open_shards`` and ``build_train_data``.
    """
    settings, loss, processes = config.data, config.loss, run.processes
    images: CaptionedImages
    sampler = None
    if shard_names.is_pattern(settings.path):
        images = shards = open_shards(settings.path, max_damaged=settings.max_damaged)
        sampler = ShardSampler(
            shards.starts_S,
            settings.batch_size,
            rank=processes.rank,
            world_size=processes.world_size,
            seed=config.run.seed,
            total_steps=total_steps,
        )
    else:
        index = open_index(
            Path(settings.path),
            max_damaged=settings.max_damaged,
            local_rank=processes.local_rank,
        )
        images = CaptionFiles(index)
    texts = Texts(
        tokenizer,
        config.model.context_length,
        Eda(config.text.synonyms) if config.text.eda else None,
        config.text.mask_probability if loss.masked_language else 0.0,
        loss.contrast_masked,
    )
    return build_train_data(
        images,
        texts,
        build_views(config),
        batch_size=settings.batch_size,
        static=wants_static_shapes(config.model.static_shapes, run.device),
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.run.seed,
        total_steps=total_steps,
        sampler=sampler,
        workers=affordable_workers(settings.workers, processes.local_world_size),
        max_damaged=settings.max_damaged,
        device=run.device,
    )


def build_views(config: Config) -> OneView:
    """What makes views of an image: two for DeCLIP, one for CLIP."""
    settings = config.data
    kind = TwoViews if config.model.objective == "declip" else OneView
    return kind(
        config.model.input_size,
        crop_min=settings.crop_min,
        color_jitter=settings.color_jitter,
        hue=settings.hue,
        jitter_probability=settings.jitter_probability,
        gray=settings.gray,
        blur=settings.blur,
        flip=settings.flip,
    )


def build_train_data(
    images: CaptionedImages,
    texts: Texts,
    views: OneView,
    *,
    batch_size: int,
    static: bool = False,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    total_steps: int | None = None,
    sampler: StepSampler | None = None,
    workers: int = 0,
    prefetch_factor: int = 2,
    max_damaged: float = 0.01,
    device: torch.device = _CPU,
) -> BatchStream[Batch]:
    """The training batches of one process for a whole run.

    Args:
        images: What to learn from.
        texts: Makes the token rows of a caption.
        views: Makes the views of an image.
        batch_size: Images a step of this process.
        static: Whether all batches have tensors of the same shapes.
        rank: This process, 0 to world_size - 1.
        world_size: Number of processes.
        seed: Decides order and augmentation.
        total_steps: The step to stop before; None for an endless stream.
        sampler: Another order than a random one of all pairs; made with the same arguments.
        workers: Data worker processes; 0 loads in this process. Does not change the batches.
        prefetch_factor: Batches that each worker makes in advance.
        max_damaged: Share of damaged pairs that this process accepts before it ends the run; of
            1,000 pairs, while it has read fewer.
        device: Where the batches are going; memory is pinned for an accelerator.

    Raises:
        UserError: Fewer pairs than one global batch, or too little shared memory for the workers;
            while iterating, more damaged pairs than allowed, or none to take the place of one.
    """
    if sampler is None:
        sampler = StepSampler(
            len(images),
            batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            total_steps=total_steps,
        )
    return BatchStream(
        CaptionItems(images, views, texts, static=static, seed=seed),
        sampler,
        DamagedShare(max_damaged, batch_size, "replaced by another one"),
        workers=workers,
        prefetch_factor=prefetch_factor,
        device=device,
    )


def build_eval_data(
    index: ImageSource,
    *,
    batch_size: int,
    input_size: int = 224,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    prefetch_factor: int = 2,
    max_damaged: int = 10,
    device: torch.device = _CPU,
) -> BatchStream[data.Batch]:
    """The evaluation batches of one process; see ``zoo_common.data.build_eval_loader``."""
    return build_eval_loader(
        index,
        EvalTransform(input_size),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        workers=workers,
        prefetch_factor=prefetch_factor,
        max_damaged=max_damaged,
        device=device,
    )
