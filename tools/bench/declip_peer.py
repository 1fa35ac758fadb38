"""What DeCLIP's benches share: the peers, and images with captions as each of them takes them.

The peer of DeCLIP is a clone of https://github.com/Sense-GVT/DeCLIP, given by ``--peer``; that of
plain CLIP is open_clip. Neither is a requirement of this zoo. Sense-GVT's asks for CUDA, a
cluster's launcher and packages that its networks do not need. ``use`` puts something in their
place:

    Tensor.cuda         gives the tensor back
    torch.distributed   a group of this process alone, by gloo
    ipdb                nothing, it is only imported
    textaugment         ``GivenEda``, with which a bench says how each caption is augmented

``linklink`` comes from the clone. It has no batch normalisation over processes, so a ResNet has
``use_sync_bn: False`` here.

Shape letters: B images, U token rows of a caption, T tokens, N rows of the queue, D features.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "built-in/others/DeCLIP_for_PyTorch"
CLIP = "clip_vitb32"
MODELS = ("declip_vitb32", "declip_res50", CLIP)
EMBED_DIM = {"declip_vitb32": 512, "declip_res50": 1024, CLIP: 512}
QUEUE = 2**16
CONTEXT = 77
MASKED = 0.15
CAPTIONS = (
    "a brown dog runs along the beach at sunset",
    "two children play football on the grass behind our house",
    "the old stone bridge over the river, seen from the north bank",
    "my sister blowing out the candles on her birthday cake",
    "red and white lighthouse on a cliff near the harbour",
    "street market in the rain, people with umbrellas",
    "steam locomotive number 7 leaving the station this morning",
    "close up of a yellow flower with a bee, taken in the botanical garden",
)

MISSING = "{what} is not here ({error}). This bench compares with it: {advice}."
CLONE = "git clone https://github.com/Sense-GVT/DeCLIP elsewhere, and give it by --peer"


class GivenEda:
    """Stands in for ``textaugment.EDA``: augments a caption as it was told to.

    Attributes:
        augmented: augmented form by caption; a caption that is not there stays as it is.
    """

    augmented: ClassVar[dict[str, str]] = {}

    def synonym_replacement(self, caption: str) -> str:
        """What was given for the caption."""
        return self.augmented.get(caption, caption)

    random_swap = random_deletion = synonym_replacement


def use(peer: Path | None) -> None:
    """Makes Sense-GVT/DeCLIP ready to build networks; calling it again does nothing.

    Args:
        peer: a clone of the repository.

    Raises:
        SystemExit: It is not there.
    """
    import torch

    if "prototype.model.declip" in sys.modules:
        return
    if peer is None or not (peer / "prototype" / "model" / "declip.py").is_file():
        error = f"no {peer}/prototype/model/declip.py" if peer else "no --peer"
        raise SystemExit(MISSING.format(what="DeCLIP", error=error, advice=CLONE))
    sys.path.insert(0, str(peer.resolve()))
    sys.modules["ipdb"] = types.ModuleType("ipdb")
    textaugment: Any = types.ModuleType("textaugment")
    textaugment.EDA = GivenEda
    sys.modules["textaugment"] = textaugment
    torch.Tensor.cuda = _stay  # type: ignore[method-assign,assignment]
    distributed: Any = importlib.import_module("torch.distributed")
    if not distributed.is_initialized():
        store = distributed.HashStore()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        importlib.import_module("prototype.model.declip")
    except ImportError as error:
        raise SystemExit(MISSING.format(what="DeCLIP", error=error, advice=CLONE)) from error


def _stay(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return self


def use_open_clip() -> Any:
    """The module.

    Raises:
        SystemExit: It is not installed.
    """
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        advice = "pip install --no-deps --target DIRECTORY open_clip_torch==3.3.0"
        raise SystemExit(MISSING.format(what="open_clip", error=error, advice=advice)) from error


def use_ours() -> None:
    """Makes the package ``declip`` importable."""
    if str(MODEL_DIR) not in sys.path:
        sys.path.insert(0, str(MODEL_DIR))


def build(kind: str, kwargs: Mapping[str, Any]) -> Any:
    """One of DeCLIP's networks with random weights, in training mode.

    Args:
        kind: ``declip_vitb32``, ``declip_res50``, ``clip_vitb32`` or ``clip_res50``.
        kwargs: ``image_encode``, ``text_encode`` and ``clip``, as in its config files.
    """
    module = importlib.import_module(f"prototype.model.{kind.partition('_')[0]}")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells each time that conv1 is frozen
        return getattr(module, kind)(**kwargs).train()


def losses(model: Any, images: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
    """The losses of a batch as its solver makes them, without their weights.

    Left out is ``nt_xent_loss``, which it computes for its log only.

    Args:
        model: by ``build``.
        images: normalised; float [B, 6, H, W] of a DeCLIP, both views behind each other, or float
            [B, 3, H, W] of a CLIP.
        captions: B texts.
    """
    module = importlib.import_module("prototype.loss_functions")
    contrast, simsiam = module.ClipInfoCELoss(), module.SimsiamLoss()
    batch = {"images": images, "captions": [[caption] for caption in captions]}
    if not hasattr(model, "projector"):
        return {"clip_loss": contrast(*model(batch))[0]}
    found = model(batch, return_dict=True)
    parts = [
        contrast(found[name][view], found[name][view + 2])[0]
        for name in ("logits", "logits_aug")
        for view in (0, 1)
    ]
    nearest = found["nn_text_logits"]
    p1, p2, z1, z2 = found["simsiam_features"]
    return {
        "clip_loss": sum(parts) / 4,
        "nn_text": sum(contrast(nearest[view], nearest[view + 2])[0] for view in (0, 1)) / 2,
        "simsiam_loss": simsiam(p1, z1, p2, z2),
        "masking_language": found["text_self_supervised"],
    }


def full_kwargs(kind: str) -> dict[str, Any]:
    """What the published config of a network gives it."""
    width = EMBED_DIM[kind]
    text = {"text_encode_type": "Transformer", "text_model_utils": {"random": False}}
    clip: dict[str, Any] = {"use_allgather": True}
    if kind != CLIP:
        clip |= {"text_mask_type": "MLM", "return_nn_bank": True, "feature_dim": width}
    image: dict[str, Any] = {"embed_dim": width}
    if kind == "declip_res50":
        image["use_sync_bn"] = False
    return {"image_encode": image, "text_encode": {**text, "embed_dim": width}, "clip": clip}


def vocabulary() -> Path:
    """CLIP's file of merges."""
    use_ours()
    from declip.tokenizer import find_vocabulary

    return find_vocabulary("", None)


