"""Settings of the toy model, faults included."""

from dataclasses import dataclass

from zoo_common import elastic
from zoo_common.config import LaunchConfig, PrecisionConfig, RunConfig, section, setting


@dataclass
class DataConfig:
    """Points on a line."""

    path: str = setting("", "not used", kind="path")
    batch_size: int = setting(4, "points per process and step", at_least=1)
    steps: int = setting(8, "steps of the run", at_least=1)
    save_every: int = setting(2, "steps between checkpoints", at_least=1)
    per_epoch: int = setting(4, "steps of an epoch", at_least=1)
    lr: float = setting(0.05, "learning rate", more_than=0)
    evaluate_every: int = setting(
        0, "steps between evaluations; 0: none before the end", at_least=0
    )


@dataclass
class FaultConfig:
    """What goes wrong, and at which step."""

    kind: str = setting(
        "",
        "fault",
        choices=(
            *("", "crash", "user", "kill", "hang", "memory"),
            *("nan", "inf", "spike", "overflow"),
        ),
    )
    rank: int = setting(0, "rank that it meets", at_least=0)
    step: int = setting(3, "step at which it happens", at_least=1)
    steps: int = setting(1, "steps from there on that have bad points", at_least=1)
    step_time_s: float = setting(0.0, "seconds that each step takes longer", at_least=0)


@dataclass
class Config:
    """All settings."""

    data: DataConfig = section(DataConfig)
    fault: FaultConfig = section(FaultConfig)
    weights: str = setting("", "checkpoint to start from", kind="checkpoint")
    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


def for_world(config: Config, world_size: int) -> Config:
    """The settings for another number of processes."""
    scaled, share = elastic.scaled(config, world_size)
    scaled.data.steps = elastic.steps_for(config.data.steps, share)
    scaled.data.save_every = elastic.steps_for(config.data.save_every, share)
    scaled.data.per_epoch = elastic.steps_for(config.data.per_epoch, share)
    scaled.data.evaluate_every = elastic.steps_for(config.data.evaluate_every, share)
    scaled.data.lr *= float(share)
    return scaled


CARD_OPTIONS = {"--steps": "data.steps", "--weights": "weights"}
