"""Mixed precision under apex's names, built on torch.amp: the same on npu, cuda and cpu.

=====  ===================================================================================
O0     float32.
O1     autocast: float32 weights, and torch.amp decides the format operator by operator.
O2     half-precision model: weights, activations and gradients are float16 or bfloat16,
       normalisation layers compute in float32, and the optimizer holds float32 masters
       of the weights. ``model(...)`` takes float32 and gives float32.
=====  ===================================================================================

float16 scales the loss so that small gradients survive, and skips a step whose gradients
overflow; bfloat16 has float32's range and does neither. A step under bfloat16 or float32 reads
nothing back to the host, one under float16 reads one number (whether to skip).

What differs from apex: every kind of normalisation stays float32 under O2 (apex: batch
normalisation), frozen and tied weights included; bfloat16; no O3.

The loss scaling inside torch.optim's ``fused=True`` kernels is left aside: those of torch_npu
have none, and a skip inside a kernel could not be counted. ``fused=True`` itself works, as the
optimizer gets gradients in true units and is not called for a skipped step. torch_npu's own
``NpuFused*`` optimizers do not: they need gradients that keep their memory.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

from zoo_common.config import PrecisionConfig
from zoo_common.errors import TrainingError, UserError

INITIAL_SCALE = 2.0**16
# float16 loses nothing at a scale of 1, so a scale this far below it can only mean that the
# gradients themselves are not finite.
SMALLEST_SCALE = 2.0**-14
# A static scale cannot give way; so many skipped steps in a row are no training any more.
MOST_SKIPS_IN_A_ROW = 50

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def resolve_dtype(config: PrecisionConfig, device: torch.device) -> torch.dtype:
    """The format that the run computes in: float32 under O0, else the half-precision one.

    Raises:
        UserError: an unknown level or format, or one that the device does not have.
    """
    if config.opt_level not in ("O0", "O1", "O2"):
        raise UserError(f"--amp={config.opt_level} is no precision level: choose O0, O1 or O2.")
    if config.dtype not in ("auto", *_DTYPES):
        raise UserError(
            f"--dtype={config.dtype} is no half-precision format: choose auto, float16 or bfloat16."
        )
    if config.opt_level == "O0":
        return torch.float32
    if config.dtype == "auto":
        # CPUs have no float16 arithmetic worth the name: it is about 8 times slower there.
        return torch.bfloat16 if device.type == "cpu" else torch.float16
    dtype = _DTYPES[config.dtype]
    has_bfloat16 = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if dtype is torch.bfloat16 and has_bfloat16 is not None and not has_bfloat16():
        raise UserError(
            f"--dtype=bfloat16 is not supported by this {device.type} device: choose float16."
        )
    return dtype


def inference_autocast(
    config: PrecisionConfig, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """Context of a forward pass of a model that no :class:`Precision` prepared: O2 is as O1."""
    dtype = resolve_dtype(config, device)
    if dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


class Precision:
    """Runs forward passes and optimizer steps of one model in the chosen precision.

    ::

        precision = Precision(config.precision, model, optimizer, device)  # before DDP
        network = DistributedDataParallel(model)
        for batch in batches:
            with precision.autocast(network):
                loss = loss_of(network(batch))
            if precision.step(loss):
                schedule.step()

    Under O2 the constructor converts ``model`` in place and puts float32 masters into the
    optimizer's parameter groups, so initial weights are loaded before, and everything that
    reads weights afterwards (checkpoints, an EMA) reads :meth:`model_state_dict`. Only
    ``model(...)`` casts its inputs and outputs, other methods of the model do not.

    Attributes:
        model: the model that was handed in.
        optimizer: the optimizer that was handed in.
        scaler: the loss scaler, disabled unless the format is float16.
        dtype: what the run computes in.
        steps: optimizer steps done.
        skipped_steps: steps left out because gradients overflowed (float16 only).
        grad_norm: global gradient norm of the last step before clipping, in true units, a
            float32 scalar on the device; not finite for a skipped step; None without clipping.
        name_step: names the step under way for an error, at best with its images.
    """

    def __init__(
        self,
        config: PrecisionConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        float32_inputs: Collection[str] = (),
    ) -> None:
        """Prepares model and optimizer.

        Args:
            config: the settings.
            model: float32 model on ``device``, not yet wrapped for distributed training.
            optimizer: over parameters of ``model``, before its first step.
            device: where the model is.
            float32_inputs: keyword arguments, dictionary keys and dataclass fields that
                ``model(...)`` takes uncast under O2, such as boxes in pixels.

        Raises:
            UserError: a setting has no meaning; the message names its option.
        """
        self.dtype = resolve_dtype(config, device)
        self._static_scale = _parse_scale(config.loss_scale)
        if not 0 <= config.clip_grad < float("inf"):
            raise UserError(
                f"precision.clip_grad={config.clip_grad} is no gradient norm: give a positive "
                "number, or 0 for no clipping."
            )
        if config.accumulate < 1:
            raise UserError(
                f"precision.accumulate={config.accumulate} is no number of micro-batches: "
                "give 1 or more."
            )
        self.model = model
        self.optimizer = optimizer
        self.steps = 0
        self.skipped_steps = 0
        self.grad_norm: Tensor | None = None
        self.name_step: Callable[[], str] = lambda: f"the step after {self.steps} good ones"
        self._config = config
        self._device_type = device.type
        self._micro_steps = 0
        self._skipped_in_a_row = 0
        self._undo: Callable[[], None] | None = None
        self.scaler = GradScaler(
            device.type,
            init_scale=self._static_scale or INITIAL_SCALE,
            enabled=self.dtype is torch.float16,
        )
        if self.scaler.is_enabled():
            # Makes GradScaler leave out the step itself, see the head of this file.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        optimizer.register_step_post_hook(self._count_step)
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        if config.opt_level == "O2":
            assert not optimizer.state, "masters cannot take over the state of earlier steps"
            _take_weights_of_rank_0(model)
            self._masters = _halve(model, self.dtype)
            _cast_calls(model, self.dtype, torch.float32, frozenset(float32_inputs))
            for group in optimizer.param_groups:
                group["params"] = [self._masters.get(p, p) for p in group["params"]]

    @property
    def loss_scale(self) -> float:
        """Factor on the loss, 1 when it is not scaled; waits for the device under float16."""
        return self.scaler.get_scale()

    @property
    def at_boundary(self) -> bool:
        """Whether no micro-batch waits for its optimizer step."""
        return self._micro_steps == 0

    def describe(self) -> str:
        """The settings in one line, such as ``O1 float16, dynamic loss scale, clip 5``."""
        parts = [f"{self._config.opt_level} {str(self.dtype).removeprefix('torch.')}"]
        if self.scaler.is_enabled():
            static = self._static_scale
            parts.append("dynamic loss scale" if static is None else f"loss scale {static:g}")
        if self._config.clip_grad:
            parts.append(f"clip {self._config.clip_grad:g}")
        if self._config.accumulate > 1:
            parts.append(f"{self._config.accumulate} micro-batches per step")
        return ", ".join(parts)

    @contextlib.contextmanager
    def autocast(self, network: nn.Module | None = None) -> Iterator[None]:
        """Context of a forward pass, in training and evaluation.

        Args:
            network: the DistributedDataParallel module of a training pass. With it, the passes
                before the last one of an accumulated step exchange no gradients. DDP decides
                that in its forward pass, which is why it is asked for here.
        """
        with contextlib.ExitStack() as stack:
            last = self._micro_steps + 1 == self._config.accumulate
            if not last and hasattr(network, "no_sync"):
                stack.enter_context(network.no_sync())  # type: ignore[union-attr, operator]
            if self._config.opt_level == "O1":
                stack.enter_context(torch.autocast(self._device_type, self.dtype))
            yield

    def step(self, loss: Tensor) -> bool:
        """Backward pass, and the optimizer step when this was its last micro-batch.

        The loss is divided by ``accumulate``, so that micro-batches of equal size give the
        gradients of one large batch; gradients are clipped once, over all parameters of the
        optimizer, in true units. Under O2 micro-batches add up in half precision.

        Args:
            loss: float32 scalar, the mean over the micro-batch.

        Returns:
            Whether the optimizer stepped: not between micro-batches, nor after
            :meth:`leave_out`, nor on overflow, when weights and optimizer state stay as they are
            and ``skipped_steps`` counts it.

        Raises:
            TrainingError: gradients overflow float16 step after step.
        """
        assert loss.dtype is torch.float32, "losses are computed in float32"
        if self._config.accumulate > 1:
            loss = loss / self._config.accumulate
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._micro_steps = (self._micro_steps + 1) % self._config.accumulate
        if self._micro_steps:
            return False
        if self._undo is not None:
            self._drop_step(self._undo)
            return False

        self._move_gradients_to_masters()
        self.scaler.unscale_(self.optimizer)
        if self._config.clip_grad:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.grad_norm = nn.utils.clip_grad_norm_(parameters, self._config.clip_grad)
        steps_before = self.steps
        self.scaler.step(self.optimizer)
        stepped = self.steps > steps_before
        self.scaler.update(self._static_scale)
        self.optimizer.zero_grad(set_to_none=True)
        if stepped:
            self._skipped_in_a_row = 0
            self._copy_masters_to_model()
        else:
            self._count_skip()
        return stepped

    def leave_out(self, undo: Callable[[], None]) -> None:
        """Leaves out the optimizer step under way; call it on all ranks, before :meth:`step`.

        Backward passes are done as ever, since all ranks take part in them. The gradients are
        dropped; weights, optimizer and loss scale stay as they are.

        Args:
            undo: called after the last backward pass; puts back what forward passes changed.
        """
        self._undo = undo

    def state_dict(self) -> dict[str, Any]:
        """All of a training state but the weights: the optimizer, the scaler, the counters."""
        assert self.at_boundary, "gradients of waiting micro-batches are not saved"
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`; the precision may be another one by now."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.skipped_steps = state["skipped_steps"]
        if state["scaler"] and self._static_scale is None:
            self.scaler.load_state_dict(state["scaler"])

    def model_state_dict(self) -> dict[str, Any]:
        """The model's ``state_dict()`` with float32 weights, under O2 the masters.

        As with ``state_dict()`` the tensors are the live weights: copy what shall not change.
        """
        with self._masters_in_model():
            state = self.model.state_dict()
        if self._masters:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dtype is self.dtype:
                    state[key] = value.float()  # a buffer, which has no master
        return state

    def load_model_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Fills the model and its masters; arguments and result as ``nn.Module`` has them."""
        with self._masters_in_model():
            result = self.model.load_state_dict(state, strict=strict)
        self._copy_masters_to_model()
        return result

    @contextlib.contextmanager
    def _masters_in_model(self) -> Iterator[None]:
        """Lets the model's own saving and loading code, hooks included, see the masters.

        The half-precision parameters are taken out and put back as they are: giving them other
        data would make autograd drop the hooks by which DDP exchanges gradients.
        """
        places = [
            (module, name, parameter)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter in self._masters
        ]
        try:
            for module, name, parameter in places:
                module._parameters[name] = self._masters[parameter]
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter

    def _move_gradients_to_masters(self) -> None:
        pairs = [(p.grad, master) for p, master in self._masters.items() if p.grad is not None]
        if not pairs:
            return
        gradients = [torch.empty_like(master) for _, master in pairs]
        torch._foreach_copy_(gradients, [half for half, _ in pairs])
        for gradient, (_, master) in zip(gradients, pairs, strict=True):
            master.grad = gradient
        for parameter in self._masters:
            parameter.grad = None

    @torch.no_grad()
    def _copy_masters_to_model(self) -> None:
        if self._masters:
            torch._foreach_copy_(list(self._masters), list(self._masters.values()))

    def _drop_step(self, undo: Callable[[], None]) -> None:
        self._undo = None
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._masters:
            parameter.grad = None
        undo()

    def _count_step(self, *_: Any) -> None:
        self.steps += 1

    def _count_skip(self) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        advice = "lower the learning rate, clip gradients, or train with --dtype=bfloat16"
        if self.loss_scale < SMALLEST_SCALE:
            raise TrainingError(
                f"The loss scale only falls: the gradients of {self.name_step()} are not finite "
                f"even at a loss scale of {self.loss_scale:g}, after {self.skipped_steps} skipped "
                f"steps; {advice}."
            )
        if self._skipped_in_a_row == MOST_SKIPS_IN_A_ROW:
            raise TrainingError(
                f"Gradients overflowed float16 {MOST_SKIPS_IN_A_ROW} times in a row at a loss "
                f"scale of {self.loss_scale:g}, those of {self.name_step()} the last: set "
                f"--loss_scale=dynamic or a smaller number, {advice}."
            )


