"""Captions of classes and their tokens, as the upstream projects make them."""

import json
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from glip.bert import find_bert
from glip.captions import Caption, ClassCaptions, TextEncoder, caption_of, clean_name
from zoo_common.errors import UserError

TINY = Path(__file__).parent / "fixtures" / "bert_tiny"
NAMES = ["person", "traffic light", "dog", "sheepdog", "car"]


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(TINY, 64)


def copy_of_tiny(directory: Path, **settings: Any) -> Path:
    shutil.copytree(TINY, directory)
    config = json.loads((TINY / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    return directory


def columns(map_NT: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in map_NT]


def test_caption_tokens_and_maps_are_those_of_microsoft_and_mmdet(encoder: TextEncoder) -> None:
    """What both wrote down for the tiny parity cases."""
    caption = caption_of(NAMES)
    assert caption.text == "person. traffic light. dog. sheepdog. car"
    assert caption.spans == [[(0, 6)], [(8, 21)], [(23, 26)], [(28, 36)], [(38, 41)]]
    text = encoder([caption.text])
    tokens = [2, 79, 5, 87, 88, 5, 84, 5, 86, 46, 57, 49, 5, 81, 3]
    assert text.tokens_BT.tolist() == [tokens + [0] * 49]
    assert text.mask_BT.tolist() == [[True] * 15 + [False] * 49]
    assert columns(encoder.token_map(caption)) == [[1], [3, 4], [6], [8, 9, 10, 11], [13]]
    (query,) = encoder.queries(NAMES)
    assert query.labels == [0, 1, 2, 3, 4] and query.caption == caption
    assert torch.equal(query.text.tokens_BT, text.tokens_BT)
    assert torch.equal(query.map_NT, encoder.token_map(caption))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("traffic_light", "traffic light"),
        ("bow_(weapon)", "bow "),
        ("a (b) c (d) e", "a e"),
        ("a__b", "a b"),
        ("T-shirt", "T-shirt"),
    ],
)
def test_names_are_cleaned_as_upstream_does(name: str, words: str) -> None:
    assert clean_name(name) == words


def test_other_orders_and_absent_classes(encoder: TextEncoder) -> None:
    caption = caption_of(NAMES, [4, 1])
    assert caption.text == "car. traffic light"
    assert caption.spans == [[], [(5, 18)], [], [], [(0, 3)]]
    assert columns(encoder.token_map(caption)) == [[], [3, 4], [], [], [1]]


def test_spans_that_end_in_spaces_are_shortened(encoder: TextEncoder) -> None:
    """By two characters at most, as upstream's create_positive_map does."""
    text = "dog   car  "
    spans = {(3, 9): [], (4, 9): [2], (0, 4): [1], (0, 5): [1], (0, 6): [], (6, 11): [2]}
    spans |= {(0, 99): [], (3, 5): []}
    found = encoder.token_map(Caption(text, [[span] for span in spans]))
    assert columns(found) == list(spans.values())
    several = encoder.token_map(Caption("dog. car. cat", [[(0, 3), (10, 13)]]))
    assert columns(several) == [[1, 5]]


def test_several_captions_in_one_call(encoder: TextEncoder) -> None:
    text = encoder(["dog", "a red Ball"])
    assert text.tokens_BT.shape == text.mask_BT.shape == (2, 64)
    assert text.mask_BT.sum(dim=1).tolist() == [3, 5]
    assert text.tokens_BT.dtype == torch.int64


