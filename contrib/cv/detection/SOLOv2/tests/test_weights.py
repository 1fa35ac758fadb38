"""Weights of others come to the right places, and what does not fit is named."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from solov2 import weights
from solov2.config import Config, HeadConfig, ModelConfig, config_from_upstream
from solov2.model import SOLOv2, build_model
from zoo_common import checkpoint
from zoo_common.errors import UserError
from zoo_common.weights import match

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from solo_runs import write_resnet  # noqa: E402

MODEL = ModelConfig(depth=50, stem_channels=4, base_channels=4, fpn_channels=8)  # write_resnet's
HEAD = HeadConfig(stacked_convs=2, channels=32, kernel_channels=32, mask_channels=32)

SAME_IN_MMDET = {
    "bbox_head.cate_convs.1.conv.weight": "mask_head.cls_convs.1.conv.weight",
    "bbox_head.cate_convs.0.gn.bias": "mask_head.cls_convs.0.gn.bias",
    "bbox_head.kernel_convs.1.conv.weight": "mask_head.kernel_convs.1.conv.weight",
    "bbox_head.kernel_convs.1.gn.weight": "mask_head.kernel_convs.1.gn.weight",
    "bbox_head.solo_cate.bias": "mask_head.conv_cls.bias",
    "bbox_head.solo_kernel.bias": "mask_head.conv_kernel.bias",
    "mask_feat_head.convs_all_levels.3.conv1.conv.weight": (
        "mask_head.mask_feature_head.convs_all_levels.3.conv1.conv.weight"
    ),
    "mask_feat_head.convs_all_levels.2.conv1.gn.bias": (
        "mask_head.mask_feature_head.convs_all_levels.2.conv1.gn.bias"
    ),
    "mask_feat_head.conv_pred.0.gn.weight": "mask_head.mask_feature_head.conv_pred.gn.weight",
    "neck.fpn_convs.3.conv.bias": "neck.fpn_convs.3.conv.bias",
    "backbone.layer3.1.bn2.running_var": "backbone.layer3.1.bn2.running_var",
}
"""Ours, and mmdet's, of each part."""

MMDET_1 = """configs/solov2/x.py
img_norm_cfg = dict(
    mean=[103.5, 116.25, 123.0], std=[1.0, 57.0, 57.5], to_rgb=True)
train_cfg = dict(target_means=[.0, .0])
"""
MMDET_3 = """model = dict(
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            103.5,
            116.25,
            123.0,
        ],
        std=[
            1.0,
            57.0,
            57.5,
        ]))
"""


def upstream(case: str) -> tuple[Config, dict[str, Tensor]]:
    """The settings and the state_dict of a model that upstream's own code has made."""
    file = HERE / "fixtures" / f"solov2_{case}_tiny"
    recorded = json.loads(file.with_suffix(".json").read_text())
    tensors = load_file(file.with_suffix(".safetensors"))
    named = {name: tensors[leaf["tensor"]] for name, leaf in recorded["state_dict"].items()}
    config = config_from_upstream(recorded["config"])
    config.model.stem_channels, config.model.base_channels = (
        len(named[f"backbone.{name}.weight"]) for name in ("conv1", "layer1.0.conv1")
    )
    return config, named


def network(classes: int = 5, *, head: dict[str, Any] | None = None, **model: Any) -> SOLOv2:
    config = Config(
        model=dataclasses.replace(MODEL, **model), head=dataclasses.replace(HEAD, **(head or {}))
    )
    return build_model(config, classes)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def randomised(model: nn.Module) -> dict[str, Tensor]:
    """Numbers with the names and shapes of a model."""
    draw = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(value.shape, generator=draw) + 1 if value.is_floating_point() else value
        for name, value in state(model).items()
    }


def save(path: Path, weights: dict[str, Tensor], config: str = "", **more: Any) -> Path:
    """As the runner of mmdet 1.x saves."""
    meta = {"epoch": 12, "iter": 9, "mmdet_version": "1.0.0+95f3732", "CLASSES": ("a", "b")}
    content = {"meta": meta | {"config": config}, "state_dict": weights, **more}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def unequal(model: nn.Module, expected: dict[str, Tensor]) -> set[str]:
    own = state(model)
    return {name for name, value in expected.items() if not torch.equal(own[name], value)}


