"""Times contestants in alternation, so that a busy neighbour slows all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

# A contestant does one piece of work and returns the seconds of its phases, by phase.
Contestant = Callable[[], Mapping[str, float]]
Seconds = dict[str, dict[str, list[float]]]


def alternate(contestants: Mapping[str, Contestant], *, rounds: int, warmup: int = 2) -> Seconds:
    """Seconds by contestant and phase: one entry a round, in which each runs once.

    The order turns around from round to round, and ``warmup`` rounds before are not recorded.
    """
    seconds: Seconds = {name: {} for name in contestants}
    for round_ in range(warmup + rounds):
        order = list(contestants)[:: 1 if round_ % 2 else -1]
        for name in order:
            phases = contestants[name]()
            if round_ >= warmup:
                for phase, duration in phases.items():
                    seconds[name].setdefault(phase, []).append(duration)
    return seconds


def print_table(seconds: Seconds, *, ours: str, theirs: str) -> None:
    """Prints, for each phase, both medians and how ours relates to theirs.

    ``ratio`` is the median over the rounds of ours / theirs, which stands a load that comes and
    goes; ``fastest`` is the ratio of the fastest rounds. On a quiet machine the two agree.
    """
    print(f"{'phase':<20} {ours + ' ms':>12} {theirs + ' ms':>12}  ratio  fastest")
    for phase in seconds[ours]:
        a, b = seconds[ours][phase], seconds[theirs][phase]
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        print(
            f"{phase:<20} {statistics.median(a) * 1e3:12.1f} {statistics.median(b) * 1e3:12.1f}  "
            f"{ratio:5.3f}  {min(a) / min(b):7.3f}"
        )
