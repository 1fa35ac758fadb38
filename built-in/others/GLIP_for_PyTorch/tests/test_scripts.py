"""The scripts of test/ as a user starts them: good runs, bad input, odd data."""

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from detector_runs import (
    JSON,
    Case,
    detections_of,
    draw_coco,
    edit,
    lines_of,
    losses_of,
    result_of,
    snapshot,
    weights_of,
)
from script_runs import (
    ScriptContract,
    assert_performance_only,
    assert_same_detections,
    assert_same_run,
    coco_bad_input,
    draw_bad_coco,
    log_of,
    run_successfully,
    shared_bad_input,
    write_bad_weights,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))

from glip.config import CARD_OPTIONS, Config
from glip.model import build_model
from glip_runs import BERT, MODEL, write_recipe
from zoo_common.config import load_config

pytestmark = pytest.mark.device

succeed = partial(run_successfully, MODEL)

NETWORK = "GLIP_for_PyTorch"
CHANCE = {"box_AP50": 2, "words_share": math.inf}  # percent; a share of nothing may be any
START = "pretrain/glip_tiny_model_o365_goldg_cc_sbu.pth"
LOSSES = {"token", "box", "centerness"}
# oneDNN's bfloat16 gradient of a convolution over a single cell, as the pyramid's last has for
# smaller images, is not initialised.
HALF_PRECISION_SIZES = ["data.min_sizes=[128]", "data.max_size=160"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"--config-file={write_recipe(tmp_path_factory.mktemp('recipe') / 'tiny.yaml')}"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_coco(tmp_path_factory.mktemp("data") / "C O C O; 'a' \"b\" ${x} 100%")


@pytest.fixture(scope="module")
def home(coco: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands, with the tree that the card shows."""
    at = tmp_path_factory.mktemp("home")
    (at / "coco").symlink_to(coco)
    (at / "bert-base-uncased").symlink_to(BERT)
    write_published(at / START, recipe)
    return at


def write_published(path: Path, recipe: str) -> None:
    """Random weights in the form of microsoft/GLIP's files, with what nothing reads in them."""
    torch.manual_seed(1)
    model = build_model(load_config(Config, [recipe], CARD_OPTIONS))
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    weights["module.rpn.head.cls_logits.weight"] = torch.zeros(1, 32, 1, 1)
    weights["module.rpn.anchor_generator.cell_anchors.0"] = torch.zeros(1, 4)
    path.parent.mkdir()
    torch.save({"model": weights}, path)


@pytest.fixture(scope="module")
def trained(recipe: str, home: Path) -> Path:
    """The output of a whole run by the card's command, whose data is ./coco."""
    words = [recipe, "model.bert=bert-base-uncased", f"--load_from={START}"]
    done = succeed("train_full_1p", *words, "--override_output_dir=my out", cwd=home)
    assert "Final Train Accuracy : " in done.stdout
    return home / "my out"


# ---------------------------------------------------------------------------- good runs


def test_a_run_records_what_it_did(trained: Path) -> None:
    result = result_of(trained)
    assert result["status"] == "completed"
    assert (result["steps"], result["epochs"], result["batch_size"]) == (6, 2, 2)
    score = result["metrics"]["box_AP"]
    assert result["metric"] == {"name": "box_AP", "value": score, "unit": "percent"}
    lines = lines_of(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["losses"].keys() == LOSSES for line in lines)
    # Falls at 0.67 and 0.89 of 6 steps.
    assert [line["lr"] for line in lines] == pytest.approx([1e-4] * 4 + [1e-5] + [1e-6])


def test_a_run_starts_from_the_published_form_of_weights_and_keeps_their_average(
    home: Path, trained: Path
) -> None:
    start = torch.load(home / START, weights_only=True)["model"]
    last = torch.load(trained / "checkpoints" / "last.pth", weights_only=True)
    average = last["parts"]["ema"]
    name = "rpn.head.dyhead_tower.0.b_attn.attn.v_proj.weight"
    first, end = start[f"module.{name}"], last["model"][name].cpu()
    assert 0 < (end - first).abs().max() < 2e-3
    # 6 steps in which the average kept 0.999 of itself each.
    assert 0 < (average[name].cpu() - first).abs().max() < 0.006 * (end - first).abs().max()
    assert average.keys() <= last["model"].keys()
    assert f"{name} " not in log_of(trained)  # nothing of it is missing


@pytest.mark.cards(2)
def test_two_processes_end_with_the_same_weights_and_share_the_evaluation(
    recipe: str, coco: Path, tmp_path: Path
) -> None:
    """Each rank evaluates its own images with its own weights, so these must be the same."""
    words = [recipe, f"--data_path={coco}", "model.static_shapes=on"]
    succeed("train_smoke_2p", *words, "--output_dir=two", cwd=tmp_path)
    result = result_of(tmp_path / "two")
    assert (result["world_size"], result["batch_size"], result["global_batch"]) == (2, 2, 2)
    assert (result["steps"], result["epochs"]) == (6, 2)
    last = f"--load_from={tmp_path}/two/checkpoints/last.pth"
    succeed("eval_8p", *words, last, "--processes=1", "--output_dir=one", cwd=tmp_path)
    assert_same_detections(tmp_path / "two", tmp_path / "one")


def test_a_run_goes_on_to_the_same_numbers(recipe: str, home: Path, trained: Path) -> None:
    """From the middle of an epoch."""
    words = [recipe, f"--load_from={START}", "--output_dir=in two"]
    succeed("train_full_1p", *words, "--max_steps=2", "--skip-test", cwd=home)
    succeed("train_full_1p", *words, "--resume", cwd=home)
    assert_same_run(home / "in two", trained)
    ours, theirs = (
        torch.load(at / "checkpoints" / "last.pth", weights_only=True)["parts"]["ema"]
        for at in (home / "in two", trained)
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_options_of_the_card_reach_the_run(recipe: str, home: Path) -> None:
    """The average is scored, and is not what the run goes on from."""
    words = [*recipe.split("="), "--override_output_dir", "options", "--seed", "3"]
    words += ["MODEL.WEIGHT", START, "SOLVER.IMS_PER_BATCH", "4", "SOLVER.USE_AMP", "True"]
    words += ["SOLVER.MAX_EPOCH", "9", "--early_stop_iteration", "2", "SOLVER.MODEL_EMA", "0.5"]
    words += ["SOLVER.USE_EMA_FOR_MONITOR", "True", "precision.accumulate=2"]
    words += HALF_PRECISION_SIZES
    succeed("train_full_1p", *words, cwd=home)
    output = home / "options"
    result = result_of(output)
    assert (result["steps"], result["seed"], result["batch_size"]) == (2, 3, 4)
    assert result["precision"].startswith("O1 ")
    assert all(math.isfinite(loss) for loss in losses_of(output))
    last = torch.load(output / "checkpoints" / "last.pth", weights_only=True)
    best = weights_of(output / "checkpoints" / "best.pth")
    for name, average in last["parts"]["ema"].items():
        assert torch.equal(average, best[name])
    assert any(not torch.equal(value, best[name]) for name, value in last["model"].items())


@pytest.mark.parametrize(("run", "level"), [("train_performance_8p", "O2")])
def test_a_performance_run_has_no_score(
    run: str, level: str, recipe: str, coco: Path, tmp_path: Path
) -> None:
    words = [f"--data_path={coco}", "--processes=1", f"--amp={level}", "--max_steps=2"]
    words += HALF_PRECISION_SIZES
    done = succeed(run, recipe, *words, "--output_dir=out", cwd=tmp_path)
    assert_performance_only(done, tmp_path / "out", steps=2)
    assert "no start weights" in log_of(tmp_path / "out")
    assert (tmp_path / "out" / f"{NETWORK}_bs2_1p_perf.log").is_file()


def test_any_classes_are_looked_for_by_their_names(
    recipe: str, trained: Path, tmp_path: Path
) -> None:
    """Data of other classes and file names, none to train on, in captions of two classes."""
    drawn = draw_coco(tmp_path / "pets", classes={1: "fox", 2: "gnu", 9: "owl"})
    shutil.rmtree(drawn / "train2017")
    (drawn / "val2017").rename(drawn / "held out")
    (drawn / JSON.format("train")).unlink()
    words = [recipe, "--data_path=pets", "data.val_images=held out", "evaluate.chunk=2"]
    last = f"--load_from={trained / 'checkpoints' / 'last.pth'}"
    succeed("eval_1p", *words, last, "--batch_size=3", "--output_dir=out", cwd=tmp_path)
    assert "3 classes are looked for in 2 captions" in log_of(tmp_path / "out")
    assert {item["category_id"] for item in detections_of(tmp_path / "out")} <= {1, 2, 9}
    assert (tmp_path / "out" / f"{NETWORK}_bs3_1p_eval.log").is_file()


# ---------------------------------------------------------------------------- odd data


def write_phrases(root: Path) -> str:
    """MDETR's JSON of the training pictures, beside COCO's: each object is called by a caption."""
    content = json.loads((root / JSON.format("train")).read_text())
    caption = "the red ball and a man"
    for image in content["images"]:
        image["caption"] = caption
    for item in content["annotations"]:
        item["tokens_positive"] = [[0, 12]] if item["category_id"] == 3 else [[17, 22]]
    (root / "phrases.json").write_text(json.dumps(content))
    return "data.grounding_json=phrases.json"


def test_phrases_are_trained_on_beside_classes(recipe: str, tmp_path: Path) -> None:
    """With damaged files and an image without objects; all of it stays as it was."""
    data = draw_coco(tmp_path / "coco")
    (data / "train2017" / "train 3.jpg").write_bytes(b"\xff\xd8 no picture")
    keep = {5, 15, 25, 35, 45}  # ids of five of six pictures

    def change(content: dict) -> None:
        content["annotations"] = [i for i in content["annotations"] if i["image_id"] in keep]

    phrases = write_phrases(data)
    edit(data, "train", change)
    before = snapshot(data)
    words = [recipe, f"--data_path={data}", phrases, "data.shuffle_classes=true"]
    succeed("train_full_1p", *words, "--skip-test", "--output_dir=out", cwd=tmp_path)
    log = log_of(tmp_path / "out")
    assert "phrases.json: 6 images" in log
    assert "damaged image replaced by the next one: train 3.jpg" in log
    assert result_of(tmp_path / "out")["steps"] == 10  # 5 and 6 images, 2 a step, twice
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / "out"))
    assert snapshot(data) == before


# ---------------------------------------------------------------------------- bad input


TRAIN, EVAL, LAST = "train_full_1p", "eval_1p", "--load_from={at}/last.pth"

BAD_INPUT = {
    # This one waits for somebody, so that it comes first.
    "no weights and no network": Case(
        "eval_1p",
        ["{recipe}", "--data_path={at}/coco"],
        ["Cannot download glip_tiny_model_o365_goldg_cc_sbu.pth from {server}/", "the file at"],
        {"ZOO_WEIGHTS_URL": "{server}", "XDG_CACHE_HOME": "{at}"},
    ),
    "a class that appears twice": Case(
        TRAIN, ["{recipe}", "--data_path={at}/twice"], ["'cat'", "twice"]
    ),
    "a class too long for a caption": Case(
        TRAIN, ["{recipe}", "--data_path={at}/long"], ["tokens", "32"]
    ),
    "a phrase outside of its caption": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "data.grounding_json=beyond.json"],
        ["beyond.json"],
    ),
    "no such phrases": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "data.grounding_json=none.json"],
        ["data.grounding_json: there is no file {at}/coco/none.json"],
    ),
    "checkpoint of other settings": Case(
        EVAL,
        ["{recipe}", "--data_path={at}/coco", "model.fusion=false", LAST],
        ["last.pth", "model.fusion"],
    ),
    "evil .pth": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "--load_from={at}/evil.pth"],
        ["evil.pth was refused"],
    ),
    # The launcher tells these before it starts a process.
    "no data": Case(TRAIN, ["{recipe}"], ["/coco' does not exist", "val2017/<image>"]),
    "no BERT": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "model.bert={at}/none"],
        ["there is no BERT directory", "bert-base-uncased"],
    ),
    "a BERT without words": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "model.bert={at}/wordless"],
        ["{at}/wordless has no tokenizer.json and no vocab.txt"],
    ),
    "words that BERT has no room for": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "model.bert={at}/wordy"],
        ["the vocabulary in {at}/wordy has 113 words, but BERT's embedding has 112"],
    ),
    "no weights at a path": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", f"--load_from={START}"],
        ["weights.start: there is no checkpoint file", START],
    ),
    "images that do not divide": Case(
        "train_full_8p", ["{recipe}", "--data_path={at}/coco"], ["data.batch_size=2", "take 8"]
    ),
    "misspelt option": Case(TRAIN, ["--load_form=x"], ["--load_form", "--load_from?"]),
    "key of another network": Case(
        TRAIN, ["MODEL.BACKBONE.CONV_BODY", "R-50"], ["only 'SWINT-FPN-RETINANET'"]
    ),
    **coco_bad_input(EVAL, LAST),
    **shared_bad_input("coco", EVAL, "--load_from"),
}


@pytest.fixture(scope="module")
def bad(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets, BERTs and weights that cannot be used, and some that can."""
    at = tmp_path_factory.mktemp("bad")
    draw_bad_coco(at)
    draw_coco(at / "twice", classes={3: "cat", 7: "cat"})
    draw_coco(at / "long", classes={3: "cat", 7: "incomprehensible " * 3})
    write_phrases(at / "coco")
    text = (at / "coco" / "phrases.json").read_text()
    (at / "coco" / "beyond.json").write_text(text.replace("[17, 22]", "[17, 99]"))
    for name in ("wordless", "wordy"):
        shutil.copytree(BERT, at / name)
    for name in ("vocab.txt", "tokenizer.json"):
        (at / "wordless" / name).unlink(missing_ok=True)
    with (at / "wordy" / "vocab.txt").open("a") as file:
        file.write("more\n")

    write_bad_weights(at, trained)
    return at


# ---------------------------------------------------------------------------- all models


class TestScripts(ScriptContract):
    model = MODEL
    network = NETWORK
    batch_size = 2
    chance = CHANCE
    bad_input = BAD_INPUT
