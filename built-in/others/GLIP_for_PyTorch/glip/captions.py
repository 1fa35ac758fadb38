"""Captions: the words that are looked for, which characters and which tokens mean what.

Class names become "person. traffic light. dog"; tokens are BERT's. Follows
https://github.com/microsoft/GLIP (MIT) at 9dda955: maskrcnn_benchmark/engine/inference.py and
data/datasets/{od_to_grounding,modulated_coco}.py.

Shape letters: B captions, N classes or phrases, T tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from glip.bert import find_bert, read_config, vocabulary_error
from zoo_common.errors import UserError, first_line

SEPARATOR = ". "
_SPECIAL_TOKENS = 2  # [CLS] and [SEP]
_SHOWN = 60

Span = tuple[int, int]
"""The first character and the one after the last."""


class Text(NamedTuple):
    """Captions as numbers.

    Attributes:
        tokens_BT: int64, filled up with the tokenizer's padding.
        mask_BT: bool, False for padding.
    """

    tokens_BT: Tensor
    mask_BT: Tensor


class Caption(NamedTuple):
    """What is looked for in an image.

    Attributes:
        text: the words.
        spans: where in ``text`` each class or phrase is; one that is not there has no span.
    """

    text: str
    spans: Sequence[Sequence[Span]]


class Query(NamedTuple):
    """A caption of classes as evaluation asks for them.

    Attributes:
        labels: the class numbers.
        caption: their words.
        text: the same as one row of numbers.
        map_NT: bool, the tokens of each of them.
    """

    labels: list[int]
    caption: Caption
    text: Text
    map_NT: Tensor


def clean_name(name: str) -> str:
    """A class name as words: what is in brackets goes, and so do underscores."""
    return re.sub(r"\(.*\)", "", name).replace("_", " ").replace("  ", " ")


def caption_of(names: Sequence[str], order: Sequence[int] | None = None) -> Caption:
    """The caption of classes.

    Args:
        names: of the classes.
        order: the numbers of those in the caption, in the order in which they stand there; None
            for all as they are.
    """
    spans: list[list[Span]] = [[] for _ in names]
    text = ""
    for number in range(len(names)) if order is None else order:
        text += SEPARATOR if text else ""
        words = clean_name(names[number])
        spans[number] = [(len(text), len(text) + len(words))]
        text += words
    return Caption(text, spans)


def check_names(names: Sequence[str]) -> None:
    """Tells class names that cannot be looked for.

    Raises:
        UserError: there is none, one says nothing, or one occurs twice.
    """
    if not names:
        raise UserError("There are no classes to look for; give one at least.")
    seen: dict[str, int] = {}
    for number, name in enumerate(names):
        if not clean_name(name).strip():
            raise UserError(f"Class {number} has no words ({name!r}); give it a name.")
        twin = seen.setdefault(name.strip().casefold(), number)
        if twin != number:
            raise UserError(
                f"The class name {name!r} occurs twice (classes {twin} and {number}), so that "
                "nothing tells them apart; rename one or make them one class."
            )


class TextEncoder:
    """Makes tokens of captions, in a fixed number.

    Args:
        directory: BERT's, with ``config.json`` and ``vocab.txt`` or ``tokenizer.json``.
        max_tokens: tokens of a caption, T.

    Raises:
        UserError: the files are not there, contradict each other, or have fewer positions.
    """

    def __init__(self, directory: Path, max_tokens: int) -> None:
        settings = read_config(find_bert(str(directory), ""))
        positions = settings.get("max_position_embeddings", 512)
        if max_tokens > positions:
            raise UserError(
                f"model.max_tokens={max_tokens} is more than the {positions} positions of the "
                f"BERT in {directory}; give no more."
            )
        try:
            loaded: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"model.bert: the tokenizer in {directory} cannot be read "
                f"({first_line(error)}); put bert-base-uncased's vocab.txt there."
            ) from error
        # The library's own object: it starts no threads for one caption, so that loaders may fork.
        self._tokenizer = loaded.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._padding = int(loaded.pad_token_id)
        self.max_tokens = max_tokens
        words = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if words > settings["vocab_size"]:
            raise vocabulary_error(directory, words, settings["vocab_size"])

    def __call__(self, texts: Iterable[str]) -> Text:
        """Captions as numbers, (B, T).

        Raises:
            UserError: one is empty or has too many tokens.
        """
        rows = [self._encode(text).ids for text in texts]
        tokens_BT = torch.full((len(rows), self.max_tokens), self._padding)
        mask_BT = torch.zeros(len(rows), self.max_tokens, dtype=torch.bool)
        for row, numbers in enumerate(rows):
            tokens_BT[row, : len(numbers)] = torch.tensor(numbers)
            mask_BT[row, : len(numbers)] = True
        return Text(tokens_BT, mask_BT)

    def token_map(self, caption: Caption) -> Tensor:
        """Which tokens mean each class or phrase, bool (N, T).

        A span that begins or ends with a character of no token, such as a space, is shortened by
        up to two of them.

        Raises:
            UserError: as :meth:`__call__`.
        """
        encoded = self._encode(caption.text)
        map_NT = torch.zeros(len(caption.spans), self.max_tokens, dtype=torch.bool)
        for number, spans in enumerate(caption.spans):
            for begin, end in spans:
                first = _first_token(encoded, (begin, begin + 1, begin + 2))
                last = _first_token(encoded, (end - 1, end - 2, end - 3))
                if first is not None and last is not None:
                    map_NT[number, first : last + 1] = True
        return map_NT

    def count(self, text: str) -> int:
        """Tokens of a text, [CLS] and [SEP] included."""
        return len(self._tokenizer.encode(text).ids)

    def fits(self, text: str) -> bool:
        """Whether a text has no more than ``max_tokens``."""
        # No token is empty, so that a short text need not be looked at.
        return len(text) + _SPECIAL_TOKENS <= self.max_tokens or self.count(text) <= self.max_tokens

    def cost(self, name: str) -> int:
        """Tokens of a class name with a separator behind it."""
        return self.count(clean_name(name) + SEPARATOR) - _SPECIAL_TOKENS

    def chunks(self, names: Sequence[str], per_chunk: int = 0) -> list[list[int]]:
        """Class numbers by caption, so that each caption fits.

        Args:
            names: of the classes.
            per_chunk: classes of a caption; 0 for as many as fit.

        Raises:
            UserError: names that cannot be looked for, or more of them than fit.
        """
        check_names(names)
        if per_chunk:
            numbers = list(range(len(names)))
            return [numbers[i : i + per_chunk] for i in range(0, len(names), per_chunk)]
        chunks: list[list[int]] = [[]]
        for number in range(len(names)):
            grown = [*chunks[-1], number]
            if chunks[-1] and not self.fits(caption_of(names, grown).text):
                grown = [number]
                chunks.append(grown)
            chunks[-1] = grown
        return chunks

    def queries(self, names: Sequence[str], per_chunk: int = 0) -> list[Query]:
        """What evaluation asks for: all classes, in one caption or several.

        Args:
            names: of the classes.
            per_chunk: classes of a caption; 0 for as many as fit.

        Raises:
            UserError: as :meth:`chunks`, and a class name that has no token.
        """
        found = []
        for labels in self.chunks(names, per_chunk):
            caption = caption_of([names[label] for label in labels])
            map_NT = self.token_map(caption)
            for label, tokens_T in zip(labels, map_NT, strict=True):
                if not tokens_T.any():
                    raise UserError(
                        f"The class name {names[label]!r} has no token in BERT's vocabulary; "
                        "give another."
                    )
            found.append(Query(labels, caption, self([caption.text]), map_NT))
        return found

    def _encode(self, text: str) -> Any:
        if not text.strip():
            raise UserError("A caption is empty; give words to look for.")
        encoded = self._tokenizer.encode(text)
        if len(encoded.ids) > self.max_tokens:
            shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
            raise UserError(
                f"The caption {shown!r} has {len(encoded.ids)} tokens, more than the "
                f"{self.max_tokens} of model.max_tokens; give fewer words at once."
            )
        return encoded


def _first_token(encoded: Any, characters: Iterable[int]) -> int | None:
    """The token of the first of these characters that has one."""
    for character in characters:
        token: int | None = encoded.char_to_token(character) if character >= 0 else None
        if token is not None:
            return token
    return None


@dataclass(frozen=True)
class ClassCaptions:
    """Captions of images whose objects have classes, for training.

    Attributes:
        names: of the classes.
        encoder: which knows how much fits.
        shuffle: whether classes stand in another order each time.
        negatives: classes beside those of the image that may be in its caption; -1 for all, as
            upstream has it for COCO. Otherwise as its ``SPECIAL_SAFEGUARD_FOR_COCO_GROUNDING``
            does: those that still fit of so many drawn ones, in any order; of an image with more
            classes than fit some are left out.

    Raises:
        UserError: names that cannot be looked for, or more of them than fit.
    """

    names: Sequence[str]
    encoder: TextEncoder
    shuffle: bool = True
    negatives: int = -1

    def __post_init__(self) -> None:
        queries = self.encoder.queries(self.names)
        if self.negatives < 0 and len(queries) > 1:
            text = caption_of(self.names).text
            raise UserError(
                f"The caption of all {len(self.names)} classes has {self.encoder.count(text)} "
                f"tokens, more than the {self.encoder.max_tokens} of model.max_tokens; give "
                "data.negatives=85, for example, which leaves classes out at random."
            )

    def draw(self, labels: Iterable[int], dice: random.Random) -> Caption:
        """The caption of an image.

        Args:
            labels: classes of its objects.
            dice: decides order and choice.
        """
        if self.negatives < 0:
            order = list(range(len(self.names)))
            if self.shuffle:
                dice.shuffle(order)
            return caption_of(self.names, order)
        room = self.encoder.max_tokens - _SPECIAL_TOKENS
        positives = sorted(set(labels))
        dice.shuffle(positives)
        drawn = dice.sample(range(len(self.names)), min(self.negatives, len(self.names)))
        others = [number for number in drawn if number not in set(positives)]
        kept: list[int] = []
        # Upstream keeps a token free behind those that are not there.
        for numbers, spare in ((positives, 0), (others, 1)):
            for number in numbers:
                room -= self.encoder.cost(self.names[number])
                if room < spare:
                    break
                kept.append(number)
        dice.shuffle(kept)
        return caption_of(self.names, kept or [dice.randrange(len(self.names))])
