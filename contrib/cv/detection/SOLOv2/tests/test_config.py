"""Configs, the card's options and the original's dictionaries, and what is said of wrong ones."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from config_checks import (
    DETECTOR_MISFITS,
    assert_mistake_told,
    differing,
    put,
    settings_of,
    words_in_help,
)
from detector_runs import run_script

from solov2.config import (
    CARD_OPTIONS,
    THEIR_CONFIGS,
    WEIGHT_ADDRESSES,
    Config,
    check,
    config_from_upstream,
)
from zoo_common import runs
from zoo_common.config import load_config
from zoo_common.errors import UserError

MODEL = Path(__file__).resolve().parents[1]

MEANINGS: list[tuple[str, dict[str, Any]]] = [
    ("--opt-level O2", {"precision.opt_level": "O2"}),
    ("--apex=O1", {"precision.opt_level": "O1"}),
    ("--autoscale-lr", {"solver.autoscale_lr": True}),
    ("--autoscale-lr --seed 3", {"solver.autoscale_lr": True, "run.seed": 3}),
    ("--total_epochs 1", {"solver.epochs": 1}),
    ("--data_root=./data/", {"data.path": "./data/"}),
    ("--data_path=./data/coco", {"data.path": "./data/coco"}),
    ("--gpu-ids 4", {"run.device_id": 4}),
    ("--device_id=4", {"run.device_id": 4}),
    ("--train_performance=1", {"solver.performance": True}),
    ("--train_performance=0", {"solver.performance": False}),
    ("--train_performance=false", {"solver.performance": False}),
    ("--train_performance 1", {"solver.performance": True}),
    ("--steps_per_epoch=50", {"solver.performance_steps": 50}),
    ("--batch_size=4", {"data.batch_size": 4}),
    ("--checkpoint=epoch_12.pth", {"weights.checkpoint": "epoch_12.pth"}),
    ("--pretrained=mine.pth", {"weights.start": "mine.pth"}),
    ("--resume_from=a/latest.pth", {"run.resume": "a/latest.pth"}),
    ("--resume_from 12", {"run.resume": "12"}),
    ("--resume_from=latest.pth --fine-tune", {"weights.start": "latest.pth"}),
    ("--fine-tune --resume_from=latest.pth", {"weights.start": "latest.pth"}),
    ("--fine-tune=0 --resume_from=latest.pth", {"run.resume": "latest.pth"}),
    ("--fine-tune", {}),
    ("--work_dir=out", {"run.output_dir": "out"}),
    ("--interval=50", {"run.log_every": 50}),
    ("--deterministic", {"run.deterministic": True}),
]
"""Words of the original's scripts and programs, and what they make of the settings."""

NO_OPTIONS = (
    "--fps_lag=200 --start_step=0 --stop_step=20 --profiling=CANN --rt2_bin=1 --ND=True "
    "--conda_name=solo --validate --gpus=8 --launcher=pytorch --local_rank=0 --tmpdir=x "
    "--out=results_solo.pkl --json_out=x --eval=segm --show"
)
"""Words of theirs that have no meaning here."""

SOLO_R50 = {
    "model": {
        "type": "SOLOv2",
        "pretrained": "torchvision://resnet50",
        "backbone": {
            "type": "ResNet",
            "depth": 50,
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "frozen_stages": 1,
            "style": "pytorch",
        },
        "neck": {
            "type": "FPN",
            "in_channels": [256, 512, 1024, 2048],
            "out_channels": 256,
            "start_level": 0,
            "num_outs": 5,
        },
        "bbox_head": {
            "type": "SOLOv2Head",
            "num_classes": 81,
            "in_channels": 256,
            "stacked_convs": 4,
            "seg_feat_channels": 512,
            "strides": [8, 8, 16, 32, 32],
            "scale_ranges": ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)),
            "sigma": 0.2,
            "num_grids": [40, 36, 24, 16, 12],
            "ins_out_channels": 256,
            "loss_ins": {"type": "DiceLoss", "use_sigmoid": True, "loss_weight": 3.0},
            "loss_cate": {
                "type": "FocalLoss",
                "use_sigmoid": True,
                "gamma": 2.0,
                "alpha": 0.25,
                "loss_weight": 1.0,
            },
        },
        "mask_feat_head": {
            "type": "MaskFeatHead",
            "in_channels": 256,
            "out_channels": 128,
            "start_level": 0,
            "end_level": 3,
            "num_classes": 256,
            "norm_cfg": {"type": "GN", "num_groups": 32, "requires_grad": True},
        },
    },
    "test_cfg": {
        "nms_pre": 500,
        "score_thr": 0.1,
        "mask_thr": 0.5,
        "update_thr": 0.05,
        "kernel": "gaussian",
        "sigma": 2.0,
        "max_per_img": 100,
    },
    "img_norm_cfg": {
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "to_rgb": True,
    },
}
"""WXinlong/SOLO's configs/solov2/solov2_r50_fpn_8gpu_1x.py, as far as it is about the network."""

