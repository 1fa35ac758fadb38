"""From predictions to objects: against a plain loop, and what it must never do."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from detector_runs import DEVICE
from torch import Tensor
from torchvision.ops import nms

from glip import anchors, detect
from glip.captions import TextEncoder
from glip.config import Config, TestConfig
from glip.detect import Detections
from glip.head import Predictions
from glip.model import GLIP, build_model
from zoo_common import device
from zoo_common.config import load_config
from zoo_common.detection import ops

pytestmark = pytest.mark.device

WHERE = device.resolve(DEVICE)
BERT = Path(__file__).parent / "fixtures" / "bert_tiny"
SIZES = [(8, 10), (4, 5), (2, 3), (1, 2), (1, 1)]
IMAGES = [(64, 80), (50, 61)]
CELLS = sum(height * width for height, width in SIZES)
TOKENS = 24
CLASSES = [[1], [3, 4], [], [6, 7, 8], [10]]


def class_map() -> Tensor:
    map_NT = torch.zeros(len(CLASSES), TOKENS, dtype=torch.bool)
    for row, tokens in enumerate(CLASSES):
        map_NT[row, tokens] = True
    return map_NT


def draw(seed: int, loud: float = 1.5) -> Predictions:
    dice = torch.Generator().manual_seed(seed)
    return Predictions(
        torch.randn(2, CELLS, TOKENS, generator=dice) * loud - 1,
        torch.randn(2, CELLS, 4, generator=dice) * 2,
        torch.randn(2, CELLS, generator=dice),
    )


def run(predictions: Predictions, config: TestConfig) -> Detections:
    moved = Predictions(*(part.to(WHERE) for part in predictions))
    sizes_B2 = torch.tensor(IMAGES, device=WHERE)
    found = detect.detect(moved, SIZES, class_map().to(WHERE), sizes_B2, config)
    return Detections(*(part.cpu() for part in found))


def expected(
    predictions: Predictions, image: int, config: TestConfig
) -> list[tuple[float, int, list[float]]]:
    """Score, class and box of each object: microsoft's or mmdet's chain, box by box."""
    logits_AT, deltas_A4, central_A = (part[image] for part in predictions)
    anchors_A4 = anchors.make_anchors(SIZES, torch.device("cpu"))
    boxes_A4 = anchors.decode(deltas_A4, anchors_A4)
    height, width = IMAGES[image]
    limits = torch.tensor([width - 1, height - 1, width - 1, height - 1])
    boxes_A4 = boxes_A4.clamp(min=0).minimum(limits)
    candidates, first = [], 0
    for cells in (h * w for h, w in SIZES):
        level = []
        for anchor in range(first, first + cells):
            central = float(central_A[anchor].sigmoid())
            for label, tokens in enumerate(CLASSES):
                if not tokens:
                    continue
                score = float(logits_AT[anchor, tokens].sigmoid().mean())
                rank = score * central if config.rank_by == "score_centerness" else score
                if score > config.score_thr:
                    level.append((rank, (score * central) ** 0.5, label, boxes_A4[anchor]))
        candidates += sorted(level, key=lambda item: -item[0])[: config.nms_pre]
        first += cells
    kept = []
    for label in range(len(CLASSES)):
        own = [(score, box) for _, score, name, box in candidates if name == label]
        if not config.legacy_nms:
            own = [(score, box) for score, box in own if (box[2:] > box[:2]).all()]
        if not own:
            continue
        scores, boxes = torch.tensor([item[0] for item in own]), torch.stack([b for _, b in own])
        longer = torch.tensor([0, 0, 1, 1]) if config.legacy_nms else torch.zeros(4)
        for place in nms(boxes + longer, scores, config.nms_thr).tolist():
            kept.append((float(scores[place]), label, boxes[place].tolist()))
    return sorted(kept, reverse=True)[: config.max_per_img]


@pytest.mark.parametrize("rank_by", ["score_centerness", "score"])
@pytest.mark.parametrize("legacy_nms", [True, False])
@pytest.mark.parametrize("reference", [True, False])
def test_objects_are_those_of_a_plain_loop(
    rank_by: str, *, legacy_nms: bool, reference: bool
) -> None:
    config = TestConfig(0.2, 40, 0.4, 50, rank_by, legacy_nms)
    for seed in range(3):
        predictions = draw(seed)
        with ops.implementation("reference") if reference else torch.no_grad():
            found = run(predictions, config)
        for image in range(2):
            wanted = expected(predictions, image, config)
            count = int(found.valid_BK[image].sum())
            assert count == len(wanted) and 10 < count <= 50
            assert found.valid_BK[image, :count].all()
            scores, labels, boxes = zip(*wanted, strict=True)
            torch.testing.assert_close(found.scores_BK[image, :count], torch.tensor(scores))
            assert found.labels_BK[image, :count].tolist() == list(labels)
            torch.testing.assert_close(
                found.boxes_BK4[image, :count], torch.tensor(boxes), rtol=0, atol=1e-3
            )


def test_shapes_do_not_depend_on_what_is_found_and_empty_slots_hold_zeros() -> None:
    config = TestConfig(score_thr=0.05, nms_pre=40, max_per_img=30)
    nothing = run(Predictions(torch.full((2, CELLS, TOKENS), -9.0), *draw(0)[1:]), config)
    much = run(draw(0), config)
    assert [part.shape for part in nothing] == [part.shape for part in much]
    assert much.valid_BK.all() and not nothing.valid_BK.any()
    assert not any(part.any() for part in nothing)


def at(*boxes: Sequence[float]) -> Tensor:
    return torch.tensor([boxes], dtype=torch.float32, device=WHERE)


def suppress(boxes_BX4: Tensor, labels: list[int], config: TestConfig) -> list[int]:
    """The places, by falling score, of what is kept of boxes in an image of 800 x 1300."""
    count = len(labels)
    labels_BX = torch.tensor([labels], device=WHERE)
    scores_BX = torch.linspace(0.9, 0.5, count, device=WHERE)[None]
    sizes_B2 = torch.tensor([[800, 1300]], device=WHERE)
    apart_BX4 = detect.in_class_places(boxes_BX4, labels_BX, 1200, sizes_B2)
    found_BX = torch.ones(1, count, dtype=torch.bool, device=WHERE)
    found = detect.suppress(boxes_BX4, apart_BX4, scores_BX, labels_BX, found_BX, config)
    kept = found.scores_BK[found.valid_BK]
    return [int((scores_BX[0] - score).abs().argmin()) for score in kept]


def test_classes_never_suppress_one_another_however_many_there_are() -> None:
    """Neighbours in numbers, in rows and at the corners of the image."""
    everywhere = [0, 0, 1299, 799]
    labels = [0, 1, 34, 35, 36, 70, 1199, 1198]
    config = TestConfig(nms_thr=0.0, legacy_nms=True)
    boxes_BX4 = at(*[everywhere] * len(labels))
    assert suppress(boxes_BX4, labels, config) == list(range(len(labels)))
    assert suppress(boxes_BX4, [7] * len(labels), config) == [0]


def test_suppression_is_as_exact_for_the_last_class_as_for_the_first() -> None:
    """An overlap of 0.6002, and of 0.5998: what float32 has left of a pixel must suffice."""
    boxes_BX4 = at([1000, 700, 1100, 720], [1000, 700, 1060.02, 720], [1000, 700, 1059.98, 720])
    config = TestConfig(nms_thr=0.6, legacy_nms=False)
    for label in (0, 599, 1199):
        assert suppress(boxes_BX4, [label] * 3, config) == [0, 2], label


def test_a_side_is_a_pixel_longer_to_microsoft_and_mmdet_drops_flat_boxes() -> None:
    """Of 5 + 1 pixels 4 + 1 are common: 0.83 or 0.8."""
    boxes_BX4 = at([10, 10, 10, 15], [10, 10, 10, 14], [20, 20, 30, 30])
    assert suppress(boxes_BX4, [0, 0, 0], TestConfig(nms_thr=0.81, legacy_nms=True)) == [0, 2]
    assert suppress(boxes_BX4, [0, 0, 0], TestConfig(nms_thr=0.81, legacy_nms=False)) == [2]
    boxes_BX4 = at([10, 10, 11, 15], [10, 10, 11, 14])
    assert suppress(boxes_BX4, [0, 0], TestConfig(nms_thr=0.81, legacy_nms=True)) == [0]
    assert suppress(boxes_BX4, [0, 0], TestConfig(nms_thr=0.81, legacy_nms=False)) == [0, 1]


def test_a_pixel_is_added_at_the_files_size() -> None:
    boxes_BK4 = at([0, 0, 79, 39], [10, 20, 10, 20])
    sizes_B2, originals_B2 = (torch.tensor([pair], device=WHERE) for pair in ((40, 80), (20, 120)))
    found = detect.to_files(boxes_BK4, sizes_B2, originals_B2)
    wanted = at([0, 0, 119.5, 20.5], [15, 10, 16, 11])
    torch.testing.assert_close(found, wanted)


def small_model() -> GLIP:
    config = load_config(
        Config,
        [
            "model.swin_width=8",
            "model.swin_depths=[1,1,1,1]",
            "model.swin_heads=[1,1,1,1]",
            "model.channels=32",
            "model.tower_blocks=1",
            "model.fusion_width=16",
            "model.fusion_heads=2",
            "model.max_tokens=32",
            f"model.bert={BERT}",
        ],
    )
    torch.manual_seed(0)
    return build_model(config).to(WHERE).eval()


@pytest.mark.parametrize("half", [False, True])
def test_captions_are_read_once_and_images_are_seen_once(*, half: bool) -> None:
    """And chunks of classes give what each of them gives alone, with the classes' numbers."""
    model, encoder = small_model(), TextEncoder(BERT, 32)
    calls = {"backbone": 0, "language_backbone": 0}
    for name in calls:

        def count(*_: object, name: str = name) -> None:
            calls[name] += 1

        model.get_submodule(name).register_forward_hook(count)
    queries = encoder.queries(["person", "stop sign", "red cup", "dog"], 3)
    dice = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8, generator=dice).to(WHERE)
    sizes_B2 = torch.tensor([[64, 90], [50, 96]], device=WHERE)
    config = TestConfig(score_thr=0.0, nms_pre=50, max_per_img=20)
    with torch.autocast(WHERE.type, torch.bfloat16, enabled=half):
        wanted = detect.read(model, queries, WHERE)
        assert calls == {"backbone": 0, "language_backbone": 2}
        parts = detect.find(model, images, sizes_B2, wanted, config)
        assert calls == {"backbone": 1, "language_backbone": 2}
        (alone,) = detect.find(model, images[1:], sizes_B2[1:], wanted[:1], config)
    assert [part.boxes_BK4.dtype for part in parts] == [torch.float32] * 2
    assert set(parts[0].labels_BK.flatten().tolist()) == {0, 1, 2}
    assert set(parts[1].labels_BK.flatten().tolist()) == {3}
    rough = {"rtol": 0, "atol": 0.01} if half else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(parts[0].scores_BK[1:], alone.scores_BK, **rough)
    joined = detect.join(parts)
    assert joined.scores_BK.shape == (2, 40)
    assert torch.equal(joined.boxes_BK4, torch.cat([part.boxes_BK4 for part in parts], dim=1))


def test_half_precision_around_does_not_reach_boxes_and_scores() -> None:
    config = TestConfig(0.2, 40, 0.4, 50)
    plain = run(draw(1), config)
    with torch.autocast(WHERE.type, torch.bfloat16):
        inside = run(draw(1), config)
    for one, other in zip(plain, inside, strict=True):
        assert torch.equal(one, other)
