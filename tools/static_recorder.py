"""Counts what makes a step slow on an accelerator: host syncs, and operator shapes not seen before.

This is for CPUs and GPUs, and for real NPUs; ``npu_static.py`` counts on the simulated NPU.

::

    report = count(step, steps=40, warmup=8, device=torch.device("cpu"))
    report.syncs, report.new_pairs      # by step
    report.clean                        # no sync at all, and no new pair after the warm-up
    print(report.describe())            # what the counts are, and who causes them

or, around any code::

    with Recorder(device) as recorder:
        for batch in batches:
            train(batch)
            recorder.next_step()
    report = recorder.report()

It sees every operator that PyTorch dispatches, those of backward passes too.

A **host sync** makes the host wait for the device: ``item`` (also as ``bool``, ``int``, ``float``
or an f-string), operators whose output has a size that depends on the data (``nonzero``,
``unique``, ``masked_select``, indexing with a mask, ``torchvision::nms``, ...), ``equal``, and
copies to the host. Operators on tensors in host memory are none.

A **pair** is an operator with the shapes and number formats of the tensors that it takes and
gives. One that was not there in an earlier step is what an NPU compiles or tunes anew.

On a CPU, which stands in for a device there, host and device are one memory, so:

* ``tolist``, ``numpy`` and ``cpu`` count where they are called. ``to("cpu")`` cannot be told from
  ``to(device)``; what such a copy is for counts when it is first read.
* What was read once counts no second time in the same step: it would have been copied.
* Tensors in shared memory are those that a loader's workers delivered, and in host memory.
* ``one_hot`` with a given class count reads its input on CPUs only, which is left out.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
SYNC = "host sync"
NEW_PAIR = "new shapes"

_TORCH = str(Path(torch.__file__).parent)
_UNSEEN = (_TORCH, contextlib.__file__, functools.__file__)
_TOOLS = Path(__file__).parent
_FRAMES = 4
_WORST = 12
_DEPENDS_ON_DATA = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
# Operators that depend on data without saying so by a tag.
_UNTAGGED = {
    "aten::allclose",
    "aten::equal",
    "aten::_linalg_check_errors",
    "aten::unique_dim_consecutive",
    "torchvision::nms",
}
_INDEXING = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
    "aten::_unsafe_index_put",
}
_COPIES = {"aten::_to_copy", "aten::copy_"}
_MASKS = (torch.bool, torch.uint8)

Frame = tuple[str, int, str]  # file, line, function


@dataclass
class Offender:
    """A line that syncs, or that makes new pairs after the warm-up.

    Attributes:
        kind: SYNC or NEW_PAIR.
        what: the operator or method, and the backward node that it ran in.
        stack: where, innermost first, without PyTorch's own files.
        example: the shapes of the first time.
        times: how often.
        steps: in which steps.
    """

    kind: str
    what: str
    stack: tuple[Frame, ...]
    example: str
    times: int = 0
    steps: set[int] = field(default_factory=set)

    def describe(self) -> str:
        """The line with its callers, as text of several lines."""
        head = f"{self.kind}: {self.what} {self.example}"
        count = f"{self.times} times in {len(self.steps)} steps"
        lines = [f"{head.rstrip()}, {count}"]
        for depth, (file, line, function) in enumerate(self.stack):
            code = linecache.getline(file, line).strip()
            lines.append(f"  {'  from ' if depth else '  '}{short(file)}:{line} {function}: {code}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What a number of steps did.

    Attributes:
        operators: operators by step.
        syncs: host syncs by step.
        new_pairs: (operator, shapes) pairs that no earlier step had, by step.
        warmup: steps whose new pairs are no offence.
        offenders: the lines to blame, the most frequent first.
        uploads: copies from the host to the device by step, where they can be seen.
        uploaded_bytes: what these copied, by step.
    """

    operators: list[int]
    syncs: list[int]
    new_pairs: list[int]
    warmup: int
    offenders: list[Offender]
    uploads: list[int] = field(default_factory=list)
    uploaded_bytes: list[int] = field(default_factory=list)

    @property
    def late_pairs(self) -> list[int]:
        """New pairs of the steps after the warm-up."""
        return self.new_pairs[self.warmup :]

    @property
    def clean(self) -> bool:
        """No host sync, and no new pair after the warm-up."""
        return not any(self.syncs) and not any(self.late_pairs)

    def describe(self, worst: int = _WORST) -> str:
        """The counts, and the ``worst`` offenders with their stacks; 0 for none of them."""
        known = sum(self.new_pairs[: self.warmup])
        lines = [
            f"operators a step: {_range(self.operators)}",
            f"host syncs a step: {_range(self.syncs)}",
            f"new (operator, shapes) pairs a step: {_range(self.late_pairs)} after {self.warmup} "
            f"steps, which had {known}",
        ]
        if self.uploads:
            lines.append(
                f"copies to the device a step: {_range(self.uploads)}; bytes: "
                f"{_range(self.uploaded_bytes)}"
            )
        lines += [offender.describe() for offender in self.offenders[:worst]]
        if 0 < worst < len(self.offenders):
            lines.append(f"... and {len(self.offenders) - worst} more lines")
        return "\n".join(lines)


