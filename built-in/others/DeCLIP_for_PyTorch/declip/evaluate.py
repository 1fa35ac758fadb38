"""Scores a checkpoint: ``bash test/train_eval_8p.sh --data_path=DIR --checkpoint=FILE``.

Zero-shot classification of the held-out images by the names of their classes.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from declip import weights
from declip.batch import Batch
from declip.config import CARD_OPTIONS, Config
from declip.data import build_eval_data
from declip.index import open_val_index
from declip.model import CLIP, build_model, to_device
from declip.tokenizer import Tokenizer, find_vocabulary
from declip.zero_shot import ClassTexts, class_features, read_prompts, similarities
from zoo_common import data as zoo_data
from zoo_common.amp import inference_autocast
from zoo_common.config import load_config
from zoo_common.data import BatchStream, affordable_workers
from zoo_common.device import wants_static_shapes
from zoo_common.distributed import sum_across
from zoo_common.errors import UserError
from zoo_common.run import Metric, Run, TrainState, start_run

METRIC = Metric("top1", "percent")


class HeldOut(NamedTuple):
    """What is classified, and the sentences of the classes."""

    images: BatchStream[zoo_data.Batch]
    texts: ClassTexts


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the checkpoint and scores it."""
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, METRIC) as run:
        tokenizer = open_tokenizer(config)
        held_out = build_held_out(config, tokenizer, run)
        model = build_model(config.model, config.loss, tokenizer.vocab_size)
        path = Path(config.weights.checkpoint)
        run.say(weights.load_for_evaluation(model, path, config.model))
        evaluate(run, to_device(model, run.device), held_out, config)
        run.finish(batch_size=config.evaluate.batch_size)


def open_tokenizer(config: Config) -> Tokenizer:
    """The vocabulary that the config names, or that stands beside the data."""
    directory = Path(config.data.val_path or config.data.path)
    return Tokenizer(find_vocabulary(config.text.vocabulary, directory))


def build_held_out(config: Config, tokenizer: Tokenizer, run: Run) -> HeldOut:
    """This process's share of the held-out images, and the texts of all classes."""
    index = open_val_index(Path(config.data.val_path or config.data.path))
    images = build_eval_data(
        index,
        batch_size=config.evaluate.batch_size,
        input_size=config.model.input_size,
        rank=run.processes.rank,
        world_size=run.processes.world_size,
        workers=affordable_workers(config.data.workers, run.processes.local_world_size),
        device=run.device,
    )
    texts = ClassTexts(
        index.classes,
        read_prompts(config.evaluate.prompts),
        tokenizer,
        config.model.context_length,
        static=wants_static_shapes(config.model.static_shapes, run.device),
    )
    return HeldOut(images, texts)


@torch.no_grad()
def evaluate(
    run: Run,
    model: CLIP,
    held_out: HeldOut,
    config: Config,
    state: TrainState[Batch] | None = None,
) -> None:
    """Classifies every held-out image once, over all ranks; records top-1 and top-5 in percent.

    Args:
        run: the run that keeps the record.
        model: the network.
        held_out: this rank's images, and the texts of all classes.
        config: for the precision.
        state: the training state, when a training run is evaluated.
    """
    with run.evaluating():
        started = time.perf_counter()
        was_training = model.training
        model.eval()
        with inference_autocast(config.precision, run.device):
            classes_CD = class_features(
                model, held_out.texts, run.processes, run.device, config.evaluate.batch_size
            )
        counts = torch.zeros(3, dtype=torch.int64, device=run.device)
        for batch in held_out.images:
            with inference_autocast(config.precision, run.device):
                cosines_BC = similarities(model, batch.images_BCHW.to(run.device), classes_CD)
            count(cosines_BC, batch.labels_B.to(run.device), counts)
        model.train(was_training)
        images, top1, top5 = sum_across(counts).tolist()
        if images == 0:
            raise UserError("None of the held-out images can be read: see the log for the reasons.")
        run.score(
            {"top1": 100 * top1 / images, "top5": 100 * top5 / images},
            images=images,
            seconds=time.perf_counter() - started,
            state=state,
            weights=None if state is None else weights_of(model),
        )


def count(cosines_BC: Tensor, labels_B: Tensor, counts: Tensor) -> None:
    """Adds a batch to ``counts``: images, right at the first guess, right among five."""
    best_BK = cosines_BC.topk(min(5, cosines_BC.shape[1])).indices
    right_BK = best_BK == labels_B[:, None]
    counts += torch.stack(
        [torch.full_like(counts[0], len(labels_B)), right_BK[:, 0].sum(), right_BK.sum()]
    )


def weights_of(model: CLIP) -> dict[str, Tensor]:
    """The weights that were scored, float32, with the published keys."""
    return {key: value.float() for key, value in model.state_dict().items()}


if __name__ == "__main__":
    main()
