"""The images and objects of a run, from its config."""

from pathlib import Path

from rcnn.config import Config
from zoo_common.data import BatchStream, affordable_workers
from zoo_common.detection import inputs
from zoo_common.detection.batching import (
    DetectionBatch,
    StaticShapes,
    round_up,
    suggest_buckets,
)
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.detection.loading import build_train_stream
from zoo_common.device import wants_static_shapes
from zoo_common.run import Run


def open_train(config: Config) -> CocoIndex:
    """The annotations to train on; every process maps the same file."""
    root = Path(config.data.path)
    return open_index(
        root / config.data.train_json, root / config.data.train_images, masks=config.model.masks
    )


def open_val(config: Config) -> CocoIndex:
    """The annotations to be scored against."""
    return inputs.open_val(config.data)


def train_stream(
    config: Config, index: CocoIndex, run: Run, total_steps: int
) -> BatchStream[DetectionBatch]:
    """This process's training batches, to the last step of the run."""
    data, processes = config.data, run.processes
    shapes = None
    if wants_static_shapes(config.model.static_shapes, run.device):
        given = tuple((height, width) for height, width in data.buckets)
        suggested = suggest_buckets(data.min_sizes, data.max_size, data.size_divisibility)
        edge_slots = StaticShapes.edge_slots
        if config.model.masks and index.most_edges > edge_slots[-1]:
            edge_slots += (round_up(index.most_edges, edge_slots[-1]),)
        shapes = StaticShapes(given or suggested, slots=data.slots or None, edge_slots=edge_slots)
    return build_train_stream(
        index,
        min_sizes=data.min_sizes,
        sampling=data.size_sampling,
        max_size=data.max_size,
        flip=data.flip,
        masks=config.model.masks,
        static=shapes,
        divisibility=data.size_divisibility,
        group_by_aspect=data.group_by_aspect,
        keep_empty=data.keep_empty,
        batch_size=data.batch_size // processes.world_size,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.run.seed,
        total_steps=total_steps,
        workers=affordable_workers(data.workers, processes.local_world_size),
        max_damaged=data.max_damaged,
        device=run.device,
    )


def eval_stream(config: Config, index: CocoIndex, run: Run) -> BatchStream[DetectionBatch]:
    """This process's share of the held-out images."""
    return inputs.eval_stream(
        config.data,
        index,
        run,
        batch_size=config.evaluate.batch_size,
        static_shapes=wants_static_shapes(config.model.static_shapes, run.device),
    )
