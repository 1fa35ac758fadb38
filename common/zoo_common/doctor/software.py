"""Python, torch, torchvision, GPUs, and the zoo's own packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys

from zoo_common import versions_npu
from zoo_common.doctor.lines import NOTE, OK, PROBLEM, Line
from zoo_common.doctor.machine import Machine, installed

_MAKE = "run: bash tools/quickstart.sh"


def python(machine: Machine) -> list[Line]:
    """The interpreter, and whether the zoo runs with it."""
    (major, first), (_, last) = versions_npu.PYTHONS
    text = f"{platform.python_version()} on {platform.machine()}, {sys.executable}"
    if (major, first) <= sys.version_info[:2] <= (major, last):
        return [Line("Python", OK, text)]
    return [
        Line(
            "Python",
            PROBLEM,
            f"{text}: not supported",
            f"use Python {major}.{first} to {major}.{last}",
        )
    ]


def packages(machine: Machine) -> list[Line]:
    """zoo-common, what it needs, and the models that are installed."""
    version = installed("zoo-common")
    if version is None:
        return [Line("zoo", PROBLEM, f"zoo-common is not installed in {sys.prefix}", _MAKE)]
    lines = [Line("zoo", OK, f"zoo-common {version} in {sys.prefix}")]
    missing = [name for name in _needs("zoo-common") if installed(name) is None]
    if missing:
        text = f"zoo-common needs {', '.join(missing)}, which {_are(missing)} not installed"
        lines.append(Line("zoo", PROBLEM, text, _MAKE))
    models = sorted(_models())
    broken = [name for name, package in models if importlib.util.find_spec(package) is None]
    if broken:
        text = f"{', '.join(broken)}: installed, but not importable; was its directory moved?"
        lines.append(Line("models", PROBLEM, text, _MAKE))
    whole = [name for name, _ in models if name not in broken]
    lines.append(
        Line("models", OK, ", ".join(whole))
        if whole
        else Line("models", NOTE, "no model is installed; their scripts work from their directory")
    )
    return lines


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _needs(distribution: str) -> list[str]:
    """The distributions that one needs in any case, its extras left out."""
    wanted = importlib.metadata.requires(distribution) or []
    matches = (re.match(r"[\w.-]+", text) for text in wanted if "extra ==" not in text)
    return [match[0] for match in matches if match]


def _models() -> set[tuple[str, str]]:
    """Installed distributions that are made on zoo-common, with their packages."""
    found: set[tuple[str, str]] = set()
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        needs = distribution.requires or []
        if name.startswith("zoo-") and any(text.startswith("zoo-common") for text in needs):
            tops = (distribution.read_text("top_level.txt") or "").split()
            found.update((name, package) for package in tops)
    return found


def torch(machine: Machine) -> list[Line]:
    """Whether torch and torchvision are there, new enough, made for one another."""
    facts = machine.facts
    version = facts.get("torch")
    if version is None:
        found = installed("torch")
        if found is None:
            return [Line("torch", PROBLEM, "not installed", _MAKE)]
        text = f"{found} is installed, but its import {facts.get('died', 'failed')}"
        return [Line("torch", PROBLEM, text, "remove .venv and " + _MAKE)]
    build = "CPU build"
    if facts["cuda"]:
        build = f"CUDA {facts['cuda']} build"
    elif facts["hip"]:
        build = f"ROCm {facts['hip']} build"
    text = f"{version}, {build}, {facts['threads']} threads"
    oldest = ".".join(map(str, versions_npu.OLDEST_TORCH))
    if (versions_npu.order(version) or (0, 0))[:2] < versions_npu.OLDEST_TORCH:
        lines = [Line("torch", PROBLEM, f"{text}: too old", f"install torch {oldest} or newer")]
    else:
        lines = [Line("torch", OK, text)]
    return [*lines, _torchvision(machine, version)]


def _torchvision(machine: Machine, torch_version: str) -> Line:
    version = installed("torchvision")
    if version is None:
        return Line("torchvision", PROBLEM, "not installed", _MAKE)
    wanted = versions_npu.torchvision_for(torch_version)
    trouble = machine.facts.get("torchvision_problem")
    if versions_npu.series(version) != wanted:
        text = f"{version} is not made for torch {torch_version}"
        return Line("torchvision", PROBLEM, text, f"install torchvision {wanted}")
    if trouble:
        advice = "install torch and torchvision from one index, both CPU builds or both CUDA builds"
        return Line("torchvision", PROBLEM, f"{version} cannot be used ({trouble})", advice)
    return Line(
        "torchvision", OK, f"{version}, made for torch {versions_npu.series(torch_version)}"
    )


def gpu(machine: Machine) -> list[Line]:
    """CUDA's GPUs, where a run would take one."""
    facts = machine.facts
    if facts.get("cuda_count"):
        count = facts["cuda_count"]
        return [Line("GPU", OK, f"{count}, the first is {facts.get('cuda_name', 'unnamed')}")]
    reason = facts.get("cuda_reason") or "not looked for"
    if machine.asked == "cuda":
        text, _, advice = reason.partition("; ")
        return [Line("GPU", PROBLEM, text, advice or "choose another --device")]
    return [Line("GPU", NOTE if machine.asked == "auto" else OK, "none that a run could use")]
