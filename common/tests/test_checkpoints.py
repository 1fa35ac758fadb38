"""A run's checkpoints: written beside training, the newest few kept, the newest good found."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo_common import checkpoint, checkpoints
from zoo_common.checkpoint import SaveError
from zoo_common.checkpoints import Checkpoints, newest_good
from zoo_common.errors import UserError


class Disk:
    """Stands before the writing: lets it wait or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flows = threading.Event()
        self.flows.set()
        self.errors: list[OSError] = []
        self._save = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self.save)

    def save(self, path: Path, content: Any, kept: str) -> None:
        self.flows.wait()
        if self.errors:
            why = self.errors.pop(0).strerror
            raise SaveError(f"Cannot write the checkpoint {path}: {why}; {kept}", "free some room")
        self._save(path, content, kept)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.flows.set()


def made(directory: Path, said: list[str], **settings: Any) -> Checkpoints:
    given = {
        "keep": 2,
        "in_background": True,
        "on_error": "stop",
        "timeout_s": 60.0,
        **settings,
    }
    return Checkpoints(directory, say=said.append, **given)


def content(step: int, run_id: str = "mine") -> dict[str, Any]:
    return {"model": {"w": torch.full((50,), float(step))}, "step": step, "run_id": run_id}


def best(score: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((50,), score)}}


def names(directory: Path) -> list[str]:
    return sorted(item.name for item in directory.iterdir())


def step_in(path: Path | None) -> int:
    assert path is not None
    return int(checkpoint.load(path)["step"])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(torch.load(path)["model"]["w"].numpy().tobytes()) + 3] ^= 4
    path.write_bytes(data)


def test_the_newest_few_and_a_link_to_the_last_are_kept(tmp_path: Path) -> None:
    said: list[str] = []
    saved = made(tmp_path / "checkpoints", said)
    saved.begin(None, 1000)
    for step in (2, 4, 6):
        saved.save(step, content(step))
        saved.save_best(best(step / 10))
    saved.save(7, content(7), final=True)
    saved.wait()
    directory = tmp_path / "checkpoints"
    assert names(directory) == ["best.pth", "last.pth", "step_00000006.pth", "step_00000007.pth"]
    assert (directory / "last.pth").readlink() == Path("step_00000007.pth")
    assert step_in(directory / "last.pth") == 7
    assert checkpoint.load(directory / "best.pth")["model"]["w"][0] == pytest.approx(0.6)
    assert said == [f"saved checkpoints/last.pth at step {step}" for step in (2, 4, 6, 7)]


def test_training_goes_on_while_the_disk_writes_what_was_then(tmp_path: Path, disk: Disk) -> None:
    said: list[str] = []
    saved = made(tmp_path, said)
    saved.begin(None, 0)
    disk.flows.clear()
    weights = content(1)
    saved.save(1, weights)
    weights["model"]["w"].zero_()
    saved.poll()
    assert not said
    disk.flows.set()
    saved.wait()
    assert torch.equal(checkpoint.load(tmp_path / "last.pth")["model"]["w"], torch.ones(50))


def test_in_the_foreground_the_file_is_there_at_once(tmp_path: Path) -> None:
    saved = made(tmp_path, [], in_background=False)
    saved.begin(None, 0)
    saved.save(1, content(1))
    assert step_in(tmp_path / "step_00000001.pth") == 1


def test_one_of_a_kind_is_under_way_at_a_time(tmp_path: Path, disk: Disk) -> None:
    said: list[str] = []
    saved = made(tmp_path, said)
    saved.begin(None, 0)
    disk.flows.clear()
    saved.save(1, content(1))
    saved.save_best(best(0.1))  # of another kind
    threading.Timer(1.2, disk.flows.set).start()
    started = time.monotonic()
    saved.save(2, content(2))
    assert time.monotonic() - started > 1
    saved.wait()
    assert any("it is slower than the saves follow" in line for line in said)
    assert step_in(tmp_path / "last.pth") == 2


