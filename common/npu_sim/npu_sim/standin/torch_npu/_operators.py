"""torch_npu's operators: all recorded schemas, and reference kernels for some.

A wrong argument fails as on the real one, since torch checks it against the schema. An operator
without a reference kernel raises NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

import npu_sim
from npu_sim import recorded
from npu_sim.npu import _errors

from . import _attention, _batch_norm, _casts, _detection, _fused

_Library: Any = torch.library.Library
_library = _Library("npu", "DEF")
_PARTS = (_attention, _batch_norm, _casts, _detection, _fused)


def _schema(recorded_text: str) -> str:
    """A schema in the spelling that torch reads; it prints None as a type that it cannot read."""
    return recorded_text.removeprefix("npu::").replace("-> NoneType", "-> ()")


def _recorded(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that ``npu_sim.record`` sees as one operator, its parts hidden."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        given = _tensors((*arguments, *keywords.values()))
        with npu_sim.kernel(f"npu::{name}", *given) as outputs:
            result = kernel(*arguments, **keywords)
            outputs += _tensors(result if isinstance(result, tuple) else (result,))
        return result

    return call


def _tensors(values: tuple[Any, ...]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def _refuse(name: str) -> Callable[..., Any]:
    def kernel(*arguments: object, **keywords: object) -> Any:
        raise recorded.refusal(f"torch_npu.{name}")

    return kernel


def define() -> None:
    """Defines the operators, their kernels on the device and their gradients."""
    kernels = {name: kernel for part in _PARTS for name, kernel in part.KERNELS.items()}
    for text in recorded.schemas():
        schema = _schema(text)
        name = schema.split("(")[0]
        _library.define(schema)
        # An operator that takes no tensor has no device to be found by.
        key = "PrivateUse1" if "Tensor" in schema.split("->")[0] else "CompositeExplicitAutograd"
        kernel = kernels.pop(name, None)
        done = _recorded(name, kernel) if kernel else _refuse(name.split(".")[0])
        _library.impl(name, done, key)
    assert not kernels, f"kernels of unknown operators: {sorted(kernels)}"
    for part in _PARTS:
        for name, (backward, setup) in part.GRADIENTS.items():
            torch.library.register_autograd(
                f"npu::{name}", backward, setup_context=setup, lib=_library
            )


def export(package: ModuleType) -> None:
    """Puts the operators into torch_npu, and into torch where the real one refuses them."""
    for text in recorded.schemas():
        name = _schema(text).split("(")[0].split(".")[0]
        if not hasattr(package, name):
            setattr(package, name, getattr(torch.ops.npu, name))
        if not hasattr(torch, name):
            setattr(torch, name, _moved(name))


def _moved(name: str) -> Callable[..., Any]:
    def refused(*arguments: object, **keywords: object) -> Any:
        raise RuntimeError(
            f"torch.{name} is deprecated and will be removed in future version. "
            f"Use torch_npu.{name} instead." + _errors.pta_error(_errors.ErrCode.NOT_SUPPORT)
        )

    return refused
