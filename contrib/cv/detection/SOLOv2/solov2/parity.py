"""What WXinlong/SOLO and mmdet recorded of SOLOv2, computed here: for ``tools/parity.py``.

A case holds a model's configuration, its weights, images with objects, and what upstream made of
them: the maps of each stage, losses, gradients and predictions; mmdet's also hold the targets.
The two have other names for the same things, and a mask loss divided by another number. Here
everything stands under both names, of which ``tools/parity.py`` takes those that it finds.

Upstream computed in float32, whose rounding decides on which side of zero a ReLU stands, and on
which side of the threshold a pixel. The maps agree to 2e-6, but one ReLU moves gradients by up to
1e-2, and one pixel is another pixel. So where something disagrees, its slack is measured: how far
gradients move when the weights move by a rounding error, and which pixels lie that close to the
threshold. Without such a place the slack is nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from solov2.config import Config, config_from_upstream
from solov2.data import Batch
from solov2.evaluate import to_originals
from solov2.model import Detections, SOLOv2, build_model
from solov2.targets import Targets, prepare
from solov2.weights import from_mmdet
from zoo_common.detection.batching import Collate, DetectionBatch, Entry
from zoo_common.detection.bitmasks import Masks
from zoo_common.detection.transforms import Sample, drop_empty
from zoo_common.errors import UserError, one_line

Tree = dict[str, Any]

GIVEN = (
    *("name", "seed", "torch", "mmdet", "commit", "meta*", "config*", "test_cfg*"),
    *("images*", "gt*", "img_metas*", "state_dict*"),
)
TOLERANCE = 1e-4
FLOAT32_TOLERANCE = 1e-3  # rounding on both sides; gradients of 101 layers add it up

CPU = torch.device("cpu")

_ROUNDING = 1e-6  # what float32 leaves open of a number behind many layers, relative
_DRAWS = 6  # disturbed copies of the weights, of which each puts a ReLU on either side
_UNDECIDED = 1e-5  # pixels this close to the threshold fall on either side
_FEWEST_SHOWN = 20


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
    for name in ("config", "state_dict", "images", "gt", "img_metas"):
        if name not in case:
            raise UserError(f"the case has no {name}, so there is nothing to compute from.")
    config = _config(case)
    model = _build(case, config).to(device, dtype)
    batch = _batch(case, config)
    result = _train(model, batch.to(device), case)
    assert batch.targets is not None
    result["targets"] = _targets(batch.detection, batch.targets, config)
    if "predict" in case:
        model = _build(case, config).to(device, torch.float32)
        result["predict"] = _predict(model.eval(), Batch(batch.detection, None).to(device), case)
    return result


def _config(case: Mapping[str, Any]) -> Config:
    """The settings of a case; what its config leaves open is as in the weights."""
    tests = case["config"].get("test_cfg") or case.get("test_cfg")
    config = config_from_upstream({"model": case["config"], "test_cfg": tests})
    weights = case["state_dict"]
    try:
        config.model.stem_channels = len(weights["backbone.conv1.weight"])
        config.model.base_channels = len(weights["backbone.layer1.0.conv1.weight"])
    except KeyError as error:
        raise UserError(f"the case's state_dict has no {error}, so it is no SOLOv2.") from error
    if "bbox_head" in case["config"] and not tests:
        # WXinlong/SOLO keeps its test settings outside of the model's dictionary. Recorded cases
        # keep fewer predictions of an image than its own configs, which is all that they change.
        counts = [len(found["scores"]) for found in case.get("predict", []) if found]
        config.test.max_per_img = max([_FEWEST_SHOWN, *counts])
    return config


def _build(case: Mapping[str, Any], config: Config) -> SOLOv2:
    model = build_model(config, config.model.num_classes)
    weights = {from_mmdet(name): value for name, value in case["state_dict"].items()}
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        problems = one_line(error, 2000)
        raise UserError(f"the case's state_dict does not fit the model: {problems}") from error
    return model


def _batch(case: Mapping[str, Any], config: Config) -> Batch:
    """The case's images and objects as the loader delivers them."""
    entries: list[Entry] = []
    for image_CHW, gt, meta in zip(case["images"], case["gt"], case["img_metas"], strict=True):
        height, width = image_CHW.shape[-2:]
        sample = Sample(
            image_HWC=image_CHW.flip(0).permute(1, 2, 0).numpy(),  # recorded in BGR
            boxes_N4=gt["bboxes"].double().numpy(),
            labels_N=gt["labels"].numpy(),
            masks=Masks.of(gt["masks"].numpy(), height, width),
        )
        original = (meta["ori_shape"][0], meta["ori_shape"][1])
        entries.append(Entry(drop_empty(sample), original, len(entries), str(len(entries))))
    collate = Collate(None, divisibility=32, masks=False, quarter_masks=True)
    detection = collate(entries, [])
    return Batch(detection, prepare(detection, config.head, static=False))


def _train(model: SOLOv2, batch: Batch, case: Mapping[str, Any]) -> Tree:
    """Maps, losses and gradients of a training step."""
    kept: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            kept[name] = output
            kept[f"{name} input"] = inputs[0]

        return hook

    parts = ("backbone", "neck", "bbox_head", "mask_feat_head")
    handles = [model.get_submodule(part).register_forward_hook(keep(part)) for part in parts]
    losses = model.train()(batch)
    for handle in handles:
        handle.remove()
    logits, kernels = kept["bbox_head"]
    return {
        "input": kept["backbone input"],
        "outputs": {
            "input": kept["backbone input"],
            "backbone": kept["backbone"],
            "fpn": kept["neck"],
            "cate": logits,
            "cls": logits,
            "kernel": kernels,
            "mask_feat": kept["mask_feat_head"],
        },
        "losses": {
            "loss_ins": losses["loss_ins"].item(),
            "loss_cate": losses["loss_cate"].item(),
            "loss_mask": losses["loss_ins"].item(),
            "loss_cls": losses["loss_cate"].item(),
        },
        "grad_norms": _grad_norms(model, batch, case.get("grad_norms", {})),
    }


