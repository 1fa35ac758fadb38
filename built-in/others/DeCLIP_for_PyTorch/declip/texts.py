"""Captions as the rows of tokens that the model reads, with words masked.

Shape letters: U token rows of a caption, B captions, T tokens of a row, M slots for masked tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.batch import Masked
from declip.eda import Eda
from declip.tokenizer import Tokenizer

EMPTY_SLOT = -100  # the label that a loss leaves out
_MULTIPLE = 8  # lengths that change are rounded up to one of it


class ItemText(NamedTuple):
    """A caption's rows.

    Attributes:
        rows: U rows of ids, each from the start token to the end token: the caption, then its
            augmented form, then its masked form, as far as ``Texts`` was asked for them. With
            ``contrast_masked`` the first row is the masked one.
        ends: where each row's end token stands: the first one, as upstream, if the caption has one
            of its own; one that was drawn for the masked row does not count.
        columns: where ids of the masked row were chosen, from left to right.
        labels: the ids that stood there.
    """

    rows: tuple[list[int], ...]
    ends: tuple[int, ...]
    columns: list[int]
    labels: list[int]


class Texts:
    """Makes the token rows of a caption, and of a batch of captions."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_length: int,
        eda: Eda | None,
        mask_probability: float,
        contrast_masked: bool,
    ) -> None:
        """Remembers what rows a caption has.

        Args:
            tokenizer: makes the ids.
            context_length: the most tokens of a row.
            eda: augments captions; None: there is no augmented row.
            mask_probability: of each token that is not special to be chosen for masked language
                modelling; 0: no masked row.
            contrast_masked: the masked row stands in place of the caption's own, as upstream.
        """
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._eda = eda
        self._mask_probability = mask_probability
        self._masked_at = 0 if contrast_masked else -1

    def __call__(self, caption: str) -> ItemText:
        """A caption's rows; draws from Python's ``random``, which the caller seeds."""
        rows = [self._tokenizer.row(caption, self._context_length)]
        if self._eda is not None:
            rows.append(self._tokenizer.row(self._eda(caption), self._context_length))
        ends = [row.index(self._tokenizer.end_id) for row in rows]
        columns: list[int] = []
        labels: list[int] = []
        if self._mask_probability:
            masked, columns, labels = self._mask(rows[0])
            if self._masked_at == 0:
                rows[0] = masked
            else:
                rows.append(masked)
                ends.append(ends[0])
        return ItemText(tuple(rows), tuple(ends), columns, labels)

    def _mask(self, row: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Chooses tokens for masked language modelling and changes most of them.

        Each token but start, end and mask tokens is chosen with the same probability. Of the
        chosen ones 80 % become the mask token, 10 % any token of the vocabulary, special ones
        too, and 10 % stay as they are; as upstream's ``text_utils/mask_tokens.py``.

        Returns:
            The masked row; the columns of the chosen tokens; the tokens that stood there.
        """
        first_special = self._tokenizer.mask_id
        masked = list(row)
        columns = [
            column
            for column, token in enumerate(row)
            if token < first_special and random.random() < self._mask_probability
        ]
        for column in columns:
            draw = random.random()
            if draw < 0.8:
                masked[column] = self._tokenizer.mask_id
            elif draw < 0.9:
                masked[column] = random.randrange(self._tokenizer.vocab_size)
        return masked, columns, [row[column] for column in columns]

    def slots(self, captions: int) -> int:
        """How many slots for masked tokens a batch of fixed shape has.

        Each of the n = ``captions`` * (``context_length`` - 2) places holds a chosen token with a
        probability of at most p, so their number has a mean of at most n * p and, as long as that
        is below n / 2, a standard deviation of at most sqrt(n * p * (1 - p)). The slots are the
        mean and six deviations, rounded up to a multiple of 8, n at the most: full captions need
        more once in 10^9 batches. Tokens without a slot stay unmasked.
        """
        places = captions * (self._context_length - 2)
        mean = places * self._mask_probability
        deviation = math.sqrt(mean * (1 - self._mask_probability))
        return _round_up(min(math.ceil(mean + 6 * deviation), places))

    def collate(
        self, items: Sequence[ItemText], static: bool
    ) -> tuple[Tensor, Tensor, Masked | None]:
        """Puts captions together.

        Args:
            items: B captions, by this object.
            static: give all batches of B captions the same shapes: rows of ``context_length``
                tokens and ``slots(B)`` slots. Otherwise rows are as long as the longest one and
                slots as many as chosen tokens, both rounded up to a multiple of 8.

        Returns:
            tokens_UBT: int64; zeros behind the end token.
            ends_UB: int64, where the end token stands.
            masked: M slots, or None without masked language modelling.
        """
        longest = max(len(row) for item in items for row in item.rows)
        length = self._context_length if static else min(_round_up(longest), self._context_length)
        tokens_UBT = np.zeros((len(items[0].rows), len(items), length), np.int64)
        for b, item in enumerate(items):
            for u, row in enumerate(item.rows):
                tokens_UBT[u, b, : len(row)] = row
        ends_UB = np.array([item.ends for item in items]).T.copy()
        masked = self._fill_slots(items, tokens_UBT, static) if self._mask_probability else None
        return torch.from_numpy(tokens_UBT), torch.from_numpy(ends_UB), masked

    def _fill_slots(
        self, items: Sequence[ItemText], tokens_UBT: np.ndarray, static: bool
    ) -> Masked:
        """The slots of a batch; unmasks, in its tokens, what finds none."""
        u = self._masked_at % len(tokens_UBT)
        chosen = [
            (b, column, label)
            for b, item in enumerate(items)
            for column, label in zip(item.columns, item.labels, strict=True)
        ]
        slots = self.slots(len(items)) if static else _round_up(len(chosen))
        for b, column, label in chosen[slots:]:
            tokens_UBT[u, b, column] = label
        filled = np.array(chosen[:slots], np.int64).reshape(-1, 3)
        slots_M3 = np.tile(np.array((0, 0, EMPTY_SLOT), np.int64), (slots, 1))
        slots_M3[: len(filled)] = filled + np.array((u * len(items), 0, 0))
        return Masked(*(torch.from_numpy(column) for column in slots_M3.T.copy()))


def _round_up(number: int) -> int:
    """The next multiple of 8, at least 8."""
    return max(-(-number // _MULTIPLE), 1) * _MULTIPLE
