"""The captions and pictures of a run: what stands in the card's two lists.

``CaptionIndex`` reads the 15 million rows of YFCC15M from a memory-mapped Arrow file, which
:mod:`declip.index_build` makes once; ``ValIndex`` holds the 50,000 rows of ImageNet's validation
pictures. No torch here: the converter to shards and the loader's processes start without it.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from declip.index_build import (
    Facts,
    RowError,
    build,
    clean_caption,
    clean_filename,
    facts_of,
    left_out_file,
    read_stamp,
    wait_until_settled,
)
from zoo_common.cache_files import Stamp, alone, cache_places, is_being_written
from zoo_common.errors import UserError
from zoo_common.flaky import read_text, retried
from zoo_common.yfcc import TRAIN_IMAGES, TRAIN_JSON, VAL_IMAGES, VAL_JSON, val_images

__all__ = [
    "CaptionIndex",
    "RowError",
    "ValIndex",
    "clean_caption",
    "open_index",
    "open_val_index",
]

_log = logging.getLogger(__name__)

_MARK_BYTES = 8
_NAMED = 3  # rows that are left out, in a message
_LOOKED_FOR = 32  # pictures, before a run starts
_HEAD_START_S = 20.0


class _Strings:
    """A column of a part: UTF-8 text and where each string begins in it.

    Arrow's own scalars take microseconds each; slices of its buffers take a tenth of that.
    """

    def __init__(self, column: pa.StringArray) -> None:
        _, offsets, text = column.buffers()
        if offsets is None or column.offset or column.null_count:
            raise ValueError("no column of texts as it is written here")
        self._offsets = memoryview(offsets).cast("B").cast("i")
        self._text = memoryview(text if text is not None else b"")

    def __getitem__(self, row: int) -> str:
        offsets = self._offsets
        return str(self._text[offsets[row] : offsets[row + 1]], "utf-8")


class CaptionIndex:
    """Pictures and their captions, in the order of the list.

    The rows stay in the mapped file, so that all processes of a machine share them. Pickling
    passes on paths, and unpickling opens the same build of the file again.

    Args:
        file: the Arrow file.
        images: the directory of the pictures.

    Raises:
        OSError: the file is not there.
        ValueError: it is damaged (``pa.ArrowInvalid`` is one), or another version's.
    """

    def __init__(self, file: Path, images: Path) -> None:
        self.file = file
        self.images = images
        self._root = f"{images}/"
        self._starts: list[int] = []
        self._filenames: list[_Strings] = []
        self._captions: list[_Strings] = []
        try:
            rows = self._map()
        except (pa.ArrowException, MemoryError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error})") from error
        if rows != self.facts.rows:
            raise ValueError("rows are missing")

    def _map(self) -> int:
        """Maps the file's rows; how many there are."""
        reader = pa.ipc.open_file(pa.memory_map(str(self.file)))
        if reader.schema.types != [pa.string(), pa.string()]:
            raise ValueError("other columns than an index has")
        self.facts: Facts = facts_of(reader.schema)
        rows = 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate()  # in time that does not grow with the rows
            self._starts.append(rows)
            self._filenames.append(_Strings(batch.column(0)))
            self._captions.append(_Strings(batch.column(1)))
            rows += batch.num_rows
        return rows

    def __len__(self) -> int:
        return self.facts.rows

    def path(self, index: int) -> str:
        """The picture's file."""
        return self._root + self.item_id(index)

    def item_id(self, index: int) -> str:
        """The picture's name below the directory of the pictures."""
        part, row = self._place(index)
        return self._filenames[part][row]

    def caption(self, index: int) -> str:
        """The caption; never empty."""
        part, row = self._place(index)
        return self._captions[part][row]

    @property
    def left_out(self) -> dict[str, int]:
        """How many rows of the list could not be used, by reason."""
        return self.facts.left_out

    @property
    def left_out_file(self) -> Path:
        """The list of these rows; it is there if there are any."""
        return left_out_file(self.file)

    def _place(self, index: int) -> tuple[int, int]:
        """The part of a row, and its number there."""
        assert 0 <= index < self.facts.rows, index
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.file, self.images, self.facts.mark)


