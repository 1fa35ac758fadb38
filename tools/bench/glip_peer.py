"""What the GLIP benches share: mmdet 3.3's GLIP-T as the peer, and the scene as each takes it.

Both have the same weights, which are random: nothing that costs time depends on what they find but
suppression, and for that ``find_something`` moves one bias so that a trained network's number of
candidates is above the threshold. BERT has the sizes of bert-base-uncased and a vocabulary of as
many words, in which the class names of COCO are.

mmdet 3.3 was written for transformers 4: what it calls there and is gone stands in ``use``.

Shape letters: B images, Q slots for boxes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmdet_peer

if TYPE_CHECKING:
    import torch

    from zoo_common.detection.transforms import Sample

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "built-in/others/GLIP_for_PyTorch"
CONFIG = "configs/glip/glip_atss_swin-t_{}_fpn_dyhead_16xb2_ms-2x_funtune_coco.py"
VARIANTS = ("a", "b")
"""Without and with fusion."""

MAX_NORM = 1.0  # of gradients, in both recipes
VOCABULARY = 30522  # words of bert-base-uncased
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NOISE = ("p", "drop_prob", "dropout", "probability")
"""How both name the probability of what training drops."""


def make_bert(directory: Path) -> None:
    """Writes a BERT of bert-base-uncased's sizes, with random weights and a vocabulary."""
    import torch
    from transformers import BertConfig, BertModel

    from zoo_common.detection.classes import COCO_CLASSES

    words = sorted({word for name in COCO_CLASSES for word in name.split()})
    vocabulary = [*SPECIAL, ".", *words]
    vocabulary += [f"[unused{number}]" for number in range(VOCABULARY - len(vocabulary))]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.manual_seed(0)
    BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(directory)


def use() -> None:
    """Makes mmdet's GLIP ready to be built; calling it again does nothing.

    Raises:
        SystemExit: mmdet is not installed.
    """
    import torch
    import torchvision
    import transformers

    modeling: Any = transformers.modeling_utils
    helpers: Any = transformers.pytorch_utils
    modeling.apply_chunking_to_forward = helpers.apply_chunking_to_forward
    mmdet_peer.use()
    from mmdet.models.utils import vlfuse_helper

    suppression: Any = importlib.import_module("mmcv.ops.nms")
    modulated: Any = importlib.import_module("mmcv.ops.modulated_deform_conv")

    def attend(self: Any, hidden: Any, mask: Any, *_: Any, **__: Any) -> tuple[Any]:
        return (self.output(self.self(hidden, mask)[0], hidden),)

    def extend(self: Any, mask_BT: torch.Tensor, *_: Any) -> torch.Tensor:
        return (1.0 - mask_BT[:, None, None].float()) * torch.finfo(torch.float32).min

    def tokenize(self: Any, *arguments: Any, **settings: Any) -> Any:
        return self(*arguments, **settings)

    def suppress(boxes: Any, scores: Any, *, iou_threshold: float, offset: int) -> Any:
        assert offset == 0
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    vlfuse_helper.BertAttention.forward = attend
    vlfuse_helper.BertEncoderLayer.get_extended_attention_mask = extend
    tokenizer: Any = transformers.PreTrainedTokenizerBase
    tokenizer.batch_encode_plus = tokenize
    suppression.ext_module.nms = suppress
    if not hasattr(modulated, "exact"):
        modulated.exact = modulated.modulated_deform_conv2d
        modulated.modulated_deform_conv2d = _modulated_deform_conv2d


