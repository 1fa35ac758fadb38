"""The lists of captions and of validation pictures: what is read, refused, resumed and shared."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from declip import index_build
from declip.index import (
    CaptionIndex,
    RowError,
    ValIndex,
    clean_caption,
    open_index,
    open_val_index,
)
from zoo_common.errors import UserError

NAME = "yfcc15m_clean_open_data"
INDEX = f"{NAME}.json.zoo-cache"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("ZOO_DATA_DIR", str(directory))
    return directory


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each part that is read, as long as the test lasts."""
    read_part, sizes = index_build._read_part, []

    def counted(*arguments: Any) -> Any:
        part = read_part(*arguments)
        sizes.append(part.facts.end - part.facts.begin)
        return part

    monkeypatch.setattr(index_build, "_read_part", counted)
    return sizes


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"filename": f"{number % 7}/{number}.jpg", "caption": f"caption {number}"} | changes


def plant(root: Path, rows: list[Any], *, pictures: bool = True) -> Path:
    """A data set: rows are JSON values, or lines as they are."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{NAME}.json").write_bytes(b"".join(line + b"\n" for line in lines))
    if pictures:
        for number in range(7):
            (root / NAME / str(number)).mkdir(parents=True, exist_ok=True)
        for number in range(len(rows)):
            (root / NAME / f"{number % 7}/{number}.jpg").touch()
    return root


def rows_of(index: CaptionIndex) -> list[tuple[str, str]]:
    return [(index.item_id(n), index.caption(n)) for n in range(len(index))]


# ------------------------------------------------------------------ what is read


def test_rows_paths_and_captions(tmp_path: Path) -> None:
    rows = [
        row(0),
        row(1, caption=["  the first counts ", "the second"], url="https://example.org"),
        row(2, caption="señor Ωμέγα — \U0001f600\u2028 in one line"),
        row(3, filename=f"{NAME}/3/3.jpg", label=7, tag=["x"]),
        row(4, filename="naïve/名.jpg"),
    ]
    index = open_index(plant(tmp_path, rows))
    assert rows_of(index) == [
        ("0/0.jpg", "caption 0"),
        ("1/1.jpg", "the first counts"),
        ("2/2.jpg", "señor Ωμέγα — \U0001f600\u2028 in one line"),
        ("3/3.jpg", "caption 3"),
        ("naïve/名.jpg", "caption 4"),
    ]
    assert index.path(3) == str(tmp_path / NAME / "3/3.jpg")
    assert (len(index), index.left_out) == (5, {})
    assert not index.left_out_file.exists()
    for outside in (-1, 5):
        with pytest.raises(AssertionError):
            index.caption(outside)


def test_many_parts_are_one_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "PART_BYTES", 500)
    index = open_index(plant(tmp_path, [row(number) for number in range(300)]))
    order = random.Random(0).sample(range(300), 300)
    assert [index.caption(number) for number in order] == [f"caption {n}" for n in order]
    assert [index.item_id(number) for number in order] == [f"{n % 7}/{n}.jpg" for n in order]
    assert len(index) == 300


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_what_editors_do_to_a_list_does_no_harm(tmp_path: Path, ending: bytes) -> None:
    plant(tmp_path, [row(0), row(1)])
    lines = [b"\xef\xbb\xbf" + json.dumps(row(0)).encode(), b"", json.dumps(row(1)).encode()]
    (tmp_path / f"{NAME}.json").write_bytes(ending.join(lines))
    index = open_index(tmp_path)
    assert rows_of(index) == [("0/0.jpg", "caption 0"), ("1/1.jpg", "caption 1")]
    assert index.left_out == {}


BAD: dict[str, list[Any]] = {
    "not JSON": [b"{", b'{"filename": "1.jpg", "caption": "cut o', b"[" * 100_000],
    "not UTF-8": [b'{"filename": "1.jpg", "caption": "\xff"}'],
    "not a JSON object": [[row(1)], "text", 3, None],
    "no filename": [{"caption": "x"}, row(1, filename=""), row(1, filename=3)],
    "filename outside the data directory": [
        row(1, filename="../1.jpg"),
        row(1, filename="a/../../1.jpg"),
        row(1, filename="/etc/passwd"),
        row(1, filename=f"{NAME}//etc/passwd"),
        row(1, filename=f"{NAME}/"),
        row(1, filename="a\0b.jpg"),
    ],
    "no caption": [{"filename": "1.jpg"}, row(1, caption=None), row(1, caption=[None])],
    "empty caption": [row(1, caption=""), row(1, caption=" \n"), row(1, caption=[])],
    "caption that is no text": [row(1, caption=3), row(1, caption={"en": "x"})],
    "Chinese caption": [row(1, caption="一只猫"), row(1, caption=["a 猫", "cat"])],
    "broken characters": [row(1, caption="half \ud83d"), row(1, filename="\ud83d.jpg")],
    "line longer than 1 MiB": [row(1, caption="long " * 300_000)],
}


@pytest.mark.parametrize("reason", BAD)
def test_rows_that_cannot_be_used_are_left_out_and_told(
    tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = BAD[reason]
    index = open_index(plant(tmp_path, [row(0), *bad, row(6)]))
    assert rows_of(index) == [("0/0.jpg", "caption 0"), ("6/6.jpg", "caption 6")]
    assert index.left_out == {reason: len(bad)}
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{len(bad)} of the {len(bad) + 2} rows" in message
    assert f"line 2: {reason}: " in message
    assert str(index.left_out_file) in message
    listed = index.left_out_file.read_text().splitlines()
    assert [line.split(": ")[:2] for line in listed] == [
        [f"line {number}", reason] for number in range(2, 2 + len(bad))
    ]
    assert max(map(len, listed)) < 160


def test_captions_are_cleaned_the_same_way_elsewhere() -> None:
    assert clean_caption([" a ", "b"]) == "a"
    with pytest.raises(RowError, match="empty caption"):
        clean_caption([""])


def test_too_many_bad_rows_end_the_run(tmp_path: Path, builds: list[int]) -> None:
    bad = [b"broken"] * 30
    plant(tmp_path, [row(number) for number in range(1970)] + bad)
    with pytest.raises(UserError) as caught:
        open_index(tmp_path)
    message = str(caught.value)
    assert "30 of the 2000 rows" in message and "(30 not JSON)" in message
    assert "line 1971: not JSON: broken" in message and "line 1974" not in message
    assert "more than max_damaged=0.01 allows" in message
    # With another limit the list is not read again.
    assert len(open_index(tmp_path, max_damaged=0.02)) == 1970
    assert len(builds) == 1


def test_a_few_bad_rows_of_a_few_are_no_rate(tmp_path: Path) -> None:
    assert len(open_index(plant(tmp_path, [row(0), *[b"broken"] * 10]))) == 1
    with pytest.raises(UserError, match="11 of the 12 rows"):
        open_index(plant(tmp_path, [row(0), *[b"broken"] * 11]))
    with pytest.raises(UserError, match="2 of the 2 rows"):
        open_index(plant(tmp_path, [b"broken"] * 2))


def test_a_file_that_is_no_list_is_refused_after_a_part(
    tmp_path: Path, builds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_build, "PART_BYTES", 10_000)
    pretty = json.dumps([row(number) for number in range(3000)], indent=1)
    plant(tmp_path, [pretty.encode()], pictures=False)
    with pytest.raises(UserError, match=r"is no list of captions: .*line 1 \(not JSON\): '\['"):
        open_index(tmp_path)
    assert len(builds) < 6
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.json"]


def test_one_endless_line_does_not_fill_the_memory(tmp_path: Path) -> None:
    plant(tmp_path, [b"[" + b"1," * 5_000_000 + b"1]", row(1)])
    index = open_index(tmp_path)
    assert (len(index), index.left_out) == (1, {"line longer than 1 MiB": 1})


def test_pictures_that_are_elsewhere_are_told(tmp_path: Path) -> None:
    plant(tmp_path, [row(number) for number in range(100)], pictures=False)
    with pytest.raises(UserError, match=r"None of 32 pictures .* the first is .*/0/0\.jpg; put"):
        open_index(tmp_path)
    (tmp_path / NAME / "0").mkdir(parents=True)
    (tmp_path / NAME / "0/0.jpg").touch()
    assert len(open_index(tmp_path)) == 100, "damaged pictures are the loader's business"


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.json cannot be read \(No such file"):
        open_index(tmp_path)
    (tmp_path / f"{NAME}.json").touch()
    with pytest.raises(UserError, match=r"data\.json is empty"):
        open_index(tmp_path)


# ------------------------------------------------------------------ the index as a file


def test_the_index_is_built_once(tmp_path: Path, builds: list[int]) -> None:
    plant(tmp_path, [row(number) for number in range(50)])
    first, second = open_index(tmp_path), open_index(tmp_path)
    assert len(builds) == 1
    assert rows_of(first) == rows_of(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, f"{NAME}.json", INDEX]


def test_a_changed_list_is_indexed_anew(tmp_path: Path, builds: list[int]) -> None:
    plant(tmp_path, [row(0), row(1)])
    source = tmp_path / f"{NAME}.json"
    open_index(tmp_path)
    for caption in ("caption 8", "caption 9"):  # the same size each time
        status = source.stat()
        source.write_bytes(source.read_bytes()[:-11] + f'{caption}"}}\n'.encode()[-11:])
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert source.stat().st_size == status.st_size
        assert open_index(tmp_path).caption(1) == caption
    assert len(builds) == 3


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data.replace(b'"version": "1"', b'"version": "0"'),
    ],
)
def test_a_damaged_index_is_built_again(
    tmp_path: Path, builds: list[int], damage: Callable[[bytes], bytes]
) -> None:
    plant(tmp_path, [row(number) for number in range(50)])
    open_index(tmp_path)
    (tmp_path / INDEX).write_bytes(damage((tmp_path / INDEX).read_bytes()))
    assert open_index(tmp_path).caption(49) == "caption 49"
    assert len(builds) == 2


def test_where_nobody_may_write_the_index_goes_elsewhere(tmp_path: Path, own_cache: Path) -> None:
    plant(tmp_path, [row(0)])
    (tmp_path / f".{INDEX}.lock").mkdir()  # root cannot open that for writing either
    for _ in range(2):
        assert open_index(tmp_path).file.parent == own_cache / "annotation-caches"
    assert not (tmp_path / INDEX).exists()


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    plant(tmp_path, [row(number) for number in range(500)])
    place = tmp_path / "caches"
    program = (
        "import resource, sys; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from declip.index import open_index\n"
        "open_index(Path(sys.argv[1]), cache=Path(sys.argv[2]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UserError: The index of" in result.stderr
    assert "cannot be written in" in result.stderr and "File too large" in result.stderr
    assert list(place.iterdir()) == []


def test_a_list_that_changes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_build, "PART_BYTES", 500)
    plant(tmp_path, [row(number) for number in range(100)])
    source, write_part = tmp_path / f"{NAME}.json", index_build._write_part

    def shorten(file: Path, part: Any) -> None:
        os.truncate(source, 1000)
        write_part(file, part)

    monkeypatch.setattr(index_build, "_write_part", shorten)
    with pytest.raises(UserError, match="changes while it is indexed; start again"):
        open_index(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, f"{NAME}.json"]


# ------------------------------------------------------------------ killed and resumed


KILLED = """
import os, sys
from pathlib import Path
from declip import index_build
from declip.index import open_index

