"""Masked language modelling: the vocabulary's cross-entropy at the masked words.

Devlin et al., BERT, arXiv:1810.04805, section 3.1 (task 1).

Shape letters: M slots for masked words, W vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_language_loss(words_MW: Tensor, labels_M: Tensor) -> Tensor:
    """The mean over this rank's masked words; 0, with gradients of 0, where none is masked.

    Args:
        words_MW: logits in any floating format.
        labels_M: the words that stood there; -100 in an empty slot.
    """
    # The logits are a batch's largest tensor: log_softmax widens them as it reads them.
    dtype = torch.promote_types(words_MW.dtype, torch.float32)
    logs_MW = F.log_softmax(words_MW, dim=1, dtype=dtype)
    total = F.nll_loss(logs_MW, labels_M, ignore_index=-100, reduction="sum")
    return total / (labels_M >= 0).sum().clamp(min=1)
