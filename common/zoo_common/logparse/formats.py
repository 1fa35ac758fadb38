"""Finds a log's format and reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from zoo_common.errors import UserError
from zoo_common.logparse import own
from zoo_common.logparse.declip import DeclipReader
from zoo_common.logparse.detectron2 import Detectron2JsonReader, Detectron2Reader
from zoo_common.logparse.glip import GlipReader
from zoo_common.logparse.lines import line_blocks
from zoo_common.logparse.openmmlab import MmcvReader, MmengineReader, OpenMmlabJsonReader
from zoo_common.logparse.reader import CocoReader, Reader
from zoo_common.logparse.records import LogStep, LogSummary
from zoo_common.logparse.scan import Scan, summarize
from zoo_common.logparse.twins import DeitJsonReader, TwinsReader

# In order: a file is of the first format that has a training step in it; a file without one, of
# the first that knows another line of it. COCO's table is printed by programs of several formats.
_READERS: tuple[type[Reader], ...] = (
    own.OwnReader,
    GlipReader,
    Detectron2Reader,
    Detectron2JsonReader,
    DeclipReader,
    TwinsReader,
    DeitJsonReader,
    MmengineReader,
    MmcvReader,
    OpenMmlabJsonReader,
    CocoReader,
)
_MARKS = tuple((mark, reader) for reader in _READERS for mark in reader.OTHER_MARKS)
FORMATS: dict[str, type[Reader]] = {reader.NAME: reader for reader in _READERS}

_RANK_LOG = re.compile(r"train_(\d+)\.log(?:\.gz)?")
_TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True, slots=True)
class Log:
    """A log that was read.

    Attributes:
        path: what was asked for, a file or a directory.
        summary: the run as the log tells it.
        source: the file that holds the steps; None where there is none (result.json alone).
    """

    path: Path
    summary: LogSummary
    source: Path | None

    def steps(self) -> Iterator[LogStep]:
        """Yield the steps in the order of the file, each once; reads the file again.

        After a restart in the same file, the steps that were done again come again.
        """
        if self.source is None:
            return
        reader = FORMATS[self.summary.format]()
        for raw in Scan(self.source, reader):
            lr, losses = reader.details(raw)
            yield LogStep(
                step=raw.step,
                epoch=raw.epoch,
                loss=raw.loss,
                losses=losses,
                lr=lr,
                step_time_s=raw.step_time_s,
                images_per_sec=raw.images_per_sec,
            )


def parse(path: str | Path, *, batch: int | None = None) -> Log:
    """Read a log.

    Args:
        path: a log file (gzip as well) or a run's output directory: one of this zoo, or one of
            the original zoo with its train_0.log.
        batch: images a step over all ranks, for logs that give only times (upstream detectron2,
            mmcv, ...). A rate that the log itself states counts more.

    Raises:
        UserError: there is no such file, it is empty, it is in no known format, it is damaged, or
            ``batch`` is not positive.
    """
    path = Path(path)
    if batch is not None and batch < 1:
        raise UserError(f"the batch size must be 1 or more, not {batch}")
    if path.is_dir():
        return _parse_directory(path, batch)
    result = own.read_result(path)
    if result is not None:
        return Log(path, own.with_result(_NOTHING, result), None)
    return Log(path, summarize(path, _find_format(path)(), batch), path)


_NOTHING = LogSummary(
    format=own.NAME,
    status="unfinished",
    steps=None,
    epochs=None,
    images_per_sec=None,
    steps_per_sec=None,
    throughput_from="none: no step is recorded",
    last_loss=None,
    recent_loss=None,
    accuracy={},
)


def _parse_directory(directory: Path, batch: int | None) -> Log:
    metrics, evaluations = directory / own.METRICS_FILE, directory / own.EVALUATIONS_FILE
    result = own.read_result(directory / own.RESULT_FILE)
    if result is None and not metrics.is_file():
        return _parse_rank_logs(directory, batch)
    source = metrics if metrics.is_file() else None
    reader = own.OwnReader()
    if evaluations.is_file():
        for block in line_blocks(evaluations):
            for line in block:
                reader.notice(line)
    summary = summarize(metrics, reader, batch) if source else _NOTHING
    if result is not None:
        return Log(directory, own.with_result(summary, result), source)
    # The last thing that a run writes is its result.
    return Log(directory, own.without_result(summary), source)


def _parse_rank_logs(directory: Path, batch: int | None) -> Log:
    """Read the train_0.log, train_1.log, ... of a run of the original zoo."""
    ranks = {int(m[1]): p for p in directory.iterdir() if (m := _RANK_LOG.fullmatch(p.name))}
    if not ranks:
        raise UserError(
            f"{directory} is no run's directory: it has no {own.RESULT_FILE}, "
            f"{own.METRICS_FILE} or train_0.log"
        )
    source, *others = (ranks[rank] for rank in sorted(ranks))
    summary = parse(source, batch=batch).summary
    # The first rank writes the steps, all others at most their crash.
    if summary.status == "unfinished":
        statuses = (summarize(other, CocoReader(), None).status for other in others)
        crashes = [status for status in statuses if status in ("failed", "interrupted")]
        if crashes:
            status = "failed" if "failed" in crashes else "interrupted"
            summary = replace(summary, status=status)
    return Log(directory, summary, source)


def _find_format(path: Path) -> type[Reader]:
    """Return the reader of the file's format.

    Raises:
        UserError: the file is empty or in no known format.
    """
    readers = [reader() for reader in _READERS]
    other: type[Reader] | None = None
    empty, crash = True, ""
    for block in line_blocks(path):
        for line in block:
            if not line or line.isspace():
                continue
            empty = False
            for reader in readers:
                if reader.step(line) is not None:
                    return type(reader)
            if other is None or other.NAME == CocoReader.NAME:
                other = _by_other_line(line) or other
            if _TRACEBACK in line:
                crash = "; it holds a Python traceback"
    if empty:
        raise UserError(f"{path} is empty: the run wrote nothing to it yet")
    if other is None:
        raise UserError(
            f"{path} is a log of no known format ({', '.join(FORMATS)}){crash}: give the training "
            "log itself, or the output directory of a run of this zoo"
        )
    return other


def _by_other_line(line: str) -> type[Reader] | None:
    for mark, reader in _MARKS:
        if mark in line and reader.OTHER_LINE.search(line):
            return reader
    return None
