"""A WordNet of a few words and a list of stop words, in the forms that nltk reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

# Synsets by part of speech; the suffix of its files and what its lines call it.
KINDS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
SYNSETS: dict[str, list[list[str]]] = {
    "noun": [
        ["dog", "domestic_dog", "Canis_familiaris"],
        ["frump", "dog"],
        ["street"],
        ["two", "2", "II", "deuce"],
        ["night", "nighttime", "dark"],
        ["X-ray", "X_ray", "roentgen_ray"],
        ["one", "1"],
    ],
    "verb": [["run", "go"], ["run", "race", "rush"], ["frump"]],
    "adj": [["quick", "fast", "speedy"], ["dark"]],
    "adv": [["quickly", "rapidly"]],
}
STOP_WORDS = ["a", "the", "in", "on", "of", "at", "is"]


def write_corpora(
    folder: Path,
    synsets: Mapping[str, Sequence[Sequence[str]]] = SYNSETS,
    *,
    line_end: str = "\n",
) -> Path:
    """Writes ``corpora/wordnet`` and ``corpora/stopwords``.

    Args:
        folder: where; private to its owner, since nltk refuses what others may write to.
        synsets: lemmas by part of speech.
        line_end: two characters shift all lines, as in files that went through Windows.

    Returns:
        The folder, an entry for ``nltk.data.path``.
    """
    wordnet = folder / "corpora" / "wordnet"
    stop_words = folder / "corpora" / "stopwords"
    texts = {stop_words / "english": "".join(f"{word}\n" for word in STOP_WORDS)}
    texts[wordnet / "lexnames"] = "00\tadj.all\t3\n"
    texts |= {wordnet / name: "" for name in ("cntlist.rev", "index.sense")}
    for suffix, kind in KINDS.items():
        # Data starts behind a heading of lines that start with blanks.
        data = "  1 WordNet 3.0 Copyright of nobody\n"
        offsets: dict[str, list[str]] = {}
        for lemmas in synsets[suffix]:
            offset = f"{len(data):08d}"
            words = " ".join(f"{lemma} 0" for lemma in lemmas)
            frames = "00 " if suffix == "verb" else ""
            data += f"{offset} 00 {kind} {len(lemmas):02x} {words} 000 {frames}| gloss\n"
            for lemma in lemmas:
                offsets.setdefault(lemma.lower(), []).append(offset)
        index = "".join(
            f"{lemma} {kind} {len(found)} 0 {len(found)} 0 {' '.join(found)}\n"
            for lemma, found in sorted(offsets.items())
        )
        texts[wordnet / f"data.{suffix}"] = data
        texts[wordnet / f"index.{suffix}"] = index
        texts[wordnet / f"{suffix}.exc"] = "ran run\n" if suffix == "verb" else ""
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.replace("\n", line_end).encode())
        path.chmod(0o644)
    for path in (folder, folder / "corpora", wordnet, stop_words):
        path.chmod(0o755)
    return folder
