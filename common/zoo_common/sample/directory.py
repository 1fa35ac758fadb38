"""Making a data set's directory so that it is there as a whole or not at all.

A data set is written into a temporary sibling and renamed into place. A process that is killed
leaves the sibling, which the next call clears away; of two processes that make the same data set
at once the slower one finds it ready and uses it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo_common.errors import UserError

MANIFEST_NAME = "manifest.json"


def default_root() -> Path:
    """Where data sets are kept unless a caller says otherwise.

    Returns:
        ``$ZOO_DATA_DIR`` if set, else ``$XDG_CACHE_HOME/zoo_common``, else
        ``~/.cache/zoo_common``. It need not exist.

    Raises:
        UserError: if none of the variables is set and the user has no home directory.
    """
    chosen = os.environ.get("ZOO_DATA_DIR")
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        # The XDG specification says that a relative path is to be ignored.
        if cache and Path(cache).is_absolute():
            return Path(cache) / "zoo_common"
        return Path.home() / ".cache" / "zoo_common"
    except RuntimeError as error:
        raise UserError(
            "no home directory was found to keep data sets in; set ZOO_DATA_DIR to a directory "
            "that can be written"
        ) from error


def make_directory(target: Path, manifest: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
    """Makes a data set's directory, or finds it ready.

    Args:
        target: the directory of the data set; missing parents are made.
        manifest: what the data set is, as JSON values. Its entry ``files`` gives the number of
            files in each folder (``{"train/circle": 200}``), which is how a damaged data set is
            told from a whole one; a file may be named too (``{"labels.json": 1}``).
        fill: writes the data set into the existing directory that it is given. It makes all
            folders of ``files`` and writes no manifest.

    Returns:
        The absolute path of ``target``, which holds the whole data set.

    Raises:
        UserError: if ``target`` holds something else or a damaged data set, or if it cannot be
            written.
    """
    # JSON turns tuples into lists; compare what would be read back.
    expected: dict[str, Any] = json.loads(json.dumps(manifest))
    try:
        target = target.expanduser().resolve()
        if _is_complete(target, expected):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(target)
        with _temporary_sibling(target) as building:
            fill(building)
            text = json.dumps(expected, indent=1, sort_keys=True) + "\n"
            (building / MANIFEST_NAME).write_text(text, encoding="utf-8")
            assert _is_complete(building, expected), "fill() wrote other files than it announced"
            try:
                building.rename(target)
            except OSError as error:
                # Another process was faster, or the directory was filled by something else
                # meanwhile: the check below tells which.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
        if not _is_complete(target, expected):
            raise UserError(f"{target} vanished while it was made; start again")
    except OSError as error:
        raise _cannot_write(target, error) from error
    return target


def _is_complete(target: Path, expected: dict[str, Any]) -> bool:
    """Tells whether ``target`` is the wanted data set (True) or free to be made (False).

    Raises:
        UserError: if it is anything else.
    """
    if not target.exists():
        return False
    if not target.is_dir():
        raise UserError(f"{target} is not a directory; choose another place for the data set")
    try:
        found = json.loads((target / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(target.iterdir()):
            raise UserError(
                f"{target} holds something else than this data set and is left as it is; choose "
                "an empty or new directory"
            ) from None
        return False
    except ValueError:
        found = None
    if found != expected:
        raise UserError(
            f"{target} holds another data set (see its {MANIFEST_NAME}) and is left as it is; "
            "choose an empty or new directory"
        )
    for folder, count in expected["files"].items():
        present = _count_files(target / folder)
        if present != count:
            raise UserError(
                f"{target / folder} should hold {count} files and holds {present}; delete "
                f"{target} and start again to have the data set made anew"
            )
    return True


def _count_files(folder: Path) -> int:
    try:
        with os.scandir(folder) as entries:
            # Caches that a data set's reader puts beside the files are none of them.
            return sum(
                1
                for entry in entries
                if not entry.name.startswith(".") and not entry.name.endswith(".zoo-cache")
            )
    except FileNotFoundError:
        return 0
    except NotADirectoryError:
        return 1


@contextmanager
def _temporary_sibling(target: Path) -> Iterator[Path]:
    """A new directory beside ``target``, locked while in use, gone afterwards unless renamed."""
    while True:
        path = target.parent / f"{_prefix(target)}{secrets.token_hex(6)}"
        path.mkdir()
        lock = _try_lock(path)
        if lock is not None:
            break
        # A process that clears up took it for an abandoned one before it was locked.
    try:
        yield path
    finally:
        if lock >= 0:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def _clear_abandoned(target: Path) -> None:
    """Deletes what killed processes left beside ``target``; a live process holds a lock."""
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        lock = _try_lock(path)
        if lock is not None and lock >= 0:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name}.making-"


def _try_lock(path: Path) -> int | None:
    """Locks a directory until the returned descriptor is closed or the process ends.

    Returns:
        The descriptor; -1 where the file system has no locks; None if another process holds the
        lock or has deleted the directory.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        return -1
    if not path.exists():
        os.close(descriptor)
        return None
    return descriptor


def _cannot_write(target: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {target} is full; free some space or choose another directory (the "
            "default is set by ZOO_DATA_DIR)"
        )
    return UserError(
        f"{target} cannot be written ({error.strerror or error}); choose a directory that can "
        "(the default is set by ZOO_DATA_DIR)"
    )
