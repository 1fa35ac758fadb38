"""tools/cluster: what its examples say is what Slurm, Kubernetes, ssh and the zoo understand.

Slurm's and ssh's programs are played by small stand-ins that do what their manuals say.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from zoo_common import runs
from zoo_common.config import node_range

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "tools" / "cluster"
TOY = ROOT / "common" / "tests" / "toy"
FIELDS = json.loads(Path(__file__).with_name("trainer_fields.json").read_text())
MODELS = sorted(file.parents[1] for file in ROOT.glob("*/*/**/test/runs.yaml") if file.is_file())
MODELS = [model for model in MODELS if model.parts[len(ROOT.parts)] in ("built-in", "contrib")]


def stub(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def start(*words: object, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["bash", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ended(child: subprocess.Popen[bytes], seconds: float = 60) -> tuple[int, str]:
    """Exit code and output."""
    with child:
        try:
            output, _ = child.communicate(timeout=seconds)
        finally:
            child.kill()
    return child.returncode, output.decode()


def until(condition: Any, child: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, f"ended with {child.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["slurm.sbatch", "ssh.sh"])
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=ROOT / ".venv" / "bin")
    if program is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([program, CLUSTER / name], check=True)


# ---------------------------------------------------------------------------- the models' scripts


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("kind", ["full", "performance"])
def test_every_model_runs_on_several_machines(model: Path, kind: str) -> None:
    loaded = runs.load(model)
    names = [name for name in loaded.runs if name.endswith(f"{kind}_multinodes")]
    assert f"train_{kind}_multinodes" in names
    for name in names:
        spec = loaded.run(name)
        assert spec.kind == ("acc" if kind == "full" else "perf")
        assert spec.devices == 8
        script = (model / "test" / f"{name}.sh").read_text()
        assert script.splitlines()[-1] == f'exec python3 -m zoo_common.launch {name} "$@"'
        launch = loaded.config(spec, []).launch
        assert launch.master_port == 23333
        assert launch.nnodes == ("4" if "DeCLIP" in model.name else "1")
        card = (
            "--data_path=/data --batch_size=128 --nnodes=2 --node_rank=1 --local_addr=10.0.0.2 "
            "--master_addr=10.0.0.1 --master_port=29500"
        )
        launch = loaded.config(spec, card.split()).launch
        assert node_range(launch) == (2, 2)
        assert (launch.node_rank, launch.local_addr) == (1, "10.0.0.2")
        assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 29500)
        elastic = ["--batch_size=128", "--nnodes=2:4", "--max_restarts=3", "--auto_resume"]
        assert node_range(loaded.config(spec, elastic).launch) == (2, 4)


# ---------------------------------------------------------------------------- Slurm

DIRECTIVES = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"1",
    "gres": r"\w+(:\w+)?:\d+",
    "exclusive": r"",
    "mem": r"0",
    "time": r"(\d+-)?\d+:[0-5]\d:[0-5]\d",
    "signal": r"B:USR1@\d+",
    "requeue": r"",
    "open-mode": r"append",
    "output": r"[\w%./-]+",
}
"""The options of sbatch that the script may use, with their values."""

SRUN = {"ntasks-per-node", "cpu-bind", "kill-on-bad-exit", "wait", "label"}


def directives() -> dict[str, str]:
    """What sbatch reads: lines that begin with #SBATCH, up to the first command."""
    found: dict[str, str] = {}
    for line in (CLUSTER / "slurm.sbatch").read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert match, line
            assert match[1] not in found, line
            found[match[1]] = match[2] or ""
    return found


def test_sbatch_reads_the_directives() -> None:
    found = directives()
    assert found.keys() == DIRECTIVES.keys()
    for name, value in found.items():
        assert re.fullmatch(DIRECTIVES[name], value), name


def test_slurm_signals_before_the_launcher_needs_its_time() -> None:
    seconds = int(directives()["signal"].partition("@")[2])
    loaded = runs.load(MODELS[0])
    config = loaded.config(loaded.run("train_full_multinodes"), [])
    assert seconds >= config.run.stop_grace_s + 60  # a step, an evaluation, the network's disk


