"""tools/parity.py on what upstream recorded, and that it notices when something is off."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solov2 import loss, matrix_nms, model, parity, targets
from solov2.layers import FixedBatchNorm

MODEL_DIR = Path(__file__).resolve().parents[1]
FIXTURES = MODEL_DIR / "tests" / "fixtures"
SOLO, MMDET = "solov2_solo_tiny", "solov2_mmdet_tiny"
DEFORMABLE = ("solov2_mmdet_r50_dcnv2_tiny", "solov2_mmdet_r34_dcn_tiny")

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


def beyond(lines: list[str]) -> list[str]:
    return [line for line in lines if "BEYOND" in line]


def change(name: str, target: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy of a case in another directory, its tree and tensors edited."""
    tree = json.loads((FIXTURES / f"{name}.json").read_text())
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    edit(tree, tensors)
    (target / "case.json").write_text(json.dumps(tree))
    save_file(tensors, target / "case.safetensors")
    return target / "case.json"


@pytest.mark.parametrize("name", [SOLO, MMDET, *DEFORMABLE])
def test_equals_upstream(compare: Callable[[Path], Result], name: str) -> None:
    code, lines = compare(FIXTURES / f"{name}.json")
    assert code == 0, beyond(lines)
    compared = int(lines[-1].removeprefix("parity: ").split()[0])
    assert compared > 140
    # A pixel of the others lies so near the threshold that the number of threads decides it.
    assert name in DEFORMABLE or not [line for line in lines if "rounding" in line]


def another_epsilon(self: FixedBatchNorm, channels: int) -> None:
    torch.nn.BatchNorm2d.__init__(self, channels, eps=1e-3)


