"""kill -9 of ranks, launchers and data workers: nothing stays behind, and nothing is lost.

A run is killed again and again at moments that a seed draws, goes on with ``--resume`` each time,
and must end in the same state, bit for bit, as a run that was left alone.
"""

import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from harness import (
    ROOT,
    Done,
    FaultRun,
    check_same_training,
    kill,
    records,
    result_of,
    run_to_end,
    start,
)

WORDS = ["train_2p", "--deterministic", "--save_every=2", "fault.step_time_s=0.05"]
SEEDS = 20
MOST_STEPS = 5  # that a start makes before it is killed
SECONDS = 20  # from the kill to the end of the launcher, on a busy machine


class Recipe(NamedTuple):
    """A model's smoke run in two processes, cut to seconds; what is learned does not matter."""

    directory: str
    words: tuple[str, ...] = ("evaluate.at_end=false",)


MODELS = {
    "twins": Recipe("contrib/cv/classification/Twins-ALTGVT-S", ("evaluate.every=0",)),
    "rcnn": Recipe("built-in/cv/detection/Faster_Mask_RCNN_for_PyTorch"),
    "solov2": Recipe("contrib/cv/detection/SOLOv2"),
    "declip": Recipe("built-in/others/DeCLIP_for_PyTorch"),
    "glip": Recipe("built-in/others/GLIP_for_PyTorch"),
}


def smoke(model: str, steps: int) -> tuple[Path, list[str]]:
    """Model directory and words of a shortened smoke run."""
    recipe = MODELS[model]
    words = ["train_smoke_2p", "--device=cpu", "--deterministic", f"--max_steps={steps}"]
    words += ["--save_every=2", "run.log_every=1", *recipe.words]
    return ROOT / recipe.directory, words


def either_rank(seeds: range) -> list[str]:
    """A victim for each seed."""
    return [f"rank {random.Random(seed).randrange(2)}" for seed in seeds]


def find(run: FaultRun, victim: str) -> psutil.Process:
    """``launcher``, ``rank R``, or ``worker of rank R``."""
    if victim == "launcher":
        return run.launcher
    rank = int(victim[-1])
    return run.data_workers(rank)[0] if victim.startswith("worker") else run.ranks()[rank]


def kill_once(directory: Path, words: list[str], output: Path, seed: int, victim: str) -> Done:
    """Starts or continues the run, and kills a process of it at a moment that the seed draws."""
    draw = random.Random(seed)
    last = output / "checkpoints" / "last.pth"
    more = ["--resume"] if last.is_file() else []
    with start(directory, *words, *more, output=output) as run:
        run.wait_for(run.steps, "the first step")
        run.wait_for_step(run.steps()[0] + draw.randint(1, MOST_STEPS))
        # Without any checkpoint there is nothing to go on from.
        run.wait_for(last.is_file, "the first checkpoint")
        time.sleep(draw.uniform(0, 0.15))  # also in the middle of a step, and of a save
        killed_at = time.monotonic()
        kill(find(run, victim))
        done = run.end()
        assert time.monotonic() - killed_at < SECONDS
        run.check_nothing_left()
    return done


def check_told(done: Done, victim: str, output: Path) -> None:
    """Asserts that the launcher's exit code and words say who was killed."""
    if victim == "launcher":
        assert done.code == -signal.SIGKILL
        return
    if victim.startswith("worker"):
        assert done.code == 1, done.err
        assert re.search(rf"rank {victim[-1]} .*data worker.*SIGKILL", done.err), done.err
        assert "--resume" in done.err
    else:
        assert done.code == 128 + signal.SIGKILL, done.err
        assert f"{victim} failed: was killed by SIGKILL" in done.err
    assert "Traceback" not in done.err
    assert result_of(output)["status"] == "failed"


