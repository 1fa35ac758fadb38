"""What microsoft/GLIP and mmdet recorded of GLIP, computed here: for ``tools/parity.py``.

A case holds a network's configuration, its weights, images with boxes, class names, and what
upstream made of them: tokens, the maps of each stage, losses, gradients and predictions; mmdet's
also hold the layers of the tower and the matched anchors. BERT's settings and vocabulary stand in
a directory of their own, beside the case or in tests/fixtures. The two have other names for the
same things; here everything stands under both, of which ``tools/parity.py`` takes those that it
finds. For their losses differ: see :func:`_train`.

Recorded networks are narrow, and one number of them stands neither in configs nor in weights: the
heads of the fusion, which upstream's code holds. It is found by trying.

mmdet computed in float32, whose rounding decides on which side of a kink a number stands: a ReLU,
a sample of a deformable convolution between two pixels, the larger of two lines. So where
gradients disagree, their slack is measured: how far they move when the weights move by a rounding
error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from glip import anchors, weights
from glip.bert import read_config
from glip.captions import Caption, TextEncoder, caption_of
from glip.config import Config, config_from_upstream
from glip.data import Batch
from glip.detect import detect, to_files
from glip.fusion import BertEncoderLayer, VLFuse
from glip.head import Predictions
from glip.model import GLIP, build_model
from glip.targets import Matches, match
from glip.tower import DyConv
from zoo_common.detection.batching import Collate, Entry
from zoo_common.detection.transforms import Sample
from zoo_common.errors import UserError, one_line

Tree = dict[str, Any]

GIVEN = (
    *("directory", "name", "seed", "torch", "mmdet", "commit", "meta*", "config*", "cfg", "map"),
    *("text", "state_dict*", "images*", "gt/*/bboxes", "gt/*/labels", "img_metas*", "map/*"),
    *("inputs/images*", "inputs/image_sizes*", "inputs/gt/*/bboxes", "inputs/gt/*/labels"),
    *("inputs/caption", "inputs/tokens_positive*"),
)
TOLERANCE = 1e-4
FLOAT32_TOLERANCE = 2e-3  # rounding on both sides; gradients behind kinks add it up

CPU = torch.device("cpu")
FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"

_NARROW_BERT = "bert_tiny"
_PUBLISHED_WIDTH = 2048
_NARROW_HEADS = (4, 8, 2, 16, 1)  # in the order in which they are tried
_SAME = 1e-2  # other heads make other numbers altogether
_ROUNDING = 1e-6  # what float32 leaves open of a number behind many layers, relative
_NOTHING = 1e-9  # of the largest gradient: rounding
_MARGIN = 2  # few draws do not show the furthest
_DRAWS = 6  # disturbed copies of the weights, of which each puts a kink on either side


@dataclass(frozen=True)
class _Case:
    """A case of either origin in one form.

    Attributes:
        microsoft: whose it is, microsoft's or mmdet's.
        config: its settings.
        weights: under our names.
        images: uint8 (3, H, W), blue first.
        boxes: (N, 4), the last pixel belongs to a box.
        labels: (N,), from 0.
        originals: height and width of each image's file.
        captions: of each image.
        divisibility: of padded sides.
        our_name: of one of its tensors.
        recorded: its tree.
    """

    microsoft: bool
    config: Config
    weights: Mapping[str, Tensor]
    images: Sequence[Tensor]
    boxes: Sequence[Tensor]
    labels: Sequence[Tensor]
    originals: Sequence[Sequence[int]]
    captions: Sequence[Caption]
    divisibility: int
    our_name: Callable[[str], str | None]
    recorded: Mapping[str, Any]


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
        UserError: The case lacks an input, its weights do not fit the model of its config, or its
            BERT is not there.
    """
    given = _read(case)
    encoder = TextEncoder(Path(given.config.model.bert), given.config.model.max_tokens)
    maps = [encoder.token_map(caption) for caption in given.captions]
    batch = _batch(given, encoder, maps).to(device)
    model = _build(given, batch, device, dtype)
    result = _train(model.train(), batch, given)
    found = _predict(model.eval(), batch, maps, given)
    return result | _texts(given, encoder, maps) | {"predict": found}


