"""Weights of others come to the right places, and what does not fit is named."""

import copy
import dataclasses
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from rcnn import weights
from rcnn.config import ModelConfig
from zoo_common import checkpoint
from zoo_common.errors import UserError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import weight_files  # noqa: E402

MSRA = ModelConfig()
RGB = ModelConfig(
    channel_order="RGB",
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    stride_in_1x1=False,
)
EXTRA = {
    "pixel_mean": np.array([103.53, 116.28, 123.675], np.float32).reshape(3, 1, 1),
    "pixel_std": np.ones((3, 1, 1), np.float32),
    **{
        f"proposal_generator.anchor_generator.cell_anchors.{level}": np.zeros((3, 4), np.float32)
        for level in range(5)
    },
}


class Named(nn.Module):
    """A module with the names and shapes of a state_dict, and numbers of its own."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for part in path:
                if not hasattr(holder, part):
                    holder.add_module(part, nn.Module())
                holder = getattr(holder, part)
            holder.register_buffer(last, torch.full(shape, 77.0))


def shapes_of(case: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that detectron2's own model had, from a parity case."""
    names = json.loads((HERE / "fixtures" / f"{case}.json").read_text())["state_dict"]
    with safe_open(HERE / "fixtures" / f"{case}.safetensors", "pt") as tensors:
        return {
            name: tuple(tensors.get_slice(leaf["tensor"]).get_shape())
            for name, leaf in names.items()
        }


def mask_r50() -> Named:
    return Named(shapes_of("maskrcnn_r50_tiny"))


def faster_r101() -> Named:
    return Named(shapes_of("fasterrcnn_r101_zoo_tiny"))


def widths(model: Named) -> dict[str, int]:
    own = model.state_dict()
    at = "backbone.bottom_up."
    return {
        "stem": len(own[f"{at}stem.conv1.weight"]),
        "width": len(own[f"{at}res2.0.conv1.weight"]),
        "res2": len(own[f"{at}res2.0.conv3.weight"]),
    }


def with_classes(model: Named, classes: int) -> Named:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    rows = {"cls_score": classes + 1, "bbox_pred": 4 * classes, "predictor": classes}
    for name, shape in shapes.items():
        layer = name.split(".")[-2]
        if layer in rows:
            shapes[name] = (rows[layer], *shape[1:])
    return Named(shapes)


