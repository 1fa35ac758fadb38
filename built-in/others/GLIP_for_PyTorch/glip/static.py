"""Steps as an accelerator runs them, for ``tools/check_static.py`` and ``tools/npu_ops.py``.

On a CPU too they take the plain-torch operators that an NPU runs, not the CPU's own kernels, which
may look at what is in host memory.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import BertConfig

from glip.captions import Caption, Query, Text
from glip.config import Config
from glip.data import Batch
from glip.detect import Detections, find, read
from glip.model import FLOAT32_INPUTS, GLIP
from glip.recipe import build_optimizer, set_lr
from zoo_common.amp import Precision, inference_autocast
from zoo_common.config import PrecisionConfig
from zoo_common.detection import ops
from zoo_common.detection.batching import DetectionBatch

BUCKETS = ((96, 128), (128, 96), (128, 160), (160, 128))
CLASSES, SLOTS, TOKENS = 5, 8, 24
VOCABULARY = 50

# Elsewhere than the steps, as a loader's processes are: nothing of theirs is counted.
_LOADER = ThreadPoolExecutor(max_workers=1)

_Tensors = TypeVar("_Tensors", DetectionBatch, Text)


def build(
    device: torch.device, opt_level: str = "O0", dtype: str = "auto"
) -> Callable[[int], object]:
    """A narrow GLIP; call ``i`` trains a step on images of sizes that step alone has.

    Args:
        device: where it runs.
        opt_level: as ``--amp``.
        dtype: as ``--dtype``; float16 reads one number a step, see ``zoo_common.amp``.
    """
    config = narrow_config(opt_level, dtype)
    torch.manual_seed(0)
    model = make_model(config).to(device)
    optimizer = build_optimizer(model, config.solver)
    precision = Precision(config.precision, model, optimizer, device, float32_inputs=FLOAT32_INPUTS)

    def step(index: int) -> Tensor:
        batch = delivered(index, device).to(device)
        set_lr(optimizer, index, config.solver, planned=1000)
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
    model = make_model(config).to(device).eval()
    with inference_autocast(config.precision, device):
        wanted = read(model, [class_query()], device)

    @torch.no_grad()
    def step(index: int) -> list[Detections]:
        batch = delivered(index, device).detection.to(device)
        with ops.implementation("reference"), inference_autocast(config.precision, device):
            return find(model, batch.images_BCHW, batch.sizes_B2, wanted, config.test)

    return step


def narrow_config(opt_level: str = "O0", dtype: str = "auto") -> Config:
    """GLIP with few channels and layers, otherwise as published."""
    config = Config(precision=PrecisionConfig(opt_level=opt_level, dtype=dtype))
    model = config.model
    model.swin_width, model.swin_depths, model.swin_heads = 8, [2, 2, 2, 2], [1, 2, 4, 8]
    model.channels, model.tower_blocks = 32, 2
    model.fusion_width, model.fusion_heads = 32, 4
    model.max_tokens = TOKENS
    config.test.score_thr = 0.001  # so that untrained weights find something
    config.test.nms_pre, config.test.max_per_img = 50, 12
    config.solver.base_lr = config.solver.lang_lr = 1e-3
    config.solver.warmup_iters = 0
    return config


def narrow_bert() -> BertConfig:
    """The settings of a BERT for :func:`narrow_config`."""
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=TOKENS,
    )


def make_model(config: Config) -> GLIP:
    """The network with random weights."""
    return GLIP(config.model, config.loss, narrow_bert())


def class_tokens() -> Tensor:
    """Which tokens mean which class, bool (CLASSES, TOKENS)."""
    token = torch.arange(TOKENS)
    first = 2 * torch.arange(CLASSES)[:, None] + 1
    return (token >= first) & (token < first + 2)


def class_query() -> Query:
    """A caption of all classes, whose tokens stand for no words."""
    token_T = torch.arange(TOKENS)
    used_T = token_T < 2 * CLASSES + 2
    text = Text((token_T % VOCABULARY * used_T)[None], used_T[None])
    return Query(list(range(CLASSES)), Caption("", []), text, class_tokens())


def delivered(index: int, device: torch.device) -> Batch:
    """Batch ``index`` as a loader hands it over: in pinned memory for an accelerator."""
    batch = _LOADER.submit(draw_batch, index, images=2).result()
    if device.type == "cpu":
        return batch
    assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
    return Batch(
        _pinned(batch.detection),
        _pinned(batch.text),
        batch.boxes_BQ4.pin_memory(),
        batch.tokens_BQT.pin_memory(),
    )


def _pinned(tensors: _Tensors) -> _Tensors:
    found: dict[str, Any] = {
        name: value.pin_memory()
        for name, value in tensors._asdict().items()
        if isinstance(value, Tensor)
    }
    return tensors._replace(**found)


def draw_batch(seed: int, images: int, bucket: tuple[int, int] | None = None) -> Batch:
    """Noise with boxes and captions, sizes and counts drawn anew for each seed."""
    generator = torch.Generator().manual_seed(seed)
    height, width = bucket or BUCKETS[seed % len(BUCKETS)]

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    sizes_B2 = torch.stack(
        [integers(height - 40, height + 1, images), integers(width - 40, width + 1, images)], dim=1
    )
    valid_BQ = torch.arange(SLOTS) < integers(0, SLOTS + 1, images, 1)
    limit_B12 = sizes_B2.flip(1)[:, None].float()
    corner_BQ2 = torch.rand(images, SLOTS, 2, generator=generator) * (limit_B12 - 20)
    side_BQ2 = torch.rand(images, SLOTS, 2, generator=generator) * 60 + 8
    boxes_BQ4 = torch.cat([corner_BQ2, (corner_BQ2 + side_BQ2).minimum(limit_B12 - 1)], dim=2)
    boxes_BQ4 = boxes_BQ4 * valid_BQ[..., None]
    labels_BQ = integers(0, CLASSES, images, SLOTS) * valid_BQ
    mask_BT = torch.arange(TOKENS) < integers(2 * CLASSES + 2, TOKENS + 1, images, 1)
    detection = DetectionBatch(
        images_BCHW=integers(0, 256, images, 3, height, width).to(torch.uint8),
        sizes_B2=sizes_B2,
        extent_2=-(-sizes_B2.amax(dim=0) // 32) * 32,
        originals_B2=sizes_B2,
        boxes_BQ4=boxes_BQ4,
        labels_BQ=labels_BQ,
        valid_BQ=valid_BQ,
        edges_BQE4=None,
        rings_BQE=None,
        ring_slots=1,
        image_ids_B=torch.arange(images),
        item_ids=[f"{seed}-{image}" for image in range(images)],
        damaged=[],
    )
    tokens_BT = integers(1, VOCABULARY, images, TOKENS) * mask_BT
    tokens_BQT = class_tokens()[labels_BQ] & valid_BQ[..., None]
    return Batch(detection, Text(tokens_BT, mask_BT), boxes_BQ4, tokens_BQT)
