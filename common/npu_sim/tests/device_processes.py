"""One of two processes of test_device_processes.py: writes what it finds as lines of JSON.

::

    python device_processes.py RANK FILE_TO_MEET
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import npu_sim

RANK = int(sys.argv[1])
RESULTS: dict[str, Any] = {}


def check(function: Callable[[torch.device], Any]) -> None:
    """Notes what a function returns, or the sentence that it raises."""
    try:
        RESULTS[function.__name__] = function(torch.device("npu", RANK))
    except (RuntimeError, ValueError, AssertionError) as error:
        RESULTS[function.__name__] = f"{type(error).__name__}: {error}".splitlines()[0]


def reductions(device: torch.device) -> dict[str, object]:
    results: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int16,
                  torch.uint8, torch.bool):  # fmt: skip
        tensor = torch.full((2,), RANK, device=device).to(dtype)
        dist.all_reduce(tensor)
        results[str(dtype)] = tensor.tolist()
    for name in ("AVG", "MAX", "MIN", "PRODUCT"):
        tensor = torch.full((2,), RANK + 1.0, device=device)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, name))
        results[name] = tensor.tolist()
    return results


def float64(device: torch.device) -> None:
    dist.all_reduce(torch.ones(2, dtype=torch.float64, device=device))


def bitwise(device: torch.device) -> None:
    dist.all_reduce(torch.ones(2, dtype=torch.int32, device=device), op=dist.ReduceOp.BOR)


def scattered_bytes(device: torch.device) -> None:
    inputs = [torch.ones(1, dtype=torch.uint8, device=device)] * 2
    dist.reduce_scatter(torch.empty_like(inputs[0]), inputs)


def gathers_take_all_types(device: torch.device) -> object:
    mine = torch.full((2,), RANK, dtype=torch.float64, device=device)
    lists = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(lists, mine)
    dist.broadcast(mine, src=1)
    return [part.tolist() for part in lists], mine.tolist()


def into_one_tensor(device: torch.device) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 gave them other names
        whole = torch.zeros(1, 4, device=device)
        dist.all_gather_into_tensor(whole, torch.full((1, 2), float(RANK), device=device))
        part = torch.zeros(2, device=device)
        dist.reduce_scatter_tensor(part, torch.arange(4.0, device=device))
    return whole.tolist(), part.tolist()


def asynchronous(device: torch.device) -> object:
    tensor = torch.full((3,), float(RANK), device=device)
    work = dist.all_reduce(tensor, op=dist.ReduceOp.AVG, async_op=True)
    work.wait()
    other = torch.full((3,), float(RANK), device=device)
    future = dist.all_reduce(other, async_op=True).get_future()
    return tensor.tolist(), [part.tolist() for part in future.wait()]


def messages(device: torch.device) -> object:
    tensor = torch.full((2,), float(RANK), device=device)
    if RANK == 0:
        dist.send(tensor, 1)
    else:
        dist.recv(tensor, 0)
    swapped = torch.zeros(2, device=device)
    dist.all_to_all_single(swapped, torch.tensor([10.0 * RANK, 10.0 * RANK + 1], device=device))
    return tensor.tolist(), swapped.tolist()


def host_tensors_and_objects(device: torch.device) -> object:
    host = torch.full((2,), RANK, dtype=torch.float64)
    dist.all_reduce(host)  # by gloo
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": RANK})
    dist.barrier()
    return host.tolist(), objects


def host_tensors_on_hccl(device: torch.device) -> None:
    dist.all_reduce(torch.ones(2), group=HCCL_ONLY)


def data_parallel(device: torch.device) -> object:
    """The gradient of two processes is that of one on the whole batch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    images, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 1])
    F.cross_entropy(network(images), labels).backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    parallel = DistributedDataParallel(network.to(device), device_ids=[RANK])
    mine = slice(3 * RANK, 3 * RANK + 3)
    F.cross_entropy(parallel(images[mine].to(device)), labels[mine].to(device)).backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient)
    return "equal"


def batch_norm(dtype: torch.dtype) -> Callable[[torch.device], str]:
    """SyncBatchNorm over parts of 4 and 2 images is BatchNorm on all 6."""

    def check_one(device: torch.device) -> str:
        torch.manual_seed(0)
        whole = (torch.randn(6, 3, 5, 5) * 2 + 1).to(dtype)
        factors = torch.randn(6, 3, 5, 5)
        mine = slice(0, 4) if RANK == 0 else slice(4, 6)

        def train(norm: nn.Module, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            leaf = images.detach().requires_grad_()
            result = norm(leaf)
            (result.float() * weights).sum().backward()
            assert leaf.grad is not None and result.dtype == images.dtype
            return result.detach().cpu().float(), leaf.grad.cpu().float()

        usual = nn.BatchNorm2d(3)
        nn.init.uniform_(usual.weight)
        result, gradient = train(usual, whole.float(), factors)
        own = nn.BatchNorm2d(3)
        nn.init.uniform_(own.weight)
        own.load_state_dict({**usual.state_dict(), **nn.BatchNorm2d(3).state_dict(),
                             "weight": usual.weight, "bias": usual.bias})  # fmt: skip
        sync = nn.SyncBatchNorm.convert_sync_batchnorm(own.to(device))
        part, part_gradient = train(sync, whole[mine].to(device), factors[mine].to(device))
        error = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(part, result[mine], rtol=error, atol=error)
        torch.testing.assert_close(part_gradient, gradient[mine], rtol=error, atol=error)
        torch.testing.assert_close(sync.running_mean.cpu(), usual.running_mean)
        torch.testing.assert_close(sync.running_var.cpu(), usual.running_var)
        for parameter, expected in ((sync.weight, usual.weight), (sync.bias, usual.bias)):
            dist.all_reduce(parameter.grad)
            # A sum over 150 elements, each rounded to dtype before.
            error = 1e-3 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(parameter.grad.cpu(), expected.grad, rtol=0, atol=error)
        return "equal"

    check_one.__name__ = f"batch_norm {dtype}"
    return check_one


npu_sim.install()
warnings.simplefilter("error")
torch.accelerator.set_device_index(RANK)
dist.init_process_group(
    "cpu:gloo,npu:hccl",
    init_method=f"file://{sys.argv[2]}",
    rank=RANK,
    world_size=2,
    timeout=timedelta(seconds=60),
    device_id=torch.device("npu", RANK),
)
HCCL_ONLY = dist.new_group(backend="hccl")
for one in (
    reductions, float64, bitwise, scattered_bytes, gathers_take_all_types, into_one_tensor,
    asynchronous, messages, host_tensors_and_objects, host_tensors_on_hccl, data_parallel,
    batch_norm(torch.float32), batch_norm(torch.bfloat16), batch_norm(torch.float16),
):  # fmt: skip
    check(one)
dist.destroy_process_group()
print(json.dumps(RESULTS))
