"""The data set of the DeCLIP card: captioned pictures, and ImageNet's validation pictures.

Names of its parts, and the check of a tree before a run starts. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zoo_common.trees import file_problems, find_tree, folder_problems

TRAIN_JSON, TRAIN_IMAGES = "yfcc15m_clean_open_data.json", "yfcc15m_clean_open_data"
VAL_JSON = "val_official.json"
VAL_IMAGES = ("imagenet_val", "imagenet_valid")
"""The directory of the validation pictures; the card's text has both names."""
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"

EXPECTED_TREE = f"""\
dataset/                                <- the path to give, or the directory that holds it
    {TRAIN_JSON}        a line a picture: {{"filename": ..., "caption": ...}}
    {TRAIN_IMAGES}/
        <filename>
    {VAL_JSON}                   a line a picture: {{"filename", "label", "label_name"}}
    {VAL_IMAGES[0]}/                       or {VAL_IMAGES[1]}/
        ILSVRC2012_val_00000001.JPEG    ... all in this one directory
    {VOCABULARY}        or text.vocabulary, or open_clip's"""

_NAMES = ("dataset",)


@dataclass(frozen=True)
class Parts:
    """What a run reads of the tree: pictures to train on, pictures to validate with."""

    train: bool = True
    val: bool = True


def val_images(root: Path) -> Path | None:
    """The directory of the validation pictures, None if there is none."""
    return next((root / name for name in VAL_IMAGES if (root / name).is_dir()), None)


def check_tree(path: str | Path, parts: Parts | None = None) -> Path:
    """Checks that a directory holds what a run reads, without reading the lists of pictures.

    Args:
        path: the directory of the tree, or one that holds it as ``dataset``; a leading ``~`` is
            expanded.
        parts: what the run reads; all if None.

    Returns:
        The directory of the tree.

    Raises:
        UserError: a part is not there, is empty or cannot be read. The message says which, and
            prints the expected tree.
    """
    chosen = parts or Parts()

    def problems(root: Path) -> list[str]:
        found = []
        if chosen.train:
            found += file_problems(root, TRAIN_JSON) + folder_problems(root, TRAIN_IMAGES)
        if chosen.val:
            found += file_problems(root, VAL_JSON) + _val_problems(root)
        return found

    return find_tree(path, _NAMES, problems, EXPECTED_TREE)


def _val_problems(root: Path) -> list[str]:
    images = val_images(root) or root / VAL_IMAGES[0]
    problems = folder_problems(root, images.name)
    if not problems and next(images.iterdir()).is_dir():
        return [f"{images.name}, whose pictures must lie in it and not in directories below"]
    return problems
