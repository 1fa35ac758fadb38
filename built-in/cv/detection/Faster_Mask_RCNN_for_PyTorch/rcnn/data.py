"""The images and objects of a run, from its config."""

from pathlib import Path

import torch

from rcnn.config import Config
from zoo_common.data import BatchStream, affordable_workers
from zoo_common.detection.batching import DetectionBatch, StaticShapes, suggest_buckets
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.detection.loading import build_eval_stream, build_train_stream
from zoo_common.errors import UserError
from zoo_common.run import Run


def open_train(config: Config) -> CocoIndex:
    """The annotations to train on; every process maps the same file."""
    root = Path(config.data.path)
    return open_index(
        root / config.data.train_json, root / config.data.train_images, masks=config.model.masks
    )


def open_val(config: Config) -> CocoIndex:
    """The annotations to be scored against."""
    root = Path(config.data.path)
    return open_index(root / config.data.val_json, root / config.data.val_images)


def wants_static_shapes(config: Config, device: torch.device) -> bool:
    """Whether a run keeps its shapes fixed; a CPU gains nothing from it."""
    wanted = config.model.static_shapes
    return device.type != "cpu" if wanted == "auto" else wanted == "on"


def train_stream(
    config: Config, index: CocoIndex, run: Run, total_steps: int
) -> BatchStream[DetectionBatch]:
    """This process's training batches, to the last step of the run."""
    data, processes = config.data, run.processes
    shapes = None
    if wants_static_shapes(config, run.device):
        given = tuple((height, width) for height, width in data.buckets)
        suggested = suggest_buckets(data.min_sizes, data.max_size, data.size_divisibility)
        shapes = StaticShapes(given or suggested, slots=data.slots or None)
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
    data, processes = config.data, run.processes
    shapes = None
    if wants_static_shapes(config, run.device):
        buckets = suggest_buckets([data.min_size_test], data.max_size_test, data.size_divisibility)
        shapes = StaticShapes(buckets, slots=1)
    return build_eval_stream(
        index,
        min_size=data.min_size_test,
        max_size=data.max_size_test,
        static=shapes,
        divisibility=data.size_divisibility,
        batch_size=config.evaluate.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        workers=affordable_workers(data.workers, processes.local_world_size),
        max_damaged=data.max_damaged,
        device=run.device,
    )


def agree_on_classes(config: Config, index: CocoIndex, held_out: CocoIndex) -> list[str]:
    """The classes of a run, which training and held-out data name alike.

    Raises:
        UserError: they differ, or ``model.num_classes`` is another number.
    """
    data = config.data
    if index.category_ids != held_out.category_ids:
        lacking = set(held_out.category_ids) ^ set(index.category_ids)
        raise UserError(
            f"{data.train_json} and {data.val_json} list different categories (ids "
            f"{sorted(lacking)[:10]} stand in one only): give both the same."
        )
    wanted = config.model.num_classes
    if wanted not in (0, len(index.classes)):
        raise UserError(
            f"model.num_classes={wanted} (MODEL.ROI_HEADS.NUM_CLASSES), but {data.train_json} has "
            f"{len(index.classes)} categories: leave it out, it is taken from the data."
        )
    return index.classes


def write_classes(classes: list[str], run: Run) -> None:
    """Writes ``classes.txt`` beside the checkpoints, a name a line, for rcnn.predict."""
    if run.processes.is_main:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{name}\n" for name in classes)
        (run.checkpoints / "classes.txt").write_text(text, encoding="utf-8")
