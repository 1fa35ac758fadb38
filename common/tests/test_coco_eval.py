"""COCO's metrics against pycocotools, over processes, and what is refused.

Started as a program (``python test_coco_eval.py DIRECTORY``) this file is one process of a
group.
"""

import contextlib
import copy
import io
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from zoo_common import distributed
from zoo_common.detection.coco import open_index
from zoo_common.detection.coco_eval import CocoEvaluator, check_outlines
from zoo_common.errors import TrainingError, UserError

IDS = [90, 3, 17, 44, 1, 60]  # of the categories, with gaps and in no order
SIZES = [(60, 80), (200, 150), (400, 500)]
NO_OBJECTS, NO_DETECTIONS, CROWDED = 2, 3, 5  # images of these places

Arrays = tuple[int, np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]


def draw_outline(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
    around = np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(0.9, 1, (9, 1)) + 1
    points: list[float] = (box[:2] + around / 2 * (box[2:] - box[:2])).ravel().tolist()
    return points


def draw_boxes(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    side = np.exp(rng.uniform(np.log(4), np.log(min(size)), (count, 2)))
    low = rng.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - side)
    return np.concatenate([low, low + side], axis=1)


def draw(images: int = 24) -> tuple[dict[str, Any], list[Arrays]]:
    """A data set and detections: crowds, equal scores, odd images, a class without objects."""
    rng = np.random.default_rng(0)
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": number, "name": f"thing {number}"} for number in IDS]
    detections: list[Arrays] = []
    for place in range(images):
        height, width = SIZES[place % 3]
        image_id = 1000 - 37 * place
        truth["images"].append({"id": image_id, "height": height, "width": width})
        boxes = draw_boxes(rng, 0 if place == NO_OBJECTS else 9, (height, width))
        labels = rng.integers(0, 5, len(boxes))  # of the sorted ids, the last of which has none
        for box, label in zip(boxes, labels.tolist(), strict=True):
            outline: Any = [draw_outline(rng, box), draw_outline(rng, box)]
            crowd = int(rng.random() < 0.15)
            rle = mask_utils.merge(mask_utils.frPyObjects(outline, height, width))
            area = float(mask_utils.area(rle))
            if crowd:
                outline = {"size": rle["size"], "counts": rle["counts"].decode()}
            low, side = box[:2].tolist(), (box[2:] - box[:2]).tolist()
            truth["annotations"].append(
                {
                    "id": 5000 - len(truth["annotations"]),
                    "image_id": image_id,
                    "category_id": sorted(IDS)[label],
                    "bbox": [*low, *side],
                    "area": area,
                    "iscrowd": crowd,
                    "segmentation": outline,
                }
            )
        if place == NO_DETECTIONS:
            continue
        count = 260 if place == CROWDED else 30
        found, guessed = draw_boxes(rng, count, (height, width)), rng.integers(0, 6, count)
        if place == CROWDED:
            guessed[:150] = 0  # more than count for a class
        near = min(2 * len(boxes), count)
        source = np.arange(near) % max(1, len(boxes))
        found[:near] = boxes[source] + rng.normal(0, 1, (near, 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        guessed[:near] = labels[source]
        scores = rng.integers(0, 20, count) / 20  # many of them equal
        outlines = [draw_outline(rng, box) for box in found]
        rles = mask_utils.frPyObjects(outlines, height, width)
        order = rng.permutation(count)
        detections.append(
            (
                image_id,
                found[order].astype(np.float32),
                scores[order].astype(np.float32),
                guessed[order],
                [rles[n] for n in order],
            )
        )
    return truth, detections


TRUTH, DETECTIONS = draw()


def add_all(evaluator: CocoEvaluator, detections: list[Arrays]) -> CocoEvaluator:
    for arrays in detections:
        evaluator.add(*arrays)
    return evaluator


def pycocotools(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> COCOeval:
    """The official evaluation, with its text in ``evaluation.text``."""
    results = copy.deepcopy(results)
    for result in results:
        # What is there first decides what pycocotools takes for a detection's area.
        result.pop("segmentation" if kind == "bbox" else "bbox", None)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as text:
        evaluation.summarize()
    evaluation.text = text.getvalue()
    return evaluation


def test_metrics_equal_pycocotools(tmp_path: Path) -> None:
    evaluator = add_all(CocoEvaluator(TRUTH), DETECTIONS)
    metrics = evaluator.summarize()
    path = tmp_path / "new" / "results.json"
    evaluator.write_results(path)
    results = json.loads(path.read_text())
    assert len(results) == sum(len(scores) for _, _, scores, _, _ in DETECTIONS)
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    text = evaluator.table()
    for kind, prefix in (("bbox", "box"), ("segm", "mask")):
        official = pycocotools(TRUTH, results, kind)
        assert 0.05 < official.stats[0] < 0.95 and (official.stats > 0).all()
        np.testing.assert_allclose(evaluator.statistics[kind], official.stats, rtol=0, atol=1e-12)
        ours = [metrics[f"{prefix}_{name}"] for name in names]
        np.testing.assert_allclose(ours, 100 * official.stats[:6], rtol=0, atol=1e-10)
        assert f"Evaluation of {kind}\n{official.text.rstrip()}" in text
        precision = official.eval["precision"][:, :, :, 0, -1]
        right = {
            f"thing {number}": 100 * precision[:, :, n].mean()
            for n, number in enumerate(sorted(IDS))
        }
        assert right.pop(f"thing {max(IDS)}") == -100
        assert evaluator.class_ap[prefix] == pytest.approx(right, abs=1e-10)


def test_metrics_of_one_kind() -> None:
    boxes_only = CocoEvaluator(TRUTH, ["bbox"])
    for image_id, boxes, scores, labels, _ in DETECTIONS:
        boxes_only.add(image_id, boxes, scores, labels)
    both = add_all(CocoEvaluator(TRUTH), DETECTIONS)
    metrics, masks = both.summarize(), add_all(CocoEvaluator(TRUTH, ["segm"]), DETECTIONS)
    assert boxes_only.summarize() == {k: v for k, v in metrics.items() if k.startswith("box_")}
    assert masks.summarize() == {k: v for k, v in metrics.items() if k.startswith("mask_")}


def test_double_precision_is_kept(tmp_path: Path) -> None:
    box, score = [0.1, 0.2, 10.1, 20.3], 0.123456789012345
    evaluator = CocoEvaluator(TRUTH, ["bbox"])
    evaluator.add(1000, np.array([box]), np.array([score]), np.array([2]))
    evaluator.write_results(tmp_path / "results.json")
    xywh = [0.1, 0.2, 10.1 - 0.1, 20.3 - 0.2]
    entry = {"image_id": 1000, "category_id": 17, "bbox": xywh, "score": score}
    assert json.loads((tmp_path / "results.json").read_text()) == [entry]


class FakeIndex:
    """The part of an index that is asked for, with labels in an order of its own."""

    @property
    def classes(self) -> list[str]:
        return [f"thing {number}" for number in IDS]

    @property
    def category_ids(self) -> list[int]:
        return IDS

    def __len__(self) -> int:
        return len(TRUTH["images"])

    def image_id(self, index: int, /) -> int:
        return int(TRUTH["images"][index]["id"])

    def size(self, index: int, /) -> tuple[int, int]:
        return TRUTH["images"][index]["height"], TRUTH["images"][index]["width"]

    def to_coco_dict(self, *, outlines: bool = True) -> dict[str, Any]:
        assert outlines
        return TRUTH


def test_sources_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    encoded = copy.deepcopy(TRUTH)
    encoded["annotations"].append({**encoded["annotations"][0], "image_id": 123456789})
    encoded["annotations"].append({**encoded["annotations"][0], "category_id": 123456789})
    path.write_text(json.dumps(encoded))
    right = add_all(CocoEvaluator(TRUTH), DETECTIONS).summarize()
    assert add_all(CocoEvaluator(path), DETECTIONS).summarize() == right
    evaluator = CocoEvaluator(FakeIndex())
    to_label = np.array([IDS.index(number) for number in sorted(IDS)])
    for image_id, boxes, scores, labels, rles in DETECTIONS:
        evaluator.add(image_id, boxes, scores, to_label[labels], rles)
    assert evaluator.summarize() == pytest.approx(right, abs=1e-10)


def test_no_detections_at_all(tmp_path: Path) -> None:
    evaluator = CocoEvaluator(TRUTH)
    evaluator.add(1000, np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), [])
    metrics = evaluator.summarize()
    assert len(metrics) == 12 and set(metrics.values()) == {0.0}
    evaluator.write_results(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_what_has_no_objects_has_no_metric() -> None:
    truth = copy.deepcopy(TRUTH)
    for annotation in truth["annotations"]:
        annotation["area"] = 10.0
    metrics = add_all(CocoEvaluator(truth), DETECTIONS).summarize()
    left = {"box_AP", "box_AP50", "box_AP75", "box_APs"}
    assert set(metrics) == left | {name.replace("box", "mask") for name in left}
    assert all(math.isfinite(value) for value in metrics.values())
    truth["annotations"] = []
    with pytest.raises(UserError, match="nothing to compare with"):
        add_all(CocoEvaluator(truth), DETECTIONS).summarize()


@pytest.mark.parametrize("given", [{"area": None}, {}])
def test_an_absent_area_is_the_boxs(given: dict[str, None]) -> None:
    truth, boxes = copy.deepcopy(TRUTH), copy.deepcopy(TRUTH)
    for annotation, other in zip(truth["annotations"], boxes["annotations"], strict=True):
        del annotation["area"]
        annotation |= given
        other["area"] = other["bbox"][2] * other["bbox"][3]
    right = add_all(CocoEvaluator(boxes), DETECTIONS).summarize()
    assert add_all(CocoEvaluator(truth), DETECTIONS).summarize() == right


@pytest.mark.parametrize("odd", [{"area": "much"}, {"bbox": [1, 2, "three", 4]}, {"area": []}])
def test_numbers_that_are_none_are_told(odd: dict[str, object]) -> None:
    truth = copy.deepcopy(TRUTH)
    truth["annotations"][3] |= odd
    number = truth["annotations"][3]["id"]
    with pytest.raises(UserError, match=f"Annotation {number} has a box or an area of no numbers"):
        add_all(CocoEvaluator(truth), DETECTIONS).summarize()


def test_annotation_ids_do_not_matter() -> None:
    """To pycocotools an object with id 0 is never found."""
    truth = copy.deepcopy(TRUTH)
    for annotation in truth["annotations"]:
        annotation["id"] = 0
    right = add_all(CocoEvaluator(TRUTH), DETECTIONS).summarize()
    assert add_all(CocoEvaluator(truth), DETECTIONS).summarize() == right


def test_objects_without_an_outline_count_for_boxes_only() -> None:
    truth = copy.deepcopy(TRUTH)
    kept = [n for n in range(len(truth["annotations"])) if n % 4]
    for number, annotation in enumerate(truth["annotations"]):
        if number not in kept:
            annotation["segmentation"] = []
    evaluator = add_all(CocoEvaluator(truth), DETECTIONS)
    metrics = evaluator.summarize()
    boxes = add_all(CocoEvaluator(TRUTH), DETECTIONS).summarize()
    truth["annotations"] = [truth["annotations"][n] for n in kept]
    masks = add_all(CocoEvaluator(truth, ["segm"]), DETECTIONS).summarize()
    assert metrics == {**{k: v for k, v in boxes.items() if k.startswith("box_")}, **masks}
    without = len(TRUTH["annotations"]) - len(kept)
    assert evaluator.table().endswith(f"{without} objects have no outline and count for boxes only")


def test_classes_of_one_name_are_told_apart() -> None:
    truth = copy.deepcopy(TRUTH)
    for category in truth["categories"][:3]:
        category["name"] = "twin"
    evaluator = add_all(CocoEvaluator(truth, ["bbox"]), DETECTIONS)
    evaluator.summarize()
    names = {"twin (3)", "twin (17)", "thing 44", "thing 1", "thing 60"}
    assert set(evaluator.class_ap["box"]) == names


# ------------------------------------------------------------------------------------------------
# Mistakes.


def change(**columns: Any) -> Arrays:
    arrays = dict(
        zip(["image_id", "boxes", "scores", "labels", "rles"], DETECTIONS[0], strict=True)
    )
    values = {**arrays, **columns}
    return tuple(values.values())  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (change(image_id=4), r"Image id 4 .* 24 images"),
        (change(labels=np.full(30, 6)), r"Image id 1000 .* class 6, .* classes 0 to 5"),
        (change(labels=np.full(30, -1)), r"class -1"),
        (change(scores=np.full(30, np.nan)), r"Image id 1000 .* no finite number"),
        (change(boxes=np.full((30, 4), np.inf)), r"Image id 1000 .* no finite number"),
    ],
)
def test_detections_of_another_data_set_are_refused(arrays: Arrays, message: str) -> None:
    evaluator = CocoEvaluator(TRUTH)
    with pytest.raises(UserError, match=message):
        evaluator.add(*arrays)
    metrics = add_all(evaluator, DETECTIONS).summarize()
    assert metrics == add_all(CocoEvaluator(TRUTH), DETECTIONS).summarize()


def test_detections_added_twice_are_refused() -> None:
    evaluator = add_all(CocoEvaluator(TRUTH), DETECTIONS)
    with pytest.raises(UserError, match="image id 963 were added twice"):
        evaluator.add(*DETECTIONS[1])


def without(key: str) -> str:
    truth = copy.deepcopy(TRUTH)
    del truth["annotations"][7][key]
    return json.dumps(truth)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Cannot read the annotations .*instances.json: No such file"),
        ("{", "are no JSON"),
        (json.dumps(TRUTH)[:-100], "are no JSON"),
        ("[]", "have no images, annotations and categories"),
        ('{"images": [], "annotations": []}', "have no images, annotations and categories"),
        (without("bbox"), "annotation 4993 has no bbox"),
        (without("category_id"), "annotation 4993 has no category_id"),
        (json.dumps({**TRUTH, "images": [{"id": 1}]}), "an entry has no 'height'"),
        (json.dumps({**TRUTH, "annotations": [5]}), "not COCO's instances"),
    ],
)
def test_other_annotations_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        CocoEvaluator(path)


