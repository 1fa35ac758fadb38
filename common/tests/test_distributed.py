"""Processes, reductions, gather, DDP and the agreement to stop, in real processes.

Started as a program (``python test_distributed.py ROLE``) this file is one process of a group.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from zoo_common import device, distributed
from zoo_common.errors import TrainingError, UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"), int(os.environ.get("RANK", 0)))
BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}[DEVICE.type]
WORLD_SIZE = 3

# ------------------------------------------------------------------------------------------------
# What the processes of a group do. Each check runs in every process of one and the same group.


def rank() -> int:
    return dist.get_rank()


def check_sum_of_floats() -> None:
    mine = torch.tensor([1.5, 2.0], device=DEVICE) * (rank() + 1)
    total = distributed.sum_across(mine)
    assert total.dtype == torch.float32
    assert total.tolist() == [9.0, 12.0]
    assert mine.tolist() == [1.5 * (rank() + 1), 2.0 * (rank() + 1)], "the argument was changed"
    for dtype in (torch.float16, torch.bfloat16):
        # 256 + 1 + 1 needs more bits than bfloat16 has.
        half = torch.tensor(256.0 if rank() == 0 else 1.0, dtype=dtype, device=DEVICE)
        total = distributed.sum_across(half)
        assert total.dtype == torch.float32 and total.item() == 258.0


def check_sum_of_counts() -> None:
    big = 2**40 + 1
    total = distributed.sum_across(torch.tensor([big, rank()], device=DEVICE))
    assert total.dtype == torch.int64 and total.tolist() == [3 * big, 3]
    total = distributed.sum_across(torch.tensor([True, rank() == 1], device=DEVICE))
    assert total.dtype == torch.int64 and total.tolist() == [3, 1]
    total = distributed.sum_across(torch.tensor([200], dtype=torch.uint8, device=DEVICE))
    assert total.dtype == torch.int64 and total.tolist() == [600]


def check_mean_and_max() -> None:
    mine = torch.tensor([float(rank())], device=DEVICE)
    assert distributed.mean_across(mine).tolist() == [1.0]
    mean = distributed.mean_across(torch.tensor(rank() + 1, device=DEVICE))
    assert mean.dtype == torch.float32 and mean.item() == 2.0
    largest = distributed.max_across(torch.tensor([rank(), -rank()], device=DEVICE))
    assert largest.tolist() == [2, 0]
    transposed = torch.arange(6.0, device=DEVICE).reshape(2, 3).t()
    assert torch.equal(distributed.max_across(transposed + rank()), transposed + 2)


def check_float64_is_refused() -> None:
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(TypeError, match="gather_results"):
            distributed.sum_across(torch.zeros(1, dtype=dtype, device=DEVICE))


def check_gather_is_exact_and_in_order() -> None:
    # 0, 2 and 5 items, with numbers that float32 would round.
    lengths = [0, 2, 5]
    mine = [{"rank": rank(), "n": n, "x": 0.1 + n} for n in range(lengths[rank()])]
    every = [{"rank": r, "n": n, "x": 0.1 + n} for r in range(3) for n in range(lengths[r])]
    assert distributed.gather_results(mine) == every
    assert distributed.gather_results(mine, to="main") == (every if rank() == 0 else [])
    assert distributed.gather_results([]) == []
    boxes = distributed.gather_results([torch.full((rank(), 4), float(rank()))])
    assert [tuple(box.shape) for box in boxes] == [(0, 4), (1, 4), (2, 4)]


def check_broadcast_and_barrier() -> None:
    assert distributed.broadcast_object({"from": rank()}, src=2) == {"from": 2}
    for_each = [f"{rank()} for {other}" for other in range(WORLD_SIZE)] if rank() == 1 else []
    assert distributed.scatter_objects(for_each, src=1) == f"1 for {rank()}"
    started = time.monotonic()
    if rank() == 1:
        time.sleep(0.3)
    distributed.barrier()
    assert rank() == 1 or time.monotonic() - started > 0.2


def check_stop_agreement() -> None:
    agreement = distributed.StopAgreement()
    answers = []
    for step in range(6):
        # Out of step with one another on purpose; only rank 1 is asked to stop, at step 3.
        time.sleep(0.01 * rank())
        answers.append(agreement.agreed(rank() == 1 and step == 3))
    agreement.drain()
    agreement.drain()
    assert answers == [False, False, False, False, True, False]
    assert distributed.gather_results([answers]) == [answers] * 3


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(DEVICE)


def global_batch() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def check_gradients_equal_those_of_one_process() -> None:
    alone = make_model()
    alone(global_batch()).square().mean().backward()
    model = make_model()
    if rank() != 0:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)  # rank 0's weights must replace these
    wrapped = distributed.wrap(model, DEVICE, bucket_mb=1.0)
    assert wrapped.module is model
    wrapped(global_batch()[2 * rank() : 2 * rank() + 2]).square().mean().backward()
    for one, many in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=0)
        torch.testing.assert_close(one.grad, many.grad, rtol=1e-6, atol=1e-7)


def check_training_and_agreeing_share_the_group() -> None:
    torch.manual_seed(rank())
    wrapped = distributed.wrap(make_model(), DEVICE)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    agreement = distributed.StopAgreement()
    steps = 0
    while not agreement.agreed(rank() == 2 and steps == 5):
        optimizer.zero_grad()
        wrapped(torch.randn(2, 4, device=DEVICE)).square().mean().backward()
        optimizer.step()
        steps += 1
    agreement.drain()
    weights = [parameter.detach().cpu() for parameter in wrapped.parameters()]
    ends = distributed.gather_results([(steps, weights)])
    assert [end[0] for end in ends] == [6, 6, 6]
    for _, others in ends:
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def check_unused_parameters() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    model.to(DEVICE)
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    wrapped = distributed.wrap(model, DEVICE, find_unused=True)
    for _ in range(2):
        wrapped(torch.ones(1, 2, device=DEVICE)).sum().backward()
    assert model["used"].weight.grad is not None and model["idle"].weight.grad is None


def check_buffers() -> None:
    with_statistics = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(DEVICE)
    wrapped = distributed.wrap(with_statistics, DEVICE)
    with_statistics[1].running_mean.fill_(rank() + 1.0)
    wrapped.eval()(torch.zeros(1, 2, device=DEVICE))
    assert with_statistics[1].running_mean.tolist() == [1.0, 1.0], "rank 0's statistics"
    with_statistics[1].has_shared_statistics = True
    wrapped = distributed.wrap(with_statistics, DEVICE)
    with_statistics[1].running_mean.fill_(rank())
    wrapped(torch.zeros(1, 2, device=DEVICE))
    assert with_statistics[1].running_mean.tolist() == [rank()] * 2, "the same by itself"
    constant = nn.Linear(2, 2).to(DEVICE)
    zeros = torch.zeros(1, 2, device=DEVICE)
    constant.register_buffer("table", torch.full((2, 3), float(rank()), device=DEVICE).t())
    wrapped = distributed.wrap(constant, DEVICE)
    assert constant.table.tolist() == [[0.0] * 2] * 3, "rank 0's buffer, once"
    constant.table.fill_(rank())
    wrapped(zeros)
    assert constant.table.tolist() == [[rank()] * 2] * 3, "constants travel no more"
    distributed.wrap(constant, DEVICE, sync_buffers=True)(zeros)
    assert constant.table.tolist() == [[0.0] * 2] * 3


def check_nothing_to_train_is_not_wrapped() -> None:
    model = make_model().requires_grad_(False)
    assert distributed.wrap(model, DEVICE) is model


def check_starting_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match="twice"):
        distributed.start(DEVICE)


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


def run_checks() -> None:
    device.configure(DEVICE)
    processes = distributed.start(DEVICE, timeout_s=20)
    place = (processes.rank, processes.local_rank, processes.world_size, processes.nnodes)
    assert place == (int(os.environ["RANK"]), int(os.environ["RANK"]), WORLD_SIZE, 1)
    named = dist.get_backend_config()
    assert all(name in named for name in BACKEND.split(",")), "named, not guessed"
    outcome = {}
    for name, check in CHECKS.items():
        try:
            check()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    distributed.stop()
    distributed.stop()
    assert not dist.is_initialized()
    print(json.dumps(outcome))


def die_while_stopping_is_agreed() -> None:
    """Rank 1 ends without a word; rank 0 tells what a step boundary cost and what it got then."""
    device.configure(DEVICE)
    distributed.start(DEVICE, timeout_s=60)
    agreement = distributed.StopAgreement()
    seconds = []
    for _ in range(100):
        time.sleep(0.003)
        started = time.perf_counter()
        agreement.agreed(False)
        seconds.append(time.perf_counter() - started)
    if rank() == 1:
        os._exit(9)
    died = time.monotonic()
    message = ""
    try:
        while True:
            time.sleep(0.01)
            agreement.agreed(False)
    except TrainingError as error:
        message = str(error)
        waited_s = time.monotonic() - died
        distributed.stop()
    cost_ms = 1000 * statistics.median(seconds)
    print(json.dumps({"cost_ms": cost_ms, "message": message, "waited_s": waited_s}))


ROLES = {"checks": run_checks, "death": die_while_stopping_is_agreed}

# ------------------------------------------------------------------------------------------------
# The tests.


FOUR = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_group(role: str, world_size: int) -> list[subprocess.CompletedProcess[str]]:
    """Starts this file ``world_size`` times as torchrun would; returns how they ended."""
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(Path(__file__).resolve()), role],
            env={**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(started, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    """What each check gave in each process: empty, or a traceback."""
    ended = run_group("checks", WORLD_SIZE)
    for process in ended:
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
    return [json.loads(process.stdout.splitlines()[-1]) for process in ended]


@pytest.mark.cards(WORLD_SIZE)
@pytest.mark.parametrize("check", CHECKS)
def test_in_three_processes(outcomes: list[dict[str, str]], check: str) -> None:
    failures = [f"rank {r}:\n{found[check]}" for r, found in enumerate(outcomes) if found[check]]
    assert not failures, "\n".join(failures)


@pytest.mark.cards(2)
def test_dead_process_is_noticed_at_once_and_agreeing_is_cheap() -> None:
    survivor, dead = run_group("death", 2)
    assert dead.returncode == 9
    assert survivor.returncode == 0, survivor.stderr
    told = json.loads(survivor.stdout)
    assert told["waited_s"] < 5
    assert told["message"].startswith("Another process of this run ended")
    assert told["message"].count("\n") == 0
    assert told["cost_ms"] < 1, "more than 1 % of a step of 100 ms"


def test_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    processes = distributed.start(CPU)
    assert processes == distributed.Processes(0, 0, 1, 1, 1) and processes.is_main
    assert not dist.is_initialized()
    value = torch.tensor([1.5])
    total = distributed.sum_across(value)
    assert total.tolist() == [1.5] and total.data_ptr() != value.data_ptr()
    assert distributed.mean_across(torch.tensor(3)).item() == 3.0
    assert distributed.max_across(torch.tensor([2, 7])).tolist() == [2, 7]
    with pytest.raises(TypeError, match="float64"):
        distributed.sum_across(torch.zeros(1, dtype=torch.float64))
    assert distributed.gather_results([1, 2]) == [1, 2]
    assert distributed.gather_results([1], to="main") == [1]
    assert distributed.broadcast_object("x") == "x"
    assert distributed.scatter_objects(["x"]) == "x"
    distributed.barrier()
    model = make_model()
    assert distributed.wrap(model, CPU) is model
    agreement = distributed.StopAgreement()
    assert [agreement.agreed(False), agreement.agreed(True)] == [False, True]
    agreement.drain()
    distributed.stop()
    distributed.stop()


def test_processes_that_do_not_meet_are_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    environment = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port, "RANK": 0}
    for name, value in {**environment, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=rf"2 processes .*127\.0\.0\.1:{port} within 1 s"):
        distributed.start(CPU, timeout_s=1)
    assert not dist.is_initialized()
    distributed.stop()


def test_accelerators_are_left_alone_while_an_exception_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL's teardown would wait for the rank that failed."""
    ended: list[str] = []
    started: list[tuple[object, ...]] = []
    for name, value in {**FOUR, **MASTER}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: started.append(("set", card)))
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, timeout, device_id: started.append((backend, timeout.seconds, device_id)),
    )
    for place in (torch.device("cuda:1"), CPU):
        monkeypatch.setattr(dist, "is_initialized", lambda: False)
        distributed.start(place, timeout_s=600)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "destroy_process_group", lambda d=place: ended.append(d.type))
        try:
            raise RuntimeError("a training step failed")
        except RuntimeError:
            distributed.stop()
        distributed.stop()
    assert ended == ["cuda", "cpu", "cpu"]
    card = torch.device("cuda:1")
    assert started == [("set", card), ("cpu:gloo,cuda:nccl", 600, card), ("gloo", 600, None)]


