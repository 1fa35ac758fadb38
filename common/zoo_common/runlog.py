"""The record of a run: JSON lines, TensorBoard and plain text, and how fast it was.

Rank 0 writes the record; the other ranks only have their text logs. Every line is flushed, so
that a killed run has a record of all that it did.
"""

import contextlib
import json
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from zoo_common.worker import REASON_VARIABLE

_METRICS, _EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


@dataclass
class StepRecord:
    """A line of ``metrics.jsonl``; times are wall-clock seconds, means since the line before.

    Attributes:
        step: finished optimizer steps, from 1.
        total_steps: steps of the whole run.
        epoch: passes over the training data, with fraction.
        images_seen: images over all ranks since the run's first step.
        losses: mean of each loss part, over ranks and over the steps since the line before.
        loss: sum of the parts.
        lr: learning rate of the step, of the first parameter group.
        images_per_sec: over all ranks.
        step_time_s: one step, data included.
        data_time_s: the part of it that waited for data.
        memory_mb: peak memory of rank 0's device, or of its process on a CPU.
        grad_norm: global gradient norm of the step in true units, when it was computed.
        loss_scale: factor on the loss, 1 without scaling.
        skipped_steps: optimizer steps skipped for float16 overflow, since the start.
        time: Unix time.
        values: what else the model watches, as it is on rank 0 after the step.
        bad_steps: steps left out under ``--skip_bad_steps``, since the start.
    """

    step: int
    total_steps: int
    epoch: float
    images_seen: int
    losses: dict[str, float]
    loss: float
    lr: float
    images_per_sec: float | None
    step_time_s: float
    data_time_s: float
    memory_mb: float
    grad_norm: float | None
    loss_scale: float
    skipped_steps: int
    time: float
    values: dict[str, float] = field(default_factory=dict)
    bad_steps: int = 0


@dataclass
class Throughput:
    """How fast a run was, and how that was measured."""

    images_per_sec: float
    step_time_s: float
    measured_steps: int
    warmup_steps: int
    how: str = (
        "images of all ranks over the wall time of the measured steps, data loading included; "
        "warm-up, evaluation and saving left out"
    )


