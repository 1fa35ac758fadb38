"""Compares a model of this zoo with numbers that its upstream recorded.

    python tools/parity.py MODEL_DIR CASE.json [--tol TOL] [--device npu]

A case is CASE.json and CASE.safetensors: a tree with the inputs, the weights and what upstream
made of them. The module ``<package>/parity.py`` of MODEL_DIR computes the same things under the
same names:

    GIVEN                   fnmatch patterns of the paths that a case gives; the rest is recorded
    TOLERANCE               the largest relative difference that agrees in float64, and
    FLOAT32_TOLERANCE       in float32; --tol overrides both
    compute(case, device, dtype) -> tree
                            ``case`` is the JSON's tree with tensors in the place of their paths,
                            on the CPU, and under ``directory`` where it was read from; the tree's
                            tensors may be anywhere

On a CPU ``dtype`` is float64, so that a difference shows a mistake and not rounding. Accelerators
compute in float32: NPUs lack most operators in float64.

A recorded thing is a tensor, a tensor's summary, a number, a text, or a list of numbers or texts.
Its relative difference is max|ours - recorded| / max|recorded| over the whole thing. Of a
summary, samples count so, and mean, standard deviation, sum and norm each in relation to
themselves (the mean to the mean magnitude). Texts are equal or not. Parameters whose recorded
gradient is below 1e-9 of the largest are rounding noise and left out, unless ours is no noise.

Where upstream's rounding decides, as of a pixel at the threshold, ``compute`` may give in the place
of numbers ``{"value": numbers, "slack": how far off each may be}``. Then only what is further off
counts; the line says so, and how far off it was.

The last line is ``parity: N compared, M beyond TOL``; the exit code is 1 if M > 0, and 2 if the
comparison could not be made.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NOISE = 1e-9  # of the largest gradient: rounding
GRADIENTS = ("grad_norm", "grad_norms")
CHANGES = "after_step_delta_norm"
MISSING = object()


def load_case(path: Path) -> dict[str, Any]:
    """The tree of a case, with tensors in the place of their paths.

    Raises:
        UserError: A file is missing, broken or does not hold what the other one names.
    """
    from safetensors import SafetensorError, safe_open

    from zoo_common.errors import UserError

    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no parity case: its top is not an object.")
    tensors_path = path.with_suffix(".safetensors")
    if not tensors_path.is_file():
        raise UserError(f"{path} has no {tensors_path.name} beside it, where its tensors belong.")
    try:
        with safe_open(tensors_path, framework="pt") as file:
            known = set(file.keys())

            def fill(node: Any) -> Any:
                if isinstance(node, dict):
                    if _is_tensor(node):
                        if node["tensor"] not in known:
                            raise UserError(
                                f"{path.name} names the tensor {node['tensor']!r}, which "
                                f"{tensors_path.name} does not hold."
                            )
                        return file.get_tensor(node["tensor"])
                    return {key: fill(value) for key, value in node.items()}
                return [fill(value) for value in node] if isinstance(node, list) else node

            filled: dict[str, Any] = fill(tree)
            return filled
    except SafetensorError as error:
        raise UserError(f"{tensors_path} is broken: {error}.") from error


def load_model_parity(model_dir: Path) -> ModuleType:
    """The module ``<package>/parity.py`` of a model directory.

    Raises:
        UserError: There is no such directory, or not exactly one such module in it.
    """
    from zoo_common.errors import UserError

    if not model_dir.is_dir():
        raise UserError(f"there is no model directory {model_dir}.")
    found = sorted(model_dir.glob("*/parity.py"))
    if len(found) != 1:
        raise UserError(
            f"{model_dir} needs one <package>/parity.py to compare with, but has {len(found)}."
        )
    sys.path.insert(0, str(model_dir.resolve()))
    return importlib.import_module(f"{found[0].parent.name}.parity")


def place(name: str) -> tuple[torch.device, torch.dtype]:
    """The device of that name with its switches set, and the dtype to compare in on it.

    Raises:
        UserError: There is no such device, or it cannot be used.
    """
    import torch

    from zoo_common import device as devices

    device = devices.resolve(name)
    # HF32 would keep fewer bits than the tolerance asks for.
    devices.configure(device, float32="fp32")
    return device, torch.float64 if device.type == "cpu" else torch.float32


def _is_tensor(node: Any) -> bool:
    return isinstance(node, dict) and set(node) == {"tensor"} and isinstance(node["tensor"], str)


def _is_summary(node: Any) -> bool:
    return isinstance(node, dict) and node.get("summary") is True


def recorded_things(
    node: Any, ours: Any, given: Sequence[str], path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(path, recorded, ours) of each recorded thing below ``node``; ours may be MISSING."""
    if any(fnmatchcase(path, pattern) for pattern in given):
        return
    children: list[tuple[Any, Any]] | None = None
    if isinstance(node, dict) and not _is_summary(node):
        children = list(node.items())
    elif isinstance(node, list) and not _is_flat(node):
        children = list(enumerate(node))
    if children is None:
        yield path, node, ours
        return
    for key, child in children:
        below = f"{path}/{key}" if path else str(key)
        yield from recorded_things(child, _child(ours, key), given, below)
    if isinstance(node, list) and isinstance(ours, Sequence) and len(ours) > len(node):
        yield f"{path}/{len(node)}", None, ours[len(node)]


