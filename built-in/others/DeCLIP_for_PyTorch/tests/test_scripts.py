"""The scripts of test/ as a user starts them: good runs, bad input, odd data."""

import json
import math
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from detector_runs import (
    DEVICE,
    Case,
    environment,
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
    assert_same_run,
    log_of,
    run_successfully,
    shared_bad_input,
    write_bad_weights,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))

from declip_runs import (
    MODEL,
    RESNET,
    TRAIN_IMAGES,
    TRAIN_JSON,
    VAL_IMAGES,
    draw_yfcc,
    read_rows,
    script,
    write_recipe,
    write_rows,
)

succeed = partial(run_successfully, MODEL)

NETWORK = "DeCLIP_for_PyTorch"
CHANCE = {"top1": 25}  # percent
LOSSES = {"clip", "nn_text", "simsiam", "masked_language"}
PLAIN = (
    "model.objective=clip",
    "loss.nn_text=0",
    "loss.simsiam=0",
    "loss.masked_language=0",
    "text.eda=false",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"--config={write_recipe(tmp_path_factory.mktemp('recipe') / 'tiny.yaml')}"


@pytest.fixture(scope="module")
def yfcc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_yfcc(tmp_path_factory.mktemp("data") / "Y F C C; 'a' \"b\" ${x} 100%")


@pytest.fixture(scope="module")
def home(yfcc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands, with the data set where the card puts it."""
    at = tmp_path_factory.mktemp("home")
    (at / "dataset").symlink_to(yfcc)
    return at


@pytest.fixture(scope="module")
def trained(recipe: str, home: Path) -> Path:
    """The output of a whole run."""
    done = succeed("train_full_1p", recipe, "--data_path=.", "--output_dir=my out", cwd=home)
    assert "Final Train Accuracy : " in done.stdout
    return home / "my out"


# ---------------------------------------------------------------------------- good runs


def test_a_run_records_what_it_did(trained: Path) -> None:
    result = result_of(trained)
    assert result["status"] == "completed"
    assert (result["steps"], result["batch_size"], result["global_batch"]) == (6, 4, 4)
    score = result["metrics"]["top1"]
    assert result["metric"] == {"name": "top1", "value": score, "unit": "percent"}
    assert score <= result["metrics"]["top5"] == 100  # of three classes
    lines = lines_of(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["losses"].keys() == LOSSES for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line["losses"].values())
    cosine = [(1 + math.cos(math.pi * done / 4)) / 2 * 1e-3 for done in range(5)]
    assert [line["lr"] for line in lines] == pytest.approx([1e-4, *cosine], abs=1e-12)
    assert all(3 <= line["values"]["logit_scale"] <= 6 for line in lines)
    evaluations = (trained / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [4, 6]
    log = log_of(trained)
    assert log.count("saved checkpoints/last.pth") == 2
    assert "DeCLIP vit, 0." in log and "4 pairs a step, 6 steps, 3.00 epochs" in log


def test_a_run_goes_on_to_the_same_numbers(recipe: str, home: Path, trained: Path) -> None:
    """With the queue of texts, from the middle of an epoch."""
    words = [recipe, "--data_path=dataset", "--output_dir=in two"]
    succeed("train_full_1p", *words, "--max_steps=3", cwd=home)
    succeed("train_full_1p", *words, "--resume", cwd=home)
    assert_same_run(home / "in two", trained)


@pytest.mark.cards(2)
def test_two_processes_share_the_evaluation(recipe: str, yfcc: Path, tmp_path: Path) -> None:
    """Each rank classifies its own images with its own weights, so these must be the same."""
    words = [recipe, f"--data_path={yfcc}", "model.static_shapes=on", *RESNET]
    words += ["model.sync_batch_norm=0"]
    more = ["--processes=2", "--batch_size=2", "--output_dir=two"]
    succeed("train_full_8p", *words, *more, cwd=tmp_path)
    result = result_of(tmp_path / "two")
    assert (result["world_size"], result["batch_size"], result["global_batch"]) == (2, 2, 4)
    last = f"--checkpoint={tmp_path}/two/checkpoints/last.pth"
    succeed("train_eval_8p", *words, last, "--processes=1", "--output_dir=one", cwd=tmp_path)
    assert result_of(tmp_path / "one")["metrics"] == result["metrics"]
    assert (tmp_path / "one" / f"{NETWORK}_bs4_1p_eval.log").is_file()


@pytest.mark.cards(2)
def test_a_run_on_several_machines_is_started_on_each(
    recipe: str, yfcc: Path, tmp_path: Path
) -> None:
    """Here both on one; the card's 32p run, and its performance run on several nodes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [recipe, f"--data_path={yfcc}", "--nnodes=2", "--processes=1", "--output_dir=out"]
    words += ["--master_addr=127.0.0.1", f"--master_port={port}", "--local_addr=127.0.0.1"]
    command = ["bash", str(MODEL / "test" / "train_full_32p.sh"), *words]
    nodes = [
        subprocess.Popen(
            [*command, f"--node_rank={rank}", f"--device_id={0}"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    result = result_of(tmp_path / "out")
    assert (result["world_size"], result["nnodes"], result["steps"]) == (2, 2, 6)
    assert result["metric"]["name"] == "top1"


def test_the_cards_32p_run_says_what_it_needs(recipe: str, home: Path) -> None:
    for run in ("train_full_32p", "train_performance_multinodes"):
        done = script(run, recipe, "--data_path=dataset", "--output_dir=nodes", cwd=home)
        assert done.returncode == 2
        assert "needs --master_addr and --master_port" in done.stderr


@pytest.mark.parametrize(
    ("run", "words", "losses"),
    [
        ("train_performance_8p", ["--processes=1", "--amp=O2", "--dtype=bfloat16"], LOSSES),
        ("train_full_1p", ["--perf_only", *PLAIN, "--amp=O1"], {"clip"}),
    ],
)
def test_a_performance_run_has_no_score_and_needs_no_validation_data(
    run: str, words: list[str], losses: set[str], recipe: str, yfcc: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(yfcc, tmp_path / "data", ignore=shutil.ignore_patterns("*val*"))
    done = succeed(run, recipe, f"--data_path={data}", *words, "--output_dir=out", cwd=tmp_path)
    assert_performance_only(done, tmp_path / "out", steps=6)
    assert all(line["losses"].keys() == losses for line in lines_of(tmp_path / "out"))
    kind = "perf" if "performance" in run else "acc"
    assert (tmp_path / "out" / f"{NETWORK}_bs4_1p_{kind}.log").is_file()


def test_the_cards_commands_take_its_directory_and_the_originals_config(
    home: Path, tmp_path: Path
) -> None:
    """No --data_path: ./dataset, where the card puts it; and a config.yaml of Sense-GVT/DeCLIP."""
    cfg = {
        "model": {
            "type": "declip_vitb32",
            "kwargs": {
                "image_encode": {
                    "embed_dim": 16,
                    "width": 16,
                    "layers": 1,
                    "heads": 2,
                    "input_resolution": 32,
                    "patch_size": 16,
                },
                "text_encode": {
                    "text_encode_type": "Transformer",
                    "embed_dim": 16,
                    "transformer_width": 16,
                    "transformer_heads": 2,
                    "transformer_layers": 1,
                    "context_length": 16,
                },
                "clip": {
                    "use_allgather": True,
                    "text_mask_type": "MLM",
                    "return_nn_bank": True,
                    "feature_dim": 16,
                    "nn_size": 8,
                },
            },
        },
        "clip_simsiam_loss_weight": {"clip_loss": 0.4, "simsiam_loss": 0.2, "nn_text": 0.2},
        "lr_scheduler": {"type": "Cosine", "kwargs": {"max_iter": 2, "warmup_steps": 0}},
        "data": {"type": "clip", "batch_size": 4},
        "saver": {"print_freq": 1, "val_freq": 2000, "save_freq": 200},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    (home / "small.txt").write_text("a {0}\nthe {}.\n")
    words = [f"--config={tmp_path}/config.yaml", "--data_path=dataset", "text.synonyms=false"]
    words += [f"--device={DEVICE}", "--workers=0", "evaluate.prompts=small.txt"]
    succeed("train_full_1p", *words, "--output_dir=theirs", cwd=home)
    assert lines_of(home / "theirs")[0]["losses"].keys() == LOSSES - {"masked_language"}
    words = ["--config=configs/declip_vitb32.yaml"]
    done = script("train_full_1p", *words, "text.vocabulary=none", cwd=home)
    assert done.returncode == 2
    assert "There is no vocabulary" in done.stderr  # so the data set was found


def test_training_starts_from_weights_of_the_original(
    recipe: str, yfcc: Path, trained: Path, tmp_path: Path
) -> None:
    weights = weights_of(trained / "checkpoints" / "last.pth")
    theirs = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"model": theirs, "optimizer": {}, "last_iter": 5}, tmp_path / "ckpt.pth.tar")
    words = [recipe, f"--data_path={yfcc}", "--pretrained=ckpt.pth.tar", "--max_steps=1"]
    rates = ["optimizer.lr=1e-9", "optimizer.peak_lr=1e-9", "--output_dir=out"]
    succeed("train_full_1p", *words, *rates, cwd=tmp_path)
    after = weights_of(tmp_path / "out" / "checkpoints" / "last.pth")
    for name in ("visual.proj", "encode_text.text_projection.weight", "logit_scale"):
        torch.testing.assert_close(after[name], weights[name], rtol=0, atol=1e-6)


def test_shards_take_the_place_of_the_tree(recipe: str, yfcc: Path, tmp_path: Path) -> None:
    words = [f"--data_path={yfcc}", "--out=shards", "--samples_per_shard=3"]
    succeed("make_shards", *words, cwd=tmp_path)
    words = [recipe, "--data_path=shards/{000000..000002}.tar", f"data.val_path={yfcc}"]
    succeed("train_full_1p", *words, "--output_dir=out", cwd=tmp_path)
    result = result_of(tmp_path / "out")
    assert (result["steps"], result["metric"]["name"]) == (6, "top1")


# ---------------------------------------------------------------------------- odd data


def test_odd_data_is_told_and_trained_on(recipe: str, tmp_path: Path) -> None:
    """Damaged and absent pictures, captions that are empty, lists or none, a read-only tree."""
    data = draw_yfcc(tmp_path / "yfcc", train=12)
    rows = read_rows(data / TRAIN_JSON)
    rows[1]["caption"] = ["a red circle in a list", "another"]
    rows[2]["caption"] = "  "
    del rows[3]["caption"]
    write_rows(data / TRAIN_JSON, rows)
    (data / TRAIN_IMAGES / rows[4]["filename"]).write_bytes(b"\xff\xd8 no picture")
    (data / TRAIN_IMAGES / rows[5]["filename"]).unlink()
    whole = (data / VAL_IMAGES / "ILSVRC2012_val_00000001.JPEG").read_bytes()
    (data / VAL_IMAGES / "ILSVRC2012_val_00000001.JPEG").write_bytes(whole[: len(whole) // 2])
    before = snapshot(data)
    words = [recipe, "--data_path=yfcc", "--output_dir=out"]
    succeed("train_full_1p", *words, cwd=tmp_path, ZOO_DATA_DIR=str(tmp_path / "cache"))
    log = log_of(tmp_path / "out")
    assert rows[4]["filename"] in log and rows[5]["filename"] in log
    assert "ILSVRC2012_val_00000001.JPEG" in log and "(5 images in" in log
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / "out"))
    after = {name: value for name, value in snapshot(data).items() if name in before}
    assert after == before


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(
    recipe: str, home: Path, trained: Path
) -> None:
    shutil.copytree(trained, home / "full")
    saved = f"{home}/full/checkpoints/last.pth"
    words = [recipe, "--data_path=dataset", f"--resume={saved}", "schedule.steps=8"]
    report = f"{NETWORK}_bs4_1p_acc"
    assert_full_disk_keeps_the_checkpoint(MODEL, home / "full", *words, report=report, kilobytes=60)


# ---------------------------------------------------------------------------- bad input


TRAIN, EVAL, LAST = "train_full_1p", "train_eval_1p", "--checkpoint={at}/last.pth"

BAD_INPUT = {
    "damaged pictures": Case(
        TRAIN, ["{recipe}", "--data_path={at}/damaged"], ["cannot be read", "data.path"]
    ),
    "all held-out pictures damaged": Case(
        EVAL, ["{recipe}", "--data_path={at}/damaged", LAST], ["None of the held-out images"]
    ),
    "no captions": Case(TRAIN, ["{recipe}", "--data_path={at}/silent"], [TRAIN_JSON]),
    "checkpoint of another width": Case(
        EVAL,
        ["{recipe}", "--data_path={at}/yfcc", LAST, "model.text_width=32"],
        ["last.pth is not of this model", "16x16 in the file, 16x32 in the model"],
    ),
    "evil .pth": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/yfcc", "--pretrained={at}/evil.pth"],
        ["evil.pth was refused"],
    ),
    "weights to go on from": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/yfcc", "--resume={at}/best.pth"],
        ["best.pth holds weights only"],
    ),
    # The launcher tells these before it starts a process.
    "no data path": Case(TRAIN, ["{recipe}"], ["give --data_path=DIR", VAL_IMAGES]),
    "no dataset where the card puts it": Case(
        TRAIN, ["text.synonyms=false"], ["dataset' does not exist", VAL_IMAGES]
    ),
    "wrong tree": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/yfcc/" + TRAIN_IMAGES],
        ["begins higher up, so give '{at}/yfcc'", "val_official.json"],
    ),
    "no validation data": Case(
        TRAIN, ["{recipe}", "--data_path={at}/bare"], ["no val_official.json", VAL_IMAGES]
    ),
    "no such shards": Case(
        TRAIN, ["{recipe}", "--data_path={at}/none/{000..003}.tar"], ["{at}/none"]
    ),
    "no such vocabulary": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/yfcc", "text.vocabulary={at}/none.txt.gz"],
        ["There is no vocabulary {at}/none.txt.gz"],
    ),
    "no corpora for synonyms": Case(
        TRAIN,
        ["{recipe}", "--data_path={at}/yfcc", "text.synonyms=true"],
        ["wordnet", "stopwords", "text.synonyms=false"],
        {"NLTK_DATA": "{at}/nothing", "HOME": "{at}"},
    ),
    "the original's own option": Case(
        TRAIN, ["--evaluate"], ["bash test/train_eval_1p.sh --checkpoint=FILE"]
    ),
    "value of another type": Case(
        TRAIN, ["--data_path={at}/yfcc", "--batch_size=many"], ["--batch_size", "int"]
    ),
    "settings that do not fit": Case(
        TRAIN, ["{recipe}", "loss.queue_size=2"], ["loss.queue_size=2 does not hold"]
    ),
    "no checkpoint": Case(EVAL, ["--data_path={at}/yfcc"], ["needs --checkpoint=VALUE"]),
    **shared_bad_input("yfcc"),
}


@pytest.fixture(scope="module")
def bad(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and weights that cannot be used, and one that can."""
    at = tmp_path_factory.mktemp("bad")
    for name in ("yfcc", "damaged", "silent", "bare"):
        draw_yfcc(at / name)
    for folder in (TRAIN_IMAGES, VAL_IMAGES):
        for file in (at / "damaged" / folder).rglob("*.*"):
            file.write_bytes(b"no picture")
    rows = read_rows(at / "silent" / TRAIN_JSON)
    write_rows(at / "silent" / TRAIN_JSON, [row | {"caption": ""} for row in rows])
    shutil.rmtree(at / "bare" / VAL_IMAGES)
    (at / "bare" / "val_official.json").unlink()
    (at / "nothing").mkdir()

    write_bad_weights(at, trained)
    return at


# ---------------------------------------------------------------------------- all models


class TestScripts(ScriptContract):
    model = MODEL
    network = NETWORK
    batch_size = 4
    chance = CHANCE
    bad_input = BAD_INPUT
    leaves = (f"silent/{TRAIN_JSON}.left-out.txt",)
