"""From the words of a command line to settings of a config; knows no model and no torch.

A word is one of
  ``--name=value``, ``--name value``, ``--flag``   an option of the table
  ``NAME value``                                   an option whose name has no dashes
                                                   (``SOLVER.IMS_PER_BATCH 8``)
  ``section.field=value``                          any field of the config
Hyphens and underscores are one in ``--names``, because the cards write both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from zoo_common.errors import UserError

TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class Option:
    """A word that a command line may hold, and the config fields that it sets.

    Attributes:
        name: as the card or the launcher writes it, dashes included.
        targets: ``section.field`` (set to the option's value) or ``section.field=value`` (a
            flag that sets that value).
        kind: ``value`` needs a value, ``flag`` takes none, ``switch`` is a truth value that may
            be left out (true), ``optional`` has a value that may be left out (``bare``),
            ``key`` has a name that is what is assigned to: another project's name, which the
            config translates; its value may be left out if there is a ``bare`` one.
        bare: what an ``optional`` option or a ``key`` without a value means.
        help: what it is, if its fields do not say it.
    """

    name: str
    targets: tuple[str, ...]
    kind: str = "value"
    bare: str = ""
    help: str = ""


@dataclass(frozen=True)
class Assignment:
    """A field or key and the text to set it to; ``written`` is what the user typed."""

    path: str
    text: str
    written: str


def parse(
    words: Sequence[str], options: Iterable[Option], paths: Iterable[str]
) -> list[Assignment]:
    """Reads a command line.

    Args:
        words: the command line without the program's name.
        options: the options that are known.
        paths: the dotted names of all fields, for ``section.field=value``.

    Raises:
        UserError: an unknown word (with the nearest known one), or a value that is missing or
            superfluous.
    """
    by_name = {_normal(option.name): option for option in options}
    known_paths = set(paths)
    assignments: list[Assignment] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        option = by_name.get(_normal(name))
        if option is not None:
            follows = bool(rest) and _normal(rest[0].partition("=")[0]) not in by_name
            text = _value_of(option, value if equals else None, rest, follows)
            assignments += _assignments(option, text, word)
        elif equals and name in known_paths:
            assignments.append(Assignment(name, value, word))
        else:
            raise UserError(_unknown(word, name, by_name, known_paths))
    return assignments


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like ``name``, or an empty text when none is."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else ""


def is_true(text: str) -> bool | None:
    """The truth value that a text names, or None when it names none."""
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    return False if word in FALSE_WORDS else None


def _normal(name: str) -> str:
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name


def _value_of(option: Option, given: str | None, rest: list[str], follows: bool) -> str:
    """The option's value: behind the equals sign, the next word, or the one that is implied.

    ``follows``: there is a next word, and it is no option.
    """
    if option.kind == "flag":
        if given is not None:
            raise UserError(
                f"{option.name} takes no value, but was given {given!r:.200}: leave it out."
            )
        return ""
    if given is not None:
        return given
    if option.kind == "switch":
        return rest.pop(0) if rest and is_true(rest[0]) is not None else "true"
    if option.bare:
        takes = follows and not rest[0].startswith("--") and "=" not in rest[0]
        return rest.pop(0) if takes else option.bare
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{option.name} needs a value: write {option.name}=VALUE.")
    return rest.pop(0)


def _assignments(option: Option, text: str, written: str) -> list[Assignment]:
    if option.kind == "key":
        return [Assignment(option.name, text, written)]
    result = []
    for target in option.targets:
        path, equals, constant = target.partition("=")
        result.append(Assignment(path, constant if equals else text, written))
    return result


def _unknown(word: str, name: str, by_name: Mapping[str, Option], paths: set[str]) -> str:
    candidates = [option.name for option in by_name.values()] + sorted(paths)
    guess = nearest(_normal(name), candidates) or nearest(name, candidates)
    hint = f"did you mean {guess}?" if guess else "--help lists what is known."
    return f"Unknown option {word[:200]!r}: {hint}"
