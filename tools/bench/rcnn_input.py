"""Input pipeline of R-CNN against detectron2's mapper: images a second on one core.

    python tools/bench/rcnn_input.py

Needs detectron2 in the environment, built from its public repository (it is no requirement of
this zoo). Draws JPEGs of 640 x 480 with the spectrum of photographs and a COCO JSON with about
seven polygons an image, and makes the recipe's training items with masks from them with both:
decode, resize to a short side of 640 to 800, flip, boxes and outlines. Ours also pads them to
batches, which detectron2 does later, in the model. Everything runs in one process on one core,
the two in alternation and in processor time, since neighbours slow either by a factor. Ours is
measured with torch's resize, which is the default, and with Pillow's. Before that the items of
both are compared. Ends with exit code 1 if they differ where they should not, or if the ratio of
the default is below ``--at_least``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from zoo_common.data import BatchStream
from zoo_common.detection.batching import DetectionBatch
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.detection.loading import build_train_stream
from zoo_common.detection.transforms import resize_image
from zoo_common.images import read_image

WIDTH, HEIGHT = 640, 480
MIN_SIZES, MAX_SIZE = (640, 672, 704, 736, 768, 800), 1333
OURS, OURS_EXACT, THEIRS = "ours", "ours, Pillow's resize", "detectron2"

Pipeline = Callable[[], int]  # makes every image once, and says how many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=96, help="JPEGs to draw (default 96)")
    parser.add_argument("--batch_size", type=int, default=2, help="images a batch (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="times to alternate (default 9)")
    parser.add_argument("--at_least", type=float, default=1.5, help="ratio to reach (default 1.5)")
    options = parser.parse_args()
    if importlib.util.find_spec("detectron2") is None:
        sys.exit(
            "detectron2 is not installed here: build it (https://github.com/facebookresearch/"
            "detectron2) and put it on PYTHONPATH to compare with it"
        )
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        size = draw_data(root, options.images)
        print(f"{options.images} JPEGs of {WIDTH} x {HEIGHT}, {size / 1024:.0f} KB on average")
        index = open_index(root / "instances.json", root / "images", masks=True)
        same = compare_items(root, index)
        pipelines = {
            OURS: our_pipeline(index, options.batch_size, exact=False),
            OURS_EXACT: our_pipeline(index, options.batch_size, exact=True),
            THEIRS: their_pipeline(root),
        }
        ratio = compare(pipelines, options.rounds)
        print_stages(index)
    print(f"\nratio {ratio:.2f}, asked for {options.at_least:.2f}")
    sys.exit(not same or ratio < options.at_least)


def compare_items(root: Path, index: CocoIndex) -> bool:
    """Prints how the items of both differ where nothing is left to chance.

    Returns:
        Whether pixels with Pillow's resize, boxes, labels and outlines are the same.
    """
    options: dict[str, Any] = {"max_size": MAX_SIZE, "masks": True, "batch_size": 1, "workers": 0}
    worst = dict.fromkeys(("pixels, Pillow's resize", "boxes", "labels", "outlines"), 0.0)
    off_by: list[float] = []
    for short in MIN_SIZES:
        for flip in (0, 1):
            mapper, dicts = detectron2_mapper(root, short, flip)
            entries = {entry["image_id"]: entry for entry in dicts}
            ours = (
                build_train_stream(
                    index,
                    min_sizes=[short],
                    flip=flip,
                    exact_resize=exact,
                    total_steps=4,
                    **options,
                )
                for exact in (True, False)
            )
            for exact, quick in zip(*ours, strict=True):
                item = mapper(entries[int(exact.image_ids_B)])
                for name, difference in differences(exact, item).items():
                    worst[name] = max(worst[name], difference)
                gap = (exact.images_BCHW.int() - quick.images_BCHW.int()).abs()
                worst["pixels, torch's resize"] = max(
                    worst.get("pixels, torch's resize", 0.0), float(gap.max())
                )
                off_by.append(float((gap > 0).float().mean()))
    print("\nlargest difference of an item of ours to detectron2's")
    for name, difference in worst.items():
        print(f"{name:24}{difference:10.2g}")
    share = statistics.mean(off_by)
    print(f"torch's resize differs in {share:.2%} of the values\n")
    return worst["pixels, Pillow's resize"] == worst["labels"] == 0 and all(
        worst[name] < limit
        for name, limit in {"boxes": 1e-3, "outlines": 1e-3, "pixels, torch's resize": 2}.items()
    )


def differences(ours: DetectionBatch, theirs: dict[str, Any]) -> dict[str, float]:
    """The largest differences of one item; infinite where the shapes differ."""
    objects = theirs["instances"]
    height, width = theirs["image"].shape[1:]
    if ours.sizes_B2.tolist() != [[height, width]] or len(objects) != int(ours.valid_BQ.sum()):
        return {"boxes": float("inf")}
    assert ours.edges_BQE4 is not None and ours.rings_BQE is not None
    outlines = 0.0
    for edges_E4, rings_E, (polygon,) in zip(
        ours.edges_BQE4[0], ours.rings_BQE[0], objects.gt_masks.polygons, strict=True
    ):
        points = edges_E4[rings_E >= 0][:, :2].numpy()
        outlines = max(outlines, float(np.abs(points - polygon.reshape(-1, 2)).max()))
    pixels = ours.images_BCHW[0, :, :height, :width].int() - theirs["image"].flip(0).int()
    return {
        "pixels, Pillow's resize": float(pixels.abs().max()),
        "boxes": float((ours.boxes_BQ4[0] - objects.gt_boxes.tensor).abs().max()),
        "labels": float((ours.labels_BQ[0] - objects.gt_classes).abs().max()),
        "outlines": outlines,
    }


def compare(pipelines: dict[str, Pipeline], rounds: int) -> float:
    """Prints images a second of each; returns ours over theirs, the median of the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        for name, pipeline in pipelines.items():
            begin = time.process_time()
            images = pipeline()
            if number:  # the first round warms up
                rates[name].append(images / (time.process_time() - begin))
    print(f"{'images a second':24}{'median':>8}{'lowest':>8}{'highest':>8}   over detectron2")
    medians = {}
    for name, values in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(values, rates[THEIRS], strict=True)]
        medians[name] = statistics.median(ratios)
        print(
            f"{name:24}{statistics.median(values):8.0f}{min(values):8.0f}{max(values):8.0f}"
            f"   {medians[name]:.2f}"
        )
    return medians[OURS]


