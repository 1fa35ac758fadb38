"""Each model's own scripts on the real torch_npu, beside the same on the CPU."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from machine import Done, Machine

from model_dirs import ModelDir

STEPS = 2
RESUMED_STEPS = 4

COMPARABLE: dict[str, tuple[str, ...]] = {
    # Of anchors and proposals a few are drawn, and which those are depends on the order of nearly
    # equal scores: with room for all of them, the losses do not.
    "rcnn": ("rpn.samples=100000", "roi.samples=2048", "roi.positive_fraction=0.5"),
}
"""Settings that take out of a model's smoke run what makes two equal runs differ."""


class Ran(NamedTuple):
    """A run that ended, and what it wrote.

    Attributes:
        done: what it printed.
        directory: its output directory.
        steps: the lines of metrics.jsonl, by step.
    """

    done: Done
    directory: Path
    steps: dict[int, dict[str, Any]]

    def scores(self) -> dict[str, float]:
        """What the evaluation at its end found."""
        last = (self.directory / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return {name: v for name, v in json.loads(last)["metrics"].items() if v is not None}


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def run(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a model's script; one that was run already is not run again."""
    known: dict[tuple[str, ...], Ran] = {}

    def run(model: ModelDir, script: str, device: str, *words: str, into: Ran | None = None) -> Ran:
        key = (model.name, script, device, *words)
        if key not in known:
            directory = into.directory if into else tmp_path_factory.mktemp(f"{model.name}-run")
            command = ["bash", f"test/{script}.sh", f"--device={device}", *words]
            command += [f"--output_dir={directory}", "run.log_every=1"]
            command += COMPARABLE.get(model.name, ())
            done = machine.run(command, cwd=model.path, timeout=500)
            assert done.code == 0, done.text[-6000:]
            lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            steps = {line["step"]: line for line in map(json.loads, lines)}
            known[key] = Ran(done, directory, steps)
        return known[key]

    return run


def _train(run: Run, model: ModelDir, device: str) -> Ran:
    return run(model, "train_smoke_1p", device, f"--max_steps={STEPS}")


def _resume(run: Run, model: ModelDir, device: str) -> Ran:
    first = _train(run, model, device)
    words = (f"--max_steps={RESUMED_STEPS}", "--resume", "evaluate.every=0")
    return run(model, "train_smoke_1p", device, *words, into=first)


def _assert_equal_losses(npu: Ran, cpu: Ran, steps: range, relative: float) -> None:
    for step in steps:
        got, wanted = npu.steps[step], cpu.steps[step]
        assert set(got["losses"]) == set(wanted["losses"])
        for name, loss in wanted["losses"].items():
            assert got["losses"][name] == pytest.approx(loss, rel=relative, abs=relative), (
                f"{name} of step {step}"
            )
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=10 * relative)


def test_environment_is_set_up(machine: Machine, model: ModelDir) -> None:
    """``source test/env_npu.sh --show`` finds CANN and sets what it says."""
    command = 'source test/env_npu.sh --show && echo "$TASK_QUEUE_ENABLE $ASCEND_HOME_PATH"'
    done = machine.run(["bash", "-c", f"set -euo pipefail; {command}"], cwd=model.path)
    assert done.code == 0, done.text
    lines = done.output.splitlines()
    assert lines[0].startswith(f"CANN: {machine.root}")
    assert any(line.startswith("TASK_QUEUE_ENABLE=2 ") for line in lines)
    assert lines[-1].startswith("2 ") and lines[-1].endswith("/ascend-toolkit/latest")


def test_runs_on_the_card(run: Run, model: ModelDir) -> None:
    """The run finds the card, and no operator of it was left to the CPU by torch_npu."""
    ran = _train(run, model, "npu")
    assert "npu:0 Ascend910B2, 64 GB, 1 process(es)" in ran.done.text
    assert "CAUTION" not in ran.done.text
    versions = json.loads((ran.directory / "result.json").read_text(encoding="utf-8"))["versions"]
    assert versions["torch_npu"] == "2.14.0"
    assert versions["cann"].endswith("stand-in")


def test_training_steps_equal_the_cpu(run: Run, model: ModelDir) -> None:
    npu, cpu = _train(run, model, "npu"), _train(run, model, "cpu")
    _assert_equal_losses(npu, cpu, range(1, STEPS + 1), 1e-4)


def test_evaluation_equals_the_cpu(run: Run, model: ModelDir) -> None:
    npu, cpu = _train(run, model, "npu").scores(), _train(run, model, "cpu").scores()
    assert npu.keys() == cpu.keys()
    for name, score in cpu.items():
        assert npu[name] == pytest.approx(score, rel=1e-3, abs=0.5), name


def test_resumes_from_its_checkpoint(run: Run, model: ModelDir) -> None:
    """Saved and loaded, weights and optimizer go on as they do on the CPU."""
    npu, cpu = _resume(run, model, "npu"), _resume(run, model, "cpu")
    _assert_equal_losses(npu, cpu, range(STEPS + 1, RESUMED_STEPS + 1), 1e-3)


def test_checkpoint_opens_without_a_card(run: Run, model: ModelDir) -> None:
    """Trained on a card, read where there is none."""
    path = _train(run, model, "npu").directory / "checkpoints" / "last.pth"
    content = torch.load(path, weights_only=True)
    assert all(weight.device.type == "cpu" for weight in content["model"].values())


def test_autocast(run: Run, model: ModelDir) -> None:
    """O1 in bfloat16: finite, and near the float32 losses of the same steps."""
    words = (f"--max_steps={STEPS}", "--amp=O1", "--dtype=bfloat16", "evaluate.every=0")
    ran = run(model, "train_smoke_1p", "npu", *words)
    assert "O1 bfloat16" in ran.done.text
    float32 = _train(run, model, "npu")
    for step in range(1, STEPS + 1):
        loss = ran.steps[step]["loss"]
        assert math.isfinite(loss)
        assert loss == pytest.approx(float32.steps[step]["loss"], rel=0.1)


def test_switches(run: Run, model: ModelDir) -> None:
    """The script's options for NPUs, all of them the other way than by default."""
    words = ("--deterministic", "--jit_compile=on", "--internal_format=on", "--hf32")
    ran = run(model, "train_smoke_1p", "npu", "--max_steps=1", *words, "evaluate.every=0")
    _assert_equal_losses(ran, _train(run, model, "cpu"), range(1, 2), 1e-4)


def test_two_ranks(run: Run, model: ModelDir) -> None:
    """DistributedDataParallel with the real ProcessGroupHCCL, against gloo's on the CPU."""
    words = (f"--max_steps={STEPS}", "evaluate.every=0")
    npu = run(model, "train_smoke_2p", "npu", *words)
    assert "2 process(es)" in npu.done.text
    cpu = run(model, "train_smoke_2p", "cpu", *words)
    _assert_equal_losses(npu, cpu, range(1, STEPS + 1), 1e-3)


def test_profiler(run: Run, model: ModelDir) -> None:
    """torch_npu's profiler starts, stops and writes its trace of the host."""
    words = ("--max_steps=5", "--profile=1", "run.warmup_steps=1", "evaluate.every=0")
    ran = run(model, "train_smoke_1p", "npu", *words)
    traces = list((ran.directory / "profile").glob("rank0_*_ascend_pt/*/trace_view.json"))
    assert len(traces) == 1
    names = {event.get("name", "") for event in json.loads(traces[0].read_text(encoding="utf-8"))}
    assert any(name.startswith("aten::") for name in names)
