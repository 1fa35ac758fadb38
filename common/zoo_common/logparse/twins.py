"""Twins' and DeiT's training logs: MetricLogger's lines, and one JSON line an epoch.

Formats: Meituan-AutoML/Twins utils.py and main.py (DeiT's); the original zoo adds `fps:`.
"""

from __future__ import annotations

import re

from zoo_common.logparse.reader import (
    COUNT,
    ETA,
    LENGTH,
    NUMBER,
    PERCENT,
    Reader,
    as_count,
    as_float,
    json_object,
)
from zoo_common.logparse.records import Accuracy, RawStep

_MARK = "Epoch: ["
_MEAN = rf"(?: \({NUMBER}\))?"
_FIELD = rf"(?:  [\w./@-]+(?: \w+)?: ?{NUMBER}{_MEAN})"
# The whole line is checked, so a line that other output cuts is dropped and never misread.
_STEP = re.compile(
    rf"Epoch: \[({COUNT})(?:/\d+)?\]\s+\[\s*({COUNT})/({LENGTH})\]  eta: {ETA}"
    rf"({_FIELD}*?  loss: ({NUMBER}){_MEAN}{_FIELD}*?)  time: ({NUMBER}){_MEAN}"
    rf"(?:  fps: ?({NUMBER}))?{_FIELD}*\s*$"
)
_SCORES = re.compile(rf"\* Acc@1 ({NUMBER}) Acc@5 ({NUMBER})(?!\S)")


class TwinsReader(Reader):
    """`Epoch: [e]  [i/n]  eta: ..  lr: ..  loss: median (mean)  time: ..  [fps:..  ]data: ..`."""

    NAME = "twins"
    OTHER_MARKS = ("* Acc@1",)
    OTHER_LINE = _SCORES
    RATE = "fps lines (global batch over the mean time of the last 20 iterations)"
    TIME = "seconds an iteration (mean of the last 20)"

    def step(self, line: str) -> RawStep | None:
        start = line.rfind(_MARK)
        if start < 0:
            return None
        match = _STEP.match(line, start)
        if match is None:
            # the line at an epoch's end is "Epoch: [e] Total time: ..."
            self.torn += "] Total time" not in line
            return None
        epoch, index, length, body, loss, time_s, fps = match.groups()
        done = int(index) + 1
        step = int(epoch) * int(length) + done
        # The zoo prints fps 0 for the first 25 iterations, when it has not measured yet.
        return RawStep(
            key=step,
            step=step,
            epoch=int(epoch) + done / int(length),
            loss=float(loss),
            step_time_s=float(time_s),
            images_per_sec=float(fps) or None if fps else None,
            body=body,
        )

    def notice(self, line: str) -> None:
        if "* Acc@1" in line:
            if match := _SCORES.search(line):
                self.found.accuracy["top1"] = Accuracy(float(match[1]), PERCENT)
                self.found.accuracy["top5"] = Accuracy(float(match[2]), PERCENT)
        elif line.startswith("Training time "):
            self.found.ended = True
        else:
            super().notice(line)


class DeitJsonReader(Reader):
    """`{"train_lr": .., "train_loss": .., "test_acc1": .., "epoch": ..}`, a line an epoch."""

    NAME = "deit json"
    TELLS_END = False

    def step(self, line: str) -> RawStep | None:
        if '"train_loss"' not in line:
            return None
        record = json_object(line)
        if record is None or "epoch" not in record or "train_loss" not in record:
            self.torn += 1
            return None
        for key, value in record.items():
            if key.startswith("test_acc") and (number := as_float(value)) is not None:
                self.score(key, number)
        epoch = as_count(record["epoch"])
        if epoch is None:
            return None
        return RawStep(
            key=epoch,
            step=None,
            epoch=epoch + 1,
            loss=as_float(record["train_loss"]),
            step_time_s=None,
            images_per_sec=None,
            body=record,
        )

    def details(self, raw: RawStep) -> tuple[float | None, dict[str, float]]:
        assert not isinstance(raw.body, str)
        return as_float(raw.body.get("train_lr")), {}
