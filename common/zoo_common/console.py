"""What a person sees of a run: the first rank's text log and, on a terminal, a progress bar.

The ranks write files only, so that a slow terminal or a cut connection never holds up training;
this thread of the launcher follows those files.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zoo_common.worker import TRACEBACK_MARK

_POLL_S = 0.2


class Console:
    """Follows a log and a record until :meth:`stop`.

    Args:
        log: text log of the first rank of this machine.
        metrics: the run's ``metrics.jsonl``.

    What both files hold already, from the part of a run that is resumed, is not shown.
    """

    def __init__(self, log: Path, metrics: Path) -> None:
        self._log = _Tail(log)
        self._metrics = _Tail(metrics)
        self._ended = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Shows what is left and ends the bar."""
        self._ended.set()
        self._thread.join()

    def resume(self) -> None:
        """The ranks are started again: shows what they write, as it did before one failed."""
        self._failed = False

    def _follow(self) -> None:
        try:
            self._show()
        except BrokenPipeError:  # who read along has gone; the run goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _show(self) -> None:
        with _Bar(sys.stdout) as bar:
            while True:
                last = self._ended.wait(_POLL_S)
                for line in self._log.lines():
                    # The launcher prints a failure at the end.
                    self._failed = self._failed or line == TRACEBACK_MARK
                    if not self._failed:
                        bar.line(line)
                for line in self._metrics.lines():
                    bar.update(json.loads(line))
                if last:
                    return


class _Tail:
    """The whole lines that a growing file gained."""

    def __init__(self, path: Path) -> None:
        self._path = path
        facts = path.stat() if path.exists() else None
        self._file = facts.st_ino if facts else 0
        self._position = facts.st_size if facts else 0
        self._rest = b""

    def lines(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            if facts.st_ino != self._file or facts.st_size < self._position:
                # A resumed run wrote the file anew, and may have made it longer than it was.
                self._file, self._position, self._rest = facts.st_ino, 0, b""
            stream.seek(self._position)
            new = stream.read()
        self._position += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]


class _Bar:
    """A progress bar below the lines on a terminal; only the lines elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: Progress | None = None
        if stream.isatty():
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=RichConsole(file=stream),
                transient=True,
            )
            self._task = self._progress.add_task("train", total=1, note="", visible=False)

    def __enter__(self) -> "_Bar":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def line(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def update(self, record: dict[str, Any]) -> None:
        if self._progress is None:
            return
        rate = record["images_per_sec"]
        note = f"loss {record['loss']:.4f}" + (f"  {rate:.0f} images/s" if rate else "")
        self._progress.update(
            self._task,
            completed=record["step"],
            total=record["total_steps"],
            note=note,
            visible=True,
        )
