"""The processes of a run: group, reductions, exact gather, stopping together.

One group is made. What lies on an accelerator travels over HCCL or NCCL: gradients and sums. What
lies on the host travels over gloo on every kind of device: objects, barriers, the agreement to
stop. HCCL moves device tensors only, and reading one would stall the training step.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zoo_common import data_workers
from zoo_common.beats import beat
from zoo_common.errors import LostPeerError, UserError, first_line

Item = TypeVar("Item")

# A gloo group of its own beside the default one cannot be: torch looks for a backend of the bound
# device in every group, and gloo has none for NPUs.
_BACKENDS = {"npu": "cpu:gloo,npu:hccl", "cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}

ROUND_VARIABLE = "ZOO_ROUND"
"""Set by the launcher: how many times the ranks of this run were started, this time included."""

_COUNTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

# DDP's argument got another name in torch 2.14, and the old one warns since.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)

_on_accelerator = False


@dataclass(frozen=True)
class Processes:
    """A process's place among those of its run.

    Attributes:
        rank: this process's number over all machines.
        local_rank: its number on this machine.
        world_size: processes on all machines.
        local_world_size: processes on this machine.
        nnodes: machines.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    nnodes: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the record."""
        return self.rank == 0


def read_environment(environ: Mapping[str, str] | None = None) -> Processes:
    """Reads the variables that torchrun sets; without them this is a single process.

    Args:
        environ: where to look; ``os.environ`` by default.

    Raises:
        UserError: some are missing, are no numbers, or contradict one another.
    """
    environ = os.environ if environ is None else environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = [name for name in names if environ.get(name)]
    if not given:
        return Processes(0, 0, 1, 1, 1)
    if environ.get("WORLD_SIZE") == "1":
        # Some cluster managers say so much of a job of one process, and no more.
        environ = {**dict.fromkeys(names, "0"), "LOCAL_WORLD_SIZE": "1", **environ}
        given = [name for name in names if environ.get(name)]
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(
            f"{', '.join(given)} is set, but {', '.join(missing)} is not: start the processes with "
            "the scripts in test/ or with torchrun, or unset it."
        )
    rank, world_size, local_rank, local_world_size = (_number(environ, name) for name in names)
    # Machines may have different numbers of processes, so the two numbers do not tell nnodes.
    nnodes = _number(environ, "GROUP_WORLD_SIZE") if environ.get("GROUP_WORLD_SIZE") else None
    if nnodes is None:
        nnodes = -(-world_size // max(1, local_world_size))
    for name, value, below in (
        ("RANK", rank, world_size),
        ("LOCAL_RANK", local_rank, local_world_size),
        ("LOCAL_WORLD_SIZE", local_world_size, world_size + 1),
        ("GROUP_WORLD_SIZE", nnodes, world_size + 1),
    ):
        if value >= below or (value == 0 and not name.endswith("RANK")):
            raise UserError(
                f"{name}={value} contradicts WORLD_SIZE={world_size}, LOCAL_WORLD_SIZE="
                f"{local_world_size}: start the processes with the scripts in test/ or torchrun."
            )
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name):
                raise UserError(
                    f"WORLD_SIZE={world_size}, but {name} is not set: start the processes with "
                    "the scripts in test/ or with torchrun."
                )
    return Processes(rank, local_rank, world_size, local_world_size, nnodes)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{name}={text} is no number of 0 or more: it is set by torchrun, not by hand."
        )
    return int(text)


def start(device: torch.device, *, timeout_s: float = 1800) -> Processes:
    """Joins the run's processes; a single process joins nothing.

    Args:
        device: this process's device, from :func:`zoo_common.device.resolve`.
        timeout_s: how long an operation waits for the other processes, in seconds. On an NPU it
            is raised above HCCL's own limits, so that HCCL's error, which names the link, comes
            first.

    Raises:
        UserError: the environment is malformed, or processes started by hand do not meet.
        LostPeerError: processes that the launcher started do not meet.
    """
    global _on_accelerator
    processes = read_environment()
    if processes.world_size == 1:
        return processes
    assert not dist.is_initialized(), "start() was called twice"
    beat("meeting the other ranks")
    timeout = timedelta(seconds=group_timeout_s(device.type, timeout_s, os.environ))
    _on_accelerator = device.type != "cpu"
    if _on_accelerator:
        torch.get_device_module(device).set_device(device)
    try:
        dist.init_process_group(
            _BACKENDS[device.type],
            timeout=timeout,
            device_id=device if _on_accelerator else None,
            **_store_of_this_round(processes, timeout),
        )
    except dist.DistError as error:
        stop()
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        # Started by the launcher, the ranks may meet when they are started again.
        kind = LostPeerError if ROUND_VARIABLE in os.environ else UserError
        raise kind(
            f"The {processes.world_size} processes of the run did not meet at {where} within "
            f"{timeout_s:g} s ({first_line(error)}): check that each machine runs its part and "
            "reaches that address."
        ) from error
    return processes


def _store_of_this_round(processes: Processes, timeout: timedelta) -> dict[str, Any]:
    """The launcher's store, with keys of this start of the ranks: others left theirs there."""
    if ROUND_VARIABLE not in os.environ:
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, timeout=timeout, wait_for_workers=False
    )
    return {
        "store": dist.PrefixStore(  # type: ignore[attr-defined]
            f"ranks/{os.environ[ROUND_VARIABLE]}", store
        ),
        "rank": processes.rank,
        "world_size": processes.world_size,
    }


