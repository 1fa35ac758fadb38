"""WordNet's synonyms and the stop words, read by nltk. No torch here.

nltk takes 0.7 s to import, so this module is imported where synonyms are wanted only.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

from nltk import data as nltk_data
from nltk.corpus.reader import CorpusReader, WordListCorpusReader, WordNetCorpusReader
from nltk.corpus.reader.wordnet import WordNetError
from nltk.corpus.util import LazyCorpusLoader

from zoo_common.errors import UserError

_NEEDED = ("wordnet/data.noun", "wordnet/index.noun", "wordnet/lexnames", "stopwords/english")
_TO_DO = (
    "run python -m nltk.downloader wordnet stopwords, or, on a machine without a network, copy "
    "corpora/wordnet and corpora/stopwords from another one's nltk_data to ~/nltk_data, or go on "
    "without synonyms by text.synonyms=false."
)
# Words whose synonyms are kept: a third of those that WordNet has alone, 10 MB at the most.
_MAX_CACHED = 1 << 14
_MAX_CACHED_LENGTH = 32
# What nltk ends with at files that are damaged.
_UNREADABLE = (WordNetError, OSError, ValueError, AssertionError, LookupError, StopIteration)
_no_letter = re.compile(r"[^a-z ]+")


def check() -> None:
    """Checks that the corpora are there, without reading them.

    Raises:
        UserError: One is not, or nltk refuses to read it.
    """
    for name in _NEEDED:
        _find(name)


class Synonyms:
    """What other words WordNet has for a word.

    The files are held in memory (WordNet's index and data: 160 MB). Processes that are forked
    afterwards share them, and none shares an open file with another, whose position they would
    move under each other's hands.

    Attributes:
        stop_words: nltk's English ones, which are never replaced.
    """

    def __init__(self) -> None:
        """Reads the corpora; takes 2 s.

        Raises:
            UserError: One is absent or damaged.
        """
        check()
        self._root = _find("wordnet/")
        # nltk's own loader hands the reader of other languages over like this; none is used.
        others = LazyCorpusLoader("omw-1.4", CorpusReader, r".*/wn-data-.*\.tab")
        try:
            self._wordnet = _WordNetInMemory(self._root, others)
            firsts = [next(iter(self._wordnet.all_lemma_names(kind))) for kind in "nvar"]
            stop_words = WordListCorpusReader(_find("stopwords/"), ["english"]).words()
        except _UNREADABLE as error:
            raise self._damaged(error) from error
        self.stop_words = frozenset(stop_words)
        self._cached: dict[str, Sequence[str]] = {}
        for word in firsts:
            self.read(word)

    def of(self, word: str) -> Sequence[str]:
        """The synonyms of a word by alphabet: lower case, a to z and blanks only.

        Forms of a word have their base form's. The word itself is left out, if it is in lower
        case. One that has no letters is empty, as with textaugment.
        """
        found = self._cached.get(word)
        if found is None:
            found = self.read(word)
            if len(word) <= _MAX_CACHED_LENGTH:
                if len(self._cached) >= _MAX_CACHED:
                    self._cached.clear()
                self._cached[word] = found
        return found

    def read(self, word: str) -> Sequence[str]:
        """The same, without the cache.

        Raises:
            UserError: WordNet's files do not belong together.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                synsets = self._wordnet.synsets(word)
            except _UNREADABLE as error:
                raise self._damaged(error) from error
        if caught:  # there is no synset where the index says
            raise self._damaged(caught[0].message)
        names = {lemma.name() for synset in synsets for lemma in synset.lemmas()}
        self._wordnet.forget()
        return sorted({_clean(name) for name in names} - {word})

    def _damaged(self, reason: object) -> UserError:
        return UserError(
            f"nltk cannot read {self._root}, it is damaged or was changed ({str(reason)[:200]!r}); "
            f"remove it and {_TO_DO}"
        )


class _WordNetInMemory(WordNetCorpusReader):  # type: ignore[misc]
    """nltk's reader of WordNet, without open files and without a cache that grows."""

    def open(self, file: str) -> io.TextIOWrapper:
        """A stream over the file's content."""
        with self.abspath(file).open() as stream:
            return io.TextIOWrapper(io.BytesIO(stream.read()), self._ENCODING)

    def forget(self) -> None:
        """Drops the synsets that were read."""
        self._synset_offset_cache.clear()


def _clean(name: str) -> str:
    """A lemma's name as words."""
    return _no_letter.sub("", name.replace("_", " ").replace("-", " ").lower())


def _find(name: str) -> Any:
    """Where nltk has a part of a corpus; a folder's name ends with a slash."""
    corpus = name.partition("/")[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for form in (f"corpora/{name}", f"corpora/{corpus}.zip/{name}"):
            try:
                return nltk_data.find(form)
            except LookupError:
                continue
    if caught:  # it is there, and others may write to it
        reason = str(caught[0].message).rstrip(".")
        raise UserError(f"nltk refuses its corpus {corpus}: {reason}.")
    raise UserError(
        f"EDA's synonyms need nltk's corpora wordnet and stopwords, and {name} is in none of "
        f"{', '.join(nltk_data.path)}; {_TO_DO}"
    )
