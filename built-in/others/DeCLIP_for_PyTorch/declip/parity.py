"""What Sense-GVT/DeCLIP recorded of its networks, computed here: for ``tools/parity.py``.

A case holds a network's configuration, its weights, images, captions with their augmented forms
and the vocabulary, and what upstream made of them: tokens, the output of each stage, logits,
losses, the queue of texts, gradients, one step of AdamW, features of an evaluation. Which words
upstream masked was drawn, so it is taken from the recorded labels; everything else is computed,
in float64 as upstream did, whose numbers were then rounded to float32.

Shape letters: V views, U texts of a caption, B images, T tokens, D features, M masked words, N rows
of the queue.
"""

from __future__ import annotations

import gzip
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from declip.batch import Batch, Masked
from declip.config import Config, LossConfig, config_from_upstream
from declip.losses.contrastive import contrastive_loss
from declip.model import CLIP, DeCLIP, Features, build_model
from declip.objective import Objective
from declip.recipe import build_optimizer, clamp_scale, lr_of_step
from declip.tokenizer import Tokenizer
from zoo_common.errors import UserError, one_line

Tree = dict[str, Any]
Place = tuple[torch.device, torch.dtype]

GIVEN = (
    *("meta", "config", "loss_weights", "adamw", "cosine", "inputs", "bpe_merges", "mlp_widths"),
    *("bank_before", "state_dict", "texts_aug"),
    *("tokens/*/texts", "tokens/*/mask_type", "eval/prompts"),
)
TOLERANCE = 2e-6
FLOAT32_TOLERANCE = 2e-3  # outputs agree to 2e-5, but rounding moves a ReLU and with it gradients

CPU = torch.device("cpu")

LOSSES = {
    "clip_loss": "clip",
    "nn_text": "nn_text",
    "simsiam_loss": "simsiam",
    "masking_language": "masked_language",
}
"""Upstream's names and ours."""

_CHANNELS = 3
_UNMASKED = -100


def compute(
    case: Mapping[str, Any],
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float64,
) -> Tree:
    """What the recorded sections of ``case`` hold, computed here, under the same names.

    Args:
        case: what ``tools/parity.py`` loads.
        device: where to compute.
        dtype: of weights and images.

    Raises:
        UserError: The case lacks an input, or its weights do not fit the model of its config.
    """
    for name in ("config", "state_dict", "inputs", "bpe_merges"):
        if name not in case:
            raise UserError(f"the case has no {name}, so there is nothing to compute from.")
    place = (device, dtype)
    tokenizer = _tokenizer(case["bpe_merges"])
    config = _config(case)
    model = _build(case, config, tokenizer).to(*place)
    tokens = [_tokens(recorded, tokenizer, config) for recorded in _recorded_tokens(case)]
    batch = _batch(case, tokens, tokenizer).to(device)
    result: Tree = {"tokens": tokens}
    if "eval" in case:
        result["eval"] = _evaluate(model.eval(), case, tokenizer, config)
    result |= _train(model.train(), batch, case, config)
    result["lr"] = {
        step: lr_of_step(int(step), config.optimizer, config.schedule.steps)
        for step in case.get("lr", {})
    }
    return result


def _tokenizer(merges: Sequence[str]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "merges.txt.gz"
        file.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode()))
        return Tokenizer(file)


def _config(case: Mapping[str, Any]) -> Config:
    """The settings of a case; widths that no config of upstream's has are as in the weights."""
    weights = case["state_dict"]
    widths = [
        len(weights[name])
        for name in ("projector.linear1.weight", "predictor.linear1.weight")
        if name in weights
    ]
    networks = dict(case["config"])
    sections: Tree = {"model": {"type": networks.pop("type", None), "kwargs": networks}}
    if "loss_weights" in case:
        sections["clip_simsiam_loss_weight"] = case["loss_weights"]
    for name, section in (("adamw", "optimizer"), ("cosine", "lr_scheduler")):
        if name in case:
            sections[section] = {"kwargs": case[name]}
    return config_from_upstream(sections, *([widths] if len(widths) == 2 else []))


def _measured(config: Config) -> LossConfig:
    """The losses with a weight each: upstream's DeCLIP computes those of weight 0, too."""
    if config.model.objective == "clip":
        return config.loss
    absent: Tree = {name: 1.0 for name in LOSSES.values() if not getattr(config.loss, name)}
    return replace(config.loss, **absent)


def _build(case: Mapping[str, Any], config: Config, tokenizer: Tokenizer) -> CLIP:
    model = build_model(config.model, _measured(config), tokenizer.vocab_size)
    try:
        model.load_state_dict(case["state_dict"], strict=True)
    except RuntimeError as error:
        problems = one_line(error, 2000)
        raise UserError(f"the case's state_dict does not fit the model: {problems}") from error
    return model


