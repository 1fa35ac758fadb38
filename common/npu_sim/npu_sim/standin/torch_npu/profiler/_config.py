"""Settings of the profiler, with torch_npu's values and what it makes of wrong ones."""

from __future__ import annotations

import enum
import os
import time
import warnings


def warn(message: str) -> None:
    """Prints as torch_npu's profiler does, on rank 0."""
    if os.environ.get("TORCH_NPU_WARNING_DISABLE") == "1" or os.environ.get("RANK", "0") != "0":
        return
    say("WARNING", message)


def say(level: str, message: str) -> None:
    """Prints a line of the profiler's log."""
    when = time.strftime("[%Y-%m-%d %H:%M:%S]")
    print(f"{when} [{level}] [{os.getpid()}] profiler.py: {message}", flush=True)


class ProfilerActivity(enum.Enum):
    """What is profiled."""

    CPU = 1
    NPU = 2

    def __str__(self) -> str:
        return f"ProfilerActivity.{self.name}"


class ProfilerLevel:
    """How much of the NPU is profiled."""

    Level0 = "Level0"
    Level1 = "Level1"
    Level2 = "Level2"
    Level_none = "Level_none"


class AiCMetrics:
    """Counters of the cores; one kind a run."""

    AiCoreNone = "ACL_AICORE_NONE"
    ArithmeticUtilization = "ACL_AICORE_ARITHMETIC_UTILIZATION"
    L2Cache = "ACL_AICORE_L2_CACHE"
    Memory = "ACL_AICORE_MEMORY_BANDWIDTH"
    MemoryAccess = "ACL_AICORE_MEMORY_ACCESS"
    MemoryL0 = "ACL_AICORE_L0B_AND_WIDTH"
    MemoryUB = "ACL_AICORE_MEMORY_UB"
    PipeUtilization = "ACL_AICORE_PIPE_UTILIZATION"
    ResourceConflictRatio = "ACL_AICORE_RESOURCE_CONFLICT_RATIO"


class ExportType:
    """How results are written."""

    Db = "db"
    Text = "text"


class HostSystem:
    """What of the host is profiled."""

    CPU = "cpu"
    DISK = "disk"
    MEM = "mem"
    NETWORK = "network"
    NUMA = "numa"
    OSRT = "osrt"


def _values(cls: type) -> set[str]:
    return {value for name, value in vars(cls).items() if not name.startswith("_")}


def supported_activities() -> set[ProfilerActivity]:
    """All activities."""
    return set(ProfilerActivity)


def supported_profiler_level() -> set[str]:
    """All levels."""
    return _values(ProfilerLevel)


def supported_ai_core_metrics() -> set[str]:
    """All kinds of counters."""
    return _values(AiCMetrics)


def supported_export_type() -> set[str]:
    """All ways to write results."""
    return _values(ExportType)


class _ExperimentalConfig:
    """Settings of the NPU's profiler; a wrong value is replaced with a warning, not refused."""

    def __init__(
        self,
        profiler_level: str = ProfilerLevel.Level0,
        aic_metrics: str = AiCMetrics.PipeUtilization,
        l2_cache: bool = False,
        msprof_tx: bool = False,
        mstx: bool = False,
        data_simplification: bool = True,
        record_op_args: bool = False,
        op_attr: bool = False,
        gc_detect_threshold: float | None = None,
        export_type: str | list[str] = ExportType.Text,
        host_sys: list[str] | None = None,
        mstx_domain_include: list[str] | None = None,
        mstx_domain_exclude: list[str] | None = None,
        sys_io: bool = False,
        sys_interconnection: bool = False,
    ) -> None:
        self._profiler_level = profiler_level
        self._aic_metrics = aic_metrics
        self._l2_cache = l2_cache
        self._msprof_tx = msprof_tx
        self._mstx = mstx
        self._data_simplification = data_simplification
        self.record_op_args = record_op_args
        self._op_attr = op_attr
        self._gc_detect_threshold = gc_detect_threshold
        self._export_type = [export_type] if isinstance(export_type, str) else export_type
        self._host_sys = host_sys or []
        self._mstx_domain_include = mstx_domain_include or []
        self._mstx_domain_exclude = mstx_domain_exclude or []
        self._sys_io = sys_io
        self._sys_interconnection = sys_interconnection
        self._check_switches()
        self._check_choices()

    @property
    def export_type(self) -> list[str]:
        """How results are written."""
        return self._export_type

    def _check_switches(self) -> None:
        switches = ("l2_cache", "msprof_tx", "mstx", "op_attr", "sys_io", "sys_interconnection")
        for name in (*switches, "record_op_args"):
            attribute = name if name == "record_op_args" else f"_{name}"
            if not isinstance(getattr(self, attribute), bool):
                warn(f"Invalid parameter {name}, which must be of bool type, reset it to False.")
                setattr(self, attribute, False)
        if not isinstance(self._data_simplification, bool | None):
            warn(
                "Invalid parameter data_simplification, which must be of bool type, "
                "reset it to default."
            )
            self._data_simplification = True
        if self._msprof_tx:
            warnings.warn(
                "The parameter msprof_tx will be deprecated. "
                "Please use the new parameter mstx instead.",
                stacklevel=4,
            )

    def _check_choices(self) -> None:
        if self._profiler_level not in supported_profiler_level():
            warn("Invalid parameter profiler_level, reset it to ProfilerLevel.Level0.")
            self._profiler_level = ProfilerLevel.Level0
        if self._aic_metrics not in supported_ai_core_metrics():
            warn("Invalid parameter aic_metrics, reset it to default.")
            self._aic_metrics = AiCMetrics.PipeUtilization
        shallow = self._profiler_level in (ProfilerLevel.Level0, ProfilerLevel.Level_none)
        if shallow and self._aic_metrics != AiCMetrics.AiCoreNone:
            warn(
                "Please use level1 or level2 if you want to collect aic metrics, "
                "reset aic metrics to None!"
            )
            self._aic_metrics = AiCMetrics.AiCoreNone
        if self._profiler_level == ProfilerLevel.Level_none and not (self._mstx or self._msprof_tx):
            self._mstx = True
            warn("Parameter mstx or msprof_tx must be True if profiler_level is set to Level_none.")
        wanted = self._export_type
        if not isinstance(wanted, list) or not wanted or set(wanted) - supported_export_type():
            warn("Invalid parameter export_type, reset it to text.")
            self._export_type = [ExportType.Text]
