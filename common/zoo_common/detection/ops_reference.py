"""Plain-torch forms of the detection operators: static shapes, and nothing read back to the host.

They give the numbers of torchvision's kernels on every device that torch runs on. ``ops`` takes
them where there is no kernel; call them through ``ops``.

All expect float32 or float64 tensors of one dtype, and no autocast around them.

Shapes: S sets, N boxes a set; B images, R regions an image, C channels, H and W a feature map's
pixels, P output pixels a side, G samples along one side of an output pixel; K taps of a
convolution's kernel, L output positions, D offset groups.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Boxes of which nms decides at once, through a table of 2 ** _CELL entries, and boxes between two
# passes over the whole set.
_CELL = 10
_BLOCK = 12 * _CELL

# Numbers in the largest temporary tensor of roi_align: 128 MiB of float32.
_CHUNK_ELEMENTS = 2**25

# Adaptive sampling takes a sample a feature pixel. A box larger than this many times the largest
# map would take ever more of them; it is sampled as coarsely as one of that size.
_LARGEST_BOX = 4


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Context in which operators keep the dtypes of their inputs."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def nms(boxes_SN4: Tensor, scores_SN: Tensor, iou_threshold: float, valid_SN: Tensor) -> Tensor:
    """Greedy suppression in S sets at once; see ``ops.nms``.

    Whether a box is kept depends on all better ones, one after the other, so some sequence cannot
    be avoided. Boxes are taken in cells of ten: a table over the 2 ** 10 patterns of boxes that
    are still alive in a cell, made for all cells at once, holds what greedy suppression keeps of
    each. Then one look-up settles a cell and one matrix product strikes out what it suppresses.
    That makes about N launches, whatever the boxes are and however many sets there are. The
    largest tensors are a few of S * 120 * N numbers and one of S * N * 102: with S = 80 and
    N = 1000 all together 290 MB, with S = 10 and N = 2000 75 MB.
    """
    count = scores_SN.shape[1]
    if scores_SN.numel() == 0:
        return torch.zeros_like(valid_SN)
    sorted_scores = scores_SN.masked_fill(~valid_SN, -math.inf)
    order_SN = sorted_scores.sort(dim=1, descending=True, stable=True).indices
    boxes = boxes_SN4.gather(1, order_SN.unsqueeze(-1).expand(-1, -1, 4))
    alive = valid_SN.gather(1, order_SN).to(boxes.dtype)
    padding = -count % _BLOCK
    boxes = F.pad(boxes, (0, 0, 0, padding))
    alive = F.pad(alive, (0, padding))

    limit = _not_above(iou_threshold, boxes.dtype)
    bits_X = 2 ** torch.arange(_CELL, dtype=torch.int32, device=boxes.device)
    survivors = _cell_table(boxes, limit, bits_X)
    patterns = torch.arange(2**_CELL, dtype=torch.int32, device=boxes.device)
    unpacked = ((patterns.unsqueeze(1) & bits_X) != 0).to(boxes.dtype)
    kept = []
    for start in range(0, count + padding, _BLOCK):
        block = boxes[:, start : start + _BLOCK]
        strikes = _overlap(block, boxes, limit).to(boxes.dtype)  # (S, block, N)
        local = alive[:, start : start + _BLOCK]
        kept_of_block = []
        for first in range(0, _BLOCK, _CELL):
            cell = slice(first, first + _CELL)
            pattern = (local[:, cell] * bits_X).sum(1).long()
            table = survivors[:, (start + first) // _CELL]
            survivor = table.gather(1, pattern.unsqueeze(1)).squeeze(1)
            kept_of_cell = unpacked.index_select(0, survivor)
            within = strikes[:, cell, start : start + _BLOCK]
            local = local * (torch.bmm(kept_of_cell.unsqueeze(1), within).squeeze(1) == 0)
            kept_of_block.append(kept_of_cell)
        kept.append(torch.cat(kept_of_block, 1))
        # Also strikes boxes that are settled by now, which nothing looks at any more.
        alive = alive * (torch.bmm(kept[-1].unsqueeze(1), strikes).squeeze(1) == 0)
    keep_sorted = torch.cat(kept, 1)[:, :count] != 0
    return torch.zeros_like(valid_SN).scatter(1, order_SN, keep_sorted)


def _cell_table(boxes_SN4: Tensor, limit: float, bits_X: Tensor) -> Tensor:
    """What is kept of each cell for each pattern of alive boxes: (S, N / 10, 2 ** 10) int32.

    Patterns in and out are numbers with a bit a box, the best box in the lowest bit.
    """
    cells = boxes_SN4.reshape(-1, _CELL, 4)
    # Bits of worse boxes and of a box itself do no harm: they are not set yet when it is looked at.
    overlaps = _overlap(cells, cells, limit)
    rivals = (overlaps * bits_X.unsqueeze(1)).sum(1, dtype=torch.int32)
    patterns = torch.arange(2**_CELL, dtype=torch.int32, device=boxes_SN4.device)
    kept = torch.zeros_like(patterns).expand(len(cells), -1)
    for position in range(_CELL):
        struck = (kept & rivals[:, position, None]) != 0
        kept = kept + (patterns & 2**position).masked_fill(struck, 0)
    return kept.long().view(len(boxes_SN4), -1, 2**_CELL)


def _overlap(a_SN4: Tensor, b_SM4: Tensor, limit: float) -> Tensor:
    """Whether two boxes suppress each other, (S, N, M) bool, in the arithmetic of torchvision.

    Two empty boxes give 0 / 0 there, which is above no limit.
    """
    ax0, ay0, ax1, ay1 = a_SN4.unsqueeze(2).unbind(-1)
    bx0, by0, bx1, by1 = b_SM4.unsqueeze(1).unbind(-1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp_(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    return intersection.div_(union) > limit


def _not_above(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of float32 or float64 that is not above a threshold in [0, 1].

    torchvision compares with the threshold in double precision, torch with one rounded to the
    tensor's dtype. They differ where a threshold such as 0.6 would be rounded up.
    """
    if dtype is torch.float64:
        return threshold
    mantissa, exponent = math.frexp(threshold)
    return math.ldexp(math.floor(math.ldexp(mantissa, 24)), exponent - 24)


