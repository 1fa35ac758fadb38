"""Losses that are not finite, spikes, and steps that are left out: zoo_common.loss_watch, Run."""

import copy
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from zoo_common import device
from zoo_common.amp import Precision
from zoo_common.config import LaunchConfig, PrecisionConfig, RunConfig, section, setting
from zoo_common.errors import TrainingError
from zoo_common.loss_watch import JUDGED_FROM, REMEMBERED, LossWatch, RecentLosses
from zoo_common.run import Metric, Run, TrainState, start_run

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
FACTOR = RunConfig().spike_factor

# ------------------------------------------------------------------------------------------------
# What is a spike.

Curve = Callable[[int, random.Random], float]
CURVES: dict[str, Curve] = {
    "constant": lambda step, draw: 2.5,
    "zero": lambda step, draw: 0.0,
    "falling": lambda step, draw: 5 * math.exp(-step / 40) + 0.02,
    "falling to nothing": lambda step, draw: 7 * math.exp(-step / 20) * draw.uniform(0.3, 3),
    "noisy": lambda step, draw: 1.5 + draw.gauss(0, 0.4),
    "a few images": lambda step, draw: draw.lognormvariate(0, 0.6),
    "tiny": lambda step, draw: 1e-9 * (1 + 0.5 * draw.random()),
    "huge": lambda step, draw: 1e30 * (1 + 0.5 * draw.random()),
    "negative": lambda step, draw: -4 + draw.gauss(0, 0.05),
    "falling through zero": lambda step, draw: 3 - step / 50 + draw.gauss(0, 0.1),
    "around zero": lambda step, draw: draw.gauss(0, 1e-3),
    "rising to the start of the warm-up": lambda step, draw: 3 + step / 100 + draw.gauss(0, 0.2),
    "learnt, but for a few": lambda step, draw: (
        8 * math.exp(-step / 40) + (0.5 if draw.random() < 0.05 else 0.001)
    ),
    "grown, smooth, with a bump": lambda step, draw: (
        min(2.5, 0.05 * 1.01**step) * (1.5 if step == 1400 else 1)
    ),
    "bfloat16": lambda step, draw: float(
        torch.tensor(0.7 + 0.01 * draw.random(), dtype=torch.bfloat16)
    ),
}


def feed(losses: Sequence[float], factor: float = FACTOR) -> RecentLosses:
    recent = RecentLosses(factor)
    for loss in losses:
        assert not recent.is_spike(loss), f"{loss} after {len(recent.state_dict()['latest'])}"
        recent.add(loss)
    return recent


@pytest.mark.parametrize("name", CURVES)
def test_what_losses_do_by_themselves_is_no_spike(name: str) -> None:
    for seed in range(5):
        draw = random.Random(seed)
        feed([CURVES[name](step, draw) for step in range(1500)])


@pytest.mark.parametrize(
    ("name", "spike"),
    [
        ("constant", 8.0),
        ("falling", 3.0),
        ("noisy", 20.0),
        ("tiny", 1e-6),
        ("negative", 5.0),
        ("falling through zero", 60.0),
        ("around zero", 1.0),
        ("learnt, but for a few", 9.0),
    ],
)
def test_what_is_far_above_is_a_spike(name: str, spike: float) -> None:
    draw = random.Random(0)
    curve = [CURVES[name](step, draw) for step in range(900)]
    recent = feed(curve)
    assert recent.is_spike(spike)
    assert not recent.is_spike(-abs(spike)), "a fall is none"
    assert not feed(curve, factor=0).is_spike(spike)


def test_the_rule_is_that_of_the_docstring() -> None:
    draw = random.Random(3)
    losses = [round(draw.gauss(0.1, 0.2), 1) for _ in range(1500)]  # with many that are equal
    recent = RecentLosses(2.0)
    spikes = 0
    for count, loss in enumerate(losses):
        latest = losses[max(0, count - REMEMBERED) : count]
        expected = False
        if count >= JUDGED_FROM:
            start, median = statistics.median(losses[:JUDGED_FROM]), statistics.median(latest)
            assert recent.median == pytest.approx(median)
            high = sorted(latest)[int(0.95 * (len(latest) - 1))]
            scale = max((high - median) / 1.645, 0.1 * abs(median), 0.01 * abs(start))
            expected = loss > median + 2.0 * scale
        assert recent.is_spike(loss) == expected
        spikes += expected
        recent.add(loss)
    assert spikes > 3


