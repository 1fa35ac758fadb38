"""tools/parity.py: agrees with upstream's numbers, and notices when something does not."""

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.twins import Twins as TimmTwins
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

MODEL_DIR = Path(__file__).resolve().parents[1]
TOOL = MODEL_DIR.parents[3] / "tools" / "parity.py"
FIXTURE = MODEL_DIR / "tests" / "fixtures" / "twins_tiny.json"

Result = tuple[int, list[str], str]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("parity_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parity(
    tool: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs the program in this process: exit code, lines of output, error output."""
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = tool.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err

    return run


def write_case(path: Path, tree: dict[str, Any]) -> Path:
    """Writes a tree with tensors in it as a case."""
    tensors: dict[str, Tensor] = {}

    def strip(node: Any, place: str) -> Any:
        if isinstance(node, Tensor):
            tensors[place] = node.detach().clone().contiguous()
            return {"tensor": place}
        if isinstance(node, dict):
            return {key: strip(value, f"{place}/{key}") for key, value in node.items()}
        if isinstance(node, list):
            return [strip(value, f"{place}/{index}") for index, value in enumerate(node)]
        return node

    path.write_text(json.dumps(strip(tree, "case")), encoding="utf-8")
    save_file(tensors, path.with_suffix(".safetensors"))
    return path


def test_upstreams_numbers(parity: Callable[..., Result]) -> None:
    code, lines, _ = parity(MODEL_DIR, FIXTURE)
    assert [line for line in lines if "BEYOND" in line] == []
    assert lines[-1] == "parity: 505 compared, 0 beyond 2e-06"
    assert code == 0


def test_a_wrong_weight_ends_with_exit_code_1(tmp_path: Path) -> None:
    tensors = load_file(FIXTURE.with_suffix(".safetensors"))
    tensors["state_dict/blocks.2.1.attn.kv.weight"][0, 0] += 1e-3
    save_file(tensors, tmp_path / "case.safetensors")
    shutil.copy(FIXTURE, tmp_path / "case.json")
    command = [sys.executable, TOOL, MODEL_DIR, tmp_path / "case.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "BEYOND" in lines["gvt/stages/blocks.2.1.attn"]
    assert "BEYOND" not in lines["gvt/stages/blocks.2.0"]
    assert result.stdout.splitlines()[-1].startswith("parity: 505 compared, ")


class GivenMask(nn.Module):
    def __init__(self, keep: float, mask: Tensor) -> None:
        super().__init__()
        self.keep, self.mask = keep, mask

    def forward(self, x: Tensor) -> Tensor:
        return x / self.keep * self.mask.view(-1, 1, 1)


def timm_case(config: dict[str, Any], size: tuple[int, int], clip: bool) -> dict[str, Any]:
    """A case of the recorded form, made with timm's Twins and PyTorch alone."""
    torch.manual_seed(3)
    options = {key: value for key, value in config.items() if key != "img_size"}
    model = TimmTwins(**options).double()
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    labels = torch.tensor([2, 0, 1])
    soft = torch.rand(3, config["num_classes"], dtype=torch.float64).softmax(1)
    scale = 500.0 if clip else 1.0  # for gradients that must be clipped
    with torch.no_grad():
        model.head.weight.mul_(scale)
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    case: dict[str, Any] = {
        "meta": {"peer": "timm"},
        "config": config,
        "inputs": {"images": images, "labels": labels, "soft": soft},
        "state_dict": state_dict,
    }
    stages: dict[str, Any] = {}
    for name, module in model.named_modules():
        if (name.count(".") == 2 and name.startswith("blocks")) or name in ("norm", "head"):
            module.register_forward_hook(lambda m, a, out, name=name: stages.update({name: out}))
        if name in [f"patch_embeds.{i}" for i in range(4)]:
            module.register_forward_hook(
                lambda m, a, out, name=name: stages.update({name: [out[0], list(out[1])]})
            )
    logits = model(images)
    stages["logits"] = logits
    section: dict[str, Any] = {"stages": copy.copy(stages), "eval_logits": logits}
    section["losses"] = {
        "ce": F.cross_entropy(logits, labels).item(),
        "soft_target": (loss := F.cross_entropy(logits, soft)).item(),
    }
    loss.backward()
    section["grad_norm"] = {n: p.grad.norm().item() for n, p in model.named_parameters()}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0).item()
    assert (norm > 5) == clip
    section["clip_total_norm"] = norm
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    torch.optim.AdamW(groups, lr=7e-4, weight_decay=0.0).step()
    section["after_step_delta_norm"] = {
        name: (parameter - state_dict[name]).norm().item()
        for name, parameter in model.named_parameters()
    }
    model.load_state_dict(state_dict)
    model.zero_grad()
    masks = {"p": 0.25, "attn": torch.tensor([1.0, 0, 1]), "mlp": torch.tensor([0.0, 1, 1])}
    section["drop_masks"] = {"1.0": masks}
    model.blocks[1][0].drop_path1 = GivenMask(0.75, masks["attn"])
    model.blocks[1][0].drop_path2 = GivenMask(0.75, masks["mlp"])
    logits = model(images)
    F.cross_entropy(logits, soft).backward()
    section["drop_path"] = {
        "logits": logits,
        "grad_norm": {n: p.grad.norm().item() for n, p in model.named_parameters()},
    }
    return {**case, "timm": section}


