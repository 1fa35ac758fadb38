"""Arrays made from a large file, kept in a file of their own that all processes map.

A cache is one file: a preamble, a header (JSON), and the arrays. It is written to a temporary
name and renamed, so it is there as a whole or not at all; one process builds while the others
wait for it. It belongs to the source's content: the source's size and times vouch for that where
they can, its SHA-256 where they cannot.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from zoo_common.cache_files import Stamp, alone, cache_places, temporary_name
from zoo_common.errors import UserError
from zoo_common.flaky import retried

Arrays = dict[str, NDArray[Any]]

_MAGIC = b"ZOOARRAY"
_PREAMBLE = struct.Struct("<8sQQ")  # magic, bytes of the header, the header's CRC
_ALIGNMENT = 64
_KINDS = ("|b1", "|u1", "<i4", "<i8", "<f4", "<f8")  # of arrays; others of NumPy's can hold objects


class Built(NamedTuple):
    """What a cache holds: arrays by name, and facts as JSON values."""

    arrays: Arrays
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Mapped:
    """An open cache. Its arrays are read-only and share their pages with all who map the file.

    Pickling passes on the path alone; unpickling maps the same content again.
    """

    path: Path
    fingerprint: str
    arrays: Arrays
    facts: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.fingerprint)


class _Header(msgspec.Struct):
    """What stands in a cache before its arrays; of each its name, kind, shape, place and sum."""

    version: str
    stamp: tuple[int, int, int]
    settled: bool
    sha256: str
    arrays: list[tuple[str, str, tuple[int, ...], int, int]]
    facts: dict[str, Any]


class _Source(NamedTuple):
    """A source's content and what was known of it when it was read."""

    stamp: Stamp
    settled: bool
    sha256: str
    data: bytes


def open_cached(
    source: Path,
    build: Callable[[bytes], Built],
    *,
    version: str,
    directory: Path | None = None,
) -> Mapped:
    """Maps the cache of a file; builds it where there is none, or a stale or damaged one.

    Args:
        source: the file that the arrays are made from.
        build: makes the arrays from the file's bytes.
        version: of ``build``; a cache of another one is built anew.
        directory: where the cache is kept. If None: beside the source, or where that cannot be
            written or is a data set that the zoo made, in ``annotation-caches`` below
            :func:`zoo_common.sample.default_root`.

    Raises:
        UserError: the source cannot be read or changes meanwhile, or no cache can be written.
    """
    finder = _Finder(source, version, cache_places(source, directory))
    found = finder.find()
    if found is not None:
        return found
    refusals: list[str] = []
    for place in finder.places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with alone(place):
                # Another process may have built it while this one waited.
                found = finder.find()
                if found is None:
                    found = _build(finder.read(), build, version, place)
            return found
        except OSError as error:
            refusals.append(f"in {place.parent} ({error.strerror or error})")
    raise UserError(
        f"The cache of {source} cannot be written {' or '.join(refusals)}; give a directory that "
        "can (ZOO_DATA_DIR sets the default)."
    )


class _Finder:
    """Looks for a valid cache in the places where there can be one; reads the source once."""

    def __init__(self, source: Path, version: str, places: list[Path]) -> None:
        self.places = places
        self._path = source
        self._version = version
        self._source: _Source | None = None

    def find(self) -> Mapped | None:
        with _readable(self._path):
            stamp = Stamp.of(retried(self._path.stat, self._path))
        for place in self.places:
            header = _read_header(place)
            if header is None or header["version"] != self._version:
                continue
            known = header["stamp"] == list(stamp) and header["settled"]
            # Other times do not mean another content: a copied data set has new ones.
            if not known and (
                header["stamp"][0] != stamp.size or header["sha256"] != self.read().sha256
            ):
                continue
            mapped = _map(place, header)
            if mapped is None or not _is_whole(mapped.arrays, header):
                continue
            if not known:
                self._renew(place, mapped)
            return mapped
        return None

    def read(self) -> _Source:
        """The source as it is now: read again only if its stamp has changed."""
        with _readable(self._path):
            return retried(self._read_now, self._path)

    def _read_now(self) -> _Source:
        with self._path.open("rb") as stream:
            begin = time.time_ns()
            stamp = Stamp.of(os.fstat(stream.fileno()))
            if self._source is not None and self._source.stamp == stamp:
                return self._source
            data = stream.read()
            after = Stamp.of(os.fstat(stream.fileno()))
        if after != stamp or len(data) != stamp.size:
            raise UserError(f"{self._path} changes while it is read; start again when it is whole.")
        sha256 = hashlib.sha256(data).hexdigest()
        self._source = _Source(stamp, stamp.is_settled(begin), sha256, data)
        return self._source

    def _renew(self, place: Path, mapped: Mapped) -> None:
        """Notes the source's new times, so that the next opening need not read it."""
        source = self.read()
        if source.settled:
            with suppress(OSError), alone(place, wait=False) as held:
                if held:
                    _write(place, Built(mapped.arrays, mapped.facts), source, self._version)


