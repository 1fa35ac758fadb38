"""The fused optimizers: torch.optim's updates, over buffers of many parameters."""

from __future__ import annotations

from typing import Any

from torch.optim.adadelta import adadelta
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.optimizer import required
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from npu_sim.npu import _errors

from ._base import NpuFusedOptimizerBase, Part


def _check(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message + _errors.pta_error(_errors.ErrCode.VALUE))


def _check_common(lr: Any, weight_decay: float, eps: float = 0.0) -> None:
    _check(lr is not required and lr < 0.0, f"Invalid learning rate: {lr}")
    _check(eps < 0.0, f"Invalid epsilon value: {eps}")
    _check(weight_decay < 0.0, f"Invalid weight_decay value: {weight_decay}")


def _settings(group: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: group[name] for name in names}


class NpuFusedSGD(NpuFusedOptimizerBase):
    """``torch.optim.SGD``."""

    def __init__(
        self,
        params: Any,
        lr: Any = required,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        _check_common(lr, weight_decay)
        _check(momentum < 0.0, f"Invalid momentum value: {momentum}")
        _check(
            nesterov and (momentum <= 0 or dampening != 0),
            "Nesterov momentum requires a momentum and zero dampening",
        )
        default = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, default)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, group: dict[str, Any], part: Part) -> None:
        buffer = part.states.get("momentum_buffer")
        # The first step's gradient becomes the buffer as it is.
        buffers = [buffer if part.continued else None]
        sgd(
            [part.values],
            [part.grads],
            buffers,
            foreach=False,
            maximize=False,
            **_settings(group, "lr", "momentum", "dampening", "weight_decay", "nesterov"),
        )
        part.step += 1
        if buffer is not None and not part.continued:
            assert buffers[0] is not None
            buffer.copy_(buffers[0])


class _Adam(NpuFusedOptimizerBase):
    """Adam and AdamW."""

    _function: Any

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        amsgrad: bool,
    ) -> None:
        _check_common(lr, weight_decay, eps)
        for index, beta in enumerate(betas):
            _check(not 0.0 <= beta < 1.0, f"Invalid beta parameter at index {index}: {beta}")
        default = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
        }
        super().__init__(params, default)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def _update(self, group: dict[str, Any], part: Part) -> None:
        states = part.states
        type(self)._function(
            [part.values],
            [part.grads],
            [states["exp_avg"]],
            [states["exp_avg_sq"]],
            [states["max_exp_avg_sq"]] if group["amsgrad"] else [],
            [part.step],
            foreach=False,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class NpuFusedAdam(_Adam):
    """``torch.optim.Adam``."""

    _function = staticmethod(adam)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)


class NpuFusedAdamW(_Adam):
    """``torch.optim.AdamW``."""

    _function = staticmethod(adamw)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)


class NpuFusedAdadelta(NpuFusedOptimizerBase):
    """``torch.optim.Adadelta``."""

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
    ) -> None:
        _check_common(lr, weight_decay, eps)
        _check(not 0.0 <= rho <= 1.0, f"Invalid rho value: {rho}")
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay})

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("square_avg", "acc_delta")

    def _update(self, group: dict[str, Any], part: Part) -> None:
        adadelta(
            [part.values],
            [part.grads],
            [part.states["square_avg"]],
            [part.states["acc_delta"]],
            [part.step],
            foreach=False,
            maximize=False,
            **_settings(group, "lr", "rho", "eps", "weight_decay"),
        )


class NpuFusedRMSprop(NpuFusedOptimizerBase):
    """``torch.optim.RMSprop``."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
    ) -> None:
        _check_common(lr, weight_decay, eps)
        _check(momentum < 0.0, f"Invalid momentum value: {momentum}")
        _check(alpha < 0.0, f"Invalid alpha value: {alpha}")
        default = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, default)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ["square_avg"]
        names += ["momentum_buffer"] if group["momentum"] > 0 else []
        return (*names, "grad_avg") if group["centered"] else tuple(names)

    def _update(self, group: dict[str, Any], part: Part) -> None:
        states = part.states
        rmsprop(
            [part.values],
            [part.grads],
            [states["square_avg"]],
            [states["grad_avg"]] if group["centered"] else [],
            [states["momentum_buffer"]] if group["momentum"] > 0 else [],
            [part.step],
            foreach=False,
            maximize=False,
            differentiable=False,
            capturable=False,
            has_complex=False,
            **_settings(group, "lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
        )
