"""What torch_npu changes in torch's own modules."""

from __future__ import annotations

import contextlib
from typing import Any

from torch.utils.checkpoint import DefaultDeviceType
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from npu_sim.npu import _device


def apply() -> None:
    """Starts the NPU before data loader workers are forked, and lets checkpointing know it.

    The first matters: a worker that touches the NPU is then refused, as on a real one.
    """
    start: Any = _MultiProcessingDataLoaderIter.__init__

    def start_after_npu(self: Any, *arguments: Any, **keywords: Any) -> None:
        with contextlib.suppress(RuntimeError):
            _device.synchronize()
        start(self, *arguments, **keywords)

    _MultiProcessingDataLoaderIter.__init__ = start_after_npu  # type: ignore[method-assign]
    DefaultDeviceType.set_device_type("npu")
