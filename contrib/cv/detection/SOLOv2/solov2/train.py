"""Trains SOLOv2: ``bash test/train_full_8p.sh --data_path=/data/coco``.

By hand, in one process: ``python3 -m solov2.train --config=configs/smoke.yaml --data_path=DIR
run.output_dir=OUT``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from solov2 import data, weights
from solov2.config import CARD_OPTIONS, Config, check, for_world
from solov2.evaluate import METRIC, evaluate
from solov2.layers import measure_norms
from solov2.model import FLOAT32_INPUTS, SOLOv2, build_model, to_device
from solov2.recipe import base_lr, build_optimizer, set_lr
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
    """Trains, saves by epochs, and evaluates at the end."""
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    if config.solver.performance:
        config.evaluate.every, config.evaluate.at_end = 0, False
    with start_run(config, METRIC) as run:
        world_size = run.processes.world_size
        config = for_world(config, world_size)
        check(config, world_size, "acc")
        index = data.open_train(config)
        held_out = data.open_val(config)
        classes = agree_on_classes(index, held_out, wanted=config.model.num_classes)
        run.say(index.describe())
        check_objects(index)
        if config.evaluate.at_end or config.evaluate.every:
            check_objects(held_out)
            check_outlines(held_out)
        if run.resume_file is not None:
            check_classes(index, run.resume_file)
        solver = config.solver
        train_data = data.train_stream(config, index, run)

        static_shapes = wants_static_shapes(config.model.static_shapes, run.device)
        model = build_model(config, len(classes), static_shapes=static_shapes)
        model = to_device(model, run.device)
        load_start(model, config, run)
        optimizer = build_optimizer(model, solver)
        precision = Precision(
            config.precision, model, optimizer, run.device, float32_inputs=FLOAT32_INPUTS
        )
        per_epoch = train_data.steps_per_epoch
        state = TrainState(
            precision,
            train_data,
            global_batch=config.data.batch_size * world_size,
            total_steps=data.total_steps(config, per_epoch),
        )
        run.resume(state)
        # Constant buffers: the statistics of norms are the same everywhere.
        network = wrap(model, run.device, sync_buffers=False)
        run.say(describe(config, index, model, state, world_size))
        write_classes(classes, run)

        for batch in run.steps(state):
            lr = set_lr(optimizer, state.step - 1, solver, per_epoch, world_size)
            for part in batch.to(run.device).chunk(config.precision.accumulate):
                with precision.autocast(network):
                    losses = network(part)
                precision.step(run.total(losses, part.item_ids))
            run.log(state, lr)
            if run.due(state, config.run.save_every or solver.checkpoint_every * per_epoch):
                run.save(state)
            if run.due(state, config.evaluate.every * per_epoch):
                evaluate(run, model, held_out, config, state)

        run.save(state)
        if config.evaluate.at_end and not run.interrupted:
            evaluate(run, model, held_out, config, state)
        run.finish(state, config.data.batch_size)


def load_start(model: SOLOv2, config: Config, run: Run) -> None:
    """Fills the model from ``weights.start``; a run that resumes has better weights."""
    if config.run.resume:
        return
    if config.weights.start:
        run.say(weights.load_start(model, Path(config.weights.start), config.model))
        return
    # Of noise, so that no batch has to be loaded before the first step.
    noise_1CHW = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    count = measure_norms(model.backbone, noise_1CHW.to(run.device))
    run.say(
        "no start weights: random ones"
        + (f", with the statistics of noise in {count} fixed norms" if count else "")
    )


def describe(
    config: Config,
    index: CocoIndex,
    model: nn.Module,
    state: TrainState[data.Batch],
    world_size: int,
) -> str:
    """The run in one line."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    return (
        f"SOLOv2 R-{config.model.depth}-FPN, {parameters:.1f} M trained parameters, "
        f"{state.precision.describe()}; {len(index.classes)} classes, {state.global_batch} images "
        f"a step, {state.total_steps} steps, learning rate {base_lr(config.solver, world_size):g}"
    )


if __name__ == "__main__":
    main()
