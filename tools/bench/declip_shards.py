"""Reading training samples from shards against reading them from single files.

    python tools/bench/declip_shards.py --directory DIR

Writes pictures of YFCC15M's mean size into DIR (tiny ones, filled up, so that the disk is timed
and not the decoder), converts them to shards, and reads an epoch of both in their training order:
with nothing in the page cache, and with all. Choose DIR on the disk in question. The directory is
deleted at the end. Ends with exit code 1 if shards are read from the disk more slowly than
``--at_least`` times the rate of files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from declip.data import CaptionedImages, CaptionFiles
from declip.index import open_index
from declip.make_shards import make_shards
from declip.shards import ShardSampler, open_shards
from zoo_common.data import StepSampler
from zoo_common.yfcc import TRAIN_IMAGES, TRAIN_JSON

BATCH_SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to write (default: /tmp)")
    parser.add_argument("--images", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=60_000, help="a picture's size")
    parser.add_argument("--workers", type=int, default=2, help="of the converter")
    parser.add_argument("--rounds", type=int, default=3, help="times to alternate (default 3)")
    parser.add_argument("--at_least", type=float, default=1.0, help="ratio to reach (default 1)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        tree, out = Path(name, "tree"), Path(name, "shards")
        draw(tree, options.images, options.bytes)
        index = open_index(tree)
        begin = time.perf_counter()
        made = make_shards(index, out, samples_per_shard=1000, workers=options.workers)
        rate = made.samples / (time.perf_counter() - begin)
        print(f"converted {made.samples} samples: {rate:.0f} a second, {options.workers} processes")
        ratio = compare(index, tree, out, options.rounds)
    sys.exit(ratio < options.at_least)


def draw(tree: Path, count: int, size: int) -> None:
    """Writes the card's tree for training."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "JPEG")
        path = tree / TRAIN_IMAGES / f"{number // 1000:03d}" / f"{number:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stream.getvalue() + rng.bytes(max(0, size - stream.tell())))
        name = path.relative_to(tree / TRAIN_IMAGES).as_posix()
        lines.append(json.dumps({"filename": name, "caption": f"picture {number} of many"}))
    (tree / TRAIN_JSON).write_text("\n".join(lines) + "\n")


def compare(index: Sequence[object], tree: Path, out: Path, rounds: int) -> float:
    """Prints samples a second; returns the ratio of shards to files with a cold cache."""
    files = CaptionFiles(index)
    shards = open_shards(str(out))
    steps = len(shards) // BATCH_SIZE
    place = {"rank": 0, "world_size": 1, "seed": 0, "total_steps": steps}
    sources: dict[str, tuple[CaptionedImages, StepSampler]] = {
        "files": (files, StepSampler(len(files), BATCH_SIZE, **place)),
        "shards": (shards, ShardSampler(shards.starts_S, BATCH_SIZE, **place)),
    }
    written = [*tree.rglob("*.jpg"), *out.glob("*.tar")]
    ratios = []
    for state in ("cold", "warm"):
        rates: dict[str, float] = dict.fromkeys(sources, 0.0)
        for _ in range(rounds):
            for name, (images, sampler) in sources.items():
                if state == "cold":
                    forget(written)
                    shards.close()
                begin = time.perf_counter()
                read = read_epoch(images, sampler)
                rates[name] = max(rates[name], read / (time.perf_counter() - begin))
        ratios.append(rates["shards"] / rates["files"])
        print(
            f"{state}: files {rates['files']:.0f}, shards {rates['shards']:.0f} samples a second, "
            f"ratio {ratios[-1]:.2f}"
        )
    return ratios[0]


def read_epoch(images: CaptionedImages, batches: StepSampler) -> int:
    """Reads what an epoch reads; returns the number of samples."""
    count = 0
    for batch in batches:
        for draw in batch:
            images.caption(draw.index)
            images.image(draw.index)
            count += 1
    return count


def forget(paths: Iterable[Path]) -> None:
    """Has the system drop the files' pages."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
