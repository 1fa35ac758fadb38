"""The pictures of a command line, and those that a program may write."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo_common.detection.pictures import find_pictures, open_picture, output_files, save
from zoo_common.errors import UserError

GREY = (100, 100, 100)


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def test_directories_are_expanded(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.jpeg"):
        grey(8, 6).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "inner.jpg").mkdir()
    (tmp_path / "._a.png").write_bytes(b"left by another system")
    odd = tmp_path / "picture without suffix"
    grey(8, 6).save(odd, format="PNG")
    found = find_pictures([odd, str(tmp_path), tmp_path / "a.png"])
    assert found == [odd, tmp_path / "a.png", tmp_path / "b.JPG", tmp_path / "c.jpeg"]
    assert find_pictures([]) == []


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    nothing = tmp_path / "empty.png"
    nothing.touch()
    for path in (text, nothing):
        with pytest.raises(UserError, match=rf"{path.name} is no picture .*; give a JPEG or PNG"):
            find_pictures([path])
    with pytest.raises(UserError, match="is no picture"):
        find_pictures([tmp_path])
    with pytest.raises(UserError, match=r"absent.jpg is not there; give a picture"):
        find_pictures([tmp_path / "absent.jpg"])
    empty = tmp_path / "nothing here"
    empty.mkdir()
    with pytest.raises(UserError, match=r"nothing here holds no picture; give"):
        find_pictures([empty])


def test_pictures_are_opened_upright_and_whole(tmp_path: Path) -> None:
    lying = grey(40, 20)
    lying.paste((250, 0, 0), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying.save(tmp_path / "turned.png", exif=exif)
    upright = open_picture(tmp_path / "turned.png")
    assert (upright.size, upright.mode) == ((20, 40), "RGB")
    assert upright.getpixel((10, 2)) == (250, 0, 0)
    assert upright.getpixel((10, 38)) == GREY

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        Image.fromarray(noise).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert find_pictures([tmp_path / name]), "its head is whole"
        with pytest.raises(UserError, match=rf"{name} is damaged \(.*\); replace it"):
            open_picture(tmp_path / name)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.png"
    grey(8, 6).save(path)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match=r"locked.png cannot be read \(Permission denied\)"):
        find_pictures([path])


def test_a_large_picture_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey(40, 40).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_picture(tmp_path / "large.png").size == (40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(UserError, match=r"large.png is too large"):
        find_pictures([Path(tmp_path / "large.png")])


def test_a_program_draws_again_what_it_drew_itself(tmp_path: Path) -> None:
    picture, out = tmp_path / "a.jpg", tmp_path / "new" / "out"
    grey(8, 6).save(picture)
    (target,) = output_files([picture], out, "mine")
    assert target == out / "a.png"
    save(grey(8, 6), target, "mine")
    with Image.open(target) as drawn:
        assert drawn.size == (8, 6)
    assert output_files([picture], out, "mine") == [target]
    with pytest.raises(UserError, match=r"a\.png is there and was not drawn here"):
        output_files([picture], out, "another")
    for content in (b"somebody's work", b""):
        target.write_bytes(content)
        with pytest.raises(UserError, match="was not drawn here: give another --out"):
            output_files([picture], out, "mine")


def test_no_picture_is_overwritten_by_another(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        grey(8, 6).save(tmp_path / name)
    with pytest.raises(UserError, match=r"Two pictures would become a\.png"):
        output_files([tmp_path / "a.jpg", tmp_path / "a.png"], tmp_path / "out", "mine")
    save(grey(8, 6), tmp_path / "a.png", "mine")
    with pytest.raises(UserError, match=r"a\.png is one of the pictures"):
        output_files([tmp_path / "a.png"], tmp_path / "x" / "..", "mine")
    with pytest.raises(UserError, match=r"Cannot write .*b\.png: .*; give another --out"):
        save(grey(8, 6), tmp_path / "a.jpg" / "b.png", "mine")
