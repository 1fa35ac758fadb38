"""What detectron2 recorded of its R-CNN models, computed here: for ``tools/parity.py``.

A case holds detectron2's merged config, weights, two images with objects, and every stage of a
training step and of inference. Upstream computed all in float64 and decoded boxes in float32.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from rcnn.config import Config, config_from_detectron2
from rcnn.model import GeneralizedRCNN, build_model
from rcnn.recipe import build_optimizer
from rcnn.roi_heads import Detections
from zoo_common.detection import boxes, masks
from zoo_common.detection.batching import DetectionBatch
from zoo_common.errors import UserError, one_line

Tree = dict[str, Any]

GIVEN = ("meta*", "cfg", "inputs*", "targets*", "state_dict*", "*/image_size*")
TOLERANCE = 1e-5
FLOAT32_TOLERANCE = 1e-3  # rounding: gradients of 101 layers differ by 5.5e-4 on a CPU, too

CPU = torch.device("cpu")


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
    for name in ("cfg", "inputs", "targets", "state_dict"):
        if name not in case:
            raise UserError(f"the case has no {name}, so there is nothing to compute from.")
    cfg = yaml.safe_load(case["cfg"])
    config = config_from_detectron2(cfg)
    num_classes = cfg["MODEL"]["ROI_HEADS"]["NUM_CLASSES"]
    model = _build(case, config, num_classes).to(device, dtype)
    batch = _batch(case, config, dtype).to(device)
    result: Tree = {}
    if "train" in case:
        result["train"] = _train(model, batch)
        result |= _step(model, config, case.get("optimizer", {}))
    if "infer" in case:
        model = _build(case, config, num_classes).to(device, dtype)
        result["infer"] = _infer(model.eval(), batch)
    return result


def _build(case: Mapping[str, Any], config: Config, num_classes: int) -> GeneralizedRCNN:
    model = build_model(config, num_classes)
    try:
        model.load_state_dict(case["state_dict"], strict=True)
    except RuntimeError as error:
        problems = one_line(error, 2000)
        raise UserError(f"the case's state_dict does not fit the model: {problems}") from error
    model.choose = sample_evenly
    return model


def _batch(case: Mapping[str, Any], config: Config, dtype: torch.dtype) -> DetectionBatch:
    """The case's images and objects, padded as upstream pads them."""
    inputs, targets = case["inputs"], case["targets"]
    sizes = [item["image"].shape[-2:] for item in inputs]
    step = 32
    height, width = (-(-max(size[i] for size in sizes) // step) * step for i in (0, 1))
    images_BCHW = torch.zeros(len(inputs), 3, height, width, dtype=inputs[0]["image"].dtype)
    for image_CHW, item in zip(images_BCHW, inputs, strict=True):
        given_CHW = item["image"]
        if config.model.channel_order == "BGR":
            given_CHW = given_CHW.flip(0)
        image_CHW[:, : given_CHW.shape[1], : given_CHW.shape[2]] = given_CHW
    slots = max(1, *(len(target["classes"]) for target in targets))
    outlines = [
        [masks.polygons_to_edges(polygons) for polygons in target.get("polygons", [])]
        for target in targets
    ]
    longest = max((len(edges) for image in outlines for edges, _ in image), default=1)
    boxes_BQ4 = torch.zeros(len(inputs), slots, 4, dtype=dtype)
    labels_BQ = torch.zeros(len(inputs), slots, dtype=torch.int64)
    valid_BQ = torch.zeros(len(inputs), slots, dtype=torch.bool)
    edges_BQE4 = torch.zeros(len(inputs), slots, longest, 4, dtype=dtype)
    rings_BQE = torch.full((len(inputs), slots, longest), -1)
    for image, target in enumerate(targets):
        count = len(target["classes"])
        boxes_BQ4[image, :count] = target["boxes"]
        labels_BQ[image, :count] = target["classes"]
        valid_BQ[image, :count] = True
        for slot, (edges_E4, rings_E) in enumerate(outlines[image]):
            edges_BQE4[image, slot, : len(edges_E4)] = torch.as_tensor(edges_E4)
            rings_BQE[image, slot, : len(rings_E)] = torch.as_tensor(rings_E)
    return DetectionBatch(
        images_BCHW=images_BCHW,
        sizes_B2=torch.tensor([list(size) for size in sizes]),
        extent_2=torch.tensor([height, width]),
        originals_B2=torch.tensor([[item["height"], item["width"]] for item in inputs]),
        boxes_BQ4=boxes_BQ4,
        labels_BQ=labels_BQ,
        valid_BQ=valid_BQ,
        edges_BQE4=edges_BQE4,
        rings_BQE=rings_BQE,
        ring_slots=max(0, int(rings_BQE.max())) + 1,
        image_ids_B=torch.arange(len(inputs)),
        item_ids=[str(index) for index in range(len(inputs))],
        damaged=[],
    )


def sample_evenly(candidates_BN: Tensor, limit_B: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The cases' rule: of n candidates k evenly spread ones, floor(i * n / k)."""
    shape, device = (len(candidates_BN), slots), candidates_BN.device
    index_BS = torch.zeros(shape, dtype=torch.int64, device=device)
    chosen_BS = torch.zeros(shape, dtype=torch.bool, device=device)
    for image, candidates_N in enumerate(candidates_BN):
        found = candidates_N.nonzero()[:, 0]
        count = min(len(found), int(limit_B[image]), slots)
        places = [i * len(found) // count for i in range(count)]
        index_BS[image, :count] = found[places]
        chosen_BS[image, :count] = True
    return index_BS, chosen_BS


class _Watch:
    """Keeps what methods of an object return, by name, while it is active."""

    def __init__(self, watched: Iterable[tuple[Any, str, str]]) -> None:
        self.kept: dict[str, list[Any]] = {}
        self._watched = list(watched)

    def __enter__(self) -> "_Watch":
        for owner, method, name in self._watched:
            setattr(owner, method, self._keeping(getattr(owner, method), name))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, method, _name in self._watched:
            delattr(owner, method)  # the class's own shows again

    def _keeping(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            value = call(*args, **kwargs)
            self.kept.setdefault(name, []).append(value)
            return value

        return wrapper


def _watch(model: GeneralizedRCNN) -> _Watch:
    generator, heads = model.proposal_generator, model.roi_heads
    return _Watch(
        [
            (model, "preprocess", "images"),
            (model.backbone.bottom_up, "forward", "stages"),
            (model.backbone, "forward", "maps"),
            (generator, "label", "labels"),
            (generator, "forward", "proposals"),
            (heads, "sample", "regions"),
            (heads, "pool", "pooled"),
            (heads, "predict_boxes", "predicted"),
            (heads.box_head, "forward", "box_head"),
            (heads, "mask_targets", "mask_targets"),
        ]
        + ([(heads.mask_head, "hidden", "mask_hidden")] if heads.mask_config else [])
    )


def _stages(model: GeneralizedRCNN, kept: Mapping[str, list[Any]]) -> Tree:
    """What training and inference have in common."""
    maps = kept["maps"][0]
    generator = model.proposal_generator
    with torch.no_grad():
        hidden = [torch.relu(generator.rpn_head.conv(map_BCHW)) for map_BCHW in maps]
        head = generator.rpn_head
        logits = [head.objectness_logits(hidden_BCHW) for hidden_BCHW in hidden]
        deltas = [head.anchor_deltas(hidden_BCHW) for hidden_BCHW in hidden]
    anchors = [generator.anchors_of(level, m, None)[0][0] for level, m in enumerate(maps)]
    stages = kept["stages"][0]
    return {
        "preprocess_image": {"tensor": kept["images"][0]},
        "backbone.bottom_up": {f"res{i + 2}": stage.detach() for i, stage in enumerate(stages)},
        "backbone": {f"p{i + 2}": map_BCHW.detach() for i, map_BCHW in enumerate(maps)},
        "proposal_generator.anchor_generator": anchors,
        "proposal_generator.rpn_head": [logits, deltas],
        "proposals": [
            {"proposal_boxes": boxes_P4[valid_P], "objectness_logits": logits_P[valid_P]}
            for boxes_P4, logits_P, valid_P in zip(*kept["proposals"][0], strict=True)
        ],
    }


def _box_stages(kept: Mapping[str, list[Any]], valid_R: Tensor) -> Tree:
    logits_RK, deltas_RK4 = kept["predicted"][0]
    return {
        "roi_heads.box_pooler": kept["pooled"][0].detach()[valid_R],
        "roi_heads.box_head": kept["box_head"][0].detach()[valid_R],
        "roi_heads.box_predictor": [
            logits_RK.detach()[valid_R],
            deltas_RK4.detach().flatten(1)[valid_R],
        ],
    }


def _train(model: GeneralizedRCNN, batch: DetectionBatch) -> Tree:
    with _watch(model) as watch:
        losses = model.train()(batch)
    kept = watch.kept
    result = _stages(model, kept)
    positive_BN, negative_BN, matches = kept["labels"][0]
    result["rpn_sampled"] = _sampled_anchors(model, batch, positive_BN, negative_BN, matches)
    regions = kept["regions"][0]
    result["sampled_proposals"] = [
        {
            "proposal_boxes": regions.boxes_BS4[image][valid_S],
            "objectness_logits": regions.logits_BS[image][valid_S],
            "gt_classes": regions.labels_BS[image][valid_S],
            "gt_boxes": regions.gt_boxes_BS4[image][valid_S],
        }
        for image, valid_S in enumerate(regions.valid_BS)
    ]
    result |= _box_stages(kept, regions.valid_BS.flatten())
    if "mask_hidden" in kept:
        slots = len(kept["mask_hidden"][0]) // len(regions.positive_BS)
        positive_BF = regions.positive_BS[:, :slots]
        positive_R = positive_BF.flatten()
        result["roi_heads.mask_pooler"] = kept["pooled"][1].detach()[positive_R]
        result["roi_heads.mask_head.logits"] = _all_masks(model, kept)[positive_R]
        targets_BFMM = kept["mask_targets"][0].unflatten(0, (-1, slots))
        result["mask_targets"] = [
            targets_FMM[positive_F]
            for targets_FMM, positive_F in zip(targets_BFMM, positive_BF, strict=True)
            if positive_F.any()  # upstream rasterises nothing for other images
        ]
    result["losses"] = {name: loss.item() for name, loss in losses.items()}
    total = torch.stack(list(losses.values())).sum()
    result["total_loss"] = total.item()
    total.backward()
    result["grad_norm"] = {
        name: parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return result


@torch.no_grad()
def _all_masks(model: GeneralizedRCNN, kept: Mapping[str, list[Any]]) -> Tensor:
    """Mask logits of all classes, of which the model itself makes one for each region."""
    logits_RKMM: Tensor = model.roi_heads.mask_head.predictor(kept["mask_hidden"][0])
    return logits_RKMM


def _sampled_anchors(
    model: GeneralizedRCNN,
    batch: DetectionBatch,
    positive_BN: Tensor,
    negative_BN: Tensor,
    matches: Any,
) -> Tree:
    """Labels of all anchors: 1 and 0 for sampled foreground and background, -1 for the rest."""
    config = model.proposal_generator.config
    labels, matched = [], []
    for image in range(len(positive_BN)):
        most = int(config.samples * config.positive_fraction)
        chosen = {1: positive_BN[image : image + 1], 0: negative_BN[image : image + 1]}
        labels_N = torch.full_like(positive_BN[image], -1, dtype=torch.int8)
        limit = most
        for label, candidates_1N in chosen.items():
            index_1S, real_1S = sample_evenly(candidates_1N, torch.tensor([limit]), config.samples)
            labels_N[index_1S[real_1S]] = label
            limit = config.samples - int(real_1S.sum())
        labels.append(labels_N)
        matched.append(batch.boxes_BQ4[image][matches.index_BN[image]])
    return {"gt_labels": labels, "matched_gt_boxes": matched}


@torch.no_grad()
def _infer(model: GeneralizedRCNN, batch: DetectionBatch) -> Tree:
    with _watch(model) as watch:
        found = model(batch)
    kept = watch.kept
    result = _stages(model, kept)
    result |= _box_stages(kept, kept["proposals"][0].valid_BP.flatten())
    if "mask_hidden" in kept:
        slots = len(kept["mask_hidden"][0]) // len(found.valid_BD)
        valid_R = found.valid_BD[:, :slots].flatten()
        result["roi_heads.mask_pooler"] = kept["pooled"][1][valid_R]
        result["roi_heads.mask_head.logits"] = _all_masks(model, kept)[valid_R]
    result["detections"] = _each_image(found, found.boxes_BD4, found.valid_BD)
    original_BD4 = boxes.to_original(found.boxes_BD4, batch.sizes_B2, batch.originals_B2)
    sides_BD2 = original_BD4[..., 2:] - original_BD4[..., :2]
    real_BD = found.valid_BD & (sides_BD2 > 0).all(dim=2)
    result["postprocessed"] = _each_image(found, original_BD4, real_BD)
    for item, (height, width) in zip(
        result["postprocessed"], batch.originals_B2.tolist(), strict=True
    ):
        if "pred_masks" in item:
            item["pred_masks"] = masks.paste(
                item["pred_masks"][:, 0], item["pred_boxes"], height, width
            )
    return result


def _each_image(found: Detections, boxes_BD4: Tensor, real_BD: Tensor) -> Sequence[Tree]:
    result = []
    for image, real_D in enumerate(real_BD):
        item = {
            "pred_boxes": boxes_BD4[image][real_D],
            "scores": found.scores_BD[image][real_D],
            "pred_classes": found.labels_BD[image][real_D],
        }
        if found.masks_BDMM is not None:
            item["pred_masks"] = found.masks_BDMM[image][real_D][:, None]
        result.append(item)
    return result


def _step(model: nn.Module, config: Config, recorded: Mapping[str, Any]) -> Tree:
    """One step of SGD at the rate of the case."""
    config.solver.base_lr = recorded.get("lr", config.solver.base_lr)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, config.solver)
    optimizer.step()
    return {
        "after_step_delta_norm": {
            name: (value.detach() - before[name]).norm().item()
            for name, value in model.named_parameters()
        },
        "optimizer": {
            "type": type(optimizer).__name__,
            "lr": optimizer.param_groups[0]["lr"],
            "groups": len(optimizer.param_groups),
            "defaults": {
                name: value for name, value in optimizer.defaults.items() if value is not None
            },
            "frozen": [n for n, value in model.named_parameters() if not value.requires_grad],
        },
    }
