"""Turns YFCC15M's list of captions, JSON lines, into an Arrow file that all processes map.

The list (15 million lines, 3.3 GB) is read once, in parts of some 300,000 lines. Each part is
written and kept when it is done, so a build that was killed goes on behind the last one. At the
end the parts become one file, which is there as a whole or not at all. Memory is that of a part.

Upstream reads all lines into a list, or keeps a list of their offsets (``fseek``), in each process:
prototype/data/datasets/clip_dataset.py of Sense-GVT/DeCLIP. As there, rows with an empty or a
Chinese caption are not used; here they and rows that cannot be read are left out, counted and
named.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
from rich.progress import Progress

from zoo_common.beats import beat
from zoo_common.cache_files import ENDING, Stamp, temporary_name
from zoo_common.errors import UserError
from zoo_common.flaky import retried
from zoo_common.yfcc import TRAIN_IMAGES

VERSION = "1"
"""Of the rules here; an index of another version is built anew."""

PART_BYTES = 1 << 26
"""How much of the list a part has: what a killed build loses, and what stands in memory."""

FACTS_KEY = b"declip.index"
"""Where the facts of an index stand in the metadata of its schema, as JSON."""

_LONGEST_LINE = 1 << 20
_EXCERPT = 80  # characters of a line that is left out
# A list of which more is unusable than this, and than the user allows, is no list of captions:
# it is refused after a part.
_HOPELESS = 0.5
_LINES_BEFORE_JUDGING = 1000
_SETTLING_S = 2.2  # no file system's clock ticks slower
_QUIET_S, _EVERY_S = 5.0, 10.0  # no progress is told of a short build, then a line so often

_CHINESE = re.compile("[\u4e00-\u9fa5]")
_INSIDE = TRAIN_IMAGES + "/"

Show = Callable[[int, int], None]
"""Is called with the bytes read and the size of the list."""


class RowError(ValueError):
    """A row that cannot be used; the message is the reason, the same for all of its kind."""


class Facts(NamedTuple):
    """What is known of an index, or of a part of one.

    Attributes:
        version: ``VERSION``.
        stamp: size and times of the list.
        begin: where its lines begin in the list, in bytes.
        end: where they end.
        lines: lines read, all before ``begin`` too; empty ones count.
        rows: rows that can be used.
        left_out: rows that cannot, by reason.
        mark: a name of this build, by which two of the same list can be told apart.
    """

    version: str
    stamp: tuple[int, ...]
    begin: int
    end: int
    lines: int
    rows: int
    left_out: dict[str, int]
    mark: str

    @property
    def share_left_out(self) -> float:
        """The share of rows that cannot be used; few rows count as more, to be judged fairly."""
        bad = sum(self.left_out.values())
        return bad / max(self.rows + bad, _LINES_BEFORE_JUDGING)


class _Part(NamedTuple):
    """A part in memory: its rows, and line, reason and beginning of those left out."""

    facts: Facts
    filenames: list[str]
    captions: list[str]
    named: list[tuple[int, str, str]]


def clean_caption(value: object) -> str:
    """The caption that is used, without space around it.

    Args:
        value: a string, or a list of which the first counts, as in upstream.

    Raises:
        RowError: it is empty, Chinese, or no text.
    """
    if isinstance(value, list):
        value = value[0] if value else ""
    if value is None:
        raise RowError("no caption")
    if not isinstance(value, str):
        raise RowError("caption that is no text")
    caption = value.strip()
    if not caption:
        raise RowError("empty caption")
    if not caption.isascii():
        if _CHINESE.search(caption):
            raise RowError("Chinese caption")
        _check_text(caption)
    return caption


def clean_filename(value: object) -> str:
    """A picture's name below the directory of the pictures.

    A name that begins with that directory's own, ``yfcc15m_clean_open_data/``, is taken to begin
    one level higher: nothing else is tried.

    Raises:
        RowError: it is none, or leads out of the directory.
    """
    if not isinstance(value, str) or not value:
        raise RowError("no filename")
    name = value.removeprefix(_INSIDE)
    if not name or name[0] == "/" or "\0" in name or (".." in name and ".." in name.split("/")):
        raise RowError("filename outside the data directory")
    if not name.isascii():
        _check_text(name)
    return name


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise RowError("broken characters") from None


def read_row(line: str) -> tuple[str, str]:
    """Filename and caption of a line; other keys are not looked at.

    Raises:
        RowError: it cannot be used.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise RowError("not JSON") from None
    if not isinstance(row, dict):
        raise RowError("not a JSON object")
    return clean_filename(row.get("filename")), clean_caption(row.get("caption"))


