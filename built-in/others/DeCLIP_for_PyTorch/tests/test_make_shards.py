"""The converter to shards: what it writes, and what is left when it is ended or the disk fails."""

import errno
import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from declip import make_shards as converter
from declip import shard_index
from declip.index import open_index
from declip.make_shards import Summary, main, make_shards
from declip.shards import open_shards
from zoo_common.errors import TrainingError, UserError
from zoo_common.yfcc import TRAIN_IMAGES, TRAIN_JSON

sys.path.insert(0, str(Path(__file__).resolve().parent))

from shard_rows import PER_SHARD, Rows, convert, draw_rows, files_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Those of a tree as the card has it."""
    images = tmp_path_factory.mktemp("tree") / TRAIN_IMAGES
    images.mkdir()
    rows = draw_rows(images, 45)
    lines = [
        json.dumps({"filename": rows.item_id(index), "caption": rows.caption(index)}) + "\n"
        for index in range(45)
    ]
    (images.parent / TRAIN_JSON).write_text("".join(lines))
    return rows


@pytest.fixture(scope="module")
def whole(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed conversion writes."""
    out = tmp_path_factory.mktemp("whole")
    convert(rows, out)
    return files_of(out)


def test_every_row_comes_back_as_it_was(rows: Rows, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    summary = convert(rows, tmp_path / "out", progress=lambda *numbers: told.append(numbers))
    assert summary == Summary(5, 45, 0, sum(p.stat().st_size for p in tmp_path.glob("out/*.tar")))
    assert told[0] == (0, 45) and told[-1] == (45, 45)
    images = open_shards(str(tmp_path / "out" / "{000000..000004}.tar"))
    assert len(images) == 45
    for index in range(45):
        assert images.caption(index) == rows.caption(index)
        assert images.item_id(index) == f"{index // PER_SHARD:06d}.tar/{index:09d}.jpg"
        with Image.open(rows.path(index)) as picture:
            assert images.image(index).tobytes() == picture.tobytes()


def test_the_library_reads_the_bytes_of_the_files(rows: Rows, whole: dict[str, bytes]) -> None:
    stored = []
    for name in sorted(name for name in whole if name.endswith(".tar")):
        members = webdataset.tariterators.tar_file_iterator(io.BytesIO(whole[name]))
        stored += [(member["fname"], member["data"]) for member in members]
    for index in range(45):
        (picture, data), (text, facts) = stored[2 * index : 2 * index + 2]
        assert (picture, text) == (f"{index:09d}.jpg", f"{index:09d}.json")
        assert data == Path(rows.path(index)).read_bytes()
        assert json.loads(facts) == {
            "caption": rows.caption(index),
            "filename": f"{index // 20}/{index}.jpg",
        }
    assert str(rows.directory).encode() not in b"".join(whole.values())


def test_the_index_lists_sizes_and_checksums(whole: dict[str, bytes]) -> None:
    content = json.loads(whole["shards.json"])
    assert content["samples"] == 45
    assert [shard["samples"] for shard in content["shards"]] == [10, 10, 10, 10, 5]
    for shard in content["shards"]:
        data = whole[shard["name"]]
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert set(whole) == {
        *(f"{number:06d}.tar" for number in range(5)),
        "shards.json",
        "shards.npy",
        "left_out.jsonl",
    }


def test_two_processes_write_the_same_bytes(
    rows: Rows, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    convert(open_index(rows.directory.parent), tmp_path / "out", workers=2)
    assert files_of(tmp_path / "out") == whole
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert convert(rows, tmp_path / "out").samples == 45
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_a_full_disk_is_told_and_finished_shards_are_kept(
    rows: Rows, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"The disk of .*out is full.*finished shards are kept"):
        convert(rows, tmp_path / "out")
    names = files_of(tmp_path / "out")
    assert "000000.tar" in names and "shards.json" not in names
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert convert(rows, tmp_path / "out").samples == 45
    assert files_of(tmp_path / "out") == whole


def test_a_disk_that_gives_back_something_else_is_found_out(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = converter.tar_file_iterator

    def spoiled(stream: converter._Hashed) -> object:
        path = Path(stream._stream.name)
        data = bytearray(path.read_bytes())
        data[900] ^= 1  # in the first picture
        path.write_bytes(data)
        return real(stream)

    monkeypatch.setattr(converter, "tar_file_iterator", spoiled)
    with pytest.raises(TrainingError, match="not on the disk as it was written"):
        convert(rows, tmp_path)
    assert not list(tmp_path.glob("*.tar"))


def test_unusable_pictures_are_named_and_limited(tmp_path: Path) -> None:
    rows = draw_rows(tmp_path, 45)
    Path(rows.path(3)).unlink()
    Path(rows.path(14)).write_bytes(b"GIF or not")
    Path(rows.path(15)).write_bytes(b"")
    cut = Path(rows.path(30)).read_bytes()
    Path(rows.path(30)).write_bytes(cut[:-8])
    with pytest.raises(UserError, match=r"3 of 45 rows have no usable picture: 0/3\.jpg \(No such"):
        convert(rows, tmp_path / "out")
    assert len(list(tmp_path.glob("out/*.tar"))) == 5
    assert convert(rows, tmp_path / "out", max_left_out=0.1) == Summary(
        5, 42, 3, sum(path.stat().st_size for path in tmp_path.glob("out/*.tar"))
    )
    lines = [
        json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()
    ]
    assert [line["item_id"] for line in lines] == ["0/3.jpg", "0/14.jpg", "0/15.jpg"]
    assert [line["reason"] for line in lines][1:] == ["no picture", "no picture"]
    images = open_shards(str(tmp_path / "out"))
    assert [images.caption(i) for i in (2, 3)] == [rows.caption(2), rows.caption(4)]
    assert convert(rows, tmp_path / "all", max_left_out=0.1, decode=True).left_out == 4


@pytest.mark.parametrize(
    ("picture_format", "ending"),
    [("PNG", "png"), ("WEBP", "webp"), ("MPO", "jpg"), ("EPS", None), ("PPM", None)],
)
def test_members_are_named_after_what_they_are(
    tmp_path: Path, picture_format: str, ending: str | None
) -> None:
    rows = draw_rows(tmp_path, 2)
    picture = Image.new("RGB", (40, 30))
    more = {"save_all": True, "append_images": [picture]} if picture_format == "MPO" else {}
    picture.save(rows.path(1), picture_format, **more)
    make_shards(rows, tmp_path / "out", max_left_out=1)
    with tarfile.open(tmp_path / "out" / "000000.tar") as archive:
        names = {"000000001.json", f"000000001.{ending}"} if ending else set()
        assert set(archive.getnames()[2:]) == names


def test_other_data_or_options_are_never_mixed(rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        convert(rows, tmp_path)
    convert(rows, tmp_path / "out")
    for other, size in ((Rows(rows.directory, 44), PER_SHARD), (rows, PER_SHARD + 1)):
        with pytest.raises(UserError, match="another data set or of other options"):
            make_shards(other, tmp_path / "out", samples_per_shard=size)
    with pytest.raises(UserError, match=r"samples_per_shard=0.*give at least 1"):
        make_shards(rows, tmp_path / "none", samples_per_shard=0)
    with pytest.raises(UserError, match="cannot be read or written"):
        convert(rows, tmp_path / "notes.txt")


def test_two_conversions_do_not_write_into_one_directory(rows: Rows, tmp_path: Path) -> None:
    class Nested(Rows):
        def path(self, index: int) -> str:
            if index == 0:
                with pytest.raises(UserError, match="Another process is making shards"):
                    convert(rows, tmp_path)
            return super().path(index)

    assert convert(Nested(rows.directory, 45), tmp_path).samples == 45


def test_the_command_makes_shards_of_the_cards_tree(
    rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, out = rows.directory.parent, tmp_path / "shards"
    words = [f"--data_path={tree}", f"--out={out}", "--samples_per_shard=10", "--workers=1"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "45 samples in 5 shards" in printed
    pattern = printed.split("--data_path=")[1].strip().strip("'")
    assert open_shards(pattern).caption(44) == rows.caption(44)
    assert main([words[0], f"--out={tree}", *words[2:]]) == 2
    assert "error: " in capsys.readouterr().err


def test_each_member_is_behind_one_header(whole: dict[str, bytes]) -> None:
    rows_N = np.load(io.BytesIO(whole["shards.npy"]), allow_pickle=False)
    data = whole["000002.tar"]
    assert int(rows_N[20]["image"]) == 1 and data.startswith(b"000000020.jpg\0")
    for row in rows_N[20:30]:
        begin = int(row["image"]) * shard_index.BLOCK
        with Image.open(io.BytesIO(data[begin : begin + int(row["image_bytes"])])) as picture:
            assert picture.size == (40, 30)
