"""Times deformable convolution on the CPU against torchvision's kernel, in alternation.

    python tools/bench/deform_conv.py [--height 60 --width 80] [--threads 2]

A modulated 3x3 convolution of 256 to 256 channels in float32, as GLIP's tower has it at a stride of
8; forward, and forward with backward to all tensors. Both must give the same numbers. Ends with
exit code 1 if forward and backward take more than ``--at_most`` of torchvision's time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
import torchvision
from alternate import alternate, print_table

from zoo_common.detection import ops

CHANNELS = 256


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=1, help="images a batch (default 1)")
    parser.add_argument("--height", type=int, default=60, help="cells (default 60)")
    parser.add_argument("--width", type=int, default=80, help="cells (default 80)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--rounds", type=int, default=8, help="timed runs of each (default 8)")
    parser.add_argument("--at_most", type=float, default=0.5, help="ratio to reach (default 0.5)")
    return parser.parse_args()


class Convolution:
    """One of both forms; a call gives the seconds of its phases."""

    def __init__(self, ours: bool, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        size = (options.images, CHANNELS, options.height, options.width)
        cells = (options.images, 27, options.height, options.width)
        moves = torch.randn(cells)
        weight = torch.randn(CHANNELS, CHANNELS, 3, 3) / 50
        leaves = (torch.randn(size), 2 * moves[:, :18], moves[:, 18:].sigmoid(), weight)
        self.leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        self.factors = torch.randn(size)
        self.convolve = ops.deform_conv2d if ours else torchvision.ops.deform_conv2d

    def __call__(self) -> dict[str, float]:
        """Forward, then forward and backward; the results stay in ``output`` and the leaves."""
        images, offset, mask, weight = self.leaves
        started = time.perf_counter()
        self.output = self.convolve(images, offset, weight, None, 1, 1, 1, mask)
        forward = time.perf_counter() - started
        for leaf in self.leaves:
            leaf.grad = None
        torch.autograd.backward(self.output, self.factors)
        return {"forward": forward, "both": time.perf_counter() - started}


def main() -> int:
    """Runs the benchmark; the exit code."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    ours, theirs = Convolution(True, options), Convolution(False, options)
    times = alternate({"ours": ours, "torchvision": theirs}, rounds=options.rounds)
    pairs = [(ours.output, theirs.output)]
    pairs += [(one.grad, other.grad) for one, other in zip(ours.leaves, theirs.leaves, strict=True)]
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    print(f"largest difference: {worst:.1e} of the largest number")
    print_table(times, ours="ours", theirs="torchvision")
    pace = zip(times["ours"]["both"], times["torchvision"]["both"], strict=True)
    ratio = statistics.median(one / other for one, other in pace)
    return int(ratio > options.at_most or worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
