"""Steps as an accelerator runs them, for ``tools/check_static.py`` and ``tools/npu_ops.py``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from twins import recipe
from twins.config import Config
from twins.data import Preprocess, TrainTransform
from twins.evaluate import count_batch, new_counts
from twins.model import Twins, build_model
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig
from zoo_common.data import Batch, Normalize, kept_rng, seed_rng
from zoo_common.imagenet import IMAGENET_MEAN, IMAGENET_STD
from zoo_common.loss_watch import LossWatch

CLASSES, IMAGES, SIZE = 10, 4, 64
POOL = 6  # batches, taken in turn
WARMUP = POOL


def build(
    device: torch.device, opt_level: str = "O1", dtype: str = "bfloat16"
) -> Callable[[int], object]:
    """A function that runs training step i of a narrow Twins with the recipe of ALT-GVT-S.

    Args:
        device: where it runs.
        opt_level: as ``--amp``.
        dtype: as ``--dtype``; float16 reads one number a step, see ``zoo_common.amp``.
    """
    config = make_config(opt_level, dtype)
    batches = [as_delivered(make_batch(config, number), device) for number in range(POOL)]
    preprocess = Preprocess(SIZE).to(device)
    mixing = recipe.Mixing(num_classes=CLASSES)
    criterion = recipe.ClassificationLoss()
    model = make_model(config, device)
    optimizer = recipe.build_optimizer(model, lr=1e-3)
    precision = Precision(config.precision, model, optimizer, device)
    watch = LossWatch(0, spike_factor=config.run.spike_factor)

    def step(index: int) -> None:
        host = batches[index % POOL]
        batch = host.to(device)
        # Not preprocess(batch), which on a CPU erases image by image.
        images_BCHW = preprocess.normalize(batch.images_BCHW)
        images_BCHW = preprocess.erase_all(images_BCHW, host.draws_BD)
        images_BCHW, targets = mixing(
            images_BCHW, batch.labels_B, seed=recipe.step_seed(config.run.seed, index)
        )
        with precision.autocast():
            loss = criterion(model(images_BCHW), targets)
        watch.add(index, {"loss": loss}, host.item_ids)
        precision.step(loss)

    return step


def evaluation(
    device: torch.device, opt_level: str = "O1", dtype: str = "bfloat16"
) -> Callable[[int], object]:
    """A function that classifies batch i as evaluate.py does; arguments as those of ``build``."""
    config = make_config(opt_level, dtype)
    batches = [as_delivered(make_batch(config, number), device) for number in range(POOL)]
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD).to(device)
    model = make_model(config, device).eval()
    counts = new_counts(device)

    @torch.no_grad()
    def step(index: int) -> None:
        batch = batches[index % POOL]
        count_batch(model, normalize, batch, config, counts)

    return step


def make_config(opt_level: str, dtype: str) -> Config:
    """The recipe in a precision."""
    return Config(precision=PrecisionConfig(opt_level=opt_level, dtype=dtype, clip_grad=5.0))


def make_model(config: Config, device: torch.device) -> Twins:
    """The narrow variant with the recipe's drop path."""
    return build_model(
        "alt_gvt_smoke", num_classes=CLASSES, drop_path_rate=config.model.drop_path
    ).to(device)


def as_delivered(batch: Batch, device: torch.device) -> Batch:
    """A batch as a loader hands it over: pinned for an accelerator, else in shared memory."""
    if device.type == "cpu":
        return batch._replace(draws_BD=batch.draws_BD.share_memory_())
    return batch._replace(
        images_BCHW=batch.images_BCHW.pin_memory(),
        labels_B=batch.labels_B.pin_memory(),
        draws_BD=batch.draws_BD.pin_memory(),
    )


def make_batch(config: Config, number: int) -> Batch:
    """Pictures of many sizes, augmented as for training."""
    data = config.data
    transform = TrainTransform(
        SIZE,
        crop_scale=(data.crop_min, 1.0),
        hflip=data.flip,
        auto_augment=data.rand_augment,
        erase_prob=data.erase,
    )
    random = np.random.default_rng(number)
    with kept_rng():
        seed_rng(config.run.seed, 0, number)
        sizes = random.integers(40, 200, size=(IMAGES, 2))
        noise = [random.integers(256, size=(*size, 3), dtype=np.uint8) for size in sizes]
        pixels = [transform(Image.fromarray(image)) for image in noise]
    images_BHWC = np.stack([item.image_HWC for item in pixels])
    draws_BD = torch.tensor([item.draws for item in pixels])
    return Batch(
        images_BCHW=torch.from_numpy(images_BHWC.transpose(0, 3, 1, 2).copy()),
        labels_B=torch.from_numpy(random.integers(CLASSES, size=IMAGES)),
        draws_BD=draws_BD,
        item_ids=[f"noise {number}.{item}" for item in range(IMAGES)],
        damaged=[],
    )
