"""What the classes of a run are called, from the data set to a checkpoint and back.

A detector knows its classes by numbers, 0 to C - 1. Their names stand in ``classes.txt`` beside a
checkpoint, so that it is neither scored on data of other classes nor drawn with wrong names.
"""

from itertools import zip_longest
from pathlib import Path

from zoo_common.detection.coco import CocoIndex
from zoo_common.errors import UserError
from zoo_common.run import Run

_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, "
    "elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, "
    "skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, "
    "apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, "
    "potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, "
    "cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
)
COCO_CLASSES = _NAMES.split(", ")
"""COCO's 80 classes in the order of their ids, for checkpoints that come without names."""


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


def agree_on_classes(
    index: CocoIndex, held_out: CocoIndex, wanted: int = 0, *, option: str = "model.num_classes"
) -> list[str]:
    """The classes of a run, which training and held-out data name alike.

    Args:
        index: the data to train on.
        held_out: the data to be scored on.
        wanted: how many classes the config asks for; 0: as many as there are.
        option: the setting that asks for them, by all its names.

    Raises:
        UserError: the data differ, or ``wanted`` is another number.
    """
    if index.category_ids != held_out.category_ids:
        lacking = set(held_out.category_ids) ^ set(index.category_ids)
        raise UserError(
            f"{index.annotations} and {held_out.annotations} list different categories (ids "
            f"{sorted(lacking)[:10]} stand in one only): give both the same."
        )
    for number, name, other in zip(
        index.category_ids, index.classes, held_out.classes, strict=True
    ):
        if name != other:
            raise UserError(
                f"The category id {number} is {name!r} in {index.annotations}, but {other!r} in "
                f"{held_out.annotations}: give both the same categories."
            )
    if wanted not in (0, len(index.classes)):
        raise UserError(
            f"{option} is {wanted}, but {index.annotations} has {len(index.classes)} categories: "
            "leave it out, it is taken from the data."
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


def class_names(checkpoint: Path, file: Path | None, count: int) -> list[str]:
    """The names to draw a checkpoint's detections with.

    Args:
        checkpoint: the weights.
        file: names, a line each, as the user gave them with ``--classes``; None: those beside the
            checkpoint, or COCO's if it has as many classes, or numbers.
        count: the classes that the checkpoint has.

    Raises:
        UserError: the names cannot be read, or are not so many.
    """
    names = read_classes(checkpoint) if file is None else _given_names(file)
    if names is None:
        known = count == len(COCO_CLASSES)
        return list(COCO_CLASSES) if known else [f"class {number}" for number in range(count)]
    if len(names) != count:
        raise UserError(
            f"There are {len(names)} class names, but {checkpoint} has {count} classes: "
            "give the right --classes."
        )
    return names


def _given_names(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--classes: cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--classes: {file} is no UTF-8 text: give a name a line.") from error


def _lines(names: list[str]) -> list[str]:
    """Class names without line breaks."""
    return [" ".join(name.split()) for name in names]
