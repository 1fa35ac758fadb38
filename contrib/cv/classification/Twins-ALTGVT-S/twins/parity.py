"""Computes with this package what a parity case recorded with upstream's code.

``tools/parity.py`` loads the case, calls ``compute`` and compares. The recording was made in
float64 and rounded to float32.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twins.model import Twins, build_model
from twins.recipe import ClassificationLoss, Mixing, build_optimizer, lr_of_epoch, parameter_groups
from zoo_common.errors import UserError, one_line

Tree = dict[str, Any]
Place = tuple[torch.device, torch.dtype]

# What a case gives; the rest of it is recorded. Patterns of fnmatch over paths.
GIVEN = (
    "meta",
    "config",
    "inputs",
    "state_dict",
    "*/drop_masks",
    "recipe/mixup_in",
    "recipe/loss_check/logits",
)
TOLERANCE = 2e-6
FLOAT32_TOLERANCE = 1e-4

WEIGHT_DECAY = 0.05
CLIP_NORM = 5.0
COOLDOWN_EPOCHS = 10  # timm counts them as part of a schedule, upstream's loop does not run them


CPU = torch.device("cpu")


def compute(
    case: Mapping[str, Any],
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float64,
) -> Tree:
    """What the recorded sections of ``case`` hold, computed here, under the same names.

    A section is ``recipe`` or the record of one implementation's model (``gvt``). What a section
    does not tell, like the step's learning rate, is read off its numbers, rounded.

    Args:
        case: what ``tools/parity.py`` loads.
        device: where to compute.
        dtype: of weights and images.

    Raises:
        UserError: The case lacks an input, or its weights do not fit the model of its config.
    """
    for name in ("config", "state_dict", "inputs", "inputs/images", "inputs/labels", "inputs/soft"):
        top, _, below = name.partition("/")
        if top not in case or (below and below not in case[top]):
            raise UserError(f"the case has no {name}, so there is nothing to compute from.")
    place = (device, dtype)
    result: Tree = {}
    for name, recorded in case.items():
        if name == "recipe":
            result[name] = _recipe(case, recorded, place)
        elif name not in GIVEN and isinstance(recorded, Mapping):
            result[name] = _network(case, recorded, place)
    return result


def _build(case: Mapping[str, Any], place: Place, drop_path_rate: float = 0.0) -> tuple[Twins, str]:
    """The case's model with its weights, and what loading them said."""
    config, weights = case["config"], case["state_dict"]
    num_classes = config.get("num_classes", len(weights.get("head.bias", ())))
    if "embed_dims" in config:
        names = ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios")
        missing = [name for name in names if name not in config]
        if missing:
            raise UserError(f"the case's config lacks {', '.join(missing)}.")
        model = Twins(
            num_classes=num_classes,
            windows=config.get("wss"),
            patch_size=config.get("patch_size", 4),
            in_channels=config.get("in_chans", 3),
            drop_path_rate=drop_path_rate,
            **{name: config[name] for name in names},
        )
    else:
        variants = [config[key] for key in ("model", "name", "variant", "arch") if key in config]
        if not variants:
            raise UserError("the case's config has neither embed_dims nor the name of a model.")
        model = build_model(variants[0], num_classes=num_classes, drop_path_rate=drop_path_rate)
    try:
        said = str(model.to(*place).load_state_dict(weights, strict=True))
    except RuntimeError as error:
        problems = one_line(error, 2000)
        raise UserError(f"the case's state_dict does not fit the model: {problems}") from error
    return model, said


class _GivenDropPath(nn.Module):
    """Drop path with the masks of a case, one a call: the attention's, then the MLP's."""

    def __init__(self, p: float, masks_B: Iterable[Tensor]) -> None:
        super().__init__()
        self.keep = 1 - p
        self.masks_B = list(masks_B)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        mask_B = self.masks_B.pop(0).to(x_BHWC)
        return x_BHWC / self.keep * mask_B.view(-1, 1, 1, 1)


def _tokens(map_BHWC: Tensor) -> Tensor:
    return map_BHWC.detach().flatten(1, 2) if map_BHWC.dim() == 4 else map_BHWC.detach()


def _forward(model: Twins, images: Tensor, stages: Iterable[str]) -> tuple[Tensor, Tree]:
    """Logits, and the outputs of the named modules as upstream has them: (B, N, C)."""
    modules = dict(model.named_modules())
    outputs: Tree = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            tokens = _tokens(output)
            if re.fullmatch(r"patch_embeds\.\d+", name):
                outputs[name] = [tokens, list(output.shape[1:3])]
            else:
                outputs[name] = tokens

        return hook

    for name in stages:
        if name in modules:
            handles.append(modules[name].register_forward_hook(keep(name)))
    logits = model(images)
    for handle in handles:
        handle.remove()
    outputs["logits"] = logits.detach()
    return logits, outputs


