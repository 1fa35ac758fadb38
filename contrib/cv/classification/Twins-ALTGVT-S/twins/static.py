"""Training steps for ``tools/check_static.py``, as train.py takes them on an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from twins import recipe
from twins.config import Config
from twins.data import Preprocess, TrainTransform
from twins.model import build_model
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig
from zoo_common.data import Batch, kept_rng, seed_rng

CLASSES, IMAGES, SIZE = 10, 4, 64
POOL = 6  # batches, taken in turn
WARMUP = POOL


def build(device: torch.device) -> Callable[[int], object]:
    """A function that runs training step i of a narrow Twins with the recipe of ALT-GVT-S.

    float16 reads one number a step, see ``zoo_common.amp``, so it is bfloat16.
    """
    config = Config(precision=PrecisionConfig(opt_level="O1", dtype="bfloat16", clip_grad=5.0))
    batches = [make_batch(config, number) for number in range(POOL)]
    preprocess = Preprocess(SIZE).to(device)
    mixing = recipe.Mixing(num_classes=CLASSES)
    criterion = recipe.ClassificationLoss()
    model = build_model(
        "alt_gvt_smoke", num_classes=CLASSES, drop_path_rate=config.model.drop_path
    ).to(device)
    optimizer = recipe.build_optimizer(model, lr=1e-3)
    precision = Precision(config.precision, model, optimizer, device)

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
        precision.step(loss)

    return step


def make_batch(config: Config, number: int) -> Batch:
    """Pictures of many sizes, augmented as for training; ``draws_BD`` as a loader delivers it."""
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
        draws_BD=draws_BD.share_memory_(),
        item_ids=[f"noise {number}.{item}" for item in range(IMAGES)],
        damaged=[],
    )
