"""The scripts of test/ as a user starts them: good runs, bad input, stops, damage."""

import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from detector_runs import (
    ABSENT,
    DEVICE,
    Case,
    assert_same_weights,
    environment,
    lines_of,
    losses_of,
    result_of,
    run_script,
    weights_of,
)
from PIL import Image
from script_runs import (
    Evil,
    ScriptContract,
    assert_full_disk_keeps_the_checkpoint,
    assert_performance_only,
    assert_same_run,
    log_of,
    run_successfully,
    shared_bad_input,
    write_bad_weights,
)

MODEL = Path(__file__).resolve().parents[1]
NETWORK = "Twins-ALTGVT-S"
CHANCE = {"top1": 20}  # percent, of ten classes
SMALL = (
    "--config=configs/smoke.yaml",
    f"--device={DEVICE}",
    "--batch_size=4",
    "--input-size=32",
    "--epochs=2",
    "--num_workers=1",
    "run.log_every=1",
    "evaluate.batch_size=5",
)

script = partial(run_script, MODEL)
succeed = partial(run_successfully, MODEL)


def draw_tree(root: Path, classes: Sequence[str] = ("cat", "dog", "emu"), train: int = 8) -> Path:
    """An ImageNet tree of noise, each class in its own colour."""
    dice = np.random.default_rng(0)
    for split, count in (("train", train), ("val", 3)):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = dice.integers(0, 120, (40, 48, 3), dtype=np.uint8)
                pixels[..., number % 3] += 120
                Image.fromarray(pixels).save(folder / f"{name}_{index}.jpg")
    return root


def steps_in(output: Path) -> int:
    file = output / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def wait_for(condition: Callable[[], bool], child: subprocess.Popen) -> None:
    for _ in range(1200):
        if condition():
            return
        assert child.poll() is None, "the run ended too early"
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tree(tmp_path_factory.mktemp("data") / "Image Net; 'a' \"b\" ${x}")


@pytest.fixture(scope="module")
def recipe() -> str:
    return "--config=configs/smoke.yaml"


