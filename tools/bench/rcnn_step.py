"""Times a training step of our Mask R-CNN R-50-FPN against detectron2's, in turns, on the CPU.

    python tools/bench/rcnn_step.py [--images 1 2] [--threads 2] [--dtype float32]

Both have the same weights, images and objects (see rcnn_peer.py); a step is forward pass, losses,
backward pass and SGD, each as its own recipe builds it. ``--dtype bfloat16`` puts ours under
autocast (``--amp=O1``); detectron2's stays float32. Which anchors and proposals are in the losses
is drawn at random, so the losses, which are printed first, agree roughly.

Then, for ours: the time of the same convolutions and matrix products called alone, which no
program that computes this step by them goes below; where the forward pass spends its time; and,
beside detectron2's, which operators the step consists of. Peak memory is what three steps add to
a process that has built the network, in a process of its own for each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import rcnn_peer as peer
from alternate import alternate, print_table
from twins_step import resident_memory_mb

if TYPE_CHECKING:
    import torch

NAMES = ("ours", "detectron2")
Step = Callable[[], dict[str, float]]

PARTS = {
    "normalised images": ("", "preprocess"),
    "backbone and pyramid": ("backbone", "forward"),
    "RPN: losses": ("proposal_generator", "losses"),
    "RPN: proposals": ("proposal_generator", "forward"),
    "sampled proposals": ("roi_heads", "sample"),
    "box head and losses": ("roi_heads", "box_losses"),
    "mask head and loss": ("roi_heads", "mask_loss"),
    "  of which mask targets": ("roi_heads", "mask_targets"),
}
KINDS = {
    "convolution": "convolutions, forward",
    "convolution_backward": "convolutions, backward",
    "mm": "matrix products",
    "addmm": "matrix products",
    "bmm": "matrix products",
    "roi_align": "region pooling, forward",
    "roi_align_levels": "region pooling, forward",
    "_roi_align_backward": "region pooling, backward",
    "roi_align_levels_backward": "region pooling, backward",
    "nms": "suppression",
    "nms_keep": "suppression",
}
PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm")


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2], help="images a step")
    parser.add_argument("--height", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--width", type=int, default=800, help="pixels (default 800)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each (default 8)")
    parser.add_argument("--teach", type=int, default=40, help="steps before (default 40)")
    parser.add_argument("--only-memory-of", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def build_step(name: str, images: int, options: argparse.Namespace) -> tuple[Step, Any]:
    """A function that trains one step and returns the seconds of its phases; and the network."""
    import torch

    weights = torch.load(options.weights)
    scenes = [peer.draw_scene(i, options.height, options.width) for i in range(images)]
    if name == "detectron2":
        from detectron2.solver import build_optimizer
        from detectron2.utils.events import EventStorage

        config = peer.their_config()
        model: Any = peer.build_theirs(config, weights)
        optimizer: torch.optim.Optimizer = build_optimizer(config, model)
        batch: Any = peer.to_theirs(scenes)
        EventStorage(0).__enter__()
    else:
        model, config = peer.build_ours(weights)
        from rcnn.recipe import build_optimizer

        optimizer = build_optimizer(model, config.solver)
        batch = peer.to_ours(scenes).to(torch.device("cpu"))
    half = options.dtype == "bfloat16" and name == "ours"

    def step() -> dict[str, float]:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = model(batch)
        forward = time.perf_counter()
        sum(losses.values()).backward()
        backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        step.losses = {key: float(losses[key]) for key in sorted(losses)}  # type: ignore[attr-defined]
        return {
            "forward": forward - start,
            "backward": backward - forward,
            "SGD": end - backward,
            "whole step": end - start,
        }

    return step, model


def added_memory_mb(options: argparse.Namespace) -> float:
    """Peak resident memory that three steps add to this process, in MiB."""
    step, _ = build_step(options.only_memory_of, options.images[0], options)
    before_mb = resident_memory_mb("VmRSS")
    for _ in range(3):
        step()
    return resident_memory_mb("VmHWM") - before_mb


def memory_mb(name: str, images: int, options: argparse.Namespace) -> float:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, f"--images={images}", f"--only-memory-of={name}"]
    for option in ("height", "width", "threads", "dtype", "weights"):
        command.append(f"--{option}={getattr(options, option)}")
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def alone_ms(step: Step, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of a step's convolutions and matrix products, called one by one."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: Counter[tuple[Any, str]] = Counter()
    arguments: dict[tuple[Any, str], tuple[Any, ...]] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func._schema.name.partition("::")[2] in PRODUCTS:
                kept = tuple(
                    (a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a
                    for a in args
                )
                arguments[func, repr(kept)] = kept
                calls[func, repr(kept)] += 1
            return func(*args, **(kwargs or {}))

    with Record():  # type: ignore[no-untyped-call]
        step()

    def make(argument: Any) -> Any:
        if isinstance(argument, tuple) and isinstance(argument[-1], torch.dtype):
            size, stride, dtype = argument
            return torch.empty_strided(size, stride, dtype=dtype).normal_()
        return argument

    total: dict[str, float] = {}
    for (func, key), times in calls.items():
        made = [make(argument) for argument in arguments[func, key]]
        fastest = min(_seconds(func, made) for _ in range(repeats))
        kind = kind_of(func._schema.name)
        total[kind] = total.get(kind, 0.0) + 1e3 * times * fastest
    return total


def _seconds(function: Any, arguments: list[Any]) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def kind_of(operator: str) -> str:
    """What an operator such as ``aten::mm`` is for."""
    return KINDS.get(operator.partition("::")[2], "all else")


def operators_ms(step: Step, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of a step by kind of operator; the median of some steps."""
    from torch.utils._python_dispatch import TorchDispatchMode

    spent: list[dict[str, float]] = []

    class Clock(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            start = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            kind = kind_of(func._schema.name)
            spent[-1][kind] = spent[-1].get(kind, 0) + 1e3 * (time.perf_counter() - start)
            return result

    for _ in range(repeats):
        spent.append({})
        with Clock():  # type: ignore[no-untyped-call]
            step()
    return {kind: statistics.median(one.get(kind, 0) for one in spent) for kind in spent[0]}


@contextmanager
def part_clock(model: Any) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of our forward pass by part, a list entry a call."""
    spent: dict[str, list[float]] = {name: [] for name in PARTS}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name].append(1e3 * (time.perf_counter() - start))
            return result

        return call

    with ExitStack() as stack:
        for name, (module, method) in PARTS.items():
            owner = model.get_submodule(module)
            function = timed(name, getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, function))
        yield spent


def print_kinds(columns: Mapping[str, Mapping[str, float]]) -> None:
    """A table of milliseconds by kind of operator."""
    print(f"{'operators, ms a step':<26}" + "".join(f"{name:>14}" for name in columns))
    for kind in [*dict.fromkeys(KINDS.values()), "all else"]:
        print(f"{kind:<26}" + "".join(f"{spent.get(kind, 0):14.0f}" for spent in columns.values()))


def compare(images: int, options: argparse.Namespace) -> None:
    """Prints all figures for a number of images."""
    built = {name: build_step(name, images, options) for name in NAMES}
    steps: dict[str, Any] = {name: step for name, (step, _) in built.items()}
    print(f"\n{images} x {options.height} x {options.width}, ours in {options.dtype}")
    seconds = alternate(steps, rounds=options.steps)
    for name, step in steps.items():
        print(f"{name:<12}" + "".join(f" {key} {value:.4f}" for key, value in step.losses.items()))
    print_table(seconds, ours=NAMES[0], theirs=NAMES[1])

    memory = {name: memory_mb(name, images, options) for name in NAMES}
    print(
        f"peak memory of steps: ours {memory['ours']:.0f} MiB, detectron2 "
        f"{memory['detectron2']:.0f} MiB, ratio {memory['ours'] / memory['detectron2']:.3f}"
    )
    with part_clock(built["ours"][1]) as parts:
        for _ in range(3):
            steps["ours"]()
    print("ours, forward, ms:")
    for name, spent in parts.items():
        print(f"  {name:<24} {statistics.median(spent):8.1f}")
    print_kinds(
        {
            **{name: operators_ms(step) for name, step in steps.items()},
            "ours alone": alone_ms(steps["ours"]),
        }
    )


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only_memory_of:
        print(added_memory_mb(options))
        return
    with tempfile.TemporaryDirectory() as directory:
        options.weights = Path(directory) / "weights.pth"
        scenes = [
            peer.draw_scene(i, options.height, options.width) for i in range(max(options.images))
        ]
        torch.save(peer.make_weights(peer.their_config(), scenes, options.teach), options.weights)
        for images in options.images:
            compare(images, options)


if __name__ == "__main__":
    main()
