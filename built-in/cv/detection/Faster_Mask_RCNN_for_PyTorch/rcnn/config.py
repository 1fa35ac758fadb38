"""The settings of a Faster or Mask R-CNN run, with the card's option names.

Defaults are detectron2's for its R-50-FPN networks (defaults.py and Base-RCNN-FPN.yaml at
be792b95); configs/*.yaml say what a published run sets otherwise. detectron2's own names for
these settings stand in rcnn.detectron2_keys. No torch here: help texts come at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rcnn.detectron2_keys import CARD_KEYS, LEVELS, PUBLISHED
from zoo_common import elastic
from zoo_common.config import (
    CardOptions,
    LaunchConfig,
    PrecisionConfig,
    RunConfig,
    build_config,
    flatten,
    section,
    setting,
)
from zoo_common.detection.settings import DetectionData, check_sizes
from zoo_common.errors import UserError
from zoo_common.options import Assignment


@dataclass
class ModelConfig:
    """Which network, and what it is fed."""

    depth: int = setting(50, "layers of the ResNet: 50 or 101", at_least=50, at_most=101)
    masks: bool = setting(True, "Mask R-CNN; false: Faster R-CNN")
    num_classes: int = setting(0, "classes; 0: as many as the data set has", at_least=0)
    norm: str = setting(
        "FrozenBN",
        "normalisation of the ResNet; FrozenBN: its statistics and weights stay as loaded",
        choices=("FrozenBN", "GN"),
    )
    stem_channels: int = setting(64, "channels behind the first convolution", at_least=1)
    res2_channels: int = setting(
        256, "channels of the first stage; each next has twice", at_least=4
    )
    num_groups: int = setting(1, "groups of the 3x3 convolutions", at_least=1)
    width_per_group: int = setting(64, "channels of each group in the first stage", at_least=1)
    stride_in_1x1: bool = setting(
        True, "the stride in the first 1x1 convolution (MSRA); false: in the 3x3 (torchvision)"
    )
    freeze_at: int = setting(
        2, "stages that are not trained; 0: none, 1: the stem, 2: and res2", at_least=0, at_most=5
    )
    fpn_channels: int = setting(256, "channels of the feature pyramid", at_least=1)
    fpn_norm: str = setting("", "normalisation in the feature pyramid", choices=("", "GN"))
    pixel_mean: list[float] = setting(
        [103.53, 116.28, 123.675], "mean of each channel, 0..255, in the order of channel_order"
    )
    pixel_std: list[float] = setting(
        [1.0, 1.0, 1.0],
        "what each channel is divided by, in the order of channel_order",
        more_than=0,
    )
    channel_order: str = setting("BGR", "order of the network's channels", choices=("BGR", "RGB"))
    static_shapes: str = setting(
        "auto", "a fixed set of tensor shapes; auto: on npu and cuda", choices=("auto", "on", "off")
    )


@dataclass
class AnchorConfig:
    """Boxes that the proposals start from."""

    sizes: list[list[float]] = setting(
        [[32.0], [64.0], [128.0], [256.0], [512.0]],
        "sides in pixels, a list for each level of the pyramid from p2 to p6",
        more_than=0,
    )
    aspect_ratios: list[float] = setting(
        [0.5, 1.0, 2.0], "height / width of the anchors", more_than=0
    )
    offset: float = setting(0.0, "shift of the centres, in strides", at_least=0, at_most=1)


@dataclass
class RpnConfig:
    """Region proposals."""

    iou_low: float = setting(0.3, "below it an anchor is background", at_least=0, at_most=1)
    iou_high: float = setting(0.7, "from it on an anchor is foreground", at_least=0, at_most=1)
    samples: int = setting(256, "anchors of an image in the loss", at_least=1)
    positive_fraction: float = setting(
        0.5, "largest share of foreground among them", at_least=0, at_most=1
    )
    pre_nms_train: int = setting(2000, "best anchors of each level before NMS", at_least=1)
    pre_nms_test: int = setting(1000, "the same in evaluation", at_least=1)
    post_nms_train: int = setting(1000, "proposals of an image after NMS", at_least=1)
    post_nms_test: int = setting(1000, "the same in evaluation", at_least=1)
    nms_thresh: float = setting(0.7, "IoU from which on NMS removes", at_least=0, at_most=1)
    min_size: float = setting(0.0, "shortest side of a proposal in pixels", at_least=0)
    smooth_l1_beta: float = setting(0.0, "where smooth L1 turns linear; 0: plain L1", at_least=0)
    cls_weight: float = setting(1.0, "weight of the objectness loss", at_least=0)
    box_weight: float = setting(1.0, "weight of the box loss", at_least=0)
    delta_weights: list[float] = setting(
        [1.0, 1.0, 1.0, 1.0], "factors on the deltas dx, dy, dw, dh", more_than=0
    )


@dataclass
class RoiConfig:
    """Which proposals the heads are trained on, and which detections are kept."""

    iou: float = setting(0.5, "from it on a proposal is foreground", at_least=0, at_most=1)
    samples: int = setting(512, "proposals of an image in the loss", at_least=1)
    positive_fraction: float = setting(
        0.25, "largest share of foreground among them", at_least=0, at_most=1
    )
    append_gt: bool = setting(True, "the annotated boxes are proposals too, in training")
    score_thresh: float = setting(0.05, "smallest score of a detection", at_least=0, at_most=1)
    nms_thresh: float = setting(0.5, "IoU from which on NMS removes", at_least=0, at_most=1)
    detections: int = setting(100, "most detections of an image", at_least=1)


@dataclass
class BoxHeadConfig:
    """Class and box of a proposal."""

    fc_dim: int = setting(1024, "width of the fully connected layers", at_least=1)
    num_fc: int = setting(2, "fully connected layers", at_least=0)
    num_conv: int = setting(0, "3x3 convolutions before them", at_least=0)
    conv_dim: int = setting(256, "their channels", at_least=1)
    norm: str = setting("", "their normalisation", choices=("", "GN"))
    pooler_resolution: int = setting(7, "side of RoIAlign's output", at_least=1)
    sampling_ratio: int = setting(
        0, "RoIAlign's samples along a side of a cell; 0: as the box needs", at_least=0
    )
    delta_weights: list[float] = setting(
        [10.0, 10.0, 5.0, 5.0], "factors on the deltas dx, dy, dw, dh", more_than=0
    )
    smooth_l1_beta: float = setting(0.0, "where smooth L1 turns linear; 0: plain L1", at_least=0)
    class_agnostic: bool = setting(False, "one box for all classes")


@dataclass
class MaskHeadConfig:
    """Mask of a detection."""

    conv_dim: int = setting(256, "channels of the convolutions", at_least=1)
    num_conv: int = setting(4, "3x3 convolutions", at_least=0)
    norm: str = setting("", "their normalisation", choices=("", "GN"))
    pooler_resolution: int = setting(14, "side of RoIAlign's output; masks have twice", at_least=1)
    sampling_ratio: int = setting(
        0, "RoIAlign's samples along a side of a cell; 0: as the box needs", at_least=0
    )
    class_agnostic: bool = setting(False, "one mask for all classes")


@dataclass
class DataConfig(DetectionData):
    """Images, their annotations, and what is done to them."""

    min_sizes: list[int] = setting(
        [640, 672, 704, 736, 768, 800], "short sides in pixels that training resizes to", at_least=1
    )
    size_sampling: str = setting(
        "choice",
        "choice: one of min_sizes; range: any side between its two",
        choices=("choice", "range"),
    )


@dataclass
class SolverConfig:
    """How weights move, and how long. A step is one batch of data.batch_size images."""

    base_lr: float = setting(0.02, "learning rate after warm-up, used as it is", more_than=0)
    max_iter: int = setting(90000, "steps of the whole run", at_least=1)
    steps: list[int] = setting(
        [60000, 80000],
        "steps at which the rate falls; those beyond max_iter do nothing",
        at_least=1,
    )
    gamma: float = setting(0.1, "factor on the rate at each of them", more_than=0)
    warmup_iters: int = setting(1000, "steps of warm-up", at_least=0)
    warmup_factor: float = setting(0.001, "share of the rate at the start", at_least=0)
    warmup_method: str = setting("linear", "course of the warm-up", choices=("linear", "constant"))
    momentum: float = setting(0.9, "momentum of SGD", at_least=0, at_most=1)
    nesterov: bool = setting(False, "Nesterov's form of momentum")
    weight_decay: float = setting(1e-4, "decay of weights", at_least=0)
    weight_decay_norm: float = setting(0.0, "decay of normalisation weights", at_least=0)
    weight_decay_bias: float = setting(-1.0, "decay of biases; -1: as weights", at_least=-1)
    bias_lr_factor: float = setting(1.0, "factor on the rate of biases", at_least=0)
    checkpoint_every: int = setting(5000, "steps between checkpoints", at_least=1)


@dataclass
class EvaluateConfig:
    """When and how the held-out images are searched for objects."""

    every: int = setting(0, "steps between evaluations; 0: none before the end", at_least=0)
    at_end: bool = setting(True, "evaluate after the last step")
    batch_size: int = setting(1, "images per card and step", at_least=1)
    write_results: bool = setting(True, "write the detections in COCO's results format")


@dataclass
class WeightsConfig:
    """Weights to start from."""

    start: str = setting(
        "R-101.pkl",
        "weights that training starts from: a .pkl or .pth file, its address, or its bare name, "
        "which is looked for in data.path, beside it and in the model's directory; empty: random",
        kind="weights",
    )
    url: str = setting(
        "", "address that weights.start is fetched from if it is nowhere; empty: the published one"
    )
    sha256: str = setting("", "checksum that weights.start must have; empty: not checked")
    checkpoint: str = setting(
        "", "trained weights for evaluation and prediction: .pth or .pkl", kind="checkpoint"
    )


@dataclass
class Config:
    """All settings."""

    model: ModelConfig = section(ModelConfig)
    anchors: AnchorConfig = section(AnchorConfig)
    rpn: RpnConfig = section(RpnConfig)
    roi: RoiConfig = section(RoiConfig)
    box_head: BoxHeadConfig = section(BoxHeadConfig)
    mask_head: MaskHeadConfig = section(MaskHeadConfig)
    data: DataConfig = section(DataConfig)
    solver: SolverConfig = section(SolverConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    weights: WeightsConfig = section(WeightsConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


CARD_OPTIONS: CardOptions = {
    "--train_steps": "solver.max_iter",
    "--checkpoint": "weights.checkpoint",
    **CARD_KEYS,
}

WEIGHT_ADDRESSES = {
    f"R-{depth}.pkl": f"{PUBLISHED}ImageNetPretrained/MSRA/R-{depth}.pkl" for depth in (50, 101)
}
"""Where published weights are, by their bare name; zoo_common.preflight fetches what is absent."""


def check(config: Config, world_size: int, kind: str) -> None:
    """Tells settings that do not fit one another; the launcher calls it before it starts.

    Args:
        config: the settings.
        world_size: processes on all machines.
        kind: ``acc``, ``perf`` or ``eval``, see zoo_common.runs; ``eval`` trains nothing.

    Raises:
        UserError: the message names the settings.
    """
    _check_model(config)
    _check_data(config.data)
    if kind == "eval":
        return
    _check_start(config)
    steps = config.solver.steps
    if steps != sorted(steps):
        raise UserError(f"solver.steps must rise, but is {steps}: sort it.")
    batch = config.data.batch_size
    if batch % world_size:
        lower, upper = batch - batch % world_size, batch + world_size - batch % world_size
        near = f"{lower} or {upper}" if lower else str(upper)
        raise UserError(
            f"data.batch_size={batch} counts the images of all {world_size} processes together and "
            f"does not divide over them: take {near} (--batch_size), or other --processes."
        )
    parts = config.precision.accumulate
    if batch // world_size % parts:
        raise UserError(
            f"precision.accumulate={parts} does not divide the {batch // world_size} images of "
            "each process: take a divisor."
        )


def for_world(config: Config, world_size: int) -> Config:
    """The settings for another number of processes than a recipe is written for.

    Args:
        config: the settings; they stay as they are.
        world_size: processes on all machines.

    Raises:
        UserError: see :func:`zoo_common.elastic.scaled` and ``batch_for`` there.
    """
    scaled, share = elastic.scaled(config, world_size)
    scaled.data.batch_size = elastic.batch_for(config.data.batch_size, share)
    solver = scaled.solver
    solver.base_lr *= float(share)
    solver.max_iter = elastic.steps_for(solver.max_iter, share)
    solver.steps = [elastic.steps_for(fall, share) for fall in solver.steps]
    solver.warmup_iters = elastic.steps_for(solver.warmup_iters, share)
    solver.checkpoint_every = elastic.steps_for(solver.checkpoint_every, share)
    scaled.evaluate.every = elastic.steps_for(scaled.evaluate.every, share)
    return scaled


def _check_model(config: Config) -> None:
    if config.model.depth not in (50, 101):
        raise UserError(f"model.depth must be 50 or 101, but is {config.model.depth}.")
    for name, values, count in (
        ("model.pixel_mean", config.model.pixel_mean, 3),
        ("model.pixel_std", config.model.pixel_std, 3),
        ("rpn.delta_weights", config.rpn.delta_weights, 4),
        ("box_head.delta_weights", config.box_head.delta_weights, 4),
        ("anchors.sizes", config.anchors.sizes, LEVELS),
    ):
        if len(values) != count:
            raise UserError(f"{name} must have {count} entries, but has {len(values)}: {values}.")
    sizes, ratios = config.anchors.sizes, config.anchors.aspect_ratios
    if not ratios or len({len(level) for level in sizes}) != 1 or not sizes[0]:
        raise UserError(
            "anchors.sizes must have as many sizes on each level, one at least, and "
            f"anchors.aspect_ratios one at least, but they are {sizes} and {ratios}."
        )
    if config.rpn.iou_low > config.rpn.iou_high:
        raise UserError(
            f"rpn.iou_low={config.rpn.iou_low} must not exceed rpn.iou_high={config.rpn.iou_high}."
        )
    for name, part in (("rpn", config.rpn), ("roi", config.roi)):
        if int(part.samples * part.positive_fraction) < 1:
            raise UserError(
                f"{name}.samples={part.samples} times {name}.positive_fraction="
                f"{part.positive_fraction} leaves no place for foreground: raise one of them."
            )
    _check_groups(config)
    if not config.box_head.num_fc + config.box_head.num_conv:
        raise UserError("box_head needs a layer: set box_head.num_fc or box_head.num_conv.")


def _check_groups(config: Config) -> None:
    """Group normalisation has 32 groups, as in detectron2."""
    model = config.model
    resnet = {
        "model.stem_channels": model.stem_channels,
        "model.res2_channels": model.res2_channels,
        "model.num_groups times model.width_per_group": model.num_groups * model.width_per_group,
    }
    for norm, channels in (
        (model.norm, resnet),
        (model.fpn_norm, {"model.fpn_channels": model.fpn_channels}),
        (config.box_head.norm, {"box_head.conv_dim": config.box_head.conv_dim}),
        (config.mask_head.norm, {"mask_head.conv_dim": config.mask_head.conv_dim}),
    ):
        for name, count in channels.items():
            if norm == "GN" and count % 32:
                raise UserError(f"{name}={count} must be a multiple of 32 for norm GN.")


def _check_data(data: DataConfig) -> None:
    check_sizes(data)
    if data.size_sampling == "range" and (
        len(data.min_sizes) != 2 or data.min_sizes[0] > data.min_sizes[1]
    ):
        raise UserError(
            "data.size_sampling=range needs the smallest and the largest of data.min_sizes, "
            f"but they are {data.min_sizes}."
        )


def _check_start(config: Config) -> None:
    """Weights of another depth would fit in part, and do harm unseen."""
    named = re.fullmatch(r"R-(\d+)\.pkl", PurePath(config.weights.start).name)
    if named and int(named[1]) != config.model.depth:
        raise UserError(
            f"weights.start={config.weights.start} is no ResNet of model.depth="
            f"{config.model.depth}: give R-{config.model.depth}.pkl (MODEL.WEIGHTS)."
        )


def config_from_detectron2(cfg: Mapping[str, Any]) -> Config:
    """The settings that a config of detectron2 stands for.

    Args:
        cfg: nested, all of it or a part, with plain values, as detectron2 writes it to YAML. Data
            sets and keys that detectron2 does not have are passed over.

    Raises:
        UserError: it describes a network or a training that is not built here.
    """
    assignments = [
        Assignment(name, str(value), name)
        for name, value in flatten(cfg)
        if name in CARD_KEYS and not name.startswith("DATASETS.")
    ]
    return build_config(Config, [], assignments, CARD_OPTIONS)
