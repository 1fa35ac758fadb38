"""Times a training step of our SOLOv2 R-50-FPN against mmdet 3.3's, in turns, on the CPU.

    python tools/bench/solov2_step.py [--images 1 2] [--threads 2] [--dtype float32]

Both have the same weights, images and objects (see solov2_peer.py); a step is forward pass,
losses, backward pass, clipping of gradients and SGD. mmdet makes its targets in the step, ours
come with the batch from the loader: making them counts here as a part of our forward pass.
``--dtype bfloat16`` puts ours under autocast (``--amp=O1``); mmdet's stays float32. Both losses are
printed first, and the bench ends with exit code 1 if they differ, or if a ratio of the whole step
is above ``--at_most`` for its time or its memory.

Then, for ours: the time of the same convolutions and matrix products called alone, which no
program that computes this step by them goes below; where the forward pass spends its time; and,
beside mmdet's, which operators the step consists of. Peak memory is what three steps add to a
process that has built the network, in processes of their own for each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import solov2_peer as peer
from alternate import alternate, print_table
from scene import draw_scene
from step_profile import (
    PRODUCTS,
    Parts,
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

NAMES = ("ours", "mmdet")
KINDS = PRODUCTS | {
    "native_batch_norm": "batch normalisation",
    "native_batch_norm_backward": "batch normalisation",
    "native_group_norm": "group normalisation",
    "native_group_norm_backward": "group normalisation",
    "relu": "ReLU",
    "relu_": "ReLU",
    "threshold_backward": "ReLU",
    "upsample_bilinear2d": "resizing",
    "upsample_bilinear2d_backward": "resizing",
    "upsample_nearest2d": "resizing",
    "upsample_nearest2d_backward": "resizing",
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
    parser.add_argument("--teach", type=int, default=26, help="steps before (default 26)")
    parser.add_argument("--at_most", type=float, default=0.8, help="ratio to reach (default 0.8)")
    parser.add_argument("--weights", type=Path, help="mmdet's, in place of teaching")
    parser.add_argument("--only-memory-of", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args()


def build_step(name: str, images: int, options: argparse.Namespace) -> tuple[TrainStep, Any]:
    """A training step, and its network."""
    import torch

    weights = torch.load(options.weights)
    scenes = [draw_scene(i, options.height, options.width) for i in range(images)]
    half = options.dtype == "bfloat16" and name == "ours"
    if name == "mmdet":
        model: Any = peer.build_theirs(weights)
        batch: Any = peer.to_theirs(model, scenes, training=True)
    else:
        model, config = peer.build_ours(weights)
        from solov2.data import Batch
        from solov2.targets import prepare

        batch = peer.to_detection(scenes)

    def forward() -> dict[str, torch.Tensor]:
        if name == "mmdet":
            theirs: dict[str, torch.Tensor] = model.loss(**batch)
            return {"loss_ins": theirs["loss_mask"], "loss_cate": theirs["loss_cls"]}
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            ours: dict[str, torch.Tensor] = model(
                Batch(batch, prepare(batch, config.head, static=False))
            )
        return ours

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Such a rate that every step meets the same weights, more or less.
    optimizer = torch.optim.SGD(trained, lr=1e-9, momentum=0.9, weight_decay=1e-4)
    return TrainStep(forward, optimizer, peer.MAX_NORM), model


def parts_of(model: Any) -> Parts:
    """Functions of our forward pass, by name."""
    import solov2.model
    import solov2.targets

    return {
        "targets": (solov2.targets, "assign"),
        "normalised images": (model, "preprocess"),
        "backbone": (model.backbone, "forward"),
        "pyramid": (model.neck, "forward"),
        "grid head": (model.bbox_head, "forward"),
        "mask features": (model.mask_feat_head, "forward"),
        "mask loss": (solov2.model, "mask_loss"),
        "class loss": (solov2.model, "class_loss"),
    }


def memory_mb(name: str, images: int, options: argparse.Namespace) -> float:
    """What three steps add to a process of their own, in MiB; the median of three processes."""
    arguments = [f"--images={images}", f"--only-memory-of={name}"]
    for option in ("height", "width", "threads", "dtype", "weights"):
        arguments.append(f"--{option}={getattr(options, option)}")
    return statistics.median(run_apart(arguments) for _ in range(3))


def compare(images: int, options: argparse.Namespace) -> bool:
    """Prints all figures for a number of images, and tells whether they are as they should be."""
    built = {name: build_step(name, images, options) for name in NAMES}
    steps = {name: step for name, (step, _) in built.items()}
    print(f"\n{images} x {options.height} x {options.width}, ours in {options.dtype}")
    seconds = alternate(steps, rounds=options.steps)
    print_losses(steps)
    print_table(seconds, ours=NAMES[0], theirs=NAMES[1])
    memory = [memory_mb(name, images, options) for name in NAMES]
    print_memory(memory, NAMES[1])
    print_parts(steps["ours"], parts_of(built["ours"][1]), "ours, forward, ms:")
    columns = {name: operators_ms(step, KINDS) for name, step in steps.items()}
    print_kinds({**columns, "ours alone": alone_ms(steps["ours"])}, KINDS)
    whole = (seconds[name]["whole step"] for name in NAMES)
    slower = statistics.median(x / y for x, y in zip(*whole, strict=True))
    tolerance = 1e-3 if options.dtype == "float32" else 0.1
    return max(slower, memory[0] / memory[1]) <= options.at_most and all(
        abs(value - steps["mmdet"].losses[key]) <= tolerance * value
        for key, value in steps["ours"].losses.items()
    )


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
        if options.weights is None:
            options.weights = Path(directory) / "weights.pth"
            scenes = [
                draw_scene(i, options.height, options.width) for i in range(max(options.images))
            ]
            torch.save(peer.make_weights(scenes, options.teach), options.weights)
        reached = [compare(images, options) for images in options.images]
    sys.exit(not all(reached))


if __name__ == "__main__":
    main()