def _parse_scale(text: str) -> float | None:
    """A static loss scale, or None for a dynamic one."""
    if text == "dynamic":
        return None
    try:
        scale = float(text)
    except ValueError:
        scale = float("nan")
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= scale <= limits.max:
        raise UserError(
            f"--loss_scale={text} is no loss scale: write dynamic, or a positive number such as "
            "128."
        )
    return scale


def _take_weights_of_rank_0(model: nn.Module) -> None:
    """Does what DDP does when it wraps a model, too late for the masters, which it never sees."""
    if dist.is_available() and dist.is_initialized():
        for parameter in model.parameters():
            sent = parameter.detach().contiguous()
            dist.broadcast(sent, 0)
            parameter.detach().copy_(sent)


def _halve(model: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, nn.Parameter]:
    """Converts all of a model but its normalisation layers, and casts around those.

    Returns:
        The float32 master of each converted parameter, frozen ones included. A master takes
        over the parameter's memory.
    """
    norms = [module for module in model.modules() if _is_norm(module)]
    stays = {id(tensor) for norm in norms for tensor in (*norm.parameters(), *norm.buffers())}
    for norm in norms:
        _cast_calls(norm, torch.float32, dtype)
    masters = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in stays:
            assert parameter.dtype is torch.float32, "O2 starts from a float32 model"
            masters[parameter] = nn.Parameter(parameter.detach(), parameter.requires_grad)
            parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point() and id(buffer) not in stays:
            buffer.data = buffer.data.to(dtype)
    return masters


