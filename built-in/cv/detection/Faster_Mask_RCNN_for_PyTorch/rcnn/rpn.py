"""The region proposal network: Ren et al., Faster R-CNN, arXiv:1506.01497, on a pyramid.

Follows detectron2 (modeling/{anchor_generator,proposal_generator/rpn}.py); keys of weights are
its own. What differs, with the same numbers: the dense pass over all anchors makes proposals,
which carry no gradient, and so runs without one; the losses need the head at the sampled anchors
only, and compute it there a second time, from the 3x3 cells around each. That saves the dense
backward pass through the head, and the memory of its activations.
One thing differs on purpose: an object that no anchor overlaps makes no anchor foreground
(detectron2 then takes all that miss it).

Shape letters: B images, N anchors of all levels, n anchors of a level, A anchors of a cell,
S sampled anchors, P proposals, Q target slots, K anchors of a level before NMS.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcnn import boxcoder
from rcnn.backbone import STRIDES
from rcnn.config import AnchorConfig, RpnConfig
from rcnn.targets import Matches, Sampler, match, sample, take, wide
from zoo_common.detection import boxes, ops
from zoo_common.detection.extent import Extent


class Proposals(NamedTuple):
    """Regions that may hold an object, best first.

    Attributes:
        boxes_BP4: float32 xyxy in pixels, clipped to the image.
        logits_BP: objectness.
        valid_BP: which slots hold a proposal.
    """

    boxes_BP4: Tensor
    logits_BP: Tensor
    valid_BP: Tensor


class Head(nn.Module):
    """Objectness and deltas of the anchors at each cell."""

    def __init__(self, channels: int, anchors: int) -> None:
        super().__init__()
        self.anchors = anchors
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in (self.conv, self.objectness_logits, self.anchor_deltas):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, map_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, n] and deltas [B, n, 4] of a level; anchors by row, column, then shape."""
        hidden_BCHW = F.relu_(self.conv(map_BCHW))
        logits_BAHW = self.objectness_logits(hidden_BCHW)
        deltas_BDHW = self.anchor_deltas(hidden_BCHW)
        logits_Bn = logits_BAHW.permute(0, 2, 3, 1).flatten(1)
        deltas_Bn4 = deltas_BDHW.permute(0, 2, 3, 1).reshape(len(map_BCHW), -1, 4)
        return logits_Bn, deltas_Bn4

    def at(self, maps: Sequence[Tensor], index_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S] and deltas [B, S, 4] of some anchors, counted over all levels."""
        patches_BSX = self._patches(maps, index_BS)
        # The weights of a 3x3 convolution, for inputs in the order channel, row, column.
        hidden_BSC = F.relu_(F.linear(patches_BSX, self.conv.weight.flatten(1), self.conv.bias))
        logits_BSA = self._project(self.objectness_logits, hidden_BSC)
        deltas_BSA4 = self._project(self.anchor_deltas, hidden_BSC).unflatten(2, (-1, 4))
        shape_BS1 = (index_BS % self.anchors)[..., None]
        logits_BS = logits_BSA.gather(2, shape_BS1).squeeze(2)
        shape_BS14 = shape_BS1[..., None].expand(-1, -1, -1, 4)
        return logits_BS, deltas_BSA4.gather(2, shape_BS14).squeeze(2)

    @staticmethod
    def _project(layer: nn.Conv2d, hidden_BSC: Tensor) -> Tensor:
        return F.linear(hidden_BSC, layer.weight.flatten(1), layer.bias)

    def _patches(self, maps: Sequence[Tensor], index_BS: Tensor) -> Tensor:
        """The 3x3 cells around anchors, [B, S, C * 9]; zero beyond the border of a map."""
        around = torch.arange(-1, 2, device=index_BS.device)
        patches_BXC: Tensor | None = None
        first = 0
        for map_BCHW in maps:
            batch, channels, height, width = map_BCHW.shape
            cell_BS = (index_BS - first).div(self.anchors, rounding_mode="floor")
            row_BS3 = cell_BS.div(width, rounding_mode="floor")[..., None] + around
            column_BS3 = (cell_BS % width)[..., None] + around
            on_level_BS = (cell_BS >= 0) & (cell_BS < height * width)
            real_BS33 = ((row_BS3 >= 0) & (row_BS3 < height))[..., :, None] & (
                (column_BS3 >= 0) & (column_BS3 < width)
            )[..., None, :]
            real_BS33 = real_BS33 & on_level_BS[..., None, None]
            place_BS33 = row_BS3[..., :, None] * width + column_BS3[..., None, :]
            place_BX1 = place_BS33.clamp(0, height * width - 1).flatten(1)[..., None]
            rows_BNC = map_BCHW.flatten(2).transpose(1, 2)
            cells_BXC = rows_BNC.gather(1, place_BX1.expand(-1, -1, channels))
            cells_BXC = torch.where(real_BS33.flatten(1)[..., None], cells_BXC, 0.0)
            patches_BXC = cells_BXC if patches_BXC is None else patches_BXC + cells_BXC
            first += height * width * self.anchors
        assert patches_BXC is not None
        return patches_BXC.view(batch, -1, 9, channels).transpose(2, 3).flatten(2)


class RegionProposals(nn.Module):
    """Anchors, head, losses and proposals.

    Args:
        channels: of the pyramid's maps.
        anchors: their sizes and shapes.
        config: thresholds and counts.
    """

    def __init__(self, channels: int, anchors: AnchorConfig, config: RpnConfig) -> None:
        super().__init__()
        self.config = config
        self.offset = anchors.offset
        self.shapes = [cell_shapes(sizes, anchors.aspect_ratios) for sizes in anchors.sizes]
        self.rpn_head = Head(channels, len(self.shapes[0]))

    def losses(
        self,
        maps: Sequence[Tensor],
        gt_boxes_BQ4: Tensor,
        gt_valid_BQ: Tensor,
        extent: Extent | None,
        choose: Sampler,
    ) -> dict[str, Tensor]:
        """``loss_rpn_cls`` and ``loss_rpn_loc``, float32 scalars, from sampled anchors.

        Args:
            maps: p2 to p6.
            gt_boxes_BQ4: objects, xyxy in pixels.
            gt_valid_BQ: which slots hold one.
            extent: what of the padded batch counts; None for all of it.
            choose: how anchors are sampled.
        """
        config = self.config
        anchors_1N4, real_1N = self.anchors(maps, extent)
        positive_BN, negative_BN, matches = self.label(
            anchors_1N4, real_1N, gt_boxes_BQ4, gt_valid_BQ
        )
        chosen = sample(
            positive_BN,
            negative_BN,
            slots=config.samples,
            positive_slots=int(config.samples * config.positive_fraction),
            choose=choose,
        )
        logits_BS, deltas_BS4 = self.rpn_head.at(maps, chosen.index_BS)
        logits_BS, deltas_BS4 = wide(logits_BS), wide(deltas_BS4)

        anchors_BS4 = take(anchors_1N4, chosen.index_BS)
        gt_BS4 = take(gt_boxes_BQ4, matches.index_BN.gather(1, chosen.index_BS))
        targets_BS4 = boxcoder.encode(anchors_BS4, gt_BS4, config.delta_weights).to(
            deltas_BS4.dtype
        )
        loc_BS = boxcoder.box_loss(deltas_BS4, targets_BS4, config.smooth_l1_beta)
        cls_BS = F.binary_cross_entropy_with_logits(
            logits_BS, chosen.positive_BS.to(logits_BS.dtype), reduction="none"
        )
        share = 1 / (config.samples * len(logits_BS))
        return {
            "loss_rpn_cls": (cls_BS * chosen.valid_BS).sum() * (share * config.cls_weight),
            "loss_rpn_loc": (loc_BS * chosen.positive_BS).sum() * (share * config.box_weight),
        }

    @torch.no_grad()
    def label(
        self,
        anchors_1N4: Tensor,
        real_1N: Tensor,
        gt_boxes_BQ4: Tensor,
        gt_valid_BQ: Tensor,
    ) -> tuple[Tensor, Tensor, Matches]:
        """Foreground and background anchors, bool [B, N], and their objects."""
        # One image at a time: the matrix of IoUs has Q x N numbers for each.
        single = [
            match(gt_boxes_14, valid_1, anchors_1N4)
            for gt_boxes_14, valid_1 in zip(
                gt_boxes_BQ4.split(1), gt_valid_BQ.split(1), strict=True
            )
        ]
        matches = Matches(*(torch.cat(parts) for parts in zip(*single, strict=True)))
        positive_BN = (matches.iou_BN >= self.config.iou_high) | matches.best_BN
        negative_BN = (matches.iou_BN < self.config.iou_low) & ~positive_BN
        return positive_BN & real_1N, negative_BN & real_1N, matches

    @torch.no_grad()
    def forward(
        self, maps: Sequence[Tensor], sizes_B2: Tensor, extent: Extent | None = None
    ) -> Proposals:
        """The best proposals after NMS within each level.

        Args:
            maps: p2 to p6.
            sizes_B2: height and width of each image in pixels.
            extent: what of the padded batch counts; None for all of it.
        """
        config = self.config
        before = config.pre_nms_train if self.training else config.pre_nms_test
        after = config.post_nms_train if self.training else config.post_nms_test
        boxes_BLK4, logits_BLK = self._best_of_levels(maps, before, extent)
        boxes_BLK4 = boxes.clip(boxes_BLK4, sizes_B2[:, None])
        sides_BLK2 = boxes_BLK4[..., 2:] - boxes_BLK4[..., :2]
        valid_BLK = (sides_BLK2 > config.min_size).all(dim=3) & logits_BLK.isfinite()
        valid_BLK &= boxes_BLK4.isfinite().all(dim=3)
        keep_SK = ops.nms(
            boxes_BLK4.flatten(0, 1),
            logits_BLK.flatten(0, 1),
            config.nms_thresh,
            valid_BLK.flatten(0, 1),
        )
        keep_BX = keep_SK.reshape(len(boxes_BLK4), -1)
        logits_BX = torch.where(keep_BX, logits_BLK.flatten(1), -math.inf)
        logits_BP, index_BP = logits_BX.topk(min(after, logits_BX.shape[1]), dim=1)
        boxes_BP4 = take(boxes_BLK4.flatten(1, 2), index_BP)
        valid_BP = keep_BX.gather(1, index_BP)
        # What a slot without a proposal holds goes through RoIAlign: it must be a finite box.
        boxes_BP4 = torch.where(valid_BP[..., None], boxes_BP4, 0.0)
        return Proposals(boxes_BP4, logits_BP, valid_BP)

    def _best_of_levels(
        self, maps: Sequence[Tensor], count: int, extent: Extent | None
    ) -> tuple[Tensor, Tensor]:
        """The ``count`` best boxes of each level: float32 [B, L, K, 4] and logits [B, L, K]."""
        boxes_of, logits_of = [], []
        for level, map_BCHW in enumerate(maps):
            logits_Bn, deltas_Bn4 = self.rpn_head(map_BCHW)
            anchors_1n4, real_1n = self.anchors_of(level, map_BCHW, extent)
            if real_1n is not None:
                logits_Bn = torch.where(real_1n, logits_Bn, -math.inf)
            best_BK, index_BK = logits_Bn.topk(min(count, logits_Bn.shape[1]), dim=1)
            boxes_BK4 = boxcoder.decode(
                take(anchors_1n4, index_BK), take(deltas_Bn4, index_BK), self.config.delta_weights
            )
            lacking = count - best_BK.shape[1]
            boxes_of.append(F.pad(boxes_BK4, (0, 0, 0, lacking)))
            logits_of.append(F.pad(best_BK, (0, lacking), value=-math.inf))
        return torch.stack(boxes_of, dim=1), torch.stack(logits_of, dim=1)

    def anchors(self, maps: Sequence[Tensor], extent: Extent | None) -> tuple[Tensor, Tensor]:
        """All anchors, xyxy [1, N, 4], and which of them count, bool [1, N]."""
        anchors, real = [], []
        for level, map_BCHW in enumerate(maps):
            anchors_1n4, real_1n = self.anchors_of(level, map_BCHW, extent)
            anchors.append(anchors_1n4)
            if real_1n is None:
                real_1n = torch.ones(
                    anchors_1n4.shape[:2], dtype=torch.bool, device=anchors_1n4.device
                )
            real.append(real_1n)
        return torch.cat(anchors, dim=1), torch.cat(real, dim=1)

    def anchors_of(
        self, level: int, map_BCHW: Tensor, extent: Extent | None
    ) -> tuple[Tensor, Tensor | None]:
        """The anchors of a level and which count; None for all."""
        height, width = map_BCHW.shape[-2:]
        stride, device = STRIDES[level], map_BCHW.device
        rows_H = (torch.arange(height, device=device) + self.offset) * stride
        columns_W = (torch.arange(width, device=device) + self.offset) * stride
        shift_HW2 = torch.stack(
            [columns_W.expand(height, -1), rows_H[:, None].expand(-1, width)], dim=2
        )
        # From numbers, so that nothing is copied from the host to the device at each step.
        shapes_A4 = torch.stack(
            [torch.stack([shift_HW2.new_full((), side) for side in s]) for s in self.shapes[level]]
        )
        anchors_HWA4 = shift_HW2.repeat(1, 1, 2)[:, :, None] + shapes_A4
        anchors_1n4 = anchors_HWA4.view(1, -1, 4).float()
        if extent is None:
            return anchors_1n4, None
        inside_HW = extent.inside(stride, height, width)
        inside_HWA = inside_HW[..., None].expand(-1, -1, len(self.shapes[level]))
        return anchors_1n4, inside_HWA.reshape(1, -1)


def cell_shapes(
    sizes: Sequence[float], aspect_ratios: Sequence[float]
) -> list[tuple[float, float, float, float]]:
    """Anchors around (0, 0), xyxy: each size is the root of an area, each ratio height / width."""
    shapes = []
    for size in sizes:
        for ratio in aspect_ratios:
            half_width = math.sqrt(size * size / ratio) / 2
            half_height = ratio * half_width
            shapes.append((-half_width, -half_height, half_width, half_height))
    return shapes
