"""Turning predicted masks into COCO RLEs: milliseconds an image of 100 detections.

    python tools/bench/mask_paste.py [--detections 100] [--threads 1 2]

Ours writes the RLE of the region that a mask can touch; the usual way pastes each mask into an
array of the image's size, which pycocotools encodes. The pasting of the usual way is detectron2's
if it is installed, else ours, which covers the same pixels. The two alternate and the fastest
round of each counts; their RLEs must be the same. Ends with exit code 1 if the ratio is above
``--at_most`` or an RLE differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.nn import functional as F

from zoo_common.detection.masks import paste, paste_rles

SIZES = ((480, 640), (800, 1333))  # height and width

Encode = Callable[[Tensor, Tensor, int, int], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--detections", type=int, default=100, help="masks (default 100)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default 1 and 2")
    parser.add_argument("--rounds", type=int, default=15, help="times to alternate (default 15)")
    parser.add_argument("--at_most", type=float, default=0.5, help="ratio (default 0.5)")
    options = parser.parse_args()
    usual, name = usual_way()
    worst = 0.0
    for height, width in SIZES:
        masks, boxes = draw(options.detections, height, width)
        arguments = (masks, boxes, height, width)
        if paste_rles(*arguments) != usual(*arguments):
            sys.exit(f"the RLEs differ at {height} x {width}")
        for threads in options.threads:
            torch.set_num_threads(threads)
            best = [float("inf")] * 2
            for _ in range(options.rounds):
                for side, call in enumerate((paste_rles, usual)):
                    begin = time.perf_counter()
                    call(*arguments)
                    best[side] = min(best[side], time.perf_counter() - begin)
            worst = max(worst, best[0] / best[1])
            print(
                f"{height} x {width}, {threads} thread(s): ours {1e3 * best[0]:.1f} ms, "
                f"{name} {1e3 * best[1]:.1f} ms, ratio {best[0] / best[1]:.2f}"
            )
    print(f"largest ratio {worst:.2f}, asked for {options.at_most:.2f}; the RLEs are the same")
    sys.exit(worst > options.at_most)


def usual_way() -> tuple[Encode, str]:
    """Pasting and encoding at the image's size, and its name."""
    name = "detectron2"
    try:
        from detectron2.layers.mask_ops import paste_masks_in_image
    except ImportError:
        name = "full-size arrays"

        def paste_masks_in_image(masks: Tensor, boxes: Tensor, shape: tuple[int, int]) -> Tensor:
            return paste(masks, boxes, *shape)

    def encode(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[dict[str, Any]]:
        pasted = paste_masks_in_image(masks, boxes, (height, width)).numpy()
        return [
            mask_utils.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0]
            for mask in pasted
        ]

    return encode, name


def draw(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Smooth masks (K, 28, 28) and boxes (K, 4) of COCO's sizes, always the same."""
    generator = torch.Generator().manual_seed(0)
    side = torch.exp(torch.randn(count, 2, generator=generator) * 0.9 + 4.3)
    limit = torch.tensor([width, height])
    centre = torch.rand(count, 2, generator=generator) * limit
    low, high = (centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, limit)
    coarse = torch.rand(count, 1, 7, 7, generator=generator)
    masks = F.interpolate(coarse, (28, 28), mode="bicubic").clamp(0, 1)[:, 0]
    return masks, torch.cat([low, high], dim=1)


if __name__ == "__main__":
    main()
