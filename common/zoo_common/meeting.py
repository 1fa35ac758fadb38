"""How the launchers of a run's machines meet, know of one another, and meet again.

Machine 0 has a store, on the given address and no other, that all launchers and ranks talk to.
A run of fixed size meets once, by the machines' numbers. Where machines may come and go, torch's
dynamic rendezvous says who takes part in a round; the ranks are then numbered by ``--node_rank``,
so that machine 0, which keeps record and checkpoints, always has rank 0.

Each launcher leaves a beat in the store every second. It is how a lost machine is told from a
slow one: a cut cable sends nothing, and the ranks' own sockets would wait for it for half an hour.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from zoo_common import same
from zoo_common.errors import UserError, first_line
from zoo_common.preflight import Place

T = TypeVar("T")

_BEAT_S = 1.0
_SKEW_S = 10.0  # torch's rendezvous compares the clocks of machines
_SILENT_S = 2.5  # a machine without a beat for so long is named as the one that may be gone
_REFUSAL = "refusal"
_POLL_S = 0.5
_ANSWER_S = 5.0  # for a word to or from a store that may be gone


class LostError(Exception):
    """Machine 0, with the store, is gone: nothing can be agreed any more."""


@dataclass(frozen=True)
class Word:
    """Why a run failed, as the launcher of the machine that failed tells the others.

    Attributes:
        machine: its number.
        rank: the failed rank, or -1 for the machine as a whole.
        code: exit code, or minus a signal's number.
        message: one line, or a few.
        traceback: the rank's, or an empty text.
        final: a restart would not help.
        of_another: it says only that another process is gone.
    """

    machine: int
    rank: int
    code: int
    message: str
    traceback: str = ""
    final: bool = False
    of_another: bool = False


class Meeting(RendezvousHandler):
    """The rendezvous of a run's launchers, as torch's agent wants one.

    Args:
        place: this machine's place, and how many others there may be.
        facts: what must be equal on all machines, see :mod:`zoo_common.same`.
        local_addr: this machine's address.
        join_timeout_s: seconds to wait for the others.
        last_call_s: seconds to wait for more than the fewest.
        lost_after_s: seconds without a beat after which a machine is lost.
        elastic: whether ranks may be started again, with other machines or without.

    Attributes:
        round: how many times ranks were started, over all machines.
        machines: numbers of the machines in this round, in order.
        is_lost: machine 0 did not answer any more.

    Raises:
        UserError: the port is taken, or machine 0 cannot be reached.
    """

    def __init__(
        self,
        place: Place,
        facts: Mapping[str, Any],
        *,
        local_addr: str,
        join_timeout_s: int,
        last_call_s: int,
        lost_after_s: int,
        elastic: bool,
    ) -> None:
        self.round = 0
        self.machines: list[int] = []
        self.is_lost = False
        self._place = place
        self._facts = dict(facts)
        self._join_timeout_s = join_timeout_s
        self._lost_after_s = lost_after_s
        self._pulse: _Pulse | None = None
        self._run_id = uuid.uuid4().hex if place.nnodes == 1 else "zoo"
        self._store = self._open_store(join_timeout_s, serve_at=_own_address(place, local_addr))
        # A connection that waits for an answer takes no other question.
        self._beats = self._open_store(lost_after_s)
        self._dynamic: RendezvousHandler | None = None
        if elastic:
            self._compare_clocks()
            self._compare_with_running()
            self._dynamic = self._torchs_rendezvous(local_addr, last_call_s)

    # ------------------------------------------------------------------ what torch's agent calls

    def get_backend(self) -> str:
        """A name for torch's own records."""
        return "zoo"

    @property
    def use_agent_store(self) -> bool:
        """The ranks use the launchers' store and make none of their own."""
        return True

    def get_run_id(self) -> str:
        """The same on all machines."""
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits for the other machines and numbers them.

        Raises:
            UserError: they did not come, or differ in what must be equal.
            LostError: machine 0 is gone.
        """
        place = self._place
        self._begin_pulse("meeting", [place.node_rank])
        self.machines, self.round = self._while_answered(self._meet)
        ask_waiting = self._dynamic.num_nodes_waiting if self._dynamic else None
        self._begin_pulse(str(self.round), self.machines, ask_waiting)
        return RendezvousInfo(
            PrefixStore(f"agent/{self.round}", self._store),
            self.machines.index(place.node_rank),
            len(self.machines),
            RendezvousStoreInfo(place.master_addr, place.master_port),
        )

    def num_nodes_waiting(self) -> int:
        """Machines that want to take part in the next round, as of the last beat."""
        return self._pulse.waiting if self._pulse else 0

    def is_closed(self) -> bool:
        """Whether there will be no further round."""
        return self._dynamic.is_closed() if self._dynamic else False

    def set_closed(self) -> None:
        """Says that there will be no further round."""
        if self._dynamic:
            self._dynamic.set_closed()  # type: ignore[no-untyped-call]

    def shutdown(self) -> bool:
        """Says that there will be no further round, if anybody can still be told."""
        self._stop_pulse()
        if self._dynamic is None or self._place.nnodes == 1 or self.is_lost:
            return True
        with suppress(TimeoutError, RendezvousError, DistError):
            return _within(_ANSWER_S, self._dynamic.shutdown)
        return False

    def leave(self) -> None:
        """Ends this machine's part; the others may go on without it."""
        self._stop_pulse()

    # ------------------------------------------------------------------ of one another

    def lost(self) -> list[int]:
        """Machines of which nothing was heard for the set time.

        Raises:
            LostError: machine 0 is one of them.
        """
        if self._pulse is None:
            return []
        silent = self._pulse.silent(self._lost_after_s)
        if 0 in silent or self._pulse.broken:
            self.is_lost = True
            raise LostError
        return silent

    def silent(self) -> list[int]:
        """Machines that miss their last beats: those that may be gone."""
        return self._pulse.silent(_SILENT_S) if self._pulse else []

    def post(self, word: Word) -> None:
        """Tells the others of a failure; the first word of a round stays."""
        if len(self.machines) > 1 and not self.is_lost:
            key, text = f"failure/{self.round}", json.dumps(asdict(word))
            with suppress(TimeoutError, DistError):
                _within(_ANSWER_S, lambda: self._store.compare_set(key, "", text))

    def posted(self, wait_s: float) -> Word | None:
        """What another machine said of this round's failure, if anything.

        Args:
            wait_s: seconds in which it may still say it.
        """
        if len(self.machines) < 2 or self._pulse is None or self.is_lost:
            return None
        key = f"failure/{self.round}"
        deadline = time.monotonic() + wait_s
        with suppress(TimeoutError, DistError):
            while True:
                if _within(_ANSWER_S, lambda: self._store.check([key])):
                    return Word(**json.loads(_within(_ANSWER_S, lambda: self._store.get(key))))
                if time.monotonic() > deadline:
                    break
                time.sleep(0.2)
        return None

    # ------------------------------------------------------------------ how

    def _open_store(self, timeout_s: float, *, serve_at: str | None = None) -> Store:
        address, port = self._place.master_addr, self._place.master_port
        # TCPStore's own server would listen on every address of the machine.
        descriptor = _listen(serve_at, port) if serve_at is not None else None
        try:
            return TCPStore(
                address,
                port,
                world_size=None,
                is_master=descriptor is not None,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                master_listen_fd=descriptor,
            )
        except DistError as error:
            raise UserError(self._did_not_meet(first_line(error))) from error

    def _while_answered(self, function: Callable[[], T]) -> T:
        """What a function gives that may wait for ever for machine 0's answer.

        Raises:
            LostError: machine 0 does not answer for the set time.
        """
        call = _Call(function)
        while not call.ended(_POLL_S):
            self.lost()
        return call.result()

    def _meet(self) -> tuple[list[int], int]:
        """The numbers of all machines that take part, in order, and the number of the round."""
        joined, count, store = self._join()
        machines = self._introduce(joined, count, store)
        if machines[0] == self._place.node_rank:
            store.set("round", str(self._store.add("rounds", 1)))
        return machines, int(store.get("round"))

    def _join(self) -> tuple[int, int, Store]:
        """This machine's provisional number, the number of machines, and the round's own store."""
        if self._dynamic is None:
            return self._place.node_rank, self._place.nnodes, PrefixStore("meet", self._store)
        try:
            info = self._dynamic.next_rendezvous()
        except RendezvousClosedError:
            raise
        except (RendezvousError, DistError) as error:
            if self.round:
                raise LostError from error
            raise UserError(self._did_not_meet(first_line(error))) from error
        return info.rank, info.world_size, info.store

    def _introduce(self, joined: int, count: int, store: Store) -> list[int]:
        """The numbers of all machines in order, which have told one another what they are."""
        own = self._place.node_rank
        before = self.round if self._dynamic is None else 0
        if store.add(f"taken/{own}", 1) > before + 1:
            raise UserError(
                f"Another machine was started with --node_rank={own}: give each its own number, "
                "from 0."
            )
        store.set(f"machine/{joined}", json.dumps({"number": own, "facts": self._facts}))
        keys = [f"machine/{index}" for index in range(count)]
        patience_s = self._join_timeout_s if self._dynamic is None else self._lost_after_s
        deadline = time.monotonic() + patience_s
        while not store.check(keys):
            if store.check([_REFUSAL]):
                raise UserError(store.get(_REFUSAL).decode())
            if time.monotonic() > deadline:
                if self.round:
                    raise LostError
                absent = [i for i, key in enumerate(keys) if i != joined and not store.check([key])]
                names = " and ".join(f"machine {index}" for index in absent)
                raise self._refusal(store, self._did_not_meet(f"{names} did not come"))
            time.sleep(_POLL_S)
        found = [json.loads(store.get(key)) for key in keys]
        try:
            self._compare_facts({m["number"]: m["facts"] for m in found if m["number"] != own})
        except UserError as error:
            raise self._refusal(store, str(error)) from None
        return sorted(int(machine["number"]) for machine in found)

    def _refusal(self, store: Store, why: str) -> UserError:
        """The error that ends the meeting; the other machines are told why."""
        store.set(_REFUSAL, why)
        if self._place.node_rank == 0:
            time.sleep(4 * _POLL_S)  # for them to read it, while there is a store
        return UserError(why)

    def _compare_facts(self, others: Mapping[int, Mapping[str, Any]]) -> None:
        named = {f"machine {number}": facts for number, facts in others.items()}
        own = f"machine {self._place.node_rank}"
        difference = same.first_difference(self._facts, named, own=own)
        if difference is not None:
            raise UserError(difference)

    def _did_not_meet(self, why: str) -> str:
        place = self._place
        return (
            f"Machine {place.node_rank} waited {self._join_timeout_s} s for {place.machines} "
            f"machines at {place.master_addr}:{place.master_port} and did not find them all: start "
            "the run on each with its own --node_rank, and check that the address is reachable "
            f"({why})."
        )

    def _compare_clocks(self) -> None:
        """Torch's rendezvous takes a machine whose clock is behind for dead."""
        if self._place.node_rank == 0:
            clock = self._open_store(self._lost_after_s)

            def tell_time() -> None:
                with suppress(DistError, RuntimeError):
                    while True:
                        clock.set("clock", str(time.time()))
                        time.sleep(_BEAT_S)

            threading.Thread(target=tell_time, name="clock", daemon=True).start()
            return
        skew = time.time() - float(self._store.get("clock"))
        if abs(skew) > _SKEW_S:
            raise UserError(
                f"The clock of machine {self._place.node_rank} is {abs(skew):.0f} s "
                f"{'ahead of' if skew > 0 else 'behind'} that of machine 0: set the clocks of all "
                "machines by one time server."
            )

    def _compare_with_running(self) -> None:
        """A machine that comes to a run that is under way must fit it, or leave it alone."""
        key = "facts of machine 0"
        if self._place.node_rank == 0:
            self._store.set(key, json.dumps(self._facts))
        elif self._store.check(["rounds"]):
            self._compare_facts({0: json.loads(self._store.get(key))})

    def _torchs_rendezvous(self, local_addr: str, last_call_s: int) -> RendezvousHandler:
        # Else torch makes a store of its own beside ours, of which a machine that comes to a later
        # round is never told (seen with torch 2.14).
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint="",
            run_id=self._run_id,
            min_nodes=self._place.fewest,
            max_nodes=self._place.nnodes,
            local_addr=local_addr or self._place.master_addr,
            join_timeout=self._join_timeout_s,
            last_call_timeout=last_call_s,
            keep_alive_interval=max(1, self._lost_after_s // 3),
            keep_alive_max_attempt=3,
        )
        backend = C10dRendezvousBackend(self._store, self._run_id)
        return create_handler(self._store, backend, parameters)

    def _begin_pulse(
        self, name: str, machines: list[int], ask_waiting: Callable[[], int] | None = None
    ) -> None:
        self._stop_pulse()
        store = PrefixStore(f"beat/{name}", self._beats)
        self._pulse = _Pulse(store, self._place.node_rank, machines, ask_waiting)

    def _stop_pulse(self) -> None:
        if self._pulse is not None:
            self._pulse.stop()
            self._pulse = None


