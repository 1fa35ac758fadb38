"""What the launcher shows of the files that ranks write."""

import json
import time
from pathlib import Path

import pytest

from zoo_common.console import Console


def record(step: int) -> str:
    return json.dumps({"step": step, "total_steps": 9, "loss": 0.5, "images_per_sec": 2.0}) + "\n"


def test_a_record_that_is_written_anew_and_longer_is_read_from_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a resumed run does between two looks; an error in the console's thread fails the test."""
    log, metrics = tmp_path / "train_0.log", tmp_path / "metrics.jsonl"
    log.touch()
    metrics.write_text(record(1)[:-9])
    console = Console(log, metrics)
    new = tmp_path / "new"
    new.write_text(record(1) + record(2))
    new.replace(metrics)
    with log.open("a") as stream:
        stream.write("resumed\n")
    time.sleep(0.5)
    console.stop()
    assert capsys.readouterr().out == "resumed\n"
