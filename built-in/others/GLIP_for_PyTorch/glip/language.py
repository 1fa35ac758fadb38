"""The text encoder: transformers' BERT, and the words that it makes of captions.

Paper: Devlin et al., https://arxiv.org/abs/1810.04805. Follows https://github.com/microsoft/GLIP
(MIT) at 9dda955, maskrcnn_benchmark/modeling/language_backbone/bert_model.py; parameter names are
the same (``body.model`` is transformers' ``BertModel`` without its pooler).

Shape letters: B captions, T tokens, C width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import BertConfig, BertModel


class Words(NamedTuple):
    """Captions as the network sees them.

    Attributes:
        hidden_BTC: the last layer's output.
        mask_BT: True for tokens, False for padding.
    """

    hidden_BTC: Tensor
    mask_BT: Tensor

    def embedded(self) -> Tensor:
        """The last layer's output (B, T, C) with zeros in the place of padding."""
        return self.hidden_BTC * self.mask_BT[..., None]


class BertEncoder(nn.Module):
    """BERT without a pooler.

    Args:
        config: transformers' settings of the network.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # The ways of attention that take a mask of truth values; the others add numbers.
        config._attn_implementation = "sdpa"
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Words:
        """Words of token numbers (B, T); ``mask_BT`` is True for tokens."""
        # Not by the whole model's forward pass: it would read the mask from the device, and add it
        # to the scores as numbers.
        seen_B1TT = mask_BT[:, None, None].expand(-1, 1, mask_BT.shape[1], -1)
        embedded_BTC = self.model.embeddings(input_ids=tokens_BT)
        output = self.model.encoder(embedded_BTC, attention_mask=seen_B1TT)
        return Words(output.last_hidden_state, mask_BT)


class LanguageBackbone(nn.Module):
    """Holds the encoder under its published name, ``body``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.body = BertEncoder(config)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Words:
        """As :class:`BertEncoder`."""
        words: Words = self.body(tokens_BT, mask_BT)
        return words
