"""``bash test/make_shards.sh``: the card's tree as WebDataset shards.

Shard k holds the usable ones of rows ``k * samples_per_shard`` and following of the data set, as
``000000123.jpg`` and ``000000123.json`` by the number of the row. Pictures are copied byte for
byte. The same data set gives the same shards, byte for byte, on any number of processes.

A shard is written to another name, read again from the disk with the webdataset library, and
compared with what was put in; then it gets its name, and a record of it is kept in ``.making``
until the index of all is written at the end. A run that was ended at any moment, by a kill too,
is continued by the same command, which keeps the shards that have a record.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset.tariterators import group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from declip import shard_index
from declip.index import open_index
from declip.shard_index import Indexed, Shard
from zoo_common import layouts, shard_names
from zoo_common.errors import TrainingError, UserError
from zoo_common.flaky import read_bytes
from zoo_common.images import DamagedImageError, decode_image
from zoo_common.runs import CALLER_VARIABLE
from zoo_common.yfcc import Parts

_FORMATS = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
}
"""Pillow's names of the pictures that are taken, and the endings that their members get."""

_WORK = ".making"
_LEFT_OUT = "left_out.jsonl"
_JUDGED_FROM = 1000
_NAMES_SHOWN = 5
_MAX_SHARDS = 1_000_000

Report = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


class RowSource(Protocol):
    """A list of pictures' files and their captions, for example ``declip.index.CaptionIndex``."""

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """The path of a picture's file."""

    def item_id(self, index: int) -> str:
        """The picture's name in the data set."""

    def caption(self, index: int) -> str:
        """Its caption."""


@dataclass(frozen=True)
class Summary:
    """What was made.

    Attributes:
        shards: how many there are.
        samples: how many they hold.
        left_out: rows whose picture cannot be used; their names are in ``left_out.jsonl``.
        bytes: size of all shards.
    """

    shards: int
    samples: int
    left_out: int
    bytes: int


class _LeftOut(NamedTuple):
    """A row that is in no shard, and why."""

    item_id: str
    reason: str


class _Done(NamedTuple):
    """A finished shard: what the index will say of it, and what is not in it."""

    indexed: Indexed
    left_out: list[_LeftOut]