@pytest.fixture(scope="module")
def trained(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a whole small run, started from elsewhere with a relative path."""
    caller = tmp_path_factory.mktemp("caller")
    (caller / "the data").symlink_to(tree)
    done = succeed(
        "train_full_1p", *SMALL, "--data_path", "the data", "--output_dir=my out", cwd=caller
    )
    assert "Final Train Accuracy : " in done.stdout
    return caller / "my out"


def test_a_run_records_what_it_did(trained: Path) -> None:
    result = result_of(trained)
    assert result["status"] == "completed"
    assert result["steps"] == 2 * (24 // 4)
    assert result["metric"]["name"] == "top1"
    lines = lines_of(trained)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    report = (trained / f"{NETWORK}_bs4_1p_acc.log").read_text()
    assert f"TrainAccuracy = {result['metric']['value']:.4f}" in report


@pytest.mark.cards(2)
def test_evaluation_gives_the_scores_of_the_training_run(
    trained: Path, tree: Path, tmp_path: Path
) -> None:
    words = [*SMALL, f"--data_path={tree}", f"--checkpoint={trained}/checkpoints/last.pth"]
    succeed("train_eval_1p", *words, "--output_dir=one", cwd=tmp_path)
    succeed("train_eval_8p", *words, "--processes=2", "--output_dir=two", cwd=tmp_path)
    expected = result_of(trained)["metrics"]
    assert result_of(tmp_path / "one")["metrics"] == expected
    assert result_of(tmp_path / "two")["metrics"] == expected
    assert (tmp_path / "one" / f"{NETWORK}_bs5_1p_eval.log").is_file()


def test_fine_tuning_starts_from_a_checkpoint_with_other_classes(
    trained: Path, tmp_path: Path
) -> None:
    tree = draw_tree(tmp_path / "two", classes=("fox", "gnu"))
    succeed(
        "train_finetune_1p",
        *SMALL,
        f"--data_path={tree}",
        f"--finetune_pth={trained}/checkpoints/best.pth",
        "--lr=1e-9",
        "--warmup-lr=1e-9",
        "--output_dir=out",
        cwd=tmp_path,
    )
    before = weights_of(trained / "checkpoints" / "best.pth")
    after = weights_of(tmp_path / "out" / "checkpoints" / "last.pth")
    assert after["head.weight"].shape[0] == 2
    torch.testing.assert_close(after["norm.weight"], before["norm.weight"], rtol=0, atol=1e-5)


def test_weights_in_the_output_that_is_moved_aside_are_found(
    trained: Path, tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "out")
    words = [*SMALL, f"--data_path={tree}", "--output_dir=out", "--max_steps=1"]
    for option, run in (("--finetune_pth", "train_finetune_1p"), ("--checkpoint", "train_eval_1p")):
        done = succeed(run, *words, f"{option}=out/checkpoints/last.pth", cwd=tmp_path)
        assert "earlier output moved to" in done.stdout


@pytest.mark.cards(2)
def test_a_performance_run_ends_well_under_its_own_name(tree: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"--data_path={tree}", "--processes=2", "--max_steps=3", "--output_dir=out"]
    done = succeed("train_performance_8p", *words, cwd=tmp_path)
    assert_performance_only(done, tmp_path / "out", steps=3)
    rows = (tmp_path / "out" / f"{NETWORK}_bs4_2p_perf.log").read_text()
    assert "RankSize = 2" in rows and "Status = completed" in rows
    assert not (tmp_path / "out" / "evaluations.jsonl").exists()


def test_the_options_of_the_card_reach_the_run(tree: Path, tmp_path: Path) -> None:
    succeed(
        "train_full_8p",
        *SMALL,
        f"--device={DEVICE}",
        "--processes=1",
        f"--data-path={tree}",
        "--model=alt_gvt_smoke",
        "--batch-size=6",
        "--dist-eval=false",
        "--opt=sgd",
        "--momentum=0.5",
        "--epochs=1",
        "--lr=0.3",
        "--weight-decay=0.01",
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert result_of(tmp_path / "out")["steps"] == 24 // 6
    state = torch.load(tmp_path / "out" / "checkpoints" / "last.pth", weights_only=True)
    groups = state["parts"]["precision"]["optimizer"]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}


@pytest.mark.parametrize("precision", ["O1", "O2"])
def test_half_precision_and_accumulation_train(precision: str, tree: Path, tmp_path: Path) -> None:
    succeed(
        "train_full_1p",
        *SMALL,
        f"--data_path={tree}",
        f"--amp={precision}",
        "precision.accumulate=2",
        "data.mixup=0.8",
        "data.cutmix=1.0",
        "--epochs=1",
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert result_of(tmp_path / "out")["precision"].startswith(f"{precision} ")
    assert all(
        v.dtype is torch.float32
        for v in weights_of(tmp_path / "out" / "checkpoints" / "last.pth").values()
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(
    number: signal.Signals, tree: Path, tmp_path: Path
) -> None:
    words = [
        *SMALL,
        f"--data_path={tree}",
        "--epochs=10",
        "--drop-path=0.1",
        "--reprob=0.5",
        "data.mixup=0.8",
        "optimizer.ema=0.9",
    ]
    succeed("train_full_1p", *words, "--output_dir=whole", cwd=tmp_path)
    # The tests themselves may run under nohup, or behind a shell's &.
    heeding = ["env", "--default-signal=HUP,INT"]
    child = subprocess.Popen(
        [*heeding, "bash", MODEL / "test" / "train_full_1p.sh", *words, "--output_dir=cut"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: steps_in(tmp_path / "cut") >= 9, child)  # inside the second epoch
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number, err
    stopped = result_of(tmp_path / "cut")
    assert stopped["status"] == "interrupted"
    assert 9 <= stopped["steps"] < 60
    succeed("train_full_1p", *words, "--output_dir=cut", "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    best = Path("checkpoints") / "best.pth"
    assert_same_weights(tmp_path / "whole" / best, tmp_path / "cut" / best)


@pytest.mark.cards(2)
def test_two_processes_learn_as_one(tree: Path, tmp_path: Path) -> None:
    """The same global batch gives the same losses; summation order costs up to 1e-4 here."""
    curves = {}
    for run, batch_size in (("train_smoke_1p", 8), ("train_smoke_2p", 4)):
        words = [*SMALL, f"--data_path={tree}", f"--batch_size={batch_size}"]
        succeed(run, *words, f"--output_dir={run}", cwd=tmp_path)
        curves[run] = losses_of(tmp_path / run)
    assert len(curves["train_smoke_1p"]) == 6
    assert curves["train_smoke_2p"] == pytest.approx(curves["train_smoke_1p"], rel=1e-4)


@pytest.mark.cards(2)
def test_a_killed_rank_is_told_and_the_others_end(tree: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [
            "bash",
            MODEL / "test" / "train_smoke_2p.sh",
            *SMALL,
            f"--data_path={tree}",
            "--epochs=500",
            "--output_dir=out",
        ],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: steps_in(tmp_path / "out") >= 3, child)
    ranks = [p for p in psutil.Process(child.pid).children() if "zoo_common.worker" in p.cmdline()]
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(ranks) == 2
    ranks[1].kill()
    started = time.monotonic()
    out, err = child.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert child.returncode == 128 + signal.SIGKILL
    assert "failed: was killed by SIGKILL" in err.splitlines()[-1]
    assert "Final" not in out
    report = (tmp_path / "out" / f"{NETWORK}_bs4_2p_acc.log").read_text()
    assert "Status = failed" in report and "FPS" not in report
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_damaged_images_are_named_and_end_the_run_at_the_limit(tmp_path: Path) -> None:
    tree = draw_tree(tmp_path / "data")
    for index in range(3):
        (tree / "train" / "cat" / f"cat_{index}.jpg").write_bytes(b"\xff\xd8 no picture")
    words = [*SMALL, f"--data_path={tree}", "--output_dir=out", "--epochs=1"]
    succeed("train_full_1p", *words, cwd=tmp_path)
    assert "cat_1.jpg" in log_of(tmp_path / "out")
    ended = script("train_full_1p", *words, "data.max_damaged=2", cwd=tmp_path)
    assert ended.returncode == 2
    assert all(f"cat_{index}.jpg" in ended.stderr for index in range(3))


def test_held_out_images_that_are_all_damaged_give_no_score(trained: Path, tmp_path: Path) -> None:
    tree = draw_tree(tmp_path / "data")
    for file in (tree / "val").glob("*/*.jpg"):
        file.write_bytes(b"no picture")
    checkpoint = f"--checkpoint={trained}/checkpoints/last.pth"
    words = [*SMALL, f"--data_path={tree}", checkpoint, "--output_dir=out"]
    done = script("train_eval_1p", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "None of the images in" in done.stderr


def test_resuming_a_finished_run_changes_no_weight(
    trained: Path, tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "out")
    words = [*SMALL, f"--data_path={tree}", "--output_dir=out", "--resume"]
    succeed("train_full_1p", *words, cwd=tmp_path)
    assert_same_run(trained, tmp_path / "out")


def test_a_full_disk_while_saving_ends_the_run_and_keeps_what_was_saved(
    tree: Path, tmp_path: Path
) -> None:
    words = [*SMALL, f"--data_path={tree}"]
    report = f"{NETWORK}_bs4_1p_acc"
    succeed("train_full_1p", *words, "--epochs=1", "--output_dir=out", cwd=tmp_path)
    words.append("--resume")
    assert_full_disk_keeps_the_checkpoint(
        MODEL, tmp_path / "out", *words, report=report, kilobytes=200
    )
    succeed("train_full_1p", *words, "--output_dir=out", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.cards(8)
def test_eight_processes_train_on_one_machine(tmp_path: Path) -> None:
    tree = draw_tree(tmp_path / "data", train=16)
    succeed(
        "train_full_8p",
        *SMALL,
        f"--data_path={tree}",
        "--batch_size=2",
        "--epochs=1",
        "--num_workers=0",
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert result_of(tmp_path / "out")["world_size"] == 8
    assert len(list((tmp_path / "out").glob("train_[0-7].log"))) == 8


# ---------------------------------------------------------------------------- bad input


TRAIN, EVAL = "train_full_1p", "train_eval_1p"

BAD_INPUT = {
    **shared_bad_input("tree"),
    # In words of its own.
    "checkpoint of another network": Case(
        EVAL,
        ["{recipe}", "--data_path={at}/tree", "--checkpoint={at}/foreign.pth"],
        ["foreign.pth is of another model"],
    ),
    "no data path": Case(TRAIN, [], ["give --data_path=DIR"]),
    "empty": Case(TRAIN, ["--data_path={at}/empty"], ["is empty"]),
    "only train": Case(TRAIN, ["--data_path={at}/only"], ["holds no val"]),
    "differing classes": Case(TRAIN, ["--data_path={at}/differ"], ["emu"]),
    "a file": Case(TRAIN, ["--data_path={at}/file"], ["file"]),
    "misspelt option": Case(TRAIN, ["--bach_size=1"], ["mean --batch_size?"]),
    "batch size 0": Case(TRAIN, ["--batch_size=0"], ["must be at least 1"]),
    "batch size text": Case(TRAIN, ["--batch_size=big"], ["of type int"]),
    "no such model": Case(
        TRAIN, [*SMALL, "--model=alt_gvt_smal", "--data_path={at}/tree"], ["alt_gvt_small"]
    ),
    "eight absent devices": Case(
        "train_full_8p",
        ["--data_path={at}/tree", f"--device={ABSENT}"],
        [f"Device {ABSENT} cannot be used"],
    ),
    "no checkpoint": Case(EVAL, ["--data_path={at}/tree"], ["needs --checkpoint=VALUE"]),
    "fine-tuning from nothing": Case(
        "train_finetune_1p",
        ["--data_path={at}/tree"],
        ["needs --finetune_pth=VALUE: checkpoint to start from"],
    ),
    "other model": Case(
        EVAL,
        [*SMALL, "--data_path={at}/tree", "--checkpoint={at}/other.pth"],
        ["is of another model"],
    ),
    "evil .pth": Case(
        "train_finetune_1p",
        [*SMALL, "--data_path={at}/tree", "--finetune={at}/evil.pth"],
        ["evil.pth was refused"],
    ),
    "evil .pth of an old torch": Case(
        "train_finetune_1p",
        [*SMALL, "--data_path={at}/tree", "--finetune={at}/old.pth"],
        ["old.pth was refused"],
    ),
    "read-only output": Case(
        TRAIN, ["--data_path={at}/tree", "--output_dir=/proc/zoo"], ["/proc/zoo"]
    ),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """Data sets and weights that cannot be used, and some that can."""
    at = tmp_path_factory.mktemp("bad")
    draw_tree(at / "tree")
    (at / "empty").mkdir()
    (at / "file").write_text("no directory")
    shutil.copytree(at / "tree" / "train", at / "only" / "train")
    shutil.copytree(at / "tree", at / "differ")
    shutil.rmtree(at / "differ" / "val" / "emu")
    write_bad_weights(at, trained)
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, at / "other.pth")
    (at / "old.pth").write_bytes(pickle.dumps({"model": Evil(at / "ran")}, protocol=2))
    return at


# ---------------------------------------------------------------------------- all models


class TestScripts(ScriptContract):
    model = MODEL
    network = NETWORK
    batch_size = 4
    chance = CHANCE
    bad_input = BAD_INPUT
