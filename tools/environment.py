"""Makes the repository's ``.venv`` with the versions that this platform needs.

    python3 tools/environment.py [--ci]

pip takes only files whose hashes stand in tools/pins/hashes. Not covered are torch and torchvision
where they come from an index of their own: on NPUs, and where PIP_EXTRA_INDEX_URL names one.

It does nothing, and calls no pip, when a stamp says that the environment is up to date. It uses
the standard library alone, because it runs before anything is installed; quickstart and the CI
scripts call it through tools/environment.sh.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from model_dirs import ROOT, find_models

NEEDED_BYTES = 7e9  # torch's CUDA build with its libraries takes 5.6 GB, the rest 0.6 GB
# What comes from PyTorch's own index or one that the user names, whose files we cannot know.
FROM_OTHER_INDEX = ("torch", "torchvision")
NETWORK_SIGNS = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "SSLError",
    "Connection broken",
    "Network is unreachable",
    "Could not fetch URL",
)
# What pip says of a file with another hash: the package, where the file is, and its hash.
OTHER_HASH = re.compile(
    r"^ +(\S+) from (\S+) .*:\n(?: +Expected .*\n)+ +Got +([0-9a-f]+)$", re.MULTILINE
)
# What pip says of a need that nothing installed meets: the need, and the package that has it.
UNMET = re.compile(r"satisfies the requirement (.+?) \(from (.+?)\) \(from versions")


class SetupError(Exception):
    """The environment cannot be made; the message is one sentence for the user."""


def platform_name() -> str:
    """``npu`` on a machine with Ascend cards, else ``default``; ZOO_PLATFORM overrides."""
    chosen = os.environ.get("ZOO_PLATFORM")
    if chosen:
        if chosen not in ("npu", "default"):
            raise SetupError(f"ZOO_PLATFORM must be npu or default, but is {chosen!r}.")
        return chosen
    cards = Path("/dev/davinci_manager").exists() or shutil.which("npu-smi")
    return "npu" if cards and sys.platform == "linux" else "default"


def pins_name(platform: str, root: Path) -> str:
    """The file of tools/pins for a platform; ZOO_TORCH asks for an older torch on NPUs."""
    torch = os.environ.get("ZOO_TORCH")
    if not torch:
        return platform
    name = f"{platform}-{torch}"
    folder = root / "tools" / "pins"
    if not (folder / f"{name}.txt").is_file():
        there = sorted(path.stem for path in folder.glob("*-*.txt"))
        raise SetupError(
            f"ZOO_TORCH={torch} has no pins for the platform {platform}: there are "
            f"{', '.join(there)} in tools/pins, and ZOO_PLATFORM=npu asks for those."
        )
    return name


def pins_with_hashes(pins: Path) -> list[str]:
    """The lines of a file of pins that its file in ``hashes/`` has too.

    Left out is what a file takes from the index that it names.
    """
    text = pins.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "-"))]
    if "--extra-index-url" in text:
        lines = [line for line in lines if line.partition("==")[0] not in FROM_OTHER_INDEX]
    return lines


def hashed_pins(file: Path) -> list[str]:
    """The pins of a file in ``hashes/``, without the hashes."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.removesuffix(" \\") for line in lines if line and not line.startswith(("#", " "))]