def _recorded_tokens(case: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The calls of upstream's tokenizer; without a record of them, those of its forward pass."""
    if "tokens" in case:
        recorded: Sequence[Mapping[str, Any]] = case["tokens"]
        return recorded
    captions = [texts[0] for texts in case["inputs"]["captions"]]
    return [{"texts": texts} for texts in (captions, case.get("texts_aug")) if texts]


def _rows(texts: Iterable[str], tokenizer: Tokenizer, config: Config) -> Tensor:
    """Tokens (B, T) of texts, zeros behind the end token."""
    length = config.model.context_length
    rows = [tokenizer.row(text, length) for text in texts]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def _tokens(recorded: Mapping[str, Any], tokenizer: Tokenizer, config: Config) -> Tree:
    """Tokens of texts, with the words masked that were masked in the record."""
    tokens_BT = _rows(recorded["texts"], tokenizer, config)
    labels_BT = recorded.get("labels")
    if labels_BT is None:
        return {"tokens": tokens_BT, "labels": None}
    masked_BT = labels_BT != _UNMASKED
    return {
        "tokens": torch.where(masked_BT, recorded["tokens"], tokens_BT),
        "labels": torch.where(masked_BT, tokens_BT, _UNMASKED),
    }


def _batch(case: Mapping[str, Any], tokens: Sequence[Tree], tokenizer: Tokenizer) -> Batch:
    images = case["inputs"]["images"]
    tokens_UBT = torch.stack([rows["tokens"] for rows in tokens])
    labels_BT = tokens[0]["labels"]
    masked = None
    if labels_BT is not None:
        rows_M, columns_M = (labels_BT != _UNMASKED).nonzero(as_tuple=True)
        masked = Masked(rows_M, columns_M, labels_BT[rows_M, columns_M])
    return Batch(
        images_VBCHW=torch.stack(images.split(_CHANNELS, dim=1)),
        tokens_UBT=tokens_UBT,
        ends_UB=(tokens_UBT == tokenizer.end_id).int().argmax(dim=2),
        masked=masked,
        item_ids=[str(item) for item in range(len(images))],
        damaged=[],
    )


@torch.no_grad()
def _evaluate(model: CLIP, case: Mapping[str, Any], tokenizer: Tokenizer, config: Config) -> Tree:
    """Features of the first views and of sentences, with the weights before the step."""
    weight = model.logit_scale
    tokens_BT = _rows(case["eval"]["prompts"], tokenizer, config)
    ends_B = (tokens_BT == tokenizer.end_id).int().argmax(dim=1)
    images = case["inputs"]["images"][:, :_CHANNELS].to(weight)
    return {
        "image_features": model.image_features(images),
        "text_features": model.caption_features(
            tokens_BT.to(weight.device), ends_B.to(weight.device)
        ),
        "text_tokens": tokens_BT,
    }


def _train(model: CLIP, batch: Batch, case: Mapping[str, Any], config: Config) -> Tree:
    """A training step: what it computes and what it changes."""
    objective = _objective(model, case, config)
    features, stages = _forward(model, batch, case.get("stages", {}))
    outputs, parts = _outputs(features, objective)
    losses = objective(features, batch)
    total = torch.stack([loss for name, loss in losses.items() if getattr(config.loss, name)]).sum()
    optimizer = build_optimizer(model, config.optimizer)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    total.backward()
    result: Tree = {
        "stages": stages,
        "outputs": outputs,
        "clip_parts": parts,
        "losses": {
            theirs: losses[ours].item() / (getattr(config.loss, ours) or 1.0)
            for theirs, ours in LOSSES.items()
            if ours in losses
        },
        "total_loss": total.item(),
        "buffers_after": {name: value.clone() for name, value in model.named_buffers()},
        "grad_norm": {
            name: None if value.grad is None else value.grad.norm().item()
            for name, value in model.named_parameters()
        },
        "optim_groups": _groups(optimizer, case.get("optim_groups", [])),
    }
    if objective.queue is not None:
        result["bank_after"] = objective.queue.rows_ND.T
        result["bank_ptr_after"] = int(objective.queue.position)
    for group in optimizer.param_groups:
        group["lr"] = case.get("adamw", {}).get("lr", config.optimizer.lr)
    clamp_scale(model, optimizer, config.loss)
    optimizer.step()
    clamp_scale(model, optimizer, config.loss)
    result["after_step_delta_norm"] = {
        name: _change(before[name], value, optimizer) for name, value in model.named_parameters()
    }
    return result


def _change(before: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer) -> float | Tree:
    """The norm of a parameter's change; in float32 with what rounding leaves open of it.

    A change of 1e-4 of a weight of 1 has four digits there. And AdamW's first step is as long for
    any gradient, so that one which is nothing but rounding moves its weight to either side.
    """
    change: float = (parameter.detach() - before).norm().item()
    if parameter.dtype == torch.float64:
        return change
    lr, eps = (optimizer.param_groups[0][name] for name in ("lr", "eps"))
    slack = torch.finfo(parameter.dtype).eps * before.norm()
    if parameter.grad is not None:
        gradient = parameter.grad
        error = FLOAT32_TOLERANCE * gradient.abs().max()
        first, *sides = (
            moved / (moved.abs() + eps) for moved in (gradient, gradient - error, gradient + error)
        )
        slack += lr * torch.stack([side - first for side in sides]).abs().amax(dim=0).norm()
    return {"value": change, "slack": slack.item()}


def _objective(model: CLIP, case: Mapping[str, Any], config: Config) -> Objective:
    """The losses, with the case's queue."""
    scale = model.logit_scale
    objective = Objective(
        _measured(config),
        config.model.embed_dim,
        device=scale.device,
        seed=0,
        rank=0,
        dtype=scale.dtype,
    )
    if objective.queue is not None and "bank_before" in case:
        bank = case["bank_before"]
        objective.queue.load_state_dict(
            {"rows_ND": bank["bank"].T, "position": torch.tensor(bank["ptr"])}
        )
    return objective


def _forward(
    model: CLIP, batch: Batch, recorded: Mapping[str, Sequence[Any]]
) -> tuple[Features, Tree]:
    """Features, and the outputs of the recorded modules as upstream has them: one a call.

    Upstream calls a tower for each view or text, ours for all of them at once where that makes no
    difference. Blocks of transformers have tokens before images there: (T, B, C).
    """
    modules = dict(model.named_modules())
    outputs: dict[str, list[Tensor]] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs.setdefault(name, []).append(output.detach().clone())

        return hook

    for name in {*recorded, "encode_text.ln_final"} & modules.keys():
        handles.append(modules[name].register_forward_hook(keep(name)))
    images = batch.images_VBCHW.to(model.logit_scale)
    features: Features = model(batch._replace(images_VBCHW=images))
    for handle in handles:
        handle.remove()
    stages: Tree = {}
    for name, calls in recorded.items():
        if name == "text_label_predictor" and isinstance(model, DeCLIP):
            # Ours sees the masked words only.
            (words_NTC,) = outputs["encode_text.ln_final"]
            with torch.no_grad():
                stages[name] = [model.text_label_predictor(words_NTC[: len(images[0])])]
        elif name in outputs:
            parts = torch.cat(outputs[name]).chunk(len(calls))
            is_block = ".resblocks." in name
            stages[name] = [part.transpose(0, 1) if is_block else part for part in parts]
    return features, stages


@torch.no_grad()
def _outputs(features: Features, objective: Objective) -> tuple[Tree, list[float]]:
    """Upstream's logits and features, and the contrastive loss of each pair of view and text."""
    images_VBD = features.images_VBD / features.images_VBD.norm(dim=2, keepdim=True)
    texts_UBD = features.texts_UBD / (features.texts_UBD.norm(dim=2, keepdim=True) + 1e-10)

    def logits(texts_BD: Tensor, *, back: bool) -> list[Tensor]:
        there = [features.scale * images_BD @ texts_BD.T for images_BD in images_VBD]
        return [*there, *(logits_BB.T for logits_BB in there if back)]

    outputs: Tree = {
        name: logits(texts_BD, back=True)
        for name, texts_BD in zip(("logits", "logits_aug"), texts_UBD, strict=False)
    }
    outputs["features"] = [texts_UBD[0], *images_VBD]
    if features.projected_VBP is not None and features.predicted_VBP is not None:
        outputs["simsiam_features"] = [*features.predicted_VBP, *features.projected_VBP]
    if objective.queue is not None:
        nearest_UBD = [objective.queue.nearest(texts_BD) for texts_BD in texts_UBD]
        outputs["nn_text_logits"] = [
            logits_BB for texts_BD in nearest_UBD for logits_BB in logits(texts_BD, back=False)
        ]
    parts = [
        contrastive_loss(images_VBD[[view]], texts_UBD[[text]], features.scale).item()
        for text in range(len(texts_UBD))
        for view in range(len(images_VBD))
    ]
    return outputs, parts


def _groups(optimizer: torch.optim.Optimizer, recorded: Sequence[Mapping[str, Any]]) -> list[Tree]:
    """Our parameters in upstream's groups, with our decay; ours are fewer."""
    decay_of = {
        name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]
    }
    result: list[Tree] = []
    for group in recorded:
        names = [name for name in group["names"] if name in decay_of]
        decays = {decay_of.pop(name) for name in names} or {group["weight_decay"]}
        decay = decays.pop() if len(decays) == 1 else math.nan
        result.append({"weight_decay": decay, "names": names})
    if recorded and decay_of:
        result.append({"weight_decay": math.nan, "names": list(decay_of)})
    return result
