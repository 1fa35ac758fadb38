"""tools/check_static.py and the recorder behind it: what counts as a host sync or a new shape."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_common import device

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
NONE = "check_static: 0 host syncs, 0 new pairs after the warm-up"

PEER = """import torch


def reads(device):
    def step(index):
        values = torch.ones(3 + index, device=device)
        if values.sum() > 2:
            values.mul_(2)

    return step


def uploads(device):
    def step(index):
        batch = torch.ones(4, 8).pin_memory().to(device, non_blocking=True)
        torch.nn.functional.relu(batch).sum()
        if index == 3:
            torch.tensor([1.0]).to(device)

    return step


def breaks(device):
    def step(index):
        raise ZeroDivisionError("the step's own")

    return step
"""


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


static = load_tool("static_recorder")


class Told(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def check_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Told]:
    """Runs the program in this process, in a directory with a module ``other``."""
    (tmp_path / "other.py").write_text(PEER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    monkeypatch.delitem(sys.modules, "other", raising=False)
    program = load_tool("check_static")

    def run(*words: str) -> Told:
        try:
            code = program.main([*words, f"--device={DEVICE.type}"])
        except SystemExit as end:
            code = end.code
        return Told(code, *capsys.readouterr())

    return run


def values(*size: int) -> Tensor:
    return torch.ones(*size, device=DEVICE)


SYNCS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "int": lambda x: int(x.sum()),
    "f-string": lambda x: f"{x.sum()}",
    "index": lambda x: [1, 2, 3, 4, 5, 6][x.argmax()],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().cpu().numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "written mask": lambda x: x.clone().__setitem__(x > 2, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.repeat_interleave(torch.ones(6, dtype=torch.int64, device=DEVICE), 0),
    "bincount": lambda x: x.long()[:, 0].bincount(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "open one_hot": lambda x: F.one_hot(x.long()),
}


@pytest.mark.parametrize("name", SYNCS)
def test_a_read_of_the_device_is_a_sync_at_its_line(name: str) -> None:
    x = values(6, 2)
    report = static.count(lambda step: SYNCS[name](x), steps=3, warmup=1, device=DEVICE)
    assert min(report.syncs) >= 1 and not report.clean
    assert report.new_pairs[0] >= 0 and report.late_pairs == [0, 0]
    offender = report.offenders[0]
    assert offender.kind == static.SYNC and offender.steps == {0, 1, 2}
    file, line, function = offender.stack[0]
    assert Path(file) == Path(__file__) and function == "<lambda>"
    assert f'"{name}"' in Path(file).read_text().splitlines()[line - 1]


STATIC: dict[str, Callable[[Tensor], object]] = {
    "where": lambda x: torch.where(x > 0, x, 0),
    "topk": lambda x: x.topk(2).indices,
    "gather": lambda x: x.gather(1, x.long().clamp(0, 1)),
    "index": lambda x: x[x[:, 0].long()],
    "one_hot": lambda x: F.one_hot(x.long(), 3),
    "conversion": lambda x: x.to(torch.float64).to(x.device),
    "from the host": lambda x: x + torch.tensor([1.0, 2.0]).to(x.device),
    "norm": lambda x: nn.utils.clip_grad_norm_([nn.Parameter(x)], 1.0),
}


@pytest.mark.parametrize("name", STATIC)
def test_what_stays_on_the_device_is_none(name: str) -> None:
    x = values(6, 2)
    report = static.count(lambda step: STATIC[name](x), steps=3, warmup=1, device=DEVICE)
    assert report.clean and report.offenders == []
    assert report.syncs == [0, 0, 0]


def test_what_was_copied_to_the_host_is_read_freely() -> None:
    def step(index: int) -> None:
        on_host = (values(4) * 2).cpu()
        assert [float(value.numpy()) for value in on_host] == on_host.tolist()
        assert on_host[0].item() == 2

    assert static.count(step, steps=2, device=DEVICE).syncs == [1, 1]


def test_tensors_of_a_loaders_workers_are_on_the_host() -> None:
    delivered = torch.arange(4).share_memory_()
    report = static.count(lambda step: delivered[1:].tolist(), steps=2, warmup=1, device=DEVICE)
    assert report.syncs == [0, 0]


def test_backward_passes_are_seen_with_their_node() -> None:
    weight = values(6).requires_grad_()
    mask = values(6) > 0

    def step(index: int) -> None:
        torch.autograd.grad(weight[mask].sum(), weight)

    report = static.count(step, steps=2, device=DEVICE)
    assert report.syncs == [2, 2]  # backward writes with the mask
    assert any("IndexBackward" in offender.what for offender in report.offenders)
    assert {offender.stack[0][2] for offender in report.offenders} == {"step"}


def test_a_backward_function_of_python_has_its_own_line() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            return gradients[0] * gradients[0].sum().item()

    x = values(3).requires_grad_()
    report = static.count(lambda step: Reads.apply(x).sum().backward(), steps=1, device=DEVICE)
    (offender,) = [found for found in report.offenders if found.kind == static.SYNC]
    assert offender.stack[0][2] == "backward"


def test_new_shapes_count_after_the_warm_up() -> None:
    sizes = [2, 3, 2, 3, 2, 4]

    def step(index: int) -> None:
        values(sizes[index]).mul_(2)

    report = static.count(step, steps=6, warmup=2, device=DEVICE)
    assert report.new_pairs == [2, 2, 0, 0, 0, 2]
    assert report.late_pairs == [0, 0, 0, 2] and not report.clean
    assert {offender.what for offender in report.offenders} == {
        "aten.ones.default",
        "aten.mul_.Tensor",
    }
    assert all(offender.steps == {5} for offender in report.offenders)
    assert "float32[4]" in report.describe()
    assert static.count(step, steps=5, warmup=2, device=DEVICE).clean


def test_formats_and_lists_belong_to_a_pair() -> None:
    def step(index: int) -> None:
        dtype = torch.float32 if index < 2 else torch.float64
        parts = [torch.zeros(2, dtype=dtype, device=DEVICE)] * (2 if index < 3 else 3)
        torch.cat(parts)

    report = static.count(step, steps=4, device=DEVICE)
    assert report.new_pairs == [2, 0, 2, 1]


def test_training_with_an_optimizer_has_the_same_pairs_in_every_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(index: int) -> None:
        optimizer.zero_grad()
        model(values(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    report = static.count(step, steps=4, warmup=2, device=DEVICE)
    assert report.clean
    assert report.operators[2] == report.operators[3] > 15


def test_the_context_counts_and_leaves_nothing_behind() -> None:
    methods = [getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")] + [F.one_hot]
    with pytest.raises(KeyError), static.Recorder(DEVICE):
        raise KeyError
    with static.Recorder(DEVICE) as recorder:
        values(1).item()
        recorder.next_step()
        values(1)
    assert recorder.report().syncs == [1, 0]
    assert [getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")] + [F.one_hot] == methods
    values(1).tolist()
    assert sum(recorder.report().syncs) == 1


@pytest.mark.parametrize("model", ["twins", "rcnn", "solov2", "declip", "glip"])
def test_our_models_train_without_any(model: str) -> None:
    words = [str(ROOT / "tools" / "check_static.py"), model, f"--device={DEVICE.type}"]
    told = subprocess.run(
        [sys.executable, *words, "--steps=12"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # layers so narrow gain nothing from more
    )
    assert told.stdout.splitlines()[-1] == NONE
    assert told.returncode == 0


def test_a_peer_is_measured_and_its_lines_are_named(check_peer: Callable[..., Told]) -> None:
    told = check_peer("--peer=other:reads", "--steps=5", "--warmup=2")
    assert told.code == 1
    assert "host syncs a step: 1" in told.out
    assert "new (operator, shapes) pairs a step: 3 after 2 steps, which had 8" in told.out
    assert "other.py:7 step: if values.sum() > 2:" in told.out
    last = told.out.splitlines()[-1]
    assert last == "check_static: 5 host syncs, 9 new pairs after the warm-up"


def run_on_npu(*words: str, place: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_static.py"), *words, "--device=npu"],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )


@pytest.mark.simulator
def test_a_simulated_npu_shows_copies_and_waits(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(PEER)
    told = run_on_npu("--peer=other:uploads", "--steps=4", "--warmup=1", place=tmp_path)
    assert told.returncode == 1, told.stderr
    lines = told.stdout.splitlines()
    assert lines[0] == "other:uploads: 4 steps on npu:0 (simulated)"
    assert "copies to the device a step: 1 to 2, 1.2 on average; bytes: 128 to 132" in told.stdout
    assert lines[-1].startswith("check_static: 1 host syncs, ")
    assert "host sync: copy in" in told.stdout  # what is not pinned waits
    assert "other.py:18 step: torch.tensor([1.0]).to(device)" in told.stdout


@pytest.mark.simulator
def test_a_simulated_npu_shows_what_reads_it(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(PEER)
    told = run_on_npu("--peer=other:reads", "--steps=5", "--warmup=2", place=tmp_path)
    assert told.returncode == 1, told.stderr
    assert "host syncs a step: 1" in told.stdout
    assert "other.py:7 step: if values.sum() > 2:" in told.stdout
    assert told.stdout.splitlines()[-1].startswith("check_static: 5 host syncs, ")


@pytest.mark.simulator
@pytest.mark.parametrize("model", ["twins", "rcnn", "solov2", "declip", "glip"])
def test_our_models_train_on_a_simulated_npu_without_any(model: str) -> None:
    told = run_on_npu(model, "--steps=12")
    assert told.stdout.splitlines()[-1] == NONE, told.stdout + told.stderr
    assert "(simulated)" in told.stdout.splitlines()[0]
    assert told.returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "There is no model 'nowhere' here"),
        (["--peer=other:missing"], "has no function 'missing'"),
        (["--peer=absent:build"], "has no module absent"),
        (["--peer=other:breaks"], "ZeroDivisionError: the step's own"),
        (["--peer=other:reads", "--steps=8"], "--steps=8 leaves nothing after the warm-up of 8"),
        ([], "required"),
    ],
)
def test_what_cannot_be_measured_is_exit_code_2(
    words: list[str], message: str, check_peer: Callable[..., Told]
) -> None:
    told = check_peer(*words)
    assert told.code == 2
    assert message in told.err
