"""Runs that hang: who hangs where is told within the configured time, and the run is ended."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from harness import FaultRun, run_to_end, start
from picture_runs import picture_toy, pictures

LIMIT_S = 4
SECONDS = 30  # for the start of the processes and the end of a run, on a busy machine


def test_a_rank_that_hangs_is_named_with_its_line_and_the_run_ends(toy: Path, output: Path) -> None:
    began = time.monotonic()
    words = ["fault.kind=hang", "fault.rank=1", f"run.hang_timeout_s={LIMIT_S}"]
    done = run_to_end(toy, "train_2p", *words, output=output)
    assert time.monotonic() - began < LIMIT_S + SECONDS
    assert done.code != 0
    assert "rank 1 came no further for " in done.err
    assert " s, and the others wait for it: " in done.err
    assert "  rank 1: " in done.err and "in step 3: toy/train.py:" in done.err
    rank_0 = next(line for line in done.err.splitlines() if line.startswith("  rank 0: "))
    assert "in step 3: torch/" in rank_0 and "<- toy/train.py:" in rank_0
    stacks = (output / "stacks.txt").read_text()
    assert "in fail" in stacks and "_engine_run_backward" in stacks
    assert (output / "checkpoints" / "last.pth").is_file()


@pytest.mark.thorough
def test_a_hung_rank_is_started_again_where_restarts_are_allowed(toy: Path, output: Path) -> None:
    """Told which rank hung, and started anew from the last checkpoint."""
    words = ["fault.kind=hang", "fault.step=5", f"run.hang_timeout_s={LIMIT_S}"]
    words += ["--max_restarts=1", "data.save_every=1"]
    script = toy / "toy" / "train.py"
    once = 'if fault.kind == "hang" and os.environ["ZOO_ROUND"] == "1":'
    text = script.read_text()
    assert text.count('if fault.kind == "hang":') == 1
    script.write_text(text.replace('if fault.kind == "hang":', once))
    done = run_to_end(toy, "train_2p", *words, output=output)
    assert done.code == 0, done.err
    assert "came no further" in (output / "starts.jsonl").read_text()


@pytest.mark.thorough
def test_a_run_that_is_slower_than_it_looks_does_not_hang(toy: Path, output: Path) -> None:
    """Each step and batch counts: the whole takes much longer than the limit."""
    words = ["--steps=8", "fault.step_time_s=1", f"run.hang_timeout_s={LIMIT_S}"]
    done = run_to_end(toy, "train_1p", *words, output=output)
    assert done.code == 0, done.err


def test_a_data_loader_that_hangs_is_told_from_its_workers(
    toy: Path, output: Path, tmp_path: Path
) -> None:
    """Opening a pipe waits for a writer: so does a file on a disk that is gone."""
    picture_toy(toy)
    files = pictures(tmp_path / "pictures", 24)
    files[7].unlink()
    os.mkfifo(files[7])
    words = [f"--data_path={files[0].parent}", "--steps=12", f"run.hang_timeout_s={LIMIT_S}"]
    done = run_to_end(toy, "train_1p", *words, output=output)
    assert done.code != 0
    line = next(line for line in done.err.splitlines() if line.startswith("  rank 0: "))
    assert "in waiting for a batch: " in line and "<- zoo_common/data.py:" in line
    assert "its data worker: zoo_common/flaky.py:" in line
    assert " read" in line.rpartition("its data worker: ")[2]


@pytest.mark.thorough
def test_a_rank_that_was_stopped_from_outside_is_named(toy: Path, output: Path) -> None:
    words = ["--steps=400", "fault.step_time_s=0.1", f"run.hang_timeout_s={LIMIT_S}"]
    with start(toy, "train_2p", *words, output=output) as run:
        run.wait_for_step(3)
        run.ranks()[0].send_signal(signal.SIGSTOP)
        done = run.end()
        run.check_nothing_left()
    assert done.code != 0
    assert "rank 0 came no further" in done.err
    assert "it does not answer: is stopped by a signal" in done.err


@pytest.mark.thorough
def test_a_pause_of_the_whole_run_is_no_hang(toy: Path, output: Path) -> None:
    """Ctrl-Z, and fg later than the limit."""
    words = ["--steps=60", "fault.step_time_s=0.1", f"run.hang_timeout_s={LIMIT_S}"]
    with start(toy, "train_2p", *words, output=output) as run:
        run.wait_for_step(3)
        everyone = run.processes()
        for process in everyone:
            process.send_signal(signal.SIGSTOP)
        time.sleep(LIMIT_S + 4)
        for process in everyone:
            process.send_signal(signal.SIGCONT)
        done = run.end()
    assert done.code == 0, done.err


@pytest.mark.thorough
def test_where_the_ranks_are_is_told_to_who_asks_the_launcher(toy: Path, output: Path) -> None:
    with start(toy, "train_2p", "--steps=30", "fault.step_time_s=0.2", output=output) as run:
        run.wait_for_step(3)
        run.signal(signal.SIGUSR2)
        run.wait_for(lambda: "rank 1: " in run.words().out, "an answer")
        done = run.end()
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("rank ")]
    assert len(lines) == 2
    assert all("s in " in line and "toy/train.py:" in line for line in lines), lines


def _all_workers(run: FaultRun) -> list[psutil.Process]:
    return [worker for rank in run.ranks() for worker in run.data_workers(rank)]


def test_a_killed_data_worker_is_one_sentence(toy: Path, output: Path, tmp_path: Path) -> None:
    picture_toy(toy)
    path = pictures(tmp_path / "pictures", 24)[0].parent
    words = [f"--data_path={path}", "--steps=40"]
    with start(toy, "train_2p", *words, "fault.step_time_s=0.2", output=output) as run:
        run.wait_for_step(5)
        killed = run.data_workers(1)[0]
        killed.send_signal(signal.SIGKILL)
        done = run.end()
        run.check_nothing_left()
        assert not list(run.temporary.glob("pymp-*"))  # sockets over which batches came
    assert done.code == 1
    assert (
        f"rank 1 failed: A data worker (process {killed.pid}) was killed by SIGKILL; the system "
        "may have run out of memory: take fewer data workers (data.workers) or a smaller "
        "--batch_size, and continue with --resume." in done.err
    )
    assert "Traceback" not in done.err


def test_data_workers_die_with_their_rank_at_once(toy: Path, output: Path, tmp_path: Path) -> None:
    picture_toy(toy)
    path = pictures(tmp_path / "pictures", 24)[0].parent
    words = [f"--data_path={path}", "--steps=400", "fault.step_time_s=0.2"]
    with start(toy, "train_2p", *words, output=output) as run:
        run.wait_for_step(3)
        workers = _all_workers(run)
        assert len(workers) == 4
        run.launcher.kill()
        run.launcher.wait()
        _, alive = psutil.wait_procs(workers, timeout=2)  # torch's watchdog takes 5 s
        assert not alive
        run.check_nothing_left()
        assert not list(run.temporary.glob("pymp-*"))
