"""Finds objects in pictures and draws them: ``python3 -m solov2.predict IMAGE... --out DIR``.

Which network it is stands in the checkpoint of a run of this zoo; for checkpoints of
WXinlong/SOLO and mmdet give --config-file. Class names stand in ``classes.txt`` beside a
checkpoint of this zoo.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from solov2 import weights
from solov2.config import CARD_OPTIONS, Config
from solov2.data import Batch
from solov2.evaluate import to_originals
from solov2.model import build_model, to_device
from zoo_common import device as devices
from zoo_common.detection import predicting
from zoo_common.detection.classes import class_names
from zoo_common.detection.draw import draw_detections
from zoo_common.detection.predicting import Drawing
from zoo_common.predicting import exit_code, network_config

MARK = "solov2.predict"
"""Stands in each PNG drawn here, which may therefore be drawn again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    options, settings = parse(sys.argv[1:] if argv is None else argv)
    return exit_code(MARK, lambda: predict(options, settings))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The program's own options, and the words that are settings of a run."""
    parser = predicting.picture_parser(
        MARK,
        "Finds objects in pictures and draws masks and labels.",
        "test.score_thr=0.2, test.kernel=linear",
        checkpoints=".pth of this zoo, WXinlong/SOLO or mmdet",
        score=0.3,
    )
    parser.add_argument("--classes", type=Path, help="class names, a line each [classes.txt]")
    parser.add_argument("--boxes", action="store_true", help="draw the masks' boxes too")
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
        batch = Batch(predicting.as_batch(picture, config.data), None)
        (found,) = to_originals(model(batch.to(device)), batch, config.test.mask_thr)
        there_D = found.boxes_D4[:, 2] > found.boxes_D4[:, 0]
        (shown,) = ((found.scores_D >= options.score) & there_D).nonzero()
        labels = [names[found.labels_D[number]] for number in shown]
        drawn = draw_detections(
            picture,
            found.boxes_D4[shown],
            labels,
            found.scores_D[shown],
            [found.rles[number] for number in shown],
            score_threshold=options.score,
            frames=options.boxes,
        )
        return Drawing(drawn, labels)

    predicting.draw_pictures(pairs, MARK, draw)


if __name__ == "__main__":
    sys.exit(main())
