"""Times zoo_common.logparse on generated logs of 200 MB, one of each of several formats.

    python3 tools/bench/logparse_rate.py [--mb 200] [--formats twins mmcv ...]

Prints the seconds that each takes, by the wall and of CPU time, which a busy neighbour lengthens
less, and removes the logs afterwards. The goal is 10 s of CPU time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from zoo_common.logparse import parse

STEPS_PER_EPOCH = 1251
GOAL_S = 10.0


def twins_line(step: int) -> str:
    """Return a line of the original zoo's Twins, the shortest of all lines."""
    epoch, index = divmod(step, STEPS_PER_EPOCH)
    return (
        f"Epoch: [{epoch}]  [{index:4d}/{STEPS_PER_EPOCH}]  eta: 1 day, 3:10:12  lr: 0.000912  "
        f"loss: {6.9 - step * 1e-6:.4f} (4.1234)  time: 0.4213  fps:{2400 + step % 50:.3f}  "
        "data: 0.0012  max mem: 11852\n"
    )


def mmcv_line(step: int) -> str:
    """Return two lines of the original zoo's SOLOv2, whose handlers print each line twice."""
    epoch, index = divmod(step, STEPS_PER_EPOCH)
    text = (
        f"Epoch [{epoch + 1}][{index + 1}/{STEPS_PER_EPOCH}]\tlr: 0.01000, eta: 1 day, 3:10:12, "
        f"time: 0.421, data_time: 0.021, loss_ins: {2 - step * 1e-6:.4f}, loss_cate: 0.8751, "
        f"loss: {3 - step * 1e-6:.4f}\n"
    )
    return f"{text}2022-03-01 10:50:00,123 - mmdet - INFO - {text}"


def detectron2_line(step: int) -> str:
    """Return a line of Mask R-CNN."""
    return (
        f"[09/02 02:36:50 d2.utils.events]:  eta: 3:10:12  iter: {step}  total_loss: "
        f"{2 - step * 1e-7:.4g}  loss_cls: 0.07132  loss_box_reg: 0.1712  loss_mask: 0.07029  "
        "loss_rpn_cls: 0.00862  loss_rpn_loc: 0.007239  time: 1.2525  data_time: 0.0099  "
        "lr: 0.00023252  max_mem: 2940M\n"
    )


def own_line(step: int) -> str:
    """Return a line of a metrics.jsonl of this zoo."""
    record = {
        "step": step + 1,
        "total_steps": 10**7,
        "epoch": (step + 1) / STEPS_PER_EPOCH,
        "images_seen": (step + 1) * 1024,
        "losses": {"loss_cls": 2 - step * 1e-7, "loss_box": 0.25},
        "loss": 2.25 - step * 1e-7,
        "lr": 0.001,
        "images_per_sec": 2400.0 + step % 50,
        "step_time_s": 0.421,
        "data_time_s": 0.01,
        "memory_mb": 812.0,
        "grad_norm": 1.5,
        "loss_scale": 65536.0,
        "skipped_steps": 0,
        "time": 1.7e9 + step,
    }
    return json.dumps(record) + "\n"


def chatter_line(step: int) -> str:
    """Return a step line among 20 lines of another kind, as a noisy rank 0 writes them."""
    noise = f"[W compiler_depend.ts:{step % 97}] Warning: the operator falls back to the CPU (op)\n"
    return noise * 20 + twins_line(step)


LINES: dict[str, Callable[[int], str]] = {
    "twins": twins_line,
    "mmcv": mmcv_line,
    "detectron2": detectron2_line,
    "own": own_line,
    "chatter": chatter_line,
}


def write_log(path: Path, line: Callable[[int], str], size: int) -> int:
    """Write at least ``size`` bytes of log and return how many steps they hold."""
    written = step = 0
    with path.open("w") as stream:
        while written < size:
            block = "".join(line(number) for number in range(step, step + 1000))
            written += stream.write(block)
            step += 1000
    return step


def main() -> None:
    """Print a line a format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mb", type=int, default=200, help="size of a log in megabytes")
    parser.add_argument("--formats", nargs="+", choices=LINES, default=list(LINES))
    arguments = parser.parse_args()
    for name in arguments.formats:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / f"{name}.log"
            steps = write_log(path, LINES[name], arguments.mb * 10**6)
            start, cpu_start = time.perf_counter(), time.process_time()
            summary = parse(path).summary
            elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        assert summary.torn_lines == 0, "a clean log has no torn lines"
        verdict = "ok" if cpu < GOAL_S else f"over {GOAL_S:.0f} s"
        print(
            f"{name:11s} {arguments.mb} MB  {steps:8d} steps  {elapsed:6.2f} s wall  "
            f"{cpu:6.2f} s CPU  {verdict}"
        )


if __name__ == "__main__":
    main()
