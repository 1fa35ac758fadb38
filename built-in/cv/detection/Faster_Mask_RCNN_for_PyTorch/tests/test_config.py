"""Configs, the card's and detectron2's names for settings, and what is said of wrong ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from config_checks import (
    DETECTOR_MISFITS,
    assert_mistake_told,
    differing,
    settings_of,
    words_in_help,
)
from detector_runs import run_script

from rcnn import detectron2_keys
from rcnn.config import CARD_OPTIONS, WEIGHT_ADDRESSES, Config, check, config_from_detectron2
from zoo_common import runs
from zoo_common.config import load_config
from zoo_common.errors import UserError

MODEL = Path(__file__).resolve().parents[1]
DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"

MEANINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("AMP", "1", {"precision.opt_level": "O1"}),
    ("OPT_LEVEL", "O2", {"precision.opt_level": "O2"}),
    ("SOLVER.AMP.ENABLED", "True", {"precision.opt_level": "O1"}),
    ("LOSS_SCALE_VALUE", "64", {"precision.loss_scale": "64"}),
    ("LOSS_SCALE_VALUE", "dynamic", {"precision.loss_scale": "dynamic"}),
    ("MODEL.DEVICE", "npu:3", {"run.device": "npu", "run.device_id": 3}),
    ("MODEL.DEVICE", "cpu", {"run.device": "cpu", "run.device_id": 0}),
    ("SEED", "1234", {"run.seed": 1234}),
    ("SEED", "-1", {"run.seed": 0}),
    ("OUTPUT_DIR", "./output", {"run.output_dir": "./output"}),
    ("MODEL.WEIGHTS", "mine.pth", {"weights.start": "mine.pth"}),
    ("MODEL.WEIGHTS", "", {"weights.start": ""}),
    (
        "MODEL.WEIGHTS",
        "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        {"weights.start": DETECTRON2 + "ImageNetPretrained/MSRA/R-50.pkl"},
    ),
    (
        "MODEL.WEIGHTS",
        "catalog://ImageNetPretrained/FAIR/R-50-GN",
        {
            "weights.start": detectron2_keys.CATALOG_PUBLISHED
            + "ImageNetPretrained/47261647/R-50-GN.pkl"
        },
    ),
    ("SOLVER.IMS_PER_BATCH", "8", {"data.batch_size": 8}),
    ("SOLVER.MAX_ITER", "10250", {"solver.max_iter": 10250}),
    ("SOLVER.BASE_LR", "0.0025", {"solver.base_lr": 0.0025}),
    ("SOLVER.BASE_LR", "25e-4", {"solver.base_lr": 0.0025}),
    ("SOLVER.STEPS", "(210000, 250000)", {"solver.steps": [210000, 250000]}),
    ("SOLVER.STEPS", "(30000,)", {"solver.steps": [30000]}),
    ("SOLVER.STEPS", "()", {"solver.steps": []}),
    ("SOLVER.GAMMA", "0.2", {"solver.gamma": 0.2}),
    ("SOLVER.WARMUP_ITERS", "0", {"solver.warmup_iters": 0}),
    ("SOLVER.WARMUP_FACTOR", "0.01", {"solver.warmup_factor": 0.01}),
    ("SOLVER.WARMUP_METHOD", "constant", {"solver.warmup_method": "constant"}),
    ("SOLVER.MOMENTUM", "0.8", {"solver.momentum": 0.8}),
    ("SOLVER.NESTEROV", "True", {"solver.nesterov": True}),
    ("SOLVER.WEIGHT_DECAY", "0.001", {"solver.weight_decay": 0.001}),
    ("SOLVER.WEIGHT_DECAY_NORM", "0.01", {"solver.weight_decay_norm": 0.01}),
    ("SOLVER.WEIGHT_DECAY_BIAS", "0.0", {"solver.weight_decay_bias": 0.0}),
    ("SOLVER.WEIGHT_DECAY_BIAS", "None", {"solver.weight_decay_bias": -1.0}),
    ("SOLVER.BIAS_LR_FACTOR", "2.0", {"solver.bias_lr_factor": 2.0}),
    ("SOLVER.CHECKPOINT_PERIOD", "100", {"solver.checkpoint_every": 100}),
    ("TEST.EVAL_PERIOD", "0", {"evaluate.every": 0}),
    ("TEST.EVAL_PERIOD", "500", {"evaluate.every": 500}),
    ("TEST.DETECTIONS_PER_IMAGE", "300", {"roi.detections": 300}),
    ("DATALOADER.NUM_WORKERS", "8", {"data.workers": 8}),
    ("DATALOADER.ASPECT_RATIO_GROUPING", "False", {"data.group_by_aspect": False}),
    ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False", {"data.keep_empty": True}),
    (
        "DATASETS.TRAIN",
        '("coco_2017_val",)',
        {
            "data.train_json": "annotations/instances_val2017.json",
            "data.train_images": "val2017",
            "data.val_images": "val2017",
        },
    ),
    (
        "DATASETS.TEST",
        '("coco_2014_val",)',
        {"data.val_json": "annotations/instances_val2014.json", "data.val_images": "val2014"},
    ),
    ("DATASETS.TEST", "()", {"data.val_images": "val2017"}),
    ("INPUT.FIX_SHAPE", "(1344, 1344)", {"data.buckets": [[1344, 1344]]}),
    ("INPUT.MIN_SIZE_TRAIN", "(800,)", {"data.min_sizes": [800]}),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", {"data.size_sampling": "range"}),
    ("INPUT.MAX_SIZE_TRAIN", "1000", {"data.max_size": 1000}),
    ("INPUT.MIN_SIZE_TEST", "600", {"data.min_size_test": 600}),
    ("INPUT.MAX_SIZE_TEST", "1000", {"data.max_size_test": 1000}),
    ("INPUT.RANDOM_FLIP", "none", {"data.flip": 0.0}),
    ("INPUT.RANDOM_FLIP", "horizontal", {"data.flip": 0.5}),
    ("INPUT.FORMAT", "RGB", {"model.channel_order": "RGB"}),
    ("MODEL.PIXEL_MEAN", "[1, 2.5, 3]", {"model.pixel_mean": [1.0, 2.5, 3.0]}),
    ("MODEL.PIXEL_STD", "(58.395, 57.12, 57.375)", {"model.pixel_std": [58.395, 57.12, 57.375]}),
    ("MODEL.MASK_ON", "False", {"model.masks": False}),
    ("MODEL.BACKBONE.FREEZE_AT", "0", {"model.freeze_at": 0}),
    ("MODEL.RESNETS.DEPTH", "101", {"model.depth": 101}),
    ("MODEL.RESNETS.NORM", "GN", {"model.norm": "GN"}),
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", {"model.stem_channels": 8}),
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", {"model.res2_channels": 32}),
    ("MODEL.RESNETS.NUM_GROUPS", "32", {"model.num_groups": 32}),
    ("MODEL.RESNETS.WIDTH_PER_GROUP", "8", {"model.width_per_group": 8}),
    ("MODEL.RESNETS.STRIDE_IN_1X1", "False", {"model.stride_in_1x1": False}),
    ("MODEL.FPN.OUT_CHANNELS", "16", {"model.fpn_channels": 16}),
    ("MODEL.FPN.NORM", "GN", {"model.fpn_norm": "GN"}),
    (
        "MODEL.ANCHOR_GENERATOR.SIZES",
        "[[8], [16], [32], [64], [128]]",
        {"anchors.sizes": [[8.0], [16.0], [32.0], [64.0], [128.0]]},
    ),
    ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16]]", {"anchors.sizes": [[8.0, 16.0]] * 5}),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0, 2]]", {"anchors.aspect_ratios": [1.0, 2.0]}),
    ("MODEL.ANCHOR_GENERATOR.OFFSET", "0.5", {"anchors.offset": 0.5}),
    ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "4", {"rpn.min_size": 4.0}),
    ("MODEL.RPN.IOU_THRESHOLDS", "[0.2, 0.6]", {"rpn.iou_low": 0.2, "rpn.iou_high": 0.6}),
    ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "64", {"rpn.samples": 64}),
    ("MODEL.RPN.POSITIVE_FRACTION", "0.25", {"rpn.positive_fraction": 0.25}),
    ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "11", {"rpn.pre_nms_train": 11}),
    ("MODEL.RPN.PRE_NMS_TOPK_TEST", "12", {"rpn.pre_nms_test": 12}),
    ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "13", {"rpn.post_nms_train": 13}),
    ("MODEL.RPN.POST_NMS_TOPK_TEST", "14", {"rpn.post_nms_test": 14}),
    ("MODEL.RPN.NMS_THRESH", "0.8", {"rpn.nms_thresh": 0.8}),
    ("MODEL.RPN.SMOOTH_L1_BETA", "0.1", {"rpn.smooth_l1_beta": 0.1}),
    ("MODEL.RPN.LOSS_WEIGHT", "2.0", {"rpn.cls_weight": 2.0, "rpn.box_weight": 2.0}),
    ("MODEL.RPN.BBOX_REG_LOSS_WEIGHT", "3.0", {"rpn.cls_weight": 1.0, "rpn.box_weight": 3.0}),
    ("MODEL.RPN.BBOX_REG_WEIGHTS", "(1, 1, 2, 2)", {"rpn.delta_weights": [1.0, 1.0, 2.0, 2.0]}),
    ("MODEL.ROI_HEADS.NUM_CLASSES", "5", {"model.num_classes": 5}),
    ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.6]", {"roi.iou": 0.6}),
    ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "128", {"roi.samples": 128}),
    ("MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5", {"roi.positive_fraction": 0.5}),
    ("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", "False", {"roi.append_gt": False}),
    ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", {"roi.score_thresh": 0.0}),
    ("MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.6", {"roi.nms_thresh": 0.6}),
    ("MODEL.ROI_BOX_HEAD.FC_DIM", "32", {"box_head.fc_dim": 32}),
    ("MODEL.ROI_BOX_HEAD.NUM_FC", "1", {"box_head.num_fc": 1}),
    ("MODEL.ROI_BOX_HEAD.NUM_CONV", "4", {"box_head.num_conv": 4}),
    ("MODEL.ROI_BOX_HEAD.CONV_DIM", "64", {"box_head.conv_dim": 64}),
    ("MODEL.ROI_BOX_HEAD.NORM", "GN", {"box_head.norm": "GN"}),
    ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "5", {"box_head.pooler_resolution": 5}),
    ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "2", {"box_head.sampling_ratio": 2}),
    (
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
        "(20, 20, 10, 10)",
        {"box_head.delta_weights": [20.0, 20.0, 10.0, 10.0]},
    ),
    ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "1.0", {"box_head.smooth_l1_beta": 1.0}),
    ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", {"box_head.class_agnostic": True}),
    ("MODEL.ROI_MASK_HEAD.CONV_DIM", "64", {"mask_head.conv_dim": 64}),
    ("MODEL.ROI_MASK_HEAD.NUM_CONV", "2", {"mask_head.num_conv": 2}),
    ("MODEL.ROI_MASK_HEAD.NORM", "GN", {"mask_head.norm": "GN"}),
    ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "7", {"mask_head.pooler_resolution": 7}),
    ("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", "2", {"mask_head.sampling_ratio": 2}),
    ("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True", {"mask_head.class_agnostic": True}),
]
"""A key, a value of it, and what it makes of the settings."""

BASE = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  BACKBONE: {NAME: "build_resnet_fpn_backbone"}
  RESNETS: {OUT_FEATURES: ["res2", "res3", "res4", "res5"], DEFORM_MODULATED: True}
  FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]], ASPECT_RATIOS: [[0.5, 1.0, 2.0]]}
  RPN: {IN_FEATURES: ["p2", "p3", "p4", "p5", "p6"], PRE_NMS_TOPK_TRAIN: 1999, CONV_DIMS: [-1]}
  ROI_HEADS: {NAME: "StandardROIHeads", IN_FEATURES: ["p2", "p3", "p4", "p5"]}
  ROI_BOX_HEAD: {NAME: "FastRCNNConvFCHead", NUM_FC: 2, POOLER_TYPE: ROIAlignV2}
  ROI_MASK_HEAD: {NAME: "MaskRCNNConvUpsampleHead", NUM_CONV: 3}
  RETINANET: {NUM_CLASSES: 7}
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER: {IMS_PER_BATCH: 24, BASE_LR: 2e-2, STEPS: "(60, 80)", CLIP_GRADIENTS: {ENABLED: False}}
INPUT: {MIN_SIZE_TRAIN: "(640, 800)", MASK_FORMAT: polygon}
TEST: {EXPECTED_RESULTS: []}
VERSION: 2
"""

