"""Weights files of others and our own, and how they fit a model.

Read are: Caffe2's and Detectron's pickles (R-50.pkl, R-101.pkl of MSRA, of either form of their
normalisation, and whole detectors), detectron2's .pkl and .pth, torchvision's ResNets, and the
zoo's checkpoints. Every tensor gets the name that it has in our model, which is detectron2's, by
rule; nothing is guessed from likeness. The names of Caffe2 follow detectron2
(checkpoint/c2_model_loading.py at be792b95), those of torchvision its
tools/convert-torchvision-to-d2.py.

Pixel statistics, channel order and the place of the stride belong to the weights as much as the
numbers do: with others the network computes without complaint, and badly. Where a file or its
origin tells them, a config that differs is an error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from zoo_common import checkpoint, pickles
from zoo_common.errors import UserError

BOTTOM_UP = "backbone.bottom_up."
_CLASS_LAYERS = (
    "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_head.predictor.",
)
_OUTPUT_LAYERS = (
    *_CLASS_LAYERS,
    "proposal_generator.rpn_head.objectness_logits.",
    "proposal_generator.rpn_head.anchor_deltas.",
)
"""What may have another shape when a training starts: other classes, other anchors."""

_EPS = 1e-5  # of the normalisation that Caffe2 folded into a factor and a shift

_MSRA = {
    "channel_order": "BGR",
    "pixel_mean": [103.53, 116.28, 123.675],
    "pixel_std": [1.0, 1.0, 1.0],
    "stride_in_1x1": True,
}
_FAIR = {"pixel_std": [57.375, 57.12, 58.395], "stride_in_1x1": False}  # ResNeXt, trained in BGR
_TORCHVISION = {
    "channel_order": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "stride_in_1x1": False,
}


class Dialect(Protocol):
    """The settings that weights ask for: section ``model`` of the config."""

    channel_order: str
    pixel_mean: list[float]
    pixel_std: list[float]
    stride_in_1x1: bool


@dataclass
class WeightsFile:
    """What a file holds, with our names.

    Attributes:
        path: the file.
        kind: ``caffe2``, ``detectron2``, ``torchvision`` or ``zoo``.
        tensors: by the name in our state_dict.
        names: of each of them, the name in the file; none for the statistics of a normalisation
            that the file has only as a factor and a shift.
        left_over: names in the file that no R-CNN has a place for (an ImageNet classifier).
        settings: settings of the section ``model`` that the weights belong to, as far as known.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Fit:
    """How a file fits a model; lists hold names of our state_dict, but ``left_over`` the file's.

    Attributes:
        file: the file.
        loaded: what the model takes.
        missing: what the file has not.
        left_over: what the model has not.
        other_shape: by name, the shapes in the file and in the model.
    """

    file: WeightsFile
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def renamed(self) -> list[str]:
        """The loaded ones that have another name in the file."""
        return [key for key in self.loaded if self.file.names.get(key, key) != key]

    @property
    def implied(self) -> list[str]:
        """The loaded ones that the file only implies: mean 0 and variance 1."""
        return [key for key in self.loaded if key not in self.file.names]

    def describe(self) -> str:
        """One line with counts and examples."""
        implied, renamed = self.implied, self.renamed
        count = len(self.loaded) - len(implied)
        parts = [f"{self.file.path.name} ({self.file.kind}): {count} tensors loaded"]
        if renamed:
            example = f"{self.file.names[renamed[0]]} -> {renamed[0]}"
            parts[0] += f", {len(renamed)} of them renamed ({example})"
        if implied:
            parts.append(f"{len(implied)} statistics of folded normalisation set to 0 and 1")
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_groups(self.missing)})")
        if self.other_shape:
            parts.append(f"{len(self.other_shape)} of another shape ({self._shapes()})")
        if self.left_over:
            parts.append(f"{len(self.left_over)} left over ({_groups(self.left_over)})")
        return "; ".join(parts)

    def details(self) -> str:
        """Every tensor on a line of its own."""
        lines = [f"{self.file.path} ({self.file.kind})"]
        for key in self.loaded:
            lines.append(f"  loaded    {key} <- {self.file.names.get(key, 'folded normalisation')}")
        lines += [f"  missing   {key}" for key in self.missing]
        lines += [
            f"  shape     {key}: {_shape(there)} in the file, {_shape(here)} in the model"
            for key, (there, here) in self.other_shape.items()
        ]
        lines += [f"  left over {name}" for name in self.left_over]
        return "\n".join(lines)

    def classes(self) -> str:
        """Both class counts, where they differ; empty otherwise."""
        key = f"{_CLASS_LAYERS[0]}weight"
        if key not in self.other_shape:
            return ""
        there, here = self.other_shape[key]
        return f"the file has {there[0] - 1} classes, the model {here[0] - 1}"

    def _shapes(self) -> str:
        key, (there, here) = next(iter(self.other_shape.items()))
        more = ", ..." if len(self.other_shape) > 1 else ""
        return f"{key}: {_shape(there)} in the file, {_shape(here)} in the model{more}"


