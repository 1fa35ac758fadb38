"""Builds the device's extension when it is first needed, and loads it.

The result is kept in NPU_SIM_CACHE (``~/.cache/npu_sim``) under a hash of the sources, torch,
Python and the compiler's options. torch's own cpp_extension is not used: it warns of a missing
CUDA on every load, and needs ninja.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

_NAME = "npu_sim_backend"
_SOURCES = Path(__file__).parent / "csrc"
# A compiler takes up to 1 GB.
_MOST_COMPILERS = 3
# -O1: kernels are torch's own, so more would cost time at the build and save none at runs.
_OPTIONS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
    "-DUSE_DISTRIBUTED",
    "-DUSE_C10D_GLOO",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
]


class BuildError(RuntimeError):
    """The extension cannot be built; the message says what to do."""


def load() -> ModuleType:
    """The extension, built before if need be.

    Raises:
        BuildError: there is no compiler, no place for the result, or the build failed.
    """
    path = build()
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def build() -> Path:
    """The extension's file, after building it if it is not there yet.

    Raises:
        BuildError: as for :func:`load`.
    """
    result = _result()
    if result.exists():
        return result
    cache = result.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(result.with_suffix(".lock")):
            if not result.exists():
                _build(result)
    except OSError as error:
        raise BuildError(
            f"The simulated NPU cannot be built in {cache} ({error.strerror}): set NPU_SIM_CACHE "
            "to a directory that can be written."
        ) from error
    return result


def reason_against() -> str | None:
    """Why the extension is not there and cannot be built here, or None."""
    if _result().exists():
        return None
    try:
        _compiler()
        _includes()
    except BuildError as error:
        return str(error)
    return None


def _result() -> Path:
    cache = Path(os.environ.get("NPU_SIM_CACHE") or Path.home() / ".cache" / "npu_sim")
    return cache / f"{_NAME}-{_key()}.so"


def _key() -> str:
    """A hash of all that the result depends on."""
    content = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    for text in (torch.__version__, str(torch.version.git_version), sys.version, *_OPTIONS):
        content.update(text.encode() + b"\0")
    return content.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process build at a time; the system frees the lock of one that is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(result: Path) -> None:
    """Compiles next to ``result``, and puts it in place when all is well."""
    compiler = _compiler()
    prefix = f"{result.stem}-building-"
    for left_by_killed in result.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_by_killed, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=result.parent) as name:
        directory = Path(name)
        sources = sorted(_SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
        objects = [directory / f"{source.stem}.o" for source in sources]
        workers = max(1, min(_MOST_COMPILERS, len(os.sched_getaffinity(0))))
        with ThreadPoolExecutor(workers) as pool:
            commands = [
                [*compiler, *_OPTIONS, *_includes(), "-c", str(source), "-o", str(target)]
                for source, target in zip(sources, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        library = directory / result.name
        _run([*compiler, "-shared", *map(str, objects), *_libraries(), "-o", str(library)])
        library.replace(result)


def _compiler() -> list[str]:
    """The command of the C++ compiler: CXX, else what the system has."""
    if asked := os.environ.get("CXX", "").split():
        if shutil.which(asked[0]) is None:
            raise BuildError(
                f"CXX is '{asked[0]}', which is no program of this machine: correct or unset it."
            )
        return asked
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError(
        "The simulated NPU is built from C++ when it is first used, and this machine has no "
        "compiler: install g++ 11 or later (apt-get install g++)."
    )


def _includes() -> list[str]:
    headers = Path(torch.__file__).parent / "include"
    python = sysconfig.get_path("include")
    if not (Path(python) / "Python.h").exists():
        raise BuildError(
            f"The simulated NPU is built from C++ when it is first used, and {python} lacks "
            "Python.h: install Python's headers (apt-get install python3-dev)."
        )
    api = headers / "torch" / "csrc" / "api" / "include"
    return [f"-I{headers}", f"-I{api}", f"-I{python}"]


def _libraries() -> list[str]:
    directory = Path(torch.__file__).parent / "lib"
    return [f"-L{directory}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]


def _run(command: list[str]) -> None:
    """Runs a compiler; what it wrote is shown if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(
            f"Building the simulated NPU failed with exit code {done.returncode}; it needs g++ 11 "
            f"or later and 1 GB of memory a core. The compiler said: {done.stderr[-4000:]}"
        )
