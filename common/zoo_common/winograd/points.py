"""Winograd's F(4x4, 3x3) by the points at which it interpolates.

A tile of 6 inputs in a line and a filter of 3 are taken as polynomials. Their values at 0, at two
pairs of points and at infinity are multiplied, and give the 4 outputs that depend on the tile
alone. Lavin's points 1 and 2 (arXiv:1509.09308) cost a digit, 3/4 and 3/2 a factor of two; all
coefficients but the filter's are exact in float32.
"""

CELLS, TILE = 4, 6
"""Outputs of a tile in a line, and the inputs that they depend on."""

NEAR, FAR = 0.75, 1.5
"""The points, beside the negative ones, zero and infinity."""

_N, _F = NEAR**2, FAR**2


def _pairs(even: tuple[float, ...], odd: tuple[float, ...]) -> list[tuple[float, ...]]:
    """The rows of a pair of points, positive and negative."""
    return [
        tuple(x + y for x, y in zip(even, odd, strict=True)),
        tuple(x - y for x, y in zip(even, odd, strict=True)),
    ]


INPUT: tuple[tuple[float, ...], ...] = (
    (_N * _F, 0, -_N - _F, 0, 1, 0),
    *_pairs((0, 0, -_F, 0, 1, 0), (0, -NEAR * _F, 0, NEAR, 0, 0)),
    *_pairs((0, 0, -_N, 0, 1, 0), (0, -FAR * _N, 0, FAR, 0, 0)),
    (0, _N * _F, 0, -_N - _F, 0, 1),
)
"""From the inputs of a line to the values at 0, NEAR, -NEAR, FAR, -FAR and infinity."""

FILTER: tuple[tuple[float, ...], ...] = (
    (1 / (_N * _F), 0, 0),
    *(
        tuple(value / (2 * point**2 * (point**2 - other)) for value in (1, point, point**2))
        for point, other in ((NEAR, _F), (-NEAR, _F), (FAR, _N), (-FAR, _N))
    ),
    (0, 0, 1),
)
"""From a filter to its values, divided by the products of the points' distances."""

OUTPUT: tuple[tuple[float, ...], ...] = (
    (1, 1, 1, 1, 1, 0),
    (0, NEAR, -NEAR, FAR, -FAR, 0),
    (0, _N, _N, _F, _F, 0),
    (0, NEAR * _N, -NEAR * _N, FAR * _F, -FAR * _F, 1),
)
"""From the products of the values to the outputs."""
