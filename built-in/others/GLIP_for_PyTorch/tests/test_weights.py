"""Weights of others come to the right places, and what does not fit is named."""

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining

from glip import weights
from glip.config import Config, config_from_upstream
from glip.model import GLIP
from glip.static import make_model, narrow_bert, narrow_config
from glip.swin import SwinTransformer
from zoo_common.errors import UserError

FIXTURES = Path(__file__).resolve().parent / "fixtures"
BERT = "language_backbone.body.model."


def recorded(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state_dict that upstream's own code has made, and its tree."""
    tree = json.loads((FIXTURES / f"glip_{name}.json").read_text())
    tensors = load_file(FIXTURES / f"glip_{name}.safetensors")
    return {key: tensors[leaf["tensor"]] for key, leaf in tree["state_dict"].items()}, tree


def of_fixture() -> tuple[Config, GLIP]:
    """A network of the two recorded cases with equal weights."""
    config = config_from_upstream(recorded("mmdet_tiny")[1]["config"])
    config.model.fusion_width, config.model.fusion_heads = 64, 4
    bert = BertConfig(**json.loads((FIXTURES / "bert_tiny" / "config.json").read_text()))
    return config, GLIP(config.model, config.loss, bert)


def network(**model: Any) -> tuple[Config, GLIP]:
    """A narrow network and its settings."""
    config = narrow_config()
    for name, value in model.items():
        setattr(config.model, name, value)
    return config, make_model(config)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def randomised(model: nn.Module) -> dict[str, Tensor]:
    """Numbers with the names and shapes of a model."""
    draw = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(value.shape, generator=draw) + 1 if value.is_floating_point() else value
        for name, value in state(model).items()
    }


def published(model: nn.Module) -> dict[str, Tensor]:
    """Numbers for a model, with all that microsoft/GLIP's files hold beside them."""
    extras = {
        "rpn.head.cls_logits.weight": torch.zeros(80, 32, 1, 1),
        "rpn.head.cls_logits.bias": torch.zeros(80),
        **{f"rpn.anchor_generator.cell_anchors.{level}": torch.zeros(1, 4) for level in range(5)},
        f"{BERT}embeddings.position_ids": torch.arange(24)[None],
        f"{BERT}pooler.dense.weight": torch.zeros(32, 32),
        f"{BERT}pooler.dense.bias": torch.zeros(32),
    }
    return randomised(model) | extras


def save(path: Path, tensors: dict[str, Tensor], prefix: str = "module.") -> Path:
    """As microsoft/GLIP saves."""
    content = {
        "model": {prefix + name: value for name, value in tensors.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "scheduler": {"last_epoch": 3, "milestones": (1, 2)},
        "iteration": 9,
    }
    torch.save(content, path)
    return path


def unequal(model: nn.Module, expected: dict[str, Tensor]) -> set[str]:
    own = state(model)
    return {name for name in own if not torch.equal(own[name], expected[name])}


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_published_layout_fills_the_model(tmp_path: Path, prefix: str) -> None:
    config, model = network()
    theirs = published(model)
    path = save(tmp_path / "glip.pth", theirs, prefix)
    report = weights.load_for_evaluation(model, path, config.model)
    count = len(state(model))
    assert report.startswith(f"glip.pth (microsoft/GLIP): {count} tensors loaded; 9 left over (")
    assert "rpn.head.cls_logits" in report and "position_ids" not in report
    assert not unequal(model, theirs)
    fresh = network()[1]
    assert weights.load_start(fresh, path, config.model) == report
    assert not unequal(fresh, theirs)


def test_upstream_s_two_dialects_are_the_same_weights(tmp_path: Path) -> None:
    config, model = of_fixture()
    microsoft, mmdet = recorded("microsoft_tiny")[0], recorded("mmdet_tiny")[0]
    weights.load_for_evaluation(model, save(tmp_path / "m.pth", microsoft), config.model)
    assert not unequal(model, microsoft)
    torch.save({"meta": {"epoch": 1}, "state_dict": mmdet}, tmp_path / "mmdet.pth")
    config, other = of_fixture()
    report = weights.load_for_evaluation(other, tmp_path / "mmdet.pth", config.model)
    assert report.startswith(f"mmdet.pth (mmdet): {len(mmdet)} tensors loaded, ")
    assert not unequal(other, microsoft)
    # They are no mere renaming.
    name = "downsample.reduction.weight"
    theirs = mmdet[f"backbone.stages.0.{name}"]
    assert not torch.equal(theirs, microsoft[f"backbone.body.layers.0.{name}"])


def test_our_own_checkpoints_are_read(tmp_path: Path) -> None:
    config, model = network()
    numbers = randomised(model)
    written = "model:\n  pixel_mean: [103.53, 116.28, 123.675]\n  fusion_heads: 4\n"
    torch.save({"format": 1, "config": written, "model": numbers}, tmp_path / "zoo.pth")
    report = weights.load_for_evaluation(model, tmp_path / "zoo.pth", config.model)
    assert report.startswith("zoo.pth (zoo): ")
    assert not unequal(model, numbers)
    other = dataclasses.replace(config.model, fusion_heads=8)
    with pytest.raises(UserError, match=r"model\.fusion_heads=8\): set model\.fusion_heads=4, or"):
        weights.load_start(network()[1], tmp_path / "zoo.pth", other)


@pytest.mark.parametrize("fusion", [True, False])
def test_with_and_without_fusion_are_told_apart(tmp_path: Path, fusion: bool) -> None:
    _, theirs = network(fusion=fusion)
    path = save(tmp_path / "glip.pth", published(theirs))
    config, ours = network(fusion=not fusion)
    here, there = str(not fusion).lower(), str(fusion).lower()
    for load in (weights.load_start, weights.load_for_evaluation):
        with pytest.raises(UserError) as caught:
            load(ours, path, config.model)
        assert f"(model.fusion={here}" in str(caught.value)
        assert f"set model.fusion={there}, or choose other weights." in str(caught.value)
        assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize(
    ("other", "advice"),
    [
        ({"tower_blocks": 3}, "set model.tower_blocks=2, or"),
        ({"channels": 48}, "set model.channels=32, or"),
        ({"swin_width": 16}, "set model.swin_width=8, or"),
        ({"fusion_width": 64}, "set model.fusion_width=32, or"),
        ({"swin_depths": [2, 2, 4, 2]}, "another network"),
        ({"swin_window": 5}, "another network"),
    ],
)
def test_weights_of_another_network_are_told(
    tmp_path: Path, other: dict[str, Any], advice: str
) -> None:
    path = save(tmp_path / "glip.pth", published(network()[1]))
    config, ours = network(**other)
    before = state(ours)
    with pytest.raises(UserError, match=advice):
        weights.load_start(ours, path, config.model)
    assert not unequal(ours, before)


def test_a_file_that_lacks_a_tensor_or_has_one_more_is_refused(tmp_path: Path) -> None:
    config, model = network()
    whole = published(model)
    less = {name: value for name, value in whole.items() if name != "rpn.head.bias0"}
    more = whole | {"rpn.head.token_logits.weight": torch.zeros(3)}
    for name, tensors in (("less", less), ("more", more)):
        path = save(tmp_path / f"{name}.pth", tensors)
        for load in (weights.load_start, weights.load_for_evaluation):
            with pytest.raises(UserError, match=r"rpn\.head"):
                load(model, path, config.model)


def swin_file(path: Path, **settings: Any) -> dict[str, Tensor]:
    """A classifier as microsoft/Swin-Transformer saves it."""
    config = narrow_config().model
    body = SwinTransformer(
        width=config.swin_width, depths=config.swin_depths, heads=config.swin_heads, window=7
    )
    own = {
        name: value
        for name, value in randomised(body).items()
        if not name.startswith(("norm1", "norm2", "norm3"))
    }
    theirs = own | {
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49),
        "norm.weight": torch.ones(64),
        "norm.bias": torch.zeros(64),
        "head.weight": torch.zeros(1000, 64),
        "head.bias": torch.zeros(1000),
    }
    torch.save({"model": theirs, **settings}, path)
    return own


