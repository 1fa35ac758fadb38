"""``torch.npu.amp``: mixed precision under torch_npu's names."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch.amp.grad_scaler import OptState

from npu_sim.npu import _device, _lazy
from npu_sim.npu._errors import ErrCode, pta_error

__all__ = ["GradScaler", "autocast", "custom_bwd", "custom_fwd"]


class autocast(torch.amp.autocast_mode.autocast):  # noqa: N801 torch's name
    """``torch.autocast("npu", ...)``."""

    def __init__(
        self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True
    ) -> None:
        super().__init__("npu", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler("npu", ...)`` that can also keep its scale.

    Args:
        init_scale: the scale to start with.
        growth_factor: what the scale grows by, over 1.
        backoff_factor: what it shrinks by when gradients overflow, under 1.
        growth_interval: steps without an overflow until it grows.
        dynamic: False keeps the scale and steps whatever the gradients are.
        enabled: False makes it do nothing.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        dynamic: bool = True,
        enabled: bool = True,
    ) -> None:
        if enabled and not _lazy.is_available():
            warnings.warn(
                "torch_npu.amp.GradScaler is enabled, but NPU is not available. Disabling.",
                stacklevel=2,
            )
            enabled = False
        if enabled and growth_factor <= 1.0:
            raise ValueError("The growth factor must be > 1.0." + pta_error(ErrCode.VALUE))
        if enabled and backoff_factor >= 1.0:
            raise ValueError("The backoff factor must be < 1.0." + pta_error(ErrCode.VALUE))
        super().__init__(
            "npu", init_scale, growth_factor, backoff_factor, growth_interval, enabled=enabled
        )
        self._dynamic = dynamic

    def scale(self, outputs: Any) -> Any:
        """Multiplies a tensor, or tensors, of the NPU by the scale."""
        if self._enabled:
            _check_on_npu(outputs)
        return super().scale(outputs)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides gradients by the scale, once a step."""
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Steps unless gradients overflow; a kept scale steps in any case."""
        if not self._enabled or self._dynamic:
            return super().step(optimizer, *args, **kwargs)
        if "closure" in kwargs:
            raise RuntimeError(
                "Closure use is not currently supported if GradScaler is enabled."
                + pta_error(ErrCode.NOT_SUPPORT)
            )
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.READY:
            self.unscale_(optimizer)
        result: float | None = optimizer.step(*args, **kwargs)
        state["stage"] = OptState.STEPPED
        return result

    def _maybe_opt_step(
        self,
        optimizer: torch.optim.Optimizer,
        optimizer_state: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> float | None:
        if sum(found.item() for found in optimizer_state["found_inf_per_device"].values()):
            print("Gradient overflow. Skipping step")
            return None
        result: float | None = optimizer.step(*args, **kwargs)
        return result

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Sets the scale for the next step."""
        if not self._enabled or self._dynamic or new_scale is not None:
            super().update(new_scale)
            return
        self._per_optimizer_states.clear()

    @staticmethod
    def get_npu_overflow_flag() -> NoReturn:
        """Exists for older chips only."""
        _device.get_npu_overflow_flag()

    @staticmethod
    def clear_npu_overflow_flag() -> None:
        """Does nothing on this chip."""
        _device.clear_npu_overflow_flag()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        state = super().state_dict()
        return {**state, "dynamic": self._dynamic} if self._enabled else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` of another one gave."""
        super().load_state_dict(state_dict)
        if self._enabled:
            self._dynamic = state_dict["dynamic"]


def _check_on_npu(outputs: Any) -> None:
    if isinstance(outputs, torch.Tensor):
        if outputs.device.type != "npu":
            raise ValueError("Device type of outputs should be npu." + pta_error(ErrCode.VALUE))
    elif isinstance(outputs, list | tuple):
        for output in outputs:
            _check_on_npu(output)
    elif not isinstance(outputs, Iterable):
        raise TypeError(
            "outputs must be a Tensor or an iterable of Tensors" + pta_error(ErrCode.TYPE)
        )


def _deprecated(name: str) -> None:
    warnings.warn(
        f"`torch_npu.npu.amp.{name}(args...)` is deprecated. "
        f"Please use `torch.amp.{name}(args..., device_type='npu')` instead.",
        FutureWarning,
        stacklevel=3,
    )


def custom_fwd(
    fwd: Callable[..., Any] | None = None, *, cast_inputs: torch.dtype | None = None
) -> Any:
    """Deprecated: ``torch.amp.custom_fwd(device_type="npu")``."""
    _deprecated("custom_fwd")
    return functools.partial(torch.amp.custom_fwd, device_type="npu")(fwd, cast_inputs=cast_inputs)


def custom_bwd(bwd: Callable[..., Any]) -> Any:
    """Deprecated: ``torch.amp.custom_bwd(device_type="npu")``."""
    _deprecated("custom_bwd")
    return torch.amp.custom_bwd(bwd, device_type="npu")