index_build.PART_BYTES = 1000
write_part, parts = index_build._write_part, []

def write(file, part):
    if len(parts) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    write_part(file, part)
    parts.append(file)

index_build._write_part = write
open_index(Path(sys.argv[1]))
"""


def kill_a_build(root: Path, after: int) -> Path:
    """Starts a build that is killed behind so many parts; gives their directory."""
    process = subprocess.run([sys.executable, "-c", KILLED, str(root), str(after)], check=False)
    assert process.returncode == -9
    assert not (root / INDEX).exists()
    return root / f".{INDEX}.parts"


def test_a_killed_build_goes_on_where_it_was(
    tmp_path: Path, builds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(number) if number % 10 else b"broken" for number in range(300)]
    plant(tmp_path, rows)
    parts = kill_a_build(tmp_path, after=8)
    assert len(list(parts.glob("*.arrow"))) == 8
    monkeypatch.setattr(index_build, "PART_BYTES", 1000)
    index = open_index(tmp_path, max_damaged=0.1)
    size = (tmp_path / f"{NAME}.json").stat().st_size
    assert sum(builds) < size - 8000
    shutil.copytree(tmp_path, tmp_path / "whole", ignore=shutil.ignore_patterns(".*", INDEX))
    whole = open_index(tmp_path / "whole", max_damaged=0.1)
    assert rows_of(index) == rows_of(whole)
    assert index.left_out == whole.left_out == {"not JSON": 30}
    assert index.left_out_file.read_text() == whole.left_out_file.read_text()
    assert not list(tmp_path.glob(".*")), "parts and locks are gone"


def test_parts_of_another_list_are_not_used(tmp_path: Path) -> None:
    plant(tmp_path, [row(number) for number in range(300)])
    kill_a_build(tmp_path, after=4)
    plant(tmp_path, [row(number, caption=f"changed {number}") for number in range(300)])
    index = open_index(tmp_path)
    assert [index.caption(number) for number in range(300)] == [f"changed {n}" for n in range(300)]


@pytest.mark.parametrize("number", [0, 3])
def test_a_damaged_part_is_read_again(
    tmp_path: Path, builds: list[int], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    plant(tmp_path, [row(number) for number in range(300)])
    parts = kill_a_build(tmp_path, after=6)
    file = parts / f"{number:05d}.arrow"
    file.write_bytes(cut(file.read_bytes()))
    monkeypatch.setattr(index_build, "PART_BYTES", 1000)
    index = open_index(tmp_path)
    assert [index.caption(n) for n in range(300)] == [f"caption {n}" for n in range(300)]
    total = -(-(tmp_path / f"{NAME}.json").stat().st_size // 1000)
    assert abs(len(builds) - (total - number)) <= 2


# ------------------------------------------------------------------ several processes


BUILDER = """
import sys, time
from pathlib import Path
from declip import index_build
from declip.index import open_index

