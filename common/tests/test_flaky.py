"""Reads that fail for a moment, through the readers of data sets that use them."""

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from zoo_common import flaky, imagenet, shard_names, yfcc
from zoo_common.detection.coco import open_index
from zoo_common.errors import UserError
from zoo_common.images import DamagedImageError, read_image

Break = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flaky, "WAITS_S", (0, 0, 0))
    monkeypatch.setattr(flaky, "_told", bytearray(1024))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Lets the first ``times`` openings of files with a name fail; gives the names as they do."""

    def install(name: str, times: int, number: int = errno.EIO) -> list[str]:
        met: list[str] = []
        true_open, true_scan, true_list = io.open, os.scandir, os.listdir

        def meet(path: object) -> None:
            known = isinstance(path, (str, os.PathLike)) and Path(path).name == name
            if known and len(met) < times:
                met.append(name)
                raise OSError(number, os.strerror(number), str(path))

        def broken(path: object, *words: object, **more: object) -> object:
            meet(path)
            return true_open(path, *words, **more)  # type: ignore[call-overload]

        def broken_scan(path: object = ".") -> object:
            meet(path)
            return true_scan(path)  # type: ignore[call-overload]

        def broken_list(path: object = ".") -> object:
            meet(path)
            return true_list(path)  # type: ignore[call-overload]

        monkeypatch.setattr(builtins, "open", broken)
        monkeypatch.setattr(io, "open", broken)
        monkeypatch.setattr(os, "scandir", broken_scan)
        monkeypatch.setattr(os, "listdir", broken_list)
        return met

    return install


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 0, 0)).save(path)
    return path


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO])
def test_a_picture_is_read_again_and_that_is_told_once(
    number: int, tmp_path: Path, failing: Break, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    met = failing("a.png", 3, number)
    assert read_image(str(first)).size == (8, 6)
    assert len(met) == 3
    met = failing("b.png", 1, number)
    assert read_image(str(second)).size == (8, 6)
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    assert f"{first} could not be read ({os.strerror(number)}): tried again" in out


def test_a_picture_that_stays_unreadable_is_damaged_for_its_own_reason(
    tmp_path: Path, failing: Break
) -> None:
    file = picture(tmp_path / "a.png")
    met = failing("a.png", 99)
    with pytest.raises(DamagedImageError, match=r"Input/output error.*a\.png"):
        read_image(str(file))
    assert len(met) == 4


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_what_does_not_pass_is_not_tried_again(
    number: int, tmp_path: Path, failing: Break, capfd: pytest.CaptureFixture[str]
) -> None:
    file = picture(tmp_path / "a.png")
    met = failing("a.png", 99, number)
    with pytest.raises(DamagedImageError):
        read_image(str(file))
    assert len(met) == 1
    assert capfd.readouterr().out == ""


def test_a_read_that_fails_in_the_middle_begins_anew(tmp_path: Path) -> None:
    tries: list[int] = []

    def read() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return "whole"

    assert flaky.retried(read, tmp_path) == "whole"
    assert len(tries) == 3


def test_waits_grow_and_come_to_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    waited: list[float] = []
    monkeypatch.setattr("zoo_common.flaky.time.sleep", waited.append)

    def read() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        flaky.retried(read, tmp_path)
    assert waited == sorted(waited) and 10 <= sum(waited) <= 30


def coco(directory: Path) -> Path:
    picture(directory / "images" / "a.png")
    file = directory / "instances.json"
    file.write_text(
        '{"images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 6}],'
        ' "categories": [{"id": 1, "name": "thing"}],'
        ' "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3],'
        ' "area": 9, "iscrowd": 0}]}'
    )
    return file


def test_annotations_are_read_again(tmp_path: Path, failing: Break) -> None:
    file = coco(tmp_path)
    met = failing("instances.json", 2)
    index = open_index(file, tmp_path / "images", cache=tmp_path / "cache")
    assert len(index) == 1
    assert len(met) == 2


def test_annotations_that_stay_unreadable_are_named(tmp_path: Path, failing: Break) -> None:
    file = coco(tmp_path)
    failing("instances.json", 99)
    with pytest.raises(UserError, match=r"instances\.json cannot be read \(Input/output error\)"):
        open_index(file, tmp_path / "images", cache=tmp_path / "cache")


def test_folders_of_classes_are_listed_again(tmp_path: Path, failing: Break) -> None:
    for split in imagenet.SPLITS:
        picture(tmp_path / split / "n01" / f"{split}.jpeg")
    met = failing("n01", 3)
    assert len(imagenet.build_index(tmp_path, "train")) == 1
    assert len(met) == 3
    failing("n01", 99)
    with pytest.raises(UserError, match=r"n01' cannot be read \(Input/output error\)"):
        imagenet.build_index(tmp_path, "train")


def test_an_index_of_shards_is_read_again(tmp_path: Path, failing: Break) -> None:
    (tmp_path / shard_names.INDEX_NAME).write_text('{"shards": [{"name": "0.tar"}]}')
    met = failing(shard_names.INDEX_NAME, 3)
    assert shard_names.read_index(tmp_path)["shards"] == [{"name": "0.tar"}]
    assert len(met) == 3


def test_a_tree_is_looked_at_again(tmp_path: Path, failing: Break) -> None:
    (tmp_path / yfcc.TRAIN_JSON).write_text("{}")
    picture(tmp_path / yfcc.TRAIN_IMAGES / "a.jpg")
    met = failing(yfcc.TRAIN_IMAGES, 2)
    assert yfcc.check_tree(tmp_path, yfcc.Parts(val=False)) == tmp_path
    assert len(met) == 2