CHILD = """
_BASE_: "../Base.yaml"
MODEL:
  WEIGHTS: "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
  MASK_ON: True
  RESNETS:
    DEPTH: 101
SOLVER:
  STEPS: (210000, 250000)
  MAX_ITER: 270000
"""


def load(*words: str | Path) -> Config:
    return load_config(Config, [str(word) for word in words], CARD_OPTIONS)


@pytest.fixture(scope="module")
def model() -> runs.Model:
    return runs.load(MODEL)


@pytest.fixture
def detectron2_file(tmp_path: Path) -> Path:
    (tmp_path / "COCO").mkdir()
    (tmp_path / "Base.yaml").write_text(BASE)
    file = tmp_path / "COCO" / "mask.yaml"
    file.write_text(CHILD)
    return file


@pytest.mark.parametrize(("key", "text", "meaning"), MEANINGS)
def test_a_card_key_sets_what_it_says_and_nothing_else(
    key: str, text: str, meaning: dict[str, Any], tmp_path: Path
) -> None:
    tree: Any = text
    for name in reversed(key.split(".")):
        tree = {name: tree}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree))
    for config in (load(key, text), load("--config-file", file)):
        assert settings_of(config) == settings_of(Config()) | meaning


def test_every_key_that_sets_something_is_tested() -> None:
    assert {key for key, _, _ in MEANINGS} == set(detectron2_keys.SETTINGS)


