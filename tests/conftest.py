"""What the tests of tools/ and ci/ share."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVE = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", "*_cache", "*.egg-info", "output", "build", "logs", "data"
)

TWINS = "contrib/cv/classification/Twins-ALTGVT-S"

PYTHON_STUB = """#!/usr/bin/env bash
# Stands for .venv/bin/python: writes pip's words to a file instead of running it.
if [[ "$*" == "-Im pip install"* ]]; then
    echo "$*" >> "$PIP_CALLS"
    echo "${PIP_SAYS-}" >&2
    exit "${PIP_CODE-0}"
fi
[[ "$*" == "-Im pip --version" ]] || exec "REAL" "$@"
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository without an environment, in a directory with a space, without git."""
    target = tmp_path / "the zoo"
    shutil.copytree(ROOT, target, ignore=LEAVE)
    return target


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A repository that holds one model and the settings of the tools, no more."""
    target = tmp_path / "the zoo"
    shutil.copytree(ROOT / TWINS, target / TWINS, ignore=LEAVE)
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


@pytest.fixture
def stub_venv(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A .venv in the copy whose pip only writes down how it was called; gives that file."""
    calls = copy.parent / "pip calls"
    monkeypatch.setenv("PIP_CALLS", str(calls))
    monkeypatch.setenv("ZOO_PLATFORM", "default")
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON_STUB.replace("REAL", sys.executable))
    python.chmod(0o755)
    (python.parent / "python3").symlink_to("python")
    version = copy / ".venv/lib/python3.11/site-packages/torch/version.py"
    version.parent.mkdir(parents=True)
    version.touch()
    return calls
