"""From a user's text to the phrases that are looked for, and where they stand in the caption.

A list of phrases has ". " behind each, and needs nothing more. Of any other text the noun phrases
are taken, by nltk's tokenizer and tagger, as microsoft/GLIP (MIT, 9dda955) does in
maskrcnn_benchmark/engine/predictor_glip.py: an article, adjectives, and one noun at least.
Differences: a phrase is found where it was read, upstream searches the text for its letters and
finds "dog" in "hotdog" too; a phrase that occurs again is one phrase with two places.

nltk takes a second to import, so that it is imported where a sentence is read only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from glip.captions import SEPARATOR, Caption, Span
from zoo_common.errors import UserError, one_line

_RESOURCES = "punkt_tab averaged_perceptron_tagger_eng"
_TO_DO = (
    f"run python3 -m nltk.downloader {_RESOURCES}, or write phrases with {SEPARATOR!r} behind "
    "each, as in 'a red circle. the dog. '."
)
_SHOWN = 60
# What a tag is called in the pattern of a noun phrase; all others are "-".
_ARTICLE, _ADJECTIVE, _NOUN = "DT", "JJ", "NN"
_noun_phrase = re.compile("d?j*n+")
# What nltk's tokenizer makes one of the last two of.
_QUOTES = ('"', "``", "''")


def read_text(text: str) -> tuple[list[str], Caption]:
    """The phrases of a text, and the caption in which they are looked for.

    Raises:
        UserError: there is none, one stands twice in a list, or nltk has no data to read a
            sentence by.
    """
    text = text.lstrip()
    if not text:
        raise UserError("--text is empty: give phrases to look for, as 'a red circle. the dog. '.")
    if SEPARATOR in text:
        return _listed(text)
    return _in_sentence(text.rstrip())


def _listed(text: str) -> tuple[list[str], Caption]:
    """The phrases between separators; the full stop behind the last may be there."""
    parts = [" ".join(part.split()) for part in f"{text} ".split(SEPARATOR)]
    phrases = [part for part in parts if _has_word(part)]
    if not phrases:
        raise UserError(f"--text {text.strip()!r} has no words: give phrases to look for.")
    seen: set[str] = set()
    for phrase in phrases:
        if phrase.casefold() in seen:
            raise UserError(f"The phrase {phrase!r} occurs twice in --text: leave one out.")
        seen.add(phrase.casefold())
    caption, spans = "", []
    for phrase in phrases:
        caption += SEPARATOR if caption else ""
        spans.append([(len(caption), len(caption) + len(phrase))])
        caption += phrase
    return phrases, Caption(caption, spans)


def _in_sentence(text: str) -> tuple[list[str], Caption]:
    """The noun phrases of a sentence, in lower case as upstream tags them."""
    text = text.lower()
    tagged = _tag(text)
    places = _places(text, [word for word, _ in tagged])
    codes = "".join(_code(tag) for _, tag in tagged)
    spans: dict[str, list[Span]] = {}
    for match in _noun_phrase.finditer(codes):
        inside = [
            place for place in places[match.start() : match.end()] if _has_word(text[slice(*place)])
        ]
        if inside:
            first, last = inside[0][0], inside[-1][1]
            spans.setdefault(" ".join(text[first:last].split()), []).append((first, last))
    if not spans:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise UserError(
            f"nltk finds no noun in --text {shown!r}: write phrases with {SEPARATOR!r} behind each."
        )
    return list(spans), Caption(text, list(spans.values()))


def _tag(text: str) -> list[tuple[str, str]]:
    """Words with nltk's tags of their kind.

    Raises:
        UserError: nltk's data are not there or damaged.
    """
    import nltk

    try:
        tagged: list[tuple[str, str]] = nltk.pos_tag(nltk.word_tokenize(text))
    except LookupError as error:
        raise UserError(
            "A sentence in --text needs nltk's punkt_tab and averaged_perceptron_tagger_eng, and "
            f"one is in none of {', '.join(nltk.data.path)}: {_TO_DO}"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"nltk cannot read its data ({one_line(error)!r}): remove punkt_tab and "
            f"averaged_perceptron_tagger_eng from nltk_data and {_TO_DO}"
        ) from error
    return tagged


def _places(text: str, words: Sequence[str]) -> list[Span]:
    """Where nltk's words stand in a text."""
    places, start = [], 0
    for word in words:
        start = _skip(text, start)
        forms = _QUOTES if word in _QUOTES else (word,)
        length = next(len(form) for form in forms if text.startswith(form, start))
        places.append((start, start + length))
        start += length
    return places


def _skip(text: str, start: int) -> int:
    """The next place that is no white space."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _code(tag: str) -> str:
    if tag == _ARTICLE:
        return "d"
    return {_ADJECTIVE: "j", _NOUN: "n"}.get(tag[:2], "-")


def _has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)
