"""Data sets on disks that fail for a moment, or for good."""

import os
import re
import subprocess
import sys
from pathlib import Path

import disk
import pytest
from harness import ROOT, check_same_training, run_to_end
from picture_runs import picture_toy, pictures

from zoo_common import sample


def test_pictures_that_fail_for_a_moment_change_nothing(
    toy: Path, scratch: Path, tmp_path: Path
) -> None:
    """In each data worker the first two reads of a picture fail."""
    picture_toy(toy)
    path = pictures(tmp_path / "pictures", 8)[0].parent
    words = [f"--data_path={path}", "--steps=4", "--deterministic"]
    steady = run_to_end(toy, "train_1p", *words, output=scratch / "steady")
    assert steady.code == 0, steady.err
    flaky = disk.rule(path, "EIO", calls=["read"], name="picture_03", times=2, each=True)
    done = run_to_end(
        toy, "train_1p", *words, output=scratch / "flaky", environment=disk.environment(flaky)
    )
    assert done.code == 0, done.err
    check_same_training(scratch / "steady", scratch / "flaky")
    log = (scratch / "flaky" / "train_0.log").read_text()
    told = re.findall(r"picture_03\.png could not be read \(Input/output error\): tried again", log)
    assert len(told) == 1
    assert "damaged" not in log


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["ESTALE", "ETIMEDOUT", "EREMOTEIO"])
def test_openings_that_fail_for_a_moment_change_nothing(
    toy: Path, output: Path, tmp_path: Path, kind: str
) -> None:
    picture_toy(toy)
    path = pictures(tmp_path / "pictures", 8)[0].parent
    flaky = disk.rule(path, kind, calls=["open"], name=".png", times=1, each=True)
    words = [f"--data_path={path}", "--steps=4"]
    done = run_to_end(toy, "train_1p", *words, output=output, environment=disk.environment(flaky))
    assert done.code == 0, done.err
    log = (output / "train_0.log").read_text()
    assert "tried again" in log and "damaged" not in log


@pytest.mark.thorough
def test_a_picture_that_stays_unreadable_is_named_and_replaced(
    toy: Path, output: Path, tmp_path: Path
) -> None:
    picture_toy(toy)
    path = pictures(tmp_path / "pictures", 8)[0].parent
    broken = disk.rule(path, "EIO", calls=["read"], name="picture_03", times=0)
    words = [f"--data_path={path}", "--steps=2"]
    done = run_to_end(toy, "train_1p", *words, output=output, environment=disk.environment(broken))
    assert done.code == 0, done.err
    log = (output / "train_0.log").read_text()
    assert re.search(r"picture_03\.png.*Input/output error", log), log


READERS = {
    "coco": (
        "annotations/instances_val2017.json",
        "from zoo_common.detection.coco import open_index\n"
        "print(len(open_index(root / name, root / 'val2017', cache=cache)))",
    ),
    "captions": (
        "yfcc15m_clean_open_data.json",
        "from declip.index import open_index\nprint(len(open_index(root, cache=cache)))",
    ),
    "validation": (
        "val_official.json",
        "from declip.index import open_val_index\nprint(len(open_val_index(root)))",
    ),
}
LAYOUTS = {"coco": "coco", "captions": "yfcc", "validation": "yfcc"}


def read(reader: str, root: Path, cache: Path, rule: str) -> subprocess.CompletedProcess[str]:
    """Opens a data set in a process whose disk fails."""
    name, program = READERS[reader]
    head = (
        "import sys\nfrom pathlib import Path\nfrom zoo_common import flaky\n"
        "from zoo_common.errors import UserError\n"
        "root, cache, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]\n"
        "flaky.WAITS_S = (0.01,) * len(flaky.WAITS_S)\n"
    )
    body = "".join(f"    {line}\n" for line in program.splitlines())
    tail = "except UserError as error:\n    sys.exit(f'error: {error}')\n"
    declip = ROOT / "built-in" / "others" / "DeCLIP_for_PyTorch"
    return subprocess.run(
        [sys.executable, "-c", f"{head}try:\n{body}{tail}", str(root), str(cache), name],
        env={**os.environ, "PYTHONPATH": str(declip), **disk.environment(rule)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def data_set(reader: str) -> Path:
    """The drawn sample data set of a reader's layout."""
    return sample.make(layout=LAYOUTS[reader])


@pytest.mark.thorough
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("call", ["open", "read"])
def test_every_index_is_read_again_or_names_its_file(
    reader: str, call: str, data_set: Path, tmp_path: Path
) -> None:
    name = READERS[reader][0]
    flaky = disk.rule(data_set, "EIO", calls=[call], name=name, times=2)
    done = read(reader, data_set, tmp_path / "cache", flaky)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 0
    assert "tried again" in done.stdout
    broken = disk.rule(data_set, "EIO", calls=[call], name=name, times=0)
    done = read(reader, data_set, tmp_path / "other cache", broken)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") <= 12
    assert Path(name).name in done.stderr and "Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
