"""Finds weights files by name, and downloads those that are not there. Torch-free.

A download goes to ``NAME.part`` beside its destination, and what the next try needs to go on
from there to ``NAME.part.json``; only a whole and checked file gets its name. Of several
processes one downloads and the others wait for it. Proxies are taken from the environment, as
urllib does.
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zoo_common.errors import UserError

Progress = Callable[[int, int], None]
"""Called with (bytes there, bytes in all or 0 when the server does not say)."""

Check = Callable[[Path], None]
"""Looks at a downloaded file before it gets its name; raises UserError if it is not good."""

MIRROR_VARIABLE = "ZOO_WEIGHTS_URL"
"""Address of a directory that has all weights files, in place of the public addresses."""

_TRIES = 4
"""Tries in a row that bring less than _WORTH bytes, after which a download is given up."""

_WORTH = 1 << 20
_BLOCK = 1 << 16
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which asking again may help."""

_NAME_SUMS = (
    (re.compile(r"model_final_([0-9a-f]{6})\.pkl"), "md5"),  # detectron2's model zoo
    (re.compile(r".+-([0-9a-f]{8})\.pth"), "sha256"),  # torchvision
)
"""Publishers that put the begin of a file's checksum into its name, and of which checksum."""


class _TransferError(Exception):
    """A transfer ended early; the text says how, as a clause."""


class _DiskError(Exception):
    """Our own disk's error, which is no reason to ask the server again."""


@dataclass
class _Notes:
    """What is known of a part: a hash of its address, and what shows that it is unchanged.

    The address itself may hold a token, and a part may lie about for long.
    """

    source: str
    validator: str = ""
    total: int = 0


def find_or_fetch(
    name: str,
    data_path: Path | None,
    url: str = "",
    sha256: str = "",
    progress: Progress | None = None,
    *,
    model_directory: Path | None = None,
    check: Check | None = None,
    timeout_s: float = 15.0,
) -> Path:
    """The weights file that a name means, downloaded if it is nowhere.

    Args:
        name: a path; the bare name of a file, which is looked for in :func:`places`; or a
            public address, whose last part is that name.
        data_path: the data set's directory, if the run has one.
        url: address of the file, or of a directory with it (ending in ``/``); empty: none.
        sha256: checksum in hexadecimal that the file must have; empty: for a download what its
            publisher put into its name, if anything.
        progress: called while it is downloaded.
        model_directory: the model's directory.
        check: looks at a downloaded file before it is taken.
        timeout_s: longest wait for the server's next bytes.

    Raises:
        UserError: no such file, no address, another checksum, or a download that failed; the
            message says where to put the file.
    """
    if "://" in name:
        url, name = name, _last_part(name)
    if not name or name == ".." or "\0" in name:
        raise UserError(f"The address {shown(url)} names no file: give that of the file itself.")
    if os.environ.get(MIRROR_VARIABLE):
        url = os.environ[MIRROR_VARIABLE].rstrip("/") + "/"
    if Path(name).name != name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"There is no weights file {path}: check the path.")
    else:
        around = places(data_path, model_directory)
        found = next((place / name for place in around if (place / name).is_file()), None)
        target = _destination(data_path) / name
        if found is None and not url:
            tried = ", ".join(map(str, around))
            raise UserError(
                f"There is no weights file {name} in {tried}, and no public address of it is "
                f"known: put it at {target}, or give its path or address."
            )
        if found is None:
            address = url if not url.endswith("/") else url + urllib.parse.quote(name)
            return fetch(address, target, sha256, progress, check=check, timeout_s=timeout_s)
        path = found
    if sha256 and _digest(path, "sha256") != sha256.lower():
        raise UserError(f"{path} has not the sha256 {sha256} that is asked for: replace the file.")
    return path


def shown(url: str) -> str:
    """An address for people and records: without user, password and query, which may be secret."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # brackets that are no IPv6 address
        return "an address"
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def _last_part(url: str) -> str:
    """The name of an address's file; empty for none."""
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    except ValueError:
        return ""


