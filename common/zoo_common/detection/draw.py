"""Detections drawn into pictures.

Shapes: K detections, H, W height and width of the picture. Boxes are xyxy in its pixels.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

RGB = tuple[int, int, int]
_Box = tuple[int, int, int, int]

# How much of a mask's pixel is its colour, of 255.
_OPACITY = 115
# Parts of the picture's shorter side, and limits in pixels.
_LINE_PART = 0.003
_TEXT_PART = 0.025
_TEXT_PIXELS = (12, 96)
# Smaller text cannot be read; what does not fit at this size is cut off.
_LEAST_TEXT_PIXELS = 8
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
# Hues that look equally far apart: red, orange, yellow, green, cyan, blue, purple, pink, red.
_HUES = (0.0, 0.07, 0.14, 0.33, 0.5, 0.6, 0.75, 0.88, 1.0)
_LIGHTNESSES = (0.5, 0.6, 0.72)


def draw_detections(
    image: Image.Image,
    boxes_K4: np.ndarray,
    labels: Sequence[str],
    scores: Sequence[float] | np.ndarray,
    masks: np.ndarray | Iterable[Mapping[str, Any]] | None = None,
    score_threshold: float = 0.5,
    *,
    frames: bool = True,
) -> Image.Image:
    """Draws detections over a picture: translucent masks, boxes, labels with scores.

    A class has the same colour on every picture. The surest detections lie on top.

    Args:
        image: a picture in any mode.
        boxes_K4: xyxy in pixels; what lies outside the picture is cut off.
        labels: a name for each box.
        scores: in [0, 1].
        masks: bool of shape (K, H, W), or a COCO RLE of the picture's size for each box, or None
            for boxes alone. Only the part of a mask inside its box is drawn.
        score_threshold: detections with a lower score are left out.
        frames: whether boxes are drawn, beside their masks and labels.

    Returns:
        A new picture of the same size, RGB.
    """
    canvas = image.convert("RGB")  # a copy in any case
    boxes = [_whole_pixels(box, canvas) for box in np.asarray(boxes_K4, dtype=np.float64)]
    if masks is not None and not isinstance(masks, np.ndarray):
        masks = list(masks)
    assert len(boxes) == len(labels) == len(scores)
    assert masks is None or len(masks) == len(boxes)
    shown = [int(k) for k in np.argsort(scores, kind="stable") if scores[k] >= score_threshold]
    if masks is not None:
        for k in shown:
            _blend(canvas, boxes[k], masks[k], class_colour(labels[k]))

    side = min(canvas.size)
    pen = ImageDraw.Draw(canvas)
    for k in shown if frames else ():
        pen.rectangle(
            boxes[k], outline=class_colour(labels[k]), width=max(1, round(_LINE_PART * side))
        )
    taken: list[_Box] = []
    # The surest first, so that they have the best places.
    for k in reversed(shown):
        text = f"{' '.join(labels[k].split())} {scores[k]:.2f}"
        _write(pen, boxes[k], text, class_colour(labels[k]), taken)
    return canvas


def class_colour(label: str) -> RGB:
    """The colour of a class, which depends on nothing but its name."""
    number, rest = divmod(zlib.crc32(label.encode()), len(_LIGHTNESSES))
    place = number % 1009 / 1009 * (len(_HUES) - 1)
    hue = float(np.interp(place, range(len(_HUES)), _HUES))
    red, green, blue = colorsys.hls_to_rgb(hue, _LIGHTNESSES[rest], 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def _whole_pixels(box_4: np.ndarray, canvas: Image.Image) -> _Box:
    """The pixels that a box touches, the last column and row included, inside the picture."""
    right_end, bottom_end = canvas.width - 1, canvas.height - 1
    left, top = np.floor(box_4[:2]).clip(0, (right_end, bottom_end))
    right, bottom = (np.ceil(box_4[2:]) - 1).clip((left, top), (right_end, bottom_end))
    return int(left), int(top), int(right), int(bottom)


def _blend(canvas: Image.Image, box: _Box, mask: Any, colour: RGB) -> None:
    """Mixes a colour into the pixels of a mask that lie in a box, in place."""
    left, top, right, bottom = box
    full_HW = mask if isinstance(mask, np.ndarray) else coco_mask.decode(mask)
    assert full_HW.shape == (canvas.height, canvas.width), full_HW.shape
    part_HW = full_HW[top : bottom + 1, left : right + 1]
    opacity_HW = np.multiply(part_HW, _OPACITY, dtype=np.uint8, casting="unsafe")
    canvas.paste(colour, (left, top), Image.fromarray(opacity_HW))


def _write(pen: ImageDraw.ImageDraw, box: _Box, text: str, colour: RGB, taken: list[_Box]) -> None:
    """Writes a label at a box where no other label stands, if there is such a place."""
    width, height = pen.im.size
    font, text_width, text_height = _fitting_font(text, width, height)
    pad = max(1, text_height // 6)
    wide, tall = text_width + 2 * pad, text_height + 2 * pad
    left, top, _, bottom = box
    left = max(0, min(left, width - wide))
    places = [
        (left, max(0, min(y, height - tall)), left + wide, max(0, min(y, height - tall)) + tall)
        for y in (top - tall, top, bottom + 1, bottom - tall, top + tall)
    ]
    place = next((p for p in places if not any(_overlap(p, other) for other in taken)), places[0])
    taken.append(place)
    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour)
    red, green, blue = colour
    dark = 299 * red + 587 * green + 114 * blue < 128_000
    pen.text((place[0] + pad, place[1] + pad), text, fill=_WHITE if dark else _BLACK, font=font)


def _fitting_font(text: str, width: int, height: int) -> tuple[ImageFont.FreeTypeFont, int, int]:
    """A font whose size suits the picture and lets the text fit into its width.

    Returns:
        The font, and the text's width and a line's height in pixels.
    """
    low, high = _TEXT_PIXELS
    size = min(high, max(low, round(_TEXT_PART * min(width, height))))
    while True:
        font = _font(size)
        text_width = round(font.getlength(text))
        if text_width + size // 2 <= width or size <= _LEAST_TEXT_PIXELS:
            return font, text_width, sum(font.getmetrics())
        size -= 1


@lru_cache(maxsize=128)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
