"""Data workers that die, and what is said of them."""

import itertools
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from zoo_common import data_workers, distributed
from zoo_common.data import BatchStream, Pixels, build_loader
from zoo_common.errors import LostPeerError


class Files:
    """Pictures of a directory."""

    def __init__(self, directory: Path) -> None:
        self._paths = sorted(map(str, directory.glob("*.png")))

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return self._paths[index]

    def item_id(self, index: int) -> str:
        return self._paths[index]

    def label(self, index: int) -> int:
        return 0


def slow(image: Image.Image) -> Pixels:
    time.sleep(0.05)
    return Pixels(np.array(image), (os.getpid(),))


@pytest.fixture
def stream(tmp_path: Path) -> BatchStream:
    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    return build_loader(Files(tmp_path), slow, batch_size=2, workers=1)


def test_a_killed_worker_is_explained_wherever_the_error_came_up(stream: BatchStream) -> None:
    batches = iter(stream)
    worker = psutil.Process(int(next(batches).draws_BD[0, 0]))
    worker.kill()
    with pytest.raises(RuntimeError) as caught:
        for _ in range(200):
            next(batches)
            time.sleep(0.05)
    sentence = data_workers.explain(caught.value)
    assert sentence == (
        f"A data worker (process {worker.pid}) was killed by SIGKILL; the system may have run out "
        "of memory: take fewer data workers (data.workers) or a smaller --batch_size, and "
        "continue with --resume."
    )
    assert not worker.is_running()


def raised(*errors: BaseException) -> BaseException:
    """The last of errors, each of which was raised for the one before."""
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


KILLED = "DataLoader worker (pid 12) is killed by signal: "


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ([RuntimeError(f"{KILLED}Killed. ")], "(process 12) was killed by SIGKILL"),
        (
            [RuntimeError(f"{KILLED}Bus error. It is possible that dataloader's workers are")],
            "(process 12) was killed by SIGBUS; /dev/shm may be full",
        ),
        (
            [RuntimeError(f"{KILLED}Segmentation fault. "), RuntimeError("something else")],
            "(process 12) was killed by SIGSEGV",
        ),
        (
            [
                RuntimeError(f"{KILLED}Killed. "),
                RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
            ],
            "(process 12) was killed by SIGKILL",
        ),
        (
            [RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly")],
            "(process 12, 13) ended by itself",
        ),
        (
            [RuntimeError("DataLoader worker (pid 12) exited unexpectedly with exit code 1. ")],
            "(process 12) ended by itself",
        ),
    ],
)
def test_torchs_words_become_one_sentence(errors: list[BaseException], words: str) -> None:
    sentence = data_workers.explain(raised(*errors))
    assert sentence is not None and words in sentence
    assert sentence.endswith(", and continue with --resume.")


def test_other_errors_are_no_dead_worker() -> None:
    assert data_workers.explain(raised(KeyError("a"), RuntimeError("CUDA error"))) is None


@pytest.mark.parametrize(
    ("message", "kind"),
    [(f"{KILLED}Killed. ", RuntimeError), ("Connection closed by peer", LostPeerError)],
)
def test_a_worker_that_dies_during_a_collective_is_no_lost_peer(
    message: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(distributed, "_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", broken)
    with pytest.raises(kind) as caught:
        distributed.sum_across(torch.zeros(1))
    assert type(caught.value) is kind


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_worker_that_died_while_it_handed_over_is_found(error: Exception) -> None:
    assert data_workers.explain(error) is None, "no process has died"
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    sentence = data_workers.explain(error)
    child.wait()
    assert sentence is not None
    assert f"A data worker (process {child.pid}) was killed by SIGKILL" in sentence