def _modulated_deform_conv2d(
    x: Any, offset: Any, mask: Any, weight: Any, bias: Any, stride: Any, *others: Any
) -> Any:
    """As mmcv's compiled one: offsets of another size are read as if they were of the output's."""
    modulated: Any = importlib.import_module("mmcv.ops.modulated_deform_conv")
    rows, columns = (-(-length // stride[0]) for length in x.shape[2:])

    def cut(places: Any) -> Any:
        numbers = places.shape[1]
        flat = places.flatten(1)[:, : numbers * rows * columns]
        return flat.view(-1, numbers, rows, columns)

    return modulated.exact(x, cut(offset), cut(mask), weight, bias, stride, *others)


def build_theirs(
    variant: str, bert: Path, weights: dict[str, torch.Tensor] | None = None, *, recompute: bool
) -> Any:
    """Mmdet's network, with random weights if none are given.

    Args:
        variant: one of ``VARIANTS``.
        bert: of :func:`make_bert`.
        weights: mmdet's.
        recompute: the fusion's forward pass again in the backward pass, in less memory.

    Raises:
        SystemExit: mmdet is not installed.
    """
    use()
    import mmdet
    from mmdet.registry import MODELS
    from mmengine.config import Config

    config = Config.fromfile(str(Path(mmdet.__file__).parent / ".mim" / CONFIG.format(variant)))
    config.model.backbone.init_cfg = None
    config.model.bbox_head.use_checkpoint = recompute
    config.model.bbox_head.lang_model_name = config.model.language_model.name = str(bert)
    model = MODELS.build(config.model)
    if weights is None:
        model.init_weights()
    else:
        model.load_state_dict(weights)
    return model.train()


def build_ours(variant: str, bert: Path, weights: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Our network with mmdet's weights, and its config."""
    import torch

    sys.path.insert(0, str(MODEL_DIR))
    from glip.config import Config
    from glip.model import build_model, to_device
    from glip.weights import from_mmdet, reorder

    config = Config()
    config.model.bert = str(bert)
    config.model.fusion = variant == "b"
    config.loss.no_object = False  # mmdet's rules
    config.test.rank_by, config.test.legacy_nms = "score", False
    model = build_model(config)
    model.load_state_dict(reorder({from_mmdet(key): value for key, value in weights.items()}))
    return to_device(model.train(), torch.device("cpu")), config


@contextlib.contextmanager
def without_noise(model: Any) -> Iterator[None]:
    """Inside, a network drops nothing in training: both give the same losses."""
    before = []
    for module in model.modules():
        for name in NOISE:
            value = getattr(module, name, None)
            if isinstance(value, float):
                before.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def to_ours(scenes: Sequence[Sample], config: Any) -> Any:
    """The scenes as a training batch of our GLIP, with the caption of all classes."""
    import torch

    from glip.captions import TextEncoder, caption_of
    from glip.data import Batch
    from zoo_common.detection.batching import Collate, Entry
    from zoo_common.detection.classes import COCO_CLASSES

    entries = [
        Entry(scene._replace(edges=None, rings=None), scene.size, index, f"scene {index}")
        for index, scene in enumerate(scenes)
    ]
    detection = Collate(None, divisibility=32, masks=False)(entries, [])
    caption = caption_of(COCO_CLASSES)
    encoder = TextEncoder(Path(config.model.bert), config.model.max_tokens)
    map_NT = encoder.token_map(caption)
    valid_BQ1 = detection.valid_BQ[..., None]
    last_4 = torch.tensor([0, 0, 1, 1])  # the last pixel belongs to a box
    return Batch(
        detection,
        encoder([caption.text] * len(scenes)),
        (detection.boxes_BQ4 - last_4) * valid_BQ1,
        map_NT[detection.labels_BQ] & valid_BQ1,
    )


def to_theirs(model: Any, scenes: Sequence[Sample], *, training: bool) -> dict[str, Any]:
    """The scenes as mmdet's GLIP takes them: normalised and padded, with the class names."""
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    from zoo_common.detection.classes import COCO_CLASSES

    inputs, samples = [], []
    for index, scene in enumerate(scenes):
        sample = DetDataSample(
            metainfo={
                "img_id": index,
                "img_shape": scene.size,
                "ori_shape": scene.size,
                "scale_factor": (1.0, 1.0),
                "text": tuple(COCO_CLASSES),
                "custom_entities": True,
            }
        )
        boxes = torch.from_numpy(scene.boxes_N4).float() - torch.tensor([0.0, 0.0, 1.0, 1.0])
        labels = torch.from_numpy(scene.labels_N)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        samples.append(sample)
        blue_first = torch.from_numpy(scene.image_HWC[:, :, ::-1].copy())
        inputs.append(blue_first.permute(2, 0, 1).contiguous())
    data = model.data_preprocessor({"inputs": inputs, "data_samples": samples}, training)
    return {"batch_inputs": data["inputs"], "batch_data_samples": data["data_samples"]}
