"""What the detectors' predict programs share: pictures in, pictures with what was found out."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from zoo_common.detection.batching import Collate, DetectionBatch, Entry
from zoo_common.detection.pictures import find_pictures, open_picture, output_files, save
from zoo_common.detection.settings import DetectionData
from zoo_common.detection.transforms import Sample, resize_image, shortest_edge_size
from zoo_common.errors import UserError
from zoo_common.preflight import check_checkpoint_file


class Drawing(NamedTuple):
    """A picture with what was found in it.

    Attributes:
        picture: in the size of the file.
        labels: what each object is.
        lines: what else is said of it, below the picture's own line.
    """

    picture: Image.Image
    labels: Sequence[str]
    lines: Sequence[str] = ()


def picture_parser(
    mark: str, description: str, epilog: str, *, checkpoints: str, score: float
) -> argparse.ArgumentParser:
    """The options that all detectors have.

    Args:
        mark: the program's module.
        description: what it does, a sentence.
        epilog: examples of settings.
        checkpoints: whose checkpoints it reads.
        score: the smallest that is drawn unless the user says otherwise.
    """
    parser = argparse.ArgumentParser(
        prog=f"python3 -m {mark}",
        description=description,
        epilog=f"Settings of a run can follow: {epilog}, ...",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture or directory of them")
    parser.add_argument("--out", type=Path, required=True, help="directory for the drawn pictures")
    parser.add_argument("--checkpoint", type=Path, required=True, help=checkpoints)
    parser.add_argument(
        "--config-file", "--config", type=Path, help="recipe of the network [the checkpoint's own]"
    )
    parser.add_argument(
        "--score", type=float, default=score, help=f"smallest score drawn [{score}]"
    )
    parser.add_argument("--device", default="auto", help="npu, cuda, cpu or auto [auto]")
    return parser


def pictures_to_draw(options: argparse.Namespace, mark: str) -> list[tuple[Path, Path]]:
    """Each picture and the PNG to draw it into, before anything heavy is done.

    Args:
        options: of :func:`picture_parser`.
        mark: the program's module; a PNG that it drew it may draw again.

    Raises:
        UserError: an option is wrong, or there is no checkpoint.
    """
    if not 0 <= options.score <= 1:
        raise UserError(f"--score must be between 0 and 1, but is {options.score}.")
    pictures = find_pictures(options.images)
    targets = output_files(pictures, options.out, mark)
    check_checkpoint_file(options.checkpoint, "--checkpoint")
    return list(zip(pictures, targets, strict=True))


def draw_pictures(
    pairs: Sequence[tuple[Path, Path]], mark: str, draw: Callable[[Image.Image], Drawing]
) -> None:
    """Draws each picture and tells what was found.

    Args:
        pairs: from :func:`pictures_to_draw`.
        mark: the program's module.
        draw: looks at a picture, RGB and upright.

    Raises:
        UserError: a picture is damaged, or cannot be written.
    """
    for source, target in track(pairs, disable=not sys.stdout.isatty()):
        drawn = draw(open_picture(source))
        save(drawn.picture, target, mark)
        counts = {label: drawn.labels.count(label) for label in dict.fromkeys(drawn.labels)}
        words = ", ".join(f"{count} x {label}" for label, count in counts.items())
        print(f"{source}: {words or 'nothing found'}; drawn in {target}")
        for line in drawn.lines:
            print(f"  {line}")


def as_batch(picture: Image.Image, data: DetectionData) -> DetectionBatch:
    """A picture as evaluation would give it to the network, alone and without objects."""
    size = shortest_edge_size(picture.height, picture.width, data.min_size_test, data.max_size_test)
    sample = Sample(
        resize_image(np.asarray(picture), *size), np.zeros((0, 4)), np.zeros(0, np.int64)
    )
    collate = Collate(None, divisibility=data.size_divisibility, masks=False)
    return collate([Entry(sample, (picture.height, picture.width), 0, "")], [])
