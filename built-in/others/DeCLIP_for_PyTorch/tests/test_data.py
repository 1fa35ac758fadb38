"""Batches do not depend on workers or processes; damaged pairs are replaced, counted, limited."""

import json
import random
import shutil
import string
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from declip.batch import Batch
from declip.config import CARD_OPTIONS, Config
from declip.data import (
    CaptionFiles,
    build_eval_data,
    build_train_data,
    open_train,
)
from declip.eda import Eda
from declip.index import open_index
from declip.shards import ShardSampler, open_shards
from declip.texts import Texts
from declip.tokenizer import Tokenizer
from declip.views import OneView, TwoViews
from zoo_common.config import load_config
from zoo_common.damage import Damaged
from zoo_common.data import Draw, StepSampler
from zoo_common.distributed import Processes
from zoo_common.errors import UserError
from zoo_common.run import Run
from zoo_common.sample.merges import write_merges
from zoo_common.yfcc import TRAIN_IMAGES, TRAIN_JSON

PAIRS = 24
CONTEXT = 12
SIZE = 16


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The card's tree; picture i is of a colour that its caption tells."""
    images = tmp_path / TRAIN_IMAGES
    images.mkdir()
    rng = np.random.default_rng(0)
    with (tmp_path / TRAIN_JSON).open("w") as file:
        for number in range(PAIRS):
            name = f"{number:03d}.jpg"
            pixels = rng.integers(0, 256, (20 + number, 40 - number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name)
            caption = f"the {string.ascii_lowercase[number]} one of all the pictures"
            file.write(json.dumps({"filename": name, "caption": caption, "url": ""}) + "\n")
    write_merges(tmp_path / "merges.txt.gz", [("t", "h"), ("th", "e</w>")])
    return tmp_path


def make_texts(tree: Path, **changes: Any) -> Texts:
    settings: dict[str, Any] = {
        "tokenizer": Tokenizer(tree / "merges.txt.gz"),
        "context_length": CONTEXT,
        "eda": Eda(synonyms=False),
        "mask_probability": 0.15,
        "contrast_masked": False,
    }
    return Texts(**settings | changes)


def stream(tree: Path, views: OneView | None = None, texts: Texts | None = None, **options: Any):
    images = CaptionFiles(open_index(tree, cache=tree / "cache"))
    settings = {"batch_size": 4, "seed": 3, "total_steps": 9} | options
    return build_train_data(images, texts or make_texts(tree), views or TwoViews(SIZE), **settings)


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.images_VBCHW, batch.tokens_UBT, batch.ends_UB, *(batch.masked or ())]


def content(batch: Batch) -> tuple[object, ...]:
    return (*(tensor.numpy().tobytes() for tensor in tensors(batch)), *batch.item_ids)


def spoil(tree: Path, *numbers: int) -> list[str]:
    """Half of the images missing, half cut off."""
    names = [f"{number:03d}.jpg" for number in numbers]
    for number, name in zip(numbers, names, strict=True):
        path = tree / TRAIN_IMAGES / name
        if number % 2:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:200])
    return names


# ---------------------------------------------------------------------------- batches


def test_a_batch_of_declip_has_two_views_and_three_rows(tree: Path) -> None:
    (batch,) = stream(tree, static=True, total_steps=1)
    assert batch.images_VBCHW.shape == (2, 4, 3, SIZE, SIZE)
    assert batch.images_VBCHW.dtype == torch.uint8
    assert not torch.equal(*batch.images_VBCHW)
    assert batch.tokens_UBT.shape == (3, 4, CONTEXT)
    assert batch.ends_UB.shape == (3, 4)
    assert batch.masked is not None
    assert len(batch.item_ids) == 4 and batch.damaged == []


def test_a_batch_of_clip_has_one_view_and_one_row(tree: Path) -> None:
    texts = make_texts(tree, eda=None, mask_probability=0)
    (batch,) = stream(tree, OneView(SIZE), texts, total_steps=1)
    assert batch.images_VBCHW.shape == (1, 4, 3, SIZE, SIZE)
    assert batch.tokens_UBT.shape[:2] == (1, 4)
    assert batch.masked is None


def test_captions_belong_to_their_images(tree: Path) -> None:
    texts = make_texts(tree, eda=None, mask_probability=0)
    tokenizer = Tokenizer(tree / "merges.txt.gz")
    seen = set()
    for batch in stream(tree, OneView(SIZE), texts, total_steps=6):
        for row, end, name in zip(
            batch.tokens_UBT[0], batch.ends_UB[0], batch.item_ids, strict=True
        ):
            letter = string.ascii_lowercase[int(name[:3])]
            expected = tokenizer.row(f"the {letter} one of all the pictures", CONTEXT)
            assert row[: end + 1].tolist() == expected
            seen.add(name)
    assert len(seen) == PAIRS