def _reopen(file: Path, images: Path, mark: str) -> CaptionIndex:
    """Opens an index in another process, which has just been opened by the one that pickled it."""
    try:
        index = CaptionIndex(file, images)
    except (OSError, ValueError):
        index = None
    if index is None or index.facts.mark != mark:
        raise UserError(f"The index {file} was changed or deleted while in use; start again.")
    return index


def open_index(
    directory: Path,
    *,
    max_damaged: float = 0.01,
    local_rank: int = 0,
    cache: Path | None = None,
) -> CaptionIndex:
    """Opens the list of captions of the card's tree; the first time it is indexed, which takes
    minutes for YFCC15M.

    One process of a machine (or of all that share the directory) builds while the others wait. A
    list that has changed is indexed anew.

    Args:
        directory: holds ``yfcc15m_clean_open_data.json`` and the directory of the same name.
        max_damaged: the share of rows that may be unusable; of fewer than 1,000 rows as many as
            of 1,000.
        local_rank: number of this process on its machine. 0 has a head start, since its output is
            the one that is shown.
        cache: the directory for the index; for None see
            :func:`zoo_common.cache_files.cache_places`.

    Raises:
        UserError: the list cannot be read, too many of its rows or all cannot be used, the index
            cannot be written, or the pictures are not where the list says.
    """
    source, images = directory / TRAIN_JSON, directory / TRAIN_IMAGES
    places = cache_places(source, cache)
    if local_rank:
        _let_the_first_begin(source, images, places)
    index = _find(places, images, read_stamp(source)) or _make(places, source, images)
    _check_left_out(index, source, max_damaged)
    _check_pictures(index, source)
    return index


def _find(places: list[Path], images: Path, stamp: Stamp) -> CaptionIndex | None:
    for place in places:
        try:
            index = CaptionIndex(place, images)
        except (OSError, ValueError):
            continue
        if index.facts.stamp == stamp:
            return index
    return None


def _make(places: list[Path], source: Path, images: Path) -> CaptionIndex:
    """Builds the index, or waits until another process has."""
    refusals: list[str] = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _turn(place, source) as locked:
                stamp = wait_until_settled(source)
                found = _find(places, images, stamp)
                if found is None:
                    mark = secrets.token_hex(_MARK_BYTES)
                    build(source, place, stamp, mark=mark, resumable=locked)
                    found = CaptionIndex(place, images)
                    _tell_left_out(found, source)
            return found
        except OSError as error:
            refusals.append(f"in {place.parent} ({error.strerror or error})")
    raise UserError(
        f"The index of {source} cannot be written {' or '.join(refusals)}; give a directory that "
        "can (ZOO_DATA_DIR sets the default)."
    )


@contextmanager
def _turn(place: Path, source: Path) -> Iterator[bool]:
    """Holds the index's lock; says so if it has to wait for it."""
    with alone(place, wait=False) as locked:
        if locked:
            yield True
            return
    print(f"waiting for the process that indexes {source.name}", flush=True)
    with alone(place) as locked:
        yield locked


def _let_the_first_begin(source: Path, images: Path, places: list[Path]) -> None:
    """Waits a little until the index is there or being written by the machine's first process."""
    deadline = time.monotonic() + _HEAD_START_S
    while time.monotonic() < deadline:
        if any(map(is_being_written, places)) or _find(places, images, read_stamp(source)):
            return
        time.sleep(0.1)


def _tell_left_out(index: CaptionIndex, source: Path) -> None:
    if index.left_out:
        _log.warning("%s", _describe_left_out(index, source))


