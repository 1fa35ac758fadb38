"""The held-out images against COCO: which words are looked for, and what counts for which class."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_runs import JSON, detections_of, draw_coco, edit, result_of
from torch import Tensor

from glip import detect, evaluate
from glip.captions import Query, TextEncoder
from glip.config import CARD_OPTIONS, Config
from glip.detect import Detections
from glip.model import build_model
from zoo_common import checkpoint
from zoo_common.config import load_config
from zoo_common.detection.batching import DetectionBatch
from zoo_common.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent))

from glip_runs import write_recipe

pytestmark = pytest.mark.device

NAMES = {2: "cat", 3: "big dog", 5: "bird", 9: "red_cup (small)"}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Settings of an evaluation of weights that nobody trained, with a file of theirs."""
    draw_coco(tmp_path / "coco", classes=NAMES)
    recipe = f"--config={write_recipe(tmp_path / 'tiny.yaml')}"
    config = load_config(Config, [recipe], CARD_OPTIONS)
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "start.pth", {"model": build_model(config).state_dict()})
    return [
        recipe,
        f"data.path={tmp_path / 'coco'}",
        f"weights.checkpoint={tmp_path / 'start.pth'}",
        f"run.output_dir={tmp_path / 'out'}",
    ]


class Oracle:
    """Finds the objects of the class whose words it is given, by the annotations.

    Attributes:
        captions: those that it was given.
        reads: whether it goes by the words; else by the place of a class in the captions.
    """

    def __init__(self, root: Path, *, reads: bool = True) -> None:
        self.captions: list[str] = []
        self.reads = reads
        content = json.loads((root / JSON.format("val")).read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        self._places = {name: place for place, name in enumerate(names.values())}
        self._encoder = TextEncoder(Path(__file__).parent / "fixtures" / "bert_tiny", 32)
        self._objects: dict[tuple[int, int], list[tuple[str, list[float]]]] = {}
        for image in content["images"]:
            there = [item for item in content["annotations"] if item["image_id"] == image["id"]]
            key = (image["height"], image["width"])
            found = [(names[item["category_id"]], item["bbox"]) for item in there]
            # Images of one size have the same objects, but for one that has less of them.
            self._objects[key] = max(self._objects.get(key, []), found, key=len)

    def read(
        self, model: torch.nn.Module, queries: Sequence[Query], device: torch.device
    ) -> Sequence[Query]:
        assert not any(module.training for module in model.modules())
        self.captions += [query.caption.text for query in queries]
        self.device = device
        return queries

    def find(
        self, _: object, images: Tensor, sizes_B2: Tensor, wanted: Sequence[Query], *more: object
    ) -> list[Detections]:
        first, parts = 0, []
        for query in wanted:
            found = [self._in_image(query, first, size) for size in sizes_B2.tolist()]
            first = (first + len(query.labels)) % len(self._places)
            most = max(1, *map(len, found))
            rows = [boxes + [(0, [0.0] * 4)] * (most - len(boxes)) for boxes in found]
            boxes_BK4 = torch.tensor([[box for _, box in row] for row in rows])
            labels_BK = torch.tensor([[label for label, _ in row] for row in rows])
            counts_B1 = torch.tensor([[len(boxes)] for boxes in found])
            valid_BK = torch.arange(most) < counts_B1
            part = Detections(boxes_BK4, valid_BK.float(), labels_BK, valid_BK)
            parts.append(Detections(*(tensor.to(self.device) for tensor in part)))
        return parts

    def _in_image(self, query: Query, first: int, size: list[int]) -> list[tuple[int, list[float]]]:
        original = (80, 64) if size[0] > size[1] else (64, 80)
        scale = [size[1] / original[1], size[0] / original[0]] * 2
        found = []
        for row, label in enumerate(query.labels):
            (span,) = query.caption.spans[row]
            name = {"red cup ": "red_cup (small)"}.get(*[query.caption.text[slice(*span)]] * 2)
            assert query.map_NT[row].any()
            for other, (x, y, width, height) in self._objects[original]:
                if other == name if self.reads else self._places[other] == first + row:
                    box = (x, y, x + width - 1, y + height - 1)
                    found.append((label, [s * edge for s, edge in zip(scale, box, strict=True)]))
        return found


def score(
    words: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *more: str,
    reads: bool = True,
) -> tuple[dict[str, Any], Oracle]:
    """The metrics of the oracle."""
    oracle = Oracle(tmp_path / "coco", reads=reads)
    monkeypatch.setattr(detect, "read", oracle.read)
    monkeypatch.setattr(detect, "find", oracle.find)
    evaluate.main([*words, *more])
    return result_of(tmp_path / "out"), oracle


@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_what_the_words_mean_scores_in_full(
    chunk: int, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Boxes to the pixel of the file, classes by their numbers, in one caption and in several."""
    more = [f"evaluate.chunk={chunk}", "evaluate.batch_size=2", "data.min_size_test=96"]
    result, oracle = score(words, monkeypatch, tmp_path, *more)
    assert result["metric"]["name"] == "box_AP"
    assert result["metric"]["value"] == pytest.approx(100)
    each = ["cat", "big dog", "bird", "red cup "]
    parts = {0: [each], 1: [[name] for name in each], 3: [each[:3], each[3:]]}[chunk]
    assert oracle.captions == [". ".join(part) for part in parts]
    found = detections_of(tmp_path / "out")
    content = json.loads((tmp_path / "coco" / JSON.format("val")).read_text())
    wanted = sorted(content["annotations"], key=lambda item: (item["image_id"], item["bbox"]))
    assert [item["category_id"] for item in found] == [item["category_id"] for item in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


@pytest.mark.parametrize("reads", [True, False])
def test_exchanged_names_cost_the_score_of_what_reads_them(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, reads: bool
) -> None:
    """And nothing that of what goes by the place of a class in the caption."""
    more = "evaluate.shuffle_words=true"
    result, oracle = score(words, monkeypatch, tmp_path, more, reads=reads)
    assert oracle.captions == ["cat. big dog. bird. red cup ", "big dog. bird. red cup . cat"]
    metrics = result["metrics"]
    assert metrics["box_AP50"] == pytest.approx(100)
    if reads:  # objects overlap, so that something is hit under the wrong name
        assert metrics["box_AP50_shuffled"] < 26 and metrics["words_share"] > 74
    else:
        assert metrics["box_AP50_shuffled"] == pytest.approx(100)
        assert metrics["words_share"] == pytest.approx(0)


def test_a_score_of_nothing_owes_nothing_to_words() -> None:
    assert evaluate.share_of_words(0.0, 0.0) == {"box_AP50_shuffled": 0.0, "words_share": 0.0}


def test_a_network_is_scored_on_each_image_and_says_how_many_captions(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([*words, "model.static_shapes=on", "evaluate.chunk=2"])
    result = result_of(tmp_path / "out")
    assert result["metric"]["name"] == "box_AP"
    found = detections_of(tmp_path / "out")
    counts = {item["image_id"]: 0 for item in found}
    for item in found:
        counts[item["image_id"]] += 1
    assert len(counts) == 4 and all(10 < count <= 20 for count in counts.values())
    assert "4 classes are looked for in 2 captions" in capsys.readouterr().out


def one_class(content: dict[str, Any]) -> None:
    content["categories"] = content["categories"][:1]
    content["annotations"] = [i for i in content["annotations"] if i["category_id"] == 2]


def twins(content: dict[str, Any]) -> None:
    content["categories"][1]["name"] = "cat"


def long(content: dict[str, Any]) -> None:
    content["categories"][1]["name"] = "person " * 40


REFUSED = {
    "one class to exchange": (one_class, ["evaluate.shuffle_words=true"], "there is one class"),
    "twins": (twins, [], "The class name 'cat' occurs twice"),
    "a long name": (long, [], "more than the 32 of model.max_tokens"),
    "no BERT": (lambda _: None, ["model.bert=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_looked_for_is_told(case: str, words: list[str], tmp_path: Path) -> None:
    change, more, said = REFUSED[case]
    edit(tmp_path / "coco", "val", change)
    with pytest.raises(UserError, match=said):
        evaluate.main([*words, *more])


def test_published_weights_are_float32_and_counters_stay_whole() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    formats = {key: value.dtype for key, value in evaluate.weights_of(model).items()}
    assert formats.pop("1.num_batches_tracked") is torch.int64
    assert set(formats.values()) == {torch.float32}


def test_empty_slots_are_left_out_and_an_image_may_have_nothing() -> None:
    valid_BK = torch.tensor([[True, False], [False, False]])
    boxes_BK4 = torch.tensor([[[1.0, 2, 3, 4], [0] * 4], [[0] * 4] * 2])
    found = Detections(boxes_BK4, valid_BK.float(), valid_BK.long(), valid_BK)
    batch = DetectionBatch(*[None] * len(DetectionBatch._fields))  # type: ignore[arg-type]
    batch = batch._replace(
        sizes_B2=torch.tensor([[40, 80]] * 2),
        originals_B2=torch.tensor([[20, 160]] * 2),
        image_ids_B=torch.tensor([7, 9]),
    )
    one, none = evaluate.to_originals(found, batch)
    assert one.image_id == 7 and one.boxes_D4.tolist() == [[2, 1, 7, 3]]
    assert one.scores_D.tolist() == [1] and one.labels_D.tolist() == [1]
    assert none.image_id == 9 and none.boxes_D4.shape == (0, 4) and len(none.labels_D) == 0
