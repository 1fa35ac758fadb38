"""The launcher's eye on the ranks of its machine: which of them hang, and where.

A rank hangs when it has not beaten (:mod:`zoo_common.beats`) for a given time. Then each rank and
each of its data workers is asked for its stacks, which says who waits for whom.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zoo_common import beats

# A process that is in the kernel does not answer; one that computes does so at once.
_ANSWER_S = 1.0
_POLL_S = 0.02
# Imports from a network disk, or an index that is made: what a rank does before its first batch.
_START_S = 600.0
# More than this between two looks, and the launcher itself had been stopped.
_LONGEST_LOOK_S = 1.0

_THREAD = re.compile(r"^(?:Current t|T)hread 0x[0-9a-f]+.*:$")
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_PROC = Path("/proc")
_HOME = str(Path(__file__).parent.parent)

_STATES = {
    "D": "waits in the kernel, mostly for a disk or a device",
    "T": "is stopped by a signal",
    "t": "is stopped by a debugger",
}


class Frame(NamedTuple):
    """A line of a stack.

    Attributes:
        file: relative to where its package stands.
        line: from 1.
        function: its name.
        ours: whether it belongs to the model directory or to the zoo's common part.
    """

    file: str
    line: int
    function: str
    ours: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


@dataclass(frozen=True)
class Whereabouts:
    """Where one rank is.

    Attributes:
        rank: its global rank.
        seconds: since its last beat.
        what: what it said then.
        where: innermost frame and innermost frames of the zoo, or why that is not known.
        waits: whether it waits for other ranks, as far as its stack tells.
        workers: the same as ``where`` for each of its data workers that is at work.
        stacks: those of all its threads and data workers, as Python's fault handler writes them.
    """

    rank: int
    seconds: float
    what: str
    where: str
    waits: bool
    workers: tuple[str, ...]
    stacks: str

    def __str__(self) -> str:
        """One line for people."""
        line = f"rank {self.rank}: {self.seconds:.0f} s in {self.what}: {self.where}"
        return "; ".join([line, *self.workers])


@dataclass(frozen=True)
class Hang:
    """A run that does not go on.

    Attributes:
        limit_s: the time that a rank was given for a step or a batch.
        ranks: where each rank of this machine is, in order.
    """

    limit_s: float
    ranks: tuple[Whereabouts, ...]

    @property
    def message(self) -> str:
        """A sentence, and a line for each rank."""
        silent = [each for each in self.ranks if each.seconds >= self.limit_s]
        stuck = [each for each in silent if not each.waits]
        named = stuck or silent
        seconds = min(each.seconds for each in named)
        who = f"{_ranks([each.rank for each in named])} came no further for {seconds:.0f} s"
        if stuck and any(each.waits for each in self.ranks):
            who += f", and the others wait for {'it' if len(stuck) == 1 else 'them'}"
        sentence = (
            f"The run hung: {who}: look at where each rank is, continue with --resume, and raise "
            "run.hang_timeout_s if a step may take so long."
        )
        return "\n".join([sentence, *(f"  {each}" for each in self.ranks)])

    @property
    def stacks(self) -> str:
        """All stacks, for a file beside the logs."""
        return "\n".join(f"==== {each}\n{each.stacks}" for each in self.ranks)


class Watch:
    """Watches the ranks of this machine.

    Before its first batch a rank has ten minutes, if the limit is less. Time counts while somebody
    looks: what passes between two calls of :meth:`hung` counts for 1 s at most, so that a launcher
    that was stopped with its ranks (Ctrl-Z, a suspended machine) does not take the pause for a
    hang.

    Args:
        directory: that of :func:`zoo_common.beats.start`.
        pids: the ranks' processes, children of this one, by local rank; beats of others that were
            there before are passed over.
        limit_s: seconds without a beat after which a rank hangs.
        first_rank: the global rank of the first of them.
    """

    def __init__(
        self, directory: Path, pids: Sequence[int], limit_s: float, *, first_rank: int = 0
    ) -> None:
        self._limit_s = limit_s
        self._looked = time.monotonic()
        self._clock = 0.0
        self._ranks = [
            _Rank(first_rank + local, pid, directory, local) for local, pid in enumerate(pids)
        ]

    def hung(self) -> Hang | None:
        """Whether a rank has hung; for a loop that calls it every 0.1 s or so.

        None takes microseconds; to look at a hang takes up to a second for each process of a rank
        that does not answer.
        """
        self._look()
        late = [rank for rank in self._ranks if rank.is_late(self._clock, self._limit_s)]
        if all(rank.has_ended() for rank in late):
            return None
        ranks = self._where()
        if all(rank.seconds < self._limit_s for rank in ranks):
            return None  # it ended just now
        return Hang(self._limit_s, ranks)

    def where(self) -> tuple[Whereabouts, ...]:
        """Where each rank is now; the ranks go on."""
        self._look()
        return self._where()

    def _look(self) -> None:
        now = time.monotonic()
        self._clock += min(now - self._looked, _LONGEST_LOOK_S)
        self._looked = now
        for rank in self._ranks:
            rank.look(self._clock)

    def _where(self) -> tuple[Whereabouts, ...]:
        running = [rank for rank in self._ranks if not rank.has_ended()]
        if not running:
            return ()
        parents = dict(_parents())
        with ThreadPoolExecutor(len(running)) as pool:
            return tuple(pool.map(lambda rank: rank.ask(self._clock, parents), running))


class _Rank:
    """One rank as the launcher sees it."""

    def __init__(self, rank: int, pid: int, directory: Path, local_rank: int) -> None:
        self._rank = rank
        self._pid = pid
        self._beat_file = beats.beat_file(directory, local_rank)
        self._stacks = -1
        self._memory: mmap.mmap | None = None
        self._count = 0
        self._since = 0.0
        self._what = "its start"
        self._working = False

    def look(self, clock: float) -> None:
        """Notes a new beat."""
        if self._memory is None and not self._open():
            return
        assert self._memory is not None
        count, self._working, what = beats.FORMAT.unpack_from(self._memory, 0)
        if count != self._count:
            self._count, self._since = count, clock
            self._what = what.rstrip(b"\0").decode(errors="replace")

    def _open(self) -> bool:
        """Whether the rank has begun to beat; a file of an earlier rank is another process's."""
        try:
            pid, memory, stacks = self._beat_file.read_text(encoding="utf-8").splitlines()
            if int(pid) != self._pid:
                return False
            with Path(memory).open("rb") as stream:
                self._memory = mmap.mmap(
                    stream.fileno(), beats.FORMAT.size, access=mmap.ACCESS_READ
                )
            # Held open: what a process wrote shall be there when it has ended.
            self._stacks = os.open(stacks, os.O_RDONLY)
        except (OSError, ValueError):
            return False
        weakref.finalize(self, os.close, self._stacks)
        return True

    def is_late(self, clock: float, limit_s: float) -> bool:
        """Whether it has not beaten for so long."""
        return clock - self._since >= (limit_s if self._working else max(limit_s, _START_S))

    def has_ended(self) -> bool:
        """Whether the process is gone; its exit code stays for the launcher to collect."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self._pid, flags) is not None
        except ChildProcessError:
            return True

    def ask(self, clock: float, parents: dict[int, int]) -> Whereabouts:
        """Where the rank is, from its own stacks and those of its data workers."""
        answers = []
        where, waits, busy = "it has not started yet", False, []
        if self._memory is not None:
            text, silent = _ask(self._pid, self._stacks)
            frames = _main_thread(text)
            where, waits = _describe(frames) if frames else silent, _waits(frames)
            answers.append(text or f"{silent}\n")
            for pid in _listening(self._pid, parents):
                text, silent = _ask(pid, self._stacks)
                frames = _inside_worker(_main_thread(text))
                answers.append(f"-- data worker, process {pid}\n{text or silent}\n")
                if not text or any(frame.ours for frame in frames):
                    busy.append(f"its data worker: {_describe(frames) if frames else silent}")
        return Whereabouts(
            self._rank,
            clock - self._since,
            self._what,
            where,
            waits,
            tuple(busy),
            "".join(answers),
        )


def _ask(pid: int, stacks: int) -> tuple[str, str]:
    """A process's stacks; without an answer an empty text, and what the kernel says of it."""
    with contextlib.suppress(OSError):
        before = size = os.fstat(stacks).st_size
        os.kill(pid, signal.SIGUSR2)
        until = time.monotonic() + _ANSWER_S
        quiet = 0
        while time.monotonic() < until and quiet < 3:
            time.sleep(_POLL_S)
            now = os.fstat(stacks).st_size
            quiet = quiet + 1 if now == size > before else 0
            size = now
        text = os.pread(stacks, size - before, before).decode(errors="replace")
        if text:
            return text, ""
    return "", f"it does not answer: {_state(pid)}"