def test_a_failure_stops_the_run_and_names_what_is_kept(tmp_path: Path, disk: Disk) -> None:
    saved = made(tmp_path, [])
    saved.begin(None, 0)
    saved.save(1, content(1))
    saved.wait()
    disk.errors.append(OSError(28, "No space left on device"))
    saved.save(2, content(2))
    with pytest.raises(SaveError, match=r"No space left on device; step_00000001\.pth is whole: "):
        for _ in range(1000):
            saved.poll()
            time.sleep(0.01)
    saved.close()
    assert step_in(newest_good(tmp_path, "mine")) == 1


def test_a_run_may_go_on_without_one_but_not_end_without_the_last(
    tmp_path: Path, disk: Disk
) -> None:
    said: list[str] = []
    saved = made(tmp_path, said, on_error="continue")
    saved.begin(None, 0)
    full = OSError(28, "No space left on device")
    disk.errors += [full, full]
    saved.save(1, content(1))
    saved.save_best(best(0.5))
    while len(said) < 2:
        saved.poll()
        time.sleep(0.01)
    assert all("training goes on, the next save tries again" in line for line in said)
    saved.save(2, content(2), final=True)
    saved.wait()
    assert names(tmp_path) == ["best.pth", "last.pth", "step_00000002.pth"]
    assert torch.equal(checkpoint.load(tmp_path / "best.pth")["model"]["w"], torch.full((50,), 0.5))
    disk.errors.append(full)
    with pytest.raises(SaveError, match="No space left"):
        saved.save(3, content(3), final=True)


