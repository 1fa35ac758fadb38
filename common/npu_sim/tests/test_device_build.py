"""How the extension is built: once, by one process at a time, and with a clear word if it can't."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from npu_sim import build

# Writes what -o names, and a line for each call; slowly, so that two builds would meet.
COMPILER = """import os, pathlib, sys, time
with open({log!r}, "a") as log:
    log.write("link\\n" if "-shared" in sys.argv else "compile\\n")
time.sleep(float(os.environ.get("COMPILER_SECONDS", "0.05")))
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(b"built")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a compiler that is quick."""
    compiler = tmp_path / "compiler"
    log = str(tmp_path / "log")
    program = tmp_path / "compiler.py"
    program.write_text(COMPILER.format(log=log), encoding="utf-8")
    # Not the program itself: a path with spaces, as Python's may be, cannot stand after #!.
    compiler.write_text(f'#!/bin/sh\nexec "{sys.executable}" {program} "$@"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("NPU_SIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def calls(cache: Path) -> list[str]:
    return (cache.parent / "log").read_text(encoding="utf-8").split()


def test_it_is_built_once(cache: Path) -> None:
    first = build.build()
    assert first.read_bytes() == b"built"
    made = calls(cache)
    assert made.count("link") == 1 and made.count("compile") > 5
    assert build.build() == first
    assert calls(cache) == made


def test_two_at_once_build_once(cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: build.build(), range(2)))
    assert results[0] == results[1]
    assert calls(cache).count("link") == 1


def test_a_killed_build_leaves_nothing_broken(cache: Path) -> None:
    program = "from npu_sim.build import build; build()"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "COMPILER_SECONDS": "60"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (cache.parent / "log").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("*.so"))
    assert build.build().read_bytes() == b"built"
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(build.BuildError, match=r"install g\+\+ 11 or later") as error:
        build.build()
    assert str(error.value).count(". ") == 0


def test_a_compiler_that_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX is 'no-such-compiler'"):
        build.build()


def test_what_the_compiler_says_is_shown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = cache.parent / "failing"
    compiler.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 3\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match=r"exit code 3.*no such option"):
        build.build()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_SIM_CACHE", str(cache.parent / "compiler" / "below"))
    with pytest.raises(build.BuildError, match="set NPU_SIM_CACHE to a directory"):
        build.build()
