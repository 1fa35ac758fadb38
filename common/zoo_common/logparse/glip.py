"""GLIP's and maskrcnn_benchmark's training logs.

Formats: microsoft/GLIP maskrcnn_benchmark/engine/trainer.py and utils/metric_logger.py, and the
original zoo's copy, which logs every iteration and adds `fps:`.
"""

from __future__ import annotations

import re

from zoo_common.logparse.reader import COUNT, NUMBER, Reader, number_after
from zoo_common.logparse.records import RawStep

_MARK = "  iter: "
_FIELD = rf"(?:  [\w./@-]+(?: \w+)?: {NUMBER}(?: \({NUMBER}\))?)"
_STEP = re.compile(
    rf"  iter: ({COUNT})(  loss: ({NUMBER}) \({NUMBER}\){_FIELD}*?  time: ({NUMBER}) \({NUMBER}\)"
    rf"{_FIELD}*)\s*$"
)


class GlipReader(Reader):
    """`eta: ..  iter: N  loss: median (mean)  ..  time: ..  data: ..  [fps: ..  ]lr: ..`."""

    NAME = "maskrcnn_benchmark"
    OTHER_MARKS = (" maskrcnn_benchmark",)
    OTHER_LINE = re.compile(r" maskrcnn_benchmark(?:\.\w+)* INFO: ")
    RATE = "fps values (global batch over the time of an iteration, running median of 20)"
    TIME = "seconds an iteration (running median of 20)"

    def step(self, line: str) -> RawStep | None:
        start = line.rfind(_MARK)
        if start < 0:
            return None
        match = _STEP.match(line, start)
        if match is None:
            self.torn += "  loss: " in line
            return None
        number, body, loss, time_s = match.groups()
        step = int(number)
        return RawStep(
            key=step,
            step=step,
            epoch=None,
            loss=float(loss),
            step_time_s=float(time_s),
            images_per_sec=number_after(body, "  fps: "),
            body=body,
        )

    def notice(self, line: str) -> None:
        if "Total training time: " in line:
            self.found.ended = True
        else:
            super().notice(line)