CONFIG = {
    "img_size": 224,
    "patch_size": 4,
    "num_classes": 4,
    "embed_dims": [8, 12, 16, 24],
    "num_heads": [2, 3, 4, 2],
    "mlp_ratios": [2, 3, 2, 4],
    "depths": [1, 3, 2, 1],
    "sr_ratios": [4, 2, 2, 1],
}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("wss", [[5, 7, 3, 7], None])
def test_other_sizes_and_the_other_family(
    parity: Callable[..., Result], tmp_path: Path, wss: list[int] | None, clip: bool
) -> None:
    config = CONFIG if wss is None else {**CONFIG, "wss": wss}
    path = write_case(tmp_path / "case.json", timm_case(config, (90, 118), clip))
    code, lines, _ = parity(MODEL_DIR, path)
    assert [line for line in lines if "BEYOND" in line] == []
    assert code == 0
    assert len(lines) > 3 * 80


def test_a_config_that_names_a_variant(parity: Callable[..., Result], tmp_path: Path) -> None:
    from twins.model import build_model

    torch.manual_seed(0)
    model = build_model("alt_gvt_smoke", num_classes=3).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    case = {
        "config": {"model": "alt_gvt_smoke"},
        "inputs": {"images": images, "labels": torch.tensor([0, 1]), "soft": torch.rand(2, 3)},
        "state_dict": dict(model.state_dict()),
        "gvt": {"eval_logits": model(images)},
    }
    code, lines, _ = parity(MODEL_DIR, write_case(tmp_path / "case.json", case))
    assert (code, lines[-1]) == (0, "parity: 1 compared, 0 beyond 2e-06")


PACKAGE = """
import torch
GIVEN = ("config", "*/given*")
TOLERANCE = 1e-3
def compute(case, device, dtype):
    assert (device.type, dtype) == ("cpu", torch.float64)
    big = torch.arange(12.).reshape(3, 4) + case["config"]["shift"]
    return {"part": {
        "tensor": big, "big": big, "number": 2.001, "words": ["a", "c"], "word": "x",
        "lists": [[1.0, 2.0], big], "nan": float("nan"), "frozen": None, "more": [big, big],
        "grad_norm": {"a": 1.0, "noise": 3e-12, "loud": 0.5, "none": None},
        "after_step_delta_norm": {"a": 0.1, "noise": 7.0},
    }}
"""
BIG = torch.arange(12.0).reshape(3, 4)
SUMMARY = {
    "summary": True,
    "shape": [3, 4],
    "dtype": "torch.float32",
    "mean": 5.5,
    "std": BIG.std(correction=0).item(),
    "abssum": 66.0,
    "norm": BIG.norm().item(),
    "sample_index": [0, 5, 11],
    "sample": [0.0, 5.0, 11.0],
}


@pytest.fixture
def judge(parity: Callable[..., Result], tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Compares a recorded part with a small package's; the lines by path."""
    package = tmp_path / "model" / f"package_{tmp_path.name}"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "parity.py").write_text(PACKAGE)

    def run(part: dict[str, Any], *options: str, shift: float = 0.0) -> dict[str, str]:
        case = {"config": {"shift": shift}, "part": part}
        path = write_case(tmp_path / "case.json", case)
        code, lines, _ = parity(tmp_path / "model", path, *options)
        beyond = sum("BEYOND" in line for line in lines)
        compared = sum("left out" not in line for line in lines[:-1])
        assert lines[-1].startswith(f"parity: {compared} compared, {beyond} beyond")
        assert code == (1 if beyond else 0)
        return {line.split()[0].removeprefix("part/"): line for line in lines[:-1]}

    return run


