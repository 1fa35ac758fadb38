"""detectron2's names for the settings of rcnn.config, and those that the original zoo added.

Every key of detectron2's defaults.py at be792b95 stands here, so that its YAML files and the
configs that it writes out are read. A key for which we have a setting sets it. One whose value
could make another network or another training out of it is taken with the value that we have,
and refused with any other. One that nothing reads with those values is taken with any.
"""

from collections.abc import Mapping
from typing import Any

from zoo_common.config import CardKey, CardOptions, Given
from zoo_common.options import is_true

PUBLISHED = "https://dl.fbaipublicfiles.com/detectron2/"
"""Where detectron2:// points."""

CATALOG_PUBLISHED = "https://dl.fbaipublicfiles.com/detectron/"
CATALOG = {
    "catalog://ImageNetPretrained/MSRA/R-50": "ImageNetPretrained/MSRA/R-50.pkl",
    "catalog://ImageNetPretrained/MSRA/R-101": "ImageNetPretrained/MSRA/R-101.pkl",
    "catalog://ImageNetPretrained/FAIR/R-50-GN": "ImageNetPretrained/47261647/R-50-GN.pkl",
    "catalog://ImageNetPretrained/FAIR/R-101-GN": "ImageNetPretrained/47592356/R-101-GN.pkl",
}
"""Files of the older address that detectron2's YAML files name."""

DATA_SETS = {
    f"coco_{year}_{split}": (f"annotations/instances_{split}{year}.json", f"{split}{year}")
    for year in ("2014", "2017")
    for split in ("train", "val")
} | {"coco_2017_val_100": ("annotations/instances_val2017_100.json", "val2017")}
"""What detectron2 calls a split: its annotations and its images, from data.path."""

LEVELS = 5
"""Levels of the pyramid that have anchors, p2 to p6."""


def _opt_level(value: Any, given: Given) -> Mapping[str, Any]:
    """AMP, SOLVER.AMP.ENABLED and OPT_LEVEL say one thing together, in whatever order.

    AMP counts before SOLVER.AMP.ENABLED, which stands at its default in the zoo's own configs.
    """
    switch = next((name for name in ("AMP", "SOLVER.AMP.ENABLED") if name in given), None)
    if switch is not None:
        enabled = is_true(str(given[switch]))
        if enabled is None:
            raise ValueError(f"{switch} must be 1 or 0, but is {given[switch]!r}.")
        if not enabled:
            return {"precision.opt_level": "O0"}
    return {"precision.opt_level": given.get("OPT_LEVEL", "O1")}


def _device(value: Any, given: Given) -> Mapping[str, Any]:
    kind, colon, index = str(value).partition(":")
    if not colon:
        return {"run.device": kind}
    if not index.isdecimal():
        raise ValueError(f"{value!r} is no device: write npu, npu:0, cuda or cpu.")
    return {"run.device": kind, "run.device_id": int(index)}


def _weights(value: Any, given: Given) -> Mapping[str, Any]:
    """A path, a bare name, or an address."""
    where = str(value)
    if where.startswith("catalog://"):
        if where not in CATALOG:
            raise ValueError(f"{where} is not known here: name the file, or its https address.")
        where = CATALOG_PUBLISHED + CATALOG[where]
    return {"weights.start": where.replace("detectron2://", PUBLISHED)}


def _seed(value: Any, given: Given) -> Mapping[str, Any]:
    """detectron2's -1 stands for any seed; ours is one of them."""
    return {} if isinstance(value, int) and value < 0 else {"run.seed": value}


def _flip(value: Any, given: Given) -> Mapping[str, Any]:
    chances = {"horizontal": 0.5, "none": 0.0}
    if value not in chances:
        raise ValueError(f"{value!r} is not supported, only horizontal or none.")
    return {"data.flip": chances[value]}


def _fix_shape(value: Any, given: Given) -> Mapping[str, Any]:
    """The one size (height, width) that every batch is padded to."""
    return {"data.buckets": [_numbers(value, 2)]}


