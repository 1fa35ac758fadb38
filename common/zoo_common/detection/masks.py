"""Instance masks: outlines as edges, training targets from them, and predictions as COCO RLEs.

A mask is a set of directed edges (x0, y0, x1, y1) in pixels, grouped in rings: one ring is one
polygon of the COCO segmentation, and the object is the union of its rings. What a ring covers is
found by parity, so its edges need no order, and an RLE can be edges too.

Rasterising follows COCO's definition (``rleFrPoly`` in cocoapi's common/maskApi.c): vertices are
rounded to fifths of a pixel; an edge is walked in such fifths along its longer axis; a column is
toggled from the point on down where the walk passes the column's middle. The walk is replaced by
its closed form, one crossing at most for each edge and column, so that shapes are static.

R regions, E edge slots, C columns of a target (``size``), K detections, M side of a predicted
mask; H W pixels of an image, or cells of a predicted mask of a whole image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.nn import functional as F

from zoo_common.errors import UserError

Rle = dict[str, Any]  # COCO's: {"size": [height, width], "counts": bytes, str or list of int}
Edges = tuple[NDArray[np.float64], NDArray[np.int64]]  # (E, 4) x0 y0 x1 y1, (E,) rings

_STEPS = 5  # COCO's grid: fifths of a pixel
# Elements of a temporary: what stays in a core's cache, and what an accelerator's memory bears.
_CPU_CHUNK = 1 << 19
_DEVICE_CHUNK = 1 << 26
# Probabilities interpolated in two ways near a threshold: a bound on what roundings make of them.
_ROUNDING = 1e-6
# Pixels at a time of a product with a matrix that is empty but near its diagonal.
_BAND = 96


def polygons_to_edges(polygons: Sequence[Sequence[float]]) -> Edges:
    """The edges of a COCO segmentation's polygons.

    Args:
        polygons: each [x0, y0, x1, y1, ...] in pixels. Those with fewer than three points or an
            odd number of coordinates cover nothing, as in detectron2, and are left out.

    Returns:
        Edges (E, 4), closing ones included, and the ring of each, counted from 0.
    """
    edges: list[NDArray[np.float64]] = []
    rings: list[int] = []
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            continue
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        edges.append(np.concatenate([points, np.roll(points, -1, axis=0)], axis=1))
        rings.append(len(points))
    if not edges:
        return np.zeros((0, 4)), np.zeros(0, np.int64)
    return np.concatenate(edges), np.repeat(np.arange(len(rings)), rings)


def rle_to_edges(rle: Rle, height: int, width: int) -> Edges:
    """The horizontal pixel borders of an RLE mask as edges of one ring.

    Args:
        rle: compressed or uncompressed.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        As :func:`polygons_to_edges`; borders of neighbouring columns at the same height are one
        edge. Rasterising them over the whole image gives the mask back.

    Raises:
        UserError: the RLE is broken or of another size.
    """
    mask = decode_rle(rle, height, width)
    padded = np.zeros((height + 2, width), bool)
    padded[1:-1] = mask
    borders = np.flatnonzero(padded[1:] ^ padded[:-1])
    y, x = np.divmod(borders, width)
    starts = np.ones(len(borders) + 1, bool)
    starts[1:-1] = (np.diff(y) != 0) | (np.diff(x) != 1)
    first = np.flatnonzero(starts[:-1])
    last = np.flatnonzero(starts[1:])
    edges = np.stack([x[first], y[first], x[last] + 1, y[last]], axis=1).astype(np.float64)
    return edges, np.zeros(len(edges), np.int64)


def decode_rle(rle: Rle, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (height, width) of a compressed or uncompressed RLE.

    Raises:
        UserError: the RLE is broken or of another size.
    """
    size = rle.get("size")
    if size is None or list(size) != [height, width]:
        raise UserError(
            f"An RLE mask has size {size}, but its image is {height} x {width} (height x width): "
            "correct the annotation."
        )
    counts = rle.get("counts")
    try:
        runs = np.array(_runs(counts) if isinstance(counts, (bytes, str)) else counts, np.int64)
        if runs.ndim != 1 or runs.sum() != height * width or (runs < 0).any():
            raise ValueError("its runs do not add up to the image")
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"An RLE mask of size {height} x {width} is broken ({error}): correct the annotation."
        ) from error
    # Column by column, outside and inside in turn.
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(text: bytes | str) -> list[int]:
    """The run lengths of a compressed RLE.

    Each is a number in base 32, lowest digit first, a character a digit: 48 plus the digit, plus
    32 if more follow; 16 in the last one means negative. From the fourth on they are differences
    from the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for code in text.encode("ascii") if isinstance(text, str) else text:
        digit = code - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs


@torch.no_grad()
def rasterize_in_boxes(
    edges_RE4: Tensor, rings_RE: Tensor, boxes_R4: Tensor, size: int, *, ring_slots: int
) -> Tensor:
    """Mask R-CNN's training targets: each region's part of its object at a small resolution.

    Gives what detectron2's ``rasterize_polygons_within_box`` does with pycocotools: bit for bit
    in float64. In float32, where rounding may move a vertex by a fifth of a pixel, one pixel in
    some 400,000 differs, and one in 50,000 if most vertices lie where rounding turns. Shapes are
    static and the device is not read.

    Args:
        edges_RE4: outline of each region's object in pixels of the image, float32 or float64;
            the computation is in this type.
        rings_RE: ring of each edge, 0 to ``ring_slots`` - 1, or negative for an empty slot.
        boxes_R4: xyxy in pixels of the image.
        size: side of a target.
        ring_slots: more than any ring.

    Returns:
        bool (R, size, size), row by row.
    """
    assert edges_RE4.dtype in (torch.float32, torch.float64), edges_RE4.dtype
    regions, slots = rings_RE.shape
    budget = _CPU_CHUNK if edges_RE4.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, budget // (size * max(slots, ring_slots * (size + 1), 1)))
    masks = [
        _rasterize(
            _to_steps(edges_RE4[at : at + step], boxes_R4[at : at + step], size),
            rings_RE[at : at + step],
            size,
            ring_slots,
        )
        for at in range(0, max(regions, 1), step)
    ]
    return torch.cat(masks)


def _to_steps(edges_RE4: Tensor, boxes_R4: Tensor, size: int) -> Tensor:
    """Moves and scales edges into their boxes, and rounds them to COCO's grid as C's cast does."""
    corner_R12, end_R12 = boxes_R4.to(edges_RE4.dtype)[:, None].chunk(2, dim=-1)
    side_R12 = (end_R12 - corner_R12).clamp(min=0.1)
    # A number divided by a tensor is its reciprocal times the number: two roundings, not one.
    scale_R12 = torch.full_like(side_R12, size) / side_R12
    moved = (edges_RE4 - corner_R12.repeat(1, 1, 2)) * scale_R12.repeat(1, 1, 2)
    return moved.mul_(_STEPS).add_(0.5).trunc_()


def _rasterize(steps_RE4: Tensor, rings_RE: Tensor, size: int, ring_slots: int) -> Tensor:
    """The union over rings of what each ring's edges cover by parity, (R, size, size)."""
    rows_RCE = _crossings(steps_RE4, rings_RE, size)
    rows = size + 1  # the last one takes what changes no pixel
    offsets_RE = rings_RE.clamp(min=0).to(torch.int64) * (size * rows)
    offsets_C1 = torch.arange(size, device=steps_RE4.device)[:, None] * rows
    cells_RX = rows_RCE.to(torch.int64).add_(offsets_RE[:, None]).add_(offsets_C1).flatten(1)
    toggles_RX = torch.zeros(
        (len(cells_RX), ring_slots * size * rows), dtype=torch.int32, device=cells_RX.device
    )
    one = torch.ones((), dtype=torch.int32, device=cells_RX.device)
    toggles_RX.scatter_add_(1, cells_RX, one.expand_as(cells_RX))
    depth = toggles_RX.view(-1, ring_slots, size, rows).cumsum(-1, dtype=torch.int32)
    covered_RCC = (depth[..., :size] & 1).amax(1)
    return covered_RCC.bool().transpose(1, 2)


