"""The images, objects and targets of a run, from its config."""

import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from detector_runs import annotation, draw_coco, edit

from solov2 import data, train
from solov2.config import CARD_OPTIONS, Config
from solov2.data import Batch
from zoo_common.config import load_config
from zoo_common.distributed import Processes
from zoo_common.errors import UserError
from zoo_common.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parent))

from solo_runs import write_recipe


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return draw_coco(tmp_path / "coco")


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts back the handlers that a run sets, which only one that ends well does itself."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def settings(coco: Path, *words: str) -> Config:
    recipe = write_recipe(coco.parent / "tiny.yaml")
    return load_config(Config, [f"--config={recipe}", f"--data_path={coco}", *words], CARD_OPTIONS)


def run_of(rank: int = 0, world_size: int = 1) -> Run:
    """What the functions here ask of a run."""
    processes = Processes(rank, rank, world_size, world_size, 1)
    return cast(Run, SimpleNamespace(processes=processes, device=torch.device("cpu")))


def train_batches(config: Config, rank: int = 0, world_size: int = 1) -> list[Batch]:
    return list(data.train_stream(config, data.open_train(config), run_of(rank, world_size)))


def held_out(config: Config, rank: int, world_size: int) -> list[str]:
    stream = data.eval_stream(config, data.open_val(config), run_of(rank, world_size))
    return [name for batch in stream for name in batch.item_ids]


def test_a_step_has_batch_size_images_in_each_process(coco: Path) -> None:
    """Six images: three steps an epoch of two in one process, one of two in each of three."""
    whole = [batch.item_ids for batch in train_batches(settings(coco))]
    ranks = [train_batches(settings(coco, "solver.epochs=1"), rank, 3) for rank in range(3)]
    assert [len(names) for names in whole] == [2] * 6
    assert [len(batches) for batches in ranks] == [1, 1, 1]
    assert sorted(name for batches in ranks for batch in batches for name in batch.item_ids) == [
        f"train {number}.jpg" for number in range(6)
    ]


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["solver.epochs=5"], 15),
        (["solver.epochs=5", "run.max_steps=4"], 4),
        (["solver.epochs=5", "solver.performance=true"], 3),
        (["solver.performance=true", "solver.performance_steps=2"], 2),
        (["solver.performance=true", "solver.performance_steps=2", "run.max_steps=1"], 1),
    ],
)
def test_a_run_is_as_long_as_its_epochs_or_what_ends_sooner(
    coco: Path, words: list[str], steps: int
) -> None:
    assert data.total_steps(settings(coco, *words), per_epoch=3) == steps
    assert len(train_batches(settings(coco, *words))) == steps


def test_fewer_images_than_a_step_are_told(coco: Path) -> None:
    with pytest.raises(UserError, match="has 6 images, fewer than one global batch of 8"):
        train_batches(settings(coco), 0, 4)


def test_held_out_images_come_once_over_all_processes(coco: Path) -> None:
    config = settings(coco, "evaluate.batch_size=2")
    names = held_out(config, 0, 3) + held_out(config, 1, 3) + held_out(config, 2, 3)
    assert sorted(names) == [f"val {number}.jpg" for number in range(4)]


