"""A simulated Ascend NPU in host memory, for tests on machines without one.

::

    npu_sim.install()
    with npu_sim.record() as recording:
        torch.ones(2, device="npu") + 1
    recording.operators
"""

from __future__ import annotations

import atexit
import contextlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from npu_sim import recording as _recording
from npu_sim.machine import MOST_CARDS, environment
from npu_sim.native import native_operators
from npu_sim.recording import Copy, Frame, Operator, Recording, Sync

if TYPE_CHECKING:
    import torch

__all__ = [
    "Copy",
    "Frame",
    "Operator",
    "Recording",
    "Sync",
    "environment",
    "install",
    "kernel",
    "record",
    "set_memory_limit",
    "set_native_operators",
    "set_poison",
]

_MEMORY = 64 * 2**30
_VERSION = "2.14"

_C: ModuleType | None = None


def install() -> None:
    """Makes device ``npu`` exist in this process, which cannot be undone; later calls do nothing.

    The number of cards and their memory come from NPU_SIM_CARDS (2) and NPU_SIM_MEMORY (bytes, 64
    GiB a card). The operators that torch_npu 2.14 has kernels for are native.

    Raises:
        npu_sim.build.BuildError: the extension cannot be built.
        ValueError: one of the variables is no such number.
    """
    global _C
    if _C is not None:
        return
    # Not above, so that `python -m npu_sim` starts without it.
    from torch.utils import backend_registration

    from npu_sim.build import load

    cards = _visible(_number("NPU_SIM_CARDS", 2, 0, MOST_CARDS))
    memory = _number("NPU_SIM_MEMORY", _MEMORY, 1, 2**60)
    native = native_operators(_VERSION)
    backend_registration.rename_privateuse1_backend("npu")
    extension = load()
    extension.install_cards(cards)
    for card in range(cards):
        extension.set_capacity(card, memory)
    with warnings.catch_warnings():
        # Kernels that torch has and that the device replaces.
        warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel")
        extension.register_operators(native)
    extension.set_native_operators(native)
    extension.set_stack_function(_recording.python_stack)
    atexit.register(extension.finish_backward_passes)
    _C = extension
    _name_device(extension)


def _name_device(extension: ModuleType) -> None:
    """Gives torch the names of the device: ``torch.npu``, ``Tensor.npu()``, ``hccl``."""
    import torch
    from torch.utils import backend_registration

    from npu_sim import hccl, npu_module

    torch._register_device_module("npu", npu_module.device_module(extension))
    backend_registration.generate_methods_for_privateuse1_backend(
        for_tensor=True, for_module=True, for_storage=True, for_packed_sequence=True
    )
    hccl.register(extension)


def _number(name: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ValueError(f"{name}={text} is no whole number from {least} to {most}: correct it.")
    return int(text)


def _visible(cards: int) -> int:
    """How many cards ASCEND_RT_VISIBLE_DEVICES leaves: it lists their numbers in ascending order,
    and the driver takes them up to the first that is not there or is out of order.
    """
    text = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if text is None:
        return cards
    last = -1
    count = 0
    for number in text.split(","):
        if not number.strip().isdigit() or not last < int(number) < cards:
            break
        last = int(number)
        count += 1
    return count


def _extension() -> ModuleType:
    install()
    assert _C is not None
    return _C


@contextlib.contextmanager
def record(stacks: bool = False) -> Iterator[Recording]:
    """Records operators, copies and syncs of all threads until the block ends.

    Args:
        stacks: notes the Python frames of each; slower. Backward passes run on a
            thread of their own, which has no frames of the caller unless
            ``torch.autograd.set_multithreading_enabled(False)`` is in force.
    """
    with _recording.record(_extension(), stacks) as recording:
        yield recording


def set_native_operators(names: frozenset[str] | None) -> None:
    """Makes the device behave as a torch_npu that has kernels for these operators only.

    Args:
        names: ``aten::add.Tensor``, ``npu::npu_swiglu``; None: all operators are native.
            Structured operators are compared by their own name: add it where torch_npu has the
            ``.out`` form, as :func:`npu_sim.native.native_operators` does.
    """
    _extension().set_native_operators(names)


def set_memory_limit(card: int, bytes: int | None) -> None:
    """Sets a card's memory; beyond it ``torch.OutOfMemoryError`` is raised.

    Args:
        card: index.
        bytes: its size; None: that of NPU_SIM_MEMORY.
    """
    memory = _number("NPU_SIM_MEMORY", _MEMORY, 1, 2**60) if bytes is None else bytes
    _extension().set_capacity(card, memory)


def set_poison(byte: int | None) -> None:
    """Fills fresh memory with a byte, so that reading it before writing shows; None: no more.

    Args:
        byte: 0 to 255; 255 makes floats NaN.
    """
    _extension().set_poison(byte)


@contextlib.contextmanager
def kernel(name: str, *inputs: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Runs a kernel that is written in Python as one operator of the device.

    What the block calls is part of the kernel: it is not recorded, and never falls back.

    Args:
        name: the operator, ``npu::npu_rms_norm``.
        inputs: its tensors.

    Yields:
        A list that takes the operator's results.
    """
    results: list[torch.Tensor] = []
    with _extension().OperatorScope(name, inputs) as scope:
        yield results
        scope.outputs(results)
