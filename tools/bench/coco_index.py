"""Reading COCO annotations: ours against pycocotools, on a file of train2017's size.

    python tools/bench/coco_index.py

Writes a seeded instances JSON (118,287 images, 860,001 annotations, about 450 MB) into a temporary
directory and opens it in a process for each: with ``pycocotools.coco.COCO``, with
``zoo_common.detection.coco`` for the first time (which builds the mapped arrays) and once more, and
in forked and spawned workers that read random images. Ends with exit code 1 if one of our figures
is over its goal; the goals are for the full size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import psutil

if TYPE_CHECKING:
    from zoo_common.detection.coco import CocoIndex

IMAGES, ANNOTATIONS = 118_287, 860_001
CROWDS = 0.0117  # of the annotations of train2017
SPLIT = 0.1  # of the objects have a second polygon
HEIGHT, WIDTH = 480, 640
# COCO's 80 categories have ids up to 90.
CATEGORY_IDS = [n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
TOUCHED = 5000  # images that a worker reads
GOALS = {"build_s": 40.0, "build_mb": 3000.0, "open_s": 1.0, "worker_mb": 50.0}

Figures = dict[str, float]


def main() -> None:
    """Prints a line for each way of opening."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"(default {IMAGES})")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, path = options.child
        print(json.dumps(CHILDREN[name](Path(path))))
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "instances_train2017.json"
        annotations = round(options.images * ANNOTATIONS / IMAGES)
        write_instances(path, options.images, annotations)
        size = path.stat().st_size / 1e6
        print(f"{options.images} images, {annotations} annotations, {size:.0f} MB")
        figures = {name: run_child(name, path) for name in CHILDREN}
    print_table(figures)
    ours = {
        "build_s": figures["first build"]["seconds"],
        "build_mb": figures["first build"]["peak_mb"],
        "open_s": figures["later open"]["seconds"],
        "worker_mb": max(figures[f"{kind} worker"]["private_mb"] for kind in ("forked", "spawned")),
    }
    late = [name for name, value in ours.items() if value >= GOALS[name]]
    goals = ", ".join(f"{name} {ours[name]:.2f} of {goal:g}" for name, goal in GOALS.items())
    print(f"\n{goals}: {'over: ' + ' '.join(late) if late else 'ok'}")
    sys.exit(bool(late))


def print_table(figures: dict[str, Figures]) -> None:
    """Prints seconds and megabytes, and pycocotools' by ours."""
    peer = figures["pycocotools"]
    print(f"{'':16}{'seconds':>10}{'CPU s':>8}{'peak MB':>10}{'private MB':>12}{'speed-up':>10}")
    for name, row in figures.items():
        cells = [f"{row['seconds']:10.2f}{row['cpu_s']:8.2f}"]
        cells.append(f"{row['peak_mb']:10.0f}{row['private_mb']:12.1f}")
        if name in ("first build", "later open"):
            cells.append(f"{peer['cpu_s'] / row['cpu_s']:9.1f}x")
        print(f"{name:16}{''.join(cells)}")
    print(
        "peak: of the process, with its imports (torch in ours); private: what it adds to memory "
        "that nobody shares;\nspeed-up: in processor time, which neighbours do not change; a "
        f"worker reads {TOUCHED} random images' objects and outlines"
    )


def run_child(name: str, path: Path) -> Figures:
    """Runs one way of opening in a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(path)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: Figures = json.loads(result.stdout.splitlines()[-1])
    return figures


def open_pycocotools(path: Path) -> Figures:
    """Opens with pycocotools, which prints to stdout."""
    from pycocotools.coco import COCO

    return measure(lambda: COCO(str(path)))


def open_ours(path: Path) -> Figures:
    """Opens with ours: builds the arrays, or maps them."""
    from zoo_common.detection.coco import open_index

    return measure(lambda: open_index(path, None))


def read_in_worker(context: ForkContext | SpawnContext, path: Path) -> Figures:
    """Opens with ours and reads random images in a worker."""
    from zoo_common.detection.coco import open_index

    index = open_index(path, None)
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=touch, args=(index, sender))
    worker.start()
    figures: Figures = receiver.recv()
    worker.join()
    return figures


def touch(index: CocoIndex, sender: Connection) -> None:
    """Reads random images; sends what that took."""
    numbers = np.random.default_rng(1).integers(len(index), size=TOUCHED).tolist()

    def read() -> None:
        for number in numbers:
            index.objects(number)
            index.outlines(number)

    sender.send(measure(read))


def measure(call: Callable[[], object]) -> Figures:
    """Seconds, the process's peak, and what it holds privately more than before."""
    process = psutil.Process()
    before = process.memory_full_info().uss
    begin, begin_cpu = time.perf_counter(), time.process_time()
    held = call()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    private = process.memory_full_info().uss - before
    del held
    # Peaks are in kilobytes on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu_s": cpu, "peak_mb": peak / 1e6, "private_mb": private / 1e6}


