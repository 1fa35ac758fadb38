"""DeCLIP's index of captions at the size of YFCC15M, beside what upstream does with the list.

    python tools/bench/declip_index.py

Writes a seeded list of 15 million rows (about 3.3 GB) into a temporary directory, which is deleted
afterwards and needs 9 GB. Then, in a process for each: builds the index, is killed half-way and
builds on; opens it; reads random rows (caption and path); and reads them in a forked and a spawned
worker. Beside it the two ways of upstream: all rows in a list, on the first 1.5 million rows alone
(15 million take about ten times the memory and time, more than many machines have), and a list of
the lines' offsets with the file opened for each row (``fseek``), on all. Ends with exit code 1 if
one of our figures misses its goal; the goals are for the full size.

Private memory is what a process has written to (``Private_Dirty``), interpreter and libraries
included. Pages of the mapped file are the kernel's to drop at any time and shared by all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROWS, LIST_ROWS = 15_000_000, 1_500_000
READ, READ_BY_OFFSET = 300_000, 30_000  # random rows of a measurement
PASSES = 3
NAME = "yfcc15m_clean_open_data"
LIST, FEW, INDEX = f"{NAME}.json", "few.json", f"{NAME}.json.zoo-cache"
MOST = {"build_mb": 500.0, "open_s": 1.0, "worker_mb": 100.0}
LEAST = {"rows_per_s": 100_000.0}

Figures = dict[str, float]


class Reader(NamedTuple):
    """A way to have the rows: how many there are, and caption and path of one."""

    rows: int
    read: Callable[[int], tuple[str, str]]


def main() -> None:
    """Prints a line for each way of reading, and whether ours keeps its goals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"(default {ROWS})")
    parser.add_argument("--directory", type=Path, help="where the temporary directory is made")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, path = options.child
        print(json.dumps(CHILDREN[name](Path(path))))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        ours = measure_all(Path(directory), options.rows)
    missed = [name for name, goal in MOST.items() if ours[name] >= goal]
    missed += [name for name, goal in LEAST.items() if ours[name] <= goal]
    goals = ", ".join(
        f"{name} {ours[name]:.4g} of {goal:g}" for name, goal in (MOST | LEAST).items()
    )
    print(f"\n{goals}: {'missed: ' + ' '.join(missed) if missed else 'ok'}")
    sys.exit(bool(missed))


def measure_all(root: Path, rows: int) -> Figures:
    """Prints all figures; gives those that have goals."""
    begin = time.perf_counter()
    write_list(root, rows)
    size = (root / LIST).stat().st_size
    print(f"{rows} rows, {size / 1e9:.2f} GB, written in {time.perf_counter() - begin:.0f} s")
    killed = build_and_kill(root, size)
    rest = run_child("build", root)
    build_s, build_mb = killed["seconds"] + rest["seconds"], max(killed["peak_mb"], rest["peak_mb"])
    print(
        f"index: built in {build_s:.0f} s, at most {build_mb:.0f} MB; killed at "
        f"{100 * killed['done']:.0f} % after {killed['seconds']:.0f} s, the rest took "
        f"{rest['seconds']:.0f} s; {(root / INDEX).stat().st_size / 1e9:.2f} GB"
    )
    print(f"\n{'':26}{'rows':>10}{'open s':>9}{'private MB':>12}{'worker MB':>11}{'rows/s':>10}")
    figures = {name: run_child(name, root) for name in CHILDREN if name != "build"}
    for name, row in figures.items():
        cells = f"{row['rows']:10.0f}{row['open_s']:9.2f}{row['private_mb']:12.0f}"
        print(f"{name:26}{cells}{row['worker_mb']:11.0f}{row['rows_per_s']:10.0f}")
    print(
        "private: of the process that opened it; worker: of a worker that then read random rows"
        f"\nlist of rows: on the first {LIST_ROWS} rows; for {rows} multiply seconds and memory by "
        f"{rows / min(rows, LIST_ROWS):.0f}"
    )
    ours = [figures[name] for name in figures if name.startswith("index")]
    return {
        "build_mb": build_mb,
        "open_s": max(row["open_s"] for row in ours),
        "worker_mb": max(row["worker_mb"] for row in ours),
        "rows_per_s": min(row["rows_per_s"] for row in ours),
    }


def write_list(root: Path, rows: int) -> None:
    """Writes the list, its beginning once more for the list in memory, and a picture."""
    dice = random.Random(0)
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 9))) for _ in range(3000)]
    told = [" ".join(dice.choices(words, k=dice.randint(2, 12))) for _ in range(20_000)]
    with (root / LIST).open("w") as stream, (root / FEW).open("w") as few:
        for first in range(0, rows, 100_000):
            block = []
            for number in range(first, min(rows, first + 100_000)):
                key = f"{dice.getrandbits(128):032x}"
                caption = f"{told[number % 19_997]} {number} {told[number % 13_001]}"
                block.append(
                    f'{{"caption": "{caption}", "filename": "{key[:3]}/{key[3:6]}/{key}.jpg", '
                    f'"url": "http://pictures.example.org/{number % 97}/{key[:9]}.jpg"}}\n'
                )
            text = "".join(block)
            stream.write(text)
            if first < LIST_ROWS:
                few.write(text)
    with (root / LIST).open() as stream:
        picture = root / NAME / json.loads(stream.readline())["filename"]
    picture.parent.mkdir(parents=True)
    picture.touch()


