"""Configs, the card's options and the original's config files, and what is said of wrong ones."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_checks import put, settings_of

from declip.config import CARD_OPTIONS, Config, check, config_from_upstream
from zoo_common import runs
from zoo_common.config import load_config, read_yaml
from zoo_common.errors import UserError

MODEL = Path(__file__).resolve().parents[1]
FIXTURES = MODEL / "tests" / "fixtures"

NORMS_AND_BIASES = ("bn_w", "bn_b", "ln_w", "ln_b", "bias", "logit_scale")

UPSTREAM: dict[str, Any] = {
    "model": {
        "type": "declip_vitb32",
        "kwargs": {
            "image_encode": {"embed_dim": 512},
            "text_encode": {
                "bpe_path": "../../../../text_info/bpe_simple_vocab_16e6.txt.gz",
                "text_encode_type": "Transformer",
                "text_model_utils": {"random": False, "freeze": False},
                "embed_dim": 512,
            },
            "clip": {
                "use_allgather": True,
                "text_mask_type": "MLM",
                "return_nn_bank": True,
                "feature_dim": 512,
            },
        },
    },
    "dist": {"sync": False},
    "grad_clip": {"type": "logit_scale_param_value", "value": 3, "max_value": 6},
    "clip_simsiam_loss_weight": {
        "clip_loss": 0.4,
        "nn_text": 0.2,
        "simsiam_loss": 0.2,
        "masking_language": 0.2,
    },
    "optimizer": {
        "type": "AdamW",
        "kwargs": {
            "lr": 0.0001,
            "weight_decay": 0.1,
            "betas": [0.9, 0.98],
            "amsgrad": False,
            "eps": 0.00000001,
        },
        "fp16_normal_bn": True,
        "fp16_normal_ln": True,
        "pconfig": {kind: {"weight_decay": 0} for kind in NORMS_AND_BIASES},
    },
    "lr_scheduler": {
        "type": "Cosine",
        "kwargs": {
            "base_lr": 0.0001,
            "warmup_lr": 0.001,
            "min_lr": 0.0,
            "warmup_steps": 2500,
            "max_iter": 128001,
        },
    },
    "label_smooth": 0.0,
    "ema": {"enable": False, "kwargs": {"decay": 0.999}},
    "data": {
        "type": "clip",
        "read_from": "fs",
        "use_dali": True,
        "batch_size": 128,
        "num_workers": 7,
        "pin_memory": True,
        "input_size": 224,
        "test_resize": 256,
        "train": {
            "root_dir": ["cluster2:s3://yfcc100m-part/data/"],
            "meta_file": ["../../../../imagenet_info/yfcc15m_clean_open_data.json"],
            "image_reader": {"type": "pil"},
            "sampler": {"type": "distributed_iteration"},
            "transforms": {"type": "MOCOV2"},
            "image_text_two_view": True,
            "fseek": True,
            "use_ranked": False,
        },
        "test": [
            {
                "type": "clip",
                "batch_size": 128,
                "test": {"meta_file": "val_official.json", "label_texts_ensemble": "prompt80"},
            }
        ],
    },
    "saver": {
        "print_freq": 100,
        "val_freq": 2000,
        "save_freq": 200,
        "save_many": False,
        "pretrain": {"auto_resume": True},
    },
}
"""Sense-GVT/DeCLIP's experiments/declip_experiments/yfcc15m/yfcc15m_vit_declip/config.yaml."""

R50: dict[str, Any] = {
    "model.type": "declip_res50",
    "model.kwargs.image_encode": {"bn_group_size": 32, "bn_sync_stats": True, "embed_dim": 1024},
    "model.kwargs.text_encode.embed_dim": 1024,
    "model.kwargs.clip.feature_dim": None,
}
CLIP: dict[str, Any] = {
    "model.type": "clip_vitb32",
    "model.kwargs.clip": {"use_allgather": True},
    "clip_simsiam_loss_weight": None,
    "optimizer.fp16_normal_bn": None,
    "optimizer.fp16_normal_ln": None,
    "data.num_workers": 5,
    "data.train.transforms.type": "STANDARD_SLIP",
    "data.train.image_text_two_view": None,
}
RECIPES: dict[str, dict[str, Any]] = {
    "declip_vitb32": {},
    "declip_r50": R50,
    "clip_vitb32": CLIP,
    "clip_r50": R50
    | CLIP
    | {
        "model.type": "clip_res50",
        "model.kwargs.image_encode": {"bn_group_size": 32, "use_sync_bn": False, "embed_dim": 1024},
    },
}
"""Our recipes, and what the original's files of the same networks have otherwise."""

OF_THE_RUN = ("data.path", "data.workers", "precision.opt_level", "schedule.save_every")
"""What a recipe says beside the original's: the card's words, places and how often it saves."""


def changed(**entries: Any) -> dict[str, Any]:
    """The original's config with other entries, by dotted names; None removes one."""
    cfg = copy.deepcopy(UPSTREAM)
    put(cfg, entries)
    return cfg


