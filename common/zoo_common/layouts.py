"""Data sets as the cards lay them out: the words for made ones, and the checks before a start.

Torch-free, so that a wrong path is told at once.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from zoo_common import digits, imagenet, sample
from zoo_common.errors import UserError


@dataclass(frozen=True)
class CocoFiles:
    """The parts of a COCO data set, from its directory or absolute; None is not asked for."""

    train_json: str | None = "annotations/instances_train2017.json"
    train_images: str | None = "train2017"
    val_json: str | None = "annotations/instances_val2017.json"
    val_images: str | None = "val2017"

    def tree(self) -> str:
        """What the directory must look like, for messages."""
        parts = [self.train_json, self.val_json]
        parts += [images and f"{images}/<image>" for images in (self.train_images, self.val_images)]
        lines = ["coco2017/            <- the path to give, or the directory that holds it"]
        return "\n    ".join(lines + [part for part in parts if part])


_COCO_NAMES = ("coco2017", "coco")
"""Names of the directory that the cards and the original zoo's scripts put below the path."""

TREES = {"imagenet": imagenet.EXPECTED_TREE, "coco": CocoFiles().tree()}
"""What a directory must look like, for messages."""

MADE = ("sample", "digits")
"""Words for ``--data_path`` that mean a data set made here."""

_LEVELS_TRIED = 100

Progress = Callable[[int, int], None]


def resolve(
    layout: str,
    path: str,
    progress: Progress | None = None,
    coco_files: CocoFiles | None = None,
) -> Path:
    """The directory that ``--data_path`` means, made where it is the word of a made data set.

    Args:
        layout: a key of :data:`TREES`.
        path: a directory, or ``sample`` (drawn shapes) or ``digits`` (scikit-learn's
            handwritten digits).
        progress: called with (pictures done, pictures in all) while a set is made.
        coco_files: what the ``coco`` layout must hold, if not COCO 2017's files. Where all are
            absolute, ``path`` may be empty.

    Returns:
        The directory of the layout's tree, which can be one level below ``path``.

    Raises:
        UserError: no path given, or the directory is not laid out as the card says.
    """
    files = coco_files or CocoFiles()
    complete = all(Path(part).is_absolute() for part in astuple(files) if part)
    if not path and not (layout == "coco" and complete):
        raise UserError(
            "The run needs a data set: give --data_path=DIR laid out as below, or "
            "--data_path=sample for the drawn sample data.\n"
            f"{files.tree() if layout == 'coco' else TREES[layout]}"
        )
    if path == "sample":
        directory = sample.make(layout=layout, progress=progress)
    elif path == "digits":
        if layout != "imagenet":
            raise UserError(f"--data_path=digits has no {layout} layout: use --data_path=sample.")
        directory = digits.make()
    else:
        directory = Path(path)
    if layout == "coco":
        return check_coco(directory, files)
    imagenet.check_tree(directory)
    return directory


def check_coco(path: str | Path, files: CocoFiles | None = None) -> Path:
    """Checks that a directory holds a COCO data set, without reading the annotations.

    Args:
        path: the directory that holds ``annotations``, or one that holds it as ``coco2017`` or
            ``coco``; a leading ``~`` is expanded.
        files: what it must hold, if not COCO 2017's files.

    Returns:
        The directory that the names of ``files`` are to be joined to.

    Raises:
        UserError: a part is not there, is empty or cannot be read. The message says which, and
            prints the expected tree.
    """
    files = files or CocoFiles()
    root = Path(path).expanduser()
    try:
        levels = [root, *(root / name for name in _COCO_NAMES)]
        problems = {level: _coco_problems(level, files) for level in levels}
        best = min(levels, key=lambda level: len(problems[level]))
        if not problems[best]:
            return best
        problem = _explain_coco(root, best, problems[best], files)
    except OSError as error:
        problem = f"'{error.filename}' cannot be read ({error.strerror}); check its permissions"
    raise UserError(f"{problem}. Expected:\n{files.tree()}")


def _coco_problems(root: Path, files: CocoFiles) -> list[str]:
    """What is wrong with each part."""
    problems = []
    for name in (files.train_json, files.val_json):
        if name is None:
            continue
        file = root / name
        if not file.exists():
            problems.append(f"no {name}")
        elif not file.is_file() or not file.stat().st_size:
            problems.append(f"{name}, which is {'empty' if file.is_file() else 'no file'}")
    for name in (files.train_images, files.val_images):
        if name is None:
            continue
        directory = root / name
        if not directory.is_dir():
            what = f"{name}, which is no directory" if directory.exists() else f"no {name}"
            problems.append(what)
        elif next(directory.iterdir(), None) is None:
            problems.append(f"{name}, which is empty")
    return problems


def _explain_coco(root: Path, best: Path, problems: list[str], files: CocoFiles) -> str:
    if not root.exists():
        return f"data path '{root}' does not exist; give the directory of the data set"
    if not root.is_dir():
        return f"data path '{root}' is a file; give the directory that holds the data set"
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not any(root.iterdir()):
        return f"data path '{root}' is empty; put the data set there or give another path"
    problem = f"data path '{best}' holds {', '.join(problems)}"
    parent = root.resolve().parent
    for level in (parent, parent.parent):
        if not _coco_problems(level, files):
            return f"{problem}; the data set begins higher up, so give '{level}'"
    for name in names[:_LEVELS_TRIED]:
        if not _coco_problems(root / name, files):
            return f"{problem}; the data set lies one level below, so give '{root / name}'"
    archives = sorted(entry.name for entry in best.iterdir() if entry.suffix == ".zip")
    if archives:
        return f"{problem}; unpack {', '.join(archives)} there"
    return f"{problem}; put what is missing there or give another path"
