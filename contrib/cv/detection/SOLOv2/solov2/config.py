"""The settings of a SOLOv2 run, with the card's option names.

Defaults are those of WXinlong/SOLO's configs/solov2/solov2_r50_fpn_8gpu_1x.py at 95f3732d;
configs/*.yaml say what another published run sets otherwise. What the original's option names and
config dictionaries mean stands in solov2.upstream_keys. No torch here: help texts come at once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from solov2.upstream_keys import CARD_KEYS, settings_of
from zoo_common import elastic
from zoo_common.config import (
    CardOptions,
    LaunchConfig,
    PrecisionConfig,
    RunConfig,
    build_config,
    section,
    setting,
)
from zoo_common.detection.settings import DetectionData, check_sizes
from zoo_common.errors import UserError
from zoo_common.options import Assignment

DEPTHS = (18, 34, 50, 101)
LEVELS = 5  # of the pyramid; each has a grid
GROUPS = 32  # of group normalisation


@dataclass
class ModelConfig:
    """Backbone and pyramid, and what they are fed."""

    depth: int = setting(50, "layers of the ResNet: 18, 34, 50 or 101", at_least=18, at_most=101)
    stem_channels: int = setting(64, "channels behind the first convolution", at_least=1)
    base_channels: int = setting(
        64, "width of the ResNet's first stage; each next has twice", at_least=1
    )
    fpn_channels: int = setting(256, "channels of the feature pyramid", at_least=1)
    frozen_stages: int = setting(
        1,
        "stages that are not trained; -1: none, 0: the stem, 1: and the first stage, ...",
        at_least=-1,
        at_most=4,
    )
    norm: str = setting(
        "BN",
        "normalisation of the ResNet; BN: its statistics stay as loaded, its weights are trained",
        choices=("BN", "GN"),
    )
    deformable: str = setting(
        "",
        "deformable 3x3 convolutions in stages 2 to 4; v2: with modulation",
        choices=("", "v1", "v2"),
    )
    num_classes: int = setting(0, "classes; 0: as many as the data set has", at_least=0)
    pixel_mean: list[float] = setting(
        [123.675, 116.28, 103.53], "mean of each channel, 0..255, red first"
    )
    pixel_std: list[float] = setting(
        [58.395, 57.12, 57.375], "what each channel is divided by, red first", more_than=0
    )
    static_shapes: str = setting(
        "auto", "a fixed set of tensor shapes; auto: on npu and cuda", choices=("auto", "on", "off")
    )


@dataclass
class HeadConfig:
    """Grids, towers and the mask branch."""

    stacked_convs: int = setting(4, "3x3 convolutions in each tower", at_least=1)
    channels: int = setting(512, "their channels", at_least=1)
    kernel_channels: int = setting(
        256, "channels of a cell's kernel and of the mask features", at_least=1
    )
    grids: list[int] = setting(
        [40, 36, 24, 16, 12], "cells along a side of each level's grid, finest first", at_least=1
    )
    strides: list[int] = setting(
        [8, 8, 16, 32, 32], "stride of each level in pixels; smaller masks are dropped", at_least=1
    )
    scale_ranges: list[list[float]] = setting(
        [[1.0, 96.0], [48.0, 192.0], [96.0, 384.0], [192.0, 768.0], [384.0, 2048.0]],
        "smallest and largest object of each level: root of its box's area, in pixels",
        at_least=0,
    )
    sigma: float = setting(
        0.2,
        "share of an object's box around its mass centre that makes cells positive",
        more_than=0,
    )
    mask_channels: int = setting(128, "channels inside the mask branch", at_least=1)
    deformable: str = setting("", "deformable convolutions in the towers", choices=("", "v1", "v2"))
    deformable_last_only: bool = setting(False, "in the last of each tower only")
    mask_deformable: str = setting(
        "", "deformable convolutions in the mask branch", choices=("", "v1", "v2")
    )
    pair_slots: list[int] = setting(
        [64, 256, 1024, 4096],
        "places for an image's pairs of cell and object under static shapes; a batch takes the "
        "least that holds its fullest image",
        at_least=1,
    )


@dataclass
class LossConfig:
    """What is minimised."""

    mask_weight: float = setting(3.0, "weight of the masks' dice loss", at_least=0)
    class_weight: float = setting(1.0, "weight of the classes' focal loss", at_least=0)
    gamma: float = setting(2.0, "exponent of the focal loss", at_least=0)
    alpha: float = setting(0.25, "weight of positives in it", at_least=0, at_most=1)
    mask_average: str = setting(
        "pairs",
        "what the dice loss is divided by: pairs of cell and object, as WXinlong/SOLO, or "
        "distinct positive cells, as mmdet",
        choices=("pairs", "cells"),
    )


@dataclass
class InferenceConfig:
    """How predictions are cleaned up."""

    score_thr: float = setting(0.1, "smallest class score of a cell", at_least=0, at_most=1)
    mask_thr: float = setting(0.5, "from it on a pixel is the object's", at_least=0, at_most=1)
    nms_pre: int = setting(500, "best masks of an image before matrix NMS", at_least=1)
    update_thr: float = setting(0.05, "smallest score after matrix NMS", at_least=0, at_most=1)
    kernel: str = setting("gaussian", "decay of matrix NMS", choices=("gaussian", "linear"))
    sigma: float = setting(2.0, "sharpness of the gaussian decay", more_than=0)
    max_per_img: int = setting(100, "most objects of an image", at_least=1)
    candidates: int = setting(
        1000,
        "most pairs of cell and class above score_thr that are looked at under static shapes",
        at_least=1,
    )


@dataclass
class DataConfig(DetectionData):
    """Images, their annotations, and what is done to them."""

    batch_size: int = setting(2, "images a step on each card", at_least=1)
    size_sampling: str = setting(
        "choice",
        "choice: one of min_sizes; range: any side between its two",
        choices=("choice", "range"),
    )


@dataclass
class SolverConfig:
    """How weights move, and how long."""

    base_lr: float = setting(0.01, "learning rate after warm-up, for 8 cards of 2", more_than=0)
    autoscale_lr: bool = setting(False, "multiply the learning rate by processes / 8")
    momentum: float = setting(0.9, "momentum of SGD", at_least=0, at_most=1)
    weight_decay: float = setting(1e-4, "decay of all weights", at_least=0)
    epochs: int = setting(12, "passes over the training data", at_least=1)
    steps: list[int] = setting(
        [9, 11],
        "epochs after which the rate falls; those beyond solver.epochs do nothing",
        at_least=1,
    )
    gamma: float = setting(0.1, "factor on the rate at each of them", more_than=0)
    warmup_iters: int = setting(500, "steps of linear warm-up", at_least=0)
    warmup_ratio: float = setting(0.01, "share of the rate at its start", at_least=0, at_most=1)
    checkpoint_every: int = setting(1, "epochs between checkpoints", at_least=1)
    performance: bool = setting(False, "speed only: a part of the first epoch, and no evaluation")
    performance_steps: int = setting(
        1000, "most steps of such a run; others have whole epochs", at_least=1
    )


@dataclass
class EvaluateConfig:
    """When and how the held-out images are searched for objects."""

    every: int = setting(0, "epochs between evaluations; 0: none before the end", at_least=0)
    at_end: bool = setting(True, "evaluate after the last step")
    batch_size: int = setting(1, "images per card and step", at_least=1)
    write_results: bool = setting(True, "write the detections in COCO's results format")


@dataclass
class WeightsConfig:
    """Weights to start from."""

    start: str = setting(
        "resnet50.pth",
        "weights that training starts from: a .pth file, its address, or its bare name, which is "
        "looked for in data.path, beside it, in pretrained there, and in data/pretrained; "
        "empty: random",
        kind="weights",
    )
    url: str = setting(
        "", "address that weights.start is fetched from if it is nowhere; empty: the published one"
    )
    sha256: str = setting("", "checksum that weights.start must have; empty: not checked")
    checkpoint: str = setting(
        "", "trained weights for evaluation and prediction", kind="checkpoint"
    )


@dataclass
class Config:
    """All settings."""

    model: ModelConfig = section(ModelConfig)
    head: HeadConfig = section(HeadConfig)
    loss: LossConfig = section(LossConfig)
    test: InferenceConfig = section(InferenceConfig)
    data: DataConfig = section(DataConfig)
    solver: SolverConfig = section(SolverConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    weights: WeightsConfig = section(WeightsConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


CARD_OPTIONS: CardOptions = {
    "--opt-level": "precision.opt_level",
    "--apex": "precision.opt_level",
    "--autoscale-lr": "solver.autoscale_lr",
    "--total_epochs": "solver.epochs",
    "--data_root": "data.path",
    "--train_performance": "solver.performance",
    "--steps_per_epoch": "solver.performance_steps",
    "--checkpoint": "weights.checkpoint",
    "--pretrained": "weights.start",
    "--work_dir": "run.output_dir",
    "--interval": "run.log_every",
    **CARD_KEYS,
}

TORCHVISION = "https://download.pytorch.org/models/"

WEIGHT_ADDRESSES = {
    f"resnet{depth}.pth": f"{TORCHVISION}resnet{depth}-{digest}.pth"
    for depth, digest in (
        (18, "5c106cde"),
        (34, "333f7ec4"),
        (50, "19c8e357"),
        (101, "5d3b4d8f"),
    )
}
"""Where torchvision's ImageNet weights are, by the names that the card gives them."""

