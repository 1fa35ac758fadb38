"""Images, boxes and captions of a run, from its config."""

import json
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
from zoo_common import sample
from zoo_common.config import load_config
from zoo_common.distributed import Processes
from zoo_common.errors import UserError
from zoo_common.run import Run

TRAIN, VAL = 24, 9


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "sample"
    return sample.make_at(path, layout="grounding", train=TRAIN, val=VAL, size=(96, 80))


def settings(root: Path, *words: str) -> Config:
    given = [
        f"--data_path={root}",
        f"model.bert={root / 'bert-sample'}",
        "data.workers=0",
        "data.min_sizes=[64,80,96]",
        "data.max_size=120",
        "data.min_size_test=80",
        "data.max_size_test=128",
        "data.batch_size=4",
        "data.shuffle_classes=true",
        "solver.max_epoch=2",
    ]
    return load_config(Config, [*given, *words], CARD_OPTIONS)


def run_of(rank: int = 0, world_size: int = 1) -> Run:
    """What the functions here ask of a run."""
    processes = Processes(rank, rank, world_size, world_size, 1)
    return cast(Run, SimpleNamespace(processes=processes, device=torch.device("cpu")))


def train_batches(config: Config, rank: int = 0, world_size: int = 1) -> list[Batch]:
    encoder = data.open_encoder(config)
    source = data.open_train(config, encoder)
    return list(data.train_stream(config, source, encoder, run_of(rank, world_size)))


def instances(root: Path, split: str = "train") -> dict[str, Any]:
    path = root / "annotations" / f"instances_{split}2017.json"
    return cast(dict[str, Any], json.loads(path.read_text()))


def words_of(root: Path) -> dict[int, str]:
    lines = (root / "bert-sample" / "vocab.txt").read_text().splitlines()
    return dict(enumerate(lines))


def said(batch: Batch, row: int, words: dict[int, str]) -> list[str]:
    """The caption of an image, token by token."""
    mask_T = batch.text.mask_BT[row]
    return [words[number] for number in batch.text.tokens_BT[row][mask_T].tolist()]


# ---------------------------------------------------------------------------- boxes and words


def expected_boxes(
    annotations: list[dict[str, Any]], file: tuple[int, int], size: tuple[int, int], flipped: bool
) -> dict[int, list[float]]:
    """microsoft/GLIP's arithmetic: a pixel less in the file, clipped, resized, turned around."""
    (height, width), (new_height, new_width) = file, size
    boxes = {}
    for item in annotations:
        x, y, w, h = item["bbox"]
        x1, x2 = (min(max(v, 0), width - 1) for v in (x, x + max(w - 1, 0)))
        y1, y2 = (min(max(v, 0), height - 1) for v in (y, y + max(h - 1, 0)))
        if item["iscrowd"] or x2 <= x1 or y2 <= y1:
            continue
        x1, x2 = x1 * new_width / width, x2 * new_width / width
        y1, y2 = y1 * new_height / height, y2 * new_height / height
        if flipped:
            x1, x2 = new_width - x2 - 1, new_width - x1 - 1
        boxes[item["id"]] = [x1, y1, x2, y2]
    return boxes


def check_batch(batch: Batch, content: dict[str, Any], words: dict[int, str]) -> None:
    """Boxes are upstream's, and the tokens of each are its class."""
    assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
    detection = batch.detection
    assert detection.flipped_B is not None
    names = {item["id"]: item["name"] for item in content["categories"]}
    assert batch.boxes_BQ4.dtype == torch.float32 and batch.tokens_BQT.dtype == torch.bool
    assert batch.tokens_BQT.shape == (*batch.boxes_BQ4.shape[:2], batch.text.tokens_BT.shape[1])
    assert not batch.boxes_BQ4[~detection.valid_BQ].any()
    assert not batch.tokens_BQT[~detection.valid_BQ].any()
    for row, image_id in enumerate(detection.image_ids_B.tolist()):
        own = [item for item in content["annotations"] if item["image_id"] == image_id]
        file, size = (tuple(t[row].tolist()) for t in (detection.originals_B2, detection.sizes_B2))
        boxes = expected_boxes(own, file, size, bool(detection.flipped_B[row]))
        valid_Q = detection.valid_BQ[row]
        torch.testing.assert_close(
            batch.boxes_BQ4[row][valid_Q],
            torch.tensor(list(boxes.values())).reshape(-1, 4),
            rtol=0,
            atol=1e-3,
        )
        caption = np.array(said(batch, row, words))
        for id_, tokens_T in zip(boxes, batch.tokens_BQT[row][valid_Q], strict=True):
            (label,) = [names[item["category_id"]] for item in own if item["id"] == id_]
            assert caption[tokens_T[: len(caption)].numpy()].tolist() == [label]
            assert not tokens_T[len(caption) :].any()


