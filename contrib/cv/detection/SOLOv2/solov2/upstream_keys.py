"""The original's names for settings: options of its scripts and programs, and its model's keys.

Options are those of Ascend ModelZoo-PyTorch's tools/train.py, tools/test_ins.py and test/*.sh;
model dictionaries those of WXinlong/SOLO (95f3732d, which builds on mmdet 1.0) and of mmdet 3.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from zoo_common.config import CardKey, CardOptions, Given
from zoo_common.errors import UserError
from zoo_common.options import is_true


def _first_card(value: Any, given: Given) -> Mapping[str, Any]:
    """The original takes the first id alone too, also in its runs on eight cards."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(
            "give the id of the first card; the cards behind it are those of the script's number, "
            "or of --processes."
        )
    return {"run.device_id": value}


def _resume(value: Any, given: Given) -> Mapping[str, Any]:
    """What a run goes on from, or with --fine-tune, what it starts from."""
    return {"weights.start" if _fine_tunes(given) else "run.resume": value}


def _fine_tune(value: Any, given: Given) -> Mapping[str, Any]:
    _fine_tunes(given)
    return {}


def _fine_tunes(given: Given) -> bool:
    wanted = is_true(str(given.get("--fine-tune", "false")))
    if wanted is None:
        raise ValueError(f"--fine-tune must be 1 or 0, but is {given['--fine-tune']!r}.")
    return wanted


def _instead(advice: str) -> CardKey:
    """An option of the original that has no meaning here; the message says what to do."""

    def read(value: Any, given: Given) -> Mapping[str, Any]:
        raise ValueError(f"there is no such option here: {advice}.")

    return CardKey((), read, bare="true")


CARD_KEYS: CardOptions = {
    "--gpu-ids": CardKey(
        ("run.device_id",), _first_card, help="index of the first card to use, as --device_id"
    ),
    "--resume_from": CardKey(
        ("run.resume", "weights.start"),
        _resume,
        literal=False,
        help="checkpoint to continue from, or with --fine-tune to start from",
    ),
    "--fine-tune": CardKey(
        ("weights.start", "run.resume"),
        _fine_tune,
        bare="true",
        help="--resume_from names weights to start from; the class count is that of the data",
    ),
    "--fps_lag": _instead("FPS is the mean over all steps but the first run.warmup_steps"),
    "--start_step": _instead("run.warmup_steps=N says where --profile=STEPS begins"),
    "--stop_step": _instead("--profile=STEPS traces so many steps"),
    "--profiling": _instead("--profile=STEPS traces so many steps"),
    "--rt2_bin": _instead("--jit_compile=off is what 1 stands for, and the default"),
    "--ND": _instead("--internal_format=off is what True stands for, and the default"),
    "--conda_name": _instead("activate the environment before the script"),
    "--validate": _instead("evaluate.every=EPOCHS says when a run evaluates, beside its end"),
    "--gpus": _instead("the script's name says how many cards, or --processes"),
    "--launcher": _instead("the scripts start their processes themselves"),
    "--local_rank": _instead("the scripts start their processes themselves"),
    "--tmpdir": _instead("the processes send each other what they found"),
    "--out": _instead("results are in coco_results.json in --output_dir"),
    "--json_out": _instead("results are in coco_results.json in --output_dir"),
    "--eval": _instead("masks are always scored"),
    "--show": _instead("python3 -m solov2.predict draws what is found"),
}

DEFORMABLE = {"": "", "DCN": "v1", "DCNv2": "v2"}
"""mmcv's names of deformable convolutions, and ours."""