def build(source: Path, place: Path, stamp: Stamp, *, mark: str, resumable: bool) -> Facts:
    """Builds the index of a list; goes on where a killed build of the same list stopped.

    Args:
        source: the list.
        place: where the index goes; the list of rows that were left out goes beside it.
        stamp: size and times of the list, settled.
        mark: of this build.
        resumable: the parts have this process alone; else they are its own and never found again.

    Raises:
        UserError: the list cannot be read, changes meanwhile, or is no list of captions.
        OSError: the index cannot be written.
    """
    parts = place.with_name(f".{place.name}.parts{'' if resumable else '-' + mark}")
    try:
        parts.mkdir(exist_ok=True)
        with _readable(source):
            stream = retried(lambda: source.open("rb", buffering=1 << 20), source)
        with stream, _showing(source) as show:
            done = _resume(parts, stamp)
            show(done[-1].end if done else 0, stamp.size)
            while not done or done[-1].end < stamp.size:
                beat(f"indexing {source.name}")
                before = done[-1] if done else None
                with _readable(source):
                    part = retried(partial(_read_part, stream, before, stamp, mark), source)
                if part.facts.end == part.facts.begin:
                    break  # the list has become shorter, or is empty
                _write_part(_part_file(parts, len(done)), part)
                done.append(part.facts)
                _refuse_hopeless(source, done, part)
                show(part.facts.end, stamp.size)
            unchanged = Stamp.of(os.fstat(stream.fileno())) == stamp
        if not unchanged or done[-1].end != stamp.size:
            raise UserError(f"{source} changes while it is indexed; start again when it is whole.")
        facts = _join(parts, done, place, mark)
    except (UserError, OSError):
        shutil.rmtree(parts, ignore_errors=True)
        raise
    shutil.rmtree(parts, ignore_errors=True)
    return facts


def facts_of(schema: pa.Schema) -> Facts:
    """The facts in the metadata of an index.

    Raises:
        ValueError: there are none, or another version's.
    """
    text = (schema.metadata or {}).get(FACTS_KEY)
    values = json.loads(text) if text else {}
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise ValueError("no index of this version")
    try:
        return Facts(**values | {"stamp": tuple(values["stamp"])})
    except (TypeError, KeyError) as error:
        raise ValueError("not the facts of an index") from error


def left_out_file(place: Path) -> Path:
    """The list of rows that were left out, beside the index."""
    return place.with_name(place.name.removesuffix(ENDING) + ".left-out.txt")


def _read_part(stream: BinaryIO, before: Facts | None, stamp: Stamp, mark: str) -> _Part:
    """Reads lines from where the part before ended."""
    begin, line_number = (before.end, before.lines) if before else (0, 0)
    stream.seek(begin)
    end = begin
    filenames: list[str] = []
    captions: list[str] = []
    named: list[tuple[int, str, str]] = []
    while end - begin < PART_BYTES:
        raw = stream.readline(_LONGEST_LINE)
        if not raw:
            break
        line_number += 1
        end += len(raw)
        try:
            if raw[-1:] != b"\n" and len(raw) == _LONGEST_LINE:
                end += _skip_line(stream)
                raise RowError("line longer than 1 MiB")
            filename, caption = read_row(_decoded(raw, line_number))
        except RowError as error:
            if raw.strip():
                excerpt = raw[: 4 * _EXCERPT].decode(errors="replace")[:_EXCERPT]
                named.append((line_number, str(error), excerpt.rstrip()))
            continue
        filenames.append(filename)
        captions.append(caption)
    counts = Counter(reason for _, reason, _ in named)
    facts = Facts(VERSION, stamp, begin, end, line_number, len(filenames), dict(counts), mark)
    return _Part(facts, filenames, captions, named)


