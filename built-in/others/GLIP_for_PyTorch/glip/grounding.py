"""Captions whose phrases have boxes, in the JSON of MDETR, and their mixture with COCO.

The JSON is COCO's with a ``caption`` for each image (a picture with several captions stands there
as several images) and ``tokens_positive`` for each annotation: the spans of characters that mean
its box. So are Flickr30k Entities, referring expressions and the mixed set that
https://github.com/microsoft/GLIP (MIT, at 9dda955) trains on: see
maskrcnn_benchmark/data/datasets/{modulated_coco,flickr,mixed,refexp}.py. A mixed set's images say
in ``data_source`` where they come from (coco, vg): they are looked for in a directory of that name
below the one that is given. Differences, and why:

- Captions of more tokens than fit are left out and counted; upstream cuts them, and their boxes
  then mean nothing.
- Boxes that no word means are left out and counted; upstream trains their place alone.

Shape letters: I images, N objects, S spans.
"""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from glip.captions import Caption, TextEncoder
from zoo_common.detection import coco_json
from zoo_common.detection.batching import Size
from zoo_common.detection.coco import CocoIndex, Objects, Outline
from zoo_common.detection.coco_cache import Arrays, Built, open_cached
from zoo_common.errors import UserError

VERSION = f"{coco_json.VERSION}, grounding 1"
"""To be changed with every change of what :func:`parse` returns."""

_UNMEANT = "boxes_without_words"
# No image is missing, but captions that are too long look like it.
_NO_PROBLEMS = ("missing_images", "no_outlines")


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    caption: str | None = None
    data_source: str | None = None


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    tokens_positive: list[tuple[int, int]] = []


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]


# Not strict: numbers such as 640.0 and "640" count as integers.
_DECODER = msgspec.json.Decoder(_File, strict=False)


def open_grounding(annotations: Path, images: Path, encoder: TextEncoder) -> GroundingIndex:
    """Opens a grounding JSON; its arrays are built on the first time and mapped afterwards.

    Args:
        annotations: the JSON.
        images: the directory of its images.
        encoder: captions that do not fit it are left out.

    Raises:
        UserError: the JSON is not what it should be, or images are missing.
    """
    build = partial(parse, path=annotations)
    mapped = open_cached(annotations, build, version=VERSION)
    everything = range(len(mapped.arrays["image_ids"]))
    index = GroundingIndex(mapped, annotations, images, False, everything).with_files(images)
    fitting = [number for number in everything if encoder.fits(index.text(number))]
    if not fitting:
        raise UserError(
            f"No caption in {annotations} has at most {encoder.max_tokens} tokens; give a larger "
            "model.max_tokens or another grounding_json."
        )
    return replace(index, _numbers=fitting, too_long=len(everything) - len(fitting))


def parse(data: bytes, path: Path) -> Built:
    """Reads a grounding JSON.

    Args:
        data: the file's content.
        path: the file's name, for messages.

    Returns:
        What :func:`zoo_common.detection.coco_json.parse` does, and ``captions`` (bytes),
        ``caption_offsets`` (I + 1), ``spans`` (S, 2) and ``span_offsets`` (N + 1).

    Raises:
        UserError: it is not JSON, of another kind, or contradicts itself.
    """
    built = coco_json.parse(data, path)
    try:
        file = _DECODER.decode(data.removeprefix(codecs.BOM_UTF8))
    except coco_json.UNREADABLE as error:
        raise UserError(
            f"{path} is no grounding JSON ({error}); give one with a caption for each image and "
            "tokens_positive, [first character, character after the last], for each annotation."
        ) from error
    file.images.sort(key=lambda image: image.id)
    file.annotations.sort(key=lambda item: item.image_id)  # as coco_json has them
    captions = _captions(file, path)
    _check_spans(file, captions, path)
    meant_N = np.array(
        [
            any(captions[item.image_id][begin:end].strip() for begin, end in item.tokens_positive)
            for item in file.annotations
        ],
        np.bool_,
    )
    texts = [captions[image.id].encode() for image in file.images]
    names = ["/".join(filter(None, (i.data_source, i.file_name))).encode() for i in file.images]
    spans = [span for item in file.annotations for span in item.tokens_positive]
    arrays: Arrays = built.arrays | {
        "usable": built.arrays["usable"] & meant_N,
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_offsets": _offsets(map(len, names)),
        "captions": np.frombuffer(b"".join(texts), np.uint8),
        "caption_offsets": _offsets(map(len, texts)),
        "spans": np.array(spans, np.int64).reshape(-1, 2),
        "span_offsets": _offsets(len(item.tokens_positive) for item in file.annotations),
    }
    return Built(arrays, built.facts | {_UNMEANT: int((~meant_N).sum())})


def _captions(file: _File, path: Path) -> dict[int, str]:
    """The caption of each image.

    Raises:
        UserError: one is empty.
    """
    empty = [image.id for image in file.images if not (image.caption or "").strip()]
    if empty:
        raise UserError(
            f"{len(empty)} of the {len(file.images)} captions in {path} are empty, the first is "
            f"that of image {empty[0]}; give them words, or take these images out."
        )
    return {image.id: image.caption or "" for image in file.images}


