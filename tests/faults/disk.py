"""A disk that fails on demand, for programs that a test starts: ``disk.c``, preloaded.

::

    broken = rule(output / "checkpoints", "ENOSPC", calls=["write"], at=3, times=0)
    subprocess.run(command, env={**os.environ, **environment(broken)})

It stands before libc, so it meets what Python and torch do with files, but not what libc does
inside itself: a ``FILE`` is seen when it is opened and not when it is read.
"""

import atexit
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("disk.c")


@cache
def library() -> Path:
    """The built library; skips the test where it cannot be built."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("the disk that fails on demand needs Linux and a C compiler")
    directory = tempfile.mkdtemp(prefix="zoo-disk-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    built = Path(directory, "disk.so")
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", str(SOURCE), "-o"]
    subprocess.run([*command, str(built), "-ldl", "-pthread"], check=True)
    return built


def rule(
    under: Path,
    do: str = "nothing",
    *,
    at: int = 1,
    times: int = 1,
    calls: Sequence[str] = (),
    name: str = "",
    each: bool = False,
    seconds: float = 0.0,
    free_bytes: int | None = None,
    only_while: Path | None = None,
    trace: Path | None = None,
) -> str:
    """What happens to which calls.

    Args:
        under: the directory; calls about paths elsewhere are let through and not counted.
        do: ``kill`` the process before the call; fail with the error of this name (``ENOSPC``,
            ``EDQUOT``, ``EROFS``, ``EIO``, ``ESTALE``, ``ETIMEDOUT``, ``EPERM``, ``EREMOTEIO``,
            ``EOPNOTSUPP``); ``short``: write or read half; ``tear``: write half and be killed;
            ``stall``: sleep first; or ``nothing``.
        at: the number of the call that it happens to, from 1.
        times: to how many calls from there on; 0: to all.
        calls: only these, of open, read, write, fsync, fdatasync, close, rename, unlink, mkdir,
            symlink, link, ftruncate, statvfs; empty: all.
        name: only paths with this in them; of two paths the new one counts.
        each: count each path by itself.
        seconds: how long a stall is.
        free_bytes: what the disk says that it has free.
        only_while: nothing is counted unless this file is there.
        trace: a file that each counted call is written to, "number call path" in a line.
    """
    lines = [f"under={under.resolve()}", f"do={do}", f"at={at}", f"times={times}"]
    lines += [f"calls={','.join(calls)}"] if calls else []
    lines += [f"name={name}", f"each={int(each)}", f"seconds={seconds}"]
    lines += [f"free_bytes={free_bytes}"] if free_bytes is not None else []
    lines += [f"only_while={only_while}"] if only_while is not None else []
    lines += [f"trace={trace}"] if trace is not None else []
    return "\n".join(lines)


def environment(text: str) -> dict[str, str]:
    """The variables that a program starts with to have :func:`rule`'s ``text`` from the start."""
    before = os.environ.get("LD_PRELOAD", "")
    return {"LD_PRELOAD": f"{library()} {before}".strip(), "ZOO_DISK": text}


def arm(text: str) -> None:
    """Inside a program that was started with :func:`environment`: another rule from here on."""
    ctypes.CDLL(None).disk_arm(text.encode())


def calls() -> int:
    """Inside such a program: how many calls were counted since."""
    count = ctypes.CDLL(None).disk_calls
    count.restype = ctypes.c_long
    return int(count())