def build_full(kind: str) -> Any:
    """The peer's network at its published size, in training mode.

    What its first weights would hide is drawn: blocks of a ResNet begin as their shortcuts.
    """
    import torch

    if kind == CLIP:
        with contextlib.redirect_stderr(io.StringIO()):  # it warns that weights are random
            model = use_open_clip().create_model("ViT-B-32-quickgelu").train()
        model.visual.conv1.requires_grad_(False)
        return model
    kwargs = full_kwargs(kind)
    kwargs["text_encode"]["bpe_path"] = str(vocabulary())
    model = build(kind, kwargs)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bn3.weight"):
                weight.fill_(0.3)
    return model


def our_config(kind: str) -> Any:
    """The settings of our network of the same kind."""
    use_ours()
    from declip.config import config_from_upstream

    return config_from_upstream({"type": kind, "kwargs": full_kwargs(kind)})


def to_our_keys(kind: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The peer's weights as our network takes them.

    open_clip has no mask token, no bias in its text projection, and a scalar scale.
    """
    import torch

    if kind != CLIP:
        return dict(weights)
    ours = {
        name if name.startswith(("visual.", "logit_scale")) else f"encode_text.{name}": value
        for name, value in weights.items()
    }
    projection = ours.pop("encode_text.text_projection")
    ours["encode_text.text_projection.weight"] = projection.T
    ours["encode_text.text_projection.bias"] = torch.zeros(projection.shape[1])
    ours["logit_scale"] = ours["logit_scale"].view(1)
    words = ours["encode_text.token_embedding.weight"]
    ours["encode_text.token_embedding.weight"] = torch.cat(
        [words[:-2], torch.zeros(1, words.shape[1]), words[-2:]]
    )
    return ours


class Scene:
    """Images, captions with masked words, and a queue: the same for both.

    Args:
        kind: of ``MODELS``.
        images: B; captions repeat from the ninth on.

    Attributes:
        vocab_size: of CLIP's vocabulary with DeCLIP's mask token.
        queue_ND: unit rows; none for a CLIP.
    """

    def __init__(self, kind: str, images: int) -> None:
        import torch

        use_ours()
        from declip.texts import Texts
        from declip.tokenizer import Tokenizer

        torch.manual_seed(1)
        random.seed(1)
        self._is_clip = kind == CLIP
        self.captions = [CAPTIONS[image % len(CAPTIONS)] for image in range(images)]
        self._tokenizer = Tokenizer(vocabulary())
        self.vocab_size = self._tokenizer.vocab_size
        eda: Any = None if self._is_clip else _swap_ends
        self._texts = Texts(self._tokenizer, CONTEXT, eda, 0 if self._is_clip else MASKED, True)
        self._items = [self._texts(caption) for caption in self.captions]
        views = 1 if self._is_clip else 2
        self.images_VBCHW = torch.randint(0, 256, (views, images, 3, 224, 224)).to(torch.uint8)
        queue = 0 if self._is_clip else QUEUE
        rows_ND = torch.randn(queue, EMBED_DIM[kind])
        self.queue_ND = torch.nn.functional.normalize(rows_ND, dim=1)

    def batch(self, *, whole: bool) -> Any:
        """As our loader delivers it.

        Args:
            whole: contrast the captions without masks, which makes three rows of a caption.
        """
        from declip.batch import Batch
        from declip.texts import Texts

        texts, items = self._texts, self._items
        if whole:
            texts = Texts(self._tokenizer, CONTEXT, texts._eda, MASKED, False)
            items = [_with_whole(item) for item in items]
        tokens_UBT, ends_UB, masked = texts.collate(items, static=False)
        names = [str(image) for image in range(len(items))]
        return Batch(self.images_VBCHW, tokens_UBT, ends_UB, masked, names, [])

    def their_images(self) -> torch.Tensor:
        """Normalised, float32 (B, 3 or 6, 224, 224)."""
        import torch

        from zoo_common.imagenet import IMAGENET_MEAN, IMAGENET_STD

        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        images_VBCHW = (self.images_VBCHW / 255 - mean) / std
        return torch.cat(list(images_VBCHW), dim=1)

    def their_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token rows (U, B, T), padded to the context, and labels (B, T) of the first one."""
        import torch

        rows = [item.rows for item in self._items]
        tokens_UBT = torch.zeros(len(rows[0]), len(rows), CONTEXT, dtype=torch.int64)
        labels_BT = torch.full((len(rows), CONTEXT), -100)
        for place, item in enumerate(self._items):
            for text, row in enumerate(item.rows):
                tokens_UBT[text, place, : len(row)] = torch.tensor(row)
            labels_BT[place, item.columns] = torch.tensor(item.labels, dtype=torch.int64)
        if self._is_clip:  # start and end token are one lower without the mask token
            tokens_UBT -= (tokens_UBT > self._tokenizer.mask_id).long()
        return tokens_UBT, labels_BT


def _swap_ends(caption: str) -> str:
    """An augmented form that needs no WordNet."""
    first, *others, last = caption.split()
    return " ".join([last, *others, first])


def _with_whole(item: Any) -> Any:
    """A caption's rows with the whole one in front of them and the masked one behind."""
    masked, augmented = item.rows
    whole = list(masked)
    for column, label in zip(item.columns, item.labels, strict=True):
        whole[column] = label
    ends = (*item.ends, item.ends[0])
    return item._replace(rows=(whole, augmented, masked), ends=ends)


def forward_of(
    kind: str, model: Any, scene: Scene, weights: Mapping[str, float]
) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that gives the peer's losses under our names, times their weights."""
    images = scene.their_images()
    tokens_UBT, labels_BT = scene.their_tokens()
    if kind == CLIP:
        criterion = use_open_clip().ClipLoss()

        def forward_clip() -> dict[str, torch.Tensor]:
            return {"clip": criterion(*model(images, tokens_UBT[0]))}

        return forward_clip

    def tokenize(*_: Any, mask_type: str | None = None, **__: Any) -> Any:
        return (tokens_UBT[0], labels_BT) if mask_type else tokens_UBT[1]

    model.encode_text.tokenize = tokenize
    queue = model.nn_replacer_text
    queue._init_memory_bank(scene.queue_ND.shape[1])
    queue.bank.copy_(scene.queue_ND.T)

    def forward() -> dict[str, torch.Tensor]:
        found = losses(model, images, scene.captions)
        return {ours: weights[ours] * found[theirs] for theirs, ours in NAMES.items()}

    return forward


NAMES = {
    "clip_loss": "clip",
    "nn_text": "nn_text",
    "simsiam_loss": "simsiam",
    "masking_language": "masked_language",
}
"""The solver's names of losses and ours."""
