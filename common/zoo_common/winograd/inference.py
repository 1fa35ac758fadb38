"""The convolution of this package where no gradients are wanted.

Each transform is a sparse matrix, the same for every channel: an embedding bag sums weighted cells
of a map, or places of a tile, as rows of channels, in one pass that stays in the caches and leaves
out what lies beyond the border. The products are a grouped 1x1 convolution of oneDNN. Filters are
transformed and brought into oneDNN's order once and kept.

Shape letters: B images, C channels, O outputs, H W cells of a map, S the cells of all maps, N those
of a chunk, T tiles, P the 36 places of a tile row by row, R tiles times places, I J rows and
columns of places, K terms of the sums of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from zoo_common.winograd.kept import Versions, versions
from zoo_common.winograd.points import CELLS, FILTER, INPUT, OUTPUT, TILE

PLACES = TILE**2
TILES = 128
"""Tiles of one product; always as many, since oneDNN's order of the filters depends on it."""
ALIGNED = 16  # channels, for the products' vectors


class _Filters(NamedTuple):
    """The filters of one layer, transformed.

    Attributes:
        packed: places x outputs filters of 1x1, in oneDNN's order.
        state: of the weight that they were made of.
    """

    packed: Tensor
    state: Versions


class _Block(NamedTuple):
    """A rectangle of an image's outputs, whole tiles but for the image's end.

    Attributes:
        first: its first cell, counted from the chunk's.
        height: rows of cells.
        width: columns.
        line: columns of the image.
        above: whether the image goes on above.
        below: and below.
        before: and to the left.
        behind: and to the right.
    """

    first: int
    height: int
    width: int
    line: int
    above: bool
    below: bool
    before: bool
    behind: bool


class _Sums(NamedTuple):
    """Weighted sums of rows: the arguments of an embedding bag."""

    rows: Tensor  # int32
    weights: Tensor
    starts: Tensor  # int32, of each sum among the rows

    def of(self, table: Tensor) -> Tensor:
        """The sums, in order."""
        return F.embedding_bag(
            self.rows, table, self.starts, mode="sum", per_sample_weights=self.weights
        )


_kept: MutableMapping[Tensor, _Filters] = WeakTensorKeyDictionary()


def convolve(
    maps_BCHW: Sequence[Tensor], weight_OC33: Tensor, bias_O: Tensor | None
) -> list[Tensor]:
    """``winograd.conv3x3`` without gradients; it says what is kept, and for how long."""
    packed = _filters(weight_OC33)
    outputs, channels = weight_OC33.shape[:2]
    lines_SC = _lines(maps_BCHW, _aligned(channels) - channels)
    sizes = [(one.shape[2], one.shape[3]) for one in maps_BCHW for _ in one]
    chunks = list(_chunks(sizes))
    lines_SO = lines_SC.new_empty(len(lines_SC), outputs)
    for begin, blocks in chunks:
        inward, outward = _transforms(blocks)
        products_RO = _multiply(inward.of(lines_SC[begin:]), packed, outputs)
        outputs_NO = outward.of(products_RO)
        if bias_O is not None:
            outputs_NO += bias_O
        if len(chunks) == 1 and all(block.width == block.line for block in blocks):
            lines_SO = outputs_NO  # they lie in order
        else:
            _place(outputs_NO, lines_SO[begin:], blocks)
    counts = [one.shape[0] * one.shape[2] * one.shape[3] for one in maps_BCHW]
    return [
        part_NO.view(one.shape[0], *one.shape[2:], outputs).permute(0, 3, 1, 2)
        for one, part_NO in zip(maps_BCHW, lines_SO.split_with_sizes(counts), strict=True)
    ]


def forget(weight_OC33: Tensor) -> None:
    """Drops what is kept of a weight, which training is about to change."""
    _kept.pop(weight_OC33, None)


def _filters(weight_OC33: Tensor) -> Tensor:
    """The transformed filters of a layer, from before if its weight is what it was."""
    state = versions(weight_OC33)
    kept = _kept.get(weight_OC33)
    if kept is None or kept.state != state:
        _kept.pop(weight_OC33, None)  # the memory of the old ones, before that of the new
        kept = _kept[weight_OC33] = _Filters(_pack(weight_OC33), state)
    return kept.packed


def _pack(weight_OC33: Tensor) -> Tensor:
    """Transforms filters, in float64, and brings them into oneDNN's order."""
    points = torch.tensor(FILTER, dtype=torch.float64)
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


def _lines(maps_BCHW: Sequence[Tensor], more: int) -> Tensor:
    """All cells, image by image and map by map, with ``more`` channels of zeros."""
    lines = [
        map_BCHW.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(0, 2)
        for map_BCHW in maps_BCHW
    ]
    lines_SC = lines[0] if len(lines) == 1 else torch.cat(lines)
    return F.pad(lines_SC, (0, more)) if more else lines_SC