class Environment:
    """The virtual environment of one checkout.

    Attributes:
        venv: its directory, ``<root>/.venv``.
        python: its interpreter.
        with_ci: whether tests and checks must be able to run in it too.
    """

    def __init__(self, root: Path, with_ci: bool) -> None:
        """Describes the environment; makes nothing."""
        self.root = root
        self.with_ci = with_ci
        self.venv = root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.platform = platform_name()
        self.pins = pins_name(self.platform, root)
        self._stamp = self.venv / "zoo-stamp.json"
        self._cut_short = self.venv / "zoo-installing"
        self._log = self.venv / "zoo-pip.log"
        self._simulator = root / "common" / "npu_sim"

    def ensure(self) -> None:
        """Makes the environment, or brings it up to date, unless it is already.

        Raises:
            SetupError: no space, no network, or a Python that lacks venv.
        """
        if self._is_fresh():
            return
        with _lock(self.root / ".venv.lock"):
            if self._is_fresh():  # another start made it while this one waited
                return
            self._make_venv()
            if self._cut_short.exists():
                _forget_damaged(self.venv)
            self._cut_short.touch()
            self._stamp.unlink(missing_ok=True)
            self._install()
            stamp = {group: self._digest(group) for group in self._groups()}
            partial = self._stamp.with_suffix(".partial")
            partial.write_text(json.dumps(stamp), encoding="utf-8")
            partial.replace(self._stamp)
            self._cut_short.unlink()

    def _groups(self) -> tuple[str, ...]:
        return ("models", "ci") if self.with_ci else ("models",)

    def _is_fresh(self) -> bool:
        if not self.python.exists() or not self._stamp.is_file():
            return False
        stamp = json.loads(self._stamp.read_text(encoding="utf-8"))
        return all(stamp.get(group) == self._digest(group) for group in self._groups())

    def _pins(self) -> list[Path]:
        folder = self.root / "tools" / "pins"
        return [folder / "common.txt", folder / f"{self.pins}.txt"]

    def _torch_has_hashes(self) -> bool:
        """Whether torch comes from the usual index, as it does unless the user names another one.

        A torch that came from another one stays, also where the variable is not set any more.
        """
        if self.platform == "npu" or os.environ.get("PIP_EXTRA_INDEX_URL"):
            return False
        pins = pins_with_hashes(self._pins()[1])
        (version,) = (pin.partition("==")[2] for pin in pins if pin.startswith("torch=="))
        builds = self.venv.glob(f"lib/python*/site-packages/torch-{version}+*.dist-info")
        return not any(builds)

    def _hashes(self, group: str) -> list[Path]:
        """The files of pins with hashes that belong to a group."""
        usual = ["common", self.pins, *(["cuda"] if self.platform == "default" else [])]
        names = ["ci"] if group == "ci" else usual
        return [self.root / "tools" / "pins" / "hashes" / f"{name}.txt" for name in names]

    def _refuse_old_hashes(self) -> None:
        for file in (file for group in self._groups() for file in self._hashes(group)):
            pins = file.parent.parent / file.name
            there = hashed_pins(file) if file.is_file() else []
            for line in sorted(set(pins_with_hashes(pins)) ^ set(there)):
                raise SetupError(
                    f"{file.relative_to(self.root)} and tools/pins/{file.name} differ in {line}: "
                    "run .venv/bin/python tools/lock.py, which writes the hashes of the pins."
                )

    def _digest(self, group: str) -> str:
        """A hash of all that decides what is installed, and where the editable sources stand."""
        projects = [self.root / "common", *(model.path for model in find_models(self.root))]
        files = [*self._pins(), *(project / "pyproject.toml" for project in projects)]
        files += self._hashes(group)
        if group == "ci":
            files += [self._simulator / "pyproject.toml", self.root / "ci" / "requirements.txt"]
        digest = hashlib.sha256(f"{self.root}\0{self.pins}\0".encode())
        for file in files:
            digest.update(f"{file.relative_to(self.root)}\0".encode() + file.read_bytes())
        return digest.hexdigest()

    def _make_venv(self) -> None:
        works = self.python.exists() and _succeeds([str(self.python), "-Im", "pip", "--version"])
        if works and self._has_torch():
            return
        self._refuse_without_space()
        if works:
            return
        self._refuse_without_venv()
        if self.venv.exists():
            _say(f"{self.venv} is not whole and is made anew.")
        _say(f"Making a virtual environment in {self.venv}.")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.venv)], check=True)

    def _has_torch(self) -> bool:
        return bool(list(self.venv.glob("lib/python*/site-packages/torch/version.py")))

    def _refuse_without_venv(self) -> None:
        if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise SetupError(
                f"{sys.executable} cannot make virtual environments: install its venv package "
                f"(Debian and Ubuntu: apt install python{version}-venv)."
            )

    def _refuse_without_space(self) -> None:
        free = shutil.disk_usage(self.root).free
        if free < NEEDED_BYTES:
            raise SetupError(
                f"The environment needs {NEEDED_BYTES / 1e9:.0f} GB of disk, but {self.root} has "
                f"{free / 1e9:.1f} GB free: make room, or clone to a larger disk."
            )

    def _install(self) -> None:
        self._refuse_old_hashes()
        # Progress bars for the long downloads; an update would only list what is there already.
        quiet = ["--quiet"] if self._has_torch() else []
        if not quiet:
            _say("Installing torch and what the models need (several GB where nothing is cached).")
        hashed = [*quiet, "--no-deps", "--require-hashes", "--only-binary=:all:"]
        for file in (file for group in self._groups() for file in self._hashes(group)):
            if file.stem != "cuda" or self._torch_has_hashes():
                hashed += ["--requirement", str(file)]
        if self._torch_has_hashes():
            self._pip(hashed)
        else:
            torch = [word for pins in self._pins() for word in ("--constraint", str(pins))]
            torch = [*quiet, *torch, *FROM_OTHER_INDEX]
            self._pip(["--no-deps", *torch])
            self._pip(hashed)
            self._pip(torch)  # the libraries that this build brings, if it is not for a CPU
        _say("Installing zoo-common and the models.")
        # All that they need is there by now, and without an index nothing else can come in.
        words = ["--quiet", "--isolated", "--no-index", "--no-build-isolation"]
        words += ["--editable", f"{self.root / 'common'}[digits]"]
        for model in find_models(self.root):
            words += ["--editable", str(model.path)]
        if self.with_ci:
            words += ["--editable", str(self._simulator)]
            words += ["--requirement", str(self.root / "ci" / "requirements.txt")]
        try:
            self._pip(words, PIP_CONFIG_FILE=os.devnull)
        except SetupError:
            unmet = UNMET.search(self._log.read_text(encoding="utf-8", errors="replace"))
            if unmet is None:
                raise
            raise SetupError(
                f"{unmet[2]} needs {unmet[1]}, which tools/pins does not give it: pin a version "
                "there, and run .venv/bin/python tools/lock.py for its hashes."
            ) from None

    def _pip(self, words: list[str], **variables: str) -> None:
        """Runs ``pip install``; its errors and warnings go to a log."""
        command = [str(self.python), "-Im", "pip", "install", "--disable-pip-version-check"]
        environment = {**os.environ, "PIP_USER": "0", **variables}
        with self._log.open("w", encoding="utf-8") as log:
            code = subprocess.call([*command, *words], stderr=log, env=environment)
        if code:
            raise SetupError(_pip_failure(self._log))


