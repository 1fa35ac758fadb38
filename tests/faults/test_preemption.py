"""A scheduler that wants its machines back: what a run saves, its exit code, and how it goes on.

Slurm and Kubernetes send SIGTERM or SIGUSR1 some time before they kill; a run that was told so
ends with 128 + the signal, which their files in tools/cluster requeue on, and the same command
with ``--auto_resume`` goes on.
"""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from harness import (
    check_same_training,
    content_of,
    records,
    result_of,
    run_to_end,
    start,
)
from test_kills import smoke

WORDS = ["train_2p", "--deterministic", "--save_every=4", "--auto_resume"]
SLOW = "fault.step_time_s=0.05"


@pytest.mark.parametrize(
    "orders",
    [
        pytest.param([(signal.SIGUSR1, 6)], id="once"),
        pytest.param(
            [(signal.SIGTERM, 6), (signal.SIGUSR1, 17)], marks=pytest.mark.thorough, id="twice"
        ),
    ],
)
def test_a_preempted_run_ends_as_one_left_alone(
    toy: Path,
    output: Path,
    left_alone: Callable[[int], Path],
    orders: list[tuple[signal.Signals, int]],
) -> None:
    """Checkpoint at the very step, code, words, and the same command again."""
    words = [*WORDS, "--steps=40", SLOW]
    for number, step in orders:
        with start(toy, *words, output=output) as run:
            run.wait_for_step(step)
            run.signal(number)
            done = run.end()
            run.check_nothing_left()
        assert done.code == 128 + number, done.err
        assert f"stopped by {number.name}; continue with --resume" in done.err
        result = result_of(output)
        assert (result["status"], result["signal"]) == ("interrupted", number)
        steps = [line["step"] for line in records(output)]
        assert content_of(output)["step"] == result["steps"] == steps[-1] < 40
    done = run_to_end(toy, *words, output=output)
    assert done.code == 0, done.err
    assert result_of(output)["status"] == "completed"
    assert [line["step"] for line in records(output)] == list(range(1, 41))
    check_same_training(output, left_alone(40))


@pytest.mark.thorough
def test_a_run_that_is_started_again_when_it_was_done_stays_as_it_is(
    toy: Path, output: Path, left_alone: Callable[[int], Path]
) -> None:
    for _ in range(2):
        done = run_to_end(toy, *WORDS, "--steps=40", output=output)
        assert done.code == 0, done.err
        assert [line["step"] for line in records(output)] == list(range(1, 41))
        check_same_training(output, left_alone(40))


@pytest.mark.thorough
def test_auto_resume_takes_no_other_runs_checkpoint(
    toy: Path, scratch: Path, left_alone: Callable[[int], Path]
) -> None:
    output, other = scratch / "output", scratch / "other"
    words = [*WORDS, "--steps=40", SLOW]
    with start(toy, *words, output=output) as run:
        run.wait_for_step(6)
        run.signal(signal.SIGTERM)
        assert run.end().code == 128 + signal.SIGTERM
    stopped = content_of(output)["step"]
    assert run_to_end(toy, *words, "--seed=5", output=other).code == 0
    for file in (other / "checkpoints").glob("step_*.pth"):
        shutil.copy(file, output / "checkpoints")
    (newest,) = sorted((output / "checkpoints").glob("step_*.pth"))[-1:]
    last = output / "checkpoints" / "last.pth"
    last.unlink()
    last.symlink_to(newest.name)
    done = run_to_end(toy, *words, output=output)
    assert done.code == 0, done.err
    assert f"at step {stopped}" in (output / "train_0.log").read_text()
    check_same_training(output, left_alone(40))


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_every_process_gets_the_signal_as_from_slurm(scratch: Path, number: signal.Signals) -> None:
    """``scancel --full`` and a container's end signal ranks and data workers too."""
    output, whole = scratch / "output", scratch / "whole"
    directory, words = smoke("twins", 60)
    with start(directory, *words, "--auto_resume", output=output) as run:
        run.wait_for_step(5)
        for process in run.processes():
            process.send_signal(number)
        done = run.end()
        run.check_nothing_left()
    assert done.code == 128 + number, done.err
    assert result_of(output)["status"] == "interrupted"
    for target in (output, whole):
        done = run_to_end(directory, *words, "--auto_resume", output=target)
        assert done.code == 0, done.err
    check_same_training(output, whole)