@pytest.mark.parametrize(
    ("words", "level"),
    [
        ("AMP 1 OPT_LEVEL O2", "O2"),
        ("OPT_LEVEL O2 AMP 1", "O2"),
        ("AMP 0 OPT_LEVEL O2", "O0"),
        ("OPT_LEVEL O2 AMP 0", "O0"),
        ("SOLVER.AMP.ENABLED False OPT_LEVEL O2", "O0"),
        ("AMP 1 SOLVER.AMP.ENABLED False", "O1"),
        ("AMP 1 --fp32", "O0"),
        ("--amp=O2", "O2"),
    ],
)
def test_the_names_of_mixed_precision_mean_one_thing_together(words: str, level: str) -> None:
    assert load(*words.split()).precision.opt_level == level


def test_the_cards_switch_keeps_the_level_of_the_cards_runs(model: runs.Model) -> None:
    spec = model.run("train_full_8p")
    levels = [
        model.config(spec, words.split()).precision.opt_level
        for words in ("", "AMP 1", "AMP 0", "--hf32", "SOLVER.AMP.ENABLED False", "OPT_LEVEL O1")
    ]
    assert levels == ["O2", "O2", "O0", "O0", "O0", "O1"]


def test_loss_weights_of_the_proposals_multiply_as_in_detectron2() -> None:
    words = ["MODEL.RPN.BBOX_REG_LOSS_WEIGHT", "3.0", "MODEL.RPN.LOSS_WEIGHT", "2.0"]
    rpn = load(*words).rpn
    assert (rpn.cls_weight, rpn.box_weight) == (2.0, 6.0)
    assert load(*words[2:], *words[:2]).rpn == rpn


