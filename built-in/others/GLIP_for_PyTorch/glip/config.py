"""The settings of a GLIP run, with the card's option names.

Defaults are those by which microsoft/GLIP (9dda955) fine-tunes GLIP-T on COCO: its config
glip_Swin_T_O365_GoldG.yaml with the settings of its README's command. configs/*.yaml say what
another run sets otherwise. What upstream's names for settings mean stands in glip.upstream_keys.
No torch here: help texts come at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glip.bert import find_bert
from glip.upstream_keys import CARD_KEYS, settings_of
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

STAGES = 4  # of the Swin Transformer
GROUPS = 16  # of group normalisation in the tower


@dataclass
class ModelConfig:
    """Backbone, pyramid, language and tower, and what they are fed."""

    swin_width: int = setting(
        96, "channels of the Swin Transformer's first stage; each next has twice", at_least=1
    )
    swin_depths: list[int] = setting([2, 2, 6, 2], "blocks of each stage", at_least=1)
    swin_heads: list[int] = setting([3, 6, 12, 24], "attention heads of each stage", at_least=1)
    swin_window: int = setting(7, "side of an attention window, in cells", at_least=1)
    drop_path: float = setting(
        0.2, "probability that the last block's branch is left out", at_least=0, at_most=0.99
    )
    drop_block: float = setting(
        0.3, "probability of the noise in the feature pyramid", at_least=0, at_most=0.99
    )
    channels: int = setting(256, "channels of the feature pyramid and of the tower", at_least=1)
    tower_blocks: int = setting(6, "blocks of the tower", at_least=1)
    fusion: bool = setting(
        True, "image and words attend to one another in each block; false: GLIP-T (A)"
    )
    fusion_width: int = setting(2048, "inner width of that attention", at_least=1)
    fusion_heads: int = setting(8, "its heads", at_least=1)
    fusion_dropout: float = setting(0.1, "its dropout", at_least=0, at_most=0.99)
    bert: str = setting(
        "bert-base-uncased",
        "directory of BERT: config.json, vocab.txt or tokenizer.json, and its weights if none of "
        "GLIP are given; also looked for in the model's directory, in data.path and beside it",
        kind="path",
    )
    max_tokens: int = setting(256, "tokens of a caption, [CLS] and [SEP] among them", at_least=3)
    pixel_mean: list[float] = setting(
        [103.53, 116.28, 123.675], "mean of each channel, 0..255, blue first"
    )
    pixel_std: list[float] = setting(
        [57.375, 57.12, 58.395], "what each channel is divided by, blue first", more_than=0
    )
    static_shapes: str = setting(
        "auto", "a fixed set of tensor shapes; auto: on npu and cuda", choices=("auto", "on", "off")
    )


@dataclass
class LossConfig:
    """What is minimised."""

    alpha: float = setting(
        0.25, "weight of positives in the tokens' focal loss", at_least=0, at_most=1
    )
    gamma: float = setting(2.0, "exponent of that loss", at_least=0)
    box_weight: float = setting(2.0, "weight of the boxes' GIoU loss", at_least=0)
    candidates: int = setting(
        9, "anchors of each level, nearest to a box, that ATSS looks at", at_least=1
    )
    no_object: bool = setting(
        True,
        "anchors without a box learn the caption's last token, as microsoft/GLIP; false: none, "
        "as mmdet",
    )


@dataclass
class TestConfig:
    """How predictions are cleaned up."""

    __test__ = False  # its name makes pytest take it for a test
    score_thr: float = setting(0.05, "smallest class score of an anchor", at_least=0, at_most=1)
    nms_pre: int = setting(1000, "best pairs of anchor and class of each level", at_least=1)
    nms_thr: float = setting(0.6, "IoU from which on NMS removes", at_least=0, at_most=1)
    max_per_img: int = setting(100, "most objects of an image", at_least=1)
    rank_by: str = setting(
        "score_centerness",
        "by what the best are found: score times centerness, as microsoft/GLIP, or score, as mmdet",
        choices=("score_centerness", "score"),
    )
    legacy_nms: bool = setting(
        True,
        "sides of boxes are x2 - x1 + 1 in NMS, as in microsoft/GLIP; false: x2 - x1, as in mmdet, "
        "and boxes of one row or column are dropped",
    )


@dataclass
class DataConfig(DetectionData):
    """Images, their annotations, and what is done to them."""

    path: str = setting("coco", "COCO directory, or sample", kind="path")
    grounding_json: str = setting(
        "",
        "phrases with boxes (MDETR's JSON) to train on beside train_json, which may be empty then; "
        "from data.path",
    )
    grounding_images: str = setting(
        "", "directory of their images, from data.path; empty: train_images"
    )
    batch_size: int = setting(8, "images a step over all cards together", at_least=1)
    shuffle_classes: bool = setting(
        False, "class names stand in a new order in each training caption"
    )
    negatives: int = setting(
        -1,
        "most classes in a training caption that its image does not have; -1: all classes",
        at_least=-1,
    )
    min_sizes: list[int] = setting(
        [480, 560, 640, 720, 800], "short sides in pixels that training resizes to", at_least=1
    )


@dataclass
class SolverConfig:
    """How weights move, and how long. A step is one batch of data.batch_size images."""

    base_lr: float = setting(
        1e-5, "learning rate of all but BERT after warm-up, used as it is", more_than=0
    )
    lang_lr: float = setting(1e-5, "learning rate of BERT after warm-up", more_than=0)
    backbone_lr_factor: float = setting(
        1.0, "factor on the rate of the Swin Transformer", at_least=0
    )
    bias_lr_factor: float = setting(2.0, "factor on the rate of biases", at_least=0)
    weight_decay: float = setting(1e-4, "decay of weights", at_least=0)
    weight_decay_bias: float = setting(0.0, "decay of biases", at_least=0)
    weight_decay_norm_factor: float = setting(
        1.0, "factor on the decay of normalisation weights", at_least=0
    )
    max_epoch: int = setting(
        24, "passes over the training data that the rate is planned for; 0: max_iter", at_least=0
    )
    max_iter: int = setting(
        40000, "steps that the rate is planned for where max_epoch is 0", at_least=1
    )
    early_stop: int = setting(
        0, "stop after this many steps, with evaluation; 0: where the plan ends", at_least=0
    )
    steps: list[float] = setting(
        [0.67, 0.89],
        "where the rate falls: shares of the plan, or steps if 1 or more",
        more_than=0,
    )
    gamma: float = setting(0.1, "factor on the rate at each of them", more_than=0)
    warmup_iters: int = setting(2000, "steps of warm-up", at_least=0)
    warmup_factor: float = setting(0.001, "share of the rate at its start", at_least=0)
    warmup_method: str = setting("linear", "course of the warm-up", choices=("linear", "constant"))
    ema: float = setting(
        0.999, "share of the average of all weights that a step keeps; 0: no average", at_least=0
    )
    checkpoint_every: int = setting(2500, "steps between checkpoints", at_least=1)


@dataclass
class EvaluateConfig:
    """When and how the held-out images are searched for objects."""

    every: int = setting(0, "steps between evaluations; 0: none before the end", at_least=0)
    at_end: bool = setting(True, "evaluate after the last step")
    batch_size: int = setting(1, "images per card and step", at_least=1)
    ema: bool = setting(False, "score the average of the weights instead of the weights")
    chunk: int = setting(
        0, "classes that a caption holds; 0: as many as its tokens allow", at_least=0
    )
    shuffle_words: bool = setting(
        False, "call each class by another's name: what a model scores that reads no words"
    )
    write_results: bool = setting(True, "write the detections in COCO's results format")


@dataclass
class WeightsConfig:
    """Weights to start from."""

    start: str = setting(
        "glip_tiny_model_o365_goldg_cc_sbu.pth",
        "weights that training starts from, of GLIP or of the Swin Transformer alone: a .pth "
        "file, its address, or its bare name, which is looked for in data.path, beside it, in "
        "pretrained there, in the model's directory and in pretrain there; empty: random",
        kind="weights",
    )
    url: str = setting(
        "", "address that weights.start is fetched from if it is nowhere; empty: the published one"
    )
    sha256: str = setting("", "checksum that weights.start must have; empty: not checked")
    checkpoint: str = setting(
        "",
        "trained weights for evaluation and prediction, named as weights.start is",
        kind="weights",
    )


@dataclass
class Config:
    """All settings."""

    model: ModelConfig = section(ModelConfig)
    loss: LossConfig = section(LossConfig)
    test: TestConfig = section(TestConfig)
    data: DataConfig = section(DataConfig)
    solver: SolverConfig = section(SolverConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    weights: WeightsConfig = section(WeightsConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


CARD_OPTIONS: CardOptions = {
    "--checkpoint": "weights.checkpoint",
    "--weight": "weights.checkpoint",
    "--override_output_dir": "run.output_dir",
    "--work_dir": "run.output_dir",
    "--fp16": "precision.opt_level=O1",
    "--skip-test": "evaluate.at_end=false",
    **CARD_KEYS,
}

WEIGHT_ADDRESSES = {
    f"glip_{name}.pth": f"https://huggingface.co/GLIPModel/GLIP/resolve/main/glip_{name}.pth"
    for name in (
        "a_tiny_o365",
        "tiny_model_o365",
        "tiny_model_o365_goldg",
        "tiny_model_o365_goldg_cc_sbu",
    )
}
"""Where published weights are, by their bare name: GLIP-T (A), (B), (C) and GLIP-T."""


def check(config: Config, world_size: int, kind: str) -> None:
    """Tells settings that do not fit one another; the launcher calls it before it starts.

    Args:
        config: the settings.
        world_size: processes on all machines.
        kind: ``acc``, ``perf`` or ``eval``, see zoo_common.runs; ``eval`` trains nothing.

    Raises:
        UserError: the message names the settings.
    """
    _check_model(config.model)
    check_sizes(config.data)
    if kind == "eval":
        return
    _check_solver(config.solver)
    if config.evaluate.ema and not config.solver.ema:
        raise UserError(
            "evaluate.ema=true needs an average of the weights: set solver.ema, as to 0.999."
        )
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
    solver.lang_lr *= float(share)
    solver.max_iter = elastic.steps_for(solver.max_iter, share)
    solver.early_stop = elastic.steps_for(solver.early_stop, share)
    solver.steps = [
        fall if fall < 1 else elastic.steps_for(int(fall), share) for fall in solver.steps
    ]
    solver.warmup_iters = elastic.steps_for(solver.warmup_iters, share)
    solver.ema = elastic.average_for(solver.ema, share)
    solver.checkpoint_every = elastic.steps_for(solver.checkpoint_every, share)
    scaled.evaluate.every = elastic.steps_for(scaled.evaluate.every, share)
    return scaled


def _check_model(model: ModelConfig) -> None:
    lists: dict[str, tuple[Sequence[Any], int]] = {
        "model.swin_depths": (model.swin_depths, STAGES),
        "model.swin_heads": (model.swin_heads, STAGES),
        "model.pixel_mean": (model.pixel_mean, 3),
        "model.pixel_std": (model.pixel_std, 3),
    }
    for name, (values, count) in lists.items():
        if len(values) != count:
            raise UserError(f"{name} must have {count} entries, but has {len(values)}: {values}.")
    for stage, heads in enumerate(model.swin_heads):
        width = model.swin_width * 2**stage
        if width % heads:
            raise UserError(
                f"model.swin_heads={model.swin_heads} must divide the channels of their stages, "
                f"but stage {stage + 1} has {width}."
            )
    if model.channels % GROUPS:
        raise UserError(
            f"model.channels={model.channels} must be a multiple of {GROUPS}, the groups of the "
            "tower's normalisation."
        )
    if model.fusion and model.fusion_width % model.fusion_heads:
        raise UserError(
            f"model.fusion_heads={model.fusion_heads} must divide model.fusion_width="
            f"{model.fusion_width}."
        )


def _check_solver(solver: SolverConfig) -> None:
    if solver.steps != sorted(solver.steps):
        raise UserError(f"solver.steps must rise, but is {solver.steps}: sort it.")
    if solver.ema >= 1:
        raise UserError(f"solver.ema={solver.ema:g} would never move: take less than 1.")


def check_files(config: Config, kind: str) -> None:
    """Tells what a run needs beside its data set and has not; the launcher calls it.

    Args:
        config: the settings, with paths that are absolute; that of BERT becomes so.
        kind: as :func:`check`.

    Raises:
        UserError: BERT's directory is nowhere, or lacks a file; no grounding annotations.
    """
    config.model.bert = str(find_bert(config.model.bert, config.data.path).absolute())
    grounding = Path(config.data.path) / config.data.grounding_json
    if kind != "eval" and config.data.grounding_json and not grounding.is_file():
        raise UserError(f"data.grounding_json: there is no file {grounding}: check the path.")


def config_from_upstream(cfg: Mapping[str, Any]) -> Config:
    """The settings that a config of microsoft/GLIP or a model of mmdet 3 stands for.

    Args:
        cfg: microsoft's config, merged or in part, as its YAML holds it; or a model dictionary of
            mmdet, or a config with it, see :func:`glip.upstream_keys.settings_of`. Data sets and
            keys that microsoft/GLIP does not have are passed over.

    Raises:
        UserError: it describes a network or a training that is not built here.
    """
    if "MODEL" in cfg:
        assignments = [
            Assignment(name, str(value), name)
            for name, value in flatten(cfg)
            if name in CARD_KEYS and not name.startswith("DATASETS.T")
        ]
        return build_config(Config, [], assignments, CARD_OPTIONS)
    assignments = [
        Assignment(path, str(value), f"{path} of the model")
        for path, value in settings_of(cfg).items()
    ]
    return build_config(Config, [], assignments)
