"""Recipes for fewer machines, and where a run goes on with another global batch."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo_common import elastic
from zoo_common.config import LaunchConfig, RunConfig, node_range, read_yaml
from zoo_common.data import StepSampler
from zoo_common.detection.loading import GroupedSampler
from zoo_common.elastic import Met
from zoo_common.errors import UserError

TOY = Path(__file__).parent / "toy"


# ---------------------------------------------------------------------------- machines


@pytest.mark.parametrize(
    ("written", "found"), [("1", (1, 1)), ("4", (4, 4)), ("2:4", (2, 4)), ("3:3", (3, 3))]
)
def test_machines_are_a_number_or_a_range(written: str, found: tuple[int, int]) -> None:
    assert node_range(LaunchConfig(nnodes=written)) == found


@pytest.mark.parametrize(
    "written",
    ["", "0", "0:2", "4:2", "-1", "2:", ":2", "a", "2.0", "1:2:3", " 2", "2\n", "٣", "1e9"],
)
def test_what_is_no_number_of_machines_is_told(written: str) -> None:
    with pytest.raises(UserError, match="must be a number of machines from 1 on, or MIN:MAX"):
        node_range(LaunchConfig(nnodes=written))


def test_a_range_in_yaml_is_no_time_of_day(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("launch: {nnodes: 2:4, node_rank: 10, seconds: 1_000}\n")
    assert read_yaml(file)["launch"] == {"nnodes": "2:4", "node_rank": 10, "seconds": 1000}


@dataclass
class Launched:
    """As much of a config as decides the share, and what every model scales."""

    launch: LaunchConfig
    run: RunConfig = field(default_factory=RunConfig)


def test_the_share_is_of_the_most_processes() -> None:
    def share(nnodes: str, processes: int, world_size: int) -> Fraction:
        launch = LaunchConfig(nnodes=nnodes, processes=processes)
        return elastic.share(Launched(launch), world_size)

    assert share("2:4", 8, 32) == 1
    assert share("2:4", 8, 24) == Fraction(3, 4)
    assert share("2:4", 8, 16) == Fraction(1, 2)
    assert share("4", 8, 20) == 1  # machines may have different numbers of cards
    assert share("1", 0, 1) == 1
    with pytest.raises(UserError, match=r"nnodes=2:4 needs launch\.processes"):
        share("2:4", 0, 32)


def test_steps_have_as_many_images() -> None:
    three_quarters = Fraction(3, 4)
    assert elastic.steps_for(90_000, three_quarters) == 120_000
    assert elastic.steps_for(10, three_quarters) == 13
    assert elastic.steps_for(0, three_quarters) == 0  # which means none, or no limit
    assert elastic.steps_for(1, Fraction(4)) == 1
    assert [elastic.steps_for(count, Fraction(1)) for count in range(9)] == list(range(9))
    falls = [elastic.steps_for(count, three_quarters) for count in range(200)]
    assert falls == sorted(set(falls))  # what was apart stays apart
    assert elastic.batch_for(64, three_quarters) == 48
    with pytest.raises(UserError, match="batch_size=30 counts the images of all processes"):
        elastic.batch_for(30, Fraction(24, 32))
    # Over the same images the average forgets as much.
    assert elastic.average_for(0.999, Fraction(1, 2)) ** 2 == pytest.approx(0.999)
    assert elastic.average_for(0.999, Fraction(1)) == 0.999
    assert elastic.average_for(0.0, Fraction(1, 2)) == 0.0
    config = Launched(LaunchConfig(nnodes="2:4", processes=8), RunConfig(max_steps=30))
    fitted, share = elastic.scaled(config, 24)
    assert (fitted.run.max_steps, fitted.run.save_every, share) == (40, 0, three_quarters)
    assert config.run.max_steps == 30


# ---------------------------------------------------------------------------- position


@dataclass
class Data:
    """A stream as the position needs it."""

    steps_per_epoch: int


@dataclass
class State:
    """A run's state as the position needs it."""

    data: Data
    global_batch: int
    total_steps: int
    step: int = 0
    met: tuple[Met, ...] = ()


