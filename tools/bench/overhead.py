"""What launcher, record and bookkeeping cost a training step: the toy model's steps of 100 ms.

The same step (a sleep, then a small network) is timed in a bare loop and in a launched run with
the record on, in one process and, with gradients exchanged by DistributedDataParallel, in two.
Prints the cost of a step in milliseconds and in percent.

    python3 tools/bench/overhead.py [--steps 200] [--step_time_s 0.1]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

TOY = Path(__file__).resolve().parents[2] / "common" / "tests" / "toy"
WARMUP = 10


def main() -> None:
    """Prints a line a way to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step_time_s", type=float, default=0.1)
    options = parser.parse_args()
    for processes in (1, 2):
        bare_s = bare_step_s(processes, options.steps, options.step_time_s)
        step_s = launched_step_s(f"train_{processes}p", options.steps, options.step_time_s)
        share = 100 * (step_s - bare_s) / bare_s
        print(
            f"{processes} process(es): bare {1000 * bare_s:.3f} ms, launched "
            f"{1000 * step_s:.3f} ms a step, cost {1000 * (step_s - bare_s):.3f} ms = {share:.2f} %"
        )


def bare_step_s(processes: int, steps: int, step_time_s: float) -> float:
    """Mean seconds of a step without the zoo."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(
            bare_loop, (processes, steps, step_time_s, scratch), nprocs=processes
        )
        return float(Path(scratch, "seconds").read_text(encoding="utf-8"))


def bare_loop(rank: int, processes: int, steps: int, step_time_s: float, scratch: str) -> None:
    """The loop of one process; rank 0 leaves the seconds of a step."""
    torch.set_num_threads(1)
    model: nn.Module = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    if processes > 1:
        store = f"file://{scratch}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    started = 0.0
    for step in range(steps + WARMUP):
        if step == WARMUP:
            started = time.perf_counter()
        points = torch.randn(4, 1)
        time.sleep(step_time_s)
        (model(points) - 3 * points).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        seconds = (time.perf_counter() - started) / steps
        Path(scratch, "seconds").write_text(str(seconds), encoding="utf-8")
    if processes > 1:
        dist.destroy_process_group()


def launched_step_s(run: str, steps: int, step_time_s: float) -> float:
    """Mean seconds of a step of a launched run, from its record."""
    with tempfile.TemporaryDirectory() as output:
        words = [
            f"--steps={steps + WARMUP}",
            f"fault.step_time_s={step_time_s}",
            f"run.warmup_steps={WARMUP}",
            "run.log_every=10",
            "data.save_every=1000000",
            f"--output_dir={output}",
        ]
        subprocess.run(
            [sys.executable, "-m", "zoo_common.launch", run, *words],
            cwd=TOY,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        result = json.loads(Path(output, "result.json").read_text(encoding="utf-8"))
    return float(result["throughput"]["step_time_s"])


if __name__ == "__main__":
    main()