@pytest.mark.thorough
def test_a_second_signal_ends_at_once(toy: Path, output: Path) -> None:
    with start(toy, *WORDS, "--steps=40", "fault.step_time_s=20", output=output) as run:
        run.wait_for_step(1)
        run.signal(signal.SIGUSR1)
        time.sleep(6)  # what comes within 5 s is the same signal by another way
        signalled_at = time.monotonic()
        run.signal(signal.SIGTERM)
        done = run.end()
        assert time.monotonic() - signalled_at < 12  # the step under way takes longer
        run.check_nothing_left()
    assert done.code in (128 + signal.SIGUSR1, 128 + signal.SIGTERM), done.err
    assert "Traceback" not in done.err


@pytest.mark.thorough
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_at_any_moment_of_a_runs_life(
    toy: Path, output: Path, left_alone: Callable[[int], Path], number: signal.Signals
) -> None:
    """Also while Python starts, while the ranks meet, and after the last step."""
    words = [*WORDS, "--steps=400", "fault.step_time_s=0.05"]
    draw = random.Random(number)
    for turn in range(21):
        with start(toy, *words, output=output) as run:
            if turn == 20:
                run.wait_for_step(400)
            elif turn % 2:
                run.wait_for(run.steps, "the first step")
                time.sleep(draw.uniform(0, 1))
            else:
                time.sleep(draw.uniform(0.02, 4))
            run.signal(number)
            done = run.end()
            run.check_nothing_left()
        # Before the launcher has any handler, a signal does what it does to every program; and a
        # run that had all its steps may end well.
        allowed = {128 + number, 0 if turn == 20 else -number}
        assert done.code in allowed, (turn, done.err)
        assert "Traceback" not in done.err
    done = run_to_end(toy, *words, output=output)
    assert done.code == 0, done.err
    assert [line["step"] for line in records(output)] == list(range(1, 401))
    check_same_training(output, left_alone(400))


@pytest.mark.thorough
def test_a_scheduler_that_does_not_wait_costs_the_steps_since_the_last_checkpoint(
    toy: Path, output: Path, left_alone: Callable[[int], Path]
) -> None:
    """SIGTERM, and SIGKILL for every process before the step under way is done."""
    words = [*WORDS, "--steps=40", "--save_every=1", "fault.step_time_s=0.5"]
    with start(toy, *words, output=output) as run:
        run.wait_for_step(3)
        run.wait_for((output / "checkpoints" / "last.pth").is_file, "a checkpoint")
        run.signal(signal.SIGTERM)
        for process in run.processes():
            process.kill()
        assert run.end().code == -signal.SIGKILL
        run.check_nothing_left()
    done = run_to_end(toy, *words, output=output)
    assert done.code == 0, done.err
    check_same_training(output, left_alone(40))


@pytest.mark.thorough
def test_a_rank_that_is_signalled_alone_stops_all(toy: Path, output: Path) -> None:
    """Some sites signal the processes that hold the cards, and no launcher."""
    with start(toy, *WORDS, "--steps=60", SLOW, output=output) as run:
        run.wait_for_step(3)
        rank: psutil.Process = run.ranks()[1]
        rank.send_signal(signal.SIGUSR1)
        done = run.end()
        run.check_nothing_left()
    # Rank 0 writes the record, and heard of it from rank 1 without the number.
    assert done.code == 128 + signal.SIGTERM, done.err
    assert result_of(output)["status"] == "interrupted"
