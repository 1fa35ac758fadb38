"""zoo_common.detection.ops against torchvision's kernels, in every implementation."""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo_common import device
from zoo_common.detection import ops, ops_reference

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
WAYS = {"cpu": ["cpu", "cuda", "reference"], "cuda": ["cuda", "reference"]}
BY_WAY = pytest.mark.parametrize("way", WAYS.get(DEVICE.type, ["reference"]))
ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="the CPU's own operators")
STRIDES = [4, 8, 16]
# What would make the host wait for the device, or gives shapes that depend on the data.
DYNAMIC = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal"}


class StaticOnly(TorchDispatchMode):
    """Fails on operators of data-dependent shape; lists the names of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        assert name not in DYNAMIC, f"{name} reads the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype is torch.int64 for i in args[1]), "selects by mask"
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_boxes(*shape: int, extent: float = 100, size: float = 30) -> Tensor:
    corner = torch.rand(*shape, 2) * extent
    return torch.cat([corner, corner + torch.rand(*shape, 2) * size], -1)


# nms


def expected_nms(boxes: Tensor, scores: Tensor, threshold: float, valid: Tensor) -> Tensor:
    keep = torch.zeros_like(valid)
    for one, (box, score, mask) in enumerate(zip(boxes, scores, valid, strict=True)):
        rows = mask.nonzero()[:, 0]
        keep[one, rows[torchvision.ops.nms(box[rows], score[rows], threshold)]] = True
    return keep


def check_nms(boxes: Tensor, scores: Tensor, threshold: float, valid: Tensor | None = None) -> int:
    """Compares with torchvision; returns how many boxes were kept."""
    everything = torch.ones_like(scores, dtype=torch.bool)
    expected = expected_nms(boxes, scores, threshold, everything if valid is None else valid)
    on_device = None if valid is None else valid.to(DEVICE)
    with StaticOnly():
        keep = ops.nms(boxes.to(DEVICE), scores.to(DEVICE), threshold, on_device)
    assert keep.dtype is torch.bool
    assert torch.equal(keep.cpu(), expected)
    return int(expected.sum())


@pytest.fixture
def _way(way: ops.Implementation) -> Iterator[None]:
    with ops.implementation(way):
        yield


ANY_WAY = [BY_WAY, pytest.mark.usefixtures("_way")]


def any_way(test: Callable[..., None]) -> Callable[..., None]:
    for mark in ANY_WAY:
        test = mark(test)
    return test


@any_way
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_keeps_what_torchvision_keeps(way: str, threshold: float) -> None:
    valid = torch.rand(4, 333) < torch.tensor([[1.0], [0.5], [0.02], [0.0]])
    kept = check_nms(random_boxes(4, 333), torch.rand(4, 333), threshold, valid)
    assert 0 < kept <= valid.sum()


@any_way
def test_nms_of_tensors_in_odd_memory(way: str) -> None:
    boxes = random_boxes(90, 3, extent=20).transpose(0, 1)
    valid = (torch.rand(90, 3) < 0.5).t()
    check_nms(boxes, torch.rand(90, 3).t(), 0.5, valid)
    check_nms(boxes[:1].expand(3, -1, -1), torch.rand(90, 1).t().expand(3, -1), 0.5, valid)


@any_way
@pytest.mark.parametrize("count", [1, 9, 10, 11, 119, 120, 121, 240])
def test_nms_at_the_borders_of_blocks(way: str, count: int) -> None:
    check_nms(random_boxes(3, count, extent=20), torch.rand(3, count), 0.5)


@any_way
def test_nms_takes_the_first_of_equal_scores(way: str) -> None:
    scores = torch.randint(3, (2, 250)).float()
    check_nms(random_boxes(2, 250, extent=20), scores, 0.4)
    check_nms(random_boxes(2, 250, extent=20), torch.zeros(2, 250), 0.4)
    scores[0, ::5] = -math.inf
    check_nms(random_boxes(2, 250, extent=20), scores, 0.4, scores < 2)


@any_way
def test_nms_of_identical_boxes_keeps_one(way: str) -> None:
    boxes = torch.tensor([3.0, 4, 50, 60]).expand(2, 260, 4)
    assert check_nms(boxes, torch.rand(2, 260), 0.99) == 2


@any_way
def test_nms_follows_chains_to_their_end(way: str) -> None:
    # Each box suppresses the next one and no other, so every second is kept; the longest
    # sequence of decisions that there can be.
    left = torch.arange(400.0)
    boxes = torch.stack([left, left * 0, left + 3, left * 0 + 10], 1)[None]
    assert check_nms(boxes, -left[None], 0.4) == 200
    assert check_nms(boxes, left[None], 0.4) == 200
    assert check_nms(boxes, torch.rand(1, 400), 0.4) > 100


@any_way
def test_nms_of_boxes_without_area(way: str) -> None:
    boxes = random_boxes(3, 200, extent=10)
    boxes[0, :, 2:] = boxes[0, :, :2]
    boxes[1, ::2, 2] = boxes[1, ::2, 0] - 1
    boxes[2, ::3] = 0
    check_nms(boxes, torch.rand(3, 200), 0.0)
    check_nms(boxes, torch.rand(3, 200), 0.5)


@any_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nms_compares_overlaps_at_the_threshold_as_torchvision_does(
    way: str, dtype: torch.dtype
) -> None:
    # Intersection over union is k / 100, rounded: some above, some below the decimal.
    width = torch.arange(100.0, dtype=dtype)
    for percent in range(1, 100):
        first = torch.tensor([[0.0, 0, 100, 1]], dtype=dtype)
        second = torch.stack([width * 0, width * 0, width, width * 0 + 1], 1)[percent, None]
        boxes = torch.cat([first, second])[None]
        check_nms(boxes, torch.tensor([[1.0, 0.5]], dtype=dtype), percent / 100)


@any_way
def test_nms_ignores_what_stands_in_empty_slots(way: str) -> None:
    boxes, scores = random_boxes(2, 150, extent=20), torch.rand(2, 150)
    valid = torch.rand(2, 150) < 0.6
    expected = expected_nms(boxes, scores, 0.5, valid)
    boxes[~valid] = math.nan
    scores[~valid] = math.inf
    keep = ops.nms(boxes.to(DEVICE), scores.to(DEVICE), 0.5, valid.to(DEVICE))
    assert torch.equal(keep.cpu(), expected)


@any_way
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nms_of_no_boxes(way: str, shape: tuple[int, int]) -> None:
    assert ops.nms(torch.zeros(*shape, 4), torch.zeros(shape), 0.5).shape == shape


@any_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nms_in_half_precision_and_autocast_computes_in_float32(
    way: str, dtype: torch.dtype
) -> None:
    boxes, scores = random_boxes(2, 200).to(dtype), torch.rand(2, 200)
    everything = torch.ones(2, 200, dtype=torch.bool)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        keep = ops.nms(boxes.to(DEVICE), scores.to(DEVICE), 0.5)
    assert torch.equal(keep.cpu(), expected_nms(boxes.float(), scores, 0.5, everything))
    keep = ops.nms(boxes.to(DEVICE), scores.to(DEVICE, dtype), 0.5)
    expected = expected_nms(boxes.float(), scores.to(dtype).float(), 0.5, everything)
    assert torch.equal(keep.cpu(), expected)


# roi_align


def pyramid(
    dtype: torch.dtype = torch.float64, channels: int = 3, channels_last: bool = False
) -> list[Tensor]:
    """Leaf feature maps of two images of 96 x 128."""
    maps = [torch.randn(2, channels, 96 // s, 128 // s).to(DEVICE, dtype) for s in STRIDES]
    if channels_last:
        maps = [one.contiguous(memory_format=torch.channels_last) for one in maps]
    return [one.requires_grad_() for one in maps]


def some_regions() -> tuple[Tensor, Tensor]:
    """Boxes (2, R, 4), ordinary and odd ones, and every level for each of them."""
    odd = [
        [0, 0, 128, 96],  # the image
        [-60, -50, 300, 200],  # beyond it on all sides
        [-90, 10, -20, 60],  # beside it
        [130, 100, 170, 150],
        [126, 94, 130, 98],  # across the corner
        [-3, -3, 2, 2],
        [40, 40, 40, 40],  # a point
        [40, 10, 40, 90],  # no width
        [60, 60, 20, 20],  # corners exchanged
        [0, 30, 128, 31],  # a line
        [2, 2, 6, 6],  # samples on pixel centres
        [127.5, 95.5, 128, 96],
    ]
    ordinary = random_boxes(12, extent=90, size=40)
    boxes = torch.cat([torch.tensor(odd, dtype=torch.float32), ordinary])
    boxes = torch.stack([boxes, boxes.flip(0)]).repeat(1, len(STRIDES), 1)
    level = torch.arange(len(STRIDES)).repeat_interleave(boxes.shape[1] // len(STRIDES))
    return boxes.to(DEVICE), level.expand(2, -1).to(DEVICE)


def expected_roi_align(
    features: list[Tensor], boxes: Tensor, level: Tensor, size: int, ratio: int
) -> Tensor:
    """What torchvision's kernel gives, region by region, on the CPU."""
    pooled = []
    for image, region in itertools.product(range(boxes.shape[0]), range(boxes.shape[1])):
        number = int(level[image, region])
        feature = features[number][image : image + 1].cpu()
        box = boxes[image, region].cpu().to(feature.dtype)
        roi = torch.cat([box.new_zeros(1), box])[None]
        if not ratio and (box[2:] <= box[:2]).any():
            # Adaptive sampling takes no sample there; torchvision cannot allocate -n of them.
            pooled.append(feature.new_zeros(1, feature.shape[1], size, size))
            continue
        pooled.append(
            torchvision.ops.roi_align(feature, roi, size, 1 / STRIDES[number], ratio, aligned=True)
        )
    return torch.cat(pooled).unflatten(0, level.shape)


