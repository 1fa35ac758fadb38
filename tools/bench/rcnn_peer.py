"""What the R-CNN benches share: detectron2 as the peer, and the scene as each of us takes it.

detectron2 comes from the environment. Random weights would find nothing, and then half of the
work is not done: so the frozen statistics are set to those of the scene (``calibrate``), and the
network is trained on it for some steps (``teach``), after which about 50 of 512 proposals are
foreground, and about 50 objects are found. The same weights, images and objects go to both.

Shape letters: B images, C channels, H W pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scene import NUM_CLASSES

if TYPE_CHECKING:
    import torch

    from zoo_common.detection.batching import DetectionBatch, StaticShapes
    from zoo_common.detection.transforms import Sample

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "built-in/cv/detection/Faster_Mask_RCNN_for_PyTorch"
CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
MISSING = (
    "detectron2 is not here ({name}: {error}). This bench compares with it: install it as its "
    "INSTALL.md says, for the torch of this environment, outside of this repository, and put it "
    "on PYTHONPATH."
)


def their_config() -> Any:
    """detectron2's config of the network, for the CPU and without weights.

    Raises:
        SystemExit: detectron2 is not installed.
    """
    try:
        import detectron2
        from detectron2.config import get_cfg
    except ImportError as error:
        raise SystemExit(MISSING.format(name=error.name, error=error)) from error
    config = get_cfg()
    configs = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    config.merge_from_file(str(configs / CONFIG))
    config.MODEL.DEVICE = "cpu"
    config.MODEL.WEIGHTS = ""
    config.SOLVER.BASE_LR = 1e-9  # every step meets the same weights, more or less
    return config


def build_theirs(config: Any, weights: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """detectron2's network, with random weights if none are given."""
    from detectron2.modeling import build_model

    model: torch.nn.Module = build_model(config)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def make_weights(config: Any, scenes: Sequence[Sample], steps: int) -> dict[str, torch.Tensor]:
    """Weights of a network that knows the scenes a little."""
    import torch

    torch.manual_seed(0)
    model, batch = build_theirs(config), to_theirs(scenes)
    calibrate(model, batch)
    teach(model, batch, steps)
    return model.state_dict()


def build_ours(weights: dict[str, torch.Tensor], *, static_shapes: bool = False) -> tuple[Any, Any]:
    """Our network with detectron2's weights, and its config."""
    import torch

    sys.path.insert(0, str(MODEL_DIR))
    from rcnn.config import Config
    from rcnn.model import build_model, to_device

    config = Config()
    config.solver.base_lr = 1e-9
    model = build_model(config, NUM_CLASSES, static_shapes=static_shapes)
    model.load_state_dict(weights)
    return to_device(model, torch.device("cpu")), config


def calibrate(model: Any, batch: list[dict[str, Any]]) -> None:
    """Sets the statistics of frozen normalisation to those of this batch, layer by layer."""
    import torch
    from detectron2.layers import FrozenBatchNorm2d

    def measure(layer: Any, inputs: tuple[torch.Tensor]) -> None:
        layer.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        layer.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    layers = [layer for layer in model.modules() if isinstance(layer, FrozenBatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
    with torch.no_grad():
        model.backbone(model.preprocess_image(batch).tensor)
    for hook in hooks:
        hook.remove()


def teach(model: torch.nn.Module, batch: list[dict[str, Any]], steps: int) -> None:
    """Trains detectron2's network on one batch, until it proposes and finds what is there."""
    import torch
    from detectron2.utils.events import EventStorage

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
    with EventStorage():
        for _ in range(steps):
            sum(model(batch).values()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 5.0)
            optimizer.step()
            optimizer.zero_grad()


def to_ours(scenes: Sequence[Sample], shapes: StaticShapes | None = None) -> DetectionBatch:
    """The scenes as a batch of this zoo."""
    from zoo_common.detection.batching import Collate, Entry

    entries = [Entry(scene, scene.size, i, f"scene {i}") for i, scene in enumerate(scenes)]
    return Collate(shapes, divisibility=32, masks=True)(entries, [])


def to_theirs(scenes: Sequence[Sample]) -> list[dict[str, Any]]:
    """The scenes as detectron2's mapper delivers them: BGR, objects as polygons."""
    import torch
    from detectron2.structures import Boxes, Instances, PolygonMasks

    batch = []
    for scene in scenes:
        assert scene.edges is not None
        polygons = [[edges[:, :2].flatten()] for edges in scene.edges]
        instances = Instances(
            scene.size,
            gt_boxes=Boxes(torch.from_numpy(scene.boxes_N4).float()),
            gt_classes=torch.from_numpy(scene.labels_N),
            gt_masks=PolygonMasks(polygons),
        )
        image_CHW = torch.from_numpy(scene.image_HWC[:, :, ::-1].copy()).permute(2, 0, 1)
        height, width = scene.size
        batch.append(
            {
                "image": image_CHW.contiguous(),
                "instances": instances,
                "height": height,
                "width": width,
            }
        )
    return batch
