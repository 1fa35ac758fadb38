"""Which data set is wanted, where it goes, and who draws it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from zoo_common.errors import UserError
from zoo_common.sample import coco, grounding, imagenet, yfcc
from zoo_common.sample.directory import default_root, make_directory
from zoo_common.sample.layout import Layout, Picture
from zoo_common.sample.scenes import SPLITS, VERSION

LAYOUTS: dict[str, Layout] = {
    "imagenet": imagenet.LAYOUT,
    "coco": coco.LAYOUT,
    "grounding": grounding.LAYOUT,
    "yfcc": yfcc.LAYOUT,
}
"""The layouts by name."""

Progress = Callable[[int, int], None]

_MIN_SIDE, _MAX_SIDE = 32, 4096
# A worker reports after this many pictures: often enough for a progress bar and to notice within
# a moment that its parent is gone.
_REPORT_EVERY = 8


@dataclass(frozen=True)
class _Wanted:
    """A data set that can be drawn: the options have been checked."""

    layout: str
    counts: tuple[int, ...]
    width: int
    height: int
    seed: int

    @property
    def pictures(self) -> list[Picture]:
        return [
            Picture(self.seed, split, index, self.width, self.height)
            for split, count in zip(SPLITS, self.counts, strict=True)
            for index in range(count)
        ]

    @property
    def name(self) -> str:
        counts = "-".join(f"{s}{n}" for s, n in zip(SPLITS, self.counts, strict=True))
        size = f"{self.width}x{self.height}"
        return f"sample-{self.layout}-v{VERSION}-seed{self.seed}-{size}-{counts}"

    @property
    def folders(self) -> dict[str, int]:
        """The number of files in each folder."""
        counts = dict(zip(SPLITS, self.counts, strict=True))
        return LAYOUTS[self.layout].count_files(self.seed, counts)

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "data_set": "zoo_common.sample",
            "version": VERSION,
            "layout": self.layout,
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "files": self.folders | dict.fromkeys(LAYOUTS[self.layout].files, 1),
        }


def make(
    root: Path | None = None,
    *,
    layout: str = "imagenet",
    train: int | None = None,
    val: int | None = None,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Draws the sample data set into a directory named after it, or finds it there.

    Args:
        root: where that directory is made; ``default_root()`` if None.
        layout: one of ``LAYOUTS``. ``imagenet``: ``train/<class>/<class>_<number>.jpg`` and
            ``val/...``, the class being the shape of the picture's main object. ``coco``:
            ``train2017/*.jpg``, ``val2017/*.jpg`` and
            ``annotations/{instances,captions}_{train,val}2017.json``. ``grounding``: the same with
            ``annotations/grounding_{train,val}2017.json`` and a small BERT's words and settings
            in ``bert-sample``. ``yfcc``: the pictures of ``imagenet`` with captions, as the
            DeCLIP card lays out YFCC15M and ImageNet's validation pictures.
        train: pictures to train on; the layout's default if None, here and below.
        val: pictures held out.
        size: of a picture in pixels: the side of a square, or (width, height), which some
            pictures of ``coco`` and ``grounding`` have the other way round.
        seed: another seed gives other pictures.
        workers: processes that draw. With more than one, the caller's main module must be
            importable without side effects, as for every use of ``multiprocessing``.
        progress: called with the pictures done so far and the total.

    Returns:
        The absolute path of the data set's directory.

    Raises:
        UserError: if an option is out of range, or the directory holds something else or cannot
            be written.
    """
    wanted = _check(layout, train, val, size, seed, workers)
    return _make(wanted, (root or default_root()) / wanted.name, workers, progress)


