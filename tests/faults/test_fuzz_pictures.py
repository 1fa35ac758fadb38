"""Pictures of a data set: damaged ones are told as such, and none starts a program."""

import io
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from fuzzing import amounts, feed, spoiled, watched
from PIL import Image

from zoo_common.detection.pictures import find_pictures, open_picture
from zoo_common.errors import UserError
from zoo_common.images import DamagedImageError, decode_image, read_image

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
(ran) (w) file closefile
showpage
"""
"""A program in PostScript, which Pillow would hand to Ghostscript to have it drawn."""


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    colours = np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def oriented() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encoded("JPEG", exif=exif)


def valid() -> list[bytes]:
    return [
        oriented(),
        encoded("JPEG", "CMYK"),
        encoded("JPEG", "L", progressive=True),
        encoded("PNG"),
        encoded("PNG", "P", transparency=b"\0\x80"),
        encoded("PNG", "RGBA"),
        encoded("GIF"),
        encoded("WEBP"),
        encoded("BMP"),
        encoded("TIFF"),
        encoded("TIFF", compression="tiff_lzw"),
        encoded("PPM"),
    ]


WORDS = [
    EPS, b"%!PS", b"\xff\xd8\xff\xe1", b"\xff\xc0", b"\xff\xda", b"\xff\xd9", b"IHDR", b"PLTE",
    b"IDAT", b"IEND", b"tRNS", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"II*\0", b"MM\0*", b"Exif\0\0",
    b"RIFF", b"VP8L", b"GIF89a", b"BM", b"P6\n", b"P6\n99999 99999\n255\n", b"\xff\xff\xff\xff",
    struct.pack(">II", 60_000, 60_000), struct.pack("<HH", 65535, 65535),
]  # fmt: skip


@amounts
def test_pictures(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"

    def read_picture(data: bytes) -> None:
        path.write_bytes(data)
        assert read_image(str(path)).mode == "RGB"
        assert decode_image(data, upright=True).mode == "RGB"

    for data in valid():
        read_picture(data)
    feed(read_picture, spoiled(valid(), WORDS), amount, tmp_path, (DamagedImageError,))


@amounts
def test_pictures_to_predict(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"

    def read_picture(data: bytes) -> None:
        path.write_bytes(data)
        for file in find_pictures([path]):
            assert open_picture(file).mode == "RGB"

    for data in valid():
        read_picture(data)
    feed(read_picture, spoiled(valid(), WORDS), amount, tmp_path)


def test_a_picture_that_is_a_program_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That Pillow itself would start Ghostscript is what makes this test mean something."""
    ran, program = tmp_path / "ran", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{ran}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "picture.jpg"
    path.write_bytes(EPS)
    with watched(tmp_path):
        with pytest.raises(DamagedImageError):
            read_image(str(path))
        with pytest.raises(DamagedImageError):
            decode_image(EPS, upright=True)
        with pytest.raises(UserError):
            open_picture(path)
        with pytest.raises(UserError):
            find_pictures([path])
    assert not ran.exists()
    assert shutil.which("gs") == str(program)
    with pytest.raises(Exception), Image.open(path) as picture:  # noqa: B017 - our gs draws nothing
        picture.load()
    assert ran.exists()
