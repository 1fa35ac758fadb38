"""Times a training step of our DeCLIP against the original's, in turns, on the CPU.

    python tools/bench/declip_step.py --peer DIR [--model declip_vitb32 declip_res50 clip_vitb32]

The peer of the two DeCLIPs is a clone of Sense-GVT/DeCLIP in DIR (see declip_peer.py), that of
plain CLIP is open_clip's ViT-B-32-quickgelu with its ClipLoss, whose first convolution is frozen
here as ours is. All at full size with CLIP's vocabulary and, for DeCLIP, a queue of 65,536 texts.
Both have the same weights, queue, images, captions and masked words; a step is forward pass,
losses, backward pass and AdamW in float32. The original augments, tokenises and masks captions in
its step: here it is given the result, as ours comes from the loader. Ours contrasts the masked
captions, as the original does (``loss.contrast_masked``); a third column is ours with the whole
ones, which takes one more pass of the text transformer.

All losses are printed first, and the bench ends with exit code 1 if they differ, or if a ratio of
the whole step is above ``--at_most`` for its time or its memory. Peak memory is what a process of
its own grows to by building the network and training three steps, without what it had imported.
Then, for ours: the time of the same convolutions and matrix products called alone, where the
forward pass spends its time, and, beside the peer's, which operators the step consists of.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import declip_peer as peer
from alternate import alternate, print_table
from step_profile import (
    PRODUCTS,
    Parts,
    TrainStep,
    alone_ms,
    operators_ms,
    print_kinds,
    print_losses,
    print_parts,
    resident_memory_mb,
    run_apart,
)

if TYPE_CHECKING:
    import torch

LR = 1e-9  # so that every step meets the same weights, more or less
TOLERANCE = 1e-4  # of a loss, relative: float32
OURS, WHOLE, THEIRS = "ours", "ours, whole", "theirs"
KINDS = PRODUCTS | {
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "native_batch_norm": "batch normalisation",
    "native_batch_norm_backward": "batch normalisation",
    "native_layer_norm": "layer normalisation",
    "native_layer_norm_backward": "layer normalisation",
    "avg_pool2d": "pooling",
    "avg_pool2d_backward": "pooling",
    "relu": "ReLU",
    "relu_": "ReLU",
    "threshold_backward": "ReLU",
    "silu": "QuickGELU",
    "silu_backward": "QuickGELU",
    "_fused_adamw_": "AdamW",
    "copy_": "copies",
    "clone": "copies",
}


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", type=Path, help="a clone of Sense-GVT/DeCLIP")
    parser.add_argument("--model", nargs="+", choices=peer.MODELS, default=list(peer.MODELS))
    parser.add_argument("--images", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--at_most", type=float, default=0.8, help="ratio to reach (default 0.8)")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, too")
    parser.add_argument("--only-memory-of", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    return parser.parse_args()


def use_peer(kind: str, options: argparse.Namespace) -> None:
    """Imports the peer of a network."""
    if kind == peer.CLIP:
        peer.use_open_clip()
    else:
        peer.use(options.peer)


def build_theirs(kind: str, scene: peer.Scene) -> tuple[TrainStep, Any]:
    """The peer's training step, and its network."""
    import torch

    model = peer.build_full(kind)
    forward = peer.forward_of(kind, model, scene, vars(peer.our_config(kind).loss))
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=LR,
        betas=(0.9, 0.98),
        weight_decay=0.1,
    )
    return TrainStep(forward, optimizer), model


def build_ours(
    kind: str, scene: peer.Scene, weights: dict[str, torch.Tensor] | None
) -> tuple[TrainStep, TrainStep, Any]:
    """Our training step, that with whole captions, and our network."""
    import torch

    peer.use_ours()
    from declip.model import build_model, to_device
    from declip.objective import Objective
    from declip.recipe import build_optimizer
    from zoo_common.device import give_back_memory

    config = peer.our_config(kind)
    give_back_memory(torch.device("cpu"))  # as declip.train does
    model = build_model(config.model, config.loss, scene.vocab_size).train()
    to_device(model, torch.device("cpu"))
    if weights is not None:
        model.load_state_dict(peer.to_our_keys(kind, weights))
    config.optimizer.lr = LR
    optimizer = build_optimizer(model, config.optimizer)
    objective = Objective(
        config.loss, config.model.embed_dim, device=torch.device("cpu"), seed=0, rank=0
    )
    if objective.queue is not None:
        objective.queue.rows_ND.copy_(scene.queue_ND)

    def make(batch: Any) -> TrainStep:
        def forward() -> dict[str, torch.Tensor]:
            losses: dict[str, torch.Tensor] = objective(model(batch), batch)
            return losses

        return TrainStep(forward, optimizer)

    # A CLIP masks nothing.
    return make(scene.batch(whole=False)), make(scene.batch(whole=kind != peer.CLIP)), model