def test_the_first_losses_are_not_judged() -> None:
    recent = RecentLosses(FACTOR)
    for _ in range(JUDGED_FROM - 1):
        recent.add(1.0)
    assert not recent.is_spike(1e9)
    recent.add(1.0)
    assert recent.is_spike(1e9)


# ------------------------------------------------------------------------------------------------
# The watch by itself.


def add(watch: LossWatch, step: int, *values: float, images: Sequence[str] = ("a", "b")) -> None:
    watch.add(step, {f"part_{i}": torch.tensor(v) for i, v in enumerate(values)}, images)


def test_adding_reads_nothing_back() -> None:
    watch = LossWatch(0, spike_factor=FACTOR)
    with FakeTensorMode():
        for step in range(200):
            watch.add(step, {"loss": torch.ones((), dtype=torch.bfloat16)}, ["a"])
        with pytest.raises(DataDependentOutputException):
            watch.check()


def test_the_first_bad_loss_is_told_with_its_parts_and_images() -> None:
    watch = LossWatch(3, spike_factor=FACTOR)
    add(watch, 7, 1.0, 2.0)
    add(watch, 8, 1.0, math.inf, images=["c", "d"])
    add(watch, 9, math.nan, 1.0)
    with pytest.raises(TrainingError) as error:
        watch.check()
    assert str(error.value).startswith(
        "The loss is not finite (part_0=1, part_1=inf) on rank 3 at step 8; its images are c, d: "
    )
    watch = LossWatch(1, spike_factor=FACTOR)
    for step in range(1, 41):
        add(watch, step, 0.5, 1.5)
    add(watch, 41, 0.5, 400.0, images=["e"])
    with pytest.raises(TrainingError) as error:
        watch.check()
    assert str(error.value).startswith(
        "The loss rose to 400.5 (part_0=0.5, part_1=400) on rank 1 at step 41, where 2 is usual; "
        "its images are e: "
    )
    assert "--resume" in str(error.value) and "--skip_bad_steps=" in str(error.value)


def test_infinities_of_both_signs_are_not_finite() -> None:
    watch = LossWatch(0, spike_factor=FACTOR)
    add(watch, 1, math.inf, -math.inf)
    with pytest.raises(TrainingError, match="not finite"):
        watch.check()


def test_many_images_are_all_in_the_log() -> None:
    said: list[str] = []
    watch = LossWatch(0, said.append, spike_factor=FACTOR)
    names = [f"image_{index}" for index in range(300)]
    add(watch, 5, math.nan, images=names)
    with pytest.raises(TrainingError, match="image_15 and 284 more:"):
        watch.check()
    assert said == [f"images of step 5: {', '.join(names)}"]


def test_means_are_those_of_the_good_steps() -> None:
    watch = LossWatch(0, spike_factor=FACTOR, skips=5)
    for step, value in enumerate([1.0, math.nan, 3.0], start=1):
        add(watch, step, value, 2 * value)
        found = watch.leaves_out()
        assert [bad.step for bad in found] == ([2] if step == 2 else [])
    assert watch.means() == {"part_0": 2.0, "part_1": 4.0}
    assert watch.means() == {}


def test_a_resumed_run_judges_from_its_first_step() -> None:
    watch = LossWatch(0, spike_factor=FACTOR, skips=5)
    for step in range(1, 61):
        add(watch, step, 1.0)
    watch.check()
    add(watch, 61, math.nan)
    watch.count(watch.leaves_out())
    state = json.loads(json.dumps(watch.state_dict()))

    again = LossWatch(1, spike_factor=FACTOR, skips=1)
    again.load_state_dict(state)
    assert again.bad_steps == 1
    add(again, 62, 50.0)
    (found,) = again.leaves_out()
    assert (found.step, found.rank, found.usual) == (62, 1, 1.0)
    with pytest.raises(TrainingError, match=r"1 such steps were left out already"):
        again.count([found])


