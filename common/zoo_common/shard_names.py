"""The names of WebDataset shards: what a pattern such as ``shards/{000..149}.tar`` stands for.

Torch-free, so that a wrong pattern is told at once. Only files of this machine's file systems are
taken: WebDataset's own addresses can also be commands (``pipe:``), which a path must never run.
"""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import Any

from zoo_common.errors import UserError
from zoo_common.flaky import read_bytes

INDEX_NAME = "shards.json"
"""The file beside shards that counts them, which DeCLIP's ``test/make_shards.sh`` writes."""

EXAMPLE = "'shards/{000000..001499}.tar'"

_ENDING = ".tar"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_MAX_SHARDS = 1_000_000
_NAMES_SHOWN = 5


def is_pattern(path: str) -> bool:
    """Whether a data path means shards: tar files, or a directory that holds their index."""
    if path.endswith(_ENDING) or _ADDRESS.match(path) or "::" in path:
        return True
    try:
        return bool(path) and (Path(path).expanduser() / INDEX_NAME).is_file()
    except (OSError, RuntimeError, ValueError):  # too long for a name, or nobody's home
        return False


def expand(pattern: str) -> list[Path]:
    """The shards that a pattern stands for, all of which exist.

    Args:
        pattern: a path that ends in ``.tar``, with ``{first..last}`` (as many digits as ``first``
            has), ``{one,other}``, ``*``, ``?`` or ``[...]`` in it; or the directory of an index,
            which lists its shards. A leading ``~`` is expanded.

    Raises:
        UserError: an address, no such shard, or a shard of the pattern that is missing.
    """
    if _ADDRESS.match(pattern) or "::" in pattern:
        raise UserError(
            f"The shards '{pattern}' are no files of this machine: give a path such as {EXAMPLE}; "
            "addresses and commands are never followed."
        )
    try:
        shards = _named(pattern)
        missing = [path for path in shards if not path.is_file()]
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        why = f"{error!s:.100}"
        raise UserError(f"The shards '{pattern:.200}' cannot be looked up ({why}).") from error
    if not shards:
        raise UserError(f"No shard is called '{pattern:.200}': give a path such as {EXAMPLE}.")
    if len(set(shards)) < len(shards):
        raise UserError(f"The shards '{pattern}' name a file twice: give each once.")
    if missing:
        names = ", ".join(path.name for path in missing[:_NAMES_SHOWN])
        more = ", ..." if len(missing) > _NAMES_SHOWN else ""
        raise UserError(
            f"{len(missing)} of the {len(shards)} shards '{pattern}' are missing in "
            f"{missing[0].parent} ({names}{more}): restore them or give a pattern without them."
        )
    return shards


def _named(pattern: str) -> list[Path]:
    directory = Path(pattern).expanduser()
    if (directory / INDEX_NAME).is_file():
        return [directory / str(entry["name"]) for entry in read_index(directory)["shards"]]
    return [path for name in _braces(str(directory), pattern) for path in _globbed(name)]


def read_index(directory: Path) -> dict[str, Any]:
    """The content of a directory's ``shards.json``.

    Raises:
        UserError: it cannot be read, or is no such index.
    """
    path = directory / INDEX_NAME
    try:
        content = json.loads(read_bytes(path))
        names = [str(entry["name"]) for entry in content["shards"]]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the file.") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(
            f"{path} is no index of shards: restore it, or remove it to have the shards counted."
        ) from None
    if any(Path(name).name != name for name in names):
        raise UserError(f"{path} names shards outside of its directory: restore it.")
    return dict(content)


def _globbed(name: str) -> list[Path]:
    if not glob.has_magic(name) or Path(name).is_file():
        return [Path(name)]
    return [Path(path) for path in sorted(glob.glob(name))]  # noqa: PTH207 - a whole path


def _braces(name: str, pattern: str) -> list[str]:
    """Expands braces into what Bash and the webdataset library make of them."""
    head, *others = _BRACES.split(name)
    names = [head]
    for inside, tail in zip(others[::2], others[1::2], strict=True):
        parts = _parts(inside, pattern)
        if len(names) * len(parts) > _MAX_SHARDS:
            raise _too_many(pattern)
        names = [begin + part + tail for begin in names for part in parts]
    return names


def _parts(inside: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if not numbers and "," in inside:
        return inside.split(",")
    if not numbers or int(numbers[2]) < int(numbers[1]):
        raise UserError(
            f"The braces {{{inside}}} in '{pattern}' cannot be read: write {{first..last}} or "
            "{one,other}, none within another."
        )
    first, last = int(numbers[1]), int(numbers[2])
    if last - first >= _MAX_SHARDS:
        raise _too_many(pattern)
    return [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]


def _too_many(pattern: str) -> UserError:
    return UserError(f"The shards '{pattern}' are over {_MAX_SHARDS:,} names: give fewer, larger.")
