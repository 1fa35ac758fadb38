"""SOLOv2: instance segmentation by grid cells, Wang et al., arXiv:2003.10152.

Follows https://github.com/WXinlong/SOLO (commit 95f3732d); its state_dict loads strictly. The
parts stand in backbone.py, heads.py, targets.py, loss.py and matrix_nms.py, each with what differs.

Shape letters: B images, C channels, H W pixels, or cells at a quarter of that, S grid cells of all
levels, K classes, E mask features, M candidates, D detections, N cells of a mask in one line.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from solov2.backbone import STRIDES, FeaturePyramid, ResNet
from solov2.config import Config
from solov2.data import Batch
from solov2.heads import GridHead, MaskFeatures
from solov2.layers import convolve_all, convolve_at, inside_of
from solov2.loss import class_loss, mask_loss, take_rows, wide
from solov2.matrix_nms import matrix_nms
from zoo_common import device as devices
from zoo_common.detection.batching import DetectionBatch
from zoo_common.detection.extent import Extent

FLOAT32_INPUTS = ("boxes_BQ4", "centers_BQ2")
"""Fields of a batch that half precision must not touch: pixels need more than 8 bits."""

FEW_CELLS = 8
"""A CPU computes the kernels of candidates alone, if at most one of so many cells is one."""

RATED = 16
"""Masks that a CPU rates at a time."""


class Detections(NamedTuple):
    """What was found in each image, best first.

    Attributes:
        scores_BD: float32.
        labels_BD: int64, classes.
        valid_BD: bool, which slots hold an object.
        masks_BDHW: probabilities at a quarter of the padded image's size, not yet thresholded.
        crowded_B: bool, images in which more cells than ``test.candidates`` passed the score
            threshold, so that the worst of them were not looked at.
    """

    scores_BD: Tensor
    labels_BD: Tensor
    valid_BD: Tensor
    masks_BDHW: Tensor
    crowded_B: Tensor


class Candidates(NamedTuple):
    """Cells and classes above the score threshold, best first.

    Attributes:
        scores_BM: their scores, 0 in empty slots.
        cells_BM: int64.
        labels_BM: int64.
        crowded_B: bool, there were more than slots.
    """

    scores_BM: Tensor
    cells_BM: Tensor
    labels_BM: Tensor
    crowded_B: Tensor


class SOLOv2(nn.Module):
    """Backbone, pyramid, grid head and mask features.

    Args:
        config: sections ``model``, ``head``, ``loss`` and ``test``.
        num_classes: without the background.
        static_shapes: batches may be padded beyond what they need, and no shape may depend on
            what is in them.
    """

    def __init__(self, config: Config, num_classes: int, *, static_shapes: bool) -> None:
        super().__init__()
        self.config = config
        self.static_shapes = static_shapes
        self.backbone = ResNet(config.model)
        self.neck = FeaturePyramid(self.backbone.channels, config.model.fpn_channels)
        self.mask_feat_head = MaskFeatures(config.model.fpn_channels, config.head)
        self.bbox_head = GridHead(config.model.fpn_channels, num_classes, config.head)

    def forward(self, batch: Batch) -> dict[str, Tensor] | Detections:
        """Losses (float32 scalars by name) in training, detections in evaluation."""
        extent = Extent(batch.detection.extent_2) if self.static_shapes else None
        maps = self.neck(self.backbone(self.preprocess(batch.detection), extent), extent)
        features_BEHW = self.mask_feat_head(maps, extent)
        inside_HW = inside_of(extent, STRIDES[0], features_BEHW)
        if self.training:
            assert batch.targets is not None
            assert batch.detection.masks_BQHW is not None
            logits, kernels = self.bbox_head(maps, extent)
            targets, loss = batch.targets, self.config.loss
            masks_BQHW = batch.detection.masks_BQHW
            return {
                "loss_ins": mask_loss(
                    in_one_line(kernels), features_BEHW, masks_BQHW, targets, loss, inside_HW
                ),
                "loss_cate": class_loss(in_one_line(logits), targets.labels_BS, loss),
            }
        logits, towers = self.bbox_head.classes(maps, extent)
        candidates = self.candidates(logits)
        kernels_BME = self.kernels_at(candidates.cells_BM, towers)
        return self.detect(candidates, kernels_BME, features_BEHW, inside_HW)

    def is_free(self, tensor: Tensor) -> bool:
        """Whether operators and shapes may depend on what is found, as on a CPU."""
        return tensor.device.type == "cpu" and not self.static_shapes

    def kernels_at(self, cells_BM: Tensor, towers: list[Tensor]) -> Tensor:
        """The kernels of some cells, [B, M, E], from the maps that give all of them."""
        layer = self.bbox_head.solo_kernel
        count = sum(grid * grid for grid in self.config.head.grids)
        if self.is_free(cells_BM) and cells_BM.shape[1] * FEW_CELLS <= count:
            return convolve_at(layer, towers, cells_BM)
        return take_rows(in_one_line(convolve_all(layer, towers)), cells_BM)

    def candidates(self, logits: list[Tensor]) -> Candidates:
        """The cells and classes that may be objects.

        A cell whose score is not the highest among itself and its neighbours above, to the left
        and above to the left drops out (points NMS).
        """
        test = self.config.test
        scores_BSK = in_one_line([_local_maxima(wide(level).sigmoid()) for level in logits])
        scores_BX = scores_BSK.flatten(1)
        passed_BX = scores_BX > test.score_thr
        count_B = passed_BX.sum(dim=1)
        slots = min(test.candidates, scores_BX.shape[1])
        if not self.static_shapes:
            slots = max(1, int(count_B.max()))  # all of them: here no shape has to be fixed
        scores_BM, index_BM = torch.where(passed_BX, scores_BX, 0.0).topk(slots, dim=1)
        classes = scores_BSK.shape[2]
        return Candidates(
            scores_BM,
            torch.div(index_BM, classes, rounding_mode="floor"),
            index_BM % classes,
            count_B > slots,
        )

    def detect(
        self,
        candidates: Candidates,
        kernels_BME: Tensor,
        features_BEHW: Tensor,
        inside_HW: Tensor | None,
    ) -> Detections:
        """Draws the candidates' masks, rates them by these, and thins them out by matrix NMS."""
        test = self.config.test
        height, width = features_BEHW.shape[-2:]
        drawn_BMN = wide(kernels_BME @ features_BEHW.flatten(2)).sigmoid_()
        if inside_HW is not None:
            drawn_BMN = drawn_BMN * inside_HW.flatten()
        if not self.is_free(drawn_BMN):
            rated = _rate(drawn_BMN, test.mask_thr)
        else:  # a few at a time, which stay in the caches
            parts = [
                _rate(drawn_BMN[:, first : first + RATED], test.mask_thr)
                for first in range(0, drawn_BMN.shape[1], RATED)
            ]
            rated = tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        masks_BMN, areas_BM, sure_BM = rated
        real_BM = (candidates.scores_BM > 0) & (areas_BM > self.strides_of(candidates.cells_BM))
        scores_BM = torch.where(real_BM, candidates.scores_BM * sure_BM, 0.0)

        scores_BM, best_BM = scores_BM.topk(min(test.nms_pre, scores_BM.shape[1]), dim=1)
        labels_BM = candidates.labels_BM.gather(1, best_BM)
        scores_BM = matrix_nms(
            take_rows(masks_BMN, best_BM),
            labels_BM,
            scores_BM,
            areas_BM.gather(1, best_BM),
            scores_BM > 0,
            kernel=test.kernel,
            sigma=test.sigma,
        )
        scores_BM = torch.where(scores_BM >= test.update_thr, scores_BM, 0.0)
        scores_BD, last_BD = scores_BM.topk(min(test.max_per_img, scores_BM.shape[1]), dim=1)
        drawn_BDN = take_rows(drawn_BMN, best_BM.gather(1, last_BD))
        return Detections(
            scores_BD,
            labels_BM.gather(1, last_BD),
            scores_BD > 0,
            drawn_BDN.reshape(*drawn_BDN.shape[:2], height, width),
            candidates.crowded_B,
        )

    def strides_of(self, cells_BM: Tensor) -> Tensor:
        """The stride of each cell's level: masks of no more cells than that are dropped."""
        strides, first = torch.zeros_like(cells_BM), 0
        for grid, stride in zip(self.config.head.grids, self.config.head.strides, strict=True):
            strides = torch.where(cells_BM >= first, stride, strides)
            first += grid * grid
        return strides

    def preprocess(self, batch: DetectionBatch) -> Tensor:
        """Normalised images, zero where they are padded."""
        images_BCHW = batch.images_BCHW
        weight = self.backbone.conv1.weight
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        height, width = images_BCHW.shape[-2:]
        rows_BH = torch.arange(height, device=images_BCHW.device) < batch.sizes_B2[:, :1]
        columns_BW = torch.arange(width, device=images_BCHW.device) < batch.sizes_B2[:, 1:]
        real_BHW = rows_BH[:, :, None] & columns_BW[:, None, :]
        model = self.config.model
        # By channel, with Python numbers: nothing is copied from the host at each step.
        planes = [
            torch.where(real_BHW, (images_BCHW[:, channel].to(dtype) - mean) / std, 0.0)
            for channel, (mean, std) in enumerate(
                zip(model.pixel_mean, model.pixel_std, strict=True)
            )
        ]
        return torch.stack(planes, dim=1).to(weight.dtype)


