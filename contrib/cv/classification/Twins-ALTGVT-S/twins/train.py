"""Trains a Twins network: ``bash test/train_full_8p.sh --data_path=/data/ImageNet2012``.

By hand, in one process: ``python3 -m twins.train --config=configs/smoke.yaml --data_path=DIR
run.output_dir=OUT``.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from twins import recipe
from twins.config import CARD_OPTIONS, Config, for_world
from twins.data import Preprocess, build_train_data
from twins.evaluate import METRIC, build_held_out_data, evaluate
from twins.model import build_model
from zoo_common import checkpoint
from zoo_common.amp import Precision
from zoo_common.config import load_config
from zoo_common.data import BatchStream, affordable_workers, steps_per_epoch
from zoo_common.distributed import wrap
from zoo_common.errors import UserError
from zoo_common.imagenet import FolderIndex, build_index
from zoo_common.run import Run, TrainState, start_run


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and evaluates after every epoch, and at the end."""
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, METRIC) as run:
        config = for_world(config, run.processes.world_size)
        index = build_index(config.data.path, "train")
        classes = config.model.num_classes or len(index.classes)
        train_data = build_stream(config, index, run)
        val_data = build_held_out_data(config, run)
        preprocess = Preprocess(config.data.input_size, seed=config.run.seed).to(run.device)
        mixing = build_mixing(config, classes)
        criterion = recipe.ClassificationLoss(config.data.smoothing)

        model = build_model(
            config.model.name,
            num_classes=classes,
            drop_rate=config.model.drop,
            drop_path_rate=config.model.drop_path,
        ).to(run.device)
        load_initial_weights(model, config, run)
        global_batch = config.data.batch_size * run.processes.world_size
        base_lr = recipe.scaled_lr(config.optimizer.lr, global_batch)
        optimizer = recipe.build_optimizer(
            model,
            name=config.optimizer.name,
            lr=base_lr,
            weight_decay=config.optimizer.weight_decay,
            momentum=config.optimizer.momentum,
            eps=config.optimizer.eps,
        )
        precision = Precision(config.precision, model, optimizer, run.device)
        ema = build_ema(model, config)
        state = TrainState(
            precision,
            train_data,
            global_batch=global_batch,
            total_steps=total_steps(config, train_data.steps_per_epoch),
            parts={"ema": ema} if ema else {},
        )
        run.resume(state)
        network = wrap(model, run.device)
        run.say(describe(config, index, model, precision, base_lr))

        for batch in run.steps(state):
            epoch = (state.step - 1) // train_data.steps_per_epoch
            lr = set_lr(optimizer, config, base_lr, epoch)
            images, targets = preprocess(batch.to(run.device)), batch.labels_B.to(run.device)
            if mixing is not None:
                seed = recipe.step_seed(config.run.seed, state.step, run.processes.rank)
                images, targets = mixing(images, targets, seed=seed)
            for part in cut(images, targets, config.precision.accumulate):
                with precision.autocast(network):
                    loss = criterion(network(part[0]), part[1])
                precision.step(run.total({"loss": loss}, batch.item_ids))
            if ema is not None and not run.left_out:
                ema.update(model)
            run.log(state, lr)
            if run.due(state, config.run.save_every or train_data.steps_per_epoch):
                run.save(state)
            if run.due(state, config.evaluate.every * train_data.steps_per_epoch):
                evaluate(run, ema or model, val_data, config, state)

        run.save(state)
        if config.evaluate.every and not run.interrupted:
            evaluate(run, ema or model, val_data, config, state)
        run.finish(state, config.data.batch_size)


def build_stream(config: Config, index: FolderIndex, run: Run) -> BatchStream:
    """This process's training batches, to the last step of the run."""
    data, processes = config.data, run.processes
    per_epoch = steps_per_epoch(len(index), data.batch_size, processes.world_size)
    return build_train_data(
        index,
        batch_size=data.batch_size,
        input_size=data.input_size,
        crop_scale=(data.crop_min, 1.0),
        hflip=data.flip,
        auto_augment=data.rand_augment,
        color_jitter=data.color_jitter,
        erase_prob=data.erase,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.run.seed,
        total_steps=total_steps(config, per_epoch),
        workers=affordable_workers(data.workers, processes.local_world_size),
        max_damaged=data.max_damaged,
        device=run.device,
    )


def total_steps(config: Config, per_epoch: int) -> int:
    """Steps of the run: whole epochs, or ``run.max_steps`` if that comes first."""
    steps = config.schedule.epochs * per_epoch
    return min(steps, config.run.max_steps or steps)


def build_mixing(config: Config, classes: int) -> recipe.Mixing | None:
    """Mixup and cutmix as the config says, or None for neither."""
    data = config.data
    if data.mixup == 0 and data.cutmix == 0:
        return None
    if data.batch_size % (2 * config.precision.accumulate):
        raise UserError(
            f"--batch_size={data.batch_size} must be even, in each of precision.accumulate="
            f"{config.precision.accumulate} parts, for mixup and cutmix to mix pairs: choose "
            "another, or set data.mixup=0 data.cutmix=0."
        )
    return recipe.Mixing(
        num_classes=classes,
        mixup=data.mixup,
        cutmix=data.cutmix,
        probability=data.mix_probability,
        switch_probability=data.switch_probability,
        smoothing=data.smoothing,
    )


def load_initial_weights(model: nn.Module, config: Config, run: Run) -> None:
    """Fills the model from ``weights.finetune``; the head may have another class count."""
    if not config.weights.finetune:
        return
    path = Path(config.weights.finetune)
    weights = checkpoint.load(path)["model"]
    chosen, fit = checkpoint.select(weights, model, path, may_differ=["head."])
    model.load_state_dict(chosen)
    run.say(f"{path.name}: {fit.describe()}")


def build_ema(model: nn.Module, config: Config) -> ModelEmaV3 | None:
    """The moving average of the weights, if there shall be one."""
    if not config.optimizer.ema:
        return None
    if config.precision.opt_level == "O2":
        raise UserError(
            "optimizer.ema averages float32 weights, which --amp=O2 keeps elsewhere: use --amp=O1."
        )
    return ModelEmaV3(model, decay=config.optimizer.ema)


def set_lr(optimizer: torch.optim.Optimizer, config: Config, base_lr: float, epoch: int) -> float:
    """Sets and returns the learning rate of an epoch (from 0)."""
    schedule = config.schedule
    lr = recipe.lr_of_epoch(
        epoch,
        lr=base_lr,
        epochs=schedule.epochs,
        warmup_epochs=schedule.warmup_epochs,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def cut(images: Tensor, targets: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch in equal parts, one backward pass each."""
    return zip(images.chunk(parts), targets.chunk(parts), strict=True)


def describe(
    config: Config, index: FolderIndex, model: nn.Module, precision: Precision, base_lr: float
) -> str:
    """The run in one line."""
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"{config.model.name}, {parameters:.1f} M parameters, {precision.describe()}; "
        f"{len(index)} training images of {len(index.classes)} classes, "
        f"{config.schedule.epochs} epochs, learning rate {base_lr:.3g}"
    )


if __name__ == "__main__":
    main()
