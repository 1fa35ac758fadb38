"""tools/scaffold.py: the skeleton passes the checks and its runs are known to the launcher."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PLACE = "built-in/others/New_for_PyTorch"


def program(root: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "tools" / name), *words], capture_output=True, text=True
    )


def test_a_skeleton_passes_the_checks(copy: Path) -> None:
    before = program(copy, "check_layout.py").stdout.splitlines()
    made = program(copy, "scaffold.py", "fresh", PLACE, "--title", "A new model")
    assert made.returncode == 0, made.stderr
    assert program(copy, "tables.py").returncode == 0
    after = program(copy, "check_layout.py").stdout.splitlines()
    assert set(after[:-1]) <= set(before[:-1])
    assert after[-1] != before[-1]  # the new directory was looked at
    ruff = [sys.executable, "-m", "ruff"]
    for words in (["check"], ["format", "--check"]):
        checked = subprocess.run([*ruff, *words, PLACE], cwd=copy, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
    assert "New_for_PyTorch" in (copy / "README.md").read_text()


def test_a_skeletons_runs_are_known_to_the_launcher(copy: Path) -> None:
    assert program(copy, "scaffold.py", "fresh", PLACE).returncode == 0
    script = copy / PLACE / "test" / "train_smoke_1p.sh"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    told = subprocess.run(
        ["bash", script, "--help"], cwd="/", env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "--data_path" in told.stdout
    found = program(copy, "../ci/copy_out.py", "nothing")
    assert found.returncode == 2
    assert re.search(r"there is: declip, fresh,.* rcnn, solov2, twins\.", found.stderr)


def test_a_skeletons_run_starts_and_says_what_to_write(copy: Path, tmp_path: Path) -> None:
    assert program(copy, "scaffold.py", "fresh", PLACE).returncode == 0
    data = tmp_path / "data"
    for split in ("train", "val"):
        (data / split / "a").mkdir(parents=True)
        (data / split / "a" / "1.png").touch()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = copy / PLACE / "test" / "train_smoke_1p.sh"
    told = subprocess.run(
        ["bash", script, f"--data_path={data}"], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 1
    assert "NotImplementedError: Write the loop" in told.stderr.splitlines()[-1]


def test_every_list_of_models_gets_the_package(copy: Path) -> None:
    assert program(copy, "scaffold.py", "fresh", PLACE).returncode == 0
    text = (copy / "pyproject.toml").read_text()
    assert text.count(', "fresh"]') == text.count('"twins"') == 5
    assert 'source_modules = ["zoo_common"]' in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("Fresh", PLACE), "'Fresh' must be a Python package's"),
        (("fresh", "elsewhere/x/y"), "must be like contrib/cv/detection/SOLOv2"),
        (("fresh", "contrib/x"), "must be like contrib/cv/detection/SOLOv2"),
        (("fresh", "contrib/../../x"), "must be like contrib/cv/detection/SOLOv2"),
        (("fresh", "contrib/cv/classification/Twins-ALTGVT-S"), "is there already"),
        (("twins", PLACE), "There is a model twins already"),
    ],
)
def test_what_cannot_be_is_told(copy: Path, words: tuple[str, str], sentence: str) -> None:
    project = (copy / "pyproject.toml").read_text()
    refused = program(copy, "scaffold.py", *words)
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert not (copy / PLACE).exists()
    assert (copy / "pyproject.toml").read_text() == project
