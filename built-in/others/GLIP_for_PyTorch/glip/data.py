"""The images, boxes and captions of a run, from its config.

Follows https://github.com/microsoft/GLIP (MIT) at 9dda955, maskrcnn_benchmark/data: COCO's classes
become a caption, in an order that is drawn for each image or fixed, and each box has the tokens of
its class. Images of a grounding JSON have their own captions; both kinds may be mixed.

Shape letters: B images, Q slots for boxes, T tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from glip.bert import find_bert
from glip.captions import Caption, ClassCaptions, Text, TextEncoder
from glip.config import Config
from glip.grounding import GroundingIndex, Mixture, open_grounding
from glip.recipe import total_steps
from zoo_common.damage import Damaged
from zoo_common.data import BatchStream, affordable_workers, steps_per_epoch
from zoo_common.detection import inputs
from zoo_common.detection.batching import DetectionBatch, StaticShapes, suggest_buckets
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.detection.loading import build_train_stream
from zoo_common.device import wants_static_shapes
from zoo_common.errors import UserError
from zoo_common.run import Run

_LEAST_SIDE = 1e-3  # file pixels


class Batch(NamedTuple):
    """Images with captions, and which words mean which boxes.

    Attributes:
        detection: the images and their objects.
        text: a caption for each image.
        boxes_BQ4: float32, xyxy in pixels of the resized image as microsoft/GLIP has them (the
            last pixel belongs to a box); 0 in empty slots. None in evaluation.
        tokens_BQT: bool, the tokens that mean the box of the slot. None in evaluation.
    """

    detection: DetectionBatch
    text: Text
    boxes_BQ4: Tensor | None = None
    tokens_BQT: Tensor | None = None

    @property
    def item_ids(self) -> list[str]:
        """File names, for people."""
        return self.detection.item_ids

    @property
    def damaged(self) -> list[Damaged]:
        """Images that were met and left out while this batch was made."""
        return self.detection.damaged

    def to(self, device: torch.device) -> Batch:
        """The batch with all but the image ids on a device; does not wait if it is pinned."""
        pinned = self.detection.images_BCHW.is_pinned()

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=pinned)

        return Batch(
            self.detection.to(device),
            Text(*map(move, self.text)),
            None if self.boxes_BQ4 is None else move(self.boxes_BQ4),
            None if self.tokens_BQT is None else move(self.tokens_BQT),
        )

    def chunk(self, parts: int) -> list[Batch]:
        """The batch in parts of equal size."""
        detections = self.detection.chunk(parts)
        size = len(self.item_ids) // parts

        def cut(tensor: Tensor, first: int) -> Tensor:
            return tensor[first : first + size]

        return [
            Batch(
                detection,
                Text(*(cut(tensor, part * size) for tensor in self.text)),
                None if self.boxes_BQ4 is None else cut(self.boxes_BQ4, part * size),
                None if self.tokens_BQT is None else cut(self.tokens_BQT, part * size),
            )
            for part, detection in enumerate(detections)
        ]


@dataclass(frozen=True)
class AddCaptions:
    """Gives the images of a training batch captions, and their boxes words.

    Attributes:
        source: the data sets of the images.
        encoder: makes tokens.
        classes: makes captions of the classes of COCO's images; None if there are none.
    """

    source: Mixture
    encoder: TextEncoder
    classes: ClassCaptions | None

    def __call__(self, detection: DetectionBatch) -> Batch:
        """A batch with captions; boxes of no width or height, or without words, lose their slot."""
        assert detection.numbers_B is not None and detection.draws_B is not None
        texts, maps = [], []
        for number, draw, labels_Q, valid_Q in zip(
            detection.numbers_B.tolist(),
            detection.draws_B.tolist(),
            detection.labels_BQ,
            detection.valid_BQ,
            strict=True,
        ):
            caption = self._caption(number, draw, labels_Q[valid_Q].tolist())
            texts.append(caption.text)
            maps.append(self.encoder.token_map(caption)[labels_Q] & valid_Q[:, None])
        boxes_BQ4, visible_BQ = inclusive_boxes(detection)
        tokens_BQT = torch.stack(maps) & visible_BQ[..., None]
        valid_BQ = tokens_BQT.any(dim=-1)
        return Batch(
            detection._replace(valid_BQ=valid_BQ),
            self.encoder(texts),
            boxes_BQ4 * valid_BQ[..., None],
            tokens_BQT,
        )

    def _caption(self, number: int, draw: int, labels: list[int]) -> Caption:
        part, place = self.source.at(number)
        if isinstance(part, GroundingIndex):
            return part.caption(place)
        assert self.classes is not None
        return self.classes.draw(labels, random.Random(draw))


def inclusive_boxes(detection: DetectionBatch) -> tuple[Tensor, Tensor]:
    """Boxes as microsoft/GLIP has them: the last pixel belongs to a box.

    Upstream subtracts the pixel in the file's pixels and resizes then; its flip subtracts one of
    the resized image (maskrcnn_benchmark/structures/bounding_box.py: convert, resize, transpose).

    Returns:
        Boxes (B, Q, 4), and bool (B, Q) whether a box is wider and higher than one pixel of its
        file; upstream drops those that are not.
    """
    assert detection.flipped_B is not None
    pixel_B12 = (detection.sizes_B2.float() / detection.originals_B2).flip(-1)[:, None]
    flipped_B1 = detection.flipped_B[:, None]
    x1, y1, x2, y2 = detection.boxes_BQ4.unbind(-1)
    wide_B1, high_B1 = pixel_B12.unbind(-1)
    boxes_BQ4 = torch.stack(
        [
            torch.where(flipped_B1, x1 + wide_B1 - 1, x1),
            y1,
            x2 - torch.where(flipped_B1, 1, wide_B1),
            y2 - high_B1,
        ],
        dim=-1,
    )
    # A box of one pixel has no side left, but for what float32 rounds.
    sides_BQ2 = (boxes_BQ4[..., 2:] - boxes_BQ4[..., :2]) / pixel_B12
    return boxes_BQ4, (sides_BQ2 > _LEAST_SIDE).all(dim=-1)


def open_train(config: Config, encoder: TextEncoder) -> Mixture:
    """The annotations to train on: COCO's, the grounding JSON's, or both.

    Raises:
        UserError: neither is named, or one is not what it should be.
    """
    data, root = config.data, Path(config.data.path)
    parts: list[CocoIndex] = []
    if data.train_json:
        parts.append(open_index(root / data.train_json, root / data.train_images))
    if data.grounding_json:
        images = root / (data.grounding_images or data.train_images)
        parts.append(open_grounding(root / data.grounding_json, images, encoder))
    if not parts:
        raise UserError("There is nothing to train on: give data.train_json or grounding_json.")
    return Mixture(tuple(parts))


def open_val(config: Config) -> CocoIndex:
    """The annotations to be scored against."""
    return inputs.open_val(config.data)


def open_encoder(config: Config) -> TextEncoder:
    """The text encoder of the config's BERT."""
    model = config.model
    return TextEncoder(find_bert(model.bert, config.data.path), model.max_tokens)


