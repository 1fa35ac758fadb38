"""What launcher, record and bookkeeping cost a training step: the toy model's steps of 100 ms.

The same step (a sleep, then a small network) is timed in a bare loop and in a launched run with
the record on, in one process and in two. Prints the cost of a step in milliseconds and in percent.

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
from torch import nn

TOY = Path(__file__).resolve().parents[2] / "common" / "tests" / "toy"


def main() -> None:
    """Prints a line a way to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step_time_s", type=float, default=0.1)
    options = parser.parse_args()
    bare_s = bare_step_s(options.steps, options.step_time_s)
    print(f"bare loop          {1000 * bare_s:8.3f} ms a step")
    for run in ("train_1p", "train_2p"):
        step_s = launched_step_s(run, options.steps, options.step_time_s)
        cost = step_s - bare_s
        print(
            f"launched {run}  {1000 * step_s:8.3f} ms a step, "
            f"cost {1000 * cost:.3f} ms = {100 * cost / bare_s:.2f} %"
        )


def bare_step_s(steps: int, step_time_s: float) -> float:
    """Mean seconds of a step without the zoo."""
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    started = 0.0
    for step in range(steps + 10):
        if step == 10:
            started = time.perf_counter()
        points = torch.randn(4, 1)
        time.sleep(step_time_s)
        (model(points) - 3 * points).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / steps


def launched_step_s(run: str, steps: int, step_time_s: float) -> float:
    """Mean seconds of a step of a launched run, from its record."""
    with tempfile.TemporaryDirectory() as output:
        words = [
            f"--steps={steps + 10}",
            f"fault.step_time_s={step_time_s}",
            "run.warmup_steps=10",
            "run.log_every=10",
            "save_every=0",
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
