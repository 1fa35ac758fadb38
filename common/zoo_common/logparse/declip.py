"""DeCLIP's training logs.

Formats: Sense-GVT/DeCLIP prototype/solver/declip_solver.py, and the original zoo's runner.py, which
logs every step and adds `FPS`.
"""

from __future__ import annotations

import re

from zoo_common.logparse.reader import COUNT, NUMBER, PERCENT, Reader
from zoo_common.logparse.records import Accuracy, RawStep

_MARK = "Iter: ["
_PAIR = rf"({NUMBER}) \(({NUMBER})\)"
_STEP = re.compile(
    rf"Iter: \[({COUNT})/({COUNT})\]\tTime {_PAIR}\t(?:FPS {_PAIR}\t)?Data {NUMBER} \({NUMBER}\)\t"
    rf"Loss ({NUMBER}) \({NUMBER}\)((?:\t[A-Za-z_][\w@ ]* {NUMBER}(?: \({NUMBER}\))?)+)"
    r"\tRemaining Time [^\t]*\)\s*$"
)
_SCORE = re.compile(rf'"top([15])": ({NUMBER})(?=[,}}\s]|$)')


class DeclipReader(Reader):
    r"""`Iter: [n/total]\tTime v (mean)\t[FPS v (mean)\t]Data ..\tLoss v (mean)\t..`."""

    NAME = "declip"
    OTHER_MARKS = ('"top',)
    OTHER_LINE = re.compile(rf'^\s+"top[15]": {NUMBER},?\s*$')
    RATE = "FPS values (global batch over the time of a step)"
    TIME = "seconds a step"
    LR = " LR "
    LOSS_PART = re.compile(rf"  ([A-Z][\w ]* Loss) ({NUMBER}) \(")

    def __init__(self) -> None:
        super().__init__()
        self._last = -1
        self._interval = 0
        self._first_is_zero = False

    def step(self, line: str) -> RawStep | None:
        start = line.rfind(_MARK)
        if start < 0:
            return None
        match = _STEP.match(line, start)
        if match is None:
            self.torn += 1
            return None
        count, total, time_s, mean_time_s, fps, mean_fps, loss, body = match.groups()
        number = int(count)
        if self._last < 0:
            # Performance runs of the original zoo count from 0, all others from 1.
            self._first_is_zero = number == 0
        elif number > self._last:
            gap = number - self._last
            self._interval = min(self._interval or gap, gap)
        self._last = number
        if number == int(total) - self._first_is_zero:
            self.found.ended = True
        if self._interval > 1:  # the mean covers the steps that are not logged
            time_s, fps = mean_time_s, mean_fps
        return RawStep(
            key=number,
            step=number + self._first_is_zero,
            epoch=None,
            loss=float(loss),
            step_time_s=float(time_s),
            images_per_sec=float(fps) if fps else None,
            body=body.replace("\t", "  "),
        )

    def notice(self, line: str) -> None:
        if '"top' in line:
            for k, value in _SCORE.findall(line):
                self.found.accuracy[f"top{k}"] = Accuracy(float(value), PERCENT)
        elif "Training has been completed" in line:
            self.found.ended = True
        else:
            super().notice(line)
