"""The original's names for settings: its programs' options and its configs' keys.

Every key of the config.yaml files of Sense-GVT/DeCLIP's (9d9e25da) clip_experiments and
declip_experiments on YFCC15M stands here, so that they are read as they are. A key for which we
have a setting sets it. One whose value could make another network or another training out of it
is taken with the value that we have, and refused with any other. One that nothing reads with
those values is taken with any.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from zoo_common.config import CardKey, CardOptions, Given, flatten
from zoo_common.errors import UserError
from zoo_common.options import Assignment, is_true

IMAGE = "model.kwargs.image_encode."
TEXT = "model.kwargs.text_encode."
CLIP = "model.kwargs.clip."
WEIGHTS = "clip_simsiam_loss_weight."

TYPES = {
    "declip_vitb32": ("declip", "vit"),
    "declip_res50": ("declip", "resnet"),
    "clip_vitb32": ("clip", "vit"),
    "clip_res50": ("clip", "resnet"),
}
"""The original's networks: our objective and tower."""

TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"width": 768, "heads": 12, "layers": 12},
    "resnet": {"width": 64, "heads": 32, "layers": [3, 4, 6, 3]},
}
"""What the original's image towers have unless their keywords say otherwise."""

DATA = "data.path says where the data are (--data_path)"


def _model(value: Any, given: Given) -> Mapping[str, Any]:
    """The network, and what its config leaves to the original's defaults."""
    if value not in TYPES:
        raise ValueError(f"{value!r} is not built here, only {', '.join(TYPES)}.")
    objective, tower = TYPES[value]
    settings: dict[str, Any] = {"model.objective": objective, "model.tower": tower}
    for name, default in TOWERS[tower].items():
        if IMAGE + name not in given:
            settings |= _image_key(name, tower, default)
    if tower == "resnet":
        settings |= _sync_batch_norm(None, given)
    if objective == "clip":
        return settings | {
            "loss.clip": 1.0,
            "loss.nn_text": 0.0,
            "loss.simsiam": 0.0,
            "loss.masked_language": 0.0,
            "text.eda": False,
        }
    _check_parts(given)
    return settings | {"loss.contrast_masked": True, "loss.queue_wrap": False}


def _check_parts(given: Given) -> None:
    """The original's DECLIP adds up a loss that has a weight if the model makes it."""
    made = {
        "return_nn_bank": ("nn_text", given.get(CLIP + "return_nn_bank", False)),
        "text_mask_type": ("masking_language", given.get(CLIP + "text_mask_type")),
    }
    for key, (weight, switch) in made.items():
        if not switch and given.get(WEIGHTS + weight, 0):
            raise ValueError(
                f"{WEIGHTS}{weight} has a weight, but {CLIP}{key} is not set, so the original "
                "leaves that loss out: set one like the other."
            )
    width = given.get(CLIP + "feature_dim", 1024)
    if IMAGE + "embed_dim" in given and width != given[IMAGE + "embed_dim"]:
        raise ValueError(
            f"{CLIP}feature_dim is {width}, but {IMAGE}embed_dim is {given[IMAGE + 'embed_dim']}: "
            "the projector takes the image tower's features, so make them equal."
        )


def _tower(given: Given) -> str:
    return TYPES.get(str(given.get("model.type")), ("", "vit"))[1]


def _image_key(name: str, tower: str, value: Any) -> dict[str, Any]:
    if name == "layers":
        return {"model.image_layers" if tower == "vit" else "model.image_depths": value}
    return {f"model.image_{name}": value}


def _layers(value: Any, given: Given) -> Mapping[str, Any]:
    """Blocks: one number for a ViT, four for a ResNet."""
    tower = _tower(given)
    if isinstance(value, list) != (tower == "resnet"):
        wanted = "one number" if tower == "vit" else "four numbers"
        raise ValueError(f"{value!r} is not what a {tower} has, {wanted}.")
    return _image_key("layers", tower, value)


def _sync_batch_norm(value: Any, given: Given) -> Mapping[str, Any]:
    """``use_sync_bn`` is on by default, in groups of ``bn_group_size`` processes."""
    switch = is_true(str(given.get(IMAGE + "use_sync_bn", True)))
    if switch is None:
        raise ValueError(f"{given[IMAGE + 'use_sync_bn']!r} is neither true nor false.")
    return {"model.sync_batch_norm": given.get(IMAGE + "bn_group_size", 1) if switch else 1}


