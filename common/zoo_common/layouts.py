"""Data sets as the cards lay them out: the words for made ones, and the checks before a start.

Torch-free, so that a wrong path is told at once.
"""

from collections.abc import Callable
from pathlib import Path

from zoo_common import digits, imagenet, sample
from zoo_common.errors import UserError

_CHECKS: dict[str, Callable[[Path], object]] = {"imagenet": imagenet.check_tree}

TREES = {"imagenet": imagenet.EXPECTED_TREE}
"""What a directory must look like, for messages."""

MADE = ("sample", "digits")
"""Words for ``--data_path`` that mean a data set made here."""

Progress = Callable[[int, int], None]


def resolve(layout: str, path: str, progress: Progress | None = None) -> Path:
    """The directory that ``--data_path`` means, made where it is the word of a made data set.

    Args:
        layout: a key of :data:`TREES`.
        path: a directory, or ``sample`` (drawn shapes) or ``digits`` (scikit-learn's
            handwritten digits).
        progress: called with (pictures done, pictures in all) while a set is made.

    Raises:
        UserError: no path given, or the directory is not laid out as the card says.
    """
    if not path:
        raise UserError(
            "The run needs a data set: give --data_path=DIR laid out as below, or "
            f"--data_path=sample for the drawn sample data.\n{TREES[layout]}"
        )
    if path == "sample":
        directory = sample.make(layout=layout, progress=progress)
    elif path == "digits":
        if layout != "imagenet":
            raise UserError(f"--data_path=digits has no {layout} layout: use --data_path=sample.")
        directory = digits.make()
    else:
        directory = Path(path)
    _CHECKS[layout](directory)
    return directory
