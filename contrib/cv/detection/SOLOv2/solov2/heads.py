"""What SOLOv2 predicts from its feature pyramid: classes and kernels of grid cells, mask features.

Wang et al., SOLOv2, arXiv:2003.10152, as in https://github.com/WXinlong/SOLO (commit 95f3732d,
mmdet/models/{anchor_heads/solov2_head,mask_heads/mask_feat_head}.py), whose names of modules it
has. An object belongs to the grid cell of its centre; the cell's kernel, a 1x1 convolution of the
mask features, draws the object's mask.

Shape letters: B images, C channels, H W cells of a map, K classes, S grid cells of all levels one
after the other, each level row by row, E mask features.
"""

import math

import torch
from torch import Tensor, nn

from solov2.backbone import STRIDES
from solov2.config import HeadConfig
from solov2.layers import ConvBlock, convolve_all, coordinates, inside_of, resize
from zoo_common.detection.extent import Extent


class GridHead(nn.Module):
    """Class scores and mask kernels of every cell of five grids.

    Each level's features are resized to its grid, whatever the size of the image; the kernel's
    branch also sees where its cell lies.
    """

    def __init__(self, inputs: int, num_classes: int, config: HeadConfig) -> None:
        super().__init__()
        self.grids = list(config.grids)
        self.cate_convs, self.kernel_convs = nn.ModuleList(), nn.ModuleList()
        for index in range(config.stacked_convs):
            last = index == config.stacked_convs - 1
            deformable = config.deformable if last or not config.deformable_last_only else ""
            for convs, more in ((self.kernel_convs, 2), (self.cate_convs, 0)):
                channels = config.channels if index else inputs + more
                convs.append(ConvBlock(channels, config.channels, 3, deformable))
        self.solo_cate = nn.Conv2d(config.channels, num_classes, 3, padding=1)
        self.solo_kernel = nn.Conv2d(config.channels, config.kernel_channels, 3, padding=1)
        for layer, bias in ((self.solo_cate, -math.log(99)), (self.solo_kernel, 0.0)):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, bias)  # a cell is foreground with probability 0.01

    def forward(
        self, maps: list[Tensor], extent: Extent | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits [B, K, grid, grid] and kernels [B, E, grid, grid] of each level."""
        logits, towers = self.classes(maps, extent)
        return logits, convolve_all(self.solo_kernel, towers)

    def classes(
        self, maps: list[Tensor], extent: Extent | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits of each level, and the maps [B, C, grid, grid] that give its kernels."""
        kernels = self.grid_features(maps, extent)
        classes = [features_BCGG[:, :-2] for features_BCGG in kernels]
        for block in self.kernel_convs:
            kernels = block(kernels)
        for block in self.cate_convs:
            classes = block(classes)
        return convolve_all(self.solo_cate, classes), kernels

    def grid_features(self, maps: list[Tensor], extent: Extent | None) -> list[Tensor]:
        """Each level's features and coordinates, x before y, resized to its grid."""
        p2, p3, p4, p5, p6 = maps
        half = (p2.shape[-2] // 2, p2.shape[-1] // 2)
        cells = [None if extent is None else extent.cells_2(stride) for stride in STRIDES]
        levels = [
            (resize(p2, half, cells[0], cells[1]), cells[1]),
            (p3, cells[1]),
            (p4, cells[2]),
            (p5, cells[3]),
            (resize(p6, (p5.shape[-2], p5.shape[-1]), cells[4], cells[3]), cells[3]),
        ]
        return [
            torch.cat(
                [
                    resize(map_BCHW, (grid, grid), cells_2),
                    resize(coordinates(map_BCHW, cells_2), (grid, grid), cells_2),
                ],
                dim=1,
            )
            for grid, (map_BCHW, cells_2) in zip(self.grids, levels, strict=True)
        ]


class MaskFeatures(nn.Module):
    """Four levels of the pyramid, brought to a quarter of the image's size and summed."""

    def __init__(self, inputs: int, config: HeadConfig) -> None:
        super().__init__()
        channels, deformable = config.mask_channels, config.mask_deformable
        self.convs_all_levels = nn.ModuleList()
        for level in range(4):
            convs = nn.Module()
            for index in range(max(1, level)):
                first = inputs + 2 * (level == 3)  # the coarsest level also sees coordinates
                convs.add_module(
                    f"conv{index}",
                    ConvBlock(channels if index else first, channels, 3, deformable),
                )
            self.convs_all_levels.append(convs)
        self.conv_pred = nn.Sequential(ConvBlock(channels, config.kernel_channels, 1, deformable))

    def forward(self, maps: list[Tensor], extent: Extent | None) -> Tensor:
        """Mask features [B, E, H / 4, W / 4], zero beyond the extent."""
        finest = self.level(0, maps[0], extent)
        # Interpolation is linear: the coarser levels are summed before their last step to a
        # quarter of the image's size, not behind it.
        coarser = [self.level(level, maps[level], extent) for level in range(1, 4)]
        total_BCHW = coarser[0] + coarser[1] + coarser[2]
        total_BCHW = finest + double(total_BCHW, extent, STRIDES[0])
        inside_HW = inside_of(extent, STRIDES[0], total_BCHW)
        features_BEHW: Tensor
        (features_BEHW,) = self.conv_pred[0]([total_BCHW], inside_HW)
        return features_BEHW

    def level(self, level: int, map_BCHW: Tensor, extent: Extent | None) -> Tensor:
        """A level's map [B, C, H', W'], at an eighth of the image's size, the finest at a quarter.

        The finest has one convolution, and one of stride 4 * 2^n has n, with the resolution doubled
        between two of them.
        """
        stride = STRIDES[level]
        if level == 3:
            cells_2 = None if extent is None else extent.cells_2(stride)
            map_BCHW = torch.cat([map_BCHW, coordinates(map_BCHW, cells_2)], dim=1)
            if extent is not None:
                map_BCHW = extent.clear(map_BCHW, stride)
        for index, block in enumerate(self.convs_all_levels[level].children()):
            if index:
                stride //= 2
                map_BCHW = double(map_BCHW, extent, stride)
            (map_BCHW,) = block([map_BCHW], inside_of(extent, stride, map_BCHW))
        return map_BCHW


def double(map_BCHW: Tensor, extent: Extent | None, stride: int) -> Tensor:
    """Twice the resolution, bilinearly; ``stride`` is that of the result."""
    height, width = map_BCHW.shape[-2:]
    if extent is None:
        return resize(map_BCHW, (2 * height, 2 * width))
    # The last row and column that count are the image's border: nothing is mixed in from beyond.
    larger_BCHW = resize(extent.extend(map_BCHW, 2 * stride), (2 * height, 2 * width))
    return extent.clear(larger_BCHW, stride)
