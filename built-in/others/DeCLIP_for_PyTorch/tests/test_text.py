"""Ids, token rows, masking and batches of captions; what is said of wrong vocabularies."""

import gzip
import json
import math
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import pytest
import torch
from safetensors.torch import load_file

from declip import tokenizer as tokenizer_module
from declip.texts import ItemText, Texts
from declip.tokenizer import VOCABULARY, Tokenizer, find_vocabulary
from zoo_common.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = json.loads((FIXTURES / "tokens.json").read_text())
CAPTIONS = ["A dog.", "two children play football on a green field", "", "the sea " * 40]


def write_vocabulary(path: Path, lines: list[str], header: str = "#version: 0.2") -> Path:
    path.write_bytes(gzip.compress("\n".join([header, *lines, ""]).encode()))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    return Tokenizer(write_vocabulary(folder / VOCABULARY, RECORDED["merges"]))


def make_texts(tokenizer: Tokenizer, **changes: Any) -> Texts:
    settings = {"context_length": 24, "eda": None, "mask_probability": 0.15}
    return Texts(tokenizer, **{**settings, "contrast_masked": False, **changes})


# ---------------------------------------------------------------------------- ids


@pytest.mark.parametrize(("text", "ids"), RECORDED["ids"])
def test_upstreams_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    for _ in range(2):  # from the file's merges, then from the cache
        assert tokenizer.encode(text) == ids
    for limit in range(len(ids) + 2):
        assert tokenizer.encode(text, limit) == ids[:limit]


