"""Which steps of a run are profiled."""

from __future__ import annotations

import enum

from npu_sim import recorded
from npu_sim.npu import _errors

from ._config import warn

ProfilerAction = recorded.enumeration("torch_npu.profiler.ProfilerAction", enum.Enum)


class Schedule:
    """Skips, then repeats: waits, warms up, records.

    Mind the order of the arguments: torch's has the warm-up second.

    Args:
        wait: steps of a cycle that are not profiled.
        active: steps of a cycle that are recorded.
        warmup: steps between, which run the profiler and throw its results away.
        repeat: cycles; 0 is until the end.
        skip_first: steps before the first cycle.
        skip_first_wait: not 0: the first cycle does not wait.
    """

    def __init__(
        self,
        wait: int,
        active: int,
        warmup: int = 0,
        repeat: int = 0,
        skip_first: int = 0,
        skip_first_wait: int = 0,
    ) -> None:
        self.wait = _at_least("wait", wait, 0)
        self.active = _at_least("active", active, 1)
        self.warmup = _at_least("warmup", warmup, 0)
        self.repeat = _at_least("repeat", repeat, 0)
        self.skip_first = _at_least("skip_first", skip_first, 0)
        self.skip_first_wait = skip_first_wait
        if self.warmup == 0:
            warn("Profiler won't be using warmup, this can skew profiler results")

    def __call__(self, step: int) -> enum.Enum:
        """What the profiler does in a step, counted from 0."""
        if step < 0:
            raise ValueError(
                "Invalid parameter step, which must be not less than 0."
                + _errors.prof_error(_errors.ErrCode.VALUE)
            )
        if step < self.skip_first:
            return _action("NONE")
        step -= self.skip_first
        if self.skip_first_wait:
            step += self.wait
        length = self.wait + self.warmup + self.active
        cycle, place = divmod(step, length)
        if (self.repeat and cycle >= self.repeat) or place < self.wait:
            return _action("NONE")
        if place < self.wait + self.warmup:
            return _action("WARMUP")
        return _action("RECORD_AND_SAVE" if place == length - 1 else "RECORD")


def _action(name: str) -> enum.Enum:
    action: enum.Enum = ProfilerAction[name]
    return action


def always(step: int) -> enum.Enum:
    """Records every step."""
    return _action("RECORD")


def _at_least(name: str, value: int, least: int) -> int:
    if isinstance(value, int) and value >= least:
        return value
    warn(f"Invalid parameter {name}, reset it to {least}.")
    return least