def _state(pid: int) -> str:
    """What the kernel says of a process that does not answer a signal."""
    try:
        state = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
        place = (_PROC / str(pid) / "wchan").read_text().strip()
    except (OSError, IndexError):
        return "it is gone, or this system does not tell"
    words = _STATES.get(state, f"it is in state {state}")
    return words if place in ("", "0") else f"{words} ({place})"


def _parents() -> Iterator[tuple[int, int]]:
    """Each process of this machine with its parent; nothing where there is no /proc."""
    names = os.listdir(_PROC) if _PROC.is_dir() else []  # noqa: PTH208 - Path makes objects
    for name in filter(str.isdigit, names):
        with contextlib.suppress(OSError, IndexError):  # it may end meanwhile
            words = (_PROC / name / "stat").read_text().rpartition(")")[2].split()
            yield int(name), int(words[1])


def _listening(pid: int, parents: dict[int, int]) -> list[int]:
    """Processes below ``pid`` that handle SIGUSR2; any other would be killed by it."""
    found, new = [], [pid]
    while new:
        new = sorted(child for child, parent in parents.items() if parent in new)
        found += new
    return [child for child in found if _handles(child, signal.SIGUSR2)]


def _handles(pid: int, number: int) -> bool:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _main_thread(text: str) -> list[Frame]:
    """Its frames, innermost first; Python writes the oldest thread last."""
    frames: list[Frame] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            frames = []
        elif found := _FRAME.match(line):
            file = found["file"]
            short, ours = _short(file)
            frames.append(Frame(short, int(found["line"]), found["function"], ours))
    return frames


