"""Logs of anybody's training, and the records that a run and its watchers read while it goes on."""

import contextlib
import gzip
import io
import json
from pathlib import Path
from typing import Any

from fuzzing import amounts, as_json, feed, spoiled, spoiled_json
from hypothesis import strategies as st

from zoo_common import logparse
from zoo_common.console import _Tail
from zoo_common.logparse.__main__ import main as print_table
from zoo_common.runlog import RunLog

STEP = {
    "step": 10, "total_steps": 20, "epoch": 0.5, "images_seen": 80, "losses": {"cls": 1.5},
    "loss": 1.5, "lr": 0.1, "images_per_sec": 9.5, "step_time_s": 0.1, "data_time_s": 0.01,
    "memory_mb": 90.5, "grad_norm": None, "loss_scale": 1.0, "skipped_steps": 0, "time": 1.7e9,
}  # fmt: skip
SCORE = {"step": 10, "epoch": 0.5, "metrics": {"top1": 50.0}, "images": 8, "seconds": 1.0}
RESULT = {
    "status": "completed", "metric": {"name": "top1", "value": 50.0, "unit": "%"}, "steps": 20,
    "metrics": {"top1": 50.0},
    "throughput": {"images_per_sec": 9.0, "step_time_s": 0.1, "how": "x"},
    "final_loss": 1.5, "epochs": 1.0,
}  # fmt: skip
LOGS = [
    b"[11/22 10:00:00 d2.utils.events]:  eta: 0:01:02  iter: 19  total_loss: 2.5  loss_cls: 1.5  "
    b"loss_box_reg: 1  time: 0.5  data_time: 0.1  lr: 0.02  max_mem: 90M\n",
    b"2021-11-22 10:00:00,000 - mmdet - INFO - Epoch [1][50/100]\tlr: 1.000e-02, eta: 0:01:00, "
    b"time: 0.500, data_time: 0.100, memory: 900, loss_ins: 1.5, loss_cate: 1.0, loss: 2.5\n",
    b"11/22 10:00:00 - mmengine - INFO - Epoch(train)  [1][ 50/100]  lr: 1.0000e-02  eta: 0:01:00  "
    b"time: 0.5000  data_time: 0.1000  memory: 900  loss: 2.5000  loss_cls: 1.5000\n",
    b"Epoch: [0]  [  10/100]  eta: 0:01:00  lr: 0.000100  loss: 6.9 (6.9)  time: 0.5  data: 0.1  "
    b"max mem: 900\n",
    b"Iter: [10/100]\tTime 0.5 (0.5)\tFPS 16.0 (16.0)\tData 0.1 (0.1)\tLoss 2.5 (2.5)\tClip Loss "
    b"1.5 (1.5)\tLR 0.1\tRemaining Time 1:00 (x)\n",
    b'{"mode": "train", "epoch": 1, "iter": 50, "lr": 0.01, "time": 0.5, "loss": 2.5}\n',
    b'{"iteration": 19, "total_loss": 2.5, "lr": 0.02, "time": 0.5, "bbox/AP": 30.0}\n',
    b'{"train_lr": 0.1, "train_loss": 6.9, "test_acc1": 10.0, "epoch": 0}\n',
    b" Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.300\n",
    b"Traceback (most recent call last)\n",
    b"OrderedDict([('bbox', {'AP': 30.0})])\n",
]  # fmt: skip
WORDS = [
    b"iter: ", b"Epoch [", b"nan", b"inf", b"1e999", b"0", b"9" * 400, b"\r", b"\x1b[0m",
    b"\x1f\x8b",
    b"Traceback (most recent call last)", b"FPS = 1.000", b"(", b"*", b"\xc2\x85", b"a" * 20000,
]  # fmt: skip


def lines(data: bytes) -> bytes:
    """A list as a line for each item, where it still is one."""
    try:
        return b"".join(as_json(row) + b"\n" for row in json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return data.replace(b"}, {", b"}\n{")


@amounts
def test_logs(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "train_0.log"
    valid = [log * 3 for log in LOGS] + [b"".join(LOGS), gzip.compress(LOGS[0] * 5)]

    def read_log(data: bytes) -> None:
        path.write_bytes(data)
        log = logparse.parse(path, batch=8)
        for step in log.steps():
            assert step.step is None or step.step >= 0
        with contextlib.redirect_stdout(io.StringIO()):
            print_table([str(path)])
            print_table([str(path), "--json"])

    for data in valid[:9]:
        read_log(data)
    feed(read_log, spoiled(valid, WORDS), amount, tmp_path)


@amounts
def test_records(amount: int, tmp_path: Path) -> None:
    """A run's directory, for the table of runs."""
    good = {
        "metrics.jsonl": as_json(STEP) + b"\n",
        "evaluations.jsonl": as_json(SCORE) + b"\n",
        "result.json": as_json(RESULT),
    }

    def read_record(given: tuple[str, bytes]) -> None:
        name, data = given
        for other, content in good.items():
            (tmp_path / other).write_bytes(data if other == name else content)
        list(logparse.parse(tmp_path).steps())
        with contextlib.redirect_stdout(io.StringIO()):
            print_table([str(tmp_path), "--json"])

    def of(name: str, valid: list[Any]) -> Any:
        inputs = spoiled_json(valid, WORDS)
        return st.tuples(st.just(name), inputs if name == "result.json" else inputs.map(lines))

    inputs = st.one_of(
        of("metrics.jsonl", [[STEP, {**STEP, "step": 20}]]),
        of("evaluations.jsonl", [[SCORE]]),
        of("result.json", [RESULT]),
    )
    feed(read_record, inputs, amount, tmp_path)


@amounts
def test_what_a_resumed_run_drops(amount: int, tmp_path: Path) -> None:
    """Lines of a killed run, of which nothing is refused: what is no record goes."""
    path = tmp_path / "metrics.jsonl"

    def read_lines(data: bytes) -> None:
        path.write_bytes(data)
        RunLog(tmp_path, writes=True).continue_from(10)
        # Not splitlines(): what it takes for the end of a line may stand in a text.
        for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
            assert json.loads(line)["step"] <= 10

    inputs = spoiled_json([[{**STEP, "step": number} for number in (5, 10, 15)]], WORDS).map(lines)
    feed(read_lines, inputs, amount, tmp_path, all_read=True)


@amounts
def test_what_the_console_follows(amount: int, tmp_path: Path) -> None:
    """A growing file that is cut, written anew, or holds half a character."""
    path = tmp_path / "train_0.log"

    def read_tail(pieces: list[bytes]) -> None:
        path.unlink(missing_ok=True)
        tail = _Tail(path)
        for piece in pieces:
            with path.open("wb" if piece.startswith(b"\0") else "ab") as stream:
                stream.write(piece)
            for line in tail.lines():
                assert "\n" not in line
                line.encode()

    inputs = st.lists(spoiled(LOGS[:2], WORDS), min_size=1, max_size=4)
    feed(read_tail, inputs, amount, tmp_path, all_read=True)
