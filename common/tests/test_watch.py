"""Beats and stacks of real processes, as the launcher sees them."""

import os
import re
import signal
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zoo_common import beats
from zoo_common.watch import Hang, Watch, Whereabouts

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="what the kernel says is read in /proc")

START = (
    "import ctypes, os, signal, sys, time\nfrom pathlib import Path\nfrom zoo_common import beats\n"
)
BEAT = "beats.start(Path(sys.argv[1]), int(sys.argv[2]))\n"


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process of its own that runs a program after it has begun to beat."""
    started: list[subprocess.Popen[bytes]] = []

    def start(
        program: str, *, local_rank: int = 0, beating: bool = True
    ) -> subprocess.Popen[bytes]:
        file = tmp_path / f"program{len(started)}.py"
        file.write_text(START + (BEAT if beating else "") + program)
        words = [sys.executable, str(file), str(tmp_path), str(local_rank)]
        started.append(subprocess.Popen(words))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for_hang(watch: Watch, within_s: float = 30) -> Hang:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        hang = watch.hung()
        if hang is not None:
            return hang
        time.sleep(0.05)
    raise AssertionError("no hang was seen")


def wait_until_it_says(watch: Watch, what: str, within_s: float = 30) -> Whereabouts:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        (where,) = watch.where()
        if where.what == what:
            return where
        time.sleep(0.05)
    raise AssertionError(f"it never said {what}")


def test_a_rank_that_sleeps_is_told_with_what_it_did_and_its_line(rank, tmp_path: Path) -> None:
    child = rank("def nap():\n    time.sleep(600)\nbeats.beat('step 12', True)\nnap()\n")
    watch = Watch(tmp_path, [child.pid], 1.5, first_rank=3)
    hang = wait_for_hang(watch)
    (where,) = hang.ranks
    assert (where.rank, where.what) == (3, "step 12")
    assert where.seconds >= 1.5
    assert re.search(r"program0\.py:6 nap", where.where), where.where
    assert hang.message.startswith("The run hung: rank 3 came no further for 2 s: ")
    assert "\n  rank 3: 2 s in step 12: " in hang.message
    assert "in nap" in hang.stacks and "in <module>" in hang.stacks


def test_a_rank_that_holds_the_interpreter_is_seen_too(rank, tmp_path: Path) -> None:
    child = rank(
        "beats.beat('x', True)\nlibrary = ctypes.PyDLL(None)\nwhile True:\n    library.sleep(600)\n"
    )
    watch = Watch(tmp_path, [child.pid], 1.0)
    (where,) = wait_for_hang(watch).ranks
    assert "program0.py:8 <module>" in where.where


def test_a_rank_that_goes_on_does_not_hang_and_can_be_asked(rank, tmp_path: Path) -> None:
    child = rank(
        "n = 0\nwhile True:\n    n += 1\n    beats.beat(f'step {n}', True)\n    time.sleep(0.05)\n"
    )
    watch = Watch(tmp_path, [child.pid], 3.0)
    end = time.monotonic() + 6
    while time.monotonic() < end:
        assert watch.hung() is None
        time.sleep(0.05)
    first = watch.where()[0]
    assert first.what.startswith("step ") and first.seconds < 3
    assert "program0.py" in first.where
    assert watch.hung() is None
    assert child.poll() is None


@pytest.mark.parametrize(("limit_s", "start_s"), [(0.5, 1.5), (1.5, 0.5)])
def test_one_that_never_starts_hangs_later_and_is_sent_no_signal(
    rank, tmp_path: Path, monkeypatch, limit_s: float, start_s: float
) -> None:
    monkeypatch.setattr("zoo_common.watch._START_S", start_s)
    child = rank("time.sleep(600)\n", beating=False)
    (where,) = wait_for_hang(Watch(tmp_path, [child.pid], limit_s)).ranks
    assert where.seconds >= 1.5
    assert where.where == "it has not started yet"
    assert child.poll() is None


def test_beats_of_an_earlier_process_do_not_count(rank, tmp_path: Path) -> None:
    first = rank("beats.beat('old', True)\ntime.sleep(600)\n")
    wait_until_it_says(Watch(tmp_path, [first.pid], 60), "old")
    second = rank("time.sleep(600)\n", beating=False)
    assert Watch(tmp_path, [second.pid], 60).where()[0].what == "its start"


@LINUX
def test_one_that_is_stopped_does_not_answer_and_the_kernel_says_why(rank, tmp_path: Path) -> None:
    child = rank("beats.beat('x', True)\ntime.sleep(600)\n")
    watch = Watch(tmp_path, [child.pid], 60)
    wait_until_it_says(watch, "x")
    child.send_signal(signal.SIGSTOP)
    (where,) = watch.where()
    assert where.where.startswith("it does not answer: is stopped by a signal")


def test_a_rank_that_has_ended_does_not_hang(rank, tmp_path: Path) -> None:
    child = rank("os._exit(0)\n")
    watch = Watch(tmp_path, [child.pid], 0.5)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    time.sleep(1)
    assert watch.hung() is None
    assert watch.where() == ()


def test_a_pause_of_the_launcher_is_no_hang(rank, tmp_path: Path, monkeypatch) -> None:
    child = rank("beats.beat('x', True)\ntime.sleep(600)\n")
    watch = Watch(tmp_path, [child.pid], 60)
    wait_until_it_says(watch, "x")
    now = time.monotonic
    monkeypatch.setattr("zoo_common.watch.time.monotonic", lambda: now() + 3600)
    assert watch.hung() is None
    assert watch.where()[0].seconds < 60


@LINUX
def test_children_answer_and_those_that_would_die_of_it_are_not_asked(rank, tmp_path: Path) -> None:
    child = rank(
        "deaf = os.fork()\n"
        "if deaf == 0:\n"
        "    signal.signal(signal.SIGUSR2, signal.SIG_DFL)\n"
        "    time.sleep(600)\n"
        "worker = os.fork()\n"
        "def fetch():\n"
        "    time.sleep(600)\n"
        "def _worker_loop():\n"
        "    beats.start_in_data_worker(beats.stacks_of_this_process())\n"
        "    beats.beat('not mine to say')\n"
        "    fetch()\n"
        "if worker == 0:\n"
        "    _worker_loop()\n"
        "beats.beat(f'{deaf} {worker}', True)\n"
        "time.sleep(600)\n"
    )
    watch = Watch(tmp_path, [child.pid], 60)
    end = time.monotonic() + 30
    while " " not in (where := watch.where()[0]).what or "in fetch" not in where.stacks:
        assert time.monotonic() < end, where
        time.sleep(0.1)
    deaf, worker = map(int, where.what.split())
    assert f"-- data worker, process {worker}\n" in where.stacks
    assert f"process {deaf}\n" not in where.stacks
    assert "program0.py" in where.where
    os.kill(deaf, 0)
    for process in (deaf, worker):
        os.kill(process, signal.SIGKILL)


def test_who_waits_for_whom() -> None:
    waits = Whereabouts(0, 61, "step 3", "a.py:1 f", True, (), "")
    stuck = Whereabouts(
        1, 60, "waiting for a batch", "b.py:2 g", False, ("its data worker: c",), ""
    )
    assert Hang(60, (waits, stuck)).message == (
        "The run hung: rank 1 came no further for 60 s, and the others wait for it: look at where "
        "each rank is, continue with --resume, and raise run.hang_timeout_s if a step may take so "
        "long.\n"
        "  rank 0: 61 s in step 3: a.py:1 f\n"
        "  rank 1: 60 s in waiting for a batch: b.py:2 g; its data worker: c"
    )
    assert "ranks 0, 1 came no further for 61 s: " in Hang(60, (waits, waits_too(1))).message


def waits_too(rank: int) -> Whereabouts:
    return Whereabouts(rank, 62, "step 3", "a.py:1 f", True, (), "")


def test_a_beat_costs_under_two_microseconds_and_nothing_without_a_launcher(
    rank, tmp_path: Path
) -> None:
    assert min(timeit.repeat(lambda: beats.beat("step 1"), number=1000, repeat=5)) < 2e-3
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{START}import timeit\n{BEAT}"
            "beat = lambda: beats.beat('step 123456', True)\n"
            "print(min(timeit.repeat(beat, number=1000, repeat=20)) / 1000)",
            str(tmp_path),
            "0",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 2e-6


def test_long_words_are_cut_and_do_not_spoil_the_next_ones(rank, tmp_path: Path) -> None:
    child = rank(
        f"beats.beat({'é' * 100!r})\ntime.sleep(1)\nbeats.beat('short', True)\ntime.sleep(600)\n"
    )
    watch = Watch(tmp_path, [child.pid], 60)
    wait_until_it_says(watch, "é" * 32)
    wait_until_it_says(watch, "short")
