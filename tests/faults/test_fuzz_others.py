"""What else is handed in: trees of pictures, downloads, rank tables, vocabularies, words."""

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import shutil
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fuzzing import amounts, as_json, feed, odd_values, spoiled, spoiled_json
from hypothesis import strategies as st

from declip.tokenizer import Tokenizer
from declip.zero_shot import read_prompts
from glip.bert import find_bert, read_config
from glip.phrases import read_text
from zoo_common import download, imagenet, layouts, rank_table, yfcc
from zoo_common.errors import UserError

NAMES = [
    "train", "val", "cat", "dog", "a b", "$(touch ran)", "`touch ran`", ";x", "é", "\udcff", "..a",
    "a\nb", "-rf", "*", "1.jpg", "2.JPEG", "3.png", "x.txt", ".jpg", "a" * 200 + ".jpg",
    "annotations",
    "instances_val2017.json", "coco", "coco2017", "val2017", "dataset", "val_official.json",
    "imagenet_val", "yfcc15m_clean_open_data", "yfcc15m_clean_open_data.json",
]  # fmt: skip


@amounts
def test_trees_of_pictures(amount: int, tmp_path: Path) -> None:
    root = tmp_path / "data"
    name = st.sampled_from(NAMES)
    entry = st.tuples(
        st.lists(name, min_size=1, max_size=4), st.sampled_from(["file", "folder", "link", "fifo"])
    )
    pair = [(["train", "cat", "1.jpg"], "file"), (["val", "cat", "2.JPEG"], "file")]
    trees = st.builds(
        lambda whole, more: [*(pair if whole else []), *more],
        st.booleans(),
        st.lists(entry, max_size=5),
    )

    def read_tree(entries: list[tuple[list[str], str]]) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for parts, kind in entries:
            path = root.joinpath(*parts)
            with contextlib.suppress(OSError):  # a name that is taken, or of a file's child
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "file":
                    path.touch()
                elif kind == "folder":
                    path.mkdir()
                elif kind == "link":
                    path.symlink_to(root if len(parts) > 1 else tmp_path / "gone")
                else:
                    os.mkfifo(path)
        for check in (layouts.check_coco, yfcc.check_tree):
            with contextlib.suppress(UserError):
                check(root)
        imagenet.check_tree(root)
        for split in ("train", "val"):
            index = imagenet.build_index(root, split)
            for number in range(len(index)):
                index.item_id(number).encode()
                assert Path(index.path(number)).is_relative_to(root)

    feed(read_tree, trees, amount, tmp_path)


HEADERS = [
    "Content-Length",
    "Content-Range",
    "ETag",
    "Last-Modified",
    "Content-Encoding",
    "Location",
]
VALUES = [
    "", "0", "5", "-1", "99999999999999999999", "bytes 0-4/5", "bytes 5-4/*", "x", '"tag"',
    'W/"tag"',
    "é", "\r\nX: y", "9" * 4000, "gzip", "file:///etc/passwd", "1e3",
]  # fmt: skip


@amounts
def test_answers_of_servers(amount: int, tmp_path: Path) -> None:
    """What a mirror may answer, and what an earlier try may have left beside the part."""
    target = tmp_path / "weights.pth"
    part, sidecar = tmp_path / "weights.pth.part", tmp_path / "weights.pth.part.json"
    url = "http://mirror/weights.pth"
    answer = st.tuples(
        st.sampled_from([200, 200, 200, 206, 206, 204, 301, 404, 416, 503]),
        st.dictionaries(st.sampled_from(HEADERS), st.sampled_from(VALUES) | st.text(max_size=4)),
        st.binary(max_size=12),
        st.sampled_from(["", "", "", "break", "timeout", "http"]),
    )
    note = {"source": hashlib.sha256(url.encode()).hexdigest(), "validator": '"tag"', "total": 5}
    left = st.none() | st.tuples(st.binary(max_size=8), spoiled_json([note]))

    def read_answers(given: tuple[Any, list[Any]]) -> None:
        before, answers = given
        for file in (target, part, sidecar):
            file.unlink(missing_ok=True)
        if before is not None:
            part.write_bytes(before[0])
            sidecar.write_bytes(before[1])
        waiting = list(answers)
        opener = SimpleNamespace(open=lambda request, timeout: respond(request, waiting))
        with mock.patch.object(urllib.request, "build_opener", lambda: opener):
            download.fetch(url, target, pause_s=0)
        assert target.is_file() and not part.exists() and not sidecar.exists()

    inputs = st.tuples(left, st.lists(answer, min_size=1, max_size=5))
    feed(read_answers, inputs, amount, tmp_path)


