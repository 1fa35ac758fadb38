"""Times 3x3 convolutions by Winograd's filtering against torch's own, in alternation, on the CPU.

    python tools/bench/winograd.py [--threads 2] [--rounds 9] [--size 512 800]

The layers are those of SOLOv2 R-50 on one image: the head's towers over its five grids, the two
finest maps of the pyramid, and the finest of the mask features. Each infers, and does a forward and
a backward pass. Largest errors against float64 are printed first, as parts of the largest output.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from alternate import alternate, print_table
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "common"))

from zoo_common import winograd  # noqa: E402

GRIDS = tuple((side, side) for side in (40, 36, 24, 16, 12))


class Layer(NamedTuple):
    """A layer and what it is given."""

    name: str
    maps: list[Tensor]
    weight: Tensor


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(512, 800),
        metavar=("HEIGHT", "WIDTH"),
        help="pixels of the image (default 512 800)",
    )
    return parser.parse_args()


def make_layers(height: int, width: int) -> list[Layer]:
    """SOLOv2's layers with random numbers; maps as a ReLU leaves them."""
    quarter, eighth = (height // 4, width // 4), (height // 8, width // 8)
    sizes = (
        ("tower 512 > 512", 512, 512, GRIDS),
        ("first 258 > 512", 258, 512, GRIDS),
        ("kernels 512 > 256", 512, 256, GRIDS),
        ("P2 256 > 256", 256, 256, (quarter,)),
        ("P3 256 > 256", 256, 256, (eighth,)),
        ("mask 256 > 128", 256, 128, (quarter,)),
    )
    return [
        Layer(
            name,
            [
                torch.randn(1, channels, *cells).relu().to(memory_format=torch.channels_last)
                for cells in grids
            ],
            torch.randn(outputs, channels, 3, 3).to(memory_format=torch.channels_last) * 0.01,
        )
        for name, channels, outputs, grids in sizes
    ]


def plain(maps: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """The layer by ``F.conv2d``."""
    return [F.conv2d(map_BCHW, weight, padding=1) for map_BCHW in maps]


@torch.no_grad()
def compare(layers: Sequence[Layer]) -> None:
    """Prints how far both ways are from float64."""
    for layer in layers:
        exact = plain([one.double() for one in layer.maps], layer.weight.double())
        largest = max(one.abs().max().item() for one in exact)
        errors = [
            max((x - y).abs().max().item() for x, y in zip(found, exact, strict=True)) / largest
            for found in (winograd.conv3x3(layer.maps, layer.weight), plain(*layer[1:]))
        ]
        print(f"{layer.name:<20} error {errors[0]:.1e}, torch's {errors[1]:.1e}")


def make_round(
    layers: Sequence[Layer], convolve: Callable[[Sequence[Tensor], Tensor], list[Tensor]]
) -> Callable[[], dict[str, float]]:
    """A function that runs all layers once and returns the seconds of each."""

    def infer() -> dict[str, float]:
        seconds = {}
        for layer in layers:
            start = time.perf_counter()
            with torch.no_grad():
                convolve(layer.maps, layer.weight)
            seconds[layer.name] = time.perf_counter() - start
        return seconds

    def train() -> dict[str, float]:
        seconds = {}
        for layer in layers:
            inputs = [one.detach().requires_grad_() for one in (*layer.maps, layer.weight)]
            start = time.perf_counter()
            outputs = convolve(inputs[:-1], inputs[-1])
            torch.autograd.grad(outputs, inputs, [torch.ones_like(one) for one in outputs])
            seconds[f"{layer.name} +bwd"] = time.perf_counter() - start
        return seconds

    return lambda: infer() | train()


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layers = make_layers(*options.size)
    compare(layers)
    contestants = {
        "ours": make_round(layers, winograd.conv3x3),
        "torch": make_round(layers, plain),
    }
    seconds = alternate(contestants, rounds=options.rounds, warmup=1)
    print_table(seconds, ours="ours", theirs="torch")


if __name__ == "__main__":
    main()
