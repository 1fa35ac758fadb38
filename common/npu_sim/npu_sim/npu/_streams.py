"""Streams and events: queues of work on a card, and marks in them."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any, NoReturn

import torch

from npu_sim import recorded
from npu_sim.npu import _lazy
from npu_sim.npu._device import Device, device_context, index_of
from npu_sim.npu._errors import ErrCode, pta_error


class Stream(torch.Stream):
    """A queue of work on one card.

    Args:
        device: the card; None means the current one.
        priority: lower numbers go first; the simulator does not look at it.
        kwargs: ``stream_id``, ``device_index`` and ``device_type`` name an existing stream.
    """

    _priority: int

    def __new__(cls, device: Device = None, priority: int = 0, **kwargs: Any) -> Stream:
        _lazy.lazy_init()
        if kwargs:
            made: Stream = super().__new__(cls, **kwargs)
        else:
            index = index_of(device, optional=True)
            made = super().__new__(cls, torch.device("npu", index), priority=priority)
        made._priority = priority
        return made

    @property
    def priority(self) -> int:
        """What it was made with."""
        return self._priority

    @staticmethod
    def priority_range() -> NoReturn:
        """Refused, as by torch_npu."""
        raise RuntimeError(
            "NPU does not support Stream.priority_range() currently."
            + pta_error(ErrCode.NOT_SUPPORT)
        )

    @property
    def npu_stream(self) -> int:
        """The stream's handle."""
        return self.stream_id

    def wait_event(self, event: torch.Event) -> None:
        """Lets what is queued from now on wait for an event."""
        event.wait(self)

    def wait_stream(self, stream: torch.Stream) -> None:
        """Lets what is queued from now on wait for what another stream has queued."""
        self.wait_event(stream.record_event())

    def record_event(self, event: torch.Event | None = None) -> torch.Event:
        """Puts a mark, a new one unless given, behind what is queued."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all of its work is done."""
        return super().query()

    def synchronize(self) -> None:
        """Waits until all of its work is done."""
        super().synchronize()

    def set_data_preprocess_stream(self, is_data_preprocess_stream: bool = False) -> None:
        """A hint for the scheduler of real cards."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((self.npu_stream, self.device))

    def __repr__(self) -> str:
        return f"<torch_npu.npu.Stream device={self.device} npu_stream={self.npu_stream:#x}>"


class Event(torch.Event):
    """A mark in a stream.

    Args:
        enable_timing: lets :meth:`elapsed_time` be asked.
        blocking: whether a wait blocks the thread.
        interprocess: not simulated.
    """

    _timed: bool
    # torch compares events of its own class only, so the mark itself is one.
    _mark: torch.Event

    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> Event:
        if interprocess:
            raise recorded.refusal("events between processes")
        event: Event = super().__new__(cls, device="npu")
        event._timed = enable_timing
        event._mark = torch.Event("npu", enable_timing=enable_timing, blocking=blocking)
        return event

    @property
    def npu_event(self) -> int:
        """The event's handle, 0 before it is recorded."""
        return self._mark.event_id

    def record(self, stream: torch.Stream | None = None) -> None:
        """Puts the mark behind what a stream, by default the current one, has queued."""
        self._mark.record(current_stream() if stream is None else stream)

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Lets a stream, by default the current one, wait for the mark."""
        self._mark.wait(current_stream() if stream is None else stream)

    def query(self) -> bool:
        """Whether the work before the mark is done."""
        return self._mark.query()

    def synchronize(self) -> None:
        """Waits until the work before the mark is done."""
        self._mark.synchronize()

    def elapsed_time(self, end_event: Event) -> float:  # type: ignore[override]
        """Milliseconds between two recorded marks."""
        if not (self.npu_event and end_event.npu_event):
            raise RuntimeError(
                "Both events must be recorded before calculating elapsed time."
                + pta_error(ErrCode.INTERNAL)
            )
        if not (self._timed and end_event._timed):
            raise RuntimeError(
                "The time between two events needs enable_timing=True on both."
                + pta_error(ErrCode.ACL)
            )
        return self._mark.elapsed_time(end_event._mark)

    @classmethod
    def from_ipc_handle(cls, device: Device, handle: bytes) -> NoReturn:
        """Not simulated."""
        raise recorded.refusal("torch.npu.Event.from_ipc_handle")

    def ipc_handle(self) -> NoReturn:
        """Not simulated."""
        raise recorded.refusal("torch.npu.Event.ipc_handle")

    def recorded_time(self) -> NoReturn:
        """Not simulated."""
        raise recorded.refusal("torch.npu.Event.recorded_time")

    def reset(self) -> NoReturn:
        """Not simulated."""
        raise recorded.refusal("torch.npu.Event.reset")

    def __repr__(self) -> str:
        state = f"{self.npu_event:#x}" if self.npu_event else "uninitialized"
        return f"<torch_npu.npu.Event {state}>"


def _stream(stream: torch.Stream, stream_id: int) -> Stream:
    return Stream(
        stream_id=stream_id, device_index=stream.device_index, device_type=stream.device_type
    )


def current_stream(device: Device = None) -> Stream:
    """The stream that a card's work goes to."""
    _lazy.lazy_init()
    stream = torch._C._accelerator_getStream(index_of(device, optional=True))
    return _stream(stream, stream.stream_id)


def default_stream(device: Device = None) -> Stream:
    """The stream that a card's work goes to unless another is chosen."""
    _lazy.lazy_init()
    return _stream(torch._C._accelerator_getStream(index_of(device, optional=True)), 0)


def set_stream(stream: torch.Stream | None) -> None:
    """Chooses where a card's work goes from now on; None changes nothing."""
    if stream is not None:
        torch._C._accelerator_setStream(stream)


class StreamContext:
    """Chooses a stream, and its card, within a block; None changes nothing."""

    def __init__(self, stream_ctx: torch.Stream | None) -> None:
        self.stream = stream_ctx
        self._before = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self.stream is None:
            return
        # Undone in reverse: the stream of the chosen card first, then the card.
        self._before.enter_context(device_context(self.stream.device))
        self._before.callback(set_stream, current_stream(self.stream.device))
        set_stream(self.stream)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._before.close()


def stream(stream: torch.Stream | None) -> StreamContext:
    """See :class:`StreamContext`."""
    return StreamContext(stream)
