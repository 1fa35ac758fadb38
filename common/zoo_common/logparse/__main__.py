"""`python3 -m zoo_common.logparse FILE...`: a table of what logs say."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo_common.errors import UserError
from zoo_common.logparse.formats import FORMATS, parse
from zoo_common.logparse.records import Accuracy, LogSummary

_COLUMNS = ("file", "format", "steps", "throughput", "last loss", "accuracy", "status")
_MINOR_SCORES = ("top5", "/AP50", "/AP75", "/APs", "/APm", "/APl")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, or JSON, and return 1 if a file could not be read."""
    arguments = _parser().parse_args(argv)
    summaries: list[tuple[str, LogSummary]] = []
    records: list[dict[str, Any]] = []
    failed = False
    for name in arguments.files:
        try:
            summary = parse(name, batch=arguments.batch).summary
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            records.append({"file": name, "error": str(error)})
            failed = True
        else:
            summaries.append((name, summary))
            records.append({"file": name, **asdict(summary)})
    if arguments.json:
        print(json.dumps(_json_value(records), indent=2, allow_nan=False))
    elif summaries:
        _print_table([_row(name, summary) for name, summary in summaries])
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m zoo_common.logparse",
        description="Reads training logs and prints what they say. Exit code 1: a file could not "
        "be read (the others are printed).",
        epilog=f"Formats, told by content: {', '.join(FORMATS)}.",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a log (gzip as well) or a run's output directory"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="images a step over all ranks, for logs that state only times",
    )
    return parser


def _row(name: str, summary: LogSummary) -> tuple[str, ...]:
    if summary.images_per_sec is not None:
        throughput = f"{summary.images_per_sec:.1f} images/s"
    elif summary.steps_per_sec is not None:
        throughput = f"{summary.steps_per_sec:.3g} steps/s"
    else:
        throughput = "-"
    if summary.steps is not None:
        steps = str(summary.steps)
    else:
        steps = "-" if summary.epochs is None else f"{summary.epochs:g} epochs"
    return (
        name,
        summary.format,
        steps,
        throughput,
        "-" if summary.last_loss is None else f"{summary.last_loss:.4g}",
        _scores(summary.accuracy),
        summary.status,
    )


def _scores(accuracy: dict[str, Accuracy]) -> str:
    main_scores = {k: v for k, v in accuracy.items() if not k.endswith(_MINOR_SCORES)}
    texts = [
        f"{name} {score.value:.4g}{' %' if score.unit == '%' else ''}"
        for name, score in main_scores.items()
    ]
    return ", ".join(texts) or "-"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    for row in (_COLUMNS, tuple("-" * width for width in widths), *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _json_value(value: Any) -> Any:
    """Return ``value`` with numbers that JSON has not (a loss that is nan) as strings."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.exit(main())
