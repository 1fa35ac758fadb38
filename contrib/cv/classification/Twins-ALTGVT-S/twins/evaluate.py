"""Scores a Twins checkpoint: ``bash test/train_eval_8p.sh --data_path=DIR --checkpoint=FILE``."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from twins.config import CARD_OPTIONS, Config
from twins.data import build_eval_data
from twins.model import build_model
from zoo_common import checkpoint
from zoo_common.amp import inference_autocast
from zoo_common.config import load_config
from zoo_common.data import Batch, BatchStream, Normalize, affordable_workers
from zoo_common.distributed import sum_across
from zoo_common.errors import UserError
from zoo_common.imagenet import IMAGENET_MEAN, IMAGENET_STD, build_index
from zoo_common.run import Metric, Run, TrainState, start_run

METRIC = Metric("top1", "percent")


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the checkpoint and scores it."""
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, METRIC) as run:
        data = build_held_out_data(config, run)
        path = Path(config.weights.checkpoint)
        weights = checkpoint.load(path)["model"]
        classes = config.model.num_classes or len(build_index(config.data.path, "val").classes)
        model = build_model(config.model.name, num_classes=classes).to(run.device)
        chosen, fit = checkpoint.select(weights, model, path)
        model.load_state_dict(chosen)
        run.say(f"{path.name}: {fit.describe()}")
        evaluate(run, model, data, config)
        run.finish(batch_size=config.evaluate.batch_size)


def build_held_out_data(config: Config, run: Run) -> BatchStream | None:
    """This process's share of the held-out images; None for a rank that evaluates nothing."""
    alone = not config.evaluate.distributed
    if alone and not run.processes.is_main:
        return None
    return build_eval_data(
        build_index(config.data.path, "val"),
        batch_size=config.evaluate.batch_size,
        input_size=config.data.input_size,
        rank=0 if alone else run.processes.rank,
        world_size=1 if alone else run.processes.world_size,
        workers=affordable_workers(config.data.workers, run.processes.local_world_size),
        max_damaged=config.data.max_damaged,
        device=run.device,
    )


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    data: BatchStream | None,
    config: Config,
    state: TrainState[Batch] | None = None,
) -> None:
    """Classifies every held-out image once, over all ranks; records top-1 and top-5 in percent.

    Args:
        run: the run that keeps the record.
        model: gives logits (B, classes) for normalised images (B, 3, H, W).
        data: this rank's share of the images.
        config: for the precision.
        state: the training state, when a training run is evaluated.
    """
    with run.evaluating():
        started = time.perf_counter()
        was_training = model.training
        model.eval()
        normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD).to(run.device)
        counts = new_counts(run.device)
        for batch in data or ():
            count_batch(model, normalize, batch, config, counts)
        model.train(was_training)
        images, top1, top5 = sum_across(counts).tolist()
        if images == 0:
            raise UserError(f"None of the images in {config.data.path}/val can be read.")
        run.score(
            {"top1": 100 * top1 / images, "top5": 100 * top5 / images},
            images=images,
            seconds=time.perf_counter() - started,
            state=state,
            weights=None if state is None else weights_of(model),
        )


def new_counts(device: torch.device) -> Tensor:
    """Zeros for :func:`count_batch`: images, right at the first guess, right among five."""
    return torch.zeros(3, dtype=torch.int64, device=device)


def count_batch(
    model: nn.Module, normalize: Normalize, batch: Batch, config: Config, counts: Tensor
) -> None:
    """Classifies a batch and adds to ``counts``, without reading the device.

    Args:
        model: gives logits (B, classes).
        normalize: what the images go through first.
        batch: on the host.
        config: for the precision.
        counts: from :func:`new_counts`; changed in place.
    """
    labels_B1 = batch.labels_B.to(counts.device)[:, None]
    with inference_autocast(config.precision, counts.device):
        logits_BN = model(normalize(batch.images_BCHW.to(counts.device)))
    best_BK = logits_BN.float().topk(min(5, logits_BN.shape[1])).indices
    right_BK = best_BK == labels_B1
    counts[0] += len(labels_B1)
    counts[1] += right_BK[:, 0].sum()
    counts[2] += right_BK.sum()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights that were scored, float32, with the published keys."""
    inner = getattr(model, "module", model)
    return {key: value.float() for key, value in inner.state_dict().items()}


if __name__ == "__main__":
    main()