read_part = index_build._read_part

def slowly(*arguments):
    print("built", flush=True)
    time.sleep(0.4)
    return read_part(*arguments)

index_build._read_part = slowly
print("ready", flush=True)
sys.stdin.readline()
index = open_index(Path(sys.argv[1]), local_rank=int(sys.argv[2]))
print(index.caption(2), "torch" in sys.modules)
"""


def test_one_process_builds_and_the_others_wait(tmp_path: Path) -> None:
    plant(tmp_path, [row(number) for number in range(20)])
    processes = []
    for rank in range(3):
        command = [sys.executable, "-c", BUILDER, str(tmp_path), str(rank)]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    # The first process of the machine comes last, and builds all the same.
    for process in reversed(processes):
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(0.05)
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [lines[-1] for lines in outputs] == ["caption 2 False"] * 3
    assert [lines.count("built") for lines in outputs] == [1, 0, 0]


def read_all(index: CaptionIndex, queue: Any) -> None:
    queue.put(rows_of(index))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same_file(tmp_path: Path, method: str) -> None:
    index = open_index(plant(tmp_path, [row(number) for number in range(20)]))
    context: Any = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    worker = context.Process(target=read_all, args=(index, queue))
    worker.start()
    assert queue.get() == rows_of(index)
    worker.join()
    assert len(pickle.dumps(index)) < 1000


def test_an_index_that_changed_is_not_opened_by_workers(tmp_path: Path) -> None:
    plant(tmp_path, [row(0), row(1)])
    index = open_index(tmp_path)
    pickled = pickle.dumps(index)
    assert rows_of(pickle.loads(pickled)) == rows_of(index)
    plant(tmp_path, [row(0), row(1), row(2)])
    open_index(tmp_path)
    assert len(index) == 2 and index.caption(1) == "caption 1", "an open one stays as it was"
    with pytest.raises(UserError, match="was changed or deleted while in use; start again"):
        pickle.loads(pickled)
    (tmp_path / INDEX).unlink()
    with pytest.raises(UserError, match="was changed or deleted"):
        pickle.loads(pickled)


def test_long_builds_tell_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "a", [row(number) for number in range(100)])
    open_index(tmp_path / "a")
    assert capsys.readouterr().out == ""
    for name in ("_QUIET_S", "_EVERY_S"):
        monkeypatch.setattr(index_build, name, 0.0)
    monkeypatch.setattr(index_build, "PART_BYTES", 2000)
    plant(tmp_path / "b", [row(number) for number in range(100)])
    open_index(tmp_path / "b")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f"indexing {NAME}.json: ") for line in lines)
    assert lines[-1].endswith("100 %, 0 s left")


# ------------------------------------------------------------------ validation pictures


def val_row(number: int, label: object, **changes: Any) -> dict[str, Any]:
    name = f"ILSVRC2012_val_{number:08d}.JPEG"
    return {"filename": name, "label": label, "label_name": f"class {label}"} | changes


def plant_val(root: Path, rows: list[Any], images: str = "imagenet_val") -> Path:
    (root / images).mkdir(parents=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (root / "val_official.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for number in range(1, len(rows) + 1):
        (root / images / f"ILSVRC2012_val_{number:08d}.JPEG").touch()
    return root


@pytest.mark.parametrize("images", ["imagenet_val", "imagenet_valid"])
def test_validation_pictures_and_classes(tmp_path: Path, images: str) -> None:
    rows = [val_row(1, 2), val_row(2, 0, caption="not needed"), "", val_row(3, "1"), val_row(4, 2)]
    index: ValIndex = open_val_index(plant_val(tmp_path, rows, images))
    assert index.classes == ["class 0", "class 1", "class 2"]
    assert [index.label(number) for number in range(len(index))] == [2, 0, 1, 2]
    assert index.item_id(3) == "ILSVRC2012_val_00000004.JPEG"
    assert index.path(3) == str(tmp_path / images / index.item_id(3))
    again = pickle.loads(pickle.dumps(index))
    assert again.path(0) == index.path(0) and again.classes == index.classes


BAD_VAL: dict[str, tuple[list[Any], str]] = {
    "no JSON": ([val_row(1, 0), "{"], r"Line 2 of .*val_official\.json cannot be used \(not JSON"),
    "array": ([[val_row(1, 0)]], r"Line 1 .* \(not a JSON object\)"),
    "no file": ([val_row(1, 0, filename=None)], r"\(no filename\)"),
    "elsewhere": ([val_row(1, 0, filename="../1.JPEG")], r"\(filename outside the data"),
    "no label": ([val_row(1, None)], r"\(no label\); it must be \{"),
    "too many digits": ([val_row(1, "9" * 5000)], r"\(no label\)"),
    "negative": ([val_row(1, -1)], r"\(no label\)"),
    "bool": ([val_row(1, True)], r"\(no label\)"),
    "no name": ([val_row(1, 0, label_name=" ")], r"\(no label_name\)"),
    "two names": (
        [val_row(1, 0), val_row(2, 0, label_name="cat")],
        r"Line 2 .*label 0 is cat here, class 0 above",
    ),
    "gap": ([val_row(1, 0), val_row(2, 2)], r"labels up to 2 and no picture of label 1; labels"),
    "from 1": ([val_row(1, 1)], r"no picture of label 0"),
    "twice": ([val_row(1, 0), val_row(1, 1)], r"names 1 pictures twice, such as ILSVRC2012_val_0"),
    "missing": (
        [val_row(1, 0), val_row(7, 1), val_row(8, 1)],
        r"2 of the 3 pictures of .* are missing, the first is .*ILSVRC2012_val_00000007\.JPEG",
    ),
    "empty": ([""], r"val_official\.json is empty"),
}


@pytest.mark.parametrize("name", BAD_VAL)
def test_lists_of_validation_pictures_that_are_refused(tmp_path: Path, name: str) -> None:
    rows, message = BAD_VAL[name]
    with pytest.raises(UserError, match=message):
        open_val_index(plant_val(tmp_path, rows))


def test_a_validation_part_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val_official\.json cannot be read \(No such file"):
        open_val_index(tmp_path)
    plant_val(tmp_path, [val_row(1, 0)])
    shutil.rmtree(tmp_path / "imagenet_val")
    with pytest.raises(UserError, match=r"imagenet_val cannot be read \(No such file"):
        open_val_index(tmp_path)