def _gradients(model: SOLOv2, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    losses: dict[str, Tensor] = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: grad.detach().clone() for name, grad in named if grad is not None}


def _grad_norms(model: SOLOv2, batch: Batch, recorded: Mapping[str, float | None]) -> Tree:
    """Norms of the gradients that were recorded, with their slack if one of them is off."""
    gradients = _gradients(model, batch)
    found: Tree = dict.fromkeys(recorded)
    found |= {
        name: gradients[from_mmdet(name)].norm().item()
        for name in recorded
        if from_mmdet(name) in gradients
    }
    if all(_near(found[name], norm) for name, norm in recorded.items()):
        return found
    slack = _disturb(model, batch, gradients)
    return {
        name: norm
        if _near(norm, recorded[name])
        else {"value": norm, "slack": slack.get(from_mmdet(name), 0.0)}
        for name, norm in found.items()
    }


def _near(ours: float | None, recorded: float | None) -> bool:
    """Whether two norms agree; upstream has none where a batch has no positive cell."""
    return abs((ours or 0.0) - (recorded or 0.0)) <= TOLERANCE * (recorded or 0.0)


def _disturb(model: SOLOv2, batch: Batch, gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each gradient moves at most when all weights move by a rounding error."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    moved = dict.fromkeys(gradients, 0.0)
    for _ in range(_DRAWS):
        with torch.no_grad():
            for name, value in model.named_parameters():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(weights[name] * (1 + _ROUNDING * noise.to(value)))
        for name, gradient in _gradients(model, batch).items():
            moved[name] = max(moved[name], (gradient - gradients[name]).norm().item())
    return moved


def _targets(detection: DetectionBatch, targets: Targets, config: Config) -> Sequence[Tree]:
    """As mmdet's: each image's pairs of cell and object by level, in the order of the objects."""
    assert detection.masks_BQHW is not None
    background = config.model.num_classes
    result = []
    for image, masks_QHW in enumerate(detection.masks_BQHW):
        valid_P = targets.valid_BP[image]
        cells_N, objects_N = targets.cells_BP[image][valid_P], targets.objects_BP[image][valid_P]
        names = ("mask_targets", "mask_shapes", "labels", "pos_masks", "pos_index")
        found: Tree = {name: [] for name in names}
        first = 0
        for grid in config.head.grids:
            here_N = (cells_N >= first) & (cells_N < first + grid**2)
            masks_NHW = masks_QHW[objects_N[here_N]]
            index_N = cells_N[here_N] - first
            labels_S = targets.labels_BS[image, first : first + grid**2]
            positive_S = torch.zeros(grid**2, dtype=torch.bool)
            positive_S[index_N] = True
            found["mask_targets"].append(_pack(masks_NHW.numpy()))
            found["mask_shapes"].append(list(masks_NHW.shape))
            found["labels"].append(labels_S.where(labels_S >= 0, background).view(grid, grid))
            found["pos_masks"].append(positive_S)
            found["pos_index"].append(index_N)
            first += grid**2
        result.append(found)
    return result


@torch.no_grad()
def _predict(model: SOLOv2, batch: Batch, case: Mapping[str, Any]) -> Sequence[Tree | None]:
    """Each image's objects by falling score, their masks as large as the image's file."""
    threshold = model.config.test.mask_thr
    found = model(batch)
    lower, usual, upper = (
        _full_size(found, batch, threshold + side) for side in (-_UNDECIDED, 0.0, _UNDECIDED)
    )
    result: list[Tree | None] = []
    for image, low, high, recorded in zip(usual, lower, upper, case["predict"], strict=True):
        shape = list(image["masks"].shape)
        if recorded is None and not shape[0]:
            result.append(None)  # what WXinlong/SOLO returns then
            continue
        image |= {"shape": shape, "mask_shape": shape, "masks": _pack(image["masks"])}
        if recorded is None or not torch.equal(image["masks"], recorded["masks"]):
            slack = _pack(low["masks"] != high["masks"])
            image["masks"] = {"value": image["masks"], "slack": slack}
        result.append(image)
    return result


def _full_size(found: Detections, batch: Batch, threshold: float) -> list[Tree]:
    """Scores, labels and masks (uint8 [D, H, W]) of each image."""
    result = []
    originals = batch.detection.originals_B2.tolist()
    for image, size in zip(to_originals(found, batch, threshold), originals, strict=True):
        masks_DHW = np.zeros((len(image.rles), *size), np.uint8)
        for mask_HW, rle in zip(masks_DHW, image.rles, strict=True):
            mask_HW[...] = coco_mask.decode(rle)
        result.append(
            {
                "scores": torch.as_tensor(image.scores_D),
                "labels": torch.as_tensor(image.labels_D),
                "masks": masks_DHW,
            }
        )
    return result


def _pack(masks: Any) -> Tensor:
    """All pixels in one row, eight to a byte, the first the highest bit."""
    return torch.from_numpy(np.packbits(masks))
