"""What a layout of the sample data set consists of, and how all of them write their pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_JPEG_QUALITY = 90


class Picture(NamedTuple):
    """Which picture is meant: its number in the split, and the size that was asked for.

    Attributes:
        seed: the data set's seed.
        split: one of ``scenes.SPLITS``.
        number: from 0 up.
        width: in pixels.
        height: in pixels.
    """

    seed: int
    split: str
    number: int
    width: int
    height: int


@dataclass(frozen=True)
class Layout:
    """A layout: its defaults and its parts.

    Attributes:
        train: pictures to train on, by default.
        val: pictures held out, by default.
        size: (width, height) in pixels, by default.
        least: fewest pictures of a split.
        lacking: what a split with fewer has not, for a message.
        count_files: (seed, pictures of each split) to the number of files in each folder.
        write_picture: draws a picture into the given data set's directory, whose folders are
            there; gives what ``finish`` is to know of it. OSError if it cannot be written.
        finish: writes what is known only when all pictures are there, from what
            ``write_picture`` gave for each, in order, by split.
        files: those of ``finish`` that lie in no folder of ``count_files``.
    """

    train: int
    val: int
    size: tuple[int, int]
    least: int
    lacking: str
    count_files: Callable[[int, Mapping[str, int]], dict[str, int]]
    write_picture: Callable[[Path, Picture], Any]
    finish: Callable[[Path, Mapping[str, Sequence[Any]]], None]
    files: tuple[str, ...] = ()


def write_jpeg(path: Path, pixels_HW3: np.ndarray) -> None:
    """Writes uint8 RGB pixels.

    Raises:
        OSError: if it cannot be written.
    """
    # Pillow's own writing to a file loses the reason when that fails.
    buffer = BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    path.write_bytes(buffer.getvalue())