def _build(given: _Case, batch: Batch, device: torch.device, dtype: torch.dtype) -> GLIP:
    """The case's network. Of a narrow fusion it has the heads that give upstream's logits.

    Raises:
        UserError: the weights do not fit it.
    """
    settings = given.config.model
    model = _filled(given).to(device, dtype)
    if not settings.fusion or settings.fusion_width == _PUBLISHED_WIDTH:
        return model
    for heads in _NARROW_HEADS:
        settings.fusion_heads = heads
        if settings.fusion_width % heads == 0:
            model = _filled(given).to(device, dtype)
            if _has_logits(model.eval(), batch, given):
                break
    return model


def _filled(given: _Case) -> GLIP:
    """The network of the settings, with the case's weights.

    Raises:
        UserError: they do not fit it.
    """
    model = build_model(given.config)
    try:
        model.load_state_dict(given.weights, strict=True)
    except RuntimeError as error:
        problems = one_line(error, 2000)
        raise UserError(f"the case's state_dict does not fit the model: {problems}") from error
    return model


@torch.no_grad()
def _has_logits(model: GLIP, batch: Batch, given: _Case) -> bool:
    """Whether the logits of the last level are upstream's, which know of all layers."""
    recorded = given.recorded.get("outputs", {})
    levels = recorded.get("dot_product_logits") or recorded.get("head_bbox_ctr_logits", [None])[-1]
    if levels is None:
        return True
    detection = batch.detection
    found, sizes = model.predict(
        detection.images_BCHW, detection.sizes_B2, model.words(*batch.text)
    )
    ours = found.logits_BAT[:, -math.prod(sizes[-1]) :].cpu().double()
    return bool((ours - levels[-1]).abs().max() <= _SAME * levels[-1].abs().max())


def _read(case: Mapping[str, Any]) -> _Case:
    microsoft = "cfg" in case
    wanted = ("cfg", "inputs") if microsoft else ("config", "images", "gt", "img_metas")
    for name in (*wanted, "state_dict"):
        if name not in case:
            raise UserError(f"the case has no {name}, so there is nothing to compute from.")
    given = _read_microsoft(case) if microsoft else _read_mmdet(case)
    model = given.config.model
    fused = given.weights.get("rpn.head.dyhead_tower.0.b_attn.attn.v_proj.weight")
    if fused is not None:
        model.fusion_width = len(fused)
    # Recorded without noise, which two programs would draw in two ways.
    model.drop_path = model.drop_block = model.fusion_dropout = 0.0
    model.bert = str(_find_bert(case, given))
    return given


def _read_microsoft(case: Mapping[str, Any]) -> _Case:
    cfg, inputs = yaml.safe_load(case["cfg"]), case["inputs"]
    config = config_from_upstream(cfg)
    spans = [[(begin, end) for begin, end in each] for each in inputs["tokens_positive"]]
    named = ((weights.from_microsoft(name), value) for name, value in case["state_dict"].items())
    return _Case(
        microsoft=True,
        config=config,
        weights={name: value for name, value in named if name},
        images=inputs["images"],
        boxes=[gt["bboxes"] for gt in inputs["gt"]],
        labels=[gt["labels"] for gt in inputs["gt"]],
        originals=inputs["image_sizes"],
        captions=[Caption(inputs["caption"], spans)] * len(inputs["images"]),
        divisibility=config.data.size_divisibility,
        our_name=weights.from_microsoft,
        recorded=case,
    )


