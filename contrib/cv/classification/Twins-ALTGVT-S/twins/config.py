"""The settings of a Twins run, with the card's option names.

Defaults are the recipe of upstream's main.py (facts per field in its help); configs/*.yaml say
what a published run sets otherwise. No torch here: help texts come at once.
"""

from dataclasses import dataclass

from zoo_common import elastic
from zoo_common.config import LaunchConfig, PrecisionConfig, RunConfig, section, setting


@dataclass
class ModelConfig:
    """Which network."""

    name: str = setting("alt_gvt_small", "a variant of twins.model.VARIANTS")
    num_classes: int = setting(0, "classes; 0: as many as the data set has", at_least=0)
    drop: float = setting(0.0, "dropout rate", at_least=0, at_most=1)
    drop_path: float = setting(
        0.1, "stochastic depth rate of the last block", at_least=0, at_most=1
    )


@dataclass
class DataConfig:
    """Pictures and what is done to them in training."""

    path: str = setting("", "ImageNet directory, or sample, or digits", kind="path")
    batch_size: int = setting(128, "images per card and step", at_least=1)
    workers: int = setting(
        8, "loader processes per card, at most its share of the cores; 0: none", at_least=0
    )
    input_size: int = setting(224, "side of the network's input in pixels", at_least=32)
    max_damaged: int = setting(
        10, "damaged images that each process bears before the run ends", at_least=0
    )
    crop_min: float = setting(
        0.08, "smallest share of a picture that is cut out", more_than=0, at_most=1
    )
    flip: float = setting(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    rand_augment: str = setting("rand-m9-mstd0.5-inc1", "timm's RandAugment string; empty: none")
    color_jitter: float = setting(0.4, "used only without rand_augment", at_least=0)
    erase: float = setting(0.25, "probability of random erasing", at_least=0, at_most=1)
    mixup: float = setting(0.8, "mixup's alpha; 0: none", at_least=0)
    cutmix: float = setting(1.0, "cutmix's alpha; 0: none", at_least=0)
    mix_probability: float = setting(1.0, "share of batches that are mixed", at_least=0, at_most=1)
    switch_probability: float = setting(
        0.5, "share of cutmix when both are on", at_least=0, at_most=1
    )
    smoothing: float = setting(0.1, "label smoothing", at_least=0, at_most=1)


@dataclass
class OptimizerConfig:
    """How weights move."""

    name: str = setting("adamw", "optimizer", choices=("adamw", "sgd"))
    lr: float = setting(
        5e-4, "learning rate at a global batch of 512; scaled linearly", more_than=0
    )
    weight_decay: float = setting(0.05, "decay of weight matrices", at_least=0)
    momentum: float = setting(0.9, "momentum of sgd", at_least=0, at_most=1)
    eps: float = setting(1e-8, "epsilon of adamw", more_than=0)
    ema: float = setting(
        0.0, "decay of a moving average of the weights; 0: none", at_least=0, at_most=1
    )


@dataclass
class ScheduleConfig:
    """How long, and the learning rate's course."""

    epochs: int = setting(300, "passes over the training data", at_least=1)
    warmup_epochs: int = setting(5, "epochs of linear warm-up", at_least=0)
    warmup_lr: float = setting(1e-6, "learning rate at the start of warm-up", at_least=0)
    min_lr: float = setting(1e-5, "learning rate at the end", at_least=0)


@dataclass
class EvaluateConfig:
    """When and how the held-out pictures are classified."""

    every: int = setting(1, "epochs between evaluations; 0: none, not even at the end", at_least=0)
    distributed: bool = setting(True, "shard over the cards; false: the first card does it alone")
    batch_size: int = setting(192, "images per card and step", at_least=1)


@dataclass
class WeightsConfig:
    """Weights to start from."""

    finetune: str = setting(
        "", "checkpoint to start from; the head may have another class count", kind="checkpoint"
    )
    checkpoint: str = setting("", "checkpoint that an evaluation run takes", kind="checkpoint")


@dataclass
class Config:
    """All settings."""

    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    weights: WeightsConfig = section(WeightsConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


CARD_OPTIONS: dict[str, str | tuple[str, ...]] = {
    "--model": "model.name",
    "--epochs": "schedule.epochs",
    "--lr": "optimizer.lr",
    "--weight-decay": "optimizer.weight_decay",
    "--momentum": "optimizer.momentum",
    "--opt": "optimizer.name",
    "--dist-eval": "evaluate.distributed",
    "--drop": "model.drop",
    "--drop-path": "model.drop_path",
    "--input-size": "data.input_size",
    "--clip-grad": "precision.clip_grad",
    "--warmup-epochs": "schedule.warmup_epochs",
    "--warmup-lr": "schedule.warmup_lr",
    "--min-lr": "schedule.min_lr",
    "--aa": "data.rand_augment",
    "--smoothing": "data.smoothing",
    "--reprob": "data.erase",
    "--mixup": "data.mixup",
    "--cutmix": "data.cutmix",
    "--num_workers": "data.workers",
    "--max_step": "run.max_steps",
    "--finetune": "weights.finetune",
    "--finetune_pth": "weights.finetune",
    "--checkpoint": "weights.checkpoint",
}


def for_world(config: Config, world_size: int) -> Config:
    """The settings for another number of processes than a recipe is written for.

    Lengths are epochs, and the learning rate is written for 512 images: both follow by themselves.

    Args:
        config: the settings; they stay as they are.
        world_size: processes on all machines.

    Raises:
        UserError: see :func:`zoo_common.elastic.scaled`.
    """
    scaled, share = elastic.scaled(config, world_size)
    scaled.optimizer.ema = elastic.average_for(config.optimizer.ema, share)
    return scaled