def add_captions(config: Config, source: Mixture, encoder: TextEncoder) -> AddCaptions:
    """What gives the images of :func:`open_train` their captions.

    Raises:
        UserError: class names that cannot be looked for, or more of them than fit.
    """
    names = next((p.classes for p in source.parts if not isinstance(p, GroundingIndex)), None)
    classes = None
    if names is not None:
        data = config.data
        classes = ClassCaptions(names, encoder, data.shuffle_classes, data.negatives)
    return AddCaptions(source, encoder, classes)


def train_stream(
    config: Config, source: Mixture, encoder: TextEncoder, run: Run
) -> BatchStream[Batch]:
    """This process's training batches, to the last step of the run.

    Captions are made where the images are, in the loader's processes.
    """
    data, processes = config.data, run.processes
    images = len(source) if data.keep_empty else len(source.trainable())
    batch_size = data.batch_size // processes.world_size
    per_epoch = steps_per_epoch(images, batch_size, processes.world_size)
    shapes = None
    if wants_static_shapes(config.model.static_shapes, run.device):
        given = tuple((height, width) for height, width in data.buckets)
        suggested = suggest_buckets(data.min_sizes, data.max_size, data.size_divisibility)
        shapes = StaticShapes(given or suggested, slots=data.slots or None)
    return build_train_stream(
        source,
        min_sizes=data.min_sizes,
        max_size=data.max_size,
        flip=data.flip,
        masks=False,
        finish=add_captions(config, source, encoder),
        static=shapes,
        divisibility=data.size_divisibility,
        group_by_aspect=data.group_by_aspect,
        keep_empty=data.keep_empty,
        batch_size=batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.run.seed,
        total_steps=total_steps(config, per_epoch),
        workers=affordable_workers(data.workers, processes.local_world_size),
        max_damaged=data.max_damaged,
        device=run.device,
    )


def eval_stream(config: Config, index: CocoIndex, run: Run) -> BatchStream[DetectionBatch]:
    """This process's share of the held-out images; their captions are the same for all."""
    return inputs.eval_stream(
        config.data,
        index,
        run,
        batch_size=config.evaluate.batch_size,
        static_shapes=wants_static_shapes(config.model.static_shapes, run.device),
    )
