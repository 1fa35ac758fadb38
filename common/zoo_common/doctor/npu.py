"""torch_npu, CANN, driver, cards and HCCL."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from pathlib import Path

from zoo_common import npu_env, versions_npu
from zoo_common.doctor.lines import NOTE, OK, PROBLEM, Line, run
from zoo_common.doctor.machine import Machine

_NPU_SMI_S = 30.0
_HDK = "install the NPU driver and firmware (Ascend HDK), or give the container its driver"
_SOURCE = "run: source test/env_npu.sh"


def nothing_here(machine: Machine) -> bool:
    """Whether this machine has nothing to do with NPUs, so that one line says it all."""
    return not (machine.wants_npu or machine.cann)


def torch_npu(machine: Machine) -> list[Line]:
    """torch_npu: installed, made for this torch, and importable."""
    if nothing_here(machine):
        return [Line("NPU", NOTE, "no card, no CANN, no torch_npu: not a machine for NPUs")]
    version, facts = machine.torch_npu, machine.facts
    if version is None:
        command = versions_npu.install_command()
        return [Line("torch_npu", machine.npu_trouble, "not installed", command)]
    lines = []
    if facts.get("torch") and version[0].isdigit():
        verdict = versions_npu.judge_torch(version, facts["torch"])
        text = f"{version}, {verdict.text}"
        status = machine.npu_trouble if verdict.status == PROBLEM else verdict.status
        lines.append(Line("torch_npu", status, text, verdict.advice))
    else:
        lines.append(Line("torch_npu", NOTE, f"{version}; which torch it is for is not known"))
    return lines + _import_of_torch_npu(machine, version)


def _import_of_torch_npu(machine: Machine, version: str) -> list[Line]:
    facts = machine.facts
    part = "torch_npu"
    if facts.get("npu_count"):
        return [Line(part, OK, f"imports, and shows {facts.get('npu_name', 'its cards')}")]
    reason = facts.get("npu_reason")
    if reason:
        text, _, advice = reason.rpartition("; ")
        if not text:
            text, advice = reason, "see the other lines"
        lines = [Line(part, machine.npu_trouble, text, advice)]
        if "driver shows no card" not in reason and _loads_itself():
            lines.append(
                Line(
                    "autoload",
                    NOTE,
                    "until then a plain `import torch` fails here as well, because torch loads "
                    "torch_npu by itself; the zoo turns that off",
                    "elsewhere: export TORCH_DEVICE_BACKEND_AUTOLOAD=0",
                )
            )
        return lines
    if facts.get("trying") == "npu" and "died" in facts:
        text = f"{version}: its import {facts['died']}"
        advice = f"install versions that belong together: {versions_npu.install_command()}"
        return [Line(part, machine.npu_trouble, text, advice)]
    return []


def _loads_itself() -> bool:
    """Whether torch would import torch_npu whenever it is imported."""
    points = importlib.metadata.entry_points(group="torch.backends")
    return any(point.name == "torch_npu" for point in points)


def cann(machine: Machine) -> list[Line]:
    """CANN: where, which, sourced, and whether torch_npu is made for it."""
    if nothing_here(machine):
        return []
    found = machine.cann
    if found is None:
        text = npu_env.no_cann_message(machine.environ).partition(": ")[2].partition(";")[0]
        if machine.imported:
            return [Line("CANN", NOTE, f"torch_npu imports, but from where is not known: {text}")]
        version = versions_npu.cann_for(machine.torch_npu or versions_npu.PAIRS[0].torch_npu)
        return [Line("CANN", machine.npu_trouble, text, f"install CANN {version}, then {_SOURCE}")]
    release = npu_env.cann_version(found)
    text = f"{release or 'of unknown version'} in {found.home}"
    lines = []
    if machine.torch_npu and release:
        verdict = versions_npu.judge_cann(machine.torch_npu, release)
        status = machine.npu_trouble if verdict.status == PROBLEM else verdict.status
        lines.append(Line("CANN", status, f"{text}: {verdict.text}", verdict.advice))
    else:
        lines.append(Line("CANN", OK if release else NOTE, text))
    return lines + _sourced(machine, found)


def _sourced(machine: Machine, found: npu_env.Cann) -> list[Line]:
    """Whether this shell has CANN's variables."""
    if found.set_env is not None:
        text = f"{found.set_env} is not sourced in this shell; a run's script does that itself"
        return [Line("set_env", NOTE, text, f"for python3 -m zoo_common.launch, {_SOURCE}")]
    paths = machine.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    home = found.home.resolve()
    if any(Path(path).resolve().is_relative_to(home) for path in paths if path):
        return [Line("set_env", OK, "sourced")]
    text = "sourced, but LD_LIBRARY_PATH does not name CANN's libraries: something replaced it"
    return [
        Line("set_env", NOTE if machine.imported else machine.npu_trouble, text, "source it again")
    ]