def build_and_kill(root: Path, size: int) -> Figures:
    """Starts a build and kills it when half of the parts should be there."""
    from declip.index_build import PART_BYTES

    parts = max(1, size // PART_BYTES // 2)
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--child", "build", str(root)])
    directory = root / f".{INDEX}.parts"
    while len(list(directory.glob("*.arrow"))) < parts and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.WIFSIGNALED(status), "the build was done before it could be killed"
    done = min(1.0, len(list(directory.glob("*.arrow"))) * PART_BYTES / size)
    return {
        "seconds": time.perf_counter() - begin,
        "peak_mb": usage.ru_maxrss / 1e3,
        "done": done,
    }


def run_child(name: str, root: Path) -> Figures:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(root)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: Figures = json.loads(result.stdout.splitlines()[-1])
    return figures


# ------------------------------------------------------------------ in a process of its own


def build(root: Path) -> Figures:
    """Builds the index, or what a killed build left of it."""
    from declip.index import open_index

    begin = time.perf_counter()
    open_index(root)
    # Kilobytes on Linux.
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": time.perf_counter() - begin, "peak_mb": peak_mb}


def open_ours(root: Path) -> Reader:
    """The mapped index."""
    from declip.index import open_index

    index = open_index(root)
    return Reader(len(index), lambda number: (index.caption(number), index.path(number)))


def open_list(root: Path) -> Reader:
    """Upstream's way: a list of all rows."""
    with (root / FEW).open() as stream:
        rows = [json.loads(line) for line in stream]
    images = f"{root}/{NAME}"
    return Reader(
        len(rows), lambda number: (rows[number]["caption"], f"{images}/{rows[number]['filename']}")
    )


def open_offsets(root: Path) -> Reader:
    """Upstream's way with ``fseek``: a list of offsets, the file opened for each row."""
    offsets: list[int] = []
    offset = 0
    with (root / LIST).open("rb") as stream:
        for line in stream:
            offsets.append(offset)
            offset += len(line)
    images = f"{root}/{NAME}"

    def read(number: int) -> tuple[str, str]:
        with (root / LIST).open("rb") as stream:
            stream.seek(offsets[number])
            row: dict[str, Any] = json.loads(stream.readline())
        return row["caption"], f"{images}/{row['filename']}"

    return Reader(len(offsets), read)


def measure(opening: Callable[[Path], Reader], root: Path, method: str, count: int) -> Figures:
    """Opens, and reads random rows in this process and in a worker."""
    import declip.index  # noqa: F401 - what is timed is opening, not importing

    begin = time.perf_counter()
    reader = opening(root)
    open_s = time.perf_counter() - begin
    private = private_mb()
    receiver, sender = get_context(method).Pipe(duplex=False)
    if method == "fork":
        worker: Any = get_context("fork").Process(target=touch, args=(reader, count, sender))
    else:
        worker = get_context("spawn").Process(target=open_and_touch, args=(root, count, sender))
    worker.start()
    worker_mb = receiver.recv()
    worker.join()
    seconds = min(read_random(reader, count, seed) for seed in range(PASSES))
    return {
        "rows": reader.rows,
        "open_s": open_s,
        "private_mb": private,
        "worker_mb": worker_mb,
        "rows_per_s": count / seconds,
    }


def open_and_touch(root: Path, count: int, sender: Connection) -> None:
    """A spawned worker, which opens the index itself."""
    touch(open_ours(root), count, sender)


def touch(reader: Reader, count: int, sender: Connection) -> None:
    """Reads random rows; sends what is private afterwards."""
    read_random(reader, count, PASSES)
    sender.send(private_mb())


def read_random(reader: Reader, count: int, seed: int) -> float:
    """Seconds of reading random rows."""
    numbers = random.Random(seed).choices(range(reader.rows), k=count)
    read = reader.read
    begin = time.perf_counter()
    for number in numbers:
        read(number)
    return time.perf_counter() - begin


def private_mb() -> float:
    """What this process has written to and shares with nobody."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1e3


CHILDREN: dict[str, Callable[[Path], Figures]] = {
    "build": build,
    "index, forked worker": lambda root: measure(open_ours, root, "fork", READ),
    "index, spawned worker": lambda root: measure(open_ours, root, "spawn", READ),
    "list of rows, forked": lambda root: measure(open_list, root, "fork", READ),
    "list of offsets, forked": lambda root: measure(open_offsets, root, "fork", READ_BY_OFFSET),
}


if __name__ == "__main__":
    main()
