"""Matrix NMS against equation 5 of the paper, written out in loops."""

import math
import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from solov2.matrix_nms import intersections, matrix_nms
from zoo_common import device

pytestmark = pytest.mark.device
DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
KERNELS = ("gaussian", "linear")
SIGMA = 2.0


def paper(masks: Tensor, labels: Tensor, scores: Tensor, kernel: str, sigma: float) -> list[float]:
    """Scores of one image's masks, best first, in Python's float64."""

    def f(iou: float) -> float:
        return math.exp(-sigma * iou**2) if kernel == "gaussian" else 1 - iou

    sets = [set(mask.nonzero().flatten().tolist()) for mask in masks]
    names = labels.tolist()

    def iou(i: int, j: int) -> float:
        return len(sets[i] & sets[j]) / len(sets[i] | sets[j])

    updated = []
    for j, score in enumerate(scores.tolist()):
        decays = [1.0]
        for i in (i for i in range(j) if names[i] == names[j]):
            highest = max((iou(k, i) for k in range(i) if names[k] == names[i]), default=0.0)
            if f(highest) > 0:
                decays.append(f(iou(i, j)) / f(highest))
        updated.append(score * min(decays))
    return updated


def draw(images: int, count: int, classes: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Blobs that overlap, every fifth a copy of another; labels, falling scores, areas."""
    dice = torch.Generator().manual_seed(seed)
    shape = (images * count, 1, 5, 5)
    coarse = torch.rand(shape, generator=dice)
    masks_BNX = (F.interpolate(coarse, (24, 30), mode="bicubic") > 0.55).view(images, count, -1)
    masks_BNX[..., 7] = True
    copied_N = torch.where(torch.arange(count) % 5 == 4, torch.arange(count) // 2, 0)
    masks_BNX = torch.where((copied_N > 0)[:, None], masks_BNX[:, copied_N], masks_BNX)
    labels_BN = torch.randint(classes, (images, count), generator=dice)
    scores_BN = torch.rand((images, count), generator=dice).sort(descending=True).values
    return masks_BNX, labels_BN, scores_BN, masks_BNX.sum(2)


def run(
    masks_BNX: Tensor,
    labels_BN: Tensor,
    scores_BN: Tensor,
    areas_BN: Tensor,
    kernel: str,
    valid_BN: Tensor | None = None,
    sigma: float = SIGMA,
) -> Tensor:
    if valid_BN is None:
        valid_BN = torch.ones_like(scores_BN, dtype=torch.bool)
    tensors = (masks_BNX, labels_BN, scores_BN, areas_BN, valid_BN)
    moved = [tensor.to(DEVICE) for tensor in tensors]
    return matrix_nms(*moved, kernel=kernel, sigma=sigma).cpu()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("count", "classes", "sigma"), [(66, 3, 2.0), (40, 1, 0.5), (9, 80, 2.0)])
def test_scores_are_those_of_the_paper(kernel: str, count: int, classes: int, sigma: float) -> None:
    masks, labels, scores, areas = draw(3, count, classes)
    updated = run(masks, labels, scores, areas, kernel, sigma=sigma)
    assert updated.dtype == torch.float32
    for image in range(3):
        right = paper(masks[image], labels[image], scores[image], kernel, sigma)
        torch.testing.assert_close(updated[image], torch.tensor(right), rtol=2e-6, atol=1e-7)
    if classes < 10:
        assert (updated < 0.9 * scores).any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_masks_may_be_of_any_type(kernel: str, dtype: torch.dtype) -> None:
    masks, *others = draw(2, 20, 2)
    assert torch.equal(run(masks.to(dtype), *others, kernel), run(masks, *others, kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_slots_neither_suppress_nor_compensate(kernel: str) -> None:
    masks, labels, scores, areas = draw(2, 30, 1)
    valid = torch.rand(2, 30, generator=torch.Generator().manual_seed(3)) < 0.6
    updated = run(masks, labels, scores, areas, kernel, valid)
    assert (updated[~valid] == 0).all()
    for image in range(2):
        real = valid[image]
        few = [tensor[image : image + 1, real] for tensor in (masks, labels, scores, areas)]
        torch.testing.assert_close(updated[image, real], run(*few, kernel)[0])
    nothing = run(masks, labels, scores, areas, kernel, valid & False)
    assert (nothing == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_copies_and_ties(kernel: str) -> None:
    """Four copies and one apart: linear is 0 / 0 for the third of them, which becomes 0."""
    one = torch.zeros(1, 5, 40, dtype=torch.bool)
    one[:, :, :10], one[:, 2] = True, False
    one[:, 2, 20:] = True
    scores = torch.full((1, 5), 0.8)
    updated = run(one, torch.zeros_like(scores).long(), scores, one.sum(2), kernel)
    copied = 0.8 * math.exp(-SIGMA) if kernel == "gaussian" else 0.0
    torch.testing.assert_close(updated[0], torch.tensor([0.8, copied, 0.8, copied, copied]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_mask_none_and_masks_without_a_pixel(kernel: str) -> None:
    masks, labels, scores, areas = draw(2, 1, 1)
    torch.testing.assert_close(run(masks, labels, scores, areas, kernel), scores)
    none = [tensor[:, :0] for tensor in (masks, labels, scores, areas)]
    assert run(*none, kernel).shape == (2, 0)
    assert run(*(tensor[:0] for tensor in (masks, labels, scores, areas)), kernel).shape == (0, 1)
    empty, labels, scores, areas = draw(1, 4, 1)
    torch.testing.assert_close(
        run(empty & False, labels, scores, 0 * areas, kernel), scores, rtol=0, atol=0
    )


def test_intersections_are_exact_counts_also_under_autocast() -> None:
    """More pixels than half precision counts to, and more than are worked on at a time."""
    masks = torch.rand(2, 100, 12_345, generator=torch.Generator().manual_seed(0)) < 0.7
    right = (masks.double() @ masks.double().mT).triu()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        counted = intersections(masks.to(DEVICE))
    assert counted.dtype == torch.float32
    assert torch.equal(counted.cpu().double().triu(), right)


def test_scores_stay_float64() -> None:
    masks, labels, scores, areas = draw(1, 12, 1)
    assert run(masks, labels, scores.half(), areas, "gaussian").dtype == torch.float32
    if DEVICE.type == "cpu":  # other devices may have no float64
        assert run(masks, labels, scores.double(), areas, "linear").dtype == torch.float64


def test_the_device_is_not_read() -> None:
    """Tensors without values, which nothing can be read from."""
    masks = torch.empty((2, 12, 99), device="meta")
    labels = torch.empty((2, 12), dtype=torch.int64, device="meta")
    for kernel in KERNELS:
        scores = matrix_nms(masks, labels, masks[..., 0], labels, labels > 0, kernel, SIGMA)
        assert scores.shape == (2, 12)