def state_of(images: int, global_batch: int, epochs: int = 10, steps: int = 0) -> Any:
    per_epoch = images // global_batch
    return State(Data(per_epoch), global_batch, steps or epochs * per_epoch)


def content_of(state: Any, step: int, world_size: int) -> dict[str, Any]:
    return {"step": step, **elastic.position(replace(state, step=step), world_size)}


def test_whole_epochs_are_kept_and_less_than_a_global_batch_is_left_out() -> None:
    images = 1000
    for before, after in ((32, 24), (24, 32), (300, 7), (7, 300), (999, 1000)):
        old, new = state_of(images, before), state_of(images, after)
        for step in range(2 * old.data.steps_per_epoch + 1):
            at = elastic.step_at(content_of(old, step, 4), new)
            epoch, place = divmod(step, old.data.steps_per_epoch)
            met = place * before
            assert at >= epoch * new.data.steps_per_epoch
            left_out = (at - epoch * new.data.steps_per_epoch) * after - met
            if at == (epoch + 1) * new.data.steps_per_epoch:  # no whole batch is left
                assert images - met < after or left_out >= 0
            else:
                assert 0 <= left_out < after


def test_nothing_changes_with_the_same_global_batch() -> None:
    state = state_of(1000, 32)
    for step in (0, 1, 30, 31, 32, 310):
        content = content_of(state, step, 4)
        assert elastic.step_at(content, state) == step
        assert elastic.met_before(content, state, 4) == ()
        assert elastic.describe(content, state) is None
    older = {"step": 17}  # a checkpoint that tells no more
    assert elastic.step_at(older, state) == 17
    assert elastic.met_before(older, state, 2) == ()
    assert elastic.describe(older, state) is None


def test_a_plan_of_steps_that_did_not_follow_keeps_the_step_and_says_so() -> None:
    old = state_of(100_000, 64, steps=10_250)
    followed = state_of(100_000, 48, steps=13_667)
    by_hand = state_of(100_000, 48, steps=10_250)
    content = content_of(old, 6000, 32)
    assert elastic.step_at(content, followed) == 3 * 2083 + math.ceil((6000 - 3 * 1562) * 64 / 48)
    said = elastic.describe(content, followed)
    assert said == "48 images a step, 64 before: step 6000 is step 8001 now"
    assert elastic.step_at(content, by_hand) == 6000
    assert elastic.met_before(content, by_hand, 24) == ()
    assert "the plan of 10250 steps did not follow" in str(elastic.describe(content, by_hand))


def test_more_epochs_than_before_are_whole_epochs_all_the_same() -> None:
    content = content_of(state_of(1000, 32, epochs=12), 5 * 31, 4)
    assert elastic.step_at(content, state_of(1000, 24, epochs=20)) == 5 * 41


# ---------------------------------------------------------------------------- order

IMAGES = 203


def plain(world_size: int, rank: int) -> StepSampler:
    return StepSampler(IMAGES, 3, rank=rank, world_size=world_size, seed=5)


def grouped(world_size: int, rank: int) -> GroupedSampler:
    groups_N = (np.arange(IMAGES) % 5 == 0).astype(np.int64)
    return GroupedSampler(groups_N, 3, rank=rank, world_size=world_size, seed=5)