WEIGHT_ADDRESSES |= {url.rpartition("/")[2]: url for url in WEIGHT_ADDRESSES.values()}

THEIR_CONFIGS = {
    f"solov2_{name.replace('_fpn', '_fpn_8gpu')}.py": f"configs/solov2_{name}.yaml"
    for name in (
        "r50_fpn_1x",
        "r50_fpn_3x",
        "r101_fpn_3x",
        "r101_dcn_fpn_3x",
        "light_448_r18_fpn_3x",
        "light_448_r34_fpn_3x",
        "light_448_r50_fpn_3x",
        "light_512_dcn_r50_fpn_3x",
    )
}
"""The files of WXinlong/SOLO's configs/solov2, and ours with the same recipe."""


def check(config: Config, world_size: int, kind: str) -> None:
    """Tells settings that do not fit one another; the launcher calls it before it starts.

    Args:
        config: the settings.
        world_size: processes on all machines; ``data.batch_size`` is that of each, so any fits.
        kind: ``acc``, ``perf`` or ``eval``, see zoo_common.runs; ``eval`` trains nothing.

    Raises:
        UserError: the message names the settings.
    """
    _check_model(config.model)
    _check_head(config.head)
    _check_data(config.data)
    if kind == "eval":
        return
    _check_start(config)
    steps = config.solver.steps
    if steps != sorted(steps):
        raise UserError(f"solver.steps must rise, but is {steps}: sort it.")
    batch, parts = config.data.batch_size, config.precision.accumulate
    if batch % parts:
        raise UserError(
            f"precision.accumulate={parts} does not divide the {batch} images of each process "
            "(data.batch_size): take a divisor."
        )


