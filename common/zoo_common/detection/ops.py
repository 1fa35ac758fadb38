"""Suppression, region pooling and deformable convolution on every device.

Which code does the work is decided here alone, by the device of the tensors:

========= ======================= ============================= ====================
device    nms                     roi_align                     deform_conv2d
========= ======================= ============================= ====================
cpu       torchvision, set by set own, as matrix products       ``deform_bags``
cuda      torchvision, set by set torchvision, level by level   torchvision
any other ``ops_reference``       ``ops_reference``             ``ops_reference``
========= ======================= ============================= ====================

All give the same numbers; sums differ in their order. What depends on the data, such as how many
boxes a set has, stays within operators of the namespace ``zoo``. From outside, to autograd, to
torch.compile and to whoever records operators, each is one operator of static shape.

On an NPU torchvision's nms and roi_align have no kernel: torch falls back to the CPU, with a wait
and copies both ways in every call. torch_npu has operators of its own (npu_nms_v4,
npu_batch_nms, npu_roi_align, npu_deformable_conv2d) which are not used: they belong to its legacy
interface, work in half precision or with other definitions of sampling, limits on classes and
boxes, or modulated convolutions only, and nobody has measured them here against these.

Boxes are x0, y0, x1, y1 in pixels. Everything is computed in float32 on purpose, also inside
autocast and for features in half precision; float64 stays float64.

Shapes: S sets, N boxes a set; B images, R regions an image, C channels, P output pixels a side.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor

from zoo_common.detection import deform_bags
from zoo_common.detection import ops_reference as reference

Implementation = Literal["cpu", "cuda", "reference"]

_forced: Implementation | None = None


@contextlib.contextmanager
def implementation(name: Implementation) -> Iterator[None]:
    """Makes all operators work as on another device, for tests and benchmarks.

    Args:
        name: a line of the table above; ``reference``, that of any other device, runs on all
            devices, and ``cuda`` also on a CPU.
    """
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def implementation_of(device: torch.device) -> Implementation:
    """How operators work on a device, for models with operators of their own."""
    if _forced is not None:
        return _forced
    if device.type == "cpu":
        return "cpu"
    return "cuda" if device.type == "cuda" else "reference"


def nms(
    boxes_SN4: Tensor,
    scores_SN: Tensor,
    iou_threshold: float,
    valid_SN: Tensor | None = None,
) -> Tensor:
    """Greedy non-maximum suppression in S independent sets.

    In each set, from the best score down, a box is kept unless its intersection over union with a
    box kept before is above the threshold. Of equal scores the first in the set counts as better.
    That is what ``torchvision.ops.nms`` does for one set.

    Args:
        boxes_SN4: boxes in pixels.
        scores_SN: scores, larger is better.
        iou_threshold: in [0, 1].
        valid_SN: bool, which slots hold boxes; the others are not kept and suppress nothing,
            whatever numbers stand in them. None: all.

    Returns:
        (S, N) bool, which boxes are kept. No gradient passes.
    """
    dtype = torch.promote_types(boxes_SN4.dtype, scores_SN.dtype)
    dtype = _compute_dtype(dtype)
    boxes_SN4 = boxes_SN4.detach().to(dtype)
    scores_SN = scores_SN.detach().to(dtype)
    if valid_SN is None:
        valid_SN = torch.ones_like(scores_SN, dtype=torch.bool)
    if implementation_of(boxes_SN4.device) == "reference":
        with reference.no_autocast(boxes_SN4.device.type):
            return reference.nms(boxes_SN4, scores_SN, iou_threshold, valid_SN)
    keep: Tensor = _nms_keep(boxes_SN4, scores_SN, iou_threshold, valid_SN)
    return keep


def roi_align(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes_BR4: Tensor,
    level_BR: Tensor,
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    """Pools regions out of a pyramid of feature maps, each out of its level's.

    Follows ``torchvision.ops.roi_align`` with ``aligned=True``. Gradients flow to the features,
    not to the boxes. The CPU's own way takes a third to a tenth of torchvision's kernel's time:
    bilinear sampling and averaging are linear in rows and in columns, so a region's output is
    weights of rows @ features @ weights of columns, and the backward pass is the transposes of
    these. It is fastest on features in channels-last memory.

    Args:
        features: a (B, C, H_l, W_l) map for each level, in any floating dtype.
        strides: pixels of the image for one pixel of each level's map.
        boxes_BR4: regions in pixels of the image. Parts outside the map count as zeros from one
            pixel beyond the border on; an empty box gives the value of its corner when
            ``sampling_ratio`` is above 0, else 0.
        level_BR: int64, each region's index into ``features``.
        output_size: P.
        sampling_ratio: samples along one side of an output pixel. 0 is adaptive: as many as a
            feature pixels fit, and a box of more than four times the largest map's size is
            sampled as coarsely as one of that size. On an NPU 2, the original zoo's setting,
            costs a fraction of 0: see ``ops_reference.roi_align``.

    Returns:
        (B, R, C, P, P) in float32, or float64 when the features have it.
    """
    dtype = _compute_dtype(features[0].dtype)
    boxes_BR4 = boxes_BR4.detach().to(dtype)
    device = features[0].device
    way = implementation_of(device)
    if way == "cpu":
        pooled: Tensor = _roi_align_levels(
            list(features), list(strides), boxes_BR4, level_BR, output_size, sampling_ratio
        )
        return pooled
    geometry = reference.Geometry(boxes_BR4, level_BR, tuple(strides), output_size, sampling_ratio)
    with reference.no_autocast(device.type):
        features = [feature.to(dtype) for feature in features]
        if way == "cuda":
            return _roi_align_by_level(features, geometry)
        return reference.roi_align(features, geometry)


def deform_conv2d(
    images_BCHW: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution, as ``torchvision.ops.deform_conv2d``, which takes the same arguments.

    Version 1 (https://arxiv.org/abs/1703.06211) without a mask, version 2
    (https://arxiv.org/abs/1811.11168) with one. Gradients flow to all tensors.

    Args:
        images_BCHW: input.
        offset: (B, 2 * D * kh * kw, H', W') for D groups of input channels: row and column, in
            pixels, by which each tap's sample moves.
        weight: (output channels, C / groups, kh, kw).
        bias: (output channels) or None.
        stride: for both directions, or (vertical, horizontal).
        padding: zeros around the input, likewise.
        dilation: pixels between taps, likewise.
        mask: (B, D * kh * kw, H', W') factors on the samples, or None.

    Returns:
        (B, output channels, H', W') in the dtype of ``images_BCHW``.
    """
    dtype = _compute_dtype(images_BCHW.dtype)
    settings = reference.Convolution(_pair(stride), _pair(padding), _pair(dilation))
    device = images_BCHW.device
    with reference.no_autocast(device.type):
        images, offset, weight = (x.to(dtype) for x in (images_BCHW, offset, weight))
        bias = None if bias is None else bias.to(dtype)
        mask = None if mask is None else mask.to(dtype)
        way = implementation_of(device)
        if way == "reference":
            output = reference.deform_conv2d(images, offset, weight, bias, mask, settings)
        elif way == "cpu":
            output = deform_bags.deform_conv2d(images, offset, weight, bias, mask, settings)
        else:
            output = torchvision.ops.deform_conv2d(
                images, offset, weight, bias, *settings, mask=mask
            )
    return output.to(images_BCHW.dtype)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Lets torch use one thread, for a loop of operators that take some ten microseconds each.

    Sharing out so little costs more than it gains, and on a busy machine threads that wait for
    each other in every one of them make it many times slower. The switch takes 0.1 us.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.library.custom_op("zoo::nms_keep", mutates_args=())