@pytest.mark.parametrize("static", [False, True])
def test_batches_are_the_same_with_any_workers_and_after_resuming(tree: Path, static: bool) -> None:
    whole = [content(batch) for batch in stream(tree, static=static)]
    assert len(set(whole)) == 9
    for workers, start in ((0, 4), (1, 7), (2, 2)):
        resumed = stream(tree, static=static, workers=workers)
        resumed.seek(start)
        assert [content(batch) for batch in resumed] == whole[start:]


def test_an_epoch_changes_views_and_texts(tree: Path) -> None:
    data = stream(tree, total_steps=2 * PAIRS, batch_size=1)
    by_name: dict[str, list[Batch]] = {}
    for batch in data:
        by_name.setdefault(batch.item_ids[0], []).append(batch)
    assert data.steps_per_epoch == PAIRS
    assert all(len(batches) == 2 for batches in by_name.values())
    changed = [
        (
            not torch.equal(first.images_VBCHW, second.images_VBCHW),
            first.tokens_UBT.shape != second.tokens_UBT.shape
            or not torch.equal(first.tokens_UBT, second.tokens_UBT),
        )
        for first, second in by_name.values()
    ]
    assert sum(views for views, _ in changed) == PAIRS
    assert sum(texts for _, texts in changed) > PAIRS / 2


def test_ranks_together_make_the_batch_of_one_process(tree: Path) -> None:
    (alone,) = stream(tree, static=True, total_steps=1, batch_size=8)
    parts = [
        next(iter(stream(tree, static=True, total_steps=1, rank=rank, world_size=2)))
        for rank in range(2)
    ]
    assert [name for part in parts for name in part.item_ids] == alone.item_ids
    for whole, *halves in zip(*map(tensors, (alone, *parts)), strict=True):
        if whole.ndim > 1:
            assert torch.equal(torch.cat(halves, dim=1), whole)


def test_loading_leaves_the_generators_of_the_caller_alone(tree: Path) -> None:
    data = stream(tree, total_steps=1)
    random.seed(0)
    torch.manual_seed(0)
    expected = random.random(), torch.rand(1)
    random.seed(0)
    torch.manual_seed(0)
    list(data)
    assert (random.random(), torch.rand(1)) == expected


def test_another_order_can_be_given(tree: Path) -> None:
    sampler = StepSampler(PAIRS, 4, rank=0, world_size=1, seed=3, total_steps=6, shuffle=False)
    names = [name for batch in stream(tree, sampler=sampler) for name in batch.item_ids]
    assert names == [f"{number:03d}.jpg" for number in range(PAIRS)]


def test_a_batch_takes_no_more_memory_than_was_asked_for(tree: Path) -> None:
    for views, texts in (
        (TwoViews(SIZE), make_texts(tree)),
        (OneView(SIZE), make_texts(tree, eda=None, mask_probability=0)),
    ):
        data = stream(tree, views, texts, static=True, total_steps=1)
        items = data._loader.dataset._items
        (batch,) = data
        assert items.batch_bytes(4) == sum(tensor.nbytes for tensor in tensors(batch))


def test_a_batch_survives_torchs_pinning(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone()
    )
    spoil(tree, 0, 1)
    (batch,) = stream(tree, total_steps=1, batch_size=PAIRS, max_damaged=1)
    for given in (batch, batch._replace(masked=None)):
        pinned.clear()
        result = pin_memory(given)
        assert type(result) is Batch and type(result.masked) is type(given.masked)
        assert len(pinned) == len(tensors(given))
        assert content(result) == content(given)
        assert result.damaged == given.damaged and type(result.damaged[0]) is Damaged


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_replaced_with_their_captions(tree: Path, workers: int) -> None:
    bad = spoil(tree, 3, 4, 23)
    texts = make_texts(tree, eda=None, mask_probability=0)
    data = stream(tree, OneView(SIZE), texts, batch_size=6, total_steps=8, workers=workers)
    names = []
    tokenizer = Tokenizer(tree / "merges.txt.gz")
    for batch in data:
        names += batch.item_ids
        for row, name in zip(batch.tokens_UBT[0], batch.item_ids, strict=True):
            caption = f"the {string.ascii_lowercase[int(name[:3])]} one of all the pictures"
            expected = tokenizer.row(caption, CONTEXT)
            assert row[: len(expected)].tolist() == expected
    # 3 is replaced by 5, since 4 is damaged too; 4 by 5, and the last one by the first.
    times = {name: names.count(name) for name in names}
    assert times == {f"{i:03d}.jpg": 2 for i in range(PAIRS) if i not in (3, 4, 23)} | {
        "000.jpg": 4,
        "005.jpg": 6,
    }
    assert sorted(data.damaged.found) == bad
    assert (data.damaged.count, data.damaged.read) == (6, 48)
    assert "No such file" in data.damaged.found["003.jpg"]


