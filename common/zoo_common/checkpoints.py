"""The checkpoints of a run: written beside training, the newest few kept, the newest good found.

``step_00000400.pth`` are the newest few, ``last.pth`` is a link to the newest of them, ``best.pth``
has the best weights. Which is the newest, ``last.pth`` says, and behind it the files' times: the
steps of a run that goes on with more images a step than before are fewer than they were.
"""

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from zoo_common import beats, checkpoint
from zoo_common.checkpoint import SaveError
from zoo_common.distributed import ROUND_VARIABLE
from zoo_common.errors import TrainingError, UserError

LAST, BEST = "last.pth", "best.pth"
_STEPS = "step_*.pth"
_ASIDE = ".aside"
_FIRST_WORD_S = 60.0
_LOOK_S = 0.5
_NICENESS = 10


def newest_good(
    directory: Path, run_id: str | None, say: Callable[[str], None] | None = None
) -> Path | None:
    """The newest checkpoint of a directory that is whole: all checksums right, and readable.

    Args:
        directory: of the checkpoints themselves, ``OUTPUT_DIR/checkpoints``.
        run_id: take only those of the run of this name; None: of any.
        say: is told about each damaged one that is passed over, in a sentence that names both.

    Returns:
        A ``step_*.pth`` (or the ``last.pth`` of runs that had no others); None where none is good.
    """
    damaged: list[str] = []
    found = None
    for path in _newest_first(directory):
        try:
            content = checkpoint.load(path)
        except UserError as error:
            damaged.append(str(error))
            continue
        if "step" in content and (run_id is None or content.get("run_id") == run_id):
            found = path
            break
    if say is not None and damaged:
        instead = f"{found} is taken instead" if found else "there is no other to take instead"
        for words in damaged:
            say(f"warning: {words.rstrip('.')}: {instead}")
    return found


def choose(settings: Any, say: Callable[[str], None]) -> str:
    """The checkpoint that a run goes on from; the newest whole one where no file is named.

    Ranks that the launcher starts again, and those of ``--auto_resume``, take one of this very run
    or, if it has none yet, what ``--resume`` names.

    Args:
        settings: a config's section ``run``.
        say: is told about each damaged one that is passed over.

    Returns:
        A path, or an empty text for a run that starts anew.

    Raises:
        UserError: ``--resume`` names no file, and there is no whole checkpoint.
    """
    directory = Path(settings.output_dir or "test/output/0") / "checkpoints"
    again = int(os.environ.get(ROUND_VARIABLE, "1")) > 1
    if settings.id and (settings.auto_resume or again):
        own = newest_good(directory, settings.id, say)
        if own is not None:
            return str(own)
    if settings.resume != "last":
        return str(settings.resume)
    damaged: list[str] = []
    newest = newest_good(directory, None, damaged.append)
    if newest is None:
        found = f" ({'; '.join(damaged)})" if damaged else ""
        raise UserError(
            f"--resume: there is no whole checkpoint in {directory}{found}: start without it, or "
            "name a file."
        )
    for text in damaged:
        say(text)
    return str(newest)


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _newest_first(directory: Path) -> list[Path]:
    """The step files, and a ``last.pth`` that is none of them."""
    last = directory / LAST
    files = []
    for path in directory.glob(_STEPS):
        with contextlib.suppress(OSError):  # removed meanwhile
            facts = path.stat()
            files.append((_is_same(last, path), facts.st_mtime_ns, path))
    paths = [path for _, _, path in sorted(files, reverse=True)]
    if last.is_file() and not any(is_last for is_last, _, _ in files):
        paths.append(last)
    return paths


