"""COCO's average precision of boxes and masks, over the ranks of a run.

Every rank adds the detections of its images; rank 0 gathers them and evaluates one class after
the other, so that only one class's detections are Python objects at a time. Matching and curves
are faster-coco-eval's; the numbers are pycocotools' ``COCOeval``.

K detections of an image; T overlap thresholds, P recall points, A ranges of area, D limits of
detections an image, C classes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from faster_coco_eval import COCOeval_faster
from faster_coco_eval.faster_eval_api_cpp import COCOevalEvaluateAccumulate
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from zoo_common import distributed
from zoo_common.detection import coco_json
from zoo_common.detection.coco import FAR, CocoIndex
from zoo_common.errors import TrainingError, UserError, one_line
from zoo_common.flaky import read_bytes

Kind = Literal["bbox", "segm"]
Result = TypeVar("Result")

PREFIXES: dict[Kind, str] = {"bbox": "box", "segm": "mask"}

_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_AREAS = ("all", "small", "medium", "large")
_LIMITS = (1, 10, 100)
_ENDLESS_NUMBER = re.compile(rb"[P-o]{12}")  # letters after which more follow, too many for one

# The twelve lines of COCO's summary: recall or precision, threshold, area, detections an image.
_LINES: tuple[tuple[bool, float | None, str, int], ...] = (
    (False, None, "all", 100),
    (False, 0.5, "all", 100),
    (False, 0.75, "all", 100),
    (False, None, "small", 100),
    (False, None, "medium", 100),
    (False, None, "large", 100),
    (True, None, "all", 1),
    (True, None, "all", 10),
    (True, None, "all", 100),
    (True, None, "small", 100),
    (True, None, "medium", 100),
    (True, None, "large", 100),
)
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six


class Index(Protocol):
    """What an evaluation needs of :class:`zoo_common.detection.coco.CocoIndex`."""

    @property
    def classes(self) -> list[str]: ...

    @property
    def category_ids(self) -> list[int]: ...

    def __len__(self) -> int: ...

    def image_id(self, index: int, /) -> int: ...

    def size(self, index: int, /) -> tuple[int, int]: ...

    def to_coco_dict(self, *, outlines: bool = True) -> dict[str, Any]: ...


class _Detections(NamedTuple):
    """Columns of detections N; masks are absent (empty) when only boxes are evaluated."""

    images_N: NDArray[np.int32]  # positions in the sorted image ids
    labels_N: NDArray[np.int32]
    boxes_N4: NDArray[np.float64]  # x y width height
    scores_N: NDArray[np.float64]
    areas_N: NDArray[np.float64]  # of the masks
    lengths_N: NDArray[np.int32]  # of the masks' counts in bytes
    counts: bytes | bytearray  # all masks' counts, one after the other


@dataclass(frozen=True)
class _Outcome:
    """What rank 0 found, for every rank."""

    statistics: dict[Kind, list[float]]
    class_ap: dict[str, dict[str, float]]
    without_mask: int  # objects that only the boxes' evaluation could use


class CocoEvaluator:
    """Collects one evaluation's detections; every rank has one.

    Attributes:
        class_ap: after :meth:`summarize`, on every rank: {"box": {class name: AP in percent},
            "mask": ...}; a class without objects is left out.
        statistics: after :meth:`summarize`, on every rank: COCO's twelve numbers for each kind,
            0 to 1, or -1 where there is nothing to find.

    Example:
        evaluator = CocoEvaluator(index)
        for ...:
            evaluator.add(image_id, boxes_K4, scores_K, labels_K, rles)
        metrics = evaluator.summarize()
        print(evaluator.table())
    """

    class_ap: dict[str, dict[str, float]]
    statistics: dict[Kind, list[float]]

    def __init__(
        self,
        source: Index | Mapping[str, Any] | Path | str,
        kinds: Sequence[Kind] = ("bbox", "segm"),
    ) -> None:
        """Reads what the data set has.

        Args:
            source: an index, COCO's dictionary, or the path of its JSON. Classes of the last two
                are numbered in the order of their category ids.
            kinds: "bbox" for boxes, "segm" for masks.

        Raises:
            UserError: the annotations cannot be read or lack what is evaluated.
        """
        assert kinds and set(kinds) <= set(PREFIXES), kinds
        self._kinds = tuple(kind for kind in PREFIXES if kind in kinds)
        if isinstance(source, (str, Path)):
            source = _read_json(Path(source))
        if isinstance(source, Mapping):
            images, self._category_ids, names = _describe(source)
            annotations = source["annotations"]
            self._annotations: Callable[[], Iterable[Mapping[str, Any]]] = lambda: annotations
        else:
            index, outlines = source, "segm" in self._kinds
            images = {index.image_id(i): index.size(i) for i in range(len(index))}
            self._category_ids, names = list(index.category_ids), list(index.classes)
            self._annotations = lambda: index.to_coco_dict(outlines=outlines)["annotations"]
        self._names = [
            f"{name} ({category_id})" if names.count(name) > 1 else name
            for name, category_id in zip(names, self._category_ids, strict=True)
        ]
        self._image_ids = sorted(images)
        self._sizes = [images[image_id] for image_id in self._image_ids]
        self._positions = {image_id: i for i, image_id in enumerate(self._image_ids)}
        self._added: set[int] = set()
        self._columns = {name: bytearray() for name in _Detections._fields}
        self._is_main: bool | None = None  # known once the ranks' parts are gathered
        self._parts: list[tuple[set[int], _Detections]] = []
        self._merged: _Detections | None = None
        self._outcome: _Outcome | None = None

    def add(
        self,
        image_id: int,
        boxes_K4: NDArray[Any],
        scores_K: NDArray[Any],
        labels_K: NDArray[Any],
        rles: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Keeps an image's detections; each image once, on one rank.

        Args:
            image_id: COCO's.
            boxes_K4: xyxy in pixels of the original image.
            scores_K: higher is surer.
            labels_K: 0 to C - 1.
            rles: compressed masks of the original image's size, if masks are evaluated.

        Raises:
            UserError: image or class are not in the data set, the image was added before, or a
                number is not finite.
        """
        assert self._is_main is None, "an evaluator takes nothing more once it has evaluated"
        position = self._positions.get(int(image_id))
        if position is None:
            raise UserError(
                f"Image id {image_id} has detections, but is not among the annotations' "
                f"{len(self._image_ids)} images: evaluate on the data set that was read."
            )
        if position in self._added:
            raise self._twice(position)
        boxes, scores, labels = np.asarray(boxes_K4), np.asarray(scores_K), np.asarray(labels_K)
        count = len(scores)
        assert boxes.shape == (count, 4) and scores.shape == labels.shape == (count,)
        self._check_numbers(image_id, boxes, scores, labels)
        # In the boxes' own precision, as detectron2 does.
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        columns: dict[str, NDArray[Any]] = {
            "images_N": np.full(count, position, np.int32),
            "labels_N": labels.astype(np.int32),
            "boxes_N4": boxes.astype(np.float64),
            "scores_N": scores.astype(np.float64),
        }
        if "segm" in self._kinds:
            assert rles is not None and len(rles) == count, "masks are evaluated: hand them in"
            height, width = self._sizes[position]
            wrong = [rle["size"] for rle in rles if list(rle["size"]) != [height, width]]
            assert not wrong, f"image {image_id} is {height} x {width}, a mask {wrong[0]}"
            texts = [_as_bytes(rle["counts"]) for rle in rles]
            columns["areas_N"] = _areas(rles)
            columns["lengths_N"] = np.array([len(text) for text in texts], np.int32)
            self._columns["counts"] += b"".join(texts)
        for name, column in columns.items():
            self._columns[name] += column.tobytes()
        self._added.add(position)

    def _check_numbers(
        self, image_id: int, boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any]
    ) -> None:
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self._category_ids):
            wrong = labels.max() if labels.min() >= 0 else labels.min()
            raise UserError(
                f"Image id {image_id} has a detection of class {wrong}, but the annotations have "
                f"classes 0 to {len(self._category_ids) - 1}: use a model with their classes."
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise UserError(
                f"Image id {image_id} has a detection with a box or score that is no finite "
                "number: look at the weights, whose training may have diverged."
            )

    def summarize(self) -> dict[str, float]:
        """Evaluates all ranks' detections; every rank calls it and gets the same.

        Returns:
            Percent: ``box_AP``, ``box_AP50``, ``box_AP75``, ``box_APs``, ``box_APm``,
            ``box_APl``, and the same with ``mask_``. What has no objects to find, such as small
            ones, is left out.

        Raises:
            UserError: two ranks added the same image, or there are no objects at all.
        """
        self._outcome = self._on_main(self._evaluate)
        self.class_ap, self.statistics = self._outcome.class_ap, self._outcome.statistics
        return {
            f"{PREFIXES[kind]}_{name}": 100 * value
            for kind, values in self.statistics.items()
            for name, value in zip(_METRICS, values, strict=False)
            if value > -1
        }

    def table(self) -> str:
        """COCO's summary of twelve lines for each kind, after :meth:`summarize`."""
        assert self._outcome is not None, "summarize() comes first"
        lines = []
        for kind, values in self.statistics.items():
            lines.append(f"Evaluation of {kind}")
            for (recall, threshold, area, limit), value in zip(_LINES, values, strict=True):
                title = "Average Recall     (AR)" if recall else "Average Precision  (AP)"
                overlap = "0.50:0.95" if threshold is None else f"{threshold:0.2f}"
                lines.append(
                    f" {title} @[ IoU={overlap:<9} | area={area:>6s} | maxDets={limit:>3d} ] "
                    f"= {value:0.3f}"
                )
        if self._outcome.without_mask:
            lines.append(
                f"{self._outcome.without_mask} objects have no outline and count for boxes only"
            )
        return "\n".join(lines)

    def write_results(self, path: Path) -> None:
        """Writes all ranks' detections as COCO's server takes them; every rank calls it.

        Args:
            path: a JSON file, written by rank 0: a temporary one beside it is renamed at the end.

        Raises:
            TrainingError: the disk does not take it.
            UserError: two ranks added the same image.
        """
        self._on_main(lambda detections: self._write(path, detections))

    def _on_main(self, job: Callable[[_Detections], Result]) -> Result:
        """The result of ``job`` on rank 0, or its error, on every rank."""
        if self._is_main is None:
            own = (self._added, _Detections(**self._arrays()))
            self._parts = distributed.gather_results([own], to="main")
            self._is_main = bool(self._parts)
            self._columns.clear()
        done: Any = None
        if self._is_main:
            try:
                if self._merged is None:
                    self._merged = self._merge()
                done = job(self._merged)
            except (UserError, TrainingError) as error:
                done = error
        done = distributed.broadcast_object(done)
        if isinstance(done, (UserError, TrainingError)):
            raise done
        return done  # type: ignore[no-any-return]

    def _arrays(self) -> dict[str, Any]:
        """This rank's columns as arrays, which share their memory."""
        types = {"images_N": np.int32, "labels_N": np.int32, "lengths_N": np.int32}
        arrays: dict[str, Any] = {
            name: np.frombuffer(column, types.get(name, np.float64))
            for name, column in self._columns.items()
            if name != "counts"
        }
        arrays["boxes_N4"] = arrays["boxes_N4"].reshape(-1, 4)
        return {**arrays, "counts": self._columns["counts"]}

    def _merge(self) -> _Detections:
        """All ranks' detections, one after the other."""
        seen: set[int] = set()
        for added, _ in self._parts:
            for position in sorted(seen & added):
                raise self._twice(position)
            seen |= added
        parts = [detections for _, detections in self._parts]
        self._parts = []
        if len(parts) == 1:
            return parts[0]
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in _Detections._fields
            if name != "counts"
        }
        return _Detections(**arrays, counts=b"".join(part.counts for part in parts))

    def _twice(self, position: int) -> UserError:
        return UserError(
            f"The detections of image id {self._image_ids[position]} were added twice: give each "
            "image to one process, once."
        )

    def _evaluate(self, detections: _Detections) -> _Outcome:
        objects = self._read_objects()
        if not any(objects):
            raise UserError(
                "The annotations have no object of their classes in their images, so there is "
                "nothing to compare with: write the results for COCO's server instead."
            )
        # Among equal scores the one added first comes first, as in pycocotools.
        keys = (-detections.scores_N, detections.images_N, detections.labels_N)
        order = np.lexsort(keys)
        ends = np.searchsorted(detections.labels_N[order], np.arange(len(objects) + 1))
        offsets = np.concatenate([[0], detections.lengths_N.cumsum(dtype=np.int64)])
        statistics: dict[Kind, list[float]] = {}
        class_ap: dict[str, dict[str, float]] = {}
        for kind in self._kinds:
            precision_TRCA = np.full((10, 101, len(objects), 4), -1.0)
            recall_TCAD = np.full((10, len(objects), 4, 3), -1.0)
            for label, there in enumerate(objects):
                if kind == "segm":
                    there = [thing for thing in there if thing.rle is not None]
                if there:
                    rows = order[ends[label] : ends[label + 1]]
                    curves = _curves(there, detections, rows, offsets, kind, self._sizes)
                    precision_TRCA[:, :, label], recall_TCAD[:, label] = curves
            statistics[kind] = [_mean(precision_TRCA, recall_TCAD, line) for line in _LINES]
            class_ap[PREFIXES[kind]] = {
                name: 100 * float(values[values > -1].mean())
                for name, values in zip(self._names, precision_TRCA[..., 0].T, strict=True)
                if (values > -1).any()
            }
        without_mask = 0
        if "segm" in self._kinds:
            without_mask = sum(thing.rle is None for there in objects for thing in there)
        return _Outcome(statistics, class_ap, without_mask)

    def _read_objects(self) -> list[list[_Object]]:
        """The annotated objects of each class, in the annotations' order."""
        labels = {category_id: label for label, category_id in enumerate(self._category_ids)}
        objects: list[list[_Object]] = [[] for _ in labels]
        for annotation in self._annotations():
            label = labels.get(annotation["category_id"])
            position = self._positions.get(annotation["image_id"])
            if label is None or position is None:
                continue
            rle = None
            if "segm" in self._kinds:
                rle = _mask_of(annotation, *self._sizes[position])
            box, area = _box_and_area(annotation)
            crowd = bool(annotation.get("iscrowd", 0))
            objects[label].append(_Object(position, box, area, crowd, rle))
        return objects

    def _write(self, path: Path, detections: _Detections) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="ascii") as stream:
                for number, text in enumerate(self._lines(detections)):
                    stream.write(f"{',' if number else '['}\n{text}")
                stream.write("\n]\n" if len(detections.scores_N) else "[]\n")
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise TrainingError(
                f"Cannot write the detections to {path}: {error.strerror}; free some room or give "
                "another path."
            ) from error

    def _lines(self, detections: _Detections) -> Iterator[str]:
        """The JSON of each detection, image by image."""
        order = np.argsort(detections.images_N, kind="stable")
        offsets = np.concatenate([[0], detections.lengths_N.cumsum(dtype=np.int64)])
        for at in range(0, len(order), 4096):
            rows = order[at : at + 4096]
            for row, position, label, box, score in zip(
                rows.tolist(),
                detections.images_N[rows].tolist(),
                detections.labels_N[rows].tolist(),
                detections.boxes_N4[rows].tolist(),
                detections.scores_N[rows].tolist(),
                strict=True,
            ):
                entry = {
                    "image_id": self._image_ids[position],
                    "category_id": self._category_ids[label],
                    "bbox": box,
                    "score": score,
                }
                if "segm" in self._kinds:
                    counts = bytes(detections.counts[offsets[row] : offsets[row + 1]])
                    size = list(self._sizes[position])
                    entry["segmentation"] = {"size": size, "counts": counts.decode("ascii")}
                yield json.dumps(entry)