def test_wrap_binds_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []

    def record(model: nn.Module, **options: object) -> nn.Module:
        calls.append(options)
        return model

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "DistributedDataParallel", record)
    distributed.wrap(nn.Linear(1, 1), torch.device("cuda:1"), static_graph=True, bucket_mb=50)
    distributed.wrap(nn.BatchNorm1d(1), CPU)
    assert [call["device_ids"] for call in calls] == [[1], None]
    assert [call["static_graph"] for call in calls] == [True, False]
    assert [call.get("bucket_cap_mb") for call in calls] == [50, None]
    assert all(call["gradient_as_bucket_view"] for call in calls)


def test_reads_what_torchrun_sets() -> None:
    read = distributed.read_environment
    assert read({}) == distributed.Processes(0, 0, 1, 1, 1)
    assert read({"WORLD_SIZE": "1", "RANK": "0"}) == distributed.Processes(0, 0, 1, 1, 1)
    assert read({**FOUR, **MASTER}) == distributed.Processes(1, 1, 4, 2, 2)
    assert not read({**FOUR, **MASTER}).is_main
    three = {**FOUR, **MASTER, "GROUP_WORLD_SIZE": "3"}  # machines with 2, 1 and 1 processes
    assert read(three).nnodes == 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK is set, but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE is not"),
        ({**FOUR, **MASTER, "RANK": "x"}, "RANK=x is no number"),
        ({**FOUR, **MASTER, "RANK": "-1"}, "RANK=-1 is no number"),
        ({**FOUR, **MASTER, "RANK": "4"}, "RANK=4 contradicts WORLD_SIZE=4"),
        ({**FOUR, **MASTER, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 contradicts"),
        ({**FOUR, **MASTER, "LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 contradicts"),
        ({**FOUR, **MASTER, "LOCAL_WORLD_SIZE": "0"}, "contradicts"),
        ({**FOUR, **MASTER, "WORLD_SIZE": "0", "RANK": "0"}, "contradicts"),
        ({**FOUR, **MASTER, "GROUP_WORLD_SIZE": "9"}, "GROUP_WORLD_SIZE=9 contradicts"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 contradicts WORLD_SIZE=1"),
        (FOUR, "MASTER_ADDR is not set"),
        ({**FOUR, "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
    ],
)
def test_malformed_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        distributed.read_environment(environment)
    assert "\n" not in str(error.value)


def test_timeout_lets_hccl_speak_first() -> None:
    timeout = distributed.group_timeout_s
    assert timeout("cpu", 5, {}) == 5
    assert timeout("cuda", 600, {"HCCL_EXEC_TIMEOUT": "9999"}) == 600
    assert timeout("npu", 1800, {}) == 1928
    assert timeout("npu", 1800, {"HCCL_EXEC_TIMEOUT": "3600"}) == 3660
    assert timeout("npu", 7200, {"HCCL_EXEC_TIMEOUT": "0", "HCCL_EVENT_TIMEOUT": "0"}) == 7200
    with pytest.raises(UserError, match="HCCL_EXEC_TIMEOUT=1h"):
        timeout("npu", 1800, {"HCCL_EXEC_TIMEOUT": "1h"})


if __name__ == "__main__":
    ROLES[sys.argv[1]]()