def our_pipeline(index: CocoIndex, batch_size: int, *, exact: bool) -> Pipeline:
    """An epoch of this zoo's training batches, whole ones."""
    stream = build_train_stream(
        index,
        min_sizes=MIN_SIZES,
        max_size=MAX_SIZE,
        masks=True,
        exact_resize=exact,
        batch_size=batch_size,
        workers=0,
    )
    batches = endless(stream)
    return lambda: sum(len(next(batches).item_ids) for _ in range(stream.steps_per_epoch))


def endless(stream: BatchStream[DetectionBatch]) -> Iterator[DetectionBatch]:
    """The stream's batches; its generator lives as long as the pipeline."""
    yield from stream


def their_pipeline(root: Path) -> Pipeline:
    """Each image once through detectron2's mapper with masks."""
    mapper, dicts = detectron2_mapper(root, MIN_SIZES, 0.5)

    def run() -> int:
        for entry in dicts:
            mapper(entry)
        return len(dicts)

    return run


def detectron2_mapper(
    root: Path, min_sizes: tuple[int, ...] | int, flip: float
) -> tuple[Callable[[dict[str, Any]], Any], list[dict[str, Any]]]:
    """detectron2's training mapper with its default augmentation, and its data set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own imports
        from detectron2.data import DatasetMapper
        from detectron2.data import transforms as T
        from detectron2.data.datasets import load_coco_json
    logging.disable(logging.INFO)
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[
            T.ResizeShortestEdge(min_sizes, MAX_SIZE, "choice"),
            T.RandomFlip(flip),
        ],
        image_format="BGR",
        use_instance_mask=True,
    )
    return mapper, load_coco_json(str(root / "instances.json"), str(root / "images"), "bench")


def print_stages(index: CocoIndex) -> None:
    """Prints where an image's time goes, by timing our parts by themselves."""
    numbers = range(min(32, len(index)))
    paths = [index.path(i) for i in numbers]
    arrays = [np.array(read_image(path)) for path in paths]
    sizes = [(short, round(short * WIDTH / HEIGHT)) for short in MIN_SIZES] * len(paths)
    resized = [resize_image(array, *size) for array, size in zip(arrays, sizes, strict=False)]
    batch_CHW = np.empty((3, 800, 1088), np.uint8)

    def copy() -> None:
        for image in resized:
            height, width, _ = image.shape
            np.copyto(batch_CHW[:, :height, :width], image.transpose(2, 0, 1))

    def resize(*, exact: bool) -> None:
        for array, size in zip(arrays, sizes, strict=False):
            resize_image(array, *size, exact=exact)

    stages: dict[str, Callable[[], object]] = {
        "read and decode": lambda: [read_image(path, upright=True) for path in paths],
        "to an array": lambda: [np.array(Image.fromarray(array)) for array in arrays],
        "resize, torch": lambda: resize(exact=False),
        "resize, Pillow": lambda: resize(exact=True),
        "copy into the batch": copy,
        "boxes from the index": lambda: [index.objects(i) for i in numbers],
        "outlines from the index": lambda: [index.outlines(i) for i in numbers],
    }
    print(f"\n{'milliseconds an image':24}{'ours':>8}")
    for name, stage in stages.items():
        print(f"{name:24}{fastest(stage) / len(paths) * 1e3:8.3f}")


