"""Reading training logs: every format, the ways in which logs break, and the command line."""

import gzip
import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo_common.errors import UserError
from zoo_common.logparse import FORMATS, Accuracy, LogSummary, parse
from zoo_common.logparse.lines import line_blocks

LOGS = Path(__file__).parent / "logs"
TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "tools/train_net.py", line 12, in main',
    "RuntimeError: out of memory",
]


def summary_of(lines: list[str], directory: Path, **options: int) -> LogSummary:
    path = directory / "some.log"
    path.write_text("\n".join(lines) + "\n")
    return parse(path, **options).summary


def lines_of(name: str) -> list[str]:
    return (LOGS / name).read_text().splitlines()


def test_every_format_is_told_by_its_content(tmp_path: Path) -> None:
    formats = {
        "coco_evaluation.log": "coco evaluation",
        "declip_upstream.log": "declip",
        "declip_zoo.log": "declip",
        "deit_svt_s.txt": "deit json",
        "detectron2_metrics.json": "detectron2 json",
        "detectron2_upstream.log": "detectron2",
        "detectron2_zoo.log": "detectron2",
        "glip_upstream.log": "maskrcnn_benchmark",
        "glip_zoo.log": "maskrcnn_benchmark",
        "mmdet2.log": "mmcv",
        "mmdet2.log.json": "openmmlab json",
        "mmengine.log": "mmengine",
        "mmengine_iter.log": "mmengine",
        "mmengine_scalars.json": "openmmlab json",
        "solov2_zoo.log": "mmcv",
        "twins_upstream.log": "twins",
        "twins_zoo.log": "twins",
        "run_completed": "zoo run",
    }
    assert set(formats.values()) == set(FORMATS), "every format has a log here"
    assert {p.name for p in LOGS.iterdir()} - set(formats) == {
        "README.md",
        "run_failed",
        "run_killed",
    }
    for number, (name, expected) in enumerate(formats.items()):
        path = LOGS / name
        if path.is_file():  # under a name that says nothing
            path = tmp_path / str(number)
            path.write_bytes((LOGS / name).read_bytes())
        summary = parse(path).summary
        assert summary.format == expected, name
        assert summary.torn_lines == 0, name


def test_glip_of_the_zoo() -> None:
    log = parse(LOGS / "glip_zoo.log")
    summary = log.summary
    assert (summary.status, summary.steps, summary.epochs) == ("completed", 40, None)
    # fps is that of all ranks; the first 20 steps are left out, the first takes 20 s
    assert summary.images_per_sec == pytest.approx(
        sum(8 / (0.8 + 0.01 * (n % 5)) for n in range(21, 41)) / 20, rel=1e-4
    )
    assert "20 lines, the first 20 steps left out" in summary.throughput_from
    assert summary.steps_per_sec == pytest.approx(1 / 0.82)
    assert summary.last_loss == 2.0
    assert summary.recent_loss == pytest.approx(2.095)
    # the dict has more digits than the table before it
    assert summary.accuracy["bbox/AP"] == Accuracy(0.42123451, "0-1")
    assert summary.accuracy["bbox/AP50"].value == 0.6343
    steps = list(log.steps())
    assert [step.step for step in steps] == list(range(1, 41))
    assert steps[0].losses.keys() == {"loss_reg", "loss_centerness", "loss_dot_product_token"}
    assert steps[0].losses["loss_centerness"] == 0.61
    assert (steps[0].loss, steps[0].lr, steps[0].step_time_s) == (2.39, 0.0001, 20.0)
    assert steps[0].images_per_sec == 0.4


def test_glip_upstream_has_no_batch_size_and_takes_one() -> None:
    summary = parse(LOGS / "glip_upstream.log").summary
    assert summary.images_per_sec is None
    assert summary.steps_per_sec == pytest.approx(1 / 1.5)
    assert "--batch" in summary.throughput_from
    summary = parse(LOGS / "glip_upstream.log", batch=64).summary
    assert summary.images_per_sec == pytest.approx(64 / 1.5)
    assert summary.throughput_from.startswith("batch 64 over mean of the seconds")
    assert (summary.status, summary.steps) == ("unfinished", 120)