@any_way
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_roi_align_equals_torchvision(way: str, ratio: int, channels_last: bool) -> None:
    features, (boxes, level) = pyramid(channels_last=channels_last), some_regions()
    with StaticOnly():
        pooled = ops.roi_align(features, STRIDES, boxes, level, 3, ratio)
        weights = torch.randn(pooled.shape).to(DEVICE, pooled.dtype)
        gradients = torch.autograd.grad((pooled * weights).sum(), features)
    expected = expected_roi_align(features, boxes, level, 3, ratio)
    torch.testing.assert_close(pooled.cpu(), expected, rtol=1e-10, atol=1e-12)
    expected_gradients = torch.autograd.grad((expected * weights.cpu()).sum(), features)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)
    assert all(one.count_nonzero() for one in gradients)
    if way == "cpu":
        assert [one.stride() for one in gradients] == [one.stride() for one in features]


@any_way
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_in_float32(way: str, ratio: int) -> None:
    features, (boxes, level) = pyramid(torch.float32, channels=16), some_regions()
    pooled = ops.roi_align(features, STRIDES, boxes, level, 7, ratio)
    expected = expected_roi_align(features, boxes, level, 7, ratio)
    torch.testing.assert_close(pooled.cpu(), expected, rtol=1e-5, atol=2e-6)