@dataclass
class _Write:
    """A checkpoint on its way to the disk; the thread sets all but the first three.

    Attributes:
        path: the file.
        content: what goes there; dropped when it is done.
        step: of ``step_*.pth``; None for ``best.pth``.
        since: when the thread began, on the monotonic clock; None before.
        error: what went wrong.
        notes: what else the log shall hold.
        done: is set last of all.
        is_late: it takes too long, and that was told.
    """

    path: Path
    content: Mapping[str, Any]
    step: int | None
    since: float | None = None
    error: BaseException | None = None
    notes: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    is_late: bool = False


class Checkpoints:
    """What writes a run's checkpoints; rank 0 has one, ``Run`` calls it.

    All methods are called by the training thread; a thread of its own takes the writes one after
    the other, so that a disk that stalls holds up none of them. One of a kind is under way at a
    time: the next one waits for it, since each takes the memory of a copy.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        in_background: bool,
        on_error: str,
        timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        """Looks at nothing yet, see :meth:`begin`.

        Args:
            directory: of the checkpoints; it need not be there.
            keep: how many of the newest stay.
            in_background: train on while the disk writes, from a copy.
            on_error: ``stop`` or ``continue``, when one cannot be written.
            timeout_s: what the disk may take for one, in seconds.
            say: writes a line to the log.
        """
        self._directory = directory
        self._keep = keep
        self._in_background = in_background
        self._stops = on_error == "stop"
        self._timeout_s = timeout_s
        self._say = say
        self._kept: list[Path] = []
        self._under_way: list[_Write] = []
        self._lost_best: dict[str, Any] | None = None
        self._next_word_s = _FIRST_WORD_S
        self._queue: SimpleQueue[_Write] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, resumed: Path | None, at_least_bytes: int) -> None:
        """Before the first step: makes the directory one of this run.

        Files that are newer than the checkpoint that the run goes on from are damaged or of
        another continuation. They get another ending, under which nobody takes them for this
        run's, but they can be named to ``--resume``.

        Args:
            resumed: where the run goes on from, if anywhere.
            at_least_bytes: what a checkpoint takes, or less.

        Raises:
            UserError: the disk has no room for one, and errors shall stop the run.
        """
        self._remove_unfinished()
        self._set_aside_behind(resumed.resolve() if resumed else None)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            checkpoint.check_space(self._directory, at_least_bytes)
        except OSError as error:
            words = f"There is no room for a checkpoint in {self._directory}: {error.strerror}"
            if self._stops:
                raise UserError(f"{words}: free some, or give another --output_dir.") from error
            self._say(f"warning: {words}: training starts all the same")

    def _set_aside_behind(self, resumed: Path | None) -> None:
        last = self._directory / LAST
        files = _newest_first(self._directory)
        while files and files[0].resolve() != resumed:
            path = files.pop(0)
            aside = path.with_name(path.name + _ASIDE)
            with contextlib.suppress(OSError):  # a disk that cannot shows at the first save
                path.replace(aside)
                self._say(f"{path.name} is no part of this run: set aside as {aside.name}")
                if (last.is_symlink() and not last.exists()) or _is_same(last, aside):
                    last.unlink()  # a link, of either kind, to what was moved
        self._kept = [path for path in reversed(files) if path != last]

    def _remove_unfinished(self) -> None:
        """What a killed run was about to write; nobody else writes here."""
        for pattern in (".*.pth.partial", ".*.pth.link"):
            for path in self._directory.glob(pattern):
                with contextlib.suppress(OSError):
                    path.unlink()

    def save(
        self,
        step: int,
        content: Mapping[str, Any],
        *,
        unshared: Collection[str] = (),
        final: bool = False,
    ) -> None:
        """Writes ``step_*.pth``, points ``last.pth`` to it and removes the oldest.

        Args:
            step: finished steps.
            content: see :func:`zoo_common.checkpoint.save`; may change as soon as this returns.
            unshared: keys of the content whose tensors nobody else holds.
            final: training ends here: waits for the disk, and raises in any case.

        Raises:
            SaveError: this one, or in the background one before, could not be written.
            TrainingError: as above, because its weights are not finite.
        """
        self._retry_best()
        path = self._directory / f"step_{step:08d}.pth"
        self._submit(_Write(path, content, step), unshared, final)

    def make_room(self, *, final: bool = False) -> None:
        """Waits for the checkpoint before, which is in memory until then.

        Args:
            final: as of :meth:`save`, which does the same, but after the content was gathered.

        Raises:
            SaveError: as of :meth:`save`.
        """
        self._wait_for_alike(is_step=True, final=final)

    def save_best(self, content: Mapping[str, Any]) -> None:
        """Writes ``best.pth``; arguments and errors as of :meth:`save`."""
        self._lost_best = None
        self._submit(_Write(self._directory / BEST, content, None), (), False)

    def _retry_best(self) -> None:
        lost, self._lost_best = self._lost_best, None
        if lost is not None:
            self._submit(_Write(self._directory / BEST, lost, None), lost.keys(), False)

    def _submit(self, write: _Write, unshared: Collection[str], final: bool) -> None:
        late = self._wait_for_alike(is_step=write.step is not None, final=final)
        if late is not None:
            self._say(f"skipped {write.path.name}: the disk still writes {late.path.name}")
            return
        background = self._in_background and not final
        if background:
            write.content = checkpoint.snapshot(write.content, unshared)
        self._under_way.append(write)
        self._start_thread()
        self._queue.put(write)
        if not background:
            # Training must not change what is still being written, so going on is no choice.
            self._wait_for(write, final or self._stops, must_in_time=True)

    def _wait_for_alike(self, *, is_step: bool, final: bool) -> _Write | None:
        """Waits for the one before of the same kind, at the end for all; which is late, if any."""
        must = self._stops and not final  # a last one that succeeds makes up for those before
        self._settle_all(must)
        started = time.monotonic()
        for other in list(self._under_way):
            alike = final or (other.step is not None) == is_step
            if alike and not self._wait_for(other, must, must_in_time=final or self._stops):
                return other
        if (waited := time.monotonic() - started) > 1:
            self._say(f"waited {waited:.1f} s for the disk: it is slower than the saves follow")
        return None

    def poll(self) -> None:
        """At each step boundary: tells what was written, raises what went wrong.

        Raises:
            SaveError: a checkpoint could not be written, and errors shall stop the run.
        """
        if self._under_way:
            self._settle_all(self._stops)
            self._is_late(self._stops)

    def wait(self) -> None:
        """Until all is on the disk; the last thing before a run ends.

        Raises:
            SaveError: a checkpoint could not be written.
        """
        self._retry_best()
        for write in list(self._under_way):
            self._wait_for(write, True, must_in_time=True)

    def close(self) -> None:
        """As :meth:`wait`, for a run that fails already: what goes wrong here is only told."""
        for write in list(self._under_way):
            try:
                self._wait_for(write, True, must_in_time=True)
            except Exception as error:  # the run's own failure is what its user shall read
                self._say(f"warning: {error}")

    def _wait_for(self, write: _Write, must: bool, *, must_in_time: bool) -> bool:
        """Whether a write has ended; False when the disk takes longer than it may.

        Args:
            write: one under way.
            must: raise its error.
            must_in_time: raise when it takes too long.
        """
        while not write.done.wait(_LOOK_S):
            beats.beat(f"writing {write.path.name}")
            if self._is_late(must_in_time):
                return False
        if write in self._under_way:
            self._settle(write, must)
        return True

    def _settle_all(self, must: bool) -> None:
        for write in list(self._under_way):
            if write.done.is_set():
                self._settle(write, must)

    def _settle(self, write: _Write, must: bool) -> None:
        """Takes note of a write that has ended."""
        self._under_way.remove(write)
        self._next_word_s = _FIRST_WORD_S
        for note in write.notes:
            self._say(note)
        error, content, write.content = write.error, write.content, {}
        if error is None:
            if write.step is not None:
                self._say(f"saved {self._directory.name}/{LAST} at step {write.step}")
            return
        if must or not isinstance(error, SaveError):
            raise error
        if write.step is None:
            self._lost_best = checkpoint.snapshot(
                content, content.keys() if self._in_background else ()
            )
        self._say(f"warning: {error.what}: training goes on, the next save tries again")

    def _is_late(self, must: bool) -> bool:
        """Whether the disk takes longer for a write than it may; tells one that takes long.

        Raises:
            SaveError: it does, if it ``must`` not.
        """
        write = next((write for write in self._under_way if not write.done.is_set()), None)
        if write is None or write.since is None:
            return False
        gone = time.monotonic() - write.since
        if gone > self._timeout_s:
            what = (
                f"The disk has not taken the checkpoint {write.path} within run.save_timeout_s="
                f"{self._timeout_s:g} s; {self._kept_words()}"
            )
            if must:
                raise SaveError(what, "look at the disk")
            if not write.is_late:
                self._say(f"warning: {what}: training goes on")
            write.is_late = True
        elif gone > self._next_word_s:
            self._next_word_s *= 2
            self._say(f"the disk has been writing {write.path.name} for {gone:.0f} s")
        return write.is_late

    def _kept_words(self) -> str:
        return f"{self._kept[-1].name} is whole" if self._kept else "there is none before it"

    # ------------------------------------------------------------------ in the thread

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        if sys.platform == "linux":  # where the number of a thread is that of a process
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            write = self._queue.get()
            write.since = time.monotonic()
            try:
                self._write(write)
            except BaseException as error:  # the training thread raises it
                write.error = error
            write.done.set()

    def _write(self, write: _Write) -> None:
        if (name := checkpoint.find_not_finite(write.content["model"])) is not None:
            raise TrainingError(
                f"The weights are not finite ({name}), though the losses up to here were: "
                f"{write.path.name} was not written; {self._kept_words()}; lower the learning "
                "rate, or clip the gradients, and continue with --resume."
            )
        checkpoint.save(write.path, write.content, self._kept_words())
        if write.step is None:
            return
        before = [path for path in self._kept if path != write.path]
        write.notes += _make_newest(write.path, before)
        self._kept = [*before, write.path]
        write.notes += _point_to(write.path)
        while len(self._kept) > self._keep:
            oldest = self._kept.pop(0)
            try:
                oldest.unlink(missing_ok=True)
            except OSError as error:
                write.notes.append(f"warning: cannot remove {oldest}: {error.strerror}")


def _make_newest(path: Path, before: list[Path]) -> list[str]:
    """Lets a file's time be behind those of the others, though clocks of machines differ."""
    try:
        newest = max((other.stat().st_mtime_ns for other in before if other.exists()), default=0)
        if path.stat().st_mtime_ns <= newest:
            os.utime(path, ns=(newest + 1_000_000, newest + 1_000_000))
    except OSError as error:
        return [f"warning: cannot set the time of {path}: {error.strerror}"]
    return []


def _point_to(path: Path) -> list[str]:
    """Makes ``last.pth`` mean a file, in one go; what the log shall say of it.

    Where there are no symbolic links it is a hard one, and where there are none either it is
    not there: an old one would be worse.
    """
    last = path.with_name(LAST)
    link = path.with_name(f".{LAST}.link")
    for make in (link.symlink_to, lambda name: os.link(path, link)):
        try:
            with contextlib.suppress(FileNotFoundError):
                link.unlink()
            make(path.name)
            link.replace(last)
            return []
        except OSError as error:
            failed = error
    with contextlib.suppress(OSError):
        link.unlink()
    try:
        last.unlink(missing_ok=True)
    except OSError as error:
        return [f"warning: cannot let {last} point to {path.name}: {error.strerror}"]
    no_links = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
    why = "this disk has no links" if failed.errno in no_links else failed.strerror
    return [f"warning: there is no {last.name} beside {path.name}: {why}"]
