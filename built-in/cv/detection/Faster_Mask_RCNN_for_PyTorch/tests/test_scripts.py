"""The scripts of test/ as a user starts them: good runs, bad input, odd data."""

import json
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from detector_runs import (
    DEVICE,
    JSON,
    Answer,
    Case,
    annotation,
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

from rcnn_runs import MODEL, script, write_recipe

NETWORK = "Faster_Mask_RCNN_for_PyTorch"
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
    done = script("train_full_1p", *words, cwd=caller)
    assert done.returncode == 0, done.stderr
    assert "Final Train Accuracy : " in done.stdout
    return caller / "my out"


# ---------------------------------------------------------------------------- good runs


def test_the_smoke_run_scores_nothing_before_it_has_learned(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = script(
        "train_smoke_1p",
        f"--device={DEVICE}",
        "--max_steps=1",
        f"--output_dir={output}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = result_of(output)["metrics"]
    assert metrics["box_AP50"] < 2
    assert metrics["mask_AP50"] < 2


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
    assert float(rows["TrainAccuracy"]) == pytest.approx(
        result_of(trained)["metric"]["value"], 1e-3
    )
    losses = (trained / f"train_{case}_loss.txt").read_text().split()
    assert [float(loss) for loss in losses] == pytest.approx(losses_of(trained), abs=1e-5)
    assert (trained / f"train_{case}_fps.log").is_file()


@pytest.mark.cards(2)
def test_two_processes_end_with_the_same_weights_and_share_the_evaluation(
    recipe: str, coco: Path, tmp_path: Path
) -> None:
    """Each rank evaluates its own images with its own weights, so these must be the same."""
    words = [recipe, f"--data_path={coco}"]
    done = script("train_smoke_2p", *words, "--output_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "two")
    assert (result["world_size"], result["batch_size"], result["global_batch"]) == (2, 2, 2)
    assert all(loss < 1e4 for loss in losses_of(tmp_path / "two"))
    last = f"--checkpoint={tmp_path}/two/checkpoints/last.pth"
    done = script("train_eval_8p", *words, last, "--processes=1", "--output_dir=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(detections_of(tmp_path / "two")) > 4
    assert detections_of(tmp_path / "one") == detections_of(tmp_path / "two")
    assert result_of(tmp_path / "one")["metrics"] == result["metrics"]
    assert (tmp_path / "one" / f"{NETWORK}_bs1_1p_eval.log").is_file()


def test_a_run_goes_on_to_the_same_numbers(
    recipe: str, coco: Path, trained: Path, tmp_path: Path
) -> None:
    words = [recipe, f"--data_path={coco}", "--output_dir=out"]
    half = script("train_full_1p", *words, "--max_steps=2", "evaluate.at_end=false", cwd=tmp_path)
    assert half.returncode == 0, half.stderr
    rest = script("train_full_1p", *words, "--resume", cwd=tmp_path)
    assert rest.returncode == 0, rest.stderr
    assert losses_of(tmp_path / "out") == losses_of(trained)
    assert_same_weights(
        tmp_path / "out" / "checkpoints" / "last.pth", trained / "checkpoints" / "last.pth"
    )
    assert result_of(tmp_path / "out")["metrics"] == result_of(trained)["metrics"]


@pytest.mark.cards(8)
def test_eight_processes_take_a_step(recipe: str, tmp_path: Path) -> None:
    data = draw_coco(tmp_path / "coco2017", train=8, val=1)
    words = [recipe, f"--data_path={tmp_path}", "MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", "8"]
    words += ["SOLVER.MAX_ITER", "1", "model.static_shapes=on", "--output_dir=out"]
    done = script("train_performance_8p", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    done = script(
        "train_faster_rcnn_full_1p",
        *words,
        *("MODEL.WEIGHTS", start, "SOLVER.BASE_LR", "1e-9", "SOLVER.MAX_ITER", "1"),
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "out" / "train_0.log").read_text()
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
    done = script("train_faster_rcnn_eval_1p", *words, last, "--output_dir=eval", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    log = (tmp_path / "out" / "train_0.log").read_text()
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
    done = script("train_full_1p", *words, "--output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    "truncated JSON": Case(
        TRAIN, ["{recipe}", "--data_path={at}/half"], ["instances_train2017.json ends in the mid"]
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
    "all held-out images damaged": Case(
        EVAL, ["{recipe}", "--data_path={at}/damaged", LAST], ["None of the images in val2017"]
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
    "no such data path": Case(
        TRAIN, ["{recipe}", "--data_path={at}/none"], ["'{at}/none' does not exist"]
    ),
    "wrong tree": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/gone/annotations"],
        ["the data set begins higher up, so give '{at}/gone'", "val2017/<image>"],
    ),
    "no annotations": Case(
        TRAIN, ["{recipe}", "--data_path={at}/bare"], ["no annotations/instances_train2017.json"]
    ),
    "data in the output": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/coco", "--output_dir={at}"],
        ["--data_path={at}/coco lies in --output_dir={at}"],
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
    "truncated checkpoint": Case(
        EVAL, ["--data_path={at}/coco", "--checkpoint={at}/half.pth"], ["half.pth is truncated"]
    ),
    "evil .pkl to start from": Case(
        TRAIN, ["--data_path={at}/coco", "MODEL.WEIGHTS", "{at}/evil.pkl"], ["evil.pkl"]
    ),
    "evil .pkl to evaluate": Case(
        EVAL, ["--data_path={at}/coco", "--checkpoint={at}/evil.pkl"], ["evil.pkl"]
    ),
}


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def bad(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and weights that cannot be used, and one that can."""
    at = tmp_path_factory.mktemp("bad")
    for name in ("coco", "half", "text", "gone", "damaged", "empty", "blank", "unknown", "bare"):
        draw_coco(at / name)
    draw_coco(at / "three", classes={3: "cat", 7: "big dog", 9: "owl"})
    draw_coco(at / "named", classes={3: "cat", 7: "gnu"})
    draw_coco(at / "renamed", classes={3: "cat", 7: "gnu"})
    for name in ("three", "named"):
        shutil.copy(at / "coco" / JSON.format("train"), at / name / JSON.format("train"))

    text = (at / "half" / JSON.format("train")).read_text()
    (at / "half" / JSON.format("train")).write_text(text[: len(text) // 2])
    (at / "text" / JSON.format("val")).write_text("<html>404 not found</html>")
    captions = {"id": 1, "image_id": 5, "caption": "A cat."}
    content = json.loads(text) | {"annotations": [captions]}
    (at / "coco" / "annotations" / "captions.json").write_text(json.dumps(content))
    (at / "gone" / "train2017" / "train 4.jpg").unlink()
    damaged = [at / "damaged" / "train2017" / f"train {number}.jpg" for number in (1, 4)]
    for file in (*damaged, *(at / "damaged" / "val2017").iterdir()):
        file.write_bytes(b"no picture")
    edit(at / "empty", "train", lambda content: content["annotations"].clear())
    edit(at / "blank", "val", lambda content: content["annotations"].clear())
    edit(at / "unknown", "val", lambda content: content["annotations"][0].update(category_id=99))
    shutil.rmtree(at / "bare" / "annotations")

    shutil.copytree(trained / "checkpoints", at, dirs_exist_ok=True)
    (at / "half.pth").write_bytes((at / "last.pth").read_bytes()[:9999])
    evil = {"model": _Evil(at / "ran")}
    (at / "evil.pkl").write_bytes(pickle.dumps(evil))
    torch.save(evil, at / "evil.pth")
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
        port = str(closed.getsockname()[1])
        server = "http:" + f"//127.0.0.1:{port}"  # in two parts, since it is no public address
        names = {"at": str(bad), "recipe": recipe, "port": port, "server": server}
        return run_cases(MODEL, BAD_INPUT, names, tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_no_number(case: str, refused: dict[str, Answer]) -> None:
    assert_refused(refused[case])


def test_bad_input_costs_nobody_a_file_and_runs_no_code(
    bad: Path, before: dict[str, bytes], refused: object
) -> None:
    assert not (bad / "ran").exists()
    assert snapshot(bad) == before
