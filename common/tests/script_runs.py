"""What the tests of all models' scripts share: whole runs, their reports, and bad input."""

import os
import pickle
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from detector_runs import (
    ABSENT,
    DEVICE,
    JSON,
    Answer,
    Case,
    assert_refused,
    assert_same_weights,
    detections_of,
    draw_coco,
    losses_of,
    report_of,
    result_of,
    run_cases,
    run_command,
    run_script,
    snapshot,
)

LAST_CHECKPOINT = Path("checkpoints") / "last.pth"

# ---------------------------------------------------------------------------- runs


def run_successfully(
    model: Path, run: str, *words: str | Path, cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script of a model's test/ that has to end well; ``more`` is as in run_script."""
    done = run_script(model, run, *words, cwd=cwd, **more)
    assert done.returncode == 0, done.stderr
    return done


def log_of(output: Path) -> str:
    return (output / "train_0.log").read_text()


def assert_same_run(one: Path, other: Path) -> None:
    """Two outputs have the same losses, weights and scores, to the last bit."""
    assert losses_of(one) == losses_of(other)
    assert_same_weights(one / LAST_CHECKPOINT, other / LAST_CHECKPOINT)
    assert result_of(one)["metrics"] == result_of(other)["metrics"]


def assert_same_detections(one: Path, other: Path) -> None:
    """Two evaluations found the same objects, more than a few, and score alike."""
    found = detections_of(one)
    assert len(found) > 4
    assert found == detections_of(other)
    assert result_of(one)["metrics"] == result_of(other)["metrics"]


def assert_performance_only(
    done: subprocess.CompletedProcess[str], output: Path, *, steps: int
) -> None:
    """A performance run tells its speed and has no score."""
    assert "Final Performance images/sec : " in done.stdout
    result = result_of(output)
    assert (result["steps"], result["metric"], result["metrics"]) == (steps, None, {})


def assert_full_disk_keeps_the_checkpoint(
    model: Path, output: Path, *words: str, report: str, kilobytes: int
) -> None:
    """A run that goes on in ``output`` fails as it saves, and what was saved stays.

    Args:
        model: the model's directory.
        output: holds a checkpoint.
        words: options of train_full_1p.
        report: the name of the run's report.
        kilobytes: how large a file may grow: logs fit, a checkpoint does not.
    """
    before = (output / LAST_CHECKPOINT).read_bytes()
    limited = f'ulimit -f {kilobytes}; exec bash "$@"'
    run = model / "test" / "train_full_1p.sh"
    command = ["bash", "-c", limited, "_", run, *words, f"--output_dir={output.name}"]
    done = run_command(command, output.parent)
    assert done.returncode == 1, done.stderr
    assert "Cannot write the checkpoint" in done.stderr and "File too large" in done.stderr
    assert (output / LAST_CHECKPOINT).read_bytes() == before
    assert report_of(output, report)["Status"] == "failed"


# ---------------------------------------------------------------------------- bad input


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def write_bad_weights(at: Path, trained: Path) -> None:
    """The checkpoints of a run, and files beside them that cannot be used."""
    shutil.copytree(trained / "checkpoints", at, dirs_exist_ok=True)
    (at / "half.pth").write_bytes((at / "last.pth").read_bytes()[:9999])
    torch.save({"stem.conv.weight": torch.zeros(3, 3)}, at / "foreign.pth")
    evil = {"model": Evil(at / "ran")}
    (at / "evil.pkl").write_bytes(pickle.dumps(evil))
    torch.save(evil, at / "evil.pth")


def draw_bad_coco(at: Path) -> None:
    """A data set that can be used, coco, and three that cannot: half, damaged and bare."""
    for name in ("coco", "half", "damaged", "bare"):
        draw_coco(at / name)
    text = (at / "half" / JSON.format("train")).read_text()
    (at / "half" / JSON.format("train")).write_text(text[: len(text) // 2])
    damaged = [at / "damaged" / "train2017" / f"train {number}.jpg" for number in (1, 4)]
    for file in (*damaged, *(at / "damaged" / "val2017").iterdir()):
        file.write_bytes(b"no picture")
    shutil.rmtree(at / "bare" / "annotations")


def shared_bad_input(
    data: str, evaluation: str = "train_eval_1p", checkpoint: str = "--checkpoint"
) -> dict[str, Case]:
    """What all models refuse alike.

    Args:
        data: the name of a data set that can be used.
        evaluation: the script that evaluates.
        checkpoint: its option for the weights.
    """
    train, path = "train_full_1p", f"--data_path={{at}}/{data}"
    return {
        "checkpoint of another network": Case(
            evaluation,
            ["{recipe}", path, f"{checkpoint}={{at}}/foreign.pth"],
            ["foreign.pth holds weights of no kind that is known here"],
        ),
        # The launcher tells these before it starts a process.
        "no such data path": Case(
            train, ["{recipe}", "--data_path={at}/none"], ["'{at}/none' does not exist"]
        ),
        "data in the output": Case(
            train,
            ["{recipe}", path, "--output_dir={at}"],
            [f"{path} lies in --output_dir={{at}}"],
        ),
        "absent device": Case(
            train,
            ["{recipe}", path, f"--device={ABSENT}"],
            [f"Device {ABSENT} cannot be used"],
        ),
        "unknown option": Case(train, ["--frobnicate=1"], ["Unknown option '--frobnicate=1'"]),
        "truncated checkpoint": Case(
            evaluation, [path, f"{checkpoint}={{at}}/half.pth"], ["half.pth is truncated"]
        ),
        "evil .pkl to evaluate": Case(
            evaluation, [path, f"{checkpoint}={{at}}/evil.pkl"], ["evil.pkl"]
        ),
    }


def coco_bad_input(evaluation: str, last: str) -> dict[str, Case]:
    """What all detectors refuse of the data of :func:`draw_bad_coco`.

    Args:
        evaluation: the script that evaluates.
        last: its option with the weights of :func:`write_bad_weights`.
    """
    train = "train_full_1p"
    return {
        "truncated JSON": Case(
            train,
            ["{recipe}", "--data_path={at}/half"],
            ["instances_train2017.json ends in the mid"],
        ),
        "all held-out images damaged": Case(
            evaluation,
            ["{recipe}", "--data_path={at}/damaged", last],
            ["None of the images in val2017"],
        ),
        "no annotations": Case(
            train,
            ["{recipe}", "--data_path={at}/bare"],
            ["no annotations/instances_train2017.json"],
        ),
    }


# ---------------------------------------------------------------------------- contract


class ScriptContract:
    """What every model's scripts keep to; a test file has one class of it, with its own facts.

    The file has three fixtures: ``recipe``, the option that names a small config; ``trained``, the
    output of train_full_1p; and ``bad``, a directory with what ``bad_input`` speaks of.

    Attributes:
        model: the model's directory.
        network: its name in reports.
        batch_size: that of ``trained``.
        chance: by metric, what an untrained network scores less than.
        bad_input: the commands that are refused; {at} is ``bad``, {recipe} the option, and
            {server} an address with {port} at which nobody answers.
        leaves: new files in ``bad`` that tell the user what is wrong there.
    """

    model: ClassVar[Path]
    network: ClassVar[str]
    batch_size: ClassVar[int]
    chance: ClassVar[Mapping[str, float]]
    bad_input: ClassVar[Mapping[str, Case]]
    leaves: ClassVar[Sequence[str]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.bad_input)

    def test_the_smoke_run_scores_nothing_before_it_has_learned(self, tmp_path: Path) -> None:
        words = [f"--device={DEVICE}", "--max_steps=1", "--output_dir=out"]
        run_successfully(self.model, "train_smoke_1p", *words, cwd=tmp_path)
        metrics = result_of(tmp_path / "out")["metrics"]
        for name, score in self.chance.items():
            assert metrics[name] < score, metrics

    def test_the_report_has_the_names_and_keys_of_the_original(self, trained: Path) -> None:
        case = f"{self.network}_bs{self.batch_size}_1p_acc"
        rows = report_of(trained, case)
        assert list(rows) == [
            "Network",
            "RankSize",
            "BatchSize",
            "DeviceType",
            "CaseName",
            "ActualFPS",
            "TrainingTime",
            "TrainAccuracy",
            "ActualLoss",
            "E2ETrainingTime",
            "Status",
        ]
        assert (rows["Network"], rows["CaseName"]) == (self.network, case)
        assert (rows["BatchSize"], rows["RankSize"]) == (str(self.batch_size), "1")
        assert rows["Status"] == "completed"
        score = result_of(trained)["metric"]["value"]
        assert float(rows["TrainAccuracy"]) == pytest.approx(score, 1e-3)
        losses = (trained / f"train_{case}_loss.txt").read_text().split()
        assert [float(loss) for loss in losses] == pytest.approx(losses_of(trained), abs=1e-5)
        assert (trained / f"train_{case}_fps.log").is_file()

    @pytest.fixture(scope="class")
    @classmethod
    def before(cls, bad: Path) -> dict[str, bytes]:
        return snapshot(bad)

    @pytest.fixture(scope="class")
    @classmethod
    def refused(
        cls, bad: Path, before: object, recipe: str, tmp_path_factory: pytest.TempPathFactory
    ) -> dict[str, Answer]:
        """What each case led to."""
        with socket.socket() as closed:  # bound, so that nobody else can listen there
            closed.bind(("127.0.0.1", 0))
            port = str(closed.getsockname()[1])
            server = "http:" + f"//127.0.0.1:{port}"  # in two parts, since it is no public address
            names = {"at": str(bad), "recipe": recipe, "port": port, "server": server}
            return run_cases(cls.model, cls.bad_input, names, tmp_path_factory.mktemp("refused"))

    def test_bad_input_is_one_message_and_no_number(
        self, case: str, refused: dict[str, Answer]
    ) -> None:
        assert_refused(refused[case])
        assert "Traceback" not in refused[case].done.stderr

    def test_bad_input_costs_nobody_a_file_and_runs_no_code(
        self, bad: Path, before: dict[str, bytes], refused: object
    ) -> None:
        assert not (bad / "ran").exists()
        after = snapshot(bad)
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        assert changed == set(self.leaves), changed