def _rate(drawn_BMN: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """Masks, bool [B, M, N], their areas, and the mean probability in each, [B, M]."""
    masks_BMN = drawn_BMN > threshold
    areas_BM = masks_BMN.sum(dim=2).to(drawn_BMN.dtype)
    sure_BM = (drawn_BMN * masks_BMN).sum(dim=2) / areas_BM.clamp(min=1)
    return masks_BMN, areas_BM, sure_BM


def in_one_line(levels: list[Tensor]) -> Tensor:
    """Grids [B, X, grid, grid] as one list of cells, [B, S, X]."""
    return torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)


def _local_maxima(scores_BKGG: Tensor) -> Tensor:
    """Scores that are the highest of two by two cells, of which they are the last; 0 elsewhere."""
    highest = F.max_pool2d(scores_BKGG, 2, stride=1, padding=1)[..., :-1, :-1]
    return scores_BKGG * (highest == scores_BKGG)


def to_device(model: SOLOv2, device: torch.device) -> SOLOv2:
    """The model on a device, in the order of memory that suits it."""
    return model.to(device).to(memory_format=devices.memory_format(device))


def build_model(config: Config, num_classes: int, *, static_shapes: bool = False) -> SOLOv2:
    """The network of a config, with initial weights drawn anew."""
    return SOLOv2(config, num_classes, static_shapes=static_shapes)