@pytest.mark.parametrize("case", ["solo", "mmdet", "mmdet_r34_dcn", "mmdet_r50_dcnv2"])
def test_upstream_s_state_dicts_fill_the_model(case: str, tmp_path: Path) -> None:
    config, theirs = upstream(case)
    model = build_model(config, config.model.num_classes)
    path = save(tmp_path / "SOLOv2.pth", theirs, optimizer={"state": {}, "param_groups": []})
    report = weights.load_for_evaluation(model, path, config.model)
    own = state(model)
    counted = {name for name in own if not name.endswith("num_batches_tracked")}
    if case == "solo":
        assert own.keys() == theirs.keys()
        assert report == f"SOLOv2.pth (WXinlong/SOLO): {len(counted)} tensors loaded"
        assert not unequal(model, {name: theirs[name] for name in counted})
    else:
        assert f"(mmdet): {len(counted)} tensors loaded, " in report
        assert not unequal(model, {our: theirs[name] for our, name in SAME_IN_MMDET.items()})
        renamed = [name for name in counted if not name.startswith(("backbone.", "neck."))]
        assert f", {len(renamed)} of them renamed (mask_head." in report
    assert weights.count_classes(path) == config.model.num_classes
    fresh = build_model(config, config.model.num_classes)
    assert weights.load_start(fresh, path, config.model) == report
    assert not unequal(fresh, {name: own[name] for name in counted})


def test_a_file_without_counters_of_batches_is_whole(tmp_path: Path) -> None:
    model = network()
    theirs = {name: v for name, v in randomised(model).items() if not name.endswith("tracked")}
    weights.load_for_evaluation(model, save(tmp_path / "w.pth", theirs), MODEL)
    assert not unequal(model, theirs)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_torchvision_s_resnets_have_our_names_and_shapes(depth: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        model = build_model(Config(model=ModelConfig(depth=depth)), 3)
    torch.save(theirs, tmp_path / "resnet.pth")
    fit = match(weights.read(tmp_path / "resnet.pth"), model)
    assert fit.left_over == ["fc.weight", "fc.bias"] and not fit.other_shape
    assert not any(name.startswith("backbone.") for name in fit.missing)
    assert len(fit.loaded) == len([name for name in theirs if "tracked" not in name]) - 2


def test_a_training_starts_from_torchvision_s_resnet(tmp_path: Path) -> None:
    path = write_resnet(tmp_path / "resnet50.pth")
    theirs = torch.load(path, weights_only=True)
    model = network()
    before = state(model)
    report = weights.load_start(model, path, MODEL)
    assert "resnet50.pth (torchvision): 265 tensors loaded, 265 of them renamed" in report
    assert report.endswith("56 tensors stay as initialised") and "1 left over" not in report
    loaded = {f"backbone.{name}": v for name, v in theirs.items() if not name.startswith("fc.")}
    assert not unequal(model, {name: v for name, v in loaded.items() if "tracked" not in name})
    assert not unequal(model, {n: v for n, v in before.items() if not n.startswith("backbone.")})
    other = dataclasses.replace(MODEL, pixel_mean=[103.53, 116.28, 123.675])
    with pytest.raises(UserError, match=r"set model\.pixel_mean=\[123\.675,116\.28,103\.53\], or"):
        weights.load_start(model, path, other)
    for wrong in ({"depth": 101}, {"depth": 34}, {"base_channels": 8}, {"norm": "GN"}):
        with pytest.raises(UserError, match=r"another network .* settings model\.depth, "):
            weights.load_start(
                network(**{"stem_channels": 32, "base_channels": 32} | wrong), path, MODEL
            )
    with pytest.raises(UserError, match="holds no detector, but a backbone"):
        weights.count_classes(path)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_offsets_of_deformable_convolutions_start_at_zero(version: str, tmp_path: Path) -> None:
    path = write_resnet(tmp_path / "resnet50.pth")
    model = network(deformable=version)
    report = weights.load_start(model, path, MODEL)
    offsets = {name: value for name, value in state(model).items() if ".conv_offset." in name}
    assert len(offsets) == 2 * (4 + 6 + 3) and not any(bool(v.any()) for v in offsets.values())
    assert "missing (backbone.layer2.0.conv2.conv_offset" in report
    assert f"{56 + len(offsets)} tensors stay as initialised" in report
    plain = save(tmp_path / "plain.pth", randomised(network()))
    assert "26 missing (backbone.layer2.0" in weights.load_start(model, plain, MODEL)
    with pytest.raises(UserError, match=r"26 missing \(backbone\.layer2\.0\.conv2\.conv_offset"):
        weights.load_for_evaluation(model, plain, MODEL)


OLDER = {
    "as now": (".conv_offset.", ".conv_offset."),
    "beside": (".conv2.conv_offset.", ".conv2_offset."),
    "with its mask": (".conv_offset.", ".conv_offset_mask."),
}


@pytest.mark.parametrize("age", OLDER)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_deformable_convolutions_of_any_age(version: str, age: str, tmp_path: Path) -> None:
    towers = {"deformable": version, "deformable_last_only": True}
    model = network(deformable=version, head=towers)
    ours = randomised(model)
    assert "bbox_head.kernel_convs.1.conv.conv_offset.bias" in ours
    theirs = {name.replace(*OLDER[age]): value for name, value in ours.items()}
    path = save(tmp_path / "dcn.pth", theirs)
    weights.load_for_evaluation(model, path, MODEL)
    assert not unequal(model, ours)
    with pytest.raises(UserError, match=r"another network .*model\.deformable"):
        weights.load_start(network(), path, MODEL)
    other = {"v1": "v2", "v2": "v1"}[version]
    with pytest.raises(UserError, match=r"(18|27)x\S+ in the file, (18|27)x\S+ in the model"):
        weights.load_start(network(deformable=other, head=towers), path, MODEL)


def test_fine_tuning_on_other_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "coco.pth", theirs := randomised(network(80)))
    model = network(3)
    before = state(model)
    report = weights.load_start(model, path, MODEL)
    counts = "the file has 80 classes, the model 3"
    assert report.endswith(f"; 2 tensors stay as initialised ({counts})") and "\n" not in report
    layer = {name for name in before if name.startswith("bbox_head.solo_cate.")}
    assert len(layer) == 2 and not unequal(model, {name: before[name] for name in layer})
    rest = {n: v for n, v in theirs.items() if n not in layer and "tracked" not in n}
    assert not unequal(model, rest)
    with pytest.raises(UserError, match=rf"coco\.pth is not of this model: .*{counts}: give"):
        weights.load_for_evaluation(model, path, MODEL)


