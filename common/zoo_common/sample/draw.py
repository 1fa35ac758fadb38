"""Draws scenes, and says what of each object is to be seen.

All arithmetic on pixels is done in whole numbers, so that a scene gives the same pixels on every
machine.

Shapes: H, W height and width of the picture; N objects of the scene, back to front.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from zoo_common.sample.scenes import VERSION, Background, Dice, Scene, SceneObject
from zoo_common.sample.shapes import Point

_Box = tuple[int, int, int, int]

# All noise of a picture is cut from its seed's store, which has room for this many beginnings.
_NOISE_STARTS = 1 << 16

_COVERAGE_OF_QUARTERS = np.array([0, 64, 128, 191, 255], dtype=np.uint8)


def draw(scene: Scene) -> np.ndarray:
    """Draws a scene.

    Args:
        scene: what to draw.

    Returns:
        The picture, uint8 RGB of shape (H, W, 3).
    """
    noise = _noise_store(scene.seed, scene.width * scene.height * 3 + _NOISE_STARTS)
    canvas = _draw_background(scene, noise)
    for item in scene.objects:
        box, cover = _coverage(item, scene.width, scene.height)
        if cover is not None:
            canvas.paste(_textured(item, box, noise), box[:2], cover)
    start = int(scene.background.offset * _NOISE_STARTS)
    pixels = np.asarray(canvas).astype(np.int16)
    grain = noise[start : start + pixels.size].reshape(pixels.shape) * scene.background.noise
    grain >>= 7
    pixels += grain
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)


def visible_masks(scene: Scene) -> np.ndarray:
    """What is to be seen of each object: inside the picture and not behind another object.

    Args:
        scene: a scene of N objects.

    Returns:
        Masks of shape (N, H, W), bool, which do not overlap. A hidden object's is empty.
    """
    masks = np.zeros((len(scene.objects), scene.height, scene.width), dtype=bool)
    free = np.ones((scene.height, scene.width), dtype=bool)
    for index in reversed(range(len(scene.objects))):
        (left, top, right, bottom), cover = _coverage(
            scene.objects[index], scene.width, scene.height
        )
        if cover is not None:
            inside = np.asarray(cover) >= 128
            masks[index, top:bottom, left:right] = inside & free[top:bottom, left:right]
            free[top:bottom, left:right] &= ~inside
    return masks


def boxes_xyxy(masks: np.ndarray) -> np.ndarray:
    """The tight boxes of masks.

    Args:
        masks: shape (N, H, W), bool.

    Returns:
        Boxes of shape (N, 4), float32, in pixels: left, top, right, bottom, the last two
        exclusive. The box of an empty mask is all zeros.
    """
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for index, mask in enumerate(masks):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(columns):
            boxes[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _coverage(item: SceneObject, width: int, height: int) -> tuple[_Box, Image.Image | None]:
    """How much of each pixel an object covers, in [0, 255], and the box where that is.

    The box is (left, top, right, bottom), the last two exclusive; there is no coverage for an
    object outside the picture.
    """
    xs, ys = zip(*item.polygon, strict=True)
    left, top = max(0, math.floor(min(xs))), max(0, math.floor(min(ys)))
    right, bottom = min(width, math.ceil(max(xs))), min(height, math.ceil(max(ys)))
    if left >= right or top >= bottom:
        return (0, 0, 0, 0), None
    inside = _rasterise(item.polygon, left, top, 2 * (right - left), 2 * (bottom - top))
    quarters = inside[::2, ::2] + inside[1::2, ::2] + inside[::2, 1::2] + inside[1::2, 1::2]
    return (left, top, right, bottom), Image.fromarray(_COVERAGE_OF_QUARTERS[quarters])


def _rasterise(
    polygon: tuple[Point, ...], left: int, top: int, columns: int, rows: int
) -> np.ndarray:
    """Which half-pixels have their centre inside a polygon (even-odd rule).

    Pillow draws polygons too, but not the same ones from version to version.

    Args:
        polygon: corners in pixels, multiples of an eighth.
        left: x of the result's left edge in pixels.
        top: y of its top edge.
        columns: its width in half-pixels.
        rows: its height in half-pixels.

    Returns:
        Zeros and ones, uint8 of shape (rows, columns).
    """
    # Whole numbers from here on: eighths of a pixel. The centre of half-pixel k is at 4 k + 2.
    start = (np.array(polygon) * 8).astype(np.int64) - (8 * left, 8 * top)
    stop = np.roll(start, -1, axis=0)
    downwards = (start[:, 1] < stop[:, 1])[:, None]
    upper, lower = np.where(downwards, start, stop), np.where(downwards, stop, start)
    # The rows whose centre lines an edge crosses, upper end included, lower end excluded.
    first = np.clip((upper[:, 1] + 1) // 4, 0, rows)
    crossed = np.clip((lower[:, 1] + 1) // 4, 0, rows) - first
    edge = np.repeat(np.arange(len(start)), crossed)
    row = np.arange(len(edge)) + np.repeat(first - np.cumsum(crossed) + crossed, crossed)
    run, rise = (lower - upper)[edge].T
    # Where each crosses: the first half-pixel whose centre lies to the right.
    passed = (4 * row + 2 - upper[edge, 1]) * run + (upper[edge, 0] - 2) * rise
    column = np.clip(passed // (4 * rise) + 1, 0, columns)
    flips = np.bincount(row * (columns + 1) + column, minlength=rows * (columns + 1))
    grid = (flips & 1).astype(np.uint8).reshape(rows, columns + 1)
    return np.bitwise_xor.accumulate(grid, axis=1)[:, :columns]


def _textured(item: SceneObject, box: _Box, noise: np.ndarray) -> Image.Image:
    """The object's colours over the whole box."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if item.texture == "plain":
        return Image.new("RGB", (width, height), item.rgb)
    if item.texture == "speckled":
        speck = max(2, item.period // 2)
        small = (-(-width // speck), -(-height // speck))
        # Anchored to the object's place, so that two objects of one picture differ.
        start = (left * 131 + top * 17) % _NOISE_STARTS
        coarse = noise[start : start + small[0] * small[1]].reshape(small[1], small[0]) > 0
        pattern = coarse.repeat(speck, axis=0).repeat(speck, axis=1)[:height, :width]
    else:
        pattern = _pattern(item, box)
    palette = np.array([item.rgb, item.second_rgb], dtype=np.uint8)
    return Image.fromarray(palette[pattern.view(np.uint8)])


def _pattern(item: SceneObject, box: _Box) -> np.ndarray:
    """Where in the box a regular texture has its second colour, bool of shape (H, W)."""
    left, top, right, bottom = box
    # Fixed point with eight bits after the point.
    right_part, down_part = round(256 * math.cos(item.angle)), round(256 * math.sin(item.angle))
    x = np.arange(left, right, dtype=np.int32) - round(item.centre[0])
    y = (np.arange(top, bottom, dtype=np.int32) - round(item.centre[1]))[:, None]
    period = item.period * 256
    along = (x * right_part + y * down_part) % period
    pattern: np.ndarray = along < period // 2
    if item.texture == "striped":
        return pattern
    across = (y * right_part - x * down_part) % period
    if item.texture == "checked":
        pattern ^= across < period // 2
    else:
        assert item.texture == "dotted", item.texture
        # Four bits after the point, so that the squares of large pictures fit into 32 bits.
        along = (along - period // 2) >> 4
        across = (across - period // 2) >> 4
        pattern = along * along + across * across < (period * 3 // 160) ** 2
    return pattern


def _draw_background(scene: Scene, noise: np.ndarray) -> Image.Image:
    background = scene.background
    canvas = Image.fromarray(_cloud_cells(background, noise)).resize(
        (scene.width, scene.height), Image.Resampling.BICUBIC
    )
    pen = ImageDraw.Draw(canvas)
    for stroke in background.strokes:
        pen.line((stroke.start, stroke.stop), fill=stroke.rgb, width=stroke.width)
    return canvas


def _cloud_cells(background: Background, noise: np.ndarray) -> np.ndarray:
    """The colours at the grid of the clouds, uint8 of shape (cells, cells, 3)."""
    cells = background.cells
    start = int((1 - background.offset) * _NOISE_STARTS)
    share = (noise[start : start + cells * cells].astype(np.int32) + 128).reshape(cells, cells, 1)
    first, second = np.array(background.colours, dtype=np.int32)
    cloud: np.ndarray = first + (second - first) * share // 255
    return cloud.astype(np.uint8)


@lru_cache(maxsize=4)
def _noise_store(seed: int, count: int) -> np.ndarray:
    """The first ``count`` values of the seed's noise, in [-128, 127], the middle more likely."""
    octets = Dice(VERSION, seed, 2, 0).octets(2 * count).astype(np.int16)
    store: np.ndarray = (octets[::2] + octets[1::2] - 255) >> 1
    store.setflags(write=False)
    return store
