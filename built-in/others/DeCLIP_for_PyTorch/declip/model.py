"""CLIP and DeCLIP: an image tower and a text tower, and the heads of DeCLIP's further losses.

Papers: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
https://arxiv.org/abs/2103.00020; Li et al., Supervision Exists Everywhere: A Data Efficient
Contrastive Language-Image Pre-training Paradigm, https://arxiv.org/abs/2110.05208. Follows
https://github.com/Sense-GVT/DeCLIP (Apache-2.0) at 5d99a855, prototype/model/clip.py and
declip.py; the state_dict's keys are the same. Differences:

- Tokens come with the batch; upstream augments, tokenises and masks captions in its forward pass.
- Both texts of a caption go through the text transformer at once, and both views of an image
  through a vision transformer. A ResNet takes them one after the other, since each has its own
  batch statistics.
- Only masked words are compared with the vocabulary, not all 77 of a caption.
- What the losses do not use gets no gradient and is not computed.

Shape letters: B images, V views, U texts of a caption, T tokens, D features, P projections, M slots
for masked words, W vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from declip.batch import Batch
from declip.config import LossConfig, ModelConfig
from declip.losses import wide
from declip.resnet import ModifiedResNet
from declip.sync_batch_norm import SyncBatchNorm
from declip.transformer import TextTransformer, VisionTransformer, select_words
from zoo_common import device as devices
from zoo_common.data import Normalize
from zoo_common.imagenet import IMAGENET_MEAN, IMAGENET_STD

MAX_SCALE = 100.0
"""Largest factor of cosine similarities."""


class Features(NamedTuple):
    """What the losses are made from.

    Attributes:
        images_VBD: features of the views, of any length.
        texts_UBD: features of the texts that images are compared with, of any length.
        scale: (1,), the factor of their cosine similarities.
        projected_VBP: SimSiam's projections, or None.
        predicted_VBP: SimSiam's predictions, or None.
        words_MW: logits of the masked words, or None.
    """

    images_VBD: Tensor
    texts_UBD: Tensor
    scale: Tensor
    projected_VBP: Tensor | None = None
    predicted_VBP: Tensor | None = None
    words_MW: Tensor | None = None


class CLIP(nn.Module):
    """Two towers whose features are to be alike for an image and its caption.

    Args:
        visual: normalised images (B, 3, H, W) to features (B, D).
        encode_text: the text transformer.
    """

    def __init__(self, visual: nn.Module, encode_text: TextTransformer) -> None:
        super().__init__()
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.visual = visual
        self.encode_text = encode_text
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, batch: Batch) -> Features:
        """The features of a training batch with one view and one text."""
        words_NTC = self.encode_text(batch.tokens_UBT.flatten(0, 1))
        return Features(
            images_VBD=self.view_features(batch.images_VBCHW),
            texts_UBD=self.text_features(words_NTC, batch.ends_UB, texts=1),
            scale=self.scale(),
        )

    def image_features(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, D) of uint8 images of 0 to 255, or of normalised floating-point ones."""
        if not images_BCHW.is_floating_point():
            images_BCHW = self.normalize(images_BCHW)
        features_BD: Tensor = self.visual(images_BCHW.to(self.logit_scale.dtype))
        return features_BD

    def caption_features(self, tokens_BT: Tensor, ends_B: Tensor) -> Tensor:
        """Features (B, D) of texts, for zero-shot classification."""
        return self.encode_text.project(self.encode_text(tokens_BT), ends_B)

    def view_features(self, images_VBCHW: Tensor) -> Tensor:
        """Features (V, B, D) of the views of images."""
        if isinstance(self.visual, VisionTransformer):
            views = images_VBCHW.shape[0]
            return self.image_features(images_VBCHW.flatten(0, 1)).unflatten(0, (views, -1))
        return torch.stack([self.image_features(images_BCHW) for images_BCHW in images_VBCHW])

    def text_features(self, words_NTC: Tensor, ends_UB: Tensor, texts: int) -> Tensor:
        """Features (U, B, D) of the first ``texts`` texts of captions, from words (U B, T, C)."""
        ends_N = ends_UB[:texts].flatten()
        features_ND = self.encode_text.project(words_NTC[: len(ends_N)], ends_N)
        return features_ND.unflatten(0, (texts, -1))

    def scale(self) -> Tensor:
        """exp(logit_scale), (1,), at most ``MAX_SCALE``; the gradient passes as if without limit.

        So it does upstream, where the limit is set behind autograd's back.
        """
        scale = self.logit_scale.exp()
        return scale + (scale.clamp(max=MAX_SCALE) - scale).detach()


