"""The images and objects of a run, from its config."""

from itertools import zip_longest
from pathlib import Path

import torch

from rcnn.config import Config
from zoo_common.data import BatchStream, affordable_workers
from zoo_common.detection.batching import (
    DetectionBatch,
    StaticShapes,
    round_up,
    suggest_buckets,
)
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


def check_objects(index: CocoIndex) -> None:
    """Tells annotations without anything to learn or to find, before hours are spent on them.

    Raises:
        UserError: no image has an object that is no crowd region.
    """
    if not len(index.trainable()):
        outline = " with an outline" if index.masks else ""
        raise UserError(
            f"No image of {index.annotations} has an object{outline}, crowd regions aside: give "
            "annotations with objects."
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
    for number, name, other in zip(
        index.category_ids, index.classes, held_out.classes, strict=True
    ):
        if name != other:
            raise UserError(
                f"The category id {number} is {name!r} in {data.train_json}, but {other!r} in "
                f"{data.val_json}: give both the same categories."
            )
    wanted = config.model.num_classes
    if wanted not in (0, len(index.classes)):
        raise UserError(
            f"model.num_classes={wanted} (MODEL.ROI_HEADS.NUM_CLASSES), but {data.train_json} has "
            f"{len(index.classes)} categories: leave it out, it is taken from the data."
        )
    return index.classes


def write_classes(classes: list[str], run: Run) -> None:
    """Writes ``classes.txt`` beside the checkpoints, a name a line."""
    if run.processes.is_main:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{name}\n" for name in _lines(classes))
        (run.checkpoints / "classes.txt").write_text(text, encoding="utf-8")


def read_classes(checkpoint: Path) -> list[str] | None:
    """What :func:`write_classes` wrote for a checkpoint; None if that is not of this zoo."""
    try:
        text = checkpoint.with_name("classes.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{checkpoint.with_name('classes.txt')} cannot be read ({error}): mend or remove it."
        ) from error
    return text.splitlines()


def check_classes(index: CocoIndex, checkpoint: Path) -> None:
    """Compares the classes that a checkpoint was trained on, if that is known, with a data set's.

    Raises:
        UserError: they differ, so that scores would be of other classes.
    """
    trained, there = read_classes(checkpoint), _lines(index.classes)
    if trained in (None, there):
        return
    pairs = zip_longest(trained or [], there, fillvalue="-")
    one, other = next((one, other) for one, other in pairs if one != other)
    raise UserError(
        f"{checkpoint} was trained on other classes than {index.annotations} lists ({one!r} there, "
        f"{other!r} here): give the annotations that belong to it, or correct its classes.txt."
    )


def _lines(names: list[str]) -> list[str]:
    """Class names without line breaks."""
    return [" ".join(name.split()) for name in names]