def _read_mmdet(case: Mapping[str, Any]) -> _Case:
    config = config_from_upstream(case["config"])
    named = {weights.from_mmdet(name): value for name, value in case["state_dict"].items()}
    return _Case(
        microsoft=False,
        config=config,
        weights=weights.reorder(named),
        images=case["images"],
        boxes=[gt["bboxes"] for gt in case["gt"]],
        labels=[gt["labels"] for gt in case["gt"]],
        originals=[meta["ori_shape"] for meta in case["img_metas"]],
        captions=[caption_of(meta["text"]) for meta in case["img_metas"]],
        divisibility=case["config"]["data_preprocessor"].get("pad_size_divisor", 1),
        our_name=weights.from_mmdet,
        recorded=case,
    )


def _find_bert(case: Mapping[str, Any], given: _Case) -> Path:
    """The directory of the BERT whose sizes are those of the case's weights.

    Raises:
        UserError: there is none.
    """
    rows = given.weights.get("language_backbone.body.model.embeddings.word_embeddings.weight")
    if rows is None:
        raise UserError("the case's state_dict has no language_backbone, so it is no GLIP.")
    names = dict.fromkeys((given.config.model.bert, _NARROW_BERT))
    places = [Path(case.get("directory", "."), name) for name in names]
    places += [FIXTURES / name for name in names]
    for place in places:
        if (place / "config.json").is_file():
            settings = read_config(place)
            if (settings["vocab_size"], settings["hidden_size"]) == tuple(rows.shape):
                return place
    raise UserError(
        f"there is no BERT with {len(rows)} words of {rows.shape[1]} channels beside the case: "
        f"put its config.json and vocab.txt into {places[0]}."
    )


def _batch(given: _Case, encoder: TextEncoder, maps: Sequence[Tensor]) -> Batch:
    """The case's images and boxes as the loader delivers them."""
    entries = []
    for number, (image_CHW, boxes_N4, labels_N, original) in enumerate(
        zip(given.images, given.boxes, given.labels, given.originals, strict=True)
    ):
        sample = Sample(
            image_HWC=image_CHW.flip(0).permute(1, 2, 0).numpy(),
            boxes_N4=boxes_N4.double().numpy(),
            labels_N=labels_N.numpy(),
        )
        entries.append(Entry(sample, (original[0], original[1]), number, str(number)))
    detection = Collate(None, divisibility=given.divisibility, masks=False)(entries, [])
    tokens_BQT = torch.stack(
        [map_NT[labels_Q] for map_NT, labels_Q in zip(maps, detection.labels_BQ, strict=True)]
    )
    return Batch(
        detection,
        encoder([caption.text for caption in given.captions]),
        detection.boxes_BQ4,
        tokens_BQT & detection.valid_BQ[..., None],
    )


def _texts(given: _Case, encoder: TextEncoder, maps: Sequence[Tensor]) -> Tree:
    """Captions and tokens, as upstream's numbers."""
    caption, map_NT = given.captions[0], maps[0]
    tokens_BT, mask_BT = encoder([caption.text])
    positive = [
        {"positive_maps": tokens_NT[labels].float()}
        for tokens_NT, labels in zip(maps, given.labels, strict=True)
    ]
    common: Tree = {"input_ids": tokens_BT[:, : int(mask_BT.sum())]}
    if given.microsoft:
        tokens = {str(row + 1): row_T.nonzero()[:, 0].tolist() for row, row_T in enumerate(map_NT)}
        return {"inputs": common | {"positive_map_eval": tokens, "gt": positive}}
    return common | {
        "caption": caption.text,
        "tokens_positive": [[list(span) for span in spans] for spans in caption.spans],
        "gt": positive,
    }


