"""The ImageNet folder layout: checking a tree before a run starts, and indexing its images.

The layout and the numbering of classes are those of torchvision's ``ImageFolder``: one folder a
class, classes numbered in the sorted order of the folders' names, images in the sorted order of
their paths. This module does not import torch, so that the launcher can check a path at once.

Shape letters: N images of a split.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zoo_common.errors import UserError
from zoo_common.flaky import retried

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of RGB over the training images, for pixel values in [0, 1]."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of RGB over the training images, for pixel values in [0, 1]."""

SPLITS = ("train", "val")

IMAGE_EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)
"""File name endings that count as an image, in any case; those of torchvision."""

EXPECTED_TREE = """\
ImageNet2012/            <- the path to give
    train/
        <class>/         one folder a class, the same names as in val
            <image>      .JPEG, .jpg, .png, ...
    val/
        <class>/
            <image>"""

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Summary:
    """What ``check_tree`` found: the root, and the class folders in the order of their numbers."""

    root: Path
    splits: tuple[str, ...]
    classes: tuple[str, ...]


def check_tree(path: str | Path, splits: Sequence[str] = SPLITS) -> Summary:
    """Checks that a directory has the ImageNet layout, without listing all of its images.

    Reads the beginning of every class folder only, so that it takes a fraction of a second for
    ImageNet on a local disk.

    Args:
        path: The directory that holds the splits; a leading ``~`` is expanded.
        splits: The splits that the run needs; their class folders must have the same names.

    Raises:
        UserError: The tree is not as expected. The message says what is wrong and what to do,
            and prints the expected tree.
    """
    root = Path(path).expanduser()
    with _readable():
        classes = retried(lambda: _check(root, splits), root)
    return Summary(root=root, splits=tuple(splits), classes=tuple(classes))


def _check(root: Path, splits: Sequence[str]) -> list[str]:
    """``check_tree`` without its handling of what the file system refuses; returns the classes."""
    if not root.exists():
        raise _error(f"data path {_quote(root)} does not exist; give the directory of the data set")
    if not root.is_dir():
        raise _error(
            f"data path {_quote(root)} is a file; give the directory that holds {_and(splits)}"
        )
    missing = [split for split in splits if not (root / split).is_dir()]
    if missing:
        raise _error(_explain_missing(root, missing, splits))
    classes = {split: _class_folders(root / split) for split in splits}
    first = splits[0]
    for split in splits[1:]:
        if classes[split] != classes[first]:
            raise _error(_explain_difference(root, first, split, classes))
    for split in splits:
        empty = [name for name in classes[split] if not _holds_image(root / split / name)]
        if len(empty) == len(classes[split]):
            raise _error(
                f"{_quote(root / split)} holds {len(empty)} class folders and no image; put the "
                f"images there, with names that end in one of {' '.join(IMAGE_EXTENSIONS)}"
            )
        if empty:
            raise _error(
                f"{len(empty)} of {len(classes[split])} class folders of {_quote(root / split)} "
                f"hold no image ({_some(empty)}); fill or remove them"
            )
    return classes[first]


@dataclass(frozen=True, eq=False)
class FolderIndex:
    """The images of one split.

    Names stand in one byte array instead of a list of strings: about 32 bytes an image in all,
    and forked data workers share its pages, since no reference counts are written into it.
    """

    root: str
    split: str
    classes: tuple[str, ...]
    labels: NDArray[np.int32]
    _names: NDArray[np.uint8]
    _ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """The number of each class, as torchvision's ``ImageFolder`` gives it."""
        return {name: number for number, name in enumerate(self.classes)}

    def label(self, index: int) -> int:
        """The class number of an image, 0 to C - 1."""
        return int(self.labels[index])

    def path(self, index: int) -> str:
        """The path of an image's file."""
        return f"{self.root}/{self._relative(index)}"

    def item_id(self, index: int) -> str:
        """The path of an image below the root, for people: always printable as UTF-8."""
        return os.fsencode(self._relative(index)).decode("utf-8", "backslashreplace")

    def _relative(self, index: int) -> str:
        begin = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._names[begin : self._ends[index]].tobytes())
        return f"{self.split}/{self.classes[self.labels[index]]}/{name}"