@any_way
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_passes_gradcheck(way: str, ratio: int) -> None:
    features = [torch.randn(1, 2, 5, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)]
    boxes = torch.tensor([[[1.0, 2, 17, 15], [-9, 3, 10, 30], [8, 8, 8, 8]]], device=DEVICE)
    level = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)

    def pool(feature: Tensor) -> Tensor:
        return ops.roi_align([feature], [4], boxes, level, 2, ratio)

    assert torch.autograd.gradcheck(pool, features)


@any_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_roi_align_of_half_precision_computes_in_float32(
    way: str, dtype: torch.dtype, channels_last: bool
) -> None:
    features, (boxes, level) = pyramid(dtype, 8, channels_last), some_regions()
    full = [one.detach().float().requires_grad_() for one in features]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        pooled = ops.roi_align(features, STRIDES, boxes, level, 4, 2)
        gradients = torch.autograd.grad(pooled.sum(), features)
    exact = ops.roi_align(full, STRIDES, boxes, level, 4, 2)
    exact_gradients = torch.autograd.grad(exact.sum(), full)
    assert pooled.dtype is torch.float32
    torch.testing.assert_close(pooled, exact, rtol=1e-5, atol=1e-6)
    for gradient, full_gradient in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype is dtype
        torch.testing.assert_close(gradient.float(), full_gradient, rtol=1e-2, atol=1e-2)


@any_way
def test_roi_align_in_chunks_gives_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, (boxes, level) = pyramid(), some_regions()

    def run(ratio: int) -> list[Tensor]:
        pooled = ops.roi_align(features, STRIDES, boxes, level, 3, ratio)
        return [pooled, *torch.autograd.grad(pooled.square().sum(), features)]

    whole = [run(0), run(2)]
    monkeypatch.setattr(ops_reference, "_CHUNK_ELEMENTS", 5000)
    torch.testing.assert_close([run(0), run(2)], whole)


