"""Two views of a picture, ours against the original's DeCLIP: images a second on one core.

    python tools/bench/declip_views.py --peer DIR

DIR is a clone of https://github.com/Sense-GVT/DeCLIP; its image reader, its ``MOCOV2`` transform
and its collate function are run as they are, with stand-ins for what they import and do not call
(kestrel, DALI, easydict and its data sets). JPEGs of 500 x 375 with the spectrum of photographs
are made into batches of two normalised views of 224 x 224, from the same random numbers by both:
decode, crop, resize, colours, grey, blur, flip, batch. The original normalises image by image,
ours the batch, which on a machine with an accelerator would not take the core's time; here it
does. Everything runs in one process on one core, the two in alternation and in processor time,
since neighbours slow either by a factor.

How far the pictures differ is printed first. Ends with exit code 1 if that is more than
``declip.views`` says, or if the ratio is below ``--at_least``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import random
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from declip_peer import CLONE, MISSING, use_ours
from photographs import HEIGHT, WIDTH, draw_photographs

from zoo_common.data import Normalize
from zoo_common.imagenet import IMAGENET_MEAN, IMAGENET_STD
from zoo_common.images import decode_image

SIZE = 224
FEW = 0.05  # values that may differ by a grey level
MORE = 0.007  # by more than one
MOST = 16  # grey levels

MakeBatch = Callable[[Sequence[bytes]], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="clone of Sense-GVT/DeCLIP")
    parser.add_argument("--images", type=int, default=96, help="JPEGs to draw (default 96)")
    parser.add_argument("--batch_size", type=int, default=32, help="images a batch (default 32)")
    parser.add_argument("--rounds", type=int, default=9, help="times to alternate (default 9)")
    parser.add_argument("--at_least", type=float, default=1.3, help="ratio to reach (default 1.3)")
    options = parser.parse_args()
    use_ours()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as directory:
        size = draw_photographs(Path(directory) / "train", options.images)
        files = [path.read_bytes() for path in sorted(Path(directory).rglob("*.jpg"))]
    print(f"{options.images} JPEGs of {WIDTH} x {HEIGHT}, {size / 1024:.0f} KB on average")
    makers = {"Sense-GVT/DeCLIP": their_maker(options.peer), "declip.views": our_maker()}
    alike = compare(makers, files)
    ratio = measure(makers, files, options.batch_size, options.rounds)
    print_stages(files)
    print(f"\nratio {ratio:.2f}, asked for {options.at_least:.2f}")
    sys.exit(ratio < options.at_least or not alike)


def their_maker(peer: Path) -> MakeBatch:
    """The original's way from the bytes of files to a batch [B, V * C, H, W].

    Raises:
        SystemExit: The clone is not there, or is another one.
    """
    if not (peer / "prototype" / "data").is_dir():
        error = f"no {peer}/prototype/data"
        raise SystemExit(MISSING.format(what="DeCLIP", error=error, advice=CLONE))
    for name in ("datasets", "sampler", "metrics", "pipelines", "nvidia_dali_dataloader"):
        sys.modules[f"prototype.data.{name}"] = _Uncalled(name)
    sys.modules["kestrel"] = _Uncalled("kestrel")
    easydict: Any = types.ModuleType("easydict")
    easydict.EasyDict = dict
    sys.modules["easydict"] = easydict
    sys.path.insert(0, str(peer.resolve()))
    try:
        build = importlib.import_module("prototype.data.imagenet_dataloader")
        collate = importlib.import_module("prototype.data.clip_dataloader")._collate_fn
        read = importlib.import_module("prototype.data.image_reader").pil_loader
    except ImportError as error:
        raise SystemExit(MISSING.format(what="DeCLIP", error=error, advice=CLONE)) from error
    transform = build.build_common_augmentation("MOCOV2")

    def make(files: Sequence[bytes]) -> torch.Tensor:
        items = [
            {"image_id": number, "filename": "", "image": transform(read(data, ""))}
            for number, data in enumerate(files)
        ]
        images: torch.Tensor = collate(items)["images"]
        return images

    return make


class _Uncalled(types.ModuleType):
    """A module of which names are imported, and nothing else."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def our_maker() -> MakeBatch:
    """Our way to a batch [V, B, C, H, W], with what the model does first."""
    from declip.views import TwoViews

    views = TwoViews(SIZE)
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)

    def make(files: Sequence[bytes]) -> torch.Tensor:
        images_VBCHW = np.empty((2, len(files), 3, SIZE, SIZE), np.uint8)
        for row, data in enumerate(files):
            images_VBCHW[:, row] = views(decode_image(data))
        normalized_VBCHW: torch.Tensor = normalize(torch.from_numpy(images_VBCHW))
        return normalized_VBCHW

    return make