def _nms_keep(
    boxes_SN4: Tensor, scores_SN: Tensor, iou_threshold: float, valid_SN: Tensor
) -> Tensor:
    with _one_thread():
        counts = valid_SN.sum(1).tolist()
        places = valid_SN.flatten().nonzero().squeeze(1)
        boxes, scores = boxes_SN4.flatten(0, 1)[places], scores_SN.flatten()[places]
        kept, start = [places[:0]], 0
        for count in counts:
            if count:
                part = slice(start, start + count)
                kept.append(torchvision.ops.nms(boxes[part], scores[part], iou_threshold) + start)
            start += count
        keep_SN = valid_SN.new_zeros(valid_SN.shape)
        keep_SN.view(-1)[places[torch.cat(kept)]] = True
    return keep_SN


@_nms_keep.register_fake
def _(boxes_SN4: Tensor, scores_SN: Tensor, iou_threshold: float, valid_SN: Tensor) -> Tensor:
    return valid_SN.new_empty(valid_SN.shape)


def _roi_align_by_level(features: Sequence[Tensor], geometry: reference.Geometry) -> Tensor:
    """Pools all regions from each level, those of other levels as empty boxes far outside.

    Their samples cost a kernel nothing and are 0, and unlike a selection of each level's regions
    this has static shapes.
    """
    images, regions = geometry.level_BR.shape
    image_B1 = torch.arange(images, device=geometry.boxes_BR4.device).unsqueeze(1)
    image_BR1 = image_B1.expand(-1, regions).unsqueeze(-1).to(geometry.boxes_BR4.dtype)
    total: Tensor | None = None
    for level, (feature, stride) in enumerate(zip(features, geometry.strides, strict=True)):
        others = (geometry.level_BR != level).unsqueeze(-1)
        boxes_BR4 = geometry.boxes_BR4.masked_fill(others, -4.0 * stride)
        pooled = torchvision.ops.roi_align(
            feature,
            torch.cat([image_BR1, boxes_BR4], -1).flatten(0, 1),
            geometry.output_size,
            1 / stride,
            geometry.sampling_ratio,
            aligned=True,
        )
        total = pooled if total is None else total + pooled
    assert total is not None
    return total.view(images, regions, *total.shape[1:])


