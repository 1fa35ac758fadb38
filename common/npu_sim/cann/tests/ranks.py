"""What each of two ranks does in the tests of ProcessGroupHCCL; see test_torch_npu_ranks.py.

python ranks.py CHECK RANK PORT: the result is the JSON of the last line that rank 0 prints.
"""

import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  (registers the device and the backend)
from torch import Tensor, nn


def _said(function: Any, *arguments: Any, **options: Any) -> str:
    """The first line of the error that a call raises."""
    try:
        function(*arguments, **options)
        torch.npu.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "no error"


def collectives(rank: int, device: torch.device) -> Any:
    """One of each, with the numbers that come out."""
    out: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        x = torch.full((5,), rank + 1, device=device).to(dtype)
        dist.all_reduce(x)
        out[f"sum {dtype}"] = x.float().tolist()
    x = torch.full((300_000,), float(rank), device=device)
    dist.all_reduce(x, dist.ReduceOp.AVG)
    out["average"] = x.unique().tolist()
    x = torch.tensor([rank, 1 - rank], device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    out["largest"] = x.tolist()
    x = torch.full((2,), float(rank), device=device)
    dist.broadcast(x, 1)
    out["broadcast"] = x.tolist()
    gathered = [torch.empty(3, device=device) for _ in range(2)]
    dist.all_gather(gathered, torch.full((3,), float(rank), device=device))
    out["gathered"] = [part.tolist() for part in gathered]
    part = torch.empty(2, device=device)
    dist.reduce_scatter_tensor(part, torch.arange(4.0, device=device))
    out["reduced part"] = part.tolist()
    swapped = torch.empty(2, device=device)
    dist.all_to_all_single(swapped, torch.arange(2.0, device=device) + 10 * rank)
    out["swapped"] = swapped.tolist()
    x = torch.full((2,), float(rank), device=device)
    if rank:
        dist.send(x, 0)
    else:
        dist.recv(x, 1)
    out["received"] = x.tolist()
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    out["objects"] = objects
    dist.barrier()
    return out


def refusals(rank: int, device: torch.device) -> Any:
    """What HCCL does not do, and what torch_npu says of it."""
    return {
        "float64": _said(dist.all_reduce, torch.ones(2, dtype=torch.float64, device=device)),
        "bitwise": _said(
            dist.all_reduce, torch.ones(2, dtype=torch.int32, device=device), dist.ReduceOp.BAND
        ),
        "uint8": _said(
            dist.reduce_scatter_tensor,
            torch.ones(1, dtype=torch.uint8, device=device),
            torch.ones(2, dtype=torch.uint8, device=device),
        ),
    }


def sync_batch_norm(rank: int, device: torch.device) -> Any:
    """Two halves of a batch in two ranks, against the whole batch on the CPU."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4) * 2 + 1
    whole = nn.BatchNorm2d(3)
    nn.init.uniform_(whole.weight)
    halves = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3)).to(device)
    halves.load_state_dict(whole.state_dict())
    wanted_in = x.clone().requires_grad_()
    (whole(wanted_in) ** 3).sum().backward()
    half_in = x.chunk(2)[rank].to(device, copy=True).requires_grad_()
    (halves(half_in) ** 3).sum().backward()
    weight_grad = halves.weight.grad.clone()
    dist.all_reduce(weight_grad)

    def apart(wanted: Tensor, got: Tensor) -> float:
        return float((wanted - got.cpu()).abs().max() / wanted.abs().max())

    return {
        "input gradient": apart(wanted_in.grad.chunk(2)[rank], half_in.grad),
        "weight gradient": apart(whole.weight.grad, weight_grad),
        "running mean": apart(whole.running_mean, halves.running_mean),
        "running variance": apart(whole.running_var, halves.running_var),
    }


def death(rank: int, device: torch.device) -> Any:
    """Rank 1 ends without a word; rank 0 must not wait for it for ever."""
    if rank == 1:
        os._exit(0)
    started = time.monotonic()
    said = _said(dist.all_reduce, torch.ones(2, device=device))
    # The process group would wait for its thread that is still in the failed operation.
    print(json.dumps([said, time.monotonic() - started]), flush=True)
    os._exit(0)


def main(check: str, rank: int, port: str) -> None:
    """Joins the group, does the check, and prints its result."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    device = torch.device("npu", rank)
    torch.npu.set_device(device)
    dist.init_process_group("hccl")
    dist.barrier()
    result = globals()[check](rank, device)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
