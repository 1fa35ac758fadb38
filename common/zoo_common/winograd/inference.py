"""The convolution of this package where no gradients are wanted.

The transforms are elementwise, on blocks of tiles that stay in the caches, and the products are a
grouped 1x1 convolution of oneDNN. Filters are transformed and brought into oneDNN's order once and
kept.

Shape letters: B images, C channels, O outputs, H W cells of a map, T tiles, P the 36 places of a
tile row by row, I J rows and columns of these, X Y rows and columns of tiles in a block.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from zoo_common.winograd.points import CELLS, FAR, FILTER, INPUT, NEAR, OUTPUT

PLACES = 36
TILES = 128
"""Tiles of one product; always as many, since oneDNN's order of the filters depends on it."""
MOST_COLUMNS = 32  # tiles of a block in a row
ALIGNED = 16  # channels, for the products' vectors


class _Filters(NamedTuple):
    """The filters of one layer, transformed.

    Attributes:
        packed: places x outputs filters of 1x1, in oneDNN's order.
        state: of the weight that they were made of.
    """

    packed: Tensor
    state: tuple[int, ...]


class _Block(NamedTuple):
    """A rectangle of tiles of one image."""

    source_HWC: Tensor
    target_HWO: Tensor
    top: int  # of its outputs
    left: int
    rows: int  # of tiles
    columns: int


_SCALES = (NEAR, NEAR, FAR, FAR)
"""Of the filters' values at the four points, so that the second output of a line is a sum."""

_kept: MutableMapping[Tensor, _Filters] = WeakTensorKeyDictionary()


def convolve(
    maps_BCHW: Sequence[Tensor], weight_OC33: Tensor, bias_O: Tensor | None
) -> list[Tensor]:
    """``winograd.conv3x3`` without gradients; it says what is kept, and for how long."""
    packed = _filters(weight_OC33)
    outputs, channels = weight_OC33.shape[:2]
    sources = [
        map_BCHW.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        for map_BCHW in maps_BCHW
    ]
    targets = [source.new_empty(*source.shape[:3], outputs) for source in sources]
    for blocks in _fill(sources, targets):
        inputs_TPC = _transform(blocks, channels)
        products_TPO = _multiply(inputs_TPC, packed, outputs)
        first = 0
        for block in blocks:
            count = block.rows * block.columns
            _finish(block, products_TPO[first : first + count], bias_O)
            first += count
    return [target.permute(0, 3, 1, 2) for target in targets]


def forget(weight_OC33: Tensor) -> None:
    """Drops what is kept of a weight, which training is about to change."""
    _kept.pop(weight_OC33, None)


def _filters(weight_OC33: Tensor) -> Tensor:
    """The transformed filters of a layer, from before if its weight is what it was."""
    threads = torch.get_num_threads()  # oneDNN's order may depend on them
    state = (weight_OC33.data_ptr(), weight_OC33._version, threads)
    kept = _kept.get(weight_OC33)
    if kept is None or kept.state != state:
        _kept.pop(weight_OC33, None)  # the memory of the old ones, before that of the new
        kept = _kept[weight_OC33] = _Filters(_pack(weight_OC33), state)
    return kept.packed


def _pack(weight_OC33: Tensor) -> Tensor:
    """Transforms filters, in float64, and brings them into oneDNN's order."""
    points = torch.tensor(FILTER, dtype=torch.float64)
    # Those of the pairs are multiplied by their point, which _interpolate_back counts on.
    points[1:5] *= torch.tensor(_SCALES, dtype=torch.float64)[:, None]
    outputs, channels = weight_OC33.shape[:2]
    filters = torch.einsum("ia,ocab,jb->ijoc", points, weight_OC33.double(), points)
    filters = F.pad(filters, (0, _aligned(channels) - channels))
    layers = filters.reshape(PLACES * outputs, -1, 1, 1).float()
    size = [1, PLACES * layers.shape[1], 1, TILES]
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        layers, [0, 0], [1, 1], [1, 1], PLACES, size
    )
    return packed


