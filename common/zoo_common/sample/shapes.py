"""The ten shape classes of the sample data set as polygons."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

Point = tuple[float, float]

_ARC_STEPS = 48
_STAR_INNER = 0.42
_CROSS_ARM = 0.34
_RING_INNER = 0.6
_CRESCENT_BITE = 0.85
_CRESCENT_SHIFT = 0.5


def _arc(radius: float, start: float, stop: float, centre_x: float = 0.0) -> list[Point]:
    """Points from angle ``start`` to ``stop`` (radians), both included."""
    steps = max(2, round(_ARC_STEPS * abs(stop - start) / math.tau))
    angles = [start + (stop - start) * step / steps for step in range(steps + 1)]
    return [(centre_x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _circle() -> list[Point]:
    return _arc(1.0, 0.0, math.tau)[:-1]


def _square() -> list[Point]:
    return [(-1, -1), (1, -1), (1, 1), (-1, 1)]


def _triangle() -> list[Point]:
    return [(math.sin(k * math.tau / 3), -math.cos(k * math.tau / 3)) for k in range(3)]


def _diamond() -> list[Point]:
    return [(0, -1), (0.55, 0), (0, 1), (-0.55, 0)]


def _star() -> list[Point]:
    radii = [_STAR_INNER if k % 2 else 1.0 for k in range(10)]
    return [
        (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)
    ]


def _cross() -> list[Point]:
    arm = _CROSS_ARM
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points: list[Point] = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


def _ring() -> list[Point]:
    # One polygon: around the outside, across a seam without width, back around the hole. Formats
    # that know no holes (COCO polygons) can hold it.
    return _arc(1.0, 0.0, math.tau) + _arc(_RING_INNER, math.tau, 0.0)


def _crescent() -> list[Point]:
    # A disc of radius 1 without the disc of radius _CRESCENT_BITE at (_CRESCENT_SHIFT, 0).
    shift, bite = _CRESCENT_SHIFT, _CRESCENT_BITE
    x = (1 + shift**2 - bite**2) / (2 * shift)
    y = math.sqrt(1 - x**2)
    outer = math.atan2(y, x)
    inner = math.atan2(y, x - shift)
    back = _arc(bite, math.tau - inner, inner, centre_x=shift)
    return _arc(1.0, outer, math.tau - outer) + back[1:-1]


def _heart() -> list[Point]:
    points = []
    for k in range(_ARC_STEPS):
        t = k * math.tau / _ARC_STEPS
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3, -y))
    return points


def _arrow() -> list[Point]:
    half = [(1.0, 0.0), (0.1, 0.75), (0.1, 0.27), (-1.0, 0.27)]
    return half + [(x, -y) for x, y in reversed(half[1:])]


_OUTLINES: dict[str, Callable[[], list[Point]]] = {
    "arrow": _arrow,
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}

CLASSES: tuple[str, ...] = tuple(_OUTLINES)


@cache
def unit_outline(shape: str) -> tuple[Point, ...]:
    """The polygon of a shape class, with area 1 and its centre of mass at the origin.

    Equal areas keep a picture's label out of its mean colour.

    Args:
        shape: one of ``CLASSES``.

    Returns:
        The corners (x, y), y pointing down as in pictures; the first is not repeated at the end.
    """
    points = _OUTLINES[shape]()
    doubled_area = moment_x = moment_y = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        turn = x0 * y1 - x1 * y0
        doubled_area += turn
        moment_x += (x0 + x1) * turn
        moment_y += (y0 + y1) * turn
    centre_x, centre_y = moment_x / (3 * doubled_area), moment_y / (3 * doubled_area)
    scale = 1 / math.sqrt(abs(doubled_area) / 2)
    return tuple((scale * (x - centre_x), scale * (y - centre_y)) for x, y in points)
