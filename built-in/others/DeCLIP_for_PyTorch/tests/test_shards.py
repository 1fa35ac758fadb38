"""Training from shards: the order of an epoch, what is read of a tar file, and damage."""

import errno
import io
import json
import os
import string
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from declip.batch import Batch
from declip.data import build_train_data
from declip.eda import Eda
from declip.shards import BUFFER_SAMPLES, ShardImages, ShardSampler, open_shards
from declip.texts import Texts
from declip.tokenizer import Tokenizer
from declip.views import TwoViews
from zoo_common import flaky
from zoo_common.data import BatchStream, Draw
from zoo_common.elastic import Met
from zoo_common.errors import UserError
from zoo_common.images import DamagedImageError
from zoo_common.sample.merges import write_merges

sys.path.insert(0, str(Path(__file__).resolve().parent))

from shard_rows import convert, draw_rows

STARTS_S = np.cumsum([0, 100, 37, 250, 0, 64, 128, 300, 90])  # 969 samples


def draws_of(**options: Any) -> list[list[Draw]]:
    settings = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 5} | options
    sampler = ShardSampler(STARTS_S, settings.pop("batch_size"), **settings)
    if sampler.total_steps is None:
        sampler.total_steps = sampler.steps_per_epoch
    return list(sampler)


# ---------------------------------------------------------------------------- order


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (4, 2), (7, 3), (60, 16)])
def test_an_epoch_has_no_sample_twice_and_leaves_out_less_than_a_batch(
    batch_size: int, world_size: int
) -> None:
    options = {"batch_size": batch_size, "world_size": world_size, "buffer_samples": 50}
    ranks = [draws_of(rank=rank, **options) for rank in range(world_size)]
    steps = 969 // (batch_size * world_size)
    assert [len(batches) for batches in ranks] == [steps] * world_size
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    samples = [draw.index for batches in ranks for batch in batches for draw in batch]
    assert len(set(samples)) == len(samples) == steps * batch_size * world_size
    assert 969 - len(samples) < batch_size * world_size
    assert set(samples) <= set(range(969))


def test_each_epoch_and_seed_has_its_own_order_and_leftovers() -> None:
    steps = 969 // 40
    batches = draws_of(batch_size=40, total_steps=3 * steps)
    epochs = [[d for b in batches[e * steps : (e + 1) * steps] for d in b] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {draw.epoch for draw in epoch} == {number}
        assert len({draw.index for draw in epoch}) == 40 * steps
    orders = [[draw.index for draw in epoch] for epoch in epochs]
    orders.append([draw.index for batch in draws_of(batch_size=40, seed=6) for draw in batch])
    left = [set(range(969)) - set(order) for order in orders]
    for one in range(4):
        for other in range(one):
            assert orders[one] != orders[other] and left[one] != left[other]


def test_every_step_can_be_resumed_at() -> None:
    options: dict[str, Any] = {"world_size": 3, "rank": 1, "buffer_samples": 30, "total_steps": 200}
    whole = draws_of(**options)  # 2.5 epochs of 80 steps
    sampler = ShardSampler(STARTS_S, 4, seed=5, **options)
    for step in [*range(0, 200, 7), 79, 80, 81, 199]:
        sampler.start_step = step
        assert list(sampler) == whole[step:]
    sampler.start_step = 200
    assert list(sampler) == []


@pytest.mark.parametrize("worlds", [(4, 3, 4), (4, 3, 2, 3), (2, 1), (1, 5, 2)])
def test_an_epoch_has_no_sample_twice_over_changing_worlds(worlds: tuple[int, ...]) -> None:
    seen: list[int] = []
    met: tuple[Met, ...] = ()
    step = 0
    for number, world_size in enumerate(worlds):
        steps_per_epoch = 969 // (4 * world_size)
        end = step + 9 if number < len(worlds) - 1 else steps_per_epoch
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size}
            sampler = ShardSampler(STARTS_S, 4, seed=5, buffer_samples=30, **place)
            sampler.start_step, sampler.total_steps, sampler.met = step, end, met
            batches = list(sampler)
            assert len(batches) == end - step
            sampler.start_step = step + 2  # as when it resumes once more
            assert list(sampler) == batches[2:]
            seen += [draw.index for batch in batches for draw in batch]
            sampler.start_step, sampler.total_steps = steps_per_epoch, steps_per_epoch + 3
            later = list(sampler)
            sampler.met = ()
            assert list(sampler) == later  # the next epoch is as ever
        met = (*met, Met(0, end, world_size, 4))
        if number < len(worlds) - 1:
            step = met[-1].steps_of(4 * worlds[number + 1])
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(969))
    assert len(seen) > 969 - sum(4 * world_size for world_size in worlds)