def _keep_empty(value: Any, given: Given) -> Mapping[str, Any]:
    filtered = is_true(str(value))
    if filtered is None:
        raise ValueError(f"{value!r} is neither true nor false.")
    return {"data.keep_empty": not filtered}


def _weight_decay_bias(value: Any, given: Given) -> Mapping[str, Any]:
    return {"solver.weight_decay_bias": -1.0 if value is None else value}


def _anchor_sizes(value: Any, given: Given) -> Mapping[str, Any]:
    """A list for each level, or one list that holds for all."""
    levels = [_numbers(level) for level in _items(value)]
    return {"anchors.sizes": levels * LEVELS if len(levels) == 1 else levels}


def _aspect_ratios(value: Any, given: Given) -> Mapping[str, Any]:
    levels = [_numbers(level) for level in _items(value)]
    if any(level != levels[0] for level in levels[1:]):
        raise ValueError("levels with ratios of their own are not supported: give one list.")
    return {"anchors.aspect_ratios": levels[0]}


def _rpn_ious(value: Any, given: Given) -> Mapping[str, Any]:
    low, high = _numbers(value, 2)
    return {"rpn.iou_low": low, "rpn.iou_high": high}


def _roi_iou(value: Any, given: Given) -> Mapping[str, Any]:
    return {"roi.iou": _numbers(value, 1)[0]}


def _rpn_loss_weights(value: Any, given: Given) -> Mapping[str, Any]:
    """In detectron2 the box loss has both weights."""
    every = given.get("MODEL.RPN.LOSS_WEIGHT", 1.0)
    of_boxes = given.get("MODEL.RPN.BBOX_REG_LOSS_WEIGHT", 1.0)
    if not all(isinstance(weight, int | float) for weight in (every, of_boxes)):
        raise ValueError(f"{value!r} is no number.")
    return {"rpn.cls_weight": every, "rpn.box_weight": every * of_boxes}


def _data_set(split: str) -> CardKey:
    paths = (f"data.{split}_json", f"data.{split}_images")

    def read(value: Any, given: Given) -> Mapping[str, Any]:
        names = [value] if isinstance(value, str) else _items(value, least=0)
        if not names:
            return {}
        if len(names) > 1 or names[0] not in DATA_SETS:
            raise ValueError(
                f"{', '.join(map(str, names))} is none of {', '.join(DATA_SETS)}: name other data "
                f"by {paths[0]} and {paths[1]}."
            )
        return dict(zip(paths, DATA_SETS[names[0]], strict=True))

    return CardKey(paths, read)


def _items(value: Any, least: int = 1) -> list[Any]:
    if not isinstance(value, list) or len(value) < least:
        raise ValueError(f"{value!r} is no list: write (a, b) or [a, b].")
    return value


def _numbers(value: Any, count: int = 0) -> list[Any]:
    items = _items(value)
    right = all(isinstance(item, int | float) for item in items)
    if not right or (count and len(items) != count):
        raise ValueError(f"{value!r} must hold {count or 'some'} number{'s' * (count != 1)}.")
    return items


def _only(built: Any) -> CardKey:
    """A key that is taken with one value only: that which is built here."""

    def read(value: Any, given: Given) -> Mapping[str, Any]:
        found = is_true(value) if isinstance(built, bool) and isinstance(value, str) else value
        if found != built:
            raise ValueError(f"{value!r} is not supported, only {built!r}.")
        return {}

    return CardKey((), read)


def _unread(value: Any, given: Given) -> Mapping[str, Any]:
    return {}


def _unread_keys(names: Mapping[str, str]) -> dict[str, CardKey]:
    return {
        f"{section}.{name}": CardKey((), _unread)
        for section, listed in names.items()
        for name in listed.split()
    }


_BACKBONE_STAGES = ["res2", "res3", "res4", "res5"]
_PYRAMID = ["p2", "p3", "p4", "p5"]

