"""The transformers of CLIP: a vision transformer and a causal text transformer.

Papers: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
https://arxiv.org/abs/2103.00020; Dosovitskiy et al., https://arxiv.org/abs/2010.11929.
Follows https://github.com/Sense-GVT/DeCLIP (Apache-2.0) at 5d99a855, prototype/model/image_encoder
and text_encoder; parameter names are the same. Differences:

- Attention is torch's scaled_dot_product_attention, which knows that text is causal, in place of
  a matrix of weights and a matrix of minus infinities.
- The text transformer takes rows of any length up to the context's: what stands behind the end
  token changes nothing before it, so that a short batch need not be padded.
- Positions of end tokens come with the batch instead of an argmax over token numbers.

Shape letters: B sequences, T tokens, C width, H heads, D features, P pixels' side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QUICK_GELU = 1.702
"""x sigmoid(1.702 x) approximates GELU: Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415."""


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of ``nn.MultiheadAttention``.

    Args:
        width: C.
        heads: H, a divisor of C.
        causal: a token sees itself and those before it only.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens_BTC: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        joined = F.linear(tokens_BTC, self.in_proj_weight, self.in_proj_bias)
        queries, keys, values = joined.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BHTD = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        mixed: Tensor = self.out_proj(mixed_BHTD.transpose(1, 2).flatten(2))
        return mixed


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), of which the backward pass keeps one tensor."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape, elementwise."""
        return F.silu(QUICK_GELU * inputs).mul_(1 / QUICK_GELU)


class MLP(nn.Module):
    """Two layers, the hidden one four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = QuickGELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, tokens_BTC: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        result: Tensor = self.c_proj(self.gelu(self.c_fc(tokens_BTC)))
        return result


class ResidualAttentionBlock(nn.Module):
    """Attention and MLP, each behind a normalisation and added to its input."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, causal=causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, tokens_BTC: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        tokens_BTC = tokens_BTC + self.attn(self.ln_1(tokens_BTC))
        result: Tensor = tokens_BTC + self.mlp(self.ln_2(tokens_BTC))
        return result


class Transformer(nn.Module):
    """Blocks in a row, initialised as CLIP's."""

    def __init__(self, width: int, layers: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, causal=causal) for _ in range(layers))
        )
        into_residual_std = 1 / math.sqrt(2 * width * layers)
        for block in self.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=1 / math.sqrt(width))
            nn.init.normal_(block.attn.out_proj.weight, std=into_residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=1 / math.sqrt(2 * width))
            nn.init.normal_(block.mlp.c_proj.weight, std=into_residual_std)

    def forward(self, tokens_BTC: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        result: Tensor = self.resblocks(tokens_BTC)
        return result


class VisionTransformer(nn.Module):
    """CLIP's vision transformer. The patches' projection stays random, as upstream trains it.

    Args:
        input_size: P, a multiple of ``patch``.
        patch: side of a patch in pixels.
        width: C.
        layers: blocks.
        heads: H.
        embed_dim: D, features of an image.
    """

    def __init__(
        self, *, input_size: int, patch: int, width: int, layers: int, heads: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.conv1.requires_grad_(False)
        std = 1 / math.sqrt(width)
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        places = (input_size // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(places, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(std * torch.randn(width, embed_dim))

    def forward(self, images_BCPP: Tensor) -> Tensor:
        """Normalised images (B, 3, P, P) to features (B, D)."""
        patches_BTC = self.conv1(images_BCPP).flatten(2).transpose(1, 2)
        whole_B1C = self.class_embedding.expand(len(patches_BTC), 1, -1)
        tokens_BTC = torch.cat([whole_B1C.to(patches_BTC.dtype), patches_BTC], dim=1)
        tokens_BTC = self.ln_pre(tokens_BTC + self.positional_embedding)
        tokens_BTC = self.transformer(tokens_BTC)
        features_BD: Tensor = self.ln_post(tokens_BTC[:, 0]) @ self.proj
        return features_BD


class TextTransformer(nn.Module):
    """CLIP's text transformer, with a bias in its projection as upstream has it.

    Args:
        vocab_size: number of tokens.
        context_length: longest row of tokens.
        width: C.
        layers: blocks.
        heads: H.
        embed_dim: D, features of a text.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers, heads, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, embed_dim)
        nn.init.normal_(self.text_projection.weight, std=1 / math.sqrt(width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token numbers (B, T), T at most the context's length, to words (B, T, C)."""
        words_BTC = self.token_embedding(tokens_BT)
        words_BTC = words_BTC + self.positional_embedding[: tokens_BT.shape[1]]
        result: Tensor = self.ln_final(self.transformer(words_BTC))
        return result

    def project(self, words_BTC: Tensor, ends_B: Tensor) -> Tensor:
        """Features (B, D) of texts: the word at each end token, projected."""
        features_BD: Tensor = self.text_projection(select_words(words_BTC, None, ends_B))
        return features_BD


def select_words(words_BTC: Tensor, rows_N: Tensor | None, columns_N: Tensor) -> Tensor:
    """The words (N, C) at rows and columns; without rows, of each row one."""
    batch, length, _ = words_BTC.shape
    if rows_N is None:
        rows_N = torch.arange(batch, device=words_BTC.device)
    return words_BTC.flatten(0, 1).index_select(0, rows_N * length + columns_N)
