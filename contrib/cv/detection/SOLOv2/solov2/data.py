"""The images, objects and targets of a run, from its config."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from solov2.config import Config, HeadConfig
from solov2.targets import Targets, prepare
from zoo_common.damage import Damaged
from zoo_common.data import BatchStream, affordable_workers, steps_per_epoch
from zoo_common.detection import inputs
from zoo_common.detection.batching import DetectionBatch, StaticShapes, suggest_buckets
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.detection.loading import build_train_stream
from zoo_common.device import wants_static_shapes
from zoo_common.run import Run


class Batch(NamedTuple):
    """Images with what the network shall say of them.

    Attributes:
        detection: the images and their objects.
        targets: which cells of the grids find which objects; None in evaluation.
    """

    detection: DetectionBatch
    targets: Targets | None = None

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
        targets = self.targets
        if targets is not None:
            targets = Targets(*(tensor.to(device, non_blocking=pinned) for tensor in targets))
        return Batch(self.detection.to(device), targets)

    def chunk(self, parts: int) -> list[Batch]:
        """The batch in parts of equal size."""
        detections = self.detection.chunk(parts)
        if self.targets is None:
            return [Batch(detection) for detection in detections]
        cut = zip(*(tensor.chunk(parts) for tensor in self.targets), strict=True)
        return [
            Batch(detection, Targets(*tensors))
            for detection, tensors in zip(detections, cut, strict=True)
        ]


def open_train(config: Config) -> CocoIndex:
    """The annotations to train on; every process maps the same file."""
    root = Path(config.data.path)
    return open_index(root / config.data.train_json, root / config.data.train_images, masks=True)


def open_val(config: Config) -> CocoIndex:
    """The annotations to be scored against."""
    return inputs.open_val(config.data)


def total_steps(config: Config, per_epoch: int) -> int:
    """Steps of the run: whole epochs, or ``run.max_steps`` if that comes first.

    Args:
        config: for the length; ``solver.performance`` means a part of an epoch.
        per_epoch: steps of an epoch.
    """
    steps = config.solver.epochs * per_epoch
    if config.solver.performance:
        steps = min(per_epoch, config.solver.performance_steps)
    return min(steps, config.run.max_steps or steps)


def train_stream(config: Config, index: CocoIndex, run: Run) -> BatchStream[Batch]:
    """This process's training batches, to the last step of the run.

    Targets are made where the images are, in the loader's processes.
    """
    data, processes = config.data, run.processes
    images = len(index) if data.keep_empty else len(index.trainable())
    per_epoch = steps_per_epoch(images, data.batch_size, processes.world_size)
    static = wants_static_shapes(config.model.static_shapes, run.device)
    shapes = None
    if static:
        given = tuple((height, width) for height, width in data.buckets)
        suggested = suggest_buckets(data.min_sizes, data.max_size, data.size_divisibility)
        shapes = StaticShapes(given or suggested, slots=data.slots or None)
    return build_train_stream(
        index,
        min_sizes=data.min_sizes,
        sampling=data.size_sampling,
        max_size=data.max_size,
        flip=data.flip,
        masks=False,
        quarter_masks=True,
        finish=partial(with_targets, head=config.head, static=static),
        static=shapes,
        divisibility=data.size_divisibility,
        group_by_aspect=data.group_by_aspect,
        keep_empty=data.keep_empty,
        batch_size=data.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.run.seed,
        total_steps=total_steps(config, per_epoch),
        workers=affordable_workers(data.workers, processes.local_world_size),
        max_damaged=data.max_damaged,
        device=run.device,
    )


def with_targets(detection: DetectionBatch, *, head: HeadConfig, static: bool) -> Batch:
    """A batch with the targets of its objects."""
    return Batch(detection, prepare(detection, head, static=static))


def eval_stream(config: Config, index: CocoIndex, run: Run) -> BatchStream[Batch]:
    """This process's share of the held-out images."""
    return inputs.eval_stream(
        config.data,
        index,
        run,
        batch_size=config.evaluate.batch_size,
        static_shapes=wants_static_shapes(config.model.static_shapes, run.device),
        finish=Batch,
    )