def load_start(model: nn.Module, path: str | Path, config: Dialect, *, full: bool = False) -> str:
    """Fills a model with the weights that its training starts from.

    The ResNet must be filled whole. What else the file has not, and output layers for another
    number of classes or anchors, stay as initialised and are reported.

    Args:
        model: of our names.
        path: the file.
        config: section ``model`` of the config.
        full: report every tensor rather than counts and examples.

    Returns:
        What was loaded, renamed, missing or left over.

    Raises:
        UserError: the file cannot be used, belongs to other pixel settings, or is of another
            network.
    """
    file = read(Path(path))
    check_dialect(file, config)
    fit = match(file, model)
    wrong = [key for key in fit.missing if key.startswith(BOTTOM_UP)]
    wrong += [key for key in fit.other_shape if not key.startswith(_OUTPUT_LAYERS)]
    own = model.state_dict()
    wrong += [key for key in file.tensors if key.startswith(BOTTOM_UP) and key not in own]
    if wrong:
        raise UserError(
            f"{path} holds the weights of another network ({fit.describe()}): choose the file or "
            f"the settings model.depth, model.norm and widths that fit ({_groups(wrong)})."
        )
    _fill(model, fit)
    notes = [fit.details() if full else fit.describe()]
    if fit.missing or fit.other_shape:
        reason = fit.classes()
        notes.append(
            f"{len(fit.missing) + len(fit.other_shape)} tensors stay as initialised"
            + (f" ({reason})" if reason else "")
        )
    return ("\n" if full else "; ").join(notes)


def load_for_evaluation(
    model: nn.Module, path: str | Path, config: Dialect | None = None, *, full: bool = False
) -> str:
    """Fills a model whole, to evaluate it or to predict with it.

    Args:
        model: of our names.
        path: the file.
        config: section ``model`` of the config; None leaves its pixel settings unchecked.
        full: report every tensor rather than counts and examples.

    Returns:
        What was loaded, renamed or left over.

    Raises:
        UserError: the file cannot be used, belongs to other pixel settings, or does not fill the
            model exactly; the message names keys and class counts.
    """
    file = read(Path(path))
    if config is not None:
        check_dialect(file, config)
    fit = match(file, model)
    if fit.missing or fit.other_shape or set(fit.left_over) != set(file.left_over):
        reason = fit.classes()
        raise UserError(
            f"{path} is not of this model: {fit.describe()}"
            + (f"; {reason}" if reason else "")
            + ": give the weights and the config that belong together."
        )
    _fill(model, fit)
    return fit.details() if full else fit.describe()


def count_classes(path: str | Path) -> int:
    """The classes that the detector in a file knows.

    Raises:
        UserError: the file cannot be used, or holds no detector.
    """
    scores = read(Path(path)).tensors.get(f"{_CLASS_LAYERS[0]}bias")
    if scores is None:
        raise UserError(f"{path} holds no detector, but a backbone: give a trained one.")
    return len(scores) - 1


def read(path: Path) -> WeightsFile:
    """Reads a weights file of any kind that is known, and runs nothing in it.

    Raises:
        UserError: the file is absent, damaged or refused, or holds no weights of a known kind.
    """
    content = _content(path)
    blobs = content.get("blobs", content)
    weights = checkpoint.without_prefix(
        {
            str(name): value
            for name, value in content.get("model", blobs).items()
            if isinstance(value, (Tensor, np.ndarray)) and not str(name).endswith("_momentum")
        }
    )
    kind = _kind(weights, content)
    if kind is None:
        raise UserError(
            f"{path} holds weights of no kind that is known here (its names begin with "
            f"{', '.join(list(weights)[:3]) or 'none'}): give detectron2's, Caffe2's, "
            "torchvision's ResNet or a checkpoint of this zoo."
        )
    file = WeightsFile(path, kind, settings=_settings(kind, weights, content))
    for name in list(weights):
        tensor = _tensor(weights.pop(name))
        key = _RULES[kind](name)
        if key is None:
            file.left_over.append(name)
        elif key:
            file.tensors[key] = _reordered(key, tensor) if kind == "caffe2" else tensor
            file.names[key] = name
    _unfold_norms(file)
    return file


