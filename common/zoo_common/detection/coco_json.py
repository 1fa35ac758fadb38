"""Reading a COCO instances JSON into arrays, and judging what is odd in it.

Shapes: I images, N objects (annotations), G rings (polygons), P points, L run-length masks.
Objects stand in the order of their images (by image id), and within one in the file's order.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from zoo_common.detection.coco_cache import Arrays, Built
from zoo_common.errors import UserError

VERSION = "coco instances 1"
"""To be changed with every change of what :func:`parse` returns."""

SMALLEST_SIDE = 1e-5
"""Boxes with a smaller side (pixels, after clipping) are no objects; detectron2's bound."""

NO_SEGMENTATION, POLYGONS, RUNS = 0, 1, 2
"""What an object's segmentation is: absent, polygons, or a run-length encoding."""

# Two values that are rounded to hundredths may add up to that much more than the image's side.
_ROUNDING = 0.02
_LARGEST_BOX = 1e9  # pixels; far below what overflows in areas and in float32
_RLES_AT_ONCE = 256
_SHOWN = 60

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for a text that is no JSON, or not what it should be."""

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class _Image(msgspec.Struct, gc=False):
    id: _Int64
    file_name: str
    height: _Side
    width: _Side


class _Annotation(msgspec.Struct, gc=False):
    id: _Int64
    image_id: _Int64
    category_id: _Int64
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: bool | int | None = None
    ignore: bool | int | None = None
    segmentation: msgspec.Raw = msgspec.Raw()


class _Category(msgspec.Struct):
    id: _Int64
    name: str
    supercategory: str | None = None


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class _Rle(msgspec.Struct):
    size: tuple[_Side, _Side]
    counts: str | list[_Count]


_Item = TypeVar("_Item", _Image, _Annotation, _Category)

# Not strict: numbers such as 640.0 and "640" count as integers.
_DECODER = msgspec.json.Decoder(_File, strict=False)
_SEGMENTATION = msgspec.json.Decoder(list[list[float]] | _Rle | None, strict=False)
_ITEMS: dict[str, Any] = {"images": _Image, "annotations": _Annotation, "categories": _Category}


def parse(data: bytes, path: Path) -> Built:
    """Reads an instances JSON.

    Args:
        data: the file's content.
        path: the file's name, for messages.

    Returns:
        The arrays (see ``_images``, ``_objects``, ``_outlines``) and facts: ``categories`` in the
        order of their ids, and ``problems``, for each kind how often it occurs.

    Raises:
        UserError: it is not JSON, of another kind, or contradicts itself.
    """
    try:
        file = _DECODER.decode(data.removeprefix(codecs.BOM_UTF8))
    except UNREADABLE as error:
        raise _explain(data, path, error) from error
    for name in ("images", "categories"):
        if not getattr(file, name):
            raise UserError(f"{path} lists no {name}; give a COCO instances file that does.")
    file.images.sort(key=lambda image: image.id)
    file.categories.sort(key=lambda category: category.id)
    image_ids = _ids(file.images, "image", path)
    category_ids = _ids(file.categories, "category", path)
    owner_N = _lookup(file, "image_id", image_ids, path)
    order_N = np.argsort(owner_N, kind="stable")
    owner_N = owner_N[order_N]
    annotations = [file.annotations[row] for row in order_N.tolist()]
    _ids(sorted(annotations, key=lambda item: item.id), "annotation", path)
    file.annotations = annotations

    arrays = _images(file.images, image_ids)
    arrays["object_offsets"] = _offsets(np.bincount(owner_N, minlength=len(image_ids)))
    arrays |= _objects(file, category_ids, path)
    arrays |= _outlines(annotations, path)
    sizes_N2 = np.stack([arrays["heights"], arrays["widths"]], axis=1)[owner_N]
    problems = _judge_outlines(arrays, sizes_N2) | _judge_boxes(arrays, sizes_N2)
    categories = [
        {key: value for key, value in msgspec.structs.asdict(category).items() if value is not None}
        for category in file.categories
    ]
    return Built(arrays, {"categories": categories, "problems": problems})


def clip(boxes_N4: NDArray[np.float64], sizes_N2: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Turns COCO's boxes (x, y, width, height) into corners within the image.

    Args:
        boxes_N4: float64, in pixels.
        sizes_N2: (height, width) of each box's image, or one for all.
    """
    limits_N4 = np.concatenate([sizes_N2[..., ::-1]] * 2, axis=-1).astype(np.float64)
    corners_N4 = boxes_N4.copy()
    corners_N4[:, 2:] += boxes_N4[:, :2]
    return np.clip(corners_N4, 0.0, limits_N4).astype(np.float32)


