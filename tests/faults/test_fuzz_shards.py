"""DeCLIP's shards: tar files of strangers, and the index beside them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import amounts, as_json, feed, spoiled, spoiled_json, watched
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from PIL import Image

from declip import shard_index
from declip.shards import ShardImages, open_shards
from zoo_common import shard_names
from zoo_common.errors import UserError
from zoo_common.images import DamagedImageError


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DATA_DIR", str(tmp_path / "zoo data"))


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 99, 200)).save(stream, "PNG")
    return stream.getvalue()


KINDS = [
    tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE,
    tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE,
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"Z",
]  # fmt: skip
NAMES = [
    "000.png", "000.txt", "000.json", "001.PNG", "001.json", "../000.png", "/etc/passwd.png",
    "a/../../b.png", "..\\x.png", "C:\\x.png", "a/b/000.txt", ".png", "x", "", "a" * 200 + ".png",
    "é.png", "\udcff.png", "000.png\0.txt", "a\nb.txt", "$(id).png", "000.pyd", "000.pkl", "000.pt",
]  # fmt: skip


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    head = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return head + data + bytes(-len(data) % 512)


END = bytes(1024)
CAPTION = json.dumps({"caption": "a blue point"}).encode()
VALID = b"".join(
    [
        member("000.png", picture()),
        member("000.txt", b"a blue point"),
        member("a/001.png", picture()),
        member("a/001.json", CAPTION),
        END,
    ]
)


@st.composite
def tars(draw: DrawFn) -> bytes:
    """Members of any kind, whose headers say what is not so, between good ones."""
    parts = [VALID[: -len(END)]] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(NAMES))
        data = draw(st.sampled_from([picture(), b"words", CAPTION, b"", b"{}", b"\xff" * 600]))
        kind = draw(st.sampled_from([*KINDS[:2] * 6, *KINDS]))
        link = draw(st.sampled_from(["", "/etc/passwd", "000.png", "../../x"]))
        part = bytearray(member(name, data, kind, link))
        if draw(st.integers(0, 3)) == 0:
            size = draw(st.sampled_from([
                b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"\x80" + b"\xff" * 11,
                b"\xff" * 12, b"\x80" + bytes(7) + b"\x10\0\0\0", b"            ", b"zzz",
            ]))  # fmt: skip
            part[124 : 124 + len(size)] = size
            if draw(st.booleans()):  # with a checksum that fits
                part[148:156] = b" " * 8
                part[148:156] = b"%06o\0 " % sum(part[:512])
        parts.append(bytes(part))
    return b"".join(parts) + draw(st.sampled_from([END, END, END, b"", b"x" * 700]))


def use(images: ShardImages) -> None:
    for number in range(len(images)):
        images.item_id(number)
        for read in (images.caption, images.image):
            try:
                read(number)
            except DamagedImageError:
                continue


WORDS = [
    b"ustar\x0000", b"ustar  \0", b"GNU.sparse.map=0,9", b"20 size=99999999999\n", b"../", b".png",
    b"30 GNU.sparse.realsize=999999999\n", b"26 path=../../../etc/x.png\n", bytes(512), bytes(1024),
    b"K", b"L", b"S", b"x", b"g", b"2", b"1", b"3", b"77777777777\0", b"\x80\xff\xff\xff",
]  # fmt: skip


@amounts
def test_shards(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "shards" / "000000.tar"
    path.parent.mkdir()

    def read_shard(data: bytes) -> None:
        path.write_bytes(data)
        (shard,), rows_N = shard_index.scan(path)
        assert shard.samples == len(rows_N)
        images = ShardImages.__new__(ShardImages)
        images.__init__([path], index_of(path.parent, shard, rows_N), [0], [shard.samples])
        use(images)
        images.close()

    read_shard(VALID)
    inputs = st.one_of(tars(), tars(), spoiled([VALID], WORDS))
    feed(read_shard, inputs, amount, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index", "shards"]
    assert [p.name for p in path.parent.iterdir()] == ["000000.tar"]


def index_of(directory: Path, shard: shard_index.Shard, rows_N: Any) -> Path:
    """An index in a file, without waiting for the disk as one that lasts does."""
    place = directory.parent / "index"
    place.mkdir(exist_ok=True)
    np.save(place / "shards.npy", rows_N)
    content = {"format": 1, "shards": [{"name": shard.name, "samples": shard.samples, "bytes": 1}]}
    (place / "shards.json").write_bytes(as_json(content))
    return place


@amounts
def test_indexes_of_shards(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    path.write_bytes(VALID)
    shard_index.save_index(tmp_path, shard_index.scan(path), plan={"rows": 2}, left_out=0)
    tables = {name: (tmp_path / name).read_bytes() for name in ("shards.json", "shards.npy")}
    content = json.loads(tables["shards.json"])

    def read_index(given: tuple[str, bytes]) -> None:
        name, data = given
        for other, good in tables.items():
            (tmp_path / other).write_bytes(data if other == name else good)
        images = open_shards(str(tmp_path))
        use(images)
        images.close()

    read_index(("shards.json", tables["shards.json"]))
    rows = spoiled(
        [tables["shards.npy"]], [b"|O", b"'descr'", b"'shape': (9,)", b"__import__('os')"]
    )
    inputs = st.one_of(
        st.tuples(st.just("shards.json"), spoiled_json([content])),
        st.tuples(st.just("shards.npy"), rows),
    )
    feed(read_index, inputs, amount, tmp_path)


@amounts
def test_patterns_of_shards(amount: int, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number:02d}.tar").write_bytes(VALID)
    pieces = [
        "{00..02}", "{0..99999999999}", "{2..0}", "{a,b}", "{", "}", "{}", "{00,01}", "*", "?",
        "[0]",
        "[", "**", "00", "01", ".tar", "/", "..", "~", "~nobody", "pipe:touch ran", "s3://x/", "::",
        "$(touch ran)", "`touch ran`", ";", "|", "\0", "a" * 300, "é", "\udcff", "\n",
        "{1..9}" * 9,
    ]  # fmt: skip
    patterns = st.lists(st.sampled_from(pieces) | st.text(max_size=3), min_size=1, max_size=5)

    def read_pattern(words: list[str]) -> None:
        pattern = f"{tmp_path}/{''.join(words)}" if words[0] != "~nobody" else "".join(words)
        shard_names.is_pattern(pattern)
        assert shard_names.expand(pattern)

    read_pattern(["{00..02}", ".tar"])
    inputs = patterns | st.tuples(st.sampled_from(pieces[:10]), st.just(".tar")).map(list)
    feed(read_pattern, inputs, amount, tmp_path)


def test_members_that_lead_out_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    bad = [
        member("../000.png", picture()), member("../000.txt", b"words"),
        member("/001.png", picture()), member("/001.txt", b"words"),
        member("002.png", b"", tarfile.SYMTYPE, "/etc/passwd"), member("002.txt", b"words"),
        member("003.png", b"", tarfile.CHRTYPE), member("003.txt", b"words"),
    ]  # fmt: skip
    path.write_bytes(b"".join([*bad, VALID]))
    with watched(tmp_path):
        (shard,), rows_N = shard_index.scan(path)
    assert (shard.samples, len(rows_N), shard.passed_over) == (2, 2, 8)


@pytest.mark.parametrize("pattern", ["pipe:touch ran", "http://x/{0..9}.tar", "a::b.tar"])
def test_a_pattern_is_never_a_command_or_an_address(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with watched(tmp_path), pytest.raises(UserError, match="never followed"):
        shard_names.expand(pattern)
    assert not any(tmp_path.iterdir())