def test_boxes_are_upstreams_and_their_tokens_are_their_classes(root: Path) -> None:
    content, words = instances(root), words_of(root)
    flips, captions, sizes = set(), set(), set()
    classes = sorted(item["name"] for item in content["categories"])
    for batch in train_batches(settings(root)):
        check_batch(batch, content, words)
        assert batch.detection.flipped_B is not None
        flips |= set(batch.detection.flipped_B.tolist())
        sizes |= {min(size) for size in batch.detection.sizes_B2.tolist()}
        for row in range(4):
            caption = said(batch, row, words)
            assert sorted(caption[1:-1:2]) == classes  # [CLS] a . b . c [SEP]
            assert set(caption[2:-1:2]) == {"."}
            captions.add(" ".join(caption))
    assert flips == {False, True} and sizes == {64, 80, 96}
    assert len(captions) > 30  # each image its own order, in each epoch another one


def test_classes_stand_in_their_order_without_shuffling(root: Path) -> None:
    words = words_of(root)
    names = [item["name"] for item in instances(root)["categories"]]
    for batch in train_batches(settings(root, "data.shuffle_classes=false")):
        check_batch(batch, instances(root), words)
        assert [said(batch, row, words)[1:-1:2] for row in range(4)] == [names] * 4


def test_drawn_negatives(root: Path) -> None:
    words = words_of(root)
    lengths = set()
    for batch in train_batches(settings(root, "data.negatives=3")):
        check_batch(batch, instances(root), words)
        lengths |= {len(said(batch, row, words)) for row in range(4)}
    assert len(lengths) > 3


def write_coco(root: Path, boxes: list[list[float]], names: list[str]) -> Path:
    """Four pictures of 40 x 50 with the same boxes, of classes in turn."""
    (root / "annotations").mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 1 + n, "name": name} for n, name in enumerate(names)]
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
    for number in range(4):
        name = f"{number}.png"
        for split in ("train", "val"):
            Image.new("RGB", (50, 40), (number, 0, 0)).save(root / f"{split}2017" / name)
        content["images"].append({"id": number, "file_name": name, "height": 40, "width": 50})
        for box in boxes:
            id_ = len(content["annotations"])
            item = {"id": id_, "image_id": number, "bbox": box, "area": box[2] * box[3]}
            item |= {"category_id": 1 + id_ % len(names), "iscrowd": 0}
            content["annotations"].append(item)
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content))
    return root


def test_boxes_of_one_pixel_lose_their_slot(root: Path, tmp_path: Path) -> None:
    """Upstream takes a pixel from each side and drops what has nothing left."""
    boxes = [[3, 4, 1, 9], [3.5, 4, 1.04, 9], [45, 30, 90, 90], [7, 8, 20, 0.5], [10, 8, 20, 20]]
    coco = write_coco(tmp_path / "coco", boxes, ["circle", "square"])
    bert = f"model.bert={root / 'bert-sample'}"
    for batch in train_batches(settings(coco, bert, "solver.max_epoch=20")):
        assert batch.detection.valid_BQ.tolist() == [[False, True, True, False, True]] * 4
        check_batch(batch, instances(coco), words_of(root))


# ---------------------------------------------------------------------------- the same anywhere


def items(batches: list[Batch]) -> list[tuple[Any, ...]]:
    found = []
    for batch in batches:
        assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
        for row, name in enumerate(batch.item_ids):
            valid_Q = batch.detection.valid_BQ[row]
            boxes, tokens = batch.boxes_BQ4[row][valid_Q], batch.tokens_BQT[row][valid_Q]
            text = batch.text.tokens_BT[row].tolist()
            found.append((name, text, boxes.tolist(), tokens.tolist()))
    return found


