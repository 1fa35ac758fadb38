"""CLIP's contrastive loss over the images and texts of all ranks.

Radford et al., CLIP, arXiv:2103.00020, section 2.3; with several views and texts as Li et al.,
DeCLIP, arXiv:2110.05208, section 3.3 (multi-view supervision). Follows ClipInfoCELoss and its use
in prototype/solver/declip_solver.py of https://github.com/Sense-GVT/DeCLIP at 5d99a855, with one
matrix a direction in the place of one for each pair of a view and a text.

Shape letters: B rows of this rank, N rows of all ranks, G groups of rows and H of what they are
compared with (V views, U texts), D features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from declip.gather import gather_rows, rank


def contrastive_loss(images_VBD: Tensor, texts_UBD: Tensor, scale: Tensor) -> Tensor:
    """The mean over views and texts of InfoNCE from image to text and from text to image.

    Memory grows with the local times the global batch: for its backward pass it keeps two matrices
    of V U B N logits, and the features of all ranks.

    Args:
        images_VBD: features of length 1, in float32 or float64.
        texts_UBD: the same of the texts.
        scale: (1,), factor of the cosine similarities.

    Returns:
        The mean over this rank's rows; see :func:`declip.gather.gather_rows` for what its gradient
        is over several ranks.
    """
    images_VND, texts_UND = gather_rows(images_VBD, texts_UBD)
    image_to_text = match_loss(images_VBD, texts_UND, scale)
    text_to_image = match_loss(texts_UBD, images_VND, scale)
    return (image_to_text + text_to_image) / 2


def match_loss(rows_GBD: Tensor, others_HND: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of finding each row's partner among those of all ranks, for all G times H.

    Args:
        rows_GBD: this rank's features, of length 1.
        others_HND: features of all ranks, of length 1.
        scale: (1,), factor of the cosine similarities.
    """
    groups, size, _ = rows_GBD.shape
    others, total, _ = others_HND.shape
    logits = (scale * rows_GBD).flatten(0, 1) @ others_HND.flatten(0, 1).t()  # (G B, H N)
    first = rank() * size
    partners_B = torch.arange(first, first + size, device=logits.device)
    partners = partners_B[:, None].expand(groups, size, others).flatten()
    return F.cross_entropy(logits.view(-1, total), partners)
