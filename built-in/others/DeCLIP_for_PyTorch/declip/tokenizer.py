"""CLIP's byte-pair encoding with DeCLIP's mask token. No torch here.

Gives the ids of upstream's ``SimpleTokenizer`` for every text:
``prototype/model/utils/text_utils/simple_tokenizer.py`` of Sense-GVT/DeCLIP at 9d9e25d, Apache-2.0,
which is openai/CLIP's with one more token. The rate comes from three facts:

- ftfy and html change nothing in a text of printable ASCII, tabs and line ends without ``&``, so it
  is not shown to them. All other texts are.
- No token spans white space and no rule looks beyond a match. So what stands between two blanks has
  the same ids in every text, and is looked up in one piece.
- Ids are merged, where upstream joins and splits strings.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import re
import zlib
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

import ftfy
import regex

from zoo_common.errors import UserError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
MAX_MERGES = 49152 - 256 - 2  # so many of the file's 262,144 are upstream's
_FULL_HEADER = '"bpe_simple_vocab_16e6.txt#version'

# Bounds of the memory: about 15 MB when full of words that occur once.
_MAX_CACHED = 1 << 16
_MAX_CACHED_LENGTH = 32

_is_plain = re.compile(r"[\t\n\r -%'-~]*").fullmatch  # "&" starts an entity of html
_between_blanks = regex.compile(r"\S+").findall
_words = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
).findall


class Tokenizer:
    """Turns texts into token ids.

    The ids: 256 bytes, 256 bytes that end a word, the merges in the order of the file, then the
    mask token, the start token and the end token. CLIP itself has no mask token, so its start and
    end token are one lower.

    Pickled, it is its file's name: a process that it is sent to reads the file again (0.1 s).

    Attributes:
        vocab_size: 512 + merges + 3; 49,409 with CLIP's file.
        mask_id: the mask token's id.
        start_id: the start token's id.
        end_id: the end token's id.
    """

    def __init__(self, vocabulary: Path) -> None:
        """Reads the merges.

        Args:
            vocabulary: ``bpe_simple_vocab_16e6.txt.gz``, or a gzip file of that form with fewer
                merges: a header that says ``#version``, then a merge a line.

        Raises:
            UserError: The file is absent, damaged or of another form.
        """
        self._path = Path(vocabulary).absolute()
        self._ranks, self._merged_ids = _read_merges(self._path)
        self.mask_id = 512 + len(self._merged_ids)
        self.start_id = self.mask_id + 1
        self.end_id = self.mask_id + 2
        self.vocab_size = self.mask_id + 3
        self._byte_ids = {byte: index for index, byte in enumerate(_byte_order())}
        self._special = {"<|startoftext|>": self.start_id, "<|endoftext|>": self.end_id}
        self._cached: dict[str, Sequence[int]] = {}

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        """Pickles the file's name only."""
        return Tokenizer, (self._path,)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """The ids of a text, without start and end token.

        The words ``<|startoftext|>`` and ``<|endoftext|>`` in it give the special tokens, as
        upstream; ``<|mask|>`` is text like any other.

        Args:
            text: any text.
            limit: return the first so many only; None: all.
        """
        if _is_plain(text):
            # Each piece has an id at least, so pieces behind the limit need not be parted.
            pieces = text.lower().split(None, -1 if limit is None else limit)[:limit]
        else:
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
            pieces = _between_blanks(text.strip().lower())
        ids: list[int] = []
        cached = self._cached
        for piece in pieces:
            found = cached.get(piece)
            ids += self._look_up(piece) if found is None else found
        return ids[:limit]

    def row(self, text: str, context_length: int) -> list[int]:
        """The ids of a text between start and end token, cut as upstream's ``tokenize`` cuts.

        Args:
            text: any text.
            context_length: the most ids that the row may have, at least 2. Of a longer text the
                last tokens are left out; the end token stays.
        """
        return [self.start_id, *self.encode(text, context_length - 2), self.end_id]

    def _look_up(self, piece: str) -> Sequence[int]:
        """The ids of text without white space."""
        found = self._cached.get(piece)
        if found is not None:
            return found
        words = _words(piece)
        if words == [piece]:
            found = self._merge(piece)
        else:
            found = tuple(chain.from_iterable(map(self._look_up, words)))
        if len(piece) <= _MAX_CACHED_LENGTH:
            if len(self._cached) >= _MAX_CACHED:
                self._cached.clear()
            self._cached[piece] = found
        return found

    def _merge(self, word: str) -> Sequence[int]:
        """The ids of one word: the merge that is first in the file, everywhere, again and again."""
        if word in self._special:
            return (self._special[word],)
        ids = [self._byte_ids[byte] for byte in word.encode()]
        ids[-1] += 256
        ranks, none = self._ranks, len(self._merged_ids)
        while True:
            first = min((ranks.get(pair, none) for pair in pairwise(ids)), default=none)
            if first == none:
                return tuple(ids)
            parts, ids, at = [*ids, -1], [], 0  # -1: nothing merges with the end
            while parts[at] >= 0:
                if ranks.get((parts[at], parts[at + 1])) == first:
                    ids.append(self._merged_ids[first])
                    at += 2
                else:
                    ids.append(parts[at])
                    at += 1


