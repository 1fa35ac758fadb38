"""Easy data augmentation (EDA) of captions. No torch here.

Paper: Wei and Zou 2019, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text
Classification Tasks". DeCLIP calls the package textaugment (MIT); this follows version 3.0.0's
``eda.py`` to the draw: the same seed gives the same text. What differs:

- textaugment seeds Python's generator with 1 and asks a server for the corpora whenever it is made.
- Its versions before 2 gave a list for a caption of one word, of which upstream says "there is a
  bug". Here the result is a text, and always has a word: a caption whose only word got a synonym
  without letters (WordNet's for "two" are "2", "deuce" and "II") stays as it is.
- A caption of white space stays as it is, where textaugment ends with a TypeError.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from declip.synonyms import Synonyms

DELETION_PROBABILITY = 0.1


def check_synonyms() -> None:
    """Checks that nltk's corpora are there, without reading them; takes as long as nltk's import.

    Raises:
        UserError: One is not there; the message says what to do.
    """
    from declip import synonyms

    synonyms.check()


class Eda:
    """Gives a caption back with a change, drawn from Python's ``random``.

    One of three, each with the same probability: a word is replaced by a synonym, two words change
    places, or each word is left out with a probability of 0.1. Words are what stands between
    blanks, with their punctuation; a stop word is none that is replaced, unless it has a capital
    or punctuation; a word that is replaced is replaced everywhere. Blanks come out as single ones.

    Made in a process before it forks its workers, it shares WordNet with them; pickled, it reads
    it again.
    """

    def __init__(self, synonyms: bool = True) -> None:
        """Reads WordNet, for synonyms.

        Args:
            synonyms: False: words only change places or are left out, and no nltk is needed.

        Raises:
            UserError: nltk's corpora are absent or damaged; the message says what to do.
        """
        self._synonyms: Synonyms | None = None
        self._ways = [self._swap, self._delete]
        if synonyms:
            from declip.synonyms import Synonyms

            self._synonyms = Synonyms()
            self._ways.insert(0, self._replace)

    def __reduce__(self) -> tuple[type[Eda], tuple[bool]]:
        """Pickles the setting only."""
        return Eda, (self._synonyms is not None,)

    def __call__(self, caption: str) -> str:
        """The caption's augmented form."""
        words = caption.split()
        if not words:
            return caption
        changed = " ".join(random.choice(self._ways)(words))
        return changed if changed.strip() else caption

    def _replace(self, words: list[str]) -> list[str]:
        """One word, drawn from those that WordNet knows, becomes a synonym of it."""
        assert self._synonyms is not None
        candidates = sorted(set(words) - self._synonyms.stop_words)
        random.shuffle(candidates)
        for candidate in candidates:
            if known := list(self._synonyms.of(candidate)):
                random.shuffle(known)  # which changes nothing, but textaugment draws twice
                synonym = random.choice(known)
                return [synonym if word == candidate else word for word in words]
        return words

    def _swap(self, words: list[str]) -> list[str]:
        """Two words change places, if one of three draws gives a second place."""
        first = random.randint(0, len(words) - 1)
        for _ in range(3):
            second = random.randint(0, len(words) - 1)
            if second != first:
                words[first], words[second] = words[second], words[first]
                break
        return words

    def _delete(self, words: list[str]) -> list[str]:
        """Each word but a single one is left out with a probability of 0.1, never all."""
        if len(words) == 1:
            return words
        kept = [word for word in words if random.uniform(0, 1) > DELETION_PROBABILITY]
        return kept or [random.choice(words)]