def test_the_tokenizer_comes_from_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    plain = copy_of_tiny(tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (plain / name).unlink()  # as the card's directory may be
    texts = ["person. Traffic Light. sheepdog"]
    assert torch.equal(TextEncoder(plain, 64)(texts).tokens_BT, TextEncoder(TINY, 64)(texts)[0])


# ---------------------------------------------------------------------------- chunks


def test_classes_that_do_not_fit_one_caption_are_asked_for_in_several() -> None:
    encoder = TextEncoder(TINY, 10)
    queries = encoder.queries(NAMES)
    assert [query.labels for query in queries] == [[0, 1, 2], [3, 4]]
    assert queries[1].caption.text == "sheepdog. car"
    assert columns(queries[1].map_NT) == [[1, 2, 3, 4], [6]]
    assert [query.labels for query in encoder.queries(NAMES[:1] + NAMES[2:3])] == [[0, 1]]
    fixed = TextEncoder(TINY, 64).queries(NAMES, 2)
    assert [query.labels for query in fixed] == [[0, 1], [2, 3], [4]]
    with pytest.raises(UserError, match=r"has 13 tokens, more than the 10 of model.max_tokens"):
        encoder.queries(NAMES, 4)


# ---------------------------------------------------------------------------- training


def test_all_classes_are_in_a_training_caption_in_any_order(encoder: TextEncoder) -> None:
    fixed = ClassCaptions(NAMES, encoder, shuffle=False)
    assert fixed.draw([2], random.Random(1)) == caption_of(NAMES)
    shuffled = ClassCaptions(NAMES, encoder, shuffle=True)
    texts = [shuffled.draw([2], random.Random(seed)).text for seed in range(50)]
    assert len(set(texts)) > 30
    assert {tuple(sorted(text.split(". "))) for text in texts} == {tuple(sorted(NAMES))}
    assert shuffled.draw([], random.Random(3)) == shuffled.draw([4], random.Random(3))


def test_drawn_negatives_stand_among_the_classes_of_the_image(encoder: TextEncoder) -> None:
    """As upstream's CocoGrounding with its safeguard: all positives, and others that fit."""
    captions = ClassCaptions(NAMES, encoder, negatives=2)
    seen = set()
    for seed in range(200):
        caption = captions.draw([1, 4, 1], random.Random(seed))
        present = [number for number, spans in enumerate(caption.spans) if spans]
        assert {1, 4} <= set(present) and len(present) <= 4
        seen.add(caption.text)
    assert {len(text.split(". ")) for text in seen} == {2, 3, 4}
    assert len({text.split(". ")[0] for text in seen}) == 5
    alone = ClassCaptions(NAMES, encoder, negatives=0)
    assert alone.draw([3], random.Random(0)).text == "sheepdog"
    assert alone.draw([], random.Random(0)).text in NAMES  # a caption is never empty


def test_classes_of_an_image_that_do_not_fit_are_left_out() -> None:
    encoder = TextEncoder(TINY, 9)
    captions = ClassCaptions(NAMES, encoder, negatives=5)
    kept = set()
    for seed in range(100):
        caption = captions.draw(range(5), random.Random(seed))
        assert encoder.fits(caption.text)
        kept |= {number for number, spans in enumerate(caption.spans) if spans}
    assert kept == set(range(5))
    with pytest.raises(UserError, match=r"caption of all 5 classes has 15 tokens, .*negatives"):
        ClassCaptions(NAMES, encoder)


@pytest.mark.parametrize(("max_tokens", "positives", "kept"), [(10, 1, 3), (11, 1, 4), (10, 4, 4)])
def test_drawn_negatives_leave_a_token_free(max_tokens: int, positives: int, kept: int) -> None:
    """As upstream: [CLS] and [SEP], and two tokens a class, the last one's dot included."""
    captions = ClassCaptions(
        ["dog", "person", "car", "ball"], TextEncoder(TINY, max_tokens), negatives=4
    )
    for seed in range(5):
        caption = captions.draw(range(positives), random.Random(seed))
        assert len(caption.text.split(". ")) == kept


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "There are no classes to look for"),
        (["dog", " "], r"Class 1 has no words \(' '\); give it a name"),
        (["dog", "(cat)"], r"Class 1 has no words"),
        (["dog", "cat", "Dog "], r"'Dog ' occurs twice \(classes 0 and 2\)"),
        (["dog", "\x7f\x7f"], r"has no token in BERT's vocabulary; give another"),
        (["dog", "x" * 80], r"'x{60}...' has 82 tokens, more than the 64 of model.max_tokens"),
    ],
)
def test_names_that_cannot_be_looked_for(names: list[str], said: str, encoder: TextEncoder) -> None:
    for ask in (encoder.queries, lambda given: ClassCaptions(given, encoder, negatives=3)):
        with pytest.raises(UserError, match=said):
            ask(names)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_caption(text: str, encoder: TextEncoder) -> None:
    with pytest.raises(UserError, match="A caption is empty; give words to look for"):
        encoder(["dog", text])
    with pytest.raises(UserError, match="A caption is empty"):
        encoder.token_map(Caption(text, []))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_size": 111}, "has 112 words, but BERT's embedding has 111"),
        ({"max_position_embeddings": 63}, "model.max_tokens=64 is more than the 63 positions"),
        ({"model_type": "roberta"}, "config.json is that of roberta"),
        ({"vocab_size": None}, "config.json is that of bert, with vocab_size None"),
    ],
)
@pytest.mark.parametrize("absent", ["vocab.txt", "tokenizer.json"])
def test_a_bert_that_does_not_fit(
    settings: dict[str, Any], said: str, absent: str, tmp_path: Path
) -> None:
    directory = copy_of_tiny(tmp_path / "bert", **settings)
    (directory / absent).unlink()
    with pytest.raises(UserError, match=said):
        TextEncoder(directory, 64)