def test_the_newer_print_of_a_result_dict(tmp_path: Path) -> None:
    lines = [line for line in lines_of("glip_zoo.log") if "Average Precision" not in line]
    old = next(line for line in lines if "OrderedDict" in line)
    new = old.split("OrderedDict")[0] + (
        "OrderedDict({'bbox': OrderedDict({'AP': 0.31, 'AP50': 0.5}), "
        "'segm': OrderedDict({'AP': 0.29, 'AP50': -1})})"
    )
    summary = summary_of([new if line == old else line for line in lines], tmp_path)
    assert {name: score.value for name, score in summary.accuracy.items()} == {
        "bbox/AP": 0.31,
        "bbox/AP50": 0.5,
        "segm/AP": 0.29,
    }


def test_detectron2_of_the_zoo() -> None:
    log = parse(LOGS / "detectron2_zoo.log")
    summary = log.summary
    assert (summary.status, summary.steps) == ("completed", 100)
    # eight processes print the same global rate, two of them on one line
    values = [121.905, 121.800, 121.910] + [121.8 + k / 100 for k in range(5)]
    assert summary.images_per_sec == pytest.approx(sum(values) / 8)
    assert "8 lines" in summary.throughput_from
    assert summary.steps_per_sec == pytest.approx(1 / 0.525), "the log's own total"
    # percentages become fractions; nan is none
    assert summary.accuracy["bbox/AP"] == Accuracy(pytest.approx(0.324312), "0-1")
    assert summary.accuracy["segm/AP"] == Accuracy(pytest.approx(0.297341), "0-1")
    first = next(log.steps())
    assert first.step == 20, "iterations count from 0 there"
    assert first.losses.keys() == {
        "loss_cls",
        "loss_box_reg",
        "loss_mask",
        "loss_rpn_cls",
        "loss_rpn_loc",
    }


def test_box_and_mask_precision_are_told_apart_in_cocos_table() -> None:
    summary = parse(LOGS / "coco_evaluation.log").summary
    assert summary.accuracy["bbox/AP"] == Accuracy(0.352, "0-1")
    assert summary.accuracy["segm/AP"] == Accuracy(0.318, "0-1")
    assert summary.accuracy["segm/AP50"].value == 0.531
    assert (summary.steps, summary.images_per_sec, summary.last_loss) == (None, None, None)


def test_detectron2_upstream() -> None:
    log = parse(LOGS / "detectron2_upstream.log", batch=16)
    # `time` is a mean over the run, so the last one counts, not the mean of the means
    assert log.summary.steps_per_sec == pytest.approx(1 / 0.5099)
    assert log.summary.images_per_sec == pytest.approx(16 / 0.5099)
    assert log.summary.status == "unfinished"
    assert next(step.lr for step in log.steps()) == pytest.approx(0.00038)


