"""The convolution of this package where gradients are wanted: forward and backward pass.

Both are in matrix products over the tiles of all maps, place by place of a tile, and the
transforms are matrix products too: by the rows of all tiles, then by their columns. Nothing that is
transformed is kept for the backward pass, which costs less time than the memory is worth: tiles
are 2.25 times a map, and transformed filters four times the filters.

Shape letters: B images, C input and K output channels, H W cells of a map, T tiles, F the 36
places of a tile, X any of its places, before or behind a transform.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zoo_common.winograd.points import CELLS, FILTER, INPUT, OUTPUT, TILE

_CHUNK = 5_000_000
"""Elements of transformed tiles at a time, in some buffers of that size. Filters are transformed
for every chunk anew: a layer of 512 channels on 4,000 cells, as SOLOv2's towers have, fits one."""


def convolve(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """``winograd.conv3x3`` with gradients, for maps whose sides are multiples of 4."""
    return list(_Winograd.apply(weight, bias, *maps))


class _Strip(NamedTuple):
    """Some rows of tiles of a map, and where their tiles lie in a chunk."""

    map: int
    top: int
    rows: int
    tiles: slice


class _Winograd(torch.autograd.Function):
    """Keeps the maps and the weights for the backward pass, nothing that is transformed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        outputs = weight.shape[0]
        results = [torch.empty((m.shape[0], *m.shape[2:], outputs), dtype=m.dtype) for m in maps]
        output = _matrix(OUTPUT)
        for strips, tiles in _chunks(maps):
            spectrum_FTC = _analyse(maps, strips, tiles)
            product_FTK = spectrum_FTC.new_empty(len(spectrum_FTC), tiles, outputs)
            for one_TC, kernel_KC, out_TK in zip(
                spectrum_FTC, _kernels(weight), product_FTK, strict=True
            ):
                out_TK.copy_(_line(F.conv2d(_row(one_TC), kernel_KC[:, :, None, None])))
            cells_XTK = _transform(output, product_FTK)
            if bias is not None:
                cells_XTK += bias
            for strip in strips:
                _blocks(results[strip.map], strip).copy_(
                    cells_XTK[:, strip.tiles].view(_grid(maps, strip, CELLS, outputs))
                )
        ctx.save_for_backward(weight, *maps)
        ctx.has_bias = bias is not None
        return tuple(result.permute(0, 3, 1, 2) for result in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        outputs, inputs = weight.shape[:2]
        wants_weight, wants_maps = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
        grad_33KC = weight.new_zeros(3, 3, outputs, inputs) if wants_weight else None
        rows_BHWK = [grad.permute(0, 2, 3, 1).contiguous() for grad in grads]
        bordered = (
            [m.new_zeros(m.shape[0], m.shape[2] + CELLS, m.shape[3] + CELLS, inputs) for m in maps]
            if wants_maps
            else []
        )
        back, front = _matrix(OUTPUT).T, _matrix(INPUT).T
        for strips, tiles in _chunks(maps):
            cells = torch.empty(CELLS**2, tiles, outputs)
            for strip in strips:
                shape = _grid(maps, strip, CELLS, outputs)
                cells[:, strip.tiles].view(shape).copy_(_blocks(rows_BHWK[strip.map], strip))
            product_FTK = _transform(back, cells)
            del cells  # while most activations are kept, what is added here makes a step's peak
            spectrum_FTC = _analyse(maps, strips, tiles)
            grads_6KC: list[Tensor] = []
            for index, kernel_KC in enumerate(_kernels(weight)):
                grad_TC, grad_KC, _ = torch.ops.aten.convolution_backward(
                    _row(product_FTK[index]),
                    _row(spectrum_FTC[index]),
                    kernel_KC[:, :, None, None],
                    None,
                    [1, 1],
                    [0, 0],
                    [1, 1],
                    False,
                    [0, 0],
                    1,
                    [wants_maps, wants_weight, False],
                )
                if grad_33KC is not None:
                    grads_6KC.append(grad_KC[..., 0, 0])
                    _gather_taps(grad_33KC, grads_6KC, index)
                if wants_maps:
                    spectrum_FTC[index] = _line(grad_TC)
            if wants_maps:
                tiles_XTC = _transform(front, spectrum_FTC)
                for strip in strips:
                    _overlap(bordered[strip.map], tiles_XTC[:, strip.tiles], maps, strip)
        grad_maps = (
            [
                one[:, 1 : 1 + m.shape[2], 1 : 1 + m.shape[3]].permute(0, 3, 1, 2)
                for one, m in zip(bordered, maps, strict=True)
            ]
            if wants_maps
            else [None] * len(maps)
        )
        grad_bias = None
        if ctx.has_bias and ctx.needs_input_grad[1]:
            grad_bias = torch.stack([rows.sum(dim=(0, 1, 2)) for rows in rows_BHWK]).sum(dim=0)
        grad_weight = None if grad_33KC is None else grad_33KC.permute(2, 3, 0, 1)
        return grad_weight, grad_bias, *grad_maps


def _row(rows_TX: Tensor) -> Tensor:
    """As a map of one row, [1, X, 1, T]: oneDNN's 1x1 convolutions outdo MKL's products."""
    return rows_TX[None, None].permute(0, 3, 1, 2)


def _line(map_1X1T: Tensor) -> Tensor:
    return map_1X1T.permute(0, 2, 3, 1)[0, 0]


def _transform(matrix: Tensor, tiles_XTC: Tensor) -> Tensor:
    """Rows and columns of tiles by a matrix: [a, b] and [b * b, T, C] give [a * a, T, C].

    Where a is b the result takes the memory of the tiles.
    """
    after, before = matrix.shape
    rows = torch.mm(matrix, tiles_XTC.view(before, -1)).view(after, before, -1)
    both = tiles_XTC if after == before else tiles_XTC.new_empty(after**2, *tiles_XTC.shape[1:])
    torch.bmm(matrix.repeat(after, 1, 1), rows, out=both.view(after, after, -1))
    return both


def _matrix(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def _kernels(weight: Tensor) -> Iterator[Tensor]:
    """The transformed weights of each place, [K, C]; a row of places is made at a time."""
    outputs, inputs = weight.shape[:2]
    points_63 = _matrix(FILTER)
    taps_3X = weight.permute(2, 3, 0, 1).reshape(3, 3 * outputs * inputs)
    for row_X in torch.mm(points_63, taps_3X):
        yield from torch.mm(points_63, row_X.view(3, -1)).view(-1, outputs, inputs)


def _gather_taps(grad_33KC: Tensor, grads_6KC: list[Tensor], place: int) -> None:
    """Adds a row of places, once it is whole, to the gradient of the weights."""
    row, column = divmod(place, TILE)
    if column < TILE - 1:
        return
    points_63 = _matrix(FILTER)
    places_6X = torch.stack(grads_6KC).flatten(1)
    taps_3KC = torch.mm(points_63.T, places_6X).view(3, *grad_33KC.shape[2:])
    for tap, factor in enumerate(FILTER[row]):
        grad_33KC[tap].add_(taps_3KC, alpha=factor)
    grads_6KC.clear()


def _chunks(maps: Sequence[Tensor]) -> Iterator[tuple[list[_Strip], int]]:
    """All tiles of the maps in chunks, each with its number of tiles."""
    most = max(1, _CHUNK // (TILE**2 * maps[0].shape[1]))
    strips: list[_Strip] = []
    tiles = 0
    for index, map_BCHW in enumerate(maps):
        images, _, height, width = map_BCHW.shape
        row = images * width // CELLS
        top, rows = 0, height // CELLS
        while top < rows:
            fitting = min(rows - top, (most - tiles) // row)
            if fitting < 1 and strips:
                yield strips, tiles
                strips, tiles = [], 0
                continue
            fitting = max(1, fitting)
            strips.append(_Strip(index, top, fitting, slice(tiles, tiles + fitting * row)))
            tiles += fitting * row
            top += fitting
    if strips:
        yield strips, tiles


def _grid(maps: Sequence[Tensor], strip: _Strip, side: int, channels: int) -> tuple[int, ...]:
    """The tiles of a strip as [side, side, B, rows of tiles, columns of tiles, channels]."""
    images, width = maps[strip.map].shape[0], maps[strip.map].shape[3]
    return side, side, images, strip.rows, width // CELLS, channels


def _blocks(map_BHWX: Tensor, strip: _Strip) -> Tensor:
    """A strip of a map cut into blocks of 4 x 4, in the order of ``_grid``."""
    images, _, width, channels = map_BHWX.shape
    cut = map_BHWX[:, strip.top * CELLS : (strip.top + strip.rows) * CELLS]
    blocks = cut.view(images, strip.rows, CELLS, width // CELLS, CELLS, channels)
    return blocks.permute(2, 4, 0, 1, 3, 5)


def _analyse(maps: Sequence[Tensor], strips: Sequence[_Strip], tiles: int) -> Tensor:
    """The transformed tiles of some strips, [F, T, C]."""
    channels = maps[0].shape[1]
    cut = torch.empty(TILE**2, tiles, channels)
    for strip in strips:
        map_BHWC = maps[strip.map].permute(0, 2, 3, 1)
        height, first = map_BHWC.shape[1], strip.top * CELLS - 1
        end = first + strip.rows * CELLS + 2
        part = map_BHWC[:, max(first, 0) : min(end, height)]
        border = (0, 0, 1, 1, max(-first, 0), max(end - height, 0))
        part = F.pad(part, border)
        image, row, column, _ = part.stride()
        shape = _grid(maps, strip, TILE, channels)
        strides = (row, column, image, CELLS * row, CELLS * column, 1)
        cut[:, strip.tiles].view(shape).copy_(part.contiguous().as_strided(shape, strides))
    return _transform(_matrix(INPUT), cut)


def _overlap(bordered_BHWC: Tensor, tiles: Tensor, maps: Sequence[Tensor], strip: _Strip) -> None:
    """Adds up tiles where they lie in a map with a border."""
    grid = _grid(maps, strip, TILE, tiles.shape[-1])
    images, height, width, channels = bordered_BHWC.shape
    blocks = bordered_BHWC.view(images, height // CELLS, CELLS, width // CELLS, CELLS, channels)
    for index, cell in enumerate(tiles.view(TILE**2, *grid[2:])):
        (down, y), (right, x) = divmod(index // TILE, CELLS), divmod(index % TILE, CELLS)
        top, columns = strip.top + down, slice(right, right + grid[4])
        blocks[:, top : top + strip.rows, y, columns, x].add_(cell)
