"""Outlines of masks: polygons that give the mask back when they are filled.

A mask's border runs along the edges between its pixels. A polygon through the middles of those
edges keeps the centre of every pixel on its side, and so does one that leaves corners out, as
long as each of its sides crosses the line between the two pixels' centres at every edge that it
passes.

Shapes: H, W height and width of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Directions along the border, the inside on the right hand: right, down, left, up.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
_DOWN, _UP = 1, 3

# Arithmetic is in whole sixteenths of a pixel.
_UNIT = 16
# A side of the polygon passes the middle of an edge at most this far away. It could be up to half
# a pixel if filling were exact; COCO's rounds to fifths of a pixel, and 6 / 16 is too much for it.
_TOLERANCE = 4

_Ring = list[tuple[int, int]]


def outline(mask_HW: np.ndarray) -> list[list[float]]:
    """The polygons of a mask, as in a ``segmentation`` of COCO.

    Args:
        mask_HW: bool.

    Returns:
        A polygon [x0, y0, x1, y1, ...] for each connected part (pixels that touch at a corner
        are connected), in pixels, in multiples of a half. A hole is joined to the outside by a
        seam without width. Filled by the even-odd rule, as pycocotools does, the polygons give
        the mask exactly. An empty mask has none.
    """
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    parts: list[_Ring] = []
    for part, ring in _rings(mask_HW[top : rows[-1] + 1, left : columns[-1] + 1]):
        if part == len(parts):
            parts.append(ring)
        else:
            parts[part] = _joined(parts[part], ring)
    return [
        [value for x, y in part for value in (x / _UNIT + left, y / _UNIT + top)] for part in parts
    ]


def _rings(mask_HW: np.ndarray) -> list[tuple[int, _Ring]]:
    """Simplified closed borders: (number of the part, corners), a part's outside before its holes.

    Borders are met row by row. The first edge that is met of an outside has the part on its
    right, the first of a hole has it on its left.
    """
    height, width = mask_HW.shape
    inside = np.pad(mask_HW, 1)
    middle = inside[1:-1, 1:-1]
    across = width + 1
    # Edges by the grid point that they start at and their direction.
    present = np.zeros((height + 1, across, 4), dtype=bool)
    present[:-1, :-1, 0] = middle & ~inside[:-2, 1:-1]
    present[:-1, 1:, 1] = middle & ~inside[1:-1, 2:]
    present[1:, 1:, 2] = middle & ~inside[2:, 1:-1]
    present[1:, :-1, 3] = middle & ~inside[1:-1, :-2]
    flags = present.reshape(-1).tobytes()

    part_of: dict[int, int] = {}
    rings: list[tuple[int, _Ring]] = []
    parts = 0
    run = 0
    for row, column in np.argwhere(inside[1:-1, 1:] != inside[1:-1, :-1]).tolist():
        entering = bool(inside[row + 1, column + 1])
        if entering:
            first = run = ((row + 1) * across + column) * 4 + _UP
        else:
            first = (row * across + column) * 4 + _DOWN
        if first in part_of:
            continue
        if entering:
            part, parts = parts, parts + 1
        else:
            part = part_of[run]
        edges = _followed(first, flags, across)
        part_of |= dict.fromkeys(edges, part)
        rings.append((part, _simplified(edges, across)))
    return rings


def _followed(first: int, flags: bytes, across: int) -> list[int]:
    """The edges of the closed border that ``first`` belongs to."""
    offsets = [4 * (dx + dy * across) for dx, dy in _STEPS]
    edges = [first]
    edge = first
    while True:
        direction = edge & 3
        corner = (edge & ~3) + offsets[direction]
        # Left before straight before right: pixels that touch at a corner are one part.
        for turn in (3, 0, 1):
            edge = corner + (direction + turn) % 4
            if flags[edge]:
                break
        if edge == first:
            return edges
        edges.append(edge)


def _simplified(edges: Sequence[int], across: int) -> _Ring:
    """Corners of a polygon that passes every edge near its middle, and never twice.

    From each corner the next is the last middle that can be seen from there through the gates
    around the middles in between.
    """
    middles: _Ring = []
    for edge in edges:
        y, x = divmod(edge >> 2, across)
        dx, dy = _STEPS[edge & 3]
        middles.append((x * _UNIT + dx * _UNIT // 2, y * _UNIT + dy * _UNIT // 2))
    middles.append(middles[0])
    gates = [(_STEPS[e & 3][1] * _TOLERANCE, -_STEPS[e & 3][0] * _TOLERANCE) for e in edges]
    gates.append(gates[0])

    corners: _Ring = []
    start = 0
    while start < len(edges):
        corners.append(middles[start])
        start_x, start_y = middles[start]
        start += 1
        left_x, left_y = right_x, right_y = 0, 0
        for place in range(start, len(middles)):
            x, y = middles[place][0] - start_x, middles[place][1] - start_y
            # A cross product is positive if the second vector is clockwise of the first.
            if left_x * y >= left_y * x and x * right_y >= y * right_x:
                start = place
            gate_x, gate_y = gates[place]
            gate_left_x, gate_left_y = x + gate_x, y + gate_y
            gate_right_x, gate_right_y = x - gate_x, y - gate_y
            if left_x == left_y == 0 or left_x * gate_left_y > left_y * gate_left_x:
                left_x, left_y = gate_left_x, gate_left_y
            if right_x == right_y == 0 or gate_right_x * right_y > gate_right_y * right_x:
                right_x, right_y = gate_right_x, gate_right_y
            if left_x * right_y < left_y * right_x:
                break
    return corners


def _joined(outside: _Ring, hole: _Ring) -> _Ring:
    """One polygon of an outside and a hole, by the shortest way from corner to corner and back."""
    gaps = np.array(outside)[:, None] - np.array(hole)
    here, there = divmod(int((gaps**2).sum(axis=2).argmin()), len(hole))
    return outside[: here + 1] + hole[there:] + hole[: there + 1] + outside[here:]