def test_detectron2s_first_line_without_learning_rate(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("[05/17 23:21:41 d2.utils.events]:  iter: 0  total_loss: 4.6  lr: N/A  \n")
    (step,) = parse(path).steps()
    assert (step.step, step.loss, step.lr, step.step_time_s) == (1, 4.6, None, None)


def test_detectron2s_json() -> None:
    summary = parse(LOGS / "detectron2_metrics.json").summary
    assert (summary.steps, summary.status) == (100, "unknown")
    assert summary.accuracy["segm/AP"] == Accuracy(pytest.approx(0.345), "0-1")


def test_solov2_of_the_zoo_prints_each_line_twice() -> None:
    log = parse(LOGS / "solov2_zoo.log")
    summary = log.summary
    assert (summary.status, summary.steps) == ("completed", 908)
    assert summary.epochs == pytest.approx(1 + 450 / 458)
    # the mean of six values, not their maximum, which is 40.1
    assert summary.images_per_sec == pytest.approx(
        (38.2 + 38.4 + 39.0 + 39.2 + 39.4 + 40.0) / 6, abs=0.2
    )
    assert "6 lines" in summary.throughput_from
    assert summary.repeated_lines == 18
    assert [step.step for step in log.steps()][:3] == [50, 100, 150]
    assert next(log.steps()).losses == {"loss_ins": 2.05, "loss_cate": 0.875}
    assert summary.accuracy["segm/AP"].value == 0.341


def test_mmdet2_and_its_validation_line() -> None:
    log = parse(LOGS / "mmdet2.log", batch=16)
    assert (log.summary.status, log.summary.steps) == ("unfinished", 350)
    assert log.summary.images_per_sec == pytest.approx(16 / 0.6), "the first line has warm-up in it"
    scores = {name: score.value for name, score in log.summary.accuracy.items()}
    assert scores["bbox/AP"] == 0.214 and scores["segm/AP"] == 0.198
    assert "bbox/APl" not in scores, "-1 means that there are no large objects"
    first = next(log.steps())
    assert first.lr == pytest.approx(1.978e-3)
    assert first.losses.keys() == {"loss_rpn_cls", "loss_rpn_bbox", "s0.loss_cls"}


def test_the_length_that_a_log_states_tells_whether_the_run_is_done(tmp_path: Path) -> None:
    lines = [re.sub(r"eta: [^,]*(?:, \d+:\d\d:\d\d)?, ", "", x) for x in lines_of("solov2_zoo.log")]
    assert summary_of(lines, tmp_path).status == "completed"
    longer = [line.replace("max: 2 epochs", "max: 3 epochs") for line in lines]
    assert summary_of(longer, tmp_path).status == "unfinished"
    last = "mmengine - INFO - Iter(train) [{}/50]  loss: 4.1"
    assert summary_of([last.format(40), last.format(50)], tmp_path).status == "completed"
    assert summary_of([last.format(20), last.format(30)], tmp_path).status == "unfinished"


def test_mmdets_json_does_not_say_how_long_an_epoch_is() -> None:
    log = parse(LOGS / "mmdet2.log.json")
    assert [step.step for step in log.steps()] == [50, 100, None, None]
    assert (log.summary.steps, log.summary.epochs) == (None, 2)
    assert log.summary.accuracy["bbox/AP"] == Accuracy(0.22, "0-1")


def test_mmengine() -> None:
    log = parse(LOGS / "mmengine.log")
    assert (log.summary.status, log.summary.steps, log.summary.epochs) == ("completed", 200, 1.0)
    assert log.summary.accuracy["bbox/AP75"] == Accuracy(0.395, "0-1")
    first = next(log.steps())
    assert (first.lr, first.step_time_s, first.epoch) == (0.01, 0.5, 0.25)
    summary = parse(LOGS / "mmengine_iter.log").summary
    assert (summary.steps, summary.epochs, summary.status) == (150, None, "unfinished")
    summary = parse(LOGS / "mmengine_scalars.json").summary
    assert (summary.steps, summary.steps_per_sec) == (200, pytest.approx(5.0))
    assert summary.accuracy["segm/AP"].value == 0.28


def test_declip_of_the_zoo() -> None:
    log = parse(LOGS / "declip_zoo.log")
    summary = log.summary
    assert (summary.status, summary.steps) == ("unfinished", 60)
    assert summary.images_per_sec == pytest.approx((1024 / 1.25 + 1024 / 1.35) / 2, rel=1e-3)
    assert summary.repeated_lines == 20, "a second handler prints them"
    assert summary.accuracy == {"top1": Accuracy(37.112, "%"), "top5": Accuracy(66.034, "%")}
    first = next(log.steps())
    assert first.losses["Clip Loss"] == 6.89 and first.losses["Simsiam Loss"] == -0.121
    assert (first.loss, first.lr, first.images_per_sec) == (8.29, 0.0001, 34.133)


def test_declips_performance_run_counts_from_0(tmp_path: Path) -> None:
    lines = [line.replace("Iter: [1/", "Iter: [0/") for line in lines_of("declip_zoo.log")[:2]]
    lines += [lines[1].replace("Iter: [0/", "Iter: [1/")]
    assert summary_of(lines, tmp_path).steps == 2


def test_declip_upstream_logs_every_hundredth_step() -> None:
    summary = parse(LOGS / "declip_upstream.log", batch=4096).summary
    assert (summary.status, summary.steps) == ("completed", 300)
    assert summary.images_per_sec == pytest.approx(4096 / 1.3), "the mean covers all steps"


def test_twins_of_the_zoo_with_wide_counters_and_days() -> None:
    log = parse(LOGS / "twins_zoo.log")
    summary = log.summary
    assert (summary.status, summary.steps, summary.epochs) == ("completed", 1251, 1.0)
    # zeros of the first 25 iterations do not count, [1000/1251] and `1 day, ` do
    expected = [2430, 2440, 2450, 2460, 2599, 2600, 2601, 2625]
    assert summary.images_per_sec == pytest.approx(sum(expected) / 8)
    assert summary.accuracy == {"top1": Accuracy(78.43, "%"), "top5": Accuracy(94.12, "%")}
    steps = {step.step: step for step in log.steps()}
    assert steps[1].images_per_sec is None and steps[31].images_per_sec == 2430
    assert steps[1001].loss == pytest.approx(4.9)
    assert steps[1].lr == 1e-6


def test_twins_upstream_and_its_log_txt() -> None:
    summary = parse(LOGS / "twins_upstream.log", batch=1024).summary
    assert (summary.steps, summary.images_per_sec) == (625 + 101, 2048.0)
    log = parse(LOGS / "deit_svt_s.txt")
    assert (log.summary.steps, log.summary.epochs, log.summary.status) == (None, 300, "unknown")
    assert log.summary.accuracy["top1"].value == pytest.approx(81.712)
    assert [step.epoch for step in log.steps()] == [1, 2, 3, 299, 300]
    assert next(log.steps()).lr == pytest.approx(1e-6)


# ---------------------------------------------------------------------------------------------
# This zoo's own records


def test_own_run_says_what_its_result_says() -> None:
    log = parse(LOGS / "run_completed")
    summary = log.summary
    assert (summary.status, summary.steps, summary.epochs) == ("completed", 100, 2.0)
    assert summary.images_per_sec == 163.5
    assert summary.throughput_from == "result.json: all ranks, steps 21 to 100"
    assert summary.accuracy == {"top1": Accuracy(87.25, "%"), "top5": Accuracy(99.0, "")}
    assert summary.last_loss == 1.2345
    first = next(log.steps())
    assert (first.step, first.loss, first.epoch) == (10, 2.15, 0.2)
    assert first.losses == {"loss_cls": 1.9, "loss_aux": 0.25}
    alone = parse(LOGS / "run_completed" / "result.json")
    assert alone.summary.images_per_sec == 163.5 and list(alone.steps()) == []


def test_a_failed_run_has_no_numbers() -> None:
    log = parse(LOGS / "run_failed")
    summary = log.summary
    assert (summary.status, summary.steps) == ("failed", 40)
    assert summary.images_per_sec is summary.steps_per_sec is summary.last_loss is None
    assert summary.recent_loss is None and summary.accuracy == {}
    assert summary.throughput_from == "none: the run failed"
    assert len(list(log.steps())) == 4, "what was logged can still be read"


def test_a_killed_run_is_unfinished_and_its_cut_last_line_is_left_out(tmp_path: Path) -> None:
    summary = parse(LOGS / "run_killed").summary
    assert (summary.status, summary.steps) == ("unfinished", 60)
    assert summary.images_per_sec == pytest.approx(145.0)
    assert summary.accuracy["top1"] == Accuracy(61.5, "")
    text = (LOGS / "run_killed" / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-200])
    summary = parse(tmp_path).summary
    assert (summary.steps, summary.torn_lines, summary.accuracy) == (50, 1, {})