def save(path: Path, content: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def changed(model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not bool((value == 77).all())}


CONTAINERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "flat": lambda blobs: blobs,
    "detectron2's": lambda blobs: {
        "model": blobs,
        "__author__": "Caffe2",
        "matching_heuristics": True,
    },
    "blobs": lambda blobs: {
        "blobs": blobs | {f"{name}_momentum": value for name, value in blobs.items()},
        "cfg": "MODEL: {}",
    },
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("folded", [False, True])
def test_r101_of_msra_fills_the_whole_resnet(folded: bool, container: str, tmp_path: Path) -> None:
    model = faster_r101()
    blobs = weight_files.caffe2(101, folded=folded, **widths(model))
    assert len(blobs) == 104 * (3 if folded else 5) + 2
    path = save(tmp_path / "R-101.pkl", CONTAINERS[container](blobs))
    report = weights.load_start(model, path, MSRA)

    own = model.state_dict()
    resnet = {name for name in own if name.startswith("backbone.bottom_up.")}
    assert len(resnet) == 104 * 5 and changed(model) == resnet
    at = "backbone.bottom_up."
    for ours, theirs in (
        ("stem.conv1.weight", "conv1_w"),
        ("stem.conv1.norm.bias", "res_conv1_bn_b" + ("" if folded else "eta")),
        ("res2.0.shortcut.weight", "res2_0_branch1_w"),
        ("res4.22.conv2.weight", "res4_22_branch2b_w"),
        ("res5.2.conv3.norm.weight", "res5_2_branch2c_bn_" + ("s" if folded else "gamma")),
    ):
        np.testing.assert_array_equal(own[at + ours], blobs[theirs])
    variance = own[f"{at}res3.1.conv1.norm.running_var"]
    if folded:  # factor and shift alone: (variance + eps) must be 1
        assert torch.equal(variance + 1e-5, torch.ones_like(variance))
        assert not own[f"{at}res3.1.conv1.norm.running_mean"].any()
    else:
        np.testing.assert_array_equal(variance, blobs["res3_1_branch2a_bn_running_var"])
        np.testing.assert_array_equal(
            own[f"{at}res3.1.conv1.norm.running_mean"], blobs["res3_1_branch2a_bn_running_mean"]
        )
    count = 104 * 3 if folded else 104 * 5
    assert f"R-101.pkl (caffe2): {count} tensors loaded, {count} of them renamed (" in report
    assert ("208 statistics of folded normalisation set to 0 and 1" in report) == folded
    assert "30 missing (backbone.fpn_lateral2" in report
    assert "2 left over (fc1000_w, fc1000_b)" in report
    assert report.endswith("30 tensors stay as initialised")
    assert "\n" not in report and len(report) < 500


def test_the_full_report_names_every_tensor(tmp_path: Path) -> None:
    model = mask_r50()
    path = save(tmp_path / "R-50.pkl", weight_files.caffe2(50, **widths(model)))
    lines = weights.load_start(model, path, MSRA, full=True).splitlines()
    assert len(lines) == 1 + 307 + 3 + 1
    assert "  loaded    backbone.bottom_up.res2.0.conv1.weight <- res2_0_branch2a_w" in lines
    assert "  missing   roi_heads.mask_head.predictor.bias" in lines
    assert "  left over conv1_b" in lines
    assert lines[-1] == "42 tensors stay as initialised"


def test_true_r101_files_of_both_dialects_have_torchvision_s_shapes(tmp_path: Path) -> None:
    with torch.device("meta"):
        import torchvision

        theirs = torchvision.models.resnet101().state_dict()
    made = weight_files.torchvision(101)
    assert sorted(made) == sorted(theirs)
    assert {name: value.shape for name, value in made.items()} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }
    small = {name: np.broadcast_to(False, value.shape) for name, value in made.items()}
    ours = weights.read(save(tmp_path / "r101.pkl", small, protocol=5))
    blobs = {
        name: np.broadcast_to(False, value.shape)
        for name, value in weight_files.caffe2(101).items()
    }
    msra = weights.read(save(tmp_path / "R-101.pkl", blobs, protocol=5))
    assert (ours.kind, msra.kind) == ("torchvision", "caffe2")
    assert len(ours.tensors) == 104 * 5
    assert {key: value.shape for key, value in ours.tensors.items()} == {
        key: value.shape for key, value in msra.tensors.items()
    }
    assert {key.removeprefix("backbone.bottom_up.") for key in ours.tensors} > {
        f"{name}.weight" for name, _ in weight_files.convolutions(101)
    }


@pytest.mark.parametrize("renamed", [False, True])
def test_torchvision_s_resnet_asks_for_its_own_settings(renamed: bool, tmp_path: Path) -> None:
    model = faster_r101()
    arrays = weight_files.torchvision(101, **widths(model))
    path = tmp_path / "resnet101.pth"
    if renamed:  # by detectron2's tools/convert-torchvision-to-d2.py
        file = weights.read(save(tmp_path / "first.pkl", arrays))
        renamed_arrays = {
            key.removeprefix("backbone.bottom_up."): value.numpy()
            for key, value in file.tensors.items()
        } | {"stem.fc.weight": arrays["fc.weight"]}
        path = save(
            tmp_path / "R-101.pkl",
            {"model": renamed_arrays, "__author__": "torchvision", "matching_heuristics": True},
        )
    else:
        torch.save(tensors(arrays), path)
    with pytest.raises(UserError) as error:
        weights.load_start(model, path, MSRA)
    words = (
        "set model.channel_order=RGB model.pixel_mean=[123.675,116.28,103.53] "
        "model.pixel_std=[58.395,57.12,57.375] model.stride_in_1x1=false"
    )
    assert words in str(error.value) and "(torchvision)" in str(error.value)
    assert changed(model) == set()
    report = weights.load_start(model, path, RGB)
    assert "(torchvision): 520 tensors loaded, 520 of them renamed" in report
    own = model.state_dict()
    at = "backbone.bottom_up."
    for ours, theirs in (
        ("stem.conv1.weight", "conv1.weight"),
        ("stem.conv1.norm.running_var", "bn1.running_var"),
        ("res3.0.shortcut.norm.bias", "layer2.0.downsample.1.bias"),
        ("res4.22.conv3.norm.weight", "layer3.22.bn3.weight"),
    ):
        np.testing.assert_array_equal(own[at + ours], arrays[theirs])


def test_msra_s_weights_refuse_torchvision_s_settings(tmp_path: Path) -> None:
    model = mask_r50()
    path = save(tmp_path / "R-50.pkl", weight_files.caffe2(50, **widths(model)))
    with pytest.raises(UserError, match=r"set model\.channel_order=BGR .*stride_in_1x1=true"):
        weights.load_start(model, path, RGB)
    wrong = dataclasses.replace(MSRA, pixel_std=[57.375, 57.12, 58.395])
    with pytest.raises(UserError, match=r"set model\.pixel_std=\[1,1,1\], or choose"):
        weights.load_start(model, path, wrong)


