"""Looking for a data set's tree where the user says it is, and the messages when it is not there.

Torch-free, and no file list is read, so that a wrong path is told at once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from zoo_common.errors import UserError
from zoo_common.flaky import retried

_LEVELS_TRIED = 100

Problems = Callable[[Path], list[str]]
"""What is wrong with a directory as the data set's: ``no train2017``, ``x, which is empty``."""


def find_tree(path: str | Path, names: Sequence[str], problems: Problems, expected: str) -> Path:
    """The directory of a data set that a path means.

    Args:
        path: the directory, or one that holds it under one of the names; a leading ``~`` is
            expanded.
        names: usual names of the directory.
        problems: what is wrong with a directory; nothing if it is the data set's.
        expected: the tree, for messages.

    Raises:
        UserError: neither is the data set's, or something cannot be read. The message says what
            is wrong and what to do, and prints the tree.
    """
    root = Path(path).expanduser()
    try:
        levels = root, *(root / name for name in names)
        found = retried(lambda: {level: problems(level) for level in levels}, root)
        best = min(found, key=lambda level: len(found[level]))
        if not found[best]:
            return best
        problem = _explain(root, best, problems)
    except OSError as error:
        problem = f"'{error.filename}' cannot be read ({error.strerror}); check its permissions"
    raise UserError(f"{problem}. Expected:\n{expected}")


def file_problems(root: Path, name: str) -> list[str]:
    """What is wrong with a file of the data set: absent, empty."""
    file = root / name
    if not file.exists():
        return [f"no {name}"]
    if not file.is_file() or not file.stat().st_size:
        return [f"{name}, which is {'empty' if file.is_file() else 'no file'}"]
    return []


def folder_problems(root: Path, name: str) -> list[str]:
    """What is wrong with a directory of the data set: absent, empty."""
    directory = root / name
    if not directory.is_dir():
        return [f"{name}, which is no directory" if directory.exists() else f"no {name}"]
    if next(directory.iterdir(), None) is None:
        return [f"{name}, which is empty"]
    return []


def _explain(root: Path, best: Path, problems: Problems) -> str:
    if not root.exists():
        return f"data path '{root}' does not exist; give the directory of the data set"
    if not root.is_dir():
        return f"data path '{root}' is a file; give the directory that holds the data set"
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not any(root.iterdir()):
        return f"data path '{root}' is empty; put the data set there or give another path"
    problem = f"data path '{best}' holds {', '.join(problems(best))}"
    parent = root.resolve().parent
    for level in (parent, parent.parent):
        if not problems(level):
            return f"{problem}; the data set begins higher up, so give '{level}'"
    for name in names[:_LEVELS_TRIED]:
        if not problems(root / name):
            return f"{problem}; the data set lies one level below, so give '{root / name}'"
    archives = sorted(entry.name for entry in best.iterdir() if entry.suffix == ".zip")
    if archives:
        return f"{problem}; unpack {', '.join(archives)} there"
    return f"{problem}; put what is missing there or give another path"
