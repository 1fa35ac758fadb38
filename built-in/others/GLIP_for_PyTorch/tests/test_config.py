"""Options and keys of the original, recipes, and settings that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_checks import (
    DETECTOR_MISFITS,
    assert_mistake_told,
    differing,
    put,
    settings_of,
    words_in_help,
)
from detector_runs import run_script

from glip.config import (
    CARD_OPTIONS,
    WEIGHT_ADDRESSES,
    Config,
    check,
    check_files,
    config_from_upstream,
)
from zoo_common import runs
from zoo_common.config import load_config
from zoo_common.errors import UserError

MODEL = Path(__file__).resolve().parents[1]
BERT = MODEL / "tests" / "fixtures" / "bert_tiny"
FUSE = "MODEL.DYHEAD.FUSE_CONFIG"
LANGUAGE = "MODEL.LANGUAGE_BACKBONE"
PUBLISHED = "glip_tiny_model_o365_goldg_cc_sbu.pth"

MEANINGS: list[tuple[str, dict[str, Any]]] = [
    ("--batch_size 16", {"data.batch_size": 16}),
    ("--batch_size=16 --evaluates", {"evaluate.batch_size": 16}),
    ("--load_from=a/b.pth", {"weights.start": "a/b.pth"}),
    ("--load_from a/b.pth --evaluates=true", {"weights.checkpoint": "a/b.pth"}),
    ("--load_from=", {"weights.start": ""}),
    ("--checkpoint=c.pth", {"weights.checkpoint": "c.pth"}),
    ("--weight=c.pth", {"weights.checkpoint": "c.pth"}),
    ("--override_output_dir OUT", {"run.output_dir": "OUT"}),
    ("--work_dir=OUT", {"run.output_dir": "OUT"}),
    ("--fp16", {"precision.opt_level": "O1"}),
    ("--fp16 --fp32", {"precision.opt_level": "O0", "run.float32": "fp32"}),
    ("--skip-test", {"evaluate.at_end": False}),
    ("--early_stop_iteration 35000", {"solver.early_stop": 35000}),
    ("--early_stop_iteration=-1", {}),
    ("--disable_output_distributed --save_original_config --seed=4", {"run.seed": 4}),
    ("MODEL.WEIGHT pretrain/x.pth", {"weights.start": "pretrain/x.pth"}),
    ("MODEL.WEIGHT 12 --evaluates", {"weights.checkpoint": "12"}),
    ("MODEL.DEVICE cpu", {"run.device": "cpu"}),
    ("MODEL.DEVICE=npu:3", {"run.device": "npu", "run.device_id": 3}),
    ("MODEL.BACKBONE.OUT_CHANNELS 64 MODEL.DYHEAD.CHANNELS 64", {"model.channels": 64}),
    ("MODEL.FPN.DROP_BLOCK False", {"model.drop_block": 0.0}),
    ("MODEL.FPN.DROP_PROB 0.1", {"model.drop_block": 0.1}),
    ("MODEL.FPN.DROP_PROB 0.1 MODEL.FPN.DROP_BLOCK False", {"model.drop_block": 0.0}),
    ("MODEL.SWINT.EMBED_DIM 48", {"model.swin_width": 48}),
    ("MODEL.SWINT.DEPTHS (1,1,1,1)", {"model.swin_depths": [1, 1, 1, 1]}),
    ("MODEL.SWINT.NUM_HEADS (2,4,8,16)", {"model.swin_heads": [2, 4, 8, 16]}),
    ("MODEL.SWINT.WINDOW_SIZE 12", {"model.swin_window": 12}),
    ("MODEL.SWINT.DROP_PATH_RATE 0", {"model.drop_path": 0.0}),
    (f"{LANGUAGE}.MODEL_PATH ./bert", {"model.bert": "./bert"}),
    (f"{LANGUAGE}.TOKENIZER_PATH ./bert", {"model.bert": "./bert"}),
    (f"{LANGUAGE}.MAX_QUERY_LEN 64", {"model.max_tokens": 64}),
    ("MODEL.DYHEAD.NUM_CONVS 2", {"model.tower_blocks": 2}),
    (f"{FUSE}.EARLY_FUSE_ON False", {"model.fusion": False}),
    (f"{FUSE}.TOKEN_ALPHA 0.5", {"loss.alpha": 0.5}),
    (f"{FUSE}.TOKEN_GAMMA 1.5", {"loss.gamma": 1.5}),
    ("MODEL.ATSS.REG_LOSS_WEIGHT 1.0", {"loss.box_weight": 1.0}),
    ("MODEL.ATSS.TOPK 5", {"loss.candidates": 5}),
    ("MODEL.ATSS.INFERENCE_TH 0.1", {"test.score_thr": 0.1}),
    ("MODEL.ATSS.PRE_NMS_TOP_N 300", {"test.nms_pre": 300}),
    ("MODEL.ATSS.NMS_TH 0.5", {"test.nms_thr": 0.5}),
    ("MODEL.ATSS.DETECTIONS_PER_IMG 300", {"test.max_per_img": 300}),
    ("INPUT.PIXEL_MEAN [1.0,2.0,3.0]", {"model.pixel_mean": [1.0, 2.0, 3.0]}),
    ("INPUT.PIXEL_STD [1.0,2.0,3.0]", {"model.pixel_std": [1.0, 2.0, 3.0]}),
    ("INPUT.MIN_SIZE_TRAIN 640", {"data.min_sizes": [640]}),
    ("AUGMENT.MULT_MIN_SIZE_TRAIN (480,640)", {"data.min_sizes": [480, 640]}),
    (
        "AUGMENT.MULT_MIN_SIZE_TRAIN (480,640) INPUT.MIN_SIZE_TRAIN 800",
        {"data.min_sizes": [480, 640]},
    ),
    ("INPUT.MAX_SIZE_TRAIN 1000", {"data.max_size": 1000}),
    ("INPUT.MIN_SIZE_TEST 600", {"data.min_size_test": 600}),
    ("INPUT.MAX_SIZE_TEST 1000", {"data.max_size_test": 1000}),
    ("AUGMENT.FLIP_PROB_TRAIN 0.0", {"data.flip": 0.0}),
    ('DATASETS.TRAIN ("coco_grounding_train",)', {}),
    ("DATASETS.TRAIN flickr30k_train", {}),
    (
        "DATASETS.TEST coco_2014_val",
        {"data.val_json": "annotations/instances_val2014.json", "data.val_images": "val2014"},
    ),
    ("DATASETS.DISABLE_SHUFFLE False", {"data.shuffle_classes": True}),
    ("DATASETS.RANDOM_SAMPLE_NEG 85", {}),
    (
        "DATASETS.RANDOM_SAMPLE_NEG 85 DATASETS.SPECIAL_SAFEGUARD_FOR_COCO_GROUNDING True",
        {"data.negatives": 85},
    ),
    ("DATALOADER.NUM_WORKERS 0", {"data.workers": 0}),
    ("DATALOADER.ASPECT_RATIO_GROUPING False", {"data.group_by_aspect": False}),
    ("DATALOADER.SIZE_DIVISIBILITY 64", {"data.size_divisibility": 64}),
    ("SOLVER.USE_AMP True", {"precision.opt_level": "O1"}),
    ("SOLVER.IMS_PER_BATCH 32", {"data.batch_size": 32}),
    ("SOLVER.MAX_EPOCH 3", {"solver.max_epoch": 3}),
    ("SOLVER.MAX_ITER 90", {"solver.max_iter": 90}),
    ("SOLVER.BASE_LR 0.5", {"solver.base_lr": 0.5}),
    ("SOLVER.LANG_LR 0.5", {"solver.lang_lr": 0.5}),
    ("SOLVER.BACKBONE_BODY_LR_FACTOR 0.5", {"solver.backbone_lr_factor": 0.5}),
    ("SOLVER.BIAS_LR_FACTOR 1", {"solver.bias_lr_factor": 1.0}),
    ("SOLVER.WEIGHT_DECAY 0.05", {"solver.weight_decay": 0.05}),
    ("SOLVER.WEIGHT_DECAY_BIAS 0.05", {"solver.weight_decay_bias": 0.05}),
    ("SOLVER.WEIGHT_DECAY_NORM_FACTOR 0", {"solver.weight_decay_norm_factor": 0.0}),
    ("SOLVER.STEPS (0.5,900)", {"solver.steps": [0.5, 900.0]}),
    ("SOLVER.GAMMA 0.5", {"solver.gamma": 0.5}),
    ("SOLVER.WARMUP_ITERS 5", {"solver.warmup_iters": 5}),
    ("SOLVER.WARMUP_FACTOR 0.5", {"solver.warmup_factor": 0.5}),
    ("SOLVER.WARMUP_METHOD constant", {"solver.warmup_method": "constant"}),
    ("SOLVER.MODEL_EMA 0.9", {"solver.ema": 0.9}),
    ("SOLVER.USE_EMA_FOR_MONITOR True", {"evaluate.ema": True}),
    ("SOLVER.CHECKPOINT_PERIOD 7", {"solver.checkpoint_every": 7}),
    ("SOLVER.CLIP_GRADIENTS.ENABLED True", {}),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE 1.0", {}),
    (
        "SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_VALUE 2.0",
        {"precision.clip_grad": 2.0},
    ),
    ("SOLVER.SEED 5", {"run.seed": 5}),
    ("TEST.DURING_TRAINING True", {"evaluate.every": 2500}),
    ("TEST.DURING_TRAINING True SOLVER.CHECKPOINT_PERIOD 2500", {"evaluate.every": 2500}),
    ("TEST.CHUNKED_EVALUATION 40", {"evaluate.chunk": 40}),
    ("TEST.CHUNKED_EVALUATION=-1", {}),
    ("OUTPUT_DIR out", {"run.output_dir": "out"}),
]
"""Words, and what they change; each option and key that sets something is in one of them."""

NO_OPTIONS = "--use-tensorboard --local_rank=0 --world-size=8 --dist-url=env:// --task_config=x"


def load(*words: str | Path) -> Config:
    return load_config(Config, [str(word) for word in words], CARD_OPTIONS)


def case(name: str) -> dict[str, Any]:
    content = json.loads((MODEL / "tests" / "fixtures" / f"{name}.json").read_text())
    theirs: dict[str, Any] = content.get("config") or yaml.safe_load(content["cfg"])
    return theirs


@pytest.fixture(scope="module")
def model() -> runs.Model:
    return runs.load(MODEL)


@pytest.mark.parametrize(("words", "meaning"), MEANINGS)
def test_a_word_sets_what_it_says_and_nothing_else(words: str, meaning: dict[str, Any]) -> None:
    config = load(*words.split())
    assert settings_of(config) == settings_of(Config()) | meaning


def test_every_word_that_sets_something_is_tested() -> None:
    tested = {word.partition("=")[0] for words, _ in MEANINGS for word in words.split()}
    tested |= {word.partition("=")[0] for word in NO_OPTIONS.split()}
    setting = {
        name
        for name, entry in CARD_OPTIONS.items()
        if name.startswith("--") or isinstance(entry, str | tuple) or entry.targets
    }
    assert setting <= tested


@pytest.mark.parametrize("word", NO_OPTIONS.split())
def test_a_word_of_theirs_without_meaning_is_answered(word: str) -> None:
    with pytest.raises(UserError, match=rf"^{word}: there is no such option here: .*\.$"):
        load(word, "--seed=1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("MODEL.DYHEAD.SCORE_AGG MAX", "MODEL.DYHEAD.SCORE_AGG: 'MAX' is not supported, only"),
        ("MODEL.BACKBONE.FREEZE_CONV_BODY_AT 2", "2 is not supported, only -1"),
        ("MODEL.BACKBONE.CONV_BODY SWINT-FPN", "only 'SWINT-FPN-RETINANET'"),
        ("MODEL.RPN.ANCHOR_SIZES (32,64,128,256,512)", "only [64, 128, 256, 512, 1024]"),
        ("INPUT.FORMAT rgb", "only '' or 'bgr255'"),
        ("SOLVER.OPTIMIZER SGD", "only 'ADAMW'"),
        ("SOLVER.USE_AMP maybe", "'maybe' is neither true nor false"),
        ("SOLVER.MAX_EPOCHS 2", "did you mean SOLVER.MAX_EPOCH?"),
        ("MODEL.WEIGHTS x.pth", "did you mean MODEL.WEIGHT?"),
        ("MODEL.DEVICE npu:a", "is no device"),
        ("DATASETS.TRAIN lvis_train", "name other data by data.train_json and data.train_images"),
        ("DATALOADER.SIZE_DIVISIBILITY 0", "0 is not supported"),
        (
            "MODEL.BACKBONE.OUT_CHANNELS 64 MODEL.DYHEAD.CHANNELS 32",
            "only MODEL.BACKBONE.OUT_CHANNELS and MODEL.DYHEAD.CHANNELS alike",
        ),
        (
            f"{FUSE}.EARLY_FUSE_ON True {FUSE}.USE_FUSED_FEATURES_DOT_PRODUCT False",
            f"only what {FUSE}.EARLY_FUSE_ON is",
        ),
        ("--load-form=x.pth", "did you mean --load_from?"),
        ("--fp16=1", "--fp16 takes no value"),
        ("test.rank_by=centerness", "must be one of score_centerness, score"),
        ("model.max_tokens=2", "must be at least 3"),
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
        ("--batch_size=12", "images of all 8 processes together .*: take 8 or 16"),
        ("--batch_size=4", "take 8 "),
        ("precision.accumulate=3", "accumulate=3 does not divide the 1 images of each process"),
        ("model.swin_depths=[2,2]", "model.swin_depths must have 4 entries, but has 2"),
        ("model.swin_heads=[3,6,12,25]", "must divide .* but stage 4 has 768"),
        ("model.channels=100", "model.channels=100 must be a multiple of 16"),
        ("model.fusion_heads=5", "model.fusion_heads=5 must divide model.fusion_width=2048"),
        ("solver.steps=[0.9,0.5]", "solver.steps must rise"),
        ("solver.ema=1", "solver.ema=1 would never move"),
        ("solver.ema=0 evaluate.ema=true", "evaluate.ema=true needs an average"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_the_start(
    model: runs.Model, words: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        model.config(model.run("train_full_8p"), words.split())


@pytest.mark.parametrize(
    ("run", "batch", "stop", "scored"),
    [
        ("train_full_8p", 8, 35000, True),
        ("train_full_1p", 1, 35000, True),
        ("train_performance_8p", 8, 2500, False),
        ("train_performance_1p", 1, 2500, False),
    ],
)
def test_the_cards_runs_have_the_originals_settings(
    model: runs.Model, run: str, batch: int, stop: int, scored: bool
) -> None:
    spec = model.run(run)
    config = model.config(spec, [])
    solver, precision = config.solver, config.precision
    assert (config.data.batch_size, solver.early_stop, solver.max_epoch) == (batch, stop, 24)
    assert (solver.base_lr, solver.lang_lr, solver.weight_decay) == (1e-5, 1e-5, 1e-4)
    assert (solver.warmup_iters, solver.warmup_factor, solver.steps) == (2000, 1e-3, [0.67, 0.89])
    assert (solver.bias_lr_factor, solver.weight_decay_bias, solver.ema) == (2.0, 0.0, 0.999)
    assert (precision.opt_level, precision.clip_grad) == ("O0", 1.0)
    assert (config.data.min_sizes, config.data.max_size) == ([480, 560, 640, 720, 800], 1333)
    assert (config.data.path, config.model.bert) == ("coco", "bert-base-uncased")
    assert config.weights.start == PUBLISHED
    assert config.evaluate.at_end is scored
    assert model.config(spec, ["--fp16"]).precision.opt_level == "O1"


def test_an_evaluation_is_of_the_published_weights_or_those_that_are_named(
    model: runs.Model,
) -> None:
    for run in ("eval_1p", "eval_8p"):
        spec = model.run(run)
        config = model.config(spec, [])
        assert (config.weights.start, config.weights.checkpoint) == ("", PUBLISHED)
        for words in (["--load_from=a.pth"], ["MODEL.WEIGHT", "a.pth"], ["--checkpoint=a.pth"]):
            config = model.config(spec, [*words, "--batch_size", "8"])
            assert (config.weights.start, config.weights.checkpoint) == ("", "a.pth")
            assert config.evaluate.batch_size == 8
    assert WEIGHT_ADDRESSES[PUBLISHED].endswith(f"/{PUBLISHED}")


def test_every_config_and_run_reads(model: runs.Model) -> None:
    for file in sorted((MODEL / "configs").glob("*.yaml")):
        config = load("--config", file)
        check(config, 1, "acc")
        assert config.weights.start in {"", *WEIGHT_ADDRESSES}
    for name, spec in model.runs.items():
        assert model.config(spec, []).evaluate.at_end is not ("performance" in name)
    batches = {
        model.config(model.run(run), []).data.batch_size
        for run in ("train_smoke_1p", "train_smoke_2p")
    }
    assert len(batches) == 1  # of all processes together


def test_microsofts_yaml_is_read_with_the_options_of_its_readme(tmp_path: Path) -> None:
    """What its command for COCO makes of its merged config is our recipe."""
    theirs = case("glip_microsoft_tiny")
    theirs["MODEL"]["SWINT"] |= {
        "EMBED_DIM": 96,
        "DEPTHS": [2, 2, 6, 2],
        "NUM_HEADS": [3, 6, 12, 24],
        "DROP_PATH_RATE": 0.2,
    }
    theirs["MODEL"]["BACKBONE"]["OUT_CHANNELS"] = theirs["MODEL"]["DYHEAD"]["CHANNELS"] = 256
    theirs["MODEL"]["DYHEAD"]["NUM_CONVS"] = 6
    theirs["MODEL"]["FPN"]["DROP_BLOCK"] = True
    theirs["MODEL"]["LANGUAGE_BACKBONE"]["MAX_QUERY_LEN"] = 256
    theirs["MODEL"]["DEVICE"] = "auto"
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(theirs))
    words = (
        f"--config-file {file} --skip-test MODEL.WEIGHT {PUBLISHED} "
        'DATASETS.TRAIN ("coco_grounding_train",) MODEL.BACKBONE.FREEZE_CONV_BODY_AT -1 '
        "SOLVER.IMS_PER_BATCH 32 SOLVER.USE_AMP True SOLVER.MAX_EPOCH 24 TEST.DURING_TRAINING "
        "False TEST.IMS_PER_BATCH 16 SOLVER.FIND_UNUSED_PARAMETERS False SOLVER.BASE_LR 0.00001 "
        "SOLVER.LANG_LR 0.00001 SOLVER.STEPS (0.67,0.89) DATASETS.DISABLE_SHUFFLE True "
        "MODEL.DYHEAD.SCORE_AGG MEAN TEST.EVAL_TASK detection"
    )
    ours = load("--config", MODEL / "configs" / "glip_tiny_coco.yaml")
    assert differing(load(*words.split()), ours) == {"evaluate.at_end", "run.output_dir"}


def test_a_key_that_is_none_of_theirs_is_told(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text("MODEL:\n  DYHEAD:\n    NUM_CONV: 6\n")
    with pytest.raises(UserError, match=r"MODEL\.DYHEAD\.NUM_CONV in .*theirs\.yaml: did you mean"):
        load("--config-file", file)


@pytest.mark.parametrize("name", ["glip_microsoft_tiny", "glip_mmdet_tiny", "glip_a_mmdet_tiny"])
def test_their_network_is_ours(name: str) -> None:
    config = config_from_upstream(case(name))
    model, is_mmdet = config.model, "mmdet" in name
    assert (model.swin_width, model.swin_depths, model.swin_heads) == (8, [2] * 4, [1, 2, 4, 8])
    assert (model.channels, model.tower_blocks, model.max_tokens) == (64, 2, 64)
    assert (model.fusion, model.drop_path, model.drop_block) == ("_a_" not in name, 0, 0)
    assert config.loss.no_object is not is_mmdet
    assert config.test.legacy_nms is not is_mmdet
    assert config.test.rank_by == ("score" if is_mmdet else "score_centerness")
    assert (config.loss.box_weight, config.test.nms_thr) == (2.0, 0.6)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("type", "GroundingDINO", "neither MODEL, as microsoft/GLIP's, nor a model of type GLIP"),
        ("backbone.type", "ResNet", "backbone.type is 'ResNet', but only 'SwinTransformer'"),
        ("backbone.embed_dims", None, "The model's backbone has no embed_dims: add it."),
        ("neck.num_outs", 6, "neck.num_outs is 6"),
        ("bbox_head.type", "ATSSHead", "only 'ATSSVLFusionHead'"),
        ("bbox_head.loss_cls", None, "The model has no loss_cls: give one of GLIP, with losses."),
        ("bbox_head.anchor_generator.ratios", [0.5], "anchor_generator.ratios is [0.5]"),
        ("data_preprocessor.bgr_to_rgb", True, "bgr_to_rgb is True, but only False"),
        ("train_cfg.assigner.iou_calculator.type", "BboxOverlaps2D", "iou_calculator.type is"),
    ],
)
def test_a_network_that_is_not_built_here_is_refused(place: str, value: Any, said: str) -> None:
    theirs = case("glip_mmdet_tiny")
    put(theirs, {place: value})
    with pytest.raises(UserError) as error:
        config_from_upstream({"model": theirs})
    assert said in str(error.value)


def test_bert_is_found_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "bert-base-uncased").symlink_to(BERT)
    config = load(f"--data_path={tmp_path / 'coco'}")
    check_files(config, "acc")
    assert config.model.bert == str(tmp_path / "bert-base-uncased")


def test_absent_phrases_are_told_in_training_only(tmp_path: Path) -> None:
    config = load(f"--data_path={tmp_path}", f"model.bert={BERT}", "data.grounding_json=x.json")
    check_files(config, "eval")
    with pytest.raises(UserError, match=rf"there is no file {tmp_path}/x\.json"):
        check_files(config, "acc")


def test_help_names_the_cards_options_and_not_those_without_meaning(tmp_path: Path) -> None:
    words = words_in_help(run_script(MODEL, "train_full_1p", "--help", cwd=tmp_path))
    assert {"--load_from", "--fp16", "SOLVER.MAX_EPOCH", "data.batch_size"} <= words
    assert not words & {"--local_rank", "--evaluates", "TEST.IMS_PER_BATCH"}


def tree(root: Path, *files: str) -> None:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_the_cards_tree_is_found_and_what_is_missing_in_it_told(tmp_path: Path) -> None:
    """As far as the weights file, which is none, so that the run ends there."""
    words = ["--device=cpu", "--output_dir=o", "--batch_size=1"]
    done = run_script(MODEL, "train_full_1p", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path}/coco" in done.stderr
    assert "annotations/instances_train2017.json" in done.stderr
    tree(
        tmp_path / "coco",
        *("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
        *("train2017/1.jpg", "val2017/2.jpg"),
    )
    done = run_script(MODEL, "train_full_1p", *words, cwd=tmp_path)
    assert_mistake_told(done, "config.json, vocab.txt or tokenizer.json into ./bert-base-uncased")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: model.bert: there is no BERT directory ")
    (tmp_path / "bert-base-uncased").symlink_to(BERT)
    weights = tmp_path / "pretrain" / PUBLISHED
    tree(tmp_path, f"pretrain/{PUBLISHED}")
    for given in (f"--load_from=pretrain/{PUBLISHED}", f"MODEL.WEIGHT=pretrain/{PUBLISHED}"):
        done = run_script(MODEL, "train_full_1p", *words, given, cwd=tmp_path)
        assert done.returncode == 2
        assert f"weights.start: {weights} is no PyTorch checkpoint" in done.stderr
    done = run_script(MODEL, "eval_1p", *words, f"--load_from=pretrain/{PUBLISHED}", cwd=tmp_path)
    assert f"weights.checkpoint: {weights} is no PyTorch checkpoint" in done.stderr
