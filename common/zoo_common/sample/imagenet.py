"""The ImageNet layout: ``<split>/<class>/<class>_<number>.jpg``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from zoo_common.sample.draw import draw
from zoo_common.sample.layout import Layout, Picture, write_jpeg
from zoo_common.sample.scenes import compose, label_of
from zoo_common.sample.shapes import CLASSES


def _count_files(seed: int, counts: Mapping[str, int]) -> dict[str, int]:
    files: dict[str, int] = {}
    for split, count in counts.items():
        rounds = count // len(CLASSES)
        rest = range(rounds * len(CLASSES), count)
        more = Counter(label_of(seed, split, index) for index in rest)
        files |= {f"{split}/{name}": rounds + more[name] for name in CLASSES}
    return files


def _write_picture(directory: Path, picture: Picture) -> None:
    """Draws a picture into its class's folder."""
    scene = compose(*picture)
    name = f"{scene.label}_{picture.number:06d}.jpg"
    write_jpeg(directory / picture.split / scene.label / name, draw(scene))


def _finish(directory: Path, notes: Mapping[str, Sequence[None]]) -> None:
    """The pictures are all there is."""


LAYOUT = Layout(
    train=4000,
    val=500,
    size=(224, 224),
    least=len(CLASSES),
    lacking="a picture of each class",
    count_files=_count_files,
    write_picture=_write_picture,
    finish=_finish,
)