SRUN_STUB = """#!/usr/bin/env python3
# Starts the command once for each machine, passes signals on, ends with the highest code.
import json, os, signal, subprocess, sys
words = sys.argv[1:]
options = []
while words[0].startswith("--"):
    options.append(words.pop(0))
open(os.environ["SAID"] + ".srun", "w").write(json.dumps([options, words]))
machines = [
    subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(number)})
    for number in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
for name in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(name, lambda number, frame: [each.send_signal(number) for each in machines])
open(os.environ["SAID"] + ".started", "w").close()
sys.exit(max(each.wait() for each in machines))
"""
SCONTROL_STUB = """#!/usr/bin/env bash
if [[ "$1 $2" == "show hostnames" ]]; then
    [[ $3 == "node[0-1]" ]] && printf '127.0.0.1\\nnode1\\n'
else
    echo "$*" >>"$SAID"
fi
"""
SQUEUE_STUB = """#!/usr/bin/env bash
[[ "$*" == "--noheader --jobs=4711 --format=%T" ]] && echo "$STATE"
"""


class Job:
    """A job of the Slurm of the stand-ins."""

    def __init__(self, directory: Path) -> None:
        self.said = directory / "said"
        programs = directory / "bin"
        stub(programs / "srun", SRUN_STUB)
        stub(programs / "scontrol", SCONTROL_STUB)
        stub(programs / "squeue", SQUEUE_STUB)
        self.script = shutil.copy(CLUSTER / "slurm.sbatch", directory / "slurm_script")  # spooled
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SAID": str(self.said),
            "STATE": "RUNNING",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_JOB_NUM_NODES": "2",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *words: str, **variables: str) -> subprocess.Popen[bytes]:
        for file in self.said.parent.glob("said*"):
            file.unlink()
        return start(self.script, *words, environment={**self.environment, **variables})

    @property
    def requeued(self) -> bool:
        return self.said.exists() and self.said.read_text() == "requeue 4711\n"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


WAITS = """#!/usr/bin/env bash
trap 'sleep 0.3; exit 138' USR1
trap 'sleep 0.3; exit 143' TERM
printf '%s\\n' "$@" > "$SAID.words$SLURM_NODEID.part"
mv "$SAID.words$SLURM_NODEID.part" "$SAID.words$SLURM_NODEID"
[[ -n ${CODE-} ]] && exit "$CODE"
for _ in {1..600}; do sleep 0.1; done
"""


def test_each_machine_gets_one_launcher_that_knows_its_place(job: Job, tmp_path: Path) -> None:
    script = stub(tmp_path / "a model" / "run.sh", WAITS)
    child = job.start(str(script), "--data_path=/a b/$(touch x)", "--nnodes=1:2", CODE="0")
    code, output = ended(child)
    assert code == 0, output
    assert not job.said.exists()
    for rank in (0, 1):
        assert (tmp_path / f"said.words{rank}").read_text().splitlines() == [
            f"--node_rank={rank}",
            "--nnodes=2",
            "--master_addr=127.0.0.1",
            "--master_port=24711",
            "--auto_resume",
            "--data_path=/a b/$(touch x)",
            "--nnodes=1:2",  # the user's own comes last and wins
        ]
    options, _ = json.loads((tmp_path / "said.srun").read_text())
    assert {option.removeprefix("--").partition("=")[0] for option in options} == SRUN


@pytest.mark.parametrize(
    ("name", "state", "code", "requeued"),
    [
        ("SIGUSR1", "RUNNING", 138, True),  # the time limit comes
        ("SIGTERM", "RUNNING", 143, True),  # preempted, in its grace time
        ("SIGTERM", "COMPLETING", 143, False),  # scancel
    ],
)
def test_a_stopped_job_is_requeued(
    job: Job, tmp_path: Path, name: str, state: str, code: int, requeued: bool
) -> None:
    script = stub(tmp_path / "run.sh", WAITS)
    child = job.start(str(script), STATE=state)
    until(lambda: len(list(tmp_path.glob("said.words?"))) == 2, child)
    child.send_signal(signal.Signals[name])
    assert ended(child)[0] == code
    assert job.requeued is requeued


@pytest.mark.parametrize("code", ["1", "2", "137"])
def test_a_failed_job_is_not_requeued(job: Job, tmp_path: Path, code: str) -> None:
    child = job.start(str(stub(tmp_path / "run.sh", WAITS)), CODE=code)
    assert ended(child)[0] == int(code)
    assert not job.said.exists()


TOY_SCRIPT = """#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m zoo_common.launch train_1p "$@"
"""


