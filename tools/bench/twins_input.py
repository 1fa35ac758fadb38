"""Input pipeline of Twins against timm's default loader: images a second on one core.

    python tools/bench/twins_input.py

Draws JPEGs of 500 x 375 with the spectrum of photographs, and makes the recipe's training
batches from them with both: decode, random-resized crop to 224, flip, RandAugment, collate,
normalise, random erasing. Everything runs in one process on one core, the two in alternation and
in processor time, since neighbours slow either by a factor. timm is measured with its prefetcher
on and off, and the faster of the two is the peer. Ends with exit code 1 if the ratio is below
``--at_least``.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from photographs import HEIGHT, WIDTH, draw_photographs
from PIL import Image
from timm.data import auto_augment, create_dataset, create_loader
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.functional import pil_to_tensor

from twins.data import (
    RAND_AUGMENT,
    Preprocess,
    build_train_data,
    rand_augment,
    resize,
)
from zoo_common.imagenet import build_index
from zoo_common.images import read_image

SIZE = 224

Stage = tuple[str, Callable[[], object], Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128, help="JPEGs to draw (default 128)")
    parser.add_argument("--batch_size", type=int, default=32, help="images a batch (default 32)")
    parser.add_argument("--rounds", type=int, default=9, help="times to alternate (default 9)")
    parser.add_argument("--at_least", type=float, default=1.3, help="ratio to reach (default 1.3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    mend_posterize()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        size = draw_photographs(root / "train" / "class", options.images)
        print(f"{options.images} JPEGs of {WIDTH} x {HEIGHT}, {size / 1024:.0f} KB on average")
        rates, ratio = compare(root, options.batch_size, options.rounds)
        print_stages(root, *rates)
    print(f"\nratio {ratio:.2f}, asked for {options.at_least:.2f}")
    sys.exit(ratio < options.at_least)


def compare(root: Path, batch_size: int, rounds: int) -> tuple[tuple[float, float], float]:
    """Prints images a second of each.

    Returns:
        The medians of the faster of timm's two and of ours; the median ratio of a round.
    """
    ours = "twins.data"
    loaders: dict[str, Iterable[torch.Tensor]] = {
        "timm, prefetcher": TimmBatches(root, batch_size, prefetcher=True),
        "timm, no prefetcher": TimmBatches(root, batch_size, prefetcher=False),
        ours: OurBatches(root, batch_size),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, loader in loaders.items():
            begin = time.process_time()
            images = sum(len(batch) for batch in loader)
            if number:  # the first round warms up
                rates[name].append(images / (time.process_time() - begin))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        low, high = min(values), max(values)
        print(f"{name:22}{medians[name]:8.0f} images/s   ({low:.0f} to {high:.0f})")
    peer = max((name for name in rates if name != ours), key=medians.__getitem__)
    ratios = [mine / theirs for mine, theirs in zip(rates[ours], rates[peer], strict=True)]
    return (medians[peer], medians[ours]), statistics.median(ratios)


class TimmBatches:
    """An epoch of timm's training loader with the recipe's augmentation."""

    def __init__(self, root: Path, batch_size: int, *, prefetcher: bool) -> None:
        self._loader = create_loader(
            create_dataset("", root=str(root / "train"), is_training=True),
            input_size=SIZE,
            batch_size=batch_size,
            is_training=True,
            auto_augment=RAND_AUGMENT,
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
            num_workers=0,
            use_prefetcher=prefetcher,
            device=torch.device("cpu"),
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (images for images, _ in self._loader)


class OurBatches:
    """An epoch of this zoo's training data for Twins."""

    def __init__(self, root: Path, batch_size: int) -> None:
        self._data = build_train_data(build_index(root, "train"), batch_size=batch_size, workers=0)
        self._preprocess = Preprocess(SIZE)
        self._step = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self._data.seek(self._step)
        for batch in self._data:
            yield self._preprocess(batch)
            self._step += 1
            if self._step % self._data.steps_per_epoch == 0:
                return


def print_stages(root: Path, timms_rate: float, our_rate: float) -> None:
    """Prints where an image's time goes, by timing the parts of both by themselves."""
    paths = sorted(str(path) for path in root.rglob("*.jpg"))
    decoded = [read_image(path) for path in paths]
    crop = RandomResizedCropAndInterpolation(SIZE, interpolation="bicubic")
    boxes = [crop.get_params(image, crop.scale, crop.ratio) for image in decoded]
    cropped = [crop(image) for image in decoded]
    arrays = [np.asarray(image) for image in cropped]
    parameters = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    timms = auto_augment.rand_augment_transform(RAND_AUGMENT, dict(parameters))
    ours = rand_augment(RAND_AUGMENT, SIZE)
    planes = np.empty((3, SIZE, SIZE), np.uint8)

    def crop_and_resize() -> None:
        for image, (top, left, height, width) in zip(decoded, boxes, strict=True):
            resize(image.crop((left, top, left + width, top + height)), SIZE)

    stages: list[Stage] = [
        (
            "read and decode",
            lambda: [Image.open(path).convert("RGB") for path in paths],
            lambda: [read_image(path) for path in paths],
        ),
        ("crop and resize", lambda: [crop(image) for image in decoded], crop_and_resize),
        (
            "RandAugment",
            lambda: [timms(image) for image in cropped],
            lambda: [ours(image) for image in cropped],
        ),
        (
            "to planes of a batch",
            lambda: [torch.from_numpy(planes).copy_(pil_to_tensor(image)) for image in cropped],
            lambda: [np.copyto(planes, array.transpose(2, 0, 1)) for array in arrays],
        ),
    ]
    print(f"\n{'milliseconds an image':24}{'timm':>8}{'ours':>8}")
    rest = [1e3 / timms_rate, 1e3 / our_rate]
    for name, *sides in stages:
        times = [fastest(side) / len(paths) * 1e3 for side in sides]
        rest = [left - time for left, time in zip(rest, times, strict=True)]
        print(f"{name:24}{times[0]:8.3f}{times[1]:8.3f}")
    print(f"{'the rest':24}{rest[0]:8.3f}{rest[1]:8.3f}   flip, erase, normalise, a cold cache")


def fastest(call: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of several calls, which all draw the same random numbers."""
    best = float("inf")
    for _ in range(repeats):
        random.seed(0)
        np.random.seed(0)
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return best


def mend_posterize() -> None:
    """Lets timm keep no bits: Pillow 13 refuses what earlier ones turned into black."""
    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]

    def mended(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
        if bits_to_keep == 0:
            return Image.new(image.mode, image.size)
        return posterize(image, bits_to_keep, **options)

    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = mended


if __name__ == "__main__":
    main()
