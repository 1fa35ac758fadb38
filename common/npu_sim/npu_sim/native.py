"""Which operators torch_npu has kernels of its own for, by version; ``data/README.md`` says whence.

::

    is_native("aten::gelu", "2.14")         # True
    native_operators("2.6")                 # "aten::add.Tensor", "npu::npu_swiglu", ...
    npu_sim.set_native_operators(native_operators("2.6"))
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "torch_npu_ops_by_version.json"


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return content


def versions() -> tuple[str, ...]:
    """The versions of torch that have a torch_npu, from 2.1 on, the oldest first."""
    return tuple(_content()["sources"])


def native_operators(version: str) -> frozenset[str]:
    """The operators that the newest torch_npu for a version of torch runs on the NPU itself.

    Names are those of torch, ``aten::sum.dim_IntList``, or torch_npu's, ``npu::npu_swiglu``.
    An operator is among them too when torch computes it by another one that is.

    Args:
        version: one of :func:`versions`.

    Raises:
        ValueError: there is none for that version.
    """
    if version not in versions():
        known = versions()
        raise ValueError(
            f"nothing is known of a torch_npu for torch {version}: give one of the versions "
            f"{known[0]} to {known[-1]}."
        )
    return _native_operators(version)


def is_native(name: str, version: str) -> bool:
    """Whether torch_npu of a version runs the operator on the NPU itself.

    Args:
        name: ``aten::add.Tensor``; the namespace and the overload belong to it.
        version: one of :func:`versions`.

    Raises:
        ValueError: there is none for that version.
    """
    return name in native_operators(version)


@functools.cache
def _native_operators(version: str) -> frozenset[str]:
    registered = {
        name for name, spans in _content()["operators"].items() if version in _expand(spans)
    }
    # A structured operator without a kernel of its own makes its outputs by a shape function that
    # needs no device, and calls the kernel of its .out form on them.
    through = _content()["structured"]
    registered |= {name for name, out in through.items() if out in registered}
    return frozenset(registered)


@functools.cache
def _expand(spans: str) -> frozenset[str]:
    """The versions that a text such as ``2.1-2.6 2.8`` names."""
    known = versions()
    named: set[str] = set()
    for span in spans.split():
        first, _, last = span.partition("-")
        named.update(known[known.index(first) : known.index(last or first) + 1])
    return frozenset(named)
