"""Looks over this machine: ``python3 -m zoo_common.doctor [--device npu] [--data_path DIR]``.

One page says what there is, what keeps a run from starting, and what to do about it. It never
crashes and never hangs: each check stands alone, what imports torch and torch_npu runs in a child
process, because a CUDA build of torch beside torch_npu aborts its process, and programs of a
broken driver are given up after some time. Only the standard library is needed, so it also runs
where nothing is installed yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from zoo_common.doctor import dataset, network, npu, software, system
from zoo_common.doctor.lines import NOTE, PROBLEM, Line, guarded, without_home
from zoo_common.doctor.machine import Machine

__all__ = ["CHECKS", "Line", "Machine", "examine", "main"]

CHECKS: tuple[tuple[str, Callable[[Machine], list[Line]]], ...] = (
    ("Python", software.python),
    ("zoo", software.packages),
    ("torch", software.torch),
    ("GPU", software.gpu),
    ("torch_npu", npu.torch_npu),
    ("CANN", npu.cann),
    ("driver", npu.driver),
    ("cards", npu.cards),
    ("HCCL", npu.hccl),
    ("network", network.interfaces),
    ("ports", network.ports),
    ("memory", system.memory),
    ("cores", system.cores),
    ("shared memory", system.shared_memory),
    ("limits", system.limits),
    ("disk", system.disk),
    ("variables", system.variables),
    ("data", dataset.data),
)
"""What is looked at, in the order of the page."""

_WIDTH = 100
_PART = 14


def examine(machine: Machine) -> list[Line]:
    """Runs all checks; a check that fails or hangs gives a line that says so."""
    # Before the checks, so that none of them is charged with the time that torch takes.
    guarded("torch", machine.look, 2 * machine.child_s)
    lines = [line for part, check in CHECKS for line in guarded(part, _bound(check, machine))]
    return [
        line._replace(text=without_home(line.text), advice=without_home(line.advice))
        for line in lines
    ]


def _bound(check: Callable[[Machine], list[Line]], machine: Machine) -> Callable[[], list[Line]]:
    return lambda: check(machine)


def page(machine: Machine, lines: Sequence[Line]) -> str:
    """The findings for people."""
    rows = []
    for line in lines:
        head = f"{line.status:8} {line.part:{_PART}} "
        indent = " " * 24
        # Long names such as ASCEND_RT_VISIBLE_DEVICES push their text to the right.
        rows.append(textwrap.fill(line.text, _WIDTH, initial_indent=head, subsequent_indent=indent))
        advice, _, tree = line.advice.partition("\n")
        if advice:
            arrow = indent + "-> "
            rows.append(_wrapped(advice, arrow))
            rows += [f"{indent}   {row}" for row in tree.splitlines()]
    return "\n".join([*rows, "", verdict(machine, lines)])


def _wrapped(advice: str, arrow: str) -> str:
    """Advice below its line; a command stays whole, so that it can be copied."""
    if len(arrow) + len(advice) <= _WIDTH or "pip install" in advice:
        return arrow + advice
    return textwrap.fill(advice, _WIDTH, initial_indent=arrow, subsequent_indent=" " * len(arrow))


def verdict(machine: Machine, lines: Sequence[Line]) -> str:
    """The last line of the page."""
    problems = sum(line.status == PROBLEM for line in lines)
    notes = sum(line.status == NOTE for line in lines)
    counts = f"{problems} problem{'' if problems == 1 else 's'}, {notes} note{'s'[: notes != 1]}"
    if problems:
        return f"{counts}: a run on {machine.kind} would not start or would fail."
    return f"{counts}: a run on {machine.kind} can start."


def document(machine: Machine, lines: Sequence[Line]) -> str:
    """The findings for programs, as JSON."""
    content = {
        "device": machine.kind,
        "ok": not any(line.status == PROBLEM for line in lines),
        "lines": [line._asdict() for line in lines],
    }
    return json.dumps(content, indent=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Examines this machine; 0 when a run could start, 1 when there are problems, 2 for usage."""
    parser = argparse.ArgumentParser(
        prog="python3 -m zoo_common.doctor",
        description="Says whether this machine can run the zoo, and what to do if not.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device",
        choices=("auto", "npu", "cuda", "cpu"),
        default="auto",
        help="what is to be used; auto is npu on a machine that has cards or torch_npu",
    )
    parser.add_argument("--data_path", default="", help="a data set to check")
    parser.add_argument("--output_dir", default=".", help="where runs are to write")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(argv)
    machine = Machine(options.device, Path(options.output_dir), options.data_path)
    lines = examine(machine)
    print(document(machine, lines) if options.json else page(machine, lines))
    sys.stdout.flush()
    return int(any(line.status == PROBLEM for line in lines))