def kill_often(directory: Path, words: list[str], output: Path, victims: Sequence[str]) -> None:
    """Kills one victim a start, and lets the run end."""
    for seed, victim in enumerate(victims):
        done = kill_once(directory, words, output, seed, victim)
        check_told(done, victim, output)
    done = run_to_end(directory, *words, "--resume", output=output)
    assert done.code == 0, done.err


def check_nothing_lost(output: Path, whole: Path) -> None:
    """Lays a run that was killed beside one that was left alone."""
    assert result_of(output)["status"] == "completed"
    steps = [line["step"] for line in records(whole)]
    assert [line["step"] for line in records(output)] == steps == list(range(1, len(steps) + 1))
    check_same_training(output, whole)


def check_model(model: str, steps: int, victims: Sequence[str], scratch: Path) -> None:
    """Kills a model's run and one victim after the other; in the end nothing is lost."""
    directory, words = smoke(model, steps)
    kill_often(directory, words, scratch / "output", victims)
    done = run_to_end(directory, *words, output=scratch / "whole")
    assert done.code == 0, done.err
    check_nothing_lost(scratch / "output", scratch / "whole")


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(["rank 1", "launcher"], id="2"),
        pytest.param(["launcher", *either_rank(range(SEEDS))], marks=pytest.mark.thorough, id="21"),
    ],
)
def test_a_run_killed_at_any_moment_loses_nothing(
    toy: Path, output: Path, left_alone: Callable[[int], Path], victims: list[str]
) -> None:
    steps = 26 + 7 * len(victims)
    kill_often(toy, [*WORDS, f"--steps={steps}"], output, victims)
    check_nothing_lost(output, left_alone(steps))


def test_restarts_go_on_under_the_same_launcher(
    toy: Path, output: Path, left_alone: Callable[[int], Path]
) -> None:
    with start(toy, *WORDS, "--steps=40", "--max_restarts=2", output=output) as run:
        run.wait_for_step(4)
        run.wait_for((output / "checkpoints" / "last.pth").is_file, "the first checkpoint")
        kill(run.ranks()[1])
        done = run.end()
        run.check_nothing_left()
    assert done.code == 0, done.err
    check_nothing_lost(output, left_alone(40))
    first, second = records(output, "starts.jsonl")
    assert (first["step"], first["reason"]) == (0, "")
    assert second["step"] >= 2
    assert "was killed by SIGKILL" in second["reason"]
    assert result_of(output)["restarts"] == [second]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("fault", "code", "starts", "said"),
    [
        ("crash", 1, 3, "KeyError: 'the toy broke'"),
        ("user", 2, 1, "error: The toy was wound up wrongly"),
        ("nan", 1, 1, "The loss is not finite"),
    ],
)
def test_restarts_end_and_do_not_repeat_a_mistake(
    toy: Path, output: Path, fault: str, code: int, starts: int, said: str
) -> None:
    words = ["--max_restarts=2", f"fault.kind={fault}", "fault.rank=1", "fault.step=5"]
    done = run_to_end(toy, *WORDS, *words, output=output)
    assert done.code == code and said in done.err, done.err
    assert len(records(output, "starts.jsonl")) == starts
    assert result_of(output)["status"] == "failed"


def test_a_killed_data_worker_is_one_sentence_and_loses_nothing(
    scratch: Path,
) -> None:
    check_model("twins", 30, ["worker of rank 1"], scratch)


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_a_data_worker_killed_at_any_moment_is_told(scratch: Path) -> None:
    """Also while it hands over a batch, when torch's own error is about a lost connection."""
    victims = [f"worker of {rank}" for rank in either_rank(range(2 * SEEDS))]
    check_model("twins", 20 + 7 * len(victims), victims, scratch)


@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", MODELS)
def test_every_models_smoke_recipe_loses_nothing(model: str, scratch: Path) -> None:
    victims = ["launcher", "worker of rank 1", "worker of rank 0", *either_rank(range(SEEDS))]
    check_model(model, 20 + 7 * len(victims), victims, scratch)
