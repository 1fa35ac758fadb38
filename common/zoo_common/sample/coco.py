"""The COCO 2017 layout: ``annotations/*.json``, ``train2017/*.jpg`` and ``val2017/*.jpg``.

Shapes: H, W height and width of a picture; N objects of its scene, back to front.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo_common.sample.captions import PER_PICTURE, Sight, caption
from zoo_common.sample.draw import boxes_xyxy, draw, visible_masks
from zoo_common.sample.layout import Layout, Picture, write_jpeg
from zoo_common.sample.outline import outline
from zoo_common.sample.scenes import SPLITS, VERSION, Dice, Scene, compose_several
from zoo_common.sample.shapes import CLASSES

CATEGORY_IDS: dict[str, int] = dict(zip(CLASSES, (1, 2, 3, 5, 8, 13, 21, 34, 55, 90), strict=True))
"""COCO's ids have gaps; these have too, so that no id can be taken for a class index."""

# An object of which less is to be seen is left out: a part of its area, and pixels.
_LEAST_PART, _LEAST_PIXELS = 0.15, 8
# Room for the annotations of a picture: objects and a crowd, or captions.
_IDS_PER_PICTURE = 8
# Image ids are no row numbers: one of three is taken, and splits have none in common.
_ID_SPREAD = 3

_Json = dict[str, Any]


class Visible(NamedTuple):
    """An object, or a crowd, of which enough is to be seen, and its visible part."""

    sight: Sight
    mask_HW: np.ndarray


def annotate(scene: Scene, image_id: int) -> tuple[list[_Json], list[str]]:
    """What COCO's files say of a scene.

    Args:
        scene: as ``compose_several`` makes it.
        image_id: its id, which the annotations' ids are derived from.

    Returns:
        Annotations of instances: the visible parts of objects as polygons, and a crowd's as run
        lengths; and captions.
    """
    seen = visible(scene)
    annotations = []
    for number, (sight, mask_HW) in enumerate(seen):
        left, top, right, bottom = sight.box_xyxy
        crowd = sight.item.in_crowd
        annotations.append(
            {
                "segmentation": _run_lengths(mask_HW) if crowd else outline(mask_HW),
                "area": float(mask_HW.sum()),
                "iscrowd": int(crowd),
                "image_id": image_id,
                "bbox": [left, top, right - left, bottom - top],
                "category_id": CATEGORY_IDS[sight.item.shape],
                "id": _IDS_PER_PICTURE * image_id + number,
            }
        )
    dice = Dice(VERSION, scene.seed, 3, image_id)
    sentences = caption([item.sight for item in seen], scene.width, scene.height, dice)
    return annotations, sentences


def visible(scene: Scene) -> list[Visible]:
    """The objects to annotate, back to front, the crowd last."""
    masks_NHW = visible_masks(scene)
    kept = [
        (item, mask_HW)
        for item, mask_HW in zip(scene.objects, masks_NHW, strict=True)
        if not item.in_crowd and mask_HW.sum() >= max(_LEAST_PIXELS, _LEAST_PART * item.scale**2)
    ]
    members = [number for number, item in enumerate(scene.objects) if item.in_crowd]
    if members:
        crowd_HW = masks_NHW[members].any(axis=0)
        if crowd_HW.sum() >= _LEAST_PIXELS:
            kept.append((scene.objects[members[0]], crowd_HW))
    seen = []
    for item, mask_HW in kept:
        left, top, right, bottom = map(float, boxes_xyxy(mask_HW[None])[0])
        seen.append(Visible(Sight(item, (left, top, right, bottom)), mask_HW))
    return seen


def _run_lengths(mask_HW: np.ndarray) -> _Json:
    """COCO's uncompressed run lengths: column by column, beginning with the zeros."""
    values = np.concatenate(([False], mask_HW.T.ravel()))
    changes = np.flatnonzero(values[1:] != values[:-1])
    counts = np.diff(changes, prepend=0, append=mask_HW.size)
    return {"size": list(mask_HW.shape), "counts": counts.tolist()}


def scene_of(picture: Picture) -> Scene:
    """What is on a picture."""
    long, short = max(picture.width, picture.height), min(picture.width, picture.height)
    return compose_several(picture.seed, picture.split, picture.number, long, short)


def _image_id(picture: Picture) -> int:
    dice = Dice(VERSION, picture.seed, 4, picture.number)
    row = _ID_SPREAD * picture.number + dice.integer(0, _ID_SPREAD - 1)
    return len(SPLITS) * row + SPLITS.index(picture.split) + 1


def _count_files(seed: int, counts: Mapping[str, int]) -> dict[str, int]:
    return {"annotations": 2 * len(counts)} | {
        f"{split}2017": count for split, count in counts.items()
    }


def _write_picture(directory: Path, picture: Picture) -> tuple[_Json, list[_Json], list[_Json]]:
    """Draws a picture; gives its record, its annotations and its captions."""
    scene = scene_of(picture)
    image_id = _image_id(picture)
    name = f"{image_id:012d}.jpg"
    write_jpeg(directory / f"{picture.split}2017" / name, draw(scene))
    annotations, sentences = annotate(scene, image_id)
    assert max(len(annotations), PER_PICTURE) <= _IDS_PER_PICTURE
    captions = [
        {"image_id": image_id, "id": _IDS_PER_PICTURE * image_id + number, "caption": sentence}
        for number, sentence in enumerate(sentences)
    ]
    image = {"file_name": name, "height": scene.height, "width": scene.width, "id": image_id}
    return image, annotations, captions


def _finish(
    directory: Path, notes: Mapping[str, Sequence[tuple[_Json, list[_Json], list[_Json]]]]
) -> None:
    """Writes the annotation files."""
    head = {
        "info": {"description": "shapes drawn by zoo_common.sample", "version": str(VERSION)},
        "licenses": [],
    }
    categories = [
        {"supercategory": "shape", "id": number, "name": name}
        for name, number in CATEGORY_IDS.items()
    ]
    for split, pictures in notes.items():
        images = {"images": [image for image, _, _ in pictures]}
        instances = [item for _, items, _ in pictures for item in items]
        captions = [item for _, _, items in pictures for item in items]
        for kind, content in (
            ("instances", {"annotations": instances, "categories": categories}),
            ("captions", {"annotations": captions}),
        ):
            text = json.dumps(head | images | content, separators=(",", ":"))
            path = directory / "annotations" / f"{kind}_{split}2017.json"
            path.write_bytes(text.encode())


LAYOUT = Layout(
    train=1000,
    val=200,
    size=(160, 128),
    least=1,
    lacking="a picture",
    count_files=_count_files,
    write_picture=_write_picture,
    finish=_finish,
)
