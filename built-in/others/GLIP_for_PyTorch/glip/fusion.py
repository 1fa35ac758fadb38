"""Deep fusion: image and words attend to one another, then words to words.

Paper: Li et al., Grounded Language-Image Pre-training, https://arxiv.org/abs/2112.03857, section
3.2. Follows https://github.com/microsoft/GLIP (MIT) at 9dda955,
maskrcnn_benchmark/utils/fuse_helper.py and modeling/rpn/vldyhead.py; parameter names are the
same. Kept as they are there, since published weights were trained so: the fused parts are added
to the normalised tensors, not to the tensors; words attend to all cells of the padded image and
padding tokens attend too; scores are limited to +-50,000.

Shape letters: B images, N cells of all levels, T tokens, V channels of a cell, L width of a word, E
inner width, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig

from glip.cross_attention import LIMIT, WordSide, read_both_ways
from glip.language import Words


class BiMultiHeadAttention(nn.Module):
    """One matrix of scores, read by rows for the image and by columns for the words.

    Args:
        v_dim: V.
        l_dim: L.
        embed_dim: E.
        heads: H, a divisor of E.
        dropout: of both attentions.
    """

    def __init__(self, v_dim: int, l_dim: int, embed_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.scale = 1 / math.sqrt(embed_dim // heads)
        self.v_proj = nn.Linear(v_dim, embed_dim)
        self.l_proj = nn.Linear(l_dim, embed_dim)
        self.values_v_proj = nn.Linear(v_dim, embed_dim)
        self.values_l_proj = nn.Linear(l_dim, embed_dim)
        self.out_v_proj = nn.Linear(embed_dim, v_dim)
        self.out_l_proj = nn.Linear(embed_dim, l_dim)
        for layer in self.children():
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, cells_BNV: Tensor, words_BTL: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is added to the cells, (B, N, V), and to the words, (B, T, L)."""
        keys_BHTD = self._split(self.l_proj(words_BTL)) * self.scale
        queries = self._of_heads(self.v_proj.weight)
        query_bias = self.v_proj.bias.unflatten(0, (self.heads, -1))
        outwards = self.out_v_proj.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        side = WordSide(
            keys_BHTD @ queries,
            (keys_BHTD @ query_bias[..., None])[..., 0],
            self._split(self.values_l_proj(words_BTL)) @ outwards,
            mask_BT,
        )
        added_BNV, read_BHTV, sums_BHT = read_both_ways(
            cells_BNV, side, self.dropout if self.training else 0.0
        )
        values = self._of_heads(self.values_v_proj.weight)
        value_bias = self.values_v_proj.bias.view(self.heads, 1, -1)
        read_BHTD = read_BHTV @ values.transpose(1, 2) + sums_BHT[..., None] * value_bias
        read_BTE = read_BHTD.transpose(1, 2).flatten(2)
        return added_BNV + self.out_v_proj.bias, self.out_l_proj(read_BTE)

    def _of_heads(self, weight: Tensor) -> Tensor:
        """The weight of a layer (E, V) by its outputs' heads, (H, D, V)."""
        return weight.unflatten(0, (self.heads, -1))

    def _split(self, tokens_BTE: Tensor) -> Tensor:
        return tokens_BTE.unflatten(2, (self.heads, -1)).transpose(1, 2)


