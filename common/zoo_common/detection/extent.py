"""The part of a batch that counts, where it is padded beyond what its images need.

With static shapes a batch has one of a few sizes. A network computes the same numbers on it as on
the batch without that further padding, if the padding is kept at zero in front of every operator
that looks at neighbours: it then acts as the border of the image does.

Shape letters: B images, C channels, H W cells of a map.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extent:
    """The part of a padded batch that counts.

    Attributes:
        size_2: int64, height and width in pixels of the image.
    """

    size_2: Tensor
    _known: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, repr=False)

    def cells_2(self, stride: int) -> Tensor:
        """Height and width in cells of a map with this stride."""
        return (self.size_2 + stride - 1) // stride

    def inside(self, stride: int, height: int, width: int) -> Tensor:
        """Which cells of a map count, bool [height, width]; kept for the next map of its kind."""
        kind = (stride, height, width)
        if kind not in self._known:
            cells_2 = self.cells_2(stride)
            rows = torch.arange(height, device=cells_2.device) < cells_2[0]
            columns = torch.arange(width, device=cells_2.device) < cells_2[1]
            self._known[kind] = rows[:, None] & columns
        return self._known[kind]

    def clear(self, map_BCHW: Tensor, stride: int) -> Tensor:
        """Sets in place to zero what lies outside; finite numbers are expected there."""
        inside = self.inside(stride, *map_BCHW.shape[-2:])
        return map_BCHW.mul_(inside.to(map_BCHW.dtype))

    def extend(self, map_BCHW: Tensor, stride: int) -> Tensor:
        """Repeats the last row and column that count once, as RoIAlign does at a border."""
        last_2 = self.cells_2(stride) - 1
        for dim, last in ((2, last_2[0:1]), (3, last_2[1:2])):
            # Not index_copy, which on an NPU is an old operator for float32 alone.
            cells = torch.arange(map_BCHW.shape[dim], device=last.device)
            beyond = cells == (last + 1).clamp(max=map_BCHW.shape[dim] - 1)
            beyond = beyond[:, None] if dim == 2 else beyond
            map_BCHW = torch.where(beyond, map_BCHW.index_select(dim, last), map_BCHW)
        return map_BCHW
