"""tools/parity.py on what detectron2 recorded, and that it notices when something is off."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcnn import boxcoder, parity, targets
from rcnn.backbone import FrozenBatchNorm

MODEL_DIR = Path(__file__).resolve().parents[1]
FIXTURES = MODEL_DIR / "tests" / "fixtures"
CASES = ("maskrcnn_r50_tiny", "fasterrcnn_r101_zoo_tiny")

Result = tuple[int, list[str]]


@pytest.fixture
def compare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Result]:
    """Runs the program in this process: exit code and lines."""
    tool = MODEL_DIR.parents[3] / "tools" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity_tool", tool)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(case: Path) -> Result:
        capsys.readouterr()
        code = module.main([str(MODEL_DIR), str(case)])
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("name", CASES)
def test_equals_detectron2(compare: Callable[[Path], Result], name: str) -> None:
    code, lines = compare(FIXTURES / f"{name}.json")
    assert code == 0, [line for line in lines if "BEYOND" in line]
    compared = int(lines[-1].removeprefix("parity: ").split()[0])
    assert compared > 300


BREAKS: dict[str, tuple[Any, str, Any, str]] = {
    "another epsilon": (FrozenBatchNorm, "__init__", None, "backbone"),
    "another clamp of deltas": (boxcoder, "MAX_LOG_SCALE", -0.1, "proposals"),
    "another rule of sampling": (parity, "sample_evenly", targets.sample_at_random, "losses"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_notices(
    compare: Callable[[Path], Result], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    owner, name, value, where = BREAKS[what]
    if owner is FrozenBatchNorm:
        original = FrozenBatchNorm.__init__
        value = lambda self, channels: original(self, channels, eps=1e-3)  # noqa: E731
    monkeypatch.setattr(owner, name, value)
    code, lines = compare(FIXTURES / "maskrcnn_r50_tiny.json")
    assert code == 1
    assert any("BEYOND" in line and where in line for line in lines)


def test_a_case_of_other_weights_is_told(
    compare: Callable[[Path], Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads((FIXTURES / "maskrcnn_r50_tiny.json").read_text())
    tree["cfg"] = tree["cfg"].replace("DEPTH: 50", "DEPTH: 101")
    case = tmp_path / "case.json"
    case.write_text(json.dumps(tree))
    weights = FIXTURES / "maskrcnn_r50_tiny.safetensors"
    (tmp_path / "case.safetensors").write_bytes(weights.read_bytes())
    tool_code, _ = compare(case)
    assert tool_code == 2


def test_a_case_without_objects_is_computed(
    compare: Callable[[Path], Result], tmp_path: Path
) -> None:
    tree = json.loads((FIXTURES / "maskrcnn_r50_tiny.json").read_text())
    tensors = load_file(FIXTURES / "maskrcnn_r50_tiny.safetensors")
    for image, target in enumerate(tree["targets"]):
        target["polygons"] = []
        tensors[f"targets/{image}/boxes"] = torch.zeros(0, 4)
        tensors[f"targets/{image}/classes"] = torch.zeros(0, dtype=torch.int64)
    tree["train"] = {"losses": {"loss_mask": 0.0, "loss_box_reg": 0.0, "loss_rpn_loc": 0.0}}
    tree["after_step_delta_norm"] = {}
    (tmp_path / "case.json").write_text(json.dumps(tree))
    save_file(tensors, tmp_path / "case.safetensors")
    code, lines = compare(tmp_path / "case.json")
    assert code == 0, [line for line in lines if "BEYOND" in line]


def test_the_rule_of_the_cases() -> None:
    candidates = torch.tensor([[1, 0, 1, 1, 1, 1, 0, 1]]).bool()
    index, chosen = parity.sample_evenly(candidates, torch.tensor([4]), 5)
    assert index[chosen].tolist() == [0, 2, 4, 5]  # numbers 0 1 3 4 of 0 2 3 4 5 7
