"""What is handed in is never run, what a run leaves is its user's, and records keep no secret."""

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from harness import ROOT, records, start

from zoo_common import preflight, runs
from zoo_common.config import fields_of, load_config, to_yaml
from zoo_common.download import shown
from zoo_common.errors import UserError

HOSTILE = "a; touch ran & $(touch ran) `touch ran` | 'q' \"d\" \\ *? {a,b} ${HOME} ~ #é\t<x> !x -x"
"""A name with all that a shell would act on, none of which it must ever see."""

SECRETS = {
    "HF_TOKEN": "hf_S3CRETS3CRETS3CRET",
    "AWS_SECRET_ACCESS_KEY": "S3CRETaws",
    "https_proxy": "http://someone:S3CRETproxy@127.0.0.1:9",
}

MODELS = sorted(
    path.parents[1]
    for part in ("built-in", "contrib")
    for path in ROOT.glob(f"{part}/**/test/runs.yaml")
)
QUICK_SCRIPTS = ("train_smoke_1p", "train_full_multinodes", "make_shards")
SCRIPTS = [
    pytest.param(
        file,
        id=f"{model.name}/{file.stem}",
        marks=[] if file.stem in QUICK_SCRIPTS else [pytest.mark.thorough],
    )
    for model in MODELS
    for file in sorted((model / "test").glob("*.sh"))
    if file.stem != "env_npu"
]