def check_dialect(file: WeightsFile, config: Dialect) -> None:
    """Compares the pixel settings and the stride with those that the weights belong to.

    Raises:
        UserError: they differ; the message gives the settings to write.
    """
    wrong = {
        name: value
        for name, value in file.settings.items()
        if not _same(getattr(config, name), value)
    }
    if wrong:
        wanted = " ".join(f"model.{name}={_written(value)}" for name, value in wrong.items())
        found = " ".join(f"model.{name}={_written(getattr(config, name))}" for name in wrong)
        raise UserError(
            f"{file.path} ({file.kind}) belongs to other settings than the config has ({found}): "
            f"set {wanted}, or choose other weights."
        )


def match(file: WeightsFile, model: nn.Module) -> Fit:
    """Compares names and shapes with a model's state_dict."""
    own = model.state_dict()
    fit = Fit(file, left_over=list(file.left_over))
    for key, value in own.items():
        found = file.tensors.get(key)
        if found is None:
            fit.missing.append(key)
        elif found.shape != value.shape:
            fit.other_shape[key] = (tuple(found.shape), tuple(value.shape))
        else:
            fit.loaded.append(key)
    fit.left_over += [name for key, name in file.names.items() if key not in own]
    return fit


def _content(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise UserError(f"Cannot read the weights {path}: {error.strerror}.") from error
    if not pickles.is_pickle(head):
        return checkpoint.load(path)
    content = pickles.load_arrays(path)
    for name in ("model", "blobs"):
        if not isinstance(content.get(name, {}), dict):
            raise UserError(f"{path} holds no dict of arrays under {name!r}: get a whole file.")
    return content


def _kind(weights: Mapping[str, Any], content: Mapping[Any, Any]) -> str | None:
    """Tells a file's kind by its names; only ResNets renamed already go by their author."""
    if any(name.startswith(("backbone.", "roi_heads.")) for name in weights):
        return "zoo" if {"format", "config"} <= content.keys() else "detectron2"
    if "conv1_w" in weights or any("_branch2a_w" in name for name in weights):
        return "caffe2"
    if "layer1.0.conv1.weight" in weights:
        return "torchvision"
    if "res2.0.conv1.weight" in weights:
        return "torchvision" if content.get("__author__") == "torchvision" else "detectron2"
    return None


def _settings(kind: str, weights: Mapping[str, Any], content: Mapping[Any, Any]) -> dict[str, Any]:
    """The settings that weights belong to, as far as their origin or the file tells."""
    if kind == "torchvision":
        return dict(_TORCHVISION)
    if kind == "caffe2":
        grouped = weights.get("res2_0_branch2b_w")
        if grouped is not None and grouped.shape[0] != grouped.shape[1]:
            return _MSRA | _FAIR
        return _MSRA | ({"stride_in_1x1": False} if "conv1_gn_s" in weights else {})
    if kind == "zoo":
        written = (yaml.safe_load(content["config"]) or {}).get("model", {})
        return {name: written[name] for name in _MSRA if name in written}
    return {
        name: [float(number) for number in weights[name].reshape(-1)]
        for name in ("pixel_mean", "pixel_std")
        if name in weights
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, list):
        return len(one) == len(other) and bool(np.allclose(one, other, rtol=0, atol=2e-3))
    return bool(one == other)


def _written(value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(f"{number:g}" for number in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


_PARAMETERS = {
    **dict.fromkeys(("w",), "weight"),
    **dict.fromkeys(("b",), "bias"),
    **dict.fromkeys(("bn_s", "bn_gamma", "gn_s"), "norm.weight"),
    **dict.fromkeys(("bn_b", "bn_beta", "gn_b"), "norm.bias"),
    **dict.fromkeys(("bn_rm", "bn_running_mean"), "norm.running_mean"),
    **dict.fromkeys(("bn_riv", "bn_running_var"), "norm.running_var"),
}
_BLOB = re.compile(rf"(.+?)_({'|'.join(_PARAMETERS)})")
_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_BLOCK = re.compile(r"res([2-5])_(\d+)_branch(1|2a|2b|2c)")
_LATERAL = re.compile(r"fpn_inner_res([2-5])_\d+_sum(?:_lateral)?")
_OUTPUT = re.compile(r"fpn_res([2-5])_\d+_sum")
_MASK = re.compile(r"_\[mask\]_fcn(\d+)")
_BOX = re.compile(r"head_conv(\d+)")
_LAYERS = {
    "conv1": f"{BOTTOM_UP}stem.conv1",
    "res_conv1": f"{BOTTOM_UP}stem.conv1",
    "conv_rpn_fpn2": "proposal_generator.rpn_head.conv",
    "rpn_cls_logits_fpn2": "proposal_generator.rpn_head.objectness_logits",
    "rpn_bbox_pred_fpn2": "proposal_generator.rpn_head.anchor_deltas",
    "fc6": "roi_heads.box_head.fc1",
    "fc7": "roi_heads.box_head.fc2",
    "cls_score": "roi_heads.box_predictor.cls_score",
    "bbox_pred": "roi_heads.box_predictor.bbox_pred",
    "conv5_mask": "roi_heads.mask_head.deconv",
    "mask_fcn_logits": "roi_heads.mask_head.predictor",
}


def _from_caffe2(name: str) -> str | None:
    """Our name of a Caffe2 blob; None where we have none."""
    blob = _BLOB.fullmatch(name)
    if blob is None or name == "conv1_b":  # a bias before a normalisation
        return None
    layer, parameter = blob.group(1), _PARAMETERS[blob.group(2)]
    if match := _BLOCK.fullmatch(layer):
        stage, block, branch = match.groups()
        return f"{BOTTOM_UP}res{stage}.{block}.{_BRANCHES[branch]}.{parameter}"
    if match := _LATERAL.fullmatch(layer):
        return f"backbone.fpn_lateral{match.group(1)}.{parameter}"
    if match := _OUTPUT.fullmatch(layer):
        return f"backbone.fpn_output{match.group(1)}.{parameter}"
    if match := _MASK.fullmatch(layer):
        return f"roi_heads.mask_head.mask_fcn{match.group(1)}.{parameter}"
    if match := _BOX.fullmatch(layer):
        return f"roi_heads.box_head.conv{match.group(1)}.{parameter}"
    return f"{_LAYERS[layer]}.{parameter}" if layer in _LAYERS else None


def _from_torchvision(name: str) -> str | None:
    """Our name of a tensor of torchvision's ResNet, renamed by detectron2's tool or not."""
    if name.endswith("num_batches_tracked") or re.match(r"(stem\.)?fc\.", name):
        return None
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match.group(1)) + 1}", name)
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return BOTTOM_UP + re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)


