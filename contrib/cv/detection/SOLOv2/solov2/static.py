"""Steps as an accelerator runs them, for ``tools/check_static.py`` and ``tools/npu_ops.py``.

On a CPU too they take the plain-torch operators that an NPU runs, not the CPU's own kernels, which
may look at what is in host memory.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from solov2.config import Config
from solov2.data import Batch
from solov2.layers import measure_norms
from solov2.model import FLOAT32_INPUTS, Detections, SOLOv2, build_model, to_device
from solov2.recipe import build_optimizer, set_lr
from solov2.targets import Targets, prepare
from zoo_common.amp import Precision, inference_autocast
from zoo_common.config import PrecisionConfig
from zoo_common.detection import ops
from zoo_common.detection.batching import DetectionBatch

BUCKETS = ((96, 128), (128, 96), (128, 160), (160, 128))
CLASSES, SLOTS = 5, 8

# Elsewhere than the steps, as a loader's processes are: targets are read while they are made.
_LOADER = ThreadPoolExecutor(max_workers=1)

_Tensors = TypeVar("_Tensors", DetectionBatch, Targets)


def build(
    device: torch.device, opt_level: str = "O0", dtype: str = "auto"
) -> Callable[[int], object]:
    """A narrow SOLOv2; call ``i`` trains a step on images of sizes that step alone has.

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
        batch = delivered(index, device).to(device)
        set_lr(optimizer, index, config.solver, steps_per_epoch=1000, world_size=1)
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
        batch = delivered(index, device)._replace(targets=None).to(device)
        with ops.implementation("reference"), inference_autocast(config.precision, device):
            found: Detections = model(batch)
        return found

    return step


def narrow_config(opt_level: str = "O0", dtype: str = "auto") -> Config:
    """SOLOv2 with few channels and small grids, otherwise as published."""
    config = Config(precision=PrecisionConfig(opt_level=opt_level, dtype=dtype))
    config.model.stem_channels = config.model.base_channels = 8
    config.model.fpn_channels = 16
    head, test = config.head, config.test
    head.stacked_convs = 2
    head.channels = head.kernel_channels = head.mask_channels = 32
    head.grids = [20, 18, 12, 8, 6]
    head.scale_ranges = [[1.0, 24.0], [12.0, 48.0], [24.0, 96.0], [48.0, 192.0], [96.0, 512.0]]
    test.candidates, test.nms_pre, test.max_per_img = 200, 100, 12
    test.score_thr = test.update_thr = 0.001  # so that untrained weights find something
    config.solver.base_lr = 1e-3
    config.solver.warmup_iters = 0
    return config


def make_model(config: Config, device: torch.device) -> SOLOv2:
    """The network with random weights, made fit to train as train.py does it: losses are finite."""
    model = to_device(build_model(config, CLASSES, static_shapes=True), device)
    noise_1CHW = torch.randn(1, 3, *BUCKETS[0], generator=torch.Generator().manual_seed(0))
    measure_norms(model.backbone, noise_1CHW.to(device))
    return model


def delivered(index: int, device: torch.device) -> Batch:
    """Batch ``index`` as a loader hands it over: in pinned memory for an accelerator."""
    batch = _LOADER.submit(draw_batch, index, images=2).result()
    if device.type == "cpu":
        return batch
    assert batch.targets is not None
    return Batch(_pinned(batch.detection), _pinned(batch.targets))


def _pinned(tensors: _Tensors) -> _Tensors:
    found: dict[str, Any] = {
        name: value.pin_memory()
        for name, value in tensors._asdict().items()
        if isinstance(value, Tensor)
    }
    return tensors._replace(**found)


def draw_batch(seed: int, images: int, bucket: tuple[int, int] | None = None) -> Batch:
    """Noise with ellipses as objects, sizes and counts drawn anew for each seed."""
    generator = torch.Generator().manual_seed(seed)
    height, width = bucket or BUCKETS[seed % len(BUCKETS)]

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    sizes_B2 = torch.stack(
        [integers(height - 40, height + 1, images), integers(width - 40, width + 1, images)], dim=1
    )
    few = seed // len(BUCKETS) % 2 == 0
    most = 3 if few else SLOTS
    valid_BQ = torch.arange(SLOTS) < integers(0, most + 1, images, 1)
    limit_B12 = sizes_B2.flip(1)[:, None].float()
    corner_BQ2 = torch.rand(images, SLOTS, 2, generator=generator) * (limit_B12 - 20)
    side_BQ2 = torch.rand(images, SLOTS, 2, generator=generator) * 60 + 8
    boxes_BQ4 = torch.cat([corner_BQ2, (corner_BQ2 + side_BQ2).minimum(limit_B12)], dim=2)
    boxes_BQ4 = boxes_BQ4 * valid_BQ[..., None]
    centers_BQ2 = (boxes_BQ4[..., :2] + boxes_BQ4[..., 2:]) / 2
    detection = DetectionBatch(
        images_BCHW=integers(0, 256, images, 3, height, width).to(torch.uint8),
        sizes_B2=sizes_B2,
        extent_2=-(-sizes_B2.amax(dim=0) // 32) * 32,
        originals_B2=sizes_B2,
        boxes_BQ4=boxes_BQ4,
        labels_BQ=integers(0, CLASSES, images, SLOTS) * valid_BQ,
        valid_BQ=valid_BQ,
        edges_BQE4=None,
        rings_BQE=None,
        masks_BQHW=_ellipses(boxes_BQ4, height // 4, width // 4),
        centers_BQ2=centers_BQ2,
        ring_slots=1,
        image_ids_B=torch.arange(images),
        item_ids=[f"{seed}-{image}" for image in range(images)],
        damaged=[],
    )
    head = narrow_config().head
    # Three objects make 54 pairs at most, so that these numbers of slots come by turns.
    head.pair_slots = [64 if few else 256]
    return Batch(detection, prepare(detection, head, static=True))


def _ellipses(boxes_BQ4: Tensor, height: int, width: int) -> Tensor:
    """What fills the boxes, at a quarter of their size; uint8 [B, Q, H, W]."""
    x_W, y_H = torch.arange(width) * 4 + 2.0, torch.arange(height) * 4 + 2.0
    x0, y0, x1, y1 = (side[..., None] for side in boxes_BQ4.unbind(2))
    x_BQW = (2 * x_W - x0 - x1) / (x1 - x0).clamp(min=1e-3)
    y_BQH = (2 * y_H - y0 - y1) / (y1 - y0).clamp(min=1e-3)
    inside = x_BQW[:, :, None].square() + y_BQH[..., None].square() <= 1
    return inside.to(torch.uint8)
