"""What happened on the device: operators, copies between host and device, and syncs."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch


class Frame(NamedTuple):
    """A place in a Python program."""

    file: str
    line: int
    function: str


TensorNote = tuple[str, tuple[int, ...]]  # dtype as in "float32", shape
Stack = tuple[Frame, ...]  # innermost first; empty unless stacks were asked for


class Operator(NamedTuple):
    """A call of an operator on the device.

    Attributes:
        name: with namespace and overload, ``aten::add.Tensor``.
        inputs: its tensors, those of lists one by one.
        outputs: its results.
        parent: the operator that was taken apart into this one and others, or None.
        way: ``native``; ``decomposed``, into operators that follow with this one as their parent;
            or ``cpu_fallback``.
        stack: where it was called.
    """

    name: str
    inputs: tuple[TensorNote, ...]
    outputs: tuple[TensorNote, ...]
    parent: str | None
    way: Literal["native", "decomposed", "cpu_fallback"]
    stack: Stack


class Copy(NamedTuple):
    """A copy between host and device, or on the device."""

    kind: Literal["host_to_device", "device_to_host", "device_to_device"]
    dtype: str
    shape: tuple[int, ...]
    non_blocking: bool
    stack: Stack


class Sync(NamedTuple):
    """A place where the host waits for the device.

    Attributes:
        kind: ``item`` reads a number back; ``copy`` waits for a copy; ``data_dependent`` needs to
            know the size of a result; the others were asked for.
        operator: which operator waits, "" where the program itself does.
        stack: where.
    """

    kind: Literal["item", "copy", "synchronize", "event", "stream", "data_dependent"]
    operator: str
    stack: Stack


class Recording:
    """What was recorded so far, or until the recording ended."""

    def __init__(self, notes: Any) -> None:
        self._notes = notes

    @property
    def operators(self) -> list[Operator]:
        """The calls in order, on all threads."""
        return [
            Operator(name, _tensors(inputs), _tensors(outputs), parent, way, stack)
            for name, inputs, outputs, parent, way, stack in self._notes.operators()
        ]

    @property
    def copies(self) -> list[Copy]:
        """The copies in order."""
        return [
            Copy(kind, _name(dtype), shape, non_blocking, stack)
            for kind, dtype, shape, non_blocking, stack in self._notes.copies()
        ]

    @property
    def syncs(self) -> list[Sync]:
        """The syncs in order."""
        return [Sync(*sync) for sync in self._notes.syncs()]


@contextlib.contextmanager
def record(extension: ModuleType, stacks: bool) -> Iterator[Recording]:
    """Records until its end; see :func:`npu_sim.record`."""
    notes = extension.Recording(stacks)
    notes.start()
    try:
        yield Recording(notes)
    finally:
        notes.stop()


def python_stack() -> Stack:
    """The Python frames of this thread; the extension calls it."""
    return tuple(
        Frame(frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_stack(sys._getframe(1))
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(notes: tuple[tuple[torch.dtype, tuple[int, ...]], ...]) -> tuple[TensorNote, ...]:
    return tuple((_name(dtype), shape) for dtype, shape in notes)
