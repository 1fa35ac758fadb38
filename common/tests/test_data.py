"""Order, randomness, damage and workers of the input stream."""

import gc
import io
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from zoo_common import device
from zoo_common.damage import Damaged, DamagedItems
from zoo_common.data import (
    BatchStream,
    Draw,
    Normalize,
    Pixels,
    StepSampler,
    affordable_workers,
    build_eval_loader,
    build_loader,
    kept_rng,
    seed_rng,
    shard,
)
from zoo_common.errors import UserError
from zoo_common.imagenet import IMAGENET_MEAN, IMAGENET_STD, FolderIndex, build_index
from zoo_common.images import DamagedImageError, decode_image, read_image

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))


def augment(image: Image.Image) -> Pixels:
    """Draws from all three generators, and fails unless the picture follows its item."""
    pixels = np.asarray(image.resize((8, 8))).copy()
    pixels[0, 0, 0] = random.randrange(256)
    pixels[0, 0, 1] = np.random.randint(256)
    pixels[0, 0, 2] = int(torch.randint(256, (1,)))
    return Pixels(pixels, (random.randrange(1000), 7))


def plain(image: Image.Image) -> Pixels:
    return Pixels(np.asarray(image.resize((8, 8))))


def draw_tree(root: Path, split: str, count: int, classes: int = 2) -> FolderIndex:
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / split / f"class {number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg")
    return build_index(root, split)


@pytest.fixture
def index(tmp_path: Path) -> FolderIndex:
    return draw_tree(tmp_path, "train", 22)


def take(stream: BatchStream, steps: int) -> list[tuple[list[str], bytes]]:
    """Everything that a run sees of its first batches."""
    seen = []
    for _, batch in zip(range(steps), stream, strict=False):
        tensors = (batch.images_BCHW, batch.labels_B, batch.draws_BD)
        seen.append((batch.item_ids, b"".join(t.numpy().tobytes() for t in tensors)))
    stream.close()
    return seen


# ---------------------------------------------------------------------------- order


def draws(steps: int, rank: int = 0, world_size: int = 1, **options: int) -> list[list[Draw]]:
    options = {"size": 100, "batch_size": 6, "seed": 5, "total_steps": steps} | options
    return list(StepSampler(rank=rank, world_size=world_size, **options))


def test_an_epoch_takes_whole_global_batches_without_repetition() -> None:
    sampler = StepSampler(100, 6, rank=0, world_size=4, seed=5)
    assert sampler.steps_per_epoch == 4
    seen = [draw for rank in range(4) for batch in draws(8, rank, 4) for draw in batch]
    for epoch in (0, 1):
        indices = [draw.index for draw in seen if draw.epoch == epoch]
        assert len(indices) == len(set(indices)) == 96
        assert set(indices) <= set(range(100))
        assert indices != sorted(indices)
    stream = draws(32)  # 16 steps an epoch
    assert {d.epoch for batch in stream[16:] for d in batch} == {1}
    assert [d.index for d in stream[0]] != [d.index for d in stream[16]]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(world_size: int) -> None:
    alone = draws(10, batch_size=12)
    ranks = [draws(10, r, world_size, batch_size=12 // world_size) for r in range(world_size)]
    assert alone == [
        [draw for batch in step for draw in batch] for step in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("step", [1, 15, 16, 17, 39])
def test_resuming_at_a_step_continues_the_same_stream(step: int) -> None:
    assert draws(40, start_step=step) == draws(40)[step:]


def test_order_is_a_function_of_seed_and_epoch_on_every_machine() -> None:
    assert [d.index for d in draws(1)[0]] == [31, 21, 40, 50, 12, 49]
    assert [d.index for d in draws(1, seed=-1)[0]] != [d.index for d in draws(1, seed=1)[0]]
    unshuffled = StepSampler(10, 4, rank=0, world_size=1, seed=0, total_steps=3, shuffle=False)
    first, second, again = ([draw.index for draw in batch] for batch in unshuffled)
    assert (first, second, again) == ([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3])


def test_resuming_in_a_large_epoch_is_immediate() -> None:
    sampler = StepSampler(15_000_000, 128, rank=3, world_size=8, seed=0, start_step=14_000)
    begin = time.process_time()
    assert len(next(iter(sampler))) == 128
    assert time.process_time() - begin < 10


def test_length_is_what_is_left() -> None:
    assert len(StepSampler(100, 6, rank=0, world_size=1, seed=0, start_step=3, total_steps=10)) == 7
    with pytest.raises(TypeError, match="endless"):
        len(StepSampler(100, 6, rank=0, world_size=1, seed=0))


def test_too_few_images_for_a_batch_are_an_error() -> None:
    with pytest.raises(UserError, match=r"has 100 images.* 104 \(26 images x 4 processes\).*fewer"):
        draws(1, world_size=4, batch_size=26)


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 3), (2, 4), (0, 2)])
def test_shards_of_an_evaluation_are_exact(size: int, world_size: int) -> None:
    shards = [list(shard(size, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for part in shards for index in part) == list(range(size))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


# ---------------------------------------------------------------------------- randomness


def numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand((), dtype=torch.float64))


def test_an_item_has_its_own_random_numbers() -> None:
    def of(*item: int) -> tuple[float, float, float]:
        with kept_rng():
            seed_rng(*item)
            return numbers()

    assert of(1, 2, 3) == of(1, 2, 3)
    assert (
        len(
            {
                number
                for item in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]
                for number in of(*item)
            }
        )
        == 12
    )