def _train(model: GLIP, batch: Batch, given: _Case) -> Tree:
    """Maps, losses and gradients of a training step, and which anchors are matched.

    mmdet divides by the matched anchors as if each image had one at least; microsoft/GLIP has a
    loss of classes beside that of tokens, which is nothing.
    """
    outputs, kept = _outputs(model, batch, given)
    sizes: list[tuple[int, int]] = [level.shape[2:] for level in outputs["fpn"]]
    assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
    anchors_A4 = anchors.make_anchors(sizes, batch.boxes_BQ4.device)
    matches = match(
        anchors_A4,
        [height * width for height, width in sizes],
        batch.boxes_BQ4,
        batch.detection.valid_BQ,
        given.config.loss.candidates,
    )
    counts = matches.positive_BA.sum(dim=1)
    count = counts.sum().clamp(min=1) if given.microsoft else counts.clamp(min=1).sum()
    share = (counts.sum().clamp(min=1) / count).item()
    losses = {
        name: loss if name == "box" else loss * share
        for name, loss in model.losses(kept, sizes, batch).items()
    }
    values = {name: loss.item() for name, loss in losses.items()}
    result: Tree = {
        "outputs": outputs,
        "losses": {
            "loss_reg": values["box"],
            "loss_bbox": values["box"],
            "loss_centerness": values["centerness"],
            "loss_dot_product_token": values["token"],
            "loss_cls": 0.0 if given.microsoft else values["token"],
        },
        "num_pos": count.item(),
        "grad_norms": _grad_norms(model, batch, share, given),
    }
    return result | _positives(matches, batch)


def _positives(matches: Matches, batch: Batch) -> Tree:
    """Each image's matched anchors: their numbers, tokens and boxes."""
    assert batch.boxes_BQ4 is not None and batch.tokens_BQT is not None
    result: Tree = {"pos_index": [], "pos_label": [], "pos_box": []}
    for slots_A, positive_A, boxes_Q4, tokens_QT in zip(
        *matches, batch.boxes_BQ4, batch.tokens_BQT, strict=True
    ):
        index_N = positive_A.nonzero()[:, 0]
        result["pos_index"].append(index_N)
        result["pos_label"].append(tokens_QT[slots_A[index_N]].float())
        result["pos_box"].append(boxes_Q4[slots_A[index_N]])
    return result


def _outputs(model: GLIP, batch: Batch, given: _Case) -> tuple[Tree, Predictions]:
    """What stages and layers give, by both names, and the head's predictions."""
    kept: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept[name] = output

        return hook

    head, tower = model.rpn.head, list(model.rpn.head.dyhead_tower)
    modules = {
        "words": model.language_backbone,
        "first": model.backbone.body.layers[0],
        "body": model.backbone.body,
        "fpn": model.backbone.fpn,
        "head": head,
        **{str(place): layer for place, layer in enumerate(tower)},
    }
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    words, levels = kept["words"], kept["fpn"]
    # microsoft/GLIP's backbone gives its first stage too, which nothing takes.
    first = [kept["first"][0].permute(0, 3, 1, 2)] if given.microsoft else []
    outputs: Tree = {
        "language": [words.embedded(), words.hidden_BTC, words.mask_BT.long()],
        "backbone": [*first, *kept["body"]],
        "fpn": levels,
    }
    outputs |= _head_outputs(kept["head"], [level.shape[2:] for level in levels])
    for place, layer in enumerate(tower):
        found = kept[str(place)]
        levels = found if isinstance(layer, DyConv) else levels
        words = found if isinstance(layer, BertEncoderLayer) else words
        if isinstance(layer, VLFuse):
            levels, words = found
        outputs[f"tower{place}_{type(layer).__name__}"] = [*levels, words.hidden_BTC]
    return outputs, kept["head"]


def _head_outputs(predictions: Predictions, sizes: Sequence[tuple[int, int]]) -> Tree:
    """Predictions level by level."""
    cells = [height * width for height, width in sizes]
    deltas, centerness = (
        [
            level_BAX.transpose(1, 2).unflatten(2, size)
            for level_BAX, size in zip(whole_BAX.split(cells, dim=1), sizes, strict=True)
        ]
        for whole_BAX in (predictions.deltas_BA4, predictions.centerness_BA[..., None])
    )
    logits = list(predictions.logits_BAT.split(cells, dim=1))
    return {
        "bbox": deltas,
        "centerness": centerness,
        "dot_product_logits": logits,
        "head_bbox_ctr_logits": [deltas, centerness, logits],
    }


