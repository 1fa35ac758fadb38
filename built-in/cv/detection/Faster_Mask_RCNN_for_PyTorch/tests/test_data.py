"""The images and objects of a run, from its config."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from detector_runs import annotation, draw_coco, edit

from rcnn import data
from rcnn.config import CARD_OPTIONS, Config
from zoo_common.config import load_config
from zoo_common.detection.batching import DetectionBatch
from zoo_common.distributed import Processes
from zoo_common.errors import UserError
from zoo_common.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rcnn_runs import write_recipe


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return draw_coco(tmp_path / "coco")


def settings(coco: Path, *words: str) -> Config:
    recipe = write_recipe(coco.parent / "tiny.yaml")
    return load_config(Config, [f"--config={recipe}", f"--data_path={coco}", *words], CARD_OPTIONS)


def run_of(rank: int = 0, world_size: int = 1, directory: Path = Path("nowhere")) -> Run:
    """What the functions here ask of a run."""
    processes = Processes(rank, rank, world_size, world_size, 1)
    device = torch.device("cpu")
    return cast(Run, SimpleNamespace(processes=processes, device=device, checkpoints=directory))


def train_batches(config: Config, rank: int = 0, world_size: int = 1) -> list[DetectionBatch]:
    index = data.open_train(config)
    return list(data.train_stream(config, index, run_of(rank, world_size), total_steps=3))


def held_out(config: Config, rank: int, world_size: int) -> list[str]:
    stream = data.eval_stream(config, data.open_val(config), run_of(rank, world_size))
    return [name for batch in stream for name in batch.item_ids]


def test_a_step_has_batch_size_images_over_all_processes(coco: Path) -> None:
    whole = [batch.item_ids for batch in train_batches(settings(coco))]
    ranks = [train_batches(settings(coco), rank, 2) for rank in range(2)]
    assert [len(names) for names in whole] == [2, 2, 2]
    assert [[*a.item_ids, *b.item_ids] for a, b in zip(*ranks, strict=True)] == whole
    assert len({name for names in whole for name in names}) == 6


def test_held_out_images_come_once_over_all_processes(coco: Path) -> None:
    config = settings(coco, "evaluate.batch_size=2")
    names = held_out(config, 0, 3) + held_out(config, 1, 3) + held_out(config, 2, 3)
    assert sorted(names) == [f"val {number}.jpg" for number in range(4)]


def test_settings_reach_the_images(coco: Path) -> None:
    words = ["data.min_sizes=[64]", "data.max_size=72", "data.flip=1", "model.masks=false"]
    batches = train_batches(settings(coco, *words))
    assert all(batch.edges_BQE4 is None for batch in batches)
    assert {tuple(sorted(size.tolist())) for b in batches for size in b.sizes_B2} == {(58, 72)}
    plain = train_batches(settings(coco, *words, "data.flip=0"))
    for one, other in zip(batches, plain, strict=True):
        left = other.sizes_B2[:, None, 1] - one.boxes_BQ4[..., 2]
        torch.testing.assert_close(left[one.valid_BQ], other.boxes_BQ4[..., 0][one.valid_BQ])


def shapes_of(batches: Sequence[DetectionBatch]) -> set[Any]:
    return {
        (*batch.images_BCHW.shape[2:], *cast(torch.Tensor, batch.edges_BQE4).shape[1:])
        for batch in batches
    }


def test_static_shapes_take_sizes_and_slots_from_config_and_data(coco: Path) -> None:
    batches = train_batches(settings(coco, "model.static_shapes=on", "data.buckets=[[96,96]]"))
    assert shapes_of(batches) == {(96, 96, 2, 64, 4)}
    batches = train_batches(
        settings(coco, "model.static_shapes=on", "data.buckets=[[96,128]]", "data.slots=9")
    )
    assert shapes_of(batches) == {(96, 128, 9, 64, 4)}
    with pytest.raises(UserError, match=r"image 15 \(train 1.jpg\) has 2 objects, more than the 1"):
        train_batches(settings(coco, "model.static_shapes=on", "data.slots=1"))


def test_an_outline_of_more_edges_than_any_slot_gets_one(coco: Path) -> None:
    ring = [number % 7 for number in range(10_000)]
    edit(coco, "train", lambda content: content["annotations"][0].update(segmentation=[ring]))
    (edges,) = {shape[3] for shape in shapes_of(train_batches(settings(coco)))} - {4}
    assert edges == 5000
    batches = train_batches(settings(coco, "model.static_shapes=on"))
    assert {shape[3] for shape in shapes_of(batches)} == {64, 8192}


def test_faster_rcnn_takes_objects_without_an_outline(coco: Path) -> None:
    boxes = [annotation(15, 3, (5, 5, 20, 20)) | {"segmentation": [], "id": 1}]
    edit(coco, "train", lambda content: content.update(annotations=boxes))
    assert not len(data.open_train(settings(coco)).trainable())
    assert len(data.open_train(settings(coco, "model.masks=false")).trainable()) == 1
