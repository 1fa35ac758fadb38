"""The records of this zoo's own runs: metrics.jsonl, evaluations.jsonl and result.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo_common.errors import UserError
from zoo_common.logparse.reader import Reader, as_count, as_float, json_object
from zoo_common.logparse.records import STATUSES, Accuracy, LogSummary, RawStep

NAME = "zoo run"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
RESULT_FILE = "result.json"
_RESULT_KEYS = {"status", "metric", "throughput"}
_LARGEST_RESULT_BYTES = 1 << 20


class OwnReader(Reader):
    """metrics.jsonl, a JSON object a log step; evaluations.jsonl, one an evaluation."""

    NAME = NAME
    OTHER_MARKS = ('"metrics": {',)
    OTHER_LINE = re.compile(r'^\{.*"metrics": \{')
    RATE = "images_per_sec records (all ranks)"
    TIME = "step_time_s records"
    TELLS_END = False

    def step(self, line: str) -> RawStep | None:
        if '"losses"' not in line:
            return None
        record = json_object(line)
        if record is None:
            self.torn += 1
            return None
        step = as_count(record.get("step"))
        if step is None:
            return None
        return RawStep(
            key=step,
            step=step,
            epoch=as_float(record.get("epoch")),
            loss=as_float(record.get("loss")),
            step_time_s=as_float(record.get("step_time_s")),
            images_per_sec=as_float(record.get("images_per_sec")),
            body=record,
        )

    def details(self, raw: RawStep) -> tuple[float | None, dict[str, float]]:
        assert not isinstance(raw.body, str)
        losses = raw.body.get("losses")
        parts = losses if isinstance(losses, dict) else {}
        named = {name: number for name, v in parts.items() if (number := as_float(v)) is not None}
        return as_float(raw.body.get("lr")), named

    def notice(self, line: str) -> None:
        if '"metrics"' not in line:
            return
        metrics = (json_object(line) or {}).get("metrics")
        if isinstance(metrics, dict):
            for name, value in metrics.items():
                if (number := as_float(value)) is not None:
                    self.found.accuracy[name] = Accuracy(number, "")


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the result record that ``path`` holds, None if it holds something else.

    Raises:
        UserError: a file named result.json that is cut or holds no result record.
    """
    if not path.is_file():
        return None
    expected = path.name == RESULT_FILE
    try:
        with path.open("rb") as stream:
            text = stream.read(_LARGEST_RESULT_BYTES)
        record = json.loads(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if expected:
            raise UserError(f"{path} is no valid JSON ({error}): it was cut or edited") from error
        return None
    if isinstance(record, dict) and record.keys() >= ({"status"} if expected else _RESULT_KEYS):
        return record
    if expected:
        raise UserError(f"{path} has no `status`: it is no record of a run of this zoo")
    return None


def with_result(summary: LogSummary, result: Mapping[str, Any]) -> LogSummary:
    """Put the run's result over what its metrics say; a run that failed keeps no numbers.

    Args:
        summary: of metrics.jsonl and evaluations.jsonl, or of nothing.
        result: the content of result.json.
    """
    status = result.get("status")
    summary = replace(
        summary,
        status=status if status in STATUSES else "unknown",
        steps=as_count(result.get("steps")) or summary.steps,
        epochs=as_float(result.get("epochs")) or summary.epochs,
    )
    if status == "failed":
        return replace(
            summary,
            images_per_sec=None,
            steps_per_sec=None,
            throughput_from="none: the run failed",
            last_loss=None,
            recent_loss=None,
            accuracy={},
        )
    speed = _mapping(result.get("throughput"))
    step_time = as_float(speed.get("step_time_s"))
    if as_float(speed.get("images_per_sec")) is not None:
        summary = replace(
            summary,
            images_per_sec=as_float(speed["images_per_sec"]),
            steps_per_sec=1 / step_time if step_time else None,
            throughput_from=f"{RESULT_FILE}: {speed.get('how', 'not said how')}",
        )
    summary = replace(summary, accuracy=_scores(result) or summary.accuracy)
    final_loss = as_float(result.get("final_loss"))
    return summary if final_loss is None else replace(summary, last_loss=final_loss)


def _scores(result: Mapping[str, Any]) -> dict[str, Accuracy]:
    """Return the run's last scores; the record states a unit for its main one only."""
    metrics, main = _mapping(result.get("metrics")), _mapping(result.get("metric"))
    scores = {
        k: Accuracy(v, "") for k, value in metrics.items() if (v := as_float(value)) is not None
    }
    if (value := as_float(main.get("value"))) is not None:
        scores[str(main.get("name"))] = Accuracy(value, str(main.get("unit") or ""))
    return scores


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def without_result(summary: LogSummary) -> LogSummary:
    """Say that a run's directory without a result is of a run that did not end."""
    return replace(summary, status="unfinished")
