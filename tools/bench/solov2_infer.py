"""Times inference of our SOLOv2 R-50-FPN against mmdet 3.3's, in alternation, on the CPU.

    python tools/bench/solov2_infer.py [--images 1] [--threads 2] [--dtype float32]

Both have the same weights and images (see solov2_peer.py) and find the same objects, which is
checked first: scores, and masks pixel by pixel. What bringing masks to the size of the file costs
depends on their number: ``--score_thr 0.01`` finds as many as the recipe keeps of an image.

``network``: ours to the masks at a quarter of the size, mmdet's to the maps that its masks are
drawn from. ``results``: from the images to what COCO's evaluation takes, run-length encoded masks
in the size of the file, ours as ``solov2.evaluate`` makes them, mmdet's as its head and its
CocoMetric. Ends with exit code 1 if they find different things, or if the ratio of the results is
above ``--at_most``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import solov2_peer as peer
from alternate import alternate, print_table
from scene import draw_scene

Find = Callable[[], dict[str, float]]


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=1, help="images a batch (default 1)")
    parser.add_argument("--height", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--width", type=int, default=800, help="pixels (default 800)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=8, help="timed runs of each (default 8)")
    parser.add_argument("--teach", type=int, default=26, help="training steps before (default 26)")
    parser.add_argument(
        "--score_thr",
        type=float,
        default=0.1,
        help="smallest score of a cell, and half of it behind matrix NMS (default 0.1, the "
        "recipe's); a lower one finds more, 100 at most",
    )
    parser.add_argument("--at_most", type=float, default=0.5, help="ratio to reach (default 0.5)")
    parser.add_argument("--weights", type=Path, help="mmdet's, in place of teaching")
    return parser.parse_args()


class Ours:
    """Our network; a call gives the seconds of its phases."""

    def __init__(self, weights: dict[str, Any], scenes: list[Any], half: bool) -> None:
        self.model, config = peer.build_ours(weights)
        self.model.eval()
        self.batch = peer.to_ours(scenes, config)
        self.half = half
        self.found: list[Any] = []

    def __call__(self) -> dict[str, float]:
        import torch

        from solov2.evaluate import to_originals

        start = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            detections = self.model(self.batch)
        network = time.perf_counter()
        self.found = to_originals(detections, self.batch)
        end = time.perf_counter()
        return {"network": network - start, "results": end - start}

    def results(self) -> list[list[tuple[float, int, Any]]]:
        """Score, class and runs of each object, by image."""
        return [
            list(zip(image.scores_D.tolist(), image.labels_D.tolist(), image.rles, strict=True))
            for image in self.found
        ]


class Theirs:
    """The same of mmdet."""

    def __init__(self, weights: dict[str, Any], scenes: list[Any]) -> None:
        self.model = peer.build_theirs(weights).eval()
        self.data = peer.to_theirs(self.model, scenes, training=False)
        self.found: list[Any] = []

    def __call__(self) -> dict[str, float]:
        import torch
        from mmdet.structures.mask import encode_mask_results

        inputs, samples = self.data["batch_inputs"], self.data["batch_data_samples"]
        start = time.perf_counter()
        with torch.no_grad():
            outputs = self.model.mask_head(self.model.extract_feat(inputs))
            network = time.perf_counter()
            metas = [sample.metainfo for sample in samples]
            items = self.model.mask_head.predict_by_feat(*outputs, batch_img_metas=metas)
        self.found = []
        for item in items:
            runs = encode_mask_results(item.masks.numpy())
            self.found.append((item.scores.numpy(), item.labels.numpy(), runs))
        end = time.perf_counter()
        return {"network": network - start, "results": end - start}

    def results(self) -> list[list[tuple[float, int, Any]]]:
        """Score, class and runs of each object, by image."""
        return [
            list(zip(scores.tolist(), labels.tolist(), runs, strict=True))
            for scores, labels, runs in self.found
        ]


def agree(
    ours: Ours, theirs: Theirs, score_apart: float = 1e-4, pixels_apart: float = 1e-4
) -> bool:
    """Prints how the objects of both differ, and tells whether they are the same.

    Of nearly equal scores another may come first, so objects are matched by class and place.
    """
    from pycocotools import mask

    same = True
    for mine, other in zip(ours.results(), theirs.results(), strict=True):
        print(f"found: ours {len(mine)}, mmdet {len(other)}", end="")
        if len(mine) != len(other) or not mine:
            print()
            same = False
            continue
        iou = mask.iou([rle for *_, rle in mine], [rle for *_, rle in other], [0] * len(other))
        apart, differ, total = 0.0, 0, 0
        for row, (score, label, rle) in enumerate(mine):
            fitting = [
                column for column, (_, theirs_is, _) in enumerate(other) if theirs_is == label
            ]
            if not fitting:
                same = False
                continue
            match = max(
                fitting, key=lambda column: (iou[row, column], -abs(other[column][0] - score))
            )
            apart = max(apart, abs(score - other[match][0]))
            differ += int((mask.decode(rle) != mask.decode(other[match][2])).sum())
            total += int(mask.area(rle))
        print(f"; scores differ by {apart:.0e} at most, masks in {differ} of {total} pixels")
        same &= apart <= score_apart and differ <= pixels_apart * total
    return same


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    scenes = [draw_scene(i, options.height, options.width) for i in range(options.images)]
    if options.weights is None:
        weights = peer.make_weights(scenes, options.teach)
    else:
        weights = torch.load(options.weights)
    ours = Ours(weights, scenes, half=options.dtype == "bfloat16")
    theirs = Theirs(weights, scenes)
    ours.model.config.test.score_thr = theirs.model.mask_head.test_cfg.score_thr = options.score_thr
    ours.model.config.test.update_thr = options.score_thr / 2
    theirs.model.mask_head.test_cfg.filter_thr = options.score_thr / 2
    print(f"{options.images} x {options.height} x {options.width}, ours in {options.dtype}")
    ours()
    theirs()
    same = agree(ours, theirs) or options.dtype != "float32"
    contestants: dict[str, Find] = {"ours": ours, "mmdet": theirs}
    seconds = alternate(contestants, rounds=options.rounds)
    print_table(seconds, ours="ours", theirs="mmdet")
    both = zip(seconds["ours"]["results"], seconds["mmdet"]["results"], strict=True)
    sys.exit(not same or statistics.median(x / y for x, y in both) > options.at_most)


if __name__ == "__main__":
    main()
