"""tools/lock.py, with a package index of its own, and what the repository's files of hashes say."""

import hashlib
import importlib
import io
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, for Python 3.11 and no NPUs."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("lock")
    monkeypatch.setattr(module, "PAIRS", ())
    monkeypatch.setattr(module, "PYTHONS", (11,))
    return module


class Index:
    """A package index on this machine.

    Attributes:
        url: its address.
        files: each file's contents.
        pages: what it lists of each package.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.pages: dict[str, list[dict[str, Any]]] = {}
        self.url = ""

    def add(
        self,
        name: str,
        version: str,
        *needs: str,
        tag: str = "py3-none-any",
        beside: bool = False,
    ) -> None:
        """Adds a wheel, with its metadata ``beside`` it or only within."""
        content = io.BytesIO()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
        with zipfile.ZipFile(content, "w") as wheel:
            wheel.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
            wheel.writestr(f"{name}/_vendor/other-1.dist-info/METADATA", "Name: other\n")
            wheel.writestr(f"{name}/data", tag.encode() + b"x" * 200_000)
        file = f"{name}-{version}-{tag}.whl"
        self.put(name, file, content.getvalue())
        if beside:
            self.pages[name][-1]["core-metadata"] = {"sha256": "of the metadata"}
            self.files[f"{file}.metadata"] = metadata.encode()
            self.files[file] = b"nobody needs to read it"

    def put(self, name: str, file: str, content: bytes) -> None:
        """Adds any file."""
        self.files[file] = content
        sha = hashlib.sha256(content).hexdigest()
        entry = {"filename": file, "url": f"{self.url}/{file}", "hashes": {"sha256": sha}}
        self.pages.setdefault(name, []).append(entry)


def fill(index: Index) -> None:
    """Adds all that the repository ``zoo`` pins, and some things beside."""
    index.add("torchvision", "1.0")
    index.add("setuptools", "1.0")
    index.add("torch", "1.0", 'gpu[fast]>=3; platform_system == "Linux"')
    index.add("one", "1.0", 'two>=2; python_version < "3.12"', 'no; sys_platform == "win32"')
    index.add("one", "2.0")
    index.put("one", "one-1.0.tar.gz", b"source")
    index.put("one", "one-1.0.exe", b"of old")
    index.add("two", "2.0", beside=True)
    for machine in ("x86_64", "aarch64"):
        tag = f"cp311-cp311-manylinux_2_28_{machine}"
        index.add("gpu", "3.0", 'two; extra == "fast"', tag=tag)
        index.add("torch_npu", "1.0", "torch==1.0", tag=tag)
    index.pages["torch-npu"] = index.pages.pop("torch_npu")
    index.add("checker", "4.0", "two")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that sends parts of files, and has what ``zoo`` pins; pip would ask it."""
    pytest.importorskip("tomllib", reason="making the files needs Python 3.11")
    known = Index()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            if name in known.pages:
                assert "json" in self.headers["Accept"]
                return self.answer(200, json.dumps({"files": known.pages[name]}).encode())
            if name not in known.files:
                return self.answer(404, b"")
            content, part = known.files[name], self.headers["Range"]
            if part is None:
                return self.answer(200, content)
            first, last = (int(word) for word in part.removeprefix("bytes=").split("-"))
            return self.answer(206, content[first : last + 1], f"bytes */{len(content)}")

        def answer(self, code: int, body: bytes, content_range: str = "") -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Stays silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"{known.url}/")
    fill(known)
    yield known
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A repository without models, whose package needs ``one``."""
    write(tmp_path, "common/pyproject.toml", project("zoo-common", "one>=1", digits="two"))
    write(tmp_path, "common/npu_sim/pyproject.toml", project("zoo-npu-sim", "torch", digits=""))
    write(tmp_path, "ci/requirements.txt", "# why\nchecker\n")
    write(tmp_path, "tools/pins/common.txt", "# why\none==1.0\ntwo==2.0\n")
    write(tmp_path, "tools/pins/default.txt", "torch==1.0\ntorchvision==1.0\nsetuptools==1.0\n")
    write(tmp_path, "tools/pins/cuda.txt", 'gpu==3.0; sys_platform == "linux"\n')
    write(tmp_path, "tools/pins/ci.txt", "checker==4.0\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def project(name: str, need: str, digits: str) -> str:
    lines = ["[project]", f'name = "{name}"', f'dependencies = ["{need}"]']
    return "\n".join([*lines, "[project.optional-dependencies]", f'digits = ["{digits}"]', ""])


def test_the_repository_has_the_hashes_of_its_pins(lock: ModuleType) -> None:
    assert list(lock.check(ROOT)) == []


def test_all_files_of_a_version_are_there_and_pass_the_check(
    lock: ModuleType, index: Index, zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lock.main([], zoo) == 0, capsys.readouterr().err
    text = (zoo / "tools/pins/hashes/common.txt").read_text()
    wheel, _, source, _ = (entry["hashes"]["sha256"] for entry in index.pages["one"])
    first, second = sorted([wheel, source])
    assert f"one==1.0 \\\n    --hash=sha256:{first} \\\n    --hash=sha256:{second}\ntwo" in text
    cuda = (zoo / "tools/pins/hashes/cuda.txt").read_text()
    assert 'gpu==3.0; sys_platform == "linux" \\\n    --hash=' in cuda
    assert cuda.count("--hash=") == 2
    assert lock.main(["--check"], zoo) == 0
    assert (
        "Linux x86_64 Python 3.11 (common, default, cuda): 6 packages, 0 problems"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("common.txt", "two==2.0\n", "", 'one needs two>=2; python_version < "3.12", of which '),
        ("common.txt", "two==2.0", "two==1.0", "but the pin is two==1.0 (the newest that fits is "),
        ("common.txt", "two==2.0", "two==2.0\nspare==1.0", "common.txt: nothing needs spare."),
        ("cuda.txt", '; sys_platform == "linux"', "", "gpu==3.0 has no wheel, on Darwin arm64 "),
        ("ci.txt", "checker==4.0\n", "", "the environment needs checker, of which there is no pin"),
    ],
)
def test_what_the_pins_lack_is_told_and_nothing_is_written(
    lock: ModuleType,
    index: Index,
    zoo: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    old: str,
    new: str,
    sentence: str,
) -> None:
    index.add("two", "1.0")
    index.add("spare", "1.0")
    pins = zoo / "tools/pins" / file
    assert old in pins.read_text()
    pins.write_text(pins.read_text().replace(old, new))
    assert lock.main([], zoo) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.splitlines()[-1] == "Nothing was written: mend tools/pins/*.txt."
    assert not (zoo / "tools/pins/hashes").exists()


def test_a_wheel_for_another_python_is_none(
    lock: ModuleType, index: Index, zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index.pages["checker"][0]["requires-python"] = ">=3.12"
    index.pages["two"][0]["yanked"] = "broken"
    assert lock.main([], zoo) == 1
    said = capsys.readouterr().err
    where = "Linux x86_64 Python 3.11 (common, default, cuda, ci), Linux aarch64 Python 3.11"
    assert f"checker==4.0 has no wheel, on {where}" in said
    assert "two==2.0 has no wheel" in said


def test_pins_for_npus_leave_torch_to_its_own_index(
    lock: ModuleType, index: Index, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo_common.versions_npu import Pair

    index.pages["torch"].clear()
    index.add("torch", "1.0", "two", 'triton; platform_system == "Linux" and extra == ""')
    write(zoo, "tools/pins/cuda.txt", 'triton==3.0; sys_platform == "linux"\n')
    for machine in ("x86_64", "aarch64"):
        index.add("triton", "3.0", tag=f"cp311-cp311-manylinux_2_28_{machine}")
    monkeypatch.setattr(lock, "PAIRS", (Pair("1.0", "1.0", "1.0", (11, 11)),))
    lines = ["--extra-index-url https://torch", "torch==1.0+cpu", "torchvision==1.0"]
    lines += ["torch-npu==1.0", "setuptools==1.0", ""]
    write(zoo, "tools/pins/npu.txt", "\n".join(lines))
    assert lock.main([], zoo) == 0
    npu = (zoo / "tools/pins/hashes/npu.txt").read_text()
    assert "torch-npu==1.0 \\" in npu and "setuptools==1.0 \\" in npu
    assert "torch==" not in npu and "torchvision" not in npu
    assert list(lock.check(zoo)) == []


def test_an_index_that_does_not_answer_is_told(
    lock: ModuleType, index: Index, zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del index.pages["one"]
    assert lock.main([], zoo) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{index.url}/one/ cannot be read: HTTP Error 404")
    assert len(said.splitlines()) == 1
    index.files["one"] = b"<html>"
    assert lock.main([], zoo) == 1
    assert "does not list one in JSON (PEP 691)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("common.txt", "timm==1.0.31", "timm==1.0.30", "hashes/common.txt lacks timm==1.0.30."),
        ("common.txt", "timm==1.0.31", "timm==1.0.30", "has timm==1.0.31, which common.txt lacks."),
        ("hashes/common.txt", "sha256:0", "sha256:g", "has no hashes, or one that is none."),
        ("hashes/npu.txt", "sha256:", "sha256:0", "has no hashes, or one that is none."),
        ("hashes/ci.txt", "--hash=sha256", "--hash=md5", "has no hashes, or one that is none."),
    ],
)
def test_the_check_finds_what_does_not_fit(
    lock: ModuleType, tmp_path: Path, file: str, old: str, new: str, sentence: str
) -> None:
    shutil.copytree(ROOT / "tools/pins", tmp_path / "tools/pins")
    path = tmp_path / "tools/pins" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert any(sentence in said for said in lock.check(tmp_path))


def test_the_check_finds_files_that_are_missing_too_many_or_at_odds(
    lock: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "tools/pins", tmp_path / "tools/pins")
    hashes = tmp_path / "tools/pins/hashes"
    (hashes / "cuda.txt").unlink()
    (hashes / "old.txt").touch()
    lines = (hashes / "npu.txt").read_text().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if line.startswith("setuptools"))
    lines[at + 1] = f"    --hash=sha256:{'0' * 64} \\\n"
    (hashes / "npu.txt").write_text("".join(lines))
    assert lock.main(["--check"], tmp_path) == 1
    said = capsys.readouterr().err.splitlines()
    assert "tools/pins/hashes/cuda.txt is missing." in said
    assert "tools/pins/hashes/old.txt belongs to no pins." in said
    assert any(
        line.startswith("tools/pins/hashes/npu.txt: setuptools==84.2.1 has") for line in said
    )
    assert said[-1] == "Run .venv/bin/python tools/lock.py."
