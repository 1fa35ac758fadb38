"""Scenes: what is on a picture of the sample data set, as data.

A scene is composed first and drawn afterwards (``zoo_common.sample.draw``), so that labels, boxes
and masks come from the same facts as the pixels.

Coordinates are pixels, x to the right and y down; (0, 0) is the top left corner of the top left
pixel. RGB values are in [0, 255].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from zoo_common.sample.shapes import CLASSES, Point, unit_outline

# Part of every random stream and of every directory name: raise it with each change that makes
# other pictures.
VERSION = 1

SPLITS = ("train", "val")

TEXTURES = ("plain", "striped", "dotted", "checked", "speckled")

RGB = tuple[int, int, int]

# Bright objects on dark backgrounds: were either the brighter one at random, a small transformer
# would need several times as long to learn the shapes. Linear classifiers fail in both cases.
COLOURS: dict[str, RGB] = {
    "red": (212, 42, 44),
    "orange": (240, 138, 28),
    "yellow": (240, 216, 48),
    "green": (52, 172, 66),
    "cyan": (56, 200, 206),
    "blue": (52, 92, 220),
    "purple": (150, 60, 192),
    "pink": (242, 132, 182),
    "brown": (158, 100, 54),
    "white": (238, 238, 238),
    "grey": (146, 146, 146),
}
_BACKGROUND = (5, 85)

# The square root of the main object's area, as a part of the picture's shorter side.
_MAIN_SCALE = (0.34, 0.50)
# How far the main object's centre may be from the picture's, as a part of its width and height.
_MAIN_SHIFT = 0.22
# The square root of another object's area, as a part of the main object's: at most 0.18 of its
# area.
_OTHER_SCALE = (0.22, 0.42)
_OTHER_COUNT = (1, 4)
# No more than this many objects lie in front of the main object.
_MAX_IN_FRONT = 2
_ASPECT = (0.87, 1.15)

# Scenes of several objects. What a block of this many pictures holds: empty ones, and ones with a
# crowd.
_KINDS = ("empty",) + ("crowd",) * 2 + ("plain",) * 37
_SEVERAL_COUNT = (1, 6)
# The square root of an object's area, as a part of the picture's shorter side; small is as likely
# as large.
_SEVERAL_SCALE = (0.16, 0.62)
# How far an object's centre stays from the border, as a part of the picture's width and height.
_MARGIN = 0.06
# Least distance of two objects' centres, as a part of the sum of their scales; discs of equal
# area touch at 0.56. An object that finds no place in so many tries is not drawn.
_CLOSENESS = (0.15, 0.6)
_TRIES = 8
# Turns that keep a shape's top at the top: detectors meet things upright, and learn them sooner.
_UPRIGHT = (-0.35, 0.35)
_ANY_ANGLE = (0.0, math.tau)
# A crowd: its members, their scale and the ellipse that they fill, in shorter sides.
_CROWD_COUNT = (12, 24)
_CROWD_SCALE = (0.05, 0.075)
_CROWD_RADIUS = (0.16, 0.3)
_CROWD_CLOSENESS = 0.65

_COLOUR_JITTER = 14
# Least distance of an object's colour to those of the background, summed over R, G and B.
_MIN_CONTRAST = 200

_T = TypeVar("_T")


class Dice:
    """A stream of random draws that is a function of the key alone.

    It is built on the raw bits of PCG64, which numpy keeps stable, and not on numpy's
    distributions, which may change between its versions.
    """

    def __init__(self, *key: int) -> None:
        """Starts the stream of ``key``, whole numbers from 0 up."""
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._ready: list[float] = []

    def unit(self) -> float:
        """A number in [0, 1)."""
        if not self._ready:
            self._ready = ((self._bits.random_raw(128) >> 11) * 2.0**-53).tolist()
        return self._ready.pop()

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.unit()

    def integer(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self.unit() * (high - low + 1))

    def choice(self, options: Sequence[_T]) -> _T:
        """One of ``options``."""
        return options[int(self.unit() * len(options))]

    def shuffled(self, items: Sequence[_T]) -> list[_T]:
        """The items in random order."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.integer(0, last)
            result[last], result[other] = result[other], result[last]
        return result

    def octets(self, count: int) -> np.ndarray:
        """An array of ``count`` whole numbers in [0, 255], as uint8."""
        words = self._bits.random_raw((count + 7) // 8)
        return np.asarray(words, dtype="<u8").view(np.uint8)[:count]


@dataclass(frozen=True)
class SceneObject:
    """A shape on a picture.

    Attributes:
        shape: one of ``CLASSES``.
        colour: one of the names in ``COLOURS``; ``rgb`` is close to it.
        texture: one of ``TEXTURES``, a pattern of ``rgb`` and ``second_rgb``.
        period: length of one repetition of the texture in pixels, at least 4.
        centre: the centre of mass (x, y).
        scale: square root of the area in pixels, also of what lies outside the picture.
        aspect: stretch along the shape's own x axis; the area stays.
        angle: rotation in radians, clockwise on the screen.
        in_crowd: whether it is one of the many of the picture's crowd.
    """

    shape: str
    colour: str
    rgb: RGB
    second_rgb: RGB
    texture: str
    period: int
    centre: Point
    scale: float
    aspect: float
    angle: float
    in_crowd: bool = False

    @cached_property
    def polygon(self) -> tuple[Point, ...]:
        """The corners (x, y), which may lie outside the picture.

        They are rounded to an eighth of a pixel, so that the last bits of the machine's sine
        and cosine do not show in the picture.
        """
        wide, tall = self.scale * math.sqrt(self.aspect), self.scale / math.sqrt(self.aspect)
        right, down = math.cos(self.angle), math.sin(self.angle)
        centre_x, centre_y = self.centre
        return tuple(
            (
                round(8 * (centre_x + right * wide * x - down * tall * y)) / 8,
                round(8 * (centre_y + down * wide * x + right * tall * y)) / 8,
            )
            for x, y in unit_outline(self.shape)
        )


@dataclass(frozen=True)
class Stroke:
    """A thin line of the background's clutter, from (x, y) to (x, y)."""

    start: Point
    stop: Point
    width: int
    rgb: RGB


@dataclass(frozen=True)
class Background:
    """What lies behind the objects, and the noise over the picture.

    Attributes:
        colours: the two colours that the clouds are mixed of.
        cells: the clouds' grid: this many random values along either side, 2 (a gradient) to 24.
        strokes: clutter, back to front.
        noise: amplitude of the noise on each pixel, in [0, 255].
        offset: where in the seed's store of noise this picture's begins, in [0, 1).
    """

    colours: tuple[RGB, RGB]
    cells: int
    strokes: tuple[Stroke, ...]
    noise: int
    offset: float


@dataclass(frozen=True)
class Scene:
    """What is on one picture of ``width`` by ``height`` pixels; ``objects`` go back to front."""

    width: int
    height: int
    seed: int
    background: Background
    objects: tuple[SceneObject, ...]

    @property
    def label(self) -> str:
        """The shape of the main object, which is the one of the largest area."""
        return max(self.objects, key=lambda item: item.scale).shape


def label_of(seed: int, split: str, index: int) -> str:
    """The class of a picture of the labelled set, as in ``compose``.

    Each run of ten indices that starts at a multiple of ten has every class once.
    """
    block, place = divmod(index, len(CLASSES))
    return Dice(VERSION, seed, SPLITS.index(split), 0, block).shuffled(CLASSES)[place]


def compose(seed: int, split: str, index: int, width: int, height: int) -> Scene:
    """Composes a picture of the labelled set: one main object, smaller ones of other classes.

    Args:
        seed: the data set's seed, from 0 up.
        split: one of ``SPLITS``; their pictures have nothing in common.
        index: the picture's number in the split, from 0 up.
        width: the picture's width in pixels.
        height: its height.

    Returns:
        The scene, a function of ``VERSION`` and the arguments alone.
    """
    label = label_of(seed, split, index)
    dice = Dice(VERSION, seed, SPLITS.index(split), 1, index)
    background = _compose_background(dice, width, height)

    side = min(width, height)
    names = dice.shuffled(list(COLOURS))
    centre = (
        width * (0.5 + dice.uniform(-_MAIN_SHIFT, _MAIN_SHIFT)),
        height * (0.5 + dice.uniform(-_MAIN_SHIFT, _MAIN_SHIFT)),
    )
    main = _compose_object(
        dice, label, centre, side * dice.uniform(*_MAIN_SCALE), names, background
    )
    behind: list[SceneObject] = []
    in_front: list[SceneObject] = []
    other_classes = [name for name in CLASSES if name != label]
    for _ in range(dice.integer(*_OTHER_COUNT)):
        centre = (dice.uniform(0, width), dice.uniform(0, height))
        scale = main.scale * dice.uniform(*_OTHER_SCALE)
        other = _compose_object(dice, dice.choice(other_classes), centre, scale, names, background)
        if len(in_front) < _MAX_IN_FRONT and dice.unit() < 0.6:
            in_front.append(other)
        else:
            behind.append(other)
    return Scene(width, height, seed, background, (*behind, main, *in_front))


def compose_several(seed: int, split: str, index: int, long: int, short: int) -> Scene:
    """Composes a picture of the detection set: up to six objects, maybe a crowd, maybe nothing.

    Each run of forty indices that starts at a multiple of forty has one picture without objects
    and two with a crowd: many tiny shapes of one class and colour, close to one another.

    Args:
        seed: the data set's seed, from 0 up.
        split: one of ``SPLITS``; their pictures have nothing in common.
        index: the picture's number in the split, from 0 up.
        long: the longer side in pixels; the width of about six pictures of ten.
        short: the shorter side.

    Returns:
        The scene, a function of ``VERSION`` and the arguments alone.
    """
    block, place = divmod(index, len(_KINDS))
    kind = Dice(VERSION, seed, SPLITS.index(split), 2, block).shuffled(_KINDS)[place]
    dice = Dice(VERSION, seed, SPLITS.index(split), 3, index)
    width, height = (long, short) if dice.unit() < 0.6 else (short, long)
    background = _compose_background(dice, width, height)
    names = dice.shuffled(list(COLOURS))
    objects: list[SceneObject] = []
    for _ in range(0 if kind == "empty" else dice.integer(*_SEVERAL_COUNT)):
        low, high = _SEVERAL_SCALE
        scale = short * low * (high / low) ** dice.unit()
        centre = _find_place(dice, scale, objects, width, height)
        if centre is not None:
            shape = dice.choice(CLASSES)
            objects.append(_compose_object(dice, shape, centre, scale, names, background, _UPRIGHT))
    if kind == "crowd":
        crowd = _compose_crowd(dice, width, height, names, background)
        objects = crowd + objects if dice.unit() < 0.5 else objects + crowd
    return Scene(width, height, seed, background, tuple(objects))


def _find_place(
    dice: Dice, scale: float, others: list[SceneObject], width: int, height: int
) -> Point | None:
    """A centre for an object that hides little of the others, or None if none was found."""
    closeness = dice.uniform(*_CLOSENESS)
    for _ in range(_TRIES):
        x = width * dice.uniform(_MARGIN, 1 - _MARGIN)
        y = height * dice.uniform(_MARGIN, 1 - _MARGIN)
        if all(
            math.dist((x, y), other.centre) >= closeness * (scale + other.scale) for other in others
        ):
            return x, y
    return None


def _compose_crowd(
    dice: Dice, width: int, height: int, colours: list[str], background: Background
) -> list[SceneObject]:
    """Tiny shapes of one class and colour; the colour is taken out of ``colours``."""
    side = min(width, height)
    shape = dice.choice(CLASSES)
    middle_x, middle_y = width * dice.uniform(0.15, 0.85), height * dice.uniform(0.15, 0.85)
    wide, tall = side * dice.uniform(*_CROWD_RADIUS), side * dice.uniform(*_CROWD_RADIUS)
    members: list[SceneObject] = []
    wanted = dice.integer(*_CROWD_COUNT)
    for _ in range(4 * wanted):
        if len(members) == wanted:
            break
        scale = side * dice.uniform(*_CROWD_SCALE)
        angle, radius = dice.uniform(0, math.tau), math.sqrt(dice.unit())
        x, y = (
            middle_x + radius * wide * math.cos(angle),
            middle_y + radius * tall * math.sin(angle),
        )
        if any(
            math.dist((x, y), other.centre) < _CROWD_CLOSENESS * (scale + other.scale)
            for other in members
        ):
            continue
        choices = [members[0].colour] if members else colours
        member = _compose_object(dice, shape, (x, y), scale, choices, background, _UPRIGHT)
        members.append(replace(member, in_crowd=True))
    return members


def _compose_object(
    dice: Dice,
    shape: str,
    centre: Point,
    scale: float,
    colours: list[str],
    background: Background,
    angles: tuple[float, float] = _ANY_ANGLE,
) -> SceneObject:
    """An object of the given shape and place; its colour is taken out of ``colours``."""
    contrasts = {
        name: min(_distance(COLOURS[name], colour) for colour in background.colours)
        for name in colours
    }
    fitting = [name for name in colours if contrasts[name] >= _MIN_CONTRAST]
    colour = fitting[0] if fitting else max(colours, key=lambda name: contrasts[name])
    colours.remove(colour)
    rgb = _jittered(dice, COLOURS[colour], _COLOUR_JITTER)
    # Towards black where the colour is light, towards white where it is dark.
    goal = 0 if sum(rgb) > 330 else 255
    red, green, blue = (value + (goal - value) * 9 // 20 for value in rgb)
    return SceneObject(
        shape=shape,
        colour=colour,
        rgb=rgb,
        second_rgb=(red, green, blue),
        texture=dice.choice(TEXTURES),
        period=max(4, round(scale * dice.uniform(0.12, 0.3))),
        centre=centre,
        scale=scale,
        aspect=dice.uniform(*_ASPECT),
        angle=dice.uniform(*angles),
    )


def _compose_background(dice: Dice, width: int, height: int) -> Background:
    first = (dice.integer(*_BACKGROUND), dice.integer(*_BACKGROUND), dice.integer(*_BACKGROUND))
    second = _jittered(dice, first, 40)
    strokes = []
    for _ in range(dice.integer(4, 16)):
        x, y = dice.uniform(0, width), dice.uniform(0, height)
        length, angle = min(width, height) * dice.uniform(0.05, 0.3), dice.uniform(0, math.tau)
        stop = (round(x + length * math.cos(angle)), round(y + length * math.sin(angle)))
        thick = max(1, round(min(width, height) * dice.uniform(0.003, 0.018)))
        strokes.append(Stroke((round(x), round(y)), stop, thick, _jittered(dice, first, 70)))
    return Background(
        colours=(first, second),
        cells=dice.integer(2, 24),
        strokes=tuple(strokes),
        noise=dice.integer(6, 36),
        offset=dice.unit(),
    )


def _jittered(dice: Dice, rgb: RGB, reach: int) -> RGB:
    red, green, blue = (min(255, max(0, value + dice.integer(-reach, reach))) for value in rgb)
    return red, green, blue


def _distance(one: RGB, other: RGB) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))