@any_way
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_of_no_regions_leaves_zero_gradients(way: str, ratio: int) -> None:
    features = pyramid()
    boxes = torch.zeros(2, 0, 4, device=DEVICE)
    level = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    pooled = ops.roi_align(features, STRIDES, boxes, level, 7, ratio)
    assert pooled.shape == (2, 0, 3, 7, 7)
    gradients = torch.autograd.grad(pooled.sum(), features)
    assert not any(one.count_nonzero() for one in gradients)


@pytest.mark.parametrize("way", [way for way in WAYS.get(DEVICE.type, []) if way != "cuda"])
@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_of_boxes_that_are_no_numbers_is_zero(way: str, ratio: int) -> None:
    features = pyramid()
    rows = [[math.nan] * 4, [-math.inf, 0, math.inf, 9], [0, math.nan, 9, 9]]
    boxes = torch.tensor(rows, device=DEVICE).expand(2, -1, -1)
    level = torch.arange(3, device=DEVICE).expand(2, -1)
    pooled = ops.roi_align(features, STRIDES, boxes, level, 4, ratio)
    gradients = torch.autograd.grad(pooled.sum(), features)
    assert not any(one.count_nonzero() for one in (pooled, *gradients))


@ON_CPU
def test_roi_align_samples_endless_boxes_in_bounded_work_and_memory() -> None:
    features = pyramid()
    boxes = torch.tensor([[-1e9, -1e9, 1e9, 1e9]]).expand(2, 3, -1)
    level = torch.arange(3).expand(2, -1)
    with ops.implementation("reference"):
        expected = ops.roi_align(features, STRIDES, boxes, level, 3, 0)
    pooled = ops.roi_align(features, STRIDES, boxes, level, 3, 0)
    torch.testing.assert_close(pooled, expected)


# deform_conv2d