def test_a_last_save_that_succeeds_makes_up_for_one_before(tmp_path: Path, disk: Disk) -> None:
    said: list[str] = []
    saved = made(tmp_path, said)
    saved.begin(None, 0)
    disk.errors.append(OSError(5, "Input/output error"))
    saved.save(1, content(1))
    saved.save(2, content(2), final=True)
    saved.wait()
    assert "Input/output error" in said[0]
    assert step_in(tmp_path / "last.pth") == 2


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_stalls_is_told(
    on_error: str, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_FIRST_WORD_S", 0.2)
    said: list[str] = []
    saved = made(tmp_path, said, on_error=on_error, timeout_s=0.8)
    saved.begin(None, 0)
    disk.flows.clear()
    saved.save(1, content(1))
    late = r"has not taken the checkpoint .*step_00000001\.pth within run\.save_timeout_s=0\.8 s; "
    if on_error == "stop":
        with pytest.raises(SaveError, match=late + "there is none before it"):
            saved.save(2, content(2))
    else:
        saved.save_best(best(0.1))  # waits behind the other, and is not written either
        saved.save(2, content(2))
        saved.save_best(best(0.2))
        assert sum("training goes on" in line for line in said) == 1
        assert "skipped step_00000002.pth: the disk still writes step_00000001.pth" in said
        with pytest.raises(SaveError, match=late):
            saved.save(3, content(3), final=True)
        disk.flows.set()
        saved.save(4, content(4), final=True)
        assert step_in(tmp_path / "last.pth") == 4
    assert any(line.startswith("the disk has been writing step_00000001.pth") for line in said)


def test_too_little_room_is_told_before_the_first_step(tmp_path: Path) -> None:
    said: list[str] = []
    saved = made(tmp_path, said)
    with pytest.raises(UserError, match=r"There is no room .* No space left on device, it needs"):
        saved.begin(None, 1 << 60)
    made(tmp_path, said, on_error="continue").begin(None, 1 << 60)
    assert "training starts all the same" in said[-1]


def test_a_damaged_newest_falls_back_with_both_names(tmp_path: Path) -> None:
    saved = made(tmp_path, [])
    saved.begin(None, 0)
    for step in (1, 2):
        saved.save(step, content(step))
    saved.wait()
    damage(tmp_path / "step_00000002.pth")
    said: list[str] = []
    assert newest_good(tmp_path, None, said.append) == tmp_path / "step_00000001.pth"
    (line,) = said
    assert "step_00000002.pth is damaged" in line
    assert line.endswith("step_00000001.pth is taken instead")
    damage(tmp_path / "step_00000001.pth")
    assert newest_good(tmp_path, None, said.append) is None
    assert newest_good(tmp_path / "none", None) is None


def test_of_another_run_none_is_taken(tmp_path: Path) -> None:
    saved = made(tmp_path, [])
    saved.begin(None, 0)
    saved.save(1, content(1))
    saved.save(2, content(2, "another"), final=True)
    assert step_in(newest_good(tmp_path, "mine")) == 1
    assert newest_good(tmp_path, "third") is None
    assert step_in(newest_good(tmp_path, None)) == 2


def test_the_last_one_is_the_newest_though_its_step_is_smaller(tmp_path: Path) -> None:
    """More machines came: a step has more images, and fewer steps are behind."""
    saved = made(tmp_path, [])
    saved.begin(None, 0)
    saved.save(1333, content(1333), final=True)
    again = made(tmp_path, [])
    again.begin(tmp_path / "step_00001333.pth", 0)
    again.save(1050, content(1050), final=True)
    assert step_in(newest_good(tmp_path, "mine")) == 1050
    again.save(1100, content(1100), final=True)
    assert names(tmp_path) == ["last.pth", "step_00001050.pth", "step_00001100.pth"]
    (tmp_path / "last.pth").unlink()
    assert step_in(newest_good(tmp_path, "mine")) == 1100


def test_the_clock_of_another_machine_does_not_matter(tmp_path: Path) -> None:
    saved = made(tmp_path, [])
    saved.begin(None, 0)
    saved.save(1, content(1), final=True)
    ahead = time.time_ns() + 3600 * 10**9
    os.utime(tmp_path / "step_00000001.pth", ns=(ahead, ahead))
    saved.save(2, content(2), final=True)
    (tmp_path / "last.pth").unlink()
    assert step_in(newest_good(tmp_path, None)) == 2


@pytest.mark.parametrize("resumed", ["step_00000001.pth", "last.pth", None])
def test_what_is_behind_the_resumed_one_is_set_aside(resumed: str | None, tmp_path: Path) -> None:
    saved = made(tmp_path, [], keep=3)
    saved.begin(None, 0)
    for step in (1, 2, 3):
        saved.save(step, content(step))
    saved.wait()
    (tmp_path / ".step_00000004.pth.partial").write_bytes(b"killed")
    said: list[str] = []
    again = made(tmp_path, said, keep=3)
    again.begin(tmp_path / resumed if resumed else None, 0)
    steps = [f"step_0000000{step}.pth" for step in (1, 2, 3)]
    if resumed == "last.pth":
        assert names(tmp_path) == ["last.pth", *steps]
        return
    first = 1 if resumed else 0
    aside = [f"{name}.aside" for name in steps[first:]]
    assert names(tmp_path) == sorted([*steps[:first], *aside])
    assert len(said) == len(aside)
    assert newest_good(tmp_path, None) == (tmp_path / steps[0] if resumed else None)
    assert step_in(tmp_path / aside[0]) == first + 1  # it can be named


def test_a_directory_of_an_older_zoo_is_resumed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "last.pth", content(5))
    found = newest_good(tmp_path, None)
    assert found == tmp_path / "last.pth"
    saved = made(tmp_path, [], keep=1)
    saved.begin(found, 0)
    for step in (6, 7):
        saved.save(step, content(step), final=True)
    assert names(tmp_path) == ["last.pth", "step_00000007.pth"]
    assert step_in(tmp_path / "last.pth") == 7
    shutil.copytree(tmp_path, tmp_path / "fresh", symlinks=True)
    (tmp_path / "fresh" / "last.pth").unlink()
    checkpoint.save(tmp_path / "fresh" / "last.pth", content(5))
    made(tmp_path / "fresh", []).begin(None, 0)
    assert names(tmp_path / "fresh") == ["last.pth.aside", "step_00000007.pth.aside"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_disk_without_links(
    hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(tmp_path / "last.pth", content(1))
    said: list[str] = []
    saved = made(tmp_path, said)
    saved.begin(tmp_path / "last.pth", 0)
    for step in (2, 3):
        saved.save(step, content(step), final=True)
    steps = ["step_00000002.pth", "step_00000003.pth"]
    assert names(tmp_path) == (["last.pth"] if hard_links else []) + steps
    assert newest_good(tmp_path, None) == tmp_path / steps[1]
    if hard_links:
        assert step_in(tmp_path / "last.pth") == 3
        again = made(tmp_path, [])
        again.begin(tmp_path / steps[0], 0)
        assert names(tmp_path) == [steps[0], f"{steps[1]}.aside"]
    else:
        assert any("this disk has no links" in line for line in said)
