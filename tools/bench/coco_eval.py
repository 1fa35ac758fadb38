"""COCO evaluation against pycocotools: seconds for boxes and masks of generated detections.

    python tools/bench/coco_eval.py [--images 5000]

Draws a validation set with COCO's statistics (80 classes of very different frequency, 7 objects
an image, sizes over two decades, crowd regions) and 100 detections with masks an image. Both
sides take the same arrays and RLEs, and everything counts: handing the detections over, matching,
accumulating. Prints the largest difference of the 24 numbers, and what ours adds to the process's
memory. Ends with exit code 1 if ours takes more than ``--at_most`` of pycocotools' time or a
number differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from zoo_common.detection.coco_eval import CocoEvaluator, Kind

HEIGHT, WIDTH = 480, 640
CLASSES = 80
PER_IMAGE = 100
KINDS: tuple[Kind, ...] = ("bbox", "segm")


class Found(NamedTuple):
    """An image's detections."""

    image_id: int
    boxes_K4: NDArray[np.float32]
    scores_K: NDArray[np.float32]
    labels_K: NDArray[np.int64]
    rles: list[dict[str, Any]]


class Timed(NamedTuple):
    """What an evaluation gave and took."""

    statistics: list[float]
    wall_s: float
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000, help="images (default 5000)")
    parser.add_argument("--at_most", type=float, default=0.2, help="ratio (default 0.2)")
    options = parser.parse_args()
    truth, detections = draw(options.images)
    size = sum(len(rle["counts"]) for found in detections for rle in found.rles)
    print(
        f"{options.images} images, {len(truth['annotations'])} objects, "
        f"{PER_IMAGE * options.images} detections, masks of "
        f"{size / (PER_IMAGE * options.images):.0f} bytes on average"
    )
    ours = evaluate_ours(truth, detections)
    theirs = evaluate_theirs(truth, detections)
    for name, timed in (("zoo_common", ours), ("pycocotools", theirs)):
        print(f"{name:12}{timed.wall_s:8.2f} s, {timed.cpu_s:.2f} s of processor time")
    pairs = zip(ours.statistics, theirs.statistics, strict=True)
    difference = max(abs(one - other) for one, other in pairs)
    ratio = ours.wall_s / theirs.wall_s
    print(f"largest difference of the numbers {difference:.1e}")
    print(
        f"ratio {ratio:.3f} ({ours.cpu_s / theirs.cpu_s:.3f} of processor time), asked for "
        f"{options.at_most:.2f}"
    )
    sys.exit(ratio > options.at_most or difference > 1e-12)


def evaluate_ours(truth: dict[str, Any], detections: list[Found]) -> Timed:
    """Evaluates with this zoo; prints the memory it takes."""
    before = memory_mb("VmRSS")
    begin, cpu_begin = time.perf_counter(), time.process_time()
    evaluator = CocoEvaluator(truth, KINDS)
    for found in detections:
        evaluator.add(*found)
    kept = memory_mb("VmRSS")
    evaluator.summarize()
    wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
    print(
        f"memory: {kept - before:.0f} MB for the detections, at most "
        f"{memory_mb('VmHWM') - kept:.0f} MB more while evaluating"
    )
    return Timed([value for kind in KINDS for value in evaluator.statistics[kind]], wall_s, cpu_s)


def memory_mb(name: str) -> float:
    """This process's memory now (VmRSS) or at its highest (VmHWM); NaN where no one says."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def evaluate_theirs(truth: dict[str, Any], detections: list[Found]) -> Timed:
    """Evaluates with pycocotools, from results made as detectron2 makes them."""
    statistics: list[float] = []
    begin, cpu_begin = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        for kind in KINDS:
            evaluation = COCOeval(coco, coco.loadRes(as_results(truth, detections, kind)), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            statistics += evaluation.stats.tolist()
    return Timed(statistics, time.perf_counter() - begin, time.process_time() - cpu_begin)


def as_results(truth: dict[str, Any], detections: list[Found], kind: Kind) -> list[dict[str, Any]]:
    """COCO's results; without boxes for masks, whose sizes are those of the masks then."""
    category_ids = [category["id"] for category in truth["categories"]]
    results = []
    for found in detections:
        boxes = found.boxes_K4.copy()
        boxes[:, 2:] -= boxes[:, :2]
        columns = (boxes.tolist(), found.scores_K.tolist(), found.labels_K.tolist(), found.rles)
        for box, score, label, rle in zip(*columns, strict=True):
            what = {"bbox": box} if kind == "bbox" else {"segmentation": rle}
            entry = {"image_id": found.image_id, "category_id": category_ids[label], "score": score}
            results.append(entry | what)
    return results


