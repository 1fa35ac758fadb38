"""The settings of a DeCLIP run, with the card's option names.

Defaults are those of the card's run, Sense-GVT/DeCLIP's yfcc15m_vit_declip at 9d9e25da, but for
``loss.contrast_masked`` and ``loss.queue_wrap``, which are what the paper says; configs/*.yaml say
what the published recipes set otherwise. What the original's configs call a setting stands in
declip.upstream_keys. No torch here: help texts come at once.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from declip.upstream_keys import CARD_KEYS, assignments_of
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
from zoo_common.errors import UserError
from zoo_common.runs import CALLER_VARIABLE

RESNET_STRIDE = 32  # pixels of the input to one of a ResNet's last map
SPECIAL_TOKENS = 2  # start and end of a row


@dataclass
class ModelConfig:
    """The two towers, and what DeCLIP puts behind the image's."""

    objective: str = setting(
        "declip",
        "declip: all four losses, on two views; clip: the contrastive one, on one view",
        choices=("declip", "clip"),
    )
    tower: str = setting("vit", "image tower", choices=("vit", "resnet"))
    embed_dim: int = setting(512, "width of the features of images and texts", at_least=1)
    input_size: int = setting(224, "side of the image tower's input in pixels", at_least=1)
    image_width: int = setting(
        768, "width of the image tower: of a ViT's tokens, or of a ResNet's stem", at_least=1
    )
    image_layers: int = setting(12, "blocks of a ViT", at_least=1)
    image_heads: int = setting(
        12,
        "attention heads of the image tower: of each block, or of a ResNet's pooling",
        at_least=1,
    )
    patch: int = setting(32, "side of a ViT's patch in pixels", at_least=1)
    image_depths: list[int] = setting([3, 4, 6, 3], "blocks of a ResNet's four stages", at_least=1)
    context_length: int = setting(
        77, "tokens of a text, start and end among them", at_least=SPECIAL_TOKENS + 1
    )
    text_width: int = setting(512, "width of the text tower", at_least=1)
    text_layers: int = setting(12, "its blocks", at_least=1)
    text_heads: int = setting(8, "its attention heads", at_least=1)
    projector_width: int = setting(
        1024, "width of SimSiam's projector and of its output", at_least=1
    )
    predictor_width: int = setting(512, "width inside SimSiam's predictor", at_least=1)
    sync_batch_norm: int = setting(
        1,
        "processes that share the statistics of a ResNet's batch normalisation; 1: each has its "
        "own, 0 or more than there are: all",
        at_least=0,
    )
    recompute: str = setting(
        "auto",
        "make outputs of a ResNet's norms anew in the backward pass: less memory, more time; "
        "auto: on a CPU",
        choices=("auto", "on", "off"),
    )
    static_shapes: str = setting(
        "auto", "a fixed set of tensor shapes; auto: on npu and cuda", choices=("auto", "on", "off")
    )


@dataclass
class LossConfig:
    """What is minimised."""

    clip: float = setting(0.4, "weight of the contrastive loss", at_least=0)
    nn_text: float = setting(
        0.2, "weight of the same towards each text's nearest neighbour; 0: none", at_least=0
    )
    simsiam: float = setting(0.2, "weight of the likeness of an image's two views", at_least=0)
    masked_language: float = setting(0.2, "weight of masked language modelling", at_least=0)
    contrast_masked: bool = setting(
        False, "the contrastive loss sees the masked caption, as in the original, not the whole one"
    )
    queue_size: int = setting(65536, "texts among which neighbours are looked for", at_least=1)
    queue_wrap: bool = setting(
        True, "texts beyond the queue's end go to its start; false: are dropped, as in the original"
    )
    scale_min: float = setting(3.0, "least logarithm of the logits' scale")
    scale_max: float = setting(6.0, "largest logarithm of the logits' scale")


@dataclass
class TextConfig:
    """Captions and what is done to them in training."""

    vocabulary: str = setting(
        "",
        "merges of the tokenizer: bpe_simple_vocab_16e6.txt.gz or a file of its form; empty: that "
        "in the data directory, or open_clip's",
        kind="path",
    )
    eda: bool = setting(True, "a second form of each caption, with words swapped, lost or replaced")
    synonyms: bool = setting(
        True, "replace words by synonyms among that; needs nltk's wordnet and stopwords"
    )
    mask_probability: float = setting(
        0.15, "share of tokens that are masked", more_than=0, at_most=1
    )


