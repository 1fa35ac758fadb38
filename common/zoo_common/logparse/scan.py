"""One pass over a log: its steps in order, each once, and the summary made from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from zoo_common.logparse.lines import line_blocks
from zoo_common.logparse.reader import Reader
from zoo_common.logparse.records import LogSummary, Mean, RawStep

WARMUP_STEPS = 20
_RECENT_LOSSES = 20
# Ranks that log to one file train in lockstep, so a late line is at most this many log steps old.
_LATE_LINES = 4
# A rank that lost another one stops at its next collective operation, so a run that logs this many
# more steps after a traceback has survived it.
_STEPS_THAT_SURVIVE = 3


class Scan:
    """Iterates over the steps of a log, in order, each step once.

    Attributes:
        reader: what the log's other lines say is in ``reader.found`` after the iteration.
        restarts: how often the steps went back so far.
        repeated: step lines left out because their step was there already.
        new_run: the latest step that was yielded began a run anew.
    """

    def __init__(self, path: Path, reader: Reader) -> None:
        self.path = path
        self.reader = reader
        self.restarts = 0
        self.repeated = 0
        self.new_run = False

    def __iter__(self) -> Iterator[RawStep]:
        step, notice, found = self.reader.step, self.reader.notice, self.reader.found
        recent: deque[float] = deque([-1.0], maxlen=_LATE_LINES)
        first, last = None, -1.0
        went_back: RawStep | None = None
        for block in line_blocks(self.path):
            for line in block:
                raw = step(line)
                if raw is None:
                    if line:
                        notice(line)
                    continue
                key = raw.key
                if key > last:
                    # One step out of order is no restart but a number that other output cut.
                    self.reader.torn += went_back is not None
                elif key in recent and not found.tracebacks:
                    self.repeated += 1
                    continue
                elif went_back is None or key <= went_back.key:
                    self.repeated += went_back is not None
                    went_back = raw
                    continue
                else:
                    first = self._restart(went_back, first)
                    yield went_back
                    self.new_run = False
                went_back = None
                first = key if first is None else first
                last = key
                recent.append(key)
                if found.tracebacks:
                    self._went_on()
                yield raw
        self.reader.torn += went_back is not None

    def _restart(self, raw: RawStep, first: float | None) -> float:
        """Go back to ``raw`` and return the run's first key; ``first`` was its first so far."""
        assert first is not None
        self.restarts += 1
        self.new_run = raw.key <= first
        self.reader.found.forget_end()
        return raw.key if self.new_run else first

    def _went_on(self) -> None:
        found = self.reader.found
        found.steps_since += 1
        if found.steps_since >= _STEPS_THAT_SURVIVE:
            found.forget_end()


class Tally:
    """Adds up the steps of one run."""

    def __init__(self) -> None:
        self.count = 0
        self.first: RawStep | None = None
        self.last: RawStep | None = None
        self.gap = 0
        self._losses: deque[float] = deque(maxlen=_RECENT_LOSSES)
        self._times = (Mean(), Mean())
        self._rates = (Mean(), Mean())

    def add(self, raw: RawStep) -> None:
        """Take up a step."""
        if self.first is None or self.last is None:
            self.first = raw
        else:
            self.gap = int(raw.key - self.last.key)
        self.last = raw
        self.count += 1
        steady = raw.key - self.first.key >= WARMUP_STEPS
        if raw.loss is not None:
            self._losses.append(raw.loss)
        if raw.step_time_s is not None:
            self._times[steady].add(raw.step_time_s)
        if raw.images_per_sec is not None:
            self._rates[steady].add(raw.images_per_sec)

    @property
    def recent_loss(self) -> float | None:
        return sum(self._losses) / len(self._losses) if self._losses else None

    def step_time(self, reader: Reader) -> tuple[float | None, str]:
        """Return the mean seconds a step and where they come from."""
        if reader.found.step_time_s is not None:
            return reader.found.step_time_s, "the log's own total"
        if reader.TIME_IS_SO_FAR:
            time_s = self.last.step_time_s if self.last else None
            return time_s, f"the last line's {reader.TIME}"
        mean, extent = _steady(self._times)
        return mean, f"mean of the {reader.TIME}, {extent}"

    def rate(self) -> tuple[float | None, str]:
        """Return the mean images per second of the step lines and their extent."""
        return _steady(self._rates)


def _steady(means: tuple[Mean, Mean]) -> tuple[float | None, str]:
    warmup, steady = means
    if steady.count:
        left_out = f", the first {WARMUP_STEPS} steps left out" if warmup.count else ""
        return steady.value, f"{steady.count} lines{left_out}"
    return warmup.value, f"{warmup.count} lines, all from the first {WARMUP_STEPS} steps"


def summarize(path: Path, reader: Reader, batch: int | None) -> LogSummary:
    """Read a log to its end.

    Args:
        path: the log, of the reader's format.
        reader: a fresh reader.
        batch: images a step over all ranks, used where the log has only times.
    """
    scan, tally, found = Scan(path, reader), Tally(), reader.found
    for raw in scan:
        if scan.new_run:
            tally = Tally()
            found.forget_scores()
        tally.add(raw)
    last = tally.last
    if last is not None:
        reader.finish(last, tally.gap)
    images_per_sec, steps_per_sec, source = _throughput(reader, tally, batch)
    return LogSummary(
        format=reader.NAME,
        status=_status(reader),
        steps=last.step if last else None,
        epochs=last.epoch if last else None,
        images_per_sec=images_per_sec,
        steps_per_sec=steps_per_sec,
        throughput_from=source,
        last_loss=last.loss if last else None,
        recent_loss=tally.recent_loss,
        accuracy=found.accuracy,
        restarts=scan.restarts,
        repeated_lines=scan.repeated,
        torn_lines=reader.torn,
    )


def _status(reader: Reader) -> str:
    found = reader.found
    if found.tracebacks:
        return "interrupted" if found.interrupts >= found.tracebacks else "failed"
    if found.ended:
        return "completed"
    return "unfinished" if reader.TELLS_END else "unknown"


def _throughput(
    reader: Reader, tally: Tally, batch: int | None
) -> tuple[float | None, float | None, str]:
    """Return images a second, steps a second, and how they were measured."""
    time_s, time_from = tally.step_time(reader)
    steps_per_sec = 1 / time_s if time_s else None
    rate, extent = tally.rate()
    lines = reader.found.rate
    if lines.value is not None:
        rate, extent = lines.value, f"{lines.count} lines"
    if rate is not None:
        return rate, steps_per_sec, f"mean of the {reader.RATE}, {extent}"
    if steps_per_sec is None:
        return None, None, "none: the log has no times"
    if batch is None:
        return None, steps_per_sec, f"{time_from}; the log has no batch size (--batch gives it)"
    return batch * steps_per_sec, steps_per_sec, f"batch {batch} over {time_from}"
