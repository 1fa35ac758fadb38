"""Times inference of our GLIP-T against mmdet 3.3's, in alternation, on the CPU.

    python tools/bench/glip_infer.py [--variants b a] [--images 1] [--threads 2]

Both have the same weights, images and caption, that of COCO's 80 classes (see glip_peer.py), and
find the same objects by mmdet's rules, which is checked first. Ours reads the caption once, mmdet
at each call: what this takes is ``caption``, and no part of our ``results``, the time from the
images to what COCO's evaluation takes. ``--dtype bfloat16`` puts ours under autocast. Ends with
exit code 1 if they find different things, or if the ratio of the results is above ``--at_most``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import glip_peer as peer
from alternate import alternate, print_table
from scene import draw_scene

if TYPE_CHECKING:
    import torch

Find = Callable[[], dict[str, float]]
CANDIDATES = 400
"""Pairs of anchor and class that are above the threshold, about as of a trained network."""


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=peer.VARIANTS, default=["b", "a"])
    parser.add_argument("--images", type=int, default=1, help="images a batch (default 1)")
    parser.add_argument("--height", type=int, default=480, help="pixels (default 480)")
    parser.add_argument("--width", type=int, default=640, help="pixels (default 640)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=4, help="timed runs of each (default 4)")
    parser.add_argument("--at_most", type=float, default=0.5, help="ratio to reach (default 0.5)")
    return parser.parse_args()


class Ours:
    """Our network; a call gives the seconds of its phases."""

    def __init__(
        self, variant: str, bert: Path, weights: dict[str, Any], scenes: list[Any], half: bool
    ) -> None:
        self.model, self.config = peer.build_ours(variant, bert, weights)
        self.model.eval()
        self.images = peer.to_ours(scenes, self.config).detection
        self.half = half
        self.found: Any = None
        from glip.captions import TextEncoder
        from zoo_common.detection.classes import COCO_CLASSES

        encoder = TextEncoder(bert, self.config.model.max_tokens)
        self.queries = encoder.queries(COCO_CLASSES)

    def __call__(self) -> dict[str, float]:
        import torch

        from glip import detect

        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            start = time.perf_counter()
            wanted = detect.read(self.model, self.queries, torch.device("cpu"))
            middle = time.perf_counter()
            images = (self.images.images_BCHW, self.images.sizes_B2)
            self.found = detect.join(detect.find(self.model, *images, wanted, self.config.test))
            end = time.perf_counter()
        return {"caption": middle - start, "results": end - middle}

    def results(self) -> list[tuple[torch.Tensor, ...]]:
        """Boxes, scores and labels of each image."""
        from glip import detect

        sizes = self.images.sizes_B2
        boxes_BK4 = detect.to_files(self.found.boxes_BK4, sizes, sizes)
        parts = zip(boxes_BK4, *self.found[1:], strict=True)
        return [tuple(part[valid] for part in image) for *image, valid in parts]


class Theirs:
    """The same of mmdet."""

    def __init__(
        self, variant: str, bert: Path, weights: dict[str, Any], scenes: list[Any]
    ) -> None:
        self.model = peer.build_theirs(variant, bert, weights, recompute=False).eval()
        self.data = peer.to_theirs(self.model, scenes, training=False)
        self.found: list[Any] = []
        self.caption = 0.0
        self.words = self.model.language_model.forward
        self.model.language_model.forward = self._read

    def __call__(self) -> dict[str, float]:
        import torch

        start = time.perf_counter()
        with torch.no_grad():
            self.found = self.model.predict(**self.data)
        return {"caption": self.caption, "results": time.perf_counter() - start}

    def results(self) -> list[tuple[torch.Tensor, ...]]:
        """Boxes, scores and labels of each image."""
        found = [sample.pred_instances for sample in self.found]
        return [(one.bboxes, one.scores, one.labels) for one in found]

    def _read(self, captions: Any) -> Any:
        start = time.perf_counter()
        words = self.words(captions)
        self.caption = time.perf_counter() - start
        return words


def find_something(ours: Ours, theirs: Theirs) -> None:
    """Moves the bias of all tokens, so that some pairs are above the threshold of scores."""
    import torch

    from glip import detect

    seen: list[torch.Tensor] = []

    def look(logits_BAT: torch.Tensor, class_map_NT: torch.Tensor) -> torch.Tensor:
        seen.append(logits_BAT)
        return class_scores(logits_BAT, class_map_NT)

    class_scores = detect.class_scores
    with mock.patch.object(detect, "class_scores", look):
        ours()
    map_NT = ours.queries[0].map_NT[:, : seen[0].shape[2]]
    low, high = -20.0, 20.0
    for _ in range(30):
        shift = (low + high) / 2
        scores = class_scores(seen[0] + shift, map_NT)
        enough = int((scores > ours.config.test.score_thr).sum()) > CANDIDATES * len(seen[0])
        low, high = (low, shift) if enough else (shift, high)
    with torch.no_grad():
        for head in (ours.model.rpn.head, theirs.model.bbox_head.head):
            head.bias0 += low


def agree(ours: Ours, theirs: Theirs, apart: float = 1e-3) -> bool:
    """Prints how the objects of both differ, and tells whether they are the same.

    Scores of random weights lie close together, so that rounding decides which of two comes first,
    and then which is suppressed: one of fifty may be another.
    """
    from torchvision.ops import box_iou

    same = True
    for mine, other in zip(ours.results(), theirs.results(), strict=True):
        scores_NM = (mine[1][:, None] - other[1]).abs()
        fits_NM = (mine[2][:, None] == other[2]) & (scores_NM <= apart)
        fits_NM &= box_iou(mine[0], other[0]) >= 1 - apart
        matched = int(fits_NM.any(dim=1).sum())
        print(f"found: ours {len(mine[1])}, mmdet {len(other[1])}, the same {matched}")
        same &= len(mine[1]) > 0 and matched >= 0.98 * max(len(mine[1]), len(other[1]))
    return same


def compare(variant: str, bert: Path, options: argparse.Namespace) -> bool:
    """Prints all figures of a variant, and tells whether they are as they should be."""
    scenes = [draw_scene(i, options.height, options.width) for i in range(options.images)]
    weights = peer.build_theirs(variant, bert, recompute=False).state_dict()
    ours = Ours(variant, bert, weights, scenes, half=options.dtype == "bfloat16")
    theirs = Theirs(variant, bert, weights, scenes)
    print(f"\nGLIP-T ({variant.upper()}), {options.images} x {options.height} x {options.width}")
    find_something(ours, theirs)
    contestants: dict[str, Find] = {"ours": ours, "mmdet": theirs}
    seconds = alternate(contestants, rounds=options.rounds, warmup=1)
    same = agree(ours, theirs) or options.dtype != "float32"
    print_table(seconds, ours="ours", theirs="mmdet")
    both = zip(seconds["ours"]["results"], seconds["mmdet"]["results"], strict=True)
    slower: float = statistics.median(x / y for x, y in both)
    return same and slower <= options.at_most


def main() -> None:
    """Runs the comparison."""
    options = parse_options()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        bert = Path(directory)
        peer.make_bert(bert)
        reached = [compare(variant, bert, options) for variant in options.variants]
    sys.exit(not all(reached))


if __name__ == "__main__":
    main()