class _Region(NamedTuple):
    """The pixels of one feature map that a region reads, and their weights in its output.

    ``number`` counts the regions of all images, ``image`` says which one it belongs to.
    """

    number: int
    image: int
    level: int
    top: int
    left: int
    rows_Ph: Tensor
    columns_Pw: Tensor

    def crop(self, map_BCHW: Tensor) -> Tensor:
        """A view of the region's pixels: (h, w * C) of maps in channels-last memory.

        Of others (C, h, w).
        """
        image, channel, row, column = map_BCHW.stride()
        channels = map_BCHW.shape[1]
        height, width = self.rows_Ph.shape[1], self.columns_Pw.shape[1]
        offset = map_BCHW.storage_offset() + self.image * image
        offset += self.top * row + self.left * column
        if _is_channels_last(map_BCHW):
            return map_BCHW.as_strided((height, width * channels), (row, 1), offset)
        return map_BCHW.as_strided((channels, height, width), (channel, row, column), offset)


def _is_channels_last(map_BCHW: Tensor) -> bool:
    _, channel, _, column = map_BCHW.stride()
    return channel == 1 and column == map_BCHW.shape[1]


def _regions(shapes: Sequence[tuple[int, int]], geometry: reference.Geometry) -> Iterator[_Region]:
    """The regions that have a pixel inside their map.

    Args:
        shapes: (H, W) of each level.
        geometry: the regions.
    """
    size, ratio = geometry.output_size, geometry.sampling_ratio
    if not geometry.level_BR.numel():
        return
    x0, y0, x1, y1 = geometry.scaled_boxes().flatten(0, 1).unbind(-1)
    firsts, counts, weights = [], [], []
    for axis, (start, end) in enumerate(((y0, y1), (x0, x1))):
        lengths = [shape[axis] for shape in shapes]
        length = geometry.of_level(lengths, geometry.level_BR).flatten()
        grid = ratio
        if not ratio:
            longest = ((end - start) / size).nan_to_num().amax().item()
            grid = min(max(1, math.ceil(longest)), reference.largest_grid(lengths, size))
        samples = reference.sample_axis(start, end, length, size, ratio, grid)
        outside = samples.share == 0
        first = samples.low.masked_fill(outside, max(lengths)).flatten(1).amin(1)
        last = samples.high.masked_fill(outside, -1).flatten(1).amax(1)
        count = (last - first + 1).clamp(min=0)
        firsts.append(first.tolist())
        counts.append(count.tolist())
        weights.append(reference.axis_weights(samples, first, max(1, *counts[-1])).unbind(0))
    regions_per_image = geometry.level_BR.shape[1]
    for index, level in enumerate(geometry.level_BR.flatten().tolist()):
        height, width = counts[0][index], counts[1][index]
        if height and width:
            yield _Region(
                index,
                index // regions_per_image,
                level,
                firsts[0][index],
                firsts[1][index],
                weights[0][index].narrow(1, 0, height),
                weights[1][index].narrow(1, 0, width),
            )


