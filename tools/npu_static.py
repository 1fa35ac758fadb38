"""Counts host syncs and new operator shapes of steps on the simulated NPU.

It knows what ``static_recorder.py`` can only infer: the simulator sees every copy between the host
and the device, and every place where the host waits, within torch's own C++ too. To be run where
``npu_simulator.is_here()``.

A copy from the device to the host is a sync. Copies to the device are counted with their bytes,
and are no offence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import npu_sim
from static_recorder import NEW_PAIR, SYNC, Offender, Report, innermost


def count(step: Callable[[int], object], *, steps: int, warmup: int) -> Report:
    """Runs ``step(0)``, ``step(1)``, ... and counts.

    Args:
        step: runs one step on the device.
        steps: how many.
        warmup: steps whose new pairs are no offence.
    """
    tally = _Tally(warmup)
    with torch.autograd.set_multithreading_enabled(False):  # stacks are those of the caller
        for index in range(steps):
            with npu_sim.record(stacks=True) as recording:
                step(index)
            tally.add(recording)
    return tally.report()


class _Tally:
    """Adds up the recordings of steps."""

    def __init__(self, warmup: int) -> None:
        self._report = Report([], [], [], warmup, [])
        self._pairs: set[tuple[Any, ...]] = set()
        self._found: dict[tuple[Any, ...], Offender] = {}

    def add(self, recording: Any) -> None:
        """Counts a step."""
        report = self._report
        for sync in recording.syncs:
            self._blame(SYNC, f"{sync.kind} in {sync.operator or 'the program'}", sync.stack, "")
        new = 0
        for operator in recording.operators:
            pair = (operator.name, operator.inputs, operator.outputs)
            if pair in self._pairs:
                continue
            self._pairs.add(pair)
            new += 1
            if len(report.operators) >= report.warmup:
                shapes = " ".join(f"{dtype}{list(shape)}" for dtype, shape in operator.inputs)
                self._blame(NEW_PAIR, operator.name, operator.stack, shapes)
        uploads = [copy for copy in recording.copies if copy.kind == "host_to_device"]
        report.operators.append(len(recording.operators))
        report.syncs.append(len(recording.syncs))
        report.new_pairs.append(new)
        report.uploads.append(len(uploads))
        report.uploaded_bytes.append(sum(_bytes(copy) for copy in uploads))

    def report(self) -> Report:
        """The steps so far."""
        found = sorted(self._found.values(), key=lambda offender: (offender.kind, -offender.times))
        self._report.offenders[:] = found
        return self._report

    def _blame(self, kind: str, what: str, stack: Any, example: str) -> None:
        frames = innermost(stack)
        offender = self._found.setdefault(
            (kind, what, frames), Offender(kind, what, frames, example)
        )
        offender.times += 1
        offender.steps.add(len(self._report.operators))


def _bytes(copy: Any) -> int:
    dtype: torch.dtype = getattr(torch, copy.dtype)
    return int(dtype.itemsize * math.prod(copy.shape))
