"""The launcher as a user meets it: whole runs of the toy model directory in its own processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch

from zoo_common.launch import share_of_cores
from zoo_common.preflight import Place, network

TOY = Path(__file__).with_name("toy")
DEVICE = os.environ.get("ZOO_TEST_DEVICE", "cpu")
ABSENT = "cuda" if DEVICE == "npu" else "npu"  # a machine has one kind of card


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A copy of the toy model directory, in a path that quoting mistakes would break."""
    directory = tmp_path / "it's a; model"
    shutil.copytree(TOY, directory, ignore=shutil.ignore_patterns("__pycache__", "output"))
    return directory


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "zoo_common.launch", *words]


def launch(directory: Path, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*words),
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def result_of(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "checkpoints" / "last.pth", weights_only=True)["model"]


def test_a_run_leaves_what_the_original_zoo_leaves_and_a_record(toy: Path) -> None:
    done = launch(toy, "train_1p")
    assert done.returncode == 0, done.stderr
    output = toy / "test" / "output" / "0"
    assert [line["step"] for line in records(output / "metrics.jsonl")] == list(range(1, 9))
    result = result_of(output)
    assert result["status"] == "completed"
    assert (result["run"], result["kind"], result["network"]) == ("train_1p", "acc", "Toy")
    assert result["metric"]["name"] == "fit"
    assert result["throughput"]["warmup_steps"] == 2
    assert result["throughput"]["measured_steps"] == 6
    assert str(toy) not in (output / "result.json").read_text()
    report = (output / "Toy_bs4_1p_acc.log").read_text()
    assert report.splitlines()[-1] == "Status = completed"
    assert len((output / "train_Toy_bs4_1p_acc_loss.txt").read_text().splitlines()) == 8
    assert "step 8/8" in (output / "train_0.log").read_text()
    assert "step 8/8" in done.stdout
    fps = result["throughput"]["images_per_sec"]
    assert f"Final Performance images/sec : {fps:.3f}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("E2E Training Duration sec : ")


def test_a_second_run_moves_the_first_aside_and_performance_has_its_own_name(toy: Path) -> None:
    assert launch(toy, "train_1p", "--steps=2").returncode == 0
    done = launch(toy, "train_performance_2p")
    assert done.returncode == 0, done.stderr
    outputs = sorted(item.name for item in (toy / "test" / "output").iterdir())
    assert len(outputs) == 2
    assert (toy / "test" / "output" / outputs[1] / "Toy_bs4_1p_acc.log").is_file()
    output = toy / "test" / "output" / "0"
    rows = dict(
        row.split(" = ") for row in (output / "Toy_bs4_2p_perf.log").read_text().splitlines()
    )
    assert rows["RankSize"] == "2"
    assert rows["Status"] == "completed"
    result = result_of(output)
    step_time_s = result["throughput"]["step_time_s"]
    assert float(rows["ActualFPS"]) == pytest.approx(8 / step_time_s, rel=1e-3)
    assert (output / "train_1.log").is_file()


def test_the_caller_is_where_relative_paths_are_meant_from(toy: Path, tmp_path: Path) -> None:
    caller = tmp_path / "elsewhere"
    caller.mkdir()
    environment = {**os.environ, "ZOO_CALLER_DIR": str(caller)}
    done = subprocess.run(
        command("train_1p", "--output_dir", "my out", "--steps", "1"), cwd=toy, env=environment
    )
    assert done.returncode == 0
    assert result_of(caller / "my out")["status"] == "completed"


def test_the_environments_device_id_names_the_output(toy: Path) -> None:
    environment = {**os.environ, "ASCEND_DEVICE_ID": "3"}
    done = subprocess.run(command("train_1p", "--steps=1"), cwd=toy, env=environment)
    assert done.returncode == 0
    assert (toy / "test" / "output" / "3" / "train_3.log").is_file()


def test_a_rank_that_crashes_ends_the_run_with_its_own_words(toy: Path) -> None:
    started = time.monotonic()
    done = launch(toy, "train_2p", "fault.kind=crash", "fault.rank=1", "fault.step=3")
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "KeyError: 'the toy broke'"
    assert "rank 1 failed" in done.stderr
    assert 'raise KeyError("the toy broke")' in done.stderr
    output = toy / "test" / "output" / "0"
    report = (output / "Toy_bs4_2p_acc.log").read_text()
    assert report.splitlines()[-1] == "Status = failed"
    assert "FPS" not in report and "Accuracy" not in report
    assert result_of(output)["status"] == "failed"
    assert result_of(output)["throughput"] is None
    assert "Final" not in done.stdout


