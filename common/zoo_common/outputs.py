"""The output directory of a run: taken for one run at a time, earlier runs moved aside."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from zoo_common.errors import UserError

LOCK = ".lock"
RANKS = ".ranks"
"""The directory of the launcher for its ranks, while a run lasts."""
_MARKS = ("config.yaml", "metrics.jsonl", "result.json")  # any of them: a run was here


def holds_a_run(directory: Path) -> bool:
    """Whether an earlier run left its config there, without which it cannot be gone on with."""
    return (directory / "config.yaml").is_file()


def default_directory(model_directory: Path, device_id: int, kind: str) -> Path:
    """Where the original zoo writes: ``test/output/$ASCEND_DEVICE_ID``.

    An evaluation has a directory beside it, so that it does not move its own training aside.
    """
    suffix = "_eval" if kind == "eval" else ""
    return model_directory / "test" / "output" / f"{device_id}{suffix}"


@contextlib.contextmanager
def occupy(directory: Path, *, keep: bool) -> Iterator[Path | None]:
    """Makes the directory, moves an earlier run's output aside, and holds it for this run.

    Args:
        directory: the output directory.
        keep: leave what is there, because the run goes on from it.

    Yields:
        Where the earlier output went, or None.

    Raises:
        UserError: another run holds the directory, it holds files that no run wrote, or the disk
            does not let us write.
    """
    _make(directory)
    lock = _lock(directory)
    try:
        aside = None
        names = [entry.name for entry in os.scandir(directory)]
        contents = [name for name in names if name not in (LOCK, RANKS)]
        if contents and not keep:
            if not any(mark in contents for mark in _MARKS):
                raise UserError(
                    f"--output_dir {directory} holds files that no run wrote ({contents[0]}, ...):"
                    " give an empty or new directory."
                )
            aside = _move_aside(directory)
            _make(directory)
            os.close(lock)
            lock = _lock(directory)
        _try_to_write(directory)
        shutil.rmtree(directory / RANKS, ignore_errors=True)  # of a launcher that was killed
        (directory / RANKS).mkdir()
        yield aside
    finally:
        shutil.rmtree(directory / RANKS, ignore_errors=True)
        with contextlib.suppress(OSError):
            (directory / LOCK).unlink()
        os.close(lock)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot make the output directory {directory}: {error.strerror}; "
            "choose another with --output_dir."
        ) from error


def _lock(directory: Path) -> int:
    try:
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"Cannot write in the output directory {directory}: {error.strerror}; "
            "choose another with --output_dir."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return handle  # a file system without locks cannot tell of another run
        os.close(handle)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise UserError(
            f"Another run is writing to {directory}: wait for it, or choose another --output_dir."
        ) from error
    return handle


def _move_aside(directory: Path) -> Path:
    """Renames the directory after the time of its last change."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(directory.stat().st_mtime))
    target = directory.with_name(f"{directory.name}.{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = directory.with_name(f"{directory.name}.{stamp}-{number}")
    (directory / LOCK).unlink()
    directory.rename(target)
    return target


def _try_to_write(directory: Path) -> None:
    probe = directory / ".probe"
    try:
        probe.write_bytes(b"\0" * 4096)
    except OSError as error:
        raise UserError(
            f"Cannot write in the output directory {directory}: {error.strerror}; "
            "free some room or choose another with --output_dir."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
