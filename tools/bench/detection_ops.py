"""Times our detection operators against torchvision's, in alternation, on the CPU.

    python tools/bench/detection_ops.py [--threads 2] [--rounds 15] [--size 800 1344]

The sizes are those of Mask R-CNN with an FPN on one image: 512 regions of 7 x 7 and 128 of
14 x 14 out of four levels of 256 channels, adaptive sampling (ratio 0) and the original zoo's
(ratio 2), features in NCHW and in channels-last memory (nhwc), forward and backward pass;
suppression of 5 levels of 2,000 proposals, and of 80 classes with 1,000 boxes each of which a few
are valid. torchvision's side selects the regions of each level and puts their results together,
as detectron2 does, and calls batched_nms. The largest differences are printed first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision  # type: ignore[import-untyped]
from alternate import alternate, print_table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "common"))

from zoo_common.detection import ops  # noqa: E402

STRIDES = (4, 8, 16, 32)
CHANNELS = 256


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(800, 1344),
        metavar=("HEIGHT", "WIDTH"),
        help="pixels of the image (default 800 1344)",
    )
    return parser.parse_args()


def random_boxes(count: int, height: int, width: int, side: float) -> Tensor:
    """Boxes (count, 4) of sides around ``side`` pixels, clipped to the image."""
    centre = torch.rand(count, 2) * torch.tensor([float(width), float(height)])
    half = side * torch.exp(torch.randn(count, 1) * 0.8 + torch.randn(count, 2) * 0.3) / 2
    boxes = torch.cat([centre - half, centre + half], 1)
    return torchvision.ops.clip_boxes_to_image(boxes, (height, width))


class Pooling(NamedTuple):
    """One case of roi_align."""

    name: str
    features: list[Tensor]
    boxes: Tensor
    level: Tensor
    output_size: int
    sampling_ratio: int

    def ours(self) -> Tensor:
        """(R, C, P, P) by ``ops.roi_align``."""
        boxes, level = self.boxes[None], self.level[None]
        arguments = (self.output_size, self.sampling_ratio)
        return ops.roi_align(self.features, STRIDES, boxes, level, *arguments)[0]

    def torchvision(self) -> Tensor:
        """The same by torchvision's kernel, level by level."""
        rois = torch.cat([self.boxes.new_zeros(len(self.boxes), 1), self.boxes], 1)
        shape = (len(rois), CHANNELS, self.output_size, self.output_size)
        pooled = self.features[0].new_zeros(shape)
        for number, (feature, stride) in enumerate(zip(self.features, STRIDES, strict=True)):
            rows = (self.level == number).nonzero()[:, 0]
            part = torchvision.ops.roi_align(
                feature, rois[rows], self.output_size, 1 / stride, self.sampling_ratio, True
            )
            pooled.index_put_((rows,), part)
        return pooled


def pooling_cases(height: int, width: int) -> list[Pooling]:
    """Boxes as an FPN assigns them: a level has those of 1/2 to 1 of 112, 224, 448 ... pixels."""
    cases = []
    for layout in (torch.contiguous_format, torch.channels_last):
        features = [
            torch.randn(1, CHANNELS, -(-height // stride), -(-width // stride))
            .to(memory_format=layout)
            .requires_grad_()
            for stride in STRIDES
        ]
        order = "nhwc" if layout is torch.channels_last else "nchw"
        for output_size, regions in ((7, 512), (14, 128)):
            boxes = random_boxes(regions, height, width, side=90)
            side = torchvision.ops.box_area(boxes).sqrt()
            level = torch.floor(torch.log2(side / 56 + 1e-6)).clamp(0, len(STRIDES) - 1).long()
            for ratio in (0, 2):
                name = f"{output_size}x{output_size} r{ratio} {order}"
                cases.append(Pooling(name, features, boxes, level, output_size, ratio))
    return cases


class Suppression(NamedTuple):
    """One case of nms."""

    name: str
    boxes: Tensor
    scores: Tensor
    valid: Tensor
    threshold: float

    def ours(self) -> Tensor:
        """(S, N) kept by ``ops.nms``."""
        return ops.nms(self.boxes, self.scores, self.threshold, self.valid)

    def torchvision(self) -> Tensor:
        """The same by torchvision's ``batched_nms``."""
        sets, rows = self.valid.nonzero(as_tuple=True)
        boxes, scores = self.boxes[sets, rows], self.scores[sets, rows]
        kept = torchvision.ops.batched_nms(boxes, scores, sets, self.threshold)
        keep = torch.zeros_like(self.valid)
        keep[sets[kept], rows[kept]] = True
        return keep


def suppression_cases(height: int, width: int) -> list[Suppression]:
    """Proposals of a training step, and detections of an image."""
    proposals = torch.stack([random_boxes(2000, height, width, 32 * 2.0**i) for i in range(5)])
    classes = random_boxes(1000, height, width, 100).expand(80, -1, -1)
    few = torch.rand(80, 1000) < 0.01
    return [
        Suppression(
            "nms 5 x 2000", proposals, torch.rand(5, 2000), torch.ones(5, 2000).bool(), 0.7
        ),
        Suppression("nms 80 x 1000", classes, torch.rand(80, 1000), few, 0.5),
    ]


def compare(cases: list[Pooling], suppressions: list[Suppression]) -> None:
    """Prints how far results are apart."""
    largest, largest_gradient = 0.0, 0.0
    for case in cases:
        pooled = [case.ours(), case.torchvision()]
        largest = max(largest, (pooled[0] - pooled[1]).abs().max().item())
        weights = torch.randn_like(pooled[0])
        gradients = [torch.autograd.grad(one, case.features, weights) for one in pooled]
        for ours, theirs in zip(*gradients, strict=True):
            largest_gradient = max(largest_gradient, (ours - theirs).abs().max().item())
    print(f"roi_align: largest difference {largest:.1e}, of gradients {largest_gradient:.1e}")
    different = sum(int((one.ours() != one.torchvision()).sum()) for one in suppressions)
    print(f"nms: {different} boxes decided differently")


def make_round(
    cases: list[Pooling], suppressions: list[Suppression], method: str
) -> Callable[[], dict[str, float]]:
    """A function that runs all cases once and returns the seconds of each."""

    def run() -> dict[str, float]:
        seconds = {}
        for case in cases:
            start = time.perf_counter()
            pooled = getattr(case, method)()
            forward = time.perf_counter()
            weights = torch.ones_like(pooled)
            backward = time.perf_counter()
            torch.autograd.grad(pooled, case.features, weights)
            seconds[f"{case.name} fwd"] = forward - start
            seconds[f"{case.name} bwd"] = time.perf_counter() - backward
        for suppression in suppressions:
            start = time.perf_counter()
            getattr(suppression, method)()
            seconds[suppression.name] = time.perf_counter() - start
        return seconds

    return run


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases, suppressions = pooling_cases(*options.size), suppression_cases(*options.size)
    compare(cases, suppressions)
    contestants = {
        "ours": make_round(cases, suppressions, "ours"),
        "torchvision": make_round(cases, suppressions, "torchvision"),
    }
    seconds = alternate(contestants, rounds=options.rounds, warmup=1)
    print_table(seconds, ours="ours", theirs="torchvision")


if __name__ == "__main__":
    main()