def test_a_cut_result_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"status": "completed", "kind"')
    with pytest.raises(UserError, match=r"result\.json is no valid JSON"):
        parse(tmp_path)
    (tmp_path / "result.json").write_text('{"speed": 3}')
    with pytest.raises(UserError, match="no record of a run"):
        parse(tmp_path)


# ---------------------------------------------------------------------------------------------
# What broke the parsers of the original zoo

CLEAN = {
    "glip_zoo.log": "iter: ",
    "detectron2_zoo.log": "total_loss: ",
    "solov2_zoo.log": "Epoch [",
    "mmengine.log": "Epoch(train)",
    "declip_zoo.log": "Iter: [",
    "twins_zoo.log": "Epoch: [",
}


@pytest.mark.parametrize(("name", "mark"), CLEAN.items())
def test_lines_torn_by_other_ranks_give_no_wrong_number(
    name: str, mark: str, tmp_path: Path
) -> None:
    """Cuts a step line at every place, with a whole line of another rank in the gap."""
    steps = list(parse(LOGS / name).steps())
    source = [line for line in lines_of(name) if mark in line and "Total" not in line]
    victim, other, last = source[-3:]
    true = {step.step: step for step in steps}
    path = tmp_path / "torn.log"
    for cut in range(1, len(victim), 2):
        for middle in (other, "[W compiler_depend.ts:12] Warning: falls back to the CPU"):
            torn = [*source[:2], victim[:cut] + middle, victim[cut:], last]
            path.write_text("\n".join(torn) + "\n")
            log = parse(path)
            for step in log.steps():
                assert step == true[step.step], (cut, middle)
            assert log.summary.steps == steps[-1].step