def test_a_batch_mixes_shards_and_a_rank_reads_its_own() -> None:
    starts_S = np.arange(0, 100_001, 1000)
    parts = []
    for rank in range(4):
        sampler = ShardSampler(starts_S, 64, rank=rank, world_size=4, seed=0, total_steps=390)
        batches = [{draw.index // 1000 for draw in batch} for batch in sampler]
        assert min(len(shards) for shards in batches[:128]) > 15
        parts.append(set.union(*batches))
    assert all(len(part) <= 26 for part in parts)  # 25 and a part of one more at an end
    assert sum(len(part) for part in parts) <= 100 + 3


def test_reads_lie_together() -> None:
    starts_S = np.arange(0, 100_001, 1000)
    sampler = ShardSampler(starts_S, 64, rank=0, world_size=1, seed=0, total_steps=128)
    samples = np.sort([draw.index for batch in sampler for draw in batch])
    assert len(samples) == BUFFER_SAMPLES
    runs = 1 + int((np.diff(samples) > 1).sum())
    assert runs < 180  # of 1,000 samples each shard has 15 runs of 64 and one of 40


def test_too_few_samples_for_a_batch_are_told() -> None:
    with pytest.raises(UserError, match="969 images, fewer than one global batch"):
        draws_of(batch_size=1000)


# ---------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    convert(draw_rows(directory, 45), directory / "out")
    write_merges(directory / "out" / "merges.txt.gz", [("t", "h"), ("th", "e</w>")])
    return directory / "out"


def stream(shards: Path, *, workers: int = 0, rank: int = 0, **options: Any) -> BatchStream[Batch]:
    images = open_shards(str(shards / "{000000..000004}.tar"))
    place = {"rank": rank, "world_size": 2, "seed": 3, "total_steps": 11}
    sampler = ShardSampler(images.starts_S, 4, **place)
    texts = Texts(Tokenizer(shards / "merges.txt.gz"), 16, Eda(synonyms=False), 0.15, False)
    return build_train_data(
        images,
        texts,
        TwoViews(16),
        batch_size=4,
        workers=workers,
        sampler=sampler,
        **place,
        **options,
    )


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.item_ids == other.item_ids
    assert one.masked is not None and other.masked is not None
    pairs = zip((*one[:3], *one.masked), (*other[:3], *other.masked), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_batches_depend_on_the_rank_alone_and_resume_exactly(shards: Path) -> None:
    seen: list[str] = []
    for rank in range(2):
        whole = list(stream(shards, rank=rank))
        assert len(whole) == 11
        for one, other in zip(whole, stream(shards, rank=rank, workers=2), strict=True):
            assert_equal(one, other)
        resumed = stream(shards, rank=rank, workers=1)
        resumed.seek(7)
        for one, other in zip(whole[7:], resumed, strict=True):
            assert_equal(one, other)
        assert resumed.steps_per_epoch == 5
        seen += [item_id for batch in whole[:5] for item_id in batch.item_ids]
    assert len(set(seen)) == len(seen) == 40


def test_a_damaged_picture_is_replaced_and_named(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = open_shards(str(tmp_path))
    with (tmp_path / "000002.tar").open("r+b") as file:
        file.seek(600)
        file.write(bytes(300))  # in the first picture
    assert images.item_id(20) == "000002.tar/000000020.jpg"
    named: set[str] = set()
    for rank in range(2):
        for batch in stream(tmp_path, rank=rank, max_damaged=1.0):
            assert len(batch.item_ids) == 4 and "000002.tar/000000020.jpg" not in batch.item_ids
            named |= {item.item_id for item in batch.damaged}
    assert named == {"000002.tar/000000020.jpg"}
    with pytest.raises(UserError, match=r"damaged.*000002\.tar/000000020\.jpg"):
        for rank in range(2):
            list(stream(tmp_path, rank=rank, max_damaged=0.0))


# ---------------------------------------------------------------------------- safety


def jpeg(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), color).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], **options: Any) -> None:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_DATA_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shard-indexes"


def captions(images: ShardImages) -> list[str]:
    return [images.caption(index) for index in range(len(images))]


def test_only_pictures_with_captions_are_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(
        tmp_path / "0.tar",
        {
            "a.jpg": jpeg(),
            "a.txt": b"a plain one\n",
            "../up.jpg": jpeg(),
            "../up.txt": b"leads out",
            "/etc/root.jpg": jpeg(),
            "/etc/root.txt": b"absolute",
            "b.jpg": special("b.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            "b.txt": b"a link",
            "c.jpg": special("c.jpg", tarfile.LNKTYPE, "a.jpg"),
            "c.txt": b"a hard link",
            "d.jpg": special("d.jpg", tarfile.CHRTYPE),
            "d.txt": b"a device",
            "e.pickle": b"cos\nsystem\n",
            "e.pyd": b"cos\nsystem\n",
            "e.txt": b"no picture",
            "f.jpg": jpeg(),
            "f.cls": b"3",
            "folder/g.PNG": jpeg(),
            "folder/g.json": json.dumps({"caption": ["one of a list", "more"]}).encode(),
            "folder/g.txt": b"text before json",
            "h.jpg": jpeg(),
            "h.json": json.dumps({"caption": ["one of a list", "more"]}).encode(),
            "folder": special("folder", tarfile.DIRTYPE),
            "\n": b"",
        },
    )
    images = open_shards(str(tmp_path / "0.tar"))
    assert captions(images) == ["a plain one", "text before json", "one of a list"]
    assert [images.item_id(index) for index in range(3)] == [
        "0.tar/a.jpg",
        "0.tar/g.PNG",
        "0.tar/h.jpg",
    ]
    assert all(images.image(index).size == (12, 8) for index in range(3))
    assert "belong to no sample" in caplog.text


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_of_both_tar_formats_are_read(tmp_path: Path, tar_format: int) -> None:
    long = "é" * 150
    members = {f"{long}.jpg": jpeg("blue"), f"{long}.txt": "blåbær".encode(), "z.jpg": jpeg()}
    write_tar(tmp_path / "0.tar", members | {"z.txt": b"z"}, format=tar_format)
    images = open_shards(str(tmp_path / "*.tar"))
    assert captions(images) == ["blåbær", "z"]
    assert images.image(0).getpixel((0, 0))[2] > 200


def test_a_caption_that_is_none_is_a_damaged_item(tmp_path: Path) -> None:
    bad = {
        "0.json": b"[" * 100_000,
        "1.json": b'{"no": 1}',
        "2.json": b'{"caption": ""}',
        "3.txt": b"\xff\xfe",
        "4.json": b"[]",
        "5.txt": b" \n",
        "6.json": b'{"caption": 7}',
    }
    members = {}
    for name, content in bad.items():
        members |= {f"{name[0]}.jpg": jpeg(), name: content}
    write_tar(tmp_path / "0.tar", members)
    images = open_shards(str(tmp_path / "0.tar"))
    assert len(images) == len(bad)
    for index in range(len(bad)):
        with pytest.raises(DamagedImageError, match="caption"):
            images.caption(index)


def test_sizes_beyond_reason_are_refused(tmp_path: Path) -> None:
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 1 << 40
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 64 << 20
    good = tmp_path / "good.tar"
    write_tar(good, {"a.jpg": jpeg(), "a.txt": b"good"})
    begin = good.read_bytes().rstrip(b"\0")
    begin += bytes(-len(begin) % 512)
    for number, info in enumerate((huge, header)):
        with (tmp_path / f"{number}.tar").open("wb") as file:
            file.write(begin + info.tobuf())
            file.truncate(100 << 20)  # sparse
    images = open_shards(str(tmp_path / "{0..1}.tar"), max_damaged=1)
    assert captions(images) == ["good", "good"]
    write_tar(tmp_path / "text.tar", {"a.jpg": jpeg(), "a.txt": b"x" * (2 << 20)})
    with pytest.raises(UserError, match="hold no sample"):
        open_shards(str(tmp_path / "text.tar"))


@pytest.mark.parametrize(
    "address", ["pipe:touch {mark}", "http://127.0.0.1/0.tar", "file:{mark}.tar"]
)
def test_addresses_are_refused_and_commands_not_run(tmp_path: Path, address: str) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(UserError, match="no files of this machine"):
        open_shards(address.format(mark=mark))
    assert not mark.exists()


def test_names_for_people_print(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"\x1b[2J.jpg": jpeg(), "\x1b[2J.txt": b"clears screens"})
    assert open_shards(str(tmp_path / "0.tar")).item_id(0) == "0.tar/'\\x1b[2J.jpg'"


# ---------------------------------------------------------------------------- damage


def write_ten(directory: Path, count: int = 3) -> None:
    for shard in range(count):
        members: dict[str, bytes | tarfile.TarInfo] = {}
        for letter in string.ascii_lowercase[:10]:
            members |= {f"{letter}.jpg": jpeg(), f"{letter}.txt": f"{shard} {letter}".encode()}
        write_tar(directory / f"{shard}.tar", members)


def test_shards_without_an_index_are_counted_once(tmp_path: Path, own_cache: Path) -> None:
    write_ten(tmp_path)
    images = open_shards(str(tmp_path / "{0..2}.tar"))
    assert len(images) == 30 and images.caption(13) == "1 d"
    (index,) = own_cache.iterdir()
    stamp = (index / "shards.npy").stat().st_mtime_ns
    assert captions(open_shards(str(tmp_path / "{0..2}.tar"))) == captions(images)
    assert (index / "shards.npy").stat().st_mtime_ns == stamp
    write_tar(tmp_path / "1.tar", {"a.jpg": jpeg(), "a.txt": b"another"})
    assert captions(open_shards(str(tmp_path / "{0..2}.tar")))[10:12] == ["another", "2 a"]
    assert len(open_shards(str(tmp_path / "{0,2}.tar"))) == 20


@pytest.mark.parametrize("left", [0.5, 0.95, "no end"])
def test_a_shard_that_is_cut_off_is_read_so_far_and_limited(
    tmp_path: Path, left: float | str, caplog: pytest.LogCaptureFixture
) -> None:
    write_ten(tmp_path)
    data = (tmp_path / "1.tar").read_bytes()
    used = len(data.rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "1.tar").write_bytes(data[: used if left == "no end" else int(used * left)])
    with pytest.raises(UserError, match=r"1 of the 3 shards .* are damaged: 1\.tar \(.*allow"):
        open_shards(str(tmp_path / "*.tar"))
    images = open_shards(str(tmp_path / "*.tar"), max_damaged=0.4)
    assert "damaged shard, read as far as it goes: 1.tar" in caplog.text
    expected = {0.5: 5, 0.95: 9, "no end": 10}[left]
    assert len(images) == 20 + expected
    assert all(images.image(index).size == (12, 8) for index in range(len(images)))


def test_garbage_in_the_middle_is_no_end(tmp_path: Path) -> None:
    write_ten(tmp_path, 1)
    data = bytearray((tmp_path / "0.tar").read_bytes())
    at = data.find(b"d.jpg")
    data[at : at + 512] = b"\x07" * 512
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(UserError, match="no end mark"):
        open_shards(str(tmp_path / "0.tar"))
    assert len(open_shards(str(tmp_path / "0.tar"), max_damaged=1)) == 3


@pytest.mark.parametrize("content", [b"", b"no tar file" * 100, b"\x1f\x8b" + bytes(600)])
def test_what_is_no_tar_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"0\.tar is no plain tar file"):
        open_shards(str(tmp_path / "0.tar"))


