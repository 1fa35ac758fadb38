"""Weights files are found, or come whole over a bad network."""

import hashlib
import http.server
import json
import multiprocessing
import pickle
import random
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo_common import download, preflight
from zoo_common.config import LaunchConfig, RunConfig, section, setting
from zoo_common.errors import UserError
from zoo_common.runs import Model

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What a local server serves, how it fails, and what it was asked."""

    content: bytes = CONTENT
    tag: str = '"v1"'
    modified: str = ""
    ranges: bool = True
    sized: bool = True
    breaks: list[int] = field(default_factory=list)  # bytes after which each answer breaks
    answers: list[int] = field(default_factory=list)  # error codes, one for each request
    pause_s: float = 0.0  # between two blocks
    silent: bool = False  # after the first block
    asked: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/weights/R-101.pkl"


def handler_of(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            server.asked.append(dict(self.headers))
            server.paths.append(self.path)
            if server.answers:
                self.send_error(server.answers.pop(0))
                return
            body = self.begin()
            limit = server.breaks.pop(0) if server.breaks else len(body)
            sent = body[:limit]
            for start in range(0, len(sent), 100_000):
                self.wfile.write(sent[start : start + 100_000])
                time.sleep(60 if server.silent else server.pause_s)

        def begin(self) -> bytes:
            validator = server.tag or server.modified
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=")[:-1]) if asked and server.ranges else 0
            if self.headers.get("If-Range") != validator:
                start = 0
            size = len(server.content)
            if start >= size > 0:
                self.send_response(416)
                self.end_headers()
                return b""
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            if server.tag:
                self.send_header("ETag", server.tag)
            if server.modified:
                self.send_header("Last-Modified", server.modified)
            if server.sized:
                self.send_header("Content-Length", str(size - start))
            self.end_headers()
            return server.content[start:]

        def log_message(self, *words: Any) -> None:
            pass

    return Handler


class QuietServer(http.server.ThreadingHTTPServer):
    """Says nothing of clients that leave, and does not wait for its silent threads."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", download.MIRROR_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    made = Server()
    listener = QuietServer(("127.0.0.1", 0), handler_of(made))
    made.port = listener.server_address[1]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    listener.shutdown()
    listener.server_close()
    thread.join()


