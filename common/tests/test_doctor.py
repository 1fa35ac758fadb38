"""The doctor's page, its exit codes, and the checks that have nothing to do with NPUs."""

import importlib.util
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo_common import doctor
from zoo_common.doctor import Line, Machine, dataset, lines, network, software, system

TORCH = {
    "torch": "2.14.1+cpu",
    "cuda": None,
    "hip": None,
    "threads": 2,
    "torchvision_problem": None,
    "cuda_reason": "torch 2.14.1+cpu is a build without CUDA; install a CUDA build of torch",
    "cuda_count": 0,
    "npu_reason": "torch_npu is not installed",
    "npu_count": 0,
}


def here(asked: str = "cpu", facts: dict[str, object] | None = None, **more: object) -> Machine:
    """A machine of which torch's child process said ``facts``, so that none is started."""
    machine = Machine(asked, **{"environ": {}, **more})  # type: ignore[arg-type]
    machine.__dict__["facts"] = TORCH | (facts or {})
    return machine


def statuses(found: list[Line]) -> list[str]:
    return [line.status for line in found]


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zoo_common.doctor", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_page_and_its_json(tmp_path: Path) -> None:
    done = run("--device=cpu", f"--output_dir={tmp_path / 'not there yet'}")
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, empty, last = done.stdout.rstrip("\n").split("\n")
    assert empty == "" and last.endswith("a run on cpu can start.")
    parts = {row[9:24].strip() for row in rows if not row.startswith(" ")}
    wanted = {"Python", "zoo", "models", "torch", "torchvision", "port", "memory", "disk", "data"}
    assert wanted <= parts
    assert all(row.split()[0] in ("ok", "note", "problem", "->") for row in rows if row[:1] != " ")
    assert max(len(row) for row in rows if "pip install" not in row) <= 100
    assert socket.gethostname() not in done.stdout


def test_problems_decide_the_exit_code(tmp_path: Path) -> None:
    done = run("--device=cpu", "--json", f"--data_path={tmp_path / 'gone'}")
    document = json.loads(done.stdout)
    problems = [line for line in document["lines"] if line["status"] == "problem"]
    assert (done.returncode, document["ok"], document["device"]) == (1, False, "cpu")
    assert [line["part"] for line in problems] == ["data"]
    assert "does not exist" in problems[0]["text"]
    wrong = run("--device=tpu")
    assert wrong.returncode == 2
    assert "invalid choice: 'tpu'" in wrong.stderr


def test_a_home_directory_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/u/maria")
    shown = lines.without_home("'/u/maria/x', /u/maria: /u/mariana /mnt/u/maria")
    assert shown == "'~/x', ~: /u/mariana /mnt/u/maria"
    monkeypatch.setenv("HOME", "/")
    assert lines.without_home("/x") == "/x"


def test_checks_that_crash_or_hang_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(machine: Machine) -> list[Line]:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "CHECKS", (("a", crash), ("Python", software.python)))
    found = doctor.examine(here())
    assert found[0] == Line("a", "note", "could not be checked (RuntimeError: first line)")
    assert found[1].status == "ok"
    (late,) = lines.guarded("disk", lambda: time.sleep(30) or [], 0.1)
    assert (late.part, late.status) == ("disk", "problem")


def test_programs_that_hang_are_given_up_with_their_children() -> None:
    started = time.monotonic()
    output = lines.run(["bash", "-c", "echo before; sleep 60"], 0.5)
    assert output.code is None and output.stdout == "before\n"
    assert time.monotonic() - started < 20


