"""Points that a toy run reads from pictures through data workers; copied into the toy's package."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from toy.config import Config
from toy.train import Batch

from zoo_common.data import Pixels, build_loader
from zoo_common.elastic import Met
from zoo_common.run import Run

WORKERS = 2


class Files:
    """The pictures of a directory, in the order of their names."""

    def __init__(self, directory: Path) -> None:
        self._paths = sorted(directory.glob("*.png"))

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return str(self._paths[index])

    def item_id(self, index: int) -> str:
        return self._paths[index].name

    def label(self, index: int) -> int:
        return 0


def pixels(image: Image.Image) -> Pixels:
    return Pixels(np.array(image))


class Pictures:
    """The mean of a picture is x."""

    def __init__(self, config: Config, run: Run) -> None:
        processes = run.processes
        self._stream = build_loader(
            Files(Path(config.data.path)),
            pixels,
            batch_size=config.data.batch_size,
            rank=processes.rank,
            world_size=processes.world_size,
            seed=config.run.seed,
            total_steps=config.data.steps,
            workers=WORKERS,
            device=run.device,
        )
        self.steps_per_epoch = self._stream.steps_per_epoch
        self.global_batch = config.data.batch_size * processes.world_size

    def seek(self, step: int, met: tuple[Met, ...] = ()) -> None:
        self._stream.seek(step, met)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream:
            x_B1 = batch.images_BCHW.to(torch.float32).mean(dim=(1, 2, 3))[:, None] / 255
            yield Batch(x_B1, 3 * x_B1 + 1, batch.item_ids)