def _is_flat(values: list[Any]) -> bool:
    """Whether a list is one thing: all numbers (truth values too), or all texts."""
    return all(isinstance(v, (int, float)) for v in values) or all(
        isinstance(v, str) for v in values
    )


def _child(ours: Any, key: Any) -> Any:
    if isinstance(ours, Mapping):
        return ours.get(key, MISSING)
    if isinstance(ours, Sequence) and not isinstance(ours, str) and isinstance(key, int):
        return ours[key] if key < len(ours) else MISSING
    return MISSING


def difference(recorded: Any, ours: Any) -> tuple[float, str]:
    """The relative difference (infinite where it cannot be told), and a remark."""
    if recorded is None:
        return (0.0, "") if ours is None or ours is MISSING or _is_zero(ours) else (math.inf, "")
    if ours is MISSING or ours is None:
        return math.inf, "not computed"
    if _has_slack(ours):
        return _difference_beyond(recorded, ours["value"], ours["slack"])
    if _is_summary(recorded):
        return _summary_difference(recorded, ours)
    if isinstance(recorded, str) or (isinstance(recorded, list) and _has_texts(recorded)):
        return (0.0, "") if recorded == ours else (math.inf, f"{ours!r:.60}")
    return _number_difference(recorded, ours)


def _has_texts(values: list[Any]) -> bool:
    return any(isinstance(v, str) for v in values)


def _is_zero(ours: Any) -> bool:
    return isinstance(ours, (int, float)) and ours == 0