def _crossings(steps_RE4: Tensor, rings_RE: Tensor, size: int) -> Tensor:
    """The row from which each edge toggles each column, or ``size`` where it does not, (R, C, E).

    An edge passes column c where its walk goes from x = 5c + 2 to 5c + 3 or back. Walks are
    counted from the end with the smaller coordinate on the longer axis, as in C, since this
    decides how ties are rounded.
    """
    x0, y0, x1, y1 = (part[:, None] for part in steps_RE4.unbind(-1))  # (R, 1, E) each
    dx, dy = (x1 - x0).abs(), (y1 - y0).abs()
    steep = dx < dy
    swap = torch.where(steep, y0 > y1, x0 > x1)
    x0, x1 = torch.where(swap, x1, x0), torch.where(swap, x0, x1)
    y0, y1 = torch.where(swap, y1, y0), torch.where(swap, y0, y1)
    middle = torch.arange(size, device=x0.device, dtype=x0.dtype)[:, None] * _STEPS + 2  # (C, 1)

    # Flat edges: a step to the right each, at the rounded height; of the two the upper one counts.
    slope = (y1 - y0) / dx.clamp(min=1)
    flat_y = (middle - (x0 - (slope < 0).to(x0.dtype))).mul_(slope).add_(y0).add_(0.5).floor_()

    # Steep edges: a step down each. ``passed`` is the first whose rounded x lies beyond the
    # middle: this quotient's ceiling, or at a tie, where the quotient is whole and C's own
    # arithmetic decides, it or the next.
    rightward = x1 > x0
    slope = (x1 - x0) / dy.clamp(min=1)
    down = dy * (x1 - x0).sign()
    passed = (middle + 0.5 - x0).mul_(down).div_(dx.clamp(min=1)).ceil_()
    beyond = (passed * slope).add_(x0).add_(0.5) >= middle + 1
    steep_y = passed.add_(y0).sub_((beyond == rightward).to(x0.dtype))

    y_RCE = torch.where(steep, steep_y, flat_y)
    row_RCE = y_RCE.add_(2.5).mul_(1 / _STEPS).floor_().clamp_(0, size)
    used = (rings_RE >= 0)[:, None]
    left = torch.where(used, torch.minimum(x0, x1), torch.inf)
    right = torch.maximum(x0, x1)
    return torch.where((left <= middle) & (right > middle), row_RCE, size)


