"""Every model's smoke scripts on the accelerator that the tests run on, as a user starts them.

Models are found, not listed. ``bash ci/test_npu_sim.sh tests/test_npu_scripts.py`` runs this on the
simulated NPU; without one it is skipped.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo_common import runs, sample

ROOT = Path(__file__).resolve().parents[1]
KIND = os.environ.get("ZOO_TEST_DEVICE", "cpu")

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(KIND == "cpu", reason="for accelerators: run bash ci/test_npu_sim.sh"),
]
on_the_simulator = pytest.mark.skipif(
    "NPU_SIM_CARDS" not in os.environ, reason="real cards have what they have"
)


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


MODELS = {model.name: model for model in load_tool("model_dirs").find_models()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small made data set for each model, in the layout of its smoke run."""
    made: dict[str, Path] = {}
    for name, model in MODELS.items():
        layout = runs.load(model.path).run("train_smoke_1p").layout
        root = tmp_path_factory.getbasetemp() / f"sample {layout}"
        if not root.is_dir():
            sample.make_at(root, layout=layout, train=64, val=10)
        made[name] = root
    return made


def script(
    name: str, run: str, *words: str, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(MODELS[name].path / "test" / f"{run}.sh"), "run.log_every=1", *words],
        cwd=cwd,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def result_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def losses_of(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights_of(output: Path) -> dict[str, Tensor]:
    return torch.load(output / "checkpoints" / "last.pth", weights_only=True)["model"]


@pytest.mark.parametrize("name", MODELS)
def test_the_smoke_run_resumes_bit_for_bit(
    name: str, data: dict[str, Path], tmp_path: Path
) -> None:
    """The uninterrupted run finds the card itself; both are evaluated at the end."""
    words = [f"--data_path={data[name]}"]
    whole = script(
        name,
        "train_smoke_1p",
        *words,
        "--device=auto",
        "--max_steps=3",
        "--output_dir=whole",
        cwd=tmp_path,
    )
    assert whole.returncode == 0, whole.stderr
    expected = result_of(tmp_path / "whole")
    assert expected["status"] == "completed"
    assert expected["device"].startswith(f"{KIND}:0 ")
    assert f"torch_{KIND}" in expected["versions"]
    assert expected["metrics"] and all(map(math.isfinite, expected["metrics"].values()))
    words += [f"--device={KIND}", "--output_dir=cut"]
    for more in (["--max_steps=1"], ["--max_steps=3", "--resume"]):
        done = script(name, "train_smoke_1p", *words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    weights = weights_of(tmp_path / "cut")
    for key, value in weights_of(tmp_path / "whole").items():
        assert torch.equal(weights[key], value), key
    assert result_of(tmp_path / "cut")["metrics"] == expected["metrics"]


@pytest.mark.cards(2)
@pytest.mark.parametrize("name", MODELS)
def test_two_cards_train_together(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    words = [f"--data_path={data[name]}", f"--device={KIND}", "--max_steps=2", "--output_dir=out"]
    done = script(name, "train_smoke_2p", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "out")
    assert (result["status"], result["world_size"], result["steps"]) == ("completed", 2, 2)
    assert all(map(math.isfinite, losses_of(tmp_path / "out")))
    assert {value.device.type for value in weights_of(tmp_path / "out").values()} == {"cpu"}
    for rank in range(2):
        assert (tmp_path / "out" / f"train_{rank}.log").is_file()


@on_the_simulator
@pytest.mark.parametrize("name", MODELS)
def test_too_little_memory_is_told_in_a_sentence(
    name: str, data: dict[str, Path], tmp_path: Path
) -> None:
    words = [f"--data_path={data[name]}", f"--device={KIND}", "--max_steps=2", "--output_dir=out"]
    done = script(name, "train_smoke_1p", *words, cwd=tmp_path, NPU_SIM_MEMORY=str(20 * 2**20))
    assert done.returncode == 1
    (told,) = [line for line in done.stderr.splitlines() if not line.startswith("env_npu.sh")]
    assert told.startswith("rank 0 failed: The card has no memory for ")
    assert told.endswith(
        " more: take a smaller --batch_size, or half precision with --amp=O1 or O2."
    )
    assert "Final" not in done.stdout
    assert result_of(tmp_path / "out")["status"] == "failed"


@on_the_simulator
@pytest.mark.parametrize("name", MODELS)
def test_a_machine_without_cards_is_told(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    words = [f"--data_path={data[name]}", f"--device={KIND}", "--output_dir=out"]
    done = script(name, "train_smoke_1p", *words, cwd=tmp_path, NPU_SIM_CARDS="0")
    assert done.returncode == 2
    (told,) = [line for line in done.stderr.splitlines() if not line.startswith("env_npu.sh")]
    assert told.startswith("error: Device npu cannot be used: the driver shows no card; ")
    few = script(name, "train_smoke_2p", *words, cwd=tmp_path, NPU_SIM_CARDS="1")
    assert few.returncode == 2
    assert "needs 2 npu cards from card 0 on, but this machine shows 1" in few.stderr
