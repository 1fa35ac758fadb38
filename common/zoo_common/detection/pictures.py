"""The pictures that a predict program is given, and those that it writes."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from zoo_common.errors import UserError
from zoo_common.images import FORMATS, DamagedImageError, read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""Names of files that are taken for pictures when a directory is given."""

_MARK = "Software"  # the name of a PNG's text that says which program drew it


def find_pictures(paths: Iterable[str | Path]) -> list[Path]:
    """The files that a command line means, each once, in the order given.

    Args:
        paths: pictures, and directories of which the pictures directly inside are taken, by name.

    Returns:
        Files that begin as pictures do; what is further on in them has not been read.

    Raises:
        UserError: one is not there or is no picture, or a directory holds none.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            inside = [p for p in inside if p.is_file() and not p.name.startswith(".")]
            if not inside:
                raise UserError(
                    f"{path} holds no picture; give picture files, or a directory that holds some "
                    f"({', '.join(SUFFIXES)})"
                )
        else:
            inside = [path]
        for file in inside:
            _open(file).close()
            found[file] = None
    return list(found)


def open_picture(path: Path) -> Image.Image:
    """A picture, RGB, turned as its EXIF data say.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    with _open(path) as picture:
        size = picture.size  # the head can be read
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return read_image(str(path), upright=True)
    except (DamagedImageError, MemoryError) as error:
        why = str(error) or f"{size[0]} x {size[1]} pixels are too many"
        raise UserError(f"{path} is damaged ({why:.200}); replace it or leave it out") from error


def output_files(pictures: Sequence[Path], directory: Path, mark: str) -> list[Path]:
    """The PNG to draw each picture into.

    Args:
        pictures: from :func:`find_pictures`.
        directory: where they shall stand, under the pictures' own names.
        mark: the program's name, as it gives it to :func:`save`.

    Raises:
        UserError: two pictures have one name, or a file would be overwritten that was not drawn
            here.
    """
    targets = [directory / f"{picture.stem}.png" for picture in pictures]
    twice = {target.name for target in targets if targets.count(target) > 1}
    if twice:
        raise UserError(f"Two pictures would become {twice.pop()}: draw them into two directories.")
    sources = {picture.resolve() for picture in pictures}
    for target in targets:
        if target.resolve() in sources:
            raise UserError(f"{target} is one of the pictures: give another --out.")
        if target.exists() and not _is_drawn(target, mark):
            raise UserError(f"{target} is there and was not drawn here: give another --out.")
    return targets


def save(picture: Image.Image, target: Path, mark: str) -> None:
    """Writes a PNG, and the directories above it.

    Args:
        picture: what was drawn.
        target: the file.
        mark: the program's name; with it in the file, the program may draw it again.

    Raises:
        UserError: the file cannot be written.
    """
    info = PngInfo()
    info.add_text(_MARK, mark)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target, pnginfo=info)
    except OSError as error:
        raise UserError(
            f"Cannot write {target}: {error.strerror or error}; give another --out."
        ) from error


def _open(path: Path) -> Image.Image:
    """Opens a picture and reads its head."""
    try:
        with warnings.catch_warnings():
            # Pictures of more than 90 megapixels are what was asked for.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path, formats=FORMATS)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; give a picture or a directory") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large ({error}); make it smaller") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path} is no picture that can be read; give a JPEG or PNG file"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a broken head raises anything
        raise UserError(
            f"{path} is damaged ({error!s:.200}); replace it or leave it out"
        ) from error


def _is_drawn(file: Path, mark: str) -> bool:
    """Whether a file is a PNG that the program with this mark drew."""
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return picture.info.get(_MARK) == mark
    except Exception:  # no picture at all, or a broken head, which raises anything
        return False
