"""A run from inside one of its processes: device, seed, signals, steps, record, checkpoints.

A model's ``train.py`` holds the loop; this module gives what the loop calls.
"""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from zoo_common import checkpoint, distributed
from zoo_common import device as devices
from zoo_common.amp import Precision
from zoo_common.config import to_yaml
from zoo_common.errors import TrainingError, UserError
from zoo_common.runlog import RunLog, StepClock, StepRecord, Throughput, write_json

Batch = TypeVar("Batch", covariant=True)


@dataclass(frozen=True)
class Metric:
    """What a run is judged by; higher is better."""

    name: str
    unit: str


class Stateful(Protocol):
    """What a checkpoint can hold a part of."""

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Puts back what :meth:`state_dict` gave."""


class TrainData(Protocol[Batch]):
    """A stream of training batches whose position is the number of finished steps."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in a pass over the data."""

    def seek(self, step: int) -> None:
        """Makes the next iteration begin with the batch after ``step`` finished steps."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches to the last one of the run."""


@dataclass
class TrainState(Generic[Batch]):
    """Where a training run is; what a checkpoint holds.

    Attributes:
        precision: owner of the model's weights and of the optimizer.
        data: the training data; its position is ``step``.
        global_batch: images of a step over all ranks.
        total_steps: steps of the whole run.
        parts: what else has a state, by name (``ema``, ...), the same on every rank.
        rank_parts: what has a state of its own on each rank, by name. A checkpoint holds all of
            them: rank 0 has twice as much as all ranks together in memory while it writes one,
            and on one machine every rank reads all of them when it resumes.
        step: finished steps; in the loop's body, the number of the step under way.
        best: best score so far.
    """

    precision: Precision
    data: TrainData[Batch]
    global_batch: int
    total_steps: int
    parts: dict[str, Stateful] = field(default_factory=dict)
    rank_parts: dict[str, Stateful] = field(default_factory=dict)
    step: int = 0
    best: float | None = None

    def stateful(self) -> dict[str, Stateful]:
        """What has a state that all ranks share, beside the weights, by its checkpoint's name."""
        return {"precision": self.precision, **self.parts}

    @property
    def epoch(self) -> float:
        """Passes over the training data."""
        return self.step / self.data.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.total_steps


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP ask for a checkpoint and an end; a second one ends at once.

    SIGHUP, a lost terminal, is left alone where it is ignored: that is what nohup means.
    """

    def __init__(self, log: RunLog) -> None:
        self.received: int | None = None
        self._log = log
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        self._log.say(f"{name}: saving a checkpoint after this step; a second one ends at once")


class Run:
    """What the loop of a ``train.py`` calls; made by :func:`start_run`.

    Attributes:
        device: this process's device.
        processes: its rank and the number of ranks.
        directory: the output directory.
        interrupted: a signal ended the steps before the last one.
    """

    def __init__(
        self, config: Any, metric: Metric, device: torch.device, processes: distributed.Processes
    ) -> None:
        self.config = config
        self.device = device
        self.processes = processes
        self.directory = Path(config.run.output_dir or "test/output/0")
        self.interrupted = False
        self._metric = metric
        self._log = RunLog(self.directory, writes=processes.is_main)
        self._signals = StopSignals(self._log)
        self._agreement = distributed.StopAgreement()
        self._clock: StepClock | None = None
        self._losses = _LossWindow()
        self._first_step = self._step = 0
        self._scores: dict[str, float] = {}
        self._throughput: Throughput | None = None
        self._result: dict[str, Any] = {}
        self._started = time.time()

    def say(self, text: str) -> None:
        """A line in the text log of rank 0."""
        if self.processes.is_main:
            self._log.say(text)

    def resume(self, state: TrainState[Any]) -> None:
        """Puts ``state`` where ``--resume`` says, or leaves it at the start.

        Raises:
            UserError: no checkpoint, or one that is no training checkpoint of this model.
        """
        path = self.resume_file
        if path is None:
            return
        content, own_parts = self._load_everywhere(path)
        if "step" not in content or "parts" not in content:
            raise UserError(
                f"--resume: {path} holds weights only, not the state of a run: "
                "start a new run from these weights instead."
            )
        weights, _ = checkpoint.select(content["model"], state.precision.model, path)
        state.precision.load_model_state_dict(weights)
        for parts, saved in (
            (state.stateful(), content["parts"]),
            (state.rank_parts, own_parts),
        ):
            for name, part in parts.items():
                if name not in saved:
                    raise UserError(
                        f"--resume: {path} holds no state of {name}: was it switched on?"
                    )
                part.load_state_dict(saved[name])
        state.step, state.best = content["step"], content["best"]
        ranks = len(content["rng"])
        if ranks == self.processes.world_size:
            checkpoint.set_rng_state(content["rng"][self.processes.rank], self.device)
        else:
            devices.seed_everything(self.config.run.seed + state.step, self.processes.rank)
            self.say("resumed with another number of ranks: random numbers start anew")
            for name in state.rank_parts:
                self.say(
                    f"rank r of {self.processes.world_size} has {name} of rank r modulo {ranks}"
                )
        self._log.continue_from(state.step)
        self.say(f"resumed from {path.name} at step {state.step}")

    def _load_everywhere(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """A checkpoint on every rank, and this rank's own parts of it.

        Of several machines only the first needs the file; a rank is sent no other rank's parts.
        """
        one_machine = self.processes.nnodes == 1
        content = checkpoint.load(path) if one_machine or self.processes.is_main else {}
        saved = content.pop("rank_parts", [{}])
        if one_machine:
            return content, saved[self.processes.rank % len(saved)]
        ranks = range(self.processes.world_size)
        content = distributed.broadcast_object(content)
        parts = [checkpoint.as_arrays(saved[rank % len(saved)]) for rank in ranks]
        return content, checkpoint.as_tensors(distributed.scatter_objects(parts))

    def steps(self, state: TrainState[Batch]) -> Iterator[Batch]:
        """The batches of the run, one a step, until the last one or a signal.

        ``state.step`` is the number of the step under way. All ranks stop at the same step.
        """
        left = state.total_steps - state.step
        warmup = min(self.config.run.warmup_steps, left // 2)
        self._first_step = state.step + 1
        self._clock = StepClock(
            state.global_batch,
            warmup,
            lambda: devices.synchronize(self.device),
        )
        with devices.profiler(
            self.device,
            self.directory / "profile",
            self._traced_steps(left, warmup),
            warmup,
        ) as profile_step:
            state.data.seek(state.step)
            batches = iter(state.data)
            while not state.done:
                if self._agreement.agreed(self._signals.received is not None):
                    self.interrupted = True
                    break
                asked = time.perf_counter()
                batch = next(batches)
                self._clock.waited(time.perf_counter() - asked)
                state.step += 1
                self._step = state.step
                yield batch
                self._clock.tick()
                profile_step()
        self._agreement.drain()
        self._throughput = self._clock.throughput()

    def _traced_steps(self, left: int, warmup: int) -> int:
        """How many of the steps that are left ``--profile`` traces; the first is no measure."""
        asked = self.config.run.profile if self.processes.is_main else 0
        traced = max(0, min(asked, left - max(1, warmup)))
        if traced < asked:
            self.say(f"--profile: the run is short, {traced} of {asked} steps are traced")
        return traced

    def total(self, losses: Mapping[str, Tensor], item_ids: Sequence[str]) -> Tensor:
        """The sum of the loss parts, kept for the record and watched for NaN and infinity.

        On a CPU a loss that is not finite stops the run before the optimizer steps. On other
        devices reading it would stall every step, so it is found at the next log step; no
        checkpoint is written in between.

        Args:
            losses: float32 scalars by name.
            item_ids: names of the batch's images, for the error.

        Raises:
            TrainingError: a loss is not finite.
        """
        self._losses.add(self._step, losses, item_ids)
        if self.device.type == "cpu":
            self._losses.check()
        return torch.stack(list(losses.values())).sum()

    def log(
        self, state: TrainState[Any], lr: float, values: Mapping[str, Tensor] | None = None
    ) -> None:
        """Records the step when it is the run's first or last, or ``run.log_every`` says so.

        Args:
            state: the training state.
            lr: learning rate of the step.
            values: numbers on the device that the record shall hold too, by name; they are read
                when the step is recorded.
        """
        assert self._clock is not None
        first = state.step == self._first_step
        if not (first or state.done or state.step % self.config.run.log_every == 0):
            return
        self._losses.check()
        losses = self._losses.means()
        step_s, data_s = self._clock.window()
        precision = state.precision
        norm = precision.grad_norm
        record = StepRecord(
            step=state.step,
            total_steps=state.total_steps,
            epoch=state.epoch,
            images_seen=state.step * state.global_batch,
            losses=losses,
            loss=math.fsum(losses.values()),
            lr=lr,
            images_per_sec=state.global_batch / step_s if step_s > 0 else None,
            step_time_s=step_s,
            data_time_s=data_s,
            memory_mb=devices.peak_memory_mb(self.device),
            grad_norm=None if norm is None else float(norm),
            loss_scale=precision.loss_scale,
            skipped_steps=precision.skipped_steps,
            time=time.time(),
            values={name: float(value.detach()) for name, value in (values or {}).items()},
        )
        self._log.step(record)
        self._result["final_loss"] = record.loss

    def due(self, state: TrainState[Any], every: int) -> bool:
        """Whether something that is done ``every`` so many steps is due; the end is not."""
        return every > 0 and state.step % every == 0 and not state.done

    def save(self, state: TrainState[Any]) -> None:
        """Writes ``checkpoints/last.pth``; every rank calls it, rank 0 writes.

        Raises:
            TrainingError: the disk does not take it, or a loss was not finite.
        """
        with self._paused():
            self._losses.check()
            own = {name: part.state_dict() for name, part in state.rank_parts.items()}
            ranks = distributed.gather_results(
                [(checkpoint.rng_state(self.device), checkpoint.as_arrays(own))], to="main"
            )
            if self.processes.is_main:
                content = {
                    "format": checkpoint.FORMAT,
                    "model": state.precision.model_state_dict(),
                    "step": state.step,
                    "epoch": state.epoch,
                    "best": state.best,
                    "parts": {name: part.state_dict() for name, part in state.stateful().items()},
                    "rng": [checkpoint.as_tensors(rng) for rng, _ in ranks],
                    "rank_parts": [checkpoint.as_tensors(parts) for _, parts in ranks],
                    "config": to_yaml(self.config),
                }
                checkpoint.save(self.checkpoints / "last.pth", content)
                self.say(f"saved {self.checkpoints.name}/last.pth at step {state.step}")

    @property
    def resume_file(self) -> Path | None:
        """The checkpoint that ``--resume`` means, if it was given."""
        where = self.config.run.resume
        if not where:
            return None
        return self.checkpoints / "last.pth" if where == "last" else Path(where)

    @property
    def checkpoints(self) -> Path:
        """The directory of this run's checkpoints."""
        return self.directory / "checkpoints"

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """What is done inside is no part of the training throughput."""
        with self._paused():
            yield

    def score(
        self,
        metrics: Mapping[str, float],
        *,
        images: int,
        seconds: float,
        state: TrainState[Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Records an evaluation; keeps the best weights as ``checkpoints/best.pth``.

        Args:
            metrics: scores by name, the run's metric among them; the same on every rank.
            images: how many were evaluated, over all ranks.
            seconds: how long it took.
            state: the training state, when a training run is evaluated.
            weights: what was evaluated, a state_dict.
        """
        self._scores = dict(metrics)
        step, epoch = (state.step, state.epoch) if state else (0, 0.0)
        self._log.evaluation(step, epoch, metrics, images, seconds)
        if state is None:
            images_per_sec = images / seconds
            self._throughput = Throughput(
                images_per_sec, seconds, 1, 0, "all images over the wall time of the evaluation"
            )
            return
        value = metrics[self._metric.name]
        if state.best is None or value > state.best:
            state.best = value
            if self.processes.is_main and weights is not None:
                content = {
                    "format": checkpoint.FORMAT,
                    "model": dict(weights),
                    "step": step,
                    "metrics": dict(metrics),
                    "config": to_yaml(self.config),
                }
                checkpoint.save(self.checkpoints / "best.pth", content)

    def finish(self, state: TrainState[Any] | None = None, batch_size: int = 0) -> None:
        """Writes ``result.json`` on each machine; the last thing that a run does.

        Args:
            state: the training state, when this was a training run.
            batch_size: what the user gives as ``--batch_size``.
        """
        self._log.close()
        self._signals.restore()
        if self.processes.local_rank != 0:
            return  # one a machine: the launchers of all machines tell how the run ended
        config, launch = self.config, self.config.launch
        world_size = self.processes.world_size
        steps = state.step if state else 0
        metric = None
        if self._metric.name in self._scores and not self.interrupted:
            value = self._scores[self._metric.name]
            metric = {"name": self._metric.name, "value": value, "unit": self._metric.unit}
        result = {
            "status": "interrupted" if self.interrupted else "completed",
            "signal": (self._signals.received or signal.SIGTERM) if self.interrupted else None,
            "metric": metric,
            "metrics": self._scores,
            "throughput": asdict(self._throughput) if self._throughput else None,
            "steps": steps,
            "epochs": round(state.epoch, 4) if state else 0,
            "batch_size": batch_size,
            "global_batch": state.global_batch if state else batch_size * world_size,
            "world_size": world_size,
            "nnodes": launch.nnodes,
            "device": devices.describe(self.device),
            "precision": state.precision.describe() if state else config.precision.opt_level,
            "seed": config.run.seed,
            "data": Path(config.data.path).name,
            "versions": devices.versions(),
            "git_commit": git_commit(),
            "train_seconds": round(time.time() - self._started, 3),
            "final_loss": self._result.get("final_loss"),
        }
        write_json(self.directory / "result.json", result)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        with self._clock.pause() if self._clock else contextlib.nullcontext():
            yield


class _LossWindow:
    """The loss parts since the last log step, kept on the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0
        self._unchecked: list[tuple[int, Tensor, Sequence[str]]] = []

    def add(self, step: int, losses: Mapping[str, Tensor], item_ids: Sequence[str]) -> None:
        values = torch.stack([value.detach().float() for value in losses.values()])
        self._names = list(losses)
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1
        self._unchecked.append((step, values, item_ids))

    def check(self) -> None:
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        finite = torch.stack([values for _, values, _ in unchecked]).isfinite().all(dim=1)
        if bool(finite.all()):
            return
        step, values, item_ids = unchecked[finite.tolist().index(False)]
        parts = ", ".join(
            f"{name}={value:g}" for name, value in zip(self._names, values.tolist(), strict=True)
        )
        raise TrainingError(
            f"The loss is not finite ({parts}) on rank {distributed.read_environment().rank} at "
            f"step {step}; its images are {', '.join(item_ids)}: look at them, or lower the "
            "learning rate, and continue with --resume."
        )

    def means(self) -> dict[str, float]:
        """Means over steps and ranks; empties the window."""
        assert self._sum is not None
        means = distributed.mean_across(self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        return dict(zip(self._names, means, strict=True))


@contextlib.contextmanager
def start_run(config: Any, metric: Metric) -> Iterator[Run]:
    """Device, process group, seed, signals and record of a run.

    Args:
        config: a model's config with the sections ``data``, ``precision``, ``run``, ``launch``.
        metric: what the run is judged by.

    Raises:
        UserError: the device is not there.
    """
    environment = distributed.read_environment()
    settings = config.run
    device = devices.resolve(settings.device, index=settings.device_id + environment.local_rank)
    devices.configure(
        device,
        float32=settings.float32,
        deterministic=settings.deterministic,
        jit_compile=settings.jit_compile,
        internal_format=settings.internal_format,
    )
    processes = distributed.start(device, timeout_s=settings.timeout_s)
    try:
        devices.seed_everything(settings.seed, processes.rank)
        run = Run(config, metric, device, processes)
        run.say(
            f"{devices.describe(device)}, {processes.world_size} process(es), "
            f"seed {settings.seed}, torch {torch.__version__}"
        )
        yield run
    finally:
        distributed.stop()


def git_commit() -> str | None:
    """The commit of the zoo that runs, with ``+`` when files differ from it, if it is known."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(directory: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(directory), *words],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()