@pytest.mark.parametrize(
    "head",
    [{"stacked_convs": 1}, {"stacked_convs": 3}, {"channels": 64}, {"mask_channels": 64}],
)
def test_the_head_of_another_variant_is_refused(head: dict[str, int], tmp_path: Path) -> None:
    path = save(tmp_path / "light.pth", randomised(network(head=head)))
    model = network()
    before = state(model)
    with pytest.raises(UserError, match=r"weights of another network .*, head and widths"):
        weights.load_start(model, path, MODEL)
    with pytest.raises(UserError, match=r"light\.pth is not of this model"):
        weights.load_for_evaluation(model, path, MODEL)
    assert not unequal(model, before)


@pytest.mark.parametrize(("key", "text"), [("config", MMDET_1), ("cfg", MMDET_3)])
def test_a_runner_s_config_tells_the_pixel_settings(key: str, text: str, tmp_path: Path) -> None:
    model, path = network(), tmp_path / "w.pth"
    content = {"state_dict": randomised(model), "meta": {key: text}}
    torch.save(content, path)
    words = r"set model\.pixel_mean=\[103\.5,116\.25,123\] model\.pixel_std=\[1,57,57\.5\], or"
    with pytest.raises(UserError, match=words):
        weights.load_for_evaluation(model, path, MODEL)
    fitting = dataclasses.replace(
        MODEL, pixel_mean=[103.5, 116.25, 123.0], pixel_std=[1.0, 57.0, 57.5]
    )
    weights.load_for_evaluation(model, path, fitting)
    torch.save({**content, "meta": {key: text.replace("True", "False")}}, path)
    with pytest.raises(UserError, match=r"w\.pth was trained on images with blue first"):
        weights.load_start(model, path, fitting)


def test_the_zoo_s_checkpoints_know_their_settings(tmp_path: Path) -> None:
    model = network()
    text = "model:\n  pixel_mean: [1.0, 2.0, 3.0]\n  depth: 50\n"
    content = {"format": checkpoint.FORMAT, "model": model.state_dict(), "config": text}
    checkpoint.save(tmp_path / "last.pth", content)
    with pytest.raises(UserError, match=r"\(zoo\) belongs .* set model\.pixel_mean=\[1,2,3\], or"):
        weights.load_start(model, tmp_path / "last.pth", MODEL)
    own = dataclasses.replace(MODEL, pixel_mean=[1.0, 2.0, 3.0])
    report = weights.load_for_evaluation(model, tmp_path / "last.pth", own)
    assert report == "last.pth (zoo): 321 tensors loaded"
    weights.load_for_evaluation(model, tmp_path / "last.pth")  # no config, no question


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    model = network()
    before = state(model)
    path = save(tmp_path / "evil.pth", before, optimizer=Evil(f"touch {tmp_path}/ran"))
    with pytest.raises(UserError, match=r"evil\.pth was refused"):
        weights.load_start(model, path, MODEL)
    assert not (tmp_path / "ran").exists() and not unequal(model, before)
    torch.save({"encoder.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no kind that is known here .* WXinlong/SOLO's or mmdet"):
        weights.load_start(model, tmp_path / "other.pth", MODEL)
    with pytest.raises(UserError, match=r"Cannot read the weights .*none\.pth: No such file"):
        weights.load_for_evaluation(model, tmp_path / "none.pth", MODEL)