def paste(
    probabilities_KMM: Tensor,
    boxes_K4: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
) -> Tensor:
    """Predicted masks in the image: what detectron2's ``paste_masks_in_image`` gives on a CPU.

    Args:
        probabilities_KMM: 0 to 1.
        boxes_K4: xyxy in pixels of the image, where each mask belongs.
        height: of the image, in pixels.
        width: of the image, in pixels.
        threshold: a pixel is covered from this probability on.

    Returns:
        bool (K, height, width) on the masks' device. For many masks :func:`paste_rles` is
        smaller and quicker.
    """
    masks_KHW = probabilities_KMM.new_zeros((len(boxes_K4), height, width), dtype=torch.bool)
    for number, (left, top, mask_HW) in enumerate(
        _regions(probabilities_KMM, boxes_K4, height, width, threshold)
    ):
        rows, columns = mask_HW.shape
        masks_KHW[number, top : top + rows, left : left + columns] = mask_HW
    return masks_KHW


def paste_rles(
    probabilities_KMM: Tensor,
    boxes_K4: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
) -> list[Rle]:
    """The masks of :func:`paste` as compressed COCO RLEs, never at the image's size.

    Args:
        probabilities_KMM: as for :func:`paste`; best on the CPU.
        boxes_K4: as for :func:`paste`.
        height: of the image, in pixels.
        width: of the image, in pixels.
        threshold: as for :func:`paste`.

    Returns:
        {"size": [height, width], "counts": bytes} for each mask.
    """
    regions = _regions(probabilities_KMM, boxes_K4, height, width, threshold)
    return [_encode(mask.cpu().numpy(), left, top, height, width) for left, top, mask in regions]


