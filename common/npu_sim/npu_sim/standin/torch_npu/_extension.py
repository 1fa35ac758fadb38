"""The parts of torch_npu's extension module that programs name: HCCL's options."""

from __future__ import annotations

import sys
from datetime import timedelta
from types import ModuleType
from typing import Any

from npu_sim import recorded


class _Options:
    """``ProcessGroupHCCL.Options``: has these attributes and no others.

    Attributes:
        hccl_config: settings of HCCL by name, such as ``{"hccl_buffer_size": 200}``; values are
            whole numbers and text.
    """

    __slots__ = (
        "_config",
        "_timeout",
        "backend",
        "enable_reconfigure",
        "global_ranks_in_group",
        "group_id",
        "group_name",
        "is_high_priority_stream",
        "op_timeout",
    )

    def __init__(self) -> None:
        self.backend = "hccl"
        self.enable_reconfigure = False
        self.global_ranks_in_group: list[int] = []
        self.group_id = ""
        self.group_name = ""
        self.is_high_priority_stream = False
        self.op_timeout = timedelta(seconds=10)
        self._timeout = timedelta(minutes=30)
        self._config: dict[str, int | str] = {}

    @property
    def hccl_config(self) -> dict[str, int | str]:
        return self._config

    @hccl_config.setter
    def hccl_config(self, value: dict[str, int | str]) -> None:
        if not isinstance(value, dict) or not all(
            isinstance(key, str) and isinstance(item, int | str) for key, item in value.items()
        ):
            raise TypeError(
                f"hccl_config takes a dict from names to whole numbers or text, but got {value!r}"
            )
        self._config = value


_Options.__name__ = "Options"
_Options.__qualname__ = "ProcessGroupHCCL.Options"


class ProcessGroupHCCL:
    """Made by ``init_process_group("hccl")`` only."""

    Options = _Options

    def __new__(cls, *arguments: Any, **keywords: Any) -> ProcessGroupHCCL:
        raise recorded.refusal("the construction of ProcessGroupHCCL by hand")


def module() -> ModuleType:
    """The module ``torch_npu._C``."""
    found = ModuleType("torch_npu._C")
    distributed = ModuleType("torch_npu._C._distributed_c10d")
    distributed.ProcessGroupHCCL = ProcessGroupHCCL  # type: ignore[attr-defined]
    found._distributed_c10d = distributed  # type: ignore[attr-defined]
    sys.modules |= {part.__name__: part for part in (found, distributed)}
    return found