def _aligned(channels: int) -> int:
    return -(-channels // ALIGNED) * ALIGNED


def _fill(sources: list[Tensor], targets: list[Tensor]) -> Iterator[list[_Block]]:
    """Blocks that have up to ``TILES`` tiles together, until all maps are covered."""
    blocks: list[_Block] = []
    room = TILES
    for source_HWC, target_HWO in (
        pair for maps in zip(sources, targets, strict=True) for pair in zip(*maps, strict=True)
    ):
        height, width = (-(-size // CELLS) for size in source_HWC.shape[:2])
        step = -(-width // -(-width // MOST_COLUMNS))
        for left in range(0, width, step):
            columns, top = min(step, width - left), 0
            while top < height:
                if room < columns:
                    yield blocks
                    blocks, room = [], TILES
                rows = min(room // columns, height - top)
                blocks.append(
                    _Block(source_HWC, target_HWO, top * CELLS, left * CELLS, rows, columns)
                )
                room -= rows * columns
                top += rows
    yield blocks


def _transform(blocks: list[_Block], channels: int) -> Tensor:
    """The transformed inputs of the blocks' tiles, zero in what is left, [TILES, P, C]."""
    width = _aligned(channels)
    inputs_TPC = blocks[0].source_HWC.new_empty(TILES, PLACES, width)
    first = 0
    for block in blocks:
        rows, columns = block.rows, block.columns
        seen_HWC = _cut(block, width)
        across = seen_HWC.shape[1]
        # For each row of tiles the six rows that it sees; two of them the next one sees too.
        taps_XIN = seen_HWC.as_strided(
            (rows, 6, across * width), (CELLS * across * width, across * width, 1)
        )
        points_XIN = torch.bmm(_matrix(INPUT).expand(rows, 6, 6), taps_XIN)
        halves_XIWC = points_XIN.view(rows, 6, across, width)
        count = rows * columns
        tiles_XYIJC = inputs_TPC[first : first + count].view(rows, columns, 6, 6, width)
        last = CELLS * (columns - 1) + 1
        _interpolate(
            [halves_XIWC[:, :, tap : tap + last : CELLS] for tap in range(6)],
            [place_XYIC.transpose(1, 2) for place_XYIC in tiles_XYIJC.unbind(3)],
        )
        first += count
    inputs_TPC[first:].zero_()
    return inputs_TPC


def _cut(block: _Block, channels: int) -> Tensor:
    """What the block's tiles see, with zeros around the map and in channels that it has not."""
    height, width, present = block.source_HWC.shape
    size = (CELLS * block.rows + 2, CELLS * block.columns + 2)
    top, left = block.top - 1, block.left - 1
    bottom, right = min(top + size[0], height), min(left + size[1], width)
    above, before = max(-top, 0), max(-left, 0)
    below, behind = bottom - top, right - left
    seen_HWC = block.source_HWC.new_empty(*size, channels)
    seen_HWC[:above].zero_()
    seen_HWC[below:].zero_()
    seen_HWC[above:below, :before].zero_()
    seen_HWC[above:below, behind:].zero_()
    inner_HWC = seen_HWC[above:below, before:behind]
    inner_HWC[..., present:].zero_()
    inner_HWC[..., :present].copy_(block.source_HWC[top + above : bottom, left + before : right])
    return seen_HWC


def _interpolate(taps: list[Tensor], points: list[Tensor]) -> None:
    """Six inputs in a line to their values at six points: Lavin's B, for our points."""
    near, far = NEAR**2, FAR**2
    even, odd = torch.empty_like(taps[0]), torch.empty_like(taps[0])
    for point, other, plus, minus in ((NEAR, far, 1, 2), (FAR, near, 3, 4)):
        torch.sub(taps[4], taps[2], alpha=other, out=even)
        torch.sub(taps[3], taps[1], alpha=other, out=odd)
        torch.add(even, odd, alpha=point, out=points[plus])
        torch.sub(even, odd, alpha=point, out=points[minus])
    for start, point in ((0, 0), (1, 5)):
        torch.sub(taps[start + 4], taps[start + 2], alpha=near + far, out=points[point])
        points[point].add_(taps[start], alpha=near * far)


def _matrix(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def _multiply(inputs_TPC: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """At each place the product with the filters' channels, [T, P, O]."""
    tiles = len(inputs_TPC)
    line_1X1T = inputs_TPC.view(1, 1, tiles, -1).permute(0, 3, 1, 2)  # channels-last
    products_1X1T: Tensor = torch.ops.mkldnn._convolution_pointwise(
        line_1X1T, packed, None, [0, 0], [1, 1], [1, 1], PLACES, "none", [], ""
    )
    return products_1X1T.permute(0, 2, 3, 1).reshape(tiles, PLACES, outputs)


def _finish(block: _Block, products_TPO: Tensor, bias_O: Tensor | None) -> None:
    """Writes a block's outputs from the products of its tiles."""
    rows, columns, outputs = block.rows, block.columns, products_TPO.shape[-1]
    tiles_XYIJO = products_TPO.view(rows, columns, 6, 6, outputs)
    halves_XIYJO = tiles_XYIJO.new_empty(rows, 6, columns, CELLS, outputs)
    _interpolate_back(
        [place_XYIO.transpose(1, 2) for place_XYIO in tiles_XYIJO.unbind(3)],
        list(halves_XIYJO.unbind(3)),
    )
    outputs_46 = _matrix(OUTPUT)
    outputs_46[:, 1:5] /= torch.tensor(_SCALES)
    whole_XIN = torch.bmm(outputs_46.expand(rows, CELLS, 6), halves_XIYJO.flatten(2))
    whole_HWO = whole_XIN.view(rows * CELLS, columns * CELLS, outputs)
    target_HWO = block.target_HWO[block.top :, block.left :]
    target_HWO = target_HWO[: rows * CELLS, : columns * CELLS]
    whole_HWO = whole_HWO[: len(target_HWO), : target_HWO.shape[1]]
    if bias_O is None:
        target_HWO.copy_(whole_HWO)
    else:
        torch.add(whole_HWO, bias_O, out=target_HWO)


def _interpolate_back(points: list[Tensor], outputs: list[Tensor]) -> None:
    """Products at six points to four outputs in a line: Lavin's A, for our points.

    Those of a pair of points come multiplied by the point, so that the second output is a sum.
    """
    near, far = torch.empty_like(points[0]), torch.empty_like(points[0])
    torch.add(points[1], points[2], out=near)
    torch.add(points[3], points[4], out=far)
    torch.add(points[0], near, alpha=1 / NEAR, out=outputs[0])
    outputs[0].add_(far, alpha=1 / FAR)
    torch.mul(far, FAR, out=outputs[2])
    outputs[2].add_(near, alpha=NEAR)
    torch.sub(points[1], points[2], out=near)
    torch.sub(points[3], points[4], out=far)
    torch.add(near, far, out=outputs[1])
    torch.add(points[5], near, alpha=NEAR**2, out=outputs[3])
    outputs[3].add_(far, alpha=FAR**2)
