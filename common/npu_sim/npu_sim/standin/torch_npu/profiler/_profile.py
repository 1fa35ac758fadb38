"""``torch_npu.profiler.profile`` over torch's profiler: its traces show the host only."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler.profiler import _KinetoProfile

from npu_sim.npu import _device, _lazy

from .. import version
from ._config import (
    ProfilerActivity,
    _ExperimentalConfig,
    say,
    supported_activities,
    warn,
)
from ._schedule import ProfilerAction, always


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """The profiler never stops a run: an error is a line in its log."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except Exception as error:
            say("ERROR", f"Call {function.__name__} failed. Exception: {error}")
            return None

    return call


class _Place:
    """Where results go; the handler of traces says it for the profiler of the process."""

    def __init__(self) -> None:
        self.directory: str | None = None
        self.worker: str | None = None

    def new(self) -> Path:
        """Makes the directory of one recording."""
        when = datetime.now().strftime("%Y%m%d%H%M%S%f")[:-3]
        name = f"{self.worker or socket.gethostname()}_{os.getpid()}_{when}_ascend_pt"
        path = Path(self.directory or os.environ.get("ASCEND_WORK_PATH") or Path.cwd()) / name
        path.mkdir(parents=True)
        return path


_place = _Place()


def _text(name: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    warn(f"Invalid parameter {name}, reset it to default.")
    return None


def tensorboard_trace_handler(
    dir_name: str | None = None,
    worker_name: str | None = None,
    analyse_flag: bool = True,
    async_mode: bool = False,
) -> Callable[[Any], None]:
    """For ``on_trace_ready``: writes ``<worker>_<pid>_<time>_ascend_pt`` below a directory.

    Args:
        dir_name: the directory; the current one by default.
        worker_name: the host's name by default.
        analyse_flag: False leaves the traces unwritten.
        async_mode: not looked at; traces are written at once.
    """
    _place.directory = _text("dir_name", dir_name)
    _place.worker = _text("worker_name", worker_name)

    def write(profiler: profile) -> None:
        if analyse_flag:
            profiler._write_trace()

    return write


class profile:  # noqa: N801 torch's name
    """Profiles steps of a run.

    Args:
        activities: host, NPU or both, which is the default.
        schedule: which steps are recorded; by default all.
        on_trace_ready: called with the profiler after each recording.
        record_shapes: shapes of operators' inputs.
        profile_memory: memory of tensors.
        with_stack: Python frames.
        with_flops: counts of operations.
        with_modules: names of modules.
        experimental_config: settings of the NPU's part.
        execution_trace_observer: started and stopped with the profiler.
        custom_trace_id_callback: gives the recording's id.
        use_cuda: not looked at.
    """

    def __init__(
        self,
        *,
        activities: Iterable[ProfilerActivity] | None = None,
        schedule: Callable[[int], Any] | None = None,
        on_trace_ready: Callable[..., Any] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        with_modules: bool = False,
        experimental_config: _ExperimentalConfig | None = None,
        execution_trace_observer: Any = None,
        custom_trace_id_callback: Callable[[], str] | None = None,
        use_cuda: bool | None = None,
    ) -> None:
        self.activities = set(activities) if activities else supported_activities()
        if not self.activities <= supported_activities():
            warn("Invalid activities, only CPU and NPU are supported, reset it to default.")
            self.activities = supported_activities()
        if schedule is not None and not callable(schedule):
            warn("schedule is not Callable, set by default.")
        if on_trace_ready is not None and not callable(on_trace_ready):
            warn("on_trace_ready is not Callable, set by default.")
        if use_cuda is not None:
            warn("This is npu environment, use_cuda is invalid")
        if not isinstance(experimental_config, _ExperimentalConfig | None):
            warn(
                "Parameter experimental_config is an instance of _ExperimentalConfig, "
                "reset it to default."
            )
            experimental_config = None
        self.record_steps = callable(schedule)
        self.schedule: Callable[[int], Any] = (
            schedule if schedule is not None and callable(schedule) else always
        )
        self.on_trace_ready = on_trace_ready if callable(on_trace_ready) else None
        self.experimental_config = experimental_config or _ExperimentalConfig()
        self.execution_trace_observer = execution_trace_observer
        self._trace_id_callback = custom_trace_id_callback
        self._options: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
            "with_flops": with_flops,
            "with_modules": with_modules,
        }
        self.metadata: dict[str, Any] = {}
        self.step_num = 0
        self.stopped = False
        self.current_action = self.schedule(0)
        self._path: Path | None = None
        self._trace_id = ""
        self._torch: _KinetoProfile | None = None
        self._step_mark: Any = None
        _lazy.lazy_init()

    @_quiet
    def __enter__(self) -> profile:
        self.start()
        return self

    @_quiet
    def __exit__(self, *error: object) -> None:
        self.stop()

    @_quiet
    def start(self) -> None:
        """Begins with step 0."""
        self.stopped = False
        self._change(ProfilerAction.NONE, self.current_action)
        self._mark_step()
        if self.execution_trace_observer is not None:
            self.execution_trace_observer.start()

    @_quiet
    def stop(self) -> None:
        """Ends; a recording that is not done is kept."""
        if self.stopped:
            return
        self._end_step()
        self._change(self.current_action, None)
        self.stopped = True
        if self.execution_trace_observer is not None:
            self.execution_trace_observer.stop()

    @_quiet
    def step(self) -> None:
        """Goes to the next step."""
        if self.stopped:
            warn("Profiler is stopped, step takes no effect!")
            return
        self._end_step()
        before = self.current_action
        self.step_num += 1
        self.current_action = self.schedule(self.step_num)
        self._change(before, self.current_action)
        self._mark_step()

    def _mark_step(self) -> None:
        if self.record_steps:
            self._step_mark = torch.profiler.record_function(f"ProfilerStep#{self.step_num}")
            self._step_mark.__enter__()

    def _end_step(self) -> None:
        if self._step_mark is not None:
            self._step_mark.__exit__(None, None, None)
            self._step_mark = None

    def _change(self, before: Any, after: Any) -> None:
        """Starts and stops recordings between two steps; ``after`` is None at the end."""
        recording = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
        if before in recording and (
            before == ProfilerAction.RECORD_AND_SAVE or after not in recording
        ):
            if before == ProfilerAction.RECORD:
                name = "stop" if after is None else after.name
                warn(f"Incorrect schedule: RECORD followed by {name}")
            self._end_recording()
            # A schedule that breaks off gives no trace, except at the end of the run.
            if self.on_trace_ready and (before == ProfilerAction.RECORD_AND_SAVE or after is None):
                self.on_trace_ready(self)
        if before == ProfilerAction.WARMUP and after in (None, ProfilerAction.NONE):
            name = "stop" if after is None else after.name
            warn(f"Incorrect schedule: WARMUP followed by {name}")
            self._remove_directory()
        if after in (*recording, ProfilerAction.WARMUP) and self._path is None:
            self._path = _place.new()
            self._trace_id = self._new_trace_id()
        if after in recording and self._torch is None:
            self._torch = _KinetoProfile(
                activities=[torch.profiler.ProfilerActivity.CPU], **self._options
            )
            self._torch.start()

    def _remove_directory(self) -> None:
        if self._path is not None:
            self._path.rmdir()
            self._path = None

    def _end_recording(self) -> None:
        assert self._torch is not None and self._path is not None
        if ProfilerActivity.NPU in self.activities:
            _device.synchronize()
        self._torch.stop()
        self._done, self._torch = self._torch, None
        self._done_path, self._path = self._path, None
        rank = os.environ.get("RANK")
        information = {
            "config": {
                "common_config": {
                    "activities": sorted(map(str, self.activities)),
                    **self._options,
                },
                "experimental_config": vars(self.experimental_config),
            },
            "end_info": {"collectionTimeEnd": time.time_ns()},
            "torch_npu_version": version.__version__,
        }
        name = "profiler_info.json" if rank is None else f"profiler_info_{rank}.json"
        self._write(name, information if rank is None else {**information, "rank_id": rank})
        self._write("profiler_metadata.json", {**self.metadata, "trace_id": self._trace_id})
        self.metadata.clear()
        if self.on_trace_ready is None:
            # Nobody is told of the directory; export_chrome_trace needs none.
            shutil.rmtree(self._done_path)

    def _write(self, name: str, document: Any) -> None:
        (self._done_path / name).write_text(json.dumps(document, indent=4))

    def _write_trace(self) -> None:
        output = self._done_path / "ASCEND_PROFILER_OUTPUT"
        output.mkdir(exist_ok=True)
        self._export(output / "trace_view.json")

    def _export(self, path: Path) -> None:
        with tempfile.TemporaryDirectory() as directory:
            chrome = Path(directory) / "trace.json"
            self._done.export_chrome_trace(str(chrome))
            events = json.loads(chrome.read_text())["traceEvents"]
        # torch_npu's file is the bare list of events.
        path.write_text(json.dumps(events))

    @_quiet
    def export_chrome_trace(self, output_path: str) -> None:
        """Writes the last recording's trace."""
        self._export(Path(output_path))

    @_quiet
    def export_stacks(self, output_path: str, metric: str = "self_cpu_time_total") -> None:
        """Writes the last recording's stacks for a flame graph."""
        if not self._options["with_stack"]:
            warn("Function export_stacks() requires with_stack=True.")
            return
        self._done.export_stacks(output_path, metric)

    @_quiet
    def export_memory_timeline(self, output_path: str, device: str | None = None) -> None:
        """Not simulated."""
        warn("npu_sim does not simulate export_memory_timeline.")

    def _new_trace_id(self) -> str:
        given = self._trace_id_callback() if callable(self._trace_id_callback) else None
        return given if isinstance(given, str) else f"{uuid.uuid4().int:032X}"

    @_quiet
    def set_custom_trace_id_callback(self, callback: Callable[[], str]) -> None:
        """Says what gives the next recordings' ids."""
        self._trace_id_callback = callback

    @_quiet
    def get_trace_id(self) -> str:
        """The recording's id."""
        return self._trace_id

    @_quiet
    def add_metadata(self, key: str, value: str) -> None:
        """Keeps a text with the recording."""
        if not (isinstance(key, str) and isinstance(value, str)):
            warn("The key and value of metadata must be string. Skip this metadata.")
            return
        self.metadata[key] = value

    @_quiet
    def add_metadata_json(self, key: str, value: str) -> None:
        """Keeps a JSON value with the recording."""
        try:
            self.metadata[key] = json.loads(value)
        except (TypeError, ValueError):
            warn("The metadata value must be json format string. Skip this metadata")

    @classmethod
    @_quiet
    def enable_profiler_in_child_thread(
        cls,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        with_modules: bool = False,
    ) -> None:
        """Nothing to do: torch's profiler sees all threads."""

    @classmethod
    @_quiet
    def disable_profiler_in_child_thread(cls) -> None:
        """Nothing to do."""
