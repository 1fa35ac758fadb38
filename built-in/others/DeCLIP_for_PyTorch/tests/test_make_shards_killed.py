"""What is left of a conversion to shards that was killed, and that the same command mends it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo_common.errors import TrainingError

sys.path.insert(0, str(Path(__file__).resolve().parent))

from shard_rows import Deadly, Rows, convert, draw_rows, files_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return draw_rows(tmp_path_factory.mktemp("rows"), 45)


@pytest.fixture(scope="module")
def whole(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed conversion writes."""
    out = tmp_path_factory.mktemp("whole")
    convert(rows, out)
    return files_of(out)


KILLED_IN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from shard_rows import PER_SHARD, Deadly
from declip import make_shards as converter, shard_index

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

rows = Deadly(Path(sys.argv[2]), 45)
rows.row = -1
for moment in ["row 0", "row 24", "written", "named", "recorded", "rows", "index"]:
    out = Path(sys.argv[3], moment)
    child = os.fork()
    if not child:
        if moment.startswith("row "):
            rows.row = int(moment[4:])
        if moment == "written":
            converter._check_written = die
        if moment == "named":
            converter._save_record = die
        if moment == "recorded":
            converter._judge = lambda found, done, *_: done == 20 and die()
        if moment in ("rows", "index"):
            real, at = os.rename, {"rows": "shards.npy", "index": "shards.json"}[moment]
            Path.rename = lambda self, to: to.name == at and die() or real(self, to)
        converter.make_shards(rows, out, samples_per_shard=PER_SHARD)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), moment
    print(moment, sorted(path.name for path in out.glob("*.tar")), flush=True)
"""


def test_a_kill_at_any_moment_is_mended_by_the_same_command(
    rows: Rows, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN, str(Path(__file__).parent), rows.directory, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert killed.returncode == 0, killed.stderr
    kept = dict(zip(["row 0", "row 24", "written", "named"], [0, 2, 0, 1], strict=True))
    for out in sorted(tmp_path.iterdir()):
        shards = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.tar")}
        assert len(shards) == kept.get(out.name, 2 if out.name == "recorded" else 5)
        assert all(files_of(out)[name] == whole[name] for name in shards)
        assert "shards.json" not in files_of(out)
        assert convert(rows, out).samples == 45
        assert files_of(out) == whole, out.name
        if out.name != "named":  # a shard without a record is made again
            assert all((out / name).stat().st_mtime_ns == at for name, at in shards.items())


SLOW_MAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from shard_rows import Slow, convert
if __name__ == "__main__":
    convert(Slow(Path(sys.argv[2]), 45), Path(sys.argv[3]), workers=2)
"""


def children_of(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [
        int(child)
        for child in listed.split()
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(
    rows: Rows, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_MAIN)
    command = [sys.executable, script, Path(__file__).parent, rows.directory, tmp_path / "out"]
    with subprocess.Popen(command) as process:
        wait_for(lambda: len(list((tmp_path / "out").glob("0*.tar"))) >= 2)
        children = children_of(process.pid)
        process.kill()
    assert len(children) == 2
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert convert(rows, tmp_path / "out").samples == 45
    assert files_of(tmp_path / "out") == whole


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_worker_is_told_and_what_others_finish_is_kept(
    rows: Rows, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    deadly = Deadly(rows.directory, 45)
    with pytest.raises(TrainingError, match="was killed, maybe for want of memory"):
        convert(deadly, tmp_path, workers=2)
    assert set(files_of(tmp_path)) >= {"000000.tar", "000002.tar", "000004.tar"}
    assert not {"000001.tar", "shards.json"} & set(files_of(tmp_path))
    assert convert(rows, tmp_path).samples == 45
    assert files_of(tmp_path) == whole
