"""What each proposal is: class, box and mask.

Girshick, Fast R-CNN, arXiv:1504.08083; He et al., Mask R-CNN, arXiv:1703.06870. Follows
detectron2 (modeling/roi_heads/{roi_heads,fast_rcnn,box_head,mask_head}.py); keys of weights are
its own. Every tensor has a fixed shape: empty slots are computed and masked out. The mask head is
the exception where that costs most and a number can be read for nothing, in host memory: it
leaves out slots that are empty in all images (:func:`used_slots`).

Shape letters: B images, P proposals, S sampled proposals, F foreground slots, Q target slots,
K classes, D detections, C channels, M side of a mask.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcnn import boxcoder
from rcnn.backbone import STRIDES, Conv, xavier_fill
from rcnn.config import BoxHeadConfig, MaskHeadConfig, RoiConfig
from rcnn.rpn import Proposals
from rcnn.targets import Sampler, match, sample, take, wide
from zoo_common.detection import boxes, masks, ops

FINEST_LEVEL, COARSEST_LEVEL = 2, 5
CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4
"""A proposal of 224 x 224 pixels is pooled from p4 (arXiv:1612.03144, equation 1)."""


class Regions(NamedTuple):
    """Sampled proposals with what they should be; foreground comes first.

    Attributes:
        boxes_BS4: xyxy in pixels.
        labels_BS: int64 class; K for background.
        gt_boxes_BS4: box of the matched object; of any slot where there is none.
        gt_index_BS: its target slot.
        positive_BS: foreground.
        valid_BS: slots that hold a proposal.
        logits_BS: objectness; that of an annotated box is close to certain.
    """

    boxes_BS4: Tensor
    labels_BS: Tensor
    gt_boxes_BS4: Tensor
    gt_index_BS: Tensor
    positive_BS: Tensor
    valid_BS: Tensor
    logits_BS: Tensor


class Detections(NamedTuple):
    """What was found, best first; in pixels of the network's input.

    Attributes:
        boxes_BD4: float32 xyxy.
        scores_BD: 0 to 1.
        labels_BD: int64 class.
        valid_BD: which slots hold a detection.
        masks_BDMM: probabilities inside of the box; None without a mask head.
    """

    boxes_BD4: Tensor
    scores_BD: Tensor
    labels_BD: Tensor
    valid_BD: Tensor
    masks_BDMM: Tensor | None = None


class PooledLinear(nn.Linear):
    """A fully connected layer on pooled features, [R, C, P, P] to [R, outputs].

    On a CPU in float32 it is computed as the convolution that it also is: oneDNN does it in two
    thirds of the time that MKL's matrix product takes on an AMD EPYC, forward and backward.
    """

    def forward(self, pooled_RCPP: Tensor) -> Tensor:
        """The same numbers either way, but for the order of sums."""
        if pooled_RCPP.device.type != "cpu" or pooled_RCPP.dtype != torch.float32:
            return super().forward(pooled_RCPP.flatten(1))
        kernel = self.weight.unflatten(1, pooled_RCPP.shape[1:])
        return F.conv2d(pooled_RCPP, kernel, self.bias).flatten(1)


class BoxHead(nn.Module):
    """Convolutions, then fully connected layers, on pooled features."""

    def __init__(self, channels: int, config: BoxHeadConfig) -> None:
        super().__init__()
        self.convs: list[str] = []
        for index in range(config.num_conv):
            self.convs.append(f"conv{index + 1}")
            self.add_module(self.convs[-1], Conv(channels, config.conv_dim, 3, config.norm))
            channels = config.conv_dim
        self.fcs: list[str] = []
        self.outputs = channels * config.pooler_resolution**2
        for index in range(config.num_fc):
            self.fcs.append(f"fc{index + 1}")
            kind = nn.Linear if index else PooledLinear
            layer = kind(self.outputs, config.fc_dim)
            xavier_fill(layer)
            self.add_module(self.fcs[-1], layer)
            self.outputs = config.fc_dim

    def forward(self, pooled_RCPP: Tensor) -> Tensor:
        """[R, C, P, P] to [R, outputs]."""
        for name in self.convs:
            pooled_RCPP = self.get_submodule(name)(pooled_RCPP).relu_()
        for name in self.fcs:
            pooled_RCPP = F.relu_(self.get_submodule(name)(pooled_RCPP))
        return pooled_RCPP.flatten(1)


class BoxPredictor(nn.Module):
    """Scores of the classes and the background, and deltas for each class or for all."""

    def __init__(self, inputs: int, num_classes: int, class_agnostic: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(inputs, num_classes + 1)
        self.bbox_pred = nn.Linear(inputs, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, K + 1] and deltas [R, 1 or K, 4]."""
        return self.cls_score(x_RC), self.bbox_pred(x_RC).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Convolutions, twice the resolution, and a mask for each class or for all."""

    def __init__(self, channels: int, num_classes: int, config: MaskHeadConfig) -> None:
        super().__init__()
        self.convs: list[str] = []
        for index in range(config.num_conv):
            self.convs.append(f"mask_fcn{index + 1}")
            self.add_module(self.convs[-1], Conv(channels, config.conv_dim, 3, config.norm))
            channels = config.conv_dim
        self.deconv = nn.ConvTranspose2d(channels, config.conv_dim, 2, 2)
        self.predictor = nn.Conv2d(config.conv_dim, 1 if config.class_agnostic else num_classes, 1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        assert self.deconv.bias is not None
        assert self.predictor.bias is not None
        nn.init.zeros_(self.deconv.bias)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, pooled_RCPP: Tensor, labels_R: Tensor) -> Tensor:
        """[R, C, P, P] to logits [R, 2P, 2P] of one class each; the other masks are not made."""
        hidden_RCMM = self.hidden(pooled_RCPP)
        assert self.predictor.bias is not None
        class_R = labels_R.clamp(max=len(self.predictor.bias) - 1)  # background is masked out
        weight_R1C = self.predictor.weight.flatten(1)[class_R].unsqueeze(1)
        logits_R1X = weight_R1C @ hidden_RCMM.flatten(2)
        logits_R1X = logits_R1X + self.predictor.bias[class_R, None, None]
        return logits_R1X.view(-1, *hidden_RCMM.shape[2:])

    def hidden(self, pooled_RCPP: Tensor) -> Tensor:
        """What the predictor, a 1x1 convolution, makes masks of: [R, conv_dim, 2P, 2P]."""
        for name in self.convs:
            pooled_RCPP = self.get_submodule(name)(pooled_RCPP).relu_()
        return F.relu_(self.deconv(pooled_RCPP))


class RoiHeads(nn.Module):
    """Samples proposals, pools their features, and runs the heads.

    Args:
        channels: of the pyramid's maps.
        num_classes: without the background.
        config: sampling and what a detection is.
        box_config: the box head.
        mask_config: the mask head; None for Faster R-CNN.
        static_shapes: keep the shapes of the mask head fixed where they need not be.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        config: RoiConfig,
        box_config: BoxHeadConfig,
        mask_config: MaskHeadConfig | None,
        *,
        static_shapes: bool,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.config = config
        self.box_config = box_config
        self.mask_config = mask_config
        self.static_shapes = static_shapes
        self.box_head = BoxHead(channels, box_config)
        self.box_predictor = BoxPredictor(
            self.box_head.outputs, num_classes, box_config.class_agnostic
        )
        if mask_config is not None:
            self.mask_head = MaskHead(channels, num_classes, mask_config)

    @torch.no_grad()
    def sample(
        self,
        proposals: Proposals,
        gt_boxes_BQ4: Tensor,
        gt_labels_BQ: Tensor,
        gt_valid_BQ: Tensor,
        choose: Sampler,
    ) -> Regions:
        """Chooses the proposals that are trained on; annotated boxes are proposals too."""
        config = self.config
        boxes_BP4, logits_BP, valid_BP = proposals
        if config.append_gt:
            # The objectness that detectron2 gives them: sigmoid gives 1 - 1e-10.
            sure_BQ = torch.full_like(gt_boxes_BQ4[..., 0], math.log((1 - 1e-10) / 1e-10))
            boxes_BP4 = torch.cat([boxes_BP4, gt_boxes_BQ4.to(boxes_BP4.dtype)], dim=1)
            valid_BP = torch.cat([valid_BP, gt_valid_BQ], dim=1)
            logits_BP = torch.cat([logits_BP, sure_BQ.to(logits_BP.dtype)], dim=1)
        matches = match(gt_boxes_BQ4, gt_valid_BQ, boxes_BP4)
        positive_BP = matches.iou_BN >= config.iou
        chosen = sample(
            positive_BP & valid_BP,
            ~positive_BP & valid_BP,
            slots=config.samples,
            positive_slots=int(config.samples * config.positive_fraction),
            choose=choose,
        )
        gt_index_BS = matches.index_BN.gather(1, chosen.index_BS)
        labels_BS = gt_labels_BQ.gather(1, gt_index_BS)
        return Regions(
            boxes_BS4=take(boxes_BP4, chosen.index_BS),
            labels_BS=torch.where(chosen.positive_BS, labels_BS, self.num_classes),
            gt_boxes_BS4=take(gt_boxes_BQ4, gt_index_BS),
            gt_index_BS=gt_index_BS,
            positive_BS=chosen.positive_BS,
            valid_BS=chosen.valid_BS,
            logits_BS=logits_BP.gather(1, chosen.index_BS),
        )

    def box_losses(self, maps: Sequence[Tensor], regions: Regions) -> dict[str, Tensor]:
        """``loss_cls`` and ``loss_box_reg``, means over all sampled proposals; scalars."""
        logits_RK, deltas_RK4 = self.predict_boxes(maps, regions.boxes_BS4)
        logits_RK, deltas_RK4 = wide(logits_RK), wide(deltas_RK4)
        labels_R = regions.labels_BS.flatten()
        valid_R, positive_R = regions.valid_BS.flatten(), regions.positive_BS.flatten()
        count = valid_R.sum().clamp(min=1)

        cls_R = F.cross_entropy(logits_RK, labels_R, reduction="none")
        class_R = labels_R.clamp(max=deltas_RK4.shape[1] - 1)  # background is masked out
        deltas_R4 = deltas_RK4.gather(1, class_R[:, None, None].expand(-1, 1, 4)).squeeze(1)
        targets_BS4 = boxcoder.encode(
            regions.boxes_BS4, regions.gt_boxes_BS4, self.box_config.delta_weights
        )
        beta = self.box_config.smooth_l1_beta
        box_R = boxcoder.box_loss(deltas_R4, targets_BS4.flatten(0, 1).to(deltas_R4.dtype), beta)
        return {
            "loss_cls": (cls_R * valid_R).sum() / count,
            "loss_box_reg": (box_R * positive_R).sum() / count,
        }

    def mask_loss(
        self,
        maps: Sequence[Tensor],
        regions: Regions,
        edges_BQE4: Tensor,
        rings_BQE: Tensor,
        ring_slots: int,
    ) -> dict[str, Tensor]:
        """``loss_mask``: mean binary cross-entropy over the pixels of foreground proposals.

        Args:
            maps: p2 to p5.
            regions: the sampled proposals.
            edges_BQE4: outlines of the objects, see zoo_common.detection.masks.
            rings_BQE: the ring of each edge, -1 in empty slots.
            ring_slots: most rings of an object.
        """
        assert self.mask_config is not None
        slots = int(self.config.samples * self.config.positive_fraction)
        slots = used_slots(regions.positive_BS[:, :slots], self.static_shapes)
        boxes_BF4, positive_BF = regions.boxes_BS4[:, :slots], regions.positive_BS[:, :slots]
        logits_RMM = wide(self.predict_masks(maps, boxes_BF4, regions.labels_BS[:, :slots]))
        with torch.no_grad():
            targets_RMM = self.mask_targets(
                boxes_BF4, regions.gt_index_BS[:, :slots], edges_BQE4, rings_BQE, ring_slots
            )
        loss_RMM = F.binary_cross_entropy_with_logits(
            logits_RMM, targets_RMM.to(logits_RMM.dtype), reduction="none"
        )
        positive_R = positive_BF.flatten()
        pixels = positive_R.sum().clamp(min=1) * targets_RMM[0].numel()
        return {"loss_mask": (loss_RMM * positive_R[:, None, None]).sum() / pixels}

    def mask_targets(
        self,
        boxes_BF4: Tensor,
        gt_index_BF: Tensor,
        edges_BQE4: Tensor,
        rings_BQE: Tensor,
        ring_slots: int,
    ) -> Tensor:
        """The objects' masks inside of proposals, bool [B * F, M, M]."""
        assert self.mask_config is not None
        return masks.rasterize_in_boxes(
            take(edges_BQE4, gt_index_BF).flatten(0, 1),
            take(rings_BQE, gt_index_BF).flatten(0, 1),
            boxes_BF4.flatten(0, 1),
            2 * self.mask_config.pooler_resolution,
            ring_slots=ring_slots,
        )

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], proposals: Proposals, sizes_B2: Tensor) -> Detections:
        """The best boxes after NMS within each class, with their masks."""
        found = self._detect_boxes(maps, proposals, sizes_B2)
        if self.mask_config is None:
            return found
        slots = used_slots(found.valid_BD, self.static_shapes)
        logits_RMM = self.predict_masks(
            maps, found.boxes_BD4[:, :slots], found.labels_BD[:, :slots]
        )
        masks_BDMM = logits_RMM.sigmoid().unflatten(0, (-1, slots))
        lacking = found.valid_BD.shape[1] - slots
        return found._replace(masks_BDMM=F.pad(masks_BDMM, (0, 0, 0, 0, 0, lacking)))

    def _detect_boxes(
        self, maps: Sequence[Tensor], proposals: Proposals, sizes_B2: Tensor
    ) -> Detections:
        config = self.config
        batch, count = proposals.valid_BP.shape
        logits_RK, deltas_RK4 = self.predict_boxes(maps, proposals.boxes_BP4)
        scores_RK = wide(logits_RK).softmax(dim=1)[:, :-1]
        boxes_RK4 = boxcoder.decode(
            proposals.boxes_BP4.flatten(0, 1)[:, None], deltas_RK4, self.box_config.delta_weights
        )
        boxes_BPK4 = boxes.clip(boxes_RK4.unflatten(0, (batch, count)), sizes_B2[:, None])
        finite_BP = boxes_BPK4.isfinite().flatten(2).all(dim=2)
        boxes_BKP4 = boxes_BPK4.transpose(1, 2).expand(-1, self.num_classes, -1, -1)
        scores_BKP = scores_RK.unflatten(0, (batch, count)).transpose(1, 2)
        valid_BKP = (scores_BKP > config.score_thresh) & scores_BKP.isfinite()
        valid_BKP = valid_BKP & (proposals.valid_BP & finite_BP)[:, None]
        keep_SP = ops.nms(
            boxes_BKP4.flatten(0, 1),
            scores_BKP.flatten(0, 1),
            config.nms_thresh,
            valid_BKP.flatten(0, 1),
        )
        keep_BX = keep_SP.reshape(batch, -1)
        scores_BX = torch.where(keep_BX, scores_BKP.flatten(1), -1.0)
        scores_BD, index_BD = scores_BX.topk(min(config.detections, scores_BX.shape[1]), dim=1)
        valid_BD = scores_BD >= 0
        boxes_BD4 = take(boxes_BKP4.flatten(1, 2), index_BD)
        return Detections(
            boxes_BD4=torch.where(valid_BD[..., None], boxes_BD4, 0.0),
            scores_BD=scores_BD.clamp(min=0),
            labels_BD=index_BD.div(count, rounding_mode="floor"),
            valid_BD=valid_BD,
        )

    def predict_boxes(self, maps: Sequence[Tensor], boxes_BR4: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B * R, K + 1] and deltas [B * R, 1 or K, 4] of regions."""
        pooled_RCPP = self.pool(maps, boxes_BR4, self.box_config)
        predicted: tuple[Tensor, Tensor] = self.box_predictor(self.box_head(pooled_RCPP))
        return predicted

    def predict_masks(self, maps: Sequence[Tensor], boxes_BR4: Tensor, labels_BR: Tensor) -> Tensor:
        """Mask logits [B * R, M, M] of regions, each of its class."""
        assert self.mask_config is not None
        pooled_RCPP = self.pool(maps, boxes_BR4, self.mask_config)
        logits_RMM: Tensor = self.mask_head(pooled_RCPP, labels_BR.flatten())
        return logits_RMM

    @staticmethod
    def pool(
        maps: Sequence[Tensor], boxes_BR4: Tensor, config: BoxHeadConfig | MaskHeadConfig
    ) -> Tensor:
        """Features [B * R, C, P, P] of regions, each from the level of its size."""
        pooled_BRCPP = ops.roi_align(
            list(maps),
            list(STRIDES[: len(maps)]),
            boxes_BR4,
            level_of(boxes_BR4),
            config.pooler_resolution,
            config.sampling_ratio,
        )
        return pooled_BRCPP.flatten(0, 1).to(maps[0].dtype)


def level_of(boxes_XN4: Tensor) -> Tensor:
    """Index of the map that a box is pooled from, 0 for p2."""
    side_XN = boxes.area(boxes_XN4).sqrt()
    level_XN = (CANONICAL_LEVEL + (side_XN / CANONICAL_SIZE + 1e-8).log2()).floor()
    return (level_XN.clamp(FINEST_LEVEL, COARSEST_LEVEL) - FINEST_LEVEL).long()


def used_slots(valid_BS: Tensor, static_shapes: bool) -> int:
    """How many leading slots to compute: all, or where they can be counted for nothing, fewer.

    Reading an accelerator's memory would make each step wait for it, and each new count would be
    a new shape. Host memory is read without a wait. At least one slot, so that every parameter
    has a gradient.
    """
    if static_shapes or valid_BS.device.type != "cpu":
        return valid_BS.shape[1]
    return max(1, int(valid_BS.numpy().sum(axis=1).max()))
