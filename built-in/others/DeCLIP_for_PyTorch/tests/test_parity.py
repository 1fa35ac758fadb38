"""tools/parity.py on what upstream recorded, and that it notices when something is off."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from declip import objective, parity, recipe, tokenizer, transformer
from declip.losses import nearest_neighbor
from declip.model import CLIP
from declip.resnet import AttentionPool2d

MODEL_DIR = Path(__file__).resolve().parents[1]
FIXTURES = MODEL_DIR / "tests" / "fixtures"
VIT, RESNET, QUEUE, PLAIN = (
    "declip_vit_tiny",
    "declip_r50_tiny",
    "declip_vit_queue",
    "clip_vit_tiny",
)
TWO_LOSSES = "declip_vit_two_losses"
COMPARED = {VIT: 254, RESNET: 383, QUEUE: 228, TWO_LOSSES: 212, PLAIN: 173}

Result = tuple[int, list[str]]


@pytest.fixture
def compare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Result]:
    """Runs the program in this process: exit code and lines."""
    tool = MODEL_DIR.parents[2] / "tools" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity_tool", tool)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(case: Path) -> Result:
        capsys.readouterr()
        code = module.main([str(MODEL_DIR), str(case)])
        output = capsys.readouterr()
        return code, [*output.out.splitlines(), *output.err.splitlines()]

    return run


def beyond(lines: list[str]) -> list[str]:
    return [line for line in lines if "BEYOND" in line]


def change(
    name: str, target: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]
) -> Path:
    """A copy of a case in another directory, its tree and tensors edited."""
    tree = json.loads((FIXTURES / f"{name}.json").read_text())
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    edit(tree, tensors)
    (target / "case.json").write_text(json.dumps(tree))
    save_file(tensors, target / "case.safetensors")
    return target / "case.json"


@pytest.mark.parametrize("name", COMPARED)
def test_equals_upstream(compare: Callable[[Path], Result], name: str) -> None:
    code, lines = compare(FIXTURES / f"{name}.json")
    assert code == 0, beyond(lines)
    assert lines[-1] == f"parity: {COMPARED[name]} compared, 0 beyond 2e-06"


def test_queues_overflow_in_either_push_of_the_cases() -> None:
    # And the second case cuts captions, and its scale is above the limit.
    for name, first in ((VIT, False), (QUEUE, True)):
        tree = json.loads((FIXTURES / f"{name}.json").read_text())
        size, start = tree["config"]["clip"]["nn_size"], tree["bank_before"]["ptr"]
        batch = len(tree["inputs"]["captions"])
        assert (start + batch >= size) == first
        assert (start + 2 * batch >= size) or first
    tensors = load_file(FIXTURES / f"{QUEUE}.safetensors")
    assert tensors["state_dict/logit_scale"].exp().item() > 100
    assert (tensors["tokens/0/tokens"][:, -1] > 0).any()


def unlimited(self: CLIP) -> Tensor:
    return self.logit_scale.exp()


def limited(self: CLIP) -> Tensor:
    return self.logit_scale.exp().clamp(max=100)


def push_around_the_end(self: nearest_neighbor.TextQueue, texts_BD: Tensor) -> None:
    self.wrap = True
    PUSH(self, texts_BD)


def attend_to_all(*qkv: Tensor, is_causal: bool = False) -> Tensor:
    return torch.nn.functional.softmax(qkv[0] @ qkv[1].mT / qkv[0].shape[-1] ** 0.5, -1) @ qkv[2]


def rows_that_end_early(self: tokenizer.Tokenizer, text: str, context_length: int) -> list[int]:
    return ROW(self, text, context_length - 1)


def no_clamp(*_: object) -> None:
    pass


PUSH, ROW = nearest_neighbor.TextQueue.push, tokenizer.Tokenizer.row
BREAKS: dict[str, tuple[str, Any, str, Any, tuple[str, ...]]] = {
    "another GELU": (
        VIT,
        transformer,
        "QUICK_GELU",
        1.7,
        ("stages/visual/0", "eval/text_features"),
    ),
    "a text that sees what follows": (
        VIT,
        transformer.F,
        "scaled_dot_product_attention",
        attend_to_all,
        ("stages/encode_text.transformer.resblocks.0/0", "eval/text_features"),
    ),
    "a scale without limit": (
        QUEUE,
        CLIP,
        "scale",
        unlimited,
        ("outputs/logits/0", "losses/nn_text"),
    ),
    "a limit that stops the gradient": (QUEUE, CLIP, "scale", limited, ("grad_norm/logit_scale",)),
    "a queue that goes around": (
        QUEUE,
        nearest_neighbor.TextQueue,
        "push",
        push_around_the_end,
        ("bank_after", "bank_ptr_after"),
    ),
    "texts cut elsewhere": (
        QUEUE,
        tokenizer.Tokenizer,
        "row",
        rows_that_end_early,
        ("tokens/0/tokens", "tokens/1/tokens"),
    ),
    "texts of other lengths": (VIT, objective, "TEXT_EPS", 0.1, ("losses/clip_loss",)),
    "a scale that is not kept above its least": (
        PLAIN,
        parity,
        "clamp_scale",
        no_clamp,
        ("after_step_delta_norm/logit_scale",),
    ),
    "decay for norms": (
        RESNET,
        recipe,
        "_NORMS",
        (torch.nn.LayerNorm,),
        ("optim_groups/1/weight_decay", "after_step_delta_norm/visual.bn1.weight"),
    ),
    "pooling by a mean": (
        RESNET,
        AttentionPool2d,
        "forward",
        lambda self, maps_BCHW: self.c_proj(maps_BCHW.mean(dim=(2, 3))),
        ("stages/visual.attnpool/0", "eval/image_features"),
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_notices(
    compare: Callable[[Path], Result], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    case, owner, name, value, places = BREAKS[what]
    monkeypatch.setattr(owner, name, value)
    code, lines = compare(FIXTURES / f"{case}.json")
    assert code == 1
    for place in places:
        assert any(place in line for line in beyond(lines)), place


def test_a_case_without_a_record_of_tokens(
    compare: Callable[[Path], Result], tmp_path: Path
) -> None:
    def edit(tree: dict[str, Any], _tensors: dict[str, Tensor]) -> None:
        del tree["tokens"]

    code, lines = compare(change(PLAIN, tmp_path, edit))
    assert code == 0, beyond(lines)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tree, _: tree.pop("config"), "the case has no config"),
        (lambda tree, _: tree["config"].update(type="filip_vitb32"), "is not built here"),
        (lambda tree, _: tree["config"]["image_encode"].update(layers=3), "does not fit the model"),
        (lambda tree, _: tree["state_dict"].pop("visual.proj"), '"visual.proj"'),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    compare: Callable[[Path], Result],
    tmp_path: Path,
    edit: Callable[[dict[str, Any], dict[str, Tensor]], None],
    said: str,
) -> None:
    code, lines = compare(change(PLAIN, tmp_path, edit))
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("parity: ")
    assert said in lines[0]