def _decoded(raw: bytes, line_number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line_number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise RowError("not UTF-8") from None


def _skip_line(stream: BinaryIO) -> int:
    """Reads to the end of the line; gives the number of bytes."""
    skipped = 0
    while raw := stream.readline(_LONGEST_LINE):
        skipped += len(raw)
        if raw[-1:] == b"\n":
            break
    return skipped


def _refuse_hopeless(source: Path, done: list[Facts], part: _Part) -> None:
    total = _total(done, "")
    if total.share_left_out > _HOPELESS:
        line, reason, excerpt = part.named[0]
        raise UserError(
            f"{source} is no list of captions: {sum(total.left_out.values())} of its first "
            f"{total.lines} lines cannot be used, such as line {line} ({reason}): {excerpt!r}; "
            'give one with a line {"filename": ..., "caption": ...} for each picture.'
        )


def _total(done: list[Facts], mark: str) -> Facts:
    counts: Counter[str] = Counter()
    for facts in done:
        counts.update(facts.left_out)
    rows = sum(facts.rows for facts in done)
    return done[-1]._replace(begin=0, rows=rows, left_out=dict(counts), mark=mark)


# ------------------------------------------------------------------ parts


def _part_file(parts: Path, number: int) -> Path:
    return parts / f"{number:05d}.arrow"


def _named_file(part: Path) -> Path:
    return part.with_suffix(".left-out.txt")


def _write_part(file: Path, part: _Part) -> None:
    """Writes a part; its file is there as a whole or not at all."""
    named = "".join(f"line {line}: {reason}: {text}\n" for line, reason, text in part.named)
    _named_file(file).write_text(named, encoding="utf-8", errors="replace")
    arrays = [pa.array(column, pa.string()) for column in (part.filenames, part.captions)]
    schema = _schema(part.facts)
    with _replacing(file) as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _resume(parts: Path, stamp: Stamp) -> list[Facts]:
    """The parts that a killed build left."""
    done: list[Facts] = []
    kept: set[Path] = set()
    while (file := _part_file(parts, len(done))).exists():
        try:
            with pa.memory_map(str(file)) as mapped:
                facts = facts_of(pa.ipc.open_file(mapped).schema)
        except (OSError, ValueError, pa.ArrowInvalid):
            break
        if facts.stamp != stamp or facts.begin != (done[-1].end if done else 0):
            break
        done.append(facts)
        kept |= {file, _named_file(file)}
    for left in set(parts.iterdir()) - kept:
        left.unlink()
    return done


def _join(parts: Path, done: list[Facts], place: Path, mark: str) -> Facts:
    """Makes one file of all parts, and one list of what was left out."""
    total = _total(done, mark)
    files = [_part_file(parts, number) for number in range(len(done))]
    names = left_out_file(place)
    if total.left_out:
        with _replacing(names) as sink:
            for file in files:
                sink.write(_named_file(file).read_bytes())
    else:
        names.unlink(missing_ok=True)
    schema = _schema(total)
    with _replacing(place) as sink, pa.ipc.new_file(sink, schema) as writer:
        for file in files:
            with pa.memory_map(str(file)) as mapped:
                batch = pa.ipc.open_file(mapped).get_batch(0)
                if batch.num_rows:
                    writer.write_batch(batch)
                del batch
    return total


def _schema(facts: Facts) -> pa.Schema:
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("filename", "caption")]
    return pa.schema(fields, metadata={FACTS_KEY: json.dumps(facts._asdict())})


@contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """Writes a file under another name and gives it its own when it is whole and on the disk."""
    temporary = temporary_name(file)
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{source} cannot be read ({error.strerror or error}); give a list that can."
        ) from error


@contextmanager
def _showing(source: Path) -> Iterator[Show]:
    """A bar on a terminal; elsewhere a line now and then, if it takes long."""
    begin = told = time.monotonic()
    words = f"indexing {source.name}"
    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(words, total=None)
        first: int | None = None

        def show(done: int, total: int) -> None:
            nonlocal first, told
            bar.update(task, completed=done, total=total)
            now = time.monotonic()
            if first is None:
                first = done
            if not bar.disable or now - begin < _QUIET_S or now - told < _EVERY_S:
                return
            told = now
            left_s = (now - begin) / max(1, done - first) * (total - done)
            print(f"{words}: {100 * done / total:.0f} %, {left_s:.0f} s left", flush=True)

        yield show


def read_stamp(source: Path) -> Stamp:
    """Size and times of a list.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    with _readable(source):
        stamp = Stamp.of(retried(source.stat, source))
    if not stamp.size:
        raise UserError(f"{source} is empty; give a list of captions.")
    return stamp


def wait_until_settled(source: Path) -> Stamp:
    """Size and times of a list, once a later change is certain to show in them.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    deadline = time.monotonic() + _SETTLING_S
    while True:
        stamp = read_stamp(source)
        # A time in the future is never settled; a change would replace it by the present one.
        if stamp.is_settled(time.time_ns()) or time.monotonic() > deadline:
            return stamp
        time.sleep(0.02)
