"""Every model on the accelerator that the tests run on: what a person does first on a new machine.

Models are found, not listed: a new one is tested here without a change. It needs
``<package>/static.py`` and parity cases in ``tests/fixtures``; its scripts are tested in
test_npu_scripts.py. ``bash ci/test_npu_sim.sh tests/test_npu_models.py`` runs this on the simulated
NPU; without one it is skipped.
"""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo_common import device as devices
from zoo_common.amp import Precision

ROOT = Path(__file__).resolve().parents[1]
KIND = os.environ.get("ZOO_TEST_DEVICE", "cpu")

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(KIND == "cpu", reason="for accelerators: run bash ci/test_npu_sim.sh"),
]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


MODELS = {model.name: model for model in load_tool("model_dirs").find_models()}
CASES = {
    f"{name}-{file.stem}": (model.path, file)
    for name, model in MODELS.items()
    for file in sorted((model.path / "tests" / "fixtures").glob("*.json"))
    if file.with_suffix(".safetensors").is_file()
}
PRECISIONS = [("O0", "auto"), ("O1", "bfloat16"), ("O2", "bfloat16"), ("O1", "float16")]


def test_every_model_is_covered() -> None:
    assert {name.partition("-")[0] for name in CASES} == set(MODELS)
    assert len(MODELS) >= 2


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_upstream_in_float32(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    parity = load_tool("parity")
    card = devices.resolve(KIND)
    devices.reset_peak_memory(card)
    before = devices.peak_memory_mb(card)
    path, file = CASES[case]
    code = parity.main([str(path), str(file), f"--device={KIND}"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, [line for line in lines if "BEYOND" in line]
    assert int(lines[-1].split()[1]) > 100
    assert devices.peak_memory_mb(card) > before + 1, "it was computed elsewhere"


class Dtypes(TorchDispatchMode):
    """Notes the floating dtypes of tensors that operators return on the accelerator.

    Numbers are left out: torch's GradScaler inverts its scale in float64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.device.type == KIND and tensor.dim():
                self.seen.update({tensor.dtype} if tensor.is_floating_point() else ())
        return result


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, bool]]]:
    """The loss of each optimizer step, and whether the step was taken."""
    steps: list[tuple[Tensor, bool]] = []
    step = Precision.step

    def record(self: Precision, loss: Tensor) -> bool:
        done = step(self, loss)
        steps.append((loss.detach(), bool(done)))
        return bool(done)

    monkeypatch.setattr(Precision, "step", record)
    return steps


@pytest.mark.parametrize("precision", PRECISIONS, ids="-".join)
@pytest.mark.parametrize("name", MODELS)
def test_trains_and_evaluates(
    name: str, precision: tuple[str, str], taken: list[tuple[Tensor, bool]]
) -> None:
    static = importlib.import_module(f"{MODELS[name].package.name}.static")
    card = devices.resolve(KIND)
    devices.configure(card)
    step = static.build(card, *precision)
    count = 2 if precision[1] == "float16" else 3
    with Dtypes() as trained:
        for index in range(count):
            step(index)
    assert len(taken) == count
    assert all(loss.device == card and loss.dtype == torch.float32 for loss, _ in taken)
    assert all(math.isfinite(loss.item()) for loss, _ in taken)
    if precision[1] != "float16":  # whose first scale is meant to overflow
        assert all(done for _, done in taken)
    evaluate = static.evaluation(card, *precision)
    with Dtypes() as evaluated:
        evaluate(0)
    half = set() if precision[1] == "auto" else {getattr(torch, precision[1])}
    for dtypes in (trained, evaluated):
        assert dtypes.seen & {torch.float16, torch.bfloat16} == half
        assert torch.float32 in dtypes.seen
        assert torch.float64 not in dtypes.seen