def make_at(
    directory: Path,
    *,
    layout: str = "imagenet",
    train: int | None = None,
    val: int | None = None,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Draws the sample data set into the given directory itself, which must be new or empty.

    Everything else is as in ``make()``.
    """
    wanted = _check(layout, train, val, size, seed, workers)
    return _make(wanted, directory, workers, progress)


def _check(
    layout: str,
    train: int | None,
    val: int | None,
    size: int | tuple[int, int] | None,
    seed: int,
    workers: int,
) -> _Wanted:
    if layout not in LAYOUTS:
        raise UserError(
            f"the sample data set has no layout {layout!r}; choose one of {', '.join(LAYOUTS)}"
        )
    chosen = LAYOUTS[layout]
    train = chosen.train if train is None else train
    val = chosen.val if val is None else val
    for name, count in (("train", train), ("val", val)):
        if count < chosen.least:
            raise UserError(
                f"{name}={count} leaves the sample data set without {chosen.lacking}; ask for at "
                f"least {chosen.least}"
            )
    size = chosen.size if size is None else size
    width, height = (size, size) if isinstance(size, int) else size
    for side in (width, height):
        if not _MIN_SIDE <= side <= _MAX_SIDE:
            raise UserError(
                f"pictures of the sample data set cannot be {width} x {height} pixels; choose "
                f"sides from {_MIN_SIDE} to {_MAX_SIDE}"
            )
    if seed < 0:
        raise UserError(f"seed={seed} of the sample data set is negative; choose one from 0 up")
    if workers < 1:
        raise UserError(f"workers={workers} leaves nobody to draw; choose at least 1")
    return _Wanted(layout, (train, val), width, height, seed)


def _make(wanted: _Wanted, directory: Path, workers: int, progress: Progress | None) -> Path:
    layout = LAYOUTS[wanted.layout]

    def fill(building: Path) -> None:
        for folder in wanted.folders:
            (building / folder).mkdir(parents=True)
        drawn = _drawn(building, wanted) if workers == 1 else _drawn_by(workers, building, wanted)
        pictures = wanted.pictures
        notes: list[Any] = [None] * len(pictures)
        # Closed, so that the workers have ended before their directory is cleared away.
        with closing(drawn):
            for done, (place, note) in enumerate(drawn, start=1):
                notes[place] = note
                if progress is not None:
                    progress(done, len(pictures))
        train = wanted.counts[0]
        layout.finish(building, dict(zip(SPLITS, (notes[:train], notes[train:]), strict=True)))

    return make_directory(directory, wanted.manifest, fill)


def _drawn(
    building: Path, wanted: _Wanted, share: int = 0, shares: int = 1
) -> Generator[tuple[int, Any], None, None]:
    """Draws every ``shares``-th picture; gives their places and the layout's notes."""
    write_picture = LAYOUTS[wanted.layout].write_picture
    for place, picture in list(enumerate(wanted.pictures))[share::shares]:
        yield place, write_picture(building, picture)


def _drawn_by(
    workers: int, building: Path, wanted: _Wanted
) -> Generator[tuple[int, Any], None, None]:
    """Has all pictures drawn by so many processes; gives what ``_drawn`` gives, in any order."""
    # No pool: its idle workers outlive a parent that was killed. These draw a fixed share each.
    # "spawn" because forking a process that has threads, as one with torch does, can hang.
    context = get_context("spawn")
    processes = []
    readers: list[Connection] = []
    done, total = 0, sum(wanted.counts)
    try:
        for share in range(workers):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_draw_share, args=(building, wanted, share, workers, writer), daemon=True
            )
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        while done < total:
            ready = wait(readers)
            for reader in [reader for reader in readers if reader in ready]:
                try:
                    report = reader.recv()
                except EOFError:
                    readers.remove(reader)
                    if not readers and done < total:
                        raise UserError(
                            "a process that drew the sample data set was killed, maybe for want "
                            "of memory; start again with fewer workers"
                        ) from None
                    continue
                if isinstance(report, OSError):
                    raise report
                done += len(report)
                yield from report
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for reader in readers:
            reader.close()


def _draw_share(
    building: Path, wanted: _Wanted, share: int, shares: int, reports: Connection
) -> None:
    """Sends what ``_drawn`` gives for its share in lists, or what went wrong."""
    # Ctrl-C goes to all processes of a terminal; the parent sees to its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    unreported = []
    with suppress(BrokenPipeError):  # The parent is gone: nobody wants the rest.
        try:
            for drawn in _drawn(building, wanted, share, shares):
                unreported.append(drawn)
                if len(unreported) == _REPORT_EVERY:
                    reports.send(unreported)
                    unreported = []
        except BrokenPipeError:
            raise
        except OSError as error:
            reports.send(error)
        else:
            reports.send(unreported)
