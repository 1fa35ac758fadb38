"""tools/npu_data.py: reading torch_npu's lists of operators and its documents."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

PLUGIN = """all_version: [v2.5, v2.6, v2.7]
official:
  - func: everywhere(Tensor self) -> Tensor
    acl_op: all_version
  - func: from_2_6.out(Tensor self, *, Tensor(a!) out) -> Tensor(a!)
    op_api: [v2.6, newest]
  - func: until_2_5(Tensor self) -> Tensor
    acl_op: [v2.5, v2.5]
  - func: named(Tensor self) -> Tensor
    op_api: v2.5, v2.6
  - func: sparse_alone(Tensor self) -> Tensor
    sparse: [v2.5, newest]
custom:
  - func: npu_own(Tensor self) -> Tensor
    op_api: all_version
symint:
  - func: zeros(SymInt[] size) -> Tensor
    op_api: all_version
  - func: npu_own(Tensor self) -> Tensor
    op_api: all_version
quant:
  - func: of_quantized(Tensor self) -> Tensor
    acl_op: all_version
"""
OWN = """supported:
  - copy_
  - func: clone
    op_api: True
custom:
  - func: npu_format_cast(Tensor self, int acl_format) -> Tensor
"""
DOCUMENT = """# torch

### torch.one
| <term>Atlas A2 训练系列产品</term> | ✔ |
**限制与说明**： `input`仅支持{}

### torch.two
| <term>Atlas A2 训练系列产品</term> | ✘ |
"""


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    spec = importlib.util.spec_from_file_location("npu_data", ROOT / "tools" / "npu_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RELEASES", {"2.6": "v2.6.0-7.3.0"})
    return module


def commit(place: Path, files: dict[str, str], branch: str, submodule: str | None = None) -> str:
    """Makes a clone with one commit on a branch; the commit."""

    def git(*words: str) -> str:
        author = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        command = ["git", *author, "-C", str(place), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    place.mkdir()
    git("init", "--quiet", f"--initial-branch={branch}")
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")
    git("add", ".")
    if submodule:
        git("update-index", "--add", "--cacheinfo", f"160000,{submodule},third_party/op-plugin")
    git("commit", "--quiet", "--message=one")
    return git("rev-parse", "HEAD")


def test_both_lists_of_a_release_add_up(data: ModuleType, tmp_path: Path) -> None:
    plugin, own = tmp_path / "op-plugin", tmp_path / "pytorch"
    plugged = commit(plugin, {data.PLUGIN_LIST: PLUGIN}, "7.3.0")
    head = commit(own, {data.OWN_LIST: OWN}, "v2.6.0-7.3.0", submodule=plugged)
    source, names = data.of_release(own, plugin, "2.6")
    assert source == {"branch": "v2.6.0-7.3.0", "pytorch": head, "op_plugin": plugged}
    assert names == {
        "aten::everywhere", "aten::from_2_6.out", "aten::named", "aten::zeros",
        "aten::copy_", "aten::clone", "npu::npu_own", "npu::npu_format_cast",
    }  # fmt: skip


def test_versions_are_written_as_ranges(data: ModuleType) -> None:
    assert data.ranges([]) == ""
    assert data.ranges(["2.14"]) == "2.14"
    assert data.ranges(["2.1", "2.2", "2.3", "2.9", "2.10"]) == "2.1-2.3 2.9-2.10"


def test_a_format_that_any_version_documents_counts(data: ModuleType, tmp_path: Path) -> None:
    files = {
        data.DOCUMENTS.format(place, chapter): DOCUMENT.format(
            "bf16，fp32，int8" if place == "2-7-1" else "fp32"
        )
        for place in data.DOCUMENTED.values()
        for chapter in data.CHAPTERS
    }
    commit(tmp_path / "pytorch", files, "master")
    found = data.documented_dtypes(tmp_path / "pytorch")
    assert found["dtypes"] == {"torch.one": "bfloat16 float32 int8"}
    assert found["unsupported"] == ["torch.two"]


def test_a_clone_without_the_branches_is_one_sentence(
    data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(tmp_path / "one", {"README.md": "nothing"}, "master")
    words = ["--pytorch", str(tmp_path / "one"), "--op-plugin", str(tmp_path / "one")]
    assert data.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("npu_data: ") and told.count("\n") == 1
    assert "fetch all branches" in told
