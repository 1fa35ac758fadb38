"""Where each sample of WebDataset shards lies: an index beside them, or made once from them.

``shards.json`` lists the shards with their sizes, ``shards.npy`` has a row for each sample, in
the order of the shards. With it any sample is one read from one file, so that the order of
training is free, a position is a number, and nothing is read twice to find it again.

A sample is what the webdataset library takes for one: neighbours in the tar file whose names are
equal up to the first dot. Of these, one picture and one caption (``.txt``, or ``caption`` of a
``.json``) are taken, and everything else is passed over: other files, links, devices, names that
lead out of a directory, sizes beyond reason. Nothing is ever unpacked to a disk or unpickled.

Shape letters: N samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import secrets
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from zoo_common import sample, shard_names
from zoo_common.beats import beat
from zoo_common.cache_files import alone
from zoo_common.errors import UserError
from zoo_common.flaky import retried

_log = logging.getLogger(__name__)

BLOCK = 512
"""Bytes of a tar block; every member begins at one, after the block of its header."""

ROW = np.dtype(
    [
        ("image", "<u4"),  # block at which the picture's bytes begin
        ("image_bytes", "<u4"),
        ("caption", "<u4"),
        ("caption_bytes", "<u4"),
        ("is_json", "u1"),  # the caption is a key of a JSON object, not the text itself
    ]
)
"""Where a sample lies in its shard."""

Rows = NDArray[np.void]

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
MAX_PICTURE_BYTES = 128 << 20
MAX_CAPTION_BYTES = 1 << 20

_ROWS_NAME = "shards.npy"
_FORMAT = 1
_MAX_HEADER_BYTES = 1 << 20
_MAX_SHARD_BYTES = BLOCK << 32
_SCANNERS = 8
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Shard:
    """What an index says of a shard.

    Attributes:
        name: of its file.
        samples: how many it has.
        bytes: its file's size.
        sha256: its file's checksum; empty where nobody computed it.
        passed_over: members that belong to no sample.
        damage: why what follows its last sample cannot be read; empty for a whole shard.
    """

    name: str
    samples: int
    bytes: int
    sha256: str = ""
    passed_over: int = 0
    damage: str = ""


class Indexed(NamedTuple):
    """Shards with the rows of their samples."""

    shards: list[Shard]
    rows_N: Rows


def scan(path: Path) -> Indexed:
    """Finds the samples of one tar file by its headers; pictures are not read.

    Raises:
        UserError: the file cannot be read, or is no plain tar file.
    """
    try:
        return retried(lambda: _scan(path), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check it.") from None


def _scan(path: Path) -> Indexed:
    rows: list[tuple[int, ...]] = []
    passed_over = 0
    key, found = "", dict[str, tuple[int, int]]()  # of the sample that is being collected
    damage = ""
    with path.open("rb", buffering=0) as raw:
        size = os.fstat(raw.fileno()).st_size
        members = _members(raw, size)
        while True:
            try:
                member = next(members, None)
            except (tarfile.TarError, ArithmeticError, LookupError, ValueError) as error:
                # A size beyond all files raises what seeking there does.
                damage, member = str(error) or "it is cut off", None
            next_key, kind = _kind(member) if member else ("", "")
            if member is None or next_key != key:
                row = _row(found)
                rows += [row] if row else []
                passed_over += len(found) if not row else 0
                key, found = next_key, {}
            if member is None:
                break
            if kind and kind not in found:
                found[kind] = member.offset_data // BLOCK, member.size
            else:
                passed_over += not member.isdir()
    if damage and not rows:
        raise UserError(f"{path} is no plain tar file ({damage}): restore it, or unpack a .gz.")
    shard = Shard(path.name, len(rows), size, passed_over=passed_over, damage=damage)
    return Indexed([shard], np.array(rows, ROW))


class _Headers(io.BufferedReader):
    """Refuses a header that would have tarfile read as much memory as it claims to be long."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of it claims {size} bytes")
        return super().read(size)


