"""Scores a checkpoint: ``bash test/train_eval_8p.sh --data_path=DIR --checkpoint=FILE``.

SOLOv2 finds masks and no boxes: what is scored is COCO's AP of masks, and the boxes in
coco_results.json are the masks' tight ones.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch import Tensor, nn

from solov2 import data, weights
from solov2.backbone import STRIDES
from solov2.config import CARD_OPTIONS, Config
from solov2.data import Batch
from solov2.model import Detections, build_model, to_device
from zoo_common.amp import inference_autocast
from zoo_common.config import load_config
from zoo_common.detection import masks
from zoo_common.detection.classes import check_classes, check_objects
from zoo_common.detection.coco import CocoIndex
from zoo_common.detection.coco_eval import CocoEvaluator, check_outlines
from zoo_common.device import wants_static_shapes
from zoo_common.distributed import sum_across
from zoo_common.errors import UserError
from zoo_common.run import Metric, Run, TrainState, start_run

METRIC = Metric("mask_AP", "percent")


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the checkpoint and scores it."""
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, METRIC) as run:
        index = data.open_val(config)
        check_objects(index)
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
    state: TrainState[Batch] | None = None,
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
        evaluator = CocoEvaluator(index, ("segm",))
        seen_crowded = torch.zeros(2, dtype=torch.int64)
        for batch in data.eval_stream(config, index, run):
            with inference_autocast(config.precision, run.device):
                found = model(batch.to(run.device))
            for result in to_originals(found, batch, config.test.mask_thr):
                evaluator.add(*result)
            seen_crowded += torch.tensor([len(batch.item_ids), int(found.crowded_B.sum())])
        model.train(was_training)
        images, crowded = sum_across(seen_crowded).tolist()
        if images == 0:
            raise UserError(f"None of the images in {config.data.val_images} can be read.")
        metrics = evaluator.summarize()
        run.say(evaluator.table())
        if crowded:
            run.say(
                f"{crowded} of {images} images had more candidates than test.candidates="
                f"{config.test.candidates}, of which the best were looked at"
            )
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
    """What was found in one image, in pixels of its file; D objects, best first.

    Attributes:
        image_id: COCO's.
        boxes_D4: xyxy, tight around each mask; zeros around one without a pixel.
        scores_D: 0 to 1.
        labels_D: classes.
        rles: COCO's, of the file's size.
    """

    image_id: int
    boxes_D4: NDArray[np.float32]
    scores_D: NDArray[np.float32]
    labels_D: NDArray[np.int64]
    rles: list[masks.Rle]


def to_originals(found: Detections, batch: Batch, mask_thr: float = 0.5) -> list[Found]:
    """Detections by image, with masks as COCO RLEs of the files' sizes.

    Masks are cut to the batch's extent first: what lies beyond is as if it were not there. One
    that vanishes at the file's size stays in the results, as in WXinlong/SOLO.

    Args:
        found: from the model, on any device.
        batch: that it was made of.
        mask_thr: a pixel belongs to a mask above this probability.
    """
    valid_BD = found.valid_BD.cpu()
    scores_BD, labels_BD = found.scores_BD.float().cpu(), found.labels_BD.cpu()
    height, width = (side // STRIDES[0] for side in batch.detection.extent_2.tolist())
    sizes, originals = batch.detection.sizes_B2.tolist(), batch.detection.originals_B2.tolist()
    results = []
    for image, image_id in enumerate(batch.detection.image_ids_B.tolist()):
        count = int(valid_BD[image].sum())  # they come first
        masks_DHW = found.masks_BDHW[image, :count].cpu()[:, :height, :width]
        rles = masks.upsampled_rles(
            masks_DHW,
            tuple(sizes[image]),
            tuple(originals[image]),
            stride=STRIDES[0],
            threshold=mask_thr,
        )
        boxes_D4 = mask_utils.toBbox(rles).reshape(-1, 4).astype(np.float32)
        boxes_D4[:, 2:] += boxes_D4[:, :2]
        scores_D, labels_D = scores_BD[image, :count], labels_BD[image, :count]
        results.append(Found(image_id, boxes_D4, scores_D.numpy(), labels_D.numpy(), rles))
    return results


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights that were scored, float32, with WXinlong/SOLO's keys."""
    return {key: value.float() for key, value in model.state_dict().items()}


if __name__ == "__main__":
    main()
