"""Convolutions on the CPU, fused and with kept weights, give the numbers of the plain ones."""

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from solov2 import fused
from solov2 import model as model_file
from solov2.layers import FixedBatchNorm, conv, convolve_all, convolve_at
from solov2.model import Detections, build_model
from solov2.static import CLASSES, draw_batch, narrow_config
from zoo_common import winograd

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available()
    or not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="here the plain way is always taken",
)


class Block(nn.Module):
    """A convolution and its normalisation, as the network has them."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv(inputs, outputs, kernel, stride)
        self.bn = FixedBatchNorm(outputs)
        with torch.no_grad():
            for tensor in (self.bn.weight, self.bn.bias, self.bn.running_mean):
                tensor.normal_()
            self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor, plus: Tensor | None = None, relu: bool = False) -> Tensor:
        y: Tensor = self.bn(self.conv, x, plus_BCHW=plus, relu=relu)
        return y

    def plain(self, x: Tensor, plus: Tensor | None = None, relu: bool = False) -> Tensor:
        """From the definitions, in float64."""
        layer, bn = copy.deepcopy(self.conv).double(), copy.deepcopy(self.bn).double()
        with torch.no_grad():
            y = layer(x.double())
            y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
            y = y if plus is None else y + plus.double()
            return y.relu() if relu else y


def check(block: Block, x: Tensor, plus: Tensor | None = None, relu: bool = False) -> None:
    with torch.no_grad():
        found = block(x, plus, relu)
    expected = block.plain(x, plus, relu)
    largest = expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, atol=1e-5 * largest, rtol=0)


SHAPES = [(64, 96, 1, 1), (48, 64, 3, 2), (3, 16, 7, 2), (128, 128, 3, 1), (96, 64, 1, 2)]


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "stride"), SHAPES)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_against_float64(
    inputs: int, outputs: int, kernel: int, stride: int, order: torch.memory_format
) -> None:
    block = Block(inputs, outputs, kernel, stride)
    for size in ((40, 44), (36, 60), (7, 9), (40, 44)):  # what is kept is of one of them
        x = torch.randn(2, inputs, *size).contiguous(memory_format=order)
        plus = torch.randn_like(block.plain(x)).float().contiguous(memory_format=order)
        before = plus.clone()
        for relu in (False, True):
            check(block, x, relu=relu)
            check(block, x, plus, relu)
        assert torch.equal(plus, before)


@needs_onednn
@pytest.mark.parametrize(("channels", "kernel"), [(64, 1), (128, 3)])
def test_weights_are_made_once(channels: int, kernel: int) -> None:
    block, x = Block(channels, channels, kernel), torch.randn(1, channels, 40, 44)
    check(block, x)
    kept = fused._kept[block.conv.weight]
    assert (kept.size is None) == (kernel == 3)  # the wide one goes to zoo_common.winograd
    check(block, x)
    assert fused._kept[block.conv.weight] is kept
    with torch.inference_mode():
        block(x)
    assert fused._kept[block.conv.weight] is kept


def load(block: Block) -> None:
    block.load_state_dict({name: value + 1 for name, value in block.state_dict().items()})


def replace(block: Block) -> None:
    block.conv.weight.data = block.conv.weight.data.flip(0).clone()


def convert(block: Block) -> None:
    block.bfloat16()
    block.float()


def train(block: Block) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(torch.randn(1, block.conv.in_channels, 40, 44)).square().mean().backward()
    optimizer.step()


def shift(block: Block) -> None:
    block.bn.running_mean.add_(1)


def widen(block: Block) -> None:
    block.bn.running_var = block.bn.running_var * 2


@pytest.mark.parametrize("change", [load, replace, convert, train, shift, widen])
@pytest.mark.parametrize(("channels", "kernel"), [(64, 1), (128, 3)])
def test_changed_weights_are_used(
    channels: int, kernel: int, change: Callable[[Block], None]
) -> None:
    block, x = Block(channels, channels, kernel), torch.randn(1, channels, 40, 44)
    with torch.no_grad():
        before = block(x)
    check(block, x)
    change(block)
    check(block, x)
    with torch.no_grad():
        assert not torch.equal(block(x), before)


@needs_onednn
def test_gradients_drop_what_is_kept() -> None:
    block, x = Block(128, 128, 3), torch.randn(1, 128, 40, 44)
    check(block, x)
    assert block.conv.weight in fused._kept
    block(x).sum().backward()
    assert block.conv.weight not in fused._kept
    assert block.conv.weight.grad is not None and block.bn.weight.grad is not None


@needs_onednn
def test_what_is_kept_lives_as_long_as_the_layer() -> None:
    gc.collect()
    before = len(fused._kept), len(winograd.inference._kept)
    block = Block(128, 128, 3)
    check(block, torch.randn(1, 128, 40, 44))
    assert (len(fused._kept), len(winograd.inference._kept)) == (before[0] + 1, before[1] + 1)
    del block
    gc.collect()
    assert (len(fused._kept), len(winograd.inference._kept)) == before


def test_copies_and_files_know_nothing_of_it() -> None:
    block, x = Block(64, 64, 1), torch.randn(1, 64, 20, 20)
    names = list(block.state_dict())
    check(block, x)
    assert list(block.state_dict()) == names
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        with torch.no_grad():
            other.conv.weight.mul_(-1)
        check(other, x)
        check(block, x)


@torch.no_grad()
def test_kernels_at_some_cells() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3, padding=1)
    maps = [torch.randn(2, 6, *size) for size in ((5, 5), (3, 4), (1, 1))]
    everywhere = torch.cat([y.flatten(2) for y in convolve_all(layer, maps)], dim=2)
    cells_BM = torch.stack([torch.randperm(38), torch.randint(0, 38, (38,))])
    index = cells_BM[:, None].expand(-1, 4, -1)
    expected = everywhere.gather(2, index).transpose(1, 2)
    torch.testing.assert_close(convolve_at(layer, maps, cells_BM), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["FEW_CELLS", "RATED"])
def test_shortcuts_of_a_cpu_find_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_model(narrow_config(), CLASSES).eval()
    nn.init.constant_(model.bbox_head.solo_cate.bias, -1)  # scores above the threshold
    batch = draw_batch(0, images=2)

    def find(limit: int) -> Detections:
        monkeypatch.setattr(model_file, name, limit)
        found: Detections = model(batch)
        return found

    assert find(1).valid_BD.any()
    for one, other in zip(find(1), find(10**9), strict=True):
        torch.testing.assert_close(one, other)
