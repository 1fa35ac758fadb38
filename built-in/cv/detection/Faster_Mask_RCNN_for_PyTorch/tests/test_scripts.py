"""The scripts of test/ as a user starts them: good runs, bad input, odd data."""

import json
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

from rcnn_runs import MODEL, script, write_recipe

succeed = partial(run_successfully, MODEL)

NETWORK = "Faster_Mask_RCNN_for_PyTorch"
CHANCE = {"box_AP50": 2, "mask_AP50": 2}  # percent
LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml")
    return f"--config-file={file}"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_coco(tmp_path_factory.mktemp("data") / "C O C O; 'a' \"b\" ${x} 100%")


@pytest.fixture(scope="module")
def trained(recipe: str, coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole Mask R-CNN run, started elsewhere with relative paths."""
    caller = tmp_path_factory.mktemp("caller")
    (caller / "the data").symlink_to(coco)
    words = [recipe, "--data_path", "the data", "--output_dir=my out"]
    done = succeed("train_full_1p", *words, cwd=caller)
    assert "Final Train Accuracy : " in done.stdout
    return caller / "my out"


# ---------------------------------------------------------------------------- good runs


def test_a_run_records_what_it_did(trained: Path) -> None:
    result = result_of(trained)
    assert result["status"] == "completed"
    assert (result["steps"], result["batch_size"], result["global_batch"]) == (4, 2, 2)
    assert result["metric"] == {
        "name": "box_AP",
        "value": result["metrics"]["box_AP"],
        "unit": "percent",
    }
    assert "mask_AP" in result["metrics"]
    lines = lines_of(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["losses"].keys() == LOSSES
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4])
    assert (trained / "checkpoints" / "classes.txt").read_text() == "cat\nbig dog\n"


@pytest.mark.cards(2)
def test_two_processes_end_with_the_same_weights_and_share_the_evaluation(
    recipe: str, coco: Path, tmp_path: Path
) -> None:
    """Each rank evaluates its own images with its own weights, so these must be the same."""
    words = [recipe, f"--data_path={coco}"]
    succeed("train_smoke_2p", *words, "--output_dir=two", cwd=tmp_path)
    result = result_of(tmp_path / "two")
    assert (result["world_size"], result["batch_size"], result["global_batch"]) == (2, 2, 2)
    assert all(loss < 1e4 for loss in losses_of(tmp_path / "two"))
    last = f"--checkpoint={tmp_path}/two/checkpoints/last.pth"
    succeed("train_eval_8p", *words, last, "--processes=1", "--output_dir=one", cwd=tmp_path)
    assert_same_detections(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "one" / f"{NETWORK}_bs1_1p_eval.log").is_file()


def test_a_run_goes_on_to_the_same_numbers(
    recipe: str, coco: Path, trained: Path, tmp_path: Path
) -> None:
    words = [recipe, f"--data_path={coco}", "--output_dir=out"]
    succeed("train_full_1p", *words, "--max_steps=2", "evaluate.at_end=false", cwd=tmp_path)
    succeed("train_full_1p", *words, "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "out", trained)


@pytest.mark.cards(8)
def test_eight_processes_take_a_step(recipe: str, tmp_path: Path) -> None:
    data = draw_coco(tmp_path / "coco2017", train=8, val=1)
    words = [recipe, f"--data_path={tmp_path}", "MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", "8"]
    words += ["SOLVER.MAX_ITER", "1", "model.static_shapes=on", "--output_dir=out"]
    succeed("train_performance_8p", *words, cwd=tmp_path)
    result = result_of(tmp_path / "out")
    assert (result["world_size"], result["steps"], result["epochs"]) == (8, 1, 1.0)
    assert (result["data"], result["metric"]) == (data.name, None)
    assert len(list((tmp_path / "out").glob("train_[0-7].log"))) == 8
    rows = (tmp_path / "out" / f"{NETWORK}_bs8_8p_perf.log").read_text()
    assert "RankSize = 8" in rows and "BatchSize = 8" in rows


def test_another_data_set_starts_from_a_checkpoint_with_other_classes(
    recipe: str, trained: Path, tmp_path: Path
) -> None:
    """Files of any name, three classes, Faster R-CNN from a Mask R-CNN of two, and its score."""
    drawn = draw_coco(tmp_path / "pets", classes={1: "fox", 2: "gnu", 9: "owl"})
    (drawn / "val2017").rename(drawn / "held out")
    (drawn / "annotations").rename(drawn / "labels")
    words = [recipe, "--data_path=pets", "data.train_json=labels/instances_train2017.json"]
    words += ["data.val_json=labels/instances_val2017.json", "data.val_images=held out"]
    words += ["MODEL.MASK_ON", "False"]
    start = trained / "checkpoints" / "best.pth"
    succeed(
        "train_faster_rcnn_full_1p",
        *words,
        *("MODEL.WEIGHTS", start, "SOLVER.BASE_LR", "1e-9", "SOLVER.MAX_ITER", "1"),
        "--output_dir=out",
        cwd=tmp_path,
    )
    log = log_of(tmp_path / "out")
    assert "the file has 2 classes, the model 3" in log
    assert "4 tensors stay as initialised" in log
    assert "cls_score.weight" in log
    before, after = weights_of(start), weights_of(tmp_path / "out" / "checkpoints" / "last.pth")
    assert len(after["roi_heads.box_predictor.bbox_pred.weight"]) == 4 * 3
    for key in ("backbone.bottom_up.res5.2.conv3.weight", "roi_heads.box_head.fc2.weight"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-5)

    last = "--checkpoint=out/checkpoints/last.pth"
    shutil.rmtree(drawn / "train2017")  # which an evaluation does not need
    (drawn / "labels" / "instances_train2017.json").unlink()
    succeed("train_faster_rcnn_eval_1p", *words, last, "--output_dir=eval", cwd=tmp_path)
    result = result_of(tmp_path / "eval")
    assert result["metrics"] == result_of(tmp_path / "out")["metrics"]
    assert {name.partition("_")[0] for name in result["metrics"]} == {"box"}


# ---------------------------------------------------------------------------- odd data


def test_odd_data_is_told_and_trained_on(recipe: str, tmp_path: Path) -> None:
    """Damaged files, an image without objects, boxes beyond the image, a read-only directory."""
    data = draw_coco(tmp_path / "coco", train=7)

    def change(content: dict) -> None:
        kept = [item for item in content["annotations"] if item["image_id"] != 5]
        beyond, outside = annotation(15, 3, (-9, 5, 30, 40)), annotation(15, 3, (90, 5, 99, 9))
        content["annotations"] = [*kept, beyond | {"id": 70}, outside | {"id": 71}]

    edit(data, "train", change)
    (data / "train2017" / "train 3.jpg").write_bytes(b"\xff\xd8 no picture")
    whole = (data / "val2017" / "val 1.jpg").read_bytes()
    (data / "val2017" / "val 1.jpg").write_bytes(whole[: len(whole) // 2])
    before = snapshot(data)
    (data / "annotations").chmod(0o555)
    words = [recipe, "--data_path=.", "SOLVER.MAX_ITER", "3", "--output_dir=out"]
    done = script("train_full_1p", *words, cwd=tmp_path, ZOO_DATA_DIR=str(tmp_path / "cache"))
    (data / "annotations").chmod(0o755)
    assert done.returncode == 0, done.stderr
    log = log_of(tmp_path / "out")
    assert "7 images (1 without annotations)" in log
    assert "1 boxes reach beyond their image: clipped" in log
    assert "1 objects lie outside their image: left out" in log
    assert "damaged image replaced by the next one: train 3.jpg" in log
    assert "damaged image left out: val 1.jpg" in log
    assert "(3 images in" in log
    assert result_of(tmp_path / "out")["epochs"] == 1  # 3 steps of 2: the empty image is left out
    assert snapshot(data) == before


def test_images_without_objects_are_trained_on_if_asked_for(recipe: str, tmp_path: Path) -> None:
    data = draw_coco(tmp_path / "coco", train=4)
    edit(data, "train", lambda content: content["annotations"].__delitem__(slice(1, None)))
    words = [recipe, f"--data_path={data}", "data.keep_empty=true", "SOLVER.MAX_ITER", "4"]
    succeed("train_full_1p", *words, "--output_dir=out", cwd=tmp_path)
    assert result_of(tmp_path / "out")["epochs"] == 2
    empty = [line["losses"]["loss_mask"] for line in lines_of(tmp_path / "out")]
    assert 0 in empty and max(empty) > 0


# ---------------------------------------------------------------------------- bad input


TRAIN, EVAL, LAST = "train_full_1p", "train_eval_1p", "--checkpoint={at}/last.pth"

BAD_INPUT = {
    # These two wait for somebody, so that they come first.
    "no weights and no network": Case(
        "train_full_8p",
        ["--data_path={at}/coco"],
        ["Cannot download R-101.pkl from {server}/R-101.pkl", "the file at {at}/R-101.pkl"],
        {"ZOO_WEIGHTS_URL": "{server}", "XDG_CACHE_HOME": "{at}"},
    ),
    "no master": Case(
        "train_performance_multinodes",
        [
            "{recipe}",
            "--data_path={at}/coco",
            "--nnodes=2",
            "--node_rank=1",
            "--processes=1",
            "--master_addr=127.0.0.1",
            "--master_port={port}",
            "launch.join_timeout_s=5",
        ],
        ["Machine 1 waited 5 s for 2 machines at 127.0.0.1:{port}"],
    ),
    "no JSON": Case(
        EVAL,
        ["{recipe}", "--data_path={at}/text", LAST],
        ["instances_val2017.json is not valid JSON", "it begins with b'<html>"],
    ),
    "captions": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "data.train_json=annotations/captions.json"],
        ["captions.json holds captions and no instances"],
    ),
    "missing image": Case(
        TRAIN, ["{recipe}", "--data_path={at}/gone"], ["{at}/gone/train2017/train 4.jpg"]
    ),
    "damaged images": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/damaged", "data.max_damaged=1"],
        ["2 images are damaged, more than the 1", "train 1.jpg (", "train 4.jpg ("],
    ),
    "no objects": Case(
        TRAIN, ["{recipe}", "--data_path={at}/empty"], ["No image of", "train2017.json has an obj"]
    ),
    "no objects, images kept": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/empty", "data.keep_empty=true"],
        ["No image of", "train2017.json has an obj"],
    ),
    "no held-out objects": Case(
        TRAIN, ["{recipe}", "--data_path={at}/blank"], ["No image of", "val2017.json has an obj"]
    ),
    "other categories": Case(
        TRAIN, ["{recipe}", "--data_path={at}/three"], ["list different categories", "[9]"]
    ),
    "categories of other names": Case(
        TRAIN, ["{recipe}", "--data_path={at}/named"], ["id 7", "'big dog'", "'gnu'"]
    ),
    "unknown category": Case(
        EVAL, ["{recipe}", "--data_path={at}/unknown", LAST], ["category_id 99", "val2017.json"]
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
        [
            "roi_heads.box_predictor.cls_score.weight",
            "the file has 2 classes, the model 3",
        ],
    ),
    "evil .pth": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "MODEL.WEIGHTS", "{at}/evil.pth"],
        ["evil.pth was refused"],
    ),
    # The launcher tells these before it starts a process.
    "no data path": Case(TRAIN, ["{recipe}"], ["give --data_path=DIR", "val2017/<image>"]),
    "wrong tree": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/gone/annotations"],
        ["the data set begins higher up, so give '{at}/gone'", "val2017/<image>"],
    ),
    "batch over 8 ranks": Case(
        "train_full_8p",
        ["--data_path={at}/coco", "SOLVER.IMS_PER_BATCH", "12"],
        ["data.batch_size=12", "all 8 processes", "take 8 or 16"],
    ),
    "misspelt key": Case(
        TRAIN,
        ["--data_path={at}/coco", "SOLVER.IMS_PER_BACH", "8"],
        ["SOLVER.IMS_PER_BACH", "SOLVER.IMS_PER_BATCH?"],
    ),
    "value of another type": Case(
        TRAIN, ["--data_path={at}/coco", "SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "int"]
    ),
    "no checkpoint": Case(EVAL, ["--data_path={at}/coco"], ["needs --checkpoint=VALUE"]),
    "evil .pkl to start from": Case(
        TRAIN, ["--data_path={at}/coco", "MODEL.WEIGHTS", "{at}/evil.pkl"], ["evil.pkl"]
    ),
    **coco_bad_input(EVAL, LAST),
    **shared_bad_input("coco"),
}


@pytest.fixture(scope="module")
def bad(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and weights that cannot be used, and one that can."""
    at = tmp_path_factory.mktemp("bad")
    draw_bad_coco(at)
    for name in ("text", "gone", "empty", "blank", "unknown"):
        draw_coco(at / name)
    draw_coco(at / "three", classes={3: "cat", 7: "big dog", 9: "owl"})
    draw_coco(at / "named", classes={3: "cat", 7: "gnu"})
    draw_coco(at / "renamed", classes={3: "cat", 7: "gnu"})
    for name in ("three", "named"):
        shutil.copy(at / "coco" / JSON.format("train"), at / name / JSON.format("train"))

    (at / "text" / JSON.format("val")).write_text("<html>404 not found</html>")
    captions = {"id": 1, "image_id": 5, "caption": "A cat."}
    content = json.loads((at / "coco" / JSON.format("train")).read_text())
    content["annotations"] = [captions]
    (at / "coco" / "annotations" / "captions.json").write_text(json.dumps(content))
    (at / "gone" / "train2017" / "train 4.jpg").unlink()
    edit(at / "empty", "train", lambda content: content["annotations"].clear())
    edit(at / "blank", "val", lambda content: content["annotations"].clear())
    edit(at / "unknown", "val", lambda content: content["annotations"][0].update(category_id=99))
    write_bad_weights(at, trained)
    return at


# ---------------------------------------------------------------------------- all models


class TestScripts(ScriptContract):
    model = MODEL
    network = NETWORK
    batch_size = 2
    chance = CHANCE
    bad_input = BAD_INPUT
