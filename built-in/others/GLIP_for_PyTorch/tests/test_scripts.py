"""The scripts of test/ as a user starts them: good runs, bad input, odd data."""

import json
import math
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from detector_runs import (
    ABSENT,
    DEVICE,
    JSON,
    Answer,
    Case,
    assert_refused,
    assert_same_weights,
    detections_of,
    draw_coco,
    edit,
    lines_of,
    losses_of,
    report_of,
    result_of,
    run_cases,
    snapshot,
    weights_of,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))

from glip.config import CARD_OPTIONS, Config
from glip.model import build_model
from glip_runs import BERT, MODEL, script, write_recipe
from zoo_common.config import load_config

pytestmark = pytest.mark.device

NETWORK = "GLIP_for_PyTorch"
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
    done = script("train_full_1p", *words, "--override_output_dir=my out", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "Final Train Accuracy : " in done.stdout
    return home / "my out"


def log_of(output: Path) -> str:
    return (output / "train_0.log").read_text()


# ---------------------------------------------------------------------------- good runs


def test_the_smoke_run_scores_nothing_before_it_has_learned(tmp_path: Path) -> None:
    words = [f"--device={DEVICE}", "--max_steps=1", "--output_dir=out"]
    done = script("train_smoke_1p", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["box_AP50"] < 2
    assert "words_share" in metrics


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


def test_the_report_has_the_names_and_keys_of_the_original(trained: Path) -> None:
    case = f"{NETWORK}_bs2_1p_acc"
    rows = report_of(trained, case)
    assert list(rows) == [
        "Network",
        "RankSize",
        "BatchSize",
        "DeviceType",
        "CaseName",
        "ActualFPS",
        "TrainingTime",
        "TrainAccuracy",
        "ActualLoss",
        "E2ETrainingTime",
        "Status",
    ]
    assert (rows["Network"], rows["BatchSize"], rows["CaseName"]) == (NETWORK, "2", case)
    score = result_of(trained)["metric"]["value"]
    assert float(rows["TrainAccuracy"]) == pytest.approx(score, 1e-3)


@pytest.mark.cards(2)
def test_two_processes_end_with_the_same_weights_and_share_the_evaluation(
    recipe: str, coco: Path, tmp_path: Path
) -> None:
    """Each rank evaluates its own images with its own weights, so these must be the same."""
    words = [recipe, f"--data_path={coco}", "model.static_shapes=on"]
    done = script("train_smoke_2p", *words, "--output_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "two")
    assert (result["world_size"], result["batch_size"], result["global_batch"]) == (2, 2, 2)
    assert (result["steps"], result["epochs"]) == (6, 2)
    last = f"--load_from={tmp_path}/two/checkpoints/last.pth"
    done = script("eval_8p", *words, last, "--processes=1", "--output_dir=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(detections_of(tmp_path / "two")) > 4
    assert detections_of(tmp_path / "one") == detections_of(tmp_path / "two")
    assert result_of(tmp_path / "one")["metrics"] == result["metrics"]


def test_a_run_goes_on_to_the_same_numbers(recipe: str, home: Path, trained: Path) -> None:
    """From the middle of an epoch."""
    words = [recipe, f"--load_from={START}", "--output_dir=in two"]
    half = script("train_full_1p", *words, "--max_steps=2", "--skip-test", cwd=home)
    assert half.returncode == 0, half.stderr
    rest = script("train_full_1p", *words, "--resume", cwd=home)
    assert rest.returncode == 0, rest.stderr
    assert losses_of(home / "in two") == losses_of(trained)
    last = Path("checkpoints") / "last.pth"
    assert_same_weights(home / "in two" / last, trained / last)
    ours, theirs = (
        torch.load(at / last, weights_only=True)["parts"]["ema"]
        for at in (home / "in two", trained)
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert result_of(home / "in two")["metrics"] == result_of(trained)["metrics"]


def test_the_options_of_the_card_reach_the_run(recipe: str, home: Path) -> None:
    """The average is scored, and is not what the run goes on from."""
    words = [*recipe.split("="), "--override_output_dir", "options", "--seed", "3"]
    words += ["MODEL.WEIGHT", START, "SOLVER.IMS_PER_BATCH", "4", "SOLVER.USE_AMP", "True"]
    words += ["SOLVER.MAX_EPOCH", "9", "--early_stop_iteration", "2", "SOLVER.MODEL_EMA", "0.5"]
    words += ["SOLVER.USE_EMA_FOR_MONITOR", "True", "precision.accumulate=2"]
    words += HALF_PRECISION_SIZES
    done = script("train_full_1p", *words, cwd=home)
    assert done.returncode == 0, done.stderr
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
    done = script(run, recipe, *words, "--output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Final Performance images/sec : " in done.stdout
    result = result_of(tmp_path / "out")
    assert (result["steps"], result["metric"], result["metrics"]) == (2, None, {})
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
    done = script("eval_1p", *words, last, "--batch_size=3", "--output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    done = script("train_full_1p", *words, "--skip-test", "--output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    "truncated JSON": Case(
        TRAIN, ["{recipe}", "--data_path={at}/half"], ["instances_train2017.json ends in the mid"]
    ),
    "all held-out images damaged": Case(
        EVAL, ["{recipe}", "--data_path={at}/damaged", LAST], ["None of the images in val2017"]
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
    "checkpoint of another network": Case(
        EVAL,
        ["{recipe}", "--data_path={at}/coco", "--load_from={at}/foreign.pth"],
        ["foreign.pth holds weights of no kind that is known here"],
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
    "no annotations": Case(
        TRAIN, ["{recipe}", "--data_path={at}/bare"], ["no annotations/instances_train2017.json"]
    ),
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
    "truncated checkpoint": Case(
        EVAL, ["--data_path={at}/coco", "--load_from={at}/half.pth"], ["half.pth is truncated"]
    ),
    "absent device": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", f"--device={ABSENT}"],
        [f"Device {ABSENT} cannot be used"],
    ),
    "images that do not divide": Case(
        "train_full_8p", ["{recipe}", "--data_path={at}/coco"], ["data.batch_size=2", "take 8"]
    ),
    "misspelt option": Case(TRAIN, ["--load_form=x"], ["--load_form", "--load_from?"]),
    "key of another network": Case(
        TRAIN, ["MODEL.BACKBONE.CONV_BODY", "R-50"], ["only 'SWINT-FPN-RETINANET'"]
    ),
}


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def bad(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets, BERTs and weights that cannot be used, and some that can."""
    at = tmp_path_factory.mktemp("bad")
    for name in ("coco", "half", "damaged", "bare"):
        draw_coco(at / name)
    draw_coco(at / "twice", classes={3: "cat", 7: "cat"})
    draw_coco(at / "long", classes={3: "cat", 7: "incomprehensible " * 3})
    text = (at / "half" / JSON.format("train")).read_text()
    (at / "half" / JSON.format("train")).write_text(text[: len(text) // 2])
    for file in (at / "damaged" / "val2017").iterdir():
        file.write_bytes(b"no picture")
    shutil.rmtree(at / "bare" / "annotations")
    write_phrases(at / "coco")
    text = (at / "coco" / "phrases.json").read_text()
    (at / "coco" / "beyond.json").write_text(text.replace("[17, 22]", "[17, 99]"))
    for name in ("wordless", "wordy"):
        shutil.copytree(BERT, at / name)
    for name in ("vocab.txt", "tokenizer.json"):
        (at / "wordless" / name).unlink(missing_ok=True)
    with (at / "wordy" / "vocab.txt").open("a") as file:
        file.write("more\n")

    shutil.copytree(trained / "checkpoints", at, dirs_exist_ok=True)
    (at / "half.pth").write_bytes((at / "last.pth").read_bytes()[:9999])
    torch.save({"stem.conv.weight": torch.zeros(3, 3)}, at / "foreign.pth")
    torch.save({"model": _Evil(at / "ran")}, at / "evil.pth")
    return at


@pytest.fixture(scope="module")
def before(bad: Path) -> dict[str, bytes]:
    return snapshot(bad)


@pytest.fixture(scope="module")
def refused(
    bad: Path, before: object, recipe: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answer]:
    """What each case led to."""
    with socket.socket() as closed:  # bound, so that nobody else can listen there
        closed.bind(("127.0.0.1", 0))
        # In two parts, since it is no public address.
        server = "http:" + f"//127.0.0.1:{closed.getsockname()[1]}"
        names = {"at": str(bad), "recipe": recipe, "server": server}
        return run_cases(MODEL, BAD_INPUT, names, tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_no_number(case: str, refused: dict[str, Answer]) -> None:
    assert_refused(refused[case])


def test_bad_input_costs_nobody_a_file_and_runs_no_code(
    bad: Path, before: dict[str, bytes], refused: object
) -> None:
    assert not (bad / "ran").exists()
    assert snapshot(bad) == before