def test_shards_unlike_their_index_are_told_before_the_start(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pattern = str(tmp_path / "{000000..000004}.tar")
    os.truncate(tmp_path / "000003.tar", 4000)
    with pytest.raises(UserError, match=r"1 shards in .* are not as long as.*000003\.tar"):
        open_shards(pattern)
    (tmp_path / "000003.tar").unlink()
    for given in (pattern, str(tmp_path)):
        with pytest.raises(UserError, match=r"1 of the 5 shards .* are missing .*000003\.tar"):
            open_shards(given)
    assert len(open_shards(str(tmp_path / "{000000..000002}.tar"))) == 30
    (tmp_path / "shards.npy").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"The index of .* is damaged"):
        open_shards(str(tmp_path / "000000.tar"))


def test_a_shard_that_changes_during_a_run_gives_no_wrong_picture(tmp_path: Path) -> None:
    write_ten(tmp_path, 2)
    images = open_shards(str(tmp_path / "{0..1}.tar"))
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(bytes(512) + data[:-512])
    with pytest.raises(DamagedImageError, match="not the one that was indexed"):
        images.image(0)
    os.truncate(tmp_path / "0.tar", 600)
    with pytest.raises(DamagedImageError, match="cut off"):
        images.caption(3)
    assert images.item_id(3).startswith("0.tar/@")
    (tmp_path / "1.tar").unlink()
    with pytest.raises(UserError, match=r"1\.tar cannot be opened any more .*--resume"):
        images.image(15)


