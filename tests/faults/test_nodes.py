"""Runs on several machines, which lose cables, power and patience."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import nodes
import pytest
import torch
from nodes import Machine

WHY_NOT = nodes.why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

LOST_CODE = 128 + signal.SIGUSR1
LOST_AFTER_S = 6
QUICK = (f"launch.lost_after_s={LOST_AFTER_S}", "launch.last_call_s=2", "launch.join_timeout_s=40")


@pytest.fixture
def two() -> Iterator[list[Machine]]:
    with nodes.machines(2) as made:
        yield made


@pytest.fixture
def three() -> Iterator[list[Machine]]:
    with nodes.machines(3) as made:
        yield made


def output(toy: Path, number: int = 0) -> Path:
    return toy / "test" / "output" / ("0" if number == 0 else f"0_node{number}")


def result(toy: Path) -> dict:
    return json.loads((output(toy) / "result.json").read_text())


def lines(toy: Path, name: str = "metrics.jsonl") -> list[dict]:
    file = output(toy) / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(toy: Path, step: int, timeout: float = 60) -> None:
    until = time.monotonic() + timeout
    while not any(line["step"] >= step for line in lines(toy)):
        assert time.monotonic() < until, f"step {step} was not reached"
        time.sleep(0.1)


def ends(process: subprocess.Popen, within: float) -> int:
    return process.wait(timeout=within)


def start(toy: Path, machines: list[Machine], *words: str, nnodes: str = "") -> list:
    master = machines[0].address
    common = [*words, f"--nnodes={nnodes or len(machines)}", *QUICK, "run.log_every=1"]
    return [machine.start(toy, ["train_1p", *common], master) for machine in machines]


def weights(toy: Path) -> dict[str, torch.Tensor]:
    return torch.load(output(toy) / "checkpoints" / "last.pth", weights_only=True)["model"]


@pytest.mark.parametrize("family", ["ipv4", pytest.param("ipv6", marks=pytest.mark.thorough)])
def test_two_machines_train_as_one_would_and_give_one_report(
    toy: Path, two: list[Machine], family: str
) -> None:
    master = two[0].address if family == "ipv4" else two[0].address6
    words = ["train_1p", "--nnodes=2", "--steps=6", "run.log_every=1", "--deterministic"]
    started = [machine.start(toy, words, master) for machine in two]
    assert [ends(process, 60) for process in started] == [0, 0], two[0].console(toy)
    found = result(toy)
    assert (found["nnodes"], found["world_size"], found["restarts"]) == (2, 2, [])
    assert (output(toy) / "Toy_bs4_2p_acc.log").is_file()
    assert not (output(toy, 1) / "Toy_bs4_2p_acc.log").exists()
    on_two = weights(toy)

    alone = ["train_2p", "--steps=6", "run.log_every=1", "--deterministic", "--output_dir=one"]
    process = subprocess.run([*two[0].inside(), *alone], cwd=toy, timeout=60)
    assert process.returncode == 0
    file = toy / "one" / "checkpoints" / "last.pth"
    for name, value in torch.load(file, weights_only=True)["model"].items():
        assert torch.equal(value, on_two[name])


@pytest.mark.parametrize(
    ("word", "item"),
    [
        ("--batch_size=3", "data.batch_size"),
        pytest.param("--seed=7", "run.seed", marks=pytest.mark.thorough),
        pytest.param("--nnodes=3", "nnodes", marks=pytest.mark.thorough),
    ],
)
def test_machines_with_other_settings_are_named_before_training(
    toy: Path, two: list[Machine], word: str, item: str
) -> None:
    master = two[0].address
    words = ["train_1p", "--nnodes=2", *QUICK]
    started = [two[0].start(toy, words, master), two[1].start(toy, [*words, word], master)]
    assert [ends(process, 60) for process in started] == [2, 2]
    for machine, other in ((two[0], "machine 1"), (two[1], "machine 0")):
        console = machine.console(toy)
        assert item in console and other in console, console
        assert "Traceback" not in console
    assert lines(toy) == []


def test_a_machine_that_does_not_come_is_named(toy: Path, two: list[Machine]) -> None:
    words = ["train_1p", "--nnodes=2", "launch.join_timeout_s=4"]
    process = two[0].start(toy, words, two[0].address)
    assert ends(process, 60) == 2
    assert "machine 1 did not come" in two[0].console(toy)


@pytest.mark.thorough
def test_two_machines_of_one_number_are_told(toy: Path, three: list[Machine]) -> None:
    words = ["train_1p", "--nnodes=3", "launch.join_timeout_s=20"]
    master = three[0].address
    first = three[0].start(toy, words, master)
    others = [three[1].start(toy, words, master)]
    others.append(three[2].start(toy, [*words, "--output_dir=twin"], master, number=1))
    assert [ends(process, 90) for process in (first, *others)] == [2, 2, 2]
    consoles = [machine.console(toy) for machine in three[1:]]
    assert "machine 2 did not come" in three[0].console(toy)
    assert any("Another machine was started with --node_rank=1" in text for text in consoles)


def test_a_failed_rank_is_told_on_every_machine(toy: Path, two: list[Machine]) -> None:
    fault = ["fault.kind=crash", "fault.rank=1", "fault.step=3"]
    first, second = start(toy, two, "--steps=50", *fault)
    assert (ends(second, 60), ends(first, 20)) == (1, 1)
    assert "on machine 1, rank 1 failed: KeyError: 'the toy broke'" in two[0].console(toy)
    assert "rank 1 failed: KeyError: 'the toy broke'" in two[1].console(toy)
    assert result(toy)["status"] == "failed"


def test_a_cut_cable_ends_a_run_of_fixed_size_on_both_sides(toy: Path, two: list[Machine]) -> None:
    words = ("--steps=5000", "fault.step_time_s=0.05")
    first, second = start(toy, two, *words)
    wait_for_step(toy, 5)
    two[1].cut()
    assert ends(first, LOST_AFTER_S + 15) == LOST_CODE
    assert ends(second, LOST_AFTER_S + 15) == LOST_CODE
    assert "machine 1 does not answer" in two[0].console(toy)
    assert "machine 0 does not answer" in two[1].console(toy)
    two[1].mend()
    last = lines(toy)[-1]["step"]
    more = f"--max_steps={last + 4}"
    started = start(toy, two, *words, more, "--auto_resume")
    assert [ends(process, 60) for process in started] == [0, 0], two[0].console(toy)
    assert [line["step"] for line in lines(toy)] == list(range(1, last + 5))


@pytest.mark.thorough
def test_the_rest_goes_on_without_a_machine_that_lost_its_power(
    toy: Path, three: list[Machine]
) -> None:
    started = start(
        toy, three, "--steps=60", "fault.step_time_s=0.1", "--max_restarts=2", nnodes="2:3"
    )
    wait_for_step(toy, 6)
    three[2].power_off()
    assert [ends(process, 120) for process in started[:2]] == [0, 0], three[0].console(toy)
    found = result(toy)
    assert (found["status"], found["world_size"], found["nnodes"]) == ("completed", 2, 2)
    assert [one["world_size"] for one in found["restarts"]] == [2]
    assert "machine 2 does not answer" in found["restarts"][0]["reason"]
    assert found["restarts"][0]["step"] >= 4
    steps = [line["step"] for line in lines(toy)]
    assert len(set(steps)) == len(steps) and steps == sorted(steps)


@pytest.mark.thorough
def test_the_rest_ends_when_machine_0_lost_its_power(toy: Path, three: list[Machine]) -> None:
    started = start(
        toy, three, "--steps=5000", "fault.step_time_s=0.05", "--max_restarts=2", nnodes="2:3"
    )
    wait_for_step(toy, 5)
    three[0].power_off()
    assert [ends(process, LOST_AFTER_S + 15) for process in started[1:]] == [LOST_CODE] * 2
    for machine in three[1:]:
        assert "machine 0 does not answer" in machine.console(toy), machine.console(toy)


@pytest.mark.thorough
@pytest.mark.parametrize("later_s", [LOST_AFTER_S - 1, LOST_AFTER_S + 0.5, LOST_AFTER_S + 2])
def test_the_rest_ends_when_machine_0_is_lost_behind_another(
    toy: Path, three: list[Machine], later_s: float
) -> None:
    """Also while they meet again without the other, when no beats of ranks are due."""
    started = start(
        toy, three, "--steps=5000", "fault.step_time_s=0.05", "--max_restarts=2", nnodes="2:3"
    )
    wait_for_step(toy, 5)
    three[2].power_off()
    time.sleep(later_s)
    three[0].power_off()
    assert ends(started[1], LOST_AFTER_S + 15) == LOST_CODE
    assert "machine 0 does not answer" in three[1].console(toy), three[1].console(toy)


@pytest.mark.thorough
def test_a_machine_that_comes_later_takes_part_and_no_step_is_lost(
    toy: Path, three: list[Machine]
) -> None:
    words = ["--steps=160", "fault.step_time_s=0.15", "--max_restarts=1"]
    started = start(toy, three[:2], *words, nnodes="2:3")
    wait_for_step(toy, 3)
    common = ["train_1p", *words, "--nnodes=2:3", *QUICK, "run.log_every=1"]
    started.append(three[2].start(toy, common, three[0].address))
    assert [ends(process, 120) for process in started] == [0, 0, 0], three[0].console(toy)
    found = result(toy)
    assert (found["world_size"], found["nnodes"]) == (3, 3)
    (again,) = found["restarts"]
    assert (again["reason"], again["world_size"]) == ("another machine came", 3)


@pytest.mark.thorough
def test_a_machine_that_must_make_room_lets_the_rest_go_on(toy: Path, three: list[Machine]) -> None:
    started = start(
        toy, three, "--steps=60", "fault.step_time_s=0.1", "--max_restarts=1", nnodes="2:3"
    )
    wait_for_step(toy, 5)
    launcher(three[2]).send_signal(signal.SIGTERM)
    assert ends(started[2], 30) == 128 + signal.SIGTERM
    assert [ends(process, 120) for process in started[:2]] == [0, 0], three[0].console(toy)
    found = result(toy)
    assert found["restarts"][0]["reason"] == "a machine was told to end"
    assert found["world_size"] == 2


def test_a_signal_to_one_machine_saves_and_stops_a_run_of_fixed_size(
    toy: Path, two: list[Machine]
) -> None:
    first, second = start(toy, two, "--steps=5000", "fault.step_time_s=0.05")
    wait_for_step(toy, 5)
    launcher(two[1]).send_signal(signal.SIGUSR1)
    assert [ends(first, 30), ends(second, 30)] == [128 + signal.SIGTERM, 128 + signal.SIGUSR1]
    assert result(toy)["status"] == "interrupted"
    saved = torch.load(output(toy) / "checkpoints" / "last.pth", weights_only=True)["step"]
    assert saved == lines(toy)[-1]["step"]


@pytest.mark.thorough
def test_a_slow_machine_is_waited_for(toy: Path, two: list[Machine]) -> None:
    words = ["train_1p", "--nnodes=2", *QUICK, "--steps=4", "run.log_every=1"]
    slow = f"fault.step_time_s={LOST_AFTER_S + 2}"
    master = two[0].address
    started = [machine.start(toy, [*words, slow], master) for machine in two]
    assert [ends(process, 120) for process in started] == [0, 0]
    assert result(toy)["restarts"] == []


def launcher(machine: Machine) -> subprocess.Popen:
    """``ip netns exec`` becomes the program that it starts."""
    return machine.started[-1]
