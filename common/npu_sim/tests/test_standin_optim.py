"""torch_npu.optim of the stand-in: torch.optim's updates, torch_npu's limits."""

import copy
import os
from typing import Any

import pytest
import torch

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the stand-in: python -m npu_sim pytest", allow_module_level=True)

import torch_npu

pytestmark = pytest.mark.device

CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.9)}),
    ("Adadelta", {"lr": 0.5}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
    ("RMSprop", {"lr": 0.01, "weight_decay": 0.1}),
]


def make(
    name: str, options: dict[str, Any], fused: bool
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Three parameters of two groups and an optimizer of either package."""
    draw = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=draw).to("npu"))
        for shape in ((3, 4), (5,), (2, 2))
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": options["lr"] * 2}]
    cls = getattr(torch_npu.optim, f"NpuFused{name}") if fused else getattr(torch.optim, name)
    return params, cls(groups, **options)


def train(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        scale = 1 + step % 3
        sum((param.sin() * scale).square().sum() for param in params).backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_updates_are_those_of_torch(name: str, options: dict[str, Any]) -> None:
    ours, fused = make(name, options, fused=True)
    theirs, plain = make(name, options, fused=False)
    train(ours, fused, range(4))
    train(theirs, plain, range(4))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_goes_on_from_a_checkpoint(name: str, options: dict[str, Any]) -> None:
    straight, optimizer = make(name, options, fused=True)
    train(straight, optimizer, range(2))
    broken, other = make(name, options, fused=True)
    with torch.no_grad():
        for one, source in zip(broken, straight, strict=True):
            one.copy_(source)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, optimizer, range(2, 5))
    train(broken, other, range(2, 5))
    for one, source in zip(broken, straight, strict=True):
        torch.testing.assert_close(one, source)


def test_parameters_lie_in_one_buffer() -> None:
    params, optimizer = make("SGD", {"lr": 0.1}, fused=True)
    train(params, optimizer, range(1))
    values, halves = optimizer.get_combined_params()
    assert halves is None and values.numel() == 12 + 5 + 4
    values.zero_()
    assert all(not param.any() for param in params)
    grads, _ = optimizer.get_combined_grads()
    grads.fill_(1.0)
    assert all(param.grad.eq(1).all() for param in params)
    optimizer.zero_grad()
    assert all(not param.grad.any() for param in params)


def test_gradients_are_clipped_together() -> None:
    params, optimizer = make("SGD", {"lr": 0.1}, fused=True)
    copies, _ = make("SGD", {"lr": 0.1}, fused=False)
    for group in (params, copies):
        sum(param.square().sum() for param in group).backward()
    norm = optimizer.clip_grad_norm_fused_(1.5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(copies, 1.5))
    for one, other in zip(params, copies, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_float16_has_a_buffer_of_its_own() -> None:
    params = [torch.nn.Parameter(torch.ones(3, device="npu", dtype=dtype))
              for dtype in (torch.float16, torch.float32)]  # fmt: skip
    optimizer = torch_npu.optim.NpuFusedAdamW(params, lr=0.1)
    train(params, optimizer, range(1))
    floats, halves = optimizer.get_combined_params()
    assert (floats.dtype, halves.dtype) == (torch.float32, torch.float16)
    assert params[0].dtype is torch.float16 and not params[0].eq(1).any()


def test_refusals() -> None:
    params = [torch.nn.Parameter(torch.ones(3, device="npu", dtype=torch.bfloat16))]
    optimizer = torch_npu.optim.NpuFusedAdamW(params)
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(TypeError, match=r"either float32 or float16, but received torch\.bfloat16"):
        optimizer.step()
    with pytest.raises(ValueError, match="set_to_none is not supported in fused optimizers"):
        optimizer.zero_grad(set_to_none=True)
    for keyword in ("maximize", "foreach", "fused"):
        with pytest.raises(TypeError, match=keyword):
            torch_npu.optim.NpuFusedAdamW(params, **{keyword: True})
    for message, options in {
        "Invalid learning rate: -1": {"lr": -1},
        "Invalid beta parameter at index 1": {"betas": (0.9, 1.0)},
        "Invalid epsilon value": {"eps": -1.0},
        "Invalid weight_decay value": {"weight_decay": -1.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            torch_npu.optim.NpuFusedAdamW(params, **options)
    with pytest.raises(ValueError, match="Nesterov momentum requires"):
        torch_npu.optim.NpuFusedSGD(params, lr=0.1, nesterov=True)
    with pytest.raises(NotImplementedError, match="NpuFusedLamb"):
        torch_npu.optim.NpuFusedLamb(params)
