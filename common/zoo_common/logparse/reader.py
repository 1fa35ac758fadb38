"""What the readers of all formats share: lines about scores, crashes and COCO's evaluation."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

from zoo_common.logparse.records import Accuracy, Findings, RawStep

NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
COUNT = r"\d{1,15}"
LENGTH = r"[1-9]\d{0,14}"  # what a count is divided by
ETA = r"(?:-?\d+ days?, )?\d+:\d\d:\d\d"

PERCENT = "%"
FRACTION = "0-1"

_COCO_ROW = re.compile(
    r"Average Precision\s+\(AP\) @\[ IoU=(0\.50:0\.95|0\.50|0\.75)\s*\| "
    r"area=\s*(all|small|medium|large) \| maxDets=\s*\d+ \] = "
    rf"({NUMBER})"
)
_COCO_ROW_NAMES = {
    ("0.50:0.95", "all"): "AP",
    ("0.50", "all"): "AP50",
    ("0.75", "all"): "AP75",
    ("0.50:0.95", "small"): "APs",
    ("0.50:0.95", "medium"): "APm",
    ("0.50:0.95", "large"): "APl",
}
_COCO_TASK = re.compile(r"Evaluate annotation type \*(\w+)\*")
# A result dict as Python prints it, in the old and the new form of OrderedDict.
_DICT_TASK = re.compile(r"'(bbox|segm)'[,:] (?:OrderedDict\()?[\[{]+(.*?)[\]}]")
_DICT_AP = re.compile(rf"'(AP(?:50|75|s|m|l)?)'[,:] ({NUMBER})")

_MM_AP = re.compile(r"(?:[\w-]+/)?(bbox|segm)_mAP(?:_(50|75|s|m|l))?")
_TOP_K = re.compile(r"(?:accuracy[/_])?top-?([15])|(?:test_)?acc@?([15])")
_SEGMENTATION = frozenset(("mIoU", "mAcc", "aAcc"))

_CRASH_SIGNS = (
    "Traceback (most recent call last)",
    "Segmentation fault",
    "terminate called after throwing",
    ", stopping training",
)
_HARMLESS = ("Exception ignored in", "Logging error")
_SIGNALLED = ("KeyboardInterrupt", "got signal: 15", "got signal: 2")


class Reader:
    """Reads the lines of one format; a reader serves one pass over one file.

    Attributes:
        NAME: the format's name.
        OTHER_MARKS: a line with one of these is worth a look with OTHER_LINE.
        OTHER_LINE: a line that proves the format though it is no training step (evaluation only,
            or a crash before the first step).
        RATE: what the format's images per second mean; empty where it has none.
        TIME: what the format's seconds a step mean.
        TIME_IS_SO_FAR: the step time is a mean over the run so far, so the last one counts.
        TELLS_END: the format's program says that it is done.
        AP_SCALE: what turns AP in a printed dict into a fraction.
        LR: what stands before the learning rate in a step's text.
        LOSS: the name of the loss whose parts are asked for.
        LOSS_PART: finds (name, value) of these in a step's text.
    """

    NAME: ClassVar[str]
    OTHER_MARKS: ClassVar[tuple[str, ...]] = ()
    OTHER_LINE: ClassVar[re.Pattern[str]] = re.compile("")
    RATE: ClassVar[str] = ""
    TIME: ClassVar[str] = "seconds a step"
    TIME_IS_SO_FAR: ClassVar[bool] = False
    TELLS_END: ClassVar[bool] = True
    AP_SCALE: ClassVar[float] = 1.0
    LR: ClassVar[str] = " lr: "
    LOSS: ClassVar[str] = "loss"
    LOSS_PART: ClassVar[re.Pattern[str]] = re.compile(rf"\s(\w*loss\w*): ({NUMBER})")

    def __init__(self) -> None:
        self.found = Findings()
        self.torn = 0
        self._task = ""
        self._previous = ""

    def step(self, line: str) -> RawStep | None:
        """Return what a step line says, None for every other line."""
        raise NotImplementedError

    def details(self, raw: RawStep) -> tuple[float | None, dict[str, float]]:
        """Return the learning rate and the parts of the loss of a step."""
        if isinstance(raw.body, str):
            rate = number_after(raw.body, self.LR)
            parts = {name: float(value) for name, value in self.LOSS_PART.findall(raw.body)}
        else:
            rate = as_float(raw.body.get("lr"))
            numbers = {name: as_float(raw.body[name]) for name in raw.body if "loss" in name}
            parts = {name: value for name, value in numbers.items() if value is not None}
        parts.pop(self.LOSS, None)
        return rate, parts

    def finish(self, last: RawStep, gap: int) -> None:
        """Look at the last step (``gap`` steps after the one before it) for a sign of the end."""

    def notice(self, line: str) -> None:
        """Take up what a line says that is no training step."""
        if "Average Precision" in line:
            self._coco_row(line)
        elif "Evaluate annotation type" in line:
            if match := _COCO_TASK.search(line):
                self._task = match[1]
        elif "OrderedDict(" in line:
            self._result_dict(line)
        elif any(sign in line for sign in _CRASH_SIGNS):
            if not any(word in self._previous for word in _HARMLESS):
                self.found.tracebacks += 1
        elif self.found.tracebacks and any(word in line for word in _SIGNALLED):
            self.found.interrupts += 1
        self._previous = line

    def score(self, key: str, value: float) -> None:
        """Keep a score that an OpenMMLab or DeiT log names ``key``, if it is one we know."""
        if match := _MM_AP.fullmatch(key):
            self._keep_ap(match[1], "AP" + (match[2] or ""), value)
        elif match := _TOP_K.fullmatch(key):
            self.found.accuracy[f"top{match[1] or match[2]}"] = Accuracy(value, PERCENT)
        elif key in _SEGMENTATION:
            # mmseg printed fractions first and per cent later.
            self.found.accuracy[key] = Accuracy(value, PERCENT if value > 1 else FRACTION)

    def _keep_ap(self, task: str, name: str, value: float) -> None:
        if value >= 0:  # COCO says -1 where there is nothing to find
            self.found.accuracy[f"{task}/{name}" if task else name] = Accuracy(value, FRACTION)

    def _coco_row(self, line: str) -> None:
        if match := _COCO_ROW.search(line):
            name = _COCO_ROW_NAMES.get((match[1], match[2]))
            if name:
                self._keep_ap(self._task, name, float(match[3]))

    def _result_dict(self, line: str) -> None:
        for task, content in _DICT_TASK.findall(line):
            for name, value in _DICT_AP.findall(content):
                self._keep_ap(task, name, float(value) * self.AP_SCALE)
        if "_mAP" in line:
            for key, value in re.findall(rf"'(\w+_mAP\w*)', ({NUMBER})\)", line):
                self.score(key, float(value))


class CocoReader(Reader):
    """The output of an evaluation on COCO, without a word from the program that ran it."""

    NAME = "coco evaluation"
    OTHER_MARKS = ("Average Precision",)
    OTHER_LINE = _COCO_ROW
    TELLS_END = False

    def step(self, line: str) -> RawStep | None:
        return None


def number_after(text: str, key: str) -> float | None:
    """Return the number that follows ``key`` in ``text`` (up to a blank or comma), if any."""
    start = text.find(key)
    if start < 0:
        return None
    start += len(key)
    start += text.startswith(" ", start)
    stop = text.find(" ", start)
    word = text[start:stop] if stop >= 0 else text[start:]
    try:
        return float(word.rstrip(",\t"))
    except ValueError:  # detectron2 prints "lr: N/A" on its first line
        return None


def as_float(value: Any) -> float | None:
    """Return a JSON number as float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def as_count(value: Any) -> int | None:
    """Return a JSON number that can count steps or epochs, None for anything else."""
    return value if type(value) is int and 0 <= value < 10**15 else None


def json_object(line: str) -> dict[str, Any] | None:
    """Return the JSON object that a line is, None if it is none (a line cut by a kill)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
