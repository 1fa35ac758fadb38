"""Files made from a data set's files and kept: where they are, who writes them, are they fresh.

Torch-free.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from zoo_common import sample
from zoo_common.beats import beat

ENDING = ".zoo-cache"
"""Of the names of such files."""

_FOLDER = "annotation-caches"
_MARK_BYTES = 6  # random bytes in a temporary name
_ASKS_EVERY_S = 0.1
# A file changed twice within one tick of its file system's clock can keep its time of change.
# Whole seconds are a sign of a coarse clock (2 s on FAT); the kernel's own tick is up to 10 ms.
_COARSE_TICK_NS = 2_000_000_000
_FINE_TICK_NS = 50_000_000


class Stamp(NamedTuple):
    """What the file system says of a file without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Of a file's status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def is_settled(self, read_at_ns: int) -> bool:
        """Whether a change after ``read_at_ns`` would certainly have shown in the times."""
        coarse = self.mtime_ns % 1_000_000_000 == 0
        tick = _COARSE_TICK_NS if coarse else _FINE_TICK_NS
        return read_at_ns - max(self.mtime_ns, self.ctime_ns) > tick


def cache_places(source: Path, directory: Path | None = None) -> list[Path]:
    """Where the cache of a file may be, the best place first.

    Args:
        source: the file that it is made from.
        directory: where the cache is kept. If None: beside the source, or where that cannot be
            written or is a data set that the zoo made, in ``annotation-caches`` below
            :func:`zoo_common.sample.default_root`.
    """
    absolute = source.absolute()
    mark = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
    apart = f"{source.name}-{mark}{ENDING}"
    if directory is not None:
        return [directory / apart]
    root = sample.default_root()
    elsewhere = root / _FOLDER / apart
    # What the zoo made itself is known to be whole by the number of its files.
    if absolute.is_relative_to(root):
        return [elsewhere]
    return [absolute.with_name(source.name + ENDING), elsewhere]


def temporary_name(place: Path) -> Path:
    """A new name beside a cache, to write it under; :func:`alone` clears what is left of such."""
    return place.with_name(f".{place.name}.{secrets.token_hex(_MARK_BYTES)}")


def is_being_written(place: Path) -> bool:
    """Whether someone holds the lock of :func:`alone`, or was killed while holding it."""
    return _lock_of(place).exists()


@contextmanager
def alone(place: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a cache that is written, and clears what killed writers left.

    Yields:
        Whether the lock is held. It is not where the file system has no locks (several may write
        at once then; the last one's file stays), or where another holds it and ``wait`` is False.
    """
    path = _lock_of(place)
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        locked = _lock(lock, wait=wait)
        # A writer deletes its lock's file when it is done; who waited then starts over.
        if not locked or _is_same_file(lock, path):
            break
        os.close(lock)
    try:
        if locked:
            for left in place.parent.glob(f".{glob.escape(place.name)}.{'?' * 2 * _MARK_BYTES}"):
                left.unlink(missing_ok=True)
        yield locked
    finally:
        if locked:
            with suppress(OSError):
                path.unlink()
        os.close(lock)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock is held now; who waits for it beats, since it may take long."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                return False
        except OSError:
            return False
        else:
            return True
        beat("waiting for a process that makes an index")
        time.sleep(_ASKS_EVERY_S)


def _lock_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