def _build(source: _Source, build: Callable[[bytes], Built], version: str, place: Path) -> Mapped:
    built = build(source.data)
    _write(place, built, source, version)
    header = _read_header(place)
    mapped = None if header is None else _map(place, header)
    if header is None or mapped is None or header["sha256"] != source.sha256:
        raise OSError(errno.EIO, "what was written there cannot be read back")
    return mapped


def _write(place: Path, built: Built, source: _Source, version: str) -> None:
    """Writes a cache to a temporary name and renames it."""
    entries = []
    offsets = []
    position = 0
    for name, array in built.arrays.items():
        position = _aligned(position)
        offsets.append(position)
        entries.append([name, array.dtype.str, array.shape, position, _checksum(array)])
        position += array.nbytes
    header = {
        "version": version,
        "stamp": source.stamp,
        "settled": source.settled,
        "sha256": source.sha256,
        "arrays": entries,
        "facts": built.facts,
    }
    text = json.dumps(header).encode()
    text += b" " * (-(_PREAMBLE.size + len(text)) % _ALIGNMENT)
    temporary = temporary_name(place)
    try:
        with temporary.open("xb") as stream:
            stream.write(_PREAMBLE.pack(_MAGIC, len(text), zlib.crc32(text)) + text)
            begin = stream.tell()
            for offset, array in zip(offsets, built.arrays.values(), strict=True):
                stream.write(bytes(begin + offset - stream.tell()))
                stream.write(np.ascontiguousarray(array).data)
            stream.flush()
            # Without it a loss of power could leave the name with nothing behind it.
            os.fsync(stream.fileno())
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _read_header(place: Path) -> dict[str, Any] | None:
    """The header of a cache, with ``begin``, where its arrays begin; None if there is none."""
    try:
        with place.open("rb") as stream:
            preamble = stream.read(_PREAMBLE.size)
            if len(preamble) < _PREAMBLE.size:
                return None
            magic, length, crc = _PREAMBLE.unpack(preamble)
            if magic != _MAGIC or length > os.fstat(stream.fileno()).st_size:
                return None
            text = stream.read(length)
    except OSError:
        return None
    if zlib.crc32(text) != crc:
        return None
    try:
        msgspec.json.decode(text, type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    header: dict[str, Any] = json.loads(text)
    header["begin"] = _PREAMBLE.size + length
    return header


def _map(place: Path, header: Mapping[str, Any]) -> Mapped | None:
    """Maps a cache's arrays; None if the file is shorter than its header says, or gone."""
    try:
        with place.open("rb") as stream:
            memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    arrays: Arrays = {}
    for name, kind, shape, offset, _ in header["arrays"]:
        if kind not in _KINDS:
            return None
        dtype = np.dtype(kind)
        count = math.prod(shape)
        begin = header["begin"] + offset
        if min((offset, *shape)) < 0 or begin + count * dtype.itemsize > len(memory):
            return None
        if count:
            arrays[name] = np.frombuffer(memory, dtype, count, begin).reshape(shape)
        else:
            arrays[name] = np.empty(shape, dtype)
    return Mapped(place, header["sha256"], arrays, header["facts"])


def _reopen(place: Path, fingerprint: str) -> Mapped:
    """Maps a cache in another process, which has just been checked by the one that pickled it."""
    header = _read_header(place)
    mapped = None if header is None else _map(place, header)
    if mapped is None or mapped.fingerprint != fingerprint:
        raise UserError(f"The cache {place} was changed or deleted while in use; start again.")
    return mapped


def _is_whole(arrays: Arrays, header: Mapping[str, Any]) -> bool:
    return all(_checksum(arrays[name]) == total for name, *_, total in header["arrays"])


def _checksum(array: NDArray[Any]) -> int:
    """The sum of an array's 8-byte words and of its last bytes: as fast as memory is read."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    words = len(data) // 8
    total = int(data[: words * 8].view(np.uint64).sum(dtype=np.uint64))
    return total + int(data[words * 8 :].sum())


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); give an annotations file that can."
        ) from error