def test_captions_depend_on_neither_workers_nor_processes(root: Path) -> None:
    one = items(train_batches(settings(root, "data.group_by_aspect=false")))
    assert items(train_batches(settings(root, "data.group_by_aspect=false", "data.workers=2"))) == (
        one
    )
    ranks = [
        items(train_batches(settings(root, "data.group_by_aspect=false"), rank, 2))
        for rank in (0, 1)
    ]
    joined = [
        item
        for step in range(len(one) // 4)
        for part in ranks
        for item in part[2 * step : 2 * step + 2]
    ]
    assert joined == one
    assert items(train_batches(settings(root, "data.group_by_aspect=false", "--seed=3"))) != one


def test_a_run_can_resume_anywhere(root: Path) -> None:
    config = settings(root)
    whole = items(train_batches(config))
    encoder = data.open_encoder(config)
    stream = data.train_stream(config, data.open_train(config, encoder), encoder, run_of())
    assert stream.steps_per_epoch * 2 * 4 == len(whole)
    stream.seek(3)
    assert items(list(stream)) == whole[12:]


# ---------------------------------------------------------------------------- shapes


def test_static_shapes(root: Path) -> None:
    words = ["model.static_shapes=on", "data.buckets=[[128,128]]", "data.slots=11"]
    for batch in train_batches(settings(root, *words)):
        assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
        assert batch.detection.images_BCHW.shape == (4, 3, 128, 128)
        assert batch.detection.images_BCHW.dtype == torch.uint8
        assert batch.boxes_BQ4.shape == (4, 11, 4)
        assert batch.tokens_BQT.shape == (4, 11, 256)
        assert batch.text.tokens_BT.shape == (4, 256)
    for batch in train_batches(settings(root, "model.max_tokens=30")):
        assert batch.text.tokens_BT.shape == (4, 30)


def test_a_batch_moves_and_is_cut_as_a_whole(root: Path) -> None:
    batch = train_batches(settings(root))[0]
    moved = batch.to(torch.device("meta"))
    tensors = [moved.detection.images_BCHW, *moved.text, moved.boxes_BQ4, moved.tokens_BQT]
    assert [t.device.type for t in tensors if t is not None] == ["meta"] * 5
    parts = batch.chunk(2)
    assert items(parts) == items([batch])
    assert [len(part.item_ids) for part in parts] == [2, 2]
    assert batch.damaged == []
    whole = Batch(batch.detection, batch.text)
    assert [part.boxes_BQ4 for part in whole.chunk(2)] == [None, None]
    assert whole.to(torch.device("meta")).tokens_BQT is None


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("static", ["on", "off"])
def test_each_held_out_image_is_seen_once(root: Path, static: str) -> None:
    config = settings(root, f"model.static_shapes={static}", "evaluate.batch_size=2")
    seen = []
    for rank in range(2):
        for batch in data.eval_stream(config, data.open_val(config), run_of(rank, 2)):
            seen += batch.item_ids
            assert {min(size) for size in batch.sizes_B2.tolist()} == {80}
    names = sorted(item["file_name"] for item in instances(root, "val")["images"])
    assert sorted(seen) == names and len(seen) == VAL


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "names", "error"),
    [
        (["data.train_json="], ["a"], "nothing to train on: give data.train_json or"),
        ([], ["circle", "Circle"], r"'Circle' occurs twice \(classes 0 and 1\)"),
        ([], ["circle", "(x)"], r"Class 1 has no words \('\(x\)'\)"),
        (["model.max_tokens=4"], ["circle", "ring"], "caption of all 2 classes has 5 tokens"),
        (["data.grounding_json=none.json"], ["a"], "none.json cannot be read"),
        (["model.max_tokens=400"], ["a"], "model.max_tokens=400 is more than the 256 positions"),
        (["data.batch_size=5"], ["a"], "training set has 4 images, fewer than one global batch"),
    ],
)
def test_what_cannot_be_trained_on_is_told_first(
    words: list[str], names: list[str], error: str, root: Path, tmp_path: Path
) -> None:
    coco = write_coco(tmp_path / "coco", [[3, 4, 9, 9], [8, 8, 9, 9]], names)
    with pytest.raises(UserError, match=error) as caught:
        train_batches(settings(coco, f"model.bert={root / 'bert-sample'}", *words))
    assert "\n" not in str(caught.value)


def test_an_absent_bert(root: Path) -> None:
    with pytest.raises(UserError, match=r"no BERT directory at .*nowhere: put bert-base-uncased's"):
        data.open_encoder(settings(root, "model.bert=nowhere"))


def test_bert_beside_the_data(root: Path) -> None:
    encoder = data.open_encoder(settings(root, "model.bert=bert-sample"))
    assert isinstance(encoder, TextEncoder) and encoder.count("circle. ring") == 5
