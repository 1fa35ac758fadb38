"""Training from WebDataset shards: ``--data_path='shards/{000000..001499}.tar'``.

Each shard's samples lie one after the other in a tar file, so that a network disk sees few large
files and long reads. ``declip.shard_index`` says where each sample lies; ``declip.make_shards``
makes shards and that index from the card's tree.

The order of an epoch is a function of (seed, epoch), the batch size and the number of ranks:

1. The shards are laid in a random order and cut into one equal part a rank, of
   ``samples // (batch_size * ranks)`` steps: no sample is in two parts, every rank has the same
   number of steps, and less than one global batch is left out, another one in each epoch. At a
   cut two ranks have a part of the same shard; otherwise a shard is read by one rank.
2. A rank cuts its part into runs of up to 64 samples that lie together, which is what it reads
   at a time, and lays these in a random order.
3. It draws its batches from a buffer of 8,192 samples of that order, then from the next 8,192.
   The buffer is the operating system's page cache: a run is asked for as a whole when its first
   sample is needed. About 0.5 GB a rank holds YFCC15M's; with less, samples are read singly.

So the batches of a step are known beforehand. A run that resumes goes on with exactly the batches
that would have come, on any number of workers, and reads at most the runs of one buffer twice.
With another number of ranks or another batch size it goes on with the samples that the epoch has
left, in the order of the shards, cut and laid as above: none comes again in that epoch.

Shape letters: N samples, S shards, R runs of samples, B samples of a batch.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from declip.index import RowError, clean_caption
from declip.shard_index import BLOCK, MAX_PICTURE_BYTES, Shard, find_index, load_index
from zoo_common import shard_names
from zoo_common.data import Draw, StepSampler
from zoo_common.elastic import Met
from zoo_common.errors import UserError
from zoo_common.flaky import retried
from zoo_common.images import DamagedImageError, decode_image

_log = logging.getLogger(__name__)

RUN_SAMPLES = 64
"""Neighbours in a shard that are read together: 4 MB of YFCC15M's pictures."""

BUFFER_SAMPLES = 8192
"""Samples of a rank among which a batch is drawn."""

_OPEN_SHARDS = 256
_NAMES_SHOWN = 5
_SHARDS, _RUNS, _BUFFER = range(3)
"""What random numbers are for."""

Integers = NDArray[np.int64]


# ---------------------------------------------------------------------------- samples


