"""Lets torch_npu be imported beside a CUDA build of torch; see csrc/allocator_keys.cpp."""

import ctypes
from pathlib import Path

import torch


def forget_options() -> None:
    """Forgets the allocator options that a CUDA build of torch announced; else does nothing."""
    if (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
        ctypes.CDLL(str(Path(__file__).parent / "allocator_keys.so")).forget_allocator_options()