def config_of(*words: str) -> Config:
    return load_config(Config, words, CARD_OPTIONS)


# ---------------------------------------------------------------------------- our own


@pytest.mark.parametrize("run", sorted(runs.load(MODEL).runs))
def test_every_run_has_a_config_and_a_script(run: str) -> None:
    model = runs.load(MODEL)
    spec = model.run(run)
    config = model.config(spec, [])
    world_size = spec.devices * int(config.launch.nnodes)
    assert f"{world_size}p" in run or run.endswith("_multinodes")
    assert (MODEL / "test" / f"{run}.sh").is_file()
    assert config.evaluate.at_end == (spec.kind != "perf")


@pytest.mark.parametrize("file", sorted(file.name for file in (MODEL / "configs").iterdir()))
def test_every_config_fits_one_card_and_many(file: str) -> None:
    config = config_of(f"--config={MODEL / 'configs' / file}")
    for world_size in (1, 2, 8, 32):
        check(config, world_size, "acc")


def test_runs_of_the_card_are_in_its_precision() -> None:
    config = config_of(f"--config={MODEL / 'configs' / 'declip_vitb32.yaml'}")
    assert (config.precision.opt_level, config.precision.loss_scale) == ("O1", "dynamic")
    assert config.data.path == "dataset"


def test_the_smoke_recipes_differ_in_the_objective_alone() -> None:
    ours, plain = (
        read_yaml(MODEL / "configs" / f"{name}.yaml") for name in ("smoke", "smoke_clip")
    )
    assert plain["model"] == ours["model"] | {"objective": "clip"}
    for section in ("optimizer", "schedule", "evaluate", "run"):
        assert plain[section] == ours[section]
    assert plain["data"]["batch_size"] == ours["data"]["batch_size"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--perf_only", {"run.max_steps": 1000, "evaluate.every": 0, "evaluate.at_end": False}),
        ("--checkpoint=ckpt.pth.tar", {"weights.checkpoint": "ckpt.pth.tar"}),
        ("--pretrained ckpt.pth.tar", {"weights.start": "ckpt.pth.tar"}),
        ("--data_path=./dataset", {"data.path": "./dataset"}),
        ("--batch_size=256", {"data.batch_size": 256}),
        ("--nnodes=4 --node_rank 1", {"launch.nnodes": "4", "launch.node_rank": 1}),
        ("lr_scheduler.kwargs.max_iter=10", {"schedule.steps": 10}),
        ("saver.print_freq 7", {"run.log_every": 7}),
    ],
)
def test_words_of_card_and_original_have_their_meaning(words: str, wanted: dict[str, Any]) -> None:
    config = config_of(*words.split())
    assert settings_of(config) == settings_of(Config()) | wanted


def test_evaluate_of_the_original_names_the_script_instead() -> None:
    with pytest.raises(UserError, match=r"--evaluate.*bash test/train_eval_1p\.sh"):
        config_of("--evaluate")


def test_help_comes_without_torch() -> None:
    code = "import sys, declip.config; assert 'torch' not in sys.modules"
    environ = os.environ | {"PYTHONPATH": str(MODEL)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ)