class ShardImages:
    """The samples of shards by number: ``declip.data.CaptionedImages``.

    Pickling passes on names alone; unpickling maps the index again.

    Args:
        paths: the shards.
        directory: where their index is.
        first_rows: of each shard, the number of its first row in the index.
        counts: of each shard, how many samples it has.
    """

    def __init__(
        self, paths: list[Path], directory: Path, first_rows: list[int], counts: list[int]
    ) -> None:
        self._open: dict[int, int] = {}  # descriptors, the one opened first is closed first
        self._asked: dict[tuple[int, int], None] = {}
        self._made_from = paths, directory, first_rows, counts
        self._paths = paths
        self._first_rows = first_rows
        self._rows_N = load_index(directory).rows_N
        self.starts_S = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        """Of each shard, the number of its first sample; then the number of samples."""
        self._starts = self.starts_S.tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardImages, self._made_from

    def __len__(self) -> int:
        return int(self._starts[-1])

    def item_id(self, index: int) -> str:
        """The names of the shard and of the picture in it: ``000012.tar/000123456.jpg``."""
        shard, row = self._find(index)
        path = self._paths[shard]
        try:
            name = _name_in(self._read(shard, row.image - 1, BLOCK))
        except DamagedImageError:
            name = f"@{row.image * BLOCK}"
        return f"{path.name}/{name if name.isprintable() else ascii(name)}"

    def image(self, index: int) -> Image.Image:
        """A picture as RGB.

        Raises:
            DamagedImageError: it cannot be read or decoded.
            UserError: its shard is gone.
        """
        shard, row = self._find(index)
        return decode_image(self._member(shard, row.image, row.image_bytes))

    def caption(self, index: int) -> str:
        """A caption.

        Raises:
            DamagedImageError: it cannot be read, or is none.
            UserError: its shard is gone.
        """
        shard, row = self._find(index)
        data = self._member(shard, row.caption, row.caption_bytes)
        try:
            return clean_caption(json.loads(data)["caption"] if row.is_json else data.decode())
        except RowError as error:
            raise DamagedImageError(str(error)) from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DamagedImageError("its caption cannot be read") from None

    def close(self) -> None:
        """Closes the shards' files; they are opened again when they are needed."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __del__(self) -> None:
        self.close()

    def _find(self, index: int) -> tuple[int, _Row]:
        """A sample's shard, and where it lies there; the disk is asked for its run."""
        shard = bisect.bisect_right(self._starts, index) - 1
        inside = index - self._starts[shard]
        run = shard, inside // RUN_SAMPLES
        if run not in self._asked:
            self._ask_for(*run)
        return shard, self._row(shard, inside)

    def _row(self, shard: int, inside: int) -> _Row:
        return _Row(*self._rows_N[self._first_rows[shard] + inside].item())

    def _member(self, shard: int, block: int, size: int) -> bytes:
        """A member's bytes; its header is read with it, and must agree with the index."""
        if size > MAX_PICTURE_BYTES:
            raise DamagedImageError(f"its index says that it has {size} bytes")
        data = self._read(shard, block - 1, BLOCK + size)
        if _size_in(data) != size:
            raise DamagedImageError("its shard is not the one that was indexed")
        return data[BLOCK:]

    def _read(self, shard: int, block: int, size: int) -> bytes:
        def read() -> bytes:
            try:
                return os.pread(self._descriptor(shard), size, block * BLOCK)
            except OSError:
                self._forget(shard)  # a handle that has gone stale stays so
                raise

        try:
            data = retried(read, self._paths[shard])
        except OSError as error:
            raise DamagedImageError(f"its shard cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise DamagedImageError("its shard has been cut off")
        return data

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.get(shard)
        if descriptor is None:
            if len(self._open) >= _OPEN_SHARDS:
                os.close(self._open.pop(next(iter(self._open))))
            path = self._paths[shard]
            try:
                descriptor = retried(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC), path)
            except OSError as error:
                raise UserError(
                    f"The shard {path} cannot be opened any more ({error.strerror}): restore it "
                    "and continue with --resume."
                ) from None
            self._open[shard] = descriptor
        return descriptor

    def _forget(self, shard: int) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _ask_for(self, shard: int, run: int) -> None:
        """Has the system read a run ahead, once: the samples that it holds are needed soon."""
        if len(self._asked) >= BUFFER_SAMPLES:
            self._asked.pop(next(iter(self._asked)))
        self._asked[shard, run] = None
        count = self._starts[shard + 1] - self._starts[shard]
        first, last = run * RUN_SAMPLES, min((run + 1) * RUN_SAMPLES, count) - 1
        begin, end = (
            _Row(*self._rows_N[self._first_rows[shard] + n].item()) for n in (first, last)
        )
        length = (end.image - begin.image) * BLOCK + end.image_bytes
        # Some file systems take no such hints, and some systems have none.
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(
                self._descriptor(shard), begin.image * BLOCK, length, os.POSIX_FADV_WILLNEED
            )


class _Row(NamedTuple):
    """A row of the index: ``declip.shard_index.ROW``."""

    image: int
    image_bytes: int
    caption: int
    caption_bytes: int
    is_json: int


def _size_in(header: bytes) -> int:
    """The size that a tar header tells; -1 for none."""
    try:
        return int(header[124:136].rstrip(b" \0"), 8)
    except ValueError:
        return -1


def _name_in(header: bytes) -> str:
    """The last part of the name that a tar header tells."""
    return PurePosixPath(header[:100].split(b"\0")[0].decode("utf-8", "replace")).name


def open_shards(pattern: str, *, max_damaged: float = 0.01) -> ShardImages:
    """Opens the shards of a pattern, and counts them first where no index lists them.

    Args:
        pattern: see ``zoo_common.shard_names.expand``.
        max_damaged: share of shards that may be cut off; without an index only, since one with an
            index must be whole.

    Raises:
        UserError: a shard is missing, is not the one that its index lists or cannot be read, more
            are cut off than allowed, or there is no sample in them.
    """
    paths = shard_names.expand(pattern)
    directory, indexed = find_index(paths)
    numbers = {shard.name: number for number, shard in enumerate(indexed.shards)}
    if directory == paths[0].parent:
        chosen = [numbers[path.name] for path in paths]
    else:  # names of several directories may be the same
        chosen = list(range(len(paths)))
    shards = [indexed.shards[number] for number in chosen]
    _check_damage(pattern, shards, max_damaged)
    if not any(shard.samples for shard in shards):
        raise UserError(
            f"The shards '{pattern}' hold no sample, a picture with a .txt or .json of the same "
            "name beside it: check what they are."
        )
    first_rows = np.cumsum([0, *(shard.samples for shard in indexed.shards)])
    return ShardImages(
        paths,
        directory,
        [int(first_rows[number]) for number in chosen],
        [shard.samples for shard in shards],
    )