class Samples(NamedTuple):
    """Where roi_align samples regions along one axis, all (..., P, G), ... being the regions.

    A sample is the mean of feature pixels ``low`` (share ``1 - fraction``) and ``high``
    (``fraction``); its ``share`` of the output pixel is 0 where it lies outside the map.
    """

    low: Tensor
    high: Tensor
    fraction: Tensor
    share: Tensor


def sample_axis(
    start: Tensor, end: Tensor, length: Tensor, output_size: int, sampling_ratio: int, grid: int
) -> Samples:
    """Samples of regions along one axis, as torchvision places them.

    Args:
        start: where the regions start, in feature pixels, pixel centres being whole numbers.
        end: where they end.
        length: int64, pixels of the feature map along the axis.
        output_size: P.
        sampling_ratio: samples an output pixel; 0 takes one a feature pixel.
        grid: G, the most samples an output pixel that any region can have.
    """
    start, end, length = (value[..., None, None] for value in (start, end, length))
    pixel = (end - start) / output_size
    number = torch.full_like(pixel, grid)
    if sampling_ratio == 0:
        number = torch.where(pixel > 0, pixel.ceil().clamp(max=grid), 0)
    divisor = number.clamp(min=1)
    sample = torch.arange(grid, device=start.device)
    output = torch.arange(output_size, device=start.device)[:, None]
    position = start + output * pixel + (sample + 0.5) * pixel / divisor
    inside = (position >= -1) & (position <= length) & (sample < number)
    position = torch.where(inside, position, 0).clamp(min=0)
    position = torch.minimum(position, (length - 1).to(position.dtype))
    low = position.floor()
    fraction = position - low
    low = low.long()
    return Samples(low, torch.minimum(low + 1, length - 1), fraction, inside / divisor)


