"""A byte-pair vocabulary in the form of CLIP's file, learnt from words.

Its lines, after a heading, are the pairs that a tokenizer joins, the first one first; the last
part of a word ends with ``</w>``. Method: Sennrich et al. 2016, "Neural Machine Translation of
Rare Words with Subword Units".
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

Pair = tuple[str, str]

_END = "</w>"
_HEADING = "#version: 0.2"


def learn_merges(counts: Mapping[str, int]) -> list[Pair]:
    """Learns the pairs that make every given word one token.

    Args:
        counts: how often each word occurs; words of the letters a to z.

    Returns:
        The pairs in the order in which they are joined: the most frequent one of each round,
        the first by alphabet among equals.
    """
    words = {(*word[:-1], word[-1] + _END): count for word, count in counts.items()}
    merges: list[Pair] = []
    while True:
        pairs: Counter[Pair] = Counter()
        for parts, count in words.items():
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_joined(parts, best): count for parts, count in words.items()}


def write_merges(path: Path, merges: Sequence[Pair]) -> None:
    """Writes the pairs; the same ones are the same bytes.

    Raises:
        OSError: if it cannot be written.
    """
    text = "".join(f"{line}\n" for line in (_HEADING, *(" ".join(pair) for pair in merges)))
    buffer = BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream:
        stream.write(text.encode())
    path.write_bytes(buffer.getvalue())


def _joined(parts: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    result: list[str] = []
    place = 0
    while place < len(parts):
        if parts[place : place + 2] == pair:
            result.append("".join(pair))
            place += 2
        else:
            result.append(parts[place])
            place += 1
    return tuple(result)
