"""COCO's layout with captions whose phrases have boxes, and the words of a small BERT.

``annotations/grounding_{train,val}2017.json`` are as MDETR's: COCO's with a ``caption`` for each
image, where a picture with two captions is two images, and ``tokens_positive`` for each
annotation: the characters [first, after the last] that mean its box. ``bert-sample`` has a
``vocab.txt`` and a ``config.json`` for a network that is trained from nothing. All else is that
of the layout ``coco``, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any, NamedTuple

from zoo_common.sample import coco
from zoo_common.sample.captions import NUMBERS, listed, plural, size_word, with_article
from zoo_common.sample.coco import Visible, scene_of, visible
from zoo_common.sample.layout import Picture
from zoo_common.sample.scenes import COLOURS, TEXTURES, VERSION, Dice, SceneObject
from zoo_common.sample.shapes import CLASSES

BERT = "bert-sample"
"""The directory of the small BERT."""

CAPTIONS = 2
"""Captions of a picture that shows anything."""

_IDS_PER_CAPTION = 8
# How much larger than the next one an object is that is called the largest of its class.
_LARGEST = 1.2

_SETTINGS = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 256,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}

_Json = dict[str, Any]


class Phrase(NamedTuple):
    """Words, and the places among what is to be seen of the objects that they mean."""

    words: str
    places: list[int]


class Grounded(NamedTuple):
    """A caption: its text, and for each phrase its characters and its objects' places."""

    text: str
    phrases: list[tuple[tuple[int, int], list[int]]]


def grounded(seen: Sequence[Visible], side: int, dice: Dice) -> list[Grounded]:
    """Captions of one picture, whose phrases mean objects.

    Args:
        seen: what is to be seen; a crowd is not told of.
        side: the picture's shorter side in pixels.
        dice: chooses what is told.

    Returns:
        ``CAPTIONS`` of them: a sentence that names all by size and colour, as "a small red circle
        and two blue squares", and a list of shorter phrases, as "circle. the largest square". None
        of a picture with nothing to tell.
    """
    items = {place: s.sight.item for place, s in enumerate(seen) if not s.sight.item.in_crowd}
    if not items:
        return []
    full = _groups(items, lambda item: f"{size_word(item, side)} {item.colour}")
    words = listed([phrase.words for phrase in full])
    return [_found(words, full), _as_list(items, dice)]


def _groups(items: Mapping[int, SceneObject], adjective: Any) -> list[Phrase]:
    """Phrases for objects; those of the same class and adjectives are counted, as "two rings"."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, item in items.items():
        groups.setdefault((" ".join(adjective(item).split()), item.shape), []).append(place)
    phrases = []
    for (words, shape), places in groups.items():
        if len(places) == 1:
            name = with_article(f"{words} {shape}")
        else:
            name = " ".join(f"{NUMBERS[len(places)]} {words} {plural(shape)}".split())
        phrases.append(Phrase(name, places))
    return phrases


def _as_list(items: Mapping[int, SceneObject], dice: Dice) -> Grounded:
    """Phrases of one to three words, class by class."""
    phrases: list[Phrase] = []
    for shape in dice.shuffled(sorted({item.shape for item in items.values()})):
        same = {place: item for place, item in items.items() if item.shape == shape}
        by_size = sorted(same, key=lambda place: -same[place].scale)
        style = dice.integer(0, 3)
        if style == 0:
            phrases.append(Phrase(shape if len(same) == 1 else plural(shape), list(same)))
        elif style == 1 and len(same) > 1 and _clearly_larger(same, by_size):
            phrases.append(Phrase(f"the largest {shape}", by_size[:1]))
        elif style == 2:
            phrases += _groups(same, lambda item: item.texture)
        else:
            phrases += _groups(same, lambda item: item.colour)
    return _found(". ".join(phrase.words for phrase in phrases), phrases)


def _clearly_larger(items: Mapping[int, SceneObject], by_size: Sequence[int]) -> bool:
    first, second = (items[place].scale for place in by_size[:2])
    return first >= _LARGEST * second


def _found(text: str, phrases: Sequence[Phrase]) -> Grounded:
    """Where the phrases, which come in this order, are in a text."""
    result, behind = [], 0
    for words, places in phrases:
        begin = text.index(words, behind)
        behind = begin + len(words)
        result.append(((begin, behind), places))
    return Grounded(text, result)


def _write_picture(
    directory: Path, picture: Picture
) -> tuple[Any, list[tuple[_Json, list[_Json]]]]:
    """Draws a picture; gives what ``coco`` does, and the records and annotations of captions."""
    note = coco.LAYOUT.write_picture(directory, picture)
    image, annotations, _ = note
    scene = scene_of(picture)
    dice = Dice(VERSION, scene.seed, 5, image["id"])
    said = []
    for number, caption in enumerate(
        grounded(visible(scene), min(scene.width, scene.height), dice)
    ):
        id_ = CAPTIONS * image["id"] + number
        record = image | {
            "id": id_,
            "caption": caption.text,
            "original_img_id": image["id"],
            "sentence_id": number,
            "dataset_name": "sample",
        }
        meant = [(place, span) for span, places in caption.phrases for place in places]
        assert len(meant) <= _IDS_PER_CAPTION
        boxes = [
            {
                "image_id": id_,
                "id": _IDS_PER_CAPTION * id_ + row,
                "category_id": 1,
                "iscrowd": 0,
                "area": annotations[place]["area"],
                "bbox": annotations[place]["bbox"],
                "tokens_positive": [list(span)],
            }
            for row, (place, span) in enumerate(meant)
        ]
        said.append((record, boxes))
    return note, said


def _finish(directory: Path, notes: Mapping[str, Sequence[Any]]) -> None:
    """Writes ``coco``'s files, the grounded captions and the vocabulary."""
    coco.LAYOUT.finish(directory, {s: [note for note, _ in pairs] for s, pairs in notes.items()})
    for split, pairs in notes.items():
        said = [item for _, records in pairs for item in records]
        content = {
            "info": {"description": "shapes drawn by zoo_common.sample", "version": str(VERSION)},
            "licenses": [],
            "images": [record for record, _ in said],
            "annotations": [box for _, boxes in said for box in boxes],
            "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
        }
        path = directory / "annotations" / f"grounding_{split}2017.json"
        path.write_bytes(json.dumps(content, separators=(",", ":")).encode())
    words = vocabulary()
    settings = json.dumps(_SETTINGS | {"vocab_size": len(words)}, indent=1, sort_keys=True)
    (directory / BERT / "config.json").write_bytes(f"{settings}\n".encode())
    (directory / BERT / "vocab.txt").write_bytes("".join(f"{word}\n" for word in words).encode())


def vocabulary() -> list[str]:
    """BERT's words: all that captions and classes are made of, and letters for all else."""
    pieces = [*ascii_lowercase, *digits]
    words = [*CLASSES, *map(plural, CLASSES), *COLOURS, *TEXTURES, *NUMBERS]
    words += ["a", "an", "the", "small", "large", "largest", "and", "object", "picture"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,:;!?'-()"]
    return list(dict.fromkeys([*special, *pieces, *(f"##{piece}" for piece in pieces), *words]))


def _count_files(seed: int, counts: Mapping[str, int]) -> dict[str, int]:
    files = coco.LAYOUT.count_files(seed, counts)
    return files | {"annotations": files["annotations"] + len(counts), BERT: 2}


LAYOUT = replace(
    coco.LAYOUT, count_files=_count_files, write_picture=_write_picture, finish=_finish
)
