"""Nearest-neighbour supervision: an image is also to match the text most like its own.

Li et al., DeCLIP, arXiv:2110.05208, section 3.3. Follows prototype/model/utils/nnclr_modules and
declip.py of https://github.com/Sense-GVT/DeCLIP at 5d99a855. Differences: the queue is saved and
resumed; texts beyond its end go to its start unless ``wrap`` is off; it is never copied.

Shape letters: N rows of the queue, B rows of a batch, D features, V views, U texts of a caption.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from declip.gather import gather_rows
from declip.losses.contrastive import match_loss
from zoo_common.errors import UserError

_QUEUE_NUMBERS = 1  # tells the queue's random numbers from others of the same seed and rank


def nearest_neighbor_loss(images_VBD: Tensor, neighbors_UBD: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from images to their texts' neighbours, those of all ranks among them.

    Args:
        images_VBD: features of length 1, in float32 or float64.
        neighbors_UBD: the texts' neighbours, of length 1; they get no gradient.
        scale: (1,), factor of the cosine similarities.
    """
    (neighbors_UND,) = gather_rows(neighbors_UBD.detach())
    return match_loss(images_VBD, neighbors_UND, scale)


class TextQueue:
    """The features of the latest texts of this rank, on its device.

    It starts with random directions, other ones on each rank. 65,536 rows of 512 float32 numbers
    take 134 MB; a search takes B rows of N similarities beside it.

    Args:
        size: N.
        dim: D.
        device: where it lies.
        seed: the run's.
        rank: this process's.
        wrap: texts beyond the end go to the start; else they are dropped, as upstream does.
        dtype: float32; float64 where the network computes in it.

    Attributes:
        rows_ND: unit rows.
        position: int64 scalar, the row that the next text is written to.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        device: torch.device,
        seed: int,
        rank: int,
        wrap: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        numbers = np.random.SeedSequence((seed, rank, _QUEUE_NUMBERS))
        # Drawn on the host, so that they are the same on every kind of device.
        generator = torch.Generator().manual_seed(int(numbers.generate_state(1, np.uint64)[0] >> 1))
        rows_ND = torch.randn(size, dim, generator=generator, dtype=torch.float32)
        self.rows_ND = F.normalize(rows_ND.to(dtype), dim=1).to(device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.wrap = wrap

    @torch.no_grad()
    def nearest(self, texts_BD: Tensor) -> Tensor:
        """The row with the largest cosine for each text, (B, D), as a copy."""
        similarities_BN = texts_BD.to(self.rows_ND.dtype) @ self.rows_ND.t()
        return self.rows_ND.index_select(0, similarities_BN.argmax(dim=1))

    @torch.no_grad()
    def push(self, texts_BD: Tensor) -> None:
        """Writes texts of length 1 over the oldest rows; B is at most N."""
        count, size = len(texts_BD), len(self.rows_ND)
        assert count <= size, f"{count} texts do not fit into a queue of {size}"
        texts_BD = texts_BD.detach().to(self.rows_ND.dtype)
        places_B = self.position + torch.arange(count, device=self.position.device)
        after = self.position + count
        if not self.wrap:
            # What is dropped leaves the row where it would go as it is: shapes stay the same.
            kept_BD = self.rows_ND.index_select(0, places_B % size)
            texts_BD = torch.where((places_B < size)[:, None], texts_BD, kept_BD)
            after = after * (after < size)
        self.rows_ND.scatter_(0, (places_B % size)[:, None].expand_as(texts_BD), texts_BD)
        self.position.copy_(after % size)

    def state_dict(self) -> dict[str, Any]:
        """Rows and position."""
        return {"rows_ND": self.rows_ND, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what :meth:`state_dict` gave.

        Raises:
            UserError: it is of a queue of another size.
        """
        saved, own = tuple(state_dict["rows_ND"].shape), tuple(self.rows_ND.shape)
        if saved != own:
            raise UserError(
                f"The checkpoint's queue holds {saved[0]} texts of {saved[1]} features, but this "
                f"run's loss.queue_size and model.embed_dim are {own[0]} and {own[1]}: give those "
                "of the checkpoint, or start a new run from its weights."
            )
        self.rows_ND.copy_(state_dict["rows_ND"])
        self.position.copy_(state_dict["position"])
