"""The feature pyramid: three maps of the backbone to five levels of one width.

Paper: Lin et al., https://arxiv.org/abs/1612.03144. Follows https://github.com/microsoft/GLIP
(MIT) at 9dda955, maskrcnn_benchmark/modeling/backbone/fpn.py with ``top_blocks`` of RetinaNet on
the output of level 5, and layers/dropblock.py; parameter names are the same.

Shape letters: B images, H W cells of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TopBlocks(nn.Module):
    """Levels 6 and 7, from the output of level 5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            _init(layer)

    def forward(self, level5: Tensor) -> list[Tensor]:
        """Both maps."""
        level6 = self.p6(level5)
        return [level6, self.p7(F.relu(level6))]


class DropBlock(nn.Module):
    """Noise for training: squares of a map are 0 in all channels, the rest is scaled up.

    Paper: Ghiasi et al., https://arxiv.org/abs/1810.12890.

    Args:
        probability: of a cell to be dropped, about.
        block: side of a square in cells, odd.
    """

    def __init__(self, probability: float, block: int = 3) -> None:
        super().__init__()
        self.probability = probability
        self.block = block

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W); the input itself in evaluation."""
        if not self.training or self.probability == 0:
            return maps_BCHW
        batch, _, height, width = maps_BCHW.shape
        drawn = torch.rand(batch, 1, height, width, device=maps_BCHW.device)
        seeds = (drawn < self.probability / self.block**2).to(maps_BCHW.dtype)
        kept = 1 - F.max_pool2d(seeds, self.block, stride=1, padding=self.block // 2)
        return maps_BCHW * kept * (kept.numel() / kept.sum().clamp(min=1))


class FPN(nn.Module):
    """The pyramid.

    Args:
        widths: channels of the backbone's maps; stages are named 2, 3, 4.
        channels: of each level.
        drop_block: share of cells that training drops from the sums of levels 3 and 4, behind
            which the next finer level takes them whole.
    """

    def __init__(self, widths: Sequence[int], channels: int, drop_block: float = 0.0) -> None:
        super().__init__()
        self.drop_block = DropBlock(drop_block)
        self.names = [str(stage) for stage in range(2, 2 + len(widths))]
        for name, width in zip(self.names, widths, strict=True):
            self.add_module(f"fpn_inner{name}", nn.Conv2d(width, channels, 1))
            self.add_module(f"fpn_layer{name}", nn.Conv2d(channels, channels, 3, padding=1))
            _init(self.get_submodule(f"fpn_inner{name}"))
            _init(self.get_submodule(f"fpn_layer{name}"))
        self.top_blocks = TopBlocks(channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, channels, H, W), finest first, of strides 8 to 128."""
        levels: list[Tensor] = []
        above: Tensor | None = None
        for name, one in reversed(list(zip(self.names, maps, strict=True))):
            merged = self.get_submodule(f"fpn_inner{name}")(one)
            noisy = merged
            if above is not None:
                merged = merged + F.interpolate(above, size=merged.shape[-2:], mode="nearest")
                noisy = self.drop_block(merged)
            above = merged
            levels.insert(0, self.get_submodule(f"fpn_layer{name}")(noisy))
        return levels + self.top_blocks(levels[-1])


def _init(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