def places(data_path: Path | None, model_directory: Path | None = None) -> list[Path]:
    """Directories in which a bare name is looked for, the first wins."""
    around = [data_path, data_path.parent] if data_path else []
    around += [place / "pretrained" for place in around]
    if model_directory:
        within = (".", "data/pretrained", "pretrain")  # as on the cards
        around += [model_directory / name for name in within]
    around += [Path.cwd(), _cache()]
    return list(dict.fromkeys(place.absolute() for place in around))


def fetch(
    url: str,
    target: Path,
    sha256: str = "",
    progress: Progress | None = None,
    *,
    check: Check | None = None,
    timeout_s: float = 15.0,
    pause_s: float = 1.0,
) -> Path:
    """Downloads a file, going on where an earlier try ended; returns ``target``.

    Args:
        url: http or https.
        target: the file; nothing is done if another process makes it meanwhile.
        sha256: as in :func:`find_or_fetch`.
        progress: called while bytes come, and while another process downloads.
        check: looks at the whole file before it gets its name.
        timeout_s: longest wait for the server's next bytes.
        pause_s: wait before the second try; doubled for each one after it.

    Raises:
        UserError: with the file, the address, the reason, and where to put it by hand.
    """
    address = shown(url)
    if not re.match("https?://[^/]", address):
        raise UserError(
            f"{address} is no address to download {target.name} from: use http or https."
        )
    part = target.with_name(f"{target.name}.part")
    sidecar = part.with_name(f"{part.name}.json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _hold(part, target, progress) as stream:
            if stream is not None:
                _keep_trying(_Transfer(url, stream, sidecar, progress, timeout_s), pause_s)
                os.fsync(stream.fileno())
                sidecar.unlink(missing_ok=True)
                _examine(part, url, target.name, sha256, check)
                part.replace(target)
    except _TransferError as error:
        raise UserError(
            f"Cannot download {target.name} from {address}: {error}; put the file at {target} by "
            f"hand, or set {MIRROR_VARIABLE} to the address of a directory that has it."
        ) from error
    except (_DiskError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"Cannot write {target} for the download of {address}: {reason}; put the file in "
            "another place and give its path."
        ) from error
    return target


@contextlib.contextmanager
def _hold(part: Path, target: Path, progress: Progress | None) -> Iterator[BinaryIO | None]:
    """Opens the part for this process alone; None when the whole file is there by then.

    The lock is on the part itself. After the wait the part may be another file, or have become
    the whole one.
    """
    while True:
        handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        with os.fdopen(handle, "r+b") as stream:
            _wait_for_lock(stream, progress)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), part.stat()):
                    if target.exists():
                        part.unlink()
                        yield None
                    else:
                        yield stream
                    return


def _wait_for_lock(stream: BinaryIO, progress: Progress | None) -> None:
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if progress is not None:
                progress(os.fstat(stream.fileno()).st_size, 0)
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return  # a network file system without locks: both write the same bytes


def _keep_trying(transfer: "_Transfer", pause_s: float) -> None:
    """Transfers until the file is whole.

    Raises:
        _TransferError: a try failed for good, or several brought next to nothing.
    """
    idle = 0
    while not transfer.whole:
        before = transfer.size
        try:
            transfer.run()
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answers {error.code} {error.reason}"
            if error.code == 416:
                transfer.start_over()
            elif error.code not in _PASSING:
                raise _TransferError(reason) from error
        except TimeoutError:
            reason = f"the server was silent for {transfer.timeout_s:g} s"
        except urllib.error.URLError as error:
            reason = f"the server cannot be reached ({error.reason})"
        except (OSError, http.client.HTTPException) as error:
            reason = f"the connection broke ({error})"
        else:
            reason = f"the connection broke after {transfer.size} of {transfer.notes.total} bytes"
        if transfer.whole:
            return
        idle = idle + 1 if transfer.size - before < _WORTH else 0
        if idle == _TRIES:
            raise _TransferError(reason)
        time.sleep(pause_s * 2 ** max(idle - 1, 0))


