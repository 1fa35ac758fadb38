"""What is done to an image together with its boxes, mask outlines and masks.

The geometry is detectron2's (https://github.com/facebookresearch/detectron2, Apache-2.0, at
02b5c4e2: data/transforms and data/detection_utils.py): sizes of a resized image, scale factors
by axis, flips about the image's own width, boxes clipped at the end, boxes of a cropped image
recomputed from what is left of the outlines. Differences, and why:

- The resize runs in torch where torch has a fast one (x86 with AVX2), in a third of Pillow's
  time. Its weights have fewer bits. Against Pillow no value differs by more than one grey level
  of 255; of the recipe's six sizes from 640 x 480 on average 0.1 % of the values differ (at
  short side 704, where many values are ties, 0.6 %). ``exact=True`` gives Pillow's own, which is
  also what runs elsewhere.
- A resized side has at least one pixel, where an image of 5000 x 1 would become one of height 0.
- Jitter is Pillow's ``ImageEnhance`` in a fixed order: brightness, contrast, saturation.

Each function takes a ``Sample`` and returns a new one; the classes draw from Python's generator
and then call a function. Coordinates are pixels, x to the right and y down, float64.

Shape letters: H W pixels, C channels (RGB), N objects, E edges of one object's outline, S slabs
of an outline between two x.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch.nn import functional

from zoo_common.detection.bitmasks import Masks
from zoo_common.errors import UserError

_EMPTY_SIDE = 1e-5
_SLABS_AT_ONCE = 256


class Sample(NamedTuple):
    """An image and its objects.

    Attributes:
        image_HWC: uint8, RGB, 0 to 255; the memory behind it may be ordered by channel.
        boxes_N4: float64, xyxy; may reach out of the image until ``clip_boxes``.
        labels_N: int64, class numbers.
        edges: The outline of each object, float64 [E, 4] as x0, y0, x1, y1; None if no masks are
            wanted.
        rings: The ring of each edge, int64 [E], for each object; None together with ``edges``.
        masks: The objects' masks as pixels; None if they are not wanted. Independent of outlines.
        flipped: Whether left and right have been turned around.
    """

    image_HWC: NDArray[np.uint8]
    boxes_N4: NDArray[np.float64]
    labels_N: NDArray[np.int64]
    edges: list[NDArray[np.float64]] | None = None
    rings: list[NDArray[np.int64]] | None = None
    masks: Masks | None = None
    flipped: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image_HWC.shape[0], self.image_HWC.shape[1]

    def select(self, keep_N: NDArray[np.bool_]) -> Sample:
        """The same image with some of its objects."""
        if keep_N.all():
            return self
        chosen = np.flatnonzero(keep_N)
        return self._replace(
            boxes_N4=self.boxes_N4[keep_N],
            labels_N=self.labels_N[keep_N],
            edges=None if self.edges is None else [self.edges[i] for i in chosen],
            rings=None if self.rings is None else [self.rings[i] for i in chosen],
            masks=None if self.masks is None else self.masks.select(keep_N),
        )


Augment = Callable[[Sample], Sample]


# ---------------------------------------------------------------------------- geometry


def shortest_edge_size(height: int, width: int, short: int, max_size: int) -> tuple[int, int]:
    """The size of an image resized by its short side.

    Args:
        height: Of the image as it is.
        width: Of the image as it is.
        short: The short side to reach; 0 leaves the image as it is.
        max_size: What the long side must not exceed; then both sides shrink.

    Returns:
        Height and width, rounded half up.
    """
    if short == 0:
        return height, width
    scale = short / min(height, width)
    new_height, new_width = (
        (float(short), scale * width) if height < width else (scale * height, float(short))
    )
    longest = max(new_height, new_width)
    if longest > max_size:
        new_height, new_width = new_height * (max_size / longest), new_width * (max_size / longest)
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def check_sides(min_sizes: Sequence[int], max_size: int, *, lowest: int = 1) -> None:
    """Refuses what cannot be the sides of an image.

    Raises:
        UserError: There is no short side, one is less than ``lowest``, or ``max_size`` is.
    """
    if not min_sizes or min(min_sizes) < lowest or max_size < 1:
        raise UserError(
            f"short sides {list(min_sizes)} and longest side {max_size} are none of an image; "
            "give pixels, for example [640, 800] and 1333"
        )


def resize(sample: Sample, height: int, width: int, *, exact: bool = False) -> Sample:
    """Scales image, boxes, outlines and masks to a new size.

    Args:
        sample: What to scale.
        height: The new height.
        width: The new width.
        exact: Pillow's resize even where torch has a faster one.
    """
    old_height, old_width = sample.size
    if (height, width) == (old_height, old_width):
        return sample
    x, y = width / old_width, height / old_height
    factors_4 = np.array([x, y, x, y])
    return sample._replace(
        image_HWC=resize_image(sample.image_HWC, height, width, exact=exact),
        boxes_N4=sample.boxes_N4 * factors_4,
        edges=None if sample.edges is None else [edges * factors_4 for edges in sample.edges],
        masks=None if sample.masks is None else sample.masks.resize(height, width),
    )


def resize_image(
    image_HWC: NDArray[np.uint8], height: int, width: int, *, exact: bool = False
) -> NDArray[np.uint8]:
    """Bilinear with antialiasing; see the header for which one. The memory is by channel."""
    if exact or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        resized = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BILINEAR)
        # Pillow takes the channels apart faster than a transposing copy does.
        return np.stack([np.asarray(band) for band in resized.split()]).transpose(1, 2, 0)
    resized_1CHW = functional.interpolate(
        _tensor(image_HWC).permute(2, 0, 1)[None], (height, width), mode="bilinear", antialias=True
    )
    return _array(resized_1CHW[0].permute(1, 2, 0))


def flip(sample: Sample) -> Sample:
    """Turns left and right around: x becomes width - x."""
    width = sample.image_HWC.shape[1]
    boxes_N4 = sample.boxes_N4.copy()
    boxes_N4[:, [0, 2]] = width - sample.boxes_N4[:, [2, 0]]
    edges = sample.edges
    if edges is not None:
        # x becomes width - x and y stays itself, in two operations an object.
        sign_4, start_4 = np.array([-1.0, 1.0, -1.0, 1.0]), np.array([width, 0.0, width, 0.0])
        edges = [start_4 + sign_4 * outline for outline in edges]
    return sample._replace(
        image_HWC=_array(_tensor(sample.image_HWC).flip(1)),
        boxes_N4=boxes_N4,
        edges=edges,
        masks=None if sample.masks is None else sample.masks.flip(),
        flipped=not sample.flipped,
    )


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Cuts a window out; objects of which nothing is left are dropped.

    Outlines are moved and not cut: what lies outside of an object's box is never filled. With
    outlines, the box becomes that of the outline's part in the window, and without, the box's
    part in the window.
    """
    shift_4 = np.array([left, top, left, top], np.float64)
    moved = sample._replace(
        image_HWC=sample.image_HWC[top : top + height, left : left + width],
        boxes_N4=sample.boxes_N4 - shift_4,
        edges=None if sample.edges is None else [edges - shift_4 for edges in sample.edges],
        masks=None if sample.masks is None else sample.masks.crop(top, left, height, width),
    )
    if moved.edges is not None and moved.rings is not None:
        boxes = [
            outline_box(edges, rings, height, width)
            for edges, rings in zip(moved.edges, moved.rings, strict=True)
        ]
        moved = moved._replace(boxes_N4=np.array(boxes, np.float64).reshape(-1, 4))
    return drop_empty(clip_boxes(moved))


