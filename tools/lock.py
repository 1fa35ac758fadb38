"""Makes the files of ``tools/pins/hashes``: the pins, with the hashes of their packages' files.

    .venv/bin/python tools/lock.py            # after a change of tools/pins/*.txt; asks the index
    .venv/bin/python tools/lock.py --check    # whether they fit the pins; without network

pip installs a list with hashes only when the list is complete, and installs nothing of it when a
single file differs. So, before it writes, this walks through what our projects need, and what that
needs in turn, on every platform and Python of the README: each package needs a pin that suits all
who ask for it, and a wheel, because what pip would build from source asks for further packages that
nothing vouches for. Each file holds the hashes of all files of a version, for all platforms.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import canonicalize_name
from packaging.version import Version

from environment import hashed_pins, pins_with_hashes
from model_dirs import ROOT, find_models
from package_index import File, PackageIndex, PackageIndexError
from zoo_common.versions_npu import PAIRS

AT_ONCE = 6  # requests under way
PYTHONS = range(10, 15)
GLIBC = 28  # 2.28 is what torch's wheels ask for
MACOS = (14, 0)  # likewise
OF_CUDA = ("cuda-", "nvidia-", "triton")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
HEADER = """\
# Made by tools/lock.py from ../{name}, not to be changed by hand: the hashes of
# all files that the package index has of these versions.
"""


@dataclass(frozen=True)
class Target:
    """A kind of machine that an environment is made for.

    Attributes:
        pins: the files of tools/pins that it takes, without ``.txt``.
        needs: what is asked for, as requirements.
        system: ``Linux`` or ``Darwin``.
        machine: as ``platform.machine`` has it.
        python: minor version of Python 3.
    """

    pins: tuple[str, ...]
    needs: tuple[str, ...]
    system: str
    machine: str
    python: int

    def __str__(self) -> str:
        """For a person."""
        return f"{self.system} {self.machine} Python 3.{self.python} ({', '.join(self.pins)})"

    def markers(self, extra: str = "") -> dict[str, str]:
        """The words that conditions of requirements are judged by."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"3.{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": self.system,
            "platform_version": "",
            "python_full_version": f"3.{self.python}.0",
            "python_version": f"3.{self.python}",
            "sys_platform": self.system.lower(),
            "extra": extra,
        }

    def tags(self) -> list[Tag]:
        """The tags of the wheels that it can install, best first."""
        if self.system == "Darwin":
            platforms = list(mac_platforms(MACOS, self.machine))
        else:
            platforms = [f"manylinux_2_{minor}_{self.machine}" for minor in range(GLIBC, 4, -1)]
            platforms += [f"manylinux{year}_{self.machine}" for year in ("2014", "2010", "1")]
            platforms.append(f"linux_{self.machine}")
        python = (3, self.python)
        tags = list(cpython_tags(python, platforms=platforms, abis=[f"cp3{self.python}"]))
        return tags + list(compatible_tags(python, f"cp3{self.python}", platforms))


