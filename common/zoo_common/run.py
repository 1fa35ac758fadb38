"""A run from inside one of its processes: device, seed, signals, steps, record, checkpoints.

A model's ``train.py`` holds the loop; this module gives what the loop calls.
"""

import contextlib
import math
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from zoo_common import checkpoint, distributed, elastic
from zoo_common import device as devices
from zoo_common.amp import Precision
from zoo_common.beats import beat
from zoo_common.checkpoints import Checkpoints, choose
from zoo_common.config import to_yaml
from zoo_common.errors import TrainingError, UserError, one_line
from zoo_common.loss_watch import LossWatch, Snapshot, Stateful
from zoo_common.runlog import RunLog, StepClock, StepRecord, Throughput, write_json
from zoo_common.stop_signals import StopSignals

Batch = TypeVar("Batch", covariant=True)


@dataclass(frozen=True)
class Metric:
    """What a run is judged by; higher is better."""

    name: str
    unit: str


class TrainData(Protocol[Batch]):
    """A stream of training batches whose position is the number of finished steps."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in a pass over the data."""

    def seek(self, step: int, met: tuple[elastic.Met, ...] = ()) -> None:
        """Makes the next iteration begin with the batch after ``step`` finished steps.

        ``met`` is what other processes met of that epoch.
        """

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
        parts: what else has a state, by name (``ema``, ...), the same on every rank; it changes
            after the optimizer's step only, and not when :attr:`Run.left_out` says so.
        rank_parts: what has a state of its own on each rank, by name. A checkpoint holds all of
            them: rank 0 has twice as much as all ranks together in memory while it writes one,
            and on one machine every rank reads all of them when it resumes.
        step: finished steps; in the loop's body, the number of the step under way.
        best: best score so far.
        met: what other processes met of the epoch that the run goes on in.
    """

    precision: Precision
    data: TrainData[Batch]
    global_batch: int
    total_steps: int
    parts: dict[str, Stateful] = field(default_factory=dict)
    rank_parts: dict[str, Stateful] = field(default_factory=dict)
    step: int = 0
    best: float | None = None
    met: tuple[elastic.Met, ...] = ()

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


class Run:
    """What the loop of a ``train.py`` calls; made by :func:`start_run`.

    Attributes:
        device: this process's device.
        processes: its rank and the number of ranks.
        directory: the output directory.
        interrupted: a signal ended the steps before the last one.
        left_out: the step under way is bad, and left out as ``--skip_bad_steps`` asks.
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
        self._saved = Checkpoints(
            self.checkpoints,
            keep=config.run.keep_checkpoints,
            in_background=config.run.save_in_background,
            on_error=config.run.on_save_error,
            timeout_s=config.run.save_timeout_s,
            say=self.say,
        )
        self._agreement = distributed.StopAgreement()
        self._clock: StepClock | None = None
        self.left_out = False
        self._losses = LossWatch(
            processes.rank,
            self._log.say,
            spike_factor=config.run.spike_factor,
            skips=config.run.skip_bad_steps,
        )
        self._precision: Precision | None = None
        self._snapshot: Snapshot | None = None
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
            self._log.continue_from(0, 0)  # ranks may have begun, and failed before a checkpoint
        else:
            try:
                self._load(path, state)
            except (UserError, TrainingError):
                raise
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise _other_state(path, error) from error
            except RuntimeError as error:
                if "out of memory" in str(error):
                    raise
                raise _other_state(path, error) from error
        if self.processes.is_main:
            parts = [part.state_dict() for part in state.rank_parts.values()]
            shared = [part.state_dict() for part in state.stateful().values()]
            shared.append(state.precision.model_state_dict())
            ranks = self.processes.world_size
            size = checkpoint.size_of(shared) + ranks * checkpoint.size_of(parts)
            self._saved.begin(path, size)

    def _load(self, path: Path, state: TrainState[Any]) -> None:
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
        state.step, state.best = elastic.step_at(content, state), content["best"]
        if state.step < 0 or not isinstance(state.best, (int, float, type(None))):
            raise ValueError(f"step {state.step}, best {state.best!r:.40}")
        state.met = elastic.met_before(content, state, self.processes.world_size)
        if "losses" in content:  # older files have none
            self._losses.load_state_dict(content["losses"])
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
        changed = elastic.describe(content, state)
        if changed is not None:
            self.say(changed)
        self._log.continue_from(content["step"], state.step, content.get("record"))
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
        processes = self.processes
        self._log.started(state.step, processes.world_size, processes.nnodes)
        left = state.total_steps - state.step
        warmup = min(self.config.run.warmup_steps, left // 2)
        self._first_step = state.step + 1
        self._clock = StepClock(
            state.global_batch,
            warmup,
            lambda: devices.synchronize(self.device),
        )
        self._precision = state.precision
        state.precision.name_step = self._losses.name_step
        if self._losses.skips:
            self._snapshot = Snapshot(state.precision.model, list(state.rank_parts.values()))
        with devices.profiler(
            self.device,
            self.directory / "profile",
            self._traced_steps(left, warmup),
            warmup,
        ) as profile_step:
            state.data.seek(state.step, state.met)
            batches = iter(state.data)
            while not state.done:
                if self._agreement.agreed(self._signals.received is not None):
                    self.interrupted = True
                    break
                asked = time.perf_counter()
                batch = next(batches)
                self._clock.waited(time.perf_counter() - asked)
                state.step += 1
                beat(f"step {state.step}", working=True)
                self._step = state.step
                self.left_out = False
                if self._snapshot is not None:
                    self._snapshot.take()
                yield batch
                self._saved.poll()
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
        """The sum of the loss parts, kept for the record and watched, see zoo_common.loss_watch.

        On a CPU a loss that is not finite, or a spike, stops the run before the optimizer steps.
        On other devices reading it would stall every step, so it is found at the next log step;
        no checkpoint is written in between. With ``--skip_bad_steps`` each step is read, and
        :meth:`Precision.step` leaves out a bad one on all ranks: weights, optimizer, buffers and
        ``rank_parts`` are then as they were before the step, which is not taken again.

        Args:
            losses: float32 scalars by name.
            item_ids: names of the batch's images, for the error.

        Raises:
            TrainingError: a loss is not finite or a spike, more often than may be left out.
        """
        self._losses.add(self._step, losses, item_ids)
        if self._snapshot is not None:
            self._leave_out_bad_step(self._snapshot)
        elif self.device.type == "cpu":
            self._losses.check()
        return torch.stack(list(losses.values())).sum()

    def _leave_out_bad_step(self, snapshot: Snapshot) -> None:
        found = self._losses.leaves_out()
        if not found or self.left_out:
            return
        assert self._precision is not None
        self._losses.count(found)
        self.left_out = True
        self._precision.leave_out(snapshot.put_back)
        for bad in found:
            self.say(
                f"left out step {bad.step}, number {self._losses.bad_steps} of "
                f"{self._losses.skips} that may be: {bad.describe()}"
            )

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
        if not losses:
            return  # all steps since the last record were left out
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
            bad_steps=self._losses.bad_steps,
        )
        self._log.step(record)
        self._result["final_loss"] = record.loss

    def due(self, state: TrainState[Any], every: int) -> bool:
        """Whether something that is done ``every`` so many steps is due; the end is not."""
        return every > 0 and state.step % every == 0 and not state.done

    def save(self, state: TrainState[Any]) -> None:
        """Writes ``checkpoints/step_*.pth``; every rank calls it, rank 0 writes.

        Training goes on meanwhile, from the last save it does not: see zoo_common.checkpoints.

        Raises:
            TrainingError: the disk does not take it, or the one before, or a loss was not finite.
        """
        with self._paused():
            beat(f"saving step {state.step}")
            self._losses.check()
            final = state.done or self.interrupted
            if self.processes.is_main:
                self._saved.make_room(final=final)
            own = {name: part.state_dict() for name, part in state.rank_parts.items()}
            ranks = distributed.gather_results(
                [(checkpoint.rng_state(self.device), checkpoint.as_arrays(own))], to="main"
            )
            if self.processes.is_main:
                content = {
                    "format": checkpoint.FORMAT,
                    "run_id": self.config.run.id,
                    "model": state.precision.model_state_dict(),
                    "step": state.step,
                    "epoch": state.epoch,
                    "best": state.best,
                    **elastic.position(state, self.processes.world_size),
                    "record": self._log.lines(),
                    "losses": self._losses.state_dict(),
                    "parts": {name: part.state_dict() for name, part in state.stateful().items()},
                    "rng": [checkpoint.as_tensors(rng) for rng, _ in ranks],
                    "rank_parts": [checkpoint.as_tensors(parts) for _, parts in ranks],
                    "config": to_yaml(self.config),
                }
                # What came from other processes nobody else holds.
                unshared = ("rng", "rank_parts") if len(ranks) > 1 else ("rng",)
                self._saved.save(state.step, content, unshared=unshared, final=final)

    @property
    def resume_file(self) -> Path | None:
        """The checkpoint that ``--resume`` means, if it was given."""
        return Path(self.config.run.resume) if self.config.run.resume else None

    @property
    def checkpoints(self) -> Path:
        """The directory of this run's checkpoints."""
        return self.directory / "checkpoints"

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """What is done inside is no part of the training throughput."""
        beat("evaluation")
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
                self._saved.save_best(content)

    def finish(self, state: TrainState[Any] | None = None, batch_size: int = 0) -> None:
        """Writes ``result.json`` on each machine; the last thing that a run does.

        Args:
            state: the training state, when this was a training run.
            batch_size: what the user gives as ``--batch_size``.

        Raises:
            TrainingError: the disk did not take the last checkpoints.
        """
        self._saved.wait()
        self._log.close()
        self._signals.restore()
        if self.processes.local_rank != 0:
            return  # one a machine: the launchers of all machines tell how the run ended
        config = self.config
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
            "nnodes": self.processes.nnodes,
            "device": devices.describe(self.device),
            "precision": state.precision.describe() if state else config.precision.opt_level,
            "seed": config.run.seed,
            "data": Path(config.data.path).name,
            "versions": devices.versions(),
            "git_commit": git_commit(),
            "train_seconds": round(time.time() - self._started, 3),
            "final_loss": self._result.get("final_loss"),
            "bad_steps": self._losses.bad_steps,
        }
        write_json(self.directory / "result.json", result)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        with self._clock.pause() if self._clock else contextlib.nullcontext():
            yield


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
        warnings: list[str] = []
        if processes.is_main:
            settings.resume = choose(settings, warnings.append)
        settings.resume = distributed.broadcast_object(settings.resume)
        run = Run(config, metric, device, processes)
        for text in warnings:
            run.say(text)
        run.say(
            f"{devices.describe(device)}, {processes.world_size} process(es), "
            f"seed {settings.seed}, torch {torch.__version__}"
        )
        with contextlib.closing(run._saved):
            yield run
    finally:
        distributed.stop()


def _other_state(path: Path, error: BaseException) -> UserError:
    """For a file that is whole, but holds other things than a state of this run."""
    return UserError(
        f"--resume: {path} is no state that this run can go on from ({one_line(error)}): give a "
        "checkpoint of the same model and settings."
    )


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
