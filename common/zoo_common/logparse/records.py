"""What a log says: one step, and the summary of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STATUSES = ("completed", "failed", "interrupted", "unfinished", "unknown")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A score and its unit.

    Attributes:
        value: the score in ``unit``.
        unit: ``%`` (0 to 100), ``0-1`` (a fraction, as COCO gives AP), or the unit that a record
            of this zoo states (empty where it states none).
    """

    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class LogStep:
    """One log step of training, as the log prints it.

    Attributes:
        step: finished optimizer steps, counted from 1; None where a log counts epochs only.
        epoch: finished epochs (1.5 is the middle of the second); None where the log has none.
            OpenMMLab's JSON gives the number of the running epoch instead.
        loss: the total loss. Most logs smooth it over some steps.
        losses: the parts of the loss by name, without the total.
        lr: learning rate.
        step_time_s: seconds a step, as the log smooths it.
        images_per_sec: over all ranks; None where the log has no rate.
    """

    step: int | None
    epoch: float | None
    loss: float | None
    losses: dict[str, float]
    lr: float | None
    step_time_s: float | None
    images_per_sec: float | None


@dataclass(frozen=True, slots=True)
class LogSummary:
    """A run as its log tells it; a log that holds several runs is told by its last one.

    Attributes:
        format: name of the log's format.
        status: one of ``STATUSES``. ``unfinished``: the log stops before its program's last
            words, as those of a performance run that exits early do. ``unknown``: logs of this
            format do not tell.
        steps: finished optimizer steps at the last log step; None where the log does not count.
        epochs: finished epochs at that point.
        images_per_sec: over all ranks; None where neither log nor caller knows the batch size.
        steps_per_sec: optimizer steps a second.
        throughput_from: how the two were measured, or why they are not there.
        last_loss: total loss at the last log step.
        recent_loss: mean total loss of the last 20 log steps.
        accuracy: scores of the last evaluation by name. Classification is ``top1`` and ``top5``
            in percent, COCO is ``bbox/AP``, ``segm/AP50`` and so on from 0 to 1, whatever unit
            the log prints.
        restarts: how often the step count went back: resumed runs, or several runs in one file.
        repeated_lines: step lines left out because their step was there already.
        torn_lines: step lines left out because other output cuts them.
    """

    format: str
    status: str
    steps: int | None
    epochs: float | None
    images_per_sec: float | None
    steps_per_sec: float | None
    throughput_from: str
    last_loss: float | None
    recent_loss: float | None
    accuracy: dict[str, Accuracy]
    restarts: int = 0
    repeated_lines: int = 0
    torn_lines: int = 0


class RawStep(NamedTuple):
    """A step line, read as far as a summary needs it; ``body`` is the rest.

    Fields are as in LogStep; ``key`` rises from line to line and is what tells a repeated line from
    a new one.
    """

    key: float
    step: int | None
    epoch: float | None
    loss: float | None
    step_time_s: float | None
    images_per_sec: float | None
    body: str | Mapping[str, Any]


@dataclass(slots=True)
class Mean:
    """A running mean of finite numbers; ``value`` is None before the first."""

    count: int = 0
    total: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class Findings:
    """What the lines beside the step lines say.

    Attributes:
        accuracy: scores by name, the last evaluation wins.
        rate: images per second over all ranks, from lines that state nothing else.
        step_time_s: seconds a step over the whole run, where the log states it.
        ended: the program's last words were seen.
        tracebacks: Python tracebacks and other signs of a crash.
        interrupts: how many of these come from Ctrl-C or a signal.
        steps_since: steps logged since the first of them.
    """

    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    rate: Mean = field(default_factory=Mean)
    step_time_s: float | None = None
    ended: bool = False
    tracebacks: int = 0
    interrupts: int = 0
    steps_since: int = 0

    def forget_end(self) -> None:
        """Take back what was said about the end of the run: it went on."""
        self.ended = False
        self.tracebacks = self.interrupts = self.steps_since = 0

    def forget_scores(self) -> None:
        """Take back what was said about an earlier run in the same file."""
        self.accuracy.clear()
        self.rate = Mean()
        self.step_time_s = None