@dataclass
class DataConfig:
    """Pairs of image and caption, and what is done to the images in training."""

    path: str = setting("", "YFCC15M directory, pattern of .tar shards, or sample", kind="path")
    val_path: str = setting(
        "", "directory of val_official.json and imagenet_val; empty: data.path", kind="path"
    )
    batch_size: int = setting(128, "images per card and step", at_least=1)
    workers: int = setting(
        8, "loader processes per card, at most its share of the cores; 0: none", at_least=0
    )
    max_damaged: float = setting(
        0.01,
        "share of damaged pairs that ends the run, once 1,000 were read",
        at_least=0,
        at_most=1,
    )
    crop_min: float = setting(
        0.2, "smallest share of an image that is cut out", more_than=0, at_most=1
    )
    color_jitter: float = setting(
        0.4, "range of brightness, contrast and saturation, each way", at_least=0, at_most=1
    )
    hue: float = setting(0.1, "range of the hue, each way", at_least=0, at_most=0.5)
    jitter_probability: float = setting(
        0.8, "share of views whose colours change", at_least=0, at_most=1
    )
    gray: float = setting(0.2, "share of views without colours", at_least=0, at_most=1)
    blur: float = setting(0.5, "share of blurred views", at_least=0, at_most=1)
    flip: float = setting(0.5, "share of mirrored views", at_least=0, at_most=1)


@dataclass
class OptimizerConfig:
    """How weights move: AdamW, a linear warm-up, and half a cosine."""

    lr: float = setting(1e-4, "learning rate at the start of warm-up", at_least=0)
    peak_lr: float = setting(1e-3, "learning rate after warm-up", more_than=0)
    min_lr: float = setting(0.0, "learning rate at the end", at_least=0)
    warmup_steps: int = setting(2500, "steps of warm-up", at_least=0)
    weight_decay: float = setting(
        0.1, "decay of all weights but those of norms, biases and the scale", at_least=0
    )
    beta1: float = setting(0.9, "AdamW's memory of gradients", at_least=0, at_most=0.99999)
    beta2: float = setting(0.98, "AdamW's memory of their squares", at_least=0, at_most=0.99999)
    eps: float = setting(1e-8, "AdamW's epsilon", more_than=0)


@dataclass
class ScheduleConfig:
    """How long."""

    steps: int = setting(128001, "optimizer steps of the whole run", at_least=1)
    save_every: int = setting(1000, "steps between checkpoints; 0: only at the end", at_least=0)


@dataclass
class EvaluateConfig:
    """When and how the held-out images are classified."""

    every: int = setting(2000, "steps between evaluations; 0: none before the end", at_least=0)
    at_end: bool = setting(True, "evaluate after the last step")
    batch_size: int = setting(128, "images per card and step", at_least=1)
    prompts: str = setting(
        "imagenet80",
        "imagenet80: CLIP's 80 sentences; one: 'a photo of a {}.'; or a file with a sentence a "
        "line, {} where the class goes",
    )


@dataclass
class WeightsConfig:
    """Weights to start from."""

    start: str = setting(
        "", "checkpoint whose weights training starts from; empty: random", kind="checkpoint"
    )
    checkpoint: str = setting(
        "", "trained weights for evaluation and prediction", kind="checkpoint"
    )


