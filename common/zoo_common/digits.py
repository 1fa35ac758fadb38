"""Real handwritten digits as an ImageNet tree, so that a classifier also runs on real pictures.

They are the 1,797 digits that come with scikit-learn (the test set of UCI's "Optical Recognition
of Handwritten Digits"): 8 x 8 pixels of 17 grey levels. Each is stored as a lossless PNG (RGB, all
three channels alike) of 40 x 40 pixels, enlarged with bicubic interpolation, so that crops and
further resizing see smooth strokes instead of blocks. Nothing is lost: with a factor of five the
middle pixel of each 5 x 5 block is the original pixel, scaled from [0, 16] to [0, 255].
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo_common.errors import UserError
from zoo_common.sample.directory import default_root, make_directory
from zoo_common.sample.scenes import Dice

VERSION = 1

HELD_OUT_PER_CLASS = 36

_FACTOR = 5
# Pictures of each digit. Known without scikit-learn, so that a tree that is there needs none.
_COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)


def make(root: Path | None = None) -> Path:
    """Writes the digits into a directory of their own, or finds them there.

    The layout is ``train/<digit>/<digit>_<number>.png`` and ``val/...``, the number being the
    picture's place in scikit-learn's data. 36 pictures of each digit are held out in ``val`` (360
    of 1,797), the same ones everywhere. Writers of the digits are not known, so the same hand may
    be in both splits.

    Args:
        root: where that directory is made; ``default_root()`` of the sample data set if None.

    Returns:
        The absolute path of the data set's directory.

    Raises:
        UserError: if scikit-learn is not installed, or the directory holds something else or
            cannot be written.
    """
    target = (root or default_root()) / f"digits-v{VERSION}"
    files = {f"train/{digit}": n - HELD_OUT_PER_CLASS for digit, n in enumerate(_COUNTS)}
    files |= {f"val/{digit}": HELD_OUT_PER_CLASS for digit in range(len(_COUNTS))}
    manifest = {"data_set": "zoo_common.digits", "version": VERSION, "files": files}
    return make_directory(target, manifest, _fill)


def _fill(building: Path) -> None:
    values, labels = _load()
    for digit in range(len(_COUNTS)):
        indices = Dice(VERSION, digit).shuffled(np.flatnonzero(labels == digit).tolist())
        for place, index in enumerate(indices):
            split = "val" if place < HELD_OUT_PER_CLASS else "train"
            folder = building / split / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            # Pillow's own writing to a file loses the reason when that fails.
            buffer = BytesIO()
            _picture(values[index]).save(buffer, format="PNG")
            (folder / f"{digit}_{index:04d}.png").write_bytes(buffer.getvalue())


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Values in [0, 16] of shape (1797, 8, 8), uint8, and labels of shape (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the data set of handwritten digits comes with scikit-learn, which is not installed; "
            'run: pip install "zoo-common[digits]"'
        ) from error
    digits: Any = load_digits()
    return digits.images.astype(np.uint8), digits.target


def _picture(values: np.ndarray) -> Image.Image:
    grey = Image.fromarray((values.astype(np.uint16) * 255 // 16).astype(np.uint8))
    side = _FACTOR * len(values)
    return grey.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