def _members(raw: io.FileIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The members whose bytes are all there.

    Raises:
        tarfile.ReadError: the file ends too early, or goes on as something else.
    """
    if size > _MAX_SHARD_BYTES:
        raise tarfile.ReadError("it is larger than 2 TB")
    with (
        _Headers(raw) as stream,
        tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="replace") as archive,
    ):
        begin = 0
        while (member := archive.next()) is not None:
            if member.offset_data <= begin or member.size < 0:
                raise tarfile.ReadError("its headers run in a circle")
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"it is cut off in {member.name}")
            begin = member.offset_data
            yield member
            archive.members.clear()  # type: ignore[attr-defined]  # or else all stay in memory
        # tarfile takes a bad header for the end.
        stream.seek(archive.offset)
        if stream.read(BLOCK) != bytes(BLOCK):
            raise tarfile.ReadError(f"it has no end mark at byte {archive.offset}")


def _kind(member: tarfile.TarInfo) -> tuple[str, str]:
    """The sample that a member belongs to, and what it is there: picture, txt, json or nothing."""
    key, ending = base_plus_ext(member.name)
    if key is None:
        return member.name, ""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        return key, ""
    if not member.isreg() or member.sparse is not None:
        return key, ""
    if ending.lower() in PICTURES:
        return key, "picture" if 0 < member.size <= MAX_PICTURE_BYTES else ""
    if ending.lower() in ("txt", "json"):
        return key, ending.lower() if 0 < member.size <= MAX_CAPTION_BYTES else ""
    return key, ""


def _row(found: dict[str, tuple[int, int]]) -> tuple[int, ...] | None:
    """A row of what was found of a sample; None without a picture or a caption."""
    caption = found.get("txt") or found.get("json")
    if caption is None or "picture" not in found:
        return None
    return (*found["picture"], *caption, "txt" not in found)


# ---------------------------------------------------------------------------- files


def save_index(directory: Path, indexed: Indexed, **facts: Any) -> None:
    """Writes the index's two files, ``shards.json`` last: where it is, the index is whole.

    Args:
        directory: where the shards are, or where their index is kept.
        indexed: the shards and their rows.
        facts: what else ``shards.json`` is to say.

    Raises:
        OSError: it cannot be written.
    """
    assert len(indexed.rows_N) == sum(shard.samples for shard in indexed.shards)
    with replacing(directory / _ROWS_NAME) as stream:
        np.save(stream, indexed.rows_N, allow_pickle=False)
    content = {
        "format": _FORMAT,
        "samples": len(indexed.rows_N),
        **facts,
        "shards": [asdict(shard) for shard in indexed.shards],
    }
    with replacing(directory / shard_names.INDEX_NAME) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name when it is whole and on the disk, and is gone otherwise."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def load_index(directory: Path) -> Indexed:
    """Maps an index's rows; all who map them share their memory.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    content = shard_names.read_index(directory)
    path = directory / _ROWS_NAME
    try:
        if content["format"] != _FORMAT:
            raise UserError(
                f"{directory / shard_names.INDEX_NAME} is of another version of the converter: "
                "remove it to have the shards counted."
            )
        shards = [_shard(entry) for entry in content["shards"]]
        rows_N = map_rows(path)
        if rows_N.dtype != ROW or rows_N.shape != (sum(shard.samples for shard in shards),):
            raise ValueError
    except UserError:
        raise
    except Exception:  # numpy follows a damaged header until anything fails
        raise UserError(
            f"The index of {directory} is damaged: restore {path.name} and "
            f"{shard_names.INDEX_NAME}, or remove both to have the shards counted."
        ) from None
    return Indexed(shards, rows_N)


def _shard(entry: dict[str, Any]) -> Shard:
    """An entry of ``shards.json``.

    Raises:
        TypeError: it is none.
    """
    shard = Shard(**entry)
    counts = (shard.samples, shard.bytes, shard.passed_over)
    texts = (shard.name, shard.sha256, shard.damage)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise TypeError
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    return shard


def map_rows(path: Path) -> Rows:
    """Maps a file of rows, read-only."""
    # A plain array: each access to a memmap makes another memmap, ten times as slowly.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # type: ignore[no-any-return]


def find_index(paths: Sequence[Path]) -> tuple[Path, Indexed]:
    """The index of these shards: the one beside them, or one made now and kept in the cache.

    Returns:
        The directory of the index, which may list more shards, and the index.

    Raises:
        UserError: a shard is not the one of the index beside it, cannot be read, or the cache
            cannot be written.
    """
    directory = paths[0].parent
    if (directory / shard_names.INDEX_NAME).is_file() and all(
        path.parent == directory for path in paths
    ):
        indexed = load_index(directory)
        _check_shards(paths, indexed.shards)
        return directory, indexed
    stamps = [
        (str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths
    ]
    mark = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:24]
    cache = sample.default_root() / "shard-indexes" / mark
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with alone(cache / shard_names.INDEX_NAME):
            if not (cache / shard_names.INDEX_NAME).is_file():
                save_index(cache, _scan_all(paths))
    except OSError as error:
        raise UserError(
            f"The index of the shards cannot be written to {cache} ({error.strerror or error}): "
            "set ZOO_DATA_DIR to a directory that can."
        ) from None
    return cache, load_index(cache)


def _check_shards(paths: Sequence[Path], shards: Sequence[Shard]) -> None:
    known = {shard.name: shard for shard in shards}
    wrong = [
        path.name
        for path in paths
        if path.name not in known or path.stat().st_size != known[path.name].bytes
    ]
    if wrong:
        names = ", ".join(wrong[:_NAMES_SHOWN]) + (", ..." if len(wrong) > _NAMES_SHOWN else "")
        raise UserError(
            f"{len(wrong)} shards in {paths[0].parent} are not as long as "
            f"{shard_names.INDEX_NAME} says, or not in it ({names}): copy them again, or remove "
            f"{shard_names.INDEX_NAME} to have the shards counted as they are."
        )
    if len(paths) < len(shards):
        _log.warning(
            "%d of the %d shards that %s lists are used",
            len(paths),
            len(shards),
            paths[0].parent / shard_names.INDEX_NAME,
        )


def _scan_all(paths: Sequence[Path]) -> Indexed:
    """Scans with threads: on network disks most of the time is spent waiting."""
    _log.info("counting the samples of %d shards; this is done once", len(paths))
    shards: list[Shard] = []
    rows: list[Rows] = []
    with ThreadPoolExecutor(_SCANNERS) as pool:
        for indexed in pool.map(scan, paths):
            beat("counting the samples of shards")
            shards += indexed.shards
            rows.append(indexed.rows_N)
    return Indexed(shards, np.concatenate(rows))
