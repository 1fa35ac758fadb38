"""Scores a checkpoint: ``bash test/train_eval_8p.sh --data_path=DIR --checkpoint=FILE``."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rcnn import data, weights
from rcnn.config import CARD_OPTIONS, Config
from rcnn.model import build_model, to_device
from rcnn.roi_heads import Detections
from zoo_common.amp import inference_autocast
from zoo_common.config import load_config
from zoo_common.detection import boxes, masks
from zoo_common.detection.batching import DetectionBatch
from zoo_common.detection.classes import check_classes, check_objects
from zoo_common.detection.coco import CocoIndex
from zoo_common.detection.coco_eval import CocoEvaluator, check_outlines
from zoo_common.device import wants_static_shapes
from zoo_common.distributed import sum_across
from zoo_common.errors import UserError
from zoo_common.run import Metric, Run, TrainState, start_run

METRIC = Metric("box_AP", "percent")


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the checkpoint and scores it."""
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, METRIC) as run:
        index = data.open_val(config)
        check_objects(index)
        if config.model.masks:
            check_outlines(index)
        run.say(index.describe())
        static_shapes = wants_static_shapes(config.model.static_shapes, run.device)
        model = build_model(config, len(index.classes), static_shapes=static_shapes)
        path = Path(config.weights.checkpoint)
        run.say(weights.load_for_evaluation(model, path, config.model))
        check_classes(index, path)
        evaluate(run, to_device(model, run.device), index, config)
        run.finish(batch_size=config.evaluate.batch_size)


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    index: CocoIndex,
    config: Config,
    state: TrainState[DetectionBatch] | None = None,
) -> None:
    """Searches every held-out image once, over all ranks; records COCO's AP in percent.

    Args:
        run: the run that keeps the record.
        model: gives :class:`Detections` for a batch.
        index: the held-out images.
        config: for sizes and precision.
        state: the training state, when a training run is evaluated.
    """
    with run.evaluating():
        started = time.perf_counter()
        was_training = model.training
        model.eval()
        evaluator = CocoEvaluator(index, ("bbox", "segm") if config.model.masks else ("bbox",))
        seen = 0
        for batch in data.eval_stream(config, index, run):
            with inference_autocast(config.precision, run.device):
                found = model(batch.to(run.device))
            for result in to_originals(found, batch):
                evaluator.add(*result)
            seen += len(batch.item_ids)
        model.train(was_training)
        images = int(sum_across(torch.tensor(seen)).item())
        if images == 0:
            raise UserError(f"None of the images in {config.data.val_images} can be read.")
        metrics = evaluator.summarize()
        run.say(evaluator.table())
        if config.evaluate.write_results:
            evaluator.write_results(run.directory / "coco_results.json")
        run.score(
            metrics,
            images=images,
            seconds=time.perf_counter() - started,
            state=state,
            weights=None if state is None else weights_of(model),
        )


class Found(NamedTuple):
    """What was found in one image, in pixels of its file."""

    image_id: int
    boxes_D4: NDArray[np.float32]
    scores_D: NDArray[np.float32]
    labels_D: NDArray[np.int64]
    rles: list[masks.Rle] | None


def to_originals(found: Detections, batch: DetectionBatch) -> list[Found]:
    """Detections by image, boxes in pixels of the files, masks as COCO RLEs."""
    boxes_BD4 = boxes.to_original(
        found.boxes_BD4.float().cpu(), batch.sizes_B2.cpu(), batch.originals_B2.cpu()
    )
    real_BD = found.valid_BD.cpu() & (boxes_BD4[..., 2:] > boxes_BD4[..., :2]).all(dim=2)
    scores_BD, labels_BD = found.scores_BD.float().cpu(), found.labels_BD.cpu()
    masks_BDMM = None if found.masks_BDMM is None else found.masks_BDMM.float().cpu()
    results = []
    for image, real_D in enumerate(real_BD):
        boxes_D4 = boxes_BD4[image][real_D]
        rles = None
        if masks_BDMM is not None:
            height, width = batch.originals_B2[image].tolist()
            rles = masks.paste_rles(masks_BDMM[image][real_D], boxes_D4, height, width)
        scores_D, labels_D = scores_BD[image][real_D], labels_BD[image][real_D]
        image_id = int(batch.image_ids_B[image])
        results.append(Found(image_id, boxes_D4.numpy(), scores_D.numpy(), labels_D.numpy(), rles))
    return results


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights that were scored, float32, with detectron2's keys."""
    return {key: value.float() for key, value in model.state_dict().items()}


if __name__ == "__main__":
    main()
