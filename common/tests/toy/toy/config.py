"""Settings of the toy model, faults included."""

from dataclasses import dataclass

from zoo_common.config import LaunchConfig, PrecisionConfig, RunConfig, section, setting


@dataclass
class DataConfig:
    """Points on a line."""

    path: str = setting("", "not used", kind="path")
    batch_size: int = setting(4, "points per process and step", at_least=1)
    steps: int = setting(8, "steps of the run", at_least=1)
    save_every: int = setting(2, "steps between checkpoints", at_least=1)


@dataclass
class FaultConfig:
    """What goes wrong, and at which step."""

    kind: str = setting("", "fault", choices=("", "crash", "user", "kill", "nan", "hang", "memory"))
    rank: int = setting(0, "rank that it meets", at_least=0)
    step: int = setting(3, "step at which it happens", at_least=1)
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


CARD_OPTIONS = {"--steps": "data.steps", "--weights": "weights"}
