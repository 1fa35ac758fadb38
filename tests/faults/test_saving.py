"""Checkpoints on disks that fail: what is there is whole, and the run says what it could not do."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import disk
import pytest
import torch
from harness import (
    TOY,
    Done,
    check_same_training,
    content_of,
    records,
    result_of,
    run_to_end,
    start,
)

PROGRAM = Path(__file__).with_name("saving_program.py")
WORDS = ("train_1p", "--steps=8", "--save_every=2", "--deterministic")
AFTER = ["best.pth", "last.pth", "step_00000004.pth"]


def attempts(directory: Path, *deeds: str) -> Iterator[dict[str, Any]]:
    """A save whose first call meets each deed, then the second, to the last: what each left."""
    environment = {**os.environ, **disk.environment(""), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, PROGRAM, directory, *deeds],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return map(json.loads, done.stdout.splitlines())


def test_a_kill_at_each_call_of_a_save_leaves_the_newest_or_the_one_before(tmp_path: Path) -> None:
    met = {"kill": 0, "tear": 0}
    for facts in attempts(tmp_path, *met):
        met[facts["deed"]] += 1
        assert facts["code"] == -signal.SIGKILL, facts
        assert facts["newest"] in (2, 3), facts
        assert facts["last"] == facts["newest"], facts
        assert facts["best"] in (2, 3), facts
        # Whoever goes on there has room: nothing unfinished is left, and the numbers are kept.
        assert [name for name in facts["after"] if not name.endswith(".aside")] in (
            [*AFTER[:2], "step_00000002.pth", AFTER[2]],
            [*AFTER[:2], "step_00000003.pth", AFTER[2]],
        ), facts
    assert met["kill"] >= 25 and met["tear"] >= 8, met  # of 36 and 14 when this was written


@pytest.mark.parametrize(
    "errors",
    [
        ["EIO", "short"],
        pytest.param(["ENOSPC", "EDQUOT", "EROFS", "ESTALE"], marks=pytest.mark.thorough),
    ],
)
def test_an_error_at_each_call_of_a_save_is_told_or_does_not_matter(
    errors: list[str], tmp_path: Path
) -> None:
    failed = dict.fromkeys(errors, 0)
    for facts in attempts(tmp_path, *errors):
        assert facts["code"] in (0, 3), facts
        failed[facts["deed"]] += facts["code"] == 3
        assert facts["newest"] == 3 if facts["code"] == 0 else facts["newest"] in (2, 3), facts
        assert facts["best"] in (2, 3), facts
        assert facts["last"] in (None, facts["newest"]), facts
    assert all(count >= 20 for error, count in failed.items() if error != "short"), failed
    assert failed.get("short", 0) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "output"
    assert run_to_end(TOY, *WORDS, output=output).code == 0
    return output


def train(toy: Path, output: Path, rule: str = "", *words: str) -> Done:
    environment = disk.environment(rule) if rule else {}
    return run_to_end(toy, *WORDS, *words, output=output, environment=environment)


def at(output: Path, step: int, do: str, **facts: Any) -> str:
    """What happens to the checkpoint of a step."""
    return disk.rule(output / "checkpoints", do, name=f"step_{step:08d}", **facts)


def resumes_as_if_nothing_had_happened(toy: Path, output: Path, whole: Path) -> str:
    done = train(toy, output, "", "--resume")
    assert done.code == 0, done.err
    check_same_training(whole, output)
    assert [line["step"] for line in records(output)] == list(range(1, 9))
    return done.out


def test_a_full_disk_stops_the_run_and_resume_goes_on(toy: Path, output: Path, whole: Path) -> None:
    done = train(toy, output, at(output, 4, "ENOSPC", calls=["write"], at=2, times=0))
    assert done.code == 1
    assert f"Cannot write the checkpoint {output}/checkpoints/step_00000004.pth: " in done.err
    told = "No space left on device; step_00000002.pth is whole: free some room and continue with"
    assert told in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert "resumed from step_00000002.pth" in resumes_as_if_nothing_had_happened(
        toy, output, whole
    )


@pytest.mark.parametrize(
    ("do", "call", "words"),
    [
        ("ENOSPC", "write", "No space left on device"),
        pytest.param("EDQUOT", "close", "Disk quota exceeded", marks=pytest.mark.thorough),
        pytest.param("EROFS", "open", "Read-only file system", marks=pytest.mark.thorough),
        pytest.param("EIO", "fsync", "Input/output error", marks=pytest.mark.thorough),
    ],
)
def test_a_run_goes_on_without_a_checkpoint_when_asked(
    do: str, call: str, words: str, toy: Path, output: Path, whole: Path
) -> None:
    rule = at(output, 4, do, calls=[call], times=0)
    done = train(toy, output, rule, "--on_save_error=continue")
    assert done.code == 0, done.err
    assert f"{words}; step_00000002.pth is whole: training goes on" in done.out
    check_same_training(whole, output)
    saved = sorted(file.name for file in (output / "checkpoints").glob("step_*"))
    assert saved == ["step_00000006.pth", "step_00000008.pth"]


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["the end", "a signal"])
def test_the_last_checkpoint_must_be_written(how: str, toy: Path, output: Path) -> None:
    """What trained for days and cannot be kept is no run that went well."""
    rule = disk.rule(output / "checkpoints", "EDQUOT", calls=["write"], times=0)
    words = [*WORDS, "--on_save_error=continue", "fault.step_time_s=0.2"]
    if how == "a signal":
        words.append("--save_every=1000")
    environment = disk.environment(rule)
    with start(toy, *words, output=output, environment=environment) as run:
        if how == "a signal":
            run.wait_for_step(3)
            run.launcher.send_signal(signal.SIGTERM)
        done = run.end(60)
        run.check_nothing_left()
    assert done.code == 1
    assert "Disk quota exceeded; there is none before it" in done.err.splitlines()[-1]


def test_training_goes_on_while_the_disk_stalls(toy: Path, output: Path, whole: Path) -> None:
    rule = at(output, 2, "stall", calls=["fsync"], seconds=3)
    done = train(toy, output, rule, "run.log_every=1")
    assert done.code == 0, done.err
    lines = records(output)
    assert [line["step"] for line in lines] == list(range(1, 9))
    # The save of step 4 waits for the one of step 2; step 3 does not.
    assert lines[3]["time"] - lines[1]["time"] < 2
    assert "it is slower than the saves follow" in done.out
    check_same_training(whole, output)


@pytest.mark.thorough
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_stalls_for_too_long(on_error: str, toy: Path, output: Path) -> None:
    rule = at(output, 4, "stall", calls=["write"], seconds=6)
    words = ["run.save_timeout_s=2", f"--on_save_error={on_error}", "fault.step_time_s=1.5"]
    done = train(toy, output, rule, *words)
    late = "/checkpoints/step_00000004.pth within run.save_timeout_s=2 s; step_00000002.pth is"
    if on_error == "stop":
        assert done.code == 1
        assert late in done.err.splitlines()[-1]
        assert result_of(output)["status"] == "failed"
    else:
        assert done.code == 0, done.err
        assert late in done.out
        assert content_of(output)["step"] == 8


def test_a_rank_that_is_killed_while_it_saves(toy: Path, output: Path, whole: Path) -> None:
    done = train(toy, output, at(output, 6, "kill", calls=["rename"]))
    assert done.code == 128 + signal.SIGKILL
    assert "resumed from step_00000004.pth" in resumes_as_if_nothing_had_happened(
        toy, output, whole
    )
    assert sorted(file.name for file in (output / "checkpoints").iterdir()) == [
        *AFTER[:2],
        "step_00000006.pth",
        "step_00000008.pth",
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(10, 90, 8))
def test_a_rank_that_is_killed_at_any_call(
    number: int, toy: Path, output: Path, whole: Path
) -> None:
    rule = disk.rule(output / "checkpoints", "kill", at=number)
    assert train(toy, output, rule).code == 128 + signal.SIGKILL
    done = train(toy, output, "", "--auto_resume")
    assert done.code == 0, done.err
    check_same_training(whole, output)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    toy: Path, output: Path, whole: Path
) -> None:
    assert train(toy, output).code == 0
    newest = output / "checkpoints" / "step_00000008.pth"
    data = bytearray(newest.read_bytes())
    weight = torch.load(newest, weights_only=True)["model"]["0.weight"]
    data[data.index(weight.numpy().tobytes()) + 2] ^= 16
    newest.write_bytes(data)
    named = train(toy, output, "", f"--resume={newest}")
    assert named.code == 2
    assert "step_00000008.pth is damaged (Bad CRC-32" in named.err
    out = resumes_as_if_nothing_had_happened(toy, output, whole)
    assert "step_00000008.pth is damaged" in out
    assert "step_00000006.pth is taken instead" in out


def test_too_little_room_is_told_before_the_first_step(toy: Path, output: Path) -> None:
    rule = disk.rule(output / "checkpoints", calls=["nothing"], free_bytes=0)
    done = train(toy, output, rule)
    assert done.code == 2
    assert "No space left on device, it needs " in done.err
    assert not records(output)
