"""What the benches of a training step share: the memory that it adds, and where its time goes.

A step is a function without arguments. Operators are told apart by kinds: a mapping from names of
operators, such as ``mm``, to what is printed for them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch

Step = Callable[[], Any]
Kinds = Mapping[str, str]
Parts = Mapping[str, tuple[Any, str]]
"""By name of a part: whose attribute it is, and which."""

REST = "all else"
PRODUCTS = {
    "convolution": "convolutions, forward",
    "convolution_backward": "convolutions, backward",
    "mm": "matrix products",
    "addmm": "matrix products",
    "bmm": "matrix products",
}
"""Kinds of the operators that no program goes without that computes a step by them."""


def resident_memory_mb(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in MiB.

    Not getrusage's peak: that starts with the peak of the parent process.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


class TrainStep:
    """Trains one step a call and returns the seconds of its phases.

    Args:
        forward: gives the losses.
        optimizer: of all parameters that are trained.
        max_norm: gradients are clipped to this norm; 0: they are not.

    Attributes:
        losses: of the last step.
    """

    def __init__(
        self,
        forward: Callable[[], dict[str, torch.Tensor]],
        optimizer: torch.optim.Optimizer,
        max_norm: float = 0,
    ) -> None:
        self.forward, self.optimizer, self.max_norm = forward, optimizer, max_norm
        self.losses: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        import torch

        start = time.perf_counter()
        losses = self.forward()
        forward = time.perf_counter()
        torch.stack([*losses.values()]).sum().backward()
        backward = time.perf_counter()
        if self.max_norm:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        self.losses = {key: losses[key].item() for key in sorted(losses)}
        return {
            "forward": forward - start,
            "backward": backward - forward,
            type(self.optimizer).__name__: end - backward,
            "whole step": end - start,
        }


def print_losses(steps: Mapping[str, TrainStep]) -> None:
    """The losses of each last step."""
    for name, step in steps.items():
        print(f"{name:<12}" + "".join(f" {key} {value:.4f}" for key, value in step.losses.items()))


def print_memory(peaks: Sequence[float], their_name: str) -> None:
    """Our peak in MiB, theirs, and how they relate."""
    ours, theirs = peaks
    print(
        f"peak memory of steps: ours {ours:.0f} MiB, {their_name} {theirs:.0f} MiB, "
        f"ratio {ours / theirs:.3f}"
    )


def added_memory_mb(step: Step, steps: int = 3) -> float:
    """Peak resident memory that some steps add to this process, in MiB."""
    before_mb = resident_memory_mb("VmRSS")
    for _ in range(steps):
        step()
    return resident_memory_mb("VmHWM") - before_mb


def run_apart(arguments: Sequence[str]) -> float:
    """The number that this program prints in a process of its own with these arguments."""
    command = [sys.executable, sys.argv[0], *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def alone_ms(
    step: Step, repeats: int = 3, *, products: Kinds = PRODUCTS, channels_last: bool = False
) -> dict[str, float]:
    """Milliseconds of a step's convolutions and matrix products, called one by one.

    Args:
        step: makes the calls, which are recorded.
        repeats: the fastest of so many calls counts.
        products: kinds of the operators that count.
        channels_last: calls them with maps and weights in this order of memory.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: Counter[tuple[Any, str]] = Counter()
    arguments: dict[tuple[Any, str], tuple[Any, ...]] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if name_of(func) in products:
                # Called alone it makes its result anew, also where it was given one to write to.
                alone = func.overloadpacket.default
                kept = tuple(
                    (a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a
                    for a in args
                )
                arguments[alone, repr(kept)] = kept
                calls[alone, repr(kept)] += 1
            return func(*args, **(kwargs or {}))

    with Record():  # type: ignore[no-untyped-call]
        step()

    def make(argument: Any) -> Any:
        if isinstance(argument, tuple) and isinstance(argument[-1], torch.dtype):
            size, stride, dtype = argument
            made = torch.empty_strided(size, stride, dtype=dtype).normal_()
            if channels_last and made.dim() == 4:
                return made.contiguous(memory_format=torch.channels_last)
            return made
        return argument

    total: dict[str, float] = {}
    for (func, key), times in calls.items():
        made = [make(argument) for argument in arguments[func, key]]
        fastest = min(_seconds(func, made) for _ in range(repeats))
        kind = products[name_of(func)]
        total[kind] = total.get(kind, 0.0) + 1e3 * times * fastest
    return total


def _seconds(function: Any, arguments: list[Any]) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def name_of(operator: Any) -> str:
    """The name of an operator without its namespace, such as ``mm``."""
    name: str = operator._schema.name
    return name.partition("::")[2]


def operators_ms(step: Step, kinds: Kinds, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of a step by kind of operator; the median of some steps."""
    from torch.utils._python_dispatch import TorchDispatchMode

    spent: list[dict[str, float]] = []

    class Clock(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            start = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            kind = kinds.get(name_of(func), REST)
            spent[-1][kind] = spent[-1].get(kind, 0) + 1e3 * (time.perf_counter() - start)
            return result

    for _ in range(repeats):
        spent.append({})
        with Clock():  # type: ignore[no-untyped-call]
            step()
    names = dict.fromkeys(kind for one in spent for kind in one)
    return {kind: statistics.median(one.get(kind, 0) for one in spent) for kind in names}


@contextmanager
def part_clock(parts: Parts) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of functions while the block runs, a list entry a call."""
    spent: dict[str, list[float]] = {name: [] for name in parts}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name].append(1e3 * (time.perf_counter() - start))
            return result

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in parts.items():
            function = timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, function))
        yield spent


def print_parts(step: Step, parts: Parts, title: str, repeats: int = 3) -> None:
    """Runs some steps and prints the median milliseconds of each part."""
    with part_clock(parts) as spent:
        for _ in range(repeats):
            step()
    print(title)
    for name, each in spent.items():
        print(f"  {name:<24} {statistics.median(each):8.1f}")


def print_kinds(columns: Mapping[str, Mapping[str, float]], kinds: Kinds) -> None:
    """A table of milliseconds by kind of operator."""
    print(f"{'operators, ms a step':<26}" + "".join(f"{name:>14}" for name in columns))
    for kind in [*dict.fromkeys(kinds.values()), REST]:
        print(f"{kind:<26}" + "".join(f"{spent.get(kind, 0):14.0f}" for spent in columns.values()))