def _from_detectron2(name: str) -> str | None:
    """Our name of a tensor of detectron2; empty for constants that the config gives us."""
    if name in ("pixel_mean", "pixel_std") or ".cell_anchors." in name:
        return ""
    if name.endswith("num_batches_tracked") or re.match(r"(stem\.)?(fc|linear)\.", name):
        return None
    return BOTTOM_UP + name if re.match(r"(stem|res[2-5])\.", name) else name


_RULES = {
    "caffe2": _from_caffe2,
    "detectron2": _from_detectron2,
    "torchvision": _from_torchvision,
    "zoo": _from_detectron2,
}


def _reordered(key: str, tensor: Tensor) -> Tensor:
    """Caffe2's class layers in our order: background last in the scores, absent elsewhere."""
    if key.startswith(_CLASS_LAYERS[0]):
        return tensor.roll(-1, dims=0)
    if key.startswith(_CLASS_LAYERS[1]):
        return tensor[4:]
    return tensor[1:] if key.startswith(_CLASS_LAYERS[2]) else tensor


def _unfold_norms(file: WeightsFile) -> None:
    """Gives normalisation that is only a factor and a shift the statistics that change nothing."""
    if file.kind != "caffe2":
        return
    for key in [key for key in file.tensors if key.endswith(".norm.weight")]:
        mean, var = (key.replace(".weight", end) for end in (".running_mean", ".running_var"))
        grouped = file.names[key].endswith("gn_s")
        if not grouped and mean not in file.tensors and var not in file.tensors:
            ones = torch.ones_like(file.tensors[key])
            file.tensors |= {mean: torch.zeros_like(ones), var: ones - _EPS}


def _tensor(value: "Tensor | np.ndarray[Any, Any]") -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(value)


def _fill(model: nn.Module, fit: Fit) -> None:
    own = model.state_dict()
    model.load_state_dict({**own, **{key: fit.file.tensors[key] for key in fit.loaded}})


def _shape(lengths: tuple[int, ...]) -> str:
    return "x".join(map(str, lengths)) or "a number"


def _groups(names: list[str]) -> str:
    """Names, cut to their first parts, a few of them."""
    heads = list(dict.fromkeys(re.sub(r"\.[a-z_]+$", "", name) for name in names))
    return ", ".join(heads[:4]) + (", ..." if len(heads) > 4 else "")