def test_settings_reach_the_images_and_the_masks_follow_them(coco: Path) -> None:
    words = ["data.min_sizes=[64]", "data.max_size=72", "data.size_divisibility=64"]
    flipped = train_batches(settings(coco, *words, "data.flip=1"))
    plain = train_batches(settings(coco, *words, "data.flip=0"))
    sizes = {tuple(sorted(size.tolist())) for b in plain for size in b.detection.sizes_B2}
    assert sizes == {(58, 72)}
    for one, other in zip(flipped, plain, strict=True):
        assert one.detection.edges_BQE4 is None
        masks_BQHW, centers_BQ2 = one.detection.masks_BQHW, one.detection.centers_BQ2
        assert masks_BQHW is not None and centers_BQ2 is not None
        assert other.detection.centers_BQ2 is not None
        size = one.detection.images_BCHW.shape[-2:]
        assert masks_BQHW.shape[-2:] == (size[0] // 4, size[1] // 4)
        assert masks_BQHW.flatten(2).any(2).tolist() == one.detection.valid_BQ.tolist()
        width_B1 = one.detection.sizes_B2[:, 1:].float() - 1
        mirrored_BQ = width_B1 - other.detection.centers_BQ2[..., 0]
        valid_BQ = one.detection.valid_BQ
        torch.testing.assert_close(centers_BQ2[..., 0][valid_BQ], mirrored_BQ[valid_BQ])


def test_targets_are_of_the_objects_in_their_batch(coco: Path) -> None:
    for batch in train_batches(settings(coco)):
        targets = batch.targets
        assert targets is not None and targets.valid_BP.any(1).all()
        labels_BP = targets.labels_BS.gather(1, targets.cells_BP)
        wanted_BP = batch.detection.labels_BQ.gather(1, targets.objects_BP)
        # Where objects share a cell it is the last one's; with two classes, the higher one.
        assert (labels_BP >= wanted_BP)[targets.valid_BP].all()
        real_BP = batch.detection.valid_BQ.gather(1, targets.objects_BP)
        assert real_BP[targets.valid_BP].all()


def test_a_batch_is_cut_and_moved_as_a_whole(coco: Path) -> None:
    batch = train_batches(settings(coco))[0]
    first, second = batch.to(torch.device("cpu")).chunk(2)
    assert [*first.item_ids, *second.item_ids] == batch.item_ids
    for part, row in ((first, 0), (second, 1)):
        assert part.targets is not None and batch.targets is not None
        for cut, whole in zip(part.targets, batch.targets, strict=True):
            assert torch.equal(cut, whole[row : row + 1])
    meta = batch.to(torch.device("meta"))
    assert meta.targets is not None and meta.targets.labels_BS.is_meta
    assert Batch(batch.detection).chunk(2)[1].targets is None
    assert Batch(batch.detection).to(torch.device("cpu")).targets is None


def test_loader_processes_can_make_targets(coco: Path) -> None:
    config = settings(coco)
    finish = partial(data.with_targets, head=config.head, static=True)
    assert pickle.loads(pickle.dumps(finish)).keywords == finish.keywords
    here, there = (
        train_batches(settings(coco, "solver.epochs=1", f"data.workers={count}"))
        for count in (0, 1)
    )
    for one, other in zip(here, there, strict=True):
        assert one.targets is not None and other.targets is not None
        for expected, found in zip(one.targets, other.targets, strict=True):
            assert torch.equal(expected, found)


def shapes_of(batches: list[Batch]) -> set[tuple[int, ...]]:
    """Height, width, object slots, and slots for pairs."""
    shapes = set()
    for batch in batches:
        assert batch.targets is not None
        slots = batch.detection.valid_BQ.shape[1]
        pairs = batch.targets.valid_BP.shape[1]
        shapes.add((*batch.detection.images_BCHW.shape[2:], slots, pairs))
    return shapes


def test_static_shapes_take_sizes_and_slots_from_config_and_data(coco: Path) -> None:
    static = ["model.static_shapes=on", "data.buckets=[[96,96]]"]
    assert shapes_of(train_batches(settings(coco, *static))) == {(96, 96, 2, 64)}
    more = train_batches(settings(coco, *static, "data.slots=9", "head.pair_slots=[80]"))
    assert shapes_of(more) == {(96, 96, 9, 80)}
    assert len(shapes_of(train_batches(settings(coco)))) > 1
    with pytest.raises(UserError, match=r"image 15 \(train 1.jpg\) has 2 objects, more than the 1"):
        train_batches(settings(coco, *static, "data.slots=1"))


CAPTION = {"id": 1, "image_id": 5, "caption": "A cat."}
OWL = {"id": 9, "name": "owl"}
LOST = {"id": 999, "file_name": "lost.jpg", "height": 64, "width": 80}


def clear(content: dict[str, Any]) -> None:
    content["annotations"].clear()


def only_crowds(content: dict[str, Any]) -> None:
    for item in content["annotations"]:
        item["iscrowd"] = 1


def of_another_size(content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"] = {"size": [10, 10], "counts": [50, 50]}


def of_one_point(content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"] = [[5, 5]]


@pytest.mark.parametrize(
    ("split", "change", "said"),
    [
        ("train", clear, "No image of .*train2017.json has an object with an outline, crowd"),
        ("train", only_crowds, "No image of .*train2017.json has an object with an outline"),
        ("val", clear, "No image of .*val2017.json has an object, crowd"),
        ("val", of_another_size, "val2017.json: .* annotation 1 cannot be used .*10, 10"),
        ("val", of_one_point, "val2017.json: .* annotation 1 cannot be used"),
        ("val", lambda content: content["categories"].append(OWL), "different categories .*9"),
        ("val", lambda content: content["categories"][1].update(name="gnu"), "'big dog'.*'gnu'"),
        ("val", lambda content: content["annotations"][0].update(category_id=99), "category_id 99"),
        ("train", lambda content: content.update(annotations=[CAPTION]), "captions and no inst"),
        ("train", lambda content: content["images"].append(LOST), "lost.jpg"),
    ],
    ids=[
        "nothing to learn",
        "crowds only",
        "nothing to find",
        "run lengths of another size",
        "a polygon of one point",
        "one class more",
        "another name",
        "an unknown class",
        "captions",
        "a missing image",
    ],
)
def test_annotations_are_refused_before_the_first_step(
    split: str,
    change: Callable[[dict[str, Any]], object],
    said: str,
    coco: Path,
    signals: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit(coco, split, change)
    output = coco.parent / "out"
    words = [f"--config={write_recipe(coco.parent / 'tiny.yaml')}", f"--data_path={coco}"]
    with pytest.raises(UserError, match=f"(?s){said}"):
        train.main([*words, f"run.output_dir={output}"])
    assert "step 1" not in capsys.readouterr().out


def odd(coco: Path, *outlines: object) -> Config:
    """The first image has objects of these outlines and no others; no image else has any."""
    items = [
        annotation(5, 3, (8, 8, 40, 40)) | {"id": number, "segmentation": outline}
        for number, outline in enumerate(outlines, start=1)
    ]
    edit(coco, "train", lambda content: content.update(annotations=items))
    return settings(coco, "data.batch_size=1", "solver.epochs=1", "data.keep_empty=true")


def objects_of(config: Config) -> int:
    """How many objects are trained on in an epoch."""
    return sum(int(batch.detection.valid_BQ.sum()) for batch in train_batches(config))


BOX = [[8, 8, 40, 8, 40, 40, 8, 40]]


def test_outlines_that_are_none_are_left_out(coco: Path) -> None:
    """Polygons of two points, run lengths of another size, damaged ones, and none at all."""
    wrong = {"size": [10, 10], "counts": [50, 50]}
    damaged = {"size": [80, 64], "counts": "no run lengths"}
    config = odd(coco, BOX, [[8, 8, 40, 40]], wrong, damaged, [])
    assert objects_of(config) == 1
    said = data.open_train(config).describe()
    assert "1 polygons have fewer than 3 points or half a point: left out" in said
    assert "2 run-length masks are damaged or not of their image's size: no outline" in said
    assert "4 objects have no outline: left out" in said


def test_masks_that_vanish_are_trained_on_as_far_as_they_are_there(coco: Path) -> None:
    """A mask of one pixel is nothing at a quarter of the size; one beyond the image is none."""
    point = {"size": [80, 64], "counts": [3000, 1, 2119]}
    empty = {"size": [80, 64], "counts": [5120]}
    config = odd(coco, BOX, point, empty)
    config.data.min_sizes, config.data.max_size = [64], 80  # the size that they have
    config.data.flip = 0
    batches = train_batches(config)
    (batch,) = [batch for batch in batches if batch.detection.valid_BQ.any()]
    assert batch.detection.valid_BQ.tolist() == [[True, True]]
    assert batch.detection.masks_BQHW is not None and batch.detection.centers_BQ2 is not None
    assert batch.detection.masks_BQHW[0].flatten(1).any(1).tolist() == [True, False]
    assert batch.detection.centers_BQ2[0, 1].tolist() == [3000 // 80, 3000 % 80]
    assert objects_of(config) == 2
