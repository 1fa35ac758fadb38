"""The data set: which layout it has, what is in it, and what is missing."""

from __future__ import annotations

import os
import time
from pathlib import Path

from zoo_common.doctor.lines import NOTE, OK, PROBLEM, Line
from zoo_common.doctor.machine import Machine
from zoo_common.yfcc import TRAIN_IMAGES, TRAIN_JSON, VAL_IMAGES, VAL_JSON, val_images

_COUNT_S = 10.0
"""How long pictures are counted; a network disk can need much longer for ImageNet's million."""

_SIGNS = {
    "coco": ("annotations", "train2017", "val2017", "coco2017", "coco"),
    "imagenet": ("val",),
    "yfcc": (TRAIN_JSON, TRAIN_IMAGES, VAL_JSON, *VAL_IMAGES),
}
"""Names in a directory that tell which layout it was meant to have."""


def data(machine: Machine) -> list[Line]:
    """Recognises the data set of ``--data_path`` and counts it."""
    given = machine.data_path
    if not given:
        return [Line("data", OK, "none given; --data_path=DIR checks one")]
    from zoo_common import layouts, shard_names  # numpy, which a bare machine may lack
    from zoo_common.errors import UserError

    if given in layouts.MADE:
        return [Line("data", OK, f"{given}: made when a run asks for it")]
    problems: dict[str, str] = {}
    if shard_names.is_pattern(given):
        try:
            return [Line("data", OK, f"{len(shard_names.expand(given))} shards")]
        except UserError as error:
            return [Line("data", PROBLEM, str(error), f"shards are {shard_names.EXAMPLE}")]
    for layout in layouts.TREES:
        try:
            root = layouts.resolve(layout, given)
        except UserError as error:
            problems[layout] = str(error)
        else:
            return [_counted(layout, root)]
    path = Path(given).expanduser()
    try:
        names = set(os.listdir(path))  # noqa: PTH208
    except OSError:
        reason = next(iter(problems.values())).partition(". Expected:")[0]
        return [Line("data", PROBLEM, reason, "give the directory of a data set")]
    meant = [layout for layout in problems if names.intersection(_SIGNS.get(layout, ()))]
    likely = meant or list(problems)
    if len(likely) == 1:
        reason, _, tree = problems[likely[0]].partition(". Expected:\n")
        text = f"looks like {likely[0]}, but {reason}"
        return [Line("data", PROBLEM, text, f"lay it out like this:\n{tree}")]
    trees = "\n".join(f"{layout}:\n{layouts.TREES[layout]}" for layout in likely)
    text = f"{path} has none of the known layouts ({', '.join(likely)})"
    return [Line("data", PROBLEM, text, f"lay it out like one of these:\n{trees}")]


def _counted(layout: str, root: Path) -> Line:
    """How many pictures a split has, as far as they can be counted in a short time."""
    until = time.monotonic() + _COUNT_S
    counts, whole = [], True
    for split in _splits(layout, root):
        number, all_counted = _files(root / split, until)
        whole = whole and all_counted
        counts.append(f"{split} {'' if all_counted else 'at least '}{number} pictures")
    text = f"{layout} in {root}: {', '.join(counts)}"
    return Line("data", OK if whole else NOTE, text, "" if whole else "counting was cut short")


def _splits(layout: str, root: Path) -> tuple[str, str]:
    """The directories of the pictures to train on and of those held out."""
    if layout == "yfcc":
        held_out = val_images(root)
        assert held_out is not None
        return TRAIN_IMAGES, held_out.name
    return ("train2017", "val2017") if layout == "coco" else ("train", "val")


def _files(directory: Path, until: float) -> tuple[int, bool]:
    """Counts the files in a directory and one level below; whether it came to the end."""
    count = 0
    waiting = [directory]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_file():
                    count += 1
                elif entry.is_dir():
                    waiting.append(Path(entry.path))
                if count % 256 == 0 and time.monotonic() > until:
                    return count, False
    return count, True
