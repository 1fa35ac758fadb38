"""OpenMMLab's training logs: mmcv's and mmengine's lines, and their JSON lines.

Formats: open-mmlab/mmcv runner/hooks/logger/text.py, open-mmlab/mmengine
runner/log_processor.py. SOLOv2 of the original zoo is mmcv 0.2.16 with `FPS: x` lines, each line
printed by two handlers.
"""

from __future__ import annotations

import re
from typing import ClassVar

from zoo_common.logparse.reader import (
    COUNT,
    ETA,
    LENGTH,
    NUMBER,
    Reader,
    as_count,
    as_float,
    json_object,
    number_after,
)
from zoo_common.logparse.records import RawStep

_ITEMS = rf"((?:[\w./@=-]+: (?:{ETA}|{NUMBER})(?:,\s?|\s+|$))+)$"
_ITEM = re.compile(rf"([\w./@=-]+): ({NUMBER})(?![\d:.])")
_ETA = re.compile(r"eta: (?:(-?\d{1,9}) days?, )?(\d{1,9}):(\d\d):(\d\d)")
_EVALUATION = re.compile(r"(?:Epoch|Iter)\((?:val|test)\) \[")
_FPS = re.compile(rf"(?:^| - )FPS: ({NUMBER})\s*$")
_LONGEST_EPOCH = 10**9
_LENGTH = re.compile(rf"max: ({COUNT}) (epochs|iters)|max_(epochs|iters)=({COUNT})")


class _TextReader(Reader):
    """What mmcv's and mmengine's lines share."""

    MARKS: ClassVar[tuple[str, str]]
    BY_EPOCH: ClassVar[re.Pattern[str]]
    BY_ITER: ClassVar[re.Pattern[str]]
    RATE = "`FPS: ` lines (images of all ranks over the time since the epoch began)"
    TIME = "seconds an iteration (mean over a log interval)"
    LOSS_PART = re.compile(rf"\s([\w./@=-]*loss[\w./@=-]*): ({NUMBER})(?![\d:.])")

    def __init__(self) -> None:
        super().__init__()
        self._epochs = 0
        self._total_steps: int | None = None
        self._fps = ""

    def step(self, line: str) -> RawStep | None:
        start = line.rfind(self.MARKS[0])
        if start >= 0:
            match = self.BY_EPOCH.match(line, start)
        else:
            start = line.rfind(self.MARKS[1])
            if start < 0:
                return None
            match = self.BY_ITER.match(line, start)
        if match is None:
            self.torn += 1
            return None
        if len(match.groups()) == 4:
            before, index, length = int(match[1]) - 1, int(match[2]), int(match[3])
            number, epoch = before * length + index, before + index / length
            self._total_steps = self._epochs * length or None
        else:
            number, epoch = int(match[1]), None
            self._total_steps = int(match[2])
        body = " " + match[match.re.groups]
        return RawStep(
            key=number,
            step=number,
            epoch=epoch,
            loss=number_after(body, " loss: "),
            step_time_s=number_after(body, " time: "),
            images_per_sec=None,
            body=body,
        )

    def finish(self, last: RawStep, gap: int) -> None:
        assert isinstance(last.body, str)
        remaining: float | None = None
        if self._total_steps is not None and last.step is not None:
            remaining = self._total_steps - last.step
        elif last.step_time_s and (match := _ETA.search(last.body)):
            days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
            eta_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
            remaining = eta_s / last.step_time_s
        # The programs say nothing at their end; after the last full log interval they are done.
        self.found.ended = remaining is not None and remaining < max(gap, 1)

    def notice(self, line: str) -> None:
        if "FPS: " in line:
            match = _FPS.search(line)
            # Two handlers print each value: the second is the same number once more.
            if match and match[1] != self._fps:
                self._fps = match[1]
                self.found.rate.add(float(match[1]))
        elif _EVALUATION.search(line):
            for key, value in _ITEM.findall(line):
                self.score(key, float(value))
        elif not self._epochs and ("max" in line) and (match := _LENGTH.search(line)):
            if "epochs" in (match[2], match[3]):
                self._epochs = int(match[1] or match[4])
        else:
            super().notice(line)


class MmcvReader(_TextReader):
    r"""`Epoch [e][i/n]\tlr: .., eta: .., time: .., data_time: .., loss_cls: .., loss: ..`."""

    NAME = "mmcv"
    OTHER_MARKS = (" - INFO - ", "(val)")
    OTHER_LINE = re.compile(
        r" - mm(?!engine)\w+ - INFO - |(?:Epoch|Iter)\(val\) \[\d+\](?:\[\d+\])?\s"
    )
    MARKS = ("Epoch [", "Iter [")
    BY_EPOCH = re.compile(rf"Epoch \[({COUNT})\]\[({COUNT})/({LENGTH})\]\s+{_ITEMS}")
    BY_ITER = re.compile(rf"Iter \[({COUNT})/({COUNT})\]\s+{_ITEMS}")


class MmengineReader(_TextReader):
    """`Epoch(train) [e][i/n]  lr: ..  eta: ..  time: ..  data_time: ..  loss: ..`."""

    NAME = "mmengine"
    OTHER_MARKS = (" - INFO - ", "(val)", "(test)")
    OTHER_LINE = re.compile(
        r" - mmengine - INFO - |(?:Epoch|Iter)\((?:val|test)\) +(?:\[\d+\])?\[\s*\d+/\d+\]"
    )
    MARKS = ("Epoch(train)", "Iter(train)")
    BY_EPOCH = re.compile(rf"Epoch\(train\)\s*\[({COUNT})\]\[\s*({COUNT})/({LENGTH})\]\s+{_ITEMS}")
    BY_ITER = re.compile(rf"Iter\(train\)\s*\[\s*({COUNT})/({COUNT})\]\s+{_ITEMS}")


class OpenMmlabJsonReader(Reader):
    """mmcv's `{"mode": "train", "epoch": 1, "iter": 50, ..}` and mmengine's scalars.json."""

    NAME = "openmmlab json"
    TIME = "seconds an iteration (mean over a log interval)"
    TELLS_END = False

    def __init__(self) -> None:
        super().__init__()
        self._last_iter = 0
        self._by_epoch = False

    def step(self, line: str) -> RawStep | None:
        if not line.startswith("{"):
            return None
        record = json_object(line)
        if record is None:
            self.torn += 1
            return None
        loss, number = as_float(record.get("loss")), as_count(record.get("iter"))
        if loss is None or number is None or record.get("mode", "train") != "train":
            for key, value in record.items():
                if (score := as_float(value)) is not None:
                    self.score(key, score)
            return None
        steps = as_count(record.get("step"))
        if steps is None:
            # mmcv counts iterations from the epoch's start, and the file does not say how many
            # an epoch has: from the second epoch on the step is not known.
            self._by_epoch |= number < self._last_iter
            self._last_iter = number
            steps = None if self._by_epoch else number
        epoch = as_count(record.get("epoch"))
        return RawStep(
            key=number + (epoch or 0) * _LONGEST_EPOCH,
            step=steps,
            epoch=epoch,
            loss=loss,
            step_time_s=as_float(record.get("time")),
            images_per_sec=None,
            body=record,
        )
