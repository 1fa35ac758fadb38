"""Weights files of others and our own, and the names that their tensors have here.

Read are: Caffe2's and Detectron's pickles (R-50.pkl, R-101.pkl of MSRA, of either form of their
normalisation, and whole detectors), detectron2's .pkl and .pth, torchvision's ResNets, and the
zoo's checkpoints. Our names are detectron2's. The names of Caffe2 follow detectron2
(checkpoint/c2_model_loading.py at be792b95), those of torchvision its
tools/convert-torchvision-to-d2.py.

The weights decide pixel statistics, channel order and the place of the stride too.
"""

import re
from typing import Any

import torch
from torch import Tensor

from zoo_common.weights import Content, Kind, Reader, WeightsFile

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
    if re.match(r"(stem\.)?fc\.", name):
        return None
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match.group(1)) + 1}", name)
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return BOTTOM_UP + re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)


def _from_detectron2(name: str) -> str | None:
    """Our name of a tensor of detectron2; empty for constants that the config gives us."""
    if name in ("pixel_mean", "pixel_std") or ".cell_anchors." in name:
        return ""
    if re.match(r"(stem\.)?(fc|linear)\.", name):
        return None
    return BOTTOM_UP + name if re.match(r"(stem|res[2-5])\.", name) else name


def _is_caffe2(content: Content) -> bool:
    return any(name == "conv1_w" or "_branch2a_w" in name for name in content.weights)


def _is_detector(content: Content) -> bool:
    return any(name.startswith(("backbone.", "roi_heads.")) for name in content.weights)


def _is_resnet(content: Content) -> bool:
    """Whether the names are a ResNet's; detectron2 has both sources under its own names."""
    return "res2.0.conv1.weight" in content.weights


def _is_torchvision(content: Content) -> bool:
    """Whether it is torchvision's; once renamed, only the file's author tells."""
    renamed = _is_resnet(content) and content.rest.get("__author__") == "torchvision"
    return renamed or "layer1.0.conv1.weight" in content.weights


def _caffe2_settings(content: Content) -> dict[str, Any]:
    grouped = content.weights.get("res2_0_branch2b_w")
    if grouped is not None and grouped.shape[0] != grouped.shape[1]:
        return _MSRA | _FAIR
    return _MSRA | ({"stride_in_1x1": False} if "conv1_gn_s" in content.weights else {})


def _detectron2_settings(content: Content) -> dict[str, Any]:
    return {
        name: [float(number) for number in content.weights[name].reshape(-1)]
        for name in ("pixel_mean", "pixel_std")
        if name in content.weights
    }


def _finish_caffe2(file: WeightsFile) -> None:
    """Reorders classes; completes a normalisation that is but a factor and a shift."""
    file.tensors = {key: _reordered(key, tensor) for key, tensor in file.tensors.items()}
    file.implied = "statistics of folded normalisation set to 0 and 1"
    for key in [key for key in file.tensors if key.endswith(".norm.weight")]:
        mean, var = (key.replace(".weight", end) for end in (".running_mean", ".running_var"))
        grouped = file.names[key].endswith("gn_s")
        if not grouped and mean not in file.tensors and var not in file.tensors:
            ones = torch.ones_like(file.tensors[key])
            file.tensors |= {mean: torch.zeros_like(ones), var: ones - _EPS}


def _reordered(key: str, tensor: Tensor) -> Tensor:
    """Caffe2's class layers in our order: background last in the scores, absent elsewhere."""
    if key.startswith(_CLASS_LAYERS[0]):
        return tensor.roll(-1, dims=0)
    if key.startswith(_CLASS_LAYERS[1]):
        return tensor[4:]
    return tensor[1:] if key.startswith(_CLASS_LAYERS[2]) else tensor


_READER = Reader(
    kinds=(
        Kind(
            "zoo",
            lambda content: _is_detector(content) and content.is_zoo_checkpoint,
            _from_detectron2,
            BOTTOM_UP,
            lambda content: content.recorded(*_MSRA),
        ),
        Kind("detectron2", _is_detector, _from_detectron2, BOTTOM_UP, _detectron2_settings),
        Kind("caffe2", _is_caffe2, _from_caffe2, BOTTOM_UP, _caffe2_settings, _finish_caffe2),
        Kind(
            "torchvision",
            _is_torchvision,
            _from_torchvision,
            BOTTOM_UP,
            lambda _: dict(_TORCHVISION),
        ),
        Kind("detectron2", _is_resnet, _from_detectron2, BOTTOM_UP, _detectron2_settings),
    ),
    known="detectron2's, Caffe2's, torchvision's ResNet or a checkpoint of this zoo",
    outputs=_OUTPUT_LAYERS,
    class_layer=f"{_CLASS_LAYERS[0]}weight",
    background=1,
    network_settings="model.depth, model.norm and widths",
)
read = _READER.read
load_start = _READER.load_start
load_for_evaluation = _READER.load_for_evaluation
count_classes = _READER.count_classes
