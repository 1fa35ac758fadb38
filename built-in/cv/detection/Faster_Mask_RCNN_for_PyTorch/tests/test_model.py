"""The networks: shapes, padding, empty images, precisions, and that they can learn."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rcnn.backbone import measure_frozen_norms
from rcnn.config import Config
from rcnn.model import FLOAT32_INPUTS, GeneralizedRCNN, build_model
from rcnn.parity import sample_evenly
from rcnn.recipe import build_optimizer
from rcnn.roi_heads import Detections
from rcnn.static import CLASSES, draw_batch, narrow_config
from rcnn.targets import sample, sample_at_random
from zoo_common import device
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig
from zoo_common.detection.batching import DetectionBatch

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
# HCCL and the NPU's kernels have no float64.
DTYPE, TOLERANCE = (torch.float32, 1e-5) if DEVICE.type == "npu" else (torch.float64, 1e-12)
FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = {("mask", 50): 307, ("mask", 101): 562, ("faster", 50): 295, ("faster", 101): 550}


def build(
    config: Config | None = None, *, static_shapes: bool = False, seed: int = 0
) -> GeneralizedRCNN:
    """A narrow network on the device, with frozen statistics that are not the identity."""
    torch.manual_seed(seed)
    model = build_model(config or narrow_config(), CLASSES, static_shapes=static_shapes)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith(("norm.weight", "norm.bias")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.5 + 0.25)
    return model.to(DEVICE)


def natural(batch: DetectionBatch) -> DetectionBatch:
    """The batch padded to what its images need."""
    height, width = batch.extent_2.tolist()
    return batch._replace(images_BCHW=batch.images_BCHW[:, :, :height, :width])


def padded(batch: DetectionBatch, height: int, width: int, slots: int) -> DetectionBatch:
    """The batch with more padding, of noise where nothing may look, and more empty slots."""
    images_BCHW = torch.randint(0, 256, (len(batch.images_BCHW), 3, height, width)).byte()
    inner_height, inner_width = batch.images_BCHW.shape[2:]
    images_BCHW[:, :, :inner_height, :inner_width] = batch.images_BCHW

    def more(tensor: Tensor, value: float) -> Tensor:
        extra = tensor.new_full((tensor.shape[0], slots, *tensor.shape[2:]), value)
        return torch.cat([tensor, extra], dim=1)

    assert batch.edges_BQE4 is not None
    assert batch.rings_BQE is not None
    return batch._replace(
        images_BCHW=images_BCHW,
        boxes_BQ4=more(batch.boxes_BQ4, 0),
        labels_BQ=more(batch.labels_BQ, 0),
        valid_BQ=more(batch.valid_BQ, False),
        edges_BQE4=more(batch.edges_BQE4, 0),
        rings_BQE=more(batch.rings_BQE, -1),
    )


def gradients(
    model: nn.Module, batch: DetectionBatch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    losses = model(batch.to(DEVICE))
    torch.stack(list(losses.values())).sum().backward()
    return {name: loss.detach() for name, loss in losses.items()}, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(("kind", "depth"), PUBLISHED)
def test_keys_are_detectron2s(kind: str, depth: int) -> None:
    config = Config()
    config.model.depth, config.model.masks = depth, kind == "mask"
    with torch.device("meta"):
        keys = set(build_model(config, 80).state_dict())
    assert len(keys) == PUBLISHED[kind, depth]
    recorded = {("mask", 50): "maskrcnn_r50_tiny", ("faster", 101): "fasterrcnn_r101_zoo_tiny"}
    if (kind, depth) in recorded:
        case = json.loads((FIXTURES / f"{recorded[kind, depth]}.json").read_text())
        assert keys == set(case["state_dict"])


@pytest.mark.parametrize("seed", range(4))
def test_more_padding_and_empty_slots_change_nothing(seed: int) -> None:
    plain, static = build(), build(static_shapes=True)
    for model in (plain, static):
        model.to(DTYPE).choose = sample_evenly
    batch = natural(draw_batch(seed, images=2))
    losses, grads = gradients(plain, batch)
    more_losses, more_grads = gradients(static, padded(batch, 224, 256, slots=3))
    for name in losses:
        torch.testing.assert_close(more_losses[name], losses[name], rtol=TOLERANCE, atol=TOLERANCE)
    for name in grads:
        scale = max(grads[name].abs().max().item(), 1e-6)
        assert (more_grads[name] - grads[name]).abs().max() <= 1e3 * TOLERANCE * scale, name

    with torch.no_grad():
        found = plain.eval()(batch.to(DEVICE))
        more_found = static.eval()(padded(batch, 224, 256, slots=3).to(DEVICE))
    assert found.valid_BD.any()
    for name, ours, theirs in zip(Detections._fields, found, more_found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6, msg=name)


def test_images_without_objects_train() -> None:
    model = build()
    batch = draw_batch(3, images=2)
    empty = batch._replace(valid_BQ=torch.zeros_like(batch.valid_BQ))
    losses, grads = gradients(model, empty)
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_loc"] == 0
    assert losses["loss_cls"] > 0
    assert all(grad.isfinite().all() for grad in grads.values())
    # As every trained parameter has a gradient, no process waits for another's.
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_head_at_anchors_equals_the_dense_pass() -> None:
    model = build().to(DTYPE)
    head = model.proposal_generator.rpn_head
    maps = [
        torch.randn(2, 16, *size, dtype=DTYPE, device=DEVICE, requires_grad=True)
        for size in ((9, 7), (5, 4), (3, 2), (2, 1), (1, 1))
    ]
    dense = [head(map_BCHW) for map_BCHW in maps]
    logits_BN = torch.cat([logits for logits, _ in dense], dim=1)
    deltas_BN4 = torch.cat([deltas for _, deltas in dense], dim=1)
    index = torch.arange(logits_BN.shape[1], device=DEVICE).expand(2, -1).flip(1)
    logits_BS, deltas_BS4 = head.at(maps, index)
    torch.testing.assert_close(logits_BS, logits_BN.flip(1))
    torch.testing.assert_close(deltas_BS4, deltas_BN4.flip(1))
    weight = torch.randn_like(logits_BN)
    parameters = [*maps, *head.parameters()]
    ours = torch.autograd.grad((logits_BS * weight.flip(1)).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((logits_BN * weight).sum(), parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_sampling_is_uniform_and_keeps_its_limits() -> None:
    torch.manual_seed(0)
    positive = torch.zeros(2000, 40, dtype=torch.bool, device=DEVICE)
    negative = torch.zeros_like(positive)
    positive[:, :10] = True
    negative[:, 15:] = True
    positive[1000:, 2:] = False
    chosen = sample(positive, negative, slots=16, positive_slots=4, choose=sample_at_random)
    counts = chosen.positive_BS.sum(dim=1)
    assert counts[:1000].eq(4).all()
    assert counts[1000:].eq(2).all()
    assert chosen.valid_BS.all()
    assert positive.gather(1, chosen.index_BS)[chosen.positive_BS].all()
    assert negative.gather(1, chosen.index_BS)[~chosen.positive_BS].all()
    for row in chosen.index_BS[::100]:
        assert len(set(row.tolist())) == 16
    drawn = torch.bincount(chosen.index_BS[:1000][chosen.positive_BS[:1000]], minlength=40)[:10]
    assert (drawn - 400).abs().max() < 80  # 5 standard deviations of 15.5


def test_fewer_candidates_than_slots_leave_slots_empty() -> None:
    positive = torch.tensor([[True, False, False, False]], device=DEVICE)
    negative = torch.tensor([[False, False, True, False]], device=DEVICE)
    chosen = sample(positive, negative, slots=4, positive_slots=2, choose=sample_at_random)
    assert chosen.valid_BS.tolist() == [[True, True, False, False]]
    assert chosen.index_BS[0, :2].tolist() == [0, 2]
    assert chosen.positive_BS.tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_half_precision_has_the_gradients_of_float32(level: str) -> None:
    batch = draw_batch(5, images=2).to(DEVICE)
    model, half = build(static_shapes=True), build(static_shapes=True)
    for one in (model, half):
        one.choose = sample_evenly
    _, wanted = gradients(model, batch)
    optimizer = build_optimizer(half, Config().solver)
    config = PrecisionConfig(opt_level=level, dtype="bfloat16")
    precision = Precision(config, half, optimizer, DEVICE, float32_inputs=FLOAT32_INPUTS)
    with precision.autocast():
        losses = half(batch)
    assert all(loss.dtype is torch.float32 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for name in (
        "proposal_generator.rpn_head.conv.weight",
        "backbone.fpn_lateral3.weight",
        "roi_heads.box_head.fc1.weight",
        "roi_heads.mask_head.mask_fcn1.weight",
    ):
        grad = half.get_parameter(name).grad
        assert grad is not None, name
        angle = torch.cosine_similarity(grad.float().flatten(), wanted[name].flatten(), dim=0)
        assert angle > 0.95, (name, angle)


def test_learns_one_batch_by_heart() -> None:
    config = narrow_config()
    config.model.norm, config.model.freeze_at = "GN", 0
    config.model.stem_channels = config.model.width_per_group = 32
    config.model.fpn_channels = config.mask_head.conv_dim = 32
    config.model.res2_channels = 32
    config.solver.base_lr = 0.02
    model = build(config)
    batch = draw_batch(8, images=2).to(DEVICE)
    optimizer = build_optimizer(model, config.solver)
    sums = []
    for _ in range(100):
        total = torch.stack(list(model(batch).values())).sum()
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        sums.append(total.item())
    assert math.isfinite(sums[-1])
    assert sum(sums[-10:]) / 10 < 0.5 * sums[0], sums  # 0.34 to 0.42 under 8 seeds


def test_frozen_norms_of_random_weights_take_the_statistics_of_images() -> None:
    torch.manual_seed(0)
    model = build_model(narrow_config(), CLASSES).to(DEVICE)
    images = 50 * torch.randn(2, 3, 128, 96, device=DEVICE)
    before = [stage.std().item() for stage in model.backbone.bottom_up(images)]
    assert measure_frozen_norms(model.backbone, images) == 53  # all convolutions of a ResNet-50
    after = [stage.std().item() for stage in model.backbone.bottom_up(images)]
    assert before[-1] > 100
    assert all(0.3 < std < 10 for std in after)
    # A second time changes nothing: the hooks are gone, and the statistics are those of the images.
    kept = [buffer.clone() for buffer in model.buffers()]
    model.backbone(images)
    assert all(torch.equal(one, other) for one, other in zip(kept, model.buffers(), strict=True))


def test_initial_weights_are_drawn_as_upstreams() -> None:
    torch.manual_seed(0)
    model = build_model(Config(), 80)
    weights = model.state_dict()
    for name, std in {
        "backbone.bottom_up.res4.0.conv2.weight": math.sqrt(2 / (256 * 9)),
        "backbone.fpn_output3.weight": math.sqrt(1 / (256 * 9)),
        "proposal_generator.rpn_head.conv.weight": 0.01,
        "roi_heads.box_head.fc2.weight": math.sqrt(1 / 1024),
        "roi_heads.box_predictor.cls_score.weight": 0.01,
        "roi_heads.box_predictor.bbox_pred.weight": 0.001,
        "roi_heads.mask_head.mask_fcn2.weight": math.sqrt(2 / (256 * 9)),
        "roi_heads.mask_head.predictor.weight": 0.001,
    }.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert {name.split(".")[2] for name in frozen} == {"stem", "res2"}
