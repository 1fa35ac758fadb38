"""What several checks ask about: what the user wants, and what the child process found out."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo_common import npu_env
from zoo_common.doctor.lines import NOTE, PROBLEM, Line, run

_CHILD_S = 240.0
"""torch from a cold network disk takes minutes."""


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Machine:
    """This machine, and what is to be run on it.

    Attributes:
        asked: the device that the user named: ``auto``, ``npu``, ``cuda`` or ``cpu``.
        output_dir: where runs write.
        data_path: the data set, empty if none is given.
        environ: the environment variables.
        system: the root of the file system that /proc, /sys and /dev/shm are in.
        child_s: how long torch's import may take.
    """

    asked: str = "auto"
    output_dir: Path = Path()
    data_path: str = ""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    system: Path = Path("/")
    child_s: float = _CHILD_S

    @property
    def root(self) -> Path:
        """The root of the file system that drivers and CANN are in."""
        return Path(self.environ.get(npu_env.ROOT_VARIABLE) or "/")

    @cached_property
    def torch_npu(self) -> str | None:
        """The version of torch_npu, or None where it is not installed."""
        version = installed("torch-npu")
        if version is None and importlib.util.find_spec("torch_npu"):
            return "(unknown version)"
        return version

    @cached_property
    def cann(self) -> npu_env.Cann | None:
        """The CANN that this environment has sourced, or that is installed."""
        return npu_env.find_cann(self.environ)

    @cached_property
    def cards(self) -> tuple[Path, ...]:
        """The device files of the cards that the driver shows."""
        found = (path for path in self.root.glob("dev/davinci*") if path.name[7:].isdigit())
        return tuple(sorted(found, key=lambda path: int(path.name[7:])))

    @property
    def wants_npu(self) -> bool:
        """Whether a run is meant for NPUs: it was said, or the machine is made for them."""
        if self.asked == "auto":
            return bool(self.torch_npu or self.cards)
        return self.asked == "npu"

    @property
    def imported(self) -> bool:
        """Whether torch_npu could be imported, which needs CANN's libraries."""
        return bool(self.facts.get("npu_imported"))

    @property
    def library_path(self) -> str:
        """LD_LIBRARY_PATH as a run has it."""
        return str(self.facts.get("library_path", self.environ.get("LD_LIBRARY_PATH", "")))

    @property
    def npu_trouble(self) -> str:
        """The status of what keeps NPUs from being used."""
        return PROBLEM if self.wants_npu else NOTE

    @property
    def kind(self) -> str:
        """The device that a run takes here."""
        if self.asked != "auto":
            return self.asked
        kinds = (kind for kind in ("npu", "cuda") if self.facts.get(f"{kind}_count"))
        return next(kinds, "npu" if self.wants_npu else "cpu")

    @property
    def ranks(self) -> int:
        """The processes of the largest run that fits here, one a card."""
        return max(1, int(self.facts.get(f"{self.kind}_count") or 0))

    def look(self) -> list[Line]:
        """Gathers :attr:`facts`, which all checks share."""
        assert isinstance(self.facts, dict)
        return []

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the child process said of torch, torchvision, GPUs and NPUs; it may have died.

        ``died`` is there when it did, and says how.
        """
        if installed("torch") is None and not importlib.util.find_spec("torch"):
            return {}
        command = [sys.executable, "-m", "zoo_common.doctor.child"]
        if self.cann and self.cann.set_env:
            # As a run's script does, so that this tells what a run would meet.
            code = npu_env.shell_code(npu_env.make_plan(self.environ))
            command = ["bash", "-c", f'{code}exec "$@"', "bash", *command]
        output = run(command, self.child_s, dict(self.environ))
        facts: dict[str, Any] = {}
        for line in output.stdout.splitlines():
            with contextlib.suppress(ValueError):  # libraries print as well
                facts.update(json.loads(line) if line.startswith("{") else {})
        if output.code is None:
            facts["died"] = f"gave no answer in {self.child_s:.0f} s"
        elif output.code < 0:
            facts["died"] = f"was ended by {signal.Signals(-output.code).name}"
        elif output.code:
            said = output.stderr.strip().splitlines() or ["no reason given"]
            facts["died"] = f"failed ({said[-1]})"
        return facts