def _check_damage(pattern: str, shards: list[Shard], max_damaged: float) -> None:
    passed_over = sum(shard.passed_over for shard in shards)
    if passed_over:
        _log.warning("%d members of the shards belong to no sample: passed over", passed_over)
    damaged = [f"{shard.name} ({shard.damage})" for shard in shards if shard.damage]
    for name in damaged:
        _log.warning("damaged shard, read as far as it goes: %s", name)
    if len(damaged) > max_damaged * len(shards):
        more = ", ..." if len(damaged) > _NAMES_SHOWN else ""
        raise UserError(
            f"{len(damaged)} of the {len(shards)} shards '{pattern}' are damaged: "
            f"{', '.join(damaged[:_NAMES_SHOWN])}{more}; restore them, give a pattern without "
            "them, or allow more with data.max_damaged."
        )


# ---------------------------------------------------------------------------- order


class _Part(NamedTuple):
    """A rank's part of an epoch: runs of neighbouring samples in the order of reading."""

    firsts_R: Integers  # of each run, its first sample, or the first's place in left_N
    lengths_R: Integers
    ends_R: Integers  # of each run, the position after its last sample
    left_N: Integers | None = None  # what other ranks left of the epoch, in the order of shards


class _Rest(NamedTuple):
    """What other ranks left of an epoch."""

    epoch: int
    begin: int  # how many steps of this size the epoch has behind it
    left_N: Integers  # samples, in the order of the epoch's shards


