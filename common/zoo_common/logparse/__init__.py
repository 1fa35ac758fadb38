"""Reads training logs: this zoo's records, the original zoo's logs, and the upstream projects'.

    log = parse("train_0.log")
    print(log.summary.images_per_sec, log.summary.throughput_from)
    losses = [step.loss for step in log.steps()]

`python3 -m zoo_common.logparse FILE...` prints a table of summaries. The format is told by the
content. Files are read line by line, so a log of any size needs little memory. Lines that other
processes' output cuts are dropped and counted; a number is never guessed.
"""

from zoo_common.logparse.formats import FORMATS, Log, parse
from zoo_common.logparse.records import STATUSES, Accuracy, LogStep, LogSummary

__all__ = ["FORMATS", "STATUSES", "Accuracy", "Log", "LogStep", "LogSummary", "parse"]
