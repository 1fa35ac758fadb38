"""Machines for tests: network namespaces of this one, joined by a switch whose cables can be cut.

Each has a loopback and one address of each family; a process in one reaches the others over the
switch only. Making them needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PORT = 29517


def why_not() -> str:
    """Why there can be no such machines here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2's ip"
    name = f"zoo{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made here ({made.stderr.strip()})"
    bridge = subprocess.run(
        ["ip", "-n", name, "link", "add", "br0", "type", "bridge"], capture_output=True, text=True
    )
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"no bridge can be made here ({bridge.stderr.strip()})" if bridge.returncode else ""


@dataclass
class Machine:
    """A machine of a test.

    Attributes:
        number: its ``--node_rank``.
        address: its IPv4 address.
        address6: its IPv6 address.
        name: of its namespace.
        switch: the namespace of the switch.
    """

    number: int
    address: str
    address6: str
    name: str
    switch: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def inside(self) -> list[str]:
        """What stands before the run and its options, to start it here."""
        return ["ip", "netns", "exec", self.name, sys.executable, "-m", "zoo_common.launch"]

    def start(
        self, directory: Path, words: Sequence[str], master: str, number: int | None = None
    ) -> subprocess.Popen[str]:
        """Starts a run of the model directory here, as a user would on this machine.

        Args:
            directory: the model's; what is printed goes to files beside it.
            words: the run and its options.
            master: address of machine 0.
            number: a ``--node_rank`` other than this machine's.
        """
        rank = self.number if number is None else number
        own = [f"--node_rank={rank}", f"--master_addr={master}", f"--master_port={PORT}"]
        with self._console(directory, len(self.started)).open("w") as log:
            process = subprocess.Popen(
                [*self.inside(), *words, *own],
                cwd=directory,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.started.append(process)
        return process

    def console(self, directory: Path, start: int = -1) -> str:
        """What a start of :meth:`start` printed, the last one by default."""
        return self._console(directory, range(len(self.started))[start]).read_text()

    def _console(self, directory: Path, start: int) -> Path:
        return directory.parent / f"console_{self.number}_{start}.txt"

    def cut(self) -> None:
        """Pulls its cable: nothing comes or goes, and nobody is told."""
        _ip("-n", self.switch, "link", "set", f"p{self.number}", "down")

    def mend(self) -> None:
        """Puts the cable back."""
        _ip("-n", self.switch, "link", "set", f"p{self.number}", "up")

    def processes(self) -> list[int]:
        """All that runs here."""
        return [int(word) for word in _ip("netns", "pids", self.name).split()]

    def power_off(self) -> None:
        """Ends it as a cut of its power would: no connection is closed in an orderly way."""
        self.cut()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """So many machines on one switch."""
    mark = f"zoo{os.getpid()}"
    switch = f"{mark}switch"
    made: list[Machine] = []
    _ip("netns", "add", switch)
    try:
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number in range(count):
            name = f"{mark}m{number}"
            machine = Machine(number, f"10.77.0.{number + 1}", f"fd77::{number + 1}", name, switch)
            _ip("netns", "add", name)
            made.append(machine)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip(
                *("-n", switch, "link", "add", f"p{number}", "type", "veth"),
                *("peer", "name", "net0", "netns", name),
            )
            _ip("-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
            _ip("-n", name, "address", "add", f"{machine.address}/24", "dev", "net0")
            _ip("-n", name, "address", "add", f"{machine.address6}/64", "dev", "net0", "nodad")
            _ip("-n", name, "link", "set", "net0", "up")
        yield made
    finally:
        for machine in made:
            for process in machine.started:
                process.kill()
                process.wait()
            machine.power_off()
            time.sleep(0.1)
            _ip("netns", "del", machine.name)
        _ip("netns", "del", switch)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout
