"""Matrix NMS of SOLOv2: ours against the original's form and greedy mask NMS, in alternation.

    python tools/bench/solov2_matrix_nms.py [--masks 500] [--height 200] [--width 336]

Masks are ellipses around a few centres, so that each overlaps with others of its class. The
original's form is that of WXinlong/SOLO's matrix_nms.py, written down here from the paper's
equation 5: one product of all masks, and square tables of overlaps, classes and quotients. Greedy
NMS takes the masks by falling score and drops what overlaps by more than half with one that stays;
it is given the same product. Scores are compared first; the bench ends with exit code 1 if ours
differ from the original's by more than 1e-5, or if ours is slower than either.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import solov2_peer as peer
from alternate import alternate, print_table

if TYPE_CHECKING:
    import torch

SIGMA = 2.0
OVERLAP = 0.5


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--masks", type=int, default=500, help="masks (default 500)")
    parser.add_argument("--height", type=int, default=200, help="of a mask (default 200)")
    parser.add_argument("--width", type=int, default=336, help="of a mask (default 336)")
    parser.add_argument("--classes", type=int, default=5, help="classes (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each (default 10)")
    return parser.parse_args()


def draw_masks(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks [N, X] as bool, classes [N], and scores [N], which fall."""
    import torch

    count, height, width = options.masks, options.height, options.width
    objects = torch.rand(count // 10 + 1, 4)
    own_N4 = objects[torch.randint(len(objects), (count,))] + 0.03 * torch.randn(count, 4)
    y_N11, x_N11 = own_N4[:, 0, None, None] * height, own_N4[:, 1, None, None] * width
    tall_N11 = (0.05 + own_N4[:, 2, None, None].abs() / 4) * height
    wide_N11 = (0.05 + own_N4[:, 3, None, None].abs() / 4) * width
    rows_H1, columns_W = torch.arange(height)[:, None], torch.arange(width)
    masks_NHW = ((rows_H1 - y_N11) / tall_N11) ** 2 + ((columns_W - x_N11) / wide_N11) ** 2 < 1
    labels_N = torch.randint(options.classes, (count,))
    return masks_NHW.flatten(1), labels_N, torch.rand(count).sort(descending=True).values


def original(
    masks_NX: torch.Tensor, labels_N: torch.Tensor, scores_N: torch.Tensor
) -> torch.Tensor:
    """Scores of matrix NMS, by square tables of all pairs."""
    import torch

    flat_NX = masks_NX.float()
    areas_N = flat_NX.sum(1)
    shared_NN = flat_NX @ flat_NX.T
    related_NN = (labels_N[:, None] == labels_N).float().triu(diagonal=1)
    iou_NN = shared_NN / (areas_N[:, None] + areas_N - shared_NN) * related_NN
    highest_N1 = iou_NN.max(0).values[:, None]
    decay_NN = torch.exp(-SIGMA * iou_NN**2) / torch.exp(-SIGMA * highest_N1**2)
    return scores_N * decay_NN.min(0).values


def greedy(masks_NX: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Which masks stay, bool [N]."""
    import torch

    flat_NX = masks_NX.float()
    areas_N = flat_NX.sum(1)
    shared_NN = flat_NX @ flat_NX.T
    iou_NN = shared_NN / (areas_N[:, None] + areas_N - shared_NN)
    drops_NN = ((iou_NN > OVERLAP) & (labels_N[:, None] == labels_N)).triu(diagonal=1)
    keep_N = torch.ones(len(labels_N), dtype=torch.bool)
    for index in range(len(labels_N)):
        if keep_N[index]:
            keep_N &= ~drops_NN[index]
    return keep_N


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    sys.path.insert(0, str(peer.MODEL_DIR))
    from solov2.matrix_nms import matrix_nms

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    masks_NX, labels_N, scores_N = draw_masks(options)
    valid_1N, areas_1N = torch.ones(1, len(labels_N), dtype=torch.bool), masks_NX.sum(1)[None]

    def ours() -> torch.Tensor:
        scores_1N: torch.Tensor = matrix_nms(
            masks_NX[None],
            labels_N[None],
            scores_N[None],
            areas_1N,
            valid_1N,
            kernel="gaussian",
            sigma=SIGMA,
        )
        return scores_1N[0]

    apart = (ours() - original(masks_NX, labels_N, scores_N)).abs().max().item()
    print(
        f"{options.masks} masks of {options.height} x {options.width}: scores differ by "
        f"{apart:.0e} at most, {int(greedy(masks_NX, labels_N).sum())} stay in greedy NMS\n"
    )

    def clocked(function: Callable[[], Any]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            start = time.perf_counter()
            function()
            return {"suppression": time.perf_counter() - start}

        return run

    contestants = {
        "ours": clocked(ours),
        "original": clocked(lambda: original(masks_NX, labels_N, scores_N)),
        "greedy": clocked(lambda: greedy(masks_NX, labels_N)),
    }
    seconds = alternate(contestants, rounds=options.rounds)
    slower = False
    for theirs in ("original", "greedy"):
        print_table(seconds, ours="ours", theirs=theirs)
        pairs = zip(seconds["ours"]["suppression"], seconds[theirs]["suppression"], strict=True)
        slower |= statistics.median(x / y for x, y in pairs) > 1
    sys.exit(slower or apart > 1e-5)


if __name__ == "__main__":
    main()
