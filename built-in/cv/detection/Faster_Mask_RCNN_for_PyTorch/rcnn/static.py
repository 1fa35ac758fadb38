"""Steps as an accelerator runs them, for ``tools/check_static.py`` and ``tools/npu_ops.py``.

On a CPU too they take the plain-torch operators that an NPU runs, not the CPU's own kernels, which
may look at what is in host memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rcnn.backbone import measure_frozen_norms
from rcnn.config import Config
from rcnn.model import FLOAT32_INPUTS, GeneralizedRCNN, build_model, to_device
from rcnn.recipe import build_optimizer, set_lr
from rcnn.roi_heads import Detections
from zoo_common.amp import Precision, inference_autocast
from zoo_common.config import PrecisionConfig
from zoo_common.detection import ops
from zoo_common.detection.batching import DetectionBatch

BUCKETS = ((96, 128), (128, 96), (128, 160), (160, 128))
CLASSES, SLOTS, EDGES, RINGS = 5, 8, 16, 2


def build(
    device: torch.device, opt_level: str = "O0", dtype: str = "auto"
) -> Callable[[int], object]:
    """A narrow Mask R-CNN; call ``i`` trains a step on images of sizes that step alone has.

    Args:
        device: where it runs.
        opt_level: as ``--amp``.
        dtype: as ``--dtype``; float16 reads one number a step, see ``zoo_common.amp``.
    """
    config = narrow_config(opt_level, dtype)
    torch.manual_seed(0)
    model = make_model(config, device)
    optimizer = build_optimizer(model, config.solver)
    precision = Precision(config.precision, model, optimizer, device, float32_inputs=FLOAT32_INPUTS)

    def step(index: int) -> Tensor:
        batch = as_delivered(draw_batch(index, images=2), device).to(device)
        set_lr(optimizer, index, config.solver)
        with ops.implementation("reference"):
            with precision.autocast(model):
                losses = model(batch)
            total = torch.stack(list(losses.values())).sum()
            precision.step(total)
        return total

    return step


def evaluation(
    device: torch.device, opt_level: str = "O0", dtype: str = "auto"
) -> Callable[[int], object]:
    """A function that searches the images of batch ``i``; arguments as those of ``build``."""
    config = narrow_config(opt_level, dtype)
    torch.manual_seed(0)
    model = make_model(config, device).eval()

    @torch.no_grad()
    def step(index: int) -> Detections:
        batch = as_delivered(draw_batch(index, images=2), device).to(device)
        with ops.implementation("reference"), inference_autocast(config.precision, device):
            found: Detections = model(batch)
        return found

    return step


def narrow_config(opt_level: str = "O0", dtype: str = "auto") -> Config:
    """Mask R-CNN with few channels and samples, otherwise as published."""
    config = Config(precision=PrecisionConfig(opt_level=opt_level, dtype=dtype))
    config.model.stem_channels = 8
    config.model.res2_channels = 32
    config.model.width_per_group = 8
    config.model.fpn_channels = 16
    config.anchors.sizes = [[8.0], [16.0], [32.0], [64.0], [128.0]]
    config.rpn.samples = 64
    config.rpn.pre_nms_train = config.rpn.pre_nms_test = 100
    config.rpn.post_nms_train = config.rpn.post_nms_test = 50
    config.roi.samples = 32
    config.roi.detections = 12
    config.box_head.fc_dim = 32
    config.box_head.sampling_ratio = config.mask_head.sampling_ratio = 2
    config.mask_head.conv_dim = 16
    config.solver.base_lr = 1e-3
    config.solver.warmup_iters = 0
    return config


def make_model(config: Config, device: torch.device) -> GeneralizedRCNN:
    """The network with random weights, made fit to train as train.py does it: losses are finite."""
    model = to_device(build_model(config, CLASSES, static_shapes=True), device)
    noise_1CHW = 50 * torch.randn(1, 3, *BUCKETS[0], generator=torch.Generator().manual_seed(0))
    measure_frozen_norms(model.backbone, noise_1CHW.to(device))
    return model


def as_delivered(batch: DetectionBatch, device: torch.device) -> DetectionBatch:
    """A batch as a loader hands it over: in pinned memory for an accelerator."""
    if device.type == "cpu":
        return batch
    tensors = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    return batch._replace(**{name: tensor.pin_memory() for name, tensor in tensors.items()})


def draw_batch(seed: int, images: int, bucket: tuple[int, int] | None = None) -> DetectionBatch:
    """Noise with boxes and their diamonds as masks, sizes and counts drawn anew for each seed."""
    generator = torch.Generator().manual_seed(seed)
    height, width = bucket or BUCKETS[seed % len(BUCKETS)]

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    sizes_B2 = torch.stack(
        [integers(height - 40, height + 1, images), integers(width - 40, width + 1, images)], dim=1
    )
    images_BCHW = integers(0, 256, images, 3, height, width).to(torch.uint8)
    valid_BQ = torch.arange(SLOTS) < integers(0, SLOTS + 1, images, 1)
    limit_B12 = sizes_B2.flip(1)[:, None].float()
    corner_BQ2 = torch.rand(images, SLOTS, 2, generator=generator) * (limit_B12 - 20)
    side_BQ2 = torch.rand(images, SLOTS, 2, generator=generator) * 60 + 8
    boxes_BQ4 = torch.cat([corner_BQ2, (corner_BQ2 + side_BQ2).minimum(limit_B12)], dim=2)
    boxes_BQ4 = boxes_BQ4 * valid_BQ[..., None]
    x0, y0, x1, y1 = boxes_BQ4.unbind(2)
    middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
    corners_BQ42 = torch.stack(
        [middle_x, y0, x1, middle_y, middle_x, y1, x0, middle_y], dim=2
    ).unflatten(2, (4, 2))
    edges_BQE4 = torch.zeros(images, SLOTS, EDGES, 4)
    edges_BQE4[:, :, :4] = torch.cat([corners_BQ42, corners_BQ42.roll(-1, 2)], dim=3)
    rings_BQE = torch.full((images, SLOTS, EDGES), -1)
    rings_BQE[:, :, :4] = torch.where(valid_BQ, 0, -1)[..., None]
    return DetectionBatch(
        images_BCHW=images_BCHW,
        sizes_B2=sizes_B2,
        extent_2=-(-sizes_B2.amax(dim=0) // 32) * 32,
        boxes_BQ4=boxes_BQ4,
        labels_BQ=integers(0, CLASSES, images, SLOTS),
        valid_BQ=valid_BQ,
        edges_BQE4=edges_BQE4,
        rings_BQE=rings_BQE,
        image_ids_B=torch.arange(images),
        item_ids=[f"{seed}-{image}" for image in range(images)],
        damaged=[],
        originals_B2=sizes_B2,
        ring_slots=RINGS,
    )
