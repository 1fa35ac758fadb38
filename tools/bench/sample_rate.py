"""How many pictures of the sample data set one core draws in a second.

Run ``python3 tools/bench/sample_rate.py``. The process is held to one core and writes real JPEGs
into a temporary directory. The rate by CPU time does not depend on what else the machine does;
the rate by the clock does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from zoo_common import sample


def main() -> None:
    """Draws the same data set a few times and prints the rates and their median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1000, help="a round (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--size", type=int, default=224, help="side in pixels (default: 224)")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    held_out = len(sample.CLASSES)
    by_clock, by_cpu = [], []
    for number in range(1, args.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            clock, cpu = time.perf_counter(), time.process_time()
            sample.make(Path(folder), train=args.pictures - held_out, val=held_out, size=args.size)
            by_clock.append(args.pictures / (time.perf_counter() - clock))
            by_cpu.append(args.pictures / (time.process_time() - cpu))
        print(
            f"round {number}: {by_clock[-1]:6.0f} pictures/s by the clock, "
            f"{by_cpu[-1]:6.0f} by CPU time"
        )
    print(
        f"median on one core, {args.size} x {args.size}: {statistics.median(by_clock):.0f} "
        f"pictures/s by the clock, {statistics.median(by_cpu):.0f} by CPU time (goal: 300)"
    )


if __name__ == "__main__":
    main()