def fetch(server: Server, directory: Path, **options: Any) -> Path:
    options = {"pause_s": 0.01, "timeout_s": 5.0, **options}
    return download.fetch(server.url, directory / "R-101.pkl", **options)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_whole_download(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = fetch(
        server, tmp_path / "new", sha256=SHA256.upper(), progress=lambda *at: seen.append(at)
    )
    assert target.read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["R-101.pkl"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert len(server.asked) == 1 and "Range" not in server.asked[0]


@pytest.mark.parametrize(
    ("tag", "modified"),
    [('"v1"', ""), ("", "Sat, 01 Jan 2022 00:00:00 GMT"), ('W/"v1"', "")],
)
def test_a_broken_connection_goes_on(
    tag: str, modified: str, server: Server, tmp_path: Path
) -> None:
    server.tag, server.modified = tag, modified
    server.breaks = [1_200_000, 700_000]
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    resumed = [asked.get("Range") for asked in server.asked]
    if tag.startswith("W/"):  # says that the file is alike, not that its bytes are the same
        assert resumed == [None, None, None]
        return
    assert resumed == [None, "bytes=1200000-", "bytes=1900000-"]
    assert server.asked[1]["If-Range"] == (tag or modified)


def test_a_later_process_goes_on(server: Server, tmp_path: Path) -> None:
    server.breaks = [500_000] * 4
    server.ranges = False  # so that each try begins anew and none brings a megabyte
    with pytest.raises(UserError, match="the connection broke after 500000 of 3000000 bytes"):
        fetch(server, tmp_path)
    assert len(server.asked) == 4
    assert names(tmp_path) == ["R-101.pkl.part", "R-101.pkl.part.json"]
    server.ranges = True
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1]["Range"] == "bytes=500000-"


def test_what_changed_on_the_server_is_taken_anew(server: Server, tmp_path: Path) -> None:
    server.breaks = [100] * 4
    with pytest.raises(UserError):
        fetch(server, tmp_path)
    server.content, server.tag = CONTENT[::-1], '"v2"'
    assert fetch(server, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_part_of_another_address_is_taken_anew(server: Server, tmp_path: Path) -> None:
    server.breaks = [100] * 4
    with pytest.raises(UserError):
        fetch(server, tmp_path)
    notes = tmp_path / "R-101.pkl.part.json"
    content = json.loads(notes.read_text())
    assert server.url not in notes.read_text()  # it may hold a token
    notes.write_text(json.dumps(content | {"source": content["source"][::-1]}))
    (tmp_path / "R-101.pkl.part").write_bytes(b"x" * 1000)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("notes", ["", "{", "[]", '{"source": 1}'])
def test_a_part_without_readable_notes_is_taken_anew(
    notes: str, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "R-101.pkl.part").write_bytes(b"x" * 1000)
    (tmp_path / "R-101.pkl.part.json").write_text(notes)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_part_that_was_whole_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "R-101.pkl.part").write_bytes(CONTENT)
    source = hashlib.sha256(server.url.encode()).hexdigest()
    notes = {"source": source, "validator": "x", "total": len(CONTENT)}
    (tmp_path / "R-101.pkl.part.json").write_text(json.dumps(notes))
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert server.asked == []


def test_a_server_without_sizes(server: Server, tmp_path: Path) -> None:
    server.sized = False
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT


def test_passing_errors_are_tried_again_and_final_ones_are_not(
    server: Server, tmp_path: Path
) -> None:
    server.answers = [503, 429, 500]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    server.answers = [404]
    server.asked.clear()
    target = tmp_path / "other" / "R-101.pkl"
    with pytest.raises(UserError) as error:
        fetch(server, target.parent)
    assert len(server.asked) == 1
    assert str(error.value).startswith(
        f"Cannot download R-101.pkl from {server.url}: the server answers 404 Not Found; "
        f"put the file at {target} by hand"
    )


def test_a_silent_server_is_given_up(server: Server, tmp_path: Path) -> None:
    server.silent = True
    started = time.monotonic()
    with pytest.raises(UserError, match=r"the server was silent for 0\.2 s; put the file at"):
        fetch(server, tmp_path, timeout_s=0.2)
    assert time.monotonic() - started < 5


def test_a_server_that_is_not_there(tmp_path: Path, server: Server) -> None:
    url = "http://127.0.0.1:1/R-101.pkl"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/R-101\.pkl: the server cannot be reached"):
        download.fetch(url, tmp_path / "R-101.pkl", pause_s=0.01)
    with pytest.raises(UserError, match="use http or https"):
        download.fetch("file:///etc/passwd", tmp_path / "R-101.pkl")


def test_a_wrong_checksum_is_thrown_away(server: Server, tmp_path: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(UserError, match=f"thrown away: the sha256 .* is {SHA256[:12]}"):
        fetch(server, tmp_path, sha256=wrong)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "good"),
    [
        (f"model_final_{hashlib.md5(CONTENT).hexdigest()[:6]}.pkl", True),
        ("model_final_a54504.pkl", False),
        (f"resnet50-{SHA256[:8]}.pth", True),
        ("resnet50-0676ba61.pth", False),
        ("model_0004999.pth", True),  # a number of steps
        ("R-50.pkl", True),
    ],
)
def test_checksums_in_names(name: str, good: bool, server: Server, tmp_path: Path) -> None:
    if good:
        assert download.fetch(server.url, tmp_path / name).read_bytes() == CONTENT
        return
    with pytest.raises(UserError, match=f"of {name} should begin with"):
        download.fetch(server.url, tmp_path / name)


def test_the_checksum_in_the_address_counts_for_a_file_of_another_name(
    server: Server, tmp_path: Path
) -> None:
    published = f"http://127.0.0.1:{server.port}/weights/resnet50-"
    target = tmp_path / "resnet50.pth"
    with pytest.raises(UserError, match=r"of resnet50\.pth should begin with 0676ba61"):
        download.fetch(f"{published}0676ba61.pth", target)
    assert names(tmp_path) == []
    assert download.fetch(f"{published}{SHA256[:8]}.pth", target).read_bytes() == CONTENT


def test_a_file_that_is_not_what_it_should_be_is_thrown_away(
    server: Server, tmp_path: Path
) -> None:
    server.content = b"<html>sign in first</html>"

    def check(file: Path) -> None:
        assert file.read_bytes() == server.content
        raise UserError("is a web page.")

    with pytest.raises(UserError, match=r"R-101\.pkl gave was thrown away: is a web page\."):
        fetch(server, tmp_path, check=check)
    assert names(tmp_path) == []


def _fetch_in_process(url: str, target: Path, results: Any) -> None:
    results.put(download.fetch(url, target, SHA256).read_bytes() == CONTENT)