def test_a_rank_that_is_killed_is_told_apart_from_its_peers(toy: Path) -> None:
    done = launch(toy, "train_2p", "fault.kind=kill", "fault.rank=1")
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 failed: was killed by SIGKILL" in done.stderr


def test_the_crash_of_one_rank_ends_one_that_hangs_within_seconds(toy: Path) -> None:
    script = toy / "toy" / "train.py"
    script.write_text(
        script.read_text().replace(
            "    time.sleep(fault.step_time_s)\n",
            "    if rank == 0 and step == 2:\n        time.sleep(3600)\n",
        )
    )
    started = time.monotonic()
    done = launch(toy, "train_2p", "fault.kind=crash", "fault.rank=1", "fault.step=2")
    assert done.returncode == 1
    assert time.monotonic() - started < 60
    assert done.stderr.splitlines()[-1] == "KeyError: 'the toy broke'"


def test_a_users_mistake_in_a_rank_is_one_sentence(toy: Path) -> None:
    done = launch(toy, "train_1p", "fault.kind=user", "fault.step=1")
    assert done.returncode == 2
    assert done.stderr == "error: The toy was wound up wrongly: turn the key the other way.\n"


def test_a_full_card_is_one_sentence(toy: Path) -> None:
    done = launch(toy, "train_1p", "fault.kind=memory", "fault.step=2")
    assert done.returncode == 1
    assert done.stderr == (
        "rank 0 failed: The card has no memory for 2.50 GiB more: take a smaller --batch_size, or "
        "half precision with --amp=O1 or O2.\n"
    )


