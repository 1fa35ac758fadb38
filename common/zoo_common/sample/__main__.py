"""``python3 -m zoo_common.sample``: draws the sample data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zoo_common import sample
from zoo_common.errors import UserError

_EPILOG = """\
examples:
  python3 -m zoo_common.sample
        the data set that --data_path=sample uses, in the cache
  python3 -m zoo_common.sample --out ./shapes --train 4000 --size 500x375
        a larger one in ./shapes
  python3 -m zoo_common.sample --layout coco --out ./coco
        one for detection, laid out as COCO 2017
  python3 -m zoo_common.sample --layout grounding --out ./grounded
        the same with captions whose phrases have boxes, and a small BERT's vocabulary
  python3 -m zoo_common.sample --layout yfcc --out ./captioned
        one of images and texts, laid out as the DeCLIP card says

imagenet: up to five shapes of different colours and textures on a noisy background; the largest
names the class. coco: up to six shapes, at times a crowd of tiny ones, at times none, with boxes,
masks and captions; some pictures have width and height the other way round. grounding: coco with
captions whose phrases have boxes. yfcc: the pictures of imagenet, each with a caption that mostly
names its class, and a vocabulary for the captions. The same options give the same pictures on
every machine. A data set that is there is used again; a directory that holds anything else is left
alone.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the command line without the program's name; ``sys.argv`` if None.

    Returns:
        The exit code: 0, or 2 for a mistake in the command line.
    """
    args = _parser().parse_args(argv)
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("drawing", total=None)

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            options: dict[str, Any] = {
                "layout": args.layout,
                "train": args.train,
                "val": args.val,
                "size": args.size,
                "seed": args.seed,
                "workers": args.workers,
                "progress": show,
            }
            if args.out is None:
                path = sample.make(**options)
            else:
                path = sample.make_at(args.out, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    _print_tree(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m zoo_common.sample",
        description="Draws the sample data set: ten classes of shapes, seeded, in seconds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--layout",
        choices=sample.LAYOUTS,
        default="imagenet",
        help="how the files are laid out (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the data set's directory, new or empty (default: one named after the options in "
        "$ZOO_DATA_DIR, or else in ~/.cache/zoo_common)",
    )
    for name, default, text in (
        ("--train", None, f"pictures to train on (default: {_defaults('train')})"),
        ("--val", None, f"pictures held out (default: {_defaults('val')})"),
        ("--seed", 0, "another seed gives other pictures (default: %(default)s)"),
        ("--workers", 1, "processes that draw (default: %(default)s)"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--size",
        type=_size,
        metavar="S",
        help=f"pixels: the side of a square, or WIDTHxHEIGHT (default: {_defaults('size')})",
    )
    return parser


def _defaults(option: str) -> str:
    values = {name: getattr(layout, option) for name, layout in sample.LAYOUTS.items()}
    texts = {n: "x".join(map(str, v)) if option == "size" else v for n, v in values.items()}
    return ", ".join(f"{value} for {name}" for name, value in texts.items())


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.partition("x")
    try:
        return int(width), int(height if separator else width)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; write 224, or 500x375 for width x height"
        ) from None


def _print_tree(directory: Path) -> None:
    """Prints the directory, and each folder that holds files with their number."""
    print(directory)
    counts = {
        f"{folder.relative_to(directory).as_posix()}/": sum(
            1 for path in folder.iterdir() if path.is_file()
        )
        for folder in sorted(path for path in directory.rglob("*") if path.is_dir())
    }
    width = max(16, *map(len, counts))
    for name, files in counts.items():
        if files:
            print(f"    {name:<{width}}{files:>6} files")


if __name__ == "__main__":
    sys.exit(main())