@pytest.mark.parametrize(
    "outline", [[[1.0]], [["a"] * 6], {"size": [5, 5], "counts": [25]}, {"counts": "1"}, 5]
)
def test_broken_outlines_are_named(outline: Any) -> None:
    truth = copy.deepcopy(TRUTH)
    truth["annotations"][7]["segmentation"] = outline
    evaluator = add_all(CocoEvaluator(truth), DETECTIONS)
    with pytest.raises(UserError, match="annotation 4993 cannot be used"):
        evaluator.summarize()


@pytest.mark.parametrize("outline", [[[1.0]], {"size": [5, 5], "counts": [25]}])
def test_broken_outlines_are_told_before_a_run_too(outline: Any, tmp_path: Path) -> None:
    truth = copy.deepcopy(TRUTH)
    for image in truth["images"]:
        image["file_name"] = f"{image['id']}.jpg"
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth))
    check_outlines(open_index(path, None))
    truth["annotations"][7]["segmentation"] = outline
    path.write_text(json.dumps(truth))
    with pytest.raises(UserError, match=r"instances\.json: .*annotation 4993 cannot be used"):
        check_outlines(open_index(path, None))


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    evaluator = add_all(CocoEvaluator(TRUTH), DETECTIONS)
    path = tmp_path / "results.json"
    path.mkdir()
    with pytest.raises(TrainingError, match="Cannot write the detections to"):
        evaluator.write_results(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


# ------------------------------------------------------------------------------------------------
# Several processes.


def main(directory: Path) -> None:
    rank = distributed.start(torch.device("cpu")).rank
    # Any sharding: one process has no image, and each takes its own from the last to the first.
    mine = {0: DETECTIONS[1::2], 1: [], 2: DETECTIONS[0::2]}[rank][::-1]
    evaluator = add_all(CocoEvaluator(TRUTH), mine)
    found = [evaluator.summarize(), evaluator.class_ap, evaluator.table()]
    evaluator.write_results(directory / "results.json")
    twice = add_all(CocoEvaluator(TRUTH), DETECTIONS[4:5] if rank == 1 else mine)
    with pytest.raises(UserError) as caught:
        twice.summarize()
    (directory / f"{rank}.json").write_text(json.dumps([*found, str(caught.value)]))
    distributed.stop()


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(Path(__file__).resolve()), str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(3)
    ]
    try:
        assert [process.wait(timeout=90) for process in started] == [0] * 3
    finally:
        for process in started:
            process.kill()
    alone = add_all(CocoEvaluator(TRUTH), DETECTIONS)
    right = json.loads(json.dumps([alone.summarize(), alone.class_ap, alone.table()]))
    alone.write_results(tmp_path / "alone.json")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [one[:3] for one in found] == [right] * 3
    assert (tmp_path / "results.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    image_id = DETECTIONS[4][0]
    assert all(f"image id {image_id} were added twice" in one[3] for one in found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
