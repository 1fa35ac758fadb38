"""Image files and their bytes to pictures; what cannot be read is told in one way."""

from __future__ import annotations

import io

from PIL import ExifTags, Image, UnidentifiedImageError

from zoo_common.errors import one_line
from zoo_common.flaky import read_bytes

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by EXIF orientation."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""What is decoded, whatever a file is called: others of Pillow's start programs (EPS does)."""


class DamagedImageError(Exception):
    """An image file that cannot be opened or decoded; the message is the reason."""


def read_image(path: str, *, upright: bool = False) -> Image.Image:
    """Reads and decodes an image file as RGB; alpha is dropped.

    A read error that may pass, as network disks have them, is tried again for some seconds.

    Args:
        path: The file.
        upright: Apply the EXIF orientation, if there is one.

    Raises:
        DamagedImageError: It cannot be opened or decoded.
    """
    try:
        data = read_bytes(path)
    except OSError as error:
        raise DamagedImageError(one_line(error)) from error
    return decode_image(data, upright=upright)


def decode_image(data: bytes, *, upright: bool = False) -> Image.Image:
    """Decodes the bytes of an image file as RGB; alpha is dropped.

    Args:
        data: The file's content.
        upright: Apply the EXIF orientation, if there is one.

    Raises:
        DamagedImageError: They cannot be decoded.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if upright:
            image = _upright(image)
        if image.mode == "P" and "transparency" in image.info:
            # Straight to RGB, Pillow would warn; the colours are the same.
            image = image.convert("RGBA")
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()
    except MemoryError:
        raise
    except UnidentifiedImageError:  # it would name the object in memory
        raise DamagedImageError("cannot identify image file") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise DamagedImageError(one_line(error)) from error
    return image


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # an EXIF block that cannot be read says nothing of the picture
        return image
    return image if turn is None else image.transpose(turn)
