"""Where BERT's files are, and whether they are whole. No torch here: told before a run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo_common.errors import UserError

_VOCABULARIES = ("tokenizer.json", "vocab.txt")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def find_bert(given: str, data_path: str, *, weights: bool = False) -> Path:
    """The directory of a BERT whose files are there.

    Args:
        given: setting ``model.bert``. What is not there is looked for, by its last name, in the
            data set's directory and beside it.
        data_path: the data set's directory; may be empty.
        weights: whether its weights are needed too.

    Raises:
        UserError: there is none, or a file is missing or does not fit the others.
    """
    places = [Path(given).expanduser()]
    if data_path:
        data = Path(data_path)
        places += [data / places[0].name, data.absolute().parent / places[0].name]
    found = next((place for place in places if place.is_dir()), None)
    wanted = "config.json, vocab.txt or tokenizer.json" + (
        f", and the weights ({' or '.join(_WEIGHTS)})" if weights else ""
    )
    if found is None or not given:
        where = f"at {given}" if given else "given"
        raise UserError(
            f"model.bert: there is no BERT directory {where}: put bert-base-uncased's {wanted} "
            "into ./bert-base-uncased in the model's directory or beside the data set, or give "
            "model.bert=DIR."
        )
    parts: list[tuple[str, ...]] = [("config.json",), _VOCABULARIES]
    for names in [*parts, _WEIGHTS] if weights else parts:
        if not any((found / name).is_file() for name in names):
            raise UserError(
                f"model.bert: {found} has no {' and no '.join(names)}: put bert-base-uncased's "
                f"{wanted} there."
            )
    _check_vocabulary(found, read_config(found))
    return found


def read_config(directory: Path) -> dict[str, Any]:
    """The settings in ``config.json``.

    Raises:
        UserError: it cannot be read or is not BERT's.
    """
    path = directory / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"model.bert: {path} cannot be read ({error}): put bert-base-uncased's there."
        ) from error
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != "bert" or not isinstance(settings.get("vocab_size"), int):
        raise UserError(
            f"model.bert: {path} is that of {kind or 'no model'!s:.40}, with vocab_size "
            f"{settings.get('vocab_size') if kind else None!s:.40}: put bert-base-uncased's there."
        )
    assert isinstance(settings, dict)
    return settings


def _check_vocabulary(directory: Path, settings: dict[str, Any]) -> None:
    """Tells a list of words that is longer than BERT's embedding."""
    path = directory / "vocab.txt"
    if not path.is_file():
        return  # tokenizer.json is read with the tokenizer
    with path.open("rb") as stream:
        words = sum(1 for _ in stream)
    if words > settings["vocab_size"]:
        raise vocabulary_error(directory, words, settings["vocab_size"])


def vocabulary_error(directory: Path, words: int, rows: int) -> UserError:
    """The error of a vocabulary that BERT's embedding has too few rows for."""
    return UserError(
        f"model.bert: the vocabulary in {directory} has {words} words, but BERT's embedding has "
        f"{rows} (vocab_size in config.json): put the files of one BERT there."
    )
