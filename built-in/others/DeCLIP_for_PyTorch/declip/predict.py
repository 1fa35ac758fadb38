"""Compares pictures with texts: ``python3 -m declip.predict IMAGE... --text "a red circle" ...``.

Which network it is stands in the checkpoint of a run of this zoo; for checkpoints of
Sense-GVT/DeCLIP give --config-file. The vocabulary is the one of the run, or --vocabulary.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from declip import weights
from declip.config import CARD_OPTIONS, Config
from declip.evaluate import open_tokenizer
from declip.model import build_model, to_device
from declip.views import EvalTransform
from declip.zero_shot import similarities, tokenize
from zoo_common import device as devices
from zoo_common.errors import UserError
from zoo_common.images import DamagedImageError, read_image
from zoo_common.predicting import exit_code, network_config
from zoo_common.preflight import check_checkpoint_file


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    options, settings = parse(sys.argv[1:] if argv is None else argv)
    return exit_code("declip.predict", lambda: predict(options, settings))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The program's own options, and the words that are settings of a run."""
    parser = argparse.ArgumentParser(
        prog="python3 -m declip.predict",
        description="Tells which of some texts fits a picture, and how probable each is.",
        epilog="Settings of a run can follow: model.input_size=224, ...",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture file")
    parser.add_argument(
        "--text", nargs="+", action="extend", required=True, help="two texts or more to choose from"
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="of this zoo or of Sense-GVT/DeCLIP"
    )
    parser.add_argument(
        "--config-file", "--config", type=Path, help="recipe of the network [the checkpoint's own]"
    )
    parser.add_argument("--vocabulary", type=Path, help="bpe_simple_vocab_16e6.txt.gz [the run's]")
    parser.add_argument("--device", default="auto", help="npu, cuda, cpu or auto [auto]")
    return parser.parse_known_args(argv)


@torch.no_grad()
def predict(options: argparse.Namespace, settings: Sequence[str]) -> None:
    """Prints, for each picture, the texts with their probabilities in percent, best first.

    Raises:
        UserError: an option, the checkpoint or a picture is not usable.
    """
    texts = list(dict.fromkeys(text.strip() for text in options.text))
    if len(texts) < 2 or not all(texts):
        raise UserError("--text needs two different texts or more, none empty, to choose from.")
    check_checkpoint_file(options.checkpoint, "--checkpoint")
    path = options.checkpoint
    config = network_config(Config, CARD_OPTIONS, path, options.config_file, settings)
    if options.vocabulary is not None:
        config.text.vocabulary = str(options.vocabulary)
    device = devices.resolve(options.device)
    tokenizer = open_tokenizer(config)
    model = build_model(config.model, config.loss, tokenizer.vocab_size)
    print(weights.load_for_evaluation(model, path, config.model), file=sys.stderr)
    to_device(model, device).eval()

    tokens_NT, ends_N = tokenize(tokenizer, texts, config.model.context_length)
    texts_ND = F.normalize(model.caption_features(tokens_NT.to(device), ends_N.to(device)), dim=1)
    transform = EvalTransform(config.model.input_size)
    for name in options.images:
        try:
            pixels = transform(read_image(name)).image_HWC
        except DamagedImageError as error:
            raise UserError(f"{name} cannot be read as a picture: {error}.") from error
        image_1CHW = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
        cosines_1N = similarities(model, image_1CHW.to(device), texts_ND)
        shares_N = (model.scale() * cosines_1N)[0].softmax(dim=0).tolist()
        print(name)
        for share, text in sorted(zip(shares_N, texts, strict=True), reverse=True):
            print(f"  {100 * share:5.1f} %  {text}")


if __name__ == "__main__":
    sys.exit(main())