def test_of_several_processes_one_downloads(server: Server, tmp_path: Path) -> None:
    server.pause_s = 0.02
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [
        context.Process(
            target=_fetch_in_process, args=(server.url, tmp_path / "R-101.pkl", results)
        )
        for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert [results.get() for _ in children] == [True] * 3
    assert len(server.asked) == 1
    assert names(tmp_path) == ["R-101.pkl"]


def test_the_next_one_takes_over_when_the_first_is_killed(server: Server, tmp_path: Path) -> None:
    server.pause_s = 0.05
    context = multiprocessing.get_context("fork")
    target = tmp_path / "R-101.pkl"
    first = context.Process(
        target=_fetch_in_process, args=(server.url, target, context.SimpleQueue())
    )
    first.start()
    part = tmp_path / "R-101.pkl.part"
    while not part.exists() or part.stat().st_size < 500_000:
        time.sleep(0.01)
    threading.Timer(0.2, first.kill).start()
    waits: list[tuple[int, int]] = []
    fetch(server, tmp_path, sha256=SHA256, progress=lambda *at: waits.append(at))
    first.join()
    assert target.read_bytes() == CONTENT
    assert waits[0][1] == 0  # another process' bytes
    assert int(server.asked[1]["Range"].removeprefix("bytes=")[:-1]) >= 500_000


def test_proxies_are_taken_from_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("no_proxy", "")
    target = download.fetch("http://weights.invalid/R-101.pkl", tmp_path / "R-101.pkl")
    assert target.read_bytes() == CONTENT
    assert server.paths == ["http://weights.invalid/R-101.pkl"]


def test_a_full_disk_is_told_and_the_server_not_asked_again(server: Server, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"Cannot write .*R-101\.pkl .* File too large; put"):
            fetch(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(server.asked) == 1
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert server.asked[1]["Range"]  # with more room it goes on


def test_a_place_that_cannot_be_written(server: Server) -> None:
    with pytest.raises(UserError, match=r"Cannot write /proc/nothing/R-101\.pkl"):
        fetch(server, Path("/proc/nothing"))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set, a model's directory and a cache of the user."""
    for name in ("disk/coco", "model/data/pretrained", "here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def find(tree: Path, name: str, **options: Any) -> Path:
    return download.find_or_fetch(
        name, tree / "disk" / "coco", model_directory=tree / "model", **options
    )


def test_a_bare_name_is_found_in_every_place_in_order(tree: Path) -> None:
    places = [
        "disk/coco",
        "disk",
        "disk/coco/pretrained",
        "disk/pretrained",
        "model",
        "model/data/pretrained",
        "here",
        "cache/zoo-common",
    ]
    for place in reversed(places):
        (tree / place).mkdir(exist_ok=True, parents=True)
        (tree / place / "R-101.pkl").write_bytes(b"x")
        assert find(tree, "R-101.pkl") == tree / place / "R-101.pkl"


def test_paths_are_taken_as_given(tree: Path) -> None:
    (tree / "here" / "sub").mkdir()
    file = tree / "here" / "sub" / "w.pkl"
    file.write_bytes(CONTENT)
    assert find(tree, str(file), sha256=SHA256) == file
    assert find(tree, "sub/w.pkl") == Path("sub/w.pkl")
    with pytest.raises(UserError, match=r"no weights file other/w\.pkl"):
        find(tree, "other/w.pkl")
    with pytest.raises(UserError, match="has not the sha256"):
        find(tree, str(file), sha256="0" * 64)


def test_a_name_without_address_says_where_it_was_looked_for(tree: Path) -> None:
    with pytest.raises(UserError) as error:
        find(tree, "R-7.pkl")
    message = str(error.value)
    assert f"{tree}/disk/coco, {tree}/disk, {tree}/disk/coco/pretrained, " in message
    assert f"put it at {tree}/disk/R-7.pkl" in message


def test_an_absent_file_is_downloaded_beside_the_data_set(tree: Path, server: Server) -> None:
    assert find(tree, "R-101.pkl", url=server.url) == tree / "disk" / "R-101.pkl"
    assert find(tree, "R-101.pkl", url=server.url).read_bytes() == CONTENT
    assert find(tree, server.url) == tree / "disk" / "R-101.pkl"
    assert len(server.asked) == 1
    base = server.url.removesuffix("R-101.pkl")
    assert find(tree, "my R-50.pkl", url=base) == tree / "disk" / "my R-50.pkl"
    assert server.paths[1] == "/weights/my%20R-50.pkl"
    with pytest.raises(UserError, match="names no file"):
        find(tree, base)


def test_a_download_without_a_writable_disk_goes_to_the_cache(tree: Path, server: Server) -> None:
    found = download.find_or_fetch("R-101.pkl", None, server.url)
    assert found == tree / "cache" / "zoo-common" / "R-101.pkl"
    found.unlink()
    assert download.find_or_fetch("R-101.pkl", Path("/data"), server.url) == found


def test_a_mirror_stands_for_every_public_address(
    tree: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(download.MIRROR_VARIABLE, f"http://127.0.0.1:{server.port}/mirror")
    find(tree, "https://public.invalid/a/R-101.pkl")
    find(tree, "R-50.pkl", url="https://public.invalid/b/R-50.pkl")
    assert server.paths == ["/mirror/R-101.pkl", "/mirror/R-50.pkl"]


@dataclass
class WeightsConfig:
    start: str = setting("R-101.pkl", "weights to start from", kind="weights")
    url: str = setting("", "address of them")
    sha256: str = setting("", "their checksum")


@dataclass
class DataConfig:
    path: str = setting("", "data", kind="path")


@dataclass
class Config:
    data: DataConfig = section(DataConfig)
    weights: WeightsConfig = section(WeightsConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


WEIGHT_ADDRESSES: dict[str, str] = {}
PICKLE = pickle.dumps({"conv1_w": np.ones(3, np.float32)}, protocol=2)


def prepare(tree: Path, start: str, resume: str = "", **settings: str) -> Config:
    """What the launcher does before it starts a process."""
    config = Config(DataConfig(str(tree / "disk" / "coco")), WeightsConfig(start, **settings))
    config.run.resume = resume
    model = Model(tree / "model", "Toy", {}, Config, {})
    preflight.absolute_paths(model, config, tree / "here")
    preflight.check_weights(model, config)
    preflight.fetch_weights(model, config)
    preflight.follow_checkpoints(model, config, tree / "old", tree / "aside")
    return config


def test_the_launcher_finds_what_a_weights_setting_names(
    tree: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = PICKLE
    beside = str(tree / "disk" / "R-101.pkl")
    with pytest.raises(UserError, match=r"no weights file R-101\.pkl in .*: put it at"):
        prepare(tree, "R-101.pkl")
    monkeypatch.setitem(WEIGHT_ADDRESSES, "R-101.pkl", server.url)
    assert prepare(tree, "R-101.pkl").weights.start == beside
    assert "weights.start: downloading R-101.pkl" in capsys.readouterr().out
    assert prepare(tree, server.url).weights.start == beside  # found by name
    assert prepare(tree, "R-50.pkl", url=server.url).weights.start == str(tree / "disk/R-50.pkl")
    assert prepare(tree, "").weights.start == ""
    assert prepare(tree, "R-7.pkl", resume="last").weights.start == "R-7.pkl"  # not needed
    assert len(server.asked) == 2
    for name in ("here/mine.pkl", "here/sub/mine.pkl", "old/mine.pkl"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(PICKLE)
    assert prepare(tree, "mine.pkl").weights.start == str(tree / "here/mine.pkl")
    assert prepare(tree, "sub/mine.pkl").weights.start == str(tree / "here/sub/mine.pkl")
    moved = str(tree / "aside/mine.pkl")
    assert prepare(tree, str(tree / "old/mine.pkl")).weights.start == moved


def test_the_launcher_refuses_weights_that_are_no_weights(tree: Path, server: Server) -> None:
    server.content = b"<html>sign in first</html>"
    with pytest.raises(UserError, match=r"thrown away: .*R-101\.pkl\.part is no PyTorch checkpoi"):
        prepare(tree, "R-101.pkl", url=server.url)
    server.content = PICKLE[:-10]
    with pytest.raises(UserError, match=r"thrown away: .*\.part is truncated, damaged or no pick"):
        prepare(tree, "R-101.pkl", url=server.url)
    assert names(tree / "disk") == ["coco"]
    (tree / "here" / "evil.pkl").write_bytes(b"\x80\x02cos\nsystem\nU\x02ls\x85R.")
    with pytest.raises(UserError, match=r"evil\.pkl was refused"):
        prepare(tree, "evil.pkl")
    with pytest.raises(UserError, match=r"there is no checkpoint file .*/here/sub/none\.pkl"):
        prepare(tree, "sub/none.pkl")
