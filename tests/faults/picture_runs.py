"""A toy run that reads pictures through data workers."""

import shutil
from pathlib import Path

from PIL import Image


def picture_toy(toy: Path) -> None:
    """Lets a copy of the toy read its points from the pictures of ``--data_path``."""
    shutil.copy(Path(__file__).with_name("toy_pictures.py"), toy / "toy" / "pictures.py")
    script = toy / "toy" / "train.py"
    text = script.read_text(encoding="utf-8")
    assert text.count("data = Points(config, run)") == 1
    text = text.replace(
        "data = Points(config, run)",
        "from toy.pictures import Pictures\n\n        data = Pictures(config, run)",
    )
    script.write_text(text, encoding="utf-8")


def pictures(directory: Path, count: int) -> list[Path]:
    """Draws pictures of one colour each."""
    directory.mkdir()
    files = [directory / f"picture_{number:02d}.png" for number in range(count)]
    for number, file in enumerate(files):
        Image.new("RGB", (8, 8), (10 * number % 256, 0, 128)).save(file)
    return files
