"""Rows to be converted to shards, for the tests of shards."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from PIL import Image

from declip.make_shards import RowSource, Summary, make_shards

PER_SHARD = 10


class Rows:
    """Pictures of a directory with captions; picklable."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        self.count = count

    def __len__(self) -> int:
        return self.count

    def path(self, index: int) -> str:
        return str(self.directory / self.item_id(index))

    def item_id(self, index: int) -> str:
        return f"{index // 20}/{index}.jpg"

    def caption(self, index: int) -> str:
        return f"picture «{index}», {'red' if index % 2 else 'blue'}"


class Slow(Rows):
    """Gives a test time to kill somebody."""

    def path(self, index: int) -> str:
        time.sleep(0.05)
        return super().path(index)


class Deadly(Rows):
    """Kills the process that comes to a row."""

    row = 12

    def path(self, index: int) -> str:
        if index == self.row:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().path(index)


def draw_rows(directory: Path, count: int) -> Rows:
    rows = Rows(directory, count)
    for index in range(count):
        path = Path(rows.path(index))
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (index * 5 % 256, index % 256, 80)).save(path)
    return rows


def convert(rows: RowSource, out: Path, **options: Any) -> Summary:
    return make_shards(rows, out, samples_per_shard=PER_SHARD, **options)


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