def test_fair_s_weights_ask_for_theirs(tmp_path: Path) -> None:
    blobs = weight_files.caffe2(50, stem=8, width=8, res2=32)
    grouped = blobs | {"res2_0_branch2b_w": blobs["res2_0_branch2b_w"][:, :2]}
    file = weights.read(save(tmp_path / "X.pkl", grouped))
    assert file.settings["pixel_std"] == [57.375, 57.12, 58.395]
    assert file.settings["stride_in_1x1"] is False and file.settings["channel_order"] == "BGR"
    group_norm = {
        name.replace("res_conv1_bn", "conv1_gn").replace("_bn_", "_gn_"): value
        for name, value in weight_files.caffe2(50, folded=True, stem=8, width=8, res2=32).items()
    }
    file = weights.read(save(tmp_path / "R-50-GN.pkl", group_norm))
    assert file.settings["stride_in_1x1"] is False and file.settings["pixel_std"] == [1, 1, 1]
    assert "backbone.bottom_up.stem.conv1.norm.weight" in file.tensors
    assert not any("running" in key for key in file.tensors)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_detectron2_s_files(suffix: str, extra: bool, prefix: str, tmp_path: Path) -> None:
    model = mask_r50()
    arrays = weight_files.random_like(model.state_dict())
    stored = {prefix + key: value for key, value in (arrays | (EXTRA if extra else {})).items()}
    path = tmp_path / f"model_final.{suffix}"
    if suffix == "pkl":
        save(path, {"model": stored, "__author__": "Detectron2 Model Zoo"}, protocol=4)
    else:
        later = {"optimizer": {"state": {}}, "scheduler": {"last_epoch": 3}, "iteration": 7}
        torch.save({"model": tensors(stored), **later}, path)
    report = weights.load_for_evaluation(model, path, MSRA)
    assert report == f"{path.name} (detectron2): 307 tensors loaded"
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, arrays[name])
    assert weights.count_classes(str(path)) == len(arrays["roi_heads.mask_head.predictor.bias"])
    fresh = mask_r50()
    assert "307 tensors loaded" in weights.load_start(fresh, path, MSRA)
    if extra:
        with pytest.raises(UserError, match=r"set model\.pixel_mean=\[103\.53,116\.28,123\.675\]"):
            weights.load_for_evaluation(model, path, RGB)


@pytest.mark.parametrize("make", [mask_r50, faster_r101])
def test_detectors_of_caffe2(make: Callable[[], Named], tmp_path: Path) -> None:
    model = make()
    arrays = weight_files.random_like(model.state_dict())
    blobs = weight_files.caffe2_detector(arrays)
    path = save(tmp_path / "model_final.pkl", CONTAINERS["blobs"](blobs))
    weights.load_for_evaluation(model, path, MSRA)
    for name, value in model.state_dict().items():
        if "norm.running" not in name:
            np.testing.assert_array_equal(value, arrays[name], err_msg=name)


def test_other_class_counts(tmp_path: Path) -> None:
    classes = len(mask_r50().state_dict()["roi_heads.mask_head.predictor.bias"])
    arrays = weight_files.random_like(mask_r50().state_dict())
    path = save(tmp_path / "coco.pkl", {"model": arrays, "__author__": "Detectron2 Model Zoo"})
    model = with_classes(mask_r50(), classes + 2)
    with pytest.raises(UserError) as error:
        weights.load_for_evaluation(model, path, MSRA)
    counts = f"the file has {classes} classes, the model {classes + 2}"
    assert counts in str(error.value)
    assert "6 of another shape (roi_heads.box_predictor.cls_score.weight: " in str(error.value)
    assert changed(model) == set()
    report = weights.load_start(model, path, MSRA)
    assert report.endswith(f"6 tensors stay as initialised ({counts})")
    kept = set(arrays) - changed(model)
    assert {name.rsplit(".", 1)[0] for name in kept} == {
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_head.predictor",
    }


