"""Finds objects in pictures and draws them: ``python3 -m rcnn.predict IMAGE... --out DIR``.

Which network it is stands in the checkpoint of a run of this zoo; for detectron2's checkpoints
give --config-file. Class names stand in ``classes.txt`` beside a checkpoint of this zoo.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from rcnn import weights
from rcnn.config import CARD_OPTIONS, Config
from rcnn.evaluate import to_originals
from rcnn.model import build_model, to_device
from zoo_common import device as devices
from zoo_common.detection import predicting
from zoo_common.detection.classes import class_names
from zoo_common.detection.draw import draw_detections
from zoo_common.detection.predicting import Drawing
from zoo_common.predicting import exit_code, network_config

MARK = "rcnn.predict"
"""Stands in each PNG drawn here, which may therefore be drawn again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    options, settings = parse(sys.argv[1:] if argv is None else argv)
    return exit_code(MARK, lambda: predict(options, settings))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The program's own options, and the words that are settings of a run."""
    parser = predicting.picture_parser(
        MARK,
        "Finds objects in pictures and draws boxes, masks and labels.",
        "roi.nms_thresh=0.4, MODEL.RPN.NMS_THRESH 0.8",
        checkpoints=".pth or detectron2's .pkl",
        score=0.5,
    )
    parser.add_argument("--classes", type=Path, help="class names, a line each [classes.txt]")
    return parser.parse_known_args(argv)


@torch.no_grad()
def predict(options: argparse.Namespace, settings: Sequence[str]) -> None:
    """Draws each picture into ``options.out`` under its own name, as PNG.

    Raises:
        UserError: an option, the checkpoint or a picture is not usable.
    """
    pairs = predicting.pictures_to_draw(options, MARK)
    path = options.checkpoint
    config = network_config(Config, CARD_OPTIONS, path, options.config_file, settings)
    device = devices.resolve(options.device)
    count = weights.count_classes(path)
    names = class_names(path, options.classes, count)
    model = build_model(config, count)
    print(weights.load_for_evaluation(model, path, config.model), file=sys.stderr)
    to_device(model, device).eval()

    def draw(picture: Image.Image) -> Drawing:
        batch = predicting.as_batch(picture, config.data)
        (found,) = to_originals(model(batch.to(device)), batch)
        labels = [names[label] for label in found.labels_D]
        drawn = draw_detections(
            picture,
            found.boxes_D4,
            labels,
            found.scores_D,
            found.rles,
            score_threshold=options.score,
        )
        sure_D = found.scores_D >= options.score
        return Drawing(drawn, [label for label, sure in zip(labels, sure_D, strict=True) if sure])

    predicting.draw_pictures(pairs, MARK, draw)


if __name__ == "__main__":
    sys.exit(main())
