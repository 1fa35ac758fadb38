"""From the head's predictions to the objects of an image; all shapes are fixed.

Follows https://github.com/microsoft/GLIP (MIT) at 9dda955, maskrcnn_benchmark/modeling/rpn/
inference.py. Differences: suppression is within classes on every device, upstream's on CUDA only;
of equal scores at the limit of detections one is kept, upstream keeps them all.

Shape letters: B images, C channels, H W pixels, A anchors of all levels, T tokens, N classes,
X candidates, K detections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glip import anchors
from glip.captions import Query
from glip.config import TestConfig
from glip.head import Predictions
from glip.language import Words
from glip.model import GLIP, level_sizes
from zoo_common.detection import ops

_TOKEN_STEP = 32


class Detections(NamedTuple):
    """What was found, best first.

    Attributes:
        boxes_BK4: xyxy in pixels of the resized image; the last pixel belongs to a box, see
            :func:`to_files`. 0 in empty slots.
        scores_BK: 0 to 1; 0 in empty slots.
        labels_BK: int64, rows of the class map; 0 in empty slots.
        valid_BK: bool, which slots hold an object.
    """

    boxes_BK4: Tensor
    scores_BK: Tensor
    labels_BK: Tensor
    valid_BK: Tensor


class Wanted(NamedTuple):
    """What is looked for with one caption, on the device.

    Attributes:
        labels_N: int64, the class numbers.
        map_NT: bool, the tokens of each class.
        words: what BERT makes of the caption, one row.
    """

    labels_N: Tensor
    map_NT: Tensor
    words: Words


@torch.no_grad()
def read(model: GLIP, queries: Sequence[Query], device: torch.device) -> list[Wanted]:
    """Lets BERT read each caption, which it needs to do once for any number of images.

    Padding, of which nothing that is found depends, is cut off but for what makes the number of
    tokens one of few.
    """
    wanted = []
    for labels, _, text, map_NT in queries:
        tokens = -(-int(text.mask_BT.sum(dim=1).max()) // _TOKEN_STEP) * _TOKEN_STEP
        words = model.words(*(part_1T[:, :tokens].to(device) for part_1T in text))
        shown_NT = map_NT[:, :tokens].to(device)
        wanted.append(Wanted(torch.tensor(labels, device=device), shown_NT, words))
    return wanted


@torch.no_grad()
def find(
    model: GLIP,
    images_BCHW: Tensor,
    sizes_B2: Tensor,
    wanted: Sequence[Wanted],
    config: TestConfig,
) -> list[Detections]:
    """Looks for the classes of each caption; the backbone sees each image once.

    Args:
        model: in evaluation mode.
        images_BCHW: 0 to 255, red first.
        sizes_B2: height and width of each image in its padding, pixels.
        wanted: from :func:`read`.
        config: thresholds and counts, for each caption by itself.

    Returns:
        What was found by each caption, with class numbers as labels.
    """
    levels = model.backbone(model.normalize(images_BCHW, sizes_B2))
    batch, sizes = len(images_BCHW), level_sizes(levels)
    parts = []
    for labels_N, map_NT, words in wanted:
        words = Words(*(part_1T.expand(batch, *part_1T.shape[1:]) for part_1T in words))
        part = detect(model.rpn.head(levels, words), sizes, map_NT, sizes_B2, config)
        labels_BK = labels_N.expand(batch, -1).gather(1, part.labels_BK)
        parts.append(part._replace(labels_BK=labels_BK))
    return parts


def join(parts: Sequence[Detections]) -> Detections:
    """What was found by captions of different classes, one after the other; none is dropped.

    So does upstream when it looks for classes in chunks: COCO's limit of detections is one of each
    class.
    """
    return Detections(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


@torch.no_grad()
def detect(
    predictions: Predictions,
    sizes: Sequence[tuple[int, int]],
    class_map_NT: Tensor,
    sizes_B2: Tensor,
    config: TestConfig,
) -> Detections:
    """Finds objects, computing in float32 (float64 for such predictions).

    Args:
        predictions: the head's, in any format.
        sizes: (height, width) of the levels.
        class_map_NT: bool, the tokens of each class; one without tokens is never found.
        sizes_B2: height and width of each image in its padding, pixels.
        config: thresholds and counts.
    """
    with torch.autocast(class_map_NT.device.type, enabled=False):
        logits_BAT, deltas_BA4, centerness_BA = (anchors.wide(part) for part in predictions)
        anchors_A4 = anchors.make_anchors(sizes, class_map_NT.device).to(deltas_BA4.dtype)
        boxes_BA4 = clip(anchors.decode(deltas_BA4, anchors_A4), sizes_B2)
        scores_BAN = class_scores(logits_BAT, class_map_NT)
        central_BAN = scores_BAN * centerness_BA.sigmoid()[..., None]
        rank_BAN = central_BAN if config.rank_by == "score_centerness" else scores_BAN
        rank_BAN = torch.where(scores_BAN > config.score_thr, rank_BAN, -1.0)
        ranks, places, first = [], [], 0
        for count in (height * width for height, width in sizes):
            level_BX = rank_BAN[:, first : first + count].flatten(1)
            best = level_BX.topk(min(config.nms_pre, level_BX.shape[1]), dim=1)
            ranks.append(best.values)
            places.append(best.indices + first * len(class_map_NT))
            first += count
        place_BX, found_BX = torch.cat(places, dim=1), torch.cat(ranks, dim=1) >= 0
        scores_BX = central_BAN.flatten(1).gather(1, place_BX).sqrt()
        labels_BX = place_BX % len(class_map_NT)
        anchor_BX1 = place_BX.div(len(class_map_NT), rounding_mode="floor")[..., None]
        boxes_BX4 = boxes_BA4.gather(1, anchor_BX1.expand(-1, -1, 4))
        apart_BX4 = in_class_places(boxes_BX4, labels_BX, len(class_map_NT), sizes_B2)
        return suppress(boxes_BX4, apart_BX4, scores_BX, labels_BX, found_BX, config)


def clip(boxes_BA4: Tensor, sizes_B2: Tensor) -> Tensor:
    """Boxes whose corners are pixels of their image, its last row and column at most."""
    high_B12 = sizes_B2.flip(1)[:, None].to(boxes_BA4.dtype) - 1
    return boxes_BA4.clamp(min=0).minimum(torch.cat([high_B12, high_B12], dim=2))


def class_scores(logits_BAT: Tensor, class_map_NT: Tensor) -> Tensor:
    """(B, A, N): the mean probability of each class's tokens."""
    shares_NT = class_map_NT.to(logits_BAT.dtype)
    shares_NT = shares_NT / shares_NT.sum(dim=1, keepdim=True).clamp(min=1)
    return logits_BAT.sigmoid() @ shares_NT.T