# ------------------------------------------------------------------------------------------------
# A run in this process: a network with norm statistics, a queue and an average of its weights.


@dataclass
class DataConfig:
    """Nothing is read."""

    path: str = setting("", "not used")


@dataclass
class Config:
    """What start_run asks for."""

    data: DataConfig = section(DataConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)
    launch: LaunchConfig = section(LaunchConfig)


class Batch(NamedTuple):
    """Inputs that depend on the step alone, and names for them."""

    x_BC: Tensor
    item_ids: list[str]


class Data:
    """An endless stream."""

    steps_per_epoch = 10

    def __init__(self) -> None:
        self.position = 0

    def seek(self, step: int, met: Any = ()) -> None:
        self.position = step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.position += 1
            x_BC = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.position))
            yield Batch(x_BC.to(DEVICE), [f"image_{self.position}_{i}" for i in range(8)])


class Queue:
    """Features of the latest inputs, pushed in the forward pass."""

    def __init__(self) -> None:
        self.rows_NC = torch.zeros(16, 4, device=DEVICE)

    def push(self, x_BC: Tensor) -> None:
        self.rows_NC.copy_(torch.cat([self.rows_NC[len(x_BC) :], x_BC]))

    def state_dict(self) -> dict[str, Any]:
        return {"rows_NC": self.rows_NC}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows_NC.copy_(state_dict["rows_NC"])


class Average:
    """A moving average of all that the model's state_dict holds, statistics included."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    def update(self, model: nn.Module) -> None:
        with torch.no_grad():
            for own, other in zip(
                self.model.state_dict().values(), model.state_dict().values(), strict=True
            ):
                own.copy_(0.9 * own + 0.1 * other)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.model.load_state_dict(state_dict)


@contextmanager
def started(directory: Path, precision: PrecisionConfig, **settings: Any) -> Iterator[Run]:
    directory.mkdir(exist_ok=True)
    settings = {"device": str(DEVICE), "output_dir": str(directory), "log_every": 1} | settings
    config = Config(precision=precision, run=RunConfig(**settings))
    with start_run(config, Metric("fit", "percent")) as run:
        yield run
        run.finish()


def everything(state: TrainState[Batch]) -> dict[str, Any]:
    """A copy of all that a bad step must not touch."""
    parts = {**state.stateful(), **state.rank_parts}
    own = {name: part.state_dict() for name, part in parts.items()}
    return copy.deepcopy({"model": state.precision.model_state_dict(), **own})


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert one == other


def train(
    run: Run,
    steps: int,
    factors: dict[int, float],
    after: Callable[[TrainState[Batch]], None] = lambda state: None,
) -> TrainState[Batch]:
    """A loop like those of the models; inputs of step s are multiplied by ``factors[s]``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4))
    model = model.to(DEVICE)
    average, queue = Average(model), Queue()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    precision = Precision(run.config.precision, model, optimizer, DEVICE)
    state = TrainState(
        precision, Data(), 8, steps, parts={"ema": average}, rank_parts={"queue": queue}
    )
    run.resume(state)
    for batch in run.steps(state):
        parts = batch.x_BC.chunk(run.config.precision.accumulate)
        for index, x_BC in enumerate(parts):
            if index == 0:  # of a step's micro-batches
                x_BC = x_BC * factors.get(state.step, 1.0)
            with precision.autocast(model):
                output_BC = model(x_BC)
            queue.push(x_BC)
            near_BC = output_BC.float() - queue.rows_NC[-len(x_BC) :] + 1
            losses = {"near": near_BC.square().mean(), "size": output_BC.float().abs().mean()}
            precision.step(run.total(losses, batch.item_ids))
        if not run.left_out:
            average.update(model)
        run.log(state, lr=0.01)
        after(state)
    return state


NAN, HIGH = math.nan, 1e4
PRECISIONS = [
    PrecisionConfig(opt_level="O0"),
    PrecisionConfig(opt_level="O0", accumulate=2, clip_grad=1.0),
    PrecisionConfig(opt_level="O2", dtype="bfloat16"),
    PrecisionConfig(opt_level="O1", dtype="float16", loss_scale="128"),
]