def find_vocabulary(given: str, directory: Path | None) -> Path:
    """The vocabulary file of a run.

    Args:
        given: a file, or empty: then ``bpe_simple_vocab_16e6.txt.gz`` in the directory, or else
            the one that open_clip brings.
        directory: the data directory, or None.

    Raises:
        UserError: There is none.
    """
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(
                f"There is no vocabulary {path}; give CLIP's {VOCABULARY} by text.vocabulary, or "
                "nothing to take the one in the data directory or open_clip's."
            )
        return path
    if directory is not None and (directory / VOCABULARY).is_file():
        return directory / VOCABULARY
    spec = importlib.util.find_spec("open_clip")  # looks for it and does not import it: seconds
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (path := Path(folder, VOCABULARY)).is_file():
            return path
    raise UserError(
        f"No vocabulary is given, {directory or 'the data directory'} has no {VOCABULARY} and "
        "open_clip is not installed; put the file there, give one by text.vocabulary, or "
        "pip install open_clip_torch, which brings it."
    )


def _byte_order() -> list[int]:
    """Bytes in the order of their ids: first those that are visible characters of Latin-1."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return visible + sorted({*range(256)} - {*visible})


def _byte_names() -> list[str]:
    """The characters that stand for the bytes in the file, in the order of their ids."""
    return [chr(byte) if at < 188 else chr(68 + at) for at, byte in enumerate(_byte_order())]


def _read_merges(path: Path) -> tuple[dict[tuple[int, int], int], list[int]]:
    """The line of each pair of ids, counted from 0, and the id that the pair of a line becomes."""
    other = f"{path} is no vocabulary of CLIP's form, gzip of a #version line and a merge a line"
    advice = f"give CLIP's {VOCABULARY} by text.vocabulary"
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            header, *lines = file.read().rstrip("\n").split("\n")
    except (gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserError(f"{other} ({error}); {advice}.") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"The vocabulary {path} is cut off or damaged; copy it again.") from error
    except OSError as error:
        raise UserError(f"The vocabulary {path} cannot be read: {error.strerror}.") from error
    if "#version" not in header or not lines:
        raise UserError(f"{other}; {advice}.")
    if header.startswith(_FULL_HEADER) and len(lines) < MAX_MERGES:
        raise UserError(
            f"The vocabulary {path} has {len(lines):,} of at least {MAX_MERGES:,} merges; copy it "
            "again."
        )
    names = _byte_names()
    ids = {name: index for index, name in enumerate(names + [name + "</w>" for name in names])}
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines[:MAX_MERGES]):
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids:
            raise UserError(
                f"{other} (line {number + 2}, {line[:40]!r}, does not join two known parts); "
                f"{advice}."
            )
        pairs.append((left, right))
        # Where two pairs give the same word, the later one's id is the word's, as upstream.
        ids[left + right] = 512 + number
    ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(pairs)}
    return ranks, [ids[left + right] for left, right in pairs]
