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
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rcnn_peer as peer
from alternate import alternate, print_table
from scene import draw_scene
from step_profile import (
    PRODUCTS,
    TrainStep,
    added_memory_mb,
    alone_ms,
    operators_ms,
    print_kinds,
    print_losses,
    print_memory,
    print_parts,
    run_apart,
)

if TYPE_CHECKING:
    import torch

NAMES = ("ours", "detectron2")

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
KINDS = PRODUCTS | {
    "roi_align": "region pooling, forward",
    "roi_align_levels": "region pooling, forward",
    "_roi_align_backward": "region pooling, backward",
    "roi_align_levels_backward": "region pooling, backward",
    "nms": "suppression",
    "nms_keep": "suppression",
}


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


def build_step(name: str, images: int, options: argparse.Namespace) -> tuple[TrainStep, Any]:
    """A training step, and its network."""
    import torch

    weights = torch.load(options.weights)
    scenes = [draw_scene(i, options.height, options.width) for i in range(images)]
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

    def forward() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses: dict[str, torch.Tensor] = model(batch)
        return losses

    return TrainStep(forward, optimizer), model


def memory_mb(name: str, images: int, options: argparse.Namespace) -> float:
    """What three steps add to a process of their own, in MiB."""
    arguments = [f"--images={images}", f"--only-memory-of={name}"]
    for option in ("height", "width", "threads", "dtype", "weights"):
        arguments.append(f"--{option}={getattr(options, option)}")
    return run_apart(arguments)


def compare(images: int, options: argparse.Namespace) -> None:
    """Prints all figures for a number of images."""
    built = {name: build_step(name, images, options) for name in NAMES}
    steps = {name: step for name, (step, _) in built.items()}
    print(f"\n{images} x {options.height} x {options.width}, ours in {options.dtype}")
    seconds = alternate(steps, rounds=options.steps)
    print_losses(steps)
    print_table(seconds, ours=NAMES[0], theirs=NAMES[1])
    print_memory([memory_mb(name, images, options) for name in NAMES], NAMES[1])
    model = built["ours"][1]
    parts = {name: (model.get_submodule(module), part) for name, (module, part) in PARTS.items()}
    print_parts(steps["ours"], parts, "ours, forward, ms:")
    columns = {name: operators_ms(step, KINDS) for name, step in steps.items()}
    print_kinds({**columns, "ours alone": alone_ms(steps["ours"])}, KINDS)


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only_memory_of:
        step, _ = build_step(options.only_memory_of, options.images[0], options)
        print(added_memory_mb(step))
        return
    with tempfile.TemporaryDirectory() as directory:
        options.weights = Path(directory) / "weights.pth"
        scenes = [draw_scene(i, options.height, options.width) for i in range(max(options.images))]
        torch.save(peer.make_weights(peer.their_config(), scenes, options.teach), options.weights)
        for images in options.images:
            compare(images, options)


if __name__ == "__main__":
    main()