class _Pulse:
    """A thread that leaves this machine's beat and listens for the others'.

    All that it does may block for ever when a cable is cut; so it only leaves what it saw, and
    when.
    """

    def __init__(
        self,
        store: Store,
        own: int,
        machines: list[int],
        ask_waiting: Callable[[], int] | None,
    ) -> None:
        self.waiting = 0
        self.broken = False
        self._store = store
        self._own = own
        self._ask_waiting = ask_waiting
        # Time counts while somebody looks: a launcher that was stopped with its ranks, or a machine
        # that slept, does not take the pause for the others' silence.
        self._clock = 0.0
        self._looked = time.monotonic()
        self._answered = 0.0  # when machine 0 last told all beats
        self._counts = dict.fromkeys(machines, 0)
        self._heard = dict.fromkeys(machines, 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the beats; a thread that is stuck is left."""
        self._ended.set()
        self._thread.join(2 * _BEAT_S)

    def silent(self, seconds: float) -> list[int]:
        """The machines, but for this one, whose last beat is older.

        While machine 0 does not answer, nothing is known of the others.
        """
        now = time.monotonic()
        self._clock += min(now - self._looked, _BEAT_S)
        self._looked = now
        answered = self._answered
        if self._clock - answered > seconds:
            return [] if self._own == 0 else [0]
        return [m for m, heard in self._heard.items() if answered - heard > seconds]

    def _beat(self) -> None:
        try:
            while not self._ended.wait(_BEAT_S):
                for machine in self._counts:
                    count = self._store.add(str(machine), int(machine == self._own))
                    if count > self._counts[machine]:
                        self._counts[machine] = count
                        self._heard[machine] = self._clock
                self._answered = self._clock
                if self._ask_waiting is not None:
                    self.waiting = self._ask_waiting()
        except (RendezvousError, DistError, RuntimeError):
            self.broken = not self._ended.is_set()


def _own_address(place: Place, local_addr: str) -> str | None:
    """Where this machine's store listens, if it is the one that has it.

    ``--master_addr`` may be a virtual address, or a name that means something else on machine 0.
    """
    return (local_addr or place.master_addr) if place.node_rank == 0 else None


def _listen(address: str, port: int) -> int:
    """A socket that listens on one address only; its descriptor is the caller's.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--master_addr={address} cannot be used ({error.strerror}): give the address of "
            "machine 0."
        ) from error
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(where)
        server.listen(1024)
    except OSError as error:
        server.close()
        raise UserError(
            f"Machine 0 cannot listen on {address}, port {port} ({error.strerror}): --master_addr "
            "must be an address of machine 0, and --master_port a free port."
        ) from error
    return server.detach()


class _Call(Generic[T]):
    """A function's call in a thread of its own, where it may be stuck for ever."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._results: list[T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:
            self._failure = error

    def ended(self, seconds: float) -> bool:
        """Whether it ended; waits so long for it."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """What the function gave; raises what it raised."""
        if self._failure is not None:
            raise self._failure
        return self._results[0]


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The function's result, or a TimeoutError."""
    call = _Call(function)
    if not call.ended(seconds):
        raise TimeoutError
    return call.result()
