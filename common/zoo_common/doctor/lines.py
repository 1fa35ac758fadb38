"""What a check finds: a line each; and how a check is kept from harming the others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from zoo_common.errors import first_line

OK, NOTE, PROBLEM = "ok", "note", "problem"

_CHECK_S = 60.0
"""How long a check may take that starts no program; a dead network disk makes it wait for ever."""


class Line(NamedTuple):
    """One finding.

    Attributes:
        part: what was looked at.
        status: ``ok``, ``note`` (worth knowing) or ``problem`` (a run cannot start, or will fail).
        text: what there is.
        advice: what to do, for a problem one sentence.
    """

    part: str
    status: str
    text: str
    advice: str = ""


class Output(NamedTuple):
    """What a program did: its exit code, None when it did not end in time, and its words."""

    code: int | None
    stdout: str
    stderr: str


def run(command: Sequence[str], seconds: float, environ: dict[str, str] | None = None) -> Output:
    """Runs a program, and leaves it alone when it does not end in time.

    A program that waits for a broken driver cannot always be killed, so this does not wait for
    its death.

    Raises:
        OSError: it cannot be started.
    """
    child = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environ,
        start_new_session=True,
    )
    try:
        stdout, stderr = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as late:
        os.killpg(child.pid, signal.SIGKILL)
        try:
            stdout, stderr = child.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            stdout, stderr = "", ""
        return Output(None, stdout or _text(late.stdout), stderr)
    return Output(child.returncode, stdout, stderr)


def _text(words: bytes | str | None) -> str:
    return words.decode(errors="replace") if isinstance(words, bytes) else words or ""


def guarded(part: str, check: Callable[[], list[Line]], seconds: float = _CHECK_S) -> list[Line]:
    """The lines of a check; one that says so when it fails or hangs."""
    found: list[Line] = []

    def work() -> None:
        try:
            found.extend(check())
        except Exception as error:  # the other checks are worth as much
            words = f"could not be checked ({type(error).__name__}: {first_line(error)})"
            found.append(Line(part, NOTE, words))

    thread = threading.Thread(target=work, name=f"doctor {part}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [Line(part, PROBLEM, f"no answer in {seconds:.0f} s", "look for a disk that hangs")]
    return found


def without_home(text: str) -> str:
    """A text without the user's name: ``~`` for the home directory."""
    home = os.path.expanduser("~")  # noqa: PTH111  Path.home raises where there is none
    if home in ("/", "~"):
        return text
    return re.sub(rf"(?<![\w./]){re.escape(home)}(?![\w.-])", "~", text)


def size(count: float) -> str:
    """Bytes for people: ``3.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"
