"""Files of several kinds come under one model's names, and what does not fit is told."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zoo_common import checkpoint
from zoo_common.errors import UserError
from zoo_common.weights import Kind, Reader, WeightsFile, match

RGB = SimpleNamespace(pixel_mean=[123.675, 116.28, 103.53], flipped=False)
BGR = SimpleNamespace(pixel_mean=[103.53, 116.28, 123.675], flipped=True)


class Detector(nn.Module):
    """A backbone with normalisation, and an output layer with a row for the background."""

    def __init__(self, classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.score = nn.Linear(width, classes + 1)


def from_lists(name: str) -> str | None:
    """The other family counts from one, and calls things by letters."""
    head, *rest = name.split(".")
    if head == "noise":
        return ""
    layers = {"b1": "backbone.0", "b2": "backbone.1", "s": "score"}
    return ".".join([layers[head], *rest]) if head in layers else None


def complete(file: WeightsFile) -> None:
    """It has no statistics."""
    file.implied = "statistics set to 0 and 1"
    ones = torch.ones_like(file.tensors["backbone.1.weight"])
    file.tensors |= {"backbone.1.running_mean": 0 * ones, "backbone.1.running_var": ones}


READER = Reader(
    kinds=(
        Kind(
            "zoo",
            lambda content: content.is_zoo_checkpoint,
            str,
            settings=lambda content: content.recorded("pixel_mean", "flipped", "unknown"),
        ),
        Kind("plain", lambda content: "backbone.0.weight" in content.weights, str),
        Kind(
            "letters",
            lambda content: "b1.weight" in content.weights,
            from_lists,
            "backbone.",
            lambda content: {"pixel_mean": [103.53, 116.28, 123.675], "flipped": True},
            complete,
        ),
    ),
    known="plain ones or letters",
    outputs=("score.",),
    class_layer="score.weight",
    background=1,
    network_settings="model.width",
    additions=(".offset.",),
)


def randomised(model: Detector) -> dict[str, Tensor]:
    torch.manual_seed(1)
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            value.copy_(torch.randn_like(value))
    return {name: value.clone() for name, value in model.state_dict().items()}


def letters(weights: dict[str, Tensor]) -> dict[str, Any]:
    named = {
        name.replace("backbone.0", "b1").replace("backbone.1", "b2").replace("score", "s"): value
        for name, value in weights.items()
        if "running" not in name and "tracked" not in name
    }
    return {**named, "noise.0": torch.ones(1), "fc.weight": torch.ones(2, 2)}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("container", ["torch", "pickle", "blobs"])
def test_a_renamed_file_fills_the_model(container: str, tmp_path: Path) -> None:
    weights = randomised(Detector())
    path = tmp_path / "w.pth"
    if container == "torch":
        save(path, {"state_dict": {f"module.{k}": v for k, v in letters(weights).items()}})
    else:
        arrays = {name: value.numpy() for name, value in letters(weights).items()}
        if container == "blobs":
            arrays |= {f"{name}_momentum": value for name, value in arrays.items()}
            path.write_bytes(pickle.dumps({"blobs": arrays, "cfg": "x"}))
        else:
            path.write_bytes(pickle.dumps(arrays))
    model = Detector()
    report = READER.load_for_evaluation(model, path, BGR)
    assert report == (
        "w.pth (letters): 6 tensors loaded, 6 of them renamed (b1.weight -> backbone.0.weight); "
        "2 statistics set to 0 and 1; 1 left over (fc)"
    )
    found = state(model)
    for name in ("backbone.0.bias", "backbone.1.weight", "score.weight"):
        assert torch.equal(found[name], weights[name])
    assert found["backbone.1.running_var"].tolist() == [1, 1, 1, 1]
    assert READER.count_classes(path) == 3


@pytest.mark.parametrize("counted", [True, False])
def test_counters_of_batches_are_neither_needed_nor_reported(counted: bool, tmp_path: Path) -> None:
    weights = randomised(Detector())
    if not counted:
        weights.pop("backbone.1.num_batches_tracked")
    path = save(tmp_path / "w.pth", weights)
    assert READER.load_for_evaluation(Detector(), path) == "w.pth (plain): 8 tensors loaded"
    without = Detector()
    without.backbone[1].register_buffer("num_batches_tracked", None)
    assert "8 tensors loaded" in READER.load_start(without, path, RGB)


def test_the_full_report_names_every_tensor(tmp_path: Path) -> None:
    weights = letters(randomised(Detector()))
    weights.pop("s.bias")
    weights["s.weight"] = torch.ones(2, 4)
    weights["b3.x"] = torch.ones(1)
    path = save(tmp_path / "w.pth", weights)
    assert READER.load_start(Detector(), path, BGR, full=True).splitlines() == [
        f"{path} (letters)",
        "  loaded    backbone.0.weight <- b1.weight",
        "  loaded    backbone.0.bias <- b1.bias",
        "  loaded    backbone.1.weight <- b2.weight",
        "  loaded    backbone.1.bias <- b2.bias",
        "  loaded    backbone.1.running_mean <- (implied)",
        "  loaded    backbone.1.running_var <- (implied)",
        "  missing   score.bias",
        "  shape     score.weight: 2x4 in the file, 4x4 in the model",
        "  left over fc.weight",
        "  left over b3.x",
        "2 tensors stay as initialised (the file has 1 classes, the model 3)",
    ]


def test_other_class_counts(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", weights := randomised(Detector(3)))
    model = Detector(5)
    before = state(model)
    counts = "the file has 3 classes, the model 5"
    with pytest.raises(UserError, match=rf"of another shape .*; {counts}: give the weights and"):
        READER.load_for_evaluation(model, path, RGB)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert READER.load_start(model, path, RGB).endswith(f"2 tensors stay as initialised ({counts})")
    for name, value in state(model).items():
        assert torch.equal(value, (before if name.startswith("score") else weights)[name])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("backbone.0.bias"), r"1 missing \(backbone\.0\)"),
        (lambda w: w.update({"backbone.2.weight": torch.ones(1)}), r"1 left over \(backbone\.2\)"),
        (lambda w: w.update({"backbone.0.bias": torch.ones(())}), "a number in the file, 4 in"),
    ],
)
def test_another_backbone_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    weights = randomised(Detector())
    change(weights)
    path = save(tmp_path / "w.pth", weights)
    model = Detector()
    before = state(model)
    with pytest.raises(UserError, match=rf"of another network .*{said}.* settings model\.width"):
        READER.load_start(model, path, RGB)
    with pytest.raises(UserError, match=rf"w\.pth is not of this model: .*{said}"):
        READER.load_for_evaluation(model, path, RGB)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_a_whole_detector_fills_more_than_a_backbone_does(tmp_path: Path) -> None:
    weights = randomised(Detector())
    weights.pop("score.bias")
    whole, start = (save(tmp_path / n, w) for n, w in (("w", weights), ("b", letters(weights))))
    with pytest.raises(UserError, match=r"of another network .* that fit \(score\)"):
        READER.load_start(Detector(), whole, RGB)
    assert READER.load_start(Detector(), start, BGR).endswith("1 tensors stay as initialised")
    weights = randomised(Detector()) | {"bias": torch.ones(1)}
    with pytest.raises(UserError, match=r"of another network .* that fit \(bias\)"):
        READER.load_start(Detector(), save(tmp_path / "w", weights), RGB)


def test_a_training_may_start_with_more_than_its_weights_knew(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", randomised(Detector()))
    model = Detector()
    model.backbone.add_module("offset", nn.Linear(1, 1))
    report = READER.load_start(model, path, RGB)
    assert "; 2 missing (backbone.offset); 2 tensors stay as initialised" in report
    with pytest.raises(UserError, match=r"2 missing \(backbone\.offset\)"):
        READER.load_for_evaluation(model, path, RGB)
    larger = save(tmp_path / "larger.pth", state(model))
    with pytest.raises(UserError, match=r"of another network .* that fit \(backbone\.offset\)"):
        READER.load_start(Detector(), larger, RGB)


def test_settings_belong_to_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", letters(randomised(Detector())))
    for load in (READER.load_start, READER.load_for_evaluation):
        with pytest.raises(UserError) as error:
            load(Detector(), path, RGB)
        words = "set model.pixel_mean=[103.53,116.28,123.675] model.flipped=true, or choose"
        assert words in str(error.value) and "(model.pixel_mean=[123.675," in str(error.value)
    READER.load_for_evaluation(Detector(), path)  # no config, no question
    close = SimpleNamespace(pixel_mean=[103.5301, 116.28, 123.675], flipped=True)
    READER.load_for_evaluation(Detector(), path, close)
    content = {"format": 1, "config": "model:\n  flipped: true\n  width: 4\n"}
    checkpoint.save(tmp_path / "last.pth", {**content, "model": randomised(Detector())})
    with pytest.raises(UserError, match=r"set model\.flipped=true, or choose"):
        READER.load_start(Detector(), tmp_path / "last.pth", RGB)
    assert "(zoo): 8 tensors" in READER.load_start(Detector(), tmp_path / "last.pth", BGR)


def test_files_that_hold_no_such_weights(tmp_path: Path) -> None:
    for content, said in (
        ({"encoder.weight": torch.ones(1)}, "of no kind .*encoder.* give plain ones or letters"),
        ({"model": {}}, "begin with none"),
    ):
        with pytest.raises(UserError, match=said):
            READER.read(save(tmp_path / "w.pth", content))
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": [np.ones(2)]}))
    with pytest.raises(UserError, match="no dict of arrays under 'model'"):
        READER.read(tmp_path / "w.pkl")
    with pytest.raises(UserError, match=r"Cannot read the weights .*none\.pth: No such file"):
        READER.read(tmp_path / "none.pth")
    alone = {name: value for name, value in randomised(Detector()).items() if "score" not in name}
    with pytest.raises(UserError, match="holds no detector, but a backbone"):
        READER.count_classes(save(tmp_path / "b.pth", alone))
    fit = match(READER.read(tmp_path / "b.pth"), Detector())
    assert fit.missing == ["score.weight", "score.bias"] and not fit.left_over