@dataclass(frozen=True)
class _Plan:
    """What is made of what; parts of two plans are never mixed."""

    rows: int
    samples_per_shard: int
    decode: bool
    mark: str

    @property
    def shards(self) -> int:
        return -(-self.rows // self.samples_per_shard)

    def rows_of(self, number: int) -> range:
        begin = number * self.samples_per_shard
        return range(begin, min(begin + self.samples_per_shard, self.rows))

    def name(self, number: int) -> str:
        return f"{number:06d}.tar"


def make_shards(
    source: RowSource,
    out: Path,
    *,
    samples_per_shard: int = 10_000,
    workers: int = 1,
    max_left_out: float = 0.01,
    decode: bool = False,
    progress: Report | None = None,
) -> Summary:
    """Writes a data set as shards with their index, or the rest of them.

    Args:
        source: the rows; picklable if there are several workers.
        out: a new or empty directory, or one in which the same was begun.
        samples_per_shard: rows a shard; shards of 0.1 to 1 GB are read well.
        workers: processes.
        max_left_out: share of rows that may be unusable, judged once 1,000 were read.
        decode: also decode every picture to find those damaged inside, ten times as slow.
        progress: told how far it is, at the start and after each shard.

    Raises:
        UserError: an option out of range, a directory with something else in it or that cannot be
            written, a full disk, or too many unusable rows. What is finished is kept.
        TrainingError: the disk gave back something else than was written, or a process died.
    """
    if samples_per_shard < 1 or workers < 1 or not 0 <= max_left_out <= 1 or not len(source):
        raise UserError(
            f"samples_per_shard={samples_per_shard}, workers={workers}, "
            f"max_left_out={max_left_out} and {len(source)} rows make no shards: give at least 1 "
            "of each, and a share from 0 to 1."
        )
    plan = _Plan(len(source), samples_per_shard, decode, _mark(source))
    if plan.shards > _MAX_SHARDS:
        raise UserError(f"{plan.shards:,} shards are too many: give a larger samples_per_shard.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        summary = _finished(out, plan)
        if summary is None:
            with _work_directory(out, plan) as work:
                summary = _make(source, out, work, plan, workers, max_left_out, progress)
            shutil.rmtree(out / _WORK)
    except OSError as error:
        raise _cannot_write(out, error) from error
    return summary


def _mark(source: RowSource) -> str:
    """A fingerprint of a data set, from up to a thousand of its rows."""
    digest = hashlib.sha256()
    for row in range(0, len(source), max(1, len(source) // 1000)):
        digest.update(json.dumps([source.item_id(row), source.caption(row)]).encode())
    return digest.hexdigest()


def _finished(out: Path, plan: _Plan) -> Summary | None:
    """The summary of a directory in which all is done."""
    if not (out / shard_names.INDEX_NAME).is_file():
        return None
    content = shard_names.read_index(out)
    if content.get("plan") != asdict(plan):
        raise UserError(
            f"{out} holds the shards of another data set or of other options: give a new "
            "directory, or the options that they were made with."
        )
    if (out / _WORK).is_dir():  # it was killed on its last step
        shutil.rmtree(out / _WORK)
    shards = shard_index.load_index(out).shards
    return _summary(shards, int(content["left_out"]))


def _summary(shards: Sequence[Shard], left_out: int) -> Summary:
    samples = sum(shard.samples for shard in shards)
    return Summary(len(shards), samples, left_out, sum(shard.bytes for shard in shards))


@contextlib.contextmanager
def _work_directory(out: Path, plan: _Plan) -> Iterator[Path]:
    """The directory of records, for this process alone, cleared of what a killed one left."""
    work = out / _WORK
    plan_file = work / "plan.json"
    if not work.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds something else: give a new or empty directory.")
    work.mkdir(exist_ok=True)
    # A file, since NFS locks what can be written only.
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is making shards in {out}: wait for it, or end it."
            ) from None
        except OSError:
            pass  # a file system without locks
        for partial in [*work.glob(".*.partial"), *out.glob(".*.partial")]:
            partial.unlink(missing_ok=True)
        if plan_file.is_file() and json.loads(plan_file.read_bytes()) != asdict(plan):
            raise UserError(
                f"{out} holds a part of the shards of another data set or of other options: give "
                "a new directory, or the options that it was begun with."
            )
        with shard_index.replacing(plan_file) as stream:
            stream.write(json.dumps(asdict(plan)).encode())
        yield work
    finally:
        os.close(descriptor)


def _make(
    source: RowSource,
    out: Path,
    work: Path,
    plan: _Plan,
    workers: int,
    max_left_out: float,
    progress: Report | None,
) -> Summary:
    """Makes the shards that are missing, and the index of all."""
    done: dict[int, _Done] = {}
    for number in range(plan.shards):
        record = _load_record(out, work, plan.name(number))
        if record is not None:
            done[number] = record
    missing = [number for number in range(plan.shards) if number not in done]
    rows = sum(len(plan.rows_of(number)) for number in done)
    left_out = [row for number in sorted(done) for row in done[number].left_out]
    if progress is not None:
        progress(rows, plan.rows)
    _judge(left_out, rows, plan.rows, max_left_out)
    with contextlib.closing(_made(source, out, work, plan, missing, workers)) as made:
        for number, shard in made:
            done[number] = shard
            rows += len(plan.rows_of(number))
            left_out += shard.left_out
            if progress is not None:
                progress(rows, plan.rows)
            _judge(left_out, rows, plan.rows, max_left_out)
    ordered = [done[number] for number in range(plan.shards)]
    shards = [shard for one in ordered for shard in one.indexed.shards]
    rows_N = np.concatenate([one.indexed.rows_N for one in ordered])
    with shard_index.replacing(out / _LEFT_OUT) as stream:
        for row in (row for one in ordered for row in one.left_out):
            stream.write((json.dumps(row._asdict(), ensure_ascii=False) + "\n").encode())
    shard_index.save_index(out, Indexed(shards, rows_N), plan=asdict(plan), left_out=len(left_out))
    return _summary(shards, len(left_out))


def _judge(left_out: Sequence[_LeftOut], rows: int, all_rows: int, limit: float) -> None:
    """Ends a conversion that leaves out too much."""
    if rows < min(_JUDGED_FROM, all_rows) or len(left_out) <= limit * rows:
        return
    shown = ", ".join(f"{row.item_id} ({row.reason})" for row in left_out[:_NAMES_SHOWN])
    more = ", ..." if len(left_out) > _NAMES_SHOWN else ""
    raise UserError(
        f"{len(left_out)} of {rows} rows have no usable picture: {shown}{more}; restore the "
        "pictures and begin in a new directory, or allow more with --max_left_out (what is "
        "finished is kept)."
    )


# ---------------------------------------------------------------------------- one shard


def _make_shard(source: RowSource, out: Path, work: Path, plan: _Plan, number: int) -> _Done:
    """Writes, checks and names one shard, and its record last."""
    name = plan.name(number)
    left_out: list[_LeftOut] = []
    sums: list[int] = []
    with shard_index.replacing(out / name) as stream:
        # No names or times in the headers: equal data make equal shards. A whole number for the
        # time, since a float needs a header of its own.
        with TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer:
            for row in plan.rows_of(number):
                try:
                    ending, picture = _picture(source.path(row), plan.decode)
                except DamagedImageError as error:
                    left_out.append(_LeftOut(source.item_id(row), str(error)))
                    continue
                facts = {"caption": source.caption(row), "filename": source.item_id(row)}
                text = json.dumps(facts, ensure_ascii=False).encode()
                writer.write({"__key__": f"{row:09d}", ending: picture, "json": text})
                sums.append(_checksum(picture, text))
        stream.flush()
        indexed = _check_written(Path(stream.name), stream, name, sums)
    done = _Done(indexed, left_out)
    _save_record(work, name, done)
    return done


def _picture(path: str, decode: bool) -> tuple[str, bytes]:
    """The ending and the bytes of a picture's file.

    Raises:
        DamagedImageError: it cannot be read or is no picture.
    """
    try:
        data = read_bytes(path, shard_index.MAX_PICTURE_BYTES + 1)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise DamagedImageError(error.strerror or "it cannot be read") from None
    if len(data) > shard_index.MAX_PICTURE_BYTES:
        raise DamagedImageError(f"it has over {shard_index.MAX_PICTURE_BYTES >> 20} MB")
    if decode:
        decode_image(data)
    try:
        # Of the listed formats only: others of Pillow's start programs.
        with Image.open(io.BytesIO(data), formats=list(_FORMATS)) as image:
            # A JPEG with several pictures calls itself MPO; its first is what everyone shows.
            return _FORMATS.get(image.format or "", "jpg"), data
    except Exception as error:  # a broken header raises anything
        reason = "no picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DamagedImageError(" ".join(reason.split()) or type(error).__name__) from None


def _checksum(picture: bytes, text: bytes) -> int:
    return zlib.crc32(text, zlib.crc32(picture))


def _check_written(path: Path, stream: BinaryIO, name: str, sums: Sequence[int]) -> Indexed:
    """Reads a shard again as a user of the webdataset library does, and indexes it.

    Raises:
        TrainingError: it is not what was written.
    """
    os.fsync(stream.fileno())
    if hasattr(os, "posix_fadvise"):  # from the disk, not from memory
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read: list[int] = []
    with path.open("rb") as reader:
        hashed = _Hashed(reader)
        members = ({**member, "__url__": name} for member in tar_file_iterator(hashed))
        for found in group_by_keys(members):
            text = found.pop("json", b"")
            pictures = [value for key, value in found.items() if not key.startswith("__")]
            read.append(_checksum(b"".join(pictures), text))
        sha256 = hashed.sha256()
    shard, rows_N = (part := shard_index.scan(path)).shards[0], part.rows_N
    if read != list(sums) or len(rows_N) != len(sums) or shard.damage or shard.passed_over:
        raise TrainingError(
            f"{path.parent / name} was not on the disk as it was written: check the disk of "
            f"{path.parent}, and give the same command again."
        )
    return Indexed([Shard(name, shard.samples, shard.bytes, sha256)], rows_N)


class _Hashed(io.RawIOBase):
    """A stream that is hashed as it is read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data

    def sha256(self) -> str:
        """The checksum of the whole stream, what nobody has read yet included."""
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()


def _save_record(work: Path, name: str, done: _Done) -> None:
    shard = asdict(done.indexed.shards[0])
    facts = {"shard": shard, "left_out": [list(row) for row in done.left_out]}
    with shard_index.replacing(work / f"{name}.npz") as stream:
        encoded = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        np.savez(stream, rows=done.indexed.rows_N, facts=encoded)


def _load_record(out: Path, work: Path, name: str) -> _Done | None:
    """What is known of a finished shard; None if it is to be made."""
    record, path = work / f"{name}.npz", out / name
    if not record.is_file() or not path.is_file():
        return None
    try:
        with np.load(record, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            indexed = Indexed([Shard(**facts["shard"])], arrays["rows"])
    except OSError:
        raise
    except Exception:  # numpy follows a damaged file until anything fails
        return None
    if path.stat().st_size != indexed.shards[0].bytes:
        return None
    return _Done(indexed, [_LeftOut(*row) for row in facts["left_out"]])


# ---------------------------------------------------------------------------- processes


def _made(
    source: RowSource, out: Path, work: Path, plan: _Plan, numbers: list[int], workers: int
) -> Generator[tuple[int, _Done], None, None]:
    """Makes shards in so many processes; gives them in any order."""
    workers = min(workers, len(numbers))
    if workers <= 1:
        for number in numbers:
            yield number, _make_shard(source, out, work, plan, number)
        return
    # No pool: its idle workers outlive a parent that was killed. "spawn", because forking a
    # process that has threads can hang.
    context = get_context("spawn")
    processes = []
    readers: list[Connection] = []
    left = len(numbers)
    try:
        for share in range(workers):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_make_share,
                args=(source, out, work, plan, numbers[share::workers], writer, os.getpid()),
            )
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        while left:
            ready = wait(readers)
            for reader in [reader for reader in readers if reader in ready]:
                try:
                    report = reader.recv()
                except EOFError:
                    readers.remove(reader)
                    continue
                if isinstance(report, Exception):
                    raise report
                left -= 1
                yield report
            if left and not readers:
                raise TrainingError(
                    f"A process that made shards in {out} was killed, maybe for want of memory: "
                    "give the same command again, with fewer --workers."
                )
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for reader in readers:
            reader.close()


def _make_share(
    source: RowSource,
    out: Path,
    work: Path,
    plan: _Plan,
    numbers: Sequence[int],
    reports: Connection,
    parent: int,
) -> None:
    """Makes shards until they are made, one fails, or nobody is there to hear of it."""
    # Ctrl-C goes to all processes of a terminal; the parent ends its workers by SIGTERM, on
    # which an unfinished shard is removed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    watched = _Watched(source, parent)
    with contextlib.suppress(BrokenPipeError):
        try:
            for number in numbers:
                reports.send((number, _make_shard(watched, out, work, plan, number)))
        except Exception as error:
            reports.send(error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself


class _Watched:
    """Rows for a worker, which ends when its parent has died."""

    def __init__(self, source: RowSource, parent: int) -> None:
        self._source = source
        self._parent = parent
        self.item_id = source.item_id
        self.caption = source.caption

    def __len__(self) -> int:
        return len(self._source)

    def path(self, index: int) -> str:
        if os.getppid() != self._parent:
            sys.exit(1)
        return self._source.path(index)


def _cannot_write(out: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk of {out} is full: free some space and give the same command again; the "
            "finished shards are kept."
        )
    return UserError(
        f"{error.filename or out} cannot be read or written ({error.strerror or error}): check "
        "the directory's permissions and its disk."
    )


# ---------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the command line without the program's name; ``sys.argv`` if None.

    Returns:
        The exit code: 0; 2 for what the user can mend, 1 for a failing disk or a killed process.
    """
    options = _parser().parse_args(argv)
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        caller = Path(os.environ.get(CALLER_VARIABLE, "."))  # test/make_shards.sh changes directory
        out = caller / options.out.expanduser()
        data_path = options.data_path
        if data_path not in layouts.MADE:
            data_path = str(caller / Path(data_path).expanduser())
        index = open_index(layouts.resolve("yfcc", data_path, yfcc_parts=Parts(val=False)))
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("rows", total=len(index))
            summary = make_shards(
                index,
                out,
                samples_per_shard=options.samples_per_shard,
                workers=options.workers,
                max_left_out=options.max_left_out,
                decode=options.decode,
                progress=lambda done, total: bar.update(task, completed=done),
            )
    except (UserError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    pattern = out / f"{{000000..{summary.shards - 1:06d}}}.tar"
    print(
        f"{summary.samples} samples in {summary.shards} shards, {summary.bytes / 1e9:.2f} GB; "
        f"{summary.left_out} rows left out ({out / _LEFT_OUT})\n"
        f"--data_path='{pattern}'"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash test/make_shards.sh",
        description="Writes the card's tree as WebDataset shards; goes on where it was ended.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data_path", required=True, metavar="DIR", help="the card's tree, or sample"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new or empty, or begun before"
    )
    parser.add_argument(
        "--samples_per_shard",
        type=int,
        default=10_000,
        metavar="N",
        help="rows a shard; 0.1 to 1 GB are read well (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one a core, %(default)s here)",
    )
    parser.add_argument(
        "--max_left_out",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of rows without a usable picture that ends it (default: %(default)s)",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode each picture too, and leave out those damaged inside; slower",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
