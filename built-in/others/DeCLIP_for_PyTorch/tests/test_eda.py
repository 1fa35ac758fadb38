"""Augmented captions, on a WordNet of a few words; what is said where there is none."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from pathlib import Path

import nltk
import pytest

from declip import synonyms
from declip.eda import Eda, check_synonyms
from zoo_common.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_wordnet import write_corpora

RECORDED: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "fixtures" / "eda.json").read_text()
)


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only data directory of nltk."""
    folder = tmp_path / "nltk_data"
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    yield folder


def augmented(eda: Eda, caption: str, seed: int) -> str:
    random.seed(seed)
    return eda(caption)


# ---------------------------------------------------------------------------- captions


def test_textaugments_captions(corpora: Path) -> None:
    write_corpora(corpora)
    eda = Eda()
    for caption, texts in RECORDED.items():
        for seed, text in enumerate(texts):
            # textaugment leaves nothing of "two" where the synonym is "2", whose letters are none.
            assert augmented(eda, caption, seed) == (text if text.strip() else caption)


@pytest.mark.parametrize("with_synonyms", [True, False])
def test_every_caption_gives_words(corpora: Path, with_synonyms: bool) -> None:
    write_corpora(corpora)
    eda = Eda(with_synonyms)
    for caption in [*RECORDED, "one", "a", "!", "\U0001f600", "x " * 400, "the\ta\nof"]:
        for seed in range(60):
            assert augmented(eda, caption, seed).split()
    assert eda("") == ""
    assert eda(" \t") == " \t"


def test_each_way_is_as_likely(corpora: Path) -> None:
    write_corpora(corpora)
    words = ["dog", "zebra", "owl", "cow", "hen", "pig", "ant", "bee", "fly", "elk"]
    counts: Counter[str] = Counter()
    eda = Eda()
    for seed in range(3000):
        got = augmented(eda, " ".join(words), seed).split()
        if not {*got} <= {*words}:
            counts["replaced"] += 1
        elif len(got) == 10 and got != words:
            counts["swapped"] += 1
        else:
            counts["deleted"] += 1
    assert all(abs(counts[way] - 1000) < 110 for way in ("replaced", "swapped", "deleted")), counts


def test_without_synonyms_no_word_is_new(corpora: Path) -> None:
    eda = Eda(synonyms=False)  # and no corpora are there
    words = ["a", "quick", "dog", "ran", "in", "the", "dark", "street"]
    lengths: Counter[int] = Counter()
    for seed in range(400):
        got = augmented(eda, " ".join(words), seed).split()
        assert {*got} <= {*words}
        lengths[len(got)] += 1
    assert lengths[8] > 200
    assert sum(lengths.values()) - lengths[8] > 80


def test_synonyms_of_forms_and_capitals(corpora: Path) -> None:
    write_corpora(corpora)
    known = synonyms.Synonyms()
    assert known.of("dogs") == ["canis familiaris", "dog", "domestic dog", "frump"]
    assert known.of("Dog") == known.of("dogs")
    assert known.of("dog") == ["canis familiaris", "domestic dog", "frump"]
    assert known.of("ran") == ["go", "race", "run", "rush"]
    assert known.of("X-ray") == ["roentgen ray", "x ray"]
    assert known.of("zebra") == []
    for word in ("dogs", "ran", "zebra"):
        assert known.read(word) == known.of(word)