def _gradient_norms(model: nn.Module) -> dict[str, float]:
    return {
        name: parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _network(case: Mapping[str, Any], recorded: Mapping[str, Any], place: Place) -> Tree:
    inputs = case["inputs"]
    images, soft = inputs["images"].to(*place), inputs["soft"].to(*place)
    labels = inputs["labels"].to(place[0])
    model, said = _build(case, place)
    result: Tree = {"load": said, "no_decay": _no_decay(model, recorded.get("no_decay", []))}

    with torch.no_grad():
        result["eval_logits"] = model.eval()(images)
    logits, result["stages"] = _forward(model.train(), images, recorded.get("stages", ()))
    losses = {
        "ce": ClassificationLoss(smoothing=0.0)(logits, labels),
        "label_smoothing": ClassificationLoss(smoothing=0.1)(logits, labels),
        "soft_target": ClassificationLoss()(logits, soft),
    }
    result["losses"] = {name: loss.item() for name, loss in losses.items()}
    losses["soft_target"].backward()
    result["grad_norm"] = _gradient_norms(model)
    total_norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    result["clip_total_norm"] = total_norm.item()
    result["after_step_delta_norm"] = _step(
        model, recorded.get("after_step_delta_norm", {}), _recorded_decay(case)
    )
    if "drop_masks" in recorded:
        model, _ = _build(case, place)
        result["drop_path"] = _drop_path(model, recorded["drop_masks"], images, soft)
    return result


def _no_decay(model: Twins, recorded: list[str]) -> list[str]:
    """The names of the group without decay, in the order of ``recorded``: it is a set."""
    names = parameter_groups(model, WEIGHT_DECAY)[0]["names"]
    return _ordered_like(names, recorded)


def _ordered_like(names: list[str], recorded: list[str]) -> list[str]:
    place = {name: index for index, name in enumerate(recorded)}
    return sorted(names, key=lambda name: place.get(name, len(place)))


def _recorded_decay(case: Mapping[str, Any]) -> float:
    groups = case.get("recipe", {}).get("weight_decay", [])
    return max((group["weight_decay"] for group in groups), default=WEIGHT_DECAY)


def _step(model: Twins, recorded: Mapping[str, float], weight_decay: float) -> dict[str, float]:
    """Norms of the change that one AdamW step makes.

    The change is proportional to the learning rate, so its recorded value is the ratio to a step
    with learning rate 1, rounded to two digits.
    """
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    build_optimizer(model, lr=1.0, weight_decay=weight_decay).step()
    change = {
        name: (value.detach() - before[name]).norm().item()
        for name, value in model.named_parameters()
    }
    ratios = [recorded[name] / change[name] for name in change.keys() & recorded.keys()]
    lr = float(f"{statistics.median(ratios):.1e}") if ratios else 1.0
    return {name: lr * norm for name, norm in change.items()}


def _drop_path(model: Twins, masks: Mapping[str, Any], images: Tensor, soft: Tensor) -> Tree:
    for block, given in masks.items():
        stage, index = map(int, block.split("."))
        model.blocks[stage][index].drop_path = _GivenDropPath(
            given["p"], [given["attn"], given["mlp"]]
        )
    logits = model(images)
    loss = ClassificationLoss()(logits, soft)
    loss.backward()
    return {
        "logits": logits.detach(),
        "loss": loss.item(),
        "grad_norm": _gradient_norms(model),
    }


def _recipe(case: Mapping[str, Any], recorded: Mapping[str, Any], place: Place) -> Tree:
    result: Tree = {}
    if "weight_decay" in recorded:
        groups = parameter_groups(_build(case, place)[0], _recorded_decay(case))
        orders = [group["names"] for group in recorded["weight_decay"]]
        result["weight_decay"] = [
            {
                "weight_decay": group["weight_decay"],
                "names": _ordered_like(group["names"], order),
            }
            for group, order in zip(groups, orders, strict=False)
        ]
    if "lr_per_epoch" in recorded:
        result.update(_schedule(recorded["lr_per_epoch"]))
    if "mixup_in" in recorded:
        result.update(_mixes(case, recorded, place[0]))
    if "loss_check" in recorded:
        logits = recorded["loss_check"]["logits"].to(*place)
        targets, labels = case["inputs"]["soft"].to(*place), case["inputs"]["labels"].to(place[0])
        soft = ClassificationLoss()(logits, targets).item()
        smooth = ClassificationLoss(smoothing=0.1)(logits, labels).item()
        result["loss_check"] = {"soft": soft, "smooth": smooth, "mine": [soft, smooth]}
    return result


def _schedule(recorded: list[float]) -> Tree:
    epochs = len(recorded)
    # Epoch 2 trains with the schedule's value at 1, a fifth of the way up to the base rate.
    lr = 1e-6 + 5 * (recorded[2] - 1e-6) if epochs > 2 else 1e-3
    lr = float(f"{lr:.5e}")
    return {
        "lr_per_epoch": [lr_of_epoch(epoch, lr=lr, epochs=epochs) for epoch in range(epochs)],
        "num_epochs_returned": epochs + COOLDOWN_EPOCHS,
    }


def _mixes(case: Mapping[str, Any], recorded: Mapping[str, Any], device: torch.device) -> Tree:
    """``mixup_seedN`` for each N: timm mixes an image with its mirror image in the batch."""
    images = recorded["mixup_in"].to(device)
    labels = case["inputs"]["labels"][: len(images)].to(device)
    half = len(images) // 2
    first = torch.arange(half)
    order = torch.stack([first, len(images) - 1 - first], dim=1).flatten()
    back = order.argsort()
    result: Tree = {}
    for name in recorded:
        match = re.fullmatch(r"mixup_seed(\d+)", name)
        if match:
            mixing = Mixing(recorded[name]["target"].shape[1])
            seed = int(match[1])
            mixed, targets = mixing(images[order], labels[order], seed=seed)
            draw = mixing.draw(seed, *images.shape[-2:])
            result[name] = {
                "params": [draw.drawn_lam, draw.box is not None],
                "lam": draw.lam,
                "images": mixed[back],
                "target": targets[back],
            }
    return result