def clip_boxes(sample: Sample) -> Sample:
    """Cuts boxes at the image's border."""
    height, width = sample.size
    limits_4 = np.array([width, height, width, height])
    return sample._replace(boxes_N4=np.minimum(np.maximum(sample.boxes_N4, 0), limits_4))


def drop_empty(sample: Sample) -> Sample:
    """Drops objects whose box has no area, or whose mask has no outline or no pixel."""
    boxes_N4 = sample.boxes_N4.astype(np.float32)  # as which they will be trained on
    sides_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
    keep_N: NDArray[np.bool_] = np.all(sides_N2 > _EMPTY_SIDE, axis=1)
    if sample.edges is not None:
        keep_N &= np.array([len(edges) > 0 for edges in sample.edges], bool)
    if sample.masks is not None:
        keep_N &= sample.masks.moments()[:, 0] > 0
    return sample.select(keep_N)


def outline_box(
    edges_E4: NDArray[np.float64], rings_E: NDArray[np.int64], height: int, width: int
) -> NDArray[np.float64]:
    """The box of what a mask shows inside of an image of this size, float64 [4].

    The mask is the union of its rings, each filled by the parity of the edges above a point; all
    zeros when nothing of it is inside.
    """
    x_E2, y_E2 = edges_E4[:, [0, 2]], edges_E4[:, [1, 3]]
    if len(edges_E4) == 0 or x_E2.max() <= 0 or x_E2.min() >= width:
        return np.zeros(4)
    if x_E2.min() >= 0 and x_E2.max() <= width and y_E2.min() >= 0 and y_E2.max() <= height:
        return np.array([x_E2.min(), y_E2.min(), x_E2.max(), y_E2.max()])
    found = [
        box
        for ring in np.unique(rings_E)
        for box in _ring_boxes(edges_E4[rings_E == ring], height, width)
    ]
    if not found:
        return np.zeros(4)
    corners = np.array(found)
    return np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)])