class _Object(NamedTuple):
    """An annotated object."""

    image: int  # position in the sorted image ids
    box: list[float]  # x y width height
    area: float
    crowd: bool
    rle: Mapping[str, Any] | None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(read_bytes(path))
    except OSError as error:
        raise UserError(
            f"Cannot read the annotations {path}: {error.strerror}; give the path of a COCO JSON."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"The annotations {path} are no JSON ({one_line(error)}): copy or download the file "
            "again."
        ) from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise UserError(
            f"The annotations {path} have no images, annotations and categories: give a JSON of "
            "COCO's instances."
        )
    return content


def _describe(
    content: Mapping[str, Any],
) -> tuple[dict[int, tuple[int, int]], list[int], list[str]]:
    """The sizes of a COCO dictionary's images, its category ids, and their names.

    Raises:
        UserError: an entry lacks what is needed.
    """
    try:
        images = {
            image["id"]: (int(image["height"]), int(image["width"])) for image in content["images"]
        }
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        for annotation in content["annotations"]:
            missing = {"image_id", "category_id", "bbox"} - set(annotation)
            if missing or len(annotation["bbox"]) != 4:
                what = ", ".join(sorted(missing)) or "a bbox of four numbers"
                raise ValueError(f"annotation {annotation.get('id')} has no {what}")
    except (KeyError, TypeError, ValueError) as error:
        why = f"an entry has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"The annotations are not COCO's instances: {why}; mend them.") from error
    return images, sorted(names), [names[category_id] for category_id in sorted(names)]