def _is_norm(module: nn.Module) -> bool:
    # Batch and instance normalisation of any library, frozen and synchronised ones included,
    # have running statistics, be they None.
    return isinstance(module, _NORM_LAYERS) or "running_var" in module._buffers


def _cast_calls(
    module: nn.Module,
    inputs: torch.dtype,
    outputs: torch.dtype,
    keep: frozenset[str] = frozenset(),
) -> None:
    """Makes a module cast the floating-point tensors that it is called with and returns."""
    module.register_forward_pre_hook(partial(_cast_inputs, inputs, keep), with_kwargs=True)
    module.register_forward_hook(partial(_cast_output, outputs))


def _cast_inputs(
    dtype: torch.dtype,
    keep: frozenset[str],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _cast(args, dtype, keep), _cast(kwargs, dtype, keep) if kwargs else kwargs


def _cast_output(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(output, dtype)


def _cast(value: Any, dtype: torch.dtype, keep: frozenset[str] = frozenset()) -> Any:
    """Casts the floating-point tensors in nested lists, tuples, dicts and dataclasses.

    Containers are made anew, those of the caller stay as they are; a dict becomes a plain one.
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: v if k in keep else _cast(v, dtype, keep) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            if field.name not in keep:
                cast = _cast(getattr(value, field.name), dtype, keep)
                object.__setattr__(result, field.name, cast)  # frozen ones too
        return result
    if hasattr(value, "_fields"):  # a named tuple
        names = [name for name in value._fields if name not in keep]
        return value._replace(**{name: _cast(getattr(value, name), dtype, keep) for name in names})
    if isinstance(value, list | tuple):
        return type(value)([_cast(item, dtype, keep) for item in value])
    return value
