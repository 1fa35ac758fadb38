"""detectron2's training logs: CommonMetricPrinter's lines, and metrics.json.

Formats: facebookresearch/detectron2 utils/events.py, engine/hooks.py and evaluation/testing.py,
and the original zoo's copy, where every process prints `FPS = x` at its end. Iterations count
from 0 there.
"""

from __future__ import annotations

import re

from zoo_common.logparse.reader import (
    COUNT,
    NUMBER,
    Reader,
    as_count,
    as_float,
    json_object,
    number_after,
)
from zoo_common.logparse.records import RawStep

_MARK = "iter: "
_STEP = re.compile(
    rf"iter: ({COUNT})(  total_loss: ({NUMBER})(?:\s{{2,}}[\w./-]+: (?:{NUMBER}M?|N/A))*)\s*$"
)
# Printed with three decimals, which separates two processes' values on one line.
_FPS = re.compile(r"FPS = (\d+\.\d{3})")
_SPEED = re.compile(rf"Overall training speed: \d+ iterations in .* \(({NUMBER}) s / it\)")
_COPYPASTE = "copypaste: "


class Detectron2Reader(Reader):
    """`eta: ..  iter: N  total_loss: ..  loss_cls: ..  time: ..  data_time: ..  lr: ..`."""

    NAME = "detectron2"
    OTHER_MARKS = (" d2.", "detectron2")
    OTHER_LINE = re.compile(r"[\[ ](?:d2\.[\w.]+|detectron2)(?:\]: | INFO: )")
    RATE = "`FPS = ` lines (global batch over a process's time without hooks and warm-up)"
    TIME = "seconds an iteration (mean over the run without its first iterations)"
    TIME_IS_SO_FAR = True
    AP_SCALE = 0.01
    LOSS = "total_loss"

    def __init__(self) -> None:
        super().__init__()
        self._columns: list[str] = []

    def step(self, line: str) -> RawStep | None:
        start = line.rfind(_MARK)
        if start < 0:
            return None
        match = _STEP.match(line, start)
        if match is None:
            self.torn += "  total_loss: " in line
            return None
        iteration, body, loss = match.groups()
        step = int(iteration) + 1
        return RawStep(
            key=step,
            step=step,
            epoch=None,
            loss=float(loss),
            step_time_s=number_after(body, "  time: "),
            images_per_sec=None,
            body=body,
        )

    def notice(self, line: str) -> None:
        if "FPS = " in line:
            for value in _FPS.findall(line):
                self.found.rate.add(float(value))
        elif _COPYPASTE in line:
            self._copypaste(line[line.rfind(_COPYPASTE) + len(_COPYPASTE) :].strip())
        elif match := _SPEED.search(line):
            self.found.step_time_s = float(match[1])
        elif "Total training time: " in line:
            self.found.ended = True
        else:
            super().notice(line)

    def _copypaste(self, text: str) -> None:
        """Take up `Task: bbox`, then a line of column names, then a line of percentages."""
        if text.startswith("Task: "):
            self._task = text.removeprefix("Task: ")
        elif text.startswith("AP"):
            self._columns = text.split(",")
        elif self._columns:
            for name, value in zip(self._columns, text.split(","), strict=False):
                if re.fullmatch(NUMBER, value) and re.fullmatch("AP(?:50|75|s|m|l)?", name):
                    self._keep_ap(self._task, name, float(value) * self.AP_SCALE)
            self._columns = []


class Detectron2JsonReader(Reader):
    """`{"iteration": 19, "total_loss": .., "lr": .., "time": ..}`, detectron2's metrics.json."""

    NAME = "detectron2 json"
    LOSS = "total_loss"
    TIME = "seconds an iteration (running median of 20)"
    TELLS_END = False

    def step(self, line: str) -> RawStep | None:
        if '"iteration"' not in line:
            return None
        record = json_object(line)
        if record is None:
            self.torn += 1
            return None
        for key, value in record.items():
            task, _, name = key.partition("/")
            number = as_float(value)
            if task in ("bbox", "segm") and number is not None and name.startswith("AP"):
                self._keep_ap(task, name, number * 0.01)
        iteration, loss = as_count(record.get("iteration")), as_float(record.get("total_loss"))
        if iteration is None or loss is None:
            return None
        return RawStep(
            key=iteration + 1,
            step=iteration + 1,
            epoch=None,
            loss=loss,
            step_time_s=as_float(record.get("time")),
            images_per_sec=None,
            body=record,
        )