def test_a_read_that_fails_for_a_moment_is_tried_again_with_a_new_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle of NFS that has gone stale stays so: only a new one reads."""
    monkeypatch.setattr(flaky, "WAITS_S", (0, 0))
    write_ten(tmp_path, 1)
    images = open_shards(str(tmp_path / "0.tar"))
    whole = captions(images)
    true_open, true_pread = os.open, os.pread
    opened: list[Path] = []

    def open_again(path: Path, flags: int) -> int:
        opened.append(path)
        return true_open(path, flags)

    def pread(descriptor: int, size: int, place: int) -> bytes:
        if not opened:
            raise OSError(errno.ESTALE, "Stale file handle")
        return true_pread(descriptor, size, place)

    monkeypatch.setattr(os, "open", open_again)
    monkeypatch.setattr(os, "pread", pread)
    assert captions(images) == whole
    assert len(opened) == 1


def test_a_shard_that_stays_unreadable_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flaky, "WAITS_S", (0, 0))
    write_ten(tmp_path, 1)
    images = open_shards(str(tmp_path / "0.tar"))
    tries: list[int] = []

    def pread(descriptor: int, size: int, place: int) -> bytes:
        tries.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(DamagedImageError, match="its shard cannot be read: Input/output error"):
        images.image(0)
    assert len(tries) == 3