def _ring_boxes(
    edges_E4: NDArray[np.float64], height: int, width: int
) -> list[tuple[float, float, float, float]]:
    """Boxes that together span the visible part of one ring.

    The image is cut into slabs at each x where an edge begins, ends or crosses the upper or the
    lower border, so that within a slab each edge is visible over its whole length or not at all.
    """
    edges_E4 = edges_E4[edges_E4[:, 0] != edges_E4[:, 2]]
    x0_E, y0_E, x1_E, y1_E = edges_E4.T
    slope_E = (y1_E - y0_E) / (x1_E - x0_E)
    low_E, high_E = np.minimum(x0_E, x1_E), np.maximum(x0_E, x1_E)
    steep_E = slope_E != 0
    crossings = [
        x0_E[steep_E] + (border - y0_E[steep_E]) / slope_E[steep_E] for border in (0, height)
    ]
    cuts = np.unique(np.concatenate([x0_E, x1_E, *crossings, [0, width]]).clip(0, width))
    boxes = []
    for first in range(0, len(cuts) - 1, _SLABS_AT_ONCE):
        part = cuts[first : first + _SLABS_AT_ONCE + 1]
        begin_S1, end_S1 = part[:-1, None], part[1:, None]
        middle_S1 = (begin_S1 + end_S1) / 2
        absent_SE = np.where((low_E <= middle_S1) & (middle_S1 < high_E), 0, np.inf)
        begin_SE, middle_SE, end_SE = (
            (y0_E + (x_S1 - x0_E) * slope_E + absent_SE).clip(0, height)
            for x_S1 in (begin_S1, middle_S1, end_S1)
        )
        # In a slab the ring is filled between the first and the second edge, and so on.
        order_SE = np.argsort(middle_SE, axis=1, kind="stable")
        pairs = order_SE.shape[1] // 2 * 2
        upper, lower = order_SE[:, 0:pairs:2], order_SE[:, 1:pairs:2]
        filled = np.take_along_axis(middle_SE, lower, 1) > np.take_along_axis(middle_SE, upper, 1)
        if not filled.any():
            continue
        slabs_S = filled.any(axis=1)
        tops, bottoms = (
            [np.take_along_axis(side_SE, which, 1)[filled] for side_SE in (begin_SE, end_SE)]
            for which in (upper, lower)
        )
        left, right = begin_S1[slabs_S].min(), end_S1[slabs_S].max()
        boxes.append((left, np.min(tops), right, np.max(bottoms)))
    return boxes


# ---------------------------------------------------------------------------- colours