def _images(images: Sequence[_Image], image_ids: NDArray[np.int64]) -> Arrays:
    """``image_ids``, ``heights``, ``widths`` (I) and the file names' bytes with their ends."""
    names = [image.file_name.encode() for image in images]
    return {
        "image_ids": image_ids,
        "heights": np.array([image.height for image in images], np.int32),
        "widths": np.array([image.width for image in images], np.int32),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_offsets": _offsets(np.array([len(name) for name in names])),
    }


def _objects(file: _File, category_ids: NDArray[np.int64], path: Path) -> Arrays:
    """What each annotation says itself: ``ids``, ``labels``, ``boxes`` (N, 4), ``areas``, ..."""
    items = file.annotations
    boxes_N4 = np.array([item.bbox for item in items], np.float64).reshape(-1, 4)
    huge_N = (np.abs(boxes_N4) > _LARGEST_BOX).any(axis=1)
    if huge_N.any():
        item = items[int(huge_N.argmax())]
        raise UserError(
            f"Annotation {item.id} of {path} has the box {list(item.bbox)}, larger than any "
            "picture; mend or remove it."
        )
    return {
        "ids": np.array([item.id for item in items], np.int64),
        "labels": _lookup(file, "category_id", category_ids, path).astype(np.int32),
        "boxes": boxes_N4,
        "areas": np.array(
            [np.nan if item.area is None else item.area for item in items], np.float64
        ),
        "crowd": np.array([bool(item.iscrowd) for item in items], np.bool_),
        "ignored": np.array([bool(item.ignore) for item in items], np.bool_),
    }


def _outlines(annotations: Sequence[_Annotation], path: Path) -> Arrays:
    """The segmentations as the file has them.

    Returns:
        ``kinds`` (N); polygons: ``ring_offsets`` (N + 1) into ``point_offsets`` (G + 1) into
        ``points`` (x, y, x, y, ...); run lengths, compressed: ``rle_objects`` (L), ``rle_sizes``
        (L, 2) height and width, ``rle_offsets`` (L + 1) into ``rle_counts``.
    """
    kinds = np.full(len(annotations), NO_SEGMENTATION, np.uint8)
    rings = np.zeros(len(annotations), np.int64)
    points, point_offsets = array("d"), array("q", [0])
    rle_objects, rle_sizes, rle_counts = array("q"), array("i"), []
    for row, item in enumerate(annotations):
        try:
            segmentation = _SEGMENTATION.decode(item.segmentation or b"null")
        except UNREADABLE as error:
            raise UserError(
                f"Annotation {item.id} of {path} has a segmentation that is neither a list of "
                f"polygons nor a run-length encoding ({error}); mend or remove it."
            ) from error
        if isinstance(segmentation, list):
            kinds[row], rings[row] = POLYGONS, len(segmentation)
            for ring in segmentation:
                points.fromlist(ring)
                point_offsets.append(len(points))
        elif segmentation is not None:
            kinds[row] = RUNS
            rle_objects.append(row)
            rle_sizes.extend(segmentation.size)
            rle_counts.append(_compressed(segmentation))
    return {
        "kinds": kinds,
        "ring_offsets": _offsets(rings),
        "point_offsets": np.frombuffer(point_offsets, np.int64),
        "points": np.frombuffer(points, np.float64),
        "rle_objects": np.frombuffer(rle_objects, np.int64),
        "rle_sizes": np.frombuffer(rle_sizes, np.int32).reshape(-1, 2),
        "rle_offsets": _offsets(np.array([len(counts) for counts in rle_counts], np.int64)),
        "rle_counts": np.frombuffer(b"".join(rle_counts), np.uint8),
    }


