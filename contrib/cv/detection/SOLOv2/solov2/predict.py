"""Finds objects in pictures and draws them: ``python3 -m solov2.predict IMAGE... --out DIR``.

Which network it is stands in the checkpoint of a run of this zoo; for checkpoints of
WXinlong/SOLO and mmdet give --config-file. Class names stand in ``classes.txt`` beside a
checkpoint of this zoo.
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

from solov2 import weights
from solov2.config import CARD_OPTIONS, Config
from solov2.data import Batch
from solov2.evaluate import to_originals
from solov2.model import SOLOv2, build_model, to_device
from zoo_common import device as devices
from zoo_common.config import load_config
from zoo_common.detection.batching import Collate, Entry
from zoo_common.detection.classes import class_names
from zoo_common.detection.draw import draw_detections
from zoo_common.detection.pictures import find_pictures, open_picture, output_files, save
from zoo_common.detection.transforms import Sample, resize_image, shortest_edge_size
from zoo_common.errors import UserError
from zoo_common.preflight import check_checkpoint_file

MARK = "solov2.predict"
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
        prog="python3 -m solov2.predict",
        description="Finds objects in pictures and draws masks and labels.",
        epilog="Settings of a run can follow: test.score_thr=0.2, test.kernel=linear, ...",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture or directory of them")
    parser.add_argument("--out", type=Path, required=True, help="directory for the drawn pictures")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help=".pth of this zoo, WXinlong/SOLO or mmdet"
    )
    parser.add_argument(
        "--config-file", "--config", type=Path, help="recipe of the network [the checkpoint's own]"
    )
    parser.add_argument("--classes", type=Path, help="class names, a line each [classes.txt]")
    parser.add_argument("--score", type=float, default=0.3, help="smallest score drawn [0.3]")
    parser.add_argument("--boxes", action="store_true", help="draw the masks' boxes too")
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
        drawn, found = draw(model, open_picture(source), names, options, device)
        save(drawn, target, MARK)
        print(f"{source}: {found}; drawn in {target}")


def network_config(checkpoint: Path, file: Path | None, settings: Sequence[str]) -> Config:
    """The settings of the network: the checkpoint's own, a file's, or SOLOv2 R-50's."""
    words = list(settings)
    if file is not None:
        words = [f"--config={file}", *words]
    elif (recorded := checkpoint.resolve().parent.parent / "config.yaml").is_file():
        words = [f"--config={recorded}", *words]
    return load_config(Config, words, CARD_OPTIONS)


def draw(
    model: SOLOv2,
    picture: Image.Image,
    names: Sequence[str],
    options: argparse.Namespace,
    device: torch.device,
) -> tuple[Image.Image, str]:
    """A picture with what was found, and that in words."""
    data = model.config.data
    size = shortest_edge_size(picture.height, picture.width, data.min_size_test, data.max_size_test)
    sample = Sample(
        resize_image(np.asarray(picture), *size), np.zeros((0, 4)), np.zeros(0, np.int64)
    )
    collate = Collate(None, divisibility=data.size_divisibility, masks=False)
    entry = Entry(sample, (picture.height, picture.width), 0, "")
    batch = Batch(collate([entry], []), None)
    found = model(batch.to(device))
    (there,) = to_originals(found, batch, model.config.test.mask_thr)
    shown = [
        number
        for number, (box_4, score) in enumerate(zip(there.boxes_D4, there.scores_D, strict=True))
        if score >= options.score and box_4[2] > box_4[0]
    ]
    labels = [names[there.labels_D[number]] for number in shown]
    drawn = draw_detections(
        picture,
        there.boxes_D4[shown],
        labels,
        there.scores_D[shown],
        [there.rles[number] for number in shown],
        score_threshold=options.score,
        frames=options.boxes,
    )
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    words = ", ".join(f"{count} x {label}" for label, count in counts.items())
    return drawn, words or "nothing found"


if __name__ == "__main__":
    sys.exit(main())