def test_every_form_of_a_recorded_thing(judge: Callable[..., dict[str, str]]) -> None:
    part = {
        "tensor": BIG,
        "big": SUMMARY,
        "number": 2.0,
        "words": ["a", "c"],
        "word": "x",
        "lists": [[1, 2], BIG],
        "nan": float("nan"),
        "frozen": None,
        "given_mask": BIG,
    }
    lines = judge(part)
    assert [line for line in lines.values() if "BEYOND" in line] == []
    assert set(lines) == {*part, "lists/0", "lists/1"} - {"given_mask", "lists"}
    assert "5.0e-04" in lines["number"]
    beyond = {path for path, line in judge(part, "--tol", "1e-4").items() if "BEYOND" in line}
    assert beyond == {"number"}
    beyond = {path for path, line in judge(part, shift=0.1).items() if "BEYOND" in line}
    assert beyond == {"tensor", "big", "lists/1"}


@pytest.mark.parametrize(
    ("recorded", "remark"),
    [
        ({"missing": 1.0}, "not computed"),
        ({"tensor": BIG.T}, "shape (3, 4) instead of (4, 3)"),
        ({"big": {**SUMMARY, "shape": [12]}}, "shape (3, 4) instead of (12,)"),
        ({"big": {**SUMMARY, "norm": 1.01 * SUMMARY["norm"]}}, "summary"),
        ({"words": ["a", "b"]}, "['a', 'c']"),
        ({"word": 3.0}, "a str instead of numbers"),
        ({"nan": 1.0}, "infinite or undefined elsewhere"),
        ({"frozen": 1.0}, "not computed"),
        ({"number": None}, "BEYOND"),
        ({"more": [BIG]}, "BEYOND"),
    ],
)
def test_every_kind_of_disagreement(
    judge: Callable[..., dict[str, str]], recorded: dict[str, Any], remark: str
) -> None:
    beyond = [line for line in judge(recorded).values() if "BEYOND" in line]
    assert len(beyond) == 1
    assert remark in beyond[0]


def test_gradients_that_are_rounding_noise(judge: Callable[..., dict[str, str]]) -> None:
    lines = judge(
        {
            "grad_norm": {"a": 1.0, "noise": 1e-15, "loud": 1e-15, "none": None},
            "after_step_delta_norm": {"a": 0.1, "noise": 3.0},
        }
    )
    assert "left out" in lines["grad_norm/noise"]
    assert "left out" in lines["after_step_delta_norm/noise"]
    assert "BEYOND" in lines["grad_norm/loud"], "noise there, but a gradient here"
    assert "BEYOND" not in lines["grad_norm/none"]


def test_mistakes_are_told_in_a_sentence(parity: Callable[..., Result], tmp_path: Path) -> None:
    def complaint(*arguments: object) -> str:
        code, lines, error = parity(*arguments)
        assert (code, lines) == (2, [])
        assert error.startswith("parity: ")
        assert error.count("\n") == 1
        return error

    case = tmp_path / "case.json"
    assert "cannot read" in complaint(MODEL_DIR, case)
    assert "--device=tpu is no device" in complaint(MODEL_DIR, FIXTURE, "--device=tpu")
    assert "there is no model directory" in complaint(tmp_path / "none", FIXTURE)
    assert "needs one <package>/parity.py" in complaint(tmp_path, FIXTURE)
    case.write_text("{", encoding="utf-8")
    assert "is not JSON" in complaint(MODEL_DIR, case)
    case.write_text("[]", encoding="utf-8")
    assert "its top is not an object" in complaint(MODEL_DIR, case)
    case.write_text('{"a": {"tensor": "b"}}', encoding="utf-8")
    assert "has no case.safetensors beside it" in complaint(MODEL_DIR, case)
    save_file({"c": torch.ones(2)}, tmp_path / "case.safetensors")
    assert "names the tensor 'b'" in complaint(MODEL_DIR, case)
    (tmp_path / "case.safetensors").write_bytes(b"12")
    assert "is broken" in complaint(MODEL_DIR, case)
    assert "the case has no config" in complaint(MODEL_DIR, write_case(case, {"a": 1}))


def test_weights_that_do_not_fit(parity: Callable[..., Result], tmp_path: Path) -> None:
    tree = json.loads(FIXTURE.read_text(encoding="utf-8"))
    del tree["state_dict"]["norm.bias"]
    tree["state_dict"]["norm.bayes"] = tree["state_dict"]["norm.weight"]
    path = tmp_path / "case.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    shutil.copy(FIXTURE.with_suffix(".safetensors"), path.with_suffix(".safetensors"))
    code, _, error = parity(MODEL_DIR, path)
    assert code == 2
    assert "does not fit the model" in error
    assert '"norm.bias"' in error
    assert '"norm.bayes"' in error