def draw(images: int) -> tuple[dict[str, Any], list[Found]]:
    """Draws the annotations and the detections, always the same."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.choice(90, CLASSES, replace=False) + 1).tolist()
    share = np.arange(1, CLASSES + 1) ** -0.8
    share /= share.sum()
    truth: dict[str, Any] = {
        "images": [{"id": 7 * i + 3, "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "annotations": [],
        "categories": [{"id": number, "name": f"class {number}"} for number in ids],
    }
    detections = []
    for image in truth["images"]:
        count = min(int(rng.geometric(1 / 7.4)), 60) if rng.random() > 0.01 else 0
        there = draw_boxes(rng, count)
        labels = rng.choice(CLASSES, count, p=share)
        for polygon, label in zip(outlines(rng, there).tolist(), labels.tolist(), strict=True):
            truth["annotations"].append(
                annotation(polygon, ids[label], image["id"], 1 + len(truth["annotations"]), rng)
            )
        near = min(2 * count, PER_IMAGE)
        source = np.arange(near) % max(count, 1)
        moved = there[source] + rng.normal(0, 0.08, (near, 4)) * there[source][:, [2, 3, 2, 3]]
        moved[:, 2:] = np.maximum(moved[:, 2:], 3)
        boxes = np.concatenate([moved, draw_boxes(rng, PER_IMAGE - near)])
        guessed = rng.choice(CLASSES, PER_IMAGE, p=share)
        guessed[:near] = np.where(rng.random(near) < 0.8, labels[source], guessed[:near])
        scores = np.concatenate([rng.beta(3, 2, near), rng.beta(1, 6, PER_IMAGE - near)])
        polygons = outlines(rng, boxes)
        points = polygons.reshape(PER_IMAGE, -1, 2)
        corners = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
        rles = mask_utils.frPyObjects(polygons.tolist(), HEIGHT, WIDTH)
        detections.append(
            Found(
                image["id"],
                corners.astype(np.float32),
                scores.astype(np.float32),
                guessed,
                rles,
            )
        )
    return truth, detections


def draw_boxes(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Centres and sizes (N, 4): x, y, width, height."""
    side = np.exp(rng.normal(4, 1, count))
    aspect = np.exp(rng.normal(0, 0.4, count))
    width = (side * aspect).clip(4, 0.9 * WIDTH)
    height = (side / aspect).clip(4, 0.9 * HEIGHT)
    return np.stack([rng.uniform(0, WIDTH, count), rng.uniform(0, HEIGHT, count), width, height], 1)


def outlines(rng: np.random.Generator, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Polygons of 16 points (N, 32) in the boxes, cut at the image's border."""
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    radius = rng.uniform(0.75, 1, (len(boxes), 16)) / 2
    x = boxes[:, :1] + boxes[:, 2:3] * radius * np.cos(angle)
    y = boxes[:, 1:2] + boxes[:, 3:] * radius * np.sin(angle)
    return np.stack([x.clip(0, WIDTH), y.clip(0, HEIGHT)], axis=-1).reshape(len(boxes), 32)


def annotation(
    polygon: list[float], category_id: int, image_id: int, number: int, rng: np.random.Generator
) -> dict[str, Any]:
    """An object; one in a hundred is a crowd region."""
    points = np.reshape(polygon, (-1, 2))
    low, size = points.min(axis=0), np.ptp(points, axis=0)
    crowd = int(rng.random() < 0.01)
    rle = mask_utils.frPyObjects([polygon], HEIGHT, WIDTH)[0]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [*low.tolist(), *size.tolist()],
        "area": float(mask_utils.area(rle)),
        "iscrowd": crowd,
        "segmentation": rle if crowd else [polygon],
    }


if __name__ == "__main__":
    main()
