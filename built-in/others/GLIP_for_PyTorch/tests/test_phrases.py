"""What is looked for in a user's text."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from detector_runs import run_command

from glip.phrases import read_text
from zoo_common.errors import UserError

TAGGER = "averaged_perceptron_tagger_eng"
TAGS = {
    **dict.fromkeys(("a", "the"), "DT"),
    **dict.fromkeys(("big", "red"), "JJ"),
    "older": "JJR",
    **dict.fromkeys(("man", "dog", "hotdog", "horse"), "NN"),
    "dogs": "NNS",
    **dict.fromkeys(("rides", "eats", "is"), "VBZ"),
    "with": "IN",
    **{mark: mark for mark in (".", ",", "``", "''")},
}


def write_nltk_data(root: Path) -> Path:
    """A sentence splitter without knowledge, and a tagger that knows a few words."""
    splitter, tagger = root / "tokenizers/punkt_tab/english", root / "taggers" / TAGGER
    for directory in (splitter, tagger):
        directory.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (splitter / name).write_text("")
    content = {"weights": {}, "tagdict": TAGS, "classes": sorted({*TAGS.values(), "VB"})}
    for name, part in content.items():
        (tagger / f"{TAGGER}.{name}.json").write_text(json.dumps(part))
    return root


@pytest.fixture
def nltk_paths() -> Iterator[list[str]]:
    """Where nltk looks for data, with nothing there."""
    nltk = pytest.importorskip("nltk")
    before = list(nltk.data.path)
    nltk.data.path[:] = []
    yield nltk.data.path
    nltk.data.path[:] = before


@pytest.fixture
def nltk_data(nltk_paths: list[str], tmp_path: Path) -> None:
    nltk_paths.append(str(write_nltk_data(tmp_path / "nltk_data")))


LISTS = {
    "a red circle. the largest square": ["a red circle", "the largest square"],
    "a red circle. the largest square. ": ["a red circle", "the largest square"],
    "a red circle. the largest square.": ["a red circle", "the largest square"],
    "  Dog.  ": ["Dog"],
    "man \n on horse. dog (left). ": ["man on horse", "dog (left)"],
    "dog. . !!. cat_1": ["dog", "cat_1"],
}


@pytest.mark.parametrize("text", LISTS)
def test_phrases_with_separators_are_taken_as_they_are(text: str) -> None:
    """Without nltk: none of these words is known to the tagger of these tests, and no data is."""
    phrases, caption = read_text(text)
    assert phrases == LISTS[text]
    assert caption.text == ". ".join(phrases)
    assert [[caption.text[slice(*span)] for span in spans] for spans in caption.spans] == [
        [phrase] for phrase in phrases
    ]


SENTENCES = {
    "A man rides the big red Horse": ["a man", "the big red horse"],
    'The  "big dog" eats a hotdog.': ["big dog", "a hotdog"],
    "older dogs, big dogs": ["older dogs", "big dogs"],
    "the man's dog is big": ["the man", "dog"],
    "man dog": ["man dog"],
}


@pytest.mark.parametrize("text", SENTENCES)
@pytest.mark.usefixtures("nltk_data")
def test_noun_phrases_of_a_sentence_are_found_where_they_stand(text: str) -> None:
    phrases, caption = read_text(text)
    assert phrases == SENTENCES[text]
    assert caption.text == text.lower()
    for phrase, ((first, last),) in zip(phrases, caption.spans, strict=True):
        assert caption.text[first:last] == phrase


@pytest.mark.usefixtures("nltk_data")
def test_a_phrase_that_occurs_again_is_one_phrase_with_two_places() -> None:
    phrases, caption = read_text("a dog eats a hotdog with a  dog")
    assert phrases == ["a dog", "a hotdog"]
    assert caption.spans == [[(0, 5), (25, 31)], [(11, 19)]]


@pytest.mark.usefixtures("nltk_data")
def test_the_phrases_are_those_of_nltks_grammar() -> None:
    """The grammar of microsoft/GLIP's demo, read by nltk itself."""
    import nltk

    grammar = nltk.RegexpParser("NP: {<DT>?<JJ.*>*<NN.*>+}")
    words = ["a", "the", "big", "older", "man", "dogs", "rides", "with", ","]
    for number in range(300):
        text = " ".join(words[number**2 * place % 97 % 9] for place in range(1, 12))
        tree = grammar.parse(nltk.pos_tag(nltk.word_tokenize(text)))
        trees = tree.subtrees(lambda part: part.label() == "NP")
        wanted = [" ".join(word for word, _ in part.leaves()) for part in trees]
        if wanted:
            assert read_text(text)[0] == list(dict.fromkeys(wanted)), text


REFUSED = {
    " \n": "--text is empty",
    ". . ": "has no words",
    "dog. cat. Dog": "The phrase 'Dog' occurs twice in --text",
    "rides with": "nltk finds no noun in --text 'rides with'",
}


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.usefixtures("nltk_data")
def test_a_text_that_names_nothing_is_told(text: str) -> None:
    with pytest.raises(UserError, match=REFUSED[text]):
        read_text(text)


READS_TWICE = """
import sys
import nltk
from glip.phrases import read_text
from zoo_common.errors import UserError
for path in sys.argv[1:]:
    nltk.data.path[:] = [path]
    try:
        read_text("a dog eats")
    except UserError as error:
        print(error)
print(read_text("a dog. ")[0])
"""


def test_data_of_nltk_that_are_not_there_or_damaged_are_told(tmp_path: Path) -> None:
    """In a process of its own, as nltk keeps what it read."""
    pytest.importorskip("nltk")
    root = write_nltk_data(tmp_path / "nltk_data")
    (root / "taggers" / TAGGER / f"{TAGGER}.tagdict.json").write_text('{"a": ')
    done = run_command([sys.executable, "-c", READS_TWICE, tmp_path, root], tmp_path)
    assert done.returncode == 0, done.stderr
    absent, damaged, listed = done.stdout.splitlines()
    assert f"one is in none of {tmp_path}: run python3 -m nltk.downloader punkt_tab " in absent
    assert damaged.startswith("nltk cannot read its data")
    assert listed == "['a dog']"
