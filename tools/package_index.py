"""What a package index says of packages: their files, with hashes, and what those need.

It asks as pip does, by the simple API's JSON form (PEP 691), and takes the metadata of a wheel from
the file beside it (PEP 658), or where an index has none, from the wheel itself, of which it reads
the few parts that hold it.
"""

import email
import functools
import io
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import Tag
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

JSON_FORM = "application/vnd.pypi.simple.v1+json"
TIMEOUT_S = 60
# At least what pip needs to find the list of a small wheel's files in one request.
PART_BYTES = 1 << 16
# Where pip looks when nobody names an index, by its own word.
DEFAULT_URL = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"


class PackageIndexError(Exception):
    """The index cannot be read; the message is one sentence for the user."""


@dataclass(frozen=True)
class File:
    """A file of a package.

    Attributes:
        name: of the file.
        url: where it is.
        sha256: its hash, 64 hexadecimal digits.
        version: of the package.
        pythons: the versions of Python that it is for.
        tags: what a wheel fits; none for a source archive.
        has_metadata: whether the index has the metadata of the wheel beside it.
    """

    name: str
    url: str
    sha256: str
    version: Version
    pythons: SpecifierSet
    tags: frozenset[Tag]
    has_metadata: bool


class PackageIndex:
    """A package index; what it said is kept."""

    def __init__(self, url: str | None = None) -> None:
        """Names the index: by default the one that pip would ask first."""
        self.url = (url or _pip_index()).rstrip("/")

    @functools.cache  # noqa: B019 the index lives as long as the program
    def files(self, package: str) -> tuple[File, ...]:
        """All files of all versions of a package, less those that were withdrawn.

        Raises:
            PackageIndexError: the index has no such package, or does not answer in JSON.
        """
        page = _get(f"{self.url}/{canonicalize_name(package)}/", Accept=JSON_FORM)
        try:
            listed: list[dict[str, Any]] = json.loads(page)["files"]
        except (ValueError, KeyError):
            raise PackageIndexError(
                f"{self.url} does not list {package} in JSON (PEP 691): name another index in "
                "PIP_INDEX_URL."
            ) from None
        found = [_file(entry) for entry in listed if not entry.get("yanked")]
        return tuple(file for file in found if file is not None)

    def of_version(self, package: str, version: str) -> list[File]:
        """The files of one version, wheels and source archives for every platform.

        Raises:
            PackageIndexError: as ``files``.
        """
        wanted = Version(version)
        return [file for file in self.files(package) if file.version == wanted]

    @functools.cache  # noqa: B019
    def needs(self, wheel: File) -> tuple[str, ...]:
        """What a wheel needs: the lines ``Requires-Dist`` of its metadata.

        Raises:
            PackageIndexError: the wheel cannot be read.
        """
        if wheel.has_metadata:
            text = _get(f"{wheel.url}.metadata").decode()
        else:
            text = _metadata_within(wheel.url)
        return tuple(email.message_from_string(text).get_all("Requires-Dist") or ())


def _pip_index() -> str:
    pip = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    said = subprocess.run(pip, capture_output=True, text=True).stdout.strip()
    named = os.environ.get("PIP_INDEX_URL") or said
    if named:
        return named
    return subprocess.check_output([sys.executable, "-c", DEFAULT_URL], text=True).strip()


def _file(entry: dict[str, Any]) -> File | None:
    """A file as the index describes it; None for kinds of archives that pip does not install."""
    name = entry["filename"]
    tags: frozenset[Tag] = frozenset()
    try:
        if name.endswith(".whl"):
            _, version, _, tags = parse_wheel_filename(name)
        else:
            _, version = parse_sdist_filename(name)
        pythons = SpecifierSet(entry.get("requires-python") or "")
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidSpecifier):
        return None
    has_metadata = bool(entry.get("core-metadata", entry.get("dist-info-metadata")))
    sha256 = entry["hashes"]["sha256"]
    return File(name, entry["url"], sha256, version, pythons, tags, has_metadata)


def _get(url: str, **headers: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            body: bytes = answer.read()
            return body
    except (urllib.error.URLError, OSError) as error:
        raise PackageIndexError(f"{url} cannot be read: {error}.") from None


def _metadata_within(url: str) -> str:
    try:
        with zipfile.ZipFile(io.BufferedReader(_RemoteFile(url), PART_BYTES)) as wheel:
            # Deeper ones are those of packages that it holds copies of.
            (name,) = (n for n in wheel.namelist() if re.fullmatch(r"[^/]*\.dist-info/METADATA", n))
            return wheel.read(name).decode()
    except (urllib.error.URLError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise PackageIndexError(f"The metadata of {url} cannot be read: {error}.") from None


class _RemoteFile(io.RawIOBase):
    """A file on a server that sends any part of it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        with self._part(0, 0) as answer:
            self._size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def _part(self, first: int, last: int) -> Any:
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={first}-{last}"})
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        if answer.status != 206:
            answer.close()
            raise OSError("the server sends no parts of files")
        return answer

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        last = min(self._position + len(buffer), self._size) - 1
        if last < self._position:
            return 0
        with self._part(self._position, last) as answer:
            part = answer.read()
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)