FAKE_PYTHON = """#!/bin/bash
[ "$1" = -c ] && exit 0
[ "$2" = zoo_common.npu_env ] && exit 0
printf '%s\\0' "$@" > "$WORDS_FILE"
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_shell_sees_the_options_of_a_script(script: Path, tmp_path: Path) -> None:
    """All options of the model at once; what comes behind the script is looked at."""
    python = tmp_path / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    here = tmp_path / HOSTILE.replace("/", "")
    here.mkdir()
    options = [option.name for option in runs.load(script.parents[1]).options()]
    words = [f"{name}={HOSTILE}" for name in options] + [w for n in options for w in (n, HOSTILE)]
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "WORDS_FILE": str(tmp_path / "words"),
    }
    done = subprocess.run(
        ["bash", str(script), *words], cwd=here, env=environment, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    found = (tmp_path / "words").read_bytes().decode().split("\0")[:-1]
    assert found[0] == "-m" and found[-len(words) :] == words
    assert not [*tmp_path.rglob("ran")] and not (script.parents[1] / "ran").exists()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_texts_reach_the_ranks_as_they_were_written(model: Path, tmp_path: Path) -> None:
    """Through config.yaml, which the launcher writes and the ranks read."""
    loaded = runs.load(model)
    file = tmp_path / "config.yaml"
    for field in fields_of(loaded.schema):
        if field.type is not str:
            continue
        word = f"{field.path}={HOSTILE}"
        try:
            config = load_config(loaded.schema, [word], loaded.card_options)
        except UserError as error:
            assert "must be" in str(error), word  # one of some words, or of a form
            continue
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(loaded.schema, [f"--config={file}"], loaded.card_options) == config
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
        for part in field.path.split("."):
            value = value[part]
        assert value == HOSTILE


def test_a_model_directory_with_such_a_name_runs(tmp_path: Path) -> None:
    model = next(model for model in MODELS if model.name.startswith("Twins"))
    copy = tmp_path / HOSTILE / model.name
    copied = ("test", "configs", "twins")
    for name in copied:
        shutil.copytree(model / name, copy / name, ignore=shutil.ignore_patterns("output"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["ASCEND_TOOLKIT_HOME"] = str(tmp_path / HOSTILE)
    done = subprocess.run(
        ["bash", "test/train_smoke_1p.sh", "--list", f"--data_path={HOSTILE}"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "--list" in done.stderr, done
    shown_text = subprocess.run(
        ["bash", "-c", "source test/env_npu.sh --show"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown_text.returncode == 0 and f"CANN: {tmp_path / HOSTILE}" in shown_text.stdout
    assert not [*tmp_path.rglob("ran")]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_files_are_the_users_sockets_are_local_and_records_keep_no_secret(
    toy: Path, tmp_path: Path
) -> None:
    """One run of two processes under a hostile name, looked at while it goes on and afterwards."""
    output = tmp_path / "runs" / HOSTILE
    strays: set[str] = set()
    ended = threading.Event()
    with (
        umask(0o027),
        start(
            toy,
            *(
                "train_2p",
                "--steps=6",
                "fault.step_time_s=0.2",
                f"--data_path={tmp_path / HOSTILE}",
            ),
            output=output,
            environment=SECRETS,
        ) as run,
    ):
        watcher = threading.Thread(target=watch, args=(run.temporary, ended, strays))
        watcher.start()
        try:
            run.wait_for(lambda: len(run.steps()) > 1, "a step")
            addresses, sockets = listeners(run.processes())
            done = run.end()
        finally:
            ended.set()
            watcher.join()
    assert done.code == 0, done.err
    strays -= {name for name in strays if name.startswith("torchinductor_")}
    assert not strays, "temporary files elsewhere than in the output directory"
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, addresses
    for path in sockets:
        assert not path.stat().st_mode & 0o007, path

    for path in [output.parent, output, *output.rglob("*")]:
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o750 if path.is_dir() else 0o640), f"{path}: {mode:o}"
    assert records(output)
    names = [path.name for path in output.rglob("*")]
    assert not [name for name in names if name.endswith((".partial", ".part", ".tmp"))], names
    check_records(output, tmp_path)
    assert not [*tmp_path.rglob("ran")] and not [*toy.rglob("ran")]


def watch(directory: Path, ended: threading.Event, found: set[str]) -> None:
    """Notes what appears in a directory; torch makes one there for compiled code, and has none."""
    while not ended.wait(0.01):
        found.update(path.name for path in directory.rglob("*"))


def listeners(processes: list[psutil.Process]) -> tuple[set[str], list[Path]]:
    """Where processes listen: addresses, and sockets with a place in the file system."""
    own = {process.pid for process in processes}
    addresses, paths = set(), []
    for connection in psutil.net_connections("all"):
        if connection.pid not in own:
            continue
        if connection.family == socket.AF_UNIX:
            if connection.laddr and not connection.laddr.startswith(("@", "\0")):
                paths.append(Path(connection.laddr))
        elif connection.status == psutil.CONN_LISTEN:
            addresses.add(connection.laddr.ip)
    return addresses, [path for path in paths if path.exists()]


def check_records(output: Path, elsewhere: Path) -> None:
    """No secret anywhere; paths in what the README says holds some: config, logs, checkpoints."""
    with_paths = re.compile(r"config\.yaml|.*\.log|.*\.pth|.*\.stack|.*\.word")
    for path in output.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        assert b"S3CRET" not in content, path
        if not with_paths.fullmatch(path.name):
            for place in (elsewhere, ROOT, Path.home()):
                assert os.fsencode(place) not in content, f"{path}: {place}"


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_download_leaves_no_secret_of_its_address_in_the_config(
    model: Path, resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed addresses and passwords are for the download; config.yaml goes to all who ask."""
    loaded = runs.load(model)
    fields = fields_of(loaded.schema)
    names = [field.path for field in fields if field.metadata.get("kind") == "weights"]
    urls = [field.path for field in fields if field.path.endswith(".url")]
    secret = "https://me:S3CRET@host/w.pth?sign=S3CRET"
    words = [f"{path}={secret}" for path in names + urls]
    config = load_config(loaded.schema, words, loaded.card_options)
    config.run.resume = "last.pth" if resumed else ""
    config.data.path = str(tmp_path)
    weights = tmp_path / "w.pth"
    torch.save({"model": {}}, weights)
    asked = []

    def fetch(name: str, *arguments: object, **options: object) -> Path:
        asked.append(name)
        return weights

    monkeypatch.setattr("zoo_common.download.find_or_fetch", fetch)
    preflight.fetch_weights(loaded, config)
    assert asked == ([] if resumed else [secret] * len(names))
    assert "S3CRET" not in to_yaml(config)


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("https://me:S3CRET@host:8/a/b.pth?X-Signature=S3CRET#S3CRET", "https://host:8/a/b.pth"),
        ("https://host/a%20b.pth", "https://host/a%20b.pth"),
        ("https://[::1]:8/b.pth", "https://[::1]:8/b.pth"),
        ("http://[broken", "an address"),
    ],
)
def test_addresses_are_shown_without_their_secrets(address: str, wanted: str) -> None:
    assert shown(address) == wanted
