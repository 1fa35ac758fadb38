"""A COCO data set: its images, and their objects from memory-mapped arrays.

Shapes: I images, N objects of an image, E edges of an object's outline. Boxes are xyxy in pixels.
COCO's category ids occur here and in evaluation only; labels are 0 to C - 1 in their order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from zoo_common.detection import coco_json
from zoo_common.detection.coco_cache import Arrays, Mapped, open_cached
from zoo_common.detection.masks import polygons_to_edges, rle_to_edges
from zoo_common.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self  # Python's own has none before 3.11

_MISSING = "missing_images"
_NO_OUTLINES = "no_outlines"
FAR = 1 << 16
"""pycocotools walks along each edge: how far out of an image, in pixels, a vertex may lie."""

_MEANINGS = {
    _MISSING: "images have no file: left out",
    "empty_boxes": "objects have a box of no width or height: left out",
    "outside_boxes": "objects lie outside their image: left out",
    "clipped_boxes": "boxes reach beyond their image: clipped",
    "ignored": "objects are marked to be ignored: left out",
    "zero_areas": "objects have an area of 0: kept",
    "no_areas": "objects have no area: their box's is taken",
    "short_polygons": "polygons have fewer than 3 points or half a point: left out",
    "unfit_rles": "run-length masks are damaged or not of their image's size: no outline",
    _NO_OUTLINES: "objects have no outline",
}


class Objects(NamedTuple):
    """The objects of an image that can be trained with, crowd regions included."""

    boxes_N4: NDArray[np.float32]
    """xyxy, clipped to the image."""
    labels_N: NDArray[np.int64]
    crowd_N: NDArray[np.bool_]
    ids_N: NDArray[np.int64]


class Outline(NamedTuple):
    """An object's outline as :mod:`zoo_common.detection.masks` takes it; E = 0: it has none."""

    edges: NDArray[np.float64]
    """x0, y0, x1, y1 in pixels, (E, 4)."""
    rings: NDArray[np.int64]
    """The ring of each edge, (E)."""


