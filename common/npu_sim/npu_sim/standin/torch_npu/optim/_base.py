"""Combining parameters, gradients and states of an optimizer in flat buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from npu_sim.npu import _errors

# The combined buffers come in this order.
DTYPES = (torch.float32, torch.float16)


class Part:
    """Parameters of one group and one dtype.

    Attributes:
        params: the parameters.
        values: their values in one buffer, which the parameters are views of.
        grads: their gradients likewise.
        states: what the optimizer keeps of them, by name, likewise.
        step: steps that were made.
        continued: whether the states were there before, as after a checkpoint was loaded.
    """

    def __init__(
        self, params: list[torch.nn.Parameter], values: torch.Tensor, grads: torch.Tensor
    ) -> None:
        self.params = params
        self.values = values
        self.grads = grads
        self.states: dict[str, torch.Tensor] = {}
        self.step = torch.tensor(0.0)
        self.continued = False

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """A buffer as tensors in the parameters' shapes."""
        pieces = torch.split(flat, [param.numel() for param in self.params])
        return [piece.view(param.shape) for piece, param in zip(pieces, self.params, strict=True)]


class NpuFusedOptimizerBase(torch.optim.Optimizer):
    """What the fused optimizers have in common.

    Args:
        params: parameters, or groups of them.
        default: settings of groups that do not say otherwise.
    """

    def __init__(self, params: Any, default: dict[str, Any]) -> None:
        super().__init__(params, default)
        self.is_fused_optimizer = True
        self._parts: list[list[Part]] = []
        self._combined_params: list[torch.Tensor | None] = [None, None]
        self._combined_grads: list[torch.Tensor | None] = [None, None]

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the states of a group's parameters."""
        raise NotImplementedError(_errors.pta_error(_errors.ErrCode.NOT_SUPPORT))

    def _update(self, group: dict[str, Any], part: Part) -> None:
        """Moves one buffer of parameters."""
        raise NotImplementedError(_errors.pta_error(_errors.ErrCode.NOT_SUPPORT))

    def _with_grad(self, group: dict[str, Any], dtype: torch.dtype) -> list[torch.nn.Parameter]:
        chosen = []
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.dtype not in DTYPES:
                raise TypeError(
                    "Fused optimizer's parameters must be either float32 or float16, but received "
                    f"{param.dtype}" + _errors.pta_error(_errors.ErrCode.TYPE)
                )
            if param.grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients"
                    + _errors.pta_error(_errors.ErrCode.NOT_SUPPORT)
                )
            if param.dtype == dtype:
                chosen.append(param)
        return chosen

    @torch.no_grad()
    def _combine(self) -> None:
        """Lays parameters and gradients into buffers, at the first step with gradients."""
        if any(self._parts):
            return
        self._parts = [[] for _ in self.param_groups]
        for place, dtype in enumerate(DTYPES):
            chosen = [self._with_grad(group, dtype) for group in self.param_groups]
            flat = [param for params in chosen for param in params]
            if not flat:
                continue
            values = torch.cat([param.detach().reshape(-1) for param in flat])
            grads = torch.cat([_grad(param).reshape(-1) for param in flat])
            self._combined_params[place], self._combined_grads[place] = values, grads
            sizes = [sum(param.numel() for param in params) for params in chosen]
            pieces = zip(chosen, torch.split(values, sizes), torch.split(grads, sizes), strict=True)
            for parts, (params, own_values, own_grads) in zip(self._parts, pieces, strict=True):
                if params:
                    parts.append(Part(params, own_values, own_grads))
        for parts in self._parts:
            for part in parts:
                views = zip(part.views(part.values), part.views(part.grads), strict=True)
                for param, (value, grad) in zip(part.params, views, strict=True):
                    param.data, param.grad = value, grad

    def _combine_states(self, group: dict[str, Any], part: Part) -> None:
        """Makes a part's states, from a checkpoint's if one was loaded."""
        part.step.fill_(float(self.state[part.params[0]].get("step", 0)))
        for name in self._state_names(group):
            flat = torch.zeros_like(part.values)
            for param, view in zip(part.params, part.views(flat), strict=True):
                if name in self.state[param]:
                    part.continued = True
                    view.copy_(self.state[param][name])
                self.state[param][name] = view
            part.states[name] = flat

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes a step; a closure is called once, before it, with gradients off."""
        loss = None if closure is None else closure()
        self._combine()
        for group, parts in zip(self.param_groups, self._parts, strict=True):
            for part in parts:
                if not part.states:
                    self._combine_states(group, part)
                for param in part.params:
                    self.state[param]["step"] = int(part.step) + 1
                self._update(group, part)
                part.continued = True
        return loss

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = False) -> None:
        """Sets the combined gradients to zero; they can't be taken away.

        Raises:
            ValueError: ``set_to_none`` is asked for.
        """
        if set_to_none:
            raise ValueError(
                "set_to_none is not supported in fused optimizers"
                + _errors.pta_error(_errors.ErrCode.VALUE)
            )
        self._combine()
        if not any(self._parts):
            super().zero_grad(set_to_none=False)
        for grads in self._combined_grads:
            if grads is not None:
                grads.zero_()

    def get_combined_params(self) -> list[torch.Tensor | None]:
        """The buffers of float32 and of float16 parameters."""
        return self._combined_params

    def get_combined_grads(self) -> list[torch.Tensor | None]:
        """The buffers of float32 and of float16 gradients."""
        return self._combined_grads

    @torch.no_grad()
    def clip_grad_norm_fused_(self, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """Scales all gradients down to a norm; returns the norm before."""
        self._combine()
        grads = [grad for grad in self._combined_grads if grad is not None]
        if not grads:
            return torch.tensor(0.0)
        order = float(norm_type)
        norms = torch.stack([torch.linalg.vector_norm(grad.float(), order) for grad in grads])
        total: torch.Tensor = torch.linalg.vector_norm(norms, order)
        factor = float(max_norm) / (total + 1e-6)
        if factor < 1:
            for grad in grads:
                grad.mul_(factor)
        return total


def _grad(param: torch.nn.Parameter) -> torch.Tensor:
    assert param.grad is not None
    return param.grad
