"""The network: names, padding, empty images, shared cells, precisions, and that it can learn."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from solov2.config import Config
from solov2.data import Batch
from solov2.evaluate import to_originals
from solov2.layers import measure_norms
from solov2.model import FLOAT32_INPUTS, Detections, SOLOv2, build_model
from solov2.recipe import build_optimizer
from solov2.static import CLASSES, draw_batch, narrow_config
from solov2.targets import prepare
from zoo_common import device
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig, load_config

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
# HCCL and the NPU's kernels have no float64.
DTYPE, TOLERANCE = (torch.float32, 2e-5) if DEVICE.type == "npu" else (torch.float64, 1e-11)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# Names and parameters of mmdet's networks of the same settings.
PUBLISHED = {
    "solov2_r50_fpn_1x": (386, 46_592_912),
    "solov2_light_448_r50_fpn_3x": (374, 31_340_560),
}


def build(config: Config | None = None, *, static_shapes: bool = False, seed: int = 0) -> SOLOv2:
    """A narrow network on the device, with statistics that are not the identity."""
    torch.manual_seed(seed)
    model = build_model(config or narrow_config(), CLASSES, static_shapes=static_shapes)
    generator = torch.Generator().manual_seed(seed)
    measure_norms(model.backbone, torch.randn(2, 3, 64, 96, generator=generator))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_offset" in name:  # which starts at zero: samples would not move
                scale = 0.5 if name.endswith("bias") else 0.02
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.to(DEVICE)


def deformable(version: str) -> Config:
    config = narrow_config()
    config.model.deformable = config.head.deformable = config.head.mask_deformable = version
    config.head.deformable_last_only = True
    return config


def natural(batch: Batch) -> Batch:
    """The batch padded to what its images need, with as many pair slots as they need."""
    detection = batch.detection
    assert detection.masks_BQHW is not None
    height, width = detection.extent_2.tolist()
    detection = detection._replace(
        images_BCHW=detection.images_BCHW[:, :, :height, :width],
        masks_BQHW=detection.masks_BQHW[:, :, : height // 4, : width // 4],
    )
    return Batch(detection, prepare(detection, narrow_config().head, static=False))


def padded(batch: Batch, height: int, width: int, slots: int) -> Batch:
    """The batch with more padding, of noise where nothing may look, and more empty slots."""
    detection = batch.detection
    assert detection.masks_BQHW is not None
    assert detection.centers_BQ2 is not None
    images_BCHW = torch.randint(0, 256, (len(detection.images_BCHW), 3, height, width)).byte()
    inner_height, inner_width = detection.images_BCHW.shape[2:]
    images_BCHW[:, :, :inner_height, :inner_width] = detection.images_BCHW

    def more(tensor: Tensor) -> Tensor:
        extra = tensor.new_zeros(tensor.shape[0], slots, *tensor.shape[2:])
        return torch.cat([tensor, extra], dim=1)

    below, beside = height // 4 - inner_height // 4, width // 4 - inner_width // 4
    detection = detection._replace(
        images_BCHW=images_BCHW,
        boxes_BQ4=more(detection.boxes_BQ4),
        labels_BQ=more(detection.labels_BQ),
        valid_BQ=more(detection.valid_BQ),
        centers_BQ2=more(detection.centers_BQ2),
        masks_BQHW=nn.functional.pad(more(detection.masks_BQHW), (0, beside, 0, below)),
    )
    return Batch(detection, prepare(detection, narrow_config().head, static=True))


def gradients(model: SOLOv2, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    losses = model(batch.to(DEVICE))
    torch.stack(list(losses.values())).sum().backward()
    return {name: loss.detach() for name, loss in losses.items()}, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_sizes_are_the_published_ones(name: str) -> None:
    config = load_config(Config, [f"--config={CONFIGS / name}.yaml"])
    with torch.device("meta"):
        model = build_model(config, 80)
    keys, parameters = PUBLISHED[name]
    assert len(model.state_dict()) == keys
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert len(frozen) == 33
    assert {name.split(".")[1] for name in frozen} == {"conv1", "bn1", "layer1"}


@pytest.mark.parametrize(
    ("seed", "config"),
    [
        *((seed, narrow_config()) for seed in (0, 1, 6, 7)),
        (1, deformable("v1")),
        (6, deformable("v2")),
    ],
    ids=["plain", "plain", "plain", "plain", "v1", "v2"],
)
def test_more_padding_and_empty_slots_change_nothing(seed: int, config: Config) -> None:
    config.test.candidates = 10_000  # without static shapes there is no such limit
    plain, static = (build(config, static_shapes=static).to(DTYPE) for static in (False, True))
    drawn = draw_batch(seed, images=2)
    batch, larger = natural(drawn), padded(drawn, 192, 224, slots=3)
    assert batch.targets is not None
    assert batch.targets.valid_BP.any()
    losses, grads = gradients(plain, batch)
    more_losses, more_grads = gradients(static, larger)
    for name in losses:
        torch.testing.assert_close(more_losses[name], losses[name], rtol=TOLERANCE, atol=TOLERANCE)
    largest = max(grad.abs().max().item() for grad in grads.values())
    for name in grads:
        scale = max(grads[name].abs().max().item(), 1e-3 * largest)
        assert (more_grads[name] - grads[name]).abs().max() <= 1e3 * TOLERANCE * scale, name

    with torch.no_grad():
        found = plain.eval()(batch.to(DEVICE))
        more_found = static.eval()(larger.to(DEVICE))
    assert found.valid_BD.any()
    height, width = (side // 4 for side in batch.detection.extent_2.tolist())
    assert not more_found.masks_BDHW[:, :, height:].any()
    assert not more_found.masks_BDHW[..., width:].any()
    more_found = more_found._replace(masks_BDHW=more_found.masks_BDHW[:, :, :height, :width])
    valid_BD = found.valid_BD
    for name, ours, theirs in zip(Detections._fields, found, more_found, strict=True):
        if name != "crowded_B":
            ours, theirs = ours[valid_BD], theirs[valid_BD]
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6, msg=name)
    for one, other in zip(
        to_originals(found, batch), to_originals(more_found, larger), strict=True
    ):
        assert one.rles == other.rles


def test_images_without_objects_train() -> None:
    model = build()
    drawn = draw_batch(7, images=2).detection
    empty = drawn._replace(valid_BQ=torch.zeros_like(drawn.valid_BQ))
    losses, grads = gradients(
        model, Batch(empty, prepare(empty, narrow_config().head, static=True))
    )
    assert losses["loss_ins"] == 0
    assert losses["loss_cate"] > 0
    assert all(grad.isfinite().all() for grad in grads.values())
    # As every trained parameter has a gradient, no process waits for another's.
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(grad.any() for name, grad in grads.items() if "kernel" in name)


def test_an_image_without_objects_leaves_the_mask_loss_to_the_others() -> None:
    model = build().to(DTYPE)
    drawn = draw_batch(6, images=1).detection
    assert drawn.valid_BQ.any()
    head = narrow_config().head
    one, _ = gradients(model, Batch(drawn, prepare(drawn, head, static=False)))
    names = [name for name in drawn._fields if isinstance(getattr(drawn, name), Tensor)]
    both = drawn._replace(
        **{name: torch.cat([getattr(drawn, name)] * 2) for name in names if name != "extent_2"},
        item_ids=drawn.item_ids * 2,
    )
    both.valid_BQ[1] = False
    two, _ = gradients(model, Batch(both, prepare(both, head, static=False)))
    torch.testing.assert_close(two["loss_ins"], one["loss_ins"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("average", "factor"), [("pairs", 1), ("cells", 2)])
def test_objects_that_share_all_their_cells(average: str, factor: int) -> None:
    config = narrow_config()
    config.loss.mask_average = average
    model = build(config).to(DTYPE)
    single = draw_batch(6, images=2).detection
    names = ("boxes_BQ4", "centers_BQ2", "labels_BQ", "valid_BQ", "masks_BQHW")
    twins = single._replace(
        **{name: getattr(single, name).repeat_interleave(2, dim=1) for name in names}
    )
    assert single.valid_BQ.any()
    once, _ = gradients(model, Batch(single, prepare(single, config.head, static=False)))
    twice, _ = gradients(model, Batch(twins, prepare(twins, config.head, static=False)))
    # The classes' loss counts a cell once; the masks' averages over pairs, or counts both.
    torch.testing.assert_close(twice["loss_cate"], once["loss_cate"], rtol=1e-5, atol=0)
    shared = prepare(single, config.head, static=False)
    pairs, cells = int(shared.valid_BP.sum()), int((shared.labels_BS >= 0).sum())
    assert pairs >= cells
    torch.testing.assert_close(twice["loss_ins"], factor * once["loss_ins"], rtol=1e-5, atol=0)


def test_more_candidates_than_places_are_told() -> None:
    config = narrow_config()
    batch = draw_batch(3, images=2).to(DEVICE)
    model = build(config, static_shapes=True).eval()
    with torch.no_grad():
        plenty = model(batch)
        config.test.candidates = 12
        few = model(batch)
        config.test.score_thr = 1.0
        nothing = model(batch)
    assert few.crowded_B.all()
    assert few.masks_BDHW.shape == plenty.masks_BDHW.shape
    assert not nothing.crowded_B.any()
    assert not nothing.valid_BD.any()
    assert all(not len(found.rles) for found in to_originals(nothing, batch))
    scores_BD = plenty.scores_BD
    assert (scores_BD[:, 1:] <= scores_BD[:, :-1]).all()


def test_masks_no_larger_than_their_levels_stride_are_dropped() -> None:
    config = narrow_config()
    config.test.candidates = config.test.nms_pre = config.test.max_per_img = 10_000
    config.test.update_thr = 0.0
    model = build(config, static_shapes=True).eval()
    batch = draw_batch(3, images=2).to(DEVICE)

    @torch.no_grad()
    def areas() -> Tensor:
        found = model(batch)
        area_BD: Tensor = (found.masks_BDHW > config.test.mask_thr).sum(dim=(2, 3))
        return area_BD[found.valid_BD]

    config.head.strides = [0] * 5
    everything = areas()
    limit = int(everything.median())
    config.head.strides = [limit] * 5
    some = areas()
    assert (some > limit).all()
    assert len(some) == (everything > limit).sum()
    # The first level alone, which has the most cells.
    config.head.strides = [100_000, 0, 0, 0, 0]
    rest = len(areas())
    config.head.strides = [0, *[100_000] * 4]
    assert 0 < rest < len(everything)
    assert len(areas()) + rest == len(everything)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_half_precision_has_the_gradients_of_float32(level: str) -> None:
    batch = draw_batch(6, images=2).to(DEVICE)
    model, half = build(static_shapes=True), build(static_shapes=True)
    wanted_losses, wanted = gradients(model, batch)
    optimizer = build_optimizer(half, Config().solver)
    config = PrecisionConfig(opt_level=level, dtype="bfloat16")
    precision = Precision(config, half, optimizer, DEVICE, float32_inputs=FLOAT32_INPUTS)
    with precision.autocast():
        losses = half(batch)
    assert all(loss.dtype is torch.float32 for loss in losses.values())
    for name, loss in losses.items():
        torch.testing.assert_close(loss, wanted_losses[name], rtol=0.03, atol=0)
    torch.stack(list(losses.values())).sum().backward()
    for name in (
        # Not deeper: gradients of a random network behind 40 layers turn by as much when its
        # weights are merely rounded to this format.
        "backbone.layer4.2.conv2.weight",
        "neck.lateral_convs.1.conv.weight",
        "mask_feat_head.convs_all_levels.1.conv0.conv.weight",
        "bbox_head.cate_convs.0.conv.weight",
        "bbox_head.solo_kernel.weight",
    ):
        grad = half.get_parameter(name).grad
        assert grad is not None, name
        angle = torch.cosine_similarity(grad.float().flatten(), wanted[name].flatten(), dim=0)
        assert angle > 0.9, (name, angle)


def test_learns_one_batch_by_heart() -> None:
    config = narrow_config()
    config.model.frozen_stages = -1
    config.model.fpn_channels = 32
    config.solver.base_lr = 0.02
    model = build(config)
    batch = draw_batch(6, images=2).to(DEVICE)
    optimizer = build_optimizer(model, config.solver)
    sums, masks = [], []
    for _ in range(60):
        losses = model(batch)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        sums.append(total.item())
        masks.append(losses["loss_ins"].item())
    assert math.isfinite(sums[-1])
    assert sum(sums[-5:]) / 5 < 0.5 * sums[0], sums
    assert sum(masks[-5:]) / 5 < 0.5 * masks[0], masks


def test_statistics_of_random_weights_are_those_of_images() -> None:
    torch.manual_seed(0)
    model = build_model(narrow_config(), CLASSES).to(DEVICE)
    images = torch.randn(2, 3, 128, 96, device=DEVICE)
    assert measure_norms(model.backbone, images) == 53  # all convolutions of a ResNet-50
    after = [stage.std().item() for stage in model.backbone(images)]
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
        "backbone.layer3.0.conv2.weight": math.sqrt(2 / (256 * 9)),
        "neck.fpn_convs.1.conv.weight": math.sqrt(2 / (2 * 256 * 9)),
        "mask_feat_head.convs_all_levels.2.conv1.conv.weight": 0.01,
        "mask_feat_head.conv_pred.0.conv.weight": 0.01,
        "bbox_head.kernel_convs.3.conv.weight": 0.01,
        "bbox_head.solo_cate.weight": 0.01,
        "bbox_head.solo_kernel.weight": 0.01,
    }.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name
    bias = weights["bbox_head.solo_cate.bias"]
    assert bias.sigmoid().tolist() == pytest.approx([0.01] * 80)
