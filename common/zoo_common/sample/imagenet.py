"""The ImageNet layout: ``<split>/<class>/<class>_<number>.jpg``."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image

from zoo_common.sample.draw import draw
from zoo_common.sample.scenes import SPLITS, compose
from zoo_common.sample.shapes import CLASSES

_JPEG_QUALITY = 90


def make_folders(directory: Path) -> None:
    """Makes the folders of all classes in an existing, empty directory."""
    for split in SPLITS:
        for name in CLASSES:
            (directory / split / name).mkdir(parents=True)


def write_picture(
    directory: Path, seed: int, split: str, index: int, width: int, height: int
) -> None:
    """Draws one picture of ``width`` x ``height`` pixels into its class's folder.

    Raises:
        OSError: if it cannot be written.
    """
    scene = compose(seed, split, index, width, height)
    # Pillow's own writing to a file loses the reason when that fails.
    buffer = BytesIO()
    Image.fromarray(draw(scene)).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    path = directory / split / scene.label / f"{scene.label}_{index:06d}.jpg"
    path.write_bytes(buffer.getvalue())