def largest_grid(lengths: Sequence[int], output_size: int) -> int:
    """The most samples an output pixel that adaptive sampling takes on maps of these lengths."""
    return _LARGEST_BOX * math.ceil(max(lengths) / output_size)


def axis_weights(samples: Samples, first: Tensor, width: int) -> Tensor:
    """Weights of the pixels ``first .. first + width - 1`` in each output pixel.

    With them roi_align is two matrix products: weights of rows @ features @ weights of columns.

    Args:
        samples: of regions ... along one axis.
        first: (...) int64 pixel of each region that weights start with.
        width: number of pixels; all that have a share must be among them.

    Returns:
        (..., P, width).
    """
    low, high, fraction, share = samples
    weights = share.new_zeros((*share.shape[:-1], width))
    for pixel, weight in ((low, share * (1 - fraction)), (high, share * fraction)):
        index = (pixel - first[..., None, None]).clamp(0, width - 1)
        weights = weights.scatter_add(-1, index, weight)
    return weights


class Geometry(NamedTuple):
    """What roi_align is asked to do, but for the features."""

    boxes_BR4: Tensor
    level_BR: Tensor
    strides: tuple[int, ...]
    output_size: int
    sampling_ratio: int

    def of_level(self, values: Sequence[float], like: Tensor) -> Tensor:
        """(B, R): each region's one of ``values``, which has an entry a level."""
        result = torch.zeros_like(like)
        for level, value in enumerate(values):
            result = torch.where(self.level_BR == level, value, result)
        return result

    def scaled_boxes(self) -> Tensor:
        """(B, R, 4) boxes in pixels of their feature maps, pixel centres being whole numbers."""
        scales = [1 / stride for stride in self.strides]
        return self.boxes_BR4 * self.of_level(scales, self.boxes_BR4[..., 0]).unsqueeze(-1) - 0.5