def test_special_ids_are_the_last_three(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 512 + 400 + 3
    assert [tokenizer.mask_id, tokenizer.start_id, tokenizer.end_id] == [912, 913, 914]


def test_recorded_captions(tokenizer: Tokenizer) -> None:
    case = json.loads((FIXTURES / "declip_vit_tiny.json").read_text())
    recorded = load_file(FIXTURES / "declip_vit_tiny.safetensors")
    for part in case["tokens"]:
        tokens_BT = recorded[part["tokens"]["tensor"]]
        if part["labels"]:
            labels_BT = recorded[part["labels"]["tensor"]]
            tokens_BT = torch.where(labels_BT >= 0, labels_BT, tokens_BT)
        for caption, tokens_T in zip(part["texts"], tokens_BT.tolist(), strict=True):
            row = tokenizer.row(caption, len(tokens_T))
            assert row + [0] * (len(tokens_T) - len(row)) == tokens_T


def test_the_full_vocabulary() -> None:
    try:
        full = Tokenizer(find_vocabulary("", None))
    except UserError as error:
        pytest.skip(str(error))
    assert full.vocab_size == 49409
    assert full.row("a diagram", 77) == [49407, 320, 22697, 49408]
    ids = [1097, 35689, 563, 15304, 267, 273, 2015, 261, 750, 959]
    assert full.encode("Naïve café, 2 tickets & more…") == ids


def test_ftfy_and_html_leave_plain_text_alone(tokenizer: Tokenizer) -> None:
    plain = [chr(code) for code in range(128) if tokenizer_module._is_plain(chr(code))]
    assert len(plain) == 3 + 95 - 1
    draw = random.Random(0)
    texts = [a + b for a in plain for b in plain]
    texts += ["".join(draw.choices(plain, k=draw.randrange(60))) for _ in range(300)]
    for text in texts:
        # Ends of lines become one kind of white space, which parts words like any other.
        fixed = ftfy.fix_text(text).replace("\r\n", "\n").replace("\r", "\n")
        assert fixed == text.replace("\r\n", "\n").replace("\r", "\n")


def test_memory_has_a_bound(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_MAX_CACHED", 100)
    fresh = pickle.loads(pickle.dumps(tokenizer))
    for number in range(1000):
        caption = f"picture number{number} " + "long" * number
        assert fresh.encode(caption) == tokenizer.encode(caption)
        assert len(fresh._cached) <= 100
        assert max(map(len, fresh._cached)) <= 32


def test_pickles_small(tokenizer: Tokenizer) -> None:
    tokenizer.encode("fills the cache")
    pickled = pickle.dumps(tokenizer)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).encode("a dog") == tokenizer.encode("a dog")


def test_long_captions_keep_the_end_token(tokenizer: Tokenizer) -> None:
    row = tokenizer.row("the sea " * 40, 12)
    assert len(row) == 12
    assert row[0] == tokenizer.start_id
    assert row[1:-1] == tokenizer.encode("the sea " * 40)[:10]
    assert row[-1] == tokenizer.end_id


# ---------------------------------------------------------------------------- vocabulary files


def test_where_the_vocabulary_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = write_vocabulary(tmp_path / "mine.gz", ["a b"])
    data = tmp_path / "data"
    data.mkdir()
    open_clip = tmp_path / "packages" / "open_clip"
    open_clip.mkdir(parents=True)
    (open_clip / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    with pytest.raises(UserError, match=r"No vocabulary is given, .*data has no .*pip install"):
        find_vocabulary("", data)
    theirs = write_vocabulary(open_clip / VOCABULARY, ["a b"])
    assert find_vocabulary("", data) == find_vocabulary("", None) == theirs
    own = write_vocabulary(data / VOCABULARY, ["a b"])
    assert find_vocabulary("", data) == own
    assert find_vocabulary(str(given), data) == given
    with pytest.raises(UserError, match=r"There is no vocabulary .*absent\.gz; give CLIP's"):
        find_vocabulary(str(tmp_path / "absent.gz"), data)


def test_a_merge_known_already_stands_where_upstream_has_it(tmp_path: Path) -> None:
    # Both last lines make "abc"; as in upstream's dictionary, its id is the later one's.
    path = write_vocabulary(tmp_path / "v.gz", ["a b", "b c</w>", "ab c</w>", "a bc</w>"])
    assert Tokenizer(path).encode("abc") == [512 + 3]


FULL_HEADER = '"bpe_simple_vocab_16e6.txt#version: 0.2'
WRONG: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "not gzip": (lambda good: gzip.decompress(good), "is no vocabulary of CLIP's form"),
    "empty": (lambda good: b"", "is no vocabulary of CLIP's form"),
    "cut off": (lambda good: good[: len(good) // 2], "cut off or damaged; copy it again"),
    "damaged": (
        lambda good: good[:40] + bytes(byte ^ 85 for byte in good[40:80]) + good[80:],
        "cut off or damaged; copy it again",
    ),
    "too short": (
        lambda good: gzip.compress(
            gzip.decompress(good).replace(b"#version: 0.2", FULL_HEADER.encode())
        ),
        "has 400 of at least 48,894 merges; copy it again",
    ),
    "no header": (
        lambda good: gzip.compress(gzip.decompress(good).partition(b"\n")[2]),
        "is no vocabulary of CLIP's form",
    ),
    "no merges": (lambda good: gzip.compress(b"#version: 0.2\n"), "is no vocabulary"),
    "words": (lambda good: gzip.compress(b"#version: 0.2\nthe\n"), "line 2, 'the', does not join"),
    "gap": (
        lambda good: gzip.compress(gzip.decompress(good).replace(b"\nt h\n", b"\n")),
        "does not join two known parts",
    ),
    "latin-1": (lambda good: gzip.compress(b"#version\n\xe9 a\n"), "is no vocabulary"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_vocabularies(tmp_path: Path, wrong: str) -> None:
    change, message = WRONG[wrong]
    path = write_vocabulary(tmp_path / "v.gz", RECORDED["merges"])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_an_absent_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Tokenizer(tmp_path / "v.gz")


# ---------------------------------------------------------------------------- masking


def test_share_and_kinds_of_masked_tokens(tokenizer: Tokenizer) -> None:
    texts = make_texts(tokenizer, context_length=77)
    random.seed(1)
    chosen, kept, masked, drawn, places = 0, 0, 0, [], 0
    for _ in range(1500):
        item = texts("the sea and the dog and the house in the city at night ran on the field")
        plain, changed = item.rows
        places += len(plain) - 2
        chosen += len(item.columns)
        for column, label in zip(item.columns, item.labels, strict=True):
            assert plain[column] == label
            masked += changed[column] == tokenizer.mask_id
            kept += changed[column] == label
            if changed[column] not in (tokenizer.mask_id, label):
                drawn.append(changed[column])
        untouched = [column for column in range(len(plain)) if column not in item.columns]
        assert [plain[column] for column in untouched] == [changed[c] for c in untouched]
    assert chosen / places == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / places))
    for part, share in ((masked, 0.8), (kept, 0.1), (len(drawn), 0.1)):
        deviation = math.sqrt(share * (1 - share) / chosen)
        assert part / chosen == pytest.approx(share, abs=4 * deviation + 2 / 915)
    # From the whole vocabulary: bytes, merges and special tokens.
    assert min(drawn) < 40
    assert max(drawn) > 890
    assert len(set(drawn)) > 300


def test_special_tokens_are_never_masked(tokenizer: Tokenizer) -> None:
    texts = make_texts(tokenizer, mask_probability=1.0)
    item = texts("a <|startoftext|> dog <|endoftext|> ran")
    row = item.rows[0]
    special = [column for column, token in enumerate(row) if token >= tokenizer.mask_id]
    assert len(special) == 4
    assert sorted(special + item.columns) == list(range(len(row)))
    assert item.ends == (row.index(tokenizer.end_id),) * 2
    assert row.index(tokenizer.end_id) < len(row) - 1  # upstream reads the first one


def test_the_same_seed_masks_the_same(tokenizer: Tokenizer) -> None:
    def draw(seed: int) -> list[ItemText]:
        random.seed(seed)
        return [texts(caption) for caption in CAPTIONS]

    texts = make_texts(tokenizer, mask_probability=0.5)
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


# ---------------------------------------------------------------------------- rows and batches


class Shout:
    """Stands in for an augmentation."""

    def __call__(self, caption: str) -> str:
        return caption + " augmented"


@pytest.mark.parametrize("static", [False, True])
def test_rows_of_a_batch(tokenizer: Tokenizer, static: bool) -> None:
    plain = [tokenizer.row(caption, 24) for caption in CAPTIONS]
    augmented = [tokenizer.row(caption + " augmented", 24) for caption in CAPTIONS]
    for eda in (None, Shout()):
        for probability, contrast_masked in ((0.0, False), (0.5, False), (0.5, True)):
            texts = make_texts(
                tokenizer, eda=eda, mask_probability=probability, contrast_masked=contrast_masked
            )
            random.seed(5)
            items = [texts(caption) for caption in CAPTIONS]
            tokens_UBT, ends_UB, masked = texts.collate(items, static)
            apart = probability > 0 and not contrast_masked
            assert tokens_UBT.shape == (1 + (eda is not None) + apart, 4, 24)
            assert tokens_UBT.dtype == ends_UB.dtype == torch.int64
            expected = [plain] + [augmented] * (eda is not None) + [plain] * apart
            for u, rows in enumerate(expected):
                assert ends_UB[u].tolist() == [len(row) - 1 for row in rows]
                for b, row in enumerate(rows):
                    assert not tokens_UBT[u, b, len(row) :].any()
            if masked is None:
                assert probability == 0
            else:
                at = 0 if contrast_masked else len(expected) - 1
                flat_NT = tokens_UBT.flatten(0, 1).clone()
                filled = masked.labels_M >= 0
                assert filled.any()
                assert set((masked.rows_M[filled] // 4).tolist()) == {at}
                assert not masked.rows_M[~filled].any()
                assert not masked.columns_M[~filled].any()
                assert (masked.labels_M[~filled] == -100).all()
                # With the labels put back, the rows are the captions' again.
                flat_NT[masked.rows_M[filled], masked.columns_M[filled]] = masked.labels_M[filled]
                tokens_UBT = flat_NT.view(tokens_UBT.shape)
            for u, rows in enumerate(expected):
                for b, row in enumerate(rows):
                    assert tokens_UBT[u, b, : len(row)].tolist() == row


def test_shapes_that_change_are_multiples_of_eight(tokenizer: Tokenizer) -> None:
    texts = make_texts(tokenizer, context_length=77, mask_probability=1.0)
    tokens_UBT, _, masked = texts.collate([texts("a dog"), texts("a dog on the field")], False)
    longest = len(texts("a dog on the field").rows[0])
    assert tokens_UBT.shape[2] == -(-longest // 8) * 8
    assert masked is not None
    chosen = int((masked.labels_M >= 0).sum())
    assert len(masked.labels_M) == -(-chosen // 8) * 8
    odd = make_texts(tokenizer, context_length=21)
    assert odd.collate([odd("sea " * 40)], False)[0].shape[2] == 21


@pytest.mark.parametrize("static", [False, True])
def test_nothing_masked_at_all(tokenizer: Tokenizer, static: bool) -> None:
    texts = make_texts(tokenizer)
    items = [texts(""), texts(" ")]
    tokens_UBT, ends_UB, masked = texts.collate(items, static)
    assert masked is not None
    assert len(masked.labels_M) >= 8
    assert (masked.labels_M == -100).all()
    assert tokens_UBT[:, :, :2].tolist() == [[[tokenizer.start_id, tokenizer.end_id]] * 2] * 2
    assert ends_UB.tolist() == [[1, 1]] * 2


def test_static_shapes_hold_and_the_surplus_stays_unmasked(tokenizer: Tokenizer) -> None:
    texts = make_texts(tokenizer, context_length=34)
    slots = texts.slots(4)
    mean = 4 * 32 * 0.15
    assert mean + 6 * math.sqrt(mean * 0.85) <= slots < mean + 6 * math.sqrt(mean * 0.85) + 8
    assert make_texts(tokenizer, context_length=34, mask_probability=1.0).slots(4) == 4 * 32

    full = make_texts(tokenizer, context_length=34, mask_probability=1.0)
    random.seed(2)
    items = [full("the sea " * 40) for _ in range(4)]
    tokens_UBT, _, masked = texts.collate(items, static=True)
    assert masked is not None
    assert masked.labels_M.shape == (slots,)
    assert (masked.labels_M >= 0).all()
    plain, changed = tokens_UBT.flatten(0, 1)[:4], tokens_UBT.flatten(0, 1)[4:]
    with_slot = set(zip((masked.rows_M - 4).tolist(), masked.columns_M.tolist(), strict=True))
    assert len(with_slot) == slots
    differing = {(int(b), int(t)) for b, t in (plain != changed).nonzero()}
    assert differing <= with_slot
    assert len(differing) > 0.8 * slots

    few = texts.collate([texts("a dog") for _ in range(4)], static=True)
    assert few[0].shape == tokens_UBT.shape
    assert few[2] is not None
    assert few[2].labels_M.shape == (slots,)


def test_texts_pickle(tokenizer: Tokenizer) -> None:
    texts = make_texts(tokenizer, eda=Shout())
    again = pickle.loads(pickle.dumps(texts))
    for use in (texts, again):
        random.seed(7)
        assert use("a dog on the field").rows[:2] == texts("a dog on the field").rows[:2]
