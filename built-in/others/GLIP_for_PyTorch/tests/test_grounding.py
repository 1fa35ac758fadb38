"""Captions whose phrases have boxes: MDETR's JSON, and its mixture with COCO."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from glip import data
from glip.captions import TextEncoder
from glip.config import CARD_OPTIONS, Config
from glip.data import Batch
from glip.grounding import GroundingIndex, Mixture, open_grounding
from zoo_common import sample
from zoo_common.config import load_config
from zoo_common.detection.coco import open_index
from zoo_common.distributed import Processes
from zoo_common.errors import UserError
from zoo_common.run import Run

TINY = Path(__file__).parent / "fixtures" / "bert_tiny"
GROUNDING = "annotations/grounding_train2017.json"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "sample"
    return sample.make_at(path, layout="grounding", train=16, val=4, size=64)


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(TINY, 64)


def batches_of(root: Path, *words: str) -> list[Batch]:
    given = [
        f"--data_path={root}",
        f"model.bert={root / 'bert-sample'}",
        "data.workers=0",
        "data.min_sizes=[64]",
        "data.batch_size=2",
        "solver.max_epoch=1",
    ]
    config = load_config(Config, [*given, *words], CARD_OPTIONS)
    processes = Processes(0, 0, 1, 1, 1)
    run = cast(Run, SimpleNamespace(processes=processes, device=torch.device("cpu")))
    encoder = data.open_encoder(config)
    return list(data.train_stream(config, data.open_train(config, encoder), encoder, run))


def content(root: Path, name: str = GROUNDING) -> Json:
    return cast(Json, json.loads((root / name).read_text()))


# ---------------------------------------------------------------------------- what it says


def phrases(text: str, spans: list[list[int]]) -> str:
    return "".join(text[begin:end].replace(" ", "") for begin, end in spans)


def test_tokens_of_a_box_are_its_phrase(root: Path) -> None:
    """Under both kinds of captions, for each box of the sample, turned around or not."""
    words = (root / "bert-sample" / "vocab.txt").read_text().splitlines()
    told = content(root)
    seen = Counter()
    for batch in batches_of(root, f"data.grounding_json={GROUNDING}", "data.train_json="):
        assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
        assert batch.detection.flipped_B is not None
        for row, id_ in enumerate(batch.detection.image_ids_B.tolist()):
            (image,) = [item for item in told["images"] if item["id"] == id_]
            tokens = np.array(words)[batch.text.tokens_BT[row].numpy()]
            mask_T = batch.text.mask_BT[row].numpy()
            said = "".join(tokens[mask_T][1:-1])
            assert said == image["caption"].replace(" ", "")
            valid_Q = batch.detection.valid_BQ[row]
            own = [item for item in told["annotations"] if item["image_id"] == id_]
            assert len(own) == valid_Q.sum()
            for item, tokens_T, box in zip(
                own, batch.tokens_BQT[row][valid_Q], batch.boxes_BQ4[row][valid_Q], strict=True
            ):
                x, y, w, h = item["bbox"]
                left = 64 - (x + w - 1) - 1 if batch.detection.flipped_B[row] else x
                assert box.tolist() == [left, y, left + w - 1, y + h - 1]
                assert "".join(tokens[tokens_T.numpy()]) == phrases(
                    image["caption"], item["tokens_positive"]
                )
            seen[id_] += 1
    assert set(seen) == {item["id"] for item in told["images"]} and set(seen.values()) == {1}


def write_grounding(root: Path, edit: Callable[[Json], None] | None = None) -> Path:
    """Two images with captions: three boxes, of which one is meant by two words."""
    for name in ("1.png", "vg/2.png"):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path)
    size = {"height": 30, "width": 40}
    told: Json = {
        "images": [
            {"id": 7, "file_name": "2.png", "data_source": "vg", "caption": "a car", **size},
            {"id": 3, "file_name": "1.png", "caption": "Ein Ähre, dog and the dog", **size},
        ],
        "annotations": [
            box(1, 7, [[2, 5]]),
            box(2, 3, [[10, 13], [22, 25]], [1, 2, 20, 8]),
            box(3, 3, [[4, 8]], [0, 0, 5, 5]),
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
    if edit is not None:
        edit(told)
    path = root / "grounding.json"
    path.write_text(json.dumps(told))
    return path


def box(
    id_: int, image_id: int, spans: list[list[int]] | None, bbox: list[float] | None = None
) -> Json:
    item: Json = {"id": id_, "image_id": image_id, "category_id": 1, "iscrowd": 0, "area": 9.0}
    item["bbox"] = bbox or [3.0, 4.0, 5.0, 6.0]
    return item if spans is None else item | {"tokens_positive": spans}


def test_images_come_with_the_spans_of_their_objects(tmp_path: Path, encoder: TextEncoder) -> None:
    path = write_grounding(tmp_path)
    for _ in range(2):  # built, and mapped
        index = open_grounding(path, tmp_path / "images", encoder)
        assert [index.image_id(i) for i in range(2)] == [3, 7]
        assert [index.item_id(i) for i in range(2)] == ["1.png", "vg/2.png"]
        assert index.path(1) == str(tmp_path / "images" / "vg" / "2.png")
        caption = index.caption(0)
        assert caption.text == "Ein Ähre, dog and the dog"
        assert caption.spans == [[(10, 13), (22, 25)], [(4, 8)]]
        assert index.objects(0).labels_N.tolist() == [0, 1]
        assert index.caption(1).spans == [[(2, 5)]]
    dog = encoder.token_map(caption)[0].nonzero().flatten().tolist()
    tokens = encoder([caption.text]).tokens_BT[0][dog]
    assert tokens.tolist() == [84, 84]  # dog
    again = pickle.loads(pickle.dumps(index))
    assert isinstance(again, GroundingIndex) and again.caption(0) == caption
    counts = "2 images (0 without annotations), 3 annotations (0 crowd regions), 1 classes"
    assert index.describe() == f"grounding.json: {counts}"


def test_what_is_left_out_is_counted(tmp_path: Path, encoder: TextEncoder) -> None:
    def edit(told: Json) -> None:
        told["annotations"] += [box(4, 3, None), box(5, 3, [[9, 10]]), box(6, 3, [])]
        long = told["images"][0] | {"id": 8, "caption": "dog " * 63, "file_name": "2.png"}
        told["images"].append(long)
        told["annotations"].append(box(9, 8, [[0, 3]]))

    index = open_grounding(write_grounding(tmp_path, edit), tmp_path / "images", encoder)
    assert [index.image_id(i) for i in range(len(index))] == [3, 7]
    assert len(index.objects(0).labels_N) == 2 and index.most_objects == 2
    assert index.describe().splitlines()[1:] == [
        "  3 boxes are meant by no word: left out",
        "  1 captions have too many tokens: left out",
    ]


# ---------------------------------------------------------------------------- mixture


def test_two_kinds_of_data_sets_in_one_run(root: Path) -> None:
    """An epoch has each image of each of them once, with the captions of its kind."""
    batches = batches_of(root, f"data.grounding_json={GROUNDING}", "data.shuffle_classes=true")
    words = (root / "bert-sample" / "vocab.txt").read_text().splitlines()
    coco, grounded = content(root, "annotations/instances_train2017.json"), content(root)
    captions = {image["caption"].replace(" ", "") for image in grounded["images"]}
    classes = sorted(item["name"] for item in coco["categories"])
    kinds, both = Counter(), 0
    for batch in batches:
        assert batch.tokens_BQT is not None
        assert torch.equal(batch.tokens_BQT.any(-1), batch.detection.valid_BQ)
        of_batch = set()
        for tokens_T, mask_T in zip(*batch.text, strict=True):
            said = [words[number] for number in tokens_T[mask_T].tolist()][1:-1]
            known = "".join(said) in captions
            assert known or sorted(said[::2]) == classes
            of_batch.add(known)
            kinds[known] += 1
        both += len(of_batch) == 2
    pictures = {item["image_id"] for item in coco["annotations"] if not item["iscrowd"]}
    expected = {True: len(grounded["images"]), False: len(pictures)}
    assert kinds.total() >= sum(expected.values()) - 1  # whole batches
    assert all(expected[kind] - count in (0, 1) for kind, count in kinds.items())
    assert both > 2


def test_a_mixture_is_its_parts_in_a_row(root: Path, tmp_path: Path, encoder: TextEncoder) -> None:
    one = open_index(root / "annotations/instances_val2017.json", root / "val2017")
    other = open_grounding(write_grounding(tmp_path), tmp_path / "images", encoder)
    both = Mixture((one, other))
    assert len(both) == 6
    assert both.sizes().tolist() == [*one.sizes().tolist(), [30, 40], [30, 40]]
    assert both.trainable().tolist() == [*one.trainable().tolist(), 4, 5]
    assert both.most_objects == max(one.most_objects, 2)
    assert both.most_edges == one.most_edges
    for index, (part, place) in enumerate([*((one, i) for i in range(4)), (other, 0), (other, 1)]):
        assert both.at(index) == (part, place)
        assert both.path(index) == part.path(place)
        assert both.item_id(index) == part.item_id(place)
        assert both.image_id(index) == part.image_id(place)
        assert both.size(index) == part.size(place)
        assert np.array_equal(both.objects(index).boxes_N4, part.objects(place).boxes_N4)
        assert len(both.outlines(index)) == len(part.outlines(place))
        assert np.array_equal(both.mask_runs(index), part.mask_runs(place))
    assert both.describe().splitlines() == [one.describe(), other.describe()]


# ---------------------------------------------------------------------------- bad input


def put(*path: str | int, value: Any) -> Callable[[Json], None]:
    def edit(told: Json) -> None:
        place: Any = told
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            put("annotations", 0, "tokens_positive", value=[[2, 6]]),
            r"1 spans .* outside of their captions, the first is \[2, 6\] of annotation 1, where "
            r"image 7's caption has 5 characters; mend them",
        ),
        (put("annotations", 0, "tokens_positive", value=[[-1, 3]]), r"first is \[-1, 3\] of"),
        (put("annotations", 0, "tokens_positive", value=[[3, 3]]), r"first is \[3, 3\] of"),
        (put("annotations", 0, "tokens_positive", value=[3, 4]), r"is no grounding JSON \(\w+"),
        (put("annotations", 0, "tokens_positive", value=[[0, 1, 2]]), "is no grounding JSON"),
        (put("images", 1, "caption", value=" "), r"1 of the 2 captions .* empty.*that of image 3"),
        (put("images", 0, "caption", value=None), r"1 of the 2 captions .* empty.*of image 7"),
        (put("images", 0, "caption", value=5), "is no grounding JSON"),
        (put("annotations", 0, "image_id", value=99), r"image_id 99|image 99"),
        (put("images", 0, "file_name", value="9.png"), r"1 of the 2 images of .*vg/9.png"),
        (put("images", value=[]), "lists no images"),
        (put("annotations", value={}), "annotations"),
    ],
)
def test_json_that_cannot_be_trained_on(
    edit: Callable[[Json], None], said: str, tmp_path: Path, encoder: TextEncoder
) -> None:
    path = write_grounding(tmp_path, edit)
    with pytest.raises(UserError, match=said) as caught:
        open_grounding(path, tmp_path / "images", encoder)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_captions_that_all_are_too_long(tmp_path: Path) -> None:
    path = write_grounding(tmp_path)
    with pytest.raises(UserError, match=r"No caption in .* has at most 3 tokens; give a larger"):
        open_grounding(path, tmp_path / "images", TextEncoder(TINY, 3))