BREAKS: dict[str, tuple[Any, str, Any, tuple[str, ...]]] = {
    "another epsilon": (
        FixedBatchNorm,
        "__init__",
        another_epsilon,
        ("outputs/backbone", "grad_norms", "predict/0/scores"),
    ),
    "another smoothing of the dice loss": (loss, "DICE_EPS", 1.0, ("losses", "grad_norms")),
    "fewer cells for an object": (targets, "REACH", 0, ("targets/0/labels", "losses/loss_cls")),
    "no suppression": (
        model,
        "matrix_nms",
        lambda masks, labels, scores, *_, **__: scores,
        ("predict/1/scores",),
    ),
    "overlaps across classes": (
        model,
        "matrix_nms",
        lambda masks, labels, *rest, **more: matrix_nms.matrix_nms(
            masks, torch.zeros_like(labels), *rest, **more
        ),
        ("predict/1/scores",),
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_notices(
    compare: Callable[[Path], Result], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    owner, name, value, places = BREAKS[what]
    monkeypatch.setattr(owner, name, value)
    code, lines = compare(FIXTURES / f"{MMDET}.json")
    assert code == 1
    for place in places:
        assert any(place in line for line in beyond(lines)), place


def test_a_pixel_of_a_mask_is_noticed(compare: Callable[[Path], Result], tmp_path: Path) -> None:
    def edit(_tree: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["predict/1/masks"][20_000] ^= 16

    code, lines = compare(change(SOLO, tmp_path, edit))
    assert code == 1
    assert [line.split()[0] for line in beyond(lines)] == ["predict/1/masks"]


def test_a_pixel_that_rounding_decides_is_none(
    compare: Callable[[Path], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a wider margin for rounding, the pixels of it may differ, and no others.
    case = parity_case(MMDET)
    config_of = parity._config(case)
    batch = parity._batch(case, config_of)
    network = parity._build(case, config_of).eval()
    with torch.no_grad():
        found = network(batch._replace(targets=None))
    low, high = (parity._full_size(found, batch, 0.5 + side)[1]["masks"] for side in (-1e-4, 1e-4))
    undecided = (low != high).reshape(-1).nonzero()[0]
    assert 10 < len(undecided) < 0.002 * low.size
    place = int(undecided[len(undecided) // 2])

    def edit(_tree: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["predict/1/masks"][place // 8] ^= 128 >> place % 8

    path = change(MMDET, tmp_path, edit)
    assert len(beyond(compare(path)[1])) == 1
    monkeypatch.setattr(parity, "_UNDECIDED", 1e-4)
    code, lines = compare(path)
    assert code == 0, beyond(lines)
    assert any("predict/1/masks" in line and "rounding decides" in line for line in lines)


def test_a_gradient_that_rounding_does_not_decide_is_noticed(
    compare: Callable[[Path], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mask_head.conv_kernel.weight"

    def edit(tree: dict[str, Any], _tensors: dict[str, Any]) -> None:
        tree["grad_norms"][name] *= 1.0003

    path = change(MMDET, tmp_path, edit)
    code, lines = compare(path)
    assert code == 1
    assert [line.split()[0] for line in beyond(lines)] == [f"grad_norms/{name}"]
    monkeypatch.setattr(parity, "_ROUNDING", 1e-3)  # as if so much were lost
    code, lines = compare(path)
    assert code == 0, beyond(lines)
    assert [line.split()[0] for line in lines if "rounding decides" in line] == [
        f"grad_norms/{name}"
    ]


def test_settings_of_the_tests_beside_the_model_count(
    compare: Callable[[Path], Result], tmp_path: Path
) -> None:
    # Where WXinlong/SOLO keeps them.
    def edit(tree: dict[str, Any], tensors: dict[str, Any]) -> None:
        tree["test_cfg"] = {"max_per_img": 3}
        for image, found in enumerate(tree["predict"]):
            _, height, width = found["shape"]
            found["shape"] = [3, height, width]
            for kind in ("scores", "labels"):
                name = f"predict/{image}/{kind}"
                tensors[name] = tensors[name][:3].clone()
            bits = np.unpackbits(tensors[f"predict/{image}/masks"].numpy())
            packed = np.packbits(bits[: 3 * height * width])
            tensors[f"predict/{image}/masks"] = torch.from_numpy(packed)

    code, lines = compare(change(SOLO, tmp_path, edit))
    assert code == 0, beyond(lines)


def test_without_predictions_the_original_has_nothing(
    compare: Callable[[Path], Result], tmp_path: Path
) -> None:
    def edit(tree: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["state_dict/bbox_head.solo_cate.bias"] -= 5
        tree["predict"] = [None, None]
        tree["outputs"].pop("cate")
        tree["losses"] = {"loss_ins": tree["losses"]["loss_ins"]}
        tree["grad_norms"] = {}

    code, lines = compare(change(SOLO, tmp_path, edit))
    assert code == 0, beyond(lines)


def test_a_case_without_objects_is_computed(
    compare: Callable[[Path], Result], tmp_path: Path
) -> None:
    def edit(tree: dict[str, Any], tensors: dict[str, Any]) -> None:
        for image, gt in enumerate(tree["gt"]):
            for kind in gt:
                tensors[f"gt/{image}/{kind}"] = tensors[f"gt/{image}/{kind}"][:0]
        tree["losses"] = {"loss_mask": 0.0}
        del tree["targets"]
        tree["grad_norms"] = dict.fromkeys(
            name for name in tree["grad_norms"] if "kernel" in name or "mask_feature" in name
        )

    code, lines = compare(change(MMDET, tmp_path, edit))
    assert code == 0, beyond(lines)


def test_a_case_of_another_network_is_told(
    compare: Callable[[Path], Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(tree: dict[str, Any], _tensors: dict[str, Any]) -> None:
        tree["config"]["backbone"]["depth"] = 34

    code, _ = compare(change(MMDET, tmp_path, edit))
    assert code == 2


def parity_case(name: str) -> dict[str, Any]:
    """A case as the program loads it."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            if set(node) == {"tensor"}:
                return tensors[node["tensor"]]
            return {key: fill(value) for key, value in node.items()}
        return [fill(value) for value in node] if isinstance(node, list) else node

    tree: dict[str, Any] = fill(json.loads((FIXTURES / f"{name}.json").read_text()))
    return tree
