"""Convolutions with fewer multiplications give the numbers of the plain ones."""

import gc
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo_common import winograd
from zoo_common.winograd import inference, training

# Whatever the rounding, of the largest output; F.conv2d itself reaches 3e-6.
TOLERANCE = 1e-5

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available()
    or not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="here the plain way is always taken",
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(outputs: int, channels: int) -> Tensor:
    return draw(outputs, channels, 3, 3, seed=1) / (3 * math.sqrt(channels))


def exact(map_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = None if bias is None else bias.double()
    return F.conv2d(map_BCHW.double(), weight.double(), wide, padding=1)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [one.shape for one in found] == [one.shape for one in expected]
    largest = max(one.detach().abs().max().item() for one in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=TOLERANCE * largest, rtol=0)


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        [(40, 40)],
        [(13, 21), (37, 150), (4, 4), (1, 1)],  # sides that are no multiples of 4, several blocks
        [(3, 700)],  # wider than a product
        [(3, 270), (24, 200), (16, 36)],  # blocks side by side, which begin above the last one
        [(60, 44)],  # more than one product
    ],
)
@pytest.mark.parametrize(("outputs", "channels"), [(128, 144), (80, 512), (130, 258)])
def test_against_float64(sizes: list[tuple[int, int]], outputs: int, channels: int) -> None:
    weight, bias = weights(outputs, channels), draw(outputs, seed=2)
    maps = [draw(2, channels, *size) for size in sizes]
    assert winograd.suits(maps, weight)
    found = winograd.conv3x3(maps, weight, bias)
    assert_close(found, [exact(map_BCHW, weight, bias) for map_BCHW in maps])
    assert_close(
        winograd.conv3x3(maps, weight), [exact(map_BCHW, weight, None) for map_BCHW in maps]
    )


@needs_onednn
@torch.no_grad()
def test_order_of_memory() -> None:
    weight, plain = weights(160, 160), draw(1, 160, 36, 44)
    expected = winograd.conv3x3([plain], weight)[0]
    assert expected.is_contiguous(memory_format=torch.channels_last)
    last = plain.contiguous(memory_format=torch.channels_last)
    assert torch.equal(winograd.conv3x3([last], weight)[0], expected)
    part = torch.cat([last, last], dim=1)[:, :160]  # channels of a wider map
    assert torch.equal(winograd.conv3x3([part], weight)[0], expected)


@needs_onednn
def test_what_inference_mode_makes_is_used_outside_of_it() -> None:
    weight, map_BCHW = weights(160, 160).requires_grad_(), draw(1, 160, 33, 45)
    with torch.inference_mode():
        expected = winograd.conv3x3([map_BCHW], weight)[0]
        packed = inference._kept[weight].packed
    with torch.no_grad():
        assert torch.equal(winograd.conv3x3([map_BCHW.requires_grad_()], weight)[0], expected)
    assert inference._kept[weight].packed is packed


@torch.no_grad()
def test_few_channels_and_few_tiles_take_the_plain_way() -> None:
    for size, channels in ((40, 8), (8, 160)):
        weight, map_BCHW = weights(channels, channels), draw(1, channels, size, size)
        assert not winograd.suits([map_BCHW], weight)
        found = winograd.conv3x3([map_BCHW], weight)[0]
        assert torch.equal(found, F.conv2d(map_BCHW, weight, padding=1))


@torch.no_grad()
def test_other_formats_and_devices_take_the_plain_way() -> None:
    weight, map_BCHW = weights(160, 160), draw(1, 160, 40, 40)
    for dtype in (torch.float64, torch.bfloat16):
        assert not winograd.suits([map_BCHW.to(dtype)], weight.to(dtype))
    assert not winograd.suits([map_BCHW.to("meta")], weight.to("meta"))
    assert winograd.conv3x3([map_BCHW.to("meta")], weight.to("meta"))[0].is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert winograd.conv3x3([map_BCHW], weight)[0].dtype is torch.bfloat16


@needs_onednn
@pytest.mark.parametrize("sizes", [[(40, 40), (12, 16)], [(32, 44)], [(4, 200)]])
@pytest.mark.parametrize(("outputs", "channels"), [(256, 258), (320, 256)])
def test_gradients_against_float64(
    sizes: list[tuple[int, int]], outputs: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_CHUNK", 36 * channels * 150)  # several of them
    maps = [draw(2, channels, *size) for size in sizes]
    weight, bias = weights(outputs, channels), draw(outputs, seed=2)
    given = [weight, bias, *maps]
    inputs = [tensor.clone().requires_grad_() for tensor in given]
    assert winograd.suits(inputs[2:], inputs[0])
    wide = [tensor.double().requires_grad_() for tensor in given]
    found = winograd.conv3x3(inputs[2:], inputs[0], inputs[1])
    expected = [F.conv2d(one, wide[0], wide[1], padding=1) for one in wide[2:]]
    assert_close(found, expected)
    pulls = [draw(*one.shape, seed=3) for one in found]
    found_grads = torch.autograd.grad(found, inputs, pulls)
    expected_grads = torch.autograd.grad(expected, wide, [pull.double() for pull in pulls])
    for one, other in zip(found_grads, expected_grads, strict=True):
        assert_close([one], [other])


@needs_onednn
def test_only_wanted_gradients() -> None:
    weight, map_BCHW = weights(256, 256), draw(1, 256, 40, 40).requires_grad_()
    winograd.conv3x3([map_BCHW], weight)[0].sum().backward()
    assert weight.grad is None and map_BCHW.grad is not None
    layer = weights(256, 256).requires_grad_()
    winograd.conv3x3([map_BCHW.detach()], layer)[0].sum().backward()
    assert layer.grad is not None


@needs_onednn
def test_gradients_drop_what_is_kept() -> None:
    weight, map_BCHW = weights(160, 160).requires_grad_(), draw(1, 160, 40, 40)
    with torch.no_grad():
        winograd.conv3x3([map_BCHW], weight)
    assert weight in inference._kept
    out = winograd.conv3x3([map_BCHW], weight)[0]
    assert weight not in inference._kept
    out.sum().backward()
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


@needs_onednn
@torch.no_grad()
def test_filters_follow_their_weight() -> None:
    weight, map_BCHW = torch.nn.Parameter(weights(160, 160)), draw(1, 160, 40, 40)

    def check(weight: Tensor) -> Tensor:
        found = winograd.conv3x3([map_BCHW], weight)
        assert_close(found, [exact(map_BCHW, weight, None)])
        return inference._kept[weight].packed

    first = check(weight)
    assert check(weight) is first  # made once
    weight.mul_(-2)
    second = check(weight)
    weight.data = weights(160, 160).flip(0)
    third = check(weight)
    assert first is not second and second is not third
    kept = len(inference._kept)
    del weight
    gc.collect()
    assert len(inference._kept) == kept - 1
