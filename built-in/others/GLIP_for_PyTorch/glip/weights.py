"""Weights files of others and our own, and the names that their tensors have here.

Read are: microsoft/GLIP's checkpoints, those of mmdet 3's GLIP, the zoo's own, microsoft's Swin
Transformers for ImageNet, and BERT's weights as transformers writes them. Our names are
microsoft/GLIP's; what its files hold beside them is not used there either: a classifier and
anchors under ``rpn``, and BERT's pooler in some.

mmdet's merging of patches lists the channels of four neighbours by channel and row by row, ours
by neighbour and column by column (tools/model_converters/glip_to_mmdet.py of mmdet turns one into
the other).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from zoo_common import checkpoint
from zoo_common.errors import UserError, one_line
from zoo_common.weights import Content, Kind, Reader, WeightsFile, fill, match

_HEAD = "rpn.head."
_BODY = "backbone.body."
_BERT = "language_backbone.body.model."
_TOWER = f"{_HEAD}dyhead_tower."
_FUSED = re.compile(rf"{re.escape(_TOWER)}\d+\.b_attn\.attn\.v_proj\.weight")
_BLOCK = re.compile(rf"({re.escape(_TOWER)}\d+)\.offset\.weight")

_UNUSED = (f"{_HEAD}cls_logits.", "rpn.anchor_generator.", f"{_BERT}pooler.")
_CONSTANTS = (f"{_BERT}embeddings.position_ids", f"{_BERT}embeddings.token_type_ids")

_FROM_MMDET = (
    (r"^backbone\.stages\.", f"{_BODY}layers."),
    (r"^backbone\.(patch_embed\.|norm\d)", rf"{_BODY}\1"),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^neck\.lateral_convs\.0\.conv\.", "backbone.fpn.fpn_inner2."),
    (r"^neck\.lateral_convs\.1\.conv\.", "backbone.fpn.fpn_inner3."),
    (r"^neck\.lateral_convs\.2\.conv\.", "backbone.fpn.fpn_inner4."),
    (r"^neck\.fpn_convs\.0\.conv\.", "backbone.fpn.fpn_layer2."),
    (r"^neck\.fpn_convs\.1\.conv\.", "backbone.fpn.fpn_layer3."),
    (r"^neck\.fpn_convs\.2\.conv\.", "backbone.fpn.fpn_layer4."),
    (r"^neck\.fpn_convs\.3\.conv\.", "backbone.fpn.top_blocks.p6."),
    (r"^neck\.fpn_convs\.4\.conv\.", "backbone.fpn.top_blocks.p7."),
    (r"^bbox_head\.head\.", _HEAD),
    (r"\.dyconvs\.", ".DyConv."),
    (r"\.attnconv\.", ".AttnConv."),
    (r"^language_model\.language_backbone\.", "language_backbone."),
)
"""Patterns in names of mmdet, and what stands here in their places; all that fit count in turn."""

_BERT_FILES = ("model.safetensors", "pytorch_model.bin")


def from_mmdet(name: str) -> str:
    """Our name of a tensor of mmdet's GLIP."""
    ours = name
    for pattern, replacement in _FROM_MMDET:
        ours = re.sub(pattern, replacement, ours)
    return ours


def from_microsoft(name: str) -> str | None:
    """Our name of a tensor of microsoft/GLIP: its own; None for what is not used there."""
    if name in _CONSTANTS:
        return ""
    return None if name.startswith(_UNUSED) else name


def reorder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of mmdet, under our names, in our order of channels and of our shapes."""
    found = dict(tensors)
    for name, value in tensors.items():
        if ".downsample." in name:
            split = value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]
            found[name] = split.transpose(-1, -2).flatten(-2)
        elif name.startswith(f"{_HEAD}scales."):
            found[name] = value.view(1)
    return found


def _finish_mmdet(file: WeightsFile) -> None:
    file.tensors = reorder(file.tensors)


def _from_mmdet_file(name: str) -> str | None:
    return from_microsoft(from_mmdet(name))


def _from_swin(name: str) -> str | None:
    """Our name of a tensor of a Swin Transformer; None for its classifier and the norm before."""
    if name.endswith(".attn_mask"):
        return ""
    return None if name.startswith(("head.", "norm.")) else f"{_BODY}{name}"


def _from_bert(name: str) -> str | None:
    """Our name of a tensor of BERT; None for the parts that its pre-training alone needs."""
    ours = name.removeprefix("bert.")
    if ours.startswith(("cls.", "pooler.")):
        return None
    # As the first of its files name them.
    ours = ours.replace(".LayerNorm.gamma", ".LayerNorm.weight")
    ours = ours.replace(".LayerNorm.beta", ".LayerNorm.bias")
    return from_microsoft(f"{_BERT}{ours}")


def _shape_settings(names: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that stand in the names and shapes of a GLIP's tensors, given under ours."""
    fused = [name for name in names if _FUSED.fullmatch(name)]
    settings: dict[str, Any] = {
        "fusion": bool(fused),
        "tower_blocks": sum(_BLOCK.fullmatch(name) is not None for name in names),
    }
    if fused:
        settings["fusion_width"] = len(names[fused[0]])
    for setting, name in (
        ("swin_width", f"{_BODY}patch_embed.proj.weight"),
        ("channels", "backbone.fpn.fpn_inner2.weight"),
    ):
        if name in names:
            settings[setting] = len(names[name])
    return settings


