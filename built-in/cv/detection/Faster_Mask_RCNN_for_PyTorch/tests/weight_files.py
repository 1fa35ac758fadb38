"""Makes weights files of the forms that others publish: true names and shapes, random numbers.

Shapes of arrays are torch's: (out, in, height, width).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BRANCHES = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
DETECTOR_BLOBS = {
    "proposal_generator.rpn_head.conv": "conv_rpn_fpn2",
    "proposal_generator.rpn_head.objectness_logits": "rpn_cls_logits_fpn2",
    "proposal_generator.rpn_head.anchor_deltas": "rpn_bbox_pred_fpn2",
    "roi_heads.box_head.fc1": "fc6",
    "roi_heads.box_head.fc2": "fc7",
    "roi_heads.box_predictor.cls_score": "cls_score",
    "roi_heads.box_predictor.bbox_pred": "bbox_pred",
    "roi_heads.mask_head.deconv": "conv5_mask",
    "roi_heads.mask_head.predictor": "mask_fcn_logits",
}


def convolutions(
    depth: int, *, stem: int = 64, width: int = 64, res2: int = 256
) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """The convolutions of a ResNet by detectron2's names, and the shapes of their weights."""
    yield "stem.conv1", (stem, 3, 7, 7)
    before = stem
    for stage, blocks in enumerate(BLOCKS[depth]):
        inner, outer = width * 2**stage, res2 * 2**stage
        for block in range(blocks):
            at = f"res{stage + 2}.{block}"
            if block == 0:
                yield f"{at}.shortcut", (outer, before, 1, 1)
            yield f"{at}.conv1", (inner, before, 1, 1)
            yield f"{at}.conv2", (inner, inner, 3, 3)
            yield f"{at}.conv3", (outer, inner, 1, 1)
            before = outer


def caffe2(depth: int, *, folded: bool = False, **widths: int) -> Arrays:
    """R-50.pkl or R-101.pkl of MSRA.

    Args:
        depth: 50 or 101.
        folded: the older form, whose normalisation is a factor and a shift.
        widths: as in :func:`convolutions`.
    """
    draw = Draw(depth)
    blobs: Arrays = {}
    last = 0
    for name, shape in convolutions(depth, **widths):
        layer, last = blob_of(name), shape[0]
        blobs[f"{layer}_w"] = draw(*shape)
        norm = ("s", "b") if folded else ("gamma", "beta", "running_mean", "running_var")
        for part in norm:
            prefix = "res_conv1" if layer == "conv1" else layer
            blobs[f"{prefix}_bn_{part}"] = draw(shape[0])
    if depth == 50:
        blobs["conv1_b"] = draw(blobs["conv1_w"].shape[0])
    blobs["fc1000_w"], blobs["fc1000_b"] = draw(1000, last), draw(1000)
    return blobs


def torchvision(depth: int, **widths: int) -> Arrays:
    """The state_dict of torchvision's resnet50 or resnet101."""
    draw = Draw(depth)
    weights: Arrays = {}
    last = 0
    for name, shape in convolutions(depth, **widths):
        last = shape[0]
        layer = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
        layer = layer.removeprefix("stem.").replace("shortcut", "downsample.0")
        norm = layer.replace("downsample.0", "downsample.1").replace("conv", "bn")
        weights[f"{layer}.weight"] = draw(*shape)
        for part in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{norm}.{part}"] = draw(shape[0])
        weights[f"{norm}.num_batches_tracked"] = np.array(7)
    weights["fc.weight"], weights["fc.bias"] = draw(1000, last), draw(1000)
    return weights


def random_like(weights: Mapping[str, Any], seed: int = 0) -> Arrays:
    """Arrays with the names and shapes of a state_dict."""
    draw = Draw(seed)
    return {name: draw(*value.shape) for name, value in weights.items()}


def caffe2_detector(weights: Mapping[str, np.ndarray]) -> Arrays:
    """A whole detector as Detectron has it, from the same with detectron2's names."""
    blobs: Arrays = {}
    for name, array in weights.items():
        layer, parameter = name.rsplit(".", 1)
        if layer.endswith(".norm"):
            layer, kind = blob_of(layer.removesuffix(".norm")), {"weight": "s", "bias": "b"}
            if parameter in kind:
                prefix = "res_conv1" if layer == "conv1" else layer
                blobs[f"{prefix}_bn_{kind[parameter]}"] = array
            continue
        blobs[f"{blob_of(layer)}_{parameter[0]}"] = with_background(layer, array)
    return blobs


def with_background(layer: str, array: np.ndarray) -> np.ndarray:
    """A class layer as Detectron has it, where background is the first class of all."""
    if layer.endswith(".cls_score"):
        return np.concatenate([array[-1:], array[:-1]])
    if layer.endswith(".bbox_pred"):
        return np.concatenate([np.full_like(array[:4], 9), array])
    if layer.endswith("mask_head.predictor"):
        return np.concatenate([np.full_like(array[:1], 9), array])
    return array


def blob_of(layer: str) -> str:
    """Caffe2's name of a layer of detectron2."""
    layer = layer.removeprefix("backbone.").removeprefix("bottom_up.")
    if layer == "stem.conv1":
        return "conv1"
    if layer.startswith("res"):
        at, branch = layer.replace(".", "_").rsplit("_", 1)
        return f"{at}_{BRANCHES[branch]}"
    if match := re.fullmatch(r"fpn_(lateral|output)(\d)", layer):
        level = f"res{match[2]}_{'2352'[int(match[2]) - 2]}_sum"
        if match[1] == "output":
            return f"fpn_{level}"
        return f"fpn_inner_{level}" + ("" if match[2] == "5" else "_lateral")
    if match := re.fullmatch(r"roi_heads\.mask_head\.mask_fcn(\d)", layer):
        return f"_[mask]_fcn{match[1]}"
    return DETECTOR_BLOBS[layer]


class Draw:
    """Random float32 arrays."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        return self._generator.standard_normal(shape, dtype=np.float32)