def respond(request: urllib.request.Request, waiting: list[Any]) -> Any:
    """The next answer, as urllib's opener gives or raises it."""
    if not waiting:
        raise urllib.error.URLError("no more")
    status, fields, body, fault = waiting.pop(0)
    headers = Message()
    for name, value in fields.items():
        headers[name] = "".join(value.splitlines())
    if fault == "http" or status >= 300:
        raise urllib.error.HTTPError(request.full_url, status, "x", headers, io.BytesIO())
    if fault:
        raise TimeoutError if fault == "timeout" else http.client.IncompleteRead(body)
    length = str(fields.get("Content-Length", ""))
    stream = io.BytesIO(body)
    return contextlib.nullcontext(
        SimpleNamespace(
            status=status,
            headers=headers,
            length=int(length) if length.isascii() and length.isdecimal() else None,
            read1=stream.read1,
        )
    )


TABLE = {
    "version": "1.0",
    "server_count": "2",
    "server_list": [
        {"server_id": f"10.0.0.{server}", "device": [
            {"device_id": str(card), "device_ip": f"10.1.{server}.{card}",
             "rank_id": str(2 * server + card)} for card in range(2)]}
        for server in range(2)
    ],
    "status": "completed",
}  # fmt: skip


@amounts
def test_rank_tables(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "rank_table.json"

    def read_table(data: bytes) -> None:
        path.write_bytes(data)
        assert rank_table.read(path)

    read_table(as_json(TABLE))
    feed(read_table, spoiled_json([TABLE]), amount, tmp_path, (ValueError,))


@amounts
def test_vocabularies(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt.gz"
    text = b'"tiny#version: 0.2\nh e\nhe l\nl o</w>\nhel lo</w>\n'
    packed = spoiled([gzip.compress(text)])
    unpacked = spoiled([text], [b"</w>", b" ", b"#version"]).map(gzip.compress)

    def read_vocabulary(data: bytes) -> None:
        path.write_bytes(data)
        tokenizer = Tokenizer(path)
        assert tokenizer.row("hello, wörld \ud800 <|mask|>", 9)

    read_vocabulary(gzip.compress(text))
    feed(read_vocabulary, st.one_of(packed, unpacked), amount, tmp_path)


@amounts
def test_settings_of_bert(amount: int, tmp_path: Path) -> None:
    config = {"model_type": "bert", "vocab_size": 4, "hidden_size": 8}
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\nb\n")

    def read_settings(data: bytes) -> None:
        (tmp_path / "config.json").write_bytes(data)
        find_bert(str(tmp_path), "")
        assert read_config(tmp_path)["model_type"] == "bert"

    read_settings(as_json(config))
    feed(read_settings, spoiled_json([config]), amount, tmp_path)


@amounts
def test_prompts(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"

    def read_sentences(data: bytes) -> None:
        path.write_bytes(data)
        for prompt in read_prompts(str(path)):
            assert prompt.replace("{}", "cat")

    valid = ["a photo of a {}.\na {0}, é\n".encode()]
    feed(
        read_sentences,
        spoiled(valid, [b"{}", b"{0.__class__}", b"{", b"\xc2\x85"]),
        amount,
        tmp_path,
    )


@amounts
def test_phrases(amount: int, tmp_path: Path) -> None:
    """Lists of phrases; a sentence is nltk's to read."""
    words = st.sampled_from(["a red circle", ". ", ".", " ", "dog", "DOG", "\n", "ß", "İ"])
    texts = st.lists(words | odd_values.map(str), min_size=1, max_size=6).map("".join)

    def read_phrases(text: str) -> None:
        phrases, caption = read_text(f"{text}. ")
        for phrase, spans in zip(phrases, caption.spans, strict=True):
            assert [caption.text[begin:end] for begin, end in spans] == [phrase]

    feed(read_phrases, texts, amount, tmp_path)


def test_a_note_of_another_download_is_not_believed(tmp_path: Path) -> None:
    """A part that a stranger left beside the target is no part of what is asked for."""
    target = tmp_path / "weights.pth"
    (tmp_path / "weights.pth.part").write_bytes(b"evil!")
    note = {"url": "http://other/weights.pth", "validator": '"tag"', "total": 5}
    (tmp_path / "weights.pth.part.json").write_text(json.dumps(note))
    waiting = [(200, {"Content-Length": "4"}, b"good", "")]
    opener = SimpleNamespace(open=lambda request, timeout: respond(request, waiting))
    with mock.patch.object(urllib.request, "build_opener", lambda: opener):
        download.fetch("http://mirror/weights.pth", target, pause_s=0)
    assert target.read_bytes() == b"good"
