"""Faster and Mask R-CNN: arXiv:1506.01497 and arXiv:1703.06870, on a feature pyramid.

Follows https://github.com/facebookresearch/detectron2 (commit be792b95, Apache-2.0,
modeling/meta_arch/rcnn.py); its state_dict loads strictly. The parts stand in backbone.py,
rpn.py and roi_heads.py, each with what differs.

Shape letters: B images, C channels, H W pixels, Q target slots, P proposals, D detections.
"""

import torch
from torch import Tensor, nn

from rcnn import targets
from rcnn.backbone import FeaturePyramid, ResNet
from rcnn.config import Config
from rcnn.roi_heads import Detections, RoiHeads
from rcnn.rpn import Proposals, RegionProposals
from zoo_common import device as devices
from zoo_common.detection.batching import DetectionBatch
from zoo_common.detection.extent import Extent

FLOAT32_INPUTS = ("boxes_BQ4", "edges_BQE4")
"""Fields of a batch that half precision must not touch: pixels need more than 8 bits."""


class GeneralizedRCNN(nn.Module):
    """Backbone, region proposals and heads.

    Args:
        config: sections ``model``, ``anchors``, ``rpn``, ``roi``, ``box_head``, ``mask_head``.
        num_classes: without the background.
        static_shapes: batches may be padded beyond what they need, and no shape may depend on
            what is in them.

    Attributes:
        choose: how anchors and proposals are sampled.
    """

    def __init__(self, config: Config, num_classes: int, *, static_shapes: bool) -> None:
        super().__init__()
        model = config.model
        self.static_shapes = static_shapes
        # In float32, as detectron2 keeps them, also where the network computes in float64.
        self.pixel_mean = torch.tensor(model.pixel_mean, device="cpu").tolist()
        self.pixel_std = torch.tensor(model.pixel_std, device="cpu").tolist()
        self.channels = (2, 1, 0) if model.channel_order == "BGR" else (0, 1, 2)
        self.choose: targets.Sampler = targets.sample_at_random
        bottom_up = ResNet(
            model.depth,
            stem_channels=model.stem_channels,
            res2_channels=model.res2_channels,
            groups=model.num_groups,
            width_per_group=model.width_per_group,
            norm=model.norm,
            stride_in_1x1=model.stride_in_1x1,
            freeze_at=model.freeze_at,
        )
        self.backbone = FeaturePyramid(bottom_up, model.fpn_channels, model.fpn_norm)
        self.proposal_generator = RegionProposals(model.fpn_channels, config.anchors, config.rpn)
        self.roi_heads = RoiHeads(
            model.fpn_channels,
            num_classes,
            config.roi,
            config.box_head,
            config.mask_head if model.masks else None,
            static_shapes=static_shapes,
        )

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor] | Detections:
        """Losses (float32 scalars by name) in training, detections in evaluation."""
        extent = Extent(batch.extent_2) if self.static_shapes else None
        maps = self.backbone(self.preprocess(batch), extent)
        if self.training:
            return self.losses(maps, batch, extent)
        proposals = self.proposal_generator(maps, batch.sizes_B2, extent)
        return self.roi_heads.detect(self.roi_maps(maps, extent), proposals, batch.sizes_B2)

    def losses(
        self, maps: list[Tensor], batch: DetectionBatch, extent: Extent | None
    ) -> dict[str, Tensor]:
        """The loss parts that detectron2 names so."""
        gt_boxes_BQ4, gt_valid_BQ = batch.boxes_BQ4, batch.valid_BQ
        # Before the dense pass of the head: under autocast that one's casts of the weights, made
        # without a gradient, would be taken for this one.
        losses = self.proposal_generator.losses(
            maps, gt_boxes_BQ4, gt_valid_BQ, extent, self.choose
        )
        proposals: Proposals = self.proposal_generator(maps, batch.sizes_B2, extent)
        regions = self.roi_heads.sample(
            proposals, gt_boxes_BQ4, batch.labels_BQ, gt_valid_BQ, self.choose
        )
        roi_maps = self.roi_maps(maps, extent)
        losses |= self.roi_heads.box_losses(roi_maps, regions)
        if self.roi_heads.mask_config is not None:
            assert batch.edges_BQE4 is not None
            assert batch.rings_BQE is not None
            losses |= self.roi_heads.mask_loss(
                roi_maps, regions, batch.edges_BQE4, batch.rings_BQE, batch.ring_slots
            )
        return losses

    def preprocess(self, batch: DetectionBatch) -> Tensor:
        """Normalised images in the network's channel order, zero where they are padded."""
        images_BCHW = batch.images_BCHW
        weight = self.backbone.bottom_up.stem.conv1.weight
        wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
        height, width = images_BCHW.shape[-2:]
        rows_BH = torch.arange(height, device=images_BCHW.device) < batch.sizes_B2[:, :1]
        columns_BW = torch.arange(width, device=images_BCHW.device) < batch.sizes_B2[:, 1:]
        real_BHW = rows_BH[:, :, None] & columns_BW[:, None, :]
        # By channel, with Python numbers: nothing is copied from the host at each step.
        planes = [
            torch.where(real_BHW, (images_BCHW[:, channel].to(wide) - mean) / std, 0.0)
            for channel, mean, std in zip(
                self.channels, self.pixel_mean, self.pixel_std, strict=True
            )
        ]
        return torch.stack(planes, dim=1).to(weight.dtype)

    @staticmethod
    def roi_maps(maps: list[Tensor], extent: Extent | None) -> list[Tensor]:
        """p2 to p5 as RoIAlign reads them: the images end where the padding begins."""
        if extent is None:
            return maps[:4]
        return [extent.extend(map_BCHW, 4 << index) for index, map_BCHW in enumerate(maps[:4])]


def to_device(model: GeneralizedRCNN, device: torch.device) -> GeneralizedRCNN:
    """The model on a device, in the order of memory that suits it."""
    return model.to(device).to(memory_format=devices.memory_format(device))


def build_model(
    config: Config, num_classes: int, *, static_shapes: bool = False
) -> GeneralizedRCNN:
    """The network of a config, with detectron2's initial weights drawn anew."""
    return GeneralizedRCNN(config, num_classes, static_shapes=static_shapes)