def _number_difference(recorded: Any, ours: Any) -> tuple[float, str]:
    import torch

    try:
        ours = ours.detach().cpu() if isinstance(ours, torch.Tensor) else ours
        a = torch.as_tensor(ours, dtype=torch.float64)
        b = torch.as_tensor(recorded, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return math.inf, f"a {type(ours).__name__} instead of numbers"
    if a.shape != b.shape:
        return math.inf, f"shape {tuple(a.shape)} instead of {tuple(b.shape)}"
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(
        a[~finite].nan_to_num(), b[~finite].nan_to_num()
    ):
        return math.inf, "infinite or undefined elsewhere"
    if not finite.any():
        return 0.0, ""
    largest = b[finite].abs().max().item()
    absolute = (a - b)[finite].abs().max().item()
    return (absolute / largest if largest else absolute), ""


def _has_slack(ours: Any) -> bool:
    return isinstance(ours, Mapping) and set(ours) == {"value", "slack"}


def _difference_beyond(recorded: Any, value: Any, slack: Any) -> tuple[float, str]:
    """The difference from the nearest number that is within the slack."""
    import torch

    relative, remark = _number_difference(recorded, value)
    if math.isinf(relative):
        return relative, remark
    value, slack, wanted = (
        torch.as_tensor(each).detach().cpu().double() for each in (value, slack, recorded)
    )
    nearest = wanted.clamp(value - slack, value + slack)
    return _number_difference(recorded, nearest)[0], f"{relative:.1e} within what rounding decides"


def _summary_difference(recorded: Mapping[str, Any], ours: Any) -> tuple[float, str]:
    import torch

    if not isinstance(ours, torch.Tensor):
        return math.inf, f"a {type(ours).__name__} instead of a tensor"
    if list(ours.shape) != recorded["shape"]:
        return math.inf, f"shape {tuple(ours.shape)} instead of {tuple(recorded['shape'])}"
    flat = ours.detach().cpu().double().flatten()
    samples, _ = _number_difference(recorded["sample"], flat[recorded["sample_index"]])
    magnitude = recorded["abssum"] / len(flat)
    parts = [samples, abs(flat.mean().item() - recorded["mean"]) / (magnitude or 1.0)]
    for name, value in (
        ("std", flat.std(correction=0)),
        ("abssum", flat.abs().sum()),
        ("norm", flat.norm()),
    ):
        parts.append(abs(value.item() - recorded[name]) / (abs(recorded[name]) or 1.0))
    return (math.inf if any(map(math.isnan, parts)) else max(parts)), "summary"


def noise_paths(things: Sequence[tuple[str, Any, Any]], tolerance: float) -> set[str]:
    """Paths of gradients (and of these parameters' changes) that are rounding noise on both sides.

    "Both": ours may be as large as ``tolerance`` of the largest recorded gradient.
    """
    groups: dict[str, list[tuple[str, float, Any]]] = {}
    for path, recorded, ours in things:
        group, _, name = path.rpartition("/")
        if group.rpartition("/")[2] in GRADIENTS and isinstance(recorded, float):
            ours = ours["value"] if _has_slack(ours) else ours
            groups.setdefault(group, []).append((name, recorded, ours))
    noise: set[str] = set()
    names: set[str] = set()
    for group, members in groups.items():
        largest = max(recorded for _, recorded, _ in members)
        for name, recorded, ours in members:
            small = isinstance(ours, float) and ours <= tolerance * largest
            if recorded < NOISE * largest and (small or ours is MISSING or ours is None):
                noise.add(f"{group}/{name}")
                names.add(name)
    for path, _, _ in things:
        group, _, name = path.rpartition("/")
        if group.rpartition("/")[2] == CHANGES and name in names:
            noise.add(path)
    return noise


def compare(
    case: Mapping[str, Any], ours: Any, given: Sequence[str], tolerance: float
) -> tuple[int, int]:
    """Prints a line for each recorded thing; how many were compared, how many are beyond."""
    things = list(recorded_things(case, ours, given))
    noise = noise_paths(things, tolerance)
    width = max((len(path) for path, _, _ in things), default=0)
    compared = beyond = 0
    for path, recorded, ours in things:
        if path in noise:
            print(f"{path:{width}}  left out: rounding noise")
            continue
        relative, remark = difference(recorded, ours)
        compared += 1
        verdict = ""
        if not relative <= tolerance:
            beyond += 1
            verdict = "  BEYOND"
        print(f"{path:{width}}  {relative:8.1e}{verdict}{'  ' + remark if remark else ''}")
    return compared, beyond


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    parser = argparse.ArgumentParser(
        description="Compare a model with numbers that its upstream recorded.",
        epilog="Exit code: 0 all agree, 1 some do not, 2 the comparison could not be made.",
    )
    parser.add_argument("model_dir", type=Path, help="a model's directory")
    parser.add_argument("case", type=Path, help="CASE.json, with CASE.safetensors beside it")
    parser.add_argument("--tol", type=float, help="largest relative difference that agrees")
    parser.add_argument("--device", default="cpu", help="auto, npu, cuda or cpu (default cpu)")
    options = parser.parse_args(argv)
    try:
        import safetensors  # noqa: F401  (load_case's, checked here with a message)

        from zoo_common.errors import UserError
    except ImportError as error:
        print(
            f"parity: {error.name} is not installed in {sys.executable}: use the environment "
            "that tools/quickstart.sh makes.",
            file=sys.stderr,
        )
        return 2
    try:
        device, dtype = place(options.device)
        module = load_model_parity(options.model_dir)
        case = load_case(options.case)
        rounded = dtype.itemsize < 8
        tolerance = module.FLOAT32_TOLERANCE if rounded else module.TOLERANCE
        if options.tol is not None:
            tolerance = options.tol
        ours = module.compute({**case, "directory": str(options.case.parent)}, device, dtype)
        compared, beyond = compare(case, ours, module.GIVEN, tolerance)
    except UserError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    print(f"parity: {compared} compared, {beyond} beyond {tolerance:g}")
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
