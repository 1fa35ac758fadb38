"""The settings of a detector's data."""

from dataclasses import dataclass

from zoo_common.config import setting
from zoo_common.errors import UserError

_STRIDE = 32  # of the coarsest level that a backbone gives


@dataclass
class DetectionData:
    """Images, their annotations, and what is done to them.

    A model's own section derives from it; where its recipe has another default it says so again.
    """

    path: str = setting("", "COCO directory, or sample", kind="path")
    train_json: str = setting(
        "annotations/instances_train2017.json", "annotations for training, from data.path"
    )
    train_images: str = setting("train2017", "directory of their images, from data.path")
    val_json: str = setting(
        "annotations/instances_val2017.json", "annotations for evaluation, from data.path"
    )
    val_images: str = setting("val2017", "directory of their images, from data.path")
    batch_size: int = setting(16, "images a step over all cards together", at_least=1)
    workers: int = setting(4, "loader processes per card; 0: none", at_least=0)
    min_sizes: list[int] = setting(
        [800], "short sides in pixels that training resizes to", at_least=1
    )
    max_size: int = setting(1333, "longest side in pixels in training", at_least=1)
    min_size_test: int = setting(800, "short side in pixels in evaluation", at_least=1)
    max_size_test: int = setting(1333, "longest side in pixels in evaluation", at_least=1)
    flip: float = setting(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    group_by_aspect: bool = setting(True, "wide and tall images in batches of their own")
    keep_empty: bool = setting(False, "train on images without objects too")
    max_damaged: int = setting(
        10, "damaged images that each process bears before the run ends", at_least=0
    )
    buckets: list[list[int]] = setting(
        [],
        "padded sizes [height, width] under static shapes; none: derived from the sizes above",
        at_least=1,
    )
    slots: int = setting(
        0, "objects that an image may have under static shapes; 0: from the data set", at_least=0
    )
    size_divisibility: int = setting(32, "padded sizes are multiples of it", at_least=1)


def check_sizes(data: DetectionData) -> None:
    """Tells sizes that do not fit one another.

    Raises:
        UserError: the message names the settings.
    """
    if not data.min_sizes:
        raise UserError("data.min_sizes is empty: name a short side at least.")
    if data.size_divisibility % _STRIDE:
        raise UserError(
            f"data.size_divisibility={data.size_divisibility} must be a multiple of {_STRIDE}, the "
            "largest stride of the backbone."
        )
    for bucket in data.buckets:
        if len(bucket) != 2 or any(side % data.size_divisibility for side in bucket):
            raise UserError(
                f"data.buckets holds {bucket}: a bucket is [height, width], multiples of "
                f"{data.size_divisibility}."
            )