SETTINGS: CardOptions = {
    "AMP": CardKey(("precision.opt_level",), _opt_level),
    "OPT_LEVEL": CardKey(("precision.opt_level",), _opt_level),
    "SOLVER.AMP.ENABLED": CardKey(("precision.opt_level",), _opt_level),
    "LOSS_SCALE_VALUE": "precision.loss_scale",
    "MODEL.DEVICE": CardKey(("run.device", "run.device_id"), _device),
    "SEED": CardKey(("run.seed",), _seed),
    "OUTPUT_DIR": "run.output_dir",
    "MODEL.WEIGHTS": CardKey(("weights.start",), _weights),
    "SOLVER.IMS_PER_BATCH": "data.batch_size",
    "SOLVER.MAX_ITER": "solver.max_iter",
    "SOLVER.BASE_LR": "solver.base_lr",
    "SOLVER.STEPS": "solver.steps",
    "SOLVER.GAMMA": "solver.gamma",
    "SOLVER.WARMUP_ITERS": "solver.warmup_iters",
    "SOLVER.WARMUP_FACTOR": "solver.warmup_factor",
    "SOLVER.WARMUP_METHOD": "solver.warmup_method",
    "SOLVER.MOMENTUM": "solver.momentum",
    "SOLVER.NESTEROV": "solver.nesterov",
    "SOLVER.WEIGHT_DECAY": "solver.weight_decay",
    "SOLVER.WEIGHT_DECAY_NORM": "solver.weight_decay_norm",
    "SOLVER.WEIGHT_DECAY_BIAS": CardKey(("solver.weight_decay_bias",), _weight_decay_bias),
    "SOLVER.BIAS_LR_FACTOR": "solver.bias_lr_factor",
    "SOLVER.CHECKPOINT_PERIOD": "solver.checkpoint_every",
    "TEST.EVAL_PERIOD": "evaluate.every",
    "TEST.DETECTIONS_PER_IMAGE": "roi.detections",
    "DATALOADER.NUM_WORKERS": "data.workers",
    "DATALOADER.ASPECT_RATIO_GROUPING": "data.group_by_aspect",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": CardKey(("data.keep_empty",), _keep_empty),
    "DATASETS.TRAIN": _data_set("train"),
    "DATASETS.TEST": _data_set("val"),
    "INPUT.FIX_SHAPE": CardKey(("data.buckets",), _fix_shape),
    "INPUT.MIN_SIZE_TRAIN": "data.min_sizes",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "data.size_sampling",
    "INPUT.MAX_SIZE_TRAIN": "data.max_size",
    "INPUT.MIN_SIZE_TEST": "data.min_size_test",
    "INPUT.MAX_SIZE_TEST": "data.max_size_test",
    "INPUT.RANDOM_FLIP": CardKey(("data.flip",), _flip),
    "INPUT.FORMAT": "model.channel_order",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
    "MODEL.MASK_ON": "model.masks",
    "MODEL.BACKBONE.FREEZE_AT": "model.freeze_at",
    "MODEL.RESNETS.DEPTH": "model.depth",
    "MODEL.RESNETS.NORM": "model.norm",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "model.stem_channels",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "model.res2_channels",
    "MODEL.RESNETS.NUM_GROUPS": "model.num_groups",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "model.width_per_group",
    "MODEL.RESNETS.STRIDE_IN_1X1": "model.stride_in_1x1",
    "MODEL.FPN.OUT_CHANNELS": "model.fpn_channels",
    "MODEL.FPN.NORM": "model.fpn_norm",
    "MODEL.ANCHOR_GENERATOR.SIZES": CardKey(("anchors.sizes",), _anchor_sizes),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": CardKey(("anchors.aspect_ratios",), _aspect_ratios),
    "MODEL.ANCHOR_GENERATOR.OFFSET": "anchors.offset",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": "rpn.min_size",
    "MODEL.RPN.IOU_THRESHOLDS": CardKey(("rpn.iou_low", "rpn.iou_high"), _rpn_ious),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": "rpn.samples",
    "MODEL.RPN.POSITIVE_FRACTION": "rpn.positive_fraction",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "rpn.pre_nms_train",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "rpn.pre_nms_test",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "rpn.post_nms_train",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "rpn.post_nms_test",
    "MODEL.RPN.NMS_THRESH": "rpn.nms_thresh",
    "MODEL.RPN.SMOOTH_L1_BETA": "rpn.smooth_l1_beta",
    "MODEL.RPN.LOSS_WEIGHT": CardKey(("rpn.cls_weight", "rpn.box_weight"), _rpn_loss_weights),
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": CardKey(("rpn.box_weight",), _rpn_loss_weights),
    "MODEL.RPN.BBOX_REG_WEIGHTS": "rpn.delta_weights",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.num_classes",
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": CardKey(("roi.iou",), _roi_iou),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "roi.samples",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": "roi.positive_fraction",
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": "roi.append_gt",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "roi.score_thresh",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "roi.nms_thresh",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "box_head.fc_dim",
    "MODEL.ROI_BOX_HEAD.NUM_FC": "box_head.num_fc",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": "box_head.num_conv",
    "MODEL.ROI_BOX_HEAD.CONV_DIM": "box_head.conv_dim",
    "MODEL.ROI_BOX_HEAD.NORM": "box_head.norm",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": "box_head.pooler_resolution",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "box_head.sampling_ratio",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "box_head.delta_weights",
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": "box_head.smooth_l1_beta",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": "box_head.class_agnostic",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "mask_head.conv_dim",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": "mask_head.num_conv",
    "MODEL.ROI_MASK_HEAD.NORM": "mask_head.norm",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": "mask_head.pooler_resolution",
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": "mask_head.sampling_ratio",
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": "mask_head.class_agnostic",
}
"""Keys that set something."""