def test_the_random_numbers_of_the_run_are_not_disturbed(index: FolderIndex) -> None:
    def run(*, load: bool) -> list[object]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        # An odd number of normal draws: the second of a pair is kept for the next call.
        seen: list[object] = [random.gauss(0, 1), np.random.randn(), torch.randn(1).item()]
        if load:
            for workers in (0, 1):
                take(build_loader(index, augment, batch_size=4, workers=workers), 3)
        seen += [random.gauss(0, 1), np.random.randn(), torch.randn(1).item()]
        return [*seen, *numbers()]

    assert run(load=True) == run(load=False)


def test_seeding_an_item_is_cheap() -> None:
    begin = time.process_time()
    with kept_rng():
        for item in range(1000):
            seed_rng(0, 0, item)
    assert time.process_time() - begin < 0.1  # 100 us an item


# ---------------------------------------------------------------------------- stream


def test_workers_and_resuming_do_not_change_the_batches(index: FolderIndex) -> None:
    marks = [
        tuple(image[:, 0, 0].tolist())
        for batch in build_loader(index, augment, batch_size=4, seed=3, total_steps=12)
        for image in batch.images_BCHW
    ]
    assert len(set(marks)) == len(marks)
    whole = take(build_loader(index, augment, batch_size=4, seed=3), 12)
    for workers in (0, 1, 2):
        stream = build_loader(index, augment, batch_size=4, seed=3, workers=workers)
        stream.seek(4)
        assert take(stream, 8) == whole[4:]
    assert take(build_loader(index, augment, batch_size=4, seed=4), 1) != whole[:1]


def test_a_picture_does_not_depend_on_the_number_of_processes(index: FolderIndex) -> None:
    (alone,) = build_loader(index, augment, batch_size=8, total_steps=1)
    for rank in (0, 1):
        stream = build_loader(
            index, augment, batch_size=4, rank=rank, world_size=2, total_steps=1, workers=rank
        )
        (part,) = stream
        mine = slice(4 * rank, 4 * rank + 4)
        assert part.item_ids == alone.item_ids[mine]
        assert torch.equal(part.images_BCHW, alone.images_BCHW[mine])
        assert torch.equal(part.draws_BD, alone.draws_BD[mine])


@pytest.mark.device
def test_a_batch_holds_images_labels_and_names(index: FolderIndex) -> None:
    stream = build_loader(index, plain, batch_size=4, total_steps=7, workers=1)
    assert (len(stream), stream.steps_per_epoch) == (7, 5)
    batches = list(stream)
    assert len(batches) == 7
    positions = {index.item_id(i): i for i in range(len(index))}
    batch = batches[-1].to(DEVICE)
    assert batch.images_BCHW.device.type == batch.labels_B.device.type == DEVICE.type
    assert batch.draws_BD.device.type == "cpu"
    assert batch.draws_BD.shape == (4, 0)
    assert batch.images_BCHW.dtype == torch.uint8
    assert batch.images_BCHW.is_contiguous()
    for image, label, name in zip(
        batch.images_BCHW.cpu(), batch.labels_B.tolist(), batch.item_ids, strict=True
    ):
        position = positions[name]
        expected = plain(read_image(index.path(position))).image_HWC
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
        assert label == index.label(position)


