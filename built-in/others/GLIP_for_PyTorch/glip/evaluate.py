"""Scores a checkpoint: ``bash test/eval_8p.sh --data_path=DIR --checkpoint=FILE``.

The held-out classes are looked for by their names, so a checkpoint is scored on any classes,
those that it was never trained on too. Their captions are the same for all images: BERT reads
them once.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glip import data, detect, weights
from glip.captions import Query
from glip.config import CARD_OPTIONS, Config
from glip.detect import Detections
from glip.model import GLIP, build_model
from zoo_common.amp import inference_autocast
from zoo_common.config import load_config
from zoo_common.detection.batching import DetectionBatch
from zoo_common.detection.classes import check_objects
from zoo_common.detection.coco import CocoIndex
from zoo_common.detection.coco_eval import CocoEvaluator
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
        run.say(index.describe())
        model = build_model(config)
        path = Path(config.weights.checkpoint)
        run.say(weights.load_for_evaluation(model, path, config.model))
        evaluate(run, model.to(run.device), index, config)
        run.finish(batch_size=config.evaluate.batch_size)


@torch.no_grad()
def evaluate(
    run: Run,
    model: GLIP,
    index: CocoIndex,
    config: Config,
    state: TrainState[data.Batch] | None = None,
) -> None:
    """Searches every held-out image once, over all ranks; records COCO's AP in percent.

    Args:
        run: the run that keeps the record.
        model: with the weights to score.
        index: the held-out images.
        config: for sizes, captions and precision.
        state: the training state, when a training run is evaluated.

    Raises:
        UserError: class names that cannot be looked for, or no image that can be read.
    """
    with run.evaluating():
        started = time.perf_counter()
        was_training = model.training
        model.eval()
        evaluator = CocoEvaluator(index, ("bbox",))
        queries = class_queries(config, index.classes)
        if len(queries) > 1:
            run.say(f"{len(index.classes)} classes are looked for in {len(queries)} captions")
        count = len(queries)
        others = CocoEvaluator(index, ("bbox",)) if config.evaluate.shuffle_words else None
        if others is not None:
            queries += exchanged_queries(config, index.classes)
        with inference_autocast(config.precision, run.device):
            wanted = detect.read(model, queries, run.device)
        seen = 0
        for batch in data.eval_stream(config, index, run):
            there = batch.to(run.device)
            with inference_autocast(config.precision, run.device):
                parts = detect.find(model, there.images_BCHW, there.sizes_B2, wanted, config.test)
            for result in to_originals(detect.join(parts[:count]), batch):
                evaluator.add(*result)
            if others is not None:
                for result in to_originals(detect.join(parts[count:]), batch):
                    others.add(*result)
            seen += len(batch.item_ids)
        model.train(was_training)
        images = int(sum_across(torch.tensor(seen)).item())
        if images == 0:
            raise UserError(f"None of the images in {config.data.val_images} can be read.")
        metrics = evaluator.summarize()
        run.say(evaluator.table())
        if others is not None:
            metrics |= share_of_words(metrics["box_AP50"], others.summarize()["box_AP50"])
        if config.evaluate.write_results:
            evaluator.write_results(run.directory / "coco_results.json")
        run.score(
            metrics,
            images=images,
            seconds=time.perf_counter() - started,
            state=state,
            weights=None if state is None else weights_of(model),
        )


def class_queries(config: Config, names: Sequence[str]) -> list[Query]:
    """The captions by which classes are looked for.

    Raises:
        UserError: class names that cannot be looked for.
    """
    return data.open_encoder(config).queries(names, config.evaluate.chunk)


def exchanged_queries(config: Config, names: Sequence[str]) -> list[Query]:
    """The same, each class called by the name of the next.

    What a model goes by that does not read the words, such as the place of a class in the caption,
    is as it was.

    Raises:
        UserError: class names that cannot be looked for, or a single one.
    """
    if len(names) < 2:
        raise UserError(
            "evaluate.shuffle_words=true exchanges class names, but there is one class: leave it "
            "out."
        )
    return class_queries(config, [*names[1:], names[0]])


def share_of_words(right: float, exchanged: float) -> dict[str, float]:
    """How much of a score is owed to the words, in percent.

    Args:
        right: AP50 with the right class names.
        exchanged: AP50 with each class called by the name of another.
    """
    share = 100 * (1 - exchanged / right) if right else 0.0
    return {"box_AP50_shuffled": exchanged, "words_share": share}


class Found(NamedTuple):
    """What was found in one image, in pixels of its file, as COCO counts them; D objects.

    Attributes:
        image_id: COCO's.
        boxes_D4: xyxy, right and bottom edges excluded.
        scores_D: 0 to 1.
        labels_D: classes.
    """

    image_id: int
    boxes_D4: NDArray[np.float32]
    scores_D: NDArray[np.float32]
    labels_D: NDArray[np.int64]


def to_originals(found: Detections, batch: DetectionBatch) -> list[Found]:
    """Detections by image.

    Args:
        found: from the model, on any device.
        batch: that it was made of.
    """
    boxes_BK4 = detect.to_files(
        found.boxes_BK4.cpu(), batch.sizes_B2.cpu(), batch.originals_B2.cpu()
    )
    valid_BK = found.valid_BK.cpu()
    scores_BK, labels_BK = found.scores_BK.cpu(), found.labels_BK.cpu()
    return [
        Found(
            image_id,
            boxes_BK4[image][valid_K].numpy(),
            scores_BK[image][valid_K].numpy(),
            labels_BK[image][valid_K].numpy(),
        )
        for image, (image_id, valid_K) in enumerate(
            zip(batch.image_ids_B.tolist(), valid_BK, strict=True)
        )
    ]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights that were scored, float32, with microsoft/GLIP's keys."""
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }


if __name__ == "__main__":
    main()
