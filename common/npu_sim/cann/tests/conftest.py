"""The machine of these tests, and the record of what they found (``--npu-record=FILE``)."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[3] / "tools")]

from build_cann import BuildError, build  # noqa: E402
from machine import ROOT, Machine, make_machine, reason_against  # noqa: E402

from model_dirs import choose_model, find_models  # noqa: E402

_REPLACED = """
import json, torch_npu, npu_sim_cann
print(json.dumps(npu_sim_cann.replaced()))
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--npu-model", action="append", help="name of a model to test; all if none")
    parser.addoption("--npu-record", help="file that takes the record of this session")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--npu-record"):
        config.pluginmanager.register(_Recorder(Path(path)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model" in metafunc.fixturenames:
        words = metafunc.config.getoption("--npu-model")
        models = [choose_model(word) for word in words] if words else find_models()
        metafunc.parametrize("model", models, ids=lambda model: model.name, scope="session")


@pytest.fixture(scope="session")
def machine() -> Machine:
    """A machine that has CANN and two cards, or so its programs believe."""
    if reason := reason_against():
        pytest.skip(reason)
    try:
        return make_machine(build())
    except BuildError as error:
        pytest.fail(str(error), pytrace=False)


class _Recorder:
    """Writes down each check, its result and time, and what it was run with."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checks: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("::")[2]
            check, _, model = name.rstrip("]").partition("[")
            entry = {"check": check.removeprefix("test_"), "result": report.outcome}
            entry |= {"model": model} if model else {}
            self._checks.append({**entry, "seconds": round(report.duration, 1)})

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        document = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "commit": _git("rev-parse", "HEAD"),
            "changed_files": len(_git("status", "--porcelain").splitlines()),
            "versions": _versions(),
            "replaced": make_machine(build()).python(_REPLACED).result(),
            "passed": sum(check["result"] == "passed" for check in self._checks),
            "failed": sum(check["result"] == "failed" for check in self._checks),
            "checks": self._checks,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True)
    torch_library = importlib.metadata.distribution("torch").locate_file("torch/lib")
    cuda = (Path(str(torch_library)) / "libtorch_cuda.so").exists()
    return {
        "python": platform.python_version(),
        **packages,
        "torch_build": "CUDA, made to look like the CPU build" if cuda else "CPU",
        "torch_npu": importlib.metadata.version("torch-npu"),
        "cann": "stand-in",
        "compiler": f"g++ {compiler.stdout.strip()}",
        "machine": platform.machine(),
    }
