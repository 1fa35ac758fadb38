"""tools/npu_ops.py: which operators a model dispatches on an NPU, and who runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tools" / "npu_ops.py"
MODELS = {
    "twins": ROOT / "contrib/cv/classification/Twins-ALTGVT-S",
    "rcnn": ROOT / "built-in/cv/detection/Faster_Mask_RCNN_for_PyTorch",
    "solov2": ROOT / "contrib/cv/detection/SOLOv2",
    "declip": ROOT / "built-in/others/DeCLIP_for_PyTorch",
    "glip": ROOT / "built-in/others/GLIP_for_PyTorch",
}

# A model with one of each: native, made of others, without a kernel, and against the rules.
STATIC = """import torch
import torch.nn.functional as F
import torchvision


def build(device, opt_level="O0", dtype="auto"):
    weight = torch.ones(3, 4, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step(index):
        optimizer.zero_grad()
        loss = F.gelu(weight).t().square().sum()
        loss.backward()
        optimizer.step()
        FALLBACK

    return step


def evaluation(device, opt_level="O0", dtype="auto"):
    image = torch.ones(1, 1, 4, 4, device=device)

    def step(index):
        RULE

    return step
"""
SUPPRESS = """boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 3]]).to(device)
        torchvision.ops.nms(boxes, torch.ones(2, device=device), 0.5)"""
SAMPLE = "F.grid_sample(image.bfloat16(), torch.zeros(1, 2, 2, 2, device=device).bfloat16())"
RESIZE = "F.interpolate(image, scale_factor=2.0)"

SURVEY = """import json, sys
from pathlib import Path
sys.path.insert(0, {tools!r})
import npu_ops
from model_dirs import ModelDir
from npu_record import take_survey

model = ModelDir("toy", Path({model!r}))
survey = take_survey(model, tuple({versions!r}))
print(npu_ops.describe(survey))
print(json.dumps([npu_ops.as_record(model, survey), npu_ops.is_clean(survey, None)]))
"""


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        timeout=500,
    )


def survey(
    place: Path,
    fallback: str = "",
    rule: str = "",
    versions: tuple[str, ...] = ("2.6", "2.14"),
    static: str = STATIC,
) -> tuple[str, dict[str, Any], bool]:
    """What is said of a model, its record, and whether all is well."""
    (place / "toy").mkdir()
    text = static.replace("FALLBACK", fallback or "pass").replace("RULE", rule or "pass")
    (place / "toy" / "static.py").write_text(text)
    script = SURVEY.format(tools=str(ROOT / "tools"), model=str(place), versions=versions)
    told = run("-m", "npu_sim", sys.executable, "-W", "ignore", "-c", script)
    assert told.returncode == 0, told.stderr
    record, clean = json.loads(told.stdout.splitlines()[-1])
    return told.stdout, record, clean


@pytest.mark.simulator
def test_operators_are_told_by_phase_and_way(tmp_path: Path) -> None:
    text, record, clean = survey(tmp_path)
    assert clean and record["broken_rules"] == []
    operators = record["operators"]
    assert operators["aten::gelu"] == {"calls": {"forward": 1}, "dtypes": ["float32"]}
    assert operators["aten::gelu_backward"]["calls"] == {"backward": 1}
    assert set(operators["aten::_foreach_add_.List"]["calls"]) == {"optimizer"}
    for kind in record["versions"]:
        assert {"aten::gelu", "aten::gelu_backward"} <= set(kind["native"])
        assert kind["decomposed"]["aten::t"] == ["aten::transpose.int"]
        assert kind["decomposed"]["aten::transpose.int"] == ["aten::as_strided"]
        assert kind["fallbacks"] == [] and kind["supported"]
    assert "torch_npu 2.6 (supported)" in text and " 0 on the CPU" in text


@pytest.mark.simulator
def test_a_fallback_is_told_with_its_line(tmp_path: Path) -> None:
    text, record, clean = survey(tmp_path, fallback=SUPPRESS)
    assert not clean
    assert all(kind["fallbacks"] == ["torchvision::nms"] for kind in record["versions"])
    line = next(line for line in text.splitlines() if line.startswith("falls back"))
    assert line.startswith("falls back on torch_npu 2.6: torchvision::nms (optimizer)")
    assert line.endswith("static.py:16 step")


@pytest.mark.simulator
def test_a_fallback_on_an_unsupported_version_is_told_and_no_failure(tmp_path: Path) -> None:
    """torch_npu has a kernel of the fused SGD since 2.13; 2.5 is too old for the project."""
    fused = "torch._fused_sgd_([weight.detach()], [weight.detach()], [], weight_decay=0.0, "
    fused += "momentum=0.0, lr=0.1, dampening=0.0, nesterov=False, maximize=False, "
    fused += "is_first_step=True)"
    _, record, clean = survey(tmp_path, fallback=fused, versions=("2.5", "2.14"))
    old, new = record["versions"]
    assert old["versions"] == ["2.5"] and not old["supported"]
    assert old["fallbacks"] == ["aten::_fused_sgd_"]
    assert new["fallbacks"] == [] and "aten::_fused_sgd_" in new["native"]
    assert clean


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (SAMPLE, "aten::grid_sampler_2d takes bfloat16, but it is documented for float16"),
        (RESIZE, "a call of interpolate, but give size: scale_factor is not supported"),
    ],
)
def test_a_broken_rule_is_told_with_its_source(tmp_path: Path, rule: str, said: str) -> None:
    text, record, clean = survey(tmp_path, rule=rule, versions=("2.14",))
    assert not clean and record["broken_rules"]
    line = next(line for line in text.splitlines() if line.startswith("rule: "))
    assert said in line and "documents" in line and "evaluation" in line


DETECTION = """import torch
from zoo_common.detection import ops


