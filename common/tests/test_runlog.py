"""The record of a run and the reports made of it."""

import json
import time
from dataclasses import replace
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zoo_common import report
from zoo_common.runlog import RunLog, StepClock, StepRecord, duration, format_step

RECORD = StepRecord(
    step=20,
    total_steps=1000,
    epoch=0.5,
    images_seen=640,
    losses={"cls": 1.0, "box": 0.25},
    loss=1.25,
    lr=1e-3,
    images_per_sec=320.0,
    step_time_s=0.1,
    data_time_s=0.01,
    memory_mb=812.0,
    grad_norm=2.0,
    loss_scale=65536.0,
    skipped_steps=1,
    time=0.0,
)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_steps_and_scores_are_kept_and_shown(tmp_path: Path, capsys) -> None:
    log = RunLog(tmp_path, writes=True)
    log.step(RECORD)
    log.evaluation(20, 0.5, {"top1": 87.5}, 500, 2.0)
    log.close()
    assert lines(tmp_path / "metrics.jsonl")[0]["losses"] == {"cls": 1.0, "box": 0.25}
    assert lines(tmp_path / "evaluations.jsonl")[0]["metrics"] == {"top1": 87.5}
    out = capsys.readouterr().out
    assert "step   20/1000  epoch 0.50  loss 1.2500  cls 1.0000  box 0.2500" in out
    assert "top1 87.500" in out
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/loss")[0].value == 1.25
    assert board.Scalars("evaluation/top1")[0].step == 20


def test_what_a_model_watches_is_kept_and_shown(tmp_path: Path, capsys) -> None:
    log = RunLog(tmp_path, writes=True)
    log.step(replace(RECORD, values={"warmth": 4.5}))
    log.close()
    assert lines(tmp_path / "metrics.jsonl")[0]["values"] == {"warmth": 4.5}
    assert "lr 1.000e-03  warmth 4.5000  grad 2.00" in capsys.readouterr().out
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/warmth")[0].value == 4.5


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "out", writes=False)
    log.step(RECORD)
    log.evaluation(20, 0.5, {"top1": 87.5}, 500, 2.0)
    log.close()
    assert not (tmp_path / "out").exists()


def test_a_resumed_record_has_every_step_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, writes=True)
    for step in (10, 20, 30):
        log.step(replace(RECORD, step=step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4')  # what a kill in the middle of a line leaves
    log = RunLog(tmp_path, writes=True)
    log.continue_from(20)
    log.step(replace(RECORD, step=30))
    log.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [10, 20, 30]


def test_a_record_is_cut_where_its_checkpoint_was_though_step_numbers_fall(tmp_path: Path) -> None:
    def record(log: RunLog, *steps: int) -> None:
        for step in steps:
            log.step(replace(RECORD, step=step))
        log.evaluation(steps[-1], 0.5, {"top1": 87.5}, 500, 2.0)

    log = RunLog(tmp_path, writes=True)
    record(log, 10, 20, 30)
    at_30 = log.lines()
    record(log, 40)
    log = RunLog(tmp_path, writes=True)
    log.continue_from(30, 20, at_30)  # more images a step: step 30 is step 20 now
    record(log, 21, 25)
    at_25 = log.lines()
    record(log, 28)
    log = RunLog(tmp_path, writes=True)
    log.continue_from(25, 38, at_25)
    record(log, 39)

    steps = [line["step"] for line in lines(tmp_path / "metrics.jsonl")]
    assert steps == [10, 20, 30, 21, 25, 39]
    assert [line["step"] for line in lines(tmp_path / "evaluations.jsonl")] == [30, 25, 39]
    assert log.lines() == {"metrics.jsonl": 6, "evaluations.jsonl": 3}

    log.continue_from(26, 26, {"metrics.jsonl": 99, "evaluations.jsonl": 1})  # other files
    steps = [line["step"] for line in lines(tmp_path / "metrics.jsonl")]
    assert steps == [10, 20, 21, 25]
    log.close()


def test_a_line_for_people_has_no_empty_fields() -> None:
    plain = replace(
        RECORD, losses={"loss": 1.25}, grad_norm=None, loss_scale=1, images_per_sec=None
    )
    text = format_step(plain)
    assert "grad" not in text and "scale" not in text and "images/s" not in text
    assert text.endswith("eta 0:01:38")
    assert duration(3 * 86400 + 61) == "72:01:01"


def test_throughput_leaves_out_warmup_and_pauses() -> None:
    clock = StepClock(images_per_step=10, warmup_steps=2, synchronize=lambda: None)
    time.sleep(0.2)
    clock.tick()
    clock.tick()
    for _ in range(4):
        time.sleep(0.02)
        clock.tick()
        with clock.pause():
            time.sleep(0.1)
    measured = clock.throughput()
    assert measured is not None
    assert (measured.measured_steps, measured.warmup_steps) == (4, 2)
    assert 0.02 <= measured.step_time_s < 0.05
    assert measured.images_per_sec == 10 / measured.step_time_s
    assert clock.window()[0] < 0.09
    assert StepClock(10, 5, lambda: None).throughput() is None


RESULT = {
    "network": "Twins-ALTGVT-S",
    "kind": "acc",
    "status": "completed",
    "batch_size": 128,
    "world_size": 8,
    "metric": {"name": "top1", "value": 78.4314, "unit": "percent"},
    "throughput": {"images_per_sec": 2000.0, "step_time_s": 0.512},
    "final_loss": 2.5,
    "e2e_seconds": 61.4,
}


def test_reports_have_the_original_zoos_names_and_true_units(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"loss": 3.0, "images_per_sec": null}\n{"loss": 2.5, "images_per_sec": 2000.0}\n'
    )
    console = report.write(tmp_path, RESULT)
    name = "Twins-ALTGVT-S_bs128_8p_acc"
    rows = dict(row.split(" = ") for row in (tmp_path / f"{name}.log").read_text().splitlines())
    assert list(rows)[:5] == ["Network", "RankSize", "BatchSize", "DeviceType", "CaseName"]
    assert rows["RankSize"] == "8"
    assert rows["CaseName"] == name
    assert rows["ActualFPS"] == "2000.000"
    assert rows["TrainingTime"] == "512.000"  # 1,024 images at 2,000 a second
    assert rows["TrainAccuracy"] == "78.4314"
    assert rows["ActualLoss"] == "2.500000"
    assert rows["Status"] == "completed"
    assert (tmp_path / f"train_{name}_loss.txt").read_text() == "3.000000\n2.500000\n"
    assert console == [
        "------------------ Final result ------------------",
        "Final Performance images/sec : 2000.000",
        "Final Train Accuracy : 78.4314",
        "E2E Training Duration sec : 61",
    ]


def test_a_run_that_did_not_end_well_reports_no_number(tmp_path: Path) -> None:
    for status in ("failed", "interrupted"):
        assert report.write(tmp_path, {**RESULT, "status": status, "kind": "perf"}) == []
        text = (tmp_path / "Twins-ALTGVT-S_bs128_8p_perf.log").read_text()
        assert text.splitlines()[-1] == f"Status = {status}"
        assert "FPS" not in text and "Accuracy" not in text and "Time" not in text
