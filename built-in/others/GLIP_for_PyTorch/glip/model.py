"""GLIP: an image backbone, BERT, and a head that fuses both and finds what words mean.

Paper: Li et al., Grounded Language-Image Pre-training, https://arxiv.org/abs/2112.03857. Follows
https://github.com/microsoft/GLIP (MIT) at 9dda955; the state_dict's keys are the same. What
upstream's checkpoints hold beyond it (``rpn.head.cls_logits``, ``rpn.anchor_generator``) is never
used there either.

Images come as uint8 with red first; the pixel statistics are those of upstream, which takes blue
first: the first layer sees them in its order.

Shape letters: B images, H W pixels, Q slots for boxes, A anchors of all levels, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import BertConfig

from glip import anchors
from glip.bert import find_bert, read_config
from glip.config import Config, LossConfig, ModelConfig
from glip.data import Batch
from glip.fpn import FPN
from glip.head import Predictions, VLDyHead
from glip.language import LanguageBackbone, Words
from glip.loss import losses
from glip.swin import SwinTransformer
from glip.targets import match
from glip.tower import Tower

FLOAT32_INPUTS = ("boxes_BQ4",)
"""What of a batch stays float32 in a half-precision model."""


class Backbone(nn.Module):
    """Holds backbone and pyramid under their published names."""

    def __init__(self, body: SwinTransformer, fpn: FPN) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Normalised images to five levels, strides 8 to 128."""
        levels: list[Tensor] = self.fpn(self.body(images_BCHW))
        return levels


class RPN(nn.Module):
    """Holds the head under its published name."""

    def __init__(self, head: VLDyHead) -> None:
        super().__init__()
        self.head = head


class GLIP(nn.Module):
    """The network.

    Args:
        config: section ``model`` of the config.
        loss: section ``loss`` of the config.
        bert: transformers' settings of BERT.
    """

    def __init__(self, config: ModelConfig, loss: LossConfig, bert: BertConfig) -> None:
        super().__init__()
        self.loss_config = loss
        self.pixels = list(zip(config.pixel_mean, config.pixel_std, strict=True))
        body = SwinTransformer(
            width=config.swin_width,
            depths=config.swin_depths,
            heads=config.swin_heads,
            window=config.swin_window,
            drop_path=config.drop_path,
        )
        self.backbone = Backbone(body, FPN(body.widths, config.channels, config.drop_block))
        self.language_backbone = LanguageBackbone(bert)
        tower = Tower(
            config.channels,
            config.tower_blocks,
            bert,
            fusion=config.fusion,
            embed_dim=config.fusion_width,
            heads=config.fusion_heads,
            dropout=config.fusion_dropout,
        )
        self.rpn = RPN(
            VLDyHead(
                tower,
                channels=config.channels,
                words_width=bert.hidden_size,
                fusion=config.fusion,
            )
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted losses of a training batch, float32 (float64 in a float64 network)."""
        assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
        words = self.words(batch.text.tokens_BT, batch.text.mask_BT)
        detection = batch.detection
        levels = self.backbone(self.normalize(detection.images_BCHW, detection.sizes_B2))
        predictions: Predictions = self.rpn.head(levels, words)
        with torch.autocast(levels[0].device.type, enabled=False):
            return self.losses(predictions, level_sizes(levels), batch)

    def losses(
        self, predictions: Predictions, sizes: Sequence[tuple[int, int]], batch: Batch
    ) -> dict[str, Tensor]:
        """The weighted losses of predictions for levels of (height, width)."""
        assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
        config = self.loss_config
        predictions = Predictions(*(anchors.wide(part) for part in predictions))
        anchors_A4 = anchors.make_anchors(sizes, batch.boxes_BQ4.device)
        # In float32 on purpose: equal distances are as equal then as upstream's.
        matches = match(
            anchors_A4,
            [height * width for height, width in sizes],
            batch.boxes_BQ4.float(),
            batch.detection.valid_BQ,
            config.candidates,
        )
        return losses(
            predictions,
            matches,
            anchors_A4.to(predictions.deltas_BA4.dtype),
            batch.boxes_BQ4.to(predictions.deltas_BA4.dtype),
            batch.tokens_BQT,
            batch.text.mask_BT,
            config,
        )

    def words(self, tokens_BT: Tensor, mask_BT: Tensor) -> Words:
        """What BERT makes of captions; of a fixed caption it needs to be made once."""
        words: Words = self.language_backbone(tokens_BT, mask_BT)
        return words

    def predict(
        self, images_BCHW: Tensor, sizes_B2: Tensor, words: Words
    ) -> tuple[Predictions, list[tuple[int, int]]]:
        """What the head says, and (height, width) of the levels.

        Args:
            images_BCHW: 0 to 255, red first.
            sizes_B2: height and width of each image in its padding.
            words: of captions, one for each image.
        """
        levels = self.backbone(self.normalize(images_BCHW, sizes_B2))
        predictions: Predictions = self.rpn.head(levels, words)
        return predictions, level_sizes(levels)

    def normalize(self, images_BCHW: Tensor, sizes_B2: Tensor) -> Tensor:
        """Images of 0 to 255, red first, to what the backbone takes: blue first, padded with 0."""
        weight = self.backbone.body.patch_embed.proj.weight
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        height, width = images_BCHW.shape[2:]
        rows_BH = torch.arange(height, device=images_BCHW.device) < sizes_B2[:, :1]
        columns_BW = torch.arange(width, device=images_BCHW.device) < sizes_B2[:, 1:]
        real_BHW = rows_BH[:, :, None] & columns_BW[:, None]
        # By channel, with Python numbers: nothing is copied from the host at each step.
        planes = [
            torch.where(real_BHW, (plane_BHW.to(dtype) - mean) / std, 0.0)
            for plane_BHW, (mean, std) in zip(
                reversed(images_BCHW.unbind(1)), self.pixels, strict=True
            )
        ]
        return torch.stack(planes, dim=1).to(weight.dtype)


def level_sizes(levels: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Height and width of maps (B, C, H, W)."""
    return [(level.shape[2], level.shape[3]) for level in levels]


def build_model(config: Config) -> GLIP:
    """The network of a config, with random weights.

    Raises:
        UserError: BERT's directory is not there, or lacks a file.
    """
    directory = find_bert(config.model.bert, config.data.path)
    return GLIP(config.model, config.loss, BertConfig(**read_config(directory)))


def to_device(model: GLIP, device: torch.device) -> GLIP:
    """The model where it computes."""
    return model.to(device)