def _regions(
    probabilities_KMM: Tensor, boxes_K4: Tensor, height: int, width: int, threshold: float
) -> Iterator[tuple[int, int, Tensor]]:
    """Left, top and mask (rows, columns) of the part of the image that each mask can touch.

    The arithmetic is detectron2's, in its order, since rounding decides single pixels.
    """
    probabilities = probabilities_KMM.detach().float()
    boxes = boxes_K4.detach().float()
    device = boxes.device
    grown = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], dim=1)
    x_W = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    y_H = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    for number, (x0, y0, x1, y1) in enumerate(grown.nan_to_num().tolist()):
        left, top = int(max(x0, 0)), int(max(y0, 0))
        columns, rows = int(min(x1, width)) - left, int(min(y1, height)) - top
        if columns <= 0 or rows <= 0:
            yield 0, 0, probabilities.new_zeros((0, 0), dtype=torch.bool)
            continue
        box = boxes[number]
        grid = torch.empty((1, rows, columns, 2), device=device)
        x_W_ = (x_W[left : left + columns] - box[0]) / (box[2] - box[0]) * 2 - 1
        y_H_ = (y_H[top : top + rows] - box[1]) / (box[3] - box[1]) * 2 - 1
        grid[..., 0] = x_W_
        grid[..., 1] = y_H_[:, None]
        mask = F.grid_sample(probabilities[number, None, None], grid, align_corners=False)
        yield left, top, mask[0, 0] >= threshold


class _Axis(NamedTuple):
    """What two interpolations do along one side: each of P pixels is a sum over M cells.

    Attributes:
        weights_PM: 0 but for a few neighbours.
        first_P: the first cell that a pixel depends on; never falls.
        last_P: the last one; never falls.
    """

    weights_PM: Tensor
    first_P: NDArray[np.int64]
    last_P: NDArray[np.int64]

    def reach(self, highest_M: Tensor, least: float) -> tuple[int, int]:
        """The pixels, from and to before, that depend on cells above ``least``."""
        cells = np.flatnonzero(highest_M.numpy() > least)
        if not len(cells):
            return 0, 0
        start = np.searchsorted(self.last_P, cells[0])
        return int(start), int(np.searchsorted(self.first_P, cells[-1], side="right"))

    def cells(self, start: int, stop: int) -> slice:
        """The cells that pixels ``start`` to before ``stop`` depend on."""
        return slice(int(self.first_P[start]), int(self.last_P[stop - 1]) + 1)

    def spread(self, values_MX: Tensor, start: int, stop: int) -> Tensor:
        """Pixels ``start`` to before ``stop``, (P, X), from just the cells they depend on."""
        origin = int(self.first_P[start])
        parts = []
        for at in range(start, stop, _BAND):
            end = min(at + _BAND, stop)
            band = self.cells(at, end)
            values = values_MX[band.start - origin : band.stop - origin]
            parts.append(self.weights_PM[at:end, band] @ values)
        return torch.cat(parts)


