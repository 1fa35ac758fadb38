"""Data sets as the cards lay them out: the words for made ones, and the checks before a start.

Torch-free, so that a wrong path is told at once.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from zoo_common import digits, imagenet, sample, yfcc
from zoo_common.errors import UserError
from zoo_common.shard_names import expand, is_pattern
from zoo_common.trees import file_problems, find_tree, folder_problems


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

TREES = {
    "imagenet": imagenet.EXPECTED_TREE,
    "coco": CocoFiles().tree(),
    "yfcc": yfcc.EXPECTED_TREE,
}
"""What a directory must look like, for messages."""

_DRAWN_AS = {"grounding": "coco"}
"""Layouts of the sample data set with more in them than the tree of this name asks for."""

MADE = ("sample", "digits")
"""Words for ``--data_path`` that mean a data set made here."""

Progress = Callable[[int, int], None]


def resolve(
    layout: str,
    path: str,
    progress: Progress | None = None,
    coco_files: CocoFiles | None = None,
    yfcc_parts: yfcc.Parts | None = None,
) -> Path:
    """The directory that ``--data_path`` means, made where it is the word of a made data set.

    Args:
        layout: a key of :data:`TREES`, or ``grounding``: that of ``coco``, whose drawn data set
            has grounded captions too.
        path: a directory, or ``sample`` (drawn shapes) or ``digits`` (scikit-learn's
            handwritten digits).
        progress: called with (pictures done, pictures in all) while a set is made.
        coco_files: what the ``coco`` layout must hold, if not COCO 2017's files. Where all are
            absolute, ``path`` may be empty.
        yfcc_parts: what a run of the ``yfcc`` layout reads, if not all.

    Returns:
        The directory of the layout's tree, which can be one level below ``path``.

    Raises:
        UserError: no path given, or the directory is not laid out as the card says.
    """
    drawn, layout = layout, _DRAWN_AS.get(layout, layout)
    files = coco_files or CocoFiles()
    complete = all(Path(part).is_absolute() for part in astuple(files) if part)
    if not path and not (layout == "coco" and complete):
        raise UserError(
            "The run needs a data set: give --data_path=DIR laid out as below, or "
            "--data_path=sample for the drawn sample data.\n"
            f"{files.tree() if layout == 'coco' else TREES[layout]}"
        )
    if path == "sample":
        directory = sample.make(layout=drawn, progress=progress)
    elif path == "digits":
        if layout != "imagenet":
            raise UserError(f"--data_path=digits has no {layout} layout: use --data_path=sample.")
        directory = digits.make()
    else:
        directory = Path(path)
    if layout == "coco":
        return check_coco(directory, files)
    if layout == "yfcc":
        return yfcc.check_tree(directory, yfcc_parts)
    imagenet.check_tree(directory)
    return directory


def resolve_yfcc(
    path: str, val_path: str, parts: yfcc.Parts, progress: Progress | None = None
) -> tuple[str, str]:
    """What ``--data_path`` and ``data.val_path`` mean in the ``yfcc`` layout.

    Args:
        path: as in :func:`resolve`, or shards of training pictures: a pattern
            (``shards/{000000..001499}.tar``), or a directory that ``zoo_common.shard_names``
            takes for one of shards.
        val_path: where the validation part is, if not in ``path``; shards hold none.
        parts: what the run reads.
        progress: called with (pictures done, pictures in all) while a set is made.

    Returns:
        Both, ready to be read: the shards as they were given, directories of the tree. The second
        is empty if it was not given.

    Raises:
        UserError: shards are missing, a directory is not laid out as the card says, or a run
            with shards has no validation part.
    """
    sharded = is_pattern(path)
    if sharded:
        if parts.train:
            expand(path)
        if parts.val and not val_path:
            raise UserError(
                f"--data_path={path} are shards, which hold no validation pictures: give "
                "data.val_path=DIR with the validation part of the tree below, or switch "
                f"evaluation off.\n{yfcc.EXPECTED_TREE}"
            )
    if val_path:
        # It can hold the vocabulary too, which a run without evaluation needs.
        held_out = yfcc.Parts(train=False, val=parts.val)
        val_path = str(resolve("yfcc", val_path, progress, yfcc_parts=held_out))
    if not sharded and (parts.train or not val_path):
        rest = yfcc.Parts(parts.train, parts.val and not val_path)
        path = str(resolve("yfcc", path, progress, yfcc_parts=rest))
    return path, val_path


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
    wanted = files or CocoFiles()

    def problems(root: Path) -> list[str]:
        found: list[str] = []
        for name in (wanted.train_json, wanted.val_json):
            found += file_problems(root, name) if name else []
        for name in (wanted.train_images, wanted.val_images):
            found += folder_problems(root, name) if name else []
        return found

    return find_tree(path, _COCO_NAMES, problems, wanted.tree())
