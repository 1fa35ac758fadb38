"""``torch.npu.FloatTensor`` and its like, and the typed storages that old checkpoints name."""

from __future__ import annotations

from typing import Any

import torch
from torch._utils import classproperty
from torch.storage import _LegacyStorage

NAMES = {
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float": torch.float32,
    "Double": torch.float64,
}


class tensortype(type):  # noqa: N801 the name of the type of such types in torch
    """Types that stand for a device and a dtype."""

    dtype: torch.dtype

    def __instancecheck__(cls, instance: object) -> bool:
        return (
            isinstance(instance, torch.Tensor)
            and instance.device.type == "npu"
            and instance.dtype is cls.dtype
        )

    def __call__(cls, *arguments: Any) -> torch.Tensor:
        host: Any = torch.tensor([], dtype=cls.dtype)
        made: torch.Tensor = host.new(*arguments)
        return made.to("npu")


def tensor_types() -> dict[str, tensortype]:
    """The tensor types by name."""
    return {
        f"{name}Tensor": tensortype(
            f"{name}Tensor", (), {"dtype": dtype, "__module__": "torch.npu"}
        )
        for name, dtype in NAMES.items()
    }


def storage_types() -> dict[str, type]:
    """The storage types by name; torch.load looks them up in ``torch._storage_classes``."""
    constant: Any = classproperty
    found = {}
    for name, dtype in NAMES.items():
        contents = {
            "dtype": constant(lambda _, dtype=dtype: dtype),
            "_dtype": constant(lambda _, dtype=dtype: dtype),
            "__module__": "torch.npu",
        }
        found[f"{name}Storage"] = type(f"{name}Storage", (_LegacyStorage,), contents)
    torch._storage_classes.update(found.values())
    return found