def test_python_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(software.python(here())) == ["ok"]
    monkeypatch.setattr(software.sys, "version_info", (3, 9, 1))
    (old,) = software.python(here())
    assert (old.status, old.advice) == ("problem", "use Python 3.10 to 3.14")
    versions = {"torch": "2.14.1", "torchvision": "0.29.1"}
    monkeypatch.setattr(software, "installed", versions.get)
    assert statuses(software.torch(here())) == ["ok", "ok"]
    cuda = software.torch(here(facts={"cuda": "13.0"}))[0]
    assert "CUDA 13.0 build" in cuda.text
    assert software.torch(here(facts={"torch": "2.5.1"}))[0].status == "problem"
    trouble = "operator torchvision::nms does not exist"
    mixed = software.torch(here(facts={"torchvision_problem": trouble}))[1]
    assert mixed.status == "problem" and "from one index" in mixed.advice
    versions["torchvision"] = "0.22.1"
    other = software.torch(here())[1]
    assert "0.22.1 is not made for torch 2.14.1+cpu" in other.text
    assert other.advice == "install torchvision 0.29"
    dead = {"torch": None, "died": "was ended by SIGILL"}
    (broken,) = software.torch(here(facts=dead))
    assert "2.14.1 is installed, but its import was ended by SIGILL" in broken.text
    versions.clear()
    (absent,) = software.torch(here(facts=dead))
    assert absent.text == "not installed" and "quickstart" in absent.advice


def test_without_torch_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo_common.doctor import machine as module

    monkeypatch.setattr(module, "installed", lambda name: None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "run", lambda *_: pytest.fail("a process was started"))
    assert Machine().facts == {}


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = software.packages(here())
    assert statuses(found) == ["ok", "ok"]
    assert "zoo-twins" in found[1].text
    real = software.installed
    monkeypatch.setattr(software, "installed", lambda n: None if n == "rich" else real(n))
    missing = software.packages(here())[1]
    assert missing.status == "problem" and "zoo-common needs rich" in missing.text
    monkeypatch.setattr(software, "installed", lambda name: None)
    (none,) = software.packages(here())
    assert none.status == "problem" and none.advice == "run: bash tools/quickstart.sh"


def test_gpus() -> None:
    there = {"cuda_count": 2, "cuda_name": "cuda:0 Some GPU, 80 GB", "cuda_reason": None}
    (found,) = software.gpu(here("auto", there))
    assert (found.status, "cuda:0 Some GPU" in found.text) == ("ok", True)
    assert here("auto", there).kind == "cuda" and here("auto", there).ranks == 2
    (absent,) = software.gpu(here("cuda"))
    assert absent.status == "problem" and absent.advice == "install a CUDA build of torch"
    wanted = "npu" if importlib.util.find_spec("torch_npu") else "cpu"  # who has it wants an NPU
    assert here("auto").kind == wanted


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens, with HCCL's 32 ports above it below 65520."""
    with socket.socket() as server:
        for port in range(40000, 60000, 37):
            if network.is_free(port):
                server.bind(("", port))
                break
        server.listen()
        yield port


def hccl_ports(**variables: str) -> Line:
    found = network.ports(here("npu", environ=variables))
    return next(line for line in found if line.part == "HCCL ports")


def test_ports(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "TORCHRUN_PORT", taken)
    (torchrun,) = network.ports(here())
    assert torchrun.status == "note" and "--master_port" in torchrun.advice
    busy = hccl_ports(HCCL_IF_BASE_PORT=str(taken))
    assert busy.status == "problem" and busy.text.endswith("in use, perhaps by another run")
    assert str(taken) in busy.text.partition(": ")[2]
    assert hccl_ports(HCCL_HOST_SOCKET_PORT_RANGE=f"{taken}").status == "problem"
    assert hccl_ports(HCCL_HOST_SOCKET_PORT_RANGE="auto").status == "ok"
    for value in ("60000-", "0", "70000", "5-2", "100,90-110", ""):
        wrong = hccl_ports(HCCL_HOST_SOCKET_PORT_RANGE=value)
        assert wrong.status == "problem", value
    assert hccl_ports(HCCL_NPU_SOCKET_PORT_RANGE="x").status == "problem"
    assert hccl_ports(HCCL_IF_BASE_PORT="80").status == "problem"
    assert network.parse_ports("60000,60010-60012") == [60000, 60010, 60011, 60012]


