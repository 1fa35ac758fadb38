"""The files and lines in which people of the original zoo look for a run's result.

Keys, order and names are those of Ascend's ModelZoo-PyTorch; units are mended: ``TrainingTime``
is milliseconds per step of the global batch, and a number only stands in a report when a run that
ended well measured it.
"""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def case_name(result: Mapping[str, Any]) -> str:
    """``<Network>_bs<BatchSize>_<RankSize>p_<acc|perf|eval>``."""
    return f"{result['network']}_bs{result['batch_size']}_{result['world_size']}p_{result['kind']}"


def write(directory: Path, result: Mapping[str, Any]) -> list[str]:
    """Writes the report files of a run.

    Args:
        directory: the output directory.
        result: the content of ``result.json``.

    Returns:
        The lines for the console, empty for a run that did not end well.
    """
    name = case_name(result)
    well = result["status"] == "completed"
    steps = _read_lines(directory / "metrics.jsonl") if well else []
    if steps and result["kind"] != "eval":
        _write(directory / f"train_{name}_loss.txt", [f"{line['loss']:.6f}" for line in steps])
        rates = [line["images_per_sec"] for line in steps if line["images_per_sec"]]
        _write(directory / f"train_{name}_fps.log", [f"{rate:.3f}" for rate in rates])
    rows = {
        "Network": result["network"],
        "RankSize": result["world_size"],
        "BatchSize": result["batch_size"],
        "DeviceType": platform.machine(),
        "CaseName": name,
    }
    if well:
        rows |= _numbers(result)
    rows["Status"] = result["status"]
    _write(directory / f"{name}.log", [f"{key} = {value}" for key, value in rows.items()])
    return _final_lines(result) if well else []


def _numbers(result: Mapping[str, Any]) -> dict[str, str]:
    rows: dict[str, str] = {}
    throughput, metric = result["throughput"], result["metric"]
    if throughput:
        rows["ActualFPS"] = f"{throughput['images_per_sec']:.3f}"
        rows["TrainingTime"] = f"{1000 * throughput['step_time_s']:.3f}"
    if metric:
        rows["TrainAccuracy"] = f"{metric['value']:.4f}"
    if result["final_loss"] is not None:
        rows["ActualLoss"] = f"{result['final_loss']:.6f}"
    rows["E2ETrainingTime"] = f"{result['e2e_seconds']:.0f}"
    return rows


def _final_lines(result: Mapping[str, Any]) -> list[str]:
    lines = ["------------------ Final result ------------------"]
    throughput, metric = result["throughput"], result["metric"]
    if throughput:
        lines.append(f"Final Performance images/sec : {throughput['images_per_sec']:.3f}")
    if metric:
        lines.append(f"Final Train Accuracy : {metric['value']:.4f}")
    lines.append(f"E2E Training Duration sec : {result['e2e_seconds']:.0f}")
    return lines


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, lines: list[str]) -> None:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