def driver(machine: Machine) -> list[Line]:
    """The driver and the firmware, by their version files."""
    if nothing_here(machine):
        return []
    version = npu_env.driver_version(machine.environ)
    if version is None:
        works = bool(machine.facts.get("npu_count"))
        status = NOTE if works else machine.npu_trouble
        return [Line("driver", status, "no version file of a driver found", _HDK)]
    firmware = npu_env.driver_version(machine.environ, "firmware")
    text = f"{version}, firmware {firmware or 'not visible here'}"
    release = machine.cann and npu_env.cann_version(machine.cann)
    if not release:
        return [Line("driver", OK, text)]
    verdict = versions_npu.judge_driver(version, release)
    status = machine.npu_trouble if verdict.status == PROBLEM else verdict.status
    return [Line("driver", status, f"{text}: {verdict.text}", verdict.advice)]


def cards(machine: Machine) -> list[Line]:
    """The cards: seen by the driver, by npu-smi, by torch_npu; and which are to be used."""
    if nothing_here(machine):
        return []
    seen = machine.facts.get("npu_count")
    lines = [_device_files(machine, bool(seen))]
    smi = npu_smi(machine)
    if smi is not None:
        lines.append(smi)
    if seen:
        lines.append(Line("cards", OK, f"torch_npu shows {seen}"))
    visible = machine.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is not None:
        lines.append(judge_visible(visible, len(machine.cards) or None, machine.npu_trouble))
    return lines


def _device_files(machine: Machine, works: bool) -> Line:
    found = machine.cards
    if not found:
        status = NOTE if works else machine.npu_trouble
        advice = "give the container its cards (--device=/dev/davinci0 ...), or load the driver"
        return Line("cards", status, "the driver shows none (no /dev/davinci0)", advice)
    closed = [path.name for path in found if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        text = f"{len(found)}, but this user may not open {', '.join(closed)}"
        return Line("cards", machine.npu_trouble, text, "join the group that owns /dev/davinci0")
    return Line("cards", OK, f"the driver shows {len(found)}")


def npu_smi(machine: Machine) -> Line | None:
    """What npu-smi counts; a broken driver can make it hang."""
    path = machine.environ.get("PATH", "")
    program = shutil.which("npu-smi", path=path) or next(
        (str(p) for p in machine.root.glob("usr/local/*bin/npu-smi")), None
    )
    if program is None:
        status = machine.npu_trouble if machine.cards else NOTE
        return Line("npu-smi", status, "not found; it comes with the driver", _HDK)
    output = run([program, "info", "-l"], _NPU_SMI_S)
    if output.code is None:
        advice = "the driver does not answer: look at dmesg, and reset the card or the machine"
        return Line("npu-smi", machine.npu_trouble, f"no answer in {_NPU_SMI_S:.0f} s", advice)
    count = re.search(r"Total Count\s*:\s*(\d+)", output.stdout)
    if output.code or count is None:
        said = (output.stdout + output.stderr).strip().splitlines() or ["nothing"]
        return Line("npu-smi", machine.npu_trouble, f"fails, saying: {said[-1].strip()}", _HDK)
    return Line("npu-smi", OK, f"counts {count[1]}")


def judge_visible(value: str, count: int | None, trouble: str) -> Line:
    """Whether ASCEND_RT_VISIBLE_DEVICES is read to its end by CANN, which stops at a mistake.

    Args:
        value: what it is set to.
        count: the cards of the machine, None if not known.
        trouble: the status of a mistake.
    """
    part = "ASCEND_RT_VISIBLE_DEVICES"
    advice = "list card numbers in ascending order with commas and no spaces, such as 0,1,2"
    if not re.fullmatch(r"\d+(,\d+)*", value):
        text = f"'{value}': CANN reads it up to the first character that is no digit or comma"
        return Line(part, trouble, text, advice)
    numbers = [int(number) for number in value.split(",")]
    if numbers != sorted(set(numbers)):
        return Line(part, trouble, f"'{value}' is not in ascending order", advice)
    if count is not None and numbers[-1] >= count:
        text = f"'{value}' names card {numbers[-1]}, and the machine has 0 to {count - 1}"
        return Line(part, trouble, text, advice)
    return Line(part, OK, f"'{value}': {len(numbers)} to be used")


def hccl(machine: Machine) -> list[Line]:
    """HCCL's library: in CANN, and where the loader looks."""
    if nothing_here(machine):
        return []
    name = "libhccl.so"
    paths = machine.library_path.split(os.pathsep)
    if any((Path(path) / name).exists() for path in paths if path):
        return [Line("HCCL", OK, f"{name} found")]
    if machine.imported:
        return [Line("HCCL", NOTE, f"{name} is not in LD_LIBRARY_PATH, but torch_npu imports")]
    if machine.cann is None:
        return [Line("HCCL", machine.npu_trouble, f"no {name}: it comes with CANN", "install CANN")]
    home = machine.cann.home
    inside = next((p for p in home.glob(f"*/{name}")), None) or next(
        (p for p in home.glob(f"*-linux/*/{name}")), None
    )
    if inside is None:
        text = f"no {name} in {home}: the CANN there is not whole"
        return [Line("HCCL", machine.npu_trouble, text, "install CANN's toolkit again")]
    text = f"{inside} is not in LD_LIBRARY_PATH"
    return [Line("HCCL", machine.npu_trouble, text, _SOURCE)]
