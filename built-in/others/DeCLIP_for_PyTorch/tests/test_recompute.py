"""Outputs of norms made anew in the backward pass: the same numbers from less memory."""

import copy

import pytest
import torch
from detector_runs import DEVICE
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from declip.recompute import behind_norm
from declip.resnet import ModifiedResNet

pytestmark = pytest.mark.device


def network(recompute: str) -> nn.Module:
    torch.manual_seed(0)
    return ModifiedResNet(
        input_size=64, depths=(1, 2, 1, 1), width=8, heads=4, embed_dim=6, recompute=recompute
    ).to(DEVICE)


def train(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor | None], int]:
    """Features of a step, gradients, and the bytes that autograd keeps, each memory once."""
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        features = model(images)
    features.square().sum().backward()
    return features.detach(), [one.grad for one in model.parameters()], sum(kept.values())


def test_features_gradients_and_statistics_are_bit_equal():
    plain, again = network("off"), network("on")
    one, other = train(plain), train(again)
    assert torch.equal(one[0], other[0])
    for a, b in zip(one[1], other[1], strict=True):
        assert (a is None) is (b is None)
        assert a is None or torch.equal(a, b)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_autograd_keeps_a_fifth_less():
    assert train(network("on"))[2] < 0.8 * train(network("off"))[2]


def test_two_backward_passes_through_one_graph():
    norm, conv = nn.BatchNorm2d(3).to(DEVICE), nn.Conv2d(3, 2, 1).to(DEVICE)
    maps = torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True)
    output = behind_norm(norm, maps, conv, recompute=True).sum()
    output.backward(retain_graph=True)
    assert maps.grad is not None
    once = maps.grad.clone()
    output.backward()
    torch.testing.assert_close(maps.grad, 2 * once)


def test_evaluation_and_training_without_gradients_are_plain():
    model = network("on")
    images = torch.rand(2, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        trained = copy.deepcopy(model)(images)
        assert torch.equal(network("off")(images), trained)
        assert torch.equal(model.eval()(images), network("off").eval()(images))
