"""Records which operators a model dispatches on the simulated NPU, and how it would run them.

    survey = take_survey(model, versions)
    survey.operators["aten::topk"].phases      # {"forward": 8, "evaluation": 5}
    survey.versions["2.6"].fallbacks           # what torch_npu 2.6 would run on the CPU
    survey.broken                              # rules of npu_rules.py that were broken

To be run where ``npu_simulator.is_here()``.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import npu_sim
from check_static import import_steps
from model_dirs import ModelDir
from npu_rules import Broken, CallWatch, broken_by
from npu_sim.native import native_operators
from static_recorder import Frame, innermost, short
from zoo_common import device as devices
from zoo_common.errors import UserError

_SITE = "/site-packages/"

FORWARD, BACKWARD, OPTIMIZER, EVALUATION = "forward", "backward", "optimizer", "evaluation"
PHASES = (FORWARD, BACKWARD, OPTIMIZER, EVALUATION)

# What a model is recorded in: the names of options --amp and --dtype.
PRECISIONS = (("O0", "auto"), ("O1", "bfloat16"), ("O1", "float16"))

# Of the simulator, where torch_npu has aten::copy_ and aten::convolution.
OF_SIMULATOR = {
    "aten::_copy_from": "aten::copy_",
    "aten::convolution_overrideable": "aten::convolution",
    "aten::convolution_backward_overrideable": "aten::convolution_backward",
}


@dataclass
class Use:
    """How a model uses an operator.

    Attributes:
        phases: calls in the step that calls it most, by phase; parts of other operators too.
        dtypes: number formats of the tensors that it takes, or makes if it takes none.
    """

    phases: Counter[str] = field(default_factory=Counter)
    dtypes: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Fallback:
    """An operator that runs on the CPU, or a broken rule, and the line of ours that causes it."""

    what: str
    phase: str
    where: str


@dataclass
class Version:
    """What a version of torch_npu makes of a model's operators.

    Attributes:
        native: names of those that it has kernels for.
        decomposed: those that torch computes by others, and which these are.
        fallbacks: those that it has no way to run but on the CPU.
    """

    native: set[str] = field(default_factory=set)
    decomposed: dict[str, set[str]] = field(default_factory=dict)
    fallbacks: set[Fallback] = field(default_factory=set)

    @property
    def seen(self) -> set[str]:
        """All names, which decide what this version does."""
        return self.native | set(self.decomposed) | {found.what for found in self.fallbacks}


@dataclass
class Survey:
    """What was recorded of a model.

    Attributes:
        operators: by name; of the newest version asked for.
        versions: by version of torch.
        broken: broken rules, with the phase and precision.
    """

    operators: dict[str, Use]
    versions: dict[str, Version]
    broken: dict[Broken, Fallback]


@dataclass(frozen=True)
class Call:
    """An operator that was dispatched, and when."""

    operator: Any
    phase: str


def take_survey(model: ModelDir, versions: Sequence[str]) -> Survey:
    """Records steps of a model for some versions of torch_npu.

    A version that treats every operator of another's recording alike takes the same way through
    torch's dispatcher, so it is not recorded again.

    Raises:
        UserError: the model has no module ``static`` with ``build`` and ``evaluation``.
    """
    static = load_static(model)
    done: dict[str, Version] = {}
    operators: dict[str, Use] = {}
    broken: dict[Broken, Fallback] = {}
    for version in reversed(versions):
        native = native_operators(version)
        for other, known in done.items():
            if known.seen & native == known.seen & native_operators(other):
                done[version] = known
                break
        else:
            done[version] = Version()
            for precision in PRECISIONS:
                used, rules = record_precision(static, precision, native, done[version])
                if version == versions[-1]:
                    merge(operators, used)
                    broken |= {rule: found for rule, found in rules.items() if rule not in broken}
    return Survey(operators, {version: done[version] for version in versions}, broken)


def load_static(model: ModelDir) -> ModuleType:
    """The model's module of steps.

    Raises:
        UserError: it is not there, or lacks a function.
    """
    sys.path.insert(0, str(model.path))
    place = f"{model.package.name}.static"
    static = import_steps(place, model.name)
    for name in ("build", "evaluation"):
        if not callable(getattr(static, name, None)):
            raise UserError(f"the module {place} has no function {name}(device).")
    return static


def record_precision(
    static: ModuleType, precision: tuple[str, str], native: frozenset[str], version: Version
) -> tuple[dict[str, Use], dict[Broken, Fallback]]:
    """Records the first two training steps, the first of which makes the optimizer's state.

    And an evaluation step.

    Args:
        static: builds the steps.
        precision: one of PRECISIONS.
        native: the operators that the device has kernels for.
        version: what was found is added here.
    """
    device = devices.resolve("npu")
    used: dict[str, Use] = {}
    broken: dict[Broken, Fallback] = {}
    for build, phases, steps in (
        (static.build, (FORWARD, BACKWARD, OPTIMIZER), 2),
        (static.evaluation, (EVALUATION,) * 3, 1),
    ):
        step = build(device, *precision)
        for index in range(steps):
            calls, watched = record_step(step, index, native, phases)
            merge(used, count_uses(calls))
            classify(calls, version)
            for rule, found in _broken(calls, watched, phases[0], "/".join(precision)):
                broken.setdefault(rule, found)
    return used, broken


def record_step(
    step: Callable[[int], object], index: int, native: frozenset[str], phases: Sequence[str]
) -> tuple[list[Call], CallWatch]:
    """Runs a step; its operators in order, and the watch over its calls.

    Args:
        step: the step.
        index: its number.
        native: as for ``record_precision``.
        phases: names of what comes before the backward pass, of it, and of what comes after it.
    """
    npu_sim.set_native_operators(native)
    try:
        with (
            torch.autograd.set_multithreading_enabled(False),  # stacks are those of the caller
            npu_sim.record(stacks=True) as recording,
            _backward_marks(recording) as marks,
            CallWatch() as watch,
        ):
            step(index)
    finally:
        npu_sim.set_native_operators(None)
    begin, end = marks or (len(recording.operators),) * 2
    calls = []
    for place, operator in enumerate(recording.operators):
        phase = phases[0] if place < begin else phases[1] if place < end else phases[2]
        calls.append(Call(operator, phase))
    return calls, watch


@contextlib.contextmanager
def _backward_marks(recording: Any) -> Iterator[list[int]]:
    """Notes how many operators there were when the backward pass began and ended."""
    marks: list[int] = []
    run = torch.autograd.backward

    def marked(*args: Any, **kwargs: Any) -> None:
        marks.append(len(recording.operators))
        run(*args, **kwargs)
        marks.append(len(recording.operators))

    with mock.patch.object(torch.autograd, "backward", marked):
        yield marks


def spelled(name: str) -> str:
    """An operator's name in torch_npu."""
    return OF_SIMULATOR.get(name, name)