class StepClock:
    """Times training steps; what happens under :meth:`pause` does not count.

    Args:
        images_per_step: over all ranks.
        warmup_steps: first steps of this process that the throughput leaves out.
        synchronize: waits for the device; called at the edges of measured stretches only.
    """

    def __init__(
        self, images_per_step: int, warmup_steps: int, synchronize: Callable[[], None]
    ) -> None:
        self.images_per_step = images_per_step
        self.warmup_steps = warmup_steps
        self._synchronize = synchronize
        self._steps = 0
        self._measured_from: float | None = None
        self._window_from = time.perf_counter()
        self._window_steps = 0
        self._window_data_s = 0.0
        if warmup_steps == 0:
            self._measured_from = self._window_from

    def waited(self, seconds: float) -> None:
        """Adds time that a step waited for its data."""
        self._window_data_s += seconds

    def tick(self) -> None:
        """A step is done."""
        self._steps += 1
        self._window_steps += 1
        if self._steps == self.warmup_steps:
            self._synchronize()
            self._measured_from = time.perf_counter()

    def window(self) -> tuple[float, float]:
        """Mean (step, data) seconds since the last call; the device must be idle."""
        now = time.perf_counter()
        steps = max(1, self._window_steps)
        means = (now - self._window_from) / steps, self._window_data_s / steps
        self._window_from, self._window_steps, self._window_data_s = now, 0, 0.0
        return means

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what is done inside."""
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            gone = time.perf_counter() - start
            self._window_from += gone
            if self._measured_from is not None:
                self._measured_from += gone

    def throughput(self) -> Throughput | None:
        """The mean over the measured steps so far, or None when there were none."""
        steps = self._steps - self.warmup_steps
        if self._measured_from is None or steps < 1:
            return None
        self._synchronize()
        seconds = time.perf_counter() - self._measured_from
        images_per_sec = steps * self.images_per_step / seconds
        return Throughput(images_per_sec, seconds / steps, steps, self.warmup_steps)


class RunLog:
    """Writes a run's record.

    Args:
        directory: the output directory.
        writes: whether this rank keeps the record; every rank may :meth:`say`.
    """

    def __init__(self, directory: Path, *, writes: bool) -> None:
        self.directory = directory
        self._writes = writes
        self._board: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._lines = dict.fromkeys((_METRICS, _EVALUATIONS), 0)

    def lines(self) -> dict[str, int]:
        """How many lines each file has, for :meth:`continue_from`; of the rank that writes."""
        return dict(self._lines)

    def continue_from(
        self, step: int, counted: int | None = None, lines: Mapping[str, int] | None = None
    ) -> None:
        """Drops what a resumed run recorded behind its checkpoint, because it is done again.

        Step numbers fall where a run goes on with more images a step than before, so that they
        alone do not tell what is behind. TensorBoard has nothing but them, and shows the last run.

        Args:
            step: the checkpoint's step, as it was counted then.
            counted: the same step, as this run counts; None: the same number.
            lines: what :meth:`lines` was at the checkpoint; files that are not those it counted,
                as in another directory, are cut by ``step``.
        """
        if not self._writes:
            return
        for name in self._lines:
            self._lines[name] = _cut(self.directory / name, step, (lines or {}).get(name))
        self._purge_step = (step if counted is None else counted) + 1

    def started(self, step: int, world_size: int, nnodes: int) -> None:
        """Notes in ``starts.jsonl`` that the ranks began, behind ``step`` finished steps."""
        if not self._writes:
            return
        start = {
            "time": time.time(),
            "step": step,
            "world_size": world_size,
            "nnodes": nnodes,
            "reason": os.environ.get(REASON_VARIABLE, "").partition("\n")[0],
        }
        with (self.directory / "starts.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(start) + "\n")

    def say(self, text: str) -> None:
        """A line for people, with the time, in this rank's text log."""
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", flush=True)

    def step(self, record: StepRecord) -> None:
        """Records a log step."""
        if not self._writes:
            return
        self._append(_METRICS, asdict(record))
        scalars = {
            "loss": record.loss,
            "lr": record.lr,
            "images_per_sec": record.images_per_sec,
            "memory_mb": record.memory_mb,
            "grad_norm": record.grad_norm,
            "loss_scale": record.loss_scale,
            **{f"loss/{name}": value for name, value in record.losses.items()},
            **record.values,
        }
        self._show("train", scalars, record.step)
        self.say(format_step(record))

    def evaluation(
        self, step: int, epoch: float, metrics: Mapping[str, float], images: int, seconds: float
    ) -> None:
        """Records an evaluation."""
        if not self._writes:
            return
        line = {
            "step": step,
            "epoch": epoch,
            "metrics": dict(metrics),
            "images": images,
            "seconds": seconds,
        }
        self._append(_EVALUATIONS, line)
        self._show("evaluation", metrics, step)
        scores = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        self.say(f"evaluation at step {step}: {scores}  ({images} images in {seconds:.1f} s)")

    def close(self) -> None:
        """Flushes what is buffered."""
        if self._board is not None:
            self._board.close()

    def _show(self, group: str, scalars: Mapping[str, float | None], step: int) -> None:
        if self._board is None:
            self._board = SummaryWriter(
                str(self.directory / "tensorboard"), purge_step=self._purge_step
            )
        for name, value in scalars.items():
            if value is not None:
                self._board.add_scalar(f"{group}/{name}", value, step)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._lines[name] += 1


def format_step(record: StepRecord) -> str:
    """A step of the record as a line for people."""
    width = len(str(record.total_steps))
    parts = [
        f"step {record.step:{width}d}/{record.total_steps}",
        f"epoch {record.epoch:.2f}",
        f"loss {record.loss:.4f}",
    ]
    if len(record.losses) > 1:
        parts += [f"{name} {value:.4f}" for name, value in record.losses.items()]
    parts.append(f"lr {record.lr:.3e}")
    parts += [f"{name} {value:.4f}" for name, value in record.values.items()]
    if record.grad_norm is not None and math.isfinite(record.grad_norm):
        parts.append(f"grad {record.grad_norm:.2f}")
    if record.loss_scale != 1:
        parts.append(f"scale {record.loss_scale:g} ({record.skipped_steps} skipped)")
    if record.bad_steps:
        parts.append(f"{record.bad_steps} bad left out")
    if record.images_per_sec is not None:
        parts.append(f"{record.images_per_sec:.1f} images/s")
    parts += [
        f"step {record.step_time_s:.3f} s",
        f"data {record.data_time_s:.3f} s",
        f"{record.memory_mb:.0f} MB",
        f"eta {duration((record.total_steps - record.step) * record.step_time_s)}",
    ]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as ``h:mm:ss``, days in hours."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _cut(file: Path, step: int, lines: int | None) -> int:
    """Leaves so many lines, or those that are not behind a step; returns how many."""
    if not file.is_file():
        return 0
    kept, steps = [], []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        # A killed run may leave half a line, and a disk that failed anything.
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            steps.append(operator.index(json.loads(line)["step"]))
            kept.append(line + "\n")
    counts_these = lines is not None and lines <= len(kept) and steps[:lines][-1:] <= [step]
    if counts_these:
        kept = kept[:lines]
    else:
        kept = [line for line, at in zip(kept, steps, strict=True) if at <= step]
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(file)
    return len(kept)