def _short(file: str) -> tuple[str, bool]:
    """A path as people know it, and whether it is one of ours."""
    if file.startswith(f"{_HOME}/zoo_common/"):
        return file[len(_HOME) + 1 :], True
    packages = re.sub(r"^.*/(?:site-packages|dist-packages|python3\.\d+t?)/", "", file)
    if packages != file:
        return packages, False
    here = f"{Path.cwd()}/"  # the launcher runs in the model directory
    return file.removeprefix(here), file.startswith(here)


def _describe(frames: Sequence[Frame]) -> str:
    """The innermost frame, the innermost one of ours, and the innermost one of the model's."""
    ours = [frame for frame in frames if frame.ours]
    models = [frame for frame in ours if not frame.file.startswith("zoo_common/")]
    chain = dict.fromkeys([*frames[:1], *ours[:1], *models[:1]])
    return " <- ".join(map(str, chain))


def _waits(frames: Sequence[Frame]) -> bool:
    """Whether a stack ends in a collective, or in a backward pass, which holds DDP's."""
    near = any(
        frame.file.startswith("torch/distributed/") or frame.file == "zoo_common/distributed.py"
        for frame in frames[:3]
    )
    backward = any(frame.function == "_engine_run_backward" for frame in frames[:1])
    return near or backward or any("nn/parallel/distributed.py" in f.file for f in frames[:1])


def _inside_worker(frames: Sequence[Frame]) -> list[Frame]:
    """What a data worker does; further out stands what its rank did when it was forked."""
    names = [frame.function for frame in frames]
    return list(frames[: names.index("_worker_loop")] if "_worker_loop" in names else frames)


def _ranks(numbers: Sequence[int]) -> str:
    words = ", ".join(map(str, numbers))
    return f"rank {words}" if len(numbers) == 1 else f"ranks {words}"
