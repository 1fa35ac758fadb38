"""Finds objects in pictures and draws them: ``python3 -m rcnn.predict IMAGE... --out DIR``.

Which network it is stands in the checkpoint of a run of this zoo; for detectron2's checkpoints
give --config-file. Class names stand in ``classes.txt`` beside a checkpoint of this zoo.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from rich.progress import track

from rcnn import weights
from rcnn.config import CARD_OPTIONS, Config
from rcnn.data import read_classes
from rcnn.evaluate import to_originals
from rcnn.model import GeneralizedRCNN, build_model, to_device
from zoo_common import device as devices
from zoo_common.config import load_config
from zoo_common.detection.batching import Collate, Entry
from zoo_common.detection.draw import draw_detections, find_pictures, open_picture
from zoo_common.detection.transforms import Sample, resize_image, shortest_edge_size
from zoo_common.errors import UserError
from zoo_common.preflight import check_checkpoint_file

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

_MARK = ("Software", "rcnn.predict")
"""Stands in each PNG drawn here, which may therefore be drawn again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    options, settings = parse(sys.argv[1:] if argv is None else argv)
    try:
        predict(options, settings)
    except UserError as error:
        print(f"rcnn.predict: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The program's own options, and the words that are settings of a run."""
    parser = argparse.ArgumentParser(
        prog="python3 -m rcnn.predict",
        description="Finds objects in pictures and draws boxes, masks and labels.",
        epilog="Settings of a run can follow: roi.nms_thresh=0.4, MODEL.RPN.NMS_THRESH 0.8, ...",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture or directory of them")
    parser.add_argument("--out", type=Path, required=True, help="directory for the drawn pictures")
    parser.add_argument("--checkpoint", type=Path, required=True, help=".pth or detectron2's .pkl")
    parser.add_argument(
        "--config-file", "--config", type=Path, help="recipe of the network [the checkpoint's own]"
    )
    parser.add_argument("--classes", type=Path, help="class names, a line each [classes.txt]")
    parser.add_argument("--score", type=float, default=0.5, help="smallest score drawn [0.5]")
    parser.add_argument("--device", default="auto", help="npu, cuda, cpu or auto [auto]")
    return parser.parse_known_args(argv)


@torch.no_grad()
def predict(options: argparse.Namespace, settings: Sequence[str]) -> None:
    """Draws each picture into ``options.out`` under its own name, as PNG.

    Raises:
        UserError: an option, the checkpoint or a picture is not usable.
    """
    if not 0 <= options.score <= 1:
        raise UserError(f"--score must be between 0 and 1, but is {options.score}.")
    pictures = find_pictures(options.images)
    targets = output_files(pictures, options.out)
    check_checkpoint_file(options.checkpoint, "--checkpoint")
    config = network_config(options.checkpoint, options.config_file, settings)
    names = class_names(options.checkpoint, options.classes)
    device = devices.resolve(options.device)
    count = weights.count_classes(options.checkpoint)
    model = build_model(config, count)
    print(weights.load_for_evaluation(model, options.checkpoint, config.model), file=sys.stderr)
    to_device(model, device).eval()
    if names is None:
        known = count == len(COCO_CLASSES)
        names = list(COCO_CLASSES) if known else [f"class {i}" for i in range(count)]
    if len(names) != count:
        raise UserError(
            f"There are {len(names)} class names, but {options.checkpoint} has {count} classes: "
            "give the right --classes."
        )
    quiet = not sys.stdout.isatty()
    pairs = list(zip(pictures, targets, strict=True))
    for source, target in track(pairs, disable=quiet):
        drawn, found = draw(model, config, open_picture(source), names, options.score, device)
        save(drawn, target)
        print(f"{source}: {found}; drawn in {target}")


def output_files(pictures: Sequence[Path], directory: Path) -> list[Path]:
    """A PNG for each picture.

    Raises:
        UserError: two pictures have one name, or a file would be overwritten that was not drawn
            here.
    """
    targets = [directory / f"{picture.stem}.png" for picture in pictures]
    twice = {target.name for target in targets if targets.count(target) > 1}
    if twice:
        raise UserError(f"Two pictures would become {twice.pop()}: draw them into two directories.")
    sources = {picture.resolve() for picture in pictures}
    for target in targets:
        if target.resolve() in sources:
            raise UserError(f"{target} is one of the pictures: give another --out.")
        if target.exists() and not is_drawn_here(target):
            raise UserError(f"{target} is there and was not drawn here: give another --out.")
    return targets


def is_drawn_here(file: Path) -> bool:
    """Whether a file is a PNG that this program drew."""
    try:
        with Image.open(file) as picture:
            return picture.info.get(_MARK[0]) == _MARK[1]
    except (UnidentifiedImageError, OSError):
        return False


def save(picture: Image.Image, target: Path) -> None:
    """Writes a PNG with our mark, and the directories above it."""
    info = PngInfo()
    info.add_text(*_MARK)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target, pnginfo=info)
    except OSError as error:
        raise UserError(
            f"Cannot write {target}: {error.strerror or error}; give another --out."
        ) from error


def network_config(checkpoint: Path, file: Path | None, settings: Sequence[str]) -> Config:
    """The settings of the network: the checkpoint's own, a file's, or detectron2's defaults."""
    words = list(settings)
    if file is not None:
        words = [f"--config={file}", *words]
    elif (recorded := checkpoint.resolve().parent.parent / "config.yaml").is_file():
        words = [f"--config={recorded}", *words]
    return load_config(Config, words, CARD_OPTIONS)


def class_names(checkpoint: Path, file: Path | None) -> list[str] | None:
    """Names from ``--classes`` or from beside the checkpoint."""
    if file is None:
        return read_classes(checkpoint)
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--classes: cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--classes: {file} is no UTF-8 text: give a name a line.") from error


def draw(
    model: GeneralizedRCNN,
    config: Config,
    picture: Image.Image,
    names: Sequence[str],
    score: float,
    device: torch.device,
) -> tuple[Image.Image, str]:
    """A picture with what was found, and that in words."""
    image_HWC = np.asarray(picture)
    size = shortest_edge_size(
        picture.height, picture.width, config.data.min_size_test, config.data.max_size_test
    )
    sample = Sample(
        resize_image(image_HWC, *size), np.zeros((0, 4)), np.zeros(0, np.int64), None, None
    )
    collate = Collate(None, divisibility=config.data.size_divisibility, masks=False)
    batch = collate([Entry(sample, (picture.height, picture.width), 0, "")], [])
    (found,) = to_originals(model(batch.to(device)), batch)
    labels = [names[label] for label in found.labels_D]
    drawn = draw_detections(
        picture, found.boxes_D4, labels, found.scores_D, found.rles, score_threshold=score
    )
    shown = [label for label, s in zip(labels, found.scores_D, strict=True) if s >= score]
    counts = {label: shown.count(label) for label in dict.fromkeys(shown)}
    words = ", ".join(f"{count} x {label}" for label, count in counts.items())
    return drawn, words or "nothing found"


if __name__ == "__main__":
    sys.exit(main())
