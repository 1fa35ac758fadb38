"""Sentences that tell what is on a picture: classes, colours, textures, sizes and places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from zoo_common.sample.scenes import Dice, SceneObject

PER_PICTURE = 5

# The square root of an object's area, as a part of the picture's shorter side: what is called
# small, and from where on it is called large.
_SMALL, _LARGE = 0.27, 0.42
# How far apart the middles of two objects are, in shorter sides, for one to be left of the other.
_CLEARLY_APART = 0.15

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_EMPTY = (
    "nothing but a dark background",
    "a dark picture without any shape",
    "an empty background with noise and a few lines",
    "there is no shape on this picture",
    "a noisy background and nothing on it",
)


class Sight(NamedTuple):
    """An object, or a crowd, of which enough is to be seen.

    Attributes:
        item: the object, or one of the crowd.
        box_xyxy: the box of its visible part in pixels.
    """

    item: SceneObject
    box_xyxy: tuple[float, float, float, float]


def caption(sights: Sequence[Sight], width: int, height: int, dice: Dice) -> list[str]:
    """Captions of one picture.

    Args:
        sights: what is to be seen, with at most one crowd.
        width: the picture's width in pixels.
        height: its height.
        dice: chooses what is told.

    Returns:
        ``PER_PICTURE`` sentences without a full stop. The first names all that is to be seen.
    """
    objects = [sight for sight in sights if not sight.item.in_crowd]
    objects.sort(key=lambda sight: -sight.item.scale)
    crowd = next((sight for sight in sights if sight.item.in_crowd), None)
    if not sights:
        return dice.shuffled(_EMPTY)
    side = min(width, height)
    named = [_name(sight.item, side) for sight in objects]
    if crowd:
        named.append(_name(crowd.item, side))
    sentences = [listed(named)]
    sentences.append(_place(crowd, width, height, dice) if crowd else _count(objects, dice))
    tries = 0
    while len(sentences) < PER_PICTURE:
        tries += 1
        if tries % 3:
            sentence = _relation(objects, side, dice)
        else:
            sentence = _place(dice.choice(sights), width, height, dice)
        # A picture of one object has not much to tell: it may be told twice.
        if sentence and (sentence not in sentences or tries > 4 * PER_PICTURE):
            sentences.append(sentence)
    return sentences


def _name(item: SceneObject, side: int) -> str:
    """An object by size, colour and class, as "a small red circle"; a crowd in the plural."""
    if item.in_crowd:
        return f"many tiny {item.colour} {plural(item.shape)}"
    return with_article(f"{size_word(item, side)} {item.colour} {item.shape}")


def _varied_name(item: SceneObject, side: int, dice: Dice) -> str:
    """As ``_name``, at times with the texture, with or without the size."""
    style = dice.integer(0, 2)
    if item.in_crowd or style == 0:
        return _name(item, side)
    size = size_word(item, side) if style == 1 else ""
    return with_article(f"{size} {item.texture} {item.colour} {item.shape}")


def size_word(item: SceneObject, side: int) -> str:
    """``small``, ``large`` or nothing, in a picture with a shorter side of so many pixels."""
    if item.scale < _SMALL * side:
        return "small"
    return "large" if item.scale >= _LARGE * side else ""


def _place(sight: Sight, width: int, height: int, dice: Dice) -> str:
    """One object and where it is."""
    name = _varied_name(sight.item, min(width, height), dice)
    return f"{name} {where(sight, width, height)} of the picture"


def where(sight: Sight, width: int, height: int) -> str:
    """Where something is, in thirds of the picture, as "at the top left" or "in the middle"."""
    x, y = _middle(sight)
    column = ("left", "", "right")[min(2, int(3 * x / width))]
    row = ("top", "", "bottom")[min(2, int(3 * y / height))]
    if row:
        return f"at the {row} {column}".rstrip()
    return f"on the {column}" if column else "in the middle"


def _count(objects: Sequence[Sight], dice: Dice) -> str:
    """How many objects there are, and one of them by its texture."""
    number = NUMBERS[len(objects)]
    item = dice.choice(objects).item
    one = with_article(f"{item.texture} {item.colour} {item.shape}")
    if len(objects) == 1:
        return f"{number} shape on a dark background, {one}"
    return f"{number} shapes on a dark background, one of them {one}"


def _relation(objects: Sequence[Sight], side: int, dice: Dice) -> str | None:
    """How two objects lie to each other, or None if no two are clearly apart."""
    pairs = [
        (one, other, relation)
        for one in objects
        for other in objects
        if (relation := _direction(one, other, side)) is not None
    ]
    if not pairs:
        return None
    one, other, relation = dice.choice(pairs)
    first, second = (_varied_name(sight.item, side, dice) for sight in (one, other))
    return f"{first} {relation} {second}"


def _direction(one: Sight, other: Sight, side: int) -> str | None:
    (x, y), (other_x, other_y) = _middle(one), _middle(other)
    right, down = x - other_x, y - other_y
    if max(abs(right), abs(down)) < _CLEARLY_APART * side:
        return None
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def _middle(sight: Sight) -> tuple[float, float]:
    left, top, right, bottom = sight.box_xyxy
    return (left + right) / 2, (top + bottom) / 2


def listed(names: Sequence[str]) -> str:
    """Names with commas, and "and" before the last."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def with_article(words: str) -> str:
    """The words, without spaces too many, after "a" or "an"."""
    words = " ".join(words.split())
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    """A class's name for several of it."""
    return shape + ("es" if shape.endswith("ss") else "s")