def test_the_cache_has_a_bound(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpora(corpora)
    monkeypatch.setattr(synonyms, "_MAX_CACHED", 10)
    known = synonyms.Synonyms()
    for number in range(50):
        known.of(f"word{number}")
        known.of("long" * number)
        assert known.of("dog") == ["canis familiaris", "domestic dog", "frump"]
        assert len(known._cached) <= 10
        assert max(map(len, known._cached)) <= 32
    assert not known._wordnet._synset_offset_cache


# ---------------------------------------------------------------------------- processes


def _augment_all(eda: Eda) -> list[str]:
    assert eda._synonyms is not None
    texts = []
    for seed in range(300):
        eda._synonyms._cached.clear()  # so that each draw reads WordNet
        texts.append(augmented(eda, "a quick dog ran in the dark street two", seed))
    return texts


def _send(eda: Eda, to: Queue[list[str]]) -> None:
    to.put(_augment_all(eda))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_do_not_disturb_each_other(corpora: Path) -> None:
    write_corpora(corpora)
    eda = Eda()
    expected = _augment_all(eda)
    context = multiprocessing.get_context("fork")
    to = context.Queue()
    workers = [context.Process(target=_send, args=(eda, to)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert _augment_all(eda) == expected
    assert [to.get(timeout=60) for _ in workers] == [expected] * 3
    for worker in workers:
        worker.join()


def test_pickled_it_reads_again(corpora: Path) -> None:
    write_corpora(corpora)
    eda = Eda()
    eda("a quick dog")
    pickled = pickle.dumps(eda)
    assert len(pickled) < 200
    assert _augment_all(pickle.loads(pickled)) == _augment_all(eda)
    assert augmented(pickle.loads(pickle.dumps(Eda(False))), "a b c d", 1) == augmented(
        Eda(False), "a b c d", 1
    )


# ---------------------------------------------------------------------------- absent and damaged


def test_zipped_corpora(corpora: Path) -> None:
    write_corpora(corpora)
    expected = _augment_all(Eda())
    for name in ("wordnet", "stopwords"):
        folder = corpora / "corpora"
        shutil.make_archive(str(folder / name), "zip", folder, name)
        (folder / f"{name}.zip").chmod(0o644)
        shutil.rmtree(folder / name)
    check_synonyms()
    assert _augment_all(Eda()) == expected


@pytest.mark.parametrize("absent", ["wordnet", "stopwords", "wordnet/data.noun"])
def test_absent_corpora(corpora: Path, absent: str) -> None:
    write_corpora(corpora)
    path = corpora / "corpora" / absent
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    for call in (check_synonyms, Eda):
        with pytest.raises(UserError, match=f"{absent}.* is in none of {corpora}") as caught:
            call()
        for advice in (
            "python -m nltk.downloader wordnet stopwords",
            "~/nltk_data",
            "text.synonyms=false.",
        ):
            assert advice in str(caught.value)
        assert "\n" not in str(caught.value)


def test_corpora_that_others_may_write_to(corpora: Path) -> None:
    write_corpora(corpora)
    (corpora / "corpora" / "wordnet").chmod(0o777)
    try:
        nltk.data.find("corpora/wordnet/data.noun")
    except (LookupError, RuntimeWarning):
        with pytest.raises(UserError, match=r"nltk refuses its corpus wordnet: .*chmod go-w"):
            check_synonyms()
    else:  # an nltk that does not mind
        check_synonyms()


DAMAGE: dict[str, Callable[[str], str]] = {
    "index.noun": lambda text: text[:-20],
    "data.noun": lambda text: "",
    "data.verb": lambda text: text.replace(" 00 v 01 ", " 00 v zz "),
    "index.adj": lambda text: text.replace("quick a 1", "quick a one"),
    "lexnames": lambda text: "adj.all\n",
    "verb.exc": lambda text: "\n",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_corpora(corpora: Path, name: str) -> None:
    write_corpora(corpora)
    path = corpora / "corpora" / "wordnet" / name
    path.write_text(DAMAGE[name](path.read_text()))
    check_synonyms()  # it looks for the files only
    with pytest.raises(UserError, match=r"wordnet, it is damaged .* text\.synonyms=false"):
        Eda()


def test_damage_that_is_met_later(corpora: Path) -> None:
    write_corpora(corpora)
    path = corpora / "corpora" / "wordnet" / "data.noun"
    path.write_text(path.read_text().replace(" 00 n 04 ", " 00 n zz "))
    known = synonyms.Synonyms()
    with pytest.raises(UserError, match="wordnet, it is damaged"):
        known.of("two")


def test_corpora_with_other_line_ends(corpora: Path) -> None:
    write_corpora(corpora, line_end="\r\n")
    with pytest.raises(UserError, match=r"wordnet, it is damaged .*No WordNet synset found"):
        Eda()


def test_neither_torch_nor_nltk_is_imported_without_need() -> None:
    program = (
        "import sys; from declip import eda, tokenizer; eda.Eda(synonyms=False); "
        "sys.exit(' '.join({'torch', 'nltk'} & {*sys.modules}) or None)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
