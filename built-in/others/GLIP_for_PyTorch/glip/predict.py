"""Finds what words mean in pictures, and draws it.

``python3 -m glip.predict IMAGE... --text "a red circle. the largest square" --checkpoint FILE
--out DIR``. Which network it is stands in the checkpoint of a run of this zoo; without it GLIP-T is
meant, and other networks of microsoft/GLIP and mmdet need --config-file.
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

from glip import data, detect, weights
from glip.captions import Query
from glip.config import CARD_OPTIONS, Config
from glip.detect import Wanted
from glip.evaluate import Found, to_originals
from glip.model import GLIP, build_model
from glip.phrases import read_text
from zoo_common import device as devices
from zoo_common.config import load_config
from zoo_common.detection.batching import Collate, Entry
from zoo_common.detection.draw import draw_detections
from zoo_common.detection.pictures import find_pictures, open_picture, output_files, save
from zoo_common.detection.transforms import Sample, resize_image, shortest_edge_size
from zoo_common.errors import UserError
from zoo_common.preflight import check_checkpoint_file

MARK = "glip.predict"
"""Stands in each PNG drawn here, which may therefore be drawn again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    options, settings = parse(sys.argv[1:] if argv is None else argv)
    try:
        predict(options, settings)
    except UserError as error:
        print(f"{MARK}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The program's own options, and the words that are settings of a run."""
    parser = argparse.ArgumentParser(
        prog="python3 -m glip.predict",
        description="Finds what words mean in pictures and draws boxes with phrases and scores.",
        epilog="Settings of a run can follow: test.nms_thr=0.5, model.bert=DIR, ...",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture or directory of them")
    parser.add_argument(
        "--text",
        required=True,
        help='what to look for: phrases with ". " behind each, or a sentence (read by nltk)',
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the drawn pictures")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help=".pth of this zoo, microsoft/GLIP or mmdet"
    )
    parser.add_argument(
        "--config-file", "--config", type=Path, help="recipe of the network [the checkpoint's own]"
    )
    parser.add_argument("--score", type=float, default=0.5, help="smallest score drawn [0.5]")
    parser.add_argument("--device", default="auto", help="npu, cuda, cpu or auto [auto]")
    return parser.parse_known_args(argv)


@torch.no_grad()
def predict(options: argparse.Namespace, settings: Sequence[str]) -> None:
    """Draws each picture into ``options.out`` under its own name, as PNG, and prints what it finds.

    Raises:
        UserError: an option, the text, the checkpoint or a picture is not usable.
    """
    if not 0 <= options.score <= 1:
        raise UserError(f"--score must be between 0 and 1, but is {options.score}.")
    phrases, caption = read_text(options.text)
    pictures = find_pictures(options.images)
    targets = output_files(pictures, options.out, MARK)
    check_checkpoint_file(options.checkpoint, "--checkpoint")
    config = network_config(options.checkpoint, options.config_file, settings)
    device = devices.resolve(options.device)
    encoder = data.open_encoder(config)
    map_NT = encoder.token_map(caption)
    for phrase, tokens_T in zip(phrases, map_NT, strict=True):
        if not tokens_T.any():
            raise UserError(
                f"The phrase {phrase!r} has no token in BERT's vocabulary: leave it out."
            )
    query = Query(list(range(len(phrases))), caption, encoder([caption.text]), map_NT)
    model = build_model(config)
    print(weights.load_for_evaluation(model, options.checkpoint, config.model), file=sys.stderr)
    model.to(device).eval()
    wanted = detect.read(model, [query], device)
    quiet = not sys.stdout.isatty()
    pairs = list(zip(pictures, targets, strict=True))
    for source, target in track(pairs, disable=quiet):
        picture = open_picture(source)
        found = look(model, picture, wanted, config, device)
        shown = found.scores_D >= options.score
        labels = [phrases[label] for label in found.labels_D[shown]]
        drawn = draw_detections(
            picture,
            found.boxes_D4[shown],
            labels,
            found.scores_D[shown],
            score_threshold=options.score,
        )
        save(drawn, target, MARK)
        counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
        words = ", ".join(f"{count} x {label}" for label, count in counts.items())
        print(f"{source}: {words or 'nothing found'}; drawn in {target}")
        limits = (picture.width, picture.height) * 2
        for label, score, box_4 in zip(
            labels, found.scores_D[shown], found.boxes_D4[shown], strict=True
        ):
            corners = " ".join(f"{edge:.0f}" for edge in np.minimum(box_4, limits))
            print(f"  {score:.2f} {label}: {corners}")


def network_config(checkpoint: Path, file: Path | None, settings: Sequence[str]) -> Config:
    """The settings of the network: the checkpoint's own, a file's, or GLIP-T's."""
    words = list(settings)
    if file is not None:
        words = [f"--config={file}", *words]
    elif (recorded := checkpoint.resolve().parent.parent / "config.yaml").is_file():
        words = [f"--config={recorded}", *words]
    return load_config(Config, words, CARD_OPTIONS)


def look(
    model: GLIP,
    picture: Image.Image,
    wanted: Sequence[Wanted],
    config: Config,
    device: torch.device,
) -> Found:
    """What of the wanted phrases is in a picture, best first."""
    sizes = config.data
    size = shortest_edge_size(
        picture.height, picture.width, sizes.min_size_test, sizes.max_size_test
    )
    sample = Sample(
        resize_image(np.asarray(picture), *size), np.zeros((0, 4)), np.zeros(0, np.int64)
    )
    collate = Collate(None, divisibility=sizes.size_divisibility, masks=False)
    batch = collate([Entry(sample, (picture.height, picture.width), 0, "")], [])
    there = batch.to(device)
    found = detect.join(detect.find(model, there.images_BCHW, there.sizes_B2, wanted, config.test))
    (result,) = to_originals(found, batch)
    return result


if __name__ == "__main__":
    sys.exit(main())
