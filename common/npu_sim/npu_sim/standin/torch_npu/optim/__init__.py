"""torch_npu's fused optimizers: all parameters of a kind lie in one buffer.

They take float32 and float16 parameters only, and no ``maximize``. As the buffers are made at the
first step, a gradient that is replaced later, as by ``zero_grad(set_to_none=True)`` of a module,
is not seen; their own ``zero_grad`` refuses it.
"""

from __future__ import annotations

from ._base import NpuFusedOptimizerBase
from ._fused import (
    NpuFusedAdadelta,
    NpuFusedAdam,
    NpuFusedAdamW,
    NpuFusedRMSprop,
    NpuFusedSGD,
)

__all__ = [
    "NpuFusedAdadelta",
    "NpuFusedAdam",
    "NpuFusedAdamW",
    "NpuFusedOptimizerBase",
    "NpuFusedRMSprop",
    "NpuFusedSGD",
]