class ShardSampler(StepSampler):
    """The batches of one rank over a whole run, as lists of ``Draw``: see the head of this file.

    Args:
        starts_S: of each shard, the number of its first sample; then the number of samples.
        batch_size: samples a step of this rank.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.
        seed: decides the order together with the epoch.
        total_steps: the step to stop before; None for an endless stream.
        buffer_samples: among how many a batch is drawn; at least one batch.

    Raises:
        UserError: fewer samples than one global batch.
    """

    def __init__(
        self,
        starts_S: Integers,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        total_steps: int | None = None,
        buffer_samples: int = BUFFER_SAMPLES,
    ) -> None:
        super().__init__(
            int(starts_S[-1]),
            batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            total_steps=total_steps,
        )
        self._starts_S = starts_S
        self._among = buffer_samples
        self._rest: tuple[tuple[Met, ...], _Rest] | None = None

    @property
    def _buffer_samples(self) -> int:
        """Whole batches, so that none is drawn from two buffers."""
        return max(1, self._among // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start_step
        while self.total_steps is None or step < self.total_steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            for samples_B in self._batches(epoch, position):
                yield [Draw(epoch, sample) for sample in samples_B]
                step += 1
                if step == self.total_steps:
                    return

    def _batches(self, epoch: int, position: int) -> Iterator[list[int]]:
        """The batches of an epoch from a step of it on."""
        rest = self._rest_of(epoch)
        part = self._part(epoch) if rest is None else self._part_of(rest)
        skipped = (position - (rest.begin if rest else 0)) * self.batch_size
        for number in range(-(-int(part.ends_R[-1]) // self._buffer_samples)):
            begin = number * self._buffer_samples
            if skipped >= begin + self._buffer_samples:
                continue
            buffer = self._buffer(part, epoch, number).tolist()
            for place in range(max(skipped - begin, 0), len(buffer), self.batch_size):
                yield buffer[place : place + self.batch_size]

    def _part(self, epoch: int) -> _Part:
        order_S = self._shuffled(len(self._starts_S) - 1, epoch, _SHARDS, 0)
        counts_S = np.diff(self._starts_S)[order_S]
        ends_S = np.cumsum(counts_S)
        size = self.steps_per_epoch * self.batch_size
        low, high = self._rank * size, (self._rank + 1) * size
        edges = []
        for place in np.flatnonzero((ends_S > low) & (ends_S - counts_S < high)):
            before = ends_S[place] - counts_S[place]
            begin, end = max(low - before, 0), min(high - before, counts_S[place])
            inner = np.arange(begin // RUN_SAMPLES + 1, -(-end // RUN_SAMPLES)) * RUN_SAMPLES
            shard_edges = np.concatenate([[begin], inner, [end]])
            edges.append(self._starts_S[order_S[place]] + shard_edges)
        return self._laid(epoch, edges)

    def _part_of(self, rest: _Rest) -> _Part:
        """The same of what other ranks left."""
        size = (self.steps_per_epoch - rest.begin) * self.batch_size
        low, high = self._rank * size, (self._rank + 1) * size
        edges = np.append(np.arange(low, high, RUN_SAMPLES), high)
        return self._laid(rest.epoch, [edges])._replace(left_N=rest.left_N)

    def _laid(self, epoch: int, edges: list[Integers]) -> _Part:
        """Runs between edges, shuffled."""
        firsts_R = np.concatenate([some[:-1] for some in edges])
        lengths_R = np.concatenate([np.diff(some) for some in edges])
        order_R = self._shuffled(len(firsts_R), epoch, _RUNS, self._rank)
        firsts_R, lengths_R = firsts_R[order_R], lengths_R[order_R]
        return _Part(firsts_R, lengths_R, np.cumsum(lengths_R))

    def _rest_of(self, epoch: int) -> _Rest | None:
        """What other ranks left of an epoch; None for one that they had no part in."""
        met = tuple(part for part in self.met if part.epoch == epoch)
        if not met:
            return None
        if self._rest is None or self._rest[0] != met:
            begin = met[-1].steps_of(self.global_batch)
            self._rest = met, _Rest(epoch, begin, self._left_by(met))
        return self._rest[1]

    def _left_by(self, met: tuple[Met, ...]) -> Integers:
        """The samples that an epoch still has, in the order of its shards."""
        last, before = met[-1], self._like(met[-1], met[:-1])
        rest = before._rest_of(last.epoch)
        if rest is None:
            order_S = self._shuffled(len(self._starts_S) - 1, last.epoch, _SHARDS, 0)
            ranges = [np.arange(*self._starts_S[shard : shard + 2]) for shard in order_S]
            left_N, begin = np.concatenate(ranges), 0
        else:
            left_N, begin = rest.left_N, rest.begin
        is_left = np.ones(int(self._starts_S[-1]), bool)
        for rank in range(last.world_size):
            before._rank = rank
            batches = before._batches(last.epoch, begin)
            for samples_B in itertools.islice(batches, last.stop - begin):
                is_left[samples_B] = False
        return left_N[is_left[left_N]]

    def _like(self, met: Met, before: tuple[Met, ...]) -> ShardSampler:
        """The sampler of one of the ranks that took part in ``met``."""
        other = copy.copy(self)
        other.batch_size, other.global_batch = met.batch_size, met.global_batch
        other.steps_per_epoch = self._size // met.global_batch
        other.met, other._rest = before, None
        return other

    def _buffer(self, part: _Part, epoch: int, number: int) -> Integers:
        """The samples of one buffer, shuffled."""
        begin = number * self._buffer_samples
        end = min(begin + self._buffer_samples, int(part.ends_R[-1]))
        first, last = np.searchsorted(part.ends_R, [begin, end - 1], side="right")
        runs = [
            np.arange(part.firsts_R[run], part.firsts_R[run] + part.lengths_R[run])
            for run in range(first, last + 1)
        ]
        skipped = begin - int(part.ends_R[first] - part.lengths_R[first])
        samples = np.concatenate(runs)[skipped : skipped + end - begin]
        if part.left_N is not None:
            samples = part.left_N[samples]
        # A rank's buffers are numbered apart from those of the others.
        mark = self._rank << 32 | number
        return samples[self._shuffled(len(samples), epoch, _BUFFER, mark)]

    def _shuffled(self, size: int, epoch: int, purpose: int, number: int) -> Integers:
        # Raw Philox words, as in StepSampler: numpy promises never to change them.
        key = np.array([self._seed % (1 << 64), epoch], np.uint64)
        counter = np.array([0, number, purpose + 1, 0], np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(size)
        return np.argsort(words, kind="stable")
