"""The processes that make batches: their signals, and the memory in which they hand them over."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import shutil
import signal
import types
from multiprocessing.sharedctypes import RawValue

from zoo_common.errors import UserError


class WorkerInit:
    """Readies a data worker: ``worker_init_fn`` of one loader, to be closed before its workers end.

    A launcher and a terminal signal whole process groups, and it is the main process that
    decides what a signal means: it may still need batches to reach its last step. So workers
    ignore SIGINT and SIGHUP, and SIGTERM until the main process has called ``close``. A worker
    ends when its main process ends it or is gone (torch's watchdog, within 5 s).
    """

    def __init__(self) -> None:
        self._closed = RawValue(ctypes.c_bool, True)

    def open(self) -> None:
        """SIGTERM is ignored from here on."""
        self._closed.value = False
        _open_inits.add(self)

    def close(self) -> None:
        """SIGTERM ends a worker from here on; torch sends it to those that miss their message."""
        self._closed.value = True
        _open_inits.discard(self)

    def __call__(self, worker_id: int) -> None:
        """Runs in the worker; torch has set it to one thread."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_terminate)
        # A collection writes to every object it looks at: of those that were there at the fork,
        # each worker would get a copy of its own.
        gc.freeze()

    def _on_terminate(self, number: int, frame: types.FrameType | None) -> None:
        if self._closed.value:
            os._exit(0)


_open_inits: set[WorkerInit] = set()


@atexit.register
def _close_all() -> None:
    """Runs before multiprocessing's own exit function, which would wait for deaf workers."""
    for worker_init in list(_open_inits):
        worker_init.close()


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
