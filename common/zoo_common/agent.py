"""Starts the ranks with torch.distributed.run's agent, starts them again, and tells how they ended.

torchrun's own command line is not used, because on a failure it gives the other ranks 30 seconds
to end, and on a signal as well: here a failure ends them at once, and a signal leaves them the
time that saving a checkpoint needs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from zoo_common.distributed import ROUND_VARIABLE
from zoo_common.meeting import LostError, Meeting, Word
from zoo_common.preflight import Place
from zoo_common.watch import Watch
from zoo_common.worker import FAILURES_VARIABLE, read_words

LOST_CODE = 128 + signal.SIGUSR1
"""Exit code of a run that lost a machine: like one that was told to make room, it is worth to be
started again with --auto_resume."""

# How long the launchers of several machines wait for one another when their ranks are done; one
# that got a signal does not come.
_GOODBYE_S = 10
# How long a failed machine's own words may take to the others, whose ranks fail at once with it.
_WORD_S = 3.0
# How long the writing of a checkpoint may hold up the end of a run that failed meanwhile.
_WRITE_S = 20.0
# How long rank 0 may take to notice that another rank failed.
_NOTICE_S = 1.0
# How long a signal to all machines may take from one to the next.
_SAME_SIGNAL_S = 2.0


@dataclass(frozen=True)
class Outcome:
    """How the ranks of this machine ended: well, by a failure, or by a signal to the launcher.

    Attributes:
        failure: the first failure on any machine, if one ended the run.
        received: the signal that this launcher got, if one did.
        started: times that the ranks were started.
    """

    failure: Word | None = None
    received: int | None = None
    started: int = 1


@dataclass(frozen=True)
class Plan:
    """What the ranks of a machine are to do, and for how long.

    Attributes:
        command: program and arguments; torchrun's variables tell each process its rank.
        environment: variables for the ranks, on top of this process's own.
        scratch: directory of this machine's ranks, for their failures and beats.
        grace_s: seconds that the ranks have after a signal before they are killed.
        hang_timeout_s: seconds without a sign of life before a rank is taken to hang.
        max_restarts: times that the ranks are started again after a failure.
        is_saving: whether a checkpoint is being written.
        was_interrupted: whether the ranks, which all ended well, had saved and stopped early.
        on_start: called before each start of the ranks with the round, the machines that take
            part, and why, which is empty the first time.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    scratch: Path
    grace_s: int
    hang_timeout_s: int
    max_restarts: int
    is_saving: Callable[[], bool]
    was_interrupted: Callable[[], bool]
    on_start: Callable[[int, Sequence[int], str], None]


class _Agent(LocalElasticAgent):
    """Ends the other ranks at once when one fails; torch's own agent gives them 30 seconds.

    ``_monitor_workers``, ``_start_workers`` and ``_stop_workers`` are methods that torch's
    documentation gives to subclasses.

    Attributes:
        failure: the last failure.
        started: times that the ranks were started.
    """

    def __init__(self, spec: WorkerSpec, plan: Plan, place: Place, meeting: Meeting) -> None:
        super().__init__(
            spec,
            DefaultLogsSpecs(log_dir=str(plan.scratch)),
            exit_barrier_timeout=_GOODBYE_S,
            shutdown_timeout=plan.grace_s,
        )
        self.failure: Word | None = None
        self.started = 0
        self._plan = plan
        self._place = place
        self._meeting = meeting
        self._watch: Watch | None = None
        self._reason = ""

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        for left in self._plan.scratch.iterdir():
            if left.is_file():
                left.unlink()
        self.started += 1
        self.failure = None
        self._plan.on_start(self._meeting.round, self._meeting.machines, self._reason)
        self._reason = "another machine came"  # unless a failure says otherwise
        os.environ[ROUND_VARIABLE] = str(self._meeting.round)
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._watch = Watch(
            self._plan.scratch,
            [pids[local] for local in sorted(pids)],
            self._plan.hang_timeout_s,
            first_rank=worker_group.workers[0].global_rank,
        )
        return pids

    def _stop_workers(self, worker_group: Any, *_: Any) -> None:
        """Before ranks are started anew with other machines: they save a checkpoint first."""
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGTERM, self._plan.grace_s)

    def _monitor_workers(self, worker_group: Any) -> Any:
        codes = {worker.global_rank: _exit_code(worker.id) for worker in worker_group.workers}
        running = None in codes.values()
        failed = {rank: code for rank, code in codes.items() if code}
        word = _first_failure(self._plan.scratch, failed, self._place.node_rank) if failed else None
        if word is None and running:
            word = self._lost() or self._hang()
        if word is not None:
            return self._fail(word)
        if running:
            return RunResult(state=WorkerState.HEALTHY)
        may_go_on = self._place.nnodes > self._place.fewest and self._remaining_restarts > 0
        if may_go_on and self._plan.was_interrupted():
            time.sleep(_SAME_SIGNAL_S)  # a signal to this machine as well ends the run here
            if self._meeting.num_nodes_waiting():
                # A launcher that saw the new machine before this one had all ranks save; torch's
                # agent starts them again, which is no restart after a failure.
                return RunResult(state=WorkerState.HEALTHY)
            machine = self._place.node_rank
            return self._fail(Word(machine, -1, LOST_CODE, "a machine was told to end"))
        return super()._monitor_workers(worker_group)

    def _hang(self) -> Word | None:
        hang = self._watch.hung() if self._watch is not None else None
        if hang is None:
            return None
        message = hang.message
        file = self._plan.scratch.parent / "stacks.txt"
        with contextlib.suppress(OSError):
            file.write_text(hang.stacks, encoding="utf-8")
            message += f"\n  all stacks: {file}"
        return Word(self._place.node_rank, -1, 1, message)

    def _lost(self) -> Word | None:
        try:
            lost = self._meeting.lost()
        except LostError:
            lost = [0]
        return self._not_answering(lost) if lost else None

    def _not_answering(self, machines: Sequence[int]) -> Word:
        if 0 in machines:
            self._remaining_restarts = 0  # the store is gone with it
        names = " and ".join(f"machine {machine}" for machine in machines)
        verb = "does" if len(machines) == 1 else "do"
        return Word(self._place.node_rank, -1, LOST_CODE, f"{names} {verb} not answer")

    def _fail(self, word: Word) -> Any:
        """Ends this machine's ranks and lets torch's agent start them again, if that may help."""
        if self._meeting.machines[0] == self._place.node_rank:
            self._let_rank_0_save()
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGKILL)
        if word.of_another:
            said = self._meeting.posted(_WORD_S)
            silent = self._meeting.silent()
            word = said or (self._not_answering(silent) if silent else word)
        else:
            self._meeting.post(word)
        if word.final:
            self._remaining_restarts = 0
        self.failure = word
        self._reason = word.message if word.rank < 0 else f"rank {word.rank} failed: {word.message}"
        return RunResult(state=WorkerState.FAILED)

    def _let_rank_0_save(self) -> None:
        """Waits while a checkpoint is being written, and a moment for rank 0 to end by itself.

        It does when its next collective fails, behind its last write.
        """
        process = self._worker_group.workers[0].id
        started = time.monotonic()
        while _exit_code(process) is None:
            waited = time.monotonic() - started
            if waited > (_WRITE_S if self._plan.is_saving() else _NOTICE_S):
                return
            time.sleep(0.05)

    def whereabouts(self) -> str:
        """Where the ranks of this machine are now, a line each."""
        return "\n".join(map(str, self._watch.where())) if self._watch is not None else ""


