"""Whether a long run stays as it was at its start: memory, open files, record and speed.

Eight processes of the toy model train 2,000 steps with a checkpoint every 50 and an evaluation
every 200, all recorded. A step sleeps for 50 ms, as if a card computed: eight processes that want
two cores at once would measure the scheduler. Meanwhile the memory that is each process's own (its
unique set size), its open files and its CPU time are read twice a second. Prints, of each process,
what it has of them in the second tenth of the run (by then each thing was done once) and in the
last; what is missing in the record or there twice; and the throughput of the first and last tenth,
from the median time of the steps.

    python3 tools/bench/load.py [--processes 8] [--steps 2000] [--step_time_s 0.05]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

TOY = Path(__file__).resolve().parents[2] / "common" / "tests" / "toy"
SAVE_EVERY, EVALUATE_EVERY = 50, 200
WARMUP = 10  # steps that no throughput counts


@dataclass(frozen=True)
class Sample:
    """A process at a step of the run.

    Attributes:
        name: ``launcher`` or ``rank R``.
        step: newest step in the record.
        memory_mb: unique set size in MiB.
        cpu_s: CPU time since its start, in seconds.
        files: open file descriptors.
        threads: threads.
    """

    name: str
    step: int
    memory_mb: float
    cpu_s: float
    files: int
    threads: int


@dataclass(frozen=True)
class Growth:
    """Medians of a process in the second and in the last tenth of the run.

    Attributes:
        cpu_ms: mean CPU time of a step in milliseconds, with saving, evaluation and record.
    """

    name: str
    memory_mb: tuple[float, float]
    cpu_ms: tuple[float, float]
    files: tuple[float, float]
    threads: tuple[float, float]

    @property
    def memory_percent(self) -> float:
        """By how much its memory grew."""
        return 100 * (self.memory_mb[1] / self.memory_mb[0] - 1)


@dataclass(frozen=True)
class Load:
    """What came of a run.

    Attributes:
        growths: of launcher and ranks.
        images_per_sec: in the first and the last tenth of the steps.
        faults: what the record lacks or has twice; empty when it is complete.
        seconds: of the whole run.
    """

    growths: list[Growth]
    images_per_sec: tuple[float, float]
    faults: list[str]
    seconds: float

    @property
    def slower_percent(self) -> float:
        """By how much the last tenth of the steps was slower than the first."""
        return 100 * (1 - self.images_per_sec[1] / self.images_per_sec[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line a process, and one each for record and speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--step_time_s", type=float, default=0.05)
    parser.add_argument("--json", type=Path, help="file that gets the numbers too")
    options = parser.parse_args(argv)
    load = measure(options.processes, options.steps, options.step_time_s)
    if not load.growths:
        print("too short to see anything grow")
    for growth in load.growths:
        memory, files, threads = growth.memory_mb, growth.files, growth.threads
        print(
            f"{growth.name:9} memory {memory[0]:.1f} -> {memory[1]:.1f} MiB "
            f"({growth.memory_percent:+.2f} %), CPU {growth.cpu_ms[0]:.2f} -> "
            f"{growth.cpu_ms[1]:.2f} ms a step, files {files[0]:g} -> {files[1]:g}, "
            f"threads {threads[0]:g} -> {threads[1]:g}"
        )
    print("record: " + ("; ".join(load.faults) or "every step and evaluation once"))
    first, last = load.images_per_sec
    print(
        f"throughput: {first:.1f} -> {last:.1f} images/s ({-load.slower_percent:+.2f} %), "
        f"{options.steps} steps in {load.seconds:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(asdict(load), indent=1) + "\n", encoding="utf-8")


def measure(processes: int, steps: int, step_time_s: float = 0.05) -> Load:
    """Runs the toy and follows it.

    Args:
        processes: of the run.
        steps: of the run.
        step_time_s: seconds that a step sleeps.

    Raises:
        RuntimeError: the run failed.
    """
    with tempfile.TemporaryDirectory(prefix="zoo-load-") as scratch:
        output = Path(scratch, "output")
        words = ["train_2p", f"--processes={processes}", f"--steps={steps}"]
        words += [f"--save_every={SAVE_EVERY}", f"data.evaluate_every={EVALUATE_EVERY}"]
        words += [f"fault.step_time_s={step_time_s}"]
        words += ["run.spike_factor=0"]  # the mean of four squares has spikes of its own
        started = time.monotonic()
        with Path(scratch, "words").open("w+", encoding="utf-8") as words_of_it:
            launcher = psutil.Popen(
                [sys.executable, "-m", "zoo_common.launch", *words, f"--output_dir={output}"],
                cwd=TOY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=words_of_it,
                stderr=subprocess.STDOUT,
            )
            samples = follow(launcher, output)
            if launcher.wait():
                words_of_it.seek(0)
                raise RuntimeError(f"the run failed: {words_of_it.read()[-2000:]}")
        seconds = time.monotonic() - started
        lines = read_lines(output / "metrics.jsonl")
        return Load(
            growths(samples, steps),
            (rate(lines[WARMUP : steps // 10]), rate(lines[-(steps // 10) :])),
            faults_of_record(output, steps),
            seconds,
        )


def follow(launcher: psutil.Process, output: Path) -> list[Sample]:
    """Looks at launcher and ranks twice a second until the run has ended."""
    samples = []
    while launcher.poll() is None:
        time.sleep(0.5)
        step = newest_step(output / "metrics.jsonl")
        try:
            family = {"launcher": launcher}
            for child in launcher.children():
                if "zoo_common.worker" in child.cmdline():
                    family[f"rank {child.environ()['RANK']}"] = child
            for name, process in family.items():
                with process.oneshot():
                    cpu = process.cpu_times()
                    memory_mb = process.memory_full_info().uss / 2**20
                    files, threads = process.num_fds(), process.num_threads()
                cpu_s = cpu.user + cpu.system
                samples.append(Sample(name, step, memory_mb, cpu_s, files, threads))
        except (psutil.NoSuchProcess, psutil.ZombieProcess, KeyError):
            continue  # it has just ended
    return samples


def growths(samples: Sequence[Sample], steps: int) -> list[Growth]:
    """Of each process that was seen early and late; of a short run, it may have been none."""
    found = []
    for name in sorted({sample.name for sample in samples}):
        own = [sample for sample in samples if sample.name == name]
        early = [s for s in own if steps // 10 < s.step <= 2 * steps // 10]
        late = [s for s in own if steps - steps // 10 < s.step < steps]  # before it winds up
        if not early or not late:
            continue
        found.append(
            Growth(
                name,
                memory_mb=(median_of(early, "memory_mb"), median_of(late, "memory_mb")),
                cpu_ms=(cpu_ms(early), cpu_ms(late)),
                files=(median_of(early, "files"), median_of(late, "files")),
                threads=(median_of(early, "threads"), median_of(late, "threads")),
            )
        )
    return found


def median_of(samples: Sequence[Sample], name: str) -> float:
    """The median of a number of some samples."""
    return float(statistics.median(getattr(sample, name) for sample in samples))


def cpu_ms(samples: Sequence[Sample]) -> float:
    """CPU time of a step, in milliseconds, from the first to the last of some samples."""
    steps = samples[-1].step - samples[0].step
    return 1000 * (samples[-1].cpu_s - samples[0].cpu_s) / max(1, steps)


def rate(lines: Sequence[dict]) -> float:
    """Images a second of the median step: saving and evaluation are not in it."""
    return statistics.median(line["images_per_sec"] for line in lines)


def faults_of_record(output: Path, steps: int) -> list[str]:
    """What is not in the record exactly once: lines, text log, TensorBoard, evaluations."""
    expected = list(range(1, steps + 1))
    text = (output / "train_0.log").read_text(encoding="utf-8")
    events = [
        event.step
        for file in sorted((output / "tensorboard").iterdir())
        for event in EventFileLoader(str(file)).Load()
        if any(value.tag == "train/loss" for value in event.summary.value)
    ]
    found = {
        "metrics.jsonl": [line["step"] for line in read_lines(output / "metrics.jsonl")],
        "train_0.log": [int(step) for step in re.findall(r"  step +(\d+)/", text)],
        "tensorboard": events,
    }
    faults = [
        f"{name} has {len(numbers)} lines for {steps} steps"
        for name, numbers in found.items()
        if numbers != expected
    ]
    evaluations = [line["step"] for line in read_lines(output / "evaluations.jsonl")]
    if evaluations != [*range(EVALUATE_EVERY, steps, EVALUATE_EVERY), steps]:
        faults.append(f"evaluations.jsonl has evaluations at {evaluations}")
    return faults


def read_lines(file: Path) -> list[dict]:
    """The whole lines of a record."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def newest_step(file: Path) -> int:
    """The last whole line's step, from the end of the file; 0 without any."""
    if not file.is_file():
        return 0
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        lines = stream.read().split(b"\n")[1:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


if __name__ == "__main__":
    main()
