"""Lines of a log file, in bounded memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from zoo_common.errors import UserError

_BLOCK_BYTES = 1 << 20
_LONGEST_LINE = 1 << 14
_GZIP_MAGIC = b"\x1f\x8b"


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    with path.open("rb") as stream:
        packed = stream.read(2) == _GZIP_MAGIC
    return gzip.open(path, "rb") if packed else path.open("rb")


def line_blocks(path: Path) -> Iterator[list[str]]:
    """Yield the file's lines in lists of about a megabyte.

    Reads gzip as well, told by its first bytes. A carriage return ends a line as a line feed does
    (progress bars write them). Bytes that are no UTF-8 become U+FFFD. Lines are cut at 16 Ki
    characters.

    Raises:
        UserError: the file is not there, cannot be read, or is damaged gzip.
    """
    try:
        with _open(path) as stream:
            rest = b""
            while block := stream.read(_BLOCK_BYTES):
                block = rest + block
                cut = max(block.rfind(b"\n"), block.rfind(b"\r")) + 1 or len(block)
                rest = block[cut:]
                yield _split(block[:cut])
            if rest:
                yield _split(rest)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged gzip ({error}): unpack or copy it again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be read ({reason}): name a log or a run's directory") from (
            error
        )


def _split(block: bytes) -> list[str]:
    # str.splitlines would also split at form feeds and Unicode separators inside a line.
    lines = block.decode("utf-8", "replace").replace("\r", "\n").split("\n")
    if max(map(len, lines)) > _LONGEST_LINE:
        lines = [line[:_LONGEST_LINE] for line in lines]
    return lines
