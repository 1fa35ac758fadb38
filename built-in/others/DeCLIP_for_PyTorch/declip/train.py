"""Trains DeCLIP or CLIP: ``bash test/train_full_8p.sh --data_path=/data/yfcc15m``.

By hand, in one process: ``python3 -m declip.train --config=configs/smoke.yaml --data_path=DIR
run.output_dir=OUT``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from declip import data, recipe, weights
from declip.batch import Batch
from declip.config import CARD_OPTIONS, Config, check, for_world
from declip.evaluate import METRIC, build_held_out, evaluate, open_tokenizer
from declip.model import CLIP, build_model, to_device
from declip.objective import Objective
from zoo_common import device as devices
from zoo_common.amp import Precision
from zoo_common.config import load_config
from zoo_common.distributed import wrap
from zoo_common.run import Run, TrainState, start_run


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and evaluates by steps, and at the end."""
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, METRIC) as run:
        world_size = run.processes.world_size
        config = for_world(config, world_size)
        check(config, world_size, "acc")
        tokenizer = open_tokenizer(config)
        train_data = data.open_train(config, tokenizer, run, total_steps(config))
        evaluates = config.evaluate.every or config.evaluate.at_end
        held_out = build_held_out(config, tokenizer, run) if evaluates else None

        devices.give_back_memory(run.device)
        model = build_model(config.model, config.loss, tokenizer.vocab_size)
        load_start(model, config, run)
        to_device(model, run.device)
        objective = Objective(
            config.loss,
            config.model.embed_dim,
            device=run.device,
            seed=config.run.seed,
            rank=run.processes.rank,
        )
        optimizer = recipe.build_optimizer(model, config.optimizer)
        precision = Precision(config.precision, model, optimizer, run.device)
        state = TrainState(
            precision,
            train_data,
            global_batch=config.data.batch_size * world_size,
            total_steps=total_steps(config),
            rank_parts={"text_queue": objective.queue} if objective.queue else {},
        )
        run.resume(state)
        # Only a ResNet has statistics that an evaluation reads; SimSiam's heads are not in it.
        keeps_statistics = config.model.tower == "resnet"
        network = wrap(model, run.device, sync_buffers=None if keeps_statistics else False)
        run.say(describe(config, model, state))

        for batch in run.steps(state):
            lr = recipe.set_lr(optimizer, state.step, config.optimizer, config.schedule.steps)
            batch = batch.to(run.device)
            with precision.autocast(network):
                features = network(batch)
            losses = objective(features, batch)
            recipe.clamp_scale(model, optimizer, config.loss)
            precision.step(run.total(losses, batch.item_ids))
            recipe.clamp_scale(model, optimizer, config.loss)
            run.log(state, lr, {"logit_scale": model.logit_scale})
            if run.due(state, config.run.save_every or config.schedule.save_every):
                run.save(state)
            if held_out and run.due(state, config.evaluate.every):
                evaluate(run, model, held_out, config, state)

        run.save(state)
        if held_out and config.evaluate.at_end and not run.interrupted:
            evaluate(run, model, held_out, config, state)
        run.finish(state, config.data.batch_size)


def total_steps(config: Config) -> int:
    """Steps of the run: those of the schedule, or ``run.max_steps`` if that comes first."""
    steps = config.schedule.steps
    return min(steps, config.run.max_steps or steps)


def load_start(model: CLIP, config: Config, run: Run) -> None:
    """Fills the model from ``weights.start``; a run that resumes has better weights."""
    if config.weights.start and not config.run.resume:
        run.say(weights.load_start(model, Path(config.weights.start), config.model))


def describe(config: Config, model: CLIP, state: TrainState[Batch]) -> str:
    """The run in one line."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    name = {"declip": "DeCLIP", "clip": "CLIP"}[config.model.objective]
    return (
        f"{name} {config.model.tower}, {parameters:.1f} M trained parameters, "
        f"{state.precision.describe()}; {state.global_batch} pairs a step, {state.total_steps} "
        f"steps, {state.total_steps / state.data.steps_per_epoch:.2f} epochs, learning rate "
        f"{config.optimizer.peak_lr:g}"
    )


if __name__ == "__main__":
    main()
