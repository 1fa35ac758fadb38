"""Trains Faster or Mask R-CNN: ``bash test/train_full_8p.sh --data_path=/data/coco2017``.

By hand, in one process: ``python3 -m rcnn.train --config=configs/smoke.yaml --data_path=DIR
run.output_dir=OUT``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rcnn import data, weights
from rcnn.backbone import measure_frozen_norms
from rcnn.config import CARD_OPTIONS, Config, check, for_world
from rcnn.evaluate import METRIC, evaluate
from rcnn.model import FLOAT32_INPUTS, GeneralizedRCNN, build_model, to_device
from rcnn.recipe import build_optimizer, set_lr
from zoo_common.amp import Precision
from zoo_common.config import load_config
from zoo_common.detection.classes import (
    agree_on_classes,
    check_classes,
    check_objects,
    write_classes,
)
from zoo_common.detection.coco import CocoIndex
from zoo_common.detection.coco_eval import check_outlines
from zoo_common.device import wants_static_shapes
from zoo_common.distributed import wrap
from zoo_common.run import Run, TrainState, start_run


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves, and evaluates at the end."""
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, METRIC) as run:
        config = for_world(config, run.processes.world_size)
        check(config, run.processes.world_size, "acc")
        index = data.open_train(config)
        held_out = data.open_val(config)
        classes = agree_on_classes(
            index,
            held_out,
            config.model.num_classes,
            option="model.num_classes (MODEL.ROI_HEADS.NUM_CLASSES)",
        )
        run.say(index.describe())
        check_objects(index)
        if config.evaluate.at_end or config.evaluate.every:
            check_objects(held_out)
            if config.model.masks:
                check_outlines(held_out)
        if run.resume_file is not None:
            check_classes(index, run.resume_file)
        solver = config.solver
        total_steps = min(solver.max_iter, config.run.max_steps or solver.max_iter)
        train_data = data.train_stream(config, index, run, total_steps)

        static_shapes = wants_static_shapes(config.model.static_shapes, run.device)
        model = build_model(config, len(classes), static_shapes=static_shapes)
        model = to_device(model, run.device)
        load_start(model, config, run)
        optimizer = build_optimizer(model, solver)
        precision = Precision(
            config.precision, model, optimizer, run.device, float32_inputs=FLOAT32_INPUTS
        )
        state = TrainState(
            precision,
            train_data,
            global_batch=config.data.batch_size,
            total_steps=total_steps,
        )
        run.resume(state)
        # Constant buffers: frozen statistics are the same everywhere.
        network = wrap(model, run.device, sync_buffers=False)
        run.say(describe(config, index, model, precision))
        write_classes(classes, run)

        for batch in run.steps(state):
            lr = set_lr(optimizer, state.step - 1, solver)
            for part in batch.to(run.device).chunk(config.precision.accumulate):
                with precision.autocast(network):
                    losses = network(part)
                precision.step(run.total(losses, part.item_ids))
            run.log(state, lr)
            if run.due(state, config.run.save_every or solver.checkpoint_every):
                run.save(state)
            if run.due(state, config.evaluate.every):
                evaluate(run, model, held_out, config, state)

        run.save(state)
        if config.evaluate.at_end and not run.interrupted:
            evaluate(run, model, held_out, config, state)
        run.finish(state, config.data.batch_size)


def load_start(model: GeneralizedRCNN, config: Config, run: Run) -> None:
    """Fills the model from ``weights.start``; a run that resumes has better weights."""
    if config.run.resume:
        return
    if config.weights.start:
        run.say(weights.load_start(model, Path(config.weights.start), config.model))
        return
    # Of noise, so that no batch has to be loaded before the first step.
    noise_1CHW = 50 * torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    count = measure_frozen_norms(model.backbone, noise_1CHW.to(run.device))
    run.say(
        "no start weights: random ones"
        + (f", with the statistics of noise in {count} frozen norms" if count else "")
    )


def describe(config: Config, index: CocoIndex, model: nn.Module, precision: Precision) -> str:
    """The run in one line."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    kind = "Mask R-CNN" if config.model.masks else "Faster R-CNN"
    return (
        f"{kind} R-{config.model.depth}-FPN, {parameters:.1f} M trained parameters, "
        f"{precision.describe()}; {len(index.classes)} classes, {config.data.batch_size} images a "
        f"step, learning rate {config.solver.base_lr:g}"
    )


if __name__ == "__main__":
    main()
