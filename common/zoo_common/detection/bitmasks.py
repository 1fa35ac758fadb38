"""Instance masks that follow an image through its transforms, and are drawn once at the end.

SOLOv2 learns masks at a quarter of the image's size, and where their centres are. The original
(https://github.com/WXinlong/SOLO, Apache-2.0, at 95f3732d: mmdet/datasets/pipelines and
models/anchor_heads/solov2_head.py) draws each mask in the size of its file, resizes it by the
nearest pixel, flips it, pads it with zeros, makes it a quarter of that by OpenCV's bilinear
resize, and finds its centre in the full one. Here an object stays what its run-length encoding
says, a transform changes which rows and columns of the file the image shows, and only the quarter
is ever drawn. Masks are the same to the last pixel; a centre is the exact one, rounded once.

OpenCV's two rules: the nearest pixel is the one at ``floor(x * (1 / (new / old)))``; and where
sides are multiples of 4, a pixel of the quarter is 1 if at least two are of the four pixels in
the middle of its 4 x 4 block.

Shape letters: H W pixels of the image, N objects, K runs of an object's pixels down a column of
the file, M those middle columns of the image that show a run, G objects of which the quarter shows
something, Y X pixels of the quarter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Masks(NamedTuple):
    """The masks of an image's objects.

    Attributes:
        objects: N, how many there are.
        runs_K4: What they cover in the file, int64: the object's number, the column, the first
            row, and the row after the last; object by object.
        rows_H: The row of the file that each row of the image shows, int64, rising.
        columns_W: The column of each column, int64, rising or, when flipped, falling.
    """

    objects: int
    runs_K4: NDArray[np.int64]
    rows_H: NDArray[np.int64]
    columns_W: NDArray[np.int64]

    @classmethod
    def of(cls, masks: Iterable[NDArray[np.uint8]], height: int, width: int) -> Masks:
        """Masks from their pixels.

        Args:
            masks: 0 and 1, each (height, width).
            height: Of the image.
            width: Of the image.
        """
        runs = [_runs(mask_HW) for mask_HW in masks]
        numbers = np.repeat(np.arange(len(runs)), [len(run) for run in runs])
        runs_K3 = np.concatenate([np.zeros((0, 3), np.int64), *runs])
        return cls.of_runs(np.column_stack([numbers, runs_K3]), len(runs), height, width)

    @classmethod
    def of_runs(cls, runs_K4: NDArray[np.int64], objects: int, height: int, width: int) -> Masks:
        """Masks from what they cover in a file of this size; see the class."""
        return cls(objects, runs_K4, np.arange(height), np.arange(width))

    def select(self, keep_N: NDArray[np.bool_]) -> Masks:
        """Some of the objects."""
        runs_K4 = self.runs_K4[keep_N[self.runs_K4[:, 0]]]
        runs_K4[:, 0] = (np.cumsum(keep_N) - 1)[runs_K4[:, 0]]
        return self._replace(objects=int(keep_N.sum()), runs_K4=runs_K4)

    def resize(self, height: int, width: int) -> Masks:
        """Scales by the nearest pixel."""
        return self._replace(
            rows_H=self.rows_H[_nearest(len(self.rows_H), height)],
            columns_W=self.columns_W[_nearest(len(self.columns_W), width)],
        )

    def flip(self) -> Masks:
        """Turns left and right around."""
        return self._replace(columns_W=self.columns_W[::-1])

    def crop(self, top: int, left: int, height: int, width: int) -> Masks:
        """Cuts a window out; objects of which nothing is left stay."""
        return self._replace(
            rows_H=self.rows_H[top : top + height], columns_W=self.columns_W[left : left + width]
        )

    def moments(self) -> NDArray[np.float64]:
        """The number of pixels of each mask, and the sums of their x and y; whole numbers, (N, 3).

        A run of the file is one in the image too; how long that is, and what its rows add up to,
        follows from its ends.
        """
        object_K, column_K = self.runs_K4[:, 0], self.runs_K4[:, 1]
        first_K, after_K = np.searchsorted(self.rows_H, self.runs_K4[:, 2:]).T
        length_K = after_K - first_K
        y_K = length_K * (first_K + after_K - 1) // 2
        # How often the image shows a column of the file, and the sum of the x where it does.
        columns = int(column_K.max(initial=0)) + 1
        x_W = np.arange(len(self.columns_W))
        times_K = np.bincount(self.columns_W, minlength=columns)[column_K]
        x_K = np.bincount(self.columns_W, x_W, minlength=columns)[column_K]
        values = (length_K * times_K, length_K * x_K, y_K * times_K)
        sums = [np.bincount(object_K, value_K, self.objects) for value_K in values]
        return np.stack(sums, axis=1)

    def write_quarters(self, quarters_NYX: NDArray[np.uint8]) -> None:
        """Writes the masks at a quarter of the size to which the image is padded, 0 and 1.

        Args:
            quarters_NYX: Zeros, at least a quarter of the image's size.
        """
        object_M, x_M, y_M, end_M = self._middle_runs()
        # Each object is drawn in its own box, at two pixels for one of the quarter.
        starts_G = np.flatnonzero(np.diff(object_M, prepend=-1))
        left_G = np.minimum.reduceat(x_M, starts_G) // 2
        right_G = np.maximum.reduceat(x_M, starts_G) // 2 + 1
        top_G = np.minimum.reduceat(y_M, starts_G) // 2
        bottom_G = (np.maximum.reduceat(end_M, starts_G) + 1) // 2
        tall_G = 2 * (bottom_G - top_G)
        areas_G = 2 * (right_G - left_G) * tall_G
        ends_G = np.cumsum(areas_G)
        column_G = ends_G - areas_G - 2 * left_G * tall_G - 2 * top_G
        group_M = np.repeat(np.arange(len(starts_G)), np.diff(starts_G, append=len(object_M)))
        column_M = column_G[group_M] + x_M * tall_G[group_M]
        # Down the columns, one box after the other: 1 up where a run begins, 1 down after it.
        # No two runs begin or end at one place, so that plain additions will do.
        pixels = np.zeros(int(areas_G.sum()) + 1, np.int8)
        pixels[column_M + y_M] += 1
        pixels[column_M + end_M] -= 1
        np.cumsum(pixels, dtype=np.int8, out=pixels)
        for group, number in enumerate(object_M[starts_G].tolist()):
            top, bottom, left, right = (
                int(side_G[group]) for side_G in (top_G, bottom_G, left_G, right_G)
            )
            box = pixels[ends_G[group] - areas_G[group] : ends_G[group]]
            box = box.reshape(2 * (right - left), 2 * (bottom - top))
            box = box[0::2] + box[1::2]
            middle_XY = box[:, 0::2] + box[:, 1::2]
            np.greater_equal(middle_XY.T, 2, out=quarters_NYX[number, top:bottom, left:right])

    def _middle_runs(self) -> NDArray[np.int64]:
        """The runs in those rows and columns of the image of which the quarter is made.

        These are the two in the middle of each four, counted on from 0.

        Returns:
            The object of each run, its column, its first row, and the row after its last, (4, M).
        """
        object_K, column_K = self.runs_K4[:, 0], self.runs_K4[:, 1]
        first_K, after_K = np.searchsorted(_middles(self.rows_H), self.runs_K4[:, 2:]).T
        columns = _middles(self.columns_W)
        falling = len(columns) > 1 and columns[0] > columns[-1]
        rising = columns[::-1] if falling else columns
        begin_K, end_K = (np.searchsorted(rising, column_K, side) for side in ("left", "right"))
        if falling:
            begin_K, end_K = len(columns) - end_K, len(columns) - begin_K
        times_K = np.where(after_K > first_K, end_K - begin_K, 0)
        run_M = np.repeat(np.arange(len(times_K)), times_K)
        before_K = np.cumsum(times_K) - times_K
        column_M = np.arange(len(run_M)) + (begin_K - before_K)[run_M]
        return np.stack([object_K[run_M], column_M, first_K[run_M], after_K[run_M]])


def _runs(mask_HW: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Column, first row and the row after the last of each run of ones, (K, 3)."""
    padded_WH = np.pad(mask_HW.T, ((0, 0), (1, 1)))
    column, row = np.nonzero(padded_WH[:, 1:] != padded_WH[:, :-1])
    return np.stack([column[0::2], row[0::2], row[1::2]], axis=1)


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    """The old pixel that each new one takes; a division by ``new`` would round otherwise."""
    taken = np.arange(new) * (1 / (new / old))
    return np.asarray(np.minimum(taken, old - 1), np.int64)


def _middles(shown: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is shown at the two middle places of each four."""
    place = np.arange(len(shown)) % 4
    return np.asarray(shown[(place == 1) | (place == 2)])