def test_evaluation_sees_every_image_once(tmp_path: Path) -> None:
    index = draw_tree(tmp_path, "val", 11)
    seen: list[str] = []
    for rank in range(3):
        stream = build_eval_loader(
            index, plain, batch_size=2, rank=rank, world_size=3, workers=rank % 2
        )
        names = [name for batch in stream for name in batch.item_ids]
        assert names == [name for batch in stream for name in batch.item_ids]  # a second time
        seen += names
    assert sorted(seen) == sorted(index.item_id(i) for i in range(11))


@pytest.mark.device
def test_normalize_is_that_of_imagenet() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    result = Normalize(IMAGENET_MEAN, IMAGENET_STD).to(DEVICE)(images.to(DEVICE))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.cpu(), (images / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_too_little_shared_memory_is_said_before_a_worker_dies(
    index: FolderIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 4095))
    with pytest.raises(UserError, match=r"/dev/shm has 0 MB free.*--shm-size"):
        build_loader(index, plain, batch_size=8, workers=1, prefetch_factor=2)
    build_loader(index, plain, batch_size=8, workers=0)


# ---------------------------------------------------------------------------- images


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str, size: tuple[int, int] = (13, 7)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def rotated_by_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


GOOD_FILES = {
    "grey jpeg": encoded(noise("L"), "JPEG"),
    "cmyk jpeg": encoded(noise("CMYK"), "JPEG"),
    "progressive": encoded(noise("RGB"), "JPEG", progressive=True),
    "exif": encoded(noise("RGB"), "JPEG", exif=rotated_by_exif()),
    "png with alpha": encoded(noise("RGBA"), "PNG"),
    "grey png with alpha": encoded(noise("LA"), "PNG"),
    "palette": encoded(noise("P"), "PNG"),
    "one pixel": encoded(noise("RGB", (1, 1)), "JPEG"),
    "webp": encoded(noise("RGB"), "WEBP"),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_every_kind_of_image_comes_as_rgb(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image.jpeg"  # ImageNet has a PNG that is called .JPEG
    path.write_bytes(GOOD_FILES[name])
    image = read_image(str(path))
    assert image.mode == "RGB"
    expected = Image.open(path).convert("RGB")
    assert image.size == expected.size
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert decode_image(GOOD_FILES[name]) == image


def test_transparency_of_a_palette_is_dropped_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    palette = noise("P")
    palette.save(path, transparency=bytes(range(256)))
    assert np.array_equal(np.asarray(read_image(str(path))), np.asarray(palette.convert("RGB")))


BAD_FILES = {
    "truncated": GOOD_FILES["progressive"][:-30],
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "png cut": GOOD_FILES["palette"][:-40],
    "png broken": GOOD_FILES["png with alpha"].replace(b"IDAT", b"IDXT"),
    "only a header": GOOD_FILES["grey jpeg"][:20],
}


@pytest.mark.parametrize("name", [*BAD_FILES, "absent", "a folder", "too large"])
def test_damage_of_every_kind_has_a_reason(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.jpg"
    if name == "a folder":
        path.mkdir()
    elif name != "absent":
        path.write_bytes(BAD_FILES.get(name, GOOD_FILES["exif"]))
    if name == "too large":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DamagedImageError, match=r"\w+") as caught:
        read_image(str(path))
    assert "object at 0x" not in str(caught.value)


# ---------------------------------------------------------------------------- damage


def spoil(index: FolderIndex, *positions: int) -> list[str]:
    for position in positions:
        Path(index.path(position)).write_bytes(GOOD_FILES["progressive"][:-30])
    return [index.item_id(position) for position in positions]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_replaced_named_and_counted_once(
    index: FolderIndex, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    good = take(build_loader(index, plain, batch_size=11, shuffle=False), 2)
    bad = spoil(index, 3, 4, 21)
    stream = build_loader(
        index, plain, batch_size=11, shuffle=False, workers=workers, total_steps=6
    )
    with caplog.at_level(logging.WARNING):
        batches = list(stream)
    names = [name for names, _ in good for name in names]
    expected = names.copy()
    expected[3] = expected[4] = names[5]
    expected[21] = names[0]
    for epoch in range(3):
        assert [n for b in batches[2 * epoch : 2 * epoch + 2] for n in b.item_ids] == expected
    assert torch.equal(batches[0].images_BCHW[3], batches[0].images_BCHW[5])
    assert batches[0].labels_B[3] == index.label(5)
    assert sorted(stream.damaged.found) == sorted(bad)
    said = [record.message for record in caplog.records]
    assert len(said) == 3
    assert all(f"replaced by the next one: {n} (image file is" in " ".join(said) for n in bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_damage_than_allowed_ends_the_run_with_the_list(
    index: FolderIndex, workers: int
) -> None:
    bad = spoil(index, 0, 2, 5)
    stream = build_loader(
        index, plain, batch_size=11, shuffle=False, max_damaged=2, workers=workers
    )
    with pytest.raises(UserError, match="3 images are damaged, more than the 2") as caught:
        next(iter(stream))
    assert all(name in str(caught.value) for name in bad)
    stream = build_loader(index, plain, batch_size=11, shuffle=False, max_damaged=3)
    assert len(next(iter(stream)).item_ids) == 11


def test_a_wholly_damaged_set_ends_the_run(index: FolderIndex) -> None:
    spoil(index, *range(len(index)))
    stream = build_loader(index, plain, batch_size=4, max_damaged=1)
    with pytest.raises(UserError, match="images are damaged, more than the 1 that"):
        next(iter(stream))


def test_evaluation_leaves_damaged_images_out(tmp_path: Path) -> None:
    index = draw_tree(tmp_path, "val", 8)
    bad = spoil(index, 2, 3, 5)
    stream = build_eval_loader(index, plain, batch_size=2, workers=1)
    for _ in range(2):
        batches = list(stream)
        assert [len(batch.item_ids) for batch in batches] == [2, 1, 2]
        assert all(len(b.images_BCHW) == len(b.labels_B) == len(b.item_ids) for b in batches)
    assert list(stream.damaged.found) == bad


def test_a_long_list_of_damage_is_cut() -> None:
    with pytest.raises(UserError, match=r"13 images .*item 9 \(bad\) and 3 more; restore"):
        DamagedItems(12, "left out").add(Damaged(f"item {i}", "bad") for i in range(13))


# ---------------------------------------------------------------------------- workers


def test_workers_outlive_the_signals_that_their_group_gets(index: FolderIndex) -> None:
    others = set(psutil.Process().children())
    stream = build_loader(index, plain, batch_size=4, workers=2)
    batches = iter(stream)
    for _ in range(2):  # one from each worker: both have their handlers now
        next(batches)
    workers = set(psutil.Process().children()) - others
    assert len(workers) >= 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for worker in workers:
            worker.send_signal(number)
    for _ in range(12):
        next(batches)
    assert all(worker.is_running() for worker in workers)
    stream.close()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_a_stream_that_was_lost_in_a_cycle_leaves_no_worker(
    index: FolderIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    others = set(psutil.Process().children())
    stream = build_loader(index, plain, batch_size=4, workers=1)
    next(iter(stream))
    workers = set(psutil.Process().children()) - others
    cycle: list[object] = [stream]
    cycle.append(cycle)
    del stream, cycle
    gc.collect()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


RUN = """
    import tempfile
    early = tempfile.TemporaryDirectory()  # has weakref's exit function run after all others
    import os, sys, time
    import numpy as np, psutil
    from zoo_common.data import Pixels, build_loader
    from zoo_common.imagenet import build_index

    def plain(image):
        return Pixels(np.asarray(image.resize((8, 8))))

    stream = build_loader(build_index(sys.argv[1], "train"), plain, batch_size=4, workers=2)
    batches = iter(stream)
    next(batches)
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
    next(batches).no_such_field
"""


def test_no_worker_is_left_when_the_main_process_fails_or_is_killed(
    index: FolderIndex, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    runs = {
        how: subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for how in ("fail", "wait")
    }
    workers = {}
    for how, run in runs.items():
        assert run.stdout is not None
        workers[how] = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
        assert len(workers[how]) == 2
    runs["wait"].kill()
    _, errors = runs["fail"].communicate(timeout=5)
    assert runs["fail"].returncode == 1
    assert errors.rstrip().endswith("no attribute 'no_such_field'")
    runs["wait"].communicate(timeout=5)
    _, alive = psutil.wait_procs(workers["fail"] + workers["wait"], timeout=10)
    assert not alive


def test_workers_do_not_outnumber_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert affordable_workers(8, local_world_size=1) == 8
    assert affordable_workers(8, local_world_size=4) == 4
    assert affordable_workers(8, local_world_size=32) == 1
    assert affordable_workers(0, local_world_size=1) == 0
