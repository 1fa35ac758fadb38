"""Registers the process group ``hccl`` of the simulated device."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch.distributed as dist


def register(extension: ModuleType) -> None:
    """Makes ``init_process_group("hccl")`` work; it is the default of device ``npu`` then."""

    def create(place: Any, options: Any) -> Any:
        gloo = dist.ProcessGroupGloo(
            place.store, place.group_rank, place.group_size, timeout=place.timeout
        )
        return extension.HcclOverGloo(gloo, place.group_rank, place.group_size)

    dist.Backend.register_backend("hccl", create, extended_api=True, devices=["npu"])