class _Transfer:
    """One file on its way.

    Attributes:
        notes: what is known of it.
        size: bytes that are there.
        whole: all are there.
    """

    def __init__(
        self,
        url: str,
        stream: BinaryIO,
        sidecar: Path,
        progress: Progress | None,
        timeout_s: float,
    ) -> None:
        self.timeout_s = timeout_s
        self._url = url
        self._stream, self._sidecar, self._progress = stream, sidecar, progress
        self.size = stream.seek(0, os.SEEK_END)
        self.notes = _read_notes(sidecar)
        source = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        known = self.notes.source == source and self.notes.validator
        if not known or self.size > self.notes.total > 0:
            self.notes = _Notes(source)
            self.start_over()
        self.whole = 0 < self.notes.total == self.size

    def start_over(self) -> None:
        """Forgets the bytes that are there."""
        self._stream.truncate(0)
        self.size = self._stream.seek(0)

    def run(self) -> None:
        """Asks for what is missing and writes what comes, which may end early.

        Raises:
            OSError: the server answers with an error, or the connection breaks.
        """
        if self.size and not self.notes.validator:
            self.start_over()  # nothing would show that the file is still the same
        headers = {"User-Agent": "zoo-common", "Accept-Encoding": "identity"}
        if self.size:
            headers["Range"] = f"bytes={self.size}-"
            headers["If-Range"] = self.notes.validator
        address = urllib.parse.quote(self._url, safe=string.punctuation)
        request = urllib.request.Request(address, headers=headers)
        opener = urllib.request.build_opener()  # with the proxies that are set now
        with opener.open(request, timeout=self.timeout_s) as response:
            self._begin(response)
            while block := response.read1(_BLOCK):
                self._write(block)
        self.whole = self.notes.total in (0, self.size)

    def _begin(self, response: http.client.HTTPResponse) -> None:
        """Reads the head of an answer: the rest of the file, or the file from its start."""
        going_on = f"bytes {self.size}-{self.notes.total - 1}/{self.notes.total}"
        if response.status == 206 and response.headers.get("Content-Range") == going_on:
            return
        self.start_over()
        if response.status != 200:
            self.notes.validator = ""  # the next try asks for the whole file
            raise http.client.HTTPException(f"the server answers {response.status}")
        tag = response.headers.get("ETag") or ""
        self.notes.validator = (
            response.headers.get("Last-Modified") or "" if tag[:2] in ("", "W/") else tag
        )
        self.notes.total = response.length or 0
        content = json.dumps(vars(self.notes))
        with _our_disk():
            self._sidecar.write_text(content, encoding="utf-8")

    def _write(self, block: bytes) -> None:
        with _our_disk():
            self._stream.write(block)
            self._stream.flush()
        self.size += len(block)
        if self._progress is not None:
            self._progress(self.size, self.notes.total)


@contextlib.contextmanager
def _our_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _DiskError(error.strerror) from error


def _read_notes(sidecar: Path) -> _Notes:
    """What an earlier try wrote down; nothing if there was none or it was cut off."""
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        return _Notes(str(content["source"]), str(content["validator"]), int(content["total"]))
    except (FileNotFoundError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        return _Notes("")


def _examine(part: Path, url: str, name: str, sha256: str, check: Check | None) -> None:
    """Removes a part that is whole but not what it should be."""
    published = _last_part(url)
    try:
        _verify(part, (name, published), sha256)
        if check is not None:
            check(part)
    except UserError as error:
        part.unlink()
        raise UserError(f"What {shown(url)} gave was thrown away: {error}") from error


def _verify(path: Path, names: tuple[str, ...], sha256: str) -> None:
    """Compares a file with the checksum that is asked for or that one of its names carries."""
    wanted, kind = sha256.lower(), "sha256"
    for pattern, kind_of_name in _NAME_SUMS:
        for name in names:
            match = pattern.fullmatch(name)
            if match and not sha256:
                wanted, kind = match.group(1), kind_of_name
    if not wanted:
        return
    found = _digest(path, kind)
    if found[: len(wanted)] != wanted:
        raise UserError(
            f"the {kind} of {names[0]} should begin with {wanted[:12]}, but is {found[:12]}...: "
            "try again, and if that does not help look for the right file or checksum."
        )


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _destination(data_path: Path | None) -> Path:
    """Beside the data set, as the card says, or in the user's cache."""
    if data_path is not None:
        beside = data_path.absolute().parent
        if beside != beside.parent and beside.is_dir() and os.access(beside, os.W_OK):
            return beside
    return _cache()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo-common"
