"""The layout of the DeCLIP card: captioned pictures to train on, labelled ones to test with.

``yfcc15m_clean_open_data.json`` has a row a picture, ``{"filename": ..., "caption": ...}``;
``val_official.json`` has ``{"filename": ..., "label": ..., "label_name": ...}``. The pictures are
those of the ImageNet layout. Captions are as people write them: most name the main object, some
tell more, and a few say nothing of use.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo_common.sample.captions import Sight, listed, size_word, where, with_article
from zoo_common.sample.coco import visible
from zoo_common.sample.draw import draw
from zoo_common.sample.layout import Layout, Picture, write_jpeg
from zoo_common.sample.merges import learn_merges, write_merges
from zoo_common.sample.scenes import SPLITS, VERSION, Dice, Scene, SceneObject, compose
from zoo_common.sample.shapes import CLASSES
from zoo_common.yfcc import TRAIN_IMAGES, TRAIN_JSON, VAL_IMAGES, VAL_JSON, VOCABULARY

# How often a caption says nothing of its main object, is a list, begins with a capital and ends
# with a full stop.
_UNNAMED, _AS_LIST, _CAPITAL, _FULL_STOP = 0.04, 0.1, 0.25, 0.4
# How often a name has each kind of adjective. Colours tell pictures apart so well that captions
# which always gave them would leave little to learn from the shapes.
_SIZED, _TEXTURED, _COLOURED = 0.15, 0.1, 0.1
_PER_FOLDER = 1000

# What is said of the main object: {name} has an article, {noun} has none.
_PLAIN = (
    "{name}",
    "a photo of {name}",
    "a picture of {name}",
    "a drawing of {name}",
    "an image of {name}",
    "this is {name}",
    "here you see {name}",
    "{name} on a dark background",
    "{name} in the dark",
    "{name} at night",
    "my {noun}",
    "my favourite {noun}",
    "the {noun}",
    "look at the {noun}",
    "the {noun} that we saw",
    "one {noun}, a little noisy",
    "{noun}",
    "{noun} no. {number}",
)
_PLACED = (
    "{name} {where}",
    "{name} {where} of the picture",
    "a photo of {name} {where}",
)
_WITH_OTHERS = (
    "{name} with {others}",
    "{name} and {others}",
    "a picture of {name} near {others}",
    "the {noun} and {others}",
)
_RICH_SHARE = 0.15
_NOTHING = (
    "a dark picture with a few lines",
    "shapes on a dark background",
    "noisy picture no. {number}",
    "untitled",
    "taken at night",
)
# What zero-shot prompts say beside the class, so that the vocabulary knows it too.
_PROMPT_WORDS = """
a an the this that it is there of in on at to my our one many some and with
photo picture image drawing painting sketch rendering rendition print sculpture statue origami
doodle graffiti tattoo toy plushie cartoon embroidery art video game jpeg close up shot view
bad good nice cool weird hard easy see low high resolution quality bright dark clean dirty black
white small large big cropped blurry pixelated corrupted plastic embroidered rendered
"""


def caption(scene: Scene, dice: Dice) -> str:
    """One sentence, or less, about a picture.

    Args:
        scene: as ``compose`` makes it.
        dice: chooses what is told.
    """
    number = dice.integer(1, 999)
    if dice.unit() < _UNNAMED:
        return dice.choice(_NOTHING).format(number=number)
    side = min(scene.width, scene.height)
    seen = sorted((item.sight for item in visible(scene)), key=lambda sight: -sight.item.scale)
    main, *others = seen
    assert main.item.shape == scene.label, "the main object is always to be seen"
    noun = _noun(main.item, side, dice)
    forms: Sequence[str] = _PLAIN
    if dice.unit() < _RICH_SHARE:
        forms = _PLACED + _WITH_OTHERS if others else _PLACED
    sentence = dice.choice(forms).format(
        name=with_article(noun),
        noun=noun,
        number=number,
        where=where(main, scene.width, scene.height),
        others=_others(others, side, dice),
    )
    if dice.unit() < _CAPITAL:
        sentence = sentence[0].upper() + sentence[1:]
    return sentence + "." if dice.unit() < _FULL_STOP else sentence


def _noun(item: SceneObject, side: int, dice: Dice) -> str:
    """An object's class, at times with its size, texture or colour, without an article."""
    size = size_word(item, side) if dice.unit() < _SIZED else ""
    texture = item.texture if dice.unit() < _TEXTURED else ""
    colour = item.colour if dice.unit() < _COLOURED else ""
    return " ".join(word for word in (size, texture, colour, item.shape) if word)


def _others(others: Sequence[Sight], side: int, dice: Dice) -> str:
    """One or two other objects; nothing if there are none."""
    if not others:
        return ""
    told = dice.shuffled(others)[: dice.integer(1, 2)]
    return listed([with_article(_noun(sight.item, side, dice)) for sight in told])


def _count_files(seed: int, counts: Mapping[str, int]) -> dict[str, int]:
    train, val = (counts[split] for split in SPLITS)
    folders = {
        f"{TRAIN_IMAGES}/{first // _PER_FOLDER:03d}": min(_PER_FOLDER, train - first)
        for first in range(0, train, _PER_FOLDER)
    }
    return folders | {VAL_IMAGES[0]: val}


def _write_picture(directory: Path, picture: Picture) -> dict[str, Any]:
    """Draws a picture; gives its row."""
    scene = compose(*picture)
    if picture.split == "val":
        # ImageNet counts its pictures from 1.
        name = f"ILSVRC2012_val_{picture.number + 1:08d}.JPEG"
        write_jpeg(directory / VAL_IMAGES[0] / name, draw(scene))
        label = CLASSES.index(scene.label)
        return {"filename": name, "label": label, "label_name": scene.label}
    name = f"{picture.number // _PER_FOLDER:03d}/{picture.number:09d}.jpg"
    write_jpeg(directory / TRAIN_IMAGES / name, draw(scene))
    dice = Dice(VERSION, picture.seed, SPLITS.index(picture.split), 4, picture.number)
    said = caption(scene, dice)
    listed_too = dice.unit() < _AS_LIST
    return {"filename": name, "caption": [said, caption(scene, dice)] if listed_too else said}


def _finish(directory: Path, notes: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Writes both lists, and a vocabulary that has a token for each of their words."""
    for name, split in ((TRAIN_JSON, "train"), (VAL_JSON, "val")):
        lines = (json.dumps(row) + "\n" for row in notes[split])
        (directory / name).write_bytes("".join(lines).encode())
    write_merges(directory / VOCABULARY, learn_merges(_words(notes["train"])))


def _words(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How often each word occurs in captions; prompts and classes count as one more caption."""
    counts: Counter[str] = Counter()
    for row in rows:
        said = row["caption"]
        text = said if isinstance(said, str) else " ".join(said)
        counts.update(re.findall("[a-z]+", text.lower()))
    counts.update(_PROMPT_WORDS.split())
    counts.update(CLASSES)
    return counts


LAYOUT = Layout(
    train=4000,
    val=500,
    size=(224, 224),
    least=len(CLASSES),
    lacking="a picture of each class",
    count_files=_count_files,
    write_picture=_write_picture,
    finish=_finish,
    files=(TRAIN_JSON, VAL_JSON, VOCABULARY),
)
