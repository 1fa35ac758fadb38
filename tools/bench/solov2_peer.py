"""What the SOLOv2 benches share: mmdet 3.3's SOLOv2 as the peer, and the scene as each takes it.

Random weights would find nothing, or everything: so the statistics of batch normalisation, which
are constants in training, are set to those of the scene (``calibrate``), and the network is
trained on the first image for some steps (``teach``), after which about three masks are found for
each of its objects. The same weights, images and objects go to both.

Shape letters: B images, C channels, N objects, H W pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmdet_peer
from scene import NUM_CLASSES

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from zoo_common.detection.transforms import Sample

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "contrib/cv/detection/SOLOv2"
CONFIG = "configs/solov2/solov2_r50_fpn_1x_coco.py"
MAX_NORM = 35  # of gradients, in both recipes
RENAMED = (
    ("mask_head.mask_feature_head.conv_pred.", "mask_feat_head.conv_pred.0."),
    ("mask_head.mask_feature_head.", "mask_feat_head."),
    ("mask_head.cls_convs.", "bbox_head.cate_convs."),
    ("mask_head.conv_cls.", "bbox_head.solo_cate."),
    ("mask_head.conv_kernel.", "bbox_head.solo_kernel."),
    ("mask_head.", "bbox_head."),
)
"""How mmdet's keys begin, and ours."""


def build_theirs(weights: dict[str, torch.Tensor] | None = None) -> Any:
    """Mmdet's network, with random weights if none are given.

    Raises:
        SystemExit: mmdet is not installed.
    """
    mmdet_peer.use()
    import mmdet
    from mmdet.registry import MODELS
    from mmengine.config import Config

    config = Config.fromfile(str(Path(mmdet.__file__).parent / ".mim" / CONFIG))
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    if weights is None:
        model.init_weights()
    else:
        model.load_state_dict(weights)
    return model.train()


def make_weights(scenes: Sequence[Sample], steps: int) -> dict[str, torch.Tensor]:
    """Weights of a network that knows the first scene a little."""
    import torch

    torch.manual_seed(0)
    model = build_theirs()
    data = to_theirs(model, scenes[:1], training=True)
    calibrate(model, data)
    teach(model, data, steps)
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def build_ours(weights: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Our network with mmdet's weights, and its config."""
    import torch

    sys.path.insert(0, str(MODEL_DIR))
    from solov2.config import Config
    from solov2.model import build_model, to_device

    config = Config()
    config.loss.mask_average = "cells"  # mmdet's rule
    model = build_model(config, NUM_CLASSES)
    model.load_state_dict({_our_key(key): value for key, value in weights.items()})
    return to_device(model, torch.device("cpu")), config


def _our_key(key: str) -> str:
    for theirs, ours in RENAMED:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def calibrate(model: Any, data: dict[str, Any]) -> None:
    """Sets the statistics of batch normalisation to those of this batch, layer by layer."""
    import torch

    def measure(layer: Any, inputs: tuple[torch.Tensor]) -> None:
        layer.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        layer.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
    with torch.no_grad():
        model.extract_feat(data["batch_inputs"])
    for hook in hooks:
        hook.remove()


def teach(model: Any, data: dict[str, Any], steps: int) -> None:
    """Trains mmdet's network on one batch, until it finds what is there."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-5)  # more would saturate the masks for good
    for _ in range(steps):
        sum(model.loss(**data).values()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad()


def draw_masks(scene: Sample) -> NDArray[np.uint8]:
    """The objects' masks at the size of the image, 0 or 1, [N, H, W]."""
    import numpy as np
    from pycocotools import mask

    assert scene.edges is not None
    polygons = [edges[:, :2].flatten().tolist() for edges in scene.edges]
    runs = mask.frPyObjects(polygons, *scene.size)
    return np.ascontiguousarray(mask.decode(runs).transpose(2, 0, 1))


def to_ours(scenes: Sequence[Sample], config: Any) -> Any:
    """The scenes as a batch of our SOLOv2, with the targets."""
    from solov2.data import Batch
    from solov2.targets import prepare

    detection = to_detection(scenes)
    return Batch(detection, prepare(detection, config.head, static=False))


def to_detection(scenes: Sequence[Sample], drawn: Sequence[NDArray[np.uint8]] = ()) -> Any:
    """The scenes as a batch of this zoo, with quarter masks; ``drawn``: by ``draw_masks``."""
    from zoo_common.detection.batching import Collate, Entry
    from zoo_common.detection.bitmasks import Masks

    entries = []
    for index, scene in enumerate(scenes):
        masks_NHW = drawn[index] if drawn else draw_masks(scene)
        masks = Masks.of(masks_NHW, *scene.size)
        sample = scene._replace(edges=None, rings=None, masks=masks)
        entries.append(Entry(sample, scene.size, index, f"scene {index}"))
    return Collate(None, divisibility=32, masks=False, quarter_masks=True)(entries, [])


def to_theirs(model: Any, scenes: Sequence[Sample], *, training: bool) -> dict[str, Any]:
    """The scenes as mmdet's networks take them: normalised and padded, objects as bitmaps."""
    import torch
    from mmdet.structures import DetDataSample

    inputs, samples = [], []
    for index, scene in enumerate(scenes):
        sample = DetDataSample(
            metainfo={
                "img_id": index,
                "img_shape": scene.size,
                "ori_shape": scene.size,
                "scale_factor": (1.0, 1.0),
            }
        )
        sample.gt_instances = their_objects(scene)
        samples.append(sample)
        image_CHW = torch.from_numpy(scene.image_HWC[:, :, ::-1].copy()).permute(2, 0, 1)
        inputs.append(image_CHW.contiguous())
    data = model.data_preprocessor({"inputs": inputs, "data_samples": samples}, training)
    return {"batch_inputs": data["inputs"], "batch_data_samples": data["data_samples"]}


def their_objects(scene: Sample) -> Any:
    """The scene's objects as mmdet takes them."""
    import torch
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    return InstanceData(
        bboxes=torch.from_numpy(scene.boxes_N4).float(),
        labels=torch.from_numpy(scene.labels_N),
        masks=BitmapMasks(draw_masks(scene), *scene.size),
    )