def test_three_ranks_in_one_file(tmp_path: Path) -> None:
    """Rank 1 is late by a line, and rank 2's lines are torn by rank 0's."""
    clean = [line for line in lines_of("twins_zoo.log") if line.startswith("Epoch: [")][:-1]
    mixed: list[str] = []
    for number, line in enumerate(clean):
        mixed += [line[:50] + line, line[50:]]
        mixed += [clean[max(0, number - 1)].replace("loss: 6", "loss: 7")]
    summary = summary_of(mixed, tmp_path)
    expected = summary_of(clean, tmp_path)
    assert summary.images_per_sec == expected.images_per_sec
    assert (summary.steps, summary.last_loss) == (expected.steps, expected.last_loss)
    assert (summary.repeated_lines, summary.restarts) == (len(clean), 0)


def test_a_cut_counter_is_no_restart(tmp_path: Path) -> None:
    lines = lines_of("glip_zoo.log")
    lines.insert(35, lines[30].replace("iter: 29", "iter: 2"))
    summary = summary_of(lines, tmp_path)
    assert (summary.steps, summary.restarts, summary.repeated_lines) == (40, 0, 0)
    assert summary.torn_lines == 1
    at_end = summary_of([*lines_of("glip_zoo.log"), lines[35]], tmp_path)
    assert (at_end.status, at_end.steps, at_end.torn_lines) == ("completed", 40, 1)


