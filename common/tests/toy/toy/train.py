"""Fits a line; the loop has the order of every train.py of the zoo."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toy.config import CARD_OPTIONS, Config, FaultConfig
from zoo_common.amp import Precision
from zoo_common.config import load_config
from zoo_common.distributed import wrap
from zoo_common.errors import UserError
from zoo_common.run import Metric, Run, TrainState, start_run


class Batch(NamedTuple):
    """Points of one process and step."""

    x_B1: Tensor
    y_B1: Tensor
    item_ids: list[str]


class Points:
    """Points of step s are a function of s alone; a rank takes its share of them."""

    steps_per_epoch = 4

    def __init__(self, config: Config, run: Run) -> None:
        self.batch = config.data.batch_size
        self.processes = run.processes
        self.global_batch = self.batch * run.processes.world_size
        self.start_step = 0

    def seek(self, step: int) -> None:
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


def main(argv: Sequence[str] | None = None) -> None:
    config = load_config(Config, sys.argv[1:] if argv is None else argv, CARD_OPTIONS)
    with start_run(config, Metric("fit", "percent")) as run:
        data = Points(config, run)
        model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1)).to(run.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
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
        error = torch.zeros(())  # a resumed run may have no step left
        for batch in run.steps(state):
            fail(config.fault, run.processes.rank, state.step)
            scale = (
                float("nan")
                if (config.fault.kind, config.fault.step)
                == (
                    "nan",
                    state.step,
                )
                else 1.0
            )
            with precision.autocast(network):
                predicted = network(batch.x_B1.to(run.device)).float()
            predicted = predicted + 0.01 * recent.mean.to(run.device)
            recent.push(batch.x_B1)
            error = (predicted - batch.y_B1.to(run.device)).square().mean()
            precision.step(run.total({"square": error * scale}, batch.item_ids))
            run.log(state, lr=0.05)
            if run.due(state, config.data.save_every):
                run.save(state)
        run.save(state)
        if not run.interrupted:
            value = 100 / (1 + error.item())
            run.score({"fit": value}, images=4, seconds=0.1, state=state, weights={})
        run.finish(state, config.data.batch_size)


if __name__ == "__main__":
    main()