def fastest(call: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of several calls."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return best


def draw_data(root: Path, count: int) -> float:
    """Draws images with the spectrum of photographs, and objects.

    Returns:
        The mean size of a JPEG of quality 90 in bytes.
    """
    directory = root / "images"
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    amplitude = np.where(frequency > 0, np.maximum(frequency, 1e-9) ** -1.2, 0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    total = 0
    for number in range(1, count + 1):
        noise = rng.standard_normal((3, *frequency.shape, 2)) @ np.array([1, 1j])
        fields = np.fft.irfft2(noise * amplitude, s=(HEIGHT, WIDTH))
        light, warm, green = fields / fields.std(axis=(1, 2), keepdims=True)
        channels = [light + 0.35 * warm, light - 0.2 * warm + 0.1 * green, light - 0.35 * warm]
        pixels = np.stack(channels, axis=-1) * 48 + rng.uniform(90, 150)
        path = directory / f"{number:012}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        total += path.stat().st_size
        images.append({"id": number, "file_name": path.name, "height": HEIGHT, "width": WIDTH})
        for _ in range(rng.poisson(7) + 1):
            shape = draw_polygon(rng)
            annotations.append({"id": len(annotations) + 1, "image_id": number, **shape})
    categories = [{"id": i, "name": f"class {i}", "supercategory": "any"} for i in range(1, 81)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return total / count


def draw_polygon(rng: np.random.Generator) -> dict[str, Any]:
    """A star-shaped polygon of 20 to 60 points as a COCO annotation."""
    points = int(rng.integers(20, 61))
    angle = np.sort(rng.uniform(0, 2 * np.pi, points))
    radius = rng.uniform(20, 120) * rng.uniform(0.6, 1, points)
    x = (rng.uniform(20, WIDTH - 20) + radius * np.cos(angle)).clip(0, WIDTH).round(2)
    y = (rng.uniform(20, HEIGHT - 20) + radius * np.sin(angle)).clip(0, HEIGHT).round(2)
    sides = [float(np.ptp(x).round(2)), float(np.ptp(y).round(2))]
    return {
        "category_id": int(rng.integers(1, 81)),
        "bbox": [float(x.min()), float(y.min()), *sides],
        "area": sides[0] * sides[1] / 2,
        "iscrowd": 0,
        "segmentation": [np.stack([x, y], axis=1).reshape(-1).tolist()],
    }


if __name__ == "__main__":
    main()
