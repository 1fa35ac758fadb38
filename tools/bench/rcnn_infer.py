"""Times inference of our Mask R-CNN R-50-FPN against detectron2's, in alternation, on the CPU.

    python tools/bench/rcnn_infer.py [--images 1] [--threads 2] [--dtype float32]

Both have the same weights and images (see rcnn_peer.py) and find the same objects, which is
checked first. ``masks``: the network, and its masks pasted into arrays of the image's size.
``results``: the network, and what COCO's evaluation takes, with run-length encoded masks; ours as
``rcnn.evaluate`` does it, detectron2's as its COCOEvaluator.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import rcnn_peer as peer
from alternate import alternate, print_table
from scene import draw_scene


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=1, help="images a batch (default 1)")
    parser.add_argument("--height", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--width", type=int, default=800, help="pixels (default 800)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=8, help="timed runs of each (default 8)")
    parser.add_argument("--teach", type=int, default=60, help="training steps before (default 60)")
    return parser.parse_args()


def build_ours(
    weights: dict[str, Any], scenes: list[Any], half: bool
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions from images to full-size masks, and to COCO results."""
    import torch

    model, _ = peer.build_ours(weights)
    model.eval()
    from rcnn.evaluate import to_originals
    from zoo_common.detection import masks

    batch = peer.to_ours(scenes)

    def find() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(batch.to(torch.device("cpu")))

    def to_masks() -> list[Any]:
        found = find()
        pasted = []
        for image, (height, width) in enumerate(batch.originals_B2.tolist()):
            real = found.valid_BD[image]
            boxes, probabilities = found.boxes_BD4[image][real], found.masks_BDMM[image][real]
            pasted.append((boxes, masks.paste(probabilities.float(), boxes, height, width)))
        return pasted

    return to_masks, lambda: to_originals(find(), batch)


def build_theirs(
    config: Any, weights: dict[str, Any], scenes: list[Any]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same of detectron2."""
    import torch
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    model = peer.build_theirs(config, weights)
    model.eval()
    batch = peer.to_theirs(scenes)

    def to_masks() -> list[Any]:
        with torch.no_grad():
            found = [output["instances"] for output in model(batch)]
        return [(item.pred_boxes.tensor, item.pred_masks) for item in found]

    def to_results() -> list[Any]:
        with torch.no_grad():
            found = [output["instances"] for output in model(batch)]
        return [instances_to_coco_json(item, image) for image, item in enumerate(found)]

    return to_masks, to_results


def print_agreement(ours: list[Any], theirs: list[Any]) -> None:
    """How many objects both found, and how far these are apart."""
    from torchvision.ops import box_iou

    for (our_boxes, our_masks), (their_boxes, their_masks) in zip(ours, theirs, strict=True):
        line = f"found: ours {len(our_boxes)}, detectron2 {len(their_boxes)}"
        if len(our_boxes) and len(their_boxes):
            # By place: of equal scores another may come first, and so be the last one kept.
            iou, match = box_iou(our_boxes, their_boxes).max(dim=1)
            same = iou > 0.99
            match = match[same]
            apart = (our_boxes[same] - their_boxes[match]).abs().max().item()
            differ = (our_masks[same] != their_masks[match]).sum().item()
            line += f", {len(match)} of them the same; those boxes differ by {apart:.0e} pixels "
            line += f"at most, those masks in {differ} of {int(their_masks[match].sum())} pixels"
        print(line)


def clocked(functions: dict[str, Callable[[], Any]]) -> Callable[[], dict[str, float]]:
    """Runs the functions one after the other and gives the seconds of each."""

    def run() -> dict[str, float]:
        seconds = {}
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name] = time.perf_counter() - start
        return seconds

    return run


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    config = peer.their_config()
    scenes = [draw_scene(i, options.height, options.width) for i in range(options.images)]
    weights = peer.make_weights(config, scenes, options.teach)
    ours = build_ours(weights, scenes, half=options.dtype == "bfloat16")
    theirs = build_theirs(config, weights, scenes)
    print(f"{options.images} x {options.height} x {options.width}, ours in {options.dtype}")
    print_agreement(ours[0](), theirs[0]())
    contestants = {
        name: clocked({"masks": to_masks, "results": to_results})
        for name, (to_masks, to_results) in (("ours", ours), ("detectron2", theirs))
    }
    print_table(alternate(contestants, rounds=options.rounds), ours="ours", theirs="detectron2")


if __name__ == "__main__":
    main()
