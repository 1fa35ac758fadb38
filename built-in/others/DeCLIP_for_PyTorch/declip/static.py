"""Steps as an accelerator runs them, for ``tools/check_static.py`` and ``tools/npu_ops.py``.

Shape letters: V views, U texts of a caption, B images, T tokens, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from declip.batch import Batch, Masked
from declip.config import Config
from declip.evaluate import count
from declip.model import CLIP, build_model, to_device
from declip.objective import Objective
from declip.recipe import build_optimizer, clamp_scale, set_lr
from declip.zero_shot import similarities
from zoo_common.amp import Precision, inference_autocast
from zoo_common.config import PrecisionConfig

IMAGES, SIZE, CLASSES = 4, 64, 10
CONTEXT, SLOTS, VOCABULARY = 24, 32, 600
TOWERS = ("vit", "resnet")
POOL = 5  # batches, taken in turn

_SPECIAL_TOKENS = 3  # mask, start and end: the last ones


def build(
    device: torch.device, opt_level: str = "O0", dtype: str = "auto"
) -> Callable[[int], object]:
    """A function that trains a narrow DeCLIP: step i one with a ViT, step i + 1 with a ResNet.

    Args:
        device: where it runs.
        opt_level: as ``--amp``.
        dtype: as ``--dtype``; float16 reads one number a step, see ``zoo_common.amp``.
    """
    steps = [_trainer(narrow_config(tower, opt_level, dtype), device) for tower in TOWERS]
    return lambda index: steps[index % len(steps)](index)


def _trainer(config: Config, device: torch.device) -> Callable[[int], Tensor]:
    model = make_model(config, device)
    objective = Objective(config.loss, config.model.embed_dim, device=device, seed=0, rank=0)
    optimizer = build_optimizer(model, config.optimizer)
    precision = Precision(config.precision, model, optimizer, device)
    batches = [delivered(draw_batch(number), device) for number in range(POOL)]

    def step(index: int) -> Tensor:
        batch = batches[index % POOL].to(device)
        set_lr(optimizer, index + 1, config.optimizer, config.schedule.steps)
        with precision.autocast(model):
            features = model(batch)
        total = torch.stack(list(objective(features, batch).values())).sum()
        clamp_scale(model, optimizer, config.loss)
        precision.step(total)
        clamp_scale(model, optimizer, config.loss)
        return total

    return step


def evaluation(
    device: torch.device, opt_level: str = "O0", dtype: str = "auto"
) -> Callable[[int], object]:
    """A function that classifies batch i with both networks; arguments as those of ``build``."""
    configs = [narrow_config(tower, opt_level, dtype) for tower in TOWERS]
    models = [make_model(config, device).eval() for config in configs]
    batches = [delivered(draw_batch(number, classes=CLASSES), device) for number in range(POOL)]
    counts = torch.zeros(3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def step(index: int) -> None:
        batch = batches[index % POOL].to(device)
        labels_B = torch.arange(IMAGES, device=device)
        for model, config in zip(models, configs, strict=True):
            with inference_autocast(config.precision, device):
                texts_CD = model.caption_features(batch.tokens_UBT[0], batch.ends_UB[0])
                classes_CD = F.normalize(texts_CD.float(), dim=1)
                cosines_BC = similarities(model, batch.images_VBCHW[0], classes_CD)
            count(cosines_BC, labels_B, counts)

    return step


def narrow_config(tower: str, opt_level: str = "O0", dtype: str = "auto") -> Config:
    """DeCLIP with few channels and a small vocabulary, otherwise as the card trains it."""
    config = Config(precision=PrecisionConfig(opt_level=opt_level, dtype=dtype))
    model = config.model
    model.tower = tower
    model.embed_dim = model.text_width = 32
    model.input_size, model.patch = SIZE, 16
    model.image_width, model.image_layers, model.image_heads = 32, 2, 2
    if tower == "resnet":
        model.image_width, model.image_depths, model.image_heads = 8, [1, 1, 1, 1], 4
    model.context_length, model.text_layers, model.text_heads = CONTEXT, 2, 2
    model.projector_width, model.predictor_width = 48, 24
    config.loss.queue_size = 10 * IMAGES + 1  # so that a batch meets its end
    config.optimizer.warmup_steps = 2
    return config


def make_model(config: Config, device: torch.device) -> CLIP:
    """The network with the same random weights each time."""
    torch.manual_seed(0)
    return to_device(build_model(config.model, config.loss, VOCABULARY), device)


def delivered(batch: Batch, device: torch.device) -> Batch:
    """A batch as a loader hands it over: in pinned memory for an accelerator."""
    if device.type == "cpu":
        return batch
    masked = batch.masked
    return batch._replace(
        images_VBCHW=batch.images_VBCHW.pin_memory(),
        tokens_UBT=batch.tokens_UBT.pin_memory(),
        ends_UB=batch.ends_UB.pin_memory(),
        masked=masked and Masked(*(slots_M.pin_memory() for slots_M in masked)),
    )


def draw_batch(seed: int, images: int = IMAGES, classes: int = 0) -> Batch:
    """Noise with captions of any tokens: whole, augmented and masked, padded to the context.

    Args:
        seed: of what is drawn.
        images: B.
        classes: captions, in place of one an image.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    captions = classes or images
    mask, start, end = range(VOCABULARY - _SPECIAL_TOKENS, VOCABULARY)
    ends_UB = integers(2, CONTEXT, 3, captions)
    ends_UB[2] = ends_UB[0]
    place_T = torch.arange(CONTEXT)
    words_UBT = integers(0, mask, 3, captions, CONTEXT)
    words_UBT[2] = words_UBT[0]
    words_UBT[..., 0] = start
    tokens_UBT = words_UBT * (place_T < ends_UB[..., None]) + end * (place_T == ends_UB[..., None])
    inside_BT = (place_T > 0) & (place_T < ends_UB[2][:, None])
    # At seed 0 nothing is masked.
    drawn_BT = torch.rand(inside_BT.shape, generator=generator) < 0.15 * (seed > 0)
    rows, columns = (inside_BT & drawn_BT).nonzero(as_tuple=True)
    rows, columns = rows[:SLOTS], columns[:SLOTS]
    masked = Masked(
        torch.zeros(SLOTS, dtype=torch.int64),
        torch.zeros(SLOTS, dtype=torch.int64),
        torch.full((SLOTS,), -100),
    )
    masked.rows_M[: len(rows)] = rows + 2 * captions
    masked.columns_M[: len(rows)] = columns
    masked.labels_M[: len(rows)] = tokens_UBT[2, rows, columns]
    tokens_UBT[2, rows, columns] = mask
    return Batch(
        images_VBCHW=integers(0, 256, 2, images, 3, SIZE, SIZE).to(torch.uint8),
        tokens_UBT=tokens_UBT,
        ends_UB=ends_UB,
        masked=masked,
        item_ids=[f"{seed}-{image}" for image in range(images)],
        damaged=[],
    )
