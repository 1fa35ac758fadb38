"""ci/smoke.sh: the scores of test/runs.yaml are asserted, with runs that take no time."""

import os
import re
import subprocess
from pathlib import Path

import pytest

TWINS = "contrib/cv/classification/Twins-ALTGVT-S"
RUN = r"""#!/usr/bin/env bash
# Stands for a training: leaves the score in a result.json, or fails.
set -euo pipefail
for word in "$@"; do [[ $word != --output_dir=* ]] || output=${word#*=}; done
mkdir -p "$output"
printf '{"status": "completed",
    "metrics": {"top1": %s, "box_AP50": %s, "words_share": %s, "mask_AP50": %s}}' \
    "$SCORE" "$SCORE" "$SCORE" "${MASK_SCORE-$SCORE}" > "$output/result.json"
exit "${RUN_CODE-0}"
"""


@pytest.fixture
def zoo(copy: Path, stub_venv: Path) -> Path:
    """A copy whose smoke runs are stubs."""
    for script in copy.glob("*/**/test/train_*.sh"):
        script.write_text(RUN)
    return copy


def smoke(zoo: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(zoo / "ci" / "smoke.sh"), *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_every_run_with_a_score_runs_and_passes(zoo: Path) -> None:
    done = smoke(zoo, SCORE="99.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train_smoke_1p: top1 99.50 reaches 85" in done.stdout
    assert "train_smoke_2p: top1 99.50 reaches 85" in done.stdout
    assert "train_smoke_1p: mask_AP50 99.50 reaches 50" in done.stdout
    assert "train_full_8p" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith(" passed, 0 failed")


def test_a_low_score_fails(zoo: Path) -> None:
    done = smoke(zoo, str(zoo / TWINS), SCORE="20")
    assert done.returncode == 1
    assert "train_smoke_1p: top1 20.00 is below 85" in done.stdout
    assert "0 passed" in done.stdout.splitlines()[-1]


def test_each_score_of_a_run_counts(zoo: Path) -> None:
    done = smoke(zoo, "rcnn", SCORE="99.5", MASK_SCORE="20")
    assert done.returncode == 1
    assert "train_smoke_1p: box_AP50 99.50 reaches 50" in done.stdout
    assert "train_smoke_1p: mask_AP50 20.00 is below 50" in done.stdout
    assert done.stdout.splitlines()[-1] == "smoke: 1 passed, 2 failed"


def test_a_failed_run_fails_whatever_it_left(zoo: Path) -> None:
    done = smoke(zoo, "twins", SCORE="99.5", RUN_CODE="3")
    assert done.returncode == 1
    assert "train_smoke_1p ended with exit code 3" in done.stdout


def test_an_unknown_model_is_told(zoo: Path) -> None:
    done = smoke(zoo, "twin", SCORE="99.5")
    assert done.returncode == 2
    assert re.search(r"there is: declip,.* rcnn, solov2, twins", done.stderr)