def convolution_inputs(
    groups: int, offset_groups: int, size: tuple[int, int], kernel: tuple[int, int] = (3, 2)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images, offsets (some far outside, some whole pixels), weight, bias, mask; float64."""
    taps = kernel[0] * kernel[1]
    offset = torch.randn(2, 2 * offset_groups * taps, *size) * 2
    offset[0, :, 0] = offset[0, :, 0].round()
    offset[1, :, 0] *= 1e9
    tensors = (
        torch.randn(2, 4, 7, 9),
        offset,
        torch.randn(6, 4 // groups, *kernel),
        torch.randn(6),
        torch.rand(2, offset_groups * taps, *size),
    )
    images, offset, weight, bias, mask = (
        one.to(DEVICE, torch.float64).requires_grad_() for one in tensors
    )
    return images, offset, weight, bias, mask


@any_way
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    ("settings", "size", "groups", "offset_groups"),
    [
        ({}, (5, 8), 1, 1),
        ({"stride": 2, "padding": 1}, (4, 5), 2, 1),
        ({"stride": (1, 2), "padding": (2, 0), "dilation": (2, 3)}, (7, 3), 1, 2),
        ({"padding": 1, "dilation": 2}, (5, 9), 2, 4),
    ],
)
def test_deform_conv2d_equals_torchvision(
    way: str,
    settings: dict[str, Any],
    size: tuple[int, int],
    groups: int,
    offset_groups: int,
    modulated: bool,
) -> None:
    images, offset, weight, bias, mask = convolution_inputs(groups, offset_groups, size)
    leaves = [images, offset, weight, bias, *([mask] if modulated else [])]
    with StaticOnly():
        output = ops.deform_conv2d(
            images, offset, weight, bias, mask=mask if modulated else None, **settings
        )
        factors = torch.randn(output.shape).to(DEVICE, output.dtype)
        gradients = torch.autograd.grad((output * factors).sum(), leaves)
    copies = [one.detach().cpu().requires_grad_() for one in leaves]
    expected = torchvision.ops.deform_conv2d(
        *copies[:4], mask=copies[4] if modulated else None, **settings
    )
    expected_gradients = torch.autograd.grad((expected * factors.cpu()).sum(), copies)
    torch.testing.assert_close(output.cpu(), expected)
    torch.testing.assert_close([one.cpu() for one in gradients], list(expected_gradients))


@any_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_deform_conv2d_computes_in_float32_and_returns_the_input_s_dtype(
    way: str, dtype: torch.dtype
) -> None:
    inputs = [one.detach().to(dtype) for one in convolution_inputs(1, 1, (5, 8))]
    images, offset, weight, bias, mask = inputs
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output = ops.deform_conv2d(images, offset, weight, bias, mask=mask)
    images, offset, weight, bias, mask = (one.float() for one in inputs)
    expected = ops.deform_conv2d(images, offset, weight, bias, mask=mask)
    assert output.dtype is dtype
    torch.testing.assert_close(output, expected.to(dtype))


@any_way
def test_deform_conv2d_without_bias_in_float32(way: str) -> None:
    images, offset, weight, _, _ = (
        one.detach().float() for one in convolution_inputs(1, 1, (5, 8))
    )
    output = ops.deform_conv2d(images, offset, weight)
    expected = torchvision.ops.deform_conv2d(images.cpu(), offset.cpu(), weight.cpu())
    torch.testing.assert_close(output.cpu(), expected)


# The choice of the implementation, and how operators look from outside


def test_the_reference_serves_devices_without_kernels() -> None:
    boxes, scores = torch.zeros(2, 30, 4, device="meta"), torch.zeros(2, 30, device="meta")
    features = [torch.zeros(2, 3, 8, 8, device="meta")]
    level = torch.zeros(2, 30, dtype=torch.int64, device="meta")
    with StaticOnly() as recorded:
        keep = ops.nms(boxes, scores, 0.5)
        pooled = ops.roi_align(features, [4], boxes, level, 7, 2)
        images, offset = torch.zeros(1, 2, 4, 4), torch.zeros(1, 18, 4, 4)
        weight = torch.zeros(5, 2, 3, 3)
        convolved = ops.deform_conv2d(
            images.to("meta"), offset.to("meta"), weight.to("meta"), padding=1
        )
    assert keep.shape == (2, 30)
    assert pooled.shape == (2, 30, 3, 7, 7)
    assert convolved.shape == (1, 5, 4, 4)
    assert not [name for name in recorded.names if name.startswith(("zoo::", "torchvision::"))]


@ON_CPU
def test_on_a_cpu_each_call_is_one_operator() -> None:
    features, (boxes, level) = pyramid(torch.float32), some_regions()
    with StaticOnly() as recorded:
        ops.nms(boxes, boxes[..., 0], 0.5, level >= 0)
        pooled = ops.roi_align(features, STRIDES, boxes, level, 7, 0)
        torch.autograd.grad(pooled.sum(), features)
    own = [name for name in recorded.names if name.startswith("zoo::")]
    assert own == ["zoo::nms_keep", "zoo::roi_align_levels", "zoo::roi_align_levels_backward"]
    assert len(recorded.names) < 15


@ON_CPU
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck, with lists
@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_hold_to_the_rules_of_torch_library(channels_last: bool) -> None:
    features, (boxes, level) = pyramid(channels_last=channels_last), some_regions()
    boxes = boxes.double()
    valid = level >= 0
    torch.library.opcheck(torch.ops.zoo.nms_keep, (boxes, boxes[..., 0], 0.5, valid))
    torch.library.opcheck(torch.ops.zoo.roi_align_levels, (features, STRIDES, boxes, level, 3, 2))


@ON_CPU
@any_way
def test_a_compiled_step_gives_the_same(way: str) -> None:
    features, (boxes, level) = pyramid(torch.float32), some_regions()

    def step(features: list[Tensor], boxes: Tensor) -> Tensor:
        keep = ops.nms(boxes, boxes[..., 0], 0.5)
        pooled = ops.roi_align(features, STRIDES, boxes, level, 3, 2)
        return (pooled * keep[..., None, None, None]).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = [(f(features, boxes)) for f in (step, compiled)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(result, features) for result in results]
    torch.testing.assert_close(*gradients)


def test_an_implementation_is_forced_only_within_its_context() -> None:
    with StaticOnly() as recorded, ops.implementation("reference"):
        with pytest.raises(ZeroDivisionError), ops.implementation("cpu"):
            raise ZeroDivisionError
        ops.nms(torch.zeros(1, 3, 4), torch.zeros(1, 3), 0.5)
    assert "zoo::nms_keep" not in recorded.names
    with StaticOnly() as recorded:
        ops.nms(torch.zeros(1, 3, 4), torch.zeros(1, 3), 0.5)
    assert "zoo::nms_keep" in recorded.names
