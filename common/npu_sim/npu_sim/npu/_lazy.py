"""When the NPU starts: at its first use, once a process, and never again in a forked child."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing.util import register_after_fork
from typing import Any

import torch

from npu_sim.npu._errors import ErrCode, pta_error


class _State:
    """What is known of this process's NPU."""

    def __init__(self) -> None:
        self.initialized = False
        self.in_bad_fork = False
        self.pid = 0
        self.lock = threading.Lock()
        self.local = threading.local()
        self.queue: list[Callable[[], object]] = []
        self.generators: tuple[torch.Generator, ...] = ()


_state = _State()
# The C++ extension that the device runs on.
extension: Any = None


def device_count() -> int:
    """Cards that this process sees."""
    return int(torch._C._accelerator_hooks_device_count())


def is_available() -> bool:
    """Whether this process sees a card."""
    return device_count() > 0


def is_initialized() -> bool:
    """Whether the NPU has been used in this process."""
    return _state.initialized and not _state.in_bad_fork


def is_in_bad_fork() -> bool:
    """Whether this process was forked from one that had started the NPU."""
    return _state.in_bad_fork


def init() -> None:
    """Starts the NPU; its first use does it too."""
    lazy_init()


def lazy_init() -> None:
    """Starts the NPU unless it runs; torch calls it before it makes a tensor on the device.

    Raises:
        RuntimeError: this process was forked from one that had started it, or sees no card.
    """
    if _state.initialized or hasattr(_state.local, "starting"):
        return
    with _state.lock:
        if _state.initialized:
            return
        if _state.in_bad_fork:
            raise RuntimeError(
                "Cannot re-initialize NPU in forked subprocess. To use NPU with "
                "multiprocessing, you must use the 'spawn' start method"
            )
        if not is_available():
            raise RuntimeError("No NPUs are available" + pta_error(ErrCode.UNAVAIL))
        _state.pid = os.getpid()
        _state.local.starting = True
        try:
            _state.generators = tuple(get_default_generator(i) for i in range(device_count()))
            for call in _state.queue:
                call()
            _state.queue.clear()
        finally:
            del _state.local.starting
        _state.initialized = True


def lazy_call(call: Callable[[], object]) -> None:
    """Calls now if the NPU runs, else when it starts."""
    if _state.initialized:
        call()
    else:
        _state.queue.append(call)


def get_default_generator(device_index: int) -> torch.Generator:
    """The random numbers of a card."""
    generator: torch.Generator = torch._C._accelerator_getDefaultGenerator(device_index)
    return generator


def generators() -> tuple[torch.Generator, ...]:
    """One generator a card, none before the NPU has started."""
    return _state.generators


def _after_fork(_: Any) -> None:
    if _state.initialized and _state.pid != os.getpid():
        _state.initialized = False
        _state.in_bad_fork = True
        # torch asks for a start once a process; the child must be refused when it asks.
        extension.require_lazy_init()


register_after_fork(_state, _after_fork)