def for_world(config: Config, world_size: int) -> Config:
    """The settings for another number of processes than a recipe is written for.

    Lengths are epochs, which follow by themselves, as the rate does under ``autoscale_lr``.

    Args:
        config: the settings; they stay as they are.
        world_size: processes on all machines.

    Raises:
        UserError: see :func:`zoo_common.elastic.scaled`.
    """
    scaled, share = elastic.scaled(config, world_size)
    solver = scaled.solver
    if not solver.autoscale_lr:
        solver.base_lr *= float(share)
    solver.warmup_iters = elastic.steps_for(solver.warmup_iters, share)
    solver.performance_steps = elastic.steps_for(solver.performance_steps, share)
    return scaled


def _check_model(model: ModelConfig) -> None:
    if model.depth not in DEPTHS:
        raise UserError(f"model.depth must be 18, 34, 50 or 101, but is {model.depth}.")
    _check_lengths({"model.pixel_mean": model.pixel_mean, "model.pixel_std": model.pixel_std}, 3)
    if model.norm == "GN":
        _check_groups(
            {
                "model.stem_channels": model.stem_channels,
                "model.base_channels": model.base_channels,
            }
        )


def _check_head(head: HeadConfig) -> None:
    levels: dict[str, Sequence[Any]] = {
        "head.grids": head.grids,
        "head.strides": head.strides,
        "head.scale_ranges": head.scale_ranges,
    }
    _check_lengths(levels, LEVELS)
    for pair in head.scale_ranges:
        if len(pair) != 2 or pair[0] > pair[1]:
            raise UserError(
                f"head.scale_ranges holds {pair}: a range is [smallest, largest], in pixels."
            )
    _check_groups(
        {
            "head.channels": head.channels,
            "head.kernel_channels": head.kernel_channels,
            "head.mask_channels": head.mask_channels,
        }
    )
    if head.deformable_last_only and not head.deformable:
        raise UserError(
            "head.deformable_last_only=true says nothing without head.deformable: set that to v1 "
            "or v2."
        )
    if not head.pair_slots or head.pair_slots != sorted(set(head.pair_slots)):
        raise UserError(
            f"head.pair_slots must hold rising counts, one at least, but is {head.pair_slots}."
        )


def _check_lengths(lists: Mapping[str, Sequence[Any]], count: int) -> None:
    for name, values in lists.items():
        if len(values) != count:
            raise UserError(f"{name} must have {count} entries, but has {len(values)}: {values}.")


def _check_groups(channels: Mapping[str, int]) -> None:
    """Group normalisation has 32 groups everywhere, as in the original."""
    for name, count in channels.items():
        if count % GROUPS:
            raise UserError(
                f"{name}={count} must be a multiple of {GROUPS}, the groups of its normalisation."
            )


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
    named = re.fullmatch(r"resnet(\d+)(-\w+)?\.pth", PurePath(config.weights.start).name)
    if named and int(named[1]) != config.model.depth:
        raise UserError(
            f"weights.start={config.weights.start} is no ResNet of model.depth="
            f"{config.model.depth}: give resnet{config.model.depth}.pth (--pretrained)."
        )


def config_from_upstream(cfg: Mapping[str, Any]) -> Config:
    """The settings that a model dictionary of WXinlong/SOLO or of mmdet 3 stands for.

    Args:
        cfg: see :func:`solov2.upstream_keys.settings_of`.

    Raises:
        UserError: it describes a network that is not built here, or lacks a key.
    """
    assignments = [
        Assignment(path, str(value), f"{path} of the model")
        for path, value in settings_of(cfg).items()
    ]
    return build_config(Config, [], assignments)
