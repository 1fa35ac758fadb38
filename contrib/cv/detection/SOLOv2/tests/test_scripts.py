"""The scripts of test/ as a user starts them: good runs, bad input, odd data."""

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
    annotation,
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
    assert_full_disk_keeps_the_checkpoint,
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

from solo_runs import MODEL, script, write_recipe, write_resnet

succeed = partial(run_successfully, MODEL)

NETWORK = "SOLOv2"
CHANCE = {"mask_AP50": 2}  # percent


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"--config={write_recipe(tmp_path_factory.mktemp('recipe') / 'tiny.yaml')}"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_coco(tmp_path_factory.mktemp("data") / "C O C O; 'a' \"b\" ${x} 100%")


@pytest.fixture(scope="module")
def home(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands, with the tree that the card shows."""
    at = tmp_path_factory.mktemp("home")
    (at / "data").mkdir()
    (at / "data" / "coco").symlink_to(coco)
    write_resnet(at / "data" / "pretrained" / "resnet50.pth")
    return at


@pytest.fixture(scope="module")
def trained(recipe: str, home: Path) -> Path:
    """The output of a whole run by the card's command."""
    words = [recipe, "--data_path=./data/coco", "--pretrained=resnet50.pth", "--output_dir=my out"]
    done = succeed("train_full_1p", *words, cwd=home)
    assert "Final Train Accuracy : " in done.stdout
    return home / "my out"


# ---------------------------------------------------------------------------- good runs


def test_a_run_records_what_it_did(trained: Path) -> None:
    result = result_of(trained)
    assert result["status"] == "completed"
    assert (result["steps"], result["epochs"], result["batch_size"]) == (6, 2, 2)
    score = result["metrics"]["mask_AP"]
    assert result["metric"] == {"name": "mask_AP", "value": score, "unit": "percent"}
    assert "mask_AP50" in result["metrics"]
    lines = lines_of(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["losses"].keys() == {"loss_ins", "loss_cate"} for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([1e-3] * 3 + [1e-4] * 3)
    assert (trained / "checkpoints" / "classes.txt").read_text() == "cat\nbig dog\n"


def test_a_run_saves_by_epochs_and_starts_from_the_cards_weights(trained: Path) -> None:
    log = log_of(trained)
    assert "saved checkpoints/last.pth at step 3" in log
    assert "saved checkpoints/last.pth at step 6" in log
    assert "resnet50.pth (torchvision): 265 tensors loaded" in log
    start = torch.load(trained.parent / "data" / "pretrained" / "resnet50.pth", weights_only=True)
    weights = weights_of(trained / "checkpoints" / "last.pth")
    for name in ("bn1.running_var", "layer4.2.bn3.running_mean"):
        assert torch.equal(weights[f"backbone.{name}"], start[name])
    for name in ("conv1.weight", "layer1.0.downsample.0.weight", "layer4.2.bn3.weight"):
        torch.testing.assert_close(weights[f"backbone.{name}"], start[name], rtol=0, atol=0.05)


@pytest.mark.cards(2)
def test_two_processes_end_with_the_same_weights_and_share_the_evaluation(
    recipe: str, coco: Path, tmp_path: Path
) -> None:
    """Each rank evaluates its own images with its own weights, so these must be the same."""
    words = [recipe, f"--data_path={coco}", "model.static_shapes=on"]
    succeed("train_smoke_2p", *words, "--batch_size=1", "--output_dir=two", cwd=tmp_path)
    result = result_of(tmp_path / "two")
    assert (result["world_size"], result["batch_size"], result["global_batch"]) == (2, 1, 2)
    assert (result["steps"], result["epochs"]) == (6, 2)
    last = f"--checkpoint={tmp_path}/two/checkpoints/last.pth"
    succeed("train_eval_8p", *words, last, "--processes=1", "--output_dir=one", cwd=tmp_path)
    assert_same_detections(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "one" / f"{NETWORK}_bs1_1p_eval.log").is_file()


def test_a_run_goes_on_to_the_same_numbers(recipe: str, home: Path, trained: Path) -> None:
    """From the middle of an epoch; and the data path may be the directory above, as ./data."""
    words = [recipe, "--data_path=./data", "--pretrained=resnet50.pth", "--output_dir=in two"]
    succeed("train_full_1p", *words, "--max_steps=2", "evaluate.at_end=false", cwd=home)
    succeed("train_full_1p", *words, "--resume", cwd=home)
    assert_same_run(home / "in two", trained)


def test_the_options_of_the_card_reach_the_run(recipe: str, home: Path) -> None:
    """A performance script is none with --train_performance=0."""
    words = [recipe, "--data_root", "./data", "--gpu-ids", "0", "--seed", "3"]
    words += ["--total_epochs", "1", "--autoscale-lr", "--train_performance=0"]
    words += ["--opt-level", "O1", "precision.accumulate=2", "--output_dir=options"]
    succeed("train_performance_1p", *words, cwd=home)
    output = home / "options"
    result = result_of(output)
    assert (result["steps"], result["seed"]) == (3, 3)
    assert result["metric"]["name"] == "mask_AP"
    assert result["precision"].startswith("O1 ")
    assert [line["lr"] for line in lines_of(output)] == pytest.approx([1e-3 / 8] * 3)
    assert all(math.isfinite(loss) for loss in losses_of(output))
    weights = weights_of(output / "checkpoints" / "last.pth")
    assert {value.dtype for value in weights.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("run", "words", "steps"),
    [
        ("train_performance_8p", ["--processes=1", "--opt-level=O2"], 3),
        ("train_full_1p", ["--train_performance=1", "--steps_per_epoch=2"], 2),
    ],
)
def test_a_performance_run_is_part_of_an_epoch_and_has_no_score(
    run: str, words: list[str], steps: int, recipe: str, coco: Path, tmp_path: Path
) -> None:
    done = succeed(run, recipe, f"--data_path={coco}", *words, "--output_dir=out", cwd=tmp_path)
    assert_performance_only(done, tmp_path / "out", steps=steps)
    assert "no start weights" in log_of(tmp_path / "out")
    kind = "perf" if "performance" in run else "acc"
    assert (tmp_path / "out" / f"{NETWORK}_bs2_1p_{kind}.log").is_file()


def test_fine_tuning_starts_from_a_checkpoint_with_other_classes(
    recipe: str, trained: Path, tmp_path: Path
) -> None:
    """Files of any name, three classes from a network of two, and its score from its file."""
    drawn = draw_coco(tmp_path / "pets", classes={1: "fox", 2: "gnu", 9: "owl"})
    (drawn / "val2017").rename(drawn / "held out")
    (drawn / "annotations").rename(drawn / "labels")
    words = [recipe, "--data_path=pets", "data.train_json=labels/instances_train2017.json"]
    words += ["data.val_json=labels/instances_val2017.json", "data.val_images=held out"]
    start = trained / "checkpoints" / "best.pth"
    more = [f"--pretrained={start}", "solver.base_lr=1e-9", "--max_steps=1", "--output_dir=out"]
    succeed("train_finetune_1p", *words, *more, cwd=tmp_path)
    log = log_of(tmp_path / "out")
    assert "the file has 2 classes, the model 3" in log
    assert "bbox_head.solo_cate.weight" in log
    before, after = weights_of(start), weights_of(tmp_path / "out" / "checkpoints" / "last.pth")
    assert len(after["bbox_head.solo_cate.weight"]) == 3
    for key in ("backbone.layer4.2.conv3.weight", "bbox_head.solo_kernel.weight"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-5)

    last = "--checkpoint=out/checkpoints/last.pth"
    shutil.rmtree(drawn / "train2017")  # which an evaluation does not need
    (drawn / "labels" / "instances_train2017.json").unlink()
    succeed("train_eval_1p", *words, last, "--output_dir=eval", cwd=tmp_path)
    assert result_of(tmp_path / "eval")["metrics"] == result_of(tmp_path / "out")["metrics"]
    assert detections_of(tmp_path / "eval") == detections_of(tmp_path / "out")


# ---------------------------------------------------------------------------- odd data


def test_odd_data_is_told_and_trained_on(recipe: str, tmp_path: Path) -> None:
    """Damaged files, objects that are none, an empty image, a read-only directory."""
    data = draw_coco(tmp_path / "coco", train=8)
    outlines = {
        "two points": [[5, 5, 30, 40]],
        "run lengths of another size": {"size": [10, 10], "counts": [50, 50]},
        "nothing": {"size": [64, 80], "counts": [64 * 80]},
        "one pixel": {"size": [64, 80], "counts": [3000, 1, 2119]},
    }

    def change(content: dict) -> None:
        kept = [item for item in content["annotations"] if item["image_id"] not in (5, 25)]
        kept.append(annotation(25, 3, (5, 5, 30, 40)) | {"iscrowd": 1})
        kept.append(annotation(15, 3, (-9, 5, 30, 40)))
        kept.append(annotation(15, 3, (90, 5, 99, 9)))
        for outline in outlines.values():
            kept.append(annotation(15, 3, (5, 5, 30, 40)) | {"segmentation": outline})
        content["annotations"] = [item | {"id": number} for number, item in enumerate(kept)]

    edit(data, "train", change)
    (data / "train2017" / "train 3.jpg").write_bytes(b"\xff\xd8 no picture")
    whole = (data / "val2017" / "val 1.jpg").read_bytes()
    (data / "val2017" / "val 1.jpg").write_bytes(whole[: len(whole) // 2])
    before = snapshot(data)
    (data / "annotations").chmod(0o555)
    words = [recipe, "--data_path=.", "solver.epochs=1", "--output_dir=out"]
    done = script("train_full_1p", *words, cwd=tmp_path, ZOO_DATA_DIR=str(tmp_path / "cache"))
    (data / "annotations").chmod(0o755)
    assert done.returncode == 0, done.stderr
    log = log_of(tmp_path / "out")
    for text in (
        "8 images (1 without annotations)",
        "(1 crowd regions)",
        "1 boxes reach beyond their image: clipped",
        "1 objects lie outside their image: left out",
        "1 polygons have fewer than 3 points or half a point: left out",
        "1 run-length masks are damaged or not of their image's size",
        "damaged image replaced by the next one: train 3.jpg",
        "damaged image left out: val 1.jpg",
        "(3 images in",
    ):
        assert text in log
    assert result_of(tmp_path / "out")["steps"] == 3  # of 2 images: two have nothing to learn
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / "out"))
    assert snapshot(data) == before


@pytest.mark.cards(2)
def test_images_without_positive_cells_train_beside_others(recipe: str, tmp_path: Path) -> None:
    """An object in no scale range, crowds only, a mask without a pixel."""
    data = draw_coco(tmp_path / "coco", train=4)
    nothing = {"size": [64, 80], "counts": [64 * 80]}

    def change(content: dict) -> None:
        items = [
            annotation(5, 3, (10, 10, 32, 32)),
            annotation(15, 3, (2, 2, 70, 60)),
            annotation(25, 3, (5, 5, 40, 40)) | {"iscrowd": 1},
            annotation(35, 3, (5, 5, 40, 40)) | {"segmentation": nothing},
        ]
        content["annotations"] = [item | {"id": number} for number, item in enumerate(items)]

    edit(data, "train", change)
    words = [recipe, f"--data_path={data}", "--processes=2", "--batch_size=1", "--output_dir=out"]
    words += ["data.keep_empty=true", f"head.scale_ranges={[[8, 32]] * 5}"]
    succeed("train_full_8p", *words, "evaluate.at_end=false", cwd=tmp_path)
    lines = lines_of(tmp_path / "out")
    masks = [line["losses"]["loss_ins"] for line in lines]
    assert len(masks) == 4 and sum(loss > 0 for loss in masks) == 2  # once in each epoch
    assert all(0 < line["losses"]["loss_cate"] < math.inf for line in lines)


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(
    recipe: str, home: Path, trained: Path
) -> None:
    shutil.copytree(trained, home / "full")
    words = [recipe, "--data_path=./data/coco", "--resume"]
    report = f"{NETWORK}_bs2_1p_acc"
    assert_full_disk_keeps_the_checkpoint(
        MODEL, home / "full", *words, report=report, kilobytes=100
    )


# ---------------------------------------------------------------------------- bad input


TRAIN, EVAL, LAST = "train_full_1p", "train_eval_1p", "--checkpoint={at}/last.pth"

BAD_INPUT = {
    # This one waits for somebody, so that it comes first.
    "no weights and no network": Case(
        "train_full_8p",
        ["--data_path={at}/coco"],
        ["Cannot download resnet50.pth from {server}/resnet50.pth", "the file at {at}/"],
        {"ZOO_WEIGHTS_URL": "{server}", "XDG_CACHE_HOME": "{at}"},
    ),
    "damaged images": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/damaged", "data.max_damaged=1"],
        ["2 images are damaged, more than the 1", "train 1.jpg (", "train 4.jpg ("],
    ),
    "checkpoint of other classes": Case(
        EVAL,
        ["{recipe}", "--data_path={at}/named", LAST],
        ["last.pth was trained on", "'big dog'", "'gnu'"],
    ),
    "resuming with other classes": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/renamed", "--resume={at}/last.pth"],
        ["last.pth was trained on", "'big dog'", "'gnu'"],
    ),
    "checkpoint of another class count": Case(
        EVAL,
        ["{recipe}", "--data_path={at}/three", LAST],
        ["bbox_head.solo_cate.weight", "the file has 2 classes, the model 3"],
    ),
    "evil .pth": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "--pretrained={at}/evil.pth"],
        ["evil.pth was refused"],
    ),
    # The launcher tells these before it starts a process.
    "no data path": Case(TRAIN, ["{recipe}"], ["give --data_path=DIR", "val2017/<image>"]),
    "wrong tree": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco/annotations"],
        ["the data set begins higher up, so give '{at}/coco'", "val2017/<image>"],
    ),
    "misspelt option": Case(
        TRAIN, ["--data_path={at}/coco", "--total_epoch=1"], ["--total_epoch", "--total_epochs?"]
    ),
    "value of another type": Case(
        TRAIN, ["--data_path={at}/coco", "--total_epochs=many"], ["--total_epochs", "int"]
    ),
    "neither 0 nor 1": Case(
        TRAIN, ["--data_path={at}/coco", "--train_performance=maybe"], ["--train_performance"]
    ),
    "weights of another depth": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "--pretrained=resnet101.pth"],
        ["resnet101.pth is no ResNet of model.depth=50"],
    ),
    "no checkpoint": Case(EVAL, ["--data_path={at}/coco"], ["needs --checkpoint=VALUE"]),
    "fine-tuning from nothing": Case(
        "train_finetune_1p", ["--data_path={at}/coco"], ["needs --pretrained=VALUE"]
    ),
    **coco_bad_input(EVAL, LAST),
    **shared_bad_input("coco"),
}


@pytest.fixture(scope="module")
def bad(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and weights that cannot be used, and one that can."""
    at = tmp_path_factory.mktemp("bad")
    draw_bad_coco(at)
    draw_coco(at / "three", classes={3: "cat", 7: "big dog", 9: "owl"})
    draw_coco(at / "named", classes={3: "cat", 7: "gnu"})
    draw_coco(at / "renamed", classes={3: "cat", 7: "gnu"})
    for name in ("three", "named"):
        shutil.copy(at / "coco" / JSON.format("train"), at / name / JSON.format("train"))
    write_bad_weights(at, trained)
    return at


# ---------------------------------------------------------------------------- all models


class TestScripts(ScriptContract):
    model = MODEL
    network = NETWORK
    batch_size = 2
    chance = CHANCE
    bad_input = BAD_INPUT