def _compressed(rle: _Rle) -> bytes:
    if isinstance(rle.counts, str):
        return rle.counts.encode()
    plain = {"size": list(rle.size), "counts": rle.counts}
    counts: bytes = coco_mask.frPyObjects(plain, *rle.size)["counts"]
    return counts


def _judge_outlines(arrays: Arrays, sizes_N2: NDArray[np.int32]) -> dict[str, int]:
    """Adds ``edges`` (N): how many edges an object's outline has at most; 0 = none to train with.

    Crowd regions have none.
    """
    lengths_G = np.diff(arrays["point_offsets"])
    good_G = (lengths_G >= 6) & (lengths_G % 2 == 0)
    edges_G = _offsets(np.where(good_G, lengths_G // 2, 0))
    edges_N = np.diff(edges_G[arrays["ring_offsets"]])
    unfit = 0
    for begin in range(0, len(arrays["rle_objects"]), _RLES_AT_ONCE):
        rows = slice(begin, begin + _RLES_AT_ONCE)
        objects_L, sizes_L2 = arrays["rle_objects"][rows], arrays["rle_sizes"][rows]
        starts = arrays["rle_offsets"][begin : begin + len(objects_L) + 1]
        letters = arrays["rle_counts"][starts[0] : starts[-1]]
        runs, offsets = _decode(letters, starts - starts[0])
        total_L = np.diff(_offsets(runs)[offsets])
        negative_L = np.diff(_offsets(runs < 0)[offsets])
        fits_L = (total_L == sizes_L2.prod(axis=1, dtype=np.int64)) & (negative_L == 0)
        fits_L &= (sizes_L2 == sizes_N2[objects_L]).all(axis=1)
        counted_L = fits_L & ~arrays["crowd"][objects_L]
        runs = np.where(np.repeat(counted_L, np.diff(offsets)), runs, 0)
        edges_N[objects_L] = _count_edges(runs, offsets, sizes_L2)
        unfit += int((~fits_L).sum())
    edges_N[arrays["crowd"]] = 0
    arrays["edges"] = edges_N.astype(np.int32)
    return {"short_polygons": int((~good_G).sum()), "unfit_rles": unfit}


def decode_runs(counts: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Decodes run-length masks, all at once; a damaged one has no run, or runs of a wrong total.

    Args:
        counts: compressed run lengths, of L masks.

    Returns:
        The runs of all, down the columns: off, on, off, ...; where each mask's begin (L + 1).
    """
    offsets = _offsets(np.array([len(letters) for letters in counts], np.int64))
    return _decode(np.frombuffer(b"".join(counts), np.uint8), offsets)


def _decode(
    coded: NDArray[np.uint8], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """See :func:`decode_runs`; the letters of all masks, and where each one's begin (L + 1).

    A count is a group of letters of 6 bits: 5 of the number each, the lowest first; the highest
    says that more follow; bit 4 of the last letter is the sign. From the fourth on, a count is
    given as its difference to the last but one. (``rleFrString`` in cocoapi's maskApi.c.)
    """
    letters = coded.astype(np.int64) - 48
    lengths_L = np.diff(offsets)
    final = (letters & 32) == 0
    strange_L = np.diff(_offsets((letters < 0) | (letters > 63))[offsets])
    sound_L = (lengths_L > 0) & (strange_L == 0)
    sound_L[sound_L] = final[(offsets[1:] - 1)[sound_L]]
    keep = np.repeat(sound_L, lengths_L)
    letters, final = letters[keep], final[keep]

    last = np.flatnonzero(final)
    first = np.concatenate([[0], last[:-1] + 1])[: len(last)]
    place = np.arange(len(letters)) - np.repeat(first, last - first + 1)
    # No count of an image takes as many as 12 letters; the rest of a longer group is dropped.
    shift = 5 * np.minimum(place, 11)
    sums = _offsets(np.where(place < 12, (letters & 31) << shift, 0))
    runs = sums[last + 1] - sums[first]
    runs -= np.where(letters[last] & 16, 32 << shift[last], 0)

    starts = _offsets(final)[_offsets(np.where(sound_L, lengths_L, 0))]
    number, base = _within(starts)
    for parity in (0, 1):
        chain = (number % 2 == parity) & (number > 0)
        sums = _offsets(np.where(chain, runs, 0))
        runs = np.where(chain, sums[1:] - sums[base], runs)
    return runs, starts


def split_by_columns(
    runs: NDArray[np.int64], offsets: NDArray[np.int64], heights_L: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The pixels of run-length masks, column by column; a run may go on in the next one.

    Args:
        runs: as :func:`decode_runs` gives them.
        offsets: with the runs.
        heights_L: of the masks' images.

    Returns:
        For each part of a run its mask's number, its column, its first row, and the row after
        its last; in the order of masks and columns.
    """
    number, base = _within(offsets)
    owner = np.repeat(np.arange(len(heights_L)), np.diff(offsets))
    ends = _offsets(runs)
    on = (number % 2 == 1) & (runs > 0)
    start, end, owner = (ends[:-1] - ends[base])[on], (ends[1:] - ends[base])[on], owner[on]
    height = heights_L[owner].astype(np.int64)
    column = start // height
    columns = (end - 1) // height - column + 1
    start, end, owner, height = (np.repeat(v, columns) for v in (start, end, owner, height))
    column = np.repeat(column, columns) + _within(_offsets(columns))[0]
    top = np.maximum(start - column * height, 0)
    bottom = np.minimum(end - column * height, height)
    return owner, column, top, bottom


def _count_edges(
    runs: NDArray[np.int64], offsets: NDArray[np.int64], sizes_L2: NDArray[np.int32]
) -> NDArray[np.int64]:
    """The edges that :func:`masks.rle_to_edges` makes of each mask: horizontal, joined, (L)."""
    owner, column, top, bottom = split_by_columns(runs, offsets, sizes_L2[:, 0])
    # Borders of one mask and height are numbered along the row, so neighbours follow each other.
    stride = sizes_L2[owner, 1].astype(np.int64) + 1
    key = np.concatenate([top, bottom]) * np.tile(stride, 2) + np.tile(column, 2)
    owner = np.tile(owner, 2)
    order = np.lexsort((key, owner))
    key, owner = key[order], owner[order]
    joined = (np.diff(key) == 1) & (np.diff(owner) == 0)
    count = len(sizes_L2)
    return np.bincount(owner, minlength=count) - np.bincount(owner[1:][joined], minlength=count)


def _judge_boxes(arrays: Arrays, sizes_N2: NDArray[np.int32]) -> dict[str, int]:
    """Adds ``usable`` (N): the box has a side within the image. Fills areas that are absent."""
    boxes_N4, areas = arrays["boxes"], arrays["areas"]
    sides_N2 = boxes_N4[:, 2:]
    clipped_N4 = clip(boxes_N4, sizes_N2)
    inside = ((clipped_N4[:, 2:] - clipped_N4[:, :2]) >= SMALLEST_SIDE).all(axis=1)
    empty = (sides_N2 < SMALLEST_SIDE).any(axis=1)
    limits_N2 = sizes_N2[:, ::-1]
    ends_N2 = boxes_N4[:, :2] + sides_N2
    beyond = ((boxes_N4[:, :2] < -_ROUNDING) | (ends_N2 > limits_N2 + _ROUNDING)).any(axis=1)
    usable = inside & ~empty & ~arrays["ignored"]
    no_area = np.isnan(areas)
    arrays["areas"] = np.where(no_area, sides_N2.prod(axis=1), areas)
    arrays["usable"] = usable
    counts = {
        "empty_boxes": empty,
        "outside_boxes": ~inside & ~empty,
        "clipped_boxes": beyond & inside & ~empty,
        "ignored": arrays.pop("ignored"),
        "zero_areas": areas <= 0,
        "no_areas": no_area,
        "no_outlines": usable & ~arrays["crowd"] & (arrays["edges"] == 0),
    }
    return {name: int(mask.sum()) for name, mask in counts.items()}


def _ids(items: Sequence[_Item], what: str, path: Path) -> NDArray[np.int64]:
    """The ids of items that are sorted by them; refuses one that occurs twice."""
    ids = np.array([item.id for item in items], np.int64)
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise UserError(
            f"{path} has {what} id {twice[0]} twice ({len(twice)} such in all); give each "
            f"{what} an id of its own."
        )
    return ids


def _lookup(file: _File, field: str, known: NDArray[np.int64], path: Path) -> NDArray[np.int64]:
    """The positions of the annotations' image or category ids among the sorted known ones."""
    wanted = np.array([getattr(item, field) for item in file.annotations], np.int64)
    found = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    wrong = np.flatnonzero(known[found] != wanted)
    if len(wrong):
        first = file.annotations[wrong[0]]
        raise UserError(
            f"Annotation {first.id} of {path} has {field} {wanted[wrong[0]]}, which the file does "
            f"not list ({len(wrong)} such annotations); list it or remove the annotations."
        )
    return found


def _offsets(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where each of some parts begins, and where the last one ends."""
    result = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def _within(offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For the items of consecutive parts: their number within the part, and where that begins."""
    base = np.repeat(offsets[:-1], np.diff(offsets))
    return np.arange(len(base)) - base, base


def _explain(data: bytes, path: Path, error: Exception) -> UserError:
    """Says what a file is that could not be read as instances."""
    expected = "give a COCO instances file, as annotations/instances_train2017.json is"
    begin = f"it begins with {data[:20]!r}"
    if not data.strip():
        return UserError(f"{path} is empty; {expected}.")
    if "truncated" in str(error):
        return UserError(
            f"{path} ends in the middle, after {len(data)} bytes; copy or download it again."
        )
    if not isinstance(error, msgspec.ValidationError):
        return UserError(f"{path} is not valid JSON ({error}; {begin}); {expected}.")
    try:
        sections = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except UNREADABLE:
        what = "a list, as of detections" if data.lstrip()[:1] == b"[" else begin
        return UserError(f"{path} is no COCO file but {what}; {expected}.")
    kind = _kind(sections)
    if kind:
        return UserError(f"{path} {kind}; {expected}.")
    for name, item_type in _ITEMS.items():
        problem = _first_bad_item(sections[name], name, item_type)
        if problem:
            return UserError(f"{path}: {problem}; {expected}.")
    return UserError(f"{path} is not as COCO defines it ({error}); {expected}.")


def _kind(sections: dict[str, msgspec.Raw]) -> str:
    """Tells other kinds of COCO files apart; empty if it could be an instances file."""
    missing = [name for name in _ITEMS if name not in sections]
    if missing == ["annotations"]:
        return "lists images without annotations, as image_info files do"
    if "annotations" in sections:
        try:
            first = msgspec.json.decode(sections["annotations"], type=list[dict[str, Any]])[:1]
        except UNREADABLE:
            first = []
        for key, what in (("caption", "captions"), ("segments_info", "panoptic segments")):
            if first and key in first[0] and "bbox" not in first[0]:
                return f"holds {what} and no instances"
    if missing:
        return f"has no {' and no '.join(missing)} (it has {_some(sections)})"
    return ""


def _first_bad_item(section: msgspec.Raw, name: str, item_type: type[Any]) -> str:
    """Finds the item that is not as it should be, which msgspec's message does not name."""
    try:
        items = msgspec.json.decode(section, type=list[msgspec.Raw])
    except UNREADABLE as error:
        return f"its {name} are no list ({error})"
    for position, item in enumerate(items):
        try:
            msgspec.json.decode(item, type=item_type, strict=False)
        except UNREADABLE as error:
            try:
                found = msgspec.json.decode(item, type=dict[str, Any])["id"]
                which = f"with id {found!r:.60}"
            except (*UNREADABLE, KeyError):
                which = f"number {position + 1}"
            return f"the item {which} of its {name} is wrong ({error})"
    return ""


def _some(names: Iterable[str]) -> str:
    text = ", ".join(names) or "nothing"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
