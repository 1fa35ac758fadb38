"""tools/environment.sh and environment.py, with a pip that only writes down its words."""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ENSURE = 'source tools/environment.sh && zoo_environment "$@" && command -v python'


def ensure(root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", ENSURE, "bash", *words],
        cwd=root,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module itself, for what cannot be set up from outside."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))
    monkeypatch.setenv("ZOO_PLATFORM", "default")
    return importlib.import_module("environment")


def hashed(call: str) -> list[str]:
    """The files with hashes that a call of pip installs."""
    for word in ("--no-deps", "--require-hashes", "--only-binary=:all:"):
        assert word in call
    return [Path(word).stem for word in call.split(" --requirement ")[1:]]


def test_installs_once_and_from_an_index_only_with_hashes(copy: Path, stub_venv: Path) -> None:
    first = ensure(copy)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == str(copy / ".venv/bin/python")
    calls = stub_venv.read_text().splitlines()
    assert len(calls) == 2
    assert hashed(calls[0]) == ["common", "default", "cuda"]
    assert "--no-index" in calls[1]
    assert f"--editable {copy}/common[digits]" in calls[1]
    assert f"--editable {copy}/contrib/cv/classification/Twins-ALTGVT-S" in calls[1]

    started = time.monotonic()
    again = ensure(copy)
    assert again.returncode == 0
    assert time.monotonic() - started < 2
    assert stub_venv.read_text().splitlines() == calls


def test_an_index_that_the_user_names_gives_torch_alone(copy: Path, stub_venv: Path) -> None:
    """And torch stays what it is when the variable is forgotten later."""
    assert ensure(copy, PIP_EXTRA_INDEX_URL="https://somewhere").returncode == 0
    calls = stub_venv.read_text().splitlines()
    pins = f"--constraint {copy}/tools/pins/common.txt --constraint {copy}/tools/pins/default.txt"
    assert calls[0].endswith(f"--no-deps --quiet {pins} torch torchvision")
    assert hashed(calls[1]) == ["common", "default"]
    assert calls[2].endswith(f"--quiet {pins} torch torchvision")
    assert "--no-deps" not in calls[2]
    assert "--no-index" in calls[3]
    (copy / ".venv/lib/python3.11/site-packages/torch-2.14.1+cpu.dist-info").mkdir()
    assert ensure(copy).returncode == 0
    assert stub_venv.read_text().splitlines() == calls
    assert ensure(copy, "--ci").returncode == 0
    assert hashed(stub_venv.read_text().splitlines()[5]) == ["common", "default", "ci"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("absl-py==2.5.1", "absl-py==2.5.2", "differ in absl-py==2.5.1"),
        ("absl-py==2.5.1\n", "", "differ in absl-py==2.5.1"),
        ("absl-py==2.5.1", "aa==1\nabsl-py==2.5.1", "differ in aa==1"),
    ],
)
def test_pins_without_their_hashes_install_nothing(
    copy: Path, stub_venv: Path, old: str, new: str, sentence: str
) -> None:
    pins = copy / "tools/pins/common.txt"
    text = pins.read_text()
    assert old in text
    pins.write_text(text.replace(old, new))
    refused = ensure(copy)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert sentence in refused.stderr
    assert "run .venv/bin/python tools/lock.py" in refused.stderr
    assert not stub_venv.exists()


BACKEND = """
import zipfile

INFO = "zoo_common-1.dist-info"
METADATA = "Metadata-Version: 2.1\\nName: zoo-common\\nVersion: 1\\nRequires-Dist: NEED\\n"


def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "zoo_common-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr(f"{INFO}/METADATA", METADATA)
        wheel.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\n")
        wheel.writestr(f"{INFO}/RECORD", "")
    return name
"""


