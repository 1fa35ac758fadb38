"""Counts host syncs and new operator shapes of training steps: ours and detectron2's.

    python tools/bench/rcnn_static.py [--steps 15] [--warmup 5] [--images 1]

Both by ``tools/static_recorder.py``, on images of many sizes with different numbers of objects.
Ours are the steps that ``tools/check_static.py`` takes, with static shapes as on an accelerator;
detectron2 has only one way. The counts do not depend on the machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import rcnn_peer as peer
from scene import draw_scene

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from static_recorder import Report


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=15, help="steps after warm-up (default 15)")
    parser.add_argument("--warmup", type=int, default=5, help="detectron2's (default 5)")
    parser.add_argument("--images", type=int, default=1, help="detectron2's images a step")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--lines", type=int, default=0, help="lines to blame (default 0)")
    return parser.parse_args()


def count_theirs(options: argparse.Namespace) -> Report:
    """detectron2's R-50-FPN Mask R-CNN, with random weights."""
    import numpy as np
    import torch

    from static_recorder import count

    config = peer.their_config()
    from detectron2.solver import build_optimizer
    from detectron2.utils.events import EventStorage

    steps = options.warmup + options.steps
    random = np.random.default_rng(0)
    batches = []
    for step in range(steps):
        scenes = [
            draw_scene(
                seed=step * options.images + image,
                height=int(random.integers(256, 480)),
                width=int(random.integers(256, 480)),
                objects=int(random.integers(1, 20)),
            )
            for image in range(options.images)
        ]
        batches.append(scenes)
    weights = peer.make_weights(config, batches[0], steps=0)
    model = peer.build_theirs(config, weights)
    optimizer: torch.optim.Optimizer = build_optimizer(config, model)
    inputs = [peer.to_theirs(scenes) for scenes in batches]

    def train(index: int) -> None:
        sum(model(inputs[index]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with EventStorage(0):
        return count(train, steps=steps, warmup=options.warmup)


def count_ours(options: argparse.Namespace) -> Report:
    """The steps of rcnn.static."""
    import torch

    from check_static import WARMUP
    from static_recorder import count

    sys.path.insert(0, str(peer.MODEL_DIR))
    from rcnn import static

    step = static.build(torch.device("cpu"))
    warmup = getattr(static, "WARMUP", WARMUP)
    return count(step, steps=warmup + options.steps, warmup=warmup)


def main() -> None:
    """Prints both counts."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name, counted in (("detectron2", count_theirs), ("ours", count_ours)):
        print(f"{name}\n{counted(options).describe(options.lines)}\n")


if __name__ == "__main__":
    main()