def _box_and_area(annotation: Mapping[str, Any]) -> tuple[list[float], float]:
    """As the annotation says; without an area it is the box's.

    Raises:
        UserError: they are no numbers.
    """
    area = annotation.get("area")
    try:
        box = [float(number) for number in annotation["bbox"]]
        return box, box[2] * box[3] if area is None else float(area)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(
            f"Annotation {annotation.get('id')!r:.60} has a box or an area of no numbers "
            f"({one_line(error)}): correct the annotations."
        ) from error


def _mask_of(annotation: Mapping[str, Any], height: int, width: int) -> Mapping[str, Any] | None:
    """The compressed RLE of an annotation, made as pycocotools does; None without an outline.

    Raises:
        UserError: the outline is broken.
    """
    outline = annotation.get("segmentation")
    if not outline:
        return None
    try:
        if isinstance(outline, list):
            rings = [_nearby(ring, height, width) for ring in outline]
            rle = mask_utils.merge(mask_utils.frPyObjects(rings, height, width))
        elif isinstance(outline["counts"], list):
            rle = mask_utils.frPyObjects(outline, height, width)
        else:
            rle = {"size": outline["size"], "counts": outline["counts"]}
        if list(rle["size"]) != [height, width]:
            raise ValueError(f"its size is {rle['size']!s:.60}, the image's {[height, width]}")
        if not isinstance(outline, list):
            _check_runs(_as_bytes(rle["counts"]), height * width)
    except Exception as error:  # pycocotools raises bare ones
        raise UserError(
            f"The segmentation of annotation {annotation.get('id')} cannot be used "
            f"({one_line(error)}): correct the annotations."
        ) from error
    return {"size": [height, width], "counts": _as_bytes(rle["counts"])}