def test_a_run_goes_on_after_its_time_limit(job: Job, tmp_path: Path) -> None:
    """The toy model on two machines: signalled, requeued, and ended as if nothing had been."""
    toy = tmp_path / "toy model"
    shutil.copytree(TOY, toy, ignore=shutil.ignore_patterns("__pycache__", "output"))
    script = stub(toy / "test" / "train_1p.sh", TOY_SCRIPT)
    metrics = tmp_path / "out" / "metrics.jsonl"
    words = [str(script), f"--output_dir={tmp_path / 'out'}", "--steps=8", "fault.step_time_s=0.3"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        words.append(f"--master_port={server.getsockname()[1]}")
    child = job.start(*words)
    until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2, child, 120)
    child.send_signal(signal.SIGUSR1)
    code, output = ended(child, 120)
    assert code == 138, output
    assert job.requeued
    child = job.start(*words)
    code, output = ended(child, 120)
    assert code == 0, output
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 9))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["status"], result["world_size"], result["nnodes"]) == ("completed", 2, 2)
    assert torch.load(tmp_path / "out" / "checkpoints" / "last.pth", weights_only=True)["model"]


# ---------------------------------------------------------------------------- Kubernetes


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    text = (CLUSTER / "kubernetes.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def problems(value: Any, path: str) -> Iterator[str]:
    """Where a manifest differs from the recorded fields of Kubeflow Trainer's definitions."""
    known = FIELDS.get(path, {"fields": []})
    if isinstance(value, dict):
        for key in known.get("required", ()):
            if key not in value:
                yield f"{path} lacks {key}"
        for key, item in value.items():
            if "map" in known:
                continue
            if key not in known["fields"]:
                yield f"{path} has no field {key}"
            else:
                yield from problems(item, f"{path}/{key}")
    elif isinstance(value, list):
        for item in value:
            yield from problems(item, f"{path}/*")
    else:
        types = {"integer": int, "boolean": bool, "string": str, "int-or-string": int | str}
        if not isinstance(value, types[known["type"]]):
            yield f"{path} is {value!r}, which is no {known['type']}"
        if value not in known.get("enum", [value]):
            yield f"{path} is {value!r}, not one of {known['enum']}"


def test_kubernetes_knows_every_field(manifests: dict[str, dict[str, Any]]) -> None:
    assert list(manifests) == ["TrainingRuntime", "TrainJob"]
    for kind, manifest in manifests.items():
        assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
        assert manifest["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert list(problems(manifest["spec"], kind)) == []


def test_the_parser_sees_a_wrong_field(manifests: dict[str, dict[str, Any]]) -> None:
    spec = json.loads(json.dumps(manifests["TrainJob"]["spec"]))
    spec["trainer"] |= {"numNodes": "4", "nodes": 4}
    del spec["runtimeRef"]["name"]
    assert sorted(problems(spec, "TrainJob")) == [
        "TrainJob/runtimeRef lacks name",
        "TrainJob/trainer has no field nodes",
        "TrainJob/trainer/numNodes is '4', which is no integer",
    ]


def test_the_job_fits_its_runtime_and_the_model(manifests: dict[str, dict[str, Any]]) -> None:
    runtime, job = manifests["TrainingRuntime"], manifests["TrainJob"]["spec"]
    assert job["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # Trainer finds both by these names.
    label = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert node["template"]["metadata"]["labels"] == label
    assert (node["name"], container["name"]) == ("node", "node")
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}

    script, *words = job["trainer"]["args"]
    assert (ROOT / script).is_file()
    given = {entry["name"] for entry in container["env"]}
    given |= {f"PET_{name}" for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(words))) == given
    values = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_PORT": "29400"}
    words = [re.sub(r"\$\((\w+)\)", lambda name: values.get(name[1], "h"), word) for word in words]
    loaded = runs.load((ROOT / script).parents[1])
    config = loaded.config(loaded.run(Path(script).stem), words)
    assert node_range(config.launch) == (4, 4)
    assert (config.launch.node_rank, config.launch.master_port) == (3, 29400)
    assert config.run.auto_resume
    cards = job["trainer"]["resourcesPerNode"]["limits"]["huawei.com/Ascend910"]
    assert cards == config.launch.processes
    assert pod["terminationGracePeriodSeconds"] > config.run.stop_grace_s
    paths = (config.data.path, config.run.output_dir)
    for path in paths:
        assert any(path.startswith(mount["mountPath"]) for mount in container["volumeMounts"])


def test_pods_are_made_anew_but_for_a_wrong_use(manifests: dict[str, dict[str, Any]]) -> None:
    spec = manifests["TrainingRuntime"]["spec"]["template"]["spec"]
    (node,) = spec["replicatedJobs"]
    job = node["template"]["spec"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] > 0


# ---------------------------------------------------------------------------- ssh

SSH_STUB = """#!/bin/sh
# Gives the words behind the host to a shell, as sshd does.
while [ "${1#-}" != "$1" ]; do
    [ "$1" = -o ] && shift
    shift
done
case $1 in absent*) exit 255 ;; esac
HOST=$1
export HOST
shift
exec sh -c "$*"
"""
ON_A_HOST = """#!/usr/bin/env bash
trap 'echo stopping; sleep 0.2; echo "$HOST" >> "$SAID.stopped"; exit 143' TERM
printf '<%s>' "$@"
echo
[[ $HOST == host1 && -n ${CODE-} ]] && exit "$CODE"
[[ -n ${CODE-} ]] && exit 0
touch "$SAID.$HOST"
for _ in {1..600}; do sleep 0.1; done
"""


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's script, in a directory whose name tempts shells, beside an ssh without network."""
    stub(tmp_path / "bin" / "ssh", SSH_STUB)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    return stub(tmp_path / "it's $(a) model" / "run.sh", ON_A_HOST)


def ssh(*words: object, **variables: str) -> subprocess.Popen[bytes]:
    return start(CLUSTER / "ssh.sh", *words, environment={**os.environ, **variables})


@pytest.mark.parametrize("code", [0, 3])
def test_every_host_gets_the_same_words_and_its_rank(hosts: Path, code: int) -> None:
    word = '--data_path=/it\'s a; $(touch x) "`path`"'
    child = ssh("me@host0,host1", hosts, word, "--nnodes=1:2", CODE=str(code))
    ended_with, output = ended(child)
    assert ended_with == code
    for rank, host in enumerate(("me@host0", "host1")):
        words = ["--nnodes=2", "--master_addr=host0", word, "--nnodes=1:2"]
        line = "".join(f"<{item}>" for item in (f"--node_rank={rank}", *words))
        assert f"{host}: {line}" in output.splitlines()


def test_ctrl_c_lets_all_hosts_save(hosts: Path, tmp_path: Path) -> None:
    for name in (signal.SIGTERM, signal.SIGINT):
        for file in tmp_path.glob("said*"):
            file.unlink()
        child = ssh("host0,host1", hosts)
        until(lambda: len(list(tmp_path.glob("said.host?"))) == 2, child)
        child.send_signal(name)
        assert ended(child)[0] == 143
        assert sorted((tmp_path / "said.stopped").read_text().split()) == ["host0", "host1"]


def test_a_lost_connection_stops_its_host(hosts: Path, tmp_path: Path) -> None:
    child = ssh("host0,host1", hosts)
    until(lambda: len(list(tmp_path.glob("said.host?"))) == 2, child)
    child.kill()
    ended(child)
    stopped, deadline = tmp_path / "said.stopped", time.monotonic() + 20
    while not stopped.exists() or len(stopped.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_host_that_is_not_there_is_told_before_any_starts(hosts: Path, tmp_path: Path) -> None:
    code, output = ended(ssh("host0,absent1", hosts))
    assert code == 2
    assert output.startswith("error: absent1 cannot be reached by ssh without a password")
    assert not list(tmp_path.glob("said*"))
    code, output = ended(ssh("host0"))
    assert (code, output[:6]) == (2, "usage:")


# ---------------------------------------------------------------------------- rank tables


def test_a_rank_table_is_made_from_each_machines_file(tmp_path: Path) -> None:
    files = []
    for net in (1, 2):
        file = tmp_path / f"node {net}.conf"
        file.write_text("".join(f"address_{card}=192.168.{net}.{card}\n" for card in range(8)))
        files.append(f"10.0.0.{net}={file}")
    program = [sys.executable, CLUSTER / "rank_table.py"]
    done = subprocess.run([*program, *files], capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)
    assert (table["status"], table["server_count"]) == ("completed", "2")
    last = table["server_list"][1]["device"][7]
    assert last == {"device_id": "7", "device_ip": "192.168.2.7", "rank_id": "15"}
    done = subprocess.run([*program, *files, "--devices=4,5"], capture_output=True, text=True)
    assert len(json.loads(done.stdout)["server_list"][0]["device"]) == 2
    for words, said in (
        (["10.0.0.1"], "error: 10.0.0.1: write ADDRESS=FILE"),
        (["10.0.0.1=absent"], "No such file"),
        ([*files, "--devices=9"], "error: 10.0.0.1: its hccn.conf has no line address_9="),
    ):
        done = subprocess.run([*program, *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert said in done.stderr