@pytest.mark.device
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda c: f"{c.opt_level}-{c.accumulate}")
def test_a_bad_step_leaves_no_trace(
    tmp_path: Path, precision: PrecisionConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    states: list[dict[str, Any]] = []
    left_out: list[bool] = []

    def note(state: TrainState[Batch]) -> None:
        states.append(everything(state))
        left_out.append(run.left_out)

    with started(tmp_path, precision, skip_bad_steps=3) as run:
        train(run, 42, {3: NAN, 40: HIGH, 41: math.inf}, note)
    bad = [step for step, out in enumerate(left_out, start=1) if out]
    assert bad == [3, 40, 41]
    for step in bad:
        assert_equal(states[step - 1], states[step - 2])
    weights = [state["model"]["0.weight"] for state in states]
    assert not torch.equal(weights[3], weights[2]) and not torch.equal(weights[41], weights[40])
    assert all(value.isfinite().all() for value in states[-1]["model"].values())
    assert states[-1]["precision"]["steps"] == 39
    assert states[-1]["precision"]["skipped_steps"] == 0

    said = capsys.readouterr().out
    assert "left out step 3, number 1 of 3 that may be: The loss is not finite (near=nan" in said
    assert "left out step 40, number 2 of 3 that may be: The loss rose to" in said
    assert "image_3_0, image_3_1" in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [
        n
        for n in range(1, 43)
        if n not in bad
        or (
            precision.accumulate > 1  # the other micro-batch was good
        )
    ]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["bad_steps"] == 3
    assert json.loads((tmp_path / "result.json").read_text())["bad_steps"] == 3


@pytest.mark.device
def test_one_bad_step_too_many_stops_and_the_count_goes_on(tmp_path: Path) -> None:
    plain = PrecisionConfig()

    def save(state: TrainState[Batch]) -> None:
        if state.step == 5:
            run.save(state)

    with (
        pytest.raises(TrainingError, match=r"at step 7; .*: 2 such steps were left out already"),
        started(tmp_path / "whole", plain, skip_bad_steps=2) as run,
    ):
        train(run, 9, {2: NAN, 4: NAN, 7: NAN}, save)
    resume = str(tmp_path / "whole" / "checkpoints" / "last.pth")
    with (
        pytest.raises(TrainingError, match=r"at step 6; .*: 2 such steps were left out already"),
        started(tmp_path / "resumed", plain, skip_bad_steps=2, resume=resume) as run,
    ):
        train(run, 9, {6: NAN})


@pytest.mark.device
@pytest.mark.parametrize("factor", [NAN, HIGH])
def test_without_skipping_it_stops_and_no_checkpoint_has_it(tmp_path: Path, factor: float) -> None:
    """On a CPU before the optimizer steps, on another device when a step is logged or saved."""
    finished: list[int] = []

    def note(state: TrainState[Batch]) -> None:
        finished.append(state.step)
        if state.step == 42:
            run.save(state)

    with (
        pytest.raises(TrainingError, match=r"at step 40.*image_40_0"),
        started(tmp_path, PrecisionConfig(), log_every=100) as run,
    ):
        train(run, 60, {40: factor}, note)
    assert finished == list(range(1, 40 if DEVICE.type == "cpu" else 43))
    assert not (tmp_path / "checkpoints" / "last.pth").exists()


@pytest.mark.device
def test_no_spikes_are_looked_for_with_a_factor_of_0(tmp_path: Path) -> None:
    with started(tmp_path, PrecisionConfig(), spike_factor=0.0) as run:
        train(run, 45, {40: HIGH})
    assert run.left_out is False


@pytest.mark.device
def test_a_scale_that_only_falls_is_told_with_step_images_and_parts(tmp_path: Path) -> None:
    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    precision = PrecisionConfig(opt_level="O1", dtype="float16")
    with (
        nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: (
                spoil(module, inputs, output) if isinstance(module, nn.GELU) else output
            )
        ),
        pytest.raises(TrainingError) as error,
        started(tmp_path, precision) as run,
    ):
        train(run, 60, {})
    words = str(error.value)
    assert words.startswith("The loss scale only falls: the gradients of step 31 on rank 0 (near=")
    assert "its images are image_31_0, image_31_1" in words
    assert "after 31 skipped steps" in words
