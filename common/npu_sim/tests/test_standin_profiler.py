"""torch_npu.profiler of the stand-in: schedule, files, what it makes of wrong arguments."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the stand-in: python -m npu_sim pytest", allow_module_level=True)

from torch_npu import profiler

pytestmark = pytest.mark.device

ACTION = profiler.ProfilerAction


def run(directory: Path, steps: int, **options: object) -> None:
    handler = profiler.tensorboard_trace_handler(str(directory), worker_name="rank0")
    with profiler.profile(on_trace_ready=handler, **options) as profile:
        for _ in range(steps):
            torch.ones(4, 4, device="npu") @ torch.ones(4, 4, device="npu")
            profile.step()


def test_schedule() -> None:
    schedule = profiler.schedule(wait=1, active=2, warmup=1, repeat=2, skip_first=1)
    names = [schedule(step).name for step in range(11)]
    cycle = ["NONE", "WARMUP", "RECORD", "RECORD_AND_SAVE"]
    assert names == ["NONE", *cycle, *cycle, "NONE", "NONE"]
    # Its positional order is not torch's.
    assert (profiler.schedule(1, 2, 3).active, profiler.schedule(1, 2, 3).warmup) == (2, 3)
    at_once = profiler.schedule(wait=3, active=1, warmup=1, skip_first_wait=1)
    assert at_once(0) is ACTION.WARMUP
    with pytest.raises(ValueError, match="must be not less than 0"):
        schedule(-1)


def test_files(tmp_path: Path) -> None:
    schedule = profiler.schedule(wait=1, active=2, warmup=1, repeat=1)
    run(tmp_path, 6, schedule=schedule, record_shapes=True)
    (directory,) = tmp_path.iterdir()
    assert re.fullmatch(rf"rank0_{os.getpid()}_\d{{17}}_ascend_pt", directory.name)
    events = json.loads((directory / "ASCEND_PROFILER_OUTPUT" / "trace_view.json").read_text())
    names = [event.get("name") for event in events]
    assert names.count("aten::mm") == 2
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= set(names)
    assert "ProfilerStep#1" not in names
    information = json.loads((directory / "profiler_info.json").read_text())
    assert information["torch_npu_version"] == "2.14.0+simulated"
    assert information["config"]["common_config"]["record_shapes"] is True
    assert "trace_id" in json.loads((directory / "profiler_metadata.json").read_text())


def test_each_cycle_is_a_recording(tmp_path: Path) -> None:
    run(tmp_path, 6, schedule=profiler.schedule(wait=0, active=2, warmup=1, repeat=0))
    traces = list(tmp_path.glob("*_ascend_pt/ASCEND_PROFILER_OUTPUT/*.json"))
    assert len(traces) == 2


def test_without_a_schedule_all_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 3)
    (trace,) = tmp_path.glob("*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json")
    names = [event.get("name") for event in json.loads(trace.read_text())]
    assert names.count("aten::mm") == 3
    assert "RECORD followed by stop" in capsys.readouterr().out


def test_a_run_that_ends_while_warming_up_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 1, schedule=profiler.schedule(wait=1, active=2, warmup=1))
    assert list(tmp_path.iterdir()) == []
    assert "WARMUP followed by stop" in capsys.readouterr().out


def test_traces_can_be_left_unwritten(tmp_path: Path) -> None:
    handler = profiler.tensorboard_trace_handler(str(tmp_path), analyse_flag=False)
    with profiler.profile(on_trace_ready=handler) as profile:
        torch.ones(2, device="npu")
        profile.step()
    (directory,) = tmp_path.iterdir()
    assert not (directory / "ASCEND_PROFILER_OUTPUT").exists()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    assert json.loads((tmp_path / "trace.json").read_text())


def test_an_error_is_a_line_in_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(profile: object) -> None:
        raise OSError("disk full")

    profiler.tensorboard_trace_handler(str(tmp_path))
    with profiler.profile(on_trace_ready=broken):
        torch.ones(2, device="npu")
    assert "[ERROR]" in (out := capsys.readouterr().out) and "disk full" in out


def test_without_a_handler_no_directory_stays(tmp_path: Path) -> None:
    profiler.tensorboard_trace_handler(str(tmp_path / "runs"))
    with profiler.profile() as profile:
        torch.ones(2, device="npu")
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    assert json.loads((tmp_path / "trace.json").read_text())
    assert list((tmp_path / "runs").iterdir()) == []


def test_wrong_keywords_are_refused() -> None:
    for function, keyword in (
        (profiler.profile, "profile_memroy"),
        (profiler._ExperimentalConfig, "level"),
        (profiler.schedule, "warm_up"),
        (profiler.tensorboard_trace_handler, "use_gzip"),
    ):
        with pytest.raises(TypeError, match=keyword):
            function(**{keyword: 1})
    with pytest.raises(TypeError, match="positional"):
        profiler.profile([profiler.ProfilerActivity.CPU])


def test_wrong_values_are_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    config = profiler._ExperimentalConfig(
        profiler_level="Level9", l2_cache=1, export_type=["csv"], aic_metrics="all"
    )
    out = capsys.readouterr().out
    for name in ("profiler_level", "l2_cache", "export_type", "aic_metrics"):
        assert f"Invalid parameter {name}" in out
    assert config.export_type == [profiler.ExportType.Text]
    # Counters need level 1.
    level0 = vars(profiler._ExperimentalConfig())
    level1 = vars(profiler._ExperimentalConfig(profiler_level=profiler.ProfilerLevel.Level1))
    assert level0["_aic_metrics"] == profiler.AiCMetrics.AiCoreNone
    assert level1["_aic_metrics"] == profiler.AiCMetrics.PipeUtilization
    profiler.schedule(wait=-1, active=0)
    assert "reset it to 1" in capsys.readouterr().out
    assert profiler.supported_activities() == set(profiler.ProfilerActivity)
    assert profiler.supported_export_type() == {"db", "text"}
    assert len(profiler.supported_ai_core_metrics()) == 9
    assert len(profiler.supported_profiler_level()) == 4