def _text_embedding(value: Any, given: Given) -> Mapping[str, Any]:
    if given.get(IMAGE + "embed_dim", value) != value:
        raise ValueError(
            f"{value!r} is not the {given[IMAGE + 'embed_dim']} of {IMAGE}embed_dim: make them "
            "equal, for images and texts are compared."
        )
    return {"model.embed_dim": value}


def _clip_weight(value: Any, given: Given) -> Mapping[str, Any]:
    """Next to it, the original takes an absent weight for 0."""
    others = {
        "nn_text": "loss.nn_text",
        "simsiam_loss": "loss.simsiam",
        "masking_language": "loss.masked_language",
    }
    absent = {path: 0.0 for name, path in others.items() if WEIGHTS + name not in given}
    return {"loss.clip": value, **absent}


def _betas(value: Any, given: Given) -> Mapping[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{value!r} is no pair of numbers.")
    return {"optimizer.beta1": value[0], "optimizer.beta2": value[1]}


def _augmentation(value: Any, given: Given) -> Mapping[str, Any]:
    """MOCOV2 makes two views, STANDARD_SLIP one that is only cut out."""
    objective = TYPES.get(str(given.get("model.type")), ("declip", ""))[0]
    wanted = {"declip": "MOCOV2", "clip": "STANDARD_SLIP"}[objective]
    if value != wanted:
        raise ValueError(f"{value!r} is not built here for {objective}, only {wanted}.")
    if objective == "declip":
        return {}
    return {
        "data.crop_min": 0.5,
        "data.jitter_probability": 0.0,
        "data.gray": 0.0,
        "data.blur": 0.0,
        "data.flip": 0.0,
    }


def _tests(value: Any, given: Given) -> Mapping[str, Any]:
    """Test sets, of which ImageNet's is the one that is evaluated here."""
    tests = value if isinstance(value, list) else [value]
    if len(tests) != 1 or not isinstance(tests[0], Mapping):
        raise ValueError("give one test set, as the original's configs do.")
    test = tests[0]
    prompts = test.get("test", {}).get("label_texts_ensemble", "none")
    if prompts != "prompt80":
        raise ValueError(
            f"label_texts_ensemble {prompts!r} is not built here, only 'prompt80': "
            "evaluate.prompts takes one, or a file of sentences."
        )
    return {"evaluate.batch_size": test.get("batch_size", 128)}


def _only(*built: Any) -> CardKey:
    """A key that is taken with the values that are built here only."""

    def read(value: Any, given: Given) -> Mapping[str, Any]:
        found = is_true(value) if isinstance(built[0], bool) and isinstance(value, str) else value
        if found not in built:
            raise ValueError(f"{value!r} is not built here, only {' or '.join(map(repr, built))}.")
        return {}

    return CardKey((), read)


def _unread(value: Any, given: Given) -> Mapping[str, Any]:
    return {}


def _unread_keys(names: str) -> dict[str, CardKey]:
    return {name: CardKey((), _unread) for name in names.split()}


def _instead(advice: str) -> CardKey:
    """A name of the original that has no meaning here; the message says what to do."""

    def read(value: Any, given: Given) -> Mapping[str, Any]:
        raise ValueError(f"there is no such setting here: {advice}.")

    return CardKey((), read, bare="true")


_ONE_SYNC_NORM = ("model.sync_batch_norm",)

SETTINGS: CardOptions = {
    "model.type": CardKey(("model.objective", "model.tower"), _model),
    IMAGE + "embed_dim": "model.embed_dim",
    IMAGE + "width": "model.image_width",
    IMAGE + "heads": "model.image_heads",
    IMAGE + "layers": CardKey(("model.image_layers", "model.image_depths"), _layers),
    IMAGE + "input_resolution": "model.input_size",
    IMAGE + "patch_size": "model.patch",
    IMAGE + "bn_group_size": CardKey(_ONE_SYNC_NORM, _sync_batch_norm),
    IMAGE + "use_sync_bn": CardKey(_ONE_SYNC_NORM, _sync_batch_norm),
    TEXT + "embed_dim": CardKey(("model.embed_dim",), _text_embedding),
    TEXT + "context_length": "model.context_length",
    TEXT + "transformer_width": "model.text_width",
    TEXT + "transformer_heads": "model.text_heads",
    TEXT + "transformer_layers": "model.text_layers",
    CLIP + "nn_size": "loss.queue_size",
    WEIGHTS + "clip_loss": CardKey(("loss.clip",), _clip_weight),
    WEIGHTS + "nn_text": "loss.nn_text",
    WEIGHTS + "simsiam_loss": "loss.simsiam",
    WEIGHTS + "masking_language": "loss.masked_language",
    "grad_clip.value": "loss.scale_min",
    "grad_clip.max_value": "loss.scale_max",
    "optimizer.kwargs.weight_decay": "optimizer.weight_decay",
    "optimizer.kwargs.betas": CardKey(("optimizer.beta1", "optimizer.beta2"), _betas),
    "optimizer.kwargs.eps": "optimizer.eps",
    "lr_scheduler.kwargs.base_lr": "optimizer.lr",
    "lr_scheduler.kwargs.warmup_lr": "optimizer.peak_lr",
    "lr_scheduler.kwargs.min_lr": "optimizer.min_lr",
    "lr_scheduler.kwargs.warmup_steps": "optimizer.warmup_steps",
    "lr_scheduler.kwargs.max_iter": "schedule.steps",
    "data.num_workers": "data.workers",
    "data.input_size": "model.input_size",
    "data.train.transforms.type": CardKey(("data.crop_min",), _augmentation),
    "data.test": CardKey(("evaluate.batch_size",), _tests),
    "saver.print_freq": "run.log_every",
    "saver.val_freq": "evaluate.every",
    "saver.save_freq": "schedule.save_every",
}
"""Keys that set something."""

FIXED: CardOptions = {
    TEXT + "text_encode_type": _only("Transformer"),
    TEXT + "text_model_utils.random": _only(False),
    TEXT + "text_model_utils.freeze": _only(False),
    TEXT + "positional_embedding_flag": _only(True),
    CLIP + "use_allgather": _only(True),
    CLIP + "text_mask_type": _only("MLM", None),
    CLIP + "return_nn_bank": _only(True, False),
    CLIP + "nn_topk": _only(1),
    CLIP + "return_dense": _only(False),
    CLIP + "return_simsiam_text": _only(False),
    CLIP + "return_simsiam_nn_text": _only(False),
    CLIP + "return_caption": _only(False),
    CLIP + "EDA": _only(True),
    CLIP + "forward_type": _only("split"),
    "grad_clip.type": _only("logit_scale_param_value"),
    "optimizer.type": _only("AdamW"),
    "optimizer.kwargs.amsgrad": _only(False),
    **{
        f"optimizer.pconfig.{kind}.weight_decay": _only(0)
        for kind in ("bn_w", "bn_b", "ln_w", "ln_b", "bias", "logit_scale")
    },
    "lr_scheduler.type": _only("Cosine"),
    "label_smooth": _only(0),
    "ema.enable": _only(False),
    "data.type": _only("clip"),
    "data.test_resize": _only(256),
    "data.train.image_text_two_view": _only(True),
    "data.train.use_ranked": _only(False),
    "saver.save_many": _only(False),
    "saver.pretrain.path": _instead("weights.start=FILE is what training starts from"),
}
"""Keys that are taken with the values that are built here."""

UNREAD = _unread_keys(
    f"{IMAGE}bn_sync_stats {IMAGE}bn_var_mode {IMAGE}checkpoint {TEXT}bpe_path {TEXT}checkpoint "
    f"{CLIP}feature_dim dist.sync optimizer.kwargs.lr optimizer.fp16_normal_bn "
    "optimizer.fp16_normal_ln optimizer.fp16_normal_fc ema.kwargs.decay data.read_from "
    "data.use_dali data.pin_memory data.train.root_dir data.train.meta_file "
    "data.train.image_reader.type data.train.sampler.type data.train.fseek "
    "saver.pretrain.auto_resume"
)
"""Keys that say where data are or how they are read, and those that the original overrides."""

CARD_KEYS: CardOptions = {
    "--evaluate": _instead("bash test/train_eval_1p.sh --checkpoint=FILE evaluates"),
    **SETTINGS,
    **FIXED,
    **UNREAD,
}


def assignments_of(cfg: Mapping[str, Any]) -> Sequence[Assignment]:
    """A config of the original, or its ``model`` section, as what a command line would say.

    Raises:
        UserError: it names no network.
    """
    parts = dict(cfg)
    if "type" in parts:
        inner = parts.pop("kwargs", None) or {
            name: parts.pop(name) for name in ("image_encode", "text_encode", "clip")
        }
        parts["model"] = {"type": parts.pop("type"), "kwargs": inner}
    if "type" not in parts.get("model", {}):
        raise UserError("The config has no model.type: give one of CLIP or DeCLIP.")
    return [Assignment(name, str(value), f"{name} of the config") for name, value in flatten(parts)]
