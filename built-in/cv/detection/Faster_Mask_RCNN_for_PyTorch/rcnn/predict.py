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
from PIL import Image
from rich.progress import track

from rcnn import weights
from rcnn.config import CARD_OPTIONS, Config
from rcnn.evaluate import to_originals
from rcnn.model import GeneralizedRCNN, build_model, to_device
from zoo_common import device as devices
from zoo_common.config import load_config
from zoo_common.detection.batching import Collate, Entry
from zoo_common.detection.classes import class_names
from zoo_common.detection.draw import draw_detections
from zoo_common.detection.pictures import find_pictures, open_picture, output_files, save
from zoo_common.detection.transforms import Sample, resize_image, shortest_edge_size
from zoo_common.errors import UserError
from zoo_common.preflight import check_checkpoint_file

MARK = "rcnn.predict"
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
    targets = output_files(pictures, options.out, MARK)
    check_checkpoint_file(options.checkpoint, "--checkpoint")
    config = network_config(options.checkpoint, options.config_file, settings)
    device = devices.resolve(options.device)
    count = weights.count_classes(options.checkpoint)
    names = class_names(options.checkpoint, options.classes, count)
    model = build_model(config, count)
    print(weights.load_for_evaluation(model, options.checkpoint, config.model), file=sys.stderr)
    to_device(model, device).eval()
    quiet = not sys.stdout.isatty()
    pairs = list(zip(pictures, targets, strict=True))
    for source, target in track(pairs, disable=quiet):
        drawn, found = draw(model, config, open_picture(source), names, options.score, device)
        save(drawn, target, MARK)
        print(f"{source}: {found}; drawn in {target}")


def network_config(checkpoint: Path, file: Path | None, settings: Sequence[str]) -> Config:
    """The settings of the network: the checkpoint's own, a file's, or detectron2's defaults."""
    words = list(settings)
    if file is not None:
        words = [f"--config={file}", *words]
    elif (recorded := checkpoint.resolve().parent.parent / "config.yaml").is_file():
        words = [f"--config={recorded}", *words]
    return load_config(Config, words, CARD_OPTIONS)


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
