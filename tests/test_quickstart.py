"""tools/quickstart.sh from outside, with a smoke run that takes no time."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

TWINS = "contrib/cv/classification/Twins-ALTGVT-S"
SMOKE = """#!/usr/bin/env bash
# Stands for the smoke run: leaves a record, and the words it was given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p test/output/0
printf '%s\\n' "$VIRTUAL_ENV" "$(command -v python3)" "$@" > test/output/0/words
[ -z "${SMOKE_SLEEP-}" ] || { trap 'exit 143' TERM; echo ready; sleep "$SMOKE_SLEEP" & wait; }
cat > test/output/0/result.json <<'JSON'
{"network": "Twins-ALTGVT-S", "metric": {"name": "top1", "value": 93.25, "unit": "percent"},
 "throughput": {"images_per_sec": 123.4}}
JSON
exit "${SMOKE_CODE-0}"
"""


@pytest.fixture
def zoo(copy: Path, stub_venv: Path) -> Path:
    """A copy with a stub environment and a stub run."""
    (copy / TWINS / "test" / "train_smoke_1p.sh").write_text(SMOKE)
    return copy


def quickstart(
    zoo: Path, *words: str, cwd: str = "/", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(zoo / "tools" / "quickstart.sh"), *words],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_ends_with_score_speed_and_places(zoo: Path) -> None:
    done = quickstart(zoo)
    assert done.returncode == 0, done.stderr
    end = done.stdout[done.stdout.index("\n\n") :]
    output = zoo / TWINS / "test/output/0"
    for text in ("top1 93.25 %", "123.4", f"{output}\n", "metrics.jsonl", "tensorboard"):
        assert text in end
    venv, python, *words = (output / "words").read_text().splitlines()
    assert venv == str(zoo / ".venv")
    assert python == str(zoo / ".venv/bin/python3")
    assert words == ["--data_path=sample", "--device=cpu"]


def test_second_start_calls_no_pip(zoo: Path, stub_venv: Path) -> None:
    assert quickstart(zoo).returncode == 0
    calls = stub_venv.read_text()
    assert quickstart(zoo).returncode == 0
    assert stub_venv.read_text() == calls


def test_options_go_to_the_run_and_may_come_without_a_model(zoo: Path) -> None:
    assert quickstart(zoo, "--data_path", "digits").returncode == 0
    words = (zoo / TWINS / "test/output/0/words").read_text().splitlines()
    assert words[-2:] == ["--data_path", "digits"]
    assert quickstart(zoo, "schedule.epochs=1").returncode == 0


def test_a_model_has_the_name_of_its_directory_too(zoo: Path) -> None:
    assert quickstart(zoo, "Twins-ALTGVT-S").returncode == 0
    assert quickstart(zoo, str(zoo / TWINS)).returncode == 0


def test_exit_code_is_the_runs(zoo: Path) -> None:
    failed = quickstart(zoo, "twins", SMOKE_CODE="7")
    assert failed.returncode == 7
    assert "exit code 7" in failed.stderr
    assert "top1" not in failed.stdout


def test_unknown_model_names_those_there_are_and_installs_nothing(
    zoo: Path, stub_venv: Path
) -> None:
    unknown = quickstart(zoo, "twin")
    assert unknown.returncode == 2
    assert "'twin'" in unknown.stderr
    assert "twins" in unknown.stderr
    assert not stub_venv.exists()


def test_help_installs_nothing(zoo: Path, stub_venv: Path) -> None:
    shown = quickstart(zoo, "--help")
    assert shown.returncode == 0
    assert "usage: bash tools/quickstart.sh [MODEL]" in shown.stdout
    assert not stub_venv.exists()


def test_sigterm_reaches_the_run(zoo: Path) -> None:
    running = subprocess.Popen(
        ["bash", str(zoo / "tools" / "quickstart.sh")],
        env={**os.environ, "SMOKE_SLEEP": "30"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert running.stdout is not None
    started = time.monotonic()
    assert any(line == "ready\n" for line in running.stdout)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=10) == 143
    assert time.monotonic() - started < 10
    running.stdout.close()
