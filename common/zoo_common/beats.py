"""Signs of life of one rank: what it does now, and where, for the launcher's :mod:`watch`.

A beat is a write into memory that the launcher reads too, so it costs less than a microsecond and
can stand in every step. Where a rank is, is asked for by SIGUSR2: Python's fault handler then
writes the stack of each thread. It does so inside the signal handler, also while the rank waits
in a collective or holds the interpreter's lock.

Beats and stacks are written to files in memory: a disk that is full or stands still, which the
launcher shall see, must not hold up the rank itself.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
from pathlib import Path

FORMAT = struct.Struct("=Q?64s")
"""A beat: how many there were, whether work has begun, and UTF-8 text padded with zeros."""

_beats: _Beats | None = None
_directory: Path | None = None
_stacks: str | None = None


class _Beats:
    """The memory that a rank shares with its launcher."""

    def __init__(self, path: str) -> None:
        handle = os.open(path, os.O_RDWR)
        os.ftruncate(handle, FORMAT.size)
        self._memory = mmap.mmap(handle, FORMAT.size)
        os.close(handle)
        self._count = 0
        self._working = False
        self.write("its start", False)

    def write(self, what: str, working: bool) -> None:
        self._count += 1
        self._working |= working
        FORMAT.pack_into(self._memory, 0, self._count, self._working, what.encode())


def beat_file(directory: Path, local_rank: int) -> Path:
    """Three lines of a rank that has started: its process, and its files of beats and stacks."""
    return directory / f"{local_rank}.beat"


def start(directory: Path, local_rank: int) -> None:
    """Lets this process beat, and answer SIGUSR2 with its stacks; the first thing that a rank does.

    Args:
        directory: the launcher's, which is there.
        local_rank: this rank's number on its machine.

    Raises:
        OSError: the directory cannot be written to.
    """
    global _beats, _directory
    beats = _memory_file(directory, f"{local_rank}.memory")
    stacks = _memory_file(directory, f"{local_rank}.stacks")
    _beats = _Beats(beats)
    _answer(stacks)
    _directory = directory
    # Last, and at once: a rank with a beat file answers.
    file = beat_file(directory, local_rank)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(f"{os.getpid()}\n{beats}\n{stacks}\n", encoding="utf-8")
    partial.replace(file)


def _memory_file(directory: Path, name: str) -> str:
    """A file that the launcher can open while this process lives; on a disk only without Linux."""
    if hasattr(os, "memfd_create"):
        return f"/proc/{os.getpid()}/fd/{os.memfd_create(f'zoo-{name}')}"
    (directory / name).write_bytes(b"")
    return str(directory / name)


def beat(what: str, working: bool = False) -> None:
    """Says what the rank begins to do, such as "step 12"; of the main thread only.

    Does nothing in a process that was not started by the launcher, and in a data worker.

    Args:
        what: fits behind "12 s in"; 64 bytes of it are kept.
        working: the rank has come so far that the limit for a step counts from here on. Imports
            and indexing take their time once.
    """
    if _beats is not None:
        _beats.write(what, working)


def launchers_directory() -> Path | None:
    """What :func:`start` was given, which the launcher clears; None where there is no launcher."""
    return _directory


def stacks_of_this_process() -> str | None:
    """What :func:`start_in_data_worker` is to be given; None where no launcher listens."""
    return _stacks


def start_in_data_worker(stacks: str | None) -> None:
    """Lets a data worker answer SIGUSR2 as its rank does; it has no beats of its own.

    Args:
        stacks: its rank's :func:`stacks_of_this_process`.
    """
    global _beats
    _beats = None  # shared with the rank after a fork
    if stacks is not None:
        _answer(stacks)


def _answer(path: str) -> None:
    """Appends the stacks of this process's threads to a file whenever it gets SIGUSR2."""
    global _stacks
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    faulthandler.register(signal.SIGUSR2, file=handle, all_threads=True, chain=False)
    _stacks = path
