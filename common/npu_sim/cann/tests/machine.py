"""A machine with the stand-in CANN, on which the tests run what a user would run."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[4]
CANN = Path(__file__).resolve().parents[1]
HOME = Path("usr/local/Ascend/ascend-toolkit/latest")


def reason_against() -> str | None:
    """Why the tests cannot run with this Python, or None."""
    if importlib.util.find_spec("torch_npu") is None:
        return "needs the real torch_npu: bash ci/test_torch_npu.sh"
    if "+" in importlib.metadata.version("torch-npu"):
        return "needs the real torch_npu, not the simulated one: bash ci/test_torch_npu.sh"
    return None


@dataclass(frozen=True)
class Machine:
    """A machine, as far as its environment variables make one.

    Attributes:
        root: the directory that stands for its ``/``.
        variables: the environment of a user who has just logged in.
    """

    root: Path
    variables: dict[str, str] = field(repr=False)

    def run(
        self, command: list[str], *, cwd: Path = ROOT, timeout: float = 300, **variables: str
    ) -> "Done":
        """Runs a command to its end; a variable that is empty is taken away."""
        environment = {**self.variables, **variables}
        environment = {name: value for name, value in environment.items() if value}
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
        )
        return Done(done.returncode, done.stdout + done.stderr, done.stdout)

    def python(self, code: str, *words: str, timeout: float = 300, **variables: str) -> "Done":
        """Runs Python code after ``source set_env.sh``, as on a machine that is set up."""
        set_env = self.root / HOME.parent / "set_env.sh"
        command = f'source "{set_env}"; exec "$0" "$@"'
        words = ("bash", "-c", command, sys.executable, "-c", code, *words)
        return self.run(list(words), timeout=timeout, **variables)


@dataclass(frozen=True)
class Done:
    """What came out of a command.

    Attributes:
        code: its exit code.
        text: all that it printed.
        output: what it printed on standard output.
    """

    code: int
    text: str
    output: str

    def result(self) -> Any:
        """The JSON of the last line; the command must have succeeded."""
        assert self.code == 0, self.text[-4000:]
        return json.loads(self.output.strip().splitlines()[-1])


def make_machine(root: Path) -> Machine:
    """A machine whose ``/`` is ``root``, where nothing has been sourced yet."""
    variables = {
        **os.environ,
        "ZOO_NPU_ENV_ROOT": str(root),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # A warning of torch_npu becomes an error: an operator for which it has no kernel.
        "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",
    }
    return Machine(root, {name: value for name, value in variables.items() if value})


def program(text: str) -> str:
    """A program without the indentation that it has here."""
    lines = text.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)