class BiAttentionBlock(nn.Module):
    """Normalisation, attention in both directions, and a learnt share of it added."""

    def __init__(
        self, v_dim: int, l_dim: int, embed_dim: int, heads: int, share: float, dropout: float
    ) -> None:
        super().__init__()
        self.layer_norm_v = nn.LayerNorm(v_dim)
        self.layer_norm_l = nn.LayerNorm(l_dim)
        self.attn = BiMultiHeadAttention(v_dim, l_dim, embed_dim, heads, dropout)
        self.gamma_v = nn.Parameter(torch.full((v_dim,), share))
        self.gamma_l = nn.Parameter(torch.full((l_dim,), share))

    def forward(
        self, cells_BNV: Tensor, words_BTL: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cells (B, N, V) and words (B, T, L) that know of one another."""
        cells_BNV, words_BTL = self.layer_norm_v(cells_BNV), self.layer_norm_l(words_BTL)
        added_v, added_l = self.attn(cells_BNV, words_BTL, mask_BT)
        return cells_BNV + self.gamma_v * added_v, words_BTL + self.gamma_l * added_l


class VLFuse(nn.Module):
    """Fusion of all levels with the words."""

    def __init__(
        self, v_dim: int, l_dim: int, embed_dim: int, heads: int, share: float, dropout: float
    ) -> None:
        super().__init__()
        self.b_attn = BiAttentionBlock(v_dim, l_dim, embed_dim, heads, share, dropout)

    def forward(self, levels: Sequence[Tensor], words: Words) -> tuple[list[Tensor], Words]:
        """Maps (B, V, height, width) and words, fused."""
        sizes = [level.shape[2:] for level in levels]
        cells_BNV = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)
        cells_BNV, words_BTL = self.b_attn(cells_BNV, words.hidden_BTC, words.mask_BT)
        split = cells_BNV.transpose(1, 2).split([math.prod(size) for size in sizes], dim=2)
        fused = [part.unflatten(2, size) for part, size in zip(split, sizes, strict=True)]
        return fused, words._replace(hidden_BTC=words_BTL)


class _SelfAttention(nn.Module):
    """BERT's attention, scores and outputs limited."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, words_BTL: Tensor, mask_BT: Tensor) -> Tensor:
        queries, keys, values = (
            layer(words_BTL).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores_BHTT = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[3])
        scores_BHTT = scores_BHTT.clamp(-LIMIT, LIMIT)
        shares = scores_BHTT.masked_fill(~mask_BT[:, None, None], -math.inf).softmax(dim=3)
        mixed = F.dropout(shares, self.dropout, self.training) @ values
        return mixed.transpose(1, 2).flatten(2)


class _Output(nn.Module):
    """A layer, dropout and a normalised sum; limited, if it ends the feed-forward part."""

    def __init__(
        self, inputs: int, width: int, dropout: float, eps: float, *, limited: bool
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = dropout
        self.limited = limited

    def forward(self, inner: Tensor, before: Tensor) -> Tensor:
        added = F.dropout(self.dense(inner), self.dropout, self.training)
        if not self.limited:
            result: Tensor = self.LayerNorm(added + before)
            return result
        result = self.LayerNorm(added.clamp(-LIMIT, LIMIT) + before)
        return result.clamp(-LIMIT, LIMIT)


class _Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self = _SelfAttention(
            width, config.num_attention_heads, config.attention_probs_dropout_prob
        )
        self.output = _Output(
            width, width, config.hidden_dropout_prob, config.layer_norm_eps, limited=False
        )

    def forward(self, words_BTL: Tensor, mask_BT: Tensor) -> Tensor:
        result: Tensor = self.output(self.self(words_BTL, mask_BT), words_BTL)
        return result


class _Intermediate(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, words_BTL: Tensor) -> Tensor:
        inner = F.gelu(self.dense(words_BTL).clamp(-LIMIT, LIMIT))
        return inner.clamp(-LIMIT, LIMIT)


class BertEncoderLayer(nn.Module):
    """A layer of BERT whose numbers are limited to what float16 holds.

    Args:
        config: transformers' settings of BERT.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Intermediate(config.hidden_size, config.intermediate_size)
        self.output = _Output(
            config.intermediate_size,
            config.hidden_size,
            config.hidden_dropout_prob,
            config.layer_norm_eps,
            limited=True,
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=config.initializer_range)
                nn.init.zeros_(layer.bias)

    def forward(self, words: Words) -> Words:
        """Words to words."""
        attended = self.attention(words.hidden_BTC, words.mask_BT)
        return words._replace(hidden_BTC=self.output(self.intermediate(attended), attended))