def settings_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a model dictionary stands for, by path.

    Args:
        cfg: the ``model`` of a config, or a config with a ``model``, of WXinlong/SOLO (with
            ``bbox_head``) or mmdet 3 (with ``mask_head``). Nothing but ``model``, ``test_cfg``
            and ``img_norm_cfg`` is looked at.

    Raises:
        UserError: it describes a network that is not built here, or lacks a key.
    """
    model = cfg.get("model", cfg)
    is_mmdet = "mask_head" in model
    if not is_mmdet and "bbox_head" not in model:
        raise UserError("The model has neither bbox_head nor mask_head: give one of SOLOv2.")
    settings = _trunk(model)
    head = _Section(model, "mask_head" if is_mmdet else "bbox_head")
    settings |= _grids(head)
    settings |= (
        _mmdet_head(head) if is_mmdet else _solo_head(head, _Section(model, "mask_feat_head"))
    )
    settings |= _pixels(cfg, model)
    return settings | _test(model.get("test_cfg") or cfg.get("test_cfg") or {})


class _Section:
    """A dictionary within a model; a key that is absent, or has a value not built here, is told."""

    def __init__(self, model: Mapping[str, Any], name: str) -> None:
        if not isinstance(model.get(name), Mapping):
            raise UserError(f"The model has no {name}: give one of SOLOv2.")
        self.name, self.content = name, model[name]

    def __getitem__(self, key: str) -> Any:
        if key not in self.content:
            raise UserError(f"The model's {self.name} has no {key}: add it.")
        return self.content[key]

    def get(self, key: str, default: Any) -> Any:
        """The value, or a default where it is absent or None."""
        value = self.content.get(key)
        return default if value is None else value

    def section(self, key: str) -> "_Section":
        """A dictionary in this one."""
        inner = _Section(self.content, key)
        inner.name = f"{self.name}.{key}"
        return inner

    def only(self, **built: Any) -> None:
        """Checks keys that are taken with one value, also by default."""
        for key, value in built.items():
            self.one_of(key, [value])

    def one_of(self, key: str, built: Iterable[Any]) -> Any:
        """The value, which must be one of those that are built here; the first is the default."""
        choices = list(built)
        found = _plain(self.get(key, choices[0]))
        if found not in choices:
            raise UserError(
                f"The model's {self.name}.{key} is {found!r}, but only "
                f"{' or '.join(map(repr, choices))} is built here."
            )
        return found

    def deformable(self, key: str) -> str:
        """Our word for the kind of convolution that a ``conv_cfg`` names."""
        if not self.get(key, {}):
            return ""
        conv = self.section(key)
        conv.only(deformable_groups=1, deform_groups=1)
        return DEFORMABLE[conv.one_of("type", ["", *DEFORMABLE])]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _trunk(model: Mapping[str, Any]) -> dict[str, Any]:
    backbone, neck = _Section(model, "backbone"), _Section(model, "neck")
    backbone.only(
        type="ResNet", num_stages=4, out_indices=[0, 1, 2, 3], style="pytorch", norm_eval=True
    )
    stages = backbone.one_of("stage_with_dcn", [[False] * 4, [False, True, True, True]])
    neck.only(type="FPN", start_level=0, num_outs=5)
    width = backbone.get("base_channels", 64)
    return {
        "model.depth": backbone["depth"],
        "model.base_channels": width,
        "model.stem_channels": backbone.get("stem_channels", width),
        "model.frozen_stages": backbone.get("frozen_stages", -1),
        "model.deformable": backbone.deformable("dcn") if any(stages) else "",
        "model.fpn_channels": neck["out_channels"],
    }


def _grids(head: _Section) -> dict[str, Any]:
    """What both dialects write alike."""
    return {
        "head.stacked_convs": head.get("stacked_convs", 4),
        "head.grids": _plain(head["num_grids"]),
        "head.strides": _plain(head["strides"]),
        "head.scale_ranges": [list(map(float, pair)) for pair in head["scale_ranges"]],
    }


def _focal(loss: _Section) -> dict[str, Any]:
    loss.only(type="FocalLoss", use_sigmoid=True)
    return {
        "loss.class_weight": float(loss.get("loss_weight", 1.0)),
        "loss.gamma": float(loss.get("gamma", 2.0)),
        "loss.alpha": float(loss.get("alpha", 0.25)),
    }


def _solo_head(head: _Section, masks: _Section) -> dict[str, Any]:
    """WXinlong/SOLO, whose class count has the background too."""
    kind = head.one_of("type", ["SOLOv2Head", "SOLOv2LightHead"])
    dice = head.section("loss_ins")
    dice.only(type="DiceLoss", use_sigmoid=True)
    masks.only(type="MaskFeatHead", start_level=0, end_level=3)
    masks.only(num_classes=head["ins_out_channels"])
    deformable = ""
    if head.get("use_dcn_in_tower", False):
        deformable = DEFORMABLE[head.one_of("type_dcn", DEFORMABLE)]
    return _focal(head.section("loss_cate")) | {
        "model.num_classes": head["num_classes"] - 1,
        "head.channels": head["seg_feat_channels"],
        "head.kernel_channels": head["ins_out_channels"],
        "head.sigma": float(head.get("sigma", 0.2)),
        "head.mask_channels": masks["out_channels"],
        "head.deformable": deformable,
        "head.deformable_last_only": bool(deformable) and kind == "SOLOv2LightHead",
        "head.mask_deformable": masks.deformable("conv_cfg"),
        "loss.mask_weight": float(dice["loss_weight"]),
        "loss.mask_average": "pairs",
    }


def _mmdet_head(head: _Section) -> dict[str, Any]:
    masks, dice = head.section("mask_feature_head"), head.section("loss_mask")
    head.only(type="SOLOV2Head", dynamic_conv_size=1, cls_down_index=0)
    masks.only(start_level=0, end_level=3, mask_stride=4)
    dice.only(type="DiceLoss", use_sigmoid=True)
    deformable = head.deformable("dcn_cfg")
    return _focal(head.section("loss_cls")) | {
        "model.num_classes": head["num_classes"],
        "head.channels": head["feat_channels"],
        "head.kernel_channels": masks["out_channels"],
        "head.sigma": float(head.get("pos_scale", 0.2)),
        "head.mask_channels": masks["feat_channels"],
        "head.deformable": deformable,
        "head.deformable_last_only": bool(deformable)
        and not head.get("dcn_apply_to_all_conv", True),
        "head.mask_deformable": masks.deformable("conv_cfg"),
        "loss.mask_weight": float(dice["loss_weight"]),
        "loss.mask_average": "cells",
    }


def _pixels(cfg: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Channel statistics, which are those of red first in both."""
    for holder, name, order in (
        (model, "data_preprocessor", "bgr_to_rgb"),
        (cfg, "img_norm_cfg", "to_rgb"),
    ):
        if "mean" in (holder.get(name) or {}):
            pixels = _Section(holder, name)
            if not pixels[order]:
                raise UserError(f"The model's {name}.{order} is false, but red is first here.")
            mean, std = (list(map(float, pixels[key])) for key in ("mean", "std"))
            return {"model.pixel_mean": mean, "model.pixel_std": std}
    return {}


def _test(test: Mapping[str, Any]) -> dict[str, Any]:
    """What mmdet 3 calls filter_thr is update_thr in the original, and here."""
    names = {"filter_thr": "update_thr"}
    known = ("nms_pre", "score_thr", "mask_thr", "update_thr", "kernel", "sigma", "max_per_img")
    renamed = {names.get(key, key): value for key, value in test.items()}
    return {f"test.{key}": renamed[key] for key in known if key in renamed}