def test_a_training_starts_from_a_swin_and_a_bert(tmp_path: Path) -> None:
    swin = swin_file(tmp_path / "swin_tiny.pth")
    torch.manual_seed(1)
    bert = BertForPreTraining(narrow_bert()).state_dict()
    (tmp_path / "bert").mkdir()
    save_file({name: value.clone() for name, value in bert.items()}, tmp_path / "bert" / "m.tmp")
    (tmp_path / "bert" / "m.tmp").rename(tmp_path / "bert" / "model.safetensors")
    config, model = network()
    before = state(model)
    report = weights.load_start(
        model, tmp_path / "swin_tiny.pth", config.model, bert=tmp_path / "bert"
    )
    assert f"swin_tiny.pth (Swin Transformer): {len(swin)} tensors loaded" in report
    assert "4 left over (norm, head)" in report
    assert "model.safetensors (BERT): " in report
    expected = before | {f"backbone.body.{name}": value for name, value in swin.items()}
    expected |= {
        f"{BERT}{name.removeprefix('bert.')}": value
        for name, value in bert.items()
        if name.startswith(("bert.embeddings", "bert.encoder"))
    }
    assert not unequal(model, expected)
    assert unequal(model, before) >= {"backbone.body.patch_embed.proj.weight"}


def test_the_first_bert_files_have_other_names_for_norms(tmp_path: Path) -> None:
    torch.manual_seed(1)
    bert = BertForPreTraining(narrow_bert()).state_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): torch.rand(value.shape)
        for name, value in bert.items()
        if value.is_floating_point()
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    _, model = network()
    report = weights.start_language(model, tmp_path)
    own = state(model)
    name = "encoder.layer.1.output.LayerNorm."
    assert torch.equal(own[f"{BERT}{name}weight"], old[f"bert.{name}gamma"])
    assert torch.equal(own[f"{BERT}{name}bias"], old[f"bert.{name}beta"])
    assert "missing" not in report


def test_a_directory_without_weights_is_told(tmp_path: Path) -> None:
    _, model = network()
    before = state(model)
    assert "starts as initialised" in weights.start_language(model, tmp_path)
    assert not unequal(model, before)


def test_another_bert_is_refused(tmp_path: Path) -> None:
    settings = narrow_bert()
    settings.num_hidden_layers, settings.intermediate_size = 3, 48
    torch.save(BertForPreTraining(settings).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"another BERT than the config\.json beside it"):
        weights.start_language(network()[1], tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        weights.start_language(network()[1], tmp_path)


class Trap:
    """What a file must not run."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    config, model = network()
    place = tmp_path / "trapped"
    torch.save({"model": published(model), "config": Trap(place)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": {}, "config": Trap(place)}))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(UserError, match="refused"):
            weights.load_start(model, tmp_path / name, config.model)
    torch.save({"bert.x": torch.zeros(1), "trap": Trap(place)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="refused"):
        weights.start_language(model, tmp_path)
    assert not place.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_what_is_no_weights_file_is_told(tmp_path: Path, content: bytes | None) -> None:
    config, model = network()
    path = tmp_path / "weights.pth"
    if content is None:
        torch.save({"model": {"fc.weight": torch.zeros(2)}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pth"):
        weights.load_for_evaluation(model, path, config.model)
    with pytest.raises(UserError, match="Cannot read the weights"):
        weights.load_start(model, tmp_path / "absent.pth", config.model)