# ---------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.image_heads=5", r"model\.image_heads=5 does not divide model\.image_width=768"),
        ("model.text_heads=3", r"model\.text_heads=3 does not divide model\.text_width=512"),
        ("model.patch=15", r"model\.patch=15 does not divide model\.input_size=224"),
        ("model.tower=resnet model.image_depths=[1,2]", r"model\.image_depths must have 4 entr"),
        ("model.tower=resnet model.input_size=100", r"input_size=100 must be a multiple of 32"),
        ("model.tower=resnet model.image_heads=7", r"image_heads=7 does not divide 32 \* model"),
        ("model.tower=resnet model.image_heads=32 model.sync_batch_norm=3", r"sync_batch_norm=3 d"),
        ("loss.scale_min=7", r"loss\.scale_min=7\.0 is above loss\.scale_max=6\.0"),
        ("loss.queue_size=64", r"loss\.queue_size=64 does not hold .* 128 of --batch_size"),
        ("text.eda=false", r"model\.objective=declip compares .* text\.synonyms=false"),
        ("model.objective=clip", r"set loss\.nn_text and loss\.simsiam and .*clip_vitb32\.yaml"),
        ("optimizer.warmup_steps=9 schedule.steps=9", r"optimizer\.warmup_steps=9 must be below"),
        ("precision.accumulate=2", r"precision\.accumulate=2 would compare .*--batch_size"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_a_sentence(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        check(config_of(*words.split()), 8, "acc")
    assert "\n" not in str(told.value)


def test_a_loss_needs_a_weight() -> None:
    names = ("clip", "nn_text", "simsiam", "masked_language")
    with pytest.raises(UserError, match="are all 0"):
        check(config_of(*(f"loss.{name}=0" for name in names)), 1, "acc")
    plain = ["model.objective=clip", *(f"loss.{name}=0" for name in names[1:])]
    with pytest.raises(UserError, match=r"text\.eda=false"):
        check(config_of(*plain), 1, "acc")
    check(config_of(*plain, "text.eda=false"), 1, "acc")


def test_an_evaluation_minds_the_network_alone() -> None:
    check(config_of("precision.accumulate=2", "text.eda=false"), 8, "eval")
    with pytest.raises(UserError, match="patch"):
        check(config_of("model.patch=15"), 8, "eval")


def test_fewer_processes_than_share_a_norm_are_one_group() -> None:
    words = ["model.tower=resnet", "model.image_heads=32", "model.sync_batch_norm=32"]
    for world_size in (1, 3, 8, 64):
        check(config_of(*words), world_size, "acc")
    with pytest.raises(UserError, match="40 processes"):
        check(config_of(*words), 40, "acc")


# ---------------------------------------------------------------------------- the original's


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_originals_files_mean_our_recipes(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(changed(**RECIPES[recipe]), sort_keys=False))
    theirs = settings_of(config_of(f"--config={file}"))
    ours = settings_of(config_of(f"--config={MODEL / 'configs' / recipe}.yaml"))
    assert (theirs["run.log_every"], theirs["evaluate.every"]) == (100, 2000)
    assert (theirs["data.workers"], theirs["schedule.save_every"]) == (
        5 if recipe[:5] == "clip_" else 7,
        200,
    )
    ignored = (*OF_THE_RUN, "run.log_every", "loss.queue_wrap")
    for name in ignored:
        theirs[name] = ours[name]
    assert theirs == ours


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_their_keys_does_not_matter(order: int, tmp_path: Path) -> None:
    cfg = changed(**R50)
    cfg["model"]["kwargs"]["image_encode"] |= {"width": 8, "layers": [1, 1, 1, 1], "heads": 4}
    cfg["model"] = dict(list(cfg["model"].items())[::order])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dict(list(cfg.items())[::order]), sort_keys=False))
    model = config_of(f"--config={file}").model
    assert (model.image_width, model.image_heads, model.embed_dim) == (8, 4, 1024)
    assert model.image_depths == [1, 1, 1, 1]


@pytest.mark.parametrize("network", ["vit", "r50"])
def test_the_parity_cases_have_configs(network: str) -> None:
    case = json.loads((FIXTURES / f"declip_{network}_tiny.json").read_text())
    cfg = case["config"] | {"clip_simsiam_loss_weight": case["loss_weights"]}
    config = config_from_upstream(cfg, case["mlp_widths"])
    assert config.loss.contrast_masked and not config.loss.queue_wrap
    assert config.loss.queue_size == case["config"]["clip"]["nn_size"]
    model = config.model
    assert (model.projector_width, model.predictor_width) == (48, 24)
    assert (model.embed_dim, model.context_length, model.text_layers) == (32, 48, 2)
    assert (model.tower == "vit") == (network == "vit")


def test_absent_weights_are_zero_beside_others() -> None:
    config = config_from_upstream(
        changed(clip_simsiam_loss_weight={"clip_loss": 0.5, "simsiam_loss": 0.5})
    )
    loss = config.loss
    assert (loss.clip, loss.nn_text, loss.simsiam, loss.masked_language) == (0.5, 0, 0.5, 0)
    assert config_from_upstream(UPSTREAM["model"]).loss.nn_text == 0.2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.type", "slip_vitb32", r"'slip_vitb32' is not built here, only declip_vitb32"),
        ("model.type", None, r"has no model\.type"),
        ("model.kwargs.clip.return_dense", True, r"return_dense.*True is not built here"),
        ("model.kwargs.clip.return_nn_bank", False, r"nn_text has a weight, but .*return_nn_bank"),
        ("model.kwargs.clip.feature_dim", None, r"feature_dim is 1024, but .*embed_dim is 512"),
        ("model.kwargs.text_encode.embed_dim", 256, r"256 is not the 512"),
        ("model.kwargs.text_encode.text_encode_type", "Bert", r"'Bert' is not built here"),
        ("model.kwargs.image_encode.layers", [3, 4, 6, 3], r"not what a vit has, one number"),
        ("model.kwargs.image_encode.dropout", 0.5, r"Unknown setting .*image_encode\.dropout"),
        ("optimizer.type", "FusedFP16SGD", r"'FusedFP16SGD' is not built here"),
        ("optimizer.pconfig.bias.weight_decay", 0.1, r"0\.1 is not built here, only 0"),
        ("data.train.transforms.type", "STANDARD_SLIP", r"not built here for declip, only MOCOV2"),
        ("saver.pretrain.path", "a.pth", r"weights\.start=FILE"),
    ],
)
def test_what_is_not_built_here_is_told(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        config_from_upstream(changed(**{name: value}))
    assert "\n" not in str(told.value)