FIXED: CardOptions = {
    "VERSION": _only(2),
    "FLOAT32_PRECISION": _only(""),
    "DEBUG_MODE": _only(0),
    "VIS_PERIOD": _only(0),
    "DATALOADER.SAMPLER_TRAIN": _only("TrainingSampler"),
    "INPUT.CROP.ENABLED": _only(False),
    "INPUT.MASK_FORMAT": _only("polygon"),
    "MODEL.META_ARCHITECTURE": _only("GeneralizedRCNN"),
    "MODEL.LOAD_PROPOSALS": _only(False),
    "MODEL.KEYPOINT_ON": _only(False),
    "MODEL.BACKBONE.NAME": _only("build_resnet_fpn_backbone"),
    "MODEL.RESNETS.OUT_FEATURES": _only(_BACKBONE_STAGES),
    "MODEL.RESNETS.RES5_DILATION": _only(1),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": _only([False] * 4),
    "MODEL.FPN.IN_FEATURES": _only(_BACKBONE_STAGES),
    "MODEL.FPN.FUSE_TYPE": _only("sum"),
    "MODEL.ANCHOR_GENERATOR.NAME": _only("DefaultAnchorGenerator"),
    "MODEL.PROPOSAL_GENERATOR.NAME": _only("RPN"),
    "MODEL.RPN.HEAD_NAME": _only("StandardRPNHead"),
    "MODEL.RPN.IN_FEATURES": _only([*_PYRAMID, "p6"]),
    "MODEL.RPN.BOUNDARY_THRESH": _only(-1),
    "MODEL.RPN.IOU_LABELS": _only([0, -1, 1]),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _only("smooth_l1"),
    "MODEL.RPN.CONV_DIMS": _only([-1]),
    "MODEL.ROI_HEADS.NAME": _only("StandardROIHeads"),
    "MODEL.ROI_HEADS.IN_FEATURES": _only(_PYRAMID),
    "MODEL.ROI_HEADS.IOU_LABELS": _only([0, 1]),
    "MODEL.ROI_BOX_HEAD.NAME": _only("FastRCNNConvFCHead"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _only("smooth_l1"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _only(1.0),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _only("ROIAlignV2"),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": _only(False),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": _only(False),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": _only(False),
    "MODEL.ROI_MASK_HEAD.NAME": _only("MaskRCNNConvUpsampleHead"),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _only("ROIAlignV2"),
    "SOLVER.LR_SCHEDULER_NAME": _only("WarmupMultiStepLR"),
    "SOLVER.RESCALE_INTERVAL": _only(False),
    "SOLVER.REFERENCE_WORLD_SIZE": _only(0),
    "SOLVER.CLIP_GRADIENTS.ENABLED": _only(False),
    "TEST.EXPECTED_RESULTS": _only([]),
    "TEST.AUG.ENABLED": _only(False),
    "TEST.PRECISE_BN.ENABLED": _only(False),
}
"""Keys that are taken with the value that is built here."""

UNREAD = _unread_keys(
    {
        "DATALOADER": "REPEAT_THRESHOLD REPEAT_SQRT",
        "DATASETS": (
            "PROPOSAL_FILES_TRAIN PRECOMPUTED_PROPOSAL_TOPK_TRAIN "
            "PROPOSAL_FILES_TEST PRECOMPUTED_PROPOSAL_TOPK_TEST"
        ),
        "GLOBAL": "HACK",
        "INPUT.CROP": "TYPE SIZE",
        "MODEL.ANCHOR_GENERATOR": "ANGLES",
        "MODEL.PANOPTIC_FPN": "INSTANCE_LOSS_WEIGHT",
        "MODEL.PANOPTIC_FPN.COMBINE": (
            "ENABLED OVERLAP_THRESH STUFF_AREA_LIMIT INSTANCES_CONFIDENCE_THRESH"
        ),
        "MODEL.RESNETS": "DEFORM_MODULATED DEFORM_NUM_GROUPS",
        "MODEL.RETINANET": (
            "NUM_CLASSES IN_FEATURES NUM_CONVS IOU_THRESHOLDS IOU_LABELS PRIOR_PROB "
            "SCORE_THRESH_TEST TOPK_CANDIDATES_TEST NMS_THRESH_TEST BBOX_REG_WEIGHTS "
            "FOCAL_LOSS_GAMMA FOCAL_LOSS_ALPHA SMOOTH_L1_LOSS_BETA BBOX_REG_LOSS_TYPE NORM"
        ),
        "MODEL.ROI_BOX_CASCADE_HEAD": "BBOX_REG_WEIGHTS IOUS",
        "MODEL.ROI_BOX_HEAD": "FED_LOSS_FREQ_WEIGHT_POWER FED_LOSS_NUM_CLASSES",
        "MODEL.ROI_KEYPOINT_HEAD": (
            "NAME POOLER_RESOLUTION POOLER_SAMPLING_RATIO CONV_DIMS NUM_KEYPOINTS "
            "MIN_KEYPOINTS_PER_IMAGE NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS LOSS_WEIGHT POOLER_TYPE"
        ),
        "MODEL.SEM_SEG_HEAD": (
            "NAME IN_FEATURES IGNORE_VALUE NUM_CLASSES CONVS_DIM COMMON_STRIDE NORM LOSS_WEIGHT"
        ),
        "SOLVER": "BASE_LR_END NUM_DECAYS",
        "SOLVER.CLIP_GRADIENTS": "CLIP_TYPE CLIP_VALUE NORM_TYPE",
        "TEST": "KEYPOINT_OKS_SIGMAS",
        "TEST.AUG": "MIN_SIZES MAX_SIZE FLIP",
        "TEST.PRECISE_BN": "NUM_ITER",
    }
)
"""Keys that nothing reads as long as those of FIXED have their values."""

CARD_KEYS: CardOptions = {
    **SETTINGS,
    **FIXED,
    **UNREAD,
    "CUDNN_BENCHMARK": CardKey((), _unread),
}
