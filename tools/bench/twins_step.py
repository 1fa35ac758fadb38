"""Times a training step of our Twins-SVT-S against timm's, in alternation, on the CPU.

    python tools/bench/twins_step.py [--batch 8] [--threads 2] [--dtype float32] [--compile]

A step is forward pass, cross entropy and backward pass; then AdamW, each as its own recipe builds
it. Both start from the same weights, and the largest relative difference of their logits is
printed first. Peak memory is what three steps add to a process that has built the network, in a
process of its own for each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from alternate import alternate, print_table
from step_profile import added_memory_mb, print_memory, run_apart

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "contrib/cv/classification/Twins-ALTGVT-S"
NUM_CLASSES = 1000
Phases = dict[str, float]


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--size", type=int, default=224, help="pixels a side (default 224)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True)")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each (default 15)")
    parser.add_argument("--only-memory-of", choices=("ours", "timm"), help=argparse.SUPPRESS)
    return parser.parse_args()


def build(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The network of ``ours`` or ``timm`` with its optimizer."""
    if name == "timm":
        import timm
        from timm.optim import create_optimizer_v2

        model = timm.create_model("twins_svt_small", num_classes=NUM_CLASSES)
        return model, create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    sys.path.insert(0, str(MODEL_DIR))
    from twins.model import build_model
    from twins.recipe import build_optimizer

    ours = build_model("alt_gvt_small", num_classes=NUM_CLASSES)
    return ours, build_optimizer(ours, lr=1e-3)


def make_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace
) -> Callable[[], Phases]:
    """A function that trains one step and returns the seconds of its phases."""
    import torch
    from torch.nn.functional import cross_entropy

    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(0, NUM_CLASSES, (options.batch,))
    network = torch.compile(model, fullgraph=True) if options.compile else model
    half = options.dtype == "bfloat16"

    def step() -> Phases:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = network(images)
        loss = cross_entropy(logits.float(), labels)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        return {
            "forward": forward - start,
            "backward": backward - forward,
            "forward + backward": backward - start,
            "AdamW": end - backward,
            "whole step": end - start,
        }

    return step


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only_memory_of:
        print(added_memory_mb(make_step(*build(options.only_memory_of), options)))
        return
    ours, our_optimizer = build("ours")
    theirs, their_optimizer = build("timm")
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(options.batch, 3, options.size, options.size)
    with torch.no_grad():
        expected, logits = theirs(images), ours(images)
    relative = ((logits - expected).abs().max() / expected.abs().max()).item()
    print(f"logits in float32: largest relative difference {relative:.1e}")

    contestants = {
        "ours": make_step(ours, our_optimizer, options),
        "timm": make_step(theirs, their_optimizer, options),
    }
    seconds = alternate(contestants, rounds=options.steps)
    print_table(seconds, ours="ours", theirs="timm")
    images_per_sec = options.batch / statistics.median(seconds["ours"]["whole step"])
    print(f"ours: {images_per_sec:.1f} images/s")

    memory = [run_apart([*sys.argv[1:], f"--only-memory-of={name}"]) for name in contestants]
    print_memory(memory, "timm")


if __name__ == "__main__":
    main()
