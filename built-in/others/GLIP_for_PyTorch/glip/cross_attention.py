"""The core of the fusion: cells read words, and words read cells, by one matrix of scores.

Upstream (see ``glip.fusion``) projects each cell to queries and to values, both of the fusion's
inner width. What is multiplied with words later may as well be multiplied with their side of it
first, of which there is far less: a score is ``cell . (W' key)`` in place of ``(W cell) . key``,
and what words read is ``W (share . cell)`` in place of ``share . (W cell)``. So there are no
queries and values of cells, with half of the arithmetic; sums differ in their order alone.

On a CPU in full precision the heads are computed one after the other, in memory that the caches
hold, and the backward pass makes the shares anew. Everywhere else, and under autocast, the same is
a few operators over all heads.

Shape letters: B images, N cells of all levels, H heads, T tokens, V channels of a cell.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo_common.detection import ops

LIMIT = 50_000.0
"""Largest score: a number that float16 holds."""

_DRAWS = 1 << 16  # of a random number of 16 bits


class WordSide(NamedTuple):
    """What cells are multiplied with, from the words.

    Attributes:
        keys_BHTV: scores are products of these with cells, and
        bias_BHT: these.
        values_BHTV: what cells read.
        mask_BT: True for tokens, False for padding, which cells do not read.
    """

    keys_BHTV: Tensor
    bias_BHT: Tensor
    values_BHTV: Tensor
    mask_BT: Tensor


def read_both_ways(
    cells_BNV: Tensor, words: WordSide, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in both directions.

    Args:
        cells_BNV: of all levels.
        words: keys and values.
        dropout: share of the shares that is dropped in each direction.

    Returns:
        What cells read (B, N, V), summed over heads; what words read of the cells (B, H, T, V);
        and the sum of their shares (B, H, T), which dropout alone makes other than 1.
    """
    own = ops.implementation_of(cells_BNV.device) == "cpu"
    if own and not torch.is_autocast_enabled("cpu"):
        read: tuple[Tensor, Tensor, Tensor] = _HeadByHead.apply(cells_BNV, *words, dropout)
        return read
    return read_at_once(cells_BNV, words, dropout)


