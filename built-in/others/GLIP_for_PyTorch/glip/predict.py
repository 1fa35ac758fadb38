"""Finds what words mean in pictures, and draws it.

``python3 -m glip.predict IMAGE... --text "a red circle. the largest square" --checkpoint FILE
--out DIR``. Which network it is stands in the checkpoint of a run of this zoo; without it GLIP-T is
meant, and other networks of microsoft/GLIP and mmdet need --config-file.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from glip import data, detect, weights
from glip.captions import Query, TextEncoder
from glip.config import CARD_OPTIONS, Config
from glip.evaluate import to_originals
from glip.model import build_model
from glip.phrases import read_text
from zoo_common import device as devices
from zoo_common.detection import predicting
from zoo_common.detection.draw import draw_detections
from zoo_common.detection.predicting import Drawing
from zoo_common.errors import UserError
from zoo_common.predicting import exit_code, network_config

MARK = "glip.predict"
"""Stands in each PNG drawn here, which may therefore be drawn again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    options, settings = parse(sys.argv[1:] if argv is None else argv)
    return exit_code(MARK, lambda: predict(options, settings))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The program's own options, and the words that are settings of a run."""
    parser = predicting.picture_parser(
        MARK,
        "Finds what words mean in pictures and draws boxes with phrases and scores.",
        "test.nms_thr=0.5, model.bert=DIR",
        checkpoints=".pth of this zoo, microsoft/GLIP or mmdet",
        score=0.5,
    )
    parser.add_argument(
        "--text",
        required=True,
        help='what to look for: phrases with ". " behind each, or a sentence (read by nltk)',
    )
    return parser.parse_known_args(argv)


@torch.no_grad()
def predict(options: argparse.Namespace, settings: Sequence[str]) -> None:
    """Draws each picture into ``options.out`` under its own name, as PNG, and prints what it finds.

    Raises:
        UserError: an option, the text, the checkpoint or a picture is not usable.
    """
    pairs = predicting.pictures_to_draw(options, MARK)
    path = options.checkpoint
    config = network_config(Config, CARD_OPTIONS, path, options.config_file, settings)
    device = devices.resolve(options.device)
    phrases, query = read_query(options.text, data.open_encoder(config))
    model = build_model(config)
    print(weights.load_for_evaluation(model, path, config.model), file=sys.stderr)
    model.to(device).eval()
    wanted = detect.read(model, [query], device)

    def draw(picture: Image.Image) -> Drawing:
        batch = predicting.as_batch(picture, config.data)
        there = batch.to(device)
        parts = detect.find(model, there.images_BCHW, there.sizes_B2, wanted, config.test)
        (found,) = to_originals(detect.join(parts), batch)
        (shown,) = (found.scores_D >= options.score).nonzero()
        boxes_D4, scores_D = found.boxes_D4[shown], found.scores_D[shown]
        labels = [phrases[found.labels_D[number]] for number in shown]
        drawn = draw_detections(picture, boxes_D4, labels, scores_D, score_threshold=options.score)
        limits = (picture.width, picture.height) * 2
        lines = [
            f"{score:.2f} {label}: {' '.join(f'{edge:.0f}' for edge in np.minimum(box_4, limits))}"
            for label, score, box_4 in zip(labels, scores_D, boxes_D4, strict=True)
        ]
        return Drawing(drawn, labels, lines)

    predicting.draw_pictures(pairs, MARK, draw)


def read_query(text: str, encoder: TextEncoder) -> tuple[list[str], Query]:
    """The phrases of a text, and what the network is asked for them.

    Raises:
        UserError: a phrase is not made of words that BERT knows.
    """
    phrases, caption = read_text(text)
    map_NT = encoder.token_map(caption)
    for phrase, tokens_T in zip(phrases, map_NT, strict=True):
        if not tokens_T.any():
            raise UserError(
                f"The phrase {phrase!r} has no token in BERT's vocabulary: leave it out."
            )
    return phrases, Query(list(range(len(phrases))), caption, encoder([caption.text]), map_NT)


if __name__ == "__main__":
    sys.exit(main())
