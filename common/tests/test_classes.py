"""The classes of a run: agreed on, kept with a checkpoint, and compared when it is used."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from detector_runs import JSON, annotation, draw_coco, edit

from zoo_common.detection.classes import (
    COCO_CLASSES,
    agree_on_classes,
    check_classes,
    check_objects,
    class_names,
    read_classes,
    write_classes,
)
from zoo_common.detection.coco import CocoIndex, open_index
from zoo_common.errors import UserError
from zoo_common.run import Run


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return draw_coco(tmp_path / "coco", train=2, val=1)


def index_of(coco: Path, split: str, *, masks: bool = False) -> CocoIndex:
    return open_index(coco / JSON.format(split), coco / f"{split}2017", masks=masks)


def run_at(checkpoints: Path, *, main: bool = True) -> Run:
    """What the functions here ask of a run."""
    processes = SimpleNamespace(is_main=main)
    return cast(Run, SimpleNamespace(processes=processes, checkpoints=checkpoints))


def test_classes_must_agree(coco: Path) -> None:
    both = index_of(coco, "train"), index_of(coco, "val")
    assert agree_on_classes(*both) == agree_on_classes(*both, 2) == ["cat", "big dog"]
    with pytest.raises(UserError, match=r"^model\.num_classes is 80, but .* has 2 categories"):
        agree_on_classes(*both, 80)
    with pytest.raises(UserError, match=r"^--classes is 3, but "):
        agree_on_classes(*both, 3, option="--classes")

    def rename(content: dict[str, Any]) -> None:
        content["categories"][1]["name"] = "small dog"

    edit(coco, "val", rename)
    with pytest.raises(UserError, match=r"id 7 is 'big dog' in .*train2017\.json, but 'small dog'"):
        agree_on_classes(both[0], index_of(coco, "val"))
    edit(coco, "val", lambda content: content["categories"].append({"id": 9, "name": "cow"}))
    with pytest.raises(UserError, match=r"list different categories \(ids \[9\] stand in one only"):
        agree_on_classes(both[0], index_of(coco, "val"))


def test_class_names_are_kept_a_line_each(coco: Path, tmp_path: Path) -> None:
    edit(coco, "val", lambda content: content["categories"][1].update(name="Bär\n\u2028 zwei"))
    index = index_of(coco, "val")
    checkpoint = tmp_path / "kept" / "best.pth"
    assert read_classes(checkpoint) is None
    check_classes(index, checkpoint)  # nothing is known
    write_classes(index.classes, run_at(checkpoint.parent))
    assert read_classes(checkpoint) == ["cat", "Bär zwei"]
    check_classes(index, checkpoint)
    write_classes(["cat"], run_at(checkpoint.parent))
    with pytest.raises(UserError, match=r"other classes than .* \('-' there, 'Bär zwei' here\)"):
        check_classes(index, checkpoint)
    write_classes(["other"], run_at(checkpoint.parent, main=False))
    assert read_classes(checkpoint) == ["cat"]
    (tmp_path / "kept" / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"classes\.txt cannot be read"):
        read_classes(checkpoint)


def test_annotations_without_objects_are_refused(coco: Path) -> None:
    check_objects(index_of(coco, "train", masks=True))
    crowds = [annotation(15, 3, (5, 5, 20, 20)) | {"iscrowd": 1, "id": 1}]
    edit(coco, "train", lambda content: content.update(annotations=crowds))
    with pytest.raises(UserError, match="has an object with an outline, crowd regions aside"):
        check_objects(index_of(coco, "train", masks=True))
    with pytest.raises(UserError, match="has an object, crowd regions aside"):
        check_objects(index_of(coco, "train"))
    boxes = [annotation(15, 3, (5, 5, 20, 20)) | {"segmentation": [], "id": 1}]
    edit(coco, "train", lambda content: content.update(annotations=boxes))
    with pytest.raises(UserError, match="has an object with an outline"):
        check_objects(index_of(coco, "train", masks=True))
    check_objects(index_of(coco, "train"))


def test_names_to_draw_with(tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "best.pth", tmp_path / "names.txt"
    assert class_names(checkpoint, None, 2) == ["class 0", "class 1"]
    assert class_names(checkpoint, None, 80) == COCO_CLASSES
    assert len(set(COCO_CLASSES)) == 80 and COCO_CLASSES[-1] == "toothbrush"
    write_classes(["cat", "big dog"], run_at(tmp_path))
    assert class_names(checkpoint, None, 2) == ["cat", "big dog"]
    file.write_text("Bär\nHund\n", encoding="utf-8")
    assert class_names(checkpoint, file, 2) == ["Bär", "Hund"]
    for given in (None, file):
        with pytest.raises(UserError, match=r"2 class names, but .*best\.pth has 80 classes"):
            class_names(checkpoint, given, 80)
    with pytest.raises(UserError, match=r"--classes: cannot read .*none\.txt: No such file"):
        class_names(checkpoint, tmp_path / "none.txt", 2)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"names\.txt is no UTF-8 text: give a name a line"):
        class_names(checkpoint, file, 2)