def _nearby(ring: Sequence[float], height: int, width: int) -> Sequence[float]:
    """A polygon whose far vertices are moved to where pycocotools can walk to in a while."""
    points = np.asarray(ring, np.float64)
    if not np.isfinite(points).all():
        raise ValueError("a coordinate is no finite number")
    limits = np.resize([width, height], points.shape) + FAR
    if (points >= -FAR).all() and (points <= limits).all():
        return ring
    moved: list[float] = np.clip(points, -FAR, limits).tolist()
    return moved


def _check_runs(counts: bytes, pixels: int) -> None:
    """Refuses run lengths that are not of an image: comparing such masks, pycocotools never ends.

    Raises:
        ValueError: they are not.
    """
    runs, _ = coco_json.decode_runs([counts])
    fits = ((runs >= 0) & (runs <= pixels)).all() and runs.sum() == pixels
    if not fits or _ENDLESS_NUMBER.search(counts):
        raise ValueError("its run lengths do not add up to the image")


def check_outlines(index: CocoIndex) -> None:
    """Tells outlines that masks cannot be scored against before a run, and not at its end.

    Raises:
        UserError: there is one.
    """
    if not index.problems.keys() & {"short_polygons", "unfit_rles"}:
        return
    for image in range(len(index)):
        for annotation in index.annotation_dicts(image):
            try:
                _mask_of(annotation, *index.size(image))
            except UserError as error:
                raise UserError(f"{index.annotations}: {error}") from error