def test_a_training_may_add_or_drop_the_mask_head_but_an_evaluation_may_not(
    tmp_path: Path,
) -> None:
    shapes = shapes_of("maskrcnn_r50_tiny")
    boxes = {name: shape for name, shape in shapes.items() if "mask_head" not in name}
    stored = {
        "boxes": weight_files.random_like(Named(boxes).state_dict()),
        "masks": weight_files.random_like(Named(shapes).state_dict()),
    }
    files = {
        name: save(tmp_path / f"{name}.pkl", {"model": arrays, "__author__": "x"})
        for name, arrays in stored.items()
    }
    model = Named(shapes)
    assert "12 missing (roi_heads.mask_head.mask_fcn1, " in weights.load_start(
        model, files["boxes"], MSRA
    )
    with pytest.raises(UserError, match=r"12 missing \(roi_heads\.mask_head"):
        weights.load_for_evaluation(model, files["boxes"], MSRA)
    model = Named(boxes)
    assert "12 left over (roi_heads.mask_head" in weights.load_start(model, files["masks"], MSRA)
    with pytest.raises(UserError, match=r"12 left over \(roi_heads\.mask_head"):
        weights.load_for_evaluation(model, files["masks"], MSRA)


def test_a_resnet_of_another_depth_or_width_is_refused(tmp_path: Path) -> None:
    small = {"stem": 8, "width": 8, "res2": 32}
    r50 = save(tmp_path / "R-50.pkl", weight_files.caffe2(50, **small))
    r101 = save(tmp_path / "R-101.pkl", weight_files.caffe2(101, **small))
    for make, path in ((faster_r101, r50), (mask_r50, r101)):
        model = make()
        assert widths(model) == small
        with pytest.raises(UserError, match=r"another network .*backbone\.bottom_up\.res4\.6\."):
            weights.load_start(model, path, MSRA)
        assert changed(model) == set()
    wide = save(tmp_path / "wide.pkl", weight_files.caffe2(50, stem=8, width=8, res2=64))
    with pytest.raises(UserError, match="64x8x1x1 in the file, 32x8x1x1 in the model"):
        weights.load_start(mask_r50(), wide, MSRA)
    with pytest.raises(UserError, match="holds no detector, but a backbone"):
        weights.count_classes(r50)


def test_the_zoo_s_checkpoints_know_their_settings(tmp_path: Path) -> None:
    model = faster_r101()
    own = copy.deepcopy(model.state_dict())
    text = "model:\n  channel_order: RGB\n  pixel_mean: [123.675, 116.28, 103.53]\n  depth: 101\n"
    content = {"format": checkpoint.FORMAT, "model": own, "step": 3, "config": text}
    checkpoint.save(tmp_path / "last.pth", content)
    report = weights.load_for_evaluation(model, tmp_path / "last.pth", RGB)
    assert report == "last.pth (zoo): 550 tensors loaded"
    with pytest.raises(UserError, match=r"set model\.channel_order=RGB model\.pixel_mean=\[123"):
        weights.load_for_evaluation(model, tmp_path / "last.pth", MSRA)
    weights.load_for_evaluation(model, tmp_path / "last.pth")  # no config, no question


def test_files_that_hold_no_such_weights(tmp_path: Path) -> None:
    model = mask_r50()
    ones = np.ones(2, np.float32)
    for content, said in (
        ({"encoder.weight": ones}, "of no kind that is known here .*encoder"),
        ({}, "begin with none"),
        ({"model": [ones], "__author__": "x"}, "no dict of arrays under 'model'"),
    ):
        with pytest.raises(UserError, match=said):
            weights.load_start(model, save(tmp_path / "w.pkl", content), MSRA)
    with pytest.raises(UserError, match=r"Cannot read the weights .*none\.pkl: No such file"):
        weights.load_start(model, tmp_path / "none.pkl", MSRA)
    (tmp_path / "half.pkl").write_bytes((tmp_path / "w.pkl").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"half\.pkl is truncated"):
        weights.load_start(model, tmp_path / "half.pkl", MSRA)
    (tmp_path / "notes.pkl").write_text("no weights\n")
    with pytest.raises(UserError, match=r"notes\.pkl was refused: it is damaged"):
        weights.load_start(model, tmp_path / "notes.pkl", MSRA)


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    model = mask_r50()
    blobs: dict[str, Any] = dict(weight_files.caffe2(50, **widths(model)))
    blobs["fc1000_b"] = Evil(f"touch {tmp_path}/ran")
    path = save(tmp_path / "R-50.pkl", blobs)
    with pytest.raises(
        UserError, match=r"was refused and nothing in it was run: it names '.*\.sys"
    ):
        weights.load_start(model, path, MSRA)
    torch.save({"model": blobs}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth was refused"):
        weights.load_for_evaluation(model, tmp_path / "evil.pth", MSRA)
    assert not (tmp_path / "ran").exists() and changed(model) == set()