class DeCLIP(CLIP):
    """CLIP with SimSiam's heads on images and a classifier of masked words.

    Args:
        visual: normalised images (B, 3, H, W) to features (B, D).
        encode_text: the text transformer.
        embed_dim: D.
        projector_width: P.
        predictor_width: hidden width of SimSiam's predictor.
        simsiam: whether SimSiam's loss is used.
        masked_language: whether the loss of masked words is used.
    """

    def __init__(
        self,
        visual: nn.Module,
        encode_text: TextTransformer,
        *,
        embed_dim: int,
        projector_width: int,
        predictor_width: int,
        simsiam: bool = True,
        masked_language: bool = True,
    ) -> None:
        super().__init__(visual, encode_text)
        self.simsiam = simsiam
        self.masked_language = masked_language
        self.projector = Projector(embed_dim, projector_width)
        self.predictor = Predictor(projector_width, predictor_width)
        vocab_size, text_width = encode_text.token_embedding.weight.shape
        self.text_label_predictor = nn.Linear(text_width, vocab_size)
        self.projector.requires_grad_(simsiam)
        self.predictor.requires_grad_(simsiam)
        self.text_label_predictor.requires_grad_(masked_language)

    def forward(self, batch: Batch) -> Features:
        """The features of a training batch with two views and two or three texts."""
        words_NTC = self.encode_text(batch.tokens_UBT.flatten(0, 1))
        features = Features(
            images_VBD=self.view_features(batch.images_VBCHW),
            texts_UBD=self.text_features(words_NTC, batch.ends_UB, texts=2),
            scale=self.scale(),
        )
        if self.simsiam:
            projected = [self.projector(features_BD) for features_BD in features.images_VBD]
            features = features._replace(
                projected_VBP=torch.stack(projected),
                predicted_VBP=torch.stack([self.predictor(part_BP) for part_BP in projected]),
            )
        if self.masked_language:
            assert batch.masked is not None
            masked_MC = select_words(words_NTC, batch.masked.rows_M, batch.masked.columns_M)
            features = features._replace(words_MW=self.text_label_predictor(masked_MC))
        return features


class Projector(nn.Module):
    """SimSiam's projector: three layers, each with a batch norm of the local batch in float32."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, width)
        self.bn1 = nn.BatchNorm1d(width)
        self.linear2 = nn.Linear(width, width)
        self.bn2 = nn.BatchNorm1d(width)
        self.linear3 = nn.Linear(width, width)
        self.bn3 = nn.BatchNorm1d(width)

    def forward(self, features_BD: Tensor) -> Tensor:
        """(B, D) to (B, P)."""
        inner_BP = F.relu_(self.bn1(wide(self.linear1(features_BD))))
        inner_BP = F.relu_(self.bn2(wide(self.linear2(inner_BP))))
        projected_BP: Tensor = self.bn3(wide(self.linear3(inner_BP)))
        return projected_BP


class Predictor(nn.Module):
    """SimSiam's predictor: two layers with a narrow one between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.layer2 = nn.Linear(hidden, width)

    def forward(self, projected_BP: Tensor) -> Tensor:
        """(B, P) to (B, P)."""
        inner_BP = F.relu_(self.bn1(wide(self.linear1(projected_BP))))
        predicted_BP: Tensor = self.layer2(inner_BP)
        return predicted_BP


def to_device(model: CLIP, device: torch.device) -> CLIP:
    """The model on a device, in the order of memory that suits it."""
    return model.to(device).to(memory_format=devices.memory_format(device))


def build_model(config: ModelConfig, loss: LossConfig, vocab_size: int) -> CLIP:
    """The network of a config.

    Args:
        config: the towers.
        loss: decides which heads are trained.
        vocab_size: tokens of the vocabulary.
    """
    text = TextTransformer(
        vocab_size=vocab_size,
        context_length=config.context_length,
        width=config.text_width,
        layers=config.text_layers,
        heads=config.text_heads,
        embed_dim=config.embed_dim,
    )
    visual = build_image_tower(config)
    if config.objective == "clip":
        return CLIP(visual, text)
    return DeCLIP(
        visual,
        text,
        embed_dim=config.embed_dim,
        projector_width=config.projector_width,
        predictor_width=config.predictor_width,
        simsiam=loss.simsiam > 0,
        masked_language=loss.masked_language > 0,
    )


def build_image_tower(config: ModelConfig) -> nn.Module:
    """The image tower of a config."""
    if config.tower == "vit":
        return VisionTransformer(
            input_size=config.input_size,
            patch=config.patch,
            width=config.image_width,
            layers=config.image_layers,
            heads=config.image_heads,
            embed_dim=config.embed_dim,
        )
    return ModifiedResNet(
        input_size=config.input_size,
        depths=config.image_depths,
        width=config.image_width,
        heads=config.image_heads,
        embed_dim=config.embed_dim,
        norm=partial(SyncBatchNorm, ranks=config.sync_batch_norm),
        recompute=config.recompute,
    )