def run(plan: Plan, place: Place, meeting: Meeting) -> Outcome:
    """Runs ``plan.command`` once per rank of this machine and waits for all of them.

    Args:
        plan: what they are to do.
        place: where the ranks are.
        meeting: the rendezvous with the other machines, which is ended.

    Raises:
        UserError: the machines did not find one another in time, or are not of one run.
    """
    _silence()
    os.environ.update({**plan.environment, **_signals(), FAILURES_VARIABLE: str(plan.scratch)})
    spec = WorkerSpec(
        role="default",
        local_world_size=place.processes,
        entrypoint=plan.command[0],
        args=tuple(plan.command[1:]),
        rdzv_handler=meeting,
        max_restarts=plan.max_restarts,
        monitor_interval=0.1,
        master_addr=place.master_addr,
        master_port=place.master_port,
    )
    agent = _Agent(spec, plan, place, meeting)
    before = signal.signal(signal.SIGUSR2, lambda *_: print(agent.whereabouts(), flush=True))
    try:
        result = agent.run()
    except SignalException as stopped:
        meeting.leave()
        failure = _first_failure(plan.scratch, {}, place.node_rank)
        if failure is not None and failure.of_another:
            failure = None  # a rank that had no handler yet ended by the signal
        return Outcome(failure, int(stopped.sigval), agent.started)
    except (LostError, RendezvousClosedError, DistError):
        meeting.leave()
        return Outcome(_last_word(agent, meeting, place), None, agent.started)
    finally:
        signal.signal(signal.SIGUSR2, before)
    meeting.shutdown()
    failed = result is not None and result.is_failed()
    return Outcome(agent.failure if failed else None, None, agent.started)


def _last_word(agent: _Agent, meeting: Meeting, place: Place) -> Word:
    """Why the ranks could not be started again."""
    said = meeting.posted(0)
    if said is not None and said.final:
        return said
    before = f", after this: {agent.failure.message}" if agent.failure else ""
    own = f"machine {place.node_rank} did not meet the others again"
    what = "machine 0 does not answer" if meeting.is_lost else own
    return Word(place.node_rank, -1, LOST_CODE, f"{what}{before}")


def _signals() -> dict[str, str]:
    """What torch's agent passes on; it would end a run under nohup when the terminal goes."""
    names = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append("SIGHUP")
    return {"TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(names)}


def _first_failure(directory: Path, codes: Mapping[int, int], machine: int) -> Word | None:
    """The failure that came first.

    A rank that a signal killed leaves no word and is the cause when there is one: the others then
    fail because their peer is gone.
    """
    words = read_words(directory)
    for rank, code in sorted(codes.items()):
        if rank not in words:
            return Word(machine, rank, code, _describe(code))
    if not words:
        return None
    rank, word = min(words.items(), key=lambda item: (item[1].of_another, item[1].time))
    return Word(machine, rank, word.code, word.message, word.traceback, word.final, word.of_another)


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