@dataclass
class Config:
    """All settings."""

    model: ModelConfig = section(ModelConfig)
    loss: LossConfig = section(LossConfig)
    text: TextConfig = section(TextConfig)
    data: DataConfig = section(DataConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    weights: WeightsConfig = section(WeightsConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


CARD_OPTIONS: CardOptions = {
    "--perf_only": ("run.max_steps=1000", "evaluate.every=0", "evaluate.at_end=false"),
    "--checkpoint": "weights.checkpoint",
    "--pretrained": "weights.start",
    **CARD_KEYS,
}


def check(config: Config, world_size: int, kind: str) -> None:
    """Tells settings that do not fit one another; the launcher calls it before it starts.

    Args:
        config: the settings.
        world_size: processes on all machines.
        kind: ``acc``, ``perf`` or ``eval``, see zoo_common.runs; ``eval`` trains nothing.

    Raises:
        UserError: the message names the settings.
    """
    _check_towers(config.model)
    if kind == "eval":
        return
    _check_objective(config)
    warmup, steps = config.optimizer.warmup_steps, config.schedule.steps
    if warmup >= max(steps, 2):
        raise UserError(
            f"optimizer.warmup_steps={warmup} must be below schedule.steps={steps}: lower the "
            "first, or raise the second (run.max_steps ends a longer schedule early)."
        )
    shared = config.model.sync_batch_norm
    if config.model.tower == "resnet" and 1 < shared < world_size and world_size % shared:
        raise UserError(
            f"model.sync_batch_norm={shared} does not divide the {world_size} processes of the "
            "run into equal groups: take a divisor, or 0 for one group."
        )
    if config.precision.accumulate > 1:
        raise UserError(
            f"precision.accumulate={config.precision.accumulate} would compare the images of a "
            "part with the texts of that part only, which is another loss: leave it at 1, and "
            "take more cards or a smaller --batch_size."
        )


def for_world(config: Config, world_size: int) -> Config:
    """The settings for another number of processes than a recipe is written for.

    Args:
        config: the settings; they stay as they are.
        world_size: processes on all machines.

    Raises:
        UserError: see :func:`zoo_common.elastic.scaled`.
    """
    scaled, share = elastic.scaled(config, world_size)
    optimizer, schedule = scaled.optimizer, scaled.schedule
    optimizer.lr *= float(share)
    optimizer.peak_lr *= float(share)
    optimizer.min_lr *= float(share)
    optimizer.warmup_steps = elastic.steps_for(optimizer.warmup_steps, share)
    schedule.steps = elastic.steps_for(schedule.steps, share)
    schedule.save_every = elastic.steps_for(schedule.save_every, share)
    scaled.evaluate.every = elastic.steps_for(scaled.evaluate.every, share)
    return scaled


def check_files(config: Config, kind: str) -> None:
    """Tells what a run needs beside its data set and has not; the launcher calls it.

    Args:
        config: the settings, with paths that are absolute; that of a file of prompts becomes so.
        kind: as :func:`check`.

    Raises:
        UserError: no vocabulary, or no corpora for synonyms; the message says what to put where.
    """
    from declip.eda import check_synonyms
    from declip.tokenizer import find_vocabulary

    prompts = Path(os.environ.get(CALLER_VARIABLE, ".")) / config.evaluate.prompts
    if prompts.is_file():
        config.evaluate.prompts = str(prompts)
    find_vocabulary(config.text.vocabulary, Path(config.data.val_path or config.data.path))
    if kind != "eval" and config.text.eda and config.text.synonyms:
        check_synonyms()


def _check_towers(model: ModelConfig) -> None:
    if model.tower == "vit":
        _check_divides(
            "model.image_heads", model.image_heads, "model.image_width", model.image_width
        )
        _check_divides("model.patch", model.patch, "model.input_size", model.input_size)
    else:
        if len(model.image_depths) != 4:
            raise UserError(
                f"model.image_depths must have 4 entries, one a stage, but is {model.image_depths}."
            )
        pooled = model.image_width * RESNET_STRIDE
        _check_divides(
            "model.image_heads", model.image_heads, f"{RESNET_STRIDE} * model.image_width", pooled
        )
        if model.input_size % RESNET_STRIDE:
            raise UserError(
                f"model.input_size={model.input_size} must be a multiple of {RESNET_STRIDE}, the "
                "stride of a ResNet."
            )
    _check_divides("model.text_heads", model.text_heads, "model.text_width", model.text_width)


def _check_divides(name: str, part: int, of: str, whole: int) -> None:
    if whole % part:
        raise UserError(f"{name}={part} does not divide {of}={whole}: take a divisor.")


def _check_objective(config: Config) -> None:
    loss = config.loss
    if loss.scale_min > loss.scale_max:
        raise UserError(
            f"loss.scale_min={loss.scale_min} is above loss.scale_max={loss.scale_max}: swap them."
        )
    weights = {
        "loss.clip": loss.clip,
        "loss.nn_text": loss.nn_text,
        "loss.simsiam": loss.simsiam,
        "loss.masked_language": loss.masked_language,
    }
    if not any(weights.values()):
        raise UserError(f"{', '.join(weights)} are all 0: give one of them a weight.")
    if config.model.objective == "declip":
        _check_declip(config)
        return
    extra = [name for name, weight in weights.items() if weight and name != "loss.clip"]
    if extra:
        raise UserError(
            f"model.objective=clip has the contrastive loss only: set {' and '.join(extra)} to 0, "
            "as configs/clip_vitb32.yaml does."
        )
    if config.text.eda:
        raise UserError(
            "model.objective=clip trains on each caption as it is: set text.eda=false, as "
            "configs/clip_vitb32.yaml does."
        )


def _check_declip(config: Config) -> None:
    if not config.text.eda:
        raise UserError(
            "model.objective=declip compares images with two forms of each caption: leave "
            "text.eda=true; text.synonyms=false is what needs no corpora of nltk."
        )
    queue, batch = config.loss.queue_size, config.data.batch_size
    if config.loss.nn_text and queue < batch:
        raise UserError(
            f"loss.queue_size={queue} does not hold the texts of one step: give at least the "
            f"{batch} of --batch_size."
        )


def config_from_upstream(cfg: Mapping[str, Any], mlp_widths: Sequence[int] = (1024, 512)) -> Config:
    """The settings that a config of the original stands for.

    Args:
        cfg: all of a config.yaml, or its ``model`` section alone, with the sections of ``kwargs``
            in it or beside ``type``; a config may have ``clip_simsiam_loss_weight`` beside it.
        mlp_widths: widths inside projector and predictor, which no config of the original holds.

    Raises:
        UserError: it describes a network or a training that is not built here.
    """
    config = build_config(Config, [], assignments_of(cfg), CARD_OPTIONS)
    config.model.projector_width, config.model.predictor_width = mlp_widths
    return config