def test_a_log_with_several_runs_is_told_by_the_last(tmp_path: Path) -> None:
    """The original GLIP scripts append to the log of the run before."""
    first = lines_of("glip_zoo.log") + TRACEBACK
    second = [line.replace("fps: 1", "fps: 2") for line in lines_of("glip_zoo.log")[:38]]
    both = summary_of(first + second, tmp_path)
    alone = summary_of(second, tmp_path)
    assert (both.status, both.restarts) == ("unfinished", 1)
    assert both.images_per_sec == alone.images_per_sec
    assert (both.steps, both.last_loss, both.accuracy) == (alone.steps, alone.last_loss, {})
    assert both.recent_loss == alone.recent_loss


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    lines = lines_of("glip_zoo.log")
    summary = summary_of(lines[:30] + TRACEBACK + lines[15:], tmp_path)
    assert (summary.status, summary.steps, summary.restarts) == ("completed", 40, 1)
    assert "28 lines" in summary.throughput_from, "steps 21 to 28, and 21 to 40 again"


@pytest.mark.parametrize("name", ["glip_zoo.log", "detectron2_zoo.log", "twins_zoo.log"])
def test_a_crash_is_failed_though_the_log_goes_on(name: str, tmp_path: Path) -> None:
    lines = lines_of(name)
    middle = 6
    summary = summary_of(lines[:middle] + TRACEBACK, tmp_path)
    assert summary.status == "failed"
    # one more line of rank 0 before it waits for the dead one for ever
    assert summary_of(lines[:middle] + TRACEBACK + lines[middle:][:1], tmp_path).status == "failed"
    # detectron2 prints its speed and its end after a crash as well
    end = [line for line in lines if "training time" in line.lower()]
    assert end and summary_of(lines[:middle] + TRACEBACK + end, tmp_path).status == "failed"


def test_a_traceback_that_the_run_survives_is_no_failure(tmp_path: Path) -> None:
    lines = lines_of("glip_zoo.log")
    assert summary_of(lines[:9] + TRACEBACK + lines[9:], tmp_path).status == "completed"


def test_other_ends(tmp_path: Path) -> None:
    lines = lines_of("twins_zoo.log")[:6]
    nan = "Loss is nan, stopping training"
    assert summary_of([*lines, nan], tmp_path).status == "failed"
    assert summary_of([*lines, *TRACEBACK[:2], "KeyboardInterrupt"], tmp_path).status == (
        "interrupted"
    )
    ctrl_c_after_crash = [*lines, *TRACEBACK, *TRACEBACK[:2], "KeyboardInterrupt"]
    assert summary_of(ctrl_c_after_crash, tmp_path).status == "failed"
    harmless = ["Exception ignored in: <function DataLoader.__del__>", *TRACEBACK]
    assert summary_of([*lines, *harmless], tmp_path).status == "unfinished"


def test_a_crash_before_the_first_step(tmp_path: Path) -> None:
    lines = ["[09/02 02:36:50 detectron2]: Rank of current process: 0. World size: 8", *TRACEBACK]
    summary = summary_of(lines, tmp_path)
    assert (summary.format, summary.status, summary.steps) == ("detectron2", "failed", None)
    assert summary.images_per_sec is None and summary.last_loss is None


