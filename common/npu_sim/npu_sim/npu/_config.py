"""Switches of torch_npu: compile mode, tensor formats, HF32, task queue."""

from __future__ import annotations

import os
import warnings
from typing import Any

from npu_sim import recorded
from npu_sim.npu import _lazy
from npu_sim.npu._device import synchronize
from npu_sim.npu._errors import ErrCode, pta_error

CubeMathType = recorded.enumeration("torch_npu.npu.CubeMathType")

# What the options that are checked may be; None: anything.
_VALUES: dict[str, tuple[str, ...] | None] = {
    "ACL_PRECISION_MODE": ("allow_fp32_to_fp16", "must_keep_origin_dtype"),
    "ACL_OP_SELECT_IMPL_MODE": ("high_performance", "high_precision"),
    "ACL_AICORE_NUM": tuple(str(number) for number in range(1, 33)),
    "ACL_OPTYPELIST_FOR_IMPLMODE": None,
    "ACL_OP_DEBUG_LEVEL": ("0", "1", "2", "3", "4"),
    "ACL_DEBUG_DIR": None,
    "ACL_OP_COMPILER_CACHE_MODE": ("disable", "enable", "force"),
    "ACL_OP_COMPILER_CACHE_DIR": None,
    "ACL_OP_DEBUG_OPTION": None,
}
_DEPRECATED = ("ACL_OP_SELECT_IMPL_MODE", "ACL_OPTYPELIST_FOR_IMPLMODE")


class _Switches:
    def __init__(self) -> None:
        self.options: dict[str, str] = {}
        self.matrices_are_plain = True
        self.task_queue = int(os.environ.get("TASK_QUEUE_ENABLE", "1"))


_switches = _Switches()


def option(name: str) -> str | None:
    """The value that an option was set to."""
    return _switches.options.get(name)


def set_option(option: dict[str, object]) -> None:
    """Sets options of CANN by name.

    Raises:
        TypeError: it is no dict.
        ValueError: an option has no such value.
    """
    if not isinstance(option, dict):
        raise TypeError("npu option must be a dict." + pta_error(ErrCode.PARAM))
    plain = option.get("MM_BMM_ND_ENABLE")
    if plain in ("enable", "disable"):
        set_mm_bmm_format_nd(plain == "enable")
    for name, value in option.items():
        allowed = _VALUES.get(name)
        if allowed is not None and str(value) not in allowed:
            raise ValueError(
                f"value of {name} should be in {list(allowed)} but got {value}"
                + pta_error(ErrCode.PARAM)
            )
        if name in _DEPRECATED:
            warnings.warn(f"{name} is deprecated; leave it at its default.", stacklevel=2)
        _switches.options[name] = str(value)


def set_compile_mode(jit_compile: bool = False) -> None:
    """Whether operators are compiled for each shape, or taken from CANN's binaries."""
    if _lazy.is_initialized():
        synchronize()
    set_option({"jitCompile": "enable" if jit_compile else "disable"})


def is_jit_compile_false() -> bool:
    """Whether operators come from CANN's binaries; on this chip they do unless told otherwise."""
    _lazy.lazy_init()
    return option("jitCompile") != "enable"


def set_mm_bmm_format_nd(is_nd: bool = True) -> None:
    """Whether matrix products use the plain format."""
    _switches.matrices_are_plain = bool(is_nd)


def get_mm_bmm_format_nd() -> bool:
    """See :func:`set_mm_bmm_format_nd`."""
    return _switches.matrices_are_plain


def set_task_queue_enable(mode: int | str) -> None:
    """Sets the level of the task queue, 0 to 2."""
    if int(mode) not in (0, 1, 2):
        raise RuntimeError(f"mode must be 0, 1, or 2, but got {mode}." + pta_error(ErrCode.VALUE))
    _switches.task_queue = int(mode)


def get_task_queue_enable() -> int:
    """The level of the task queue that holds."""
    blocking = os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1"
    return 0 if blocking else _switches.task_queue


def get_sync_debug_mode() -> int:
    """0: waiting for the device is neither warned of nor refused."""
    return 0


def set_sync_debug_mode(debug_mode: int | str) -> None:
    """Only ``default`` (0) is simulated; ``npu_sim.record`` lists what waits for the device."""
    modes: dict[int | str, int] = {"default": 0, "warn": 1, "error": 2, 0: 0, 1: 1, 2: 2}
    if debug_mode not in modes:
        raise RuntimeError(
            "invalid value of debug_mode, expected one of `default`, `warn`, `error`"
            + pta_error(ErrCode.PARAM)
        )
    if modes[debug_mode]:
        raise recorded.refusal(f"torch.npu.set_sync_debug_mode({debug_mode!r})")


def _enabled(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"allow_hf32 must be a bool, but got {type(value).__name__}" + pta_error(ErrCode.TYPE)
        )
    set_option({name: "enable" if value else "disable"})


class Config:
    """``torch.npu.config``: can be written, not read; names it does not know are ignored."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "allow_internal_format":
            set_option({"ALLOW_INTERNAL_FORMAT": "enable" if value else "disable"})


class Convolutions:
    """``torch.npu.conv``: HF32 is allowed by default; unknown names read as None."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "allow_hf32":
            _enabled("ALLOW_CONV_HF32", value)

    def __getattr__(self, name: str) -> Any:
        if name == "allow_hf32":
            return option("ALLOW_CONV_HF32") != "disable"
        return None


class Matrices:
    """``torch.npu.matmul``: HF32 is not allowed by default; unknown names read as None."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "allow_hf32":
            _enabled("ALLOW_MATMUL_HF32", value)
        elif name == "cube_math_type":
            if not isinstance(value, CubeMathType):
                raise TypeError(
                    "value should be one of Enum CubeMathType when setting cube_math_type, "
                    f"but got {type(value)}"
                )
            set_option({"CUBE_MATH_TYPE": str(int(value))})

    def __getattr__(self, name: str) -> Any:
        if name == "allow_hf32":
            return option("ALLOW_MATMUL_HF32") == "enable"
        written = option("CUBE_MATH_TYPE")
        if name == "cube_math_type" and written is not None:
            return CubeMathType(int(written))
        return None


config = Config()
conv = Convolutions()
matmul = Matrices()