def open_index(
    annotations: Path,
    images: Path | None,
    *,
    masks: bool = False,
    allow_missing: bool = False,
    cache: Path | None = None,
) -> CocoIndex:
    """Opens an instances JSON; its arrays are built on the first time and mapped afterwards.

    Args:
        annotations: an instances (or keypoints) JSON.
        images: the directory of its images; None if no image is to be read.
        masks: objects without an outline are left out (crowd regions stay).
        allow_missing: leave images without a file out of the index instead of refusing them.
        cache: the directory for the mapped arrays; for None see
            :func:`zoo_common.detection.coco_cache.open_cached`.

    Raises:
        UserError: the JSON is not what it should be, or images are missing.
    """
    mapped = open_cached(
        annotations,
        partial(coco_json.parse, path=annotations),
        version=coco_json.VERSION,
        directory=cache,
    )
    index = CocoIndex(mapped, annotations, images, masks, range(len(mapped.arrays["image_ids"])))
    return index if images is None else index.with_files(images, allow_missing=allow_missing)


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """The images of an instances JSON, in the order of their ids.

    Forked and spawned workers share the arrays' pages; pickling passes on paths.
    """

    _mapped: Mapped
    annotations: Path
    images: Path | None
    masks: bool
    _numbers: Sequence[int]  # of the images here among those of the JSON

    def __len__(self) -> int:
        return len(self._numbers)

    def with_files(self, images: Path, *, allow_missing: bool = False) -> Self:
        """The index of the whole JSON with the directory of its images, which must be there.

        Args:
            images: the directory.
            allow_missing: leave images without a file out instead of refusing them.

        Raises:
            UserError: images are missing.
        """
        index = replace(self, images=images)
        present = _are_present(self._arrays, images)
        missing = np.flatnonzero(~present)
        if len(missing) and (not allow_missing or not present.any()):
            first = index.path(int(missing[0]))[:500]
            raise UserError(
                f"{len(missing)} of the {len(index)} images of {self.annotations} are missing, the "
                f"first is {first}; add them, or take them out of the JSON."
            )
        return replace(index, _numbers=np.flatnonzero(present).tolist()) if len(missing) else index

    @property
    def _arrays(self) -> Arrays:
        return self._mapped.arrays

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the JSON."""
        return self._mapped.fingerprint

    @property
    def classes(self) -> list[str]:
        """The names of the labels."""
        return [category["name"] for category in self._mapped.facts["categories"]]

    @property
    def category_ids(self) -> list[int]:
        """The COCO id of each label."""
        return [category["id"] for category in self._mapped.facts["categories"]]

    def item_id(self, index: int) -> str:
        """The image's file name as the JSON has it."""
        number = self._numbers[index]
        begin, end = self._arrays["name_offsets"][number : number + 2].tolist()
        name: bytes = self._arrays["names"][begin:end].tobytes()
        return name.decode()

    def path(self, index: int) -> str:
        """The path of the image's file."""
        assert self.images is not None, "the index was opened without images"
        return str(self.images / self.item_id(index))

    def image_id(self, index: int) -> int:
        """The image's COCO id."""
        return int(self._arrays["image_ids"][self._numbers[index]])

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels as the JSON has them."""
        number = self._numbers[index]
        return int(self._arrays["heights"][number]), int(self._arrays["widths"][number])

    def sizes(self) -> NDArray[np.int32]:
        """(height, width) of all images, (I, 2)."""
        sides = [self._arrays[name][np.asarray(self._numbers)] for name in ("heights", "widths")]
        return np.array(sides, np.int32).T

    def objects(self, index: int) -> Objects:
        """The objects of an image; those that :attr:`problems` says are left out are not there."""
        rows = self._rows(index)
        arrays = self._arrays
        return Objects(
            coco_json.clip(arrays["boxes"][rows], np.array(self.size(index))),
            arrays["labels"][rows].astype(np.int64),
            arrays["crowd"][rows],
            arrays["ids"][rows],
        )

    def outlines(self, index: int) -> list[Outline]:
        """The outlines of :meth:`objects`, in pixels, unclipped; crowd regions have none."""
        arrays = self._arrays
        height, width = self.size(index)
        result = []
        for row in self._rows(index).tolist():
            if not arrays["edges"][row]:
                outline = Outline(np.empty((0, 4)), np.empty(0, np.int64))
            elif arrays["kinds"][row] == coco_json.RUNS:
                outline = Outline(*rle_to_edges(self._rle(row), height, width))
            else:
                outline = Outline(*polygons_to_edges(self._polygons(row)))
            result.append(outline)
        return result

    def mask_runs(self, index: int) -> NDArray[np.int64]:
        """What the objects cover, as pycocotools draws them: runs of pixels down the columns.

        Crowd regions and objects without an outline have none. pycocotools walks along each edge,
        so that vertices further than 65536 pixels outside of the image are moved to there.

        Returns:
            Number among :meth:`objects`, column, first row, row after the last (K, 4); in this
            order, by object and column.
        """
        height, width = self.size(index)
        limits_2 = np.array([width, height]) + FAR
        counts = []
        for row in self._rows(index).tolist():
            if not self._arrays["edges"][row]:
                counts.append(b"")
            elif self._arrays["kinds"][row] == coco_json.RUNS:
                counts.append(self._rle(row)["counts"].encode())
            else:
                rings = [
                    np.clip(np.reshape(ring, (-1, 2)), -FAR, limits_2).ravel()
                    for ring in self._polygons(row)
                    if len(ring) >= 6 and len(ring) % 2 == 0
                ]
                rles = coco_mask.frPyObjects(rings, height, width)
                counts.append(coco_mask.merge(rles)["counts"])
        runs, offsets = coco_json.decode_runs(counts)
        columns = coco_json.split_by_columns(runs, offsets, np.full(len(counts), height))
        return np.stack(columns, axis=1)

    def annotation_dicts(self, index: int, *, outlines: bool = True) -> list[dict[str, Any]]:
        """The image's annotations as the JSON has them: all of them, boxes unclipped.

        An absent area is the box's, run lengths are compressed, and fields that are not of
        instances are left out.

        Args:
            index: of the image.
            outlines: False leaves ``segmentation`` out.
        """
        arrays = self._arrays
        begin, end = self._span(index)
        category_ids = self.category_ids
        image_id = self.image_id(index)
        columns = [arrays[name][begin:end].tolist() for name in ("ids", "labels", "boxes", "areas")]
        result = []
        for row, id_, label, box, area in zip(range(begin, end), *columns, strict=True):
            annotation = {
                "id": id_,
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(arrays["crowd"][row]),
            }
            kind = arrays["kinds"][row]
            if outlines and kind == coco_json.POLYGONS:
                annotation["segmentation"] = self._polygons(row)
            elif outlines and kind == coco_json.RUNS:
                annotation["segmentation"] = self._rle(row)
            result.append(annotation)
        return result

    def to_coco_dict(self, *, outlines: bool = True) -> dict[str, Any]:
        """What the JSON says of instances, as ``pycocotools.coco.COCO.dataset`` has it.

        Annotations stand in the order of their images, within one in the file's order. See
        :meth:`annotation_dicts`; for a training set's 860,000 objects it is large.
        """
        return {
            "info": {},
            "images": [
                {
                    "id": self.image_id(i),
                    "file_name": self.item_id(i),
                    "height": self.size(i)[0],
                    "width": self.size(i)[1],
                }
                for i in range(len(self))
            ],
            "annotations": [
                annotation
                for index in range(len(self))
                for annotation in self.annotation_dicts(index, outlines=outlines)
            ],
            "categories": [dict(category) for category in self._mapped.facts["categories"]],
        }

    def trainable(self) -> NDArray[np.int64]:
        """The images that have an object that is no crowd region."""
        return np.flatnonzero(self._object_counts)

    @cached_property
    def most_objects(self) -> int:
        """The most objects in an image, without crowd regions."""
        return int(self._object_counts.max())

    @cached_property
    def most_edges(self) -> int:
        """The most edges in an object's outline."""
        return int(self._arrays["edges"][self._kept].max(initial=0))

    @property
    def problems(self) -> dict[str, int]:
        """How often each oddity occurs; those that do not are left out. See :meth:`describe`."""
        missing = len(self._arrays["image_ids"]) - len(self)
        counts = {_MISSING: missing, **self._mapped.facts["problems"]}
        return {name: counts[name] for name in _MEANINGS if counts[name]}

    def describe(self) -> str:
        """What the data set holds and what is odd in it: a line, and one for each oddity."""
        arrays = self._arrays
        crowds = int(arrays["crowd"].sum())
        empty = int((np.diff(arrays["object_offsets"]) == 0).sum())
        lines = [
            f"{self.annotations.name}: {len(arrays['image_ids'])} images ({empty} without "
            "annotations), "
            f"{len(arrays['ids'])} annotations ({crowds} crowd regions), "
            f"{len(self.classes)} classes"
        ]
        for name, count in self.problems.items():
            end = ""
            if name == _NO_OUTLINES:
                end = ": left out" if self.masks else ": used for their boxes"
            lines.append(f"  {count} {_MEANINGS[name]}{end}")
        return "\n".join(lines)

    @property
    def _kept(self) -> NDArray[np.bool_]:
        """Which annotations are among :meth:`objects` and no crowd regions."""
        kept: NDArray[np.bool_] = self._arrays["usable"] & ~self._arrays["crowd"]
        return kept & (self._arrays["edges"] > 0) if self.masks else kept

    @cached_property
    def _object_counts(self) -> NDArray[np.int64]:
        """How many of them each image has."""
        before = np.concatenate([[0], np.cumsum(self._kept)])
        counts = np.diff(before[self._arrays["object_offsets"]])
        return np.asarray(counts[np.asarray(self._numbers)], np.int64)

    def _span(self, index: int) -> tuple[int, int]:
        """The rows of an image's annotations."""
        number = self._numbers[index]
        begin, end = self._arrays["object_offsets"][number : number + 2].tolist()
        return begin, end

    def _rows(self, index: int) -> NDArray[np.int64]:
        begin, end = self._span(index)
        keep = self._arrays["usable"][begin:end]
        if self.masks:
            keep = keep & (
                self._arrays["crowd"][begin:end] | (self._arrays["edges"][begin:end] > 0)
            )
        return np.arange(begin, end)[keep]

    def _polygons(self, row: int) -> list[list[float]]:
        first, last = self._arrays["ring_offsets"][row : row + 2].tolist()
        offsets = self._arrays["point_offsets"][first : last + 1].tolist()
        points: list[float] = self._arrays["points"][offsets[0] : offsets[-1]].tolist()
        return [points[begin - offsets[0] : end - offsets[0]] for begin, end in pairwise(offsets)]

    def _rle(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._arrays["rle_objects"], row))
        begin, end = self._arrays["rle_offsets"][number : number + 2].tolist()
        counts = self._arrays["rle_counts"][begin:end].tobytes().decode()
        return {"size": self._arrays["rle_sizes"][number].tolist(), "counts": counts}


def _are_present(arrays: Arrays, images: Path) -> NDArray[np.bool_]:
    """Which images have a file (I); lists each directory once and asks for no file's status."""
    names, offsets = arrays["names"].tobytes(), arrays["name_offsets"].tolist()
    known: dict[str, set[str]] = {}
    present = np.empty(len(offsets) - 1, np.bool_)
    for number, (begin, end) in enumerate(pairwise(offsets)):
        folder, slash, name = names[begin:end].decode().rpartition("/")
        if folder not in known:
            known[folder] = _names_in(images / (folder + slash))
        present[number] = name in known[folder]
    return present


def _names_in(directory: Path) -> set[str]:
    try:
        with os.scandir(directory) as entries:
            return {entry.name for entry in entries}
    except OSError:
        return set()