def compare(makers: dict[str, MakeBatch], files: Sequence[bytes]) -> bool:
    """Prints by how many grey levels the pictures of the same draws differ.

    Returns:
        Whether that is as little as it should be.
    """
    std_C11 = torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
    counts = torch.zeros(256, dtype=torch.int64)
    for number, data in enumerate(files):
        pictures = []
        for make in makers.values():
            seed_all(number)
            pictures.append(make([data]).view(2, 3, SIZE, SIZE) * std_C11)
        levels = (pictures[0] - pictures[1]).abs().round().long()
        counts += torch.bincount(levels.flatten(), minlength=256)
    shares = counts.double() / counts.sum()
    most = int(counts.nonzero().max())
    print(
        f"values that differ by one grey level: {100 * shares[1]:.2f} %, by two to {most}: "
        f"{100 * shares[2:].sum():.2f} %"
    )
    return bool(shares[1] <= FEW and shares[2:].sum() <= MORE and most <= MOST)


def measure(
    makers: dict[str, MakeBatch], files: Sequence[bytes], batch_size: int, rounds: int
) -> float:
    """Prints images a second of both.

    Returns:
        The median over the rounds of their ratio.
    """
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(rounds + 1):
        for name, make in makers.items():
            seed_all(number)
            begin = time.process_time()
            for start in range(0, len(files), batch_size):
                make(files[start : start + batch_size])
            if number:  # the first round warms up
                rates[name].append(len(files) / (time.process_time() - begin))
    for name, values in rates.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        print(f"{name:22}{middle:8.0f} images/s   ({low:.0f} to {high:.0f})")
    theirs, ours = rates.values()
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def print_stages(files: Sequence[bytes]) -> None:
    """Prints how long the parts of a view take, by timing torchvision's and ours by themselves."""
    from PIL import Image, ImageFilter
    from torchvision.transforms import functional

    from declip import views

    images = [decode_image(data) for data in files]
    sources = [views.Crops(image) for image in images]
    smalls = [image.resize((SIZE, SIZE)) for image in images]
    planes = [np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1)) for small in smalls]
    top, left, height, width = 30, 40, 300, 350
    turn = views.Jitter((3, 0, 1, 2), (None, None, None, 0.05))
    lights = views.Jitter((0, 1, 2, 3), (1.2, 0.8, 1.2, None))

    def their_lights(image: Image.Image) -> None:
        image = functional.adjust_contrast(functional.adjust_brightness(image, 1.2), 0.8)
        functional.adjust_saturation(image, 1.2)

    def each(call: Callable[[Any], object], values: Sequence[Any]) -> Callable[[], object]:
        return lambda: [call(value) for value in values]

    box = (top, left, height, width)
    size = [SIZE, SIZE]
    stages = {
        "decode": (
            each(lambda data: Image.open(io.BytesIO(data)).convert("RGB"), files),
            each(decode_image, files),
        ),
        "crop and resize": (
            each(lambda image: functional.resized_crop(image, *box, size), images),
            each(lambda source: source.crop(box, SIZE, False), sources),
        ),
        "brightness to saturation": (
            each(their_lights, smalls),
            each(lambda image: views.jitter_colors(image, lights), planes),
        ),
        "hue": (
            each(lambda image: functional.adjust_hue(image, 0.05), smalls),
            each(lambda image: views.jitter_colors(image, turn), planes),
        ),
        "blur": (
            each(lambda image: image.filter(ImageFilter.GaussianBlur(1.0)), smalls),
            each(lambda image: views.gaussian_blur(image, 1.0), planes),
        ),
    }
    print(f"\n{'milliseconds a picture':26}{'theirs':>8}{'ours':>8}")
    for name, sides in stages.items():
        theirs, ours = (fastest(side) / len(files) * 1e3 for side in sides)
        print(f"{name:26}{theirs:8.3f}{ours:8.3f}")


def fastest(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of several calls."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return best


def seed_all(seed: int) -> None:
    """Seeds what both draw from."""
    random.seed(seed)
    torch.manual_seed(seed)


if __name__ == "__main__":
    main()