def test_a_vocabulary_that_does_not_fit_is_told_without_the_tokenizer(tmp_path: Path) -> None:
    assert find_bert(str(copy_of_tiny(tmp_path / "fits", vocab_size=112)), "")
    with pytest.raises(UserError, match="has 112 words, but BERT's embedding has 111"):
        find_bert(str(copy_of_tiny(tmp_path / "small", vocab_size=111)), "")


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        (["config.json"], "has no config.json: put bert-base-uncased's"),
        (["vocab.txt", "tokenizer.json"], "has no tokenizer.json and no vocab.txt: put"),
    ],
)
def test_an_incomplete_bert(absent: list[str], said: str, tmp_path: Path) -> None:
    directory = copy_of_tiny(tmp_path / "bert")
    for name in absent:
        (directory / name).unlink()
    with pytest.raises(UserError, match=said):
        find_bert(str(directory), "")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json is that of no model"),
        ("tokenizer.json", "{", "the tokenizer in .* cannot be read"),
    ],
)
def test_a_damaged_bert(name: str, content: str, said: str, tmp_path: Path) -> None:
    directory = copy_of_tiny(tmp_path / "bert")
    (directory / name).write_text(content)
    with pytest.raises(UserError, match=said):
        TextEncoder(directory, 64)


def test_where_bert_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "coco"
    data.mkdir()
    given = str(tmp_path / "model" / "bert")
    with pytest.raises(UserError) as caught:
        find_bert(given, str(data))
    assert given in str(caught.value) and "config.json, vocab.txt" in str(caught.value)
    assert "\n" not in str(caught.value)
    beside = copy_of_tiny(tmp_path / "bert")
    assert find_bert(given, str(data)) == beside
    assert find_bert(given, "coco").resolve() == beside
    inside = copy_of_tiny(data / "bert")
    assert find_bert(given, str(data)) == inside
    itself = copy_of_tiny(Path(given))
    assert find_bert(given, str(data)) == itself
    with pytest.raises(UserError, match=r"has no model.safetensors and no pytorch_model.bin"):
        find_bert(given, str(data), weights=True)
    (itself / "pytorch_model.bin").touch()
    assert find_bert(given, str(data), weights=True) == itself
    with pytest.raises(UserError, match="there is no BERT directory given"):
        find_bert("", str(data))