def jitter(sample: Sample, brightness: float, contrast: float, saturation: float) -> Sample:
    """Changes colours by factors, in this order; 1 leaves them, 0 takes all away."""
    image: Image.Image | None = None
    for factor, enhance in (
        (brightness, ImageEnhance.Brightness),
        (contrast, ImageEnhance.Contrast),
        (saturation, ImageEnhance.Color),
    ):
        if factor != 1:
            image = enhance(image or Image.fromarray(sample.image_HWC)).enhance(factor)
    return sample if image is None else sample._replace(image_HWC=np.array(image))


# ---------------------------------------------------------------------------- random draws


class RandomResize:
    """Resizes by the short side, to a size that is drawn.

    Args:
        min_sizes: The short sides to draw from; with ``sampling`` "range" the lowest and the
            highest.
        max_size: What the long side must not exceed.
        sampling: "choice" or "range".
        exact: Pillow's resize even where torch has a faster one.

    Raises:
        UserError: A value that is none of these.
    """

    def __init__(
        self,
        min_sizes: Sequence[int],
        max_size: int,
        *,
        sampling: str = "choice",
        exact: bool = False,
    ) -> None:
        if sampling not in ("choice", "range") or (sampling == "range" and len(min_sizes) != 2):
            raise UserError(
                f"min_sizes={list(min_sizes)} cannot be sampled by '{sampling}'; give 'choice' "
                "and a list of short sides, or 'range' and the lowest and the highest one"
            )
        check_sides(min_sizes, max_size)
        self._min_sizes = list(min_sizes)
        self._max_size = max_size
        self._range = sampling == "range"
        self._exact = exact

    def __call__(self, sample: Sample) -> Sample:
        """A sample of another size."""
        sizes = self._min_sizes
        short = random.randint(*sorted(sizes)) if self._range else random.choice(sizes)
        height, width = shortest_edge_size(*sample.size, short, self._max_size)
        return resize(sample, height, width, exact=self._exact)


class RandomFlip:
    """Flips with a probability."""

    def __init__(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise UserError(f"flip={probability} is no probability; give a value from 0 to 1")
        self._probability = probability

    def __call__(self, sample: Sample) -> Sample:
        """The sample as it is, or flipped."""
        return flip(sample) if random.random() < self._probability else sample


class RandomCrop:
    """Cuts out a window whose sides are drawn as shares of the image's, and then its place.

    Args:
        low_height: The lowest share of the height; the highest is 1.
        low_width: The lowest share of the width.

    Raises:
        UserError: A value that is no share.
    """

    def __init__(self, low_height: float, low_width: float) -> None:
        for share in (low_height, low_width):
            if not 0 < share <= 1:
                raise UserError(f"a crop to {share} of the side is none; give a share up to 1")
        self._low = low_height, low_width

    def __call__(self, sample: Sample) -> Sample:
        """The window's sample."""
        sides = [
            max(1, math.floor(side * random.uniform(low, 1) + 0.5))
            for side, low in zip(sample.size, self._low, strict=True)
        ]
        top, left = (
            random.randint(0, side - cut) for side, cut in zip(sample.size, sides, strict=True)
        )
        return crop(sample, top, left, *sides)


class RandomJitter:
    """Changes brightness, contrast and saturation by factors from 1 - strength to 1 + strength."""

    def __init__(self, brightness: float, contrast: float, saturation: float) -> None:
        self._strengths = brightness, contrast, saturation
        if min(self._strengths) < 0:
            raise UserError(f"jitter={self._strengths} is negative; give 0 to switch a part off")

    def __call__(self, sample: Sample) -> Sample:
        """The sample in other colours."""
        brightness, contrast, saturation = (
            random.uniform(max(0.0, 1 - strength), 1 + strength) if strength else 1.0
            for strength in self._strengths
        )
        return jitter(sample, brightness, contrast, saturation)


def _tensor(image_HWC: NDArray[np.uint8]) -> torch.Tensor:
    """An image as a tensor; torch takes no read-only and no reversed memory."""
    usable = image_HWC.flags.writeable and min(image_HWC.strides) > 0
    return torch.from_numpy(image_HWC if usable else image_HWC.copy())


def _array(image_HWC: torch.Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = image_HWC.numpy()
    return array