def group_timeout_s(kind: str, timeout_s: float, environ: Mapping[str, str]) -> float:
    """The default group's timeout: on an NPU above HCCL_EXEC_TIMEOUT and HCCL_EVENT_TIMEOUT.

    Args:
        kind: device type.
        timeout_s: what was asked for, in seconds.
        environ: where HCCL's limits may be set; 0 there means that HCCL waits for ever.
    """
    if kind != "npu":
        return timeout_s
    limits = {"HCCL_EXEC_TIMEOUT": 1836, "HCCL_EVENT_TIMEOUT": 1868}
    set_to = [_number(environ, n) if environ.get(n) else limit for n, limit in limits.items()]
    return max(timeout_s, *(limit + 60 for limit in set_to))


def stop() -> None:
    """Leaves the group; may be called at any time and more than once.

    While an exception passes, NCCL and HCCL are left to the end of the process: taking them down
    waits for ranks that may be gone.
    """
    failed = sys.exc_info()[0] is not None
    if dist.is_initialized() and not (failed and _on_accelerator):
        dist.destroy_process_group()


@contextlib.contextmanager
def _with_others() -> Iterator[None]:
    """Turns gloo's error about a process that is gone into one that people understand."""
    try:
        yield
    except RuntimeError as error:
        if data_workers.explain(error):
            raise  # torch raises it wherever the main thread happens to be
        raise LostPeerError(
            "Another process of this run ended or does not answer, so this one ends too; the "
            f"other's log says why ({first_line(error)})."
        ) from error


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _for_wire(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in float32 or int64, the two types that every backend adds up."""
    if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
        dtype = torch.float32
    elif tensor.dtype in _COUNTS:
        dtype = torch.int64
    else:
        raise TypeError(
            f"{tensor.dtype} is not reduced over processes, since HCCL has no such reduction: use "
            "float32, int64 for counts, or gather_results() and add up on the host."
        )
    return tensor.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)


def _reduce(tensor: Tensor, op: Any) -> Tensor:
    result = _for_wire(tensor)
    if _world_size() > 1:
        beat("adding up over the ranks")
        # An accelerator's error may be about anything that it was given before.
        with _with_others() if result.device.type == "cpu" else contextlib.nullcontext():
            dist.all_reduce(result, op)
    return result


def sum_across(tensor: Tensor) -> Tensor:
    """The sum over all processes, as a new tensor.

    Args:
        tensor: any shape, the same on each process, on the CPU or on the run's device. Half
            precision is added up as float32; bool and small integers as int64.

    Raises:
        TypeError: float64 and other types that HCCL cannot add up.
        LostPeerError: another process is gone.
    """
    return _reduce(tensor, dist.ReduceOp.SUM)


def mean_across(tensor: Tensor) -> Tensor:
    """The mean over all processes in float32, otherwise as :func:`sum_across`."""
    return sum_across(tensor).to(torch.float32) / _world_size()


def max_across(tensor: Tensor) -> Tensor:
    """The largest value over all processes, element by element, as :func:`sum_across`."""
    return _reduce(tensor, dist.ReduceOp.MAX)


def gather_results(items: Sequence[Item], to: Literal["all", "main"] = "all") -> list[Item]:
    """The items of all processes in order of rank, none lost and none twice.

    They travel pickled over gloo, so each process may give any number of them, and numbers arrive
    bit for bit.

    Args:
        items: what can be pickled; tensors should be on the CPU.
        to: ``main`` gives them to rank 0 only, which spares the others the memory.

    Returns:
        All items; an empty list on the other ranks with ``to="main"``.

    Raises:
        LostPeerError: another process is gone.
    """
    world_size = _world_size()
    if world_size == 1:
        return list(items)
    beat("gathering results")
    receives = to == "all" or dist.get_rank() == 0
    parts: list[Any] = [None] * world_size
    with _with_others():
        if to == "all":
            dist.all_gather_object(parts, list(items))
        else:
            dist.gather_object(list(items), parts if receives else None, dst=0)
    return [item for part in parts for item in part] if receives else []


def broadcast_object(value: Item, src: int = 0) -> Item:
    """Rank ``src``'s value, on every process; it is pickled on the way.

    Raises:
        LostPeerError: another process is gone.
    """
    if _world_size() == 1:
        return value
    box: list[Any] = [value]
    beat(f"waiting for a word of rank {src}")
    with _with_others():
        dist.broadcast_object_list(box, src=src)
    return box[0]  # type: ignore[no-any-return]


def scatter_objects(values: Sequence[Item], src: int = 0) -> Item:
    """This rank's own of the values that rank ``src`` gives, one for each; pickled on the way.

    Args:
        values: in order of rank; what the other ranks give does not matter.
        src: the rank that gives.

    Raises:
        LostPeerError: another process is gone.
    """
    if _world_size() == 1:
        return values[0]
    box: list[Any] = [None]
    beat(f"waiting for a word of rank {src}")
    with _with_others():
        dist.scatter_object_list(box, list(values) if dist.get_rank() == src else None, src=src)
    return box[0]  # type: ignore[no-any-return]


def barrier() -> None:
    """Waits until every process has come here; the device's queue is not waited for.

    Raises:
        LostPeerError: another process is gone.
    """
    # Not dist.barrier(), which would use the accelerator.
    sum_across(torch.zeros(1))


def wrap(
    model: nn.Module,
    device: torch.device,
    *,
    find_unused: bool = False,
    static_graph: bool = False,
    bucket_mb: float | None = None,
    sync_buffers: bool | None = None,
) -> nn.Module:
    """Makes a model average its gradients over the processes.

    All processes start with rank 0's weights and buffers.

    Args:
        model: on ``device``; its parameters' ``requires_grad`` must not change afterwards.
        device: this process's device.
        find_unused: some parameters get no gradient in some steps; costs a walk over the graph.
        static_graph: the same parameters are used in every step.
        bucket_mb: size of the pieces that gradients travel in, in MiB; torch's default is 25.
        sync_buffers: send rank 0's buffers in every forward pass; by default only when the model
            has batch norms with statistics of their own, since constant buffers (anchors, position
            indices) are the same everywhere. A layer whose ``has_shared_statistics`` is true says
            that its are the same too.

    Returns:
        The wrapped model; the model itself in a single process or with nothing to train.
    """
    if _world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    if sync_buffers is None:
        sync_buffers = any(_has_own_statistics(module) for module in model.modules())
    if not sync_buffers:
        _send_buffers(model)
    options: dict[str, Any] = {_SYNC_BUFFERS: sync_buffers}
    if bucket_mb is not None:
        options["bucket_cap_mb"] = bucket_mb
    return DistributedDataParallel(
        model,
        device_ids=None if device.type == "cpu" else [device.index],
        find_unused_parameters=find_unused,
        static_graph=static_graph,
        gradient_as_bucket_view=True,
        **options,
    )


def _has_own_statistics(module: nn.Module) -> bool:
    """Whether a layer keeps running statistics that differ between the processes."""
    if isinstance(module, nn.SyncBatchNorm) or getattr(module, "has_shared_statistics", False):
        return False
    is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return is_norm and module.running_mean is not None


def _send_buffers(model: nn.Module) -> None:
    """Gives every process rank 0's buffers once: older DDP sends them in each step or never."""
    for buffer in model.buffers():
        sent = buffer.detach().contiguous()
        dist.broadcast(sent, src=0)
        buffer.detach().copy_(sent)


class StopAgreement:
    """Lets all processes stop at the same step when one of them is asked to.

    Each step's requests travel while the next step runs: :meth:`agreed` starts an exchange on the
    host and returns the result of the one that the call before it started. So no step waits, the
    device is not read, and every process gets the same answer at the same step, one step after
    the request.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, Tensor] | None = None

    def agreed(self, local_request: bool) -> bool:
        """Whether to stop here. Every process calls it at every step boundary.

        Args:
            local_request: this process wants to stop.

        Returns:
            In a single process, ``local_request``; else whether any process wanted to stop at the
            step boundary before.

        Raises:
            LostPeerError: another process is gone.
        """
        if _world_size() == 1:
            return local_request
        request = torch.tensor([int(local_request)])
        with _with_others():
            work = dist.all_reduce(request, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        before, self._pending = self._pending, (work, request)
        return before is not None and self._result(before)

    def drain(self) -> None:
        """Waits for the exchange under way, so that none is when the groups are left.

        Raises:
            LostPeerError: another process is gone.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._result(pending)

    def _result(self, exchange: tuple[dist.Work, Tensor]) -> bool:
        work, request = exchange
        beat("agreeing with the other ranks whether to stop")
        with _with_others():
            work.wait()
        return bool(request.item())