def roi_align(features: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """Differentiable (B, R, C, P, P); see ``ops.roi_align``.

    A fixed sampling ratio gathers the four pixels around each sample: S * S * 4 rows of C numbers
    an output pixel. Adaptive sampling has no bound on the samples that helps (a box as large as
    the finest map takes thousands of them), so it multiplies each whole map, level by level, with
    each region's weights of rows and of columns: on large maps many times the work of
    ``sampling_ratio=2``. Both go over the regions in chunks whose largest tensor has 2 ** 25
    numbers, or one region's where that is more.
    """
    pooled: Tensor = _RoiAlign.apply(geometry, *features)
    return pooled


class _RoiAlign(torch.autograd.Function):
    """The result is linear in the features, so its backward pass needs only the boxes."""

    @staticmethod
    def forward(ctx: Any, geometry: Geometry, *features: Tensor) -> Tensor:
        ctx.save_for_backward(geometry.boxes_BR4, geometry.level_BR)
        ctx.settings = geometry[2:]
        ctx.shapes = [feature.shape for feature in features]
        if geometry.sampling_ratio:
            return _gather(features, geometry)
        return _multiply(features, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        geometry = Geometry(*ctx.saved_tensors, *ctx.settings)
        with no_autocast(grads[0].device.type):
            if geometry.sampling_ratio:
                return None, *_gather_backward(grads[0], ctx.shapes, geometry)
            return None, *_multiply_backward(grads[0], ctx.shapes, geometry)


def _gather(features: Sequence[Tensor], geometry: Geometry) -> Tensor:
    table = torch.cat([feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in features])
    shapes = [feature.shape for feature in features]
    pooled = []
    for rows, weights in _gather_chunks(shapes, geometry):
        pixels = table.index_select(0, rows).view(*weights.shape[::2], table.shape[1])
        pooled.append(torch.bmm(weights, pixels))
    return _output(torch.cat(pooled), geometry)


def _gather_backward(
    grad: Tensor, shapes: Sequence[torch.Size], geometry: Geometry
) -> list[Tensor]:
    rows_of_levels = [shape[0] * shape[2] * shape[3] for shape in shapes]
    table = grad.new_zeros(sum(rows_of_levels), shapes[0][1])
    grad_X1C = grad.flatten(0, 1).flatten(2).transpose(1, 2).reshape(-1, 1, shapes[0][1])
    start = 0
    for rows, weights in _gather_chunks(shapes, geometry):
        part = grad_X1C[start : start + len(weights)]
        table.index_add_(0, rows, torch.bmm(weights.transpose(1, 2), part).flatten(0, 1))
        start += len(weights)
    return [
        level.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
        for level, shape in zip(torch.split(table, rows_of_levels), shapes, strict=True)
    ]


def _gather_chunks(shapes: Sequence[torch.Size], geometry: Geometry) -> list[tuple[Tensor, Tensor]]:
    """For each chunk of output pixels, rows of the table of all levels' pixels, and weights.

    Rows are (pixels * X) and weights (pixels, 1, X) with X = (2 * G) ** 2.
    """
    level_BR, size, ratio = geometry.level_BR, geometry.output_size, geometry.sampling_ratio
    images, channels = shapes[0][:2]
    heights = geometry.of_level([shape[2] for shape in shapes], level_BR)
    widths = geometry.of_level([shape[3] for shape in shapes], level_BR)
    level_sizes = [shape[0] * shape[2] * shape[3] for shape in shapes]
    base_BR = geometry.of_level([sum(level_sizes[:i]) for i in range(len(shapes))], level_BR)
    image_B1 = torch.arange(images, device=level_BR.device).unsqueeze(1)
    base_BR = base_BR + image_B1 * heights * widths
    x0, y0, x1, y1 = geometry.scaled_boxes().unbind(-1)
    rows, row_weights = _both_pixels(sample_axis(y0, y1, heights, size, ratio, ratio))
    columns, column_weights = _both_pixels(sample_axis(x0, x1, widths, size, ratio, ratio))
    rows = base_BR[..., None, None] + rows * widths[..., None, None]

    per_region = (2 * size * ratio) ** 2 * channels
    step = max(1, _CHUNK_ELEMENTS // per_region)
    chunks = []
    values = (rows, columns, row_weights, column_weights)
    parts = (torch.split(value.flatten(0, 1), step) for value in values)
    for row, column, row_weight, column_weight in zip(*parts, strict=True):
        index = row[:, :, None, :, None] + column[:, None, :, None, :]
        weight = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]
        chunks.append((index.flatten(), weight.flatten(0, 2).flatten(1).unsqueeze(1)))
    return chunks


def _both_pixels(samples: Samples) -> tuple[Tensor, Tensor]:
    """Pixels and weights (..., P, 2 * G) of samples (..., P, G)."""
    low, high, fraction, share = samples
    return torch.cat([low, high], -1), torch.cat([share * (1 - fraction), share * fraction], -1)


def _output(pooled_X1C: Tensor, geometry: Geometry) -> Tensor:
    """(B, R, C, P, P) of rows of channels, one an output pixel."""
    images, regions = geometry.level_BR.shape
    size, channels = geometry.output_size, pooled_X1C.shape[-1]
    pooled = pooled_X1C.view(images, regions, size, size, channels)
    return pooled.permute(0, 1, 4, 2, 3).contiguous()


def _multiply(features: Sequence[Tensor], geometry: Geometry) -> Tensor:
    images, regions = geometry.level_BR.shape
    channels, size = features[0].shape[1], geometry.output_size
    pooled = features[0].new_zeros(images, regions, size, size, channels)
    shapes = [feature.shape for feature in features]
    for level, feature in enumerate(features):
        height, width = feature.shape[2:]
        rows_BHX = feature.permute(0, 2, 3, 1).reshape(images, height, width * channels)
        for part, down, across in _multiply_chunks(level, shapes, geometry):
            lines = torch.bmm(down.flatten(1, 2), rows_BHX)
            lines = lines.view(images, -1, size, width, channels)
            pooled[:, part] += torch.matmul(across.unsqueeze(2), lines)
    return pooled.permute(0, 1, 4, 2, 3).contiguous()


def _multiply_backward(
    grad: Tensor, shapes: Sequence[torch.Size], geometry: Geometry
) -> list[Tensor]:
    grad_BRPPC = grad.permute(0, 1, 3, 4, 2)
    grads = []
    for level, (images, channels, height, width) in enumerate(shapes):
        rows_BHX = grad.new_zeros(images, height, width * channels)
        for part, down, across in _multiply_chunks(level, shapes, geometry):
            lines = torch.matmul(across.transpose(2, 3).unsqueeze(2), grad_BRPPC[:, part])
            lines = lines.flatten(3).flatten(1, 2)
            rows_BHX.baddbmm_(down.flatten(1, 2).transpose(1, 2), lines)
        grads.append(rows_BHX.view(images, height, width, channels).permute(0, 3, 1, 2))
    return grads


def _multiply_chunks(
    level: int, shapes: Sequence[torch.Size], geometry: Geometry
) -> list[tuple[slice, Tensor, Tensor]]:
    """Chunks of regions with their weights of rows (B, r, P, H) and of columns (B, r, P, W).

    Regions of other levels have rows of weight 0.
    """
    images, channels, _, width = shapes[level]
    size, regions = geometry.output_size, geometry.level_BR.shape[1]
    step = max(1, _CHUNK_ELEMENTS // max(1, images * size * width * channels))
    boxes = geometry.scaled_boxes()
    chunks = []
    for start in range(0, regions, step):
        part = slice(start, start + step)
        x0, y0, x1, y1 = boxes[:, part].unbind(-1)
        mine = geometry.level_BR[:, part] == level
        first = torch.zeros_like(mine, dtype=torch.int64)
        weights = []
        for axis, low, high in ((2, y0, y1), (3, x0, x1)):
            length = shapes[level][axis]
            grid = largest_grid([shape[axis] for shape in shapes], size)
            samples = sample_axis(low, high, first + length, size, 0, grid)
            weights.append(axis_weights(samples, first, length))
        chunks.append((part, weights[0] * mine[..., None, None], weights[1]))
    return chunks


class Convolution(NamedTuple):
    """Settings of a convolution, each for (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def deform_conv2d(
    images_BCHW: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    settings: Convolution,
) -> Tensor:
    """Differentiable deformable convolution; see ``ops.deform_conv2d``.

    Gathers the four pixels around each sample, of as many of the kernel's taps at once as
    ``_CHUNK_ELEMENTS`` holds, and multiplies the samples with the taps' weights. The backward pass
    gathers again, so that no samples are kept.
    """
    images, channels, height, width = images_BCHW.shape
    kernel = (weight.shape[2], weight.shape[3])
    taps = kernel[0] * kernel[1]
    rows, columns = offset.shape[2:]
    moved_BDK2L = offset.reshape(images, -1, taps, 2, rows * columns)
    groups = moved_BDK2L.shape[1]
    corners, shares = corners_and_shares(
        moved_BDK2L, mask, offset.shape, kernel, images_BCHW, settings
    )
    table = images_BCHW.reshape(images, groups, -1, height, width).permute(0, 1, 3, 4, 2)
    table = table.reshape(images * groups * height * width, -1)
    at_once = max(1, _CHUNK_ELEMENTS // (4 * images * channels * rows * columns))
    output: Tensor | None = None
    for first in range(0, taps, at_once):
        part = slice(first, first + at_once)
        product = checkpoint(
            _taps_product,
            table,
            corners[:, :, :, part],
            shares[:, :, :, part],
            weight.flatten(2)[:, :, part],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        output = product if output is None else output + product
    assert output is not None
    if bias is not None:
        output = output + bias
    return output.transpose(1, 2).reshape(images, -1, rows, columns)


def corners_and_shares(
    moved_BDK2L: Tensor,
    mask: Tensor | None,
    output: torch.Size,
    kernel: tuple[int, int],
    images_BCHW: Tensor,
    settings: Convolution,
) -> tuple[Tensor, Tensor]:
    """The four pixels of each sample and their shares, (B, D, L, K, 4).

    Pixels are numbered through images, groups, rows and columns.

    Args:
        moved_BDK2L: offsets of D groups of channels that move together, K taps and L output
            pixels.
        mask: as that of ``ops.deform_conv2d``.
        output: shape that ends with the output's height and width.
        kernel: height and width.
        images_BCHW: input.
        settings: of the convolution.
    """
    height, width = images_BCHW.shape[2:]
    batch, moving = moved_BDK2L.shape[:2]
    device = moved_BDK2L.device
    places = []
    for axis, length in ((0, height), (1, width)):
        tap = torch.arange(kernel[axis], device=device) * settings.dilation[axis]
        tap = tap - settings.padding[axis]
        first = torch.arange(output[2 + axis], device=device) * settings.stride[axis]
        if axis == 0:
            tap_K, first_L = tap.repeat_interleave(kernel[1]), first.repeat_interleave(output[3])
        else:
            tap_K, first_L = tap.repeat(kernel[0]), first.repeat(output[2])
        place = moved_BDK2L[:, :, :, axis] + (first_L + tap_K[:, None])
        # Beyond the border by a pixel and more a sample is 0; a whole number must not overflow.
        places.append(place.transpose(2, 3).clamp(-2, length + 1))
    y, x = places
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    table = torch.arange(batch * moving, device=device).view(batch, moving, 1, 1)
    table = table * (height * width)
    corners, shares = [], []
    for row, row_share in ((top, 1 - down), (top + 1, down)):
        for column, column_share in ((left, 1 - right), (left + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            number = row.long() * width + column.long() + table
            corners.append(torch.where(inside, number, 0))
            shares.append(row_share * column_share * inside)
    joined = torch.stack(shares, dim=-1)
    if mask is not None:
        factors = mask.reshape(batch, moving, kernel[0] * kernel[1], -1).transpose(2, 3)
        joined = joined * factors[..., None]
    return torch.stack(corners, dim=-1), joined


def _taps_product(table: Tensor, corners: Tensor, shares: Tensor, weight_OIK: Tensor) -> Tensor:
    """Some taps' part of the output, (B, L, output channels).

    Args:
        table: (B * D * H * W, C / D) pixels.
        corners: (B, D, L, K, 4) rows of the table.
        shares: of the same shape, factors on them.
        weight_OIK: weights; I is C over the number of weight groups.
    """
    images, _, length, taps, _ = corners.shape
    pixels = table.index_select(0, corners.flatten()).view(*corners.shape, -1)
    samples_BDLKX = (pixels * shares[..., None]).sum(dim=-2)
    samples_BLKC = samples_BDLKX.permute(0, 2, 3, 1, 4).flatten(3)
    outputs, inputs, _ = weight_OIK.shape
    split = samples_BLKC.reshape(images, length, taps, -1, inputs).permute(0, 3, 1, 2, 4)
    groups = split.shape[1]
    matrices = weight_OIK.reshape(groups, outputs // groups, inputs, taps).permute(0, 3, 2, 1)
    product_BGLO = split.flatten(3) @ matrices.flatten(1, 2)
    return product_BGLO.transpose(1, 2).flatten(2)