LIGHT = {
    "bbox_head.stacked_convs": 2,
    "bbox_head.seg_feat_channels": 256,
    "bbox_head.scale_ranges": ((1, 56), (28, 112), (56, 224), (112, 448), (224, 896)),
    "bbox_head.ins_out_channels": 128,
    "mask_feat_head.num_classes": 128,
}
STAGES = {"backbone.stage_with_dcn": (False, True, True, True)}
NETWORKS: dict[str, dict[str, Any]] = {
    "solov2_r50_fpn_1x": {},
    "solov2_r50_fpn_3x": {},
    "solov2_r101_fpn_3x": {"backbone.depth": 101},
    "solov2_r101_dcn_fpn_3x": {
        "backbone.depth": 101,
        "backbone.dcn": {"type": "DCNv2", "deformable_groups": 1, "fallback_on_stride": False},
        **STAGES,
        "bbox_head.use_dcn_in_tower": True,
        "bbox_head.type_dcn": "DCNv2",
        "mask_feat_head.conv_cfg": {"type": "DCNv2"},
    },
    "solov2_light_448_r18_fpn_3x": {**LIGHT, "backbone.depth": 18},
    "solov2_light_448_r34_fpn_3x": {**LIGHT, "backbone.depth": 34},
    "solov2_light_448_r50_fpn_3x": LIGHT,
    "solov2_light_512_dcn_r50_fpn_3x": {
        **LIGHT,
        "backbone.dcn": {"type": "DCN", "deformable_groups": 1, "fallback_on_stride": False},
        **STAGES,
        "bbox_head.type": "SOLOv2LightHead",
        "bbox_head.stacked_convs": 3,
        "bbox_head.use_dcn_in_tower": True,
        "bbox_head.type_dcn": "DCN",
        "bbox_head.scale_ranges": ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048)),
    },
}
"""How the models of its other files differ from that one."""

FULL = ([640, 672, 704, 736, 768, 800], 1333, 800, 1333)
LIGHT_SIZES = [352, 384, 416, 448, 480, 512]
SIZES: dict[str, tuple[list[int], int, int, int]] = {
    "solov2_r50_fpn_1x": ([800], 1333, 800, 1333),
    "solov2_r50_fpn_3x": FULL,
    "solov2_r101_fpn_3x": FULL,
    "solov2_r101_dcn_fpn_3x": FULL,
    "solov2_light_448_r18_fpn_3x": (LIGHT_SIZES, 768, 448, 768),
    "solov2_light_448_r34_fpn_3x": (LIGHT_SIZES, 768, 448, 768),
    "solov2_light_448_r50_fpn_3x": (LIGHT_SIZES, 768, 448, 768),
    "solov2_light_512_dcn_r50_fpn_3x": (LIGHT_SIZES, 852, 512, 852),
}
"""Short sides and the longest in training, and in evaluation."""


def load(*words: str | Path) -> Config:
    return load_config(Config, [str(word) for word in words], CARD_OPTIONS)


def solo(changes: dict[str, Any]) -> dict[str, Any]:
    """A config of WXinlong/SOLO with other values; None leaves a key out."""
    config: dict[str, Any] = copy.deepcopy(SOLO_R50)
    put(config["model"], changes)
    return config


def mmdet() -> dict[str, Any]:
    """The same network in the words of mmdet 3."""
    model = solo({})["model"]
    head, masks = model.pop("bbox_head"), model.pop("mask_feat_head")
    head |= {
        "type": "SOLOV2Head",
        "num_classes": 80,
        "feat_channels": head.pop("seg_feat_channels"),
        "pos_scale": head.pop("sigma"),
        "cls_down_index": 0,
        "mask_feature_head": {
            "feat_channels": masks["out_channels"],
            "start_level": 0,
            "end_level": 3,
            "out_channels": head.pop("ins_out_channels"),
            "mask_stride": 4,
            "norm_cfg": masks["norm_cfg"],
        },
        "loss_mask": head.pop("loss_ins"),
        "loss_cls": head.pop("loss_cate"),
    }
    pixels = SOLO_R50["img_norm_cfg"]
    test = dict(SOLO_R50["test_cfg"])
    test["filter_thr"] = test.pop("update_thr")
    preprocessor = {"mean": pixels["mean"], "std": pixels["std"], "bgr_to_rgb": True}
    return model | {"mask_head": head, "test_cfg": test, "data_preprocessor": preprocessor}


