"""The pins for NPUs, the check that proves them, and its record."""

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from zoo_common.versions_npu import CPU_INDEX, PAIRS, RELEASES, find, torchvision_for

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tools/pins"


@pytest.fixture
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_npu_pins", ROOT / "ci/check_npu_pins.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakePip:
    """pip as the check uses it; the package index has what is given."""

    def __init__(self, folder: Path, needs: list[str], refusal: str | None = None) -> None:
        self.folder, self.needs, self.refusal, self.version = folder, needs, refusal, "26.3"
        self.asked: list[list[str]] = []

    def resolve(self, arch: str, python: int, words: list[str]) -> dict[str, Any] | str:
        self.asked.append(words)
        if "--no-deps" in words:
            return {"torch": {"metadata": {"requires_dist": self.needs}}}
        if self.refusal:
            return self.refusal
        return {"torch-npu": {"download_info": {"url": "https://index/torch_npu-2.whl"}}}


def test_pin_files_are_those_of_the_table(check: ModuleType) -> None:
    files = {file.name for file in PINS.glob("npu*.txt")}
    assert files == {check.pins_file(pair).name for pair in PAIRS}
    for pair in PAIRS:
        text = check.pins_file(pair).read_text()
        wanted = [
            f"--extra-index-url {CPU_INDEX}",
            f"torch=={pair.torch}+cpu",
            f"torchvision=={pair.torchvision}",
            f"torch-npu=={pair.torch_npu}",
        ]
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert lines[:4] == wanted
        others = {line.partition("==")[0] for line in lines[4:]}
        assert others == {"setuptools", "sympy"}  # of which torch admits certain versions only
        assert not any(f"\n{name}==" in (PINS / "common.txt").read_text() for name in others)


def test_pairs_are_the_newest_releases_for_their_torch() -> None:
    for pair in PAIRS:
        newest = next(release for release in RELEASES if release.torch == pair.torch)
        assert find(pair.torch_npu) == newest
        assert pair.torchvision.startswith(torchvision_for(pair.torch) + ".")


def test_the_record_proves_every_pair_on_both_architectures() -> None:
    record = json.loads((ROOT / "common/npu_sim/records/npu_pins.json").read_text())
    proven = {
        (one["torch"], one["torchvision"], one["torch_npu"], one["arch"], one["python"])
        for one in record
        if one["resolves"]
    }
    wanted = {
        (pair.torch, pair.torchvision, pair.torch_npu, arch, f"3.{python}")
        for pair in PAIRS
        for arch in ("x86_64", "aarch64")
        for python in range(pair.pythons[0], pair.pythons[1] + 1)
    }
    assert proven == wanted


def test_conditions_of_our_pins_are_judged_for_the_python_in_question(
    check: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "pins.txt"
    file.write_text('# why\n--extra-index-url x\na==1; python_version >= "3.11"\nb==2\n')
    assert list(check.pins_for(file, "aarch64", 10)) == ["b==2"]
    assert list(check.pins_for(file, "aarch64", 14)) == ["a==1", "b==2"]


def test_a_stand_in_has_the_demands_of_torch_less_cuda(check: ModuleType, tmp_path: Path) -> None:
    needs = ["filelock", 'triton==3; platform_system == "Linux"', 'x; extra == "y"']
    pip = FakePip(tmp_path, needs)
    result = check.check(pip, PAIRS[0], "x86_64", 11, reachable=False)
    assert result["resolves"] and result["torch_npu_wheel"] == "torch_npu-2.whl"
    assert result["torch_in_package_index"] == "CUDA build"
    (wheel,) = (tmp_path / "stand_ins").iterdir()
    assert wheel.name == f"torch-{PAIRS[0].torch}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert "Requires-Dist: filelock" in text and "triton" not in text and "extra" not in text
    asked = pip.asked[-1]
    assert f"--find-links={tmp_path / 'stand_ins'}" in asked
    assert {"torch", "torchvision", "torch-npu"} <= set(asked)
    assert any(word.startswith("timm") for word in asked)
    assert CPU_INDEX not in (tmp_path / "constraints.txt").read_text()


def test_with_pytorchs_index_nothing_stands_in(check: ModuleType, tmp_path: Path) -> None:
    pip = FakePip(tmp_path, ['nvidia-x; platform_machine == "x86_64"'])
    result = check.check(pip, PAIRS[-1], "aarch64", 11, reachable=True)
    assert result["torch_in_package_index"] == "CPU build"
    assert not (tmp_path / "stand_ins").exists()
    lines = (tmp_path / "constraints.txt").read_text().splitlines()
    assert f"torch=={PAIRS[-1].torch}+cpu" in lines and f"--extra-index-url {CPU_INDEX}" in lines


def test_a_refusal_is_told_and_is_the_exit_code(
    check: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(*words: str, refusal: str | None, reachable: bool) -> int:
        monkeypatch.setattr(check.sys, "argv", ["check_npu_pins.py", *words])
        monkeypatch.setattr(check, "is_reachable", lambda: reachable)
        monkeypatch.setattr(check, "Pip", lambda folder: FakePip(tmp_path, [], refusal))
        return int(check.main())

    monkeypatch.setattr(check, "RECORD", tmp_path / "record.json")
    assert start("2.6.0", refusal="no wheel", reachable=True) == 1
    assert "REFUSED torch 2.6.0, torch_npu 2.6.0.post5" in capsys.readouterr().out
    assert start("2.7.1", refusal=None, reachable=True) == 0
    kept = json.loads(check.RECORD.read_text())
    assert [one["resolves"] for one in kept] == [True] * 8 + [False] * 4
    assert kept[0]["torch_cpu_build"] == "from PyTorch's index" and kept[-1]["said"] == "no wheel"
    assert start("2.6.0", refusal=None, reachable=False) == 3
    assert "not reachable" in capsys.readouterr().out
    assert start("2.6", refusal=None, reachable=True) == 2
    renewed = json.loads(check.RECORD.read_text())
    assert renewed[:8] == kept[:8] and all(one["resolves"] for one in renewed)


def test_what_pip_says_of_a_conflict_is_kept_short(check: ModuleType) -> None:
    said = """Looking in indexes: https://index
    The conflict is caused by:
        torch 2.12.0+cpu depends on setuptools<82
        The user requested (constraint) setuptools==84.2.1
    ERROR: ResolutionImpossible: for help visit https://pip"""
    assert check._refusal(said) == (
        "torch 2.12.0+cpu depends on setuptools<82; "
        "The user requested (constraint) setuptools==84.2.1"
    )