def test_a_file_of_detectron2_is_read_as_it_is(detectron2_file: Path) -> None:
    config = load("--config-file", detectron2_file)
    assert config.model.depth == 101
    assert config.weights.start == DETECTRON2 + "ImageNetPretrained/MSRA/R-101.pkl"
    assert config.solver.steps == [210000, 250000]
    assert config.solver.max_iter == 270000
    assert config.data.batch_size == 24
    assert config.data.min_sizes == [640, 800]
    assert config.rpn.pre_nms_train == 1999
    assert config.mask_head.num_conv == 3
    check(config, 8, "acc")
    own = load("--config-file", detectron2_file, "--batch_size=16", "SOLVER.MAX_ITER", "5")
    assert (own.data.batch_size, own.solver.max_iter) == (16, 5)


def test_own_and_detectron2_names_stand_in_one_file(detectron2_file: Path) -> None:
    mixed = detectron2_file.with_name("mixed.yaml")
    mixed.write_text(
        "_base_: mask.yaml\nsolver: {max_iter: 7}\nDATALOADER: {NUM_WORKERS: 1}\n"
        "data: {train_json: a/b.json, train_images: pictures}\nMODEL: {WEIGHTS: mine.pth}\n"
    )
    config = load("--config", mixed)
    assert (config.solver.max_iter, config.data.workers) == (7, 1)
    assert (config.data.train_json, config.weights.start) == ("a/b.json", "mine.pth")


