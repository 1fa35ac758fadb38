"""Trains GLIP: ``bash test/train_full_8p.sh --data_path=/data/coco``.

By hand, in one process: ``python3 -m glip.train --config=configs/smoke.yaml --data_path=DIR
run.output_dir=OUT``.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from glip import data, weights
from glip.bert import find_bert
from glip.config import CARD_OPTIONS, Config, check, for_world
from glip.evaluate import METRIC, evaluate
from glip.model import FLOAT32_INPUTS, GLIP, build_model, to_device
from glip.recipe import (
    WeightAverage,
    build_optimizer,
    largest_kept_block_mb,
    planned_steps,
    set_lr,
    total_steps,
)
from zoo_common import device as devices
from zoo_common.amp import Precision
from zoo_common.config import load_config
from zoo_common.detection.classes import check_objects
from zoo_common.distributed import wrap
from zoo_common.run import Run, TrainState, start_run


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves, and evaluates at the end."""
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, METRIC) as run:
        config = for_world(config, run.processes.world_size)
        check(config, run.processes.world_size, "acc")
        encoder = data.open_encoder(config)
        index = data.open_train(config, encoder)
        held_out = data.open_val(config)
        run.say(index.describe())
        for source in index.parts:
            check_objects(source)
        if config.evaluate.at_end or config.evaluate.every:
            check_objects(held_out)
        solver = config.solver
        train_data = data.train_stream(config, index, encoder, run)

        devices.give_back_memory(run.device, largest_kept_block_mb(config.model))
        model = to_device(build_model(config), run.device)
        load_start(model, config, run)
        optimizer = build_optimizer(model, solver)
        precision = Precision(
            config.precision, model, optimizer, run.device, float32_inputs=FLOAT32_INPUTS
        )
        average = WeightAverage(precision, solver.ema) if solver.ema else None
        per_epoch = train_data.steps_per_epoch
        planned = planned_steps(solver, per_epoch)
        state = TrainState(
            precision,
            train_data,
            global_batch=config.data.batch_size,
            total_steps=total_steps(config, per_epoch),
            parts={"ema": average} if average else {},
        )
        run.resume(state)
        network = wrap(model, run.device)
        run.say(describe(config, model, state, planned))

        for batch in run.steps(state):
            lr = set_lr(optimizer, state.step - 1, solver, planned)
            for part in batch.to(run.device).chunk(config.precision.accumulate):
                with precision.autocast(network):
                    losses = network(part)
                precision.step(run.total(losses, part.item_ids))
            if average is not None and not run.left_out:
                average.update()
            run.log(state, lr)
            if run.due(state, config.run.save_every or solver.checkpoint_every):
                run.save(state)
            if run.due(state, config.evaluate.every):
                with weights_to_score(config, average):
                    evaluate(run, model, held_out, config, state)

        run.save(state)
        if config.evaluate.at_end and not run.interrupted:
            with weights_to_score(config, average):
                evaluate(run, model, held_out, config, state)
        run.finish(state, config.data.batch_size)


def load_start(model: GLIP, config: Config, run: Run) -> None:
    """Fills the model from ``weights.start``; a run that resumes has better weights."""
    if config.run.resume:
        return
    bert = find_bert(config.model.bert, config.data.path)
    if config.weights.start:
        path = Path(config.weights.start)
        run.say(weights.load_start(model, path, config.model, bert=bert))
    else:
        run.say(f"no start weights: random ones; {weights.start_language(model, bert)}")


def weights_to_score(
    config: Config, average: WeightAverage | None
) -> contextlib.AbstractContextManager[None]:
    """The model's weights inside: their average, or as upstream's evaluation, they themselves."""
    if config.evaluate.ema and average is not None:
        return average.in_model()
    return contextlib.nullcontext()


def describe(config: Config, model: nn.Module, state: TrainState[data.Batch], planned: int) -> str:
    """The run in one line."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    kind = "GLIP" if config.model.fusion else "GLIP without fusion"
    solver = config.solver
    return (
        f"{kind}, {parameters:.1f} M trained parameters, {state.precision.describe()}; "
        f"{state.global_batch} images a step, {state.total_steps} steps of {planned} planned, "
        f"learning rate {solver.base_lr:g}, of BERT {solver.lang_lr:g}"
    )


if __name__ == "__main__":
    main()