@pytest.mark.parametrize("make", [plain, grouped])
@pytest.mark.parametrize("worlds", [(4, 3, 4), (4, 3, 2, 3, 4), (2, 4, 4), (3, 1, 3), (4, 8)])
def test_an_epoch_has_no_image_twice_over_changing_worlds(
    make: Callable[[int, int], StepSampler], worlds: tuple[int, ...]
) -> None:
    content: dict[str, Any] = {}
    seen: list[int] = []
    for number, world_size in enumerate(worlds):
        samplers = [make(world_size, rank) for rank in range(world_size)]
        state = state_of(IMAGES, 3 * world_size)
        step, met = 0, ()
        if content:
            step = elastic.step_at(content, state)
            met = elastic.met_before(content, state, world_size)
        state.met = met
        end = step + 3 if number < len(worlds) - 1 else 2 * state.data.steps_per_epoch
        seen = [] if step % state.data.steps_per_epoch == 0 else seen
        for sampler in samplers:
            sampler.start_step, sampler.total_steps, sampler.met = step, end, met
            seen += [draw.index for batch in sampler for draw in batch if draw.epoch == 0]
        content = content_of(state, end, world_size)
        content["met"] = [tuple(part) for part in met]
    assert len(set(seen)) == len(seen)
    # At each change less than a global batch is left out, and at the end.
    assert len(seen) > IMAGES - sum(3 * world_size for world_size in worlds)
    later = [make(worlds[-1], rank) for rank in range(worlds[-1])]
    untouched = [make(worlds[-1], rank) for rank in range(worlds[-1])]
    for sampler, other in zip(later, untouched, strict=True):
        sampler.met = state.met
        assert sampler.order(1).tolist() == other.order(1).tolist()  # an epoch later all is as ever


def test_the_rest_of_an_epoch_is_still_in_batches_of_one_group() -> None:
    sampler = grouped(3, 0)
    sampler.batch_size, sampler.met = 9, (Met(0, 4, 4, 3),)  # the whole global batch at once
    sampler.start_step, sampler.total_steps = 6, sampler.steps_per_epoch
    kinds = [{draw.index % 5 == 0 for draw in batch} for batch in sampler]
    assert sum(len(kind) == 2 for kind in kinds) <= 1


def test_other_ranks_with_the_same_global_batch_go_on_in_the_same_order() -> None:
    alone, before = grouped(1, 0), grouped(1, 0)
    for sampler in (alone, before):
        sampler.global_batch, sampler.batch_size, sampler.steps_per_epoch = 12, 12, 16
    before.met = (Met(0, 5, 4, 3),)
    assert alone.order(0).tolist() == before.order(0).tolist()


# ---------------------------------------------------------------------------- whole runs


def run_toy(directory: Path, world_size: int, *words: str, fails: bool = False) -> str:
    """Runs the toy in so many processes, of 2 that --nnodes=1:2 allows; returns rank 0's log."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    running = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "PYTHONPATH": f"{TOY}:{TOY.parent.parent}",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "zoo_common.worker", "toy.train"]
        command += [f"--config={TOY / 'toy.yaml'}"]
        command += [f"--output_dir={directory}", "run.log_every=1", "--device=cpu"]
        command += ["--nnodes=1:2", "--processes=1", "--save_every=1", *words]
        running.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        logs = [process.communicate(timeout=200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [bool(process.returncode) for process in running] == [fails] * world_size, logs
    return logs[0]


def test_a_run_goes_on_with_fewer_and_with_more_processes(tmp_path: Path) -> None:
    fault = ["fault.kind=user", "fault.step_time_s=0.2"]
    run_toy(tmp_path, 2, *fault, "fault.step=4", fails=True)
    said = run_toy(tmp_path, 1, "--resume", *fault, "fault.step=11", fails=True)
    assert "4 images a step, 8 before: step 3 is step 6 now" in said
    assert "resumed with another number of ranks" in said
    said = run_toy(tmp_path, 2, "--resume")
    assert "8 images a step, 4 before: step 10 is step 5 now" in said
    record = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in record] == [1, 2, 3, 7, 8, 9, 10, 6, 7, 8]
    assert [line["total_steps"] for line in record] == [8] * 3 + [16] * 4 + [8] * 3
    assert [line["lr"] for line in record] == [0.05] * 3 + [0.025] * 4 + [0.05] * 3
    assert [line["images_seen"] for line in record] == sorted(
        {line["images_seen"] for line in record}
    )


def test_a_batch_changed_by_hand_keeps_the_step(tmp_path: Path) -> None:
    fault = ["fault.kind=user", "fault.step_time_s=0.2", "fault.step=4"]
    run_toy(tmp_path, 1, *fault, "--nnodes=1", fails=True)
    said = run_toy(tmp_path, 1, "--resume", "--nnodes=1", "--batch_size=6", "data.per_epoch=3")
    assert "6 images a step, 4 before, and the plan of 8 steps did not follow" in said
    assert "at step 3" in said
