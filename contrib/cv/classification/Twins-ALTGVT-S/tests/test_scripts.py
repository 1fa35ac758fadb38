"""The scripts of test/ as a user starts them: good runs, bad input, stops, damage."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from zoo_common import sample

MODEL = Path(__file__).resolve().parents[1]
DEVICE = os.environ.get("ZOO_TEST_DEVICE", "cpu")
ABSENT = "cuda" if DEVICE == "npu" else "npu"  # a machine has one kind of card
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


def environment() -> dict[str, str]:
    """This environment's python first on the path, as an activated one has it."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


def script(run: str, *words: str | Path, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(MODEL / "test" / f"{run}.sh"), *map(str, words)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


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


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tree(tmp_path_factory.mktemp("data") / "Image Net; 'a' \"b\" ${x}")


@pytest.fixture(scope="module")
def trained(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a whole small run, started from elsewhere with a relative path."""
    caller = tmp_path_factory.mktemp("caller")
    (caller / "the data").symlink_to(tree)
    done = script(
        "train_full_1p", *SMALL, "--data_path", "the data", "--output_dir=my out", cwd=caller
    )
    assert done.returncode == 0, done.stderr
    assert "Final Train Accuracy : " in done.stdout
    return caller / "my out"


def result_of(output: Path) -> dict:
    return json.loads((output / "result.json").read_text())


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["model"]


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights_of(one), weights_of(other)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def test_a_run_records_what_it_did(trained: Path) -> None:
    result = result_of(trained)
    assert result["status"] == "completed"
    assert result["steps"] == 2 * (24 // 4)
    assert result["metric"]["name"] == "top1"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    report = (trained / "Twins-ALTGVT-S_bs4_1p_acc.log").read_text()
    assert f"TrainAccuracy = {result['metric']['value']:.4f}" in report


@pytest.mark.cards(2)
def test_evaluation_gives_the_scores_of_the_training_run(
    trained: Path, tree: Path, tmp_path: Path
) -> None:
    words = [*SMALL, f"--data_path={tree}", f"--checkpoint={trained}/checkpoints/last.pth"]
    done = script("train_eval_1p", *words, "--output_dir=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = script("train_eval_8p", *words, "--processes=2", "--output_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = result_of(trained)["metrics"]
    assert result_of(tmp_path / "one")["metrics"] == expected
    assert result_of(tmp_path / "two")["metrics"] == expected
    assert (tmp_path / "one" / "Twins-ALTGVT-S_bs5_1p_eval.log").is_file()


def test_fine_tuning_starts_from_a_checkpoint_with_other_classes(
    trained: Path, tmp_path: Path
) -> None:
    tree = draw_tree(tmp_path / "two", classes=("fox", "gnu"))
    done = script(
        "train_finetune_1p",
        *SMALL,
        f"--data_path={tree}",
        f"--finetune_pth={trained}/checkpoints/best.pth",
        "--lr=1e-9",
        "--warmup-lr=1e-9",
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
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
        done = script(run, *words, f"{option}=out/checkpoints/last.pth", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "earlier output moved to" in done.stdout


@pytest.mark.cards(2)
def test_a_performance_run_ends_well_under_its_own_name(tree: Path, tmp_path: Path) -> None:
    done = script(
        "train_performance_8p",
        *SMALL,
        f"--data_path={tree}",
        "--processes=2",
        "--max_steps=3",
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out" / "Twins-ALTGVT-S_bs4_2p_perf.log").read_text()
    assert "RankSize = 2" in rows and "Status = completed" in rows
    assert result_of(tmp_path / "out")["metric"] is None
    assert not (tmp_path / "out" / "evaluations.jsonl").exists()


def test_the_options_of_the_card_reach_the_run(tree: Path, tmp_path: Path) -> None:
    done = script(
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
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "out")["steps"] == 24 // 6
    state = torch.load(tmp_path / "out" / "checkpoints" / "last.pth", weights_only=True)
    groups = state["parts"]["precision"]["optimizer"]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}


@pytest.mark.parametrize("precision", ["O1", "O2"])
def test_half_precision_and_accumulation_train(precision: str, tree: Path, tmp_path: Path) -> None:
    done = script(
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
    assert done.returncode == 0, done.stderr
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
    whole = script("train_full_1p", *words, "--output_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    child = subprocess.Popen(
        ["bash", MODEL / "test" / "train_full_1p.sh", *words, "--output_dir=cut"],
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
    resumed = script("train_full_1p", *words, "--output_dir=cut", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("last.pth", "best.pth"):
        assert_same_weights(
            tmp_path / "whole" / "checkpoints" / name, tmp_path / "cut" / "checkpoints" / name
        )
    assert result_of(tmp_path / "cut")["metrics"] == result_of(tmp_path / "whole")["metrics"]


def test_an_untrained_network_scores_near_chance_on_the_sample(tmp_path: Path) -> None:
    drawn = sample.make(tmp_path, train=40, val=200)
    words = [f"--device={DEVICE}", f"--data_path={drawn}", "--max_steps=1", "--output_dir=out"]
    done = script("train_smoke_1p", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "out")["metrics"]["top1"] < 20


@pytest.mark.cards(2)
def test_two_processes_learn_as_one(tree: Path, tmp_path: Path) -> None:
    """The same global batch gives the same losses; summation order costs up to 1e-4 here."""
    curves = {}
    for run, batch_size in (("train_smoke_1p", 8), ("train_smoke_2p", 4)):
        words = [*SMALL, f"--data_path={tree}", f"--batch_size={batch_size}"]
        done = script(run, *words, f"--output_dir={run}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        curves[run] = [json.loads(line)["loss"] for line in lines]
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
    report = (tmp_path / "out" / "Twins-ALTGVT-S_bs4_2p_acc.log").read_text()
    assert "Status = failed" in report and "FPS" not in report
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_damaged_images_are_named_and_end_the_run_at_the_limit(tmp_path: Path) -> None:
    tree = draw_tree(tmp_path / "data")
    for index in range(3):
        (tree / "train" / "cat" / f"cat_{index}.jpg").write_bytes(b"\xff\xd8 no picture")
    words = [*SMALL, f"--data_path={tree}", "--output_dir=out", "--epochs=1"]
    borne = script("train_full_1p", *words, cwd=tmp_path)
    assert borne.returncode == 0, borne.stderr
    assert "cat_1.jpg" in (tmp_path / "out" / "train_0.log").read_text()
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
    done = script("train_full_1p", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_weights(
        trained / "checkpoints" / "last.pth", tmp_path / "out" / "checkpoints" / "last.pth"
    )
    assert result_of(tmp_path / "out")["metrics"] == result_of(trained)["metrics"]


def test_a_full_disk_while_saving_ends_the_run_and_keeps_what_was_saved(
    tree: Path, tmp_path: Path
) -> None:
    words = [*SMALL, f"--data_path={tree}", "--output_dir=out"]
    assert script("train_full_1p", *words, "--epochs=1", cwd=tmp_path).returncode == 0
    before = (tmp_path / "out" / "checkpoints" / "last.pth").read_bytes()
    limit = 200_000  # bytes a file: logs fit, a checkpoint does not

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = script("train_full_1p", *words, "--resume", cwd=tmp_path, preexec_fn=limit_files)
    assert done.returncode == 1
    assert "Cannot write the checkpoint" in done.stderr and "File too large" in done.stderr
    assert (tmp_path / "out" / "checkpoints" / "last.pth").read_bytes() == before
    assert "Status = failed" in (tmp_path / "out" / "Twins-ALTGVT-S_bs4_1p_acc.log").read_text()
    assert script("train_full_1p", *words, "--resume", cwd=tmp_path).returncode == 0


BAD_INPUT: dict[str, tuple[str, Callable[[Path], Sequence[str]], str]] = {
    "no data path": ("train_full_1p", lambda at: [], "give --data_path=DIR"),
    "absent": ("train_full_1p", lambda at: [f"--data_path={at}/none"], "none"),
    "empty": ("train_full_1p", lambda at: [f"--data_path={at}/empty"], "is empty"),
    "only train": ("train_full_1p", lambda at: [f"--data_path={at}/only"], "holds no val"),
    "differing classes": ("train_full_1p", lambda at: [f"--data_path={at}/differ"], "emu"),
    "a file": ("train_full_1p", lambda at: [f"--data_path={at}/file"], "file"),
    "unknown option": ("train_full_1p", lambda at: ["--frobnicate=1"], "Unknown option"),
    "misspelt option": ("train_full_1p", lambda at: ["--bach_size=1"], "mean --batch_size?"),
    "batch size 0": ("train_full_1p", lambda at: ["--batch_size=0"], "must be at least 1"),
    "batch size text": ("train_full_1p", lambda at: ["--batch_size=big"], "of type int"),
    "no such model": (
        "train_full_1p",
        lambda at: [*SMALL, "--model=alt_gvt_smal", f"--data_path={at}/tree"],
        "alt_gvt_small",
    ),
    "absent device": (
        "train_full_8p",
        lambda at: [f"--data_path={at}/tree", f"--device={ABSENT}"],
        f"Device {ABSENT} cannot be used",
    ),
    "no checkpoint": (
        "train_eval_1p",
        lambda at: [f"--data_path={at}/tree"],
        "needs --checkpoint=VALUE",
    ),
    "fine-tuning from nothing": (
        "train_finetune_1p",
        lambda at: [f"--data_path={at}/tree"],
        "needs --finetune_pth=VALUE: checkpoint to start from",
    ),
    "truncated": (
        "train_eval_1p",
        lambda at: [f"--data_path={at}/tree", f"--checkpoint={at}/half.pth"],
        "half.pth is truncated",
    ),
    "other model": (
        "train_eval_1p",
        lambda at: [*SMALL, f"--data_path={at}/tree", f"--checkpoint={at}/other.pth"],
        "is of another model",
    ),
    "pickle": (
        "train_finetune_1p",
        lambda at: [*SMALL, f"--data_path={at}/tree", f"--finetune={at}/evil.pth"],
        "evil.pth was refused",
    ),
    "read-only output": (
        "train_full_1p",
        lambda at: [f"--data_path={at}/tree", "--output_dir=/proc/zoo"],
        "/proc/zoo",
    ),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    at = tmp_path_factory.mktemp("bad")
    draw_tree(at / "tree")
    (at / "empty").mkdir()
    (at / "file").write_text("no directory")
    shutil.copytree(at / "tree" / "train", at / "only" / "train")
    shutil.copytree(at / "tree", at / "differ")
    shutil.rmtree(at / "differ" / "val" / "emu")
    whole = (trained / "checkpoints" / "last.pth").read_bytes()
    (at / "half.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, at / "other.pth")
    (at / "evil.pth").write_bytes(pickle.dumps({"model": _Evil(at / "ran")}, protocol=2))
    return at


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_no_number(case: str, bad: Path, tmp_path: Path) -> None:
    run, words, said = BAD_INPUT[case]
    options = [] if case == "read-only output" else ["--output_dir=out"]
    done = script(run, *words(bad), *options, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Final" not in done.stdout
    assert not (bad / "ran").exists()
    for report in (tmp_path / "out").glob("*.log") if (tmp_path / "out").exists() else ():
        assert "FPS" not in report.read_text()


@pytest.mark.slow
@pytest.mark.cards(8)
def test_eight_processes_train_on_one_machine(tmp_path: Path) -> None:
    tree = draw_tree(tmp_path / "data", train=16)
    done = script(
        "train_full_8p",
        *SMALL,
        f"--data_path={tree}",
        "--batch_size=2",
        "--epochs=1",
        "--num_workers=0",
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "out")["world_size"] == 8
    assert len(list((tmp_path / "out").glob("train_[0-7].log"))) == 8


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