@pytest.mark.parametrize(
    ("line", "expected", "scores"),
    [
        (
            "2022-03-04 06:00:27,958 - mmdet - INFO - Epoch(val) [12][14018]\tbbox_mAP: 0.2140, "
            "bbox_mAP_copypaste: 0.214 -1.000",
            "mmcv",
            {"bbox/AP": 0.214},
        ),
        ("Epoch(test) [13/13]  coco/bbox_mAP: 0.7460  time: 0.53", "mmengine", {"bbox/AP": 0.746}),
        ("2022-03-04 06:00:27,958 - mmcls - INFO - Start running", "mmcv", {}),
        ("06/11 11:48:55 - mmengine - INFO - Evaluating bbox...", "mmengine", {}),
        ("* Acc@1 82.346 Acc@5 95.982 loss 0.798", "twins", {"top1": 82.346, "top5": 95.982}),
        ('  "top1": 37.25,', "declip", {"top1": 37.25}),
        (
            "2019-07-23 00:55:27,879 maskrcnn_benchmark.inference INFO: "
            "OrderedDict([('segm', OrderedDict([('AP', 0.5)]))])",
            "maskrcnn_benchmark",
            {"segm/AP": 0.5},
        ),
        ("[05/17 23:21:41 d2.utils.events]:  iter: 0       lr: N/A  ", "detectron2", {}),
        (
            "[05/17 23:21:41 d2.engine]: OrderedDict([('bbox', {'AP': 37.5, 'AP50': nan})])",
            "detectron2",
            {"bbox/AP": 0.375},
        ),
        ('{"step": 1, "metrics": {"top1": 50.0}}', "zoo run", {"top1": 50.0}),
    ],
)
def test_a_log_without_a_training_step(
    line: str, expected: str, scores: dict[str, float], tmp_path: Path
) -> None:
    summary = summary_of(["loading", line], tmp_path)
    assert (summary.format, summary.steps, summary.last_loss) == (expected, None, None)
    assert {name: score.value for name, score in summary.accuracy.items()} == scores


def test_a_loss_that_is_nan_is_seen(tmp_path: Path) -> None:
    lines = lines_of("glip_upstream.log")[:2]
    lines.append(lines[-1].replace("iter: 20", "iter: 40").replace("loss: 2.9200", "loss: nan"))
    last = summary_of(lines, tmp_path).last_loss
    assert last is not None and math.isnan(last)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = (LOGS / "twins_zoo.log").read_bytes().splitlines()
    chinese = "警告：算子回退到 CPU 上执行".encode()
    lines = [line + b"\r 50%|=====     | 20/40 [00:01<00:01]" for line in lines]
    noise = [
        chinese,
        chinese.decode().encode("gbk"),
        b"\x00" * 4000,
        b"\xff\xfe\x80",
        b"10%\r20%\r",
    ]
    mixed = [part for line in lines for part in (line, *noise)]
    mixed[0] = b"\x00\x00\x00" + mixed[0]
    path.write_bytes(b"\r\n".join(mixed))
    assert parse(path).summary == parse(LOGS / "twins_zoo.log").summary


def test_gzip_and_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "train.log.gz"
    content = gzip.compress((LOGS / "mmdet2.log").read_bytes())
    path.write_bytes(content)
    assert parse(path).summary == parse(LOGS / "mmdet2.log").summary
    path.write_bytes(content[:-20])
    with pytest.raises(UserError, match="damaged gzip"):
        parse(path)


def test_a_line_without_an_end_needs_little_memory_and_time(tmp_path: Path) -> None:
    path = tmp_path / "log"
    endless = b"Epoch: [0]  [ 1/2]  eta: 0:00:01" + b"  loss: 1 (1)" * 400_000
    path.write_bytes(endless + b"\n" + (LOGS / "twins_zoo.log").read_bytes())
    for block in line_blocks(path):
        assert sum(map(len, block)) < 3e6 and max(map(len, block)) < 2e4
    start = time.process_time()
    summary = parse(path).summary
    assert (summary.steps, summary.status) == (1251, "completed")
    assert time.process_time() - start < 10


def test_random_damage_gives_a_summary_or_a_sentence(tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "log"
    files = [file for file in sorted(LOGS.rglob("*")) if file.is_file() and file.suffix != ".md"]
    for file in files * 4:
        content = bytearray(file.read_bytes())
        for _ in range(chance.randrange(1, 30)):
            place, start = chance.randrange(len(content) + 1), chance.randrange(len(content) + 1)
            length = chance.randrange(1, 200)
            piece = bytes(content[start : start + length])
            content[place : place + chance.choice((0, length))] = chance.choice(
                (piece, b"", b"0]", b"[" * length, b"9" * length * 30, b"\n", b"\xff")
            )
        path.write_bytes(content)
        try:
            log = parse(path)
        except UserError:
            continue
        assert log.summary.format in FORMATS
        for step in log.steps():
            assert step.step is None or step.step >= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"hello\nworld, loss: 3.0\n", "no known format"),
        (bytes(range(256)) * 5000, "no known format"),
        (b"PK\x03\x04" + b"\x00" * 100_000, "no known format"),
        (b'{"a": 1}\n', "no known format"),
        (b"[" * 1_000_000, "no known format"),
        ("\n".join(TRACEBACK).encode(), "it holds a Python traceback"),
    ],
)
def test_what_is_no_log_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        parse(path)
    assert str(path) in str(error.value)
    if "no known format" in message:
        assert all(name in str(error.value) for name in FORMATS)


