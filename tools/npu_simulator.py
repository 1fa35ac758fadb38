"""Runs a program again on the simulated NPU of common/npu_sim; standard library only."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def is_here() -> bool:
    """Whether this process runs on the simulated NPU, as ``python -m npu_sim`` starts one."""
    simulator, installed = _file_of("npu_sim"), _file_of("torch_npu")
    return simulator is not None and installed is not None and simulator.parent in installed.parents


def _file_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).resolve() if spec and spec.origin else None


def run_again(program: str, words: Sequence[str]) -> int:
    """Runs a program on the simulated NPU; its exit code, or 2 if there is no simulator.

    Args:
        program: the Python file.
        words: its arguments.
    """
    name = Path(program).stem
    if _file_of("npu_sim") is None:
        print(
            f"{name}: the simulated NPU is not installed in {sys.executable}: run "
            "python tools/environment.py --ci, and use the environment that it makes.",
            file=sys.stderr,
        )
        return 2
    command = [sys.executable, "-m", "npu_sim", sys.executable, program, *words]
    return subprocess.call(command)