def read_at_once(
    cells_BNV: Tensor, words: WordSide, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`read_both_ways`, in operators over all heads, on any device."""
    keys_BHTV, bias_BHT, values_BHTV, mask_BT = words
    scores_BNX = cells_BNV @ keys_BHTV.flatten(1, 2).transpose(1, 2)
    scores_BNHT = scores_BNX.unflatten(2, bias_BHT.shape[1:]) + bias_BHT[:, None]
    scores_BNHT = scores_BNHT.clamp(-LIMIT, LIMIT)
    to_cells_BNHT = scores_BNHT.masked_fill(~mask_BT[:, None, None], -math.inf).softmax(dim=3)
    to_words_BNHT = scores_BNHT.softmax(dim=1)
    if dropout:
        to_cells_BNHT = torch.dropout(to_cells_BNHT, dropout, True)
        to_words_BNHT = torch.dropout(to_words_BNHT, dropout, True)
    read_BNV = to_cells_BNHT.flatten(2) @ values_BHTV.flatten(1, 2)
    read_BXV = to_words_BNHT.flatten(2).transpose(1, 2) @ cells_BNV
    return read_BNV, read_BXV.unflatten(1, bias_BHT.shape[1:]), to_words_BNHT.sum(dim=1)


class _HeadByHead(torch.autograd.Function):
    """Keeps scores, and which shares were not dropped; the shares are made anew."""

    @staticmethod
    def forward(
        ctx: Any,
        cells_BNV: Tensor,
        keys_BHTV: Tensor,
        bias_BHT: Tensor,
        values_BHTV: Tensor,
        mask_BT: Tensor,
        dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.factor = _factor(dropout)
        ctx.limited = False
        needed = any(ctx.needs_input_grad)
        read_BNV = torch.zeros_like(cells_BNV)
        read_BHTV, sums_BHT = torch.empty_like(keys_BHTV), torch.empty_like(bias_BHT)
        scores, kept = [], []  # of each head
        for at in itertools.product(*map(range, keys_BHTV.shape[:2])):
            cells_NV = cells_BNV[at[0]]
            scores_NT = torch.addmm(bias_BHT[at], cells_NV, keys_BHTV[at].t())
            # A pass through memory that only reads takes less time than one that writes.
            if max(map(abs, torch.stack(scores_NT.aminmax()).tolist())) >= LIMIT:
                scores_NT.clamp_(-LIMIT, LIMIT)
                ctx.limited = True
            shares_2NT = _shares(scores_NT, mask_BT[at[0]])
            if dropout:
                kept_2NT = _draw((2, *scores_NT.shape), dropout)
                _drop(shares_2NT, kept_2NT)
                kept.append(kept_2NT)
            read_BNV[at[0]].addmm_(shares_2NT[0], values_BHTV[at], alpha=ctx.factor)
            torch.mm(shares_2NT[1].t(), cells_NV, out=read_BHTV[at])
            torch.sum(shares_2NT[1], dim=0, out=sums_BHT[at])
            if needed:
                scores.append(scores_NT)
        ctx.save_for_backward(cells_BNV, keys_BHTV, values_BHTV, mask_BT, *scores, *kept)
        return read_BNV, read_BHTV.mul_(ctx.factor), sums_BHT.mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient_BNV: Tensor, gradient_BHTV: Tensor, gradient_BHT: Tensor
    ) -> tuple[Tensor | None, ...]:
        cells_BNV, keys_BHTV, values_BHTV, mask_BT, *rest = ctx.saved_tensors
        number = len(keys_BHTV.flatten(0, 1))
        scores, kept = rest[:number], rest[number:]
        cells_gradient = torch.zeros_like(cells_BNV)
        keys_gradient, values_gradient = torch.empty_like(keys_BHTV), torch.empty_like(values_BHTV)
        bias_gradient = torch.empty_like(gradient_BHT)
        values_BHTV = values_BHTV * ctx.factor
        gradient_BHTV, gradient_BHT = gradient_BHTV * ctx.factor, gradient_BHT * ctx.factor
        for head, at in enumerate(itertools.product(*map(range, keys_BHTV.shape[:2]))):
            cells_NV, gradient_NV, scores_NT = cells_BNV[at[0]], gradient_BNV[at[0]], scores[head]
            shares_2NT = _shares(scores_NT, mask_BT[at[0]])
            slopes_2NT = (
                gradient_NV @ values_BHTV[at].t(),
                torch.addmm(gradient_BHT[at], cells_NV, gradient_BHTV[at].t()),
            )
            if kept:
                _drop(slopes_2NT, kept[head])
            slope_NT = _through_softmax(slopes_2NT[0], shares_2NT[0], 1)
            slope_NT += _through_softmax(slopes_2NT[1], shares_2NT[1], 0)
            if ctx.limited:
                slope_NT.masked_fill_(scores_NT.abs() >= LIMIT, 0)
            if kept:
                _drop(shares_2NT, kept[head])
            torch.mm(shares_2NT[0].t(), gradient_NV, out=values_gradient[at])
            cells_gradient[at[0]].addmm_(shares_2NT[1], gradient_BHTV[at])
            cells_gradient[at[0]].addmm_(slope_NT, keys_BHTV[at])
            torch.mm(slope_NT.t(), cells_NV, out=keys_gradient[at])
            torch.sum(slope_NT, dim=0, out=bias_gradient[at])
        values_gradient *= ctx.factor
        return cells_gradient, keys_gradient, bias_gradient, values_gradient, None, None


def _shares(scores_NT: Tensor, seen_T: Tensor) -> tuple[Tensor, Tensor]:
    """By rows for the cells, which do not see padding, and by columns for the words."""
    unseen_T = torch.where(seen_T, 0.0, -math.inf).to(scores_NT.dtype)
    return (scores_NT + unseen_T).softmax(dim=1), scores_NT.softmax(dim=0)


def _through_softmax(gradient_NT: Tensor, shares_NT: Tensor, dim: int) -> Tensor:
    slope_NT: Tensor = torch._softmax_backward_data(gradient_NT, shares_NT, dim, shares_NT.dtype)
    return slope_NT


def _drop(tensors_2NT: tuple[Tensor, Tensor], kept_2NT: Tensor) -> None:
    for tensor_NT, kept_NT in zip(tensors_2NT, kept_2NT, strict=True):
        tensor_NT *= kept_NT


def _factor(dropout: float) -> float:
    """What makes up for what is dropped, as often as :func:`_draw` really drops."""
    return 1 / (1 - round(dropout * _DRAWS) / _DRAWS)


def _draw(shape: tuple[int, int, int], dropout: float) -> Tensor:
    """uint8: 0 for what is dropped, else 1.

    Of each random number of 64 bits four are made, in a third of the time of ``bernoulli_``.
    """
    count = math.prod(shape)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None)
    kept = drawn.view(torch.int16)[:count] >= round(dropout * _DRAWS) - _DRAWS // 2
    return kept.view(torch.uint8).view(shape)
