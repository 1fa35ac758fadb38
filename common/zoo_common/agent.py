"""Starts the ranks with torch.distributed.run's agent and tells how they ended.

torchrun's own command line is not used, because on a failure it gives the other ranks 30 seconds
to end, and on a signal as well: here a failure ends them at once, and a signal leaves them the
time that saving a checkpoint needs.
"""

import json
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from zoo_common.errors import UserError
from zoo_common.preflight import Place
from zoo_common.worker import FAILURES_VARIABLE

# How long the launchers of several machines wait for one another when their ranks are done; one
# that got a signal does not come.
_GOODBYE_S = 10


@dataclass(frozen=True)
class Failure:
    """Why the first failed rank failed.

    Attributes:
        rank: its global rank.
        code: its exit code, or minus the signal that killed it.
        message: one line.
        traceback: its own, or an empty text.
    """

    rank: int
    code: int
    message: str
    traceback: str


@dataclass(frozen=True)
class Outcome:
    """How the ranks of this machine ended: well, by a failure, or by a signal to the launcher."""

    failure: Failure | None = None
    received: int | None = None


class _Agent(LocalElasticAgent):
    """Ends the other ranks at once when one fails; torch's own agent gives them 30 seconds.

    ``_monitor_workers`` is one of the methods that torch's documentation gives to subclasses.

    Attributes:
        failed: exit codes of the ranks that had failed before any other was ended.
    """

    failed: dict[int, int]

    def _monitor_workers(self, worker_group: Any) -> Any:
        codes = {worker.global_rank: _exit_code(worker.id) for worker in worker_group.workers}
        self.failed = {rank: code for rank, code in codes.items() if code}
        if self.failed and self._pcontext is not None:
            self._pcontext.close(signal.SIGKILL)
        elif None in codes.values():
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)


def run(
    command: Sequence[str],
    place: Place,
    *,
    environment: Mapping[str, str],
    grace_s: int,
    join_timeout_s: int,
    local_addr: str = "",
) -> Outcome:
    """Runs ``command`` once per rank of this machine and waits for all of them.

    Args:
        command: program and arguments; torchrun's variables tell each process its rank.
        place: where the ranks are.
        environment: variables for the ranks, on top of this process's own.
        grace_s: seconds that the ranks have after a signal before they are killed.
        join_timeout_s: seconds to wait for the other machines.
        local_addr: this machine's address, if the default is not the right one.

    Raises:
        UserError: the machines did not find one another in time.
    """
    _silence()
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch:
        os.environ.update({**environment, **_signals(), FAILURES_VARIABLE: scratch})
        parameters = RendezvousParameters(
            backend="static",
            endpoint=f"{place.master_addr}:{place.master_port}",
            run_id=uuid.uuid4().hex if place.nnodes == 1 else "zoo",
            min_nodes=place.nnodes,
            max_nodes=place.nnodes,
            local_addr=local_addr or None,
            rank=place.node_rank,
            timeout=join_timeout_s,
        )
        handler = rendezvous.get_rendezvous_handler(parameters)
        spec = WorkerSpec(
            role="default",
            local_world_size=place.processes,
            entrypoint=command[0],
            args=tuple(command[1:]),
            rdzv_handler=handler,
            max_restarts=0,
            monitor_interval=0.1,
            master_addr=place.master_addr,
            master_port=place.master_port,
            local_addr=local_addr or None,
        )
        agent = _Agent(
            spec,
            DefaultLogsSpecs(log_dir=scratch),
            exit_barrier_timeout=_GOODBYE_S,
            shutdown_timeout=grace_s,
        )
        try:
            result = agent.run()
        except DistError as error:
            raise UserError(
                f"Machine {place.node_rank} waited {join_timeout_s} s for {place.nnodes} machines "
                f"at {place.master_addr}:{place.master_port} and did not find them all: start the "
                "run on each with its own --node_rank, and check that the address is reachable "
                f"({str(error).splitlines()[0]})."
            ) from error
        except SignalException as stopped:
            return Outcome(_first_failure(Path(scratch), {}), int(stopped.sigval))
        finally:
            handler.shutdown()
        if not result.is_failed():
            return Outcome()
        return Outcome(_first_failure(Path(scratch), agent.failed))


def _signals() -> dict[str, str]:
    """What torch's agent passes on; it would end a run under nohup when the terminal goes."""
    names = ["SIGTERM", "SIGINT", "SIGQUIT"]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append("SIGHUP")
    return {"TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(names)}


def _first_failure(directory: Path, codes: Mapping[int, int]) -> Failure | None:
    """The failure that came first.

    A rank that a signal killed leaves no word and is the cause when there is one: the others then
    fail because their peer is gone.
    """
    words: dict[int, dict[str, Any]] = {}
    for file in directory.glob("*.json"):
        words[int(file.stem)] = json.loads(file.read_text(encoding="utf-8"))
    for rank, code in sorted(codes.items()):
        if rank not in words:
            return Failure(rank, code, _describe(code), "")
    if not words:
        return None
    rank, word = min(words.items(), key=lambda item: float(item[1]["time"]))
    return Failure(rank, int(word["code"]), str(word["message"]), str(word["traceback"]))


def _exit_code(pid: int) -> int | None:
    """How a child ended, which stays for torch's agent to collect; None while it runs."""
    status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status


def _describe(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _silence() -> None:
    """Torch's agent logs each kill as a warning; we tell how the run ended ourselves."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch.distributed.elastic") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.CRITICAL)