def parts_of(model: Any) -> Parts:
    """Functions of our forward pass, by name."""
    import declip.objective

    parts: dict[str, tuple[Any, str]] = {
        "image tower": (model, "view_features"),
        "text transformer": (model.encode_text, "forward"),
        "contrastive loss": (declip.objective, "contrastive_loss"),
    }
    if hasattr(model, "projector"):
        parts |= {
            "projector, a view": (model.projector, "forward"),
            "masked words": (model.text_label_predictor, "forward"),
            "neighbours": (declip.objective.Objective, "_neighbors"),
        }
    return parts


def grown_memory_mb(name: str, kind: str, options: argparse.Namespace) -> float:
    """What this process grows by building a network and training three steps, in MiB."""
    use_peer(kind, options)
    scene = peer.Scene(kind, options.images)
    before_mb = resident_memory_mb("VmRSS")
    step: TrainStep
    if name == OURS:
        step, *_ = build_ours(kind, scene, None)
    else:
        step, _ = build_theirs(kind, scene)
    for _ in range(3):
        step()
    return resident_memory_mb("VmHWM") - before_mb


def memory_mb(name: str, kind: str, options: argparse.Namespace) -> float:
    """The same in a process of its own."""
    arguments = [f"--model={kind}", f"--only-memory-of={name}", f"--images={options.images}"]
    arguments.append(f"--threads={options.threads}")
    if options.peer:
        arguments.append(f"--peer={options.peer}")
    return run_apart(arguments)


def compare(kind: str, options: argparse.Namespace) -> bool:
    """Prints all figures of a network, and tells whether they are as they should be."""
    print(f"\n{kind}: {options.images} images, float32, {options.threads} threads")
    use_peer(kind, options)
    scene = peer.Scene(kind, options.images)
    theirs, their_model = build_theirs(kind, scene)
    ours, whole, our_model = build_ours(kind, scene, their_model.state_dict())
    steps = {OURS: ours, THEIRS: theirs} | ({} if kind == peer.CLIP else {WHOLE: whole})
    theirs()
    ours()
    agree = all(
        abs(ours.losses[name] - loss) <= TOLERANCE * abs(loss)
        for name, loss in theirs.losses.items()
    )
    print_losses({OURS: ours, THEIRS: theirs})
    seconds = alternate(steps, rounds=options.steps, warmup=1)
    print_table(seconds, ours=OURS, theirs=THEIRS)
    if WHOLE in steps:
        print_table(seconds, ours=WHOLE, theirs=THEIRS)
    if options.profile:
        print_parts(ours, parts_of(our_model), "ours, forward, ms:")
        columns = {name: operators_ms(steps[name], KINDS) for name in (OURS, THEIRS)}
        print_kinds({**columns, "ours alone": alone_ms(ours)}, KINDS)
    pairs = zip(*(seconds[name]["whole step"] for name in (OURS, THEIRS)), strict=True)
    slower = statistics.median(x / y for x, y in pairs)
    del theirs, ours, whole, steps, their_model, our_model
    memory = [memory_mb(name, kind, options) for name in (OURS, THEIRS)]
    print(
        f"peak memory: ours {memory[0]:.0f} MiB, theirs {memory[1]:.0f} MiB, "
        f"ratio {memory[0] / memory[1]:.3f}"
    )
    return agree and max(slower, memory[0] / memory[1]) <= options.at_most


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only_memory_of:
        print(grown_memory_mb(options.only_memory_of, options.model[0], options))
        return
    reached = [compare(kind, options) for kind in options.model]
    sys.exit(not all(reached))


if __name__ == "__main__":
    main()
