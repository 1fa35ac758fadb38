"""What is minimised: the weighted losses of a batch's features.

Shape letters: B images, V views, U texts of a caption, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from declip.batch import Batch
from declip.config import LossConfig
from declip.losses import wide
from declip.losses.contrastive import contrastive_loss
from declip.losses.masked_language import masked_language_loss
from declip.losses.nearest_neighbor import TextQueue, nearest_neighbor_loss
from declip.losses.simsiam import simsiam_loss
from declip.model import Features

TEXT_EPS = 1e-10  # added to the length of a text's features, as upstream does


class Objective:
    """The losses that have a weight, in float32 whatever the network computes in.

    It runs outside of the network that DistributedDataParallel wraps, in the same place on every
    rank: the losses of images and texts exchange features. Batches are of one size, on all ranks
    and in all steps.

    Args:
        config: weights and queue.
        embed_dim: D.
        device: this process's.
        seed: the run's.
        rank: this process's.
        dtype: of the queue; float64 where the network computes in it.

    Attributes:
        queue: the texts among which neighbours are looked for; None without ``config.nn_text``.
            Each rank has its own: it belongs into the state's ``rank_parts``.
    """

    def __init__(
        self,
        config: LossConfig,
        embed_dim: int,
        *,
        device: torch.device,
        seed: int,
        rank: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._config = config
        self._batch_size: int | None = None
        self.queue: TextQueue | None = None
        if config.nn_text > 0:
            self.queue = TextQueue(
                config.queue_size,
                embed_dim,
                device=device,
                seed=seed,
                rank=rank,
                wrap=config.queue_wrap,
                dtype=dtype,
            )

    def __call__(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """The losses of this rank's part of a batch, times their weights.

        Args:
            features: what the network made of the batch.
            batch: for the masked words.

        Returns:
            Scalars by name: ``clip``, ``nn_text``, ``simsiam`` and ``masked_language``, without
            those of weight 0.
        """
        size = features.images_VBD.shape[1]
        assert self._batch_size in (None, size), f"{size} images after {self._batch_size}"
        self._batch_size = size
        with torch.autocast(features.images_VBD.device.type, enabled=False):
            return self._losses(features, batch)

    def _losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        config = self._config
        losses: dict[str, Tensor] = {}
        images_VBD, texts_UBD = wide(features.images_VBD), wide(features.texts_UBD)
        images_VBD = images_VBD / images_VBD.norm(dim=-1, keepdim=True)
        texts_UBD = texts_UBD / (texts_UBD.norm(dim=-1, keepdim=True) + TEXT_EPS)
        scale = wide(features.scale)
        if config.clip > 0:
            losses["clip"] = config.clip * contrastive_loss(images_VBD, texts_UBD, scale)
        if self.queue is not None:
            neighbors_UBD = self._neighbors(self.queue, texts_UBD.detach())
            nn_text = nearest_neighbor_loss(images_VBD, neighbors_UBD, scale)
            losses["nn_text"] = config.nn_text * nn_text
        if config.simsiam > 0:
            assert features.predicted_VBP is not None and features.projected_VBP is not None
            simsiam = simsiam_loss(features.predicted_VBP, features.projected_VBP)
            losses["simsiam"] = config.simsiam * simsiam
        if config.masked_language > 0:
            assert features.words_MW is not None and batch.masked is not None
            words = masked_language_loss(features.words_MW, batch.masked.labels_M)
            losses["masked_language"] = config.masked_language * words
        return losses

    def _neighbors(self, queue: TextQueue, texts_UBD: Tensor) -> Tensor:
        """All texts' neighbours among those of the steps before, (U, B, D); then they join them."""
        neighbors_UBD = queue.nearest(texts_UBD.flatten(0, 1)).view_as(texts_UBD)
        # Upstream's order: the augmented captions first.
        for texts_BD in reversed(texts_UBD.unbind()):
            queue.push(texts_BD)
        return neighbors_UBD.to(texts_UBD.dtype)
