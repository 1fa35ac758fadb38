"""Swin transformer, the image backbone.

Paper: Liu et al., https://arxiv.org/abs/2103.14030. Follows https://github.com/microsoft/GLIP
(MIT) at 9dda955, maskrcnn_benchmark/modeling/backbone/swint.py; parameter names are the same.
Difference: masks of shifted windows are minus infinity in place of -100, which changes no number,
since exp(-100) is below what float64 adds to 1.

Shape letters: B images, C channels, H W cells, N windows of all images, S cells of a window, A
heads, D channels of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glip.recompute import recomputed

PATCH = 4
"""Pixels of a cell of the first stage."""


class DropPath(nn.Module):
    """Stochastic depth: in training, a branch is left out of some images and scaled up in the rest.

    Paper: Huang et al., https://arxiv.org/abs/1603.09382. It draws in float32, the format in which
    all devices can.

    Args:
        probability: of an image to go without the branch.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """Any shape with images first; the input itself in evaluation."""
        if not self.training or self.probability == 0:
            return branch
        kept = 1 - self.probability
        drawn = torch.rand(len(branch), *[1] * (branch.dim() - 1), device=branch.device)
        return branch * ((drawn < kept) / kept).to(branch.dtype)


class WindowAttention(nn.Module):
    """Attention among the cells of a window, with a bias for each relative position.

    Args:
        width: C.
        window: cells of a window's side.
        heads: A, a divisor of C.
    """

    relative_position_index: Tensor

    def __init__(self, width: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        places = (2 * window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(places, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(window))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, cells_NSC: Tensor, apart_NSS: Tensor | None) -> Tensor:
        """(N, S, C) to (N, S, C).

        Args:
            cells_NSC: windows.
            apart_NSS: True for cells of an image's window that do not see each other, (windows of
                an image, S, S), or None.
        """
        windows, cells, _ = cells_NSC.shape
        joined = self.qkv(cells_NSC).view(windows, cells, 3, self.heads, -1)
        queries, keys, values = joined.permute(2, 0, 3, 1, 4)
        scores_NASS = (self.scale * queries) @ keys.transpose(-2, -1)
        bias_SSA = self.relative_position_bias_table.index_select(
            0, self.relative_position_index.flatten()
        ).view(cells, cells, self.heads)
        scores_NASS = scores_NASS + bias_SSA.permute(2, 0, 1)
        if apart_NSS is not None:
            per_image = scores_NASS.view(-1, len(apart_NSS), self.heads, cells, cells)
            scores_NASS = per_image.masked_fill(apart_NSS[:, None], float("-inf")).flatten(0, 1)
        mixed_NASD = scores_NASS.softmax(dim=-1) @ values
        result: Tensor = self.proj(mixed_NASD.transpose(1, 2).flatten(2))
        return result


class MLP(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, cells: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        result: Tensor = self.fc2(F.gelu(self.fc1(cells)))
        return result


class SwinBlock(nn.Module):
    """Attention in windows, at times shifted by half a window, and an MLP."""

    def __init__(
        self, width: int, heads: int, window: int, shift: int, ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, window, heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(ratio * width))

    def forward(self, cells_BHWC: Tensor, apart_NSS: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        cells_BHWC = cells_BHWC + self.drop_path(self._attend(self.norm1(cells_BHWC), apart_NSS))
        result: Tensor = cells_BHWC + self.drop_path(self.mlp(self.norm2(cells_BHWC)))
        return result

    def _attend(self, cells_BHWC: Tensor, apart_NSS: Tensor) -> Tensor:
        _, height, width, _ = cells_BHWC.shape
        window, shift = self.window, self.shift
        padded = F.pad(cells_BHWC, (0, 0, 0, -width % window, 0, -height % window))
        if shift:
            padded = padded.roll((-shift, -shift), dims=(1, 2))
        split = padded.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3)
        mixed_NSC = self.attn(split.flatten(0, 2).flatten(1, 2), apart_NSS if shift else None)
        joined = mixed_NSC.view_as(split).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if shift:
            joined = joined.roll((shift, shift), dims=(1, 2))
        return joined[:, :height, :width]


class PatchMerging(nn.Module):
    """Four neighbours to one cell of twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, cells_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H / 2, W / 2, 2 C), rounded up."""
        _, height, width, _ = cells_BHWC.shape
        padded = F.pad(cells_BHWC, (0, 0, 0, width % 2, 0, height % 2))
        neighbours = [padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        result: Tensor = self.reduction(self.norm(torch.cat(neighbours, dim=-1)))
        return result


class Stage(nn.Module):
    """Blocks of one resolution, and the way to the next."""

    def __init__(
        self,
        width: int,
        heads: int,
        window: int,
        ratio: float,
        drop_paths: Sequence[float],
        downsample: bool,
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads, window, (block % 2) * (window // 2), ratio, drop_path)
            for block, drop_path in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(width) if downsample else None

    def forward(self, cells_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's output, and the next one's input, for (B, H, W, C)."""
        apart_NSS = cells_apart(cells_BHWC, self.window)
        for block in self.blocks:
            cells_BHWC = recomputed(block, cells_BHWC, apart_NSS)
        return cells_BHWC, self.downsample(cells_BHWC) if self.downsample else cells_BHWC


class PatchEmbed(nn.Module):
    """Pixels to cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, H / 4, W / 4, C), rounded up."""
        _, _, height, width = images_BCHW.shape
        padded = F.pad(images_BCHW, (0, -width % PATCH, 0, -height % PATCH))
        cells_BHWC: Tensor = self.norm(self.proj(padded).permute(0, 2, 3, 1))
        return cells_BHWC


class SwinTransformer(nn.Module):
    """Swin; gives the maps of its last three stages.

    Args:
        width: C of the first stage; each next has twice.
        depths: blocks of the stages.
        heads: of the stages.
        window: cells of a window's side.
        ratio: hidden width of an MLP over C.
        drop_path: stochastic depth of the last block, from 0 for the first.
    """

    def __init__(
        self,
        *,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int,
        ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width)
        blocks = sum(depths)
        drops = [drop_path * block / max(1, blocks - 1) for block in range(blocks)]
        ends = list(itertools.accumulate(depths, initial=0))
        self.layers = nn.ModuleList(
            Stage(
                width << stage,
                heads[stage],
                window,
                ratio,
                drops[ends[stage] : ends[stage + 1]],
                downsample=stage < len(depths) - 1,
            )
            for stage in range(len(depths))
        )
        self.widths = [width << stage for stage in range(1, len(depths))]
        for stage, channels in enumerate(self.widths, start=1):
            self.add_module(f"norm{stage}", nn.LayerNorm(channels))
        self.apply(_init)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Maps (B, C, H, W) of all stages but the first; strides 8, 16, 32."""
        cells_BHWC = self.patch_embed(images_BCHW)
        maps = []
        for stage, layer in enumerate(self.layers):
            output_BHWC, cells_BHWC = layer(cells_BHWC)
            if stage:
                norm = self.get_submodule(f"norm{stage}")
                maps.append(norm(output_BHWC).permute(0, 3, 1, 2).contiguous())
        return maps


def relative_positions(window: int) -> Tensor:
    """(S, S) int64: the row of the bias table for each pair of cells."""
    place = torch.arange(window)
    row_S, column_S = place.repeat_interleave(window), place.repeat(window)
    down = row_S[:, None] - row_S + window - 1
    right = column_S[:, None] - column_S + window - 1
    return down * (2 * window - 1) + right


def cells_apart(cells_BHWC: Tensor, window: int) -> Tensor:
    """(windows of an image, S, S) bool: cells that a shift has brought into one window."""
    _, height, width, _ = cells_BHWC.shape
    shift = window // 2
    regions = []
    for length in (height, width):
        padded = length + -length % window
        place = torch.arange(padded, device=cells_BHWC.device)
        # Before, inside and behind the last window of the shifted order.
        regions.append((place >= padded - window).long() + (place >= padded - shift).long())
    region_HW = 3 * regions[0][:, None] + regions[1]
    split = region_HW.unflatten(0, (-1, window)).unflatten(2, (-1, window)).transpose(1, 2)
    region_NS = split.flatten(0, 1).flatten(1)
    return region_NS[:, None, :] != region_NS[:, :, None]


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