def _check_spans(file: _File, captions: dict[int, str], path: Path) -> None:
    """Raises UserError if a span is not within its caption."""
    wrong = [
        (item, begin, end)
        for item in file.annotations
        for begin, end in item.tokens_positive
        if not 0 <= begin < end <= len(captions[item.image_id])
    ]
    if wrong:
        item, begin, end = wrong[0]
        raise UserError(
            f"{len(wrong)} spans in {path} lie outside of their captions, the first is "
            f"[{begin}, {end}] of annotation {item.id}, where image {item.image_id}'s caption has "
            f"{len(captions[item.image_id])} characters; mend them, or take these annotations out."
        )


@dataclass(frozen=True, eq=False)
class GroundingIndex(CocoIndex):
    """The images of a grounding JSON, in the order of their ids; an image has one caption.

    Attributes:
        too_long: images left out because their captions have too many tokens.
    """

    too_long: int = 0

    def objects(self, index: int) -> Objects:
        """As in :class:`CocoIndex`; a label is an object's number among these."""
        found = super().objects(index)
        return found._replace(labels_N=np.arange(len(found.labels_N)))

    def text(self, index: int) -> str:
        """The image's caption."""
        number = self._numbers[index]
        begin, end = self._arrays["caption_offsets"][number : number + 2].tolist()
        words: bytes = self._arrays["captions"][begin:end].tobytes()
        return words.decode()

    def caption(self, index: int) -> Caption:
        """The image's caption, with the spans of each of its objects."""
        spans = []
        for row in self._rows(index).tolist():
            begin, end = self._arrays["span_offsets"][row : row + 2].tolist()
            spans.append(
                [(first, last) for first, last in self._arrays["spans"][begin:end].tolist()]
            )
        return Caption(self.text(index), spans)

    @property
    def problems(self) -> dict[str, int]:
        """As in :class:`CocoIndex`, but for outlines, which grounding has none of."""
        found = super().problems
        return {name: found[name] for name in found if name not in _NO_PROBLEMS}

    def describe(self) -> str:
        """As in :class:`CocoIndex`, and what is odd in captions."""
        lines = [super().describe()]
        unmeant = self._mapped.facts[_UNMEANT]
        if unmeant:
            lines.append(f"  {unmeant} boxes are meant by no word: left out")
        if self.too_long:
            lines.append(f"  {self.too_long} captions have too many tokens: left out")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data sets one behind the other: an epoch has each image of each of them once.

    Attributes:
        parts: the data sets.
    """

    parts: tuple[CocoIndex, ...]

    def __len__(self) -> int:
        return self._ends[-1]

    def at(self, index: int) -> tuple[CocoIndex, int]:
        """The data set of an image, and its place there."""
        part = bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part] - len(self.parts[part]))

    def path(self, index: int) -> str:
        """The path of an image's file."""
        part, place = self.at(index)
        return part.path(place)

    def item_id(self, index: int) -> str:
        """The image's file name as its JSON has it."""
        part, place = self.at(index)
        return part.item_id(place)

    def image_id(self, index: int) -> int:
        """The image's id in its JSON; two parts may have the same."""
        part, place = self.at(index)
        return part.image_id(place)

    def size(self, index: int) -> Size:
        """Height and width in pixels as its JSON has them."""
        part, place = self.at(index)
        return part.size(place)

    def sizes(self) -> NDArray[np.int32]:
        """Those of all images, (I, 2)."""
        return np.concatenate([part.sizes() for part in self.parts])

    def objects(self, index: int) -> Objects:
        """The image's objects."""
        part, place = self.at(index)
        return part.objects(place)

    def outlines(self, index: int) -> list[Outline]:
        """Their outlines, in the same order."""
        part, place = self.at(index)
        return part.outlines(place)

    def mask_runs(self, index: int) -> NDArray[np.int64]:
        """What they cover, as :meth:`CocoIndex.mask_runs`."""
        part, place = self.at(index)
        return part.mask_runs(place)

    def trainable(self) -> NDArray[np.int64]:
        """The images that have an object that is no crowd region."""
        starts = [0, *self._ends]
        found = [start + part.trainable() for start, part in zip(starts, self.parts, strict=False)]
        return np.concatenate(found)

    @property
    def most_objects(self) -> int:
        """The most objects in an image, without crowd regions."""
        return max(part.most_objects for part in self.parts)

    @property
    def most_edges(self) -> int:
        """The most edges in an object's outline."""
        return max(part.most_edges for part in self.parts)

    def describe(self) -> str:
        """What the data sets hold and what is odd in them."""
        return "\n".join(part.describe() for part in self.parts)

    @cached_property
    def _ends(self) -> list[int]:
        return list(np.cumsum([len(part) for part in self.parts]).tolist())


def _offsets(lengths: Iterable[int]) -> NDArray[np.int64]:
    """Where each of so many long pieces begins, and where the last one ends."""
    return np.cumsum([0, *lengths], dtype=np.int64)