def _pip_failure(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    if "No space left on device" in text:
        return (
            "The disk became full during the installation, for which pip also needs room in "
            f"{tempfile.gettempdir()}: make room, or set TMPDIR, and run again ({log})."
        )
    if any(sign in text for sign in NETWORK_SIGNS):
        return (
            "The package index could not be reached: connect, or name a mirror in PIP_INDEX_URL, "
            f"and run the same command again (what pip said: {log})."
        )
    wrong = OTHER_HASH.search(text)
    if wrong:
        return (
            f"{wrong[2]} is not the {wrong[1]} whose hashes stand in tools/pins/hashes (its "
            f"SHA-256 is {wrong[3]}), so pip installed nothing: take no package from that place "
            "before you know why it differs; another index can be named in PIP_INDEX_URL (all "
            f"that pip said: {log})."
        )
    errors = [line for line in text.splitlines() if line.startswith("ERROR: ")]
    said = errors[-1].removeprefix("ERROR: ") if errors else "no reason given"
    return f"pip could not install the packages: {said} (all it said: {log})"


def _forget_damaged(venv: Path) -> None:
    """Removes the metadata of packages whose files are not all there, so that pip brings them.

    An installation that was cut short can leave a package that pip believes to be installed.
    """
    for site in venv.glob("lib/python*/site-packages"):
        for info in site.glob("*.dist-info"):
            if not _is_whole(site, info / "RECORD"):
                _say(f"{info.name.removesuffix('.dist-info')} was cut short and is installed anew.")
                shutil.rmtree(info)
        for leftover in site.glob("~*"):  # what pip set aside while it replaced a package
            shutil.rmtree(leftover, ignore_errors=True)


def _is_whole(site: Path, record: Path) -> bool:
    if not record.is_file():
        return False
    with record.open(encoding="utf-8", newline="") as file:
        for name, _, size in csv.reader(file):
            path = site / name
            if not path.exists() or (size and path.stat().st_size != int(size)):
                return False
    return True


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process at a time through; the lock goes with the process that holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _say("Another start is making the environment: waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _say(sentence: str) -> None:
    print(sentence, flush=True)


def ensure(with_ci: bool = False, root: Path = ROOT) -> int:
    """Makes the environment; the exit code, after one sentence on standard error if it fails."""
    try:
        Environment(root, with_ci).ensure()
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"The environment in {root / '.venv'} cannot be made: {error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes the repository's .venv.")
    parser.add_argument("--ci", action="store_true", help="with what tests and checks need")
    sys.exit(ensure(parser.parse_args().ci))