def test_the_whole_config_of_detectron2_becomes_ours(detectron2_file: Path) -> None:
    """With data sets and keys that only it has, which no field stands for."""
    tree = yaml.safe_load(BASE)
    tree["MODEL"] |= yaml.safe_load(CHILD)["MODEL"] | {"WEIGHTS": "", "PROJECT": {"X": 1}}
    tree["MODEL"]["DEVICE"] = "cpu"
    tree["DATASETS"]["TRAIN"] = ["tiny"]
    tree["SOLVER"] |= {"WEIGHT_DECAY_BIAS": None, "STEPS": [5, 6]}
    tree["SEED"] = -1
    config = config_from_detectron2(tree)
    assert (config.model.depth, config.solver.steps, config.weights.start) == (101, [5, 6], "")
    assert config.data.train_images == "train2017"
    assert config.solver.weight_decay_bias == -1.0
    tree["MODEL"]["ROI_BOX_HEAD"]["POOLER_TYPE"] = "ROIAlign"
    with pytest.raises(UserError, match="POOLER_TYPE: 'ROIAlign' is not supported"):
        config_from_detectron2(tree)


@pytest.mark.parametrize("key", sorted(detectron2_keys.FIXED))
def test_what_is_not_built_here_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: 'another' is not supported, only "):
        load(key, "another")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("SOLVER.IMS_PER_BACH 8", "did you mean SOLVER.IMS_PER_BATCH?"),
        ("MODEL.RPN.NMS_TRESH 0.8", "did you mean MODEL.RPN.NMS_THRESH?"),
        ("MODEL.META_ARCHITECTUR x", "did you mean MODEL.META_ARCHITECTURE?"),
        ("--train_step=5", "did you mean --train_steps?"),
        ("--precision_mode=x", "Unknown option '--precision_mode=x'"),
        ("solver.max_iters=5", "did you mean solver.max_iter?"),
        ("SOLVER.MAX_ITER", "SOLVER.MAX_ITER needs a value"),
        ("SOLVER.MAX_ITER 2.5", "solver.max_iter must be of type int, but got 2.5"),
        ("SOLVER.BASE_LR 0", "solver.base_lr must be more than 0"),
        ("SOLVER.STEPS 5", "solver.steps must be of type list[int], but got 5"),
        ("SOLVER.STEPS (0,)", "solver.steps must be at least 1"),
        ("OPT_LEVEL O3", "must be one of O0, O1, O2, but is 'O3'"),
        ("AMP perhaps", "AMP must be 1 or 0, but is 'perhaps'"),
        ("MODEL.DEVICE npu:x", "'npu:x' is no device"),
        ("MODEL.RESNETS.NORM SyncBN", "must be one of FrozenBN, GN"),
        ("MODEL.PIXEL_STD (1,0,1)", "model.pixel_std must be more than 0"),
        ("MODEL.RPN.IOU_THRESHOLDS (0.3,)", "must hold 2 numbers"),
        ("MODEL.RPN.LOSS_WEIGHT x", "'x' is no number"),
        ("MODEL.ANCHOR_GENERATOR.SIZES 32", "32 is no list"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[1],[2]]", "levels with ratios of their own"),
        ("MODEL.WEIGHTS catalog://x", "catalog://x is not known here"),
        ("DATASETS.TRAIN ('voc',)", "name other data by data.train_json and data.train_images"),
        ("DATASETS.TEST ('coco_2017_val','voc')", "data.val_json and data.val_images"),
        ("DATALOADER.FILTER_EMPTY_ANNOTATIONS x", "'x' is neither true nor false"),
        ("INPUT.FIX_SHAPE 1344", "1344 is no list"),
        ("INPUT.RANDOM_FLIP vertical", "only horizontal or none"),
    ],
)
def test_a_wrong_word_is_named(words: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load(*words.split())
    assert said in str(error.value)


def test_a_wrong_key_in_a_file_is_named_with_its_file(detectron2_file: Path) -> None:
    file = detectron2_file.parents[1] / "Base.yaml"
    file.write_text(BASE.replace("IMS_PER_BATCH", "IMS_PER_BACH"))
    with pytest.raises(UserError, match=r"IMS_PER_BACH in .*Base.yaml: did you mean SOLVER.IMS_"):
        load("--config-file", detectron2_file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *DETECTOR_MISFITS,
        ("MODEL.WEIGHTS=detectron2://ImageNetPretrained/MSRA/R-50.pkl", "give R-101.pkl"),
        ("data.batch_size=63", "63 counts the images of all 8 processes .* take 56 or 64"),
        ("data.batch_size=7", "take 8 "),
        ("model.depth=77", "model.depth must be 50 or 101"),
        ("model.depth=50", "R-101.pkl is no ResNet of model.depth=50: give R-50.pkl"),
        ("anchors.sizes=[[8],[16]]", "anchors.sizes must have 5 entries, but has 2"),
        ("anchors.sizes=[[8],[8],[8],[8],[8,9]]", "as many sizes on each level"),
        ("anchors.aspect_ratios=[]", "anchors.aspect_ratios one at least"),
        ("rpn.delta_weights=[1]", "rpn.delta_weights must have 4 entries"),
        ("rpn.iou_low=0.9", "rpn.iou_low=0.9 must not exceed rpn.iou_high=0.7"),
        ("box_head.num_fc=0", "box_head needs a layer"),
        ("rpn.samples=1", "rpn.positive_fraction=0.5 leaves no place for foreground"),
        ("mask_head.norm=GN mask_head.conv_dim=48", "mask_head.conv_dim=48 must be a multiple of"),
        ("precision.accumulate=5", "precision.accumulate=5 does not divide the 8 images"),
        ("data.size_sampling=range", "needs the smallest and the largest"),
        ("solver.steps=[9,5]", "solver.steps must rise"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_the_start(
    model: runs.Model, words: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        model.config(model.run("train_full_8p"), words.split())


def test_a_batch_divides_over_all_machines_and_an_evaluation_has_none(model: runs.Model) -> None:
    several = model.run("train_performance_multinodes")
    config = model.config(several, ["--nnodes=2", "--batch_size=128"])
    assert config.data.batch_size == 128
    assert config.launch.master_port == 23333
    with pytest.raises(UserError, match="of all 16 processes together"):
        model.config(several, ["--nnodes=2", "--batch_size=72"])
    for run in ("train_eval_8p", "train_faster_rcnn_eval_8p"):
        model.config(model.run(run), ["--processes=3", "MODEL.RESNETS.DEPTH", "50"])


def test_every_config_and_run_reads(model: runs.Model) -> None:
    for file in sorted((MODEL / "configs").glob("*.yaml")):
        check(load("--config", file), 1, "acc")
    for name, spec in model.runs.items():
        config = model.config(spec, [])
        assert config.model.masks is not ("faster" in name)
        assert config.evaluate.at_end is (spec.kind != "perf")


@pytest.mark.parametrize(
    ("run", "batch", "rate", "steps", "workers"),
    [
        ("train_full_8p", 64, 0.02, 10250, 8),
        ("train_full_1p", 8, 0.0025, 82000, 4),
        ("train_performance_8p", 64, 0.02, 200, 8),
        ("train_performance_1p", 8, 0.0025, 400, 4),
        ("train_performance_multinodes", 64, 0.02, 200, 8),
        ("train_faster_rcnn_full_8p", 64, 0.02, 11250, 8),
        ("train_faster_rcnn_full_1p", 8, 0.0025, 90000, 4),
        ("train_faster_rcnn_performance_8p", 64, 0.02, 3000, 8),
        ("train_faster_rcnn_performance_1p", 8, 0.0025, 3000, 4),
        ("train_faster_rcnn_performance_multinodes", 64, 0.02, 3000, 8),
    ],
)
def test_the_cards_runs_have_the_cards_settings(
    model: runs.Model, run: str, batch: int, rate: float, steps: int, workers: int
) -> None:
    config = model.config(model.run(run), [])
    assert (config.data.batch_size, config.solver.base_lr) == (batch, rate)
    assert (config.solver.max_iter, config.data.workers) == (steps, workers)
    assert (config.precision.opt_level, config.precision.loss_scale) == ("O2", "64")
    assert (config.rpn.nms_thresh, config.run.seed, config.model.depth) == (0.8, 1234, 101)
    assert (config.box_head.sampling_ratio, config.mask_head.sampling_ratio) == (2, 2)
    assert config.weights.start == "R-101.pkl"
    assert model.config(model.run(run), ["--train_steps=50"]).solver.max_iter == 50


@pytest.mark.parametrize("prefix", ["train_full", "train_faster_rcnn_full"])
@pytest.mark.parametrize("cards", ["1p", "8p"])
def test_full_runs_decay_at_the_shares_of_3x_and_the_cards_schedule_is_one_word_away(
    model: runs.Model, prefix: str, cards: str
) -> None:
    spec = model.run(f"{prefix}_{cards}")
    solver = model.config(spec, []).solver
    assert solver.steps == [round(solver.max_iter * share / 270) for share in (210, 250)]
    literal = model.config(spec, ["SOLVER.STEPS", "(210000, 250000)"]).solver
    assert literal.steps == [210000, 250000]
    assert min(literal.steps) > literal.max_iter


@pytest.mark.parametrize(
    ("config", "depth", "masks", "steps"),
    [
        ("mask_rcnn_R_50_FPN_1x", 50, True, 90000),
        ("mask_rcnn_R_50_FPN_3x", 50, True, 270000),
        ("mask_rcnn_R_101_FPN_3x", 101, True, 270000),
        ("faster_rcnn_R_50_FPN_1x", 50, False, 90000),
        ("faster_rcnn_R_50_FPN_3x", 50, False, 270000),
        ("faster_rcnn_R_101_FPN_3x", 101, False, 270000),
    ],
)
def test_recipes_of_detectron2(config: str, depth: int, masks: bool, steps: int) -> None:
    settings = load("--config", MODEL / "configs" / f"{config}.yaml")
    assert (settings.model.depth, settings.model.masks) == (depth, masks)
    last_steps = {90000: [60000, 80000], 270000: [210000, 250000]}[steps]
    assert (settings.solver.max_iter, settings.solver.steps) == (steps, last_steps)
    assert settings.weights.start == f"R-{depth}.pkl"
    address = WEIGHT_ADDRESSES[settings.weights.start]
    assert address == f"{DETECTRON2}ImageNetPretrained/MSRA/R-{depth}.pkl"
    assert differing(settings, Config()) <= {
        "model.depth",
        "model.masks",
        "solver.max_iter",
        "solver.steps",
        "weights.start",
    }


def test_help_names_the_cards_keys_and_not_those_without_effect(tmp_path: Path) -> None:
    words = words_in_help(
        run_script(MODEL, "train_faster_rcnn_performance_1p", "--help", cwd=tmp_path)
    )
    assert {"AMP", "SOLVER.IMS_PER_BATCH", "--train_steps", "data.batch_size"} <= words
    assert not words & {"VERSION", "MODEL.RETINANET.NUM_CLASSES"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["SOLVER.IMS_PER_BACH", "8"], "did you mean SOLVER.IMS_PER_BATCH?"),
        (["--batch_size=63"], "data.batch_size=63 counts the images of all 8 processes"),
    ],
)
def test_a_script_tells_a_wrong_setting_and_starts_nothing(
    words: list[str], said: str, tmp_path: Path
) -> None:
    done = run_script(MODEL, "train_full_8p", "--data_path=/nowhere", *words, cwd=tmp_path)
    assert_mistake_told(done, said)