def build_index(root: str | Path, split: str) -> FolderIndex:
    """Lists the images of one split, in torchvision's order.

    Opens no image and asks the file system for no file's status: 1.28 million images take about
    three seconds on a local disk whose directories are in memory.

    Args:
        root: The directory that holds the splits.
        split: ``train`` or ``val``.

    Raises:
        UserError: A class folder holds no image, or there is none.
    """
    summary = check_tree(root, [split])
    blobs: list[bytes] = []
    lengths: list[NDArray[np.int64]] = []
    counts: list[int] = []
    for name in summary.classes:
        with _readable():
            folder = summary.root / split / name
            names = [os.fsencode(image) for image in retried(partial(_images, folder), folder)]
        blobs.append(b"".join(names))
        lengths.append(np.fromiter(map(len, names), np.int64, len(names)))
        counts.append(len(names))
    return FolderIndex(
        root=str(summary.root),
        split=split,
        classes=summary.classes,
        labels=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        _names=np.frombuffer(b"".join(blobs), np.uint8),
        _ends=np.cumsum(np.concatenate(lengths)),
    )


def _class_folders(directory: Path) -> list[str]:
    names = sorted(entry.name for entry in _scan(directory) if entry.is_dir())
    if names:
        return names
    if _holds_image(directory):
        raise _error(
            f"{_quote(directory)} holds images, but no class folders; move each image into the "
            "folder of its class"
        )
    raise _error(f"{_quote(directory)} holds no class folders; put the data set there")


def _images(directory: Path) -> list[str]:
    """Paths below a class folder, with subfolders, in the order of torchvision's walk."""
    found: list[tuple[str, list[str]]] = []
    pending = [""]
    while pending:
        below = pending.pop()
        files = []
        for entry in _scan(directory / below):
            if entry.is_dir():
                pending.append(f"{below}{entry.name}/")
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                files.append(entry.name)
        found.append((below, sorted(files)))
    # torchvision sorts folders by their path, which has no slash at its end.
    found.sort(key=lambda item: item[0].rstrip("/"))
    return [below + file for below, files in found for file in files]


def _holds_image(directory: Path) -> bool:
    """Whether there is an image in a folder or below it; stops at the first one."""
    folders = []
    for entry in _scan(directory):
        if entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.is_dir():
            return True
        if entry.is_dir():
            folders.append(directory / entry.name)
    return any(_holds_image(folder) for folder in folders)


def _scan(directory: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        yield from entries


@contextmanager
def _readable() -> Iterator[None]:
    """Turns a refusal of the file system into an error that names the path."""
    try:
        yield
    except OSError as error:
        raise _error(
            f"{_quote(error.filename)} cannot be read ({error.strerror}); check its permissions"
        ) from error


def _explain_missing(root: Path, missing: list[str], splits: Sequence[str]) -> str:
    names = [entry.name for entry in _scan(root)]
    if not names:
        return f"data path {_quote(root)} is empty; put the data set there or give another path"
    problem = f"data path {_quote(root)} holds no {_and(missing, 'or')} directory"
    parent = root.resolve().parent
    for level in (parent, parent.parent):
        if all((level / split).is_dir() for split in splits):
            return f"{problem}; the data set begins higher up, so give {_quote(level)}"
    for name in sorted(names):
        if all((root / name / split).is_dir() for split in splits):
            return f"{problem}; the data set lies one level below, so give {_quote(root / name)}"
    others = [name for name in names if name.lower() in ("training", "validation", "test", "valid")]
    if others:
        return f"{problem}, but {_some(sorted(others))}; rename or link it to {_and(missing)}"
    return f"{problem}; put the images of {_and(missing)} there, one folder a class"


def _explain_difference(root: Path, first: str, second: str, classes: dict[str, list[str]]) -> str:
    parts = []
    for split, other in ((first, second), (second, first)):
        only = sorted(set(classes[split]) - set(classes[other]))
        if only:
            parts.append(f"{len(only)} only in {split} ({_some(only)})")
    return (
        f"the class folders of {first} and {second} in {_quote(root)} differ: {', '.join(parts)}; "
        "give both splits the same class folders"
    )


def _error(problem: str) -> UserError:
    return UserError(f"{problem}. Expected:\n{EXPECTED_TREE}")


def _quote(path: Path | str) -> str:
    return f"'{path}'"


def _and(names: Iterable[str], word: str = "and") -> str:
    return f" {word} ".join(names)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown}, ..." if len(names) > _NAMES_SHOWN else shown