def _chunks(sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, tuple[_Block, ...]]]:
    """Cuts images into chunks of up to ``TILES`` tiles.

    Yields:
        The first cell that a chunk sees, and its blocks. Chunks of the same shape are equal,
        wherever they lie.
    """
    blocks: list[_Block] = []
    room, first = TILES, 0
    for height, width in sizes:
        step = _columns(-(-width // CELLS)) * CELLS
        for left in range(0, width, step):
            across, top = min(step, width - left), 0
            columns = -(-across // CELLS)
            while top < height:
                if room < columns:
                    yield _from_begin(blocks)
                    blocks, room = [], TILES
                deep = min(room // columns * CELLS, height - top)
                borders = (top > 0, top + deep < height, left > 0, left + across < width)
                cell = first + top * width + left
                blocks.append(_Block(cell, deep, across, width, *borders))
                room -= -(-deep // CELLS) * columns
                top += deep
        first += height * width
    yield _from_begin(blocks)


def _from_begin(blocks: Sequence[_Block]) -> tuple[int, tuple[_Block, ...]]:
    """The first cell that blocks see, and them with their cells counted from there."""
    begin = min(block.first - block.above * block.line - block.before for block in blocks)
    return begin, tuple(block._replace(first=block.first - begin) for block in blocks)


def _columns(tiles: int) -> int:
    """The width of blocks: a row of tiles is cut into few parts, so that blocks fill products."""
    fewest = -(-tiles // TILES)
    widths = [-(-tiles // parts) for parts in range(fewest, fewest + 4)]
    filled = [TILES // width * tiles / -(-tiles // width) / TILES for width in widths]
    return next(
        (width for width, part in zip(widths, filled, strict=True) if part > 0.9),
        widths[filled.index(max(filled))],
    )


def _place(cells_NO: Tensor, lines_SO: Tensor, blocks: Sequence[_Block]) -> None:
    """Writes a chunk's outputs where they belong."""
    outputs, done = cells_NO.shape[1], 0
    for block in blocks:
        size = (block.height, block.width, outputs)
        part_NO = cells_NO[done : done + block.height * block.width]
        lines_SO[block.first :].as_strided(size, (block.line * outputs, outputs, 1)).copy_(
            part_NO.view(size)
        )
        done += len(part_NO)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _transforms(blocks: tuple[_Block, ...]) -> tuple[_Sums, _Sums]:
    """From the cells of a chunk to the places of its tiles, [R, C], and from these to its outputs.

    A tile has up to 484 terms there and 324 back, of 8 bytes each: those of a chunk take 0.8 MB.
    """
    tiles = 0
    inward, outward = [], []
    for block in blocks:
        inward.append(_inward(block))
        outward.append(_outward(block, tiles))
        tiles += len(inward[-1].counts) // PLACES
    return _join(inward, spare=(TILES - tiles) * PLACES), _join(outward)


class _Terms(NamedTuple):
    """The same as :class:`_Sums`, of a part."""

    rows: Tensor
    weights: Tensor
    counts: Tensor  # of the terms of each sum


def _inward(block: _Block) -> _Terms:
    """Lavin's B on both sides, without the cells beyond the border."""
    taps = torch.arange(TILE) - 1
    y_YK = CELLS * torch.arange(-(-block.height // CELLS))[:, None] + taps
    x_XL = CELLS * torch.arange(-(-block.width // CELLS))[:, None] + taps
    there_YK = (y_YK >= -int(block.above)) & (y_YK < block.height + int(block.below))
    there_XL = (x_XL >= -int(block.before)) & (x_XL < block.width + int(block.behind))
    matrix = torch.tensor(INPUT, dtype=torch.float32)
    down_YIK, across_XJL = matrix * there_YK[:, None], matrix * there_XL[:, None]
    cells_YXKL = block.first + y_YK[:, None, :, None] * block.line + x_XL[None, :, None]
    return _terms(
        cells_YXKL[:, :, None, None],
        down_YIK[:, None, :, None, :, None] * across_XJL[None, :, None, :, None],
    )


def _outward(block: _Block, tiles: int) -> _Terms:
    """Lavin's A on both sides, row by row of the block; ``tiles`` come before."""
    y_H, x_W = torch.arange(block.height), torch.arange(block.width)
    tiles_HW = tiles + (y_H // CELLS)[:, None] * -(-block.width // CELLS) + x_W // CELLS
    places_IJ = torch.arange(PLACES).view(TILE, TILE)
    matrix = torch.tensor(OUTPUT, dtype=torch.float32)
    down_HI, across_WJ = matrix[y_H % CELLS], matrix[x_W % CELLS]
    return _terms(
        tiles_HW[:, :, None, None] * PLACES + places_IJ,
        down_HI[:, None, :, None] * across_WJ[None, :, None],
    )


def _terms(rows: Tensor, weights: Tensor) -> _Terms:
    """Those that count of the sums over the last two dimensions."""
    there = weights != 0
    counts = there.sum(dim=(-2, -1)).flatten()
    return _Terms(rows.expand_as(weights)[there], weights[there], counts)


def _join(parts: Sequence[_Terms], spare: int = 0) -> _Sums:
    """The sums of all parts, and ``spare`` sums of nothing."""
    counts = F.pad(torch.cat([part.counts for part in parts]), (0, spare))
    return _Sums(
        torch.cat([part.rows for part in parts]).int(),
        torch.cat([part.weights for part in parts]),
        (counts.cumsum(0) - counts).int(),
    )


def _multiply(inputs_RC: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """At each place the product with the filters' channels, [R, O]."""
    line_1X1T = inputs_RC.view(1, 1, TILES, -1).permute(0, 3, 1, 2)  # channels-last
    products_1X1T: Tensor = torch.ops.mkldnn._convolution_pointwise(
        line_1X1T, packed, None, [0, 0], [1, 1], [1, 1], PLACES, "none", [], ""
    )
    return products_1X1T.permute(0, 2, 3, 1).reshape(-1, outputs)