def test_ports_that_the_system_may_give_away(tmp_path: Path) -> None:
    settings = tmp_path / "proc/sys/net/ipv4"
    settings.mkdir(parents=True)
    (settings / "ip_local_port_range").write_text("32768\t60999\n")
    (settings / "ip_local_reserved_ports").write_text("\n")
    machine = here("npu", system=tmp_path, environ={"HCCL_HOST_SOCKET_PORT_RANGE": "60500"})
    loose = network.ports(machine)[-1]
    assert loose.status == "note" and "ip_local_reserved_ports=60500-60500" in loose.advice
    (settings / "ip_local_reserved_ports").write_text("60000-60600\n")
    assert "note" not in statuses(network.ports(machine)[1:])


def test_network_variables(tmp_path: Path) -> None:
    def one(**variables: str) -> Line:
        (line,) = network.interfaces(here("npu", environ=variables))
        return line

    assert one().status == "ok"
    assert one(HCCL_IF_IP="127.0.0.1").status == "ok"
    assert one(HCCL_IF_IP="203.0.113.9").status == "problem"
    assert one(HCCL_IF_IP="not an address").status == "problem"
    assert one(HCCL_SOCKET_IFNAME="lo").status == "ok"
    assert one(HCCL_SOCKET_IFNAME="nosuch").status == "problem"
    assert one(GLOO_SOCKET_IFNAME="nosuch").status == "problem"
    assert "not used" in one(RANK_TABLE_FILE=str(tmp_path / "gone.json")).text
    names = ["lo", "eth0", "enp1s0"]
    hits = {w: network.matches_hccl(w, names) for w in ("eth", "=eth", "=eth0,x", "^eth", "^e,l")}
    assert hits == {"eth": True, "=eth": False, "=eth0,x": True, "^eth": True, "^e,l": False}


def write_memory(root: Path, free_kb: int, limit: str = "max") -> None:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 33554432 kB\nMemAvailable: {free_kb} kB\n")
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(limit)


def test_memory_of_machine_and_container(tmp_path: Path) -> None:
    machine = here(system=tmp_path)
    assert statuses(system.memory(machine)) == ["note"]
    write_memory(tmp_path, 16 * 2**20)
    assert system.memory(machine) == [Line("memory", "ok", "16 GB free of 32 GB")]
    write_memory(tmp_path, 16 * 2**20, limit=str(2 * 2**30))
    (small,) = system.memory(machine)
    assert small.status == "note" and "container may have 2.0 GB" in small.text


def test_cores_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert system.cores(here()) == [Line("cores", "ok", "8 of 16")]
    eight = {"npu_count": 8}
    assert statuses(system.cores(here("npu", eight, environ={"OMP_NUM_THREADS": "1"}))) == ["ok"]
    many = system.cores(here("npu", eight, environ={"OMP_NUM_THREADS": "16"}))
    assert statuses(many) == ["ok", "note"]
    assert statuses(system.cores(here(environ={"OMP_NUM_THREADS": "x"}))) == ["ok", "problem"]
    assert statuses(system.cores(here("npu", {"npu_count": 16}))) == ["note"]