def upsampled_rles(
    probabilities_KHW: Tensor,
    resized: tuple[int, int],
    original: tuple[int, int],
    *,
    stride: int = 4,
    threshold: float = 0.5,
) -> list[Rle]:
    """Masks of a padded image at a low resolution, as compressed COCO RLEs of its file.

    The pixels are those of SOLO and mmdet, which interpolate to the padded size, crop to the
    image, interpolate to the file's size (both bilinear without antialiasing), and threshold.
    Both steps are linear and go along one side and then the other, so that each mask is two
    products with small matrices, and only where it can exceed the threshold. A mask that comes
    as close to the threshold as sums are rounded is made in the long way. (What the long way
    makes of a value that is the threshold to the last bit can depend on how many masks it is
    given at once.)

    Args:
        probabilities_KHW: 0 to 1; the work is done on the CPU, in float64 if they are, else in
            float32.
        resized: height and width of the image inside the padding, as the network saw it.
        original: height and width of its file.
        stride: pixels of the padded image along a cell of a mask.
        threshold: a pixel is covered above this probability.

    Returns:
        {"size": [height, width], "counts": bytes} for each mask; also for one without a pixel.
    """
    probabilities_KHW = probabilities_KHW.detach().cpu()
    kind = torch.promote_types(probabilities_KHW.dtype, torch.float32)
    probabilities_KHW = probabilities_KHW.to(kind)
    y_axis = _axis(probabilities_KHW.shape[1], stride, resized[0], original[0], kind)
    x_axis = _axis(probabilities_KHW.shape[2], stride, resized[1], original[1], kind)
    least = threshold - _ROUNDING  # interpolation exceeds no source, but for the rounding
    rles = []
    for values_HW in probabilities_KHW:
        top, bottom = y_axis.reach(values_HW.amax(1), least)
        left, right = x_axis.reach(values_HW.amax(0), least)
        if top >= bottom or left >= right:
            rles.append(_encode(np.zeros((0, 0), bool), 0, 0, *original))
            continue
        part_HW = values_HW[y_axis.cells(top, bottom), x_axis.cells(left, right)]
        part_XH = x_axis.spread(part_HW.T, left, right)
        part_YX = y_axis.spread(part_XH.T, top, bottom)
        if float((part_YX - threshold).abs_().min()) < _ROUNDING:
            top = left = 0
            part_YX = _upsample(values_HW[None, None], (stride, stride), resized, original)[0, 0]
        rles.append(_encode((part_YX > threshold).numpy(), left, top, *original))
    return rles


@lru_cache(maxsize=256)
def _axis(cells: int, stride: int, resized: int, original: int, kind: torch.dtype) -> _Axis:
    """The weights of :func:`_upsample` along one side: what it makes of single ones."""
    one_11MM = torch.eye(cells, dtype=kind)[None, None]
    weights_PM = _upsample(one_11MM, (stride, 1), (resized, cells), (original, cells))[0, 0]
    used_PM = weights_PM.numpy() > 0
    last_P = cells - 1 - used_PM[:, ::-1].argmax(1)
    return _Axis(weights_PM, used_PM.argmax(1), last_P)


def _upsample(
    values_KCHW: Tensor,
    strides: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
) -> Tensor:
    """Two bilinear interpolations, the second of a part: as :func:`upsampled_rles` says."""
    height, width = values_KCHW.shape[-2:]
    padded = height * strides[0], width * strides[1]
    upsampled = F.interpolate(values_KCHW, padded, mode="bilinear", align_corners=False)
    cropped = upsampled[..., : resized[0], : resized[1]]
    return F.interpolate(cropped, original, mode="bilinear", align_corners=False)


def _encode(mask: NDArray[np.bool_], left: int, top: int, height: int, width: int) -> Rle:
    """The RLE of an image that is empty but for ``mask`` (rows, columns) at (left, top)."""
    rows, columns = mask.shape
    # Columns one after the other, nothing before the first and below each.
    flat = np.zeros(1 + columns * (rows + 1), bool)
    flat[1:].reshape(columns, rows + 1)[:, :rows] = mask.T
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), rows + 1)
    starts = (column + left) * height + (row + top)
    # A run to the bottom of a column and one from the top of the next are one run.
    joined = np.flatnonzero(np.diff(starts) == 0)
    starts = np.delete(starts, np.concatenate([joined, joined + 1]))
    if len(starts) and starts[-1] == height * width:
        starts = starts[:-1]
    counts = np.diff(starts, prepend=0, append=height * width).tolist()
    rle: Rle = mask_utils.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return rle