def small_zoo(folder: Path, need: str) -> None:
    """A repository with one package of ours, built by a backend of its own, that needs one pin."""
    for model in ("built-in", "contrib"):
        shutil.rmtree(folder / model, ignore_errors=True)
    (folder / "common/pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (folder / "common/backend.py").write_text(BACKEND.replace("NEED", need))
    pins = folder / "tools/pins"
    for name, text in (("common", "tiny==1.0\n"), ("default", "torch==1\n"), ("cuda", "")):
        (pins / f"{name}.txt").write_text(text)
        lines = [
            f"{line} \\\n    --hash=sha256:{sha(folder, line)}\n" for line in text.splitlines()
        ]
        (pins / f"hashes/{name}.txt").write_text("".join(lines))


def sha(folder: Path, pin: str) -> str:
    """The hash of an empty wheel of that version, which is made for it."""
    name, _, version = pin.partition("==")
    info = f"{name}-{version}.dist-info"
    wheel = folder / "wheels" / f"{name}-{version}-py3-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{info}/METADATA", head)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_a_file_with_another_hash_is_refused_by_the_real_pip(copy: Path) -> None:
    """And a need without a pin is told: nothing comes in beside what has a hash."""
    small_zoo(copy, need="tiny>=1")
    source = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": (copy / "wheels").as_uri(),
        "PIP_NO_INDEX": "1",
        "ZOO_PLATFORM": "default",
    }
    wheel = copy / "wheels/tiny-1.0-py3-none-any.whl"
    good = wheel.read_bytes()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny.py", "# more than there was\n")
    refused = ensure(copy, **source)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for text in (f"{wheel.as_uri()} is not the tiny==1.0 whose", got, "installed nothing"):
        assert text in refused.stderr
    site = next((copy / ".venv/lib").glob("python*/site-packages"))
    assert not list(site.glob("t*-*.dist-info"))

    wheel.write_bytes(good)
    assert ensure(copy, **source).returncode == 0
    assert {info.name for info in site.glob("*-1*.dist-info")} >= {
        "tiny-1.0.dist-info",
        "torch-1.dist-info",
        "zoo_common-1.dist-info",
    }

    small_zoo(copy, need="tiny>=2")
    sha(copy, "tiny==2.0")
    with (copy / "common/pyproject.toml").open("a") as project:
        project.write("# changed\n")
    unmet = ensure(copy, **source)
    assert unmet.returncode == 1
    assert unmet.stderr == (
        "zoo-common[digits] needs tiny>=2, which tools/pins does not give it: pin a version there, "
        "and run .venv/bin/python tools/lock.py for its hashes.\n"
    )


def test_ci_adds_to_what_is_there(copy: Path, stub_venv: Path) -> None:
    assert ensure(copy).returncode == 0
    assert ensure(copy, "--ci").returncode == 0
    assert f"--requirement {copy}/ci/requirements.txt" in stub_venv.read_text().splitlines()[-1]
    count = len(stub_venv.read_text().splitlines())
    assert ensure(copy).returncode == 0
    assert ensure(copy, "--ci").returncode == 0
    assert len(stub_venv.read_text().splitlines()) == count


@pytest.mark.parametrize(
    "file",
    [
        "common/pyproject.toml",
        "tools/pins/common.txt",
        "tools/pins/hashes/cuda.txt",
        "contrib/cv/classification/Twins-ALTGVT-S/pyproject.toml",
    ],
)
def test_a_change_of_what_is_needed_installs_again(copy: Path, stub_venv: Path, file: str) -> None:
    assert ensure(copy).returncode == 0
    with (copy / file).open("a") as stream:
        stream.write("# changed\n")
    assert ensure(copy).returncode == 0
    assert len(stub_venv.read_text().splitlines()) == 4


def test_a_moved_tree_installs_again(copy: Path, stub_venv: Path) -> None:
    assert ensure(copy).returncode == 0
    moved = copy.with_name("moved")
    copy.rename(moved)
    assert ensure(moved).returncode == 0
    assert f"--editable {moved}/common[digits]" in stub_venv.read_text().splitlines()[-1]


def test_npu_machines_get_torch_npu_and_its_torch(copy: Path, stub_venv: Path) -> None:
    assert ensure(copy, ZOO_PLATFORM="npu").returncode == 0
    calls = stub_venv.read_text().splitlines()
    assert f"--no-deps --quiet --constraint {copy}/tools/pins/common.txt" in calls[0]
    assert calls[0].endswith(f"--constraint {copy}/tools/pins/npu.txt torch torchvision")
    assert hashed(calls[1]) == ["common", "npu"]
    pins = (copy / "tools/pins/npu.txt").read_text()
    assert "torch==2.14.0+cpu\n" in pins
    hashes = (copy / "tools/pins/hashes/npu.txt").read_text()
    assert "torch-npu==2.14.0 \\\n    --hash=sha256:" in hashes
    assert "\ntorch==" not in hashes and "torchvision" not in hashes


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("Max retries exceeded: NewConnectionError(...)", "package index could not be reached"),
        ("ERROR: [Errno 28] No space left on device", "disk became full"),
        ("ERROR: No matching distribution found for x", "No matching distribution found for x"),
    ],
)
def test_a_failed_install_says_one_sentence_and_is_tried_again(
    copy: Path, stub_venv: Path, said: str, sentence: str
) -> None:
    failed = ensure(copy, PIP_CODE="1", PIP_SAYS=said)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert sentence in failed.stderr
    assert ensure(copy).returncode == 0
    assert len(stub_venv.read_text().splitlines()) == 3