def _gradients(model: GLIP, batch: Batch, share: float) -> dict[str, Tensor]:
    """The gradients of all parameters, under our names."""
    model.zero_grad()
    losses: dict[str, Tensor] = model(batch)
    (losses["box"] + share * (losses["token"] + losses["centerness"])).backward()
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: grad.detach().clone() for name, grad in named if grad is not None}


def _grad_norms(model: GLIP, batch: Batch, share: float, given: _Case) -> Tree:
    """Norms of the gradients that were recorded, with their slack if one of them is off."""
    recorded: Mapping[str, float | None] = given.recorded.get("grad_norms", {})
    gradients = _gradients(model, batch, share)
    found: Tree = {}
    for name in recorded:
        gradient = gradients.get(given.our_name(name) or "")
        found[name] = None if gradient is None else gradient.norm().item()
    largest = max((norm or 0.0 for norm in recorded.values()), default=0.0)
    off = [name for name, norm in recorded.items() if not _near(found[name], norm, largest)]
    if not off:
        return found
    slack = _disturb(model, batch, share, gradients)
    for name in off:
        ours = given.our_name(name) or ""
        found[name] = {"value": found[name], "slack": slack.get(ours, 0.0)}
    return found


def _near(ours: float | None, recorded: float | None, largest: float) -> bool:
    """Whether two norms agree, or are nothing but rounding."""
    ours, recorded = ours or 0.0, recorded or 0.0
    return abs(ours - recorded) <= max(TOLERANCE * recorded, _NOTHING * largest)


def _disturb(
    model: GLIP, batch: Batch, share: float, gradients: Mapping[str, Tensor]
) -> dict[str, float]:
    """How far each gradient moves when all weights move by a rounding error and so does the rest.

    The rest, by computing in float32: the bias of an attention's keys has no gradient but this.
    """
    generator = torch.Generator().manual_seed(0)
    disturbed = copy.deepcopy(model).float()
    before = {name: value.detach().clone() for name, value in disturbed.named_parameters()}
    moved = dict.fromkeys(gradients, 0.0)
    for _ in range(_DRAWS):
        with torch.no_grad():
            for name, value in disturbed.named_parameters():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(before[name] * (1 + _ROUNDING * noise.to(value)))
        for name, gradient in _gradients(disturbed, batch, share).items():
            change = (gradient - gradients[name]).norm().item()
            moved[name] = max(moved[name], _MARGIN * change)
    return moved


@torch.no_grad()
def _predict(model: GLIP, batch: Batch, maps: Sequence[Tensor], given: _Case) -> list[Tree]:
    """Each image's objects by falling score; mmdet's boxes are those of the image's file."""
    sizes_B2, originals_B2 = batch.detection.sizes_B2, batch.detection.originals_B2
    words = model.words(*batch.text)
    predictions, sizes = model.predict(batch.detection.images_BCHW, sizes_B2, words)
    result = []
    for image, map_NT in enumerate(maps):
        one = slice(image, image + 1)
        found = detect(
            Predictions(*(part[one] for part in predictions)),
            sizes,
            map_NT.to(sizes_B2.device),
            sizes_B2[one],
            given.config.test,
        )
        boxes_BK4 = found.boxes_BK4
        if not given.microsoft:
            boxes_BK4 = to_files(boxes_BK4, sizes_B2[one], originals_B2[one])
        valid_K = found.valid_BK[0]
        result.append(
            {
                "scores": found.scores_BK[0][valid_K],
                "labels": found.labels_BK[0][valid_K],
                "bboxes": boxes_BK4[0][valid_K],
            }
        )
    return result
