"""A padded batch counts as the batch without the padding."""

import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo_common import device
from zoo_common.detection.extent import Extent

pytestmark = pytest.mark.device
DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))

SIZES = [(32, 32), (24, 30), (17, 1), (9, 31)]


def extent_of(height: int, width: int) -> Extent:
    return Extent(torch.tensor([height, width], device=DEVICE))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_cells_that_count(height: int, width: int, stride: int) -> None:
    extent = extent_of(height, width)
    rows, columns = extent.cells_2(stride).tolist()
    assert (rows, columns) == (-(-height // stride), -(-width // stride))
    inside = extent.inside(stride, 32 // stride, 32 // stride)
    assert inside.sum() == rows * columns and bool(inside[:rows, :columns].all())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_network_with_cleared_padding_gives_the_same_numbers(height: int, width: int) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3, 2, 1).to(DEVICE)
    second = nn.Conv2d(4, 5, 3, 1, 1).to(DEVICE)
    image = torch.randn(2, 3, height, width, device=DEVICE)
    expected = second(first(image))
    padded = F.pad(image, (0, 32 - width, 0, 32 - height))
    middle = extent_of(height, width).clear(first(padded), 2)
    found = second(middle)[..., : expected.shape[2], : expected.shape[3]]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_border_is_repeated_once(height: int, width: int) -> None:
    stride = 4
    rows, columns = -(-height // stride), -(-width // stride)
    whole = torch.randn(1, 2, rows, columns, device=DEVICE)
    padded: Tensor = F.pad(whole, (0, 8 - columns, 0, 8 - rows), value=9.0)
    found = extent_of(height, width).extend(padded, stride)
    expected = F.pad(whole, (0, 1, 0, 1), mode="replicate")[..., :8, :8]
    assert torch.equal(found[..., : expected.shape[2], : expected.shape[3]], expected)