def test_packages_that_were_cut_short_are_forgotten(copy: Path, stub_venv: Path) -> None:
    site = copy / ".venv/lib/python3.11/site-packages"
    (site / "~orch").mkdir()
    for name, files in (("whole", ["whole.py"]), ("half", []), ("unrecorded", [])):
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        for file in files:
            (site / file).write_text("12345")
        if name != "unrecorded":
            (info / "RECORD").write_text(f"{name}.py,sha256=x,5\n{info.name}/RECORD,,\n")
    assert ensure(copy, PIP_CODE="1").returncode == 1
    assert ensure(copy).returncode == 0
    assert [path.name for path in site.glob("*.dist-info")] == ["whole-1.0.dist-info"]
    assert not (site / "~orch").exists()


def test_a_venv_that_does_not_run_is_made_anew_and_offline_is_told(
    copy: Path, tmp_path: Path
) -> None:
    """The real venv and the real pip, which has no index to ask."""
    python = copy / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(tmp_path / "gone")
    offline = ensure(
        copy,
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="1",
        ZOO_PLATFORM="default",
    )
    assert offline.returncode == 1
    assert "is made anew" in offline.stdout
    assert "The package index could not be reached" in offline.stderr
    assert len(offline.stderr.splitlines()) == 1


def test_too_little_disk_is_told_before_anything_is_made(
    copy: Path,
    environment: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(copy)._replace(free=3_000_000_000)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)
    assert environment.ensure(root=copy) == 1
    assert "needs 7 GB of disk" in capsys.readouterr().err
    assert not (copy / ".venv").exists()


def test_another_torch_takes_its_own_pins(copy: Path, stub_venv: Path) -> None:
    assert ensure(copy, ZOO_PLATFORM="npu", ZOO_TORCH="2.7.1").returncode == 0
    calls = stub_venv.read_text().splitlines()
    assert f"--constraint {copy}/tools/pins/npu-2.7.1.txt" in calls[0]
    assert hashed(calls[1]) == ["common", "npu-2.7.1"]
    assert not any("/npu.txt" in call for call in calls)
    wrong = ensure(copy, ZOO_PLATFORM="npu", ZOO_TORCH="2.7")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("ZOO_TORCH=2.7 has no pins for the platform npu: there are npu-")


def test_a_wrong_platform_is_told(copy: Path) -> None:
    wrong = ensure(copy, ZOO_PLATFORM="tpu")
    assert wrong.returncode == 1
    assert wrong.stderr == "ZOO_PLATFORM must be npu or default, but is 'tpu'.\n"


def test_without_python_one_sentence_says_so(copy: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or name)
    (tools / "python3").write_text(f"#!{tools}/bash\nexit 127\n")  # a stand-in that does not run
    (tools / "python3").chmod(0o755)
    missing = subprocess.run(
        [tools / "bash", "tools/quickstart.sh"],
        cwd=copy,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 1
    assert missing.stderr == (
        "No Python from 3.10 to 3.14 was found: install Python 3.11 and run this again.\n"
    )


def test_two_starts_at_once_install_once(copy: Path, stub_venv: Path) -> None:
    command = ["bash", "-c", ENSURE, "bash"]
    starts = [subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE) for _ in range(2)]
    assert [start.wait() for start in starts] == [0, 0]
    for start in starts:
        assert start.stdout is not None
        start.stdout.close()
    assert len(stub_venv.read_text().splitlines()) == 2


def test_pins_name_the_versions_that_the_tests_run_with() -> None:
    """Torch and torchvision of this environment are those of one of the pin files."""
    import torch

    pins = Path(__file__).parent.parent / "tools" / "pins"
    version = torch.__version__.partition("+")[0]
    named = (pins / "default.txt").read_text() + (pins / "npu.txt").read_text()
    assert f"torch=={version}" in named
    assert sys.version_info >= (3, 10)