def targets(root: Path) -> list[Target]:
    """The machines of the README: Linux and macOS, and those with Ascend cards."""
    projects = ("zoo-common[digits]", *(f"zoo-{model.name}" for model in find_models(root)))
    for_ci = ("zoo-npu-sim", *_lines(root / "ci" / "requirements.txt"))
    usual = ("setuptools", "torch", "torchvision", *projects)
    found = []
    for system, machine in (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")):
        for python in PYTHONS:
            pins = ("common", "default", "cuda")
            found.append(Target(pins, usual, system, machine, python))
            found.append(Target((*pins, "ci"), (*usual, *for_ci), system, machine, python))
    for pair in PAIRS:
        name = "npu" if pair is PAIRS[0] else f"npu-{pair.torch}"
        for machine in ("x86_64", "aarch64"):
            for python in range(pair.pythons[0], pair.pythons[1] + 1):
                needs = (*usual, "torch-npu")
                found.append(Target(("common", name), needs, "Linux", machine, python))
    return found


class Walk:
    """Goes through what a target needs and notes what its pins lack.

    Attributes:
        reached: the packages that it came by.
        lacks: sentences without their end, each a reason why the target cannot be installed.
    """

    def __init__(self, root: Path, index: PackageIndex, target: Target) -> None:
        """Walks the whole way."""
        self._index, self._target = index, target
        self._tags = {tag: rank for rank, tag in enumerate(target.tags())}
        self._projects = own_projects(root)
        self._pins = dict(_pins_on(root, target))
        self.reached: set[str] = set()
        self.lacks: list[str] = []
        self._ask_ahead()
        done: set[tuple[str, str]] = set()
        roots = [need for need in target.needs if self._holds(need, "")]
        ways = [(Requirement(need), "the environment") for need in roots]
        while ways:
            need, who = ways.pop()
            name = canonicalize_name(need.name)
            if not self._suits(name, need, who):
                continue
            for extra in need.extras or {""}:
                if (name, extra) not in done:
                    done.add((name, extra))
                    ways += [(Requirement(text), name) for text in self._needs(name, extra)]

    def _ask_ahead(self) -> None:
        """Finds the wheels of all pins, and asks for their metadata at once: the wait is long."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            wheels = [wheel for wheel in pool.map(self._wheel, self._pins) if wheel]
            list(pool.map(self._index.needs, wheels))

    def _suits(self, name: str, need: Requirement, who: str) -> bool:
        if name in self._projects:
            return True
        if name not in self._pins:
            self.lacks.append(f"{who} needs {need}, of which there is no pin{self._offer(need)}")
            return False
        self.reached.add(name)
        if not need.specifier.contains(self._pins[name], prereleases=True):
            pin = f"{name}=={self._pins[name]}"
            self.lacks.append(f"{who} needs {need}, but the pin is {pin}{self._offer(need)}")
        return True

    def _offer(self, need: Requirement) -> str:
        """The newest version with a wheel that the target could take."""
        try:
            files = self._index.files(need.name)
        except PackageIndexError:
            return ""
        versions = {file.version for file in files if self._fits(file)}
        versions = set(need.specifier.filter(versions))
        return f" (the newest that fits is {max(versions)})" if versions else ""

    def _fits(self, file: File) -> bool:
        python = f"3.{self._target.python}.0"
        return file.pythons.contains(python) and not file.tags.isdisjoint(self._tags)

    def _needs(self, name: str, extra: str) -> list[str]:
        if name in self._projects:
            project = self._projects[name]
            texts = [*project["dependencies"]]
            texts += project["optional-dependencies"][extra] if extra else []
        else:
            wheel = self._wheel(name)
            texts = [*self._index.needs(wheel)] if wheel else []
        return [text for text in texts if self._holds(text, extra)]

    def _holds(self, text: str, extra: str) -> bool:
        need = Requirement(text)
        if "cuda" not in self._target.pins and need.name.startswith(OF_CUDA):
            return False  # asked for by a CUDA build, in whose place there is a CPU build
        return need.marker is None or need.marker.evaluate(self._target.markers(extra))

    def _wheel(self, name: str) -> File | None:
        """The wheel of the pinned version; of a build of PyTorch's index, the like of it here."""
        version = Version(self._pins[name]).public  # less what PyTorch's index adds, as in +cpu
        files = self._index.of_version(name, version)
        fits = [file for file in files if self._fits(file)]
        if not fits:
            lack = f"{name}=={version} has no wheel{self._offer(Requirement(name))}"
            if lack not in self.lacks:
                self.lacks.append(lack)
            return None
        return min(fits, key=lambda file: min(self._tags.get(tag, 1 << 20) for tag in file.tags))


def own_projects(root: Path) -> dict[str, dict[str, Any]]:
    """The projects of the repository by name, as their pyproject.toml has them."""
    import tomllib  # new in Python 3.11, and only the making of the files needs it

    folders = [root / "common", root / "common" / "npu_sim"]
    folders += [model.path for model in find_models(root)]
    texts = [(folder / "pyproject.toml").read_text(encoding="utf-8") for folder in folders]
    projects = [tomllib.loads(text)["project"] for text in texts]
    return {canonicalize_name(project["name"]): project for project in projects}


def _pins_on(root: Path, target: Target) -> Iterator[tuple[str, str]]:
    for name in target.pins:
        for line in _lines(root / "tools" / "pins" / f"{name}.txt"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(target.markers()):
                yield canonicalize_name(pin.name), str(pin.specifier).removeprefix("==")


def _lines(file: Path) -> list[str]:
    """The requirements of a file, without its comments and options."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def lacking(root: Path, index: PackageIndex) -> list[str]:
    """What the pins lack on the machines of the README, one sentence each.

    Raises:
        PackageIndexError: the index cannot be read.
    """
    where: dict[str, list[Target]] = {}
    reached: set[str] = set()
    for target in targets(root):
        walk = Walk(root, index, target)
        reached |= walk.reached
        for lack in walk.lacks:
            where.setdefault(lack, []).append(target)
        print(f"{target}: {len(walk.reached)} packages, {len(walk.lacks)} problems", flush=True)
    sentences = [f"{lack}, on {', '.join(map(str, found))}." for lack, found in where.items()]
    for file in pin_files(root):
        names = {canonicalize_name(Requirement(line).name) for line in _lines(file)}
        sentences += [f"{file.name}: nothing needs {name}." for name in sorted(names - reached)]
    return sentences


def pin_files(root: Path) -> list[Path]:
    """The files of pins, each of which has its like in ``hashes/``."""
    return sorted((root / "tools" / "pins").glob("*.txt"))


def hash_file(pins: Path) -> Path:
    """Where the hashes of a file of pins stand."""
    return pins.parent / "hashes" / pins.name


def with_hashes(pins: Path, index: PackageIndex) -> str:
    """The contents of the file with hashes.

    Raises:
        PackageIndexError: the index cannot be read, or has no files of a version.
    """
    text = HEADER.format(name=pins.name)
    for line in pins_with_hashes(pins):
        pin = Requirement(line)
        files = index.of_version(pin.name, str(pin.specifier).removeprefix("=="))
        if not files:
            raise PackageIndexError(f"{index.url} has no files of {pin}, which {pins.name} names.")
        hashes = sorted({f"    --hash=sha256:{file.sha256}" for file in files})
        text += " \\\n".join([line, *hashes]) + "\n"
    return text


def check(root: Path) -> Iterator[str]:
    """Where the hashes do not fit the pins, one sentence each; asks no index."""
    known: dict[str, tuple[str, list[str]]] = {}
    files = pin_files(root)
    for pins in files:
        file = hash_file(pins)
        shown = file.relative_to(root)
        if not file.is_file():
            yield f"{shown} is missing."
            continue
        wanted, there = pins_with_hashes(pins), hashed_pins(file)
        yield from (f"{shown} lacks {line}." for line in _less(wanted, there))
        yield from (
            f"{shown} has {line}, which {pins.name} lacks." for line in _less(there, wanted)
        )
        for line, hashes in _hashes(file):
            if not hashes or not all(HASH.fullmatch(text) for text in hashes):
                yield f"{shown}: {line} has no hashes, or one that is none."
            pin = line.partition(";")[0]
            hashes = [text.removesuffix(" \\") for text in hashes]
            other, same = known.setdefault(pin, (pins.name, hashes))
            if same != hashes:
                yield f"{shown}: {pin} has other hashes than in hashes/{other}."
    strays = set((root / "tools" / "pins" / "hashes").glob("*")) - {
        hash_file(pins) for pins in files
    }
    yield from (f"{stray.relative_to(root)} belongs to no pins." for stray in sorted(strays))


def _less(some: Iterable[str], others: Iterable[str]) -> list[str]:
    return sorted(set(some) - set(others))


def _hashes(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Each pin of a file of ``hashes/`` with the lines of its hashes."""
    parts: list[tuple[str, list[str]]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("    ") and parts:
            parts[-1][1].append(line)
        elif line and not line.startswith("#"):
            parts.append((line.removesuffix(" \\"), []))
    yield from parts


def make(root: Path, index: PackageIndex) -> list[str]:
    """Writes the files, unless the pins lack something: then the sentences that say what.

    Raises:
        PackageIndexError: the index cannot be read; nothing is written then.
    """
    lacks = lacking(root, index)
    if lacks:
        return lacks
    texts = {hash_file(pins): with_hashes(pins, index) for pins in pin_files(root)}
    folder = root / "tools" / "pins" / "hashes"
    folder.mkdir(exist_ok=True)
    for stray in {*folder.iterdir()} - texts.keys():
        stray.unlink()
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
        print(f"{file.relative_to(root)}: {text.count('--hash')} hashes")
    return []


def main(words: list[str], root: Path = ROOT) -> int:
    """Makes the files or checks them; the exit code."""
    parser = argparse.ArgumentParser(description="Makes the files of tools/pins/hashes.")
    parser.add_argument("--check", action="store_true", help="only say whether they fit the pins")
    try:
        if parser.parse_args(words).check:
            said, then = list(check(root)), "Run .venv/bin/python tools/lock.py."
        else:
            said, then = make(root, PackageIndex()), "Nothing was written: mend tools/pins/*.txt."
    except PackageIndexError as error:
        print(error, file=sys.stderr)
        return 1
    for sentence in said:
        print(sentence, file=sys.stderr)
    if said:
        print(then, file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
