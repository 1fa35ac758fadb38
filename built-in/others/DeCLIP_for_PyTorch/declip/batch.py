"""What the loader hands to the model.

Shape letters: V views of an image, U token rows of a caption, B images, C channels (RGB), H W
pixels, T tokens of a row, M slots for masked tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo_common.damage import Damaged


class Masked(NamedTuple):
    """The masked tokens of a batch, in slots.

    Attributes:
        rows_M: int64, row of the batch's ``tokens_UBT.flatten(0, 1)``; 0 in an empty slot.
        columns_M: int64, position in the row; 0 in an empty slot.
        labels_M: int64, the token that stood there; -100 in an empty slot.
    """

    rows_M: Tensor
    columns_M: Tensor
    labels_M: Tensor


class Batch(NamedTuple):
    """Images with their captions' tokens.

    Attributes:
        images_VBCHW: uint8, RGB, 0 to 255.
        tokens_UBT: int64, from the start token to the end token, then zeros. The rows of a
            caption: itself; its augmented form, for DeCLIP; its masked form, for masked language
            modelling, if that is not the first row already (``loss.contrast_masked``).
        ends_UB: int64, where the end token stands.
        masked: what was masked, or None without masked language modelling.
        item_ids: the images' names, in the order of the batch.
        damaged: items that were met and left out while the batch was made.
    """

    images_VBCHW: Tensor
    tokens_UBT: Tensor
    ends_UB: Tensor
    masked: Masked | None
    item_ids: list[str]
    damaged: list[Damaged]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; does not wait if it is pinned."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=tensor.is_pinned())

        return self._replace(
            images_VBCHW=move(self.images_VBCHW),
            tokens_UBT=move(self.tokens_UBT),
            ends_UB=move(self.ends_UB),
            masked=Masked(*map(move, self.masked)) if self.masked else None,
        )