class Recorder(TorchDispatchMode):
    """Counts host syncs and new (operator, shapes) pairs of the code that runs inside it.

    Backward passes run in the calling thread meanwhile. Not for several threads.

    Args:
        device: where the steps run; work on other devices is not looked at. On a CPU the head of
            this file says what can be seen.
        warmup: steps in which new pairs are expected.
    """

    def __init__(self, device: torch.device = CPU, *, warmup: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device.type
        self._warmup = warmup
        self._operators, self._syncs, self._new_pairs = [0], [0], [0]
        self._pairs: set[tuple[Any, ...]] = set()
        self._found: dict[tuple[Any, ...], Offender] = {}
        self._read: dict[int, torch.UntypedStorage] = {}  # kept, so that no address comes again
        self._unwatched = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            if self._type == "cpu":
                for patch in self._patches():
                    stack.enter_context(patch)
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._stack.close()
        self._read.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operator and counts it; PyTorch calls this."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        taken = list(_tensors((result,)))
        if self._type != "cpu" and not any(t.device.type == self._type for t in (*given, *taken)):
            return result
        self._operators[-1] += 1
        name = func._schema.name
        if not self._unwatched and self._waits(func, name, args, given, taken):
            self._sync(name, given)
        pair = (
            func,
            *((t.shape, t.dtype) for t in given),
            None,
            *((t.shape, t.dtype) for t in taken),
        )
        if pair not in self._pairs:
            self._pairs.add(pair)
            self._new_pairs[-1] += 1
            if len(self._new_pairs) > self._warmup:
                self._blame(NEW_PAIR, str(func), given)
        return result

    def next_step(self) -> None:
        """Ends a step; what follows counts for the next one."""
        for counts in (self._operators, self._syncs, self._new_pairs):
            counts.append(0)
        self._read.clear()

    def report(self) -> Report:
        """The steps so far; the one under way counts if it has done anything."""
        done = len(self._operators) - (self._operators[-1] == self._syncs[-1] == 0)
        return Report(
            operators=self._operators[:done],
            syncs=self._syncs[:done],
            new_pairs=self._new_pairs[:done],
            warmup=self._warmup,
            offenders=sorted(self._found.values(), key=lambda o: (o.kind, -o.times)),
        )

    def _waits(
        self, func: Any, name: str, args: tuple[Any, ...], given: list[Tensor], taken: list[Tensor]
    ) -> bool:
        """Whether the host has to wait for the device to finish this operator."""
        if name in _COPIES:
            source = given[-1]  # copy_ takes its target first
            return source.device.type != "cpu" and taken[0].device.type == "cpu"
        if name in _INDEXING:
            indices = [index for index in _tensors(args[1]) if index.dtype in _MASKS]
            return any(not self._on_host(index) for index in indices)
        if _DEPENDS_ON_DATA.isdisjoint(func.tags) and name not in _UNTAGGED:
            return False
        return any(not self._on_host(tensor) for tensor in given)

    def _on_host(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu":
            return False
        if self._type != "cpu" or _address(tensor) in self._read:
            return True
        return bool(tensor.is_shared())  # type: ignore[no-untyped-call]

    def _sync(self, what: str, tensors: list[Tensor]) -> None:
        self._syncs[-1] += 1
        self._blame(SYNC, what, tensors)

    def _blame(self, kind: str, what: str, tensors: list[Tensor]) -> None:
        node = torch._C._current_autograd_node()
        if node is not None:
            what = f"{what} in {node.name()}"
        stack = _stack()
        offender = self._found.get((kind, what, stack))
        if offender is None:
            offender = Offender(kind, what, stack, _shapes(tensors))
            self._found[kind, what, stack] = offender
        offender.times += 1
        offender.steps.add(len(self._syncs) - 1)

    def _patches(self) -> Iterator[contextlib.AbstractContextManager[object]]:
        """Puts a watch on what reads a tensor of the CPU past the dispatcher."""
        for name in ("tolist", "numpy", "cpu"):
            yield mock.patch.object(Tensor, name, self._watched(name, getattr(Tensor, name)))
        yield mock.patch.object(F, "one_hot", self._unchecked(F.one_hot))

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._on_host(tensor):
                self._sync(f"Tensor.{name}", [tensor])
                self._read[_address(tensor)] = tensor.untyped_storage()
            return method(tensor, *args, **kwargs)

        return watched

    def _unchecked(self, one_hot: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def unchecked(labels: Tensor, num_classes: int = -1) -> Tensor:
            self._unwatched = num_classes >= 0
            try:
                return one_hot(labels, num_classes)
            finally:
                self._unwatched = False

        return unchecked


def count(
    step: Callable[[int], object],
    *,
    steps: int = 40,
    warmup: int = 8,
    device: torch.device = CPU,
) -> Report:
    """Runs ``step(0)``, ``step(1)``, ... and counts; arguments as those of ``Recorder``."""
    with Recorder(device, warmup=warmup) as recorder:
        for index in range(steps):
            step(index)
            recorder.next_step()
    return recorder.report()


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in the arguments of an operator, lists among them taken apart."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _stack() -> tuple[Frame, ...]:
    """The innermost frames outside PyTorch."""
    return innermost(_frames(sys._getframe(1)))


def _frames(frame: FrameType | None) -> Iterator[Frame]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def innermost(frames: Iterable[Frame]) -> tuple[Frame, ...]:
    """The first few of a stack's frames that are not of PyTorch or of the tools beside this."""
    seen = (
        frame
        for frame in frames
        if not frame[0].startswith(_UNSEEN) and Path(frame[0]).parent != _TOOLS
    )
    return tuple(itertools.islice(seen, _FRAMES))


def _shapes(tensors: Sequence[Tensor], most: int = 4) -> str:
    shown = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors[:most]]
    return " ".join([*shown, "..."] if len(tensors) > most else shown)


def short(file: str) -> str:
    """A path from the working directory or an import root on, without what lies above."""
    for root in (str(Path.cwd()), *sys.path):
        if root and file.startswith(root + "/"):
            return file[len(root) + 1 :]
    return file


def _range(counts: Sequence[int]) -> str:
    if not counts or min(counts) == max(counts):
        return str(counts[0] if counts else 0)
    return f"{min(counts)} to {max(counts)}, {sum(counts) / len(counts):.1f} on average"
