"""tools/parity.py on what upstream recorded, and that it notices when something is off."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glip import anchors, detect, fusion, head, loss, model, parity, targets, tower
from glip.language import Words

MODEL_DIR = Path(__file__).resolve().parents[1]
FIXTURES = MODEL_DIR / "tests" / "fixtures"
MICROSOFT, MMDET, PLAIN, ODD = (
    f"glip_{name}" for name in ("microsoft_tiny", "mmdet_tiny", "a_mmdet_tiny", "mmdet_odd")
)

Result = tuple[int, list[str]]


@pytest.fixture
def compare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs the program in this process: exit code and lines."""
    tool = MODEL_DIR.parents[2] / "tools" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity_tool", tool)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(case: Path, *words: str) -> Result:
        capsys.readouterr()
        code = module.main([str(MODEL_DIR), str(case), *words])
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


def in_float64(case: str) -> list[str]:
    """microsoft/GLIP computed in float64, so that what agrees does so to float32's last bits."""
    return ["--tol=2e-5"] if case == MICROSOFT else []


@pytest.mark.parametrize(
    ("name", "least"), [(MICROSOFT, 330), (MMDET, 370), (PLAIN, 280), (ODD, 240)]
)
def test_equals_upstream(compare: Callable[..., Result], name: str, least: int) -> None:
    code, lines = compare(FIXTURES / f"{name}.json", *in_float64(name))
    assert code == 0, beyond(lines)
    assert int(lines[-1].removeprefix("parity: ").split()[0]) >= least
    paths = {line.split()[0] for line in lines}
    prefix = "inputs/" if name == MICROSOFT else ""
    assert {f"{prefix}input_ids", f"{prefix}gt/0/positive_maps", "predict/0/scores"} <= paths


BREAKS: dict[str, tuple[str, Any, str, Any, tuple[str, ...]]] = {
    "offsets that are not read again": (
        ODD,
        tower,
        "reread",
        lambda places, size: places[..., : size[0], : size[1]],
        ("outputs/tower2_DyConv/0", "losses/loss_bbox"),
    ),
    "enlarging by pixels' middles": (
        ODD,
        tower.F,
        "interpolate",
        lambda maps, size, mode, align_corners=None: maps.new_zeros(*maps.shape[:2], *size),
        ("outputs/tower2_DyConv/0",),
    ),
    "padding tokens that count": (
        PLAIN,
        Words,
        "embedded",
        lambda words: words.hidden_BTC,
        ("outputs/language/0", "outputs/head_bbox_ctr_logits/2/0"),
    ),
    "a limit of the words": (ODD, fusion, "LIMIT", 0.5, ("outputs/tower1_BertEncoderLayer/5",)),
    "a limit of the logits": (
        MICROSOFT,
        head,
        "LIMIT",
        1.0,
        ("outputs/dot_product_logits/0", "losses/loss_dot_product_token"),
    ),
    "anchors of another size": (
        ODD,
        anchors,
        "ANCHOR_STRIDES",
        7,
        ("pos_index/0", "losses/loss_bbox", "predict/0/bboxes"),
    ),
    "anchors at the edge of a box": (ODD, targets, "MARGIN", -50.0, ("pos_index/0", "num_pos")),
    "another smoothing of GIoU": (MICROSOFT, loss, "EPS", 1.0, ("losses/loss_reg", "grad_norms/")),
    "images with black padding": (
        ODD,
        model.GLIP,
        "normalize",
        lambda self, images, sizes: (
            (images.flip(1).double() - torch.tensor(self.pixels)[:, :1, None])
            / torch.tensor(self.pixels)[:, 1:, None]
        ),
        ("outputs/backbone/0",),
    ),
    "the last pixel of a box": (
        ODD,
        parity,
        "to_files",
        lambda boxes, *_: detect.to_files(boxes, *_) - 1,
        ("predict/0/bboxes",),
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_notices(
    compare: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    name, owner, attribute, value, places = BREAKS[what]
    monkeypatch.setattr(owner, attribute, value)
    monkeypatch.setattr(parity, "_DRAWS", 0)
    code, lines = compare(FIXTURES / f"{name}.json")
    assert code == 1
    for place in places:
        assert any(place in line for line in beyond(lines)), place


def test_a_gradient_that_rounding_does_not_decide_is_noticed(
    compare: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "bbox_head.head.dot_product_projection_text.weight"

    def edit(tree: dict[str, Any], _tensors: dict[str, Any]) -> None:
        tree["grad_norms"][name] *= 1.01

    path = change(ODD, tmp_path, edit)
    code, lines = compare(path)
    assert code == 1
    assert [line.split()[0] for line in beyond(lines)] == [f"grad_norms/{name}"]
    monkeypatch.setattr(parity, "_ROUNDING", 1e-2)  # as if so much were lost
    code, lines = compare(path)
    assert code == 0, beyond(lines)
    assert [line.split()[0] for line in lines if "rounding decides" in line] == [
        f"grad_norms/{name}"
    ]


def test_another_order_of_objects_is_noticed(
    compare: Callable[..., Result], tmp_path: Path
) -> None:
    def edit(_tree: dict[str, Any], tensors: dict[str, Any]) -> None:
        labels = tensors["predict/1/labels"]
        labels[0] = 1 - labels[0]

    code, lines = compare(change(ODD, tmp_path, edit))
    assert code == 1
    assert [line.split()[0] for line in beyond(lines)] == ["predict/1/labels"]


@pytest.mark.parametrize("name", [MICROSOFT, ODD])
def test_a_bert_of_another_size_is_found_beside_the_case_only(
    compare: Callable[..., Result],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    words = next(
        key
        for key in json.loads((FIXTURES / f"{name}.json").read_text())["state_dict"]
        if key.endswith("word_embeddings.weight")
    )

    def edit(_tree: dict[str, Any], tensors: dict[str, Any]) -> None:
        rows = tensors[f"state_dict/{words}"]
        tensors[f"state_dict/{words}"] = torch.cat([rows, rows[:3]])

    path = change(name, tmp_path, edit)
    assert compare(path)[0] == 2
    shutil.copytree(FIXTURES / "bert_tiny", tmp_path / "bert_tiny")
    settings = json.loads((tmp_path / "bert_tiny" / "config.json").read_text())
    (tmp_path / "bert_tiny" / "config.json").chmod(0o644)
    (tmp_path / "bert_tiny" / "config.json").write_text(
        json.dumps(settings | {"vocab_size": settings["vocab_size"] + 3})
    )
    code, lines = compare(path)
    assert code == 0, beyond(lines)


def test_a_case_of_another_network_is_told(compare: Callable[..., Result], tmp_path: Path) -> None:
    def edit(tree: dict[str, Any], _tensors: dict[str, Any]) -> None:
        tree["config"]["bbox_head"]["num_dyhead_blocks"] = 3

    assert compare(change(ODD, tmp_path, edit))[0] == 2


@pytest.mark.parametrize("part", ["img_metas", "state_dict", "config"])
def test_a_case_without_an_input_is_told(
    compare: Callable[..., Result], tmp_path: Path, part: str
) -> None:
    def edit(tree: dict[str, Any], _tensors: dict[str, Any]) -> None:
        del tree[part]

    assert compare(change(ODD, tmp_path, edit))[0] == 2