def count_uses(calls: Sequence[Call]) -> dict[str, Use]:
    """The operators of a step."""
    used: dict[str, Use] = {}
    for call in calls:
        use = used.setdefault(spelled(call.operator.name), Use())
        use.phases[call.phase] += 1
        use.dtypes.update(_dtypes(call.operator))
    return used


def _dtypes(operator: Any) -> Iterator[str]:
    """Number formats of what an operator takes, or makes if it takes nothing."""
    for place, (dtype, shape) in enumerate(operator.inputs or operator.outputs):
        # A number of Python reaches an operator as a tensor without dimensions.
        if place == 0 or shape or dtype not in ("float64", "int64"):
            yield dtype


def merge(into: dict[str, Use], used: dict[str, Use]) -> None:
    """Adds other uses; of two counts the larger one stays."""
    for name, use in used.items():
        kept = into.setdefault(name, Use())
        kept.phases |= use.phases
        kept.dtypes |= use.dtypes


def classify(calls: Sequence[Call], version: Version) -> None:
    """Adds to what a version makes of operators."""
    for call in calls:
        operator = call.operator
        name = spelled(operator.name)
        parent = spelled(operator.parent) if operator.parent else None
        if operator.way == "cpu_fallback":
            version.fallbacks.add(Fallback(name, call.phase, where(operator.stack)))
        elif operator.way == "decomposed":
            version.decomposed.setdefault(name, set())
        else:
            version.native.add(name)
        if parent is not None and parent != name:
            version.decomposed.setdefault(parent, set()).add(name)


def _broken(
    calls: Sequence[Call], watch: CallWatch, phase: str, precision: str
) -> Iterator[tuple[Broken, Fallback]]:
    for rule in watch.broken:
        yield rule, Fallback(rule.what, f"{phase}, {precision}", "")
    for call in calls:
        for rule in broken_by(call.operator):
            place = where(call.operator.stack)
            yield rule, Fallback(rule.what, f"{call.phase}, {precision}", place)


def where(stack: Sequence[Frame]) -> str:
    """The innermost line of a stack that no installed package has, as ``file:line function``."""
    for file, line, function in innermost(frame for frame in stack if _SITE not in frame[0]):
        return f"{short(file)}:{line} {function}"
    return ""