def build(device, opt_level="O0", dtype="auto"):
    maps = [torch.rand(2, 4, size, size, device=device, requires_grad=True) for size in (8, 4)]
    weight = torch.rand(6, 4, 3, 3, device=device, requires_grad=True)
    offset = torch.rand(2, 18, 8, 8, device=device, requires_grad=True)
    mask = torch.rand(2, 9, 8, 8, device=device, requires_grad=True)
    corner = torch.rand(2, 5, 2, device=device) * 16
    boxes = torch.cat([corner, corner + 9], 2)
    level = torch.zeros(2, 5, dtype=torch.int64, device=device)

    def step(index):
        kept = ops.nms(boxes, boxes[..., 0], 0.5)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            pooled = [ops.roi_align(maps, (4, 8), boxes, level, 3, ratio) for ratio in (0, 2)]
            bent = ops.deform_conv2d(maps[0], offset, weight, padding=1, mask=mask)
        (pooled[0].sum() + pooled[1].sum() + bent.sum() + kept.sum()).backward()

    return step


def evaluation(device, opt_level="O0", dtype="auto"):
    return lambda index: None
"""


@pytest.mark.simulator
def test_the_detection_operators_fall_back_in_no_supported_version(tmp_path: Path) -> None:
    versions = tuple(f"2.{minor}" for minor in range(6, 15))
    _, record, clean = survey(tmp_path, versions=versions, static=DETECTION)
    assert clean and record["broken_rules"] == []
    assert all(kind["supported"] and not kind["fallbacks"] for kind in record["versions"])
    assert "aten::index_add_" in record["operators"]


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_our_models_fall_back_nowhere_and_their_record_is_fresh(model: str, tmp_path: Path) -> None:
    file = tmp_path / "now.json"
    told = run(str(PROGRAM), model, f"--json={file}")
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.splitlines()[-1].endswith("all is well")
    now = json.loads(file.read_text(encoding="utf-8"))
    kept = json.loads((MODELS[model] / "npu_operators.json").read_text(encoding="utf-8"))
    assert sorted(now["operators"]) == sorted(kept["operators"])
    assert now["versions"] == kept["versions"]
    assert now["broken_rules"] == kept["broken_rules"] == []


@pytest.mark.simulator
def test_the_table_alone_is_printed_on_demand() -> None:
    told = run(str(PROGRAM), "twins", "--version=2.14", "--markdown")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines[0].startswith("| torch_npu | supported here |")
    assert lines[2].startswith("| 2.14 | yes |")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "npu_ops: There is no model 'nowhere' here; there is: "),
        (["twins", "--version=1.11"], "npu_ops: --version=1.11: nothing is known of such a"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words: list[str], message: str) -> None:
    told = run(str(PROGRAM), *words)
    assert told.returncode == 2
    assert told.stderr.splitlines()[-1].startswith(message)