def test_a_replacement_is_drawn_as_if_it_were_the_damaged_one(tree: Path) -> None:
    images = tree / TRAIN_IMAGES
    shutil.copy(images / "007.jpg", images / "008.jpg")
    before = stream(tree)._loader.dataset._items.__getitems__([Draw(0, 7), Draw(0, 9)])
    spoil(tree, 7)
    after = stream(tree)._loader.dataset._items.__getitems__([Draw(0, 7), Draw(0, 9)])
    assert after.item_ids == ["008.jpg", "009.jpg"]
    assert torch.equal(before.images_VBCHW, after.images_VBCHW)


def test_long_runs_of_missing_files_are_jumped_over(tree: Path) -> None:
    spoil(tree, *range(1, 20))
    batch = stream(tree)._loader.dataset._items.__getitems__([Draw(0, 5)])
    assert batch.item_ids == ["021.jpg"]  # 5 + 16
    assert [item.item_id for item in batch.damaged] == ["005.jpg"]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_much_damage_ends_the_run(tree: Path, workers: int) -> None:
    bad = spoil(tree, 0, 1, 2)
    data = stream(tree, batch_size=12, total_steps=None, workers=workers)
    with pytest.raises(UserError, match="images that were read are damaged, more than") as caught:
        for _ in data:
            assert data.damaged.count <= 10
    assert all(f"{name} (" in str(caught.value) for name in bad)
    assert data.damaged.read < 120


def test_no_damage_is_allowed_with_a_share_of_0(tree: Path) -> None:
    spoil(tree, 5)
    with pytest.raises(UserError, match="1 of the 24 images that were read are damaged"):
        list(stream(tree, batch_size=PAIRS, max_damaged=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_directory_without_images_is_told_at_once(tree: Path, workers: int) -> None:
    data = stream(tree, workers=workers)
    shutil.rmtree(tree / TRAIN_IMAGES)
    with pytest.raises(UserError, match=r"\.jpg cannot be read \(.*No such file.*check that data"):
        next(iter(data))


# ---------------------------------------------------------------------------- from the config


def one_process() -> Run:
    processes = Processes(0, 0, 1, 1, 1)
    return cast(Run, SimpleNamespace(processes=processes, device=torch.device("cpu")))


@pytest.mark.parametrize("shards", [False, True])
def test_a_config_opens_files_or_shards(
    tree: Path, shards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree / "cache"))
    path = tree
    if shards:
        path = tree / "{00..01}.tar"
        for number in range(2):
            with tarfile.open(tree / f"{number:02d}.tar", "w") as tar:
                for image in sorted((tree / TRAIN_IMAGES).iterdir())[number::2]:
                    caption = image.with_suffix(".txt")
                    caption.write_text(f"picture {image.stem}")
                    tar.add(image, image.name)
                    tar.add(caption, caption.name)
    words = [
        f"--data_path={path}",
        "--batch_size=4",
        f"model.input_size={SIZE}",
        f"model.context_length={CONTEXT}",
        "text.synonyms=false",
        "data.workers=0",
    ]
    tokenizer = Tokenizer(tree / "merges.txt.gz")
    config = load_config(Config, words, CARD_OPTIONS)
    batches = list(open_train(config, tokenizer, one_process(), total_steps=6))
    assert batches[0].images_VBCHW.shape == (2, 4, 3, SIZE, SIZE)
    assert batches[0].tokens_UBT.shape[0] == 3
    names = [name for batch in batches for name in batch.item_ids]
    assert len(set(names)) == PAIRS
    if shards:
        samples = open_shards(str(path))
        sampler = ShardSampler(
            samples.starts_S, 4, rank=0, world_size=1, seed=config.run.seed, total_steps=6
        )
        assert names == [samples.item_id(draw.index) for draws in sampler for draw in draws]

    words += ["model.objective=clip", "loss.masked_language=0", "text.eda=false"]
    config = load_config(Config, words, CARD_OPTIONS)
    (batch,) = open_train(config, tokenizer, one_process(), total_steps=1)
    assert batch.images_VBCHW.shape[0] == batch.tokens_UBT.shape[0] == 1
    assert batch.masked is None


# ---------------------------------------------------------------------------- evaluation


class Held:
    """Held-out images in a directory."""

    def __init__(self, directory: Path) -> None:
        self.paths = sorted(map(str, directory.iterdir()))

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]

    def item_id(self, index: int) -> str:
        return Path(self.paths[index]).name

    def label(self, index: int) -> int:
        return index


def test_evaluation_sees_every_image_once_over_ranks(tree: Path) -> None:
    held = Held(tree / TRAIN_IMAGES)
    labels = []
    for rank in range(2):
        for batch in build_eval_data(
            held, batch_size=5, input_size=SIZE, rank=rank, world_size=2, workers=0
        ):
            assert batch.images_BCHW.shape[1:] == (3, SIZE, SIZE)
            labels += batch.labels_B.tolist()
    assert sorted(labels) == list(range(PAIRS))
