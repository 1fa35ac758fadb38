"""What is recorded of torch_npu 2.14.0, and placeholders for what is not simulated.

A name that the real package has exists on the stand-in too, so that ``hasattr`` and imports behave
alike. Where nothing is simulated behind it, calling it raises a NotImplementedError that says so,
and it carries the recorded signature.
"""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import json
import re
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

DATA = Path(__file__).parent / "data"

_KINDS = inspect.Parameter


@functools.cache
def _document(name: str) -> dict[str, Any]:
    return json.loads((DATA / name).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def api() -> dict[str, str]:
    """Public names of torch_npu's main modules with signatures or, for values, type names."""
    return _document("torch_npu_2.14_api.json")


def constants() -> dict[str, int]:
    """Whole numbers that torch_npu itself defines: its dtypes."""
    return _document("torch_npu_2.14_members.json")["constants"]  # type: ignore[no-any-return]


def classes() -> dict[str, dict[str, str]]:
    """Public methods and attributes of torch_npu's classes."""
    return _document("torch_npu_2.14_members.json")["classes"]  # type: ignore[no-any-return]


def modules() -> dict[str, dict[str, str]]:
    """Modules below the main ones and their public names, as in :func:`api`."""
    return _document("torch_npu_2.14_members.json")["modules"]  # type: ignore[no-any-return]


def schemas() -> list[str]:
    """Schemas of all operators that torch_npu defines, as torch prints them."""
    return _document("torch_npu_2.14_native_ops.json")["npu_schemas"]  # type: ignore[no-any-return]


def enumeration(name: str, base: Any = enum.IntEnum) -> Any:
    """A recorded enumeration, such as ``torch_npu.Format``, as a class."""
    members = _document("torch_npu_2.14_members.json")["enums"][name]
    return base(name.rpartition(".")[2], members)


class Written(str):
    """A default value as it is written in a recorded signature."""

    def __repr__(self) -> str:
        return str(self)


def is_signature(text: str) -> bool:
    """Whether an entry of :func:`api` is a signature rather than the name of a type."""
    return text.startswith("(")


def signature(text: str) -> inspect.Signature:
    """Names, kinds and defaults of a written signature; annotations are left out.

    Args:
        text: such as ``(device=None) -> int``; what stands in angle brackets is taken as it is.
    """
    readable = re.sub(r"(?<!')<[^<>]*>", lambda match: repr(match[0]), text)
    function = ast.parse(f"def f{readable}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args

    def parameter(
        argument: ast.arg, kind: inspect._ParameterKind, default: ast.expr | None
    ) -> inspect.Parameter:
        value = inspect.Parameter.empty if default is None else Written(ast.unparse(default))
        return inspect.Parameter(argument.arg, kind, default=value)

    places: list[tuple[ast.arg, inspect._ParameterKind]] = [
        (argument, _KINDS.POSITIONAL_ONLY) for argument in arguments.posonlyargs
    ]
    places += [(argument, _KINDS.POSITIONAL_OR_KEYWORD) for argument in arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(places) - len(arguments.defaults))
    found = [
        parameter(argument, kind, default)
        for (argument, kind), default in zip(places, [*defaults, *arguments.defaults], strict=True)
    ]
    if arguments.vararg:
        found.append(parameter(arguments.vararg, _KINDS.VAR_POSITIONAL, None))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(parameter(argument, _KINDS.KEYWORD_ONLY, default))
    if arguments.kwarg:
        found.append(parameter(arguments.kwarg, _KINDS.VAR_KEYWORD, None))
    return inspect.Signature(found)


def refusal(name: str) -> NotImplementedError:
    """The error of what is not simulated."""
    return NotImplementedError(
        f"npu_sim does not simulate {name}; run this on an NPU, or leave it out on the simulator."
    )


def _absent(name: str, text: str) -> Any:
    """A function or class of the recorded signature that raises when it is called."""
    module, _, short = name.rpartition(".")

    def call(*args: object, **keywords: object) -> Any:
        raise refusal(name)

    call.__name__ = call.__qualname__ = short
    call.is_absent = True  # type: ignore[attr-defined]
    call.__module__ = module
    if not is_signature(text):
        # A value of a type that is not simulated: it has no signature and no use.
        call.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
    else:
        call.__signature__ = signature(text)  # type: ignore[attr-defined]
    if name not in classes():
        return call
    contents = {
        "__new__": call,
        "__module__": module,
        "is_absent": True,
        "__signature__": call.__signature__,  # type: ignore[attr-defined]
    }
    return type(short, (), contents)


def is_absent(value: object) -> bool:
    """Whether a function or class is there by name only."""
    return getattr(value, "is_absent", False) is True


def _records() -> dict[str, dict[str, str]]:
    """All recorded modules with their names, parents before children."""
    found = {name: dict(names) for name, names in modules().items()}
    for name, text in api().items():
        module, _, short = name.rpartition(".")
        found.setdefault(module, {})[short] = text
    return dict(sorted(found.items()))


def _value(module: str, name: str, text: str, owners: Mapping[str, ModuleType]) -> Any:
    """What a recorded name is where the simulator has nothing under it."""
    # The simulator does not split its code as torch_npu does, but torch_npu.npu.streams.Stream is
    # torch_npu.npu.Stream on both. Not so contrib, which has functions under names of operators.
    above = [key for key in owners if "." in key and module.startswith(f"{key}.")]
    if above and hasattr(owners[max(above)], name):
        return getattr(owners[max(above)], name)
    if text == "module":
        # Imports of torch_npu's own, which its modules show too.
        if name in sys.stdlib_module_names or name in ("torch", "torch_npu"):
            return sys.modules[name]
        return sys.modules.setdefault(f"{module}.{name}", ModuleType(f"{module}.{name}"))
    if hasattr(typing, name):
        return getattr(typing, name)
    return _absent(f"{module}.{name}", text)


def complete(owners: Mapping[str, ModuleType]) -> None:
    """Gives simulated modules the recorded names that they lack, and adds the recorded modules.

    Args:
        owners: simulated modules by their torch_npu names.
    """
    records = _records()
    for name in records:
        sys.modules.setdefault(name, owners.get(name) or ModuleType(name))
    for name, names in records.items():
        module = sys.modules[name]
        parent, _, child = name.rpartition(".")
        # torch_npu.npu.mstx is a class; its module is found through sys.modules only.
        if parent in records and records[parent].get(child, "module") == "module":
            setattr(sys.modules[parent], child, module)
        for key, text in names.items():
            if not hasattr(module, key):
                setattr(module, key, _value(name, key, text, owners))
