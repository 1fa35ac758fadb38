"""The network: names, what is trained, padding, matching, precisions, and that it can learn."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig

from glip import anchors, weights
from glip.config import Config
from glip.data import Batch
from glip.fpn import DropBlock
from glip.language import LanguageBackbone
from glip.loss import losses as losses_of
from glip.model import FLOAT32_INPUTS, GLIP
from glip.recipe import build_optimizer
from glip.static import SLOTS, TOKENS, draw_batch, make_model, narrow_bert, narrow_config
from glip.swin import DropPath
from glip.targets import match
from glip.tower import reread
from zoo_common import device
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
# The NPU's kernels have no float64.
DTYPE, TOLERANCE = (torch.float32, 1e-4) if DEVICE.type == "npu" else (torch.float64, 1e-6)
MODEL_DIR = Path(__file__).resolve().parents[1]

# Names and parameters of mmdet's networks of the same settings, with bert-base-uncased.
PUBLISHED = {True: (738, 231_759_662), False: (534, 151_409_966)}


def quiet(config: Config | None = None, *, fusion: bool = True, seed: int = 0) -> GLIP:
    """A narrow network on the device that draws no noise in training."""
    config = config or narrow_config()
    model = config.model
    model.fusion = fusion
    model.drop_path = model.drop_block = model.fusion_dropout = 0.0
    bert = narrow_bert()
    bert.hidden_dropout_prob = bert.attention_probs_dropout_prob = 0.0
    torch.manual_seed(seed)
    return GLIP(model, config.loss, bert).to(DEVICE)


def gradients(model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    losses = model(batch.to(DEVICE))
    torch.stack(list(losses.values())).sum().backward()
    return {name: loss.detach() for name, loss in losses.items()}, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("fusion", PUBLISHED)
def test_names_and_sizes_are_the_published_ones(fusion: bool) -> None:
    config = Config()
    config.model.fusion = fusion
    with torch.device("meta"):
        model = GLIP(config.model, config.loss, BertConfig())
    keys, parameters = PUBLISHED[fusion]
    assert len(model.state_dict()) == keys
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_names_are_upstreams() -> None:
    tree = json.loads((MODEL_DIR / "tests/fixtures/glip_microsoft_tiny.json").read_text())
    theirs = {name for name in tree["state_dict"] if weights.from_microsoft(name)}
    assert quiet().state_dict().keys() == theirs
    assert tree["state_dict"].keys() - theirs == tree["map"].keys()


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("empty", [False, True])
def test_all_weights_learn_with_and_without_boxes(fusion: bool, empty: bool) -> None:
    model = quiet(fusion=fusion)
    batch = draw_batch(3, images=2)
    if empty:
        assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
        batch = batch._replace(
            detection=batch.detection._replace(valid_BQ=torch.zeros_like(batch.detection.valid_BQ)),
            boxes_BQ4=torch.zeros_like(batch.boxes_BQ4),
            tokens_BQT=torch.zeros_like(batch.tokens_BQT),
        )
    losses, grads = gradients(model, batch)
    # As every parameter has a gradient, no process waits for another's.
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (losses["box"] == 0) == (losses["centerness"] == 0) == empty
    assert losses["token"] > 0


def test_empty_slots_change_nothing() -> None:
    model = quiet().to(DTYPE)
    batch = draw_batch(6, images=2)
    assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
    more = batch._replace(
        detection=batch.detection._replace(
            valid_BQ=nn.functional.pad(batch.detection.valid_BQ, (0, 3))
        ),
        boxes_BQ4=nn.functional.pad(batch.boxes_BQ4, (0, 0, 0, 3)),
        tokens_BQT=nn.functional.pad(batch.tokens_BQT, (0, 0, 0, 3)),
    )
    with torch.no_grad():
        few, many = model(batch.to(DEVICE)), model(more.to(DEVICE))
    for name in few:
        torch.testing.assert_close(many[name], few[name], rtol=TOLERANCE, atol=0)


def test_what_stands_in_the_padding_of_an_image_changes_nothing() -> None:
    model = quiet().eval()
    batch = draw_batch(2, images=2).to(DEVICE)
    images, sizes = batch.detection.images_BCHW, batch.detection.sizes_B2
    noisy = images.clone()
    for image, (height, width) in zip(noisy, sizes.tolist(), strict=True):
        image[:, height:] = 255
        image[..., width:] = 7
    assert not torch.equal(noisy, images)
    planes = model.normalize(noisy, sizes)
    assert torch.equal(planes, model.normalize(images, sizes))
    assert not planes[0, :, sizes[0, 0] :].any()
    # Blue first, which is the last of the given ones.
    red = (images[0, 0, 0, 0].float() - model.pixels[2][0]) / model.pixels[2][1]
    assert planes[0, 2, 0, 0].item() == pytest.approx(red.item(), rel=1e-6)


def test_padding_tokens_do_not_reach_the_words() -> None:
    torch.manual_seed(0)
    language = LanguageBackbone(narrow_bert()).to(DEVICE).eval()
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(1, 50, (2, TOKENS), generator=generator).to(DEVICE)
    mask_BT = (torch.arange(TOKENS) < torch.tensor([[9], [TOKENS]])).to(DEVICE)
    other_BT = torch.where(mask_BT, tokens_BT, 1)
    with torch.no_grad():
        words, others = language(tokens_BT, mask_BT), language(other_BT, mask_BT)
    torch.testing.assert_close(others.embedded(), words.embedded(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(others.hidden_BTC, words.hidden_BTC)
    assert not words.embedded()[0, 9:].any()
    # As transformers' own forward pass masks.
    with torch.no_grad():
        whole = language.body.model(input_ids=tokens_BT, attention_mask=mask_BT.long())
    torch.testing.assert_close(whole.last_hidden_state, words.hidden_BTC, rtol=1e-4, atol=1e-5)


def test_offsets_of_a_finer_level_are_read_from_their_memory() -> None:
    places = torch.arange(2 * 18 * 6 * 8, dtype=torch.float32).view(2, 18, 6, 8)
    assert reread(places, (6, 8)) is places
    found = reread(places, (3, 4))
    assert found.shape == (2, 18, 3, 4)
    assert torch.equal(found[1].flatten(), places[1].flatten()[: 18 * 12])
    assert not torch.equal(found, places[..., :3, :4])


def test_noise_of_the_pyramid_drops_squares_and_keeps_the_sum() -> None:
    torch.manual_seed(0)
    noise = DropBlock(0.3)
    maps = torch.ones(8, 3, 40, 48)
    assert noise.eval()(maps) is maps
    dropped = noise.train()(maps)
    assert torch.equal(dropped[:, 0], dropped[:, 2])  # the same in all channels
    share = (dropped == 0).float().mean().item()
    assert 0.2 < share < 0.35
    assert dropped.sum().item() == pytest.approx(maps.sum().item(), rel=1e-5)
    # What is dropped lies in squares of three cells.
    zeros = (dropped[:, :1] == 0).float()
    inner = -nn.functional.max_pool2d(-nn.functional.pad(zeros, (1, 1, 1, 1), value=1.0), 3, 1)
    regrown = nn.functional.max_pool2d(inner, 3, 1, padding=1)
    assert torch.equal(regrown[..., 1:-1, 1:-1], zeros[..., 1:-1, 1:-1])


def test_stochastic_depth_leaves_images_out_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    branch = torch.ones(4000, 2, 1, 3, device=DEVICE)
    assert drop.eval()(branch) is branch
    dropped = drop.train()(branch).flatten(1)
    assert (dropped == dropped[:, :1]).all()
    assert sorted(set(dropped[:, 0].tolist())) == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    model = make_model(narrow_config())
    rates = [layer.probability for layer in model.modules() if isinstance(layer, DropPath)]
    assert rates == pytest.approx([0.2 * block / 7 for block in range(8)])


SIZES = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
CELLS = [height * width for height, width in SIZES]


def matches(boxes: list[tuple[float, ...]], slots: int = SLOTS) -> list[list[int]]:
    """The anchors of each box in an image of 96 x 128 pixels."""
    boxes_1Q4 = torch.zeros(1, slots, 4)
    for slot, box in enumerate(boxes):
        boxes_1Q4[0, slot] = torch.tensor(box)
    valid_1Q = torch.arange(slots)[None] < len(boxes)
    anchors_A4 = anchors.make_anchors(SIZES, DEVICE)
    found = match(anchors_A4, CELLS, boxes_1Q4.to(DEVICE), valid_1Q.to(DEVICE), 9)
    positive_A, slots_A = found.positive_BA[0].cpu(), found.slots_BA[0].cpu()
    assert not slots_A[~positive_A].any()
    return [(positive_A & (slots_A == slot)).nonzero()[:, 0].tolist() for slot in range(len(boxes))]


def test_boxes_get_the_anchors_in_their_middle() -> None:
    middles = anchors.centers(anchors.make_anchors(SIZES, torch.device("cpu")))
    boxes = [(8.0, 8.0, 71.0, 71.0), (60.0, 20.0, 120.0, 90.0)]
    for (x1, y1, x2, y2), found in zip(boxes, matches(boxes), strict=True):
        assert 3 <= len(found) <= 45
        x, y = middles[found].T
        assert ((x > x1) & (x < x2) & (y > y1) & (y < y2)).all()
    # More slots, all empty, are none.
    assert matches(boxes, slots=40) == matches(boxes)


def test_no_box_has_no_anchor() -> None:
    assert matches([]) == []
    boxes_1Q4, valid_1Q = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool)
    anchors_A4 = anchors.make_anchors(SIZES, torch.device("cpu"))
    assert not match(anchors_A4, CELLS, boxes_1Q4, valid_1Q, 9).positive_BA.any()


def test_an_anchor_of_two_boxes_learns_the_one_it_overlaps_more() -> None:
    inner, outer = (16.0, 16.0, 79.0, 79.0), (4.0, 4.0, 91.0, 91.0)
    both = matches([inner, outer])
    assert matches([outer, inner]) == both[::-1]
    alone = matches([outer])[0]
    assert set(both[1]) < set(alone)
    assert set(both[0]) & set(alone)


def test_of_equal_boxes_the_first_has_all_anchors() -> None:
    box = (8.0, 8.0, 71.0, 71.0)
    assert matches([box, box]) == [matches([box])[0], []]


def test_a_box_between_the_middles_of_anchors_has_none() -> None:
    assert matches([(13.0, 13.0, 18.0, 18.0)]) == [[]]


@pytest.mark.parametrize("no_object", [True, False])
def test_anchors_without_a_box_learn_the_last_token_only_if_it_is_one(no_object: bool) -> None:
    config = narrow_config()
    config.loss.no_object = no_object
    model = quiet(config).to(DTYPE)
    batch = draw_batch(6, images=2).to(DEVICE)
    assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None

    def token_loss(mask_BT: Tensor) -> float:
        with torch.no_grad():
            words = model.words(*batch.text)
            detection = batch.detection
            found, sizes = model.predict(detection.images_BCHW, detection.sizes_B2, words)
            anchors_A4 = anchors.make_anchors(sizes, DEVICE)
            taken = match(
                anchors_A4,
                [height * width for height, width in sizes],
                batch.boxes_BQ4,
                detection.valid_BQ,
                9,
            )
            losses = losses_of(
                found,
                taken,
                anchors_A4.to(DTYPE),
                batch.boxes_BQ4.to(DTYPE),
                batch.tokens_BQT,
                mask_BT,
                config.loss,
            )
        return losses["token"].item()

    full_BT = torch.ones_like(batch.text.mask_BT)
    short_BT = full_BT.clone()
    short_BT[:, -1] = False
    # Of many anchors that have no box, each is far from sure of the last token.
    share = token_loss(full_BT) / token_loss(short_BT)
    assert share > 2 if no_object else 0.9 < share < 1.2


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_half_precision_has_the_gradients_of_float32(level: str) -> None:
    batch = draw_batch(6, images=2)
    model, half = quiet(), quiet()
    wanted_losses, wanted = gradients(model, batch)
    optimizer = build_optimizer(half, Config().solver)
    config = PrecisionConfig(opt_level=level, dtype="bfloat16")
    precision = Precision(config, half, optimizer, DEVICE, float32_inputs=FLOAT32_INPUTS)
    with precision.autocast():
        losses = half(batch.to(DEVICE))
    assert all(loss.dtype is torch.float32 for loss in losses.values())
    for name, loss in losses.items():
        torch.testing.assert_close(loss, wanted_losses[name], rtol=0.05, atol=0)
    torch.stack(list(losses.values())).sum().backward()
    for name in (
        "rpn.head.bbox_pred.weight",
        "rpn.head.dot_product_projection_text.weight",
        "rpn.head.dyhead_tower.5.DyConv.1.conv.weight",
        "backbone.fpn.fpn_layer2.weight",
        "language_backbone.body.model.encoder.layer.1.output.dense.weight",
    ):
        grad = half.get_parameter(name).grad
        assert grad is not None, name
        angle = torch.cosine_similarity(grad.float().flatten(), wanted[name].flatten(), dim=0)
        assert angle > 0.9, (name, angle)


@pytest.mark.parametrize(("level", "dtype"), [("O1", "float16"), ("O2", "float16")])
def test_float16_trains(level: str, dtype: str) -> None:
    model = make_model(narrow_config()).to(DEVICE)
    config = PrecisionConfig(opt_level=level, dtype=dtype, loss_scale="128")
    optimizer = build_optimizer(model, narrow_config().solver)
    precision = Precision(config, model, optimizer, DEVICE, float32_inputs=FLOAT32_INPUTS)
    before = {name: value.clone() for name, value in precision.model_state_dict().items()}
    for seed in (1, 2):
        with precision.autocast():
            losses = model(draw_batch(seed, images=1).to(DEVICE))
        total = torch.stack(list(losses.values())).sum()
        assert math.isfinite(total.item())
        assert precision.step(total)
    after = precision.model_state_dict()
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
    assert not torch.equal(after["rpn.head.bias0"], before["rpn.head.bias0"])


def test_learns_one_batch_by_heart() -> None:
    model = quiet()
    batch = draw_batch(2, images=1, bucket=(96, 96)).to(DEVICE)
    assert batch.detection.valid_BQ.any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first, last = {}, {}
    for step in range(40):
        losses = model(batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = {name: loss.item() for name, loss in losses.items()}
        first = first if step else last
    assert last["token"] < 0.3 * first["token"], (first, last)
    assert last["box"] < 0.8 * first["box"], (first, last)