def test_a_loss_of_nan_stops_before_the_optimizer_and_names_the_images(toy: Path) -> None:
    done = launch(toy, "train_1p", "fault.kind=nan", "fault.step=5")
    assert done.returncode == 1
    assert "The loss is not finite (square=nan) on rank 0 at step 5" in done.stderr
    assert "point_4_0, point_4_1" in done.stderr
    assert "Traceback" not in done.stderr
    good = launch(toy, "train_1p", "--max_steps=4", "--output_dir=good")
    assert good.returncode == 0
    kept = weights_of(toy / "test" / "output" / "0")
    for key, value in weights_of(toy / "good").items():
        torch.testing.assert_close(kept[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("run", ["train_1p", "train_2p"])
def test_a_signal_saves_and_resuming_gives_the_same_weights(
    toy: Path, run: str, number: signal.Signals
) -> None:
    whole = launch(toy, run, "--steps=12", "--output_dir=whole")
    assert whole.returncode == 0, whole.stderr
    child = subprocess.Popen(
        command(run, "--steps=12", "--output_dir=cut", "fault.step_time_s=0.3"),
        cwd=toy,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for_step(child, toy / "cut" / "metrics.jsonl", 3)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert "saving a checkpoint after this step" in out
    assert f"stopped by {number.name}; continue with --resume" in err
    stopped = result_of(toy / "cut")
    assert stopped["status"] == "interrupted"
    assert stopped["metric"] is None
    assert 3 <= stopped["steps"] < 12
    resumed = launch(toy, run, "--steps=12", "--output_dir=cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for key, value in weights_of(toy / "whole").items():
        torch.testing.assert_close(weights_of(toy / "cut")[key], value, rtol=0, atol=0)
    steps = [line["step"] for line in records(toy / "cut" / "metrics.jsonl")]
    assert steps == list(range(1, 13))


def test_a_lost_terminal_stops_a_run_but_not_one_under_nohup(toy: Path) -> None:
    for prefix, code, status in (
        # The tests themselves may run under nohup.
        (["env", "--default-signal=HUP"], 128 + signal.SIGHUP, "interrupted"),
        (["nohup"], 0, "completed"),
    ):
        output = toy / f"out{code}"
        words = command("train_1p", "--steps=16", f"--output_dir={output}", "fault.step_time_s=0.2")
        child = subprocess.Popen(
            [*prefix, *words], cwd=toy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _wait_for_step(child, output / "metrics.jsonl", 3)
        child.send_signal(signal.SIGHUP)
        assert child.wait(timeout=60) == code
        assert result_of(output)["status"] == status


def test_a_run_outlives_the_reader_of_its_output(toy: Path) -> None:
    words = command("train_1p", "--steps=8", "fault.step_time_s=0.1")
    child = subprocess.Popen(words, cwd=toy, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    err = child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=60) == 0, err
    assert err == b""
    assert result_of(toy / "test" / "output" / "0")["status"] == "completed"


def test_a_disk_that_fills_is_told_in_a_sentence(toy: Path, tmp_path: Path) -> None:
    disk = tmp_path / "small disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk])
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        done = launch(toy, "train_2p", f"--output_dir={disk}/out", "--steps=2000")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "--resume" in done.stderr.splitlines()[-1]
    assert "Final" not in done.stdout


def test_a_killed_launcher_leaves_no_process(toy: Path) -> None:
    child = subprocess.Popen(
        command("train_2p", "--steps=500", "fault.step_time_s=0.2"),
        cwd=toy,
        stdout=subprocess.DEVNULL,
    )
    _wait_for_step(child, toy / "test" / "output" / "0" / "metrics.jsonl", 4)
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) >= 2
    child.kill()
    child.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, alive
    done = launch(toy, "train_2p", "--resume", "--steps=8")
    assert done.returncode == 0, done.stderr


def test_two_machines_form_one_run_and_resume_it(toy: Path, free_port: int) -> None:
    words = ["train_1p", "--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port}"]
    for more in (["--steps=4"], ["--steps=6", "--resume"]):
        second = subprocess.Popen(command(*words, *more, "--node_rank=1"), cwd=toy)
        first = launch(toy, *words, *more, "--node_rank=0")
        assert first.returncode == 0, first.stderr
        assert second.wait(timeout=60) == 0
    output = toy / "test" / "output" / "0"
    result = result_of(output)
    assert (result["world_size"], result["nnodes"], result["steps"]) == (2, 2, 6)
    assert (output.with_name("0_node1") / "train_1.log").is_file()
    whole = launch(toy, "train_2p", "--steps=6", "--output_dir=whole")
    assert whole.returncode == 0, whole.stderr
    for key, value in weights_of(toy / "whole").items():
        torch.testing.assert_close(weights_of(output)[key], value, rtol=0, atol=0)


def test_each_rank_has_its_own_parts_back(toy: Path, free_port: int) -> None:
    """Two processes, then three, then two on each of two machines."""

    def parts() -> list[float]:
        file = toy / "test" / "output" / "0" / "checkpoints" / "last.pth"
        saved = torch.load(file, weights_only=True)["rank_parts"]
        return [part["recent"]["mean"].item() for part in saved]

    assert launch(toy, "train_2p", "--steps=4").returncode == 0
    first, second = parts()
    assert first != second
    # No step is left, so what was read is written again.
    words = ["--processes=3", "--steps=4", "--resume"]
    done = launch(toy, "train_2p", *words)
    assert done.returncode == 0, done.stderr
    assert parts() == [first, second, first]
    assert "rank r of 3 has recent of rank r modulo 2" in done.stdout
    words = ["train_2p", "--steps=4", "--resume", "--nnodes=2", f"--master_port={free_port}"]
    words += ["--master_addr=127.0.0.1"]
    other = subprocess.Popen(command(*words, "--node_rank=1"), cwd=toy, stdout=subprocess.DEVNULL)
    done = launch(toy, *words, "--node_rank=0")
    assert done.returncode == 0, done.stderr
    assert other.wait(timeout=60) == 0
    assert parts() == [first, second, first, first]


def test_a_checkpoint_without_a_ranks_parts_is_told(toy: Path) -> None:
    assert launch(toy, "train_1p", "--steps=2").returncode == 0
    file = toy / "test" / "output" / "0" / "checkpoints" / "last.pth"
    content = torch.load(file, weights_only=True)
    del content["rank_parts"]  # as runs wrote them before there were such parts
    older = toy / "older.pth"
    torch.save(content, older)
    done = launch(toy, "train_1p", "--steps=4", "--resume=older.pth")
    assert done.returncode == 2
    assert "older.pth holds no state of recent: was it switched on?" in done.stderr


def test_a_signal_on_one_machine_stops_the_run_on_both(toy: Path, free_port: int) -> None:
    words = ["train_1p", "--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port}"]
    words += ["--local_addr=127.0.0.1", "--steps=400", "fault.step_time_s=0.2"]
    children = [
        subprocess.Popen(
            command(*words, f"--node_rank={node_rank}"), cwd=toy, stdout=subprocess.DEVNULL
        )
        for node_rank in (0, 1)
    ]
    try:
        _wait_for_step(children[0], toy / "test" / "output" / "0" / "metrics.jsonl", 3)
        children[1].send_signal(signal.SIGTERM)
        assert [child.wait(timeout=60) for child in children] == [128 + signal.SIGTERM] * 2
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert result_of(toy / "test" / "output" / "0")["status"] == "interrupted"


def test_local_addr_ties_the_collectives_to_its_network(monkeypatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("HCCL_IF_IP", "192.0.2.1")
    assert network("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}
    monkeypatch.delenv("HCCL_IF_IP")
    assert network("127.0.0.1") == {"HCCL_IF_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def test_a_machine_that_finds_no_other_says_so_in_time(toy: Path, free_port: int) -> None:
    words = ["train_1p", "--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port}"]
    for node_rank in (0, 1):
        done = launch(toy, *words, f"--node_rank={node_rank}", "launch.join_timeout_s=3")
        assert done.returncode == 2
        assert f"Machine {node_rank} waited 3 s for 2 machines" in done.stderr
        assert f"127.0.0.1:{free_port}" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train_3p"], "Toy has no run 'train_3p': did you mean train_2p?"),
        (["train_1p", "--stepz=3"], "did you mean --steps?"),
        (["train_1p", "--batch_size=0"], "--batch_size=0: data.batch_size must be at least 1"),
        (["train_1p", f"--device={ABSENT}"], f"Device {ABSENT} cannot be used: "),
        (["train_1p", "--device=tpu"], "--device=tpu is no device"),
        (["train_1p", "--output_dir=/proc/zoo"], "Cannot make the output directory /proc/zoo"),
        (["train_1p", "--weights=none.pth"], "weights: there is no checkpoint file"),
        (["train_1p", "--resume"], "--resume: there is no checkpoint in"),
        (["train_1p", "--resume=toy.yaml"], "toy.yaml is no PyTorch checkpoint"),
        (["train_1p", "--nnodes=2"], "needs --master_addr and --master_port"),
        (["train_1p", "--local_addr=203.0.113.9"], "--local_addr=203.0.113.9 is no address of"),
        (["train_1p", "--node_rank=1"], "--node_rank=1 must be below --nnodes=1"),
        (["train_sample_1p"], "The run needs a data set: give --data_path=DIR"),
        (["train_sample_1p", "--data_path=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_message_and_no_run(toy: Path, words: Sequence[str], said: str) -> None:
    done = launch(toy, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (toy / "test" / "output" / "0" / "config.yaml").exists()


def test_a_taken_port_is_told(toy: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launch(toy, "train_1p", f"--master_port={port}")
    assert done.returncode == 2
    assert f"--master_port={port} cannot be used (Address already in use)" in done.stderr


def test_help_comes_without_torch(toy: Path) -> None:
    script = (
        "import sys; from zoo_common.launch import main; code = main(['train_1p', '--help']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=toy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--batch_size" in done.stdout and "data.batch_size" in done.stdout


def test_runs_are_listed(toy: Path) -> None:
    done = launch(toy, "--list")
    assert done.returncode == 0
    assert "train_performance_2p  Speed of two processes" in done.stdout
    assert launch(toy.parent, "--list").returncode == 2


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _wait_for_step(child: subprocess.Popen, metrics: Path, step: int) -> None:
    for _ in range(600):
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        assert child.poll() is None, "the run ended too early"
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


def test_a_profile_is_written_where_the_help_says(toy: Path) -> None:
    done = launch(toy, "train_1p", "--profile=2", "--steps=8")
    assert done.returncode == 0, done.stderr
    traces = list((toy / "test" / "output" / "0" / "profile").glob("*.json*"))
    assert len(traces) == 1
    assert "traceEvents" in traces[0].read_text()


def test_a_short_run_traces_what_it_has_and_says_so(toy: Path) -> None:
    done = launch(toy, "train_1p", "--profile=5", "--steps=3")
    assert done.returncode == 0, done.stderr
    assert "2 of 5 steps are traced" in done.stdout
    assert len(list((toy / "test" / "output" / "0" / "profile").glob("*"))) == 1


def test_help_ends_well_when_its_reader_leaves(toy: Path) -> None:
    command = f"'{sys.executable}' -m zoo_common.launch train_1p --help | true"
    command += "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], cwd=toy, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("cores", "processes", "device", "expected"),
    [
        (16, 8, "cuda", {"OMP_NUM_THREADS": "2", "ZOO_PIN_CORES": "1"}),
        (16, 8, "npu", {"OMP_NUM_THREADS": "2"}),
        (2, 8, "cpu", {"OMP_NUM_THREADS": "1"}),
        (16, 1, "cpu", {"OMP_NUM_THREADS": "16"}),
    ],
)
def test_ranks_share_the_cores(cores, processes, device, expected, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    place = Place(device, processes, 1, 0, "127.0.0.1", 1)
    assert share_of_cores(place, threads=0) == expected
    assert share_of_cores(place, threads=5)["OMP_NUM_THREADS"] == "5"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in share_of_cores(place, threads=0)


def test_a_pinned_rank_has_its_own_cores() -> None:
    script = (
        "import os; from zoo_common.worker import keep_to_own_cores\n"
        "os.sched_setaffinity = lambda pid, cores: print(sorted(cores))\n"
        "os.sched_getaffinity = lambda pid: {8, 9, 10, 11, 12}\n"
        "keep_to_own_cores(1, 2)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[10, 11]\n"