@torch.library.custom_op("zoo::roi_align_levels", mutates_args=(), device_types="cpu")
def _roi_align_levels(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes_BR4: Tensor,
    level_BR: Tensor,
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    images, regions = level_BR.shape
    channels, size, dtype = features[0].shape[1], output_size, boxes_BR4.dtype
    pooled = boxes_BR4.new_zeros(images * regions, channels, size * size)
    geometry = reference.Geometry(boxes_BR4, level_BR, tuple(strides), size, sampling_ratio)
    shapes = [(feature.shape[2], feature.shape[3]) for feature in features]
    with reference.no_autocast("cpu"), _one_thread():
        for region in _regions(shapes, geometry):
            feature = features[region.level]
            crop = region.crop(feature).to(dtype)
            rows_Ph, columns_Pw = region.rows_Ph, region.columns_Pw
            # BLAS is fast with few rows and many columns, so channels are always in the columns.
            if _is_channels_last(feature):
                lines = torch.mm(rows_Ph, crop).view(size, -1, channels)
                pixels = torch.bmm(columns_Pw.expand(size, -1, -1), lines)
            else:
                columns = torch.mm(columns_Pw, crop.flatten(0, 1).t())
                pixels = torch.mm(rows_Ph, columns.view(size * channels, -1).t())
            pooled[region.number].copy_(pixels.view(size * size, channels).t())
    return pooled.view(images, regions, channels, size, size)


@_roi_align_levels.register_fake
def _(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes_BR4: Tensor,
    level_BR: Tensor,
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    shape = (*level_BR.shape, features[0].shape[1], output_size, output_size)
    return boxes_BR4.new_empty(shape)


@torch.library.custom_op("zoo::roi_align_levels_backward", mutates_args=(), device_types="cpu")
def _roi_align_levels_backward(
    grad: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: Sequence[bool],
    strides: Sequence[int],
    boxes_BR4: Tensor,
    level_BR: Tensor,
    sampling_ratio: int,
) -> list[Tensor]:
    size = grad.shape[-1]
    shapes = list(zip(heights, widths, strict=True))
    grads = _feature_grads(grad, shapes, channels_last)
    for feature_grad in grads:
        feature_grad.zero_()
    geometry = reference.Geometry(boxes_BR4, level_BR, tuple(strides), size, sampling_ratio)
    with reference.no_autocast("cpu"), _one_thread():
        for region in _regions(shapes, geometry):
            feature_grad = grads[region.level]
            crop = region.crop(feature_grad)
            rows_hP, columns_Pw = region.rows_Ph.t(), region.columns_Pw
            grad_CPP = grad.select(0, region.image).select(0, region.number % level_BR.shape[1])
            if _is_channels_last(feature_grad):
                grad_PPC = grad_CPP.permute(1, 2, 0)
                lines = torch.bmm(columns_Pw.t().expand(size, -1, -1), grad_PPC)
                crop.addmm_(rows_hP, lines.flatten(1))
            else:
                grad_XP = grad_CPP.transpose(0, 1).reshape(-1, size)
                lines = torch.mm(grad_XP, columns_Pw).view(size, -1)
                crop_hCw = crop.transpose(0, 1)
                crop_hCw.add_(torch.mm(rows_hP, lines).view(crop_hCw.shape))
    return grads


@_roi_align_levels_backward.register_fake
def _(
    grad: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: Sequence[bool],
    strides: Sequence[int],
    boxes_BR4: Tensor,
    level_BR: Tensor,
    sampling_ratio: int,
) -> list[Tensor]:
    return _feature_grads(grad, list(zip(heights, widths, strict=True)), channels_last)


def _feature_grads(
    grad_BRCPP: Tensor, shapes: Sequence[tuple[int, int]], channels_last: Sequence[bool]
) -> list[Tensor]:
    """Uninitialised gradients of the levels, in the memory format of the features."""
    images, _, channels = grad_BRCPP.shape[:3]
    return [
        torch.empty(
            (images, channels, *shape),
            dtype=grad_BRCPP.dtype,
            device=grad_BRCPP.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        for shape, last in zip(shapes, channels_last, strict=True)
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, strides, boxes_BR4, level_BR, _, sampling_ratio = inputs
    ctx.save_for_backward(boxes_BR4, level_BR)
    ctx.features = [
        (feature.shape[2], feature.shape[3], _is_channels_last(feature), feature.dtype)
        for feature in features
    ]
    ctx.strides, ctx.sampling_ratio = strides, sampling_ratio


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    heights, widths, channels_last, dtypes = (list(x) for x in zip(*ctx.features, strict=True))
    grads = _roi_align_levels_backward(
        grad,
        heights,
        widths,
        channels_last,
        ctx.strides,
        *ctx.saved_tensors,
        ctx.sampling_ratio,
    )
    grads = [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    return grads, None, None, None, None, None


_roi_align_levels.register_autograd(_backward, setup_context=_save_for_backward)