@pytest.fixture(scope="module")
def model() -> runs.Model:
    return runs.load(MODEL)


@pytest.mark.parametrize(("words", "meaning"), MEANINGS)
def test_an_option_sets_what_it_says_and_nothing_else(words: str, meaning: dict[str, Any]) -> None:
    config = load(*words.split())
    assert settings_of(config) == settings_of(Config()) | meaning


@pytest.mark.parametrize("word", NO_OPTIONS.split())
def test_a_word_of_theirs_without_meaning_is_answered(word: str) -> None:
    with pytest.raises(UserError, match=rf"^{word}: there is no such option here: .*\.$"):
        load(word, "--seed=1")


def test_every_option_of_the_card_is_tested() -> None:
    words = " ".join([*(text for text, _ in MEANINGS), NO_OPTIONS]).split()
    assert set(CARD_OPTIONS) <= {word.partition("=")[0] for word in words}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpu-ids=0,1", "--gpu-ids=0,1: give the id of the first card"),
        ("--fine-tune=perhaps", "--fine-tune must be 1 or 0, but is 'perhaps'"),
        ("--train_performance=perhaps", "'perhaps' is neither true nor false"),
        ("--opt-level=O3", "must be one of O0, O1, O2, but is 'O3'"),
        ("--total_epoch=5", "did you mean --total_epochs?"),
        ("--autoscale_lr=x", "'x' is neither true nor false"),
        ("--resume_from", "--resume_from needs a value"),
        ("solver.max_iter=5", "Unknown option 'solver.max_iter=5'"),
        ("test.kernel=box", "must be one of gaussian, linear"),
        ("head.sigma=0", "head.sigma=0 must be more than 0"),
    ],
)
def test_a_wrong_word_is_named(words: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load(*words.split())
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *DETECTOR_MISFITS,
        ("--pretrained=resnet101.pth", "is no ResNet of model.depth=50: give resnet50.pth"),
        ("--pretrained=x/resnet18-5c106cde.pth", "give resnet50.pth"),
        ("model.depth=34", "resnet50.pth is no ResNet of model.depth=34: give resnet34.pth"),
        ("model.depth=77", "model.depth must be 18, 34, 50 or 101"),
        ("model.norm=GN model.base_channels=48", "model.base_channels=48 must be a multiple of 32"),
        ("head.channels=100", "head.channels=100 must be a multiple of 32"),
        ("head.grids=[40,36]", "head.grids must have 5 entries, but has 2"),
        ("head.scale_ranges=[[1,2],[1,2],[1,2],[1,2],[2,1]]", r"holds \[2.0, 1.0\]: a range is"),
        ("head.deformable_last_only=true", "says nothing without head.deformable"),
        ("head.pair_slots=[64,32]", "head.pair_slots must hold rising counts"),
        ("head.pair_slots=[]", "one at least"),
        ("precision.accumulate=3", "accumulate=3 does not divide the 2 images of each process"),
        ("data.size_sampling=range", "needs the smallest and the largest"),
        ("solver.steps=[9,5]", "solver.steps must rise"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_the_start(
    model: runs.Model, words: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        model.config(model.run("train_full_8p"), words.split())


def test_an_evaluation_asks_for_no_start_weights(model: runs.Model) -> None:
    for run in ("train_eval_1p", "train_eval_8p"):
        spec = model.run(run)
        assert model.config(spec, ["model.depth=18"]).weights.start == ""
        assert spec.required == ["weights.checkpoint"]


@pytest.mark.parametrize(
    ("run", "epochs", "performance", "autoscale"),
    [
        ("train_full_8p", 12, False, True),
        ("train_full_1p", 1, False, True),
        ("train_performance_8p", 12, True, True),
        ("train_performance_1p", 1, True, True),
        ("train_finetune_1p", 1, False, True),
    ],
)
def test_the_cards_runs_have_the_cards_settings(
    model: runs.Model, run: str, epochs: int, performance: bool, autoscale: bool
) -> None:
    spec = model.run(run)
    config = model.config(spec, [])
    precision, solver = config.precision, config.solver
    assert (precision.opt_level, precision.loss_scale, precision.clip_grad) == ("O1", "128", 35.0)
    assert (solver.epochs, solver.performance, solver.performance_steps) == (
        epochs,
        performance,
        1000,
    )
    assert (solver.base_lr, solver.autoscale_lr, solver.steps) == (0.01, autoscale, [9, 11])
    assert (config.data.batch_size, config.run.seed, config.model.depth) == (2, 0, 50)
    assert config.evaluate.at_end
    assert not model.config(spec, ["--train_performance=0"]).solver.performance
    assert model.config(spec, ["--apex=O0", "--total_epochs=3"]).precision.opt_level == "O0"


def test_fine_tuning_starts_from_the_checkpoint_that_the_user_must_name(model: runs.Model) -> None:
    spec = model.run("train_finetune_1p")
    assert spec.required == ["weights.start"]
    for word in ("--pretrained=mine.pth", "--resume_from=mine.pth"):
        config = model.config(spec, [word])
        assert (config.weights.start, config.run.resume) == ("mine.pth", "")
    again = model.config(spec, ["--pretrained=mine.pth", "--resume"])
    assert (again.weights.start, again.run.resume) == ("mine.pth", "last")


def test_every_config_and_run_reads(model: runs.Model) -> None:
    for file in sorted((MODEL / "configs").glob("*.yaml")):
        check(load("--config", file), 1, "acc")
    for name, spec in model.runs.items():
        assert model.config(spec, []).solver.performance is ("performance" in name)


def test_both_smoke_runs_train_on_the_same_images_a_step(model: runs.Model) -> None:
    batches = {
        spec.devices: model.config(spec, []).data.batch_size * spec.devices
        for name, spec in model.runs.items()
        if "smoke" in name
    }
    assert set(batches) == {1, 2}
    assert len(set(batches.values())) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_a_recipe_is_that_of_the_originals_file(name: str) -> None:
    config = load("--config", MODEL / "configs" / f"{name}.yaml")
    theirs = config_from_upstream(solo(NETWORKS[name]))
    assert theirs.model.num_classes == 80
    theirs.model.num_classes = 0
    for section in ("model", "head", "loss", "test"):
        assert getattr(config, section) == getattr(theirs, section)
    data, solver = config.data, config.solver
    sizes = (data.min_sizes, data.max_size, data.min_size_test, data.max_size_test)
    assert sizes == SIZES[name]
    assert (solver.epochs, solver.steps) == (
        (12, [9, 11]) if name.endswith("1x") else (36, [27, 33])
    )
    assert (config.precision.clip_grad, data.size_sampling, data.flip) == (35.0, "choice", 0.5)
    assert config.weights.start == f"resnet{config.model.depth}.pth"
    unchanged = dataclasses.replace(
        solver, epochs=12, steps=[9, 11]
    )  # the rest is the same everywhere
    assert unchanged == Config().solver


def test_mmdets_model_is_the_same_network_with_its_average_of_masks() -> None:
    config, other = config_from_upstream(mmdet()), config_from_upstream(SOLO_R50)
    assert differing(config, other) == {"loss.mask_average"}
    assert config.loss.mask_average == "cells"
    head = mmdet()
    head["backbone"] |= {"stem_channels": 8, "base_channels": 16, "frozen_stages": -1}
    head["mask_head"] |= {"dcn_cfg": {"type": "DCN"}, "dcn_apply_to_all_conv": False}
    head["test_cfg"]["filter_thr"] = 0.07
    config = config_from_upstream({"model": head})
    assert (config.model.stem_channels, config.model.base_channels) == (8, 16)
    assert (config.head.deformable, config.head.deformable_last_only) == ("v1", True)
    assert (config.model.frozen_stages, config.test.update_thr) == (-1, 0.07)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone.type": "ResNeXt"}, "backbone.type is 'ResNeXt', but only 'ResNet'"),
        ({"backbone.style": "caffe"}, "backbone.style is 'caffe'"),
        ({"backbone.stage_with_dcn": (True,) * 4}, "backbone.stage_with_dcn is [True, True"),
        (
            {"backbone.dcn": {"type": "DCN", "deformable_groups": 4}, **STAGES},
            "backbone.dcn.deformable_groups is 4",
        ),
        ({"backbone.depth": None}, "backbone has no depth"),
        ({"backbone.depth": 152}, "model.depth of the model must be at most 101"),
        ({"neck.num_outs": 6}, "neck.num_outs is 6"),
        ({"bbox_head.type": "DecoupledSOLOHead"}, "only 'SOLOv2Head' or 'SOLOv2LightHead'"),
        ({"bbox_head.num_grids": None}, "bbox_head has no num_grids"),
        ({"bbox_head.loss_ins.use_sigmoid": False}, "bbox_head.loss_ins.use_sigmoid is False"),
        ({"mask_feat_head.num_classes": 128}, "num_classes is 128, but only 256"),
        ({"mask_feat_head": None}, "The model has no mask_feat_head"),
        ({"bbox_head": None}, "neither bbox_head nor mask_head"),
    ],
)
def test_a_network_that_is_not_built_here_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_upstream(solo(changes))
    assert said in str(error.value)


def test_a_kind_of_convolution_without_a_stage_is_not_used() -> None:
    config = config_from_upstream(solo({"backbone.dcn": {"type": "DCNv2"}}))
    assert config.model.deformable == ""


def test_pixels_of_another_order_are_refused() -> None:
    model = mmdet()
    model["data_preprocessor"]["bgr_to_rgb"] = False
    with pytest.raises(UserError, match=r"data_preprocessor\.bgr_to_rgb is false"):
        config_from_upstream(model)


def test_a_python_config_is_answered_with_ours(model: runs.Model) -> None:
    assert set(THEIR_CONFIGS.values()) == {f"configs/{name}.yaml" for name in NETWORKS}
    for theirs, ours in THEIR_CONFIGS.items():
        assert (MODEL / ours).is_file()
        with pytest.raises(UserError, match=rf"not run here: its recipe is {ours}\.$"):
            model.config(model.run("train_full_8p"), [f"--config=configs/solov2/{theirs}"])
    assert THEIR_CONFIGS["solov2_r50_fpn_8gpu_1x.py"] == "configs/solov2_r50_fpn_1x.yaml"
    assert "solov2_light_512_dcn_r50_fpn_8gpu_3x.py" in THEIR_CONFIGS
    with pytest.raises(UserError, match="give a YAML file"):
        model.config(model.run("train_full_8p"), ["--config=solov2_x101_dcn_fpn_8gpu_3x.py"])


def test_start_weights_have_the_addresses_of_torchvision() -> None:
    published = "https://download.pytorch.org/models/"
    assert WEIGHT_ADDRESSES["resnet50.pth"] == f"{published}resnet50-19c8e357.pth"
    for depth in (18, 34, 50, 101):
        address = WEIGHT_ADDRESSES[f"resnet{depth}.pth"]
        assert WEIGHT_ADDRESSES[address.rpartition("/")[2]] == address


@pytest.mark.parametrize(
    "word", ["--data_path=./data/coco", "--data_path=./data", "--data_root=data"]
)
def test_either_form_of_the_cards_path_finds_data_and_weights(tmp_path: Path, word: str) -> None:
    """As far as the weights file, which is none, so that the run ends there."""
    for file in (
        "coco/annotations/instances_train2017.json",
        "coco/annotations/instances_val2017.json",
        "coco/train2017/1.jpg",
        "coco/val2017/2.jpg",
        "pretrained/resnet50.pth",
    ):
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    words = (word, "--device=cpu", f"--output_dir={tmp_path}/o")
    done = run_script(MODEL, "train_full_1p", *words, cwd=tmp_path)
    weights = tmp_path / "data" / "pretrained" / "resnet50.pth"
    assert_mistake_told(done, f"weights.start: {weights} is no PyTorch checkpoint")


def test_help_names_the_cards_options_and_not_those_without_meaning(tmp_path: Path) -> None:
    done = run_script(MODEL, "train_full_1p", "--help", cwd=tmp_path)
    words = words_in_help(done)
    assert {"--apex", "--total_epochs", "--train_performance", "data.batch_size"} <= words
    assert not words & {"--fps_lag", "--validate"}
    assert "--resume_from          checkpoint to continue from, or with --fine-tune" in done.stdout


@pytest.mark.parametrize(
    ("run", "words", "said"),
    [
        ("train_full_8p", ["--total_epoch=8"], "did you mean --total_epochs?"),
        ("train_finetune_1p", [], "The run needs --pretrained=VALUE"),
        ("train_eval_1p", [], "The run needs --checkpoint=VALUE"),
        ("train_full_1p", ["--fps_lag=200"], "--fps_lag=200: there is no such option here"),
    ],
)
def test_a_script_tells_a_wrong_setting_and_starts_nothing(
    run: str, words: list[str], said: str, tmp_path: Path
) -> None:
    done = run_script(MODEL, run, "--data_path=/nowhere", *words, cwd=tmp_path)
    assert_mistake_told(done, said)
