"""Times a training step of our GLIP-T against mmdet 3.3's, in turns, on the CPU.

    python tools/bench/glip_step.py [--variants b a] [--images 1] [--threads 2]

``b`` is GLIP-T with fusion, ``a`` without. Both have the same weights, images, objects and caption,
that of COCO's 80 classes (see glip_peer.py); a step is forward pass, losses, backward pass,
clipping of gradients and AdamW. First their losses are printed, without what training drops at
random. The steps that are timed drop as the recipes do. ``--dtype bfloat16`` puts ours under
autocast (``--amp=O1``); mmdet's stays float32. mmdet's config of ``b`` makes the fusion's forward
pass again in the backward pass, to save memory; ``--recompute`` lets it do so here.

Then where our forward pass spends its time, and which operators both steps consist of. Peak memory
is what two steps add to a process that has built the network, in processes of their own for each.
Ends with exit code 1 if losses differ, or if a ratio of the whole step is above ``--at_most`` for
its time or ``--memory_at_most`` for its memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import glip_peer as peer
from alternate import alternate, print_table
from scene import draw_scene
from step_profile import (
    PRODUCTS,
    Parts,
    TrainStep,
    added_memory_mb,
    operators_ms,
    print_kinds,
    print_losses,
    print_memory,
    print_parts,
    run_apart,
)

if TYPE_CHECKING:
    import torch

    Forward = Callable[[], dict[str, torch.Tensor]]

NAMES = ("ours", "mmdet")
DEFORMABLE = "deformable convolution"
KINDS = PRODUCTS | {
    "addmm_": "matrix products",
    "addmm.out": "matrix products",
    "mm.out": "matrix products",
    "deform_conv2d": DEFORMABLE,
    "_deform_conv2d_backward": DEFORMABLE,
    "_softmax": "softmax",
    "_softmax_backward_data": "softmax",
    "bernoulli_": "random numbers",
    "random_": "random numbers",
    "native_layer_norm": "normalisation",
    "native_layer_norm_backward": "normalisation",
    "native_group_norm": "normalisation",
    "native_group_norm_backward": "normalisation",
}


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=peer.VARIANTS, default=["b", "a"])
    parser.add_argument("--images", type=int, default=1, help="images a step (default 1)")
    parser.add_argument("--height", type=int, default=480, help="pixels (default 480)")
    parser.add_argument("--width", type=int, default=640, help="pixels (default 640)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recompute", action="store_true", help="mmdet recomputes its fusion")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each (default 3)")
    parser.add_argument("--at_most", type=float, default=0.4, help="of time (default 0.4)")
    parser.add_argument(
        "--memory_at_most", type=float, default=0.7, help="ratio to reach (default 0.7)"
    )
    parser.add_argument("--bert", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only-memory-of", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args()


def build_step(name: str, variant: str, options: argparse.Namespace) -> tuple[TrainStep, Any]:
    """A training step, and its network."""
    import torch

    weights = torch.load(options.bert / f"{variant}.pth")
    scenes = [draw_scene(i, options.height, options.width) for i in range(options.images)]
    optimizer: torch.optim.Optimizer
    if name == "mmdet":
        theirs = peer.build_theirs(variant, options.bert, weights, recompute=options.recompute)
        data = peer.to_theirs(theirs, scenes, training=True)

        def their_losses() -> dict[str, torch.Tensor]:
            losses: dict[str, torch.Tensor] = theirs.loss(**data)
            return {key.removeprefix("loss_"): value for key, value in losses.items()}

        optimizer = torch.optim.AdamW(theirs.parameters(), weight_decay=0.05)
        return _step(their_losses, optimizer), theirs
    from glip.recipe import build_optimizer, largest_kept_block_mb
    from zoo_common.device import give_back_memory

    ours, config = peer.build_ours(variant, options.bert, weights)
    give_back_memory(torch.device("cpu"), largest_kept_block_mb(config.model))  # as glip.train
    batch = peer.to_ours(scenes, config)

    def our_losses() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            losses: dict[str, torch.Tensor] = ours(batch)
        names = {"token": "cls", "box": "bbox"}  # mmdet's
        return {names.get(key, key): value for key, value in losses.items()}

    return _step(our_losses, build_optimizer(ours, config.solver)), ours


def _step(forward: Forward, optimizer: torch.optim.Optimizer) -> TrainStep:
    for group in optimizer.param_groups:
        group["lr"] = 1e-12  # every step meets the same weights, more or less
    return TrainStep(forward, optimizer, peer.MAX_NORM)


def parts_of(model: Any) -> Parts:
    """Functions of our forward pass, by name; what a tower calls several times is summed."""
    parts: dict[str, tuple[Any, str]] = {
        "Swin Transformer": (model.backbone.body, "forward"),
        "pyramid": (model.backbone.fpn, "forward"),
        "BERT": (model.language_backbone, "forward"),
        "head, with the tower": (model.rpn.head, "forward"),
        "losses, with matching": (model, "losses"),
    }
    for layer in list(model.rpn.head.dyhead_tower)[:3]:
        parts[f"a layer: {type(layer).__name__}"] = (layer, "forward")
    return parts


def memory_mb(name: str, variant: str, options: argparse.Namespace) -> float:
    """What two steps add to a process of their own, in MiB."""
    arguments = [f"--variants={variant}", f"--only-memory-of={name}"]
    for option in ("images", "height", "width", "threads", "dtype", "bert"):
        arguments.append(f"--{option}={getattr(options, option)}")
    return run_apart(arguments + ["--recompute"] * options.recompute)


def deformable_ms(step: TrainStep) -> float:
    """Milliseconds of a step in our deformable convolution, forward and backward."""
    from torch.autograd.profiler import profile

    with profile() as profiler:
        step()
    names = ("_DeformConv", "_DeformConvBackward")
    events = profiler.key_averages()
    return float(sum(event.cpu_time_total for event in events if event.key in names)) / 1e3


def compare(variant: str, options: argparse.Namespace) -> bool:
    """Prints all figures of a variant, and tells whether they are as they should be."""
    # In processes of their own, before this one takes the memory of both.
    memory = [memory_mb(name, variant, options) for name in NAMES]
    built = {name: build_step(name, variant, options) for name in NAMES}
    steps = {name: step for name, (step, _) in built.items()}
    print(f"\nGLIP-T ({variant.upper()}), {options.images} x {options.height} x {options.width}")
    for step, model in built.values():
        with peer.without_noise(model):
            step.losses = {key: value.item() for key, value in sorted(step.forward().items())}
    print_losses(steps)
    losses = {name: step.losses for name, step in steps.items()}
    seconds = alternate(steps, rounds=options.steps, warmup=1)
    print_table(seconds, ours=NAMES[0], theirs=NAMES[1])
    print_memory(memory, NAMES[1])
    print_parts(steps["ours"], parts_of(built["ours"][1]), "ours, forward, ms:", repeats=1)
    print_kinds({n: operators_ms(step, KINDS, repeats=1) for n, step in steps.items()}, KINDS)
    print(f"{DEFORMABLE} with its products, ours: {deformable_ms(steps['ours']):.0f} ms a step")
    whole = (seconds[name]["whole step"] for name in NAMES)
    slower = statistics.median(x / y for x, y in zip(*whole, strict=True))
    tolerance = 1e-3 if options.dtype == "float32" else 0.1
    same = all(
        abs(value - losses["mmdet"][key]) <= tolerance * value
        for key, value in losses["ours"].items()
    )
    leaner = memory[0] / memory[1] <= options.memory_at_most
    return same and leaner and slower <= options.at_most


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only_memory_of:
        step, _ = build_step(options.only_memory_of, options.variants[0], options)
        print(added_memory_mb(step, steps=2))
        return
    with tempfile.TemporaryDirectory() as directory:
        options.bert = Path(directory)
        peer.make_bert(options.bert)
        for variant in options.variants:
            network = peer.build_theirs(variant, options.bert, recompute=False)
            torch.save(network.state_dict(), options.bert / f"{variant}.pth")
            del network
        reached = [compare(variant, options) for variant in options.variants]
    sys.exit(not all(reached))


if __name__ == "__main__":
    main()
