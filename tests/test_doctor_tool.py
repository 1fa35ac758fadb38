"""tools/doctor.py: with the active environment, with the repository's, and with none."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A Python with nothing installed."""
    venv.create(tmp_path / "bare", with_pip=False)
    return tmp_path / "bare/bin/python"


def doctor(python: Path | str, root: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [str(root / "tools/doctor.py"), "--device=cpu", "--json"]
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(python), *words], cwd=cwd, env=environ, capture_output=True, text=True, timeout=240
    )


def test_before_there_is_an_environment_it_says_how_to_make_it(
    copy: Path, bare: Path, tmp_path: Path
) -> None:
    done = doctor(bare, copy, tmp_path)
    assert done.returncode == 1, done.stderr
    found = {line["part"]: line for line in json.loads(done.stdout)["lines"]}
    assert found["zoo"]["status"] == found["torch"]["status"] == "problem"
    assert found["zoo"]["advice"] == "run: bash tools/quickstart.sh"
    assert found["disk"]["status"] in ("ok", "note")
    assert not [line for line in found.values() if "could not be checked" in line["text"]]


def test_the_repositorys_environment_is_taken_where_the_active_one_lacks_the_zoo(
    copy: Path, bare: Path, tmp_path: Path
) -> None:
    python = copy / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = doctor(bare, copy, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True
