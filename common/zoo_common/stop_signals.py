"""What a rank does when it is told to end: it saves first."""

import os
import signal
import time
from types import FrameType

from zoo_common.runlog import RunLog

# A second signal within so many seconds is the first one again; a person's Ctrl-C comes once.
_SAME_SIGNAL_S = 5.0
_SAME_INTERRUPT_S = 1.0


class StopSignals:
    """SIGTERM, SIGUSR1, SIGINT and SIGHUP ask for a checkpoint and an end.

    A second one ends at once, unless it comes right after the first: who ends a job may signal
    its launchers, which pass that on, and all its processes as well.

    SIGHUP, a lost terminal, is left alone where it is ignored: that is what nohup means.
    """

    def __init__(self, log: RunLog) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._log = log
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            same_s = _SAME_INTERRUPT_S if number == signal.SIGINT else _SAME_SIGNAL_S
            if time.monotonic() - self._received_at > same_s:
                os._exit(128 + number)
            return
        self.received, self._received_at = number, time.monotonic()
        self._log.say(f"{name}: saving a checkpoint after this step; a second one ends at once")