def test_shared_memory_and_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(system.shared_memory(here(system=tmp_path))) == ["problem"]

    def has(free: int) -> None:
        usage = SimpleNamespace(total=free, used=0, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    has(64 * 2**20)  # what Docker gives
    (small,) = system.shared_memory(here())
    assert small.status == "problem" and "--shm-size" in small.advice
    assert statuses(system.disk(here(output_dir=tmp_path / "a/b"))) == ["problem", "problem"]
    has(3 * 2**30)
    assert statuses(system.shared_memory(here())) == ["ok"]
    assert statuses(system.disk(here(output_dir=tmp_path / "a/b"))) == ["note", "ok"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in system.disk(here())[0].text


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = {resource.RLIMIT_NOFILE: 1024}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (allowed.get(which, -1), -1))
    (few,) = system.limits(here())
    assert few.status == "note" and "open files 1024, processes unlimited" in few.text
    allowed[resource.RLIMIT_NOFILE] = 65536
    assert statuses(system.limits(here())) == ["ok"]


@pytest.mark.parametrize(
    ("variables", "status", "words"),
    [
        ({}, "ok", "none that is known to hurt"),
        ({"TASK_QUEUE_ENABLE": "2", "ASCEND_DEVICE_ID": "3"}, "ok", "none"),
        ({"TASK_QUEUE_ENABLE": "3"}, "problem", "is not 0, 1 or 2"),
        ({"PYTORCH_ALLOC_CONF": "a", "PYTORCH_NPU_ALLOC_CONF": "b"}, "problem", "both set"),
        ({"ASCEND_LAUNCH_BLOCKING": "1"}, "note", "slow"),
        ({"PYTORCH_NO_NPU_MEMORY_CACHING": "1"}, "note", "slow"),
        ({"ASCEND_DEVICE_ID": "npu"}, "problem", "no card number"),
        ({"https_proxy": "http://proxy.invalid:1"}, "note", "a proxy is set"),
    ],
)
def test_variables_that_hurt(variables: dict[str, str], status: str, words: str) -> None:
    (line,) = system.variables(here("npu", environ=variables))
    assert line.status == status and words in line.text


def plant(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("{}")
    return root


COCO = (
    "annotations/instances_train2017.json",
    "annotations/instances_val2017.json",
    "train2017/1.jpg",
    "train2017/2.jpg",
    "val2017/3.jpg",
)


YFCC = (
    "val_official.json",
    "yfcc15m_clean_open_data.json",
    "yfcc15m_clean_open_data/0/1.jpg",
    "yfcc15m_clean_open_data/0/2.jpg",
    "imagenet_valid/ILSVRC2012_val_00000001.JPEG",
)


def looked_at(path: Path | str) -> Line:
    (line,) = dataset.data(here(data_path=str(path)))
    return line


def test_data_sets_are_recognised_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dataset.data(here())[0].status == "ok"
    assert looked_at("sample").status == "ok"
    coco = looked_at(plant(tmp_path / "c/coco", *COCO).parent)
    assert coco.status == "ok"
    assert coco.text.startswith("coco in ")
    assert coco.text.endswith("train2017 2 pictures, val2017 1 pictures")
    classes = plant(tmp_path / "i", "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    assert looked_at(classes).text.endswith("train 2 pictures, val 2 pictures")
    captioned = looked_at(plant(tmp_path / "y", *YFCC))
    assert captioned.text.endswith("yfcc15m_clean_open_data 2 pictures, imagenet_valid 1 pictures")
    shards = plant(tmp_path / "s", "00.tar", "01.tar")
    assert looked_at(f"{shards}/{{00..01}}.tar").text == "2 shards"
    monkeypatch.setattr(dataset, "_COUNT_S", -1.0)
    short = looked_at(classes)
    assert short.status == "note" and "at least" in short.text


def test_data_sets_that_are_not_whole(tmp_path: Path) -> None:
    half = looked_at(plant(tmp_path / "half", *COCO[:3]))
    assert half.status == "problem"
    assert half.text.startswith("looks like coco, but ") and "no val2017" in half.text
    assert "annotations/instances_val2017.json" in half.advice.split("\n", 1)[1]
    lonely = looked_at(plant(tmp_path / "lonely", "val/a/1.jpg"))
    assert lonely.text.startswith("looks like imagenet, but ")
    unlabelled = looked_at(plant(tmp_path / "y", *YFCC[1:]))
    assert unlabelled.text.startswith("looks like yfcc, but ")
    lost = looked_at(f"{tmp_path}/{{00..01}}.tar")
    assert lost.status == "problem" and "2 of the 2 shards" in lost.text
    other = looked_at(plant(tmp_path / "other", "pictures/1.jpg"))
    assert "none of the known layouts" in other.text
    assert "coco:" in other.advice and "imagenet:" in other.advice
    assert "does not exist" in looked_at(tmp_path / "gone").text
