"""Builds the stand-in CANN for the torch and torch_npu of the Python that runs this.

    .venv-torch-npu/bin/python common/npu_sim/cann/build_cann.py

prints a directory that stands for ``/`` of a machine with CANN and its driver. With its path in
ZOO_NPU_ENV_ROOT, ``source test/env_npu.sh`` finds CANN there as it does on a real machine. It is
built once for each state of the sources and versions, in NPU_SIM_CACHE (~/.cache/npu_sim).
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "npu_sim/csrc"
"""The simulated device's sources; host_alias.h is used here, too."""

HOME = Path("usr/local/Ascend/ascend-toolkit/latest")

LIBRARIES = {
    "libascendcl.so": ("accepted", "device", "memory", "operators", "profiler", "streams"),
    "libascend_hal.so": ("driver",),
    "libhccl.so": ("hccl", "hccl_link", "hccl_types"),
    # torch_npu loads these, too; what it uses of them here is in libascendcl.so.
    "libacl_op_compiler.so": (),
    "libge_runner.so": (),
    "libgraph.so": (),
    "libacl_tdt_channel.so": (),
    "libmsprofiler.so": (),
}

_KERNELS = (
    "-DTORCH_EXTENSION_NAME=kernels",
    "-DTORCH_API_INCLUDE_EXTENSION_H",
    *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-ltorch_npu"),
    "-Wl,--allow-shlib-undefined",  # of CANN, which is found when torch_npu is imported
)

_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*_cache", "*.pyi")


class BuildError(Exception):
    """It cannot be built; the message is one sentence for the user."""


def _package(name: str) -> Path:
    """The directory of an installed package, which is not imported: torch_npu needs CANN."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(
            f"{name} is not installed for {sys.executable}: run bash ci/test_torch_npu.sh, which "
            "makes an environment that has it."
        )
    return Path(spec.origin).parent


def _versions() -> list[str]:
    return [
        sys.version,
        importlib.metadata.version("torch"),
        importlib.metadata.version("torch-npu"),
    ]


def _digest() -> str:
    digest = hashlib.sha256("\0".join(_versions()).encode())
    for folder in ("csrc", "python", "root"):
        for file in sorted((HERE / folder).rglob("*")):
            if file.is_file() and file.suffix in (".c", ".cpp", ".h", ".py", ".sh", ".info"):
                digest.update(f"\0{file.relative_to(HERE)}\0".encode() + file.read_bytes())
    for file in (HERE / "build_cann.py", SHARED / "host_alias.h"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _compiler(*names: str) -> str:
    for name in names:
        if name and (found := shutil.which(name)):
            return found
    raise BuildError(
        f"No compiler was found ({' or '.join(name for name in names if name)}): install gcc and "
        "g++ (Debian and Ubuntu: apt install g++)."
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        said = errors[0] if errors else done.stderr.strip()[-300:]
        raise BuildError(f"{Path(command[0]).name} cannot build the stand-in CANN: {said}")


def _build_libraries(directory: Path) -> None:
    """The C libraries, checked against the CANN headers in torch_npu's wheel."""
    compiler = _compiler(os.environ.get("CC", ""), "gcc", "cc")
    directory.mkdir(parents=True)
    for library, sources in LIBRARIES.items():
        command = [compiler, "-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
        command += ["-Wall", "-Wno-deprecated-declarations", "-pthread"]
        command += ["-isystem", str(_package("torch_npu") / "include")]
        if sources:
            command += [str(HERE / "csrc" / f"{source}.c") for source in sources]
        else:
            command += ["-x", "c", os.devnull, "-x", "none", f"-L{directory}"]
            command += ["-Wl,--no-as-needed", "-lascendcl", "-Wl,-rpath,$ORIGIN"]
        _run([*command, "-o", str(directory / library), "-lrt"])


def _build_extensions(directory: Path) -> None:
    """The C++ parts, which belong to this Python, torch and torch_npu."""
    compiler = _compiler(os.environ.get("CXX", ""), "g++", "c++")
    torch, torch_npu = _package("torch"), _package("torch_npu")
    includes = [torch / "include", torch / "include/torch/csrc/api/include", torch_npu / "include"]
    includes += [Path(sysconfig.get_paths()["include"]), SHARED]
    common = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall"]
    for include in includes:
        common += ["-isystem", str(include)]
    common += [f"-L{torch / 'lib'}", f"-L{torch_npu / 'lib'}"]
    for library, source, *options in (
        ("allocator_keys.so", "allocator_keys.cpp", "-lc10"),
        ("kernels.so", "kernels.cpp", *_KERNELS),
    ):
        _run([*common, str(HERE / "csrc" / source), "-o", str(directory / library), *options])


def build() -> Path:
    """Builds the stand-in CANN unless that was done; returns the directory that stands for ``/``.

    Raises:
        BuildError: no compiler, no torch_npu, or sources that do not fit its version.
    """
    cache = Path(os.environ.get("NPU_SIM_CACHE") or Path.home() / ".cache/npu_sim")
    root = cache / f"cann-{_digest()}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "cann.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.is_dir():
            return root
        partial = root.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(HERE / "root", partial)
        _build_libraries(partial / HOME / "lib64")
        packages = partial / HOME / "python/site-packages"
        shutil.copytree(HERE / "python", packages, ignore=_LEFT_OUT)
        _build_extensions(packages / "npu_sim_cann")
        partial.rename(root)
    return root


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(str(error))
