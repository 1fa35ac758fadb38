"""Reading from disks that fail for a moment: network disks, and machines that are short of memory.

What a reader of a data set reads once and as a whole goes through here. An error that may pass is
tried again, with growing waits and not for ever; the last error is raised as it came, so that the
reader names the file in its own words.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

WAITS_S = (0.1, 0.5, 2.0, 5.0, 10.0)
"""Seconds before each further try; with the reads themselves about 20 s in all."""

_NAMES = (
    "EIO ESTALE ETIMEDOUT EREMOTEIO ECOMM EPROTO ENOLINK ENETDOWN ENETUNREACH ENETRESET "
    "ECONNABORTED ECONNREFUSED ECONNRESET ENOTCONN ESHUTDOWN EHOSTDOWN EHOSTUNREACH "
    "EAGAIN EBUSY EINTR ENOBUFS ENFILE"
)
PASSING = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
"""Errors that may pass. A missing file, a lack of rights or of space do not."""

# By error number, whether it was told: memory that forked data workers share with their rank.
_told = mmap.mmap(-1, 1024)


def retried(read: Callable[[], Result], path: str | os.PathLike[str]) -> Result:
    """What ``read`` returns, which is called again after an error that may pass.

    The first retry for each kind of error is told in the log.

    Args:
        read: begins from the start each time that it is called.
        path: the file, for the log.

    Raises:
        OSError: the last one.
    """
    for wait_s in WAITS_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            _tell(error, path)
        time.sleep(wait_s)
    return read()


def read_bytes(path: str | os.PathLike[str], most: int = -1) -> bytes:
    """A file's content, or its first ``most`` bytes; see :func:`retried`."""

    def read() -> bytes:
        with open(path, "rb") as stream:  # noqa: PTH123 - Path() costs as much as the read
            return stream.read(most)

    return retried(read, path)


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """A text file's content; see :func:`retried`.

    Raises:
        UnicodeDecodeError: it is not in this encoding.
    """
    return retried(lambda: Path(path).read_text(encoding=encoding), path)


def _tell(error: OSError, path: str | os.PathLike[str]) -> None:
    assert error.errno is not None
    if _told[error.errno]:
        return
    _told[error.errno] = 1
    print(
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {os.fspath(path)} could not be read "
        f"({error.strerror}): tried again, up to {len(WAITS_S)} times in {sum(WAITS_S):.0f} s, "
        "here and wherever this happens",
        flush=True,
    )
