"""Which grid cells draw which object, in tensors of fixed shape.

Wang et al., SOLOv2, arXiv:2003.10152, section 3.3.1, with the rules of
https://github.com/WXinlong/SOLO (commit 95f3732d, solov2_target_single): an object belongs to the
levels in whose range the geometric mean of its box's sides lies, and there to the cells around its
centre of mass, three by three at most. Where several objects claim a cell, its class is that of
the last one, but its kernel is compared with each one's mask: the pairs of cell and object are
what the mask loss counts.

This runs in the loader's processes: it is some arithmetic on a few boxes, which a CPU does in the
time that an NPU takes to start the first operator, and how many slots a batch needs is known
before it is on the device. A mask is stored once for its object at a quarter of the image's
size, not once for each of its cells.

Shape letters: B images, Q object slots, L levels, S grid cells of all levels, P pair slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from solov2.config import HeadConfig
from zoo_common.detection.batching import DetectionBatch, round_up

REACH = 1  # cells on each side of the centre's cell that an object can have


class Targets(NamedTuple):
    """What the cells of a batch should say.

    Attributes:
        labels_BS: int64, the class of each cell; -1 for the background.
        cells_BP: int64, the cell of each pair of a cell and an object; 0 in empty slots.
        objects_BP: int64, the slot of the object.
        valid_BP: bool, which slots hold a pair; those come first.
    """

    labels_BS: Tensor
    cells_BP: Tensor
    objects_BP: Tensor
    valid_BP: Tensor


def prepare(batch: DetectionBatch, head: HeadConfig, *, static: bool) -> Targets:
    """The targets of a batch, with as many slots as its fullest image needs.

    Args:
        batch: with mass centres.
        head: grids and ranges.
        static: take one of ``head.pair_slots``, or multiples of the largest.
    """
    assert batch.centers_BQ2 is not None
    found = assign(
        batch.boxes_BQ4, batch.centers_BQ2, batch.labels_BQ, batch.valid_BQ, batch.extent_2, head
    )
    slots = max(1, int(found.valid_BP.sum(dim=1).max()) if len(found.valid_BP) else 1)
    if static:
        fitting = [size for size in sorted(head.pair_slots) if size >= slots]
        slots = fitting[0] if fitting else round_up(slots, max(head.pair_slots))
    return compact(found, slots)


def assign(
    boxes_BQ4: Tensor,
    centers_BQ2: Tensor,
    labels_BQ: Tensor,
    valid_BQ: Tensor,
    extent_2: Tensor,
    head: HeadConfig,
) -> Targets:
    """All pairs that could be: nine for each object and level.

    Args:
        boxes_BQ4: float32, xyxy in pixels of the resized image.
        centers_BQ2: float32, x and y of the masks' centres of mass, in the same.
        labels_BQ: int64, classes.
        valid_BQ: bool, which slots hold an object.
        extent_2: int64, height and width in pixels that the grids cover.
        head: grids and ranges.

    Returns:
        Targets with P = 9 L Q slots, of which the valid ones do not come first.
    """
    sides_BQ2 = boxes_BQ4[..., 2:] - boxes_BQ4[..., :2]
    size_BQ = (sides_BQ2[..., 0] * sides_BQ2[..., 1]).sqrt()
    half_BQ2 = 0.5 * sides_BQ2 * head.sigma
    extent_xy = extent_2.flip(0)
    cells, valid, first_cell = [], [], 0
    for grid, (lowest, highest) in zip(head.grids, head.scale_ranges, strict=True):

        def cell_of(point_BQ2: Tensor, grid: int = grid) -> Tensor:
            # Upstream's arithmetic, in float32: a centre on a border belongs to the cell behind it.
            # (torch's "floor" goes by the remainder and would say the cell before it.)
            return torch.div(point_BQ2 / extent_xy, 1.0 / grid, rounding_mode="trunc").long()

        middle_BQ2 = cell_of(centers_BQ2)
        low_BQ2 = cell_of(centers_BQ2 - half_BQ2).clamp(min=0).maximum(middle_BQ2 - REACH)
        high_BQ2 = cell_of(centers_BQ2 + half_BQ2).clamp(max=grid - 1).minimum(middle_BQ2 + REACH)
        there_BQ = valid_BQ & (size_BQ >= lowest) & (size_BQ <= highest)
        steps = torch.arange(2 * REACH + 1, device=low_BQ2.device)
        columns_BQ3, rows_BQ3 = (low_BQ2[..., side, None] + steps for side in (0, 1))
        fits_BQ33 = (rows_BQ3 <= high_BQ2[..., 1, None])[..., :, None] & (
            columns_BQ3 <= high_BQ2[..., 0, None]
        )[..., None, :]
        cells_BQ33 = rows_BQ3[..., :, None] * grid + columns_BQ3[..., None, :] + first_cell
        valid_BQ33 = fits_BQ33 & there_BQ[..., None, None]
        cells.append(torch.where(valid_BQ33, cells_BQ33, 0).flatten(1))
        valid.append(valid_BQ33.flatten(1))
        first_cell += grid * grid
    cells_BP, valid_BP = torch.cat(cells, dim=1), torch.cat(valid, dim=1)
    slots = torch.arange(boxes_BQ4.shape[1], device=cells_BP.device)
    objects_BP = slots.repeat_interleave((2 * REACH + 1) ** 2).repeat(len(cells))
    objects_BP = objects_BP.expand(len(cells_BP), -1)
    # The last object that claims a cell; -1 where none does.
    last_BS = torch.full((len(cells_BP), first_cell), -1, device=cells_BP.device)
    claims_BP = torch.where(valid_BP, objects_BP, -1)
    last_BS = last_BS.scatter_reduce(1, cells_BP, claims_BP, "amax")
    labels_BS = torch.where(last_BS >= 0, labels_BQ.gather(1, last_BS.clamp(min=0)), -1)
    return Targets(labels_BS, cells_BP, objects_BP, valid_BP)


def compact(found: Targets, slots: int) -> Targets:
    """The same with the pairs in the first of ``slots`` slots, which must be enough."""
    order_BP = torch.argsort((~found.valid_BP).to(torch.uint8), dim=1, stable=True)[:, :slots]
    missing = slots - order_BP.shape[1]
    taken = []
    for values_BP in (found.cells_BP, found.objects_BP, found.valid_BP):
        taken_BP = values_BP.gather(1, order_BP)
        taken.append(torch.nn.functional.pad(taken_BP, (0, missing)))
    cells_BP, objects_BP, valid_BP = taken
    return Targets(found.labels_BS, cells_BP * valid_BP, objects_BP * valid_BP, valid_BP)