CHILDREN: dict[str, Callable[[Path], Figures]] = {
    "pycocotools": open_pycocotools,
    "first build": open_ours,
    "later open": open_ours,
    "forked worker": lambda path: read_in_worker(get_context("fork"), path),
    "spawned worker": lambda path: read_in_worker(get_context("spawn"), path),
}


def write_instances(path: Path, images: int, annotations: int) -> None:
    """Writes an instances JSON with COCO's proportions: polygons of hundredths, some crowds."""
    rng = np.random.default_rng(0)
    owners = rng.integers(1, images + 1, annotations)
    categories = rng.choice(CATEGORY_IDS, annotations)
    crowds = rng.random(annotations) < CROWDS
    with path.open("w") as stream:
        stream.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        stream.write(", ".join(image_text(number) for number in range(1, images + 1)))
        stream.write('], "annotations": [')
        for number in range(annotations):
            stream.write(", " if number else "")
            write_annotation(
                stream, rng, number, owners[number], categories[number], crowd=crowds[number]
            )
        listed = [{"supercategory": "x", "id": n, "name": f"class {n}"} for n in CATEGORY_IDS]
        stream.write(f'], "categories": {json.dumps(listed)}}}')


def image_text(number: int) -> str:
    """An image as train2017 lists it, addresses and all."""
    name = f"{number:012}.jpg"
    return (
        f'{{"license": 3, "file_name": "{name}", "coco_url": "http://images.cocodataset.org/'
        f'train2017/{name}", "height": {HEIGHT}, "width": {WIDTH}, "date_captured": '
        f'"2013-11-14 11:18:45", "flickr_url": "http://pictures.example.org/folder/{name}", '
        f'"id": {number}}}'
    )


def write_annotation(
    stream: TextIO, rng: np.random.Generator, number: int, image: int, category: int, *, crowd: bool
) -> None:
    """Writes one annotation: a jagged blob, or a crowd's uncompressed run lengths."""
    width, height = rng.uniform(5, 250, 2)
    x, y = rng.random(2) * (WIDTH - width, HEIGHT - height)
    if crowd:
        runs = rng.integers(1, 200, 1200)
        counts = ",".join(map(str, [*runs.tolist(), HEIGHT * WIDTH - int(runs.sum())]))
        segmentation = f'{{"counts": [{counts}], "size": [{HEIGHT},{WIDTH}]}}'
    else:
        polygons = []
        for _ in range(1 + (rng.random() < SPLIT)):
            points = int(np.clip(rng.lognormal(2.75, 0.7), 3, 400))
            angles = np.sort(rng.uniform(0, 2 * np.pi, points))
            radius = rng.uniform(0.7, 1, points) / 2
            xy = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None] + 0.5
            values = (xy * (width, height) + (x, y)).ravel().tolist()
            polygons.append("[" + ",".join(map("{:.2f}".format, values)) + "]")
        segmentation = f"[{','.join(polygons)}]"
    stream.write(
        f'{{"segmentation": {segmentation},"area": {width * height * 0.6},"iscrowd": {int(crowd)},'
        f'"image_id": {image},"bbox": [{x:.2f},{y:.2f},{width:.2f},{height:.2f}],'
        f'"category_id": {category},"id": {number + 1}}}'
    )


if __name__ == "__main__":
    main()
