"""What a detector's run is fed with, from its settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from zoo_common.data import AnyBatch, BatchStream, affordable_workers
from zoo_common.detection.batching import DetectionBatch, StaticShapes, suggest_buckets
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.detection.loading import build_eval_stream
from zoo_common.detection.settings import DetectionData
from zoo_common.run import Run

FinishedT = TypeVar("FinishedT", bound=AnyBatch)


def open_val(data: DetectionData) -> CocoIndex:
    """The annotations to be scored against."""
    root = Path(data.path)
    return open_index(root / data.val_json, root / data.val_images)


def eval_stream(
    data: DetectionData,
    index: CocoIndex,
    run: Run,
    *,
    batch_size: int,
    static_shapes: bool,
    finish: Callable[[DetectionBatch], FinishedT] | None = None,
) -> BatchStream[FinishedT]:
    """This process's share of the held-out images.

    Args:
        data: for the sizes.
        index: the annotations.
        run: for processes and device.
        batch_size: images per card and step.
        static_shapes: whether batches have few shapes.
        finish: makes of each batch what the stream gives; None: the batch.
    """
    processes = run.processes
    shapes = None
    if static_shapes:
        buckets = suggest_buckets([data.min_size_test], data.max_size_test, data.size_divisibility)
        shapes = StaticShapes(buckets, slots=1)
    return build_eval_stream(
        index,
        min_size=data.min_size_test,
        max_size=data.max_size_test,
        static=shapes,
        divisibility=data.size_divisibility,
        finish=finish,
        batch_size=batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        workers=affordable_workers(data.workers, processes.local_world_size),
        max_damaged=data.max_damaged,
        device=run.device,
    )