def _settings(content: Content) -> dict[str, Any]:
    return _shape_settings(content.weights)


def _mmdet_settings(content: Content) -> dict[str, Any]:
    return _shape_settings({from_mmdet(name): value for name, value in content.weights.items()})


def _zoo_settings(content: Content) -> dict[str, Any]:
    """By the config that a run has written down, what shapes do not tell too."""
    recorded = content.recorded("pixel_mean", "pixel_std", "swin_heads", "swin_window")
    return recorded | content.recorded("fusion_heads") | _settings(content)


_LANGUAGE_BIAS = "bias_lang"

_READER = Reader(
    kinds=(
        Kind(
            "zoo",
            lambda content: (
                content.is_zoo_checkpoint and f"{_HEAD}{_LANGUAGE_BIAS}" in content.weights
            ),
            from_microsoft,
            settings=_zoo_settings,
        ),
        Kind(
            "microsoft/GLIP",
            lambda content: f"{_HEAD}{_LANGUAGE_BIAS}" in content.weights,
            from_microsoft,
            settings=_settings,
        ),
        Kind(
            "mmdet",
            lambda content: f"bbox_head.head.{_LANGUAGE_BIAS}" in content.weights,
            _from_mmdet_file,
            settings=_mmdet_settings,
            finish=_finish_mmdet,
        ),
        Kind(
            "Swin Transformer",
            lambda content: "layers.0.blocks.0.attn.qkv.weight" in content.weights,
            _from_swin,
            # The norms behind the stages are no part of a classifier.
            fills=f"{_BODY}layers.",
        ),
    ),
    known=(
        "microsoft/GLIP's or mmdet's GLIP, microsoft's Swin Transformer or a checkpoint of this zoo"
    ),
    outputs=(),
    class_layer="",
    background=0,
    network_settings=(
        "model.swin_*, model.channels, model.tower_blocks, model.fusion and model.bert"
    ),
)
read = _READER.read
load_for_evaluation = _READER.load_for_evaluation


def load_start(
    model: nn.Module,
    path: str | Path,
    config: object,
    *,
    bert: Path | None = None,
    full: bool = False,
) -> str:
    """Fills a model with the weights that its training starts from.

    Args:
        model: of our names.
        path: the file.
        config: section ``model`` of the config.
        bert: directory whose weights are taken for language if the file is of a backbone alone.
        full: report every tensor rather than counts and examples.

    Returns:
        What was loaded, renamed, missing or left over.

    Raises:
        UserError: the file cannot be used, belongs to other settings, or is of another network.
    """
    told = _READER.load_start(model, path, config, full=full)
    if bert is None or read(Path(path)).kind != "Swin Transformer":
        return told
    return f"{told}; {start_language(model, bert)}"


def start_language(model: nn.Module, directory: Path) -> str:
    """Fills a model's BERT with the weights that stand in a directory of transformers.

    Args:
        model: of our names.
        directory: with ``model.safetensors`` or ``pytorch_model.bin``; without, nothing is done.

    Returns:
        What was loaded, in words.

    Raises:
        UserError: the file is damaged or refused, or is of another BERT.
    """
    path = next((directory / name for name in _BERT_FILES if (directory / name).is_file()), None)
    if path is None:
        return f"{directory} has no weights of BERT, so that it starts as initialised"
    file = WeightsFile(path, "BERT")
    for name, value in _read_bert(path).items():
        key = _from_bert(name)
        if key is None:
            file.left_over.append(name)
        elif key:
            file.tensors[key], file.names[key] = value, name
    fit = match(file, model)
    wrong = [key for key in fit.missing if key.startswith(_BERT)] + list(fit.other_shape)
    wrong += [name for name in fit.left_over if name not in file.left_over]
    if wrong:
        fit.missing = [key for key in fit.missing if key.startswith(_BERT)]
        raise UserError(
            f"{path} holds the weights of another BERT than the config.json beside it "
            f"({fit.describe()}): put the files of one BERT there."
        )
    fit.missing = []  # of what is no language
    fill(model, fit)
    return fit.describe()


def _read_bert(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        weights = checkpoint.load(path)["model"]
        return {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): get a whole file.") from error
