"""Saves checkpoints on a disk that fails, for test_saving.py, which preloads disk.py's library.

``saving_program.py DIRECTORY DEED...``: for each deed, as disk.py names them, a child saves and
meets it at the first of its calls, the next child at the second, and so on to the last. Prints
what each has left, a JSON object in a line.
"""

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import disk
import torch

from zoo_common import checkpoint
from zoo_common.checkpoint import SaveError
from zoo_common.checkpoints import Checkpoints, newest_good

SAVED, FAILED, NO_SUCH_CALL, BROKEN = 0, 3, 4, 5


def made(directory: Path, **settings: Any) -> Checkpoints:
    given = {"keep": 2, "in_background": True, "on_error": "stop", "timeout_s": 60.0, **settings}
    return Checkpoints(directory, say=lambda text: None, **given)


def content(step: int) -> dict[str, Any]:
    weights = {f"w{index}": torch.full((9000,), float(step)) for index in range(3)}
    return {"model": weights, "step": step, "run_id": "mine"}


def save(saved: Checkpoints, step: int, *, final: bool = False) -> None:
    saved.save_best(content(step))
    saved.save(step, content(step), final=final)


def prepared(directory: Path) -> Checkpoints:
    """Two checkpoints and a best one, so that the next save removes the first."""
    saved = made(directory)
    saved.begin(None, 0)
    save(saved, 1)
    save(saved, 2)
    saved.wait()
    return saved


def attempt(directory: Path, deed: str, at: int) -> int:
    """What the third save of a directory comes to when its call of this number meets a deed."""
    saved = prepared(directory)
    calls = ("write",) if deed in ("tear", "short") else ()
    disk.arm(disk.rule(directory, deed, at=at, calls=calls))
    try:
        save(saved, 3)
        saved.wait()
        return SAVED if disk.calls() >= at else NO_SUCH_CALL
    except SaveError:
        return FAILED
    finally:
        disk.arm("")


def in_child(action: Callable[[], int]) -> int:
    """The exit code of a child that did this, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(path: Path) -> int | None:
    """The step in a checkpoint whose numbers are all of it; None: no file."""
    if not path.exists():
        return None
    loaded = checkpoint.load(path)
    values = {value for tensor in loaded["model"].values() for value in tensor.tolist()}
    assert values == {float(loaded["step"])}, path
    return int(loaded["step"])


def left(directory: Path) -> dict[str, Any]:
    """The steps in a directory's checkpoints, and its files after another run went on there."""
    newest = newest_good(directory, "mine")
    assert newest is not None, sorted(directory.iterdir())
    facts = {"newest": whole(newest)}
    for name in ("last", "best"):
        facts[name] = whole(directory / f"{name}.pth")
    saved = made(directory)
    saved.begin(newest, 0)
    save(saved, 4, final=True)
    facts["after"] = sorted(item.name for item in directory.iterdir())
    return facts


def main() -> None:
    directory, deeds = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    for deed in deeds:
        for at in itertools.count(1):
            own = directory / deed / str(at)
            code = in_child(partial(attempt, own, deed, at))
            if code == NO_SUCH_CALL:
                break
            print(json.dumps({"deed": deed, "at": at, "code": code, **left(own)}), flush=True)


if __name__ == "__main__":
    main()