def test_wrong_paths_and_batch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        parse(tmp_path / "nothing.log")
    with pytest.raises(UserError, match=r"no result\.json, metrics\.jsonl or train_0\.log"):
        parse(tmp_path)
    with pytest.raises(UserError, match="batch size must be 1 or more, not 0"):
        parse(LOGS / "glip_upstream.log", batch=0)


def test_a_directory_of_the_original_zoo(tmp_path: Path) -> None:
    text = (LOGS / "glip_zoo.log").read_text()
    (tmp_path / "train_0.log").write_text("\n".join(text.splitlines()[:30]))
    (tmp_path / "train_10.log").write_text("nothing to see\n")
    log = parse(tmp_path)
    assert (log.summary.status, log.summary.steps, len(list(log.steps()))) == ("unfinished", 28, 28)
    (tmp_path / "train_3.log").write_text("\n".join(TRACEBACK))
    assert parse(tmp_path).summary.status == "failed"


# ---------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "zoo_common.logparse", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return call


def squeeze(row: str) -> str:
    return " ".join(row.split())


def test_table(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run(LOGS / "solov2_zoo.log", LOGS / "run_completed", LOGS / "run_failed")
    assert (done.returncode, done.stderr) == (0, "")
    head, _, solo, good, bad = done.stdout.splitlines()
    assert squeeze(head) == "file format steps throughput last loss accuracy status"
    assert squeeze(solo).endswith("log mmcv 908 39.0 images/s 1.638 segm/AP 0.341 completed")
    assert squeeze(good).endswith("zoo run 100 163.5 images/s 1.234 top1 87.25 % completed")
    assert squeeze(bad).endswith("zoo run 40 - - - failed")


def test_json_and_a_bad_file_among_good_ones(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    bad = tmp_path / "empty file.log"
    bad.touch()
    nan = tmp_path / "nan.log"
    nan.write_text(
        "Epoch: [0]  [  0/10]  eta: 0:00:01  lr: 0.1  loss: nan (nan)  time: 0.5  data: 0.1\n"
    )
    done = run("--json", "--batch", "8", bad, nan, LOGS / "glip_upstream.log")
    assert done.returncode == 1
    assert done.stderr == f"error: {bad} is empty: the run wrote nothing to it yet\n"
    first, second, third = json.loads(done.stdout)
    assert first == {"file": str(bad), "error": f"{bad} is empty: the run wrote nothing to it yet"}
    assert second["last_loss"] == "nan" and second["images_per_sec"] == 16.0
    assert third["images_per_sec"] == pytest.approx(8 / 1.5)
    assert third["format"] == "maskrcnn_benchmark"


def test_a_bad_file_does_not_hide_the_good_ones_in_the_table(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run(tmp_path / "nothing", LOGS / "mmengine.log")
    assert done.returncode == 1
    assert "nothing cannot be read (No such file or directory)" in done.stderr
    assert "mmengine" in done.stdout and "Traceback" not in done.stderr


def test_help_and_import_need_no_torch(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "--batch" in done.stdout and "declip" in done.stdout
    code = "import sys, zoo_common.logparse.__main__; print({'torch', 'rich'} & {*sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout == "set()\n"