def _as_bytes(counts: bytes | str) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)


def _areas(rles: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Pixels of each mask. pycocotools keeps the number of masks of a call in eight bits."""
    parts = [mask_utils.area(list(rles[at : at + 255])) for at in range(0, len(rles), 255)]
    return np.concatenate([np.zeros(0), *parts])


def _curves(
    objects: Sequence[_Object],
    detections: _Detections,
    rows: NDArray[np.int64],
    offsets: NDArray[np.int64],
    kind: Kind,
    sizes: Sequence[tuple[int, int]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One class's precision and recall.

    Args:
        objects: at least one.
        detections: of all classes.
        rows: those of the class, by image and in it by falling score.
        offsets: where each detection's mask begins in ``detections.counts``.
        kind: what is compared.
        sizes: (height, width) of all images.

    Returns:
        Precision (T, R, A) with the most detections an image, and recall (T, A, D); -1 where
        there is nothing to find.
    """
    # COCOeval_faster.evaluate() without its dictionaries of annotations, which take most of its
    # time and memory: here an annotation is what the matching reads of it.
    evaluation = COCOeval_faster(iouType=kind)
    by_image: dict[int, list[_Object]] = {}
    # Ids are our own: 0 would read as "not matched", and files have been seen with twins.
    for number, thing in enumerate(objects, 1):
        by_image.setdefault(thing.image, []).append(thing)
        crowd = thing.crowd
        entry = {"id": number, "area": thing.area, "iscrowd": crowd, "ignore": crowd}
        evaluation.gt_dataset.append_ref(thing.image, 1, entry)
    boxes, images = detections.boxes_N4[rows], detections.images_N[rows]
    areas = detections.areas_N[rows] if kind == "segm" else boxes[:, 2] * boxes[:, 3]
    columns = (images.tolist(), areas.tolist(), detections.scores_N[rows].tolist())
    for number, (image, area, score) in enumerate(zip(*columns, strict=True), 1):
        entry = {"id": number, "area": area, "score": score}
        evaluation.dt_dataset.append_ref(image, 1, entry)
    used = sorted(by_image.keys() | set(columns[0]))
    begins = np.searchsorted(images, used).tolist()
    ends = np.searchsorted(images, used, side="right").tolist()
    overlaps: list[list[list[list[float]]]] = []
    for image, begin, end in zip(used, begins, ends, strict=True):
        there = by_image.get(image)
        if not there or begin == end:
            overlaps.append([[]])
            continue
        end = min(end, begin + _LIMITS[-1])
        candidates: Any = boxes[begin:end]
        targets: Any = np.array([thing.box for thing in there])
        if kind == "segm":
            targets = [thing.rle for thing in there]
            candidates = [
                {"size": sizes[image], "counts": bytes(detections.counts[at:stop])}
                for at, stop in offsets[rows[begin:end, None] + [0, 1]].tolist()
            ]
        crowds = [thing.crowd for thing in there]
        overlaps.append([mask_utils.iou(candidates, targets, crowds).tolist()])
    evaluation.params.imgIds, evaluation.params.catIds = used, [1]
    result = COCOevalEvaluateAccumulate(
        evaluation.params,
        overlaps,
        evaluation.gt_dataset,
        evaluation.dt_dataset,
        used,
        [1],
        True,
    )
    return result["precision"][:, :, 0, :, -1], result["recall"][:, 0]


def _mean(
    precision_TRCA: NDArray[np.float64],
    recall_TCAD: NDArray[np.float64],
    line: tuple[bool, float | None, str, int],
) -> float:
    """The number of one of the summary's lines, or -1 where there is nothing to find."""
    recall, threshold, area, limit = line
    values = recall_TCAD[..., _LIMITS.index(limit)] if recall else precision_TRCA
    values = values[..., _AREAS.index(area)]
    if threshold is not None:
        values = values[np.isclose(_THRESHOLDS, threshold)]
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0
