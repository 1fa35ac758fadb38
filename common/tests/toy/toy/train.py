"""Fits a line; the loop has the order of every train.py of the zoo."""

import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toy.config import CARD_OPTIONS, Config, FaultConfig, for_world
from zoo_common.amp import Precision
from zoo_common.config import load_config
from zoo_common.distributed import gather_results, wrap
from zoo_common.elastic import Met
from zoo_common.errors import UserError
from zoo_common.run import Metric, Run, TrainState, start_run


class Batch(NamedTuple):
    """Points of one process and step."""

    x_B1: Tensor
    y_B1: Tensor
    item_ids: list[str]


class Points:
    """Points of step s are a function of s alone; a rank takes its share of them."""

    def __init__(self, config: Config, run: Run) -> None:
        self.steps_per_epoch = config.data.per_epoch
        self.batch = config.data.batch_size
        self.processes = run.processes
        self.global_batch = self.batch * run.processes.world_size
        self.start_step = 0

    def seek(self, step: int, met: tuple[Met, ...] = ()) -> None:
        self.start_step = step

    def __iter__(self) -> Iterator[Batch]:
        for step in itertools.count(self.start_step):
            x = torch.randn(self.global_batch, 1, generator=torch.Generator().manual_seed(step))
            own = slice(self.processes.rank * self.batch, (self.processes.rank + 1) * self.batch)
            names = [f"point_{step}_{index}" for index in range(self.global_batch)]
            yield Batch(x[own], 3 * x[own] + 1, names[own])


class Recent:
    """The points that this rank met last; each rank has its own."""

    def __init__(self) -> None:
        self.mean = torch.zeros(1)

    def push(self, x_B1: Tensor) -> None:
        self.mean.lerp_(x_B1.mean(dim=0), 0.5)

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.mean.copy_(state_dict["mean"])


def fail(fault: FaultConfig, rank: int, step: int) -> None:
    time.sleep(fault.step_time_s)
    if (rank, step) != (fault.rank, fault.step):
        return
    if fault.kind == "crash":
        raise KeyError("the toy broke")
    if fault.kind == "user":
        raise UserError("The toy was wound up wrongly: turn the key the other way.")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "memory":
        raise torch.OutOfMemoryError(
            "NPU out of memory. Tried to allocate 2.50 GiB (NPU 0; 60.97 GiB total capacity). If"
        )
    if fault.kind == "hang":
        time.sleep(3600)


def spoil(fault: FaultConfig, rank: int, step: int, x_B1: Tensor) -> Tensor:
    """The points as a damaged picture would make them."""
    if rank != fault.rank or not fault.step <= step < fault.step + fault.steps:
        return x_B1
    return x_B1 * {"nan": math.nan, "inf": math.inf, "spike": 1e4}.get(fault.kind, 1)


def evaluate(run: Run, model: nn.Module, state: TrainState[Batch]) -> None:
    """Scores the line on points that no step has met; each rank takes its own of them."""
    processes = run.processes
    with run.evaluating():
        x_B1 = torch.linspace(-2, 2, 64)[processes.rank :: processes.world_size, None]
        model.eval()
        with torch.no_grad():
            predicted_B1 = model(x_B1.to(run.device)).float().cpu()
        model.train()
        errors = gather_results((predicted_B1 - 3 * x_B1 - 1).square().flatten().tolist())
        fit = 100 / (1 + sum(errors) / len(errors))
        weights = model.state_dict()
        run.score({"fit": fit}, images=64, seconds=0.1, state=state, weights=weights)


def main(argv: Sequence[str] | None = None) -> None:
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, Metric("fit", "percent")) as run:
        config = for_world(config, run.processes.world_size)
        data = Points(config, run)
        model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1)).to(run.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.data.lr)
        precision = Precision(config.precision, model, optimizer, run.device)
        recent = Recent()
        state = TrainState(
            precision,
            data,
            global_batch=data.global_batch,
            total_steps=config.run.max_steps or config.data.steps,
            rank_parts={"recent": recent},
        )
        run.resume(state)
        network = wrap(model, run.device)
        for batch in run.steps(state):
            fail(config.fault, run.processes.rank, state.step)
            x_B1 = spoil(config.fault, run.processes.rank, state.step, batch.x_B1)
            with precision.autocast(network):
                predicted = network(x_B1.to(run.device)).float()
            predicted = predicted + 0.01 * recent.mean.to(run.device)
            recent.push(x_B1)
            if config.fault.kind == "overflow" and state.step >= config.fault.step:
                predicted.register_hook(lambda gradient: gradient * math.inf)
            error = (predicted - batch.y_B1.to(run.device)).square().mean()
            precision.step(run.total({"square": error}, batch.item_ids))
            run.log(state, lr=config.data.lr)
            if run.due(state, config.run.save_every or config.data.save_every):
                run.save(state)
            if run.due(state, config.data.evaluate_every):
                evaluate(run, model, state)
        run.save(state)
        if not run.interrupted:
            evaluate(run, model, state)
        run.finish(state, config.data.batch_size)


if __name__ == "__main__":
    main()
