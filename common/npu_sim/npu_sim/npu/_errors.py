"""Error codes as torch_npu appends them to its messages."""

from __future__ import annotations

import enum
import os
import time

import torch

from npu_sim import recorded

ErrCode = recorded.enumeration("torch_npu.npu.ErrCode", enum.Enum)


def _text(module: str, number: int, error: enum.Enum) -> str:
    if os.environ.get("TORCH_NPU_COMPACT_ERROR_OUTPUT", "0") != "0":
        return ""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if ready else -1
    card = torch._C._accelerator_hooks_get_current_device()
    code, meaning = error.value
    when = time.strftime("%Y-%m-%d-%H:%M:%S")
    return (
        f"\n[ERROR] {when} (PID:{os.getpid()}, Device:{card}, RankID:{rank}) "
        f"ERR{number:02d}{code:03d} {module} {meaning}"
    )


def pta_error(error: enum.Enum) -> str:
    """The line that ends messages of torch_npu's PyTorch adapter, with a line break before."""
    return _text("PTA", 0, error)


def prof_error(error: enum.Enum) -> str:
    """The same for messages of the profiler."""
    return _text("PROF", 4, error)
