"""Box arithmetic of zoo_common.detection.boxes."""

import os

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor

from zoo_common import device
from zoo_common.detection import boxes

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
# Zero width, zero height, a point, corners the wrong way round in one and in both directions.
EMPTY = [[5, 5, 5, 9], [5, 5, 9, 5], [5, 5, 5, 5], [9, 5, 5, 9], [9, 9, 5, 5]]


def tensor(rows: object, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


def random_boxes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 80
    size = torch.rand(*shape, 2, generator=generator) * 40
    return torch.cat([corner, corner + size], -1).to(DEVICE)


def test_area_is_width_times_height_and_empty_boxes_have_none() -> None:
    assert boxes.area(tensor([[1, 2, 4, 7], [0, 0, 0.5, 0.5]])).tolist() == [15, 0.25]
    assert boxes.area(tensor(EMPTY)).tolist() == [0] * len(EMPTY)


def test_iou_equals_torchvision() -> None:
    a, b = random_boxes(40), random_boxes(30, seed=1)
    expected = torchvision.ops.box_iou(a.cpu(), b.cpu())
    assert (expected > 0).any()
    torch.testing.assert_close(boxes.iou(a, b).cpu(), expected)


def test_iou_of_batches_is_that_of_their_members() -> None:
    a, b = random_boxes(3, 5), random_boxes(3, 7, seed=1)
    result = boxes.iou(a, b)
    assert result.shape == (3, 5, 7)
    members = [boxes.iou(a[i], b[i]) for i in range(3)]
    torch.testing.assert_close(result, torch.stack(members))
    torch.testing.assert_close(boxes.iou(a, b[0])[2], boxes.iou(a[2], b[0]))


def test_empty_boxes_overlap_nothing_and_give_finite_gradients() -> None:
    empty = tensor(EMPTY).requires_grad_()
    everything = torch.cat([empty, tensor([[0, 0, 10, 10]])])
    overlap = boxes.iou(everything, everything)
    assert overlap[:-1].count_nonzero() == 0
    assert overlap[-1, -1] == 1
    (gradient,) = torch.autograd.grad(overlap.sum() + boxes.area(everything).sum(), empty)
    assert gradient.isfinite().all()


def test_clip_moves_edges_into_each_set_s_own_image() -> None:
    rows = [[-5, -5, 200, 200], [10, 10, 20, 20], [120, 130, 140, 150]]
    sizes = torch.tensor([[100, 50], [300, 400]], device=DEVICE)
    small, large = boxes.clip(tensor([rows, rows]), sizes).tolist()
    assert small == [[0, 0, 50, 100], [10, 10, 20, 20], [50, 100, 50, 100]]
    assert large == [[0, 0, 200, 200], rows[1], rows[2]]
    assert boxes.clip(tensor(rows), sizes[0]).tolist() == small


def test_to_original_scales_each_direction_and_clips() -> None:
    found = tensor([[[10, 20, 30, 40], [0, 0, 60, 99]], [[1, 2, 3, 4], [0, 0, 0, 0]]])
    sizes = torch.tensor([[50, 40], [10, 10]], device=DEVICE)
    originals = torch.tensor([[100, 120], [5, 20]], device=DEVICE)
    result = boxes.to_original(found, sizes, originals).tolist()
    assert result[0] == [[30, 40, 90, 80], [0, 0, 120, 100]]
    assert result[1] == [[2, 1, 6, 2], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_is_float32_unless_given_more(given: torch.dtype, computed: torch.dtype) -> None:
    # 250 * 250 is beyond float16, and in bfloat16 256 and 257 are one number.
    rows = tensor([[0, 0, 250, 250], [1, 1, 251, 251]], given)
    sizes = torch.tensor([257, 257], device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        results = [
            boxes.area(rows),
            boxes.iou(rows, rows),
            boxes.clip(rows + 5, sizes),
            boxes.to_original(rows[None], sizes[None], sizes[None] * 2),
        ]
    assert [result.dtype for result in results] == [computed] * 4
    assert results[0].tolist() == [62500, 62500]
    assert results[1][0, 1].item() == pytest.approx(249**2 / (2 * 62500 - 249**2), rel=1e-6)


def test_no_boxes() -> None:
    none = torch.zeros(2, 0, 4, device=DEVICE)
    sizes = torch.tensor([[9, 9], [8, 8]], device=DEVICE)
    assert boxes.area(none).shape == (2, 0)
    assert boxes.iou(none, random_boxes(2, 3)).shape == (2, 0, 3)
    assert boxes.to_original(none, sizes, sizes).shape == (2, 0, 4)
