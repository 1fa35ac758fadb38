"""The processes that make batches: their signals, and the memory in which they hand them over."""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from multiprocessing.sharedctypes import RawValue

from zoo_common import beats
from zoo_common.errors import UserError

_PR_SET_PDEATHSIG = 1
_KILLED = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([^.]*)\.")
_SILENCE_LOOKS = 50  # of 20 ms each
_GONE = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) exited unexpectedly")


class WorkerInit:
    """Readies a data worker: ``worker_init_fn`` of one loader, to be closed before its workers end.

    A launcher and a terminal signal whole process groups, and it is the main process that
    decides what a signal means: it may still need batches to reach its last step. So workers
    ignore SIGINT and SIGHUP, and SIGTERM until the main process has called ``close``. A worker
    ends when its main process ends it or is gone: on Linux at once, elsewhere by torch's watchdog
    within 5 s. It tells the launcher where it is, as its rank does.
    """

    def __init__(self) -> None:
        self._closed = RawValue(ctypes.c_bool, True)
        self._dies_with_parent = False
        self._stacks: str | None = None
        self._scratch: str | None = None

    def open(self) -> None:
        """SIGTERM is ignored from here on; called in the thread that starts the workers."""
        self._closed.value = False
        # The kernel takes the end of the thread that forked for the end of the parent.
        main = threading.current_thread() is threading.main_thread()
        self._dies_with_parent = main and sys.platform == "linux"
        self._stacks = beats.stacks_of_this_process()
        self._scratch = _cleared_directory()
        _open_inits.add(self)

    def close(self) -> None:
        """SIGTERM ends a worker from here on; torch sends it to those that miss their message."""
        self._closed.value = True
        _open_inits.discard(self)

    def __call__(self, worker_id: int) -> None:
        """Runs in the worker; torch has set it to one thread."""
        if self._dies_with_parent:
            _die_with_parent()
        beats.start_in_data_worker(self._stacks)
        if self._scratch is not None:
            tempfile.tempdir = self._scratch
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_terminate)
        # A collection writes to every object it looks at: of those that were there at the fork,
        # each worker would get a copy of its own.
        gc.freeze()

    def _on_terminate(self, number: int, frame: types.FrameType | None) -> None:
        if self._closed.value:
            os._exit(0)


@functools.cache
def _cleared_directory() -> str | None:
    """Where a worker puts the socket over which it hands out batches; None: where Python does.

    The launcher clears its directory, while a worker that is killed would leave something in the
    system's. Names of sockets have to be short, and this one is, wherever the output is.
    """
    directory = beats.launchers_directory()
    if directory is None or sys.platform != "linux":
        return None
    place = f"/proc/{os.getpid()}/fd/{os.open(directory, os.O_RDONLY)}"
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{place}/{os.getpid()}.probe")
        os.unlink(f"{place}/{os.getpid()}.probe")  # noqa: PTH108
    except OSError:  # some file systems have no sockets
        return None
    return place


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # it died before the call


_open_inits: set[WorkerInit] = set()


@atexit.register
def _close_all() -> None:
    """Runs before multiprocessing's own exit function, which would wait for deaf workers."""
    for worker_init in list(_open_inits):
        worker_init.close()


def explain(error: BaseException) -> str | None:
    """One sentence about a data worker that died, if that is what an error came from.

    Torch raises its error wherever the main thread happens to be, so that another one may have
    been raised for it: causes and contexts are looked through.
    """
    words = None
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError):
            if killed := _KILLED.search(str(seen)):
                return _describe(killed[1], killed[2])
            if gone := _GONE.search(str(seen)):
                words = _describe(gone[1], "")
        if isinstance(seen, (ConnectionError, EOFError, FileNotFoundError)):
            words = words or _explain_silence()
        seen = seen.__cause__ or seen.__context__
    return words


def _explain_silence() -> str | None:
    """The same for a worker that died while it handed over a batch: its socket is gone before it.

    Nothing else that a training process starts is killed by a signal.
    """
    for _ in range(_SILENCE_LOOKS):
        try:
            status = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return None
        if status is not None and status.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
            kind = signal.strsignal(status.si_status)
            return _describe(str(status.si_pid), kind or str(status.si_status))
        time.sleep(0.02)
    return None


def _describe(pid: str, kind: str) -> str:
    names = {signal.strsignal(number): number for number in signal.valid_signals()}
    number = names.get(kind)
    name = number.name if isinstance(number, signal.Signals) else kind
    how = f"was killed by {name}" if name else "ended by itself"
    if number == signal.SIGBUS:
        hint = "/dev/shm may be full, or a disk may have failed under a mapped file"
        advice = "give more shared memory (docker run --shm-size) or take fewer data workers"
    elif number == signal.SIGKILL:
        hint = "the system may have run out of memory"
        advice = "take fewer data workers (data.workers) or a smaller --batch_size"
    else:
        hint, advice = "its own words, if any, stand above in this rank's log", "look there"
    return f"A data worker (process {pid}) {how}; {hint}: {advice}, and continue with --resume."


def check_shared_memory(needed: int, workers: int) -> None:
    """Workers hand over batches in /dev/shm, and die of a bus error when it is full.

    Args:
        needed: Bytes.
        workers: How many there are, for the message.

    Raises:
        UserError: There is not so much.
    """
    shared = "/dev/shm"
    if not os.path.isdir(shared):  # noqa: PTH112
        return
    free = shutil.disk_usage(shared).free
    if free < needed:
        raise UserError(
            f"{shared} has {free >> 20} MB free, and {workers} data workers need up to "
            f"{needed >> 20} MB of it; use fewer workers, a smaller batch size or more shared "
            "memory (docker run --shm-size)"
        )
