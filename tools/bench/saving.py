"""What saving costs training: steps with and without checkpoints written beside them.

The state is a model with AdamW's two moments; a step is a matrix product and the optimizer's step
over all weights. Rounds without saves, with saves in the background and with saves in the
foreground alternate, each as long as the period between two saves. Prints for both ways how long
a save holds up the loop, how long the disk takes, and the share of the period that is lost.

    python3 tools/bench/saving.py [--megabytes 500] [--period_s 60] [--rounds 3] [--threads 1]
                                  [--directory DIR]

Where training computes on the same cores (``--threads`` of all of them), the checksums and copies
take their part of these; beside an accelerator one thread is the fair measure.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from zoo_common.checkpoints import Checkpoints

WAYS = ("no saves", "background", "foreground")


def main() -> None:
    """Prints a line a way to save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=500.0)
    parser.add_argument("--period_s", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step, content = training(options.megabytes)
    for _ in range(3):
        step()
    step_s = statistics.median(seconds_of(step) for _ in range(5))
    steps = max(1, round(options.period_s / step_s))
    print(
        f"state {options.megabytes:g} MB, step {1000 * step_s:.0f} ms, {steps} steps between "
        f"saves, {options.threads} thread(s)"
    )
    rounds: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for _ in range(options.rounds):
            for way in WAYS:
                rounds[way].append(one_round(way, Path(directory, way), step, content, steps))
    bare_s = statistics.median(total for total, _, _ in rounds["no saves"])
    for way in WAYS:
        total_s, held_s, disk_s = map(statistics.median, zip(*rounds[way], strict=True))
        lost = 100 * (total_s - bare_s) / bare_s
        print(
            f"{way:11} {total_s:7.2f} s a round, save() holds up {1000 * held_s:6.0f} ms, written "
            f"after {disk_s:5.2f} s, lost {lost:5.2f} %"
        )


def training(megabytes: float) -> tuple[Callable[[], None], Callable[[], dict[str, object]]]:
    """A step, and what a checkpoint of the state then holds."""
    side = 1024
    layers = max(1, round(megabytes * 1e6 / (3 * 4 * side * side)))
    weights = [torch.randn(side, side, requires_grad=True) for _ in range(layers)]
    optimizer = torch.optim.AdamW(weights, lr=1e-5)
    points = torch.randn(32, side)

    def step() -> None:
        values = points
        for weight in weights:
            values = torch.tanh(values @ weight / side**0.5)
        values.square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    def content() -> dict[str, object]:
        model = {f"{index}.weight": weight.detach() for index, weight in enumerate(weights)}
        return {"format": 1, "model": model, "step": 0, "parts": {"opt": optimizer.state_dict()}}

    return step, content


def one_round(
    way: str,
    directory: Path,
    step: Callable[[], None],
    content: Callable[[], dict[str, object]],
    steps: int,
) -> tuple[float, float, float]:
    """Seconds of a period, of its save() as the loop sees it, and until the file was there."""
    written: list[float] = []
    saved = Checkpoints(
        directory,
        keep=1,
        in_background=way == "background",
        on_error="stop",
        timeout_s=900,
        say=lambda text: written.append(time.perf_counter()),
    )
    saved.begin(None, 0)
    written.clear()
    started = time.perf_counter()
    held_s = 0.0
    if way != "no saves":
        saved.save(1, content())
        held_s = time.perf_counter() - started
    for _ in range(steps):
        step()
        saved.poll()
    total_s = time.perf_counter() - started
    saved.wait()
    return total_s, held_s, written[0] - started if written else 0.0


def seconds_of(action: Callable[[], None]) -> float:
    """Of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
