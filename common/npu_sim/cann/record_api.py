"""Records what the classes and modules of an installed torch_npu offer, as data for the stand-in.

    python record_api.py ../npu_sim/data/torch_npu_2.14_members.json

Run it where the real torch_npu imports: on an NPU machine, or on the stand-in CANN. No card is
needed. ``torch_npu_2.14_api.json`` has the names of the main modules; this adds what is below.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

# The modules that torch_npu_2.14_api.json lists.
LISTED = (
    "torch_npu",
    "torch_npu.npu",
    "torch_npu.npu.amp",
    "torch_npu.optim",
    "torch_npu.profiler",
)
# Below these, modules are recorded too. What they leave out belongs to the compiler or to tools.
FAMILIES = (
    "torch_npu.asd",
    "torch_npu.contrib",
    "torch_npu.distributed",
    "torch_npu.multiprocessing",
    "torch_npu.npu",
    "torch_npu.optim",
    "torch_npu.profiler",
    "torch_npu.utils",
)
# transfer_to_npu replaces torch.cuda when it is imported, the others want packages of CANN.
LEFT_OUT = ("torch_npu.contrib.transfer_to_npu", "torch_npu.profiler.analysis")


def describe(value: object) -> str:
    """A callable's signature, else the name of the value's type."""
    try:
        text = str(inspect.signature(value))  # type: ignore[arg-type]
        # Without addresses and paths of defaults, so that each run and machine gives the same.
        return re.sub(r" at 0x[0-9a-f]+|(?<=') from '[^']*'(?=>)", "", text)
    except (TypeError, ValueError):
        return type(value).__name__


def members(cls: type) -> dict[str, str]:
    """Public methods and attributes that torch_npu gives a class, bases within it included."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("torch_npu"):
            found |= {name: describe(value) for name, value in vars(base).items()}
    return {name: text for name, text in sorted(found.items()) if not name.startswith("_")}


def public(module: ModuleType) -> dict[str, object]:
    """What a module offers: its ``__all__``, else its public names that are torch_npu's own."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and not isinstance(value, ModuleType)
            and str(getattr(value, "__module__", "")).startswith("torch_npu")
        ]
    return {name: getattr(module, name) for name in sorted(names) if hasattr(module, name)}


def modules() -> list[str]:
    """Names of the recorded modules that import on this machine."""
    found = []
    for family in FAMILIES:
        package = importlib.import_module(family)
        names = [family]
        names += [item.name for item in pkgutil.walk_packages(package.__path__, family + ".")]
        for name in names:
            private = any(part.startswith("_") for part in name.split("."))
            if private or name.startswith(LEFT_OUT) or name in LISTED:
                continue
            try:
                importlib.import_module(name)
            except (ImportError, OSError, RuntimeError):
                continue
            found.append(name)
    return found


def main() -> None:
    import torch_npu

    classes, enums = {}, {}
    for name in LISTED:
        for key, value in vars(importlib.import_module(name)).items():
            if key.startswith("_") or not isinstance(value, type):
                continue
            if issubclass(value, enum.Enum):
                enums[f"{name}.{key}"] = {
                    item: member.value for item, member in value.__members__.items()
                }
            elif value.__module__.startswith("torch_npu"):
                classes[f"{name}.{key}"] = members(value)
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options
    classes["torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options"] = members(options)
    properties = type(torch_npu.npu.get_device_properties(0))
    classes["torch_npu._C._NPUDeviceProperties"] = members(properties)
    document = {
        "torch_npu": torch_npu.__version__,
        "constants": {
            name: value for name, value in sorted(vars(torch_npu).items()) if type(value) is int
        },
        "enums": enums,
        "classes": dict(sorted(classes.items())),
        "modules": {
            name: {key: describe(value) for key, value in public(sys.modules[name]).items()}
            for name in modules()
        },
    }
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
