"""tools/check_layout.py: each rule, on a copy of the repository that is broken in one way."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

TWINS = "contrib/cv/classification/Twins-ALTGVT-S"
SCRIPT = f"{TWINS}/test/train_full_8p.sh"


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program's module: a process for each case would take a second more."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))
    return importlib.import_module("check_layout")


def findings(layout: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    code = layout.main(["--root", str(root)])
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"layout: {len(lines)} findings")
    assert code == (1 if lines else 0)
    return set(lines)


def append(file: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / file).write_text((root / file).read_text() + text)


def write(file: str, content: str) -> Callable[[Path], object]:
    def act(root: Path) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content.encode())

    return act


def replace(file: str, old: str, new: str) -> Callable[[Path], object]:
    def act(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new))

    return act


def remove(file: str) -> Callable[[Path], object]:
    return lambda root: (root / file).unlink()


RECORD = '{"status": "completed", "run": "x", "note": %s}'
CASES = {
    "large file": (write("notes.bin", "x" * 5_000_001), "notes.bin: has 5.0 MB"),
    "long file": (write("tools/long.py", "x = 1\n" * 701), "tools/long.py: has 701 lines"),
    "long function": (
        write("tools/long.py", "def work():\n" + "    x = 1\n" * 80),
        "tools/long.py: work has 81 lines",
    ),
    "long main": (
        write("tools/long.py", "def main():\n" + "    x = 1\n" * 120),
        "tools/long.py: main has 121 lines",
    ),
    "CR": (write("tools/dos.sh", "echo\r\n"), "tools/dos.sh: has CR line ends"),
    "home path": (write("a.md", "x\nsee /home" + "/me/x\n"), "a.md: line 2 names a path"),
    "detection": (
        write("common/zoo_common/amp2.py", "from zoo_common.detection import boxes\n"),
        "common/zoo_common/amp2.py: imports zoo_common.detection",
    ),
    "contracts": (
        replace("pyproject.toml", 'modules = ["twins", ', "modules = ["),
        'pyproject.toml: [tool.importlinter] lacks "twins"',
    ),
    "missing file": (remove(f"{TWINS}/modelzoo_level.txt"), "modelzoo_level.txt: is missing"),
    "missing module": (remove(f"{TWINS}/twins/config.py"), "twins/config.py: is missing"),
    "long script": (append(SCRIPT, "true\n" * 10), f"{SCRIPT}: has 16 lines of work"),
    "no pipefail": (replace(SCRIPT, "set -euo pipefail", "set -e"), "lacks the line 'set -euo"),
    "no exec": (replace(SCRIPT, "exec python3", "python3"), f"{SCRIPT}: must end in one exec"),
    "grep": (append(SCRIPT, "grep loss x\n"), f"{SCRIPT}: uses sed, awk or grep"),
    "run without script": (remove(SCRIPT), "describes train_full_8p, but test/train_full_8p.sh"),
    "script without run": (
        lambda root: shutil.copy(root / SCRIPT, root / TWINS / "test/train_more_1p.sh"),
        "runs.yaml: lacks the run train_more_1p",
    ),
    "run without config": (
        replace(f"{TWINS}/test/runs.yaml", "configs/finetune.yaml", "configs/fine.yaml"),
        "train_finetune_1p names the config configs/fine.yaml",
    ),
    "section": (replace(f"{TWINS}/README.md", "# Data set (准备数据集)", ""), "'准备数据集'"),
    "marker": (replace(f"{TWINS}/README.md", "<!-- results:end -->", ""), "table 'results'"),
    "requirement": (
        replace(f"{TWINS}/requirements.txt", "timm>=1.0.9\n", "timm>=1\n"),
        "requirements.txt: differs from pyproject.toml: it lacks timm>=1.0.9",
    ),
    "broken record": (write(f"{TWINS}/results/a.json", "{"), "a.json: is no JSON"),
    "failed record": (
        write(f"{TWINS}/results/a.json", '{"status": "failed"}'),
        "a.json: is not the record of a completed run",
    ),
    "path in record": (
        write(f"{TWINS}/results/a.json", RECORD % '["see /data/x"]'),
        "a.json: note holds an absolute path",
    ),
    "host in record": (
        write(f"{TWINS}/results/a.json", RECORD % '{"hostname": "a"}'),
        "a.json: note.hostname holds a host name",
    ),
    "address": (
        append(f"{TWINS}/twins/config.py", "# https" + "://example.org/x\n"),
        "config.py: has the address https://example.org/x",
    ),
    "level": (
        write(f"{TWINS}/modelzoo_level.txt", "FuncStatus:GOOD\n"),
        "must have a line FuncStatus:NOK|OK",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_copy_is_found(
    layout: ModuleType, model_copy: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, words = CASES[case]
    before = findings(layout, model_copy, capsys)
    damage(model_copy)
    found = findings(layout, model_copy, capsys) - before
    assert any(words in line for line in found), found


def test_env_scripts_are_the_same_in_all_models(
    layout: ModuleType, model_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "contrib/cv/classification/Zwins"
    shutil.copytree(model_copy / TWINS, model_copy / other)
    project = model_copy / other / "pyproject.toml"
    project.write_text(project.read_text().replace("zoo-twins", "zoo-zwins"))
    assert not any("differs from" in line for line in findings(layout, model_copy, capsys))
    append(f"{other}/test/env_npu.sh", "# another\n")(model_copy)
    assert any(
        line.startswith(f"{other}/test/env_npu.sh: differs from {TWINS}")
        for line in findings(layout, model_copy, capsys)
    )


def test_what_runs_leave_behind_is_not_looked_at(
    layout: ModuleType, model_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = findings(layout, model_copy, capsys)
    for folder in (".venv/lib", f"{TWINS}/test/output/0", "data", ".mypy_cache"):
        write(f"{folder}/long.py", "x = 1\r\n" * 701)(model_copy)
    assert findings(layout, model_copy, capsys) == before
