"""One process of a run: ``python3 -m zoo_common.worker ENTRY --config FILE``, started by launch.

It gives the process a text log of its own before anything else is imported, ends it when the
launcher dies, and leaves word of how it failed.
"""

import contextlib
import ctypes
import errno
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from zoo_common import beats, data_workers
from zoo_common.errors import LostPeerError, TrainingError, UserError

LOG_VARIABLE = "ZOO_LOG_FILE"
"""Where the processes of this machine write: one path per local rank, a line each."""

FAILURES_VARIABLE = "ZOO_FAILURES"
"""The launcher's directory for its ranks: of their failures and their beats."""

_WORD_BYTES = 12 << 10

_PEER_MARKS = ("gloo/transport", "DistBackendError", "DistNetworkError", "HCCL function error")
"""In what a collective of a backward pass raises when another process or its network is gone."""

TRACEBACK_MARK = "---- this rank failed ----"

REASON_VARIABLE = "ZOO_REASON"
"""Why the launcher starts the ranks again; empty the first time."""

PIN_VARIABLE = "ZOO_PIN_CORES"
"""Set: each rank of this machine keeps to its own share of the cores."""

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs ``ENTRY.main(argv)``; the exit code is 0, 1 for a crash, 2 for a user's mistake."""
    _write_to_own_log()
    _die_with_parent()
    if os.environ.get(PIN_VARIABLE):
        keep_to_own_cores(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    entry, *argv = sys.argv[1:]
    try:
        try:
            _answer_launcher()
            importlib.import_module(entry).main(argv)
        finally:
            # Or torch raises its error about a dead data worker while another one is reported.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except UserError as error:
        _report(2, str(error), "", final=True)
    except LostPeerError as error:
        _report(1, str(error), "", of_another=True)
    except TrainingError as error:
        _report(1, str(error), "", final=True)
    except OSError as error:
        if dead := data_workers.explain(error):
            _report(1, dead, "")
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        words = f"{error.strerror} ({error.filename or 'output directory'})"
        advice = f"{words}: free some room and continue with --resume."
        _report(1, advice if full else words, "" if full else traceback.format_exc(), final=full)
    except Exception as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error):
            _report(1, _out_of_memory(str(error)), "")
        if dead := data_workers.explain(error):
            _report(1, dead, "")
        of_another = any(mark in repr(error) for mark in _PEER_MARKS)
        _report(
            1, f"{type(error).__name__}: {error}", traceback.format_exc(), of_another=of_another
        )
    _end(0)


def _out_of_memory(words: str) -> str:
    """One sentence for what torch and torch_npu say in many when a card's memory is full."""
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", words)
    more = f" for {wanted[1]} more" if wanted else ""
    return (
        f"The card has no memory{more}: take a smaller --batch_size, or half precision with "
        "--amp=O1 or O2."
    )


def _write_to_own_log() -> None:
    paths = os.environ.get(LOG_VARIABLE)
    if paths is None:
        return
    path = paths.split("\n")[int(os.environ["LOCAL_RANK"])]
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115


def _die_with_parent() -> None:
    """A killed launcher leaves no process behind (Linux; elsewhere nothing happens)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the call


def keep_to_own_cores(local_rank: int, ranks: int) -> None:
    """Data workers inherit this, so that ranks do not move over each other's caches."""
    cores = sorted(os.sched_getaffinity(0))  # what a container or taskset leaves us
    share = len(cores) // ranks
    os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])


@dataclass(frozen=True)
class LastWord:
    """How a rank failed, in its own words.

    Attributes:
        code: its exit code.
        message: one line.
        traceback: its own, or an empty text.
        final: it would fail again if it were started again.
        of_another: it failed only because another process is gone.
        time: when, in Unix time.
    """

    code: int
    message: str
    traceback: str
    final: bool
    of_another: bool
    time: float


def read_words(directory: Path) -> dict[int, LastWord]:
    """The words that failed ranks left, by rank."""
    words = {}
    for file in directory.glob("*.word"):
        text = file.read_bytes().rstrip(b"\0")
        with contextlib.suppress(ValueError, TypeError):  # killed while it wrote
            words[int(file.stem)] = LastWord(**json.loads(text))
    return words


def _word_file() -> Path | None:
    directory = os.environ.get(FAILURES_VARIABLE)
    return Path(directory, f"{os.environ['RANK']}.word") if directory is not None else None


def _answer_launcher() -> None:
    """Lets the launcher see where this rank is, and takes the room of a last word.

    There is room now; a full disk may be what the word is about.
    """
    file = _word_file()
    if file is not None:
        file.write_bytes(b"\0" * _WORD_BYTES)
        beats.start(file.parent, int(os.environ["LOCAL_RANK"]))


def _fitting(word: LastWord) -> bytes:
    """A word as it is left; of a long traceback the end, which says what happened."""
    while len(text := json.dumps(asdict(word)).encode()) > _WORD_BYTES:
        word = replace(word, traceback=word.traceback[len(word.traceback) // 4 + 1 :])
    return text


def _report(
    code: int, message: str, trace: str, *, final: bool = False, of_another: bool = False
) -> NoReturn:
    """Leaves word for the launcher, prints the failure, and ends."""
    file = _word_file()
    if file is not None:
        word = LastWord(code, message[:2000], trace, final, of_another, time.time())
        with contextlib.suppress(OSError), file.open("r+b") as stream:
            stream.write(_fitting(word))
    with contextlib.suppress(OSError):  # the log's disk may be full
        print(f"{TRACEBACK_MARK}\n{trace or 'error: ' + message}", file=sys.stderr, flush=True)
    _end(code)


def _end(code: int) -> NoReturn:
    """Ends without taking the interpreter down.

    After a failure, a collective that waits for a dead rank would hold that up; and at any time
    one of gloo's threads may still have to free a Python object, which aborts the process when
    the interpreter is gone by then (seen with torch 2.14).
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