def _describe_left_out(index: CaptionIndex, source: Path) -> str:
    """How many rows cannot be used, the first ones, and where all are listed."""
    counts = Counter(index.left_out)
    bad = sum(counts.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    with index.left_out_file.open(encoding="utf-8") as lines:
        first = "; ".join(line.rstrip("\n") for _, line in zip(range(_NAMED), lines, strict=False))
    return (
        f"{bad} of the {bad + len(index)} rows of {source} cannot be used and are left out "
        f"({reasons}); the first: {first}; all are listed in {index.left_out_file}"
    )


def _check_left_out(index: CaptionIndex, source: Path, max_damaged: float) -> None:
    if index.facts.share_left_out > max_damaged or not len(index):
        raise UserError(
            f"{_describe_left_out(index, source)}; that is more than max_damaged={max_damaged:g} "
            "allows: mend the list, or allow more with data.max_damaged"
        )


def _check_pictures(index: CaptionIndex, source: Path) -> None:
    """Looks for a few pictures, spread over the list: one of them at least must be there."""
    looked_for = min(_LOOKED_FOR, len(index))
    paths = [Path(index.path(len(index) * n // looked_for)) for n in range(looked_for)]
    if not any(map(_is_file, paths)):
        raise UserError(
            f"None of {looked_for} pictures of {source} that were looked for is there, the first "
            f"is {str(paths[0])[:500]}; put the pictures below {index.images} under the names of "
            "the list."
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for one
        return False


class ValIndex:
    """ImageNet's validation pictures with their classes; a source for ``zoo_common.data``.

    Args:
        images: the directory of the pictures.
        names: their names there.
        labels: the number of each one's class.
        classes: the classes' names, by number.
    """

    def __init__(
        self, images: Path, names: list[str], labels: list[int], classes: list[str]
    ) -> None:
        # Arrays, so that forked workers, which count references, do not copy 50,000 strings.
        self._names: NDArray[np.str_] = np.array(names)
        self._labels = np.array(labels, np.int64)
        self._root = f"{images}/"
        self.classes = classes

    def __len__(self) -> int:
        return len(self._labels)

    def path(self, index: int) -> str:
        """The picture's file."""
        return self._root + self.item_id(index)

    def item_id(self, index: int) -> str:
        """The picture's name below the directory of the pictures."""
        return str(self._names[index])

    def label(self, index: int) -> int:
        """The number of the picture's class."""
        return int(self._labels[index])


def open_val_index(directory: Path) -> ValIndex:
    """Opens the list of validation pictures of the card's tree.

    A caption, which upstream's reader asks for and the card's list has not, is not needed.

    Args:
        directory: holds ``val_official.json`` and ``imagenet_val`` or ``imagenet_valid``.

    Raises:
        UserError: a row cannot be used, the labels are not 0 to C - 1 with a name each, or
            pictures are missing.
    """
    source = directory / VAL_JSON
    try:
        lines = read_text(source, "utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"{source} cannot be read ({reason}); give a list that can.") from error
    names: list[str] = []
    labels: list[int] = []
    names_of: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            name, label, label_name = _read_val_row(line)
            if names_of.setdefault(label, label_name) != label_name:
                raise RowError(f"label {label} is {label_name} here, {names_of[label]} above")
        except RowError as error:
            raise UserError(
                f"Line {number} of {source} cannot be used ({error}); it must be "
                '{"filename": ..., "label": NUMBER, "label_name": ...}.'
            ) from None
        names.append(name)
        labels.append(label)
    _check_val(source, names, names_of)
    images = val_images(directory) or directory / VAL_IMAGES[0]
    _check_val_pictures(images, source, names)
    return ValIndex(images, names, labels, [names_of[label] for label in range(len(names_of))])


def _read_val_row(line: str) -> tuple[str, int, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise RowError("not JSON") from None
    if not isinstance(row, dict):
        raise RowError("not a JSON object")
    name = clean_filename(row.get("filename"))
    label, label_name = row.get("label"), row.get("label_name")
    if isinstance(label, str) and label.isdecimal() and len(label) < 20:
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise RowError("no label")
    if not isinstance(label_name, str) or not label_name.strip():
        raise RowError("no label_name")
    return name, label, label_name.strip()


def _check_val(source: Path, names: list[str], names_of: dict[int, str]) -> None:
    if not names:
        raise UserError(f"{source} is empty; give a list of validation pictures.")
    gap = next((label for label in range(len(names_of)) if label not in names_of), None)
    if gap is not None:
        raise UserError(
            f"{source} has labels up to {max(names_of)} and no picture of label {gap}; labels "
            "must be numbered from 0 without a gap, since each is a class of the evaluation."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{source} names {len(twice)} pictures twice, such as {twice[0]}.")


def _check_val_pictures(images: Path, source: Path, names: list[str]) -> None:
    try:
        present = retried(lambda: {entry.name for entry in images.iterdir()}, images)
    except OSError as error:
        raise UserError(
            f"{images} cannot be read ({error.strerror}); put the validation pictures there."
        ) from error
    missing = [name for name in names if name not in present and not _is_file(images / name)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} pictures of {source} are missing, the first is "
            f"{str(images / missing[0])[:500]}; add them, or take them out of the list."
        )
