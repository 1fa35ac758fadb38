"""Weights files of others and our own, and the names that their tensors have here.

Read are: WXinlong/SOLO's checkpoints (written by mmdet 1.x's runner), those of mmdet 2 and 3's
SOLOv2, torchvision's ResNets, and the zoo's checkpoints. Our names are WXinlong/SOLO's.

Deformable convolutions: WXinlong/SOLO and mmdet since January 2020 hold the convolution that
tells the offsets inside (``conv2.conv_offset``). Before, mmdet had it beside (``conv2_offset``,
mmdet/ops/dcn/deform_conv.py of WXinlong/SOLO loads it still); other ports of version 2 call it
``conv_offset_mask``.

The weights decide pixel statistics too.
"""

import re
from collections.abc import Callable
from typing import Any

from zoo_common.errors import UserError
from zoo_common.weights import Content, Kind, Reader

CLASS_LAYER = "bbox_head.solo_cate."

_TORCHVISION = {
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}
"""Red first; all published SOLOv2 recipes start from torchvision's ResNets and keep these."""

_FROM_MMDET = (
    ("mask_head.mask_feature_head.conv_pred.", "mask_feat_head.conv_pred.0."),
    ("mask_head.mask_feature_head.", "mask_feat_head."),
    ("mask_head.cls_convs.", "bbox_head.cate_convs."),
    ("mask_head.conv_cls.", CLASS_LAYER),
    ("mask_head.conv_kernel.", "bbox_head.solo_kernel."),
    ("mask_head.", "bbox_head."),
)
"""How names of mmdet begin, and ours; the first that fits counts."""

_NUMBERS = r"\s*=\s*[\[(]([^\])]*)[\])]"
_MEAN, _STD = re.compile(rf"\bmean{_NUMBERS}"), re.compile(rf"\bstd{_NUMBERS}")
_BLUE_FIRST = re.compile(r"\b(?:bgr_)?to_rgb\s*=\s*False\b")


def from_mmdet(name: str) -> str:
    """Our name of a tensor of mmdet's SOLOv2."""
    for theirs, ours in _FROM_MMDET:
        if name.startswith(theirs):
            return _from_solo(ours + name.removeprefix(theirs))
    return _from_solo(name)


def _from_solo(name: str) -> str:
    """Our name of a tensor of WXinlong/SOLO: its own, but for older deformable convolutions."""
    name = re.sub(r"\.(conv\d)_offset\.", r".\1.conv_offset.", name)
    return name.replace(".conv_offset_mask.", ".conv_offset.")


def _from_torchvision(name: str) -> str | None:
    """Our name of a tensor of a ResNet; None for the classifier."""
    return None if name.startswith("fc.") else f"backbone.{name}"


def _runner_settings(content: Content) -> dict[str, Any]:
    """Pixel statistics by the config that a runner has written down, or the published ones.

    Raises:
        UserError: the weights take blue first.
    """
    meta = content.rest.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    text = str(meta.get("config", meta.get("cfg", "")))
    if _BLUE_FIRST.search(text):
        raise UserError(
            f"{content.path} was trained on images with blue first (to_rgb=False), but red is "
            "first here: give other weights."
        )
    mean, std = _MEAN.search(text), _STD.search(text)
    if mean is None or std is None:
        return dict(_TORCHVISION)
    return {"pixel_mean": _numbers(mean[1]), "pixel_std": _numbers(std[1])}


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*", text)]


def _has(name: str) -> Callable[[Content], bool]:
    """Tells the files that have a tensor of this name."""
    return lambda content: name in content.weights


_READER = Reader(
    kinds=(
        Kind(
            "zoo",
            lambda content: content.is_zoo_checkpoint and f"{CLASS_LAYER}weight" in content.weights,
            _from_solo,
            settings=lambda content: content.recorded(*_TORCHVISION),
        ),
        Kind("WXinlong/SOLO", _has(f"{CLASS_LAYER}weight"), _from_solo, settings=_runner_settings),
        Kind("mmdet", _has("mask_head.conv_cls.weight"), from_mmdet, settings=_runner_settings),
        Kind(
            "torchvision",
            _has("layer1.0.conv1.weight"),
            _from_torchvision,
            "backbone.",
            lambda _: dict(_TORCHVISION),
        ),
    ),
    known="WXinlong/SOLO's or mmdet's SOLOv2, torchvision's ResNet or a checkpoint of this zoo",
    outputs=(CLASS_LAYER,),
    class_layer=f"{CLASS_LAYER}weight",
    background=0,
    network_settings="model.depth, model.norm, model.deformable, head and widths",
    additions=(".conv_offset.",),  # they start at zero
)
read = _READER.read
load_start = _READER.load_start
load_for_evaluation = _READER.load_for_evaluation
count_classes = _READER.count_classes