def in_class_places(boxes_BX4: Tensor, labels_BX: Tensor, classes: int, sizes_B2: Tensor) -> Tensor:
    """Boxes moved so that no two of different classes meet, and one suppression serves all.

    The places of the classes form a square: in a row, numbers of 80 classes would grow so large
    that float32 has hundredths of a pixel left.
    """
    columns = math.ceil(math.sqrt(classes))
    side_B1 = sizes_B2.amax(dim=1, keepdim=True) + 2
    x_BX = labels_BX % columns * side_B1
    y_BX = labels_BX.div(columns, rounding_mode="floor") * side_B1
    return boxes_BX4 + torch.stack([x_BX, y_BX, x_BX, y_BX], dim=2).to(boxes_BX4.dtype)


def suppress(
    boxes_BX4: Tensor,
    apart_BX4: Tensor,
    scores_BX: Tensor,
    labels_BX: Tensor,
    found_BX: Tensor,
    config: TestConfig,
) -> Detections:
    """The best of overlapping boxes of a class, and of those the best.

    Args:
        boxes_BX4: candidates.
        apart_BX4: the same, with classes where they do not meet.
        scores_BX: their scores.
        labels_BX: their classes.
        found_BX: which of them there are.
        config: thresholds and counts.
    """
    if config.legacy_nms:
        apart_BX4 = torch.cat([apart_BX4[..., :2], apart_BX4[..., 2:] + 1], dim=2)
    else:
        # To mmdet a box of a single row or column has no extent, and it drops such boxes.
        found_BX = found_BX & (boxes_BX4[..., 2:] > boxes_BX4[..., :2]).all(dim=2)
    kept_BX = ops.nms(apart_BX4, scores_BX, config.nms_thr, found_BX)
    ranked_BX = torch.where(kept_BX, scores_BX, -1.0)
    scores_BK, place_BK = ranked_BX.topk(min(config.max_per_img, ranked_BX.shape[1]), dim=1)
    valid_BK = scores_BK >= 0
    boxes_BK4 = boxes_BX4.gather(1, place_BK[..., None].expand(-1, -1, 4))
    return Detections(
        torch.where(valid_BK[..., None], boxes_BK4, 0.0),
        scores_BK.clamp(min=0),
        torch.where(valid_BK, labels_BX.gather(1, place_BK), 0),
        valid_BK,
    )


def to_files(boxes_BK4: Tensor, sizes_B2: Tensor, originals_B2: Tensor) -> Tensor:
    """Boxes in pixels of the files, right and bottom edges excluded, as COCO counts.

    The pixel that belongs to a box is added at the file's size, as upstream does; so a box at the
    edge of a picture that was enlarged goes beyond it by a part of a pixel.

    Args:
        boxes_BK4: of :class:`Detections`.
        sizes_B2: height and width of the resized images.
        originals_B2: those of the files.
    """
    scale_B2 = originals_B2.to(boxes_BK4.dtype) / sizes_B2.to(boxes_BK4.dtype)
    boxes_BK4 = boxes_BK4 * scale_B2.flip(1).repeat(1, 2)[:, None]
    return torch.cat([boxes_BK4[..., :2], boxes_BK4[..., 2:] + 1], dim=2)
