"""Whole runs for the tests of faults: start them, see all their processes, break them.

Every process of a run is known by a mark in its environment, which children inherit: so one that
has lost its parent is found too.
"""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "common" / "tests" / "toy"
MARK = "ZOO_FAULT_TEST_MARK"
DEV_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Done:
    """How a launcher ended: its exit code, negative for a signal, and what it printed."""

    code: int
    out: str
    err: str


class FaultRun:
    """A run that has been started; :func:`start` makes it and ends what is left of it.

    Attributes:
        launcher: the process that was started.
        output: the run's output directory.
        started: Unix time.
        temporary: what the run's processes take for the system's temporary directory.
    """

    def __init__(
        self, directory: Path, words: list[str], output: Path, environment: Mapping[str, str]
    ) -> None:
        self.output = output
        self.started = time.time()
        self._mark = uuid.uuid4().hex
        self._scratch = tempfile.TemporaryDirectory(prefix="zf")  # short, as sockets need it
        self._ports: set[int] = set()
        scratch = Path(self._scratch.name)
        self.temporary = scratch / "tmp"
        self.temporary.mkdir()
        self._shared = SharedMemory(scratch / "shm")
        self._texts = scratch / "out", scratch / "err"
        own = {MARK: self._mark, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        with self._texts[0].open("w") as out, self._texts[1].open("w") as err:
            self.launcher = psutil.Popen(
                [
                    *self._shared.prefix,
                    *(sys.executable, "-m", "zoo_common.launch", *words, f"--output_dir={output}"),
                ],
                cwd=directory,
                env={**os.environ, **own, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def processes(self) -> list[psutil.Process]:
        """All that live, the launcher included."""
        wanted = f"{MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(int(entry.name)))
            except (OSError, psutil.NoSuchProcess):
                continue  # it has just ended, or is another user's
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes of this machine by their global rank."""
        found = {}
        for process in self.processes():
            try:
                if process.ppid() == self.launcher.pid and "zoo_common.worker" in process.cmdline():
                    found[int(process.environ()["RANK"])] = process
            except (psutil.NoSuchProcess, KeyError):
                continue
        return found

    def data_workers(self, rank: int) -> list[psutil.Process]:
        """The processes that make batches for a rank."""
        return [
            child
            for child in self.ranks()[rank].children()
            if "zoo_common.worker" in child.cmdline()
        ]

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = 300) -> None:
        """Waits until a condition holds, and fails when the run ends before."""
        end = time.monotonic() + timeout_s
        while not condition():
            ended = self.launcher.poll()
            assert ended is None, f"ended with {ended} before {what}: {self.words().err}"
            assert time.monotonic() < end, f"{what} did not come within {timeout_s:g} s"
            time.sleep(0.02)

    def steps(self) -> list[int]:
        """The steps that this start has recorded, and none that a start before it left."""
        return [line["step"] for line in records(self.output) if line["time"] > self.started]

    def wait_for_step(self, step: int, timeout_s: float = 300) -> None:
        """Waits until this start has recorded a step."""
        self.wait_for(lambda: max(self.steps(), default=0) >= step, f"step {step}", timeout_s)
        self.note_ports()

    def note_ports(self) -> None:
        """Remembers where the run's processes listen now, for :meth:`check_nothing_left`."""
        own = {process.pid for process in self.processes()}
        for connection in psutil.net_connections("inet"):
            if connection.pid in own and connection.status == psutil.CONN_LISTEN:
                self._ports.add(connection.laddr.port)

    def words(self) -> Done:
        """What was printed up to now."""
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._texts)
        return Done(self.launcher.returncode or 0, out, err)

    def end(self, timeout_s: float = 300) -> Done:
        """Waits until the launcher has ended by itself."""
        code = self.launcher.wait(timeout=timeout_s)
        words = self.words()
        return Done(code, words.out, words.err)

    def signal(self, number: int) -> None:
        """Sends the launcher a signal."""
        self.launcher.send_signal(number)

    def check_nothing_left(self, within_s: float = 10) -> None:
        """Asserts that no process, listening port or shared memory of the run remains.

        The launcher may be gone before the last of its descendants; they have ``within_s``.
        """
        end = time.monotonic() + within_s
        while left := self._left():
            assert time.monotonic() < end, f"left after {within_s:g} s: {', '.join(left)}"
            time.sleep(0.1)

    def _left(self) -> list[str]:
        left = [f"process {process.pid} {_describe(process)}" for process in self.processes()]
        left += [f"port {port}" for port in sorted(self._ports) if not _can_listen(port)]
        return left + [f"/dev/shm/{name}" for name in self._shared.left()]

    def close(self) -> None:
        """Ends what a test has left running."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.launcher.wait(timeout=30)
        self._scratch.cleanup()


class SharedMemory:
    """A run's files in ``/dev/shm``.

    Where this process may mount, the run sees a directory of its own there. Elsewhere new files
    count as the run's when they are named after a process that has ended; semaphores, which are
    named after nobody, do not.

    Args:
        directory: what the run is to see, to be made.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o1777)
        self.prefix: list[str] = []
        self._directory = DEV_SHM
        if _may_mount():
            self._directory = directory
            script = 'mount --bind "$0" /dev/shm && exec "$@"'
            self.prefix = ["unshare", "--mount", "sh", "-c", script, str(directory)]
        self._before = self._files()

    def left(self) -> list[str]:
        """Names of the files that the run has made and not removed."""
        new = sorted(self._files() - self._before)
        return new if self.prefix else [name for name in new if _of_an_ended(name)]

    def _files(self) -> set[str]:
        directory = self._directory
        return {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()


@functools.cache
def _may_mount() -> bool:
    """Whether this process may give others a view of the disks of their own."""
    command = ["unshare", "--mount", "mount", "--bind", tempfile.gettempdir(), str(DEV_SHM)]
    try:
        return DEV_SHM.is_dir() and subprocess.run(command, capture_output=True).returncode == 0
    except OSError:  # there is no such program
        return False


@contextmanager
def start(
    directory: Path, *words: str, output: Path, environment: Mapping[str, str] | None = None
) -> Iterator[FaultRun]:
    """Starts ``python3 -m zoo_common.launch WORDS`` in a model directory.

    Args:
        directory: of the model, or a copy of the toy.
        words: run and options; ``--output_dir`` is added.
        output: the output directory.
        environment: variables on top of this process's own.
    """
    run = FaultRun(directory, list(words), output, environment or {})
    try:
        yield run
    finally:
        run.close()


def run_to_end(
    directory: Path,
    *words: str,
    output: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
) -> Done:
    """Starts a run, waits for it, and asserts that nothing of it is left."""
    with start(directory, *words, output=output, environment=environment) as run:
        done = run.end(timeout_s)
        run.check_nothing_left()
    return done


def kill(process: psutil.Process) -> None:
    """``kill -9``."""
    process.send_signal(signal.SIGKILL)


def records(output: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a record; the last one may be half written."""
    file = output / name
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def result_of(output: Path) -> dict[str, Any]:
    """The run's result."""
    result: dict[str, Any] = json.loads((output / "result.json").read_text(encoding="utf-8"))
    return result


def content_of(output: Path, name: str = "last.pth") -> dict[str, Any]:
    """A checkpoint as it is in the file."""
    content: dict[str, Any] = torch.load(output / "checkpoints" / name, weights_only=True)
    return content


def check_same_training(first: Path, second: Path) -> None:
    """Asserts that two runs ended in the same state, bit for bit: all that training goes on from.

    Weights, optimizer, loss scale, averages, queues, random numbers and position; the run's name
    and its settings may differ.
    """
    one, other = content_of(first), content_of(second)
    names = ["model", "step", "epoch", "best", "parts", "rng", "rank_parts"]
    differing = [line for name in names for line in differences(one[name], other[name], name)]
    assert not differing, f"{len(differing)} differ: {'; '.join(differing[:5])}"


def differences(first: Any, second: Any, where: str) -> Iterator[str]:
    """Where two parts of checkpoints differ in any bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        alike = first.dtype == second.dtype and first.shape == second.shape
        if not alike or not torch.equal(_bits(first), _bits(second)):
            yield where
    elif isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            yield f"{where}: keys"
        for key in first.keys() & second.keys():
            yield from differences(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            yield f"{where}: length"
        for index, (one, other) in enumerate(zip(first, second, strict=False)):
            yield from differences(one, other, f"{where}[{index}]")
    elif type(first) is not type(second) or first != second:
        yield f"{where}: {first!r} and {second!r}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, so that NaN equals NaN and 0 differs from -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _describe(process: psutil.Process) -> str:
    try:
        return f"({process.status()}) {' '.join(process.cmdline()[:4])}"
    except psutil.NoSuchProcess:
        return "(ended just now)"


def _can_listen(port: int) -> bool:
    """Whether a server could start at a port; connections that linger there do not matter."""
    for family, address in ((socket.AF_INET, ""), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
                probe.listen(1)
        except OSError as error:
            if error.errno in _NO_SUCH_FAMILY:
                continue
            return False
    return True


_NO_SUCH_FAMILY = (97, 99)  # EAFNOSUPPORT, EADDRNOTAVAIL: a machine without IPv6


def _of_an_ended(name: str) -> bool:
    """Whether a file of shared memory is named after a process, and that one has ended."""
    numbers = [int(number) for number in re.findall(r"\d{2,}", name)]
    return bool(numbers) and not any(map(psutil.pid_exists, numbers))
