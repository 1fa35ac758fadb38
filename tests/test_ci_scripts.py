"""The scripts of ci/ and .ci/run: what they start, and how they end."""

import os
import subprocess
from pathlib import Path

import pytest

STEPS = ["lint", "test", "test_faults", "test_npu_sim", "smoke", "copy_out"]


def run(script: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *words],
        cwd="/",
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def stub(file: Path, body: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("failing", [None, *STEPS])
def test_ci_stops_at_the_first_failure_and_says_so_last(
    copy: Path, tmp_path: Path, failing: str | None
) -> None:
    done = tmp_path / "done"
    for step in STEPS:
        code = 3 if step == failing else 0
        stub(copy / "ci" / f"{step}.sh", f"echo {step} >> '{done}'; exit {code}")
    result = run(copy / ".ci" / "run")
    last = result.stdout.splitlines()[-1]
    if failing is None:
        assert result.returncode == 0
        assert last.startswith("CI passed in ")
        assert done.read_text().split() == STEPS
    else:
        assert result.returncode == 1
        assert last.startswith(f"CI failed: ci/{failing}.sh")
        assert done.read_text().split() == STEPS[: STEPS.index(failing) + 1]


@pytest.fixture
def lint_tools(copy: Path, stub_venv: Path) -> Path:
    """Stubs of the tools that lint uses; gives the file with their calls."""
    calls = copy.parent / "lint calls"
    for name in ("ruff", "mypy", "shellcheck", "codespell", "lint-imports"):
        body = f'echo "{name} $*" >> "{calls}"; [[ "{name} $*" != "${{BREAK-none}}"* ]]'
        stub(copy / ".venv" / "bin" / name, body)
    for program in ("check_layout.py", "tables.py", "lock.py"):
        (copy / "tools" / program).write_text("")
    return calls


def test_lint_tries_every_check(copy: Path, lint_tools: Path) -> None:
    result = run(copy / "ci" / "lint.sh")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "lint: all passed"
    calls = lint_tools.read_text()
    assert "ruff check ." in calls
    assert "mypy common/zoo_common" in calls
    shells = next(line for line in calls.splitlines() if line.startswith("shellcheck"))
    for script in ("ci/lint.sh", ".ci/run", "tools/environment.sh", "test/env_npu.sh"):
        assert script in shells


def test_lint_names_what_failed_after_trying_the_rest(copy: Path, lint_tools: Path) -> None:
    result = run(copy / "ci" / "lint.sh", BREAK="ruff check")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "lint: failed: ruff"
    assert "lint-imports" in lint_tools.read_text()


def test_tests_get_pytest_words(copy: Path, stub_venv: Path) -> None:
    (copy / "tests" / "test_only.py").write_text("def test_it():\n    pass\n")
    result = run(copy / "ci" / "test.sh", "tests/test_only.py", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout
    assert "ci/requirements.txt" in stub_venv.read_text()


@pytest.fixture
def fault_tests(copy: Path, stub_venv: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three tests of faults in the copy and no others; gives the file in which they sign."""
    for file in (copy / "tests").rglob("*.py"):
        file.unlink()
    (copy / "tests" / "faults" / "test_only.py").write_text(OF_FAULTS)
    done = copy / "done"
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of these tests themselves
    monkeypatch.setenv("DONE", str(done))
    return done


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        ([], ["quick", "thorough", "alone"]),
        (["--quick"], ["quick"]),
        (["tests/faults/test_only.py::test_alone"], ["alone"]),
    ],
)
def test_what_measures_is_run_after_the_other_tests_of_faults(
    copy: Path, fault_tests: Path, words: list[str], ran: list[str]
) -> None:
    result = run(copy / "ci" / "test_faults.sh", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert fault_tests.read_text().split() == ran


def test_a_test_of_faults_that_fails_or_is_not_there(copy: Path, fault_tests: Path) -> None:
    result = run(copy / "ci" / "test_faults.sh", "--quick", BREAK="1")
    assert result.returncode == 1 and "1 failed" in result.stdout
    assert run(copy / "ci" / "test_faults.sh", "-k", "no_such_test").returncode == 5
    result = run(copy / "ci" / "test.sh", "tests", "--numprocesses=0")
    assert result.returncode == 5, "ci/test.sh leaves tests/faults out"


OF_FAULTS = """
import os
from pathlib import Path

import pytest


def note(word):
    with Path(os.environ["DONE"]).open("a") as stream:
        print(word, file=stream)
    assert "BREAK" not in os.environ


def test_quick():
    note("quick")


@pytest.mark.thorough
def test_thorough():
    note("thorough")


@pytest.mark.thorough
@pytest.mark.alone
def test_alone():
    assert "PYTEST_XDIST_WORKER" not in os.environ
    note("alone")
"""


def test_tests_on_simulated_npus(copy: Path, stub_venv: Path) -> None:
    (copy / "tests" / "test_only.py").write_text(ON_NPUS)
    words = ["--quick", "tests/test_only.py", "--numprocesses=0"]
    result = run(copy / "ci" / "test_npu_sim.sh", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed, 1 deselected" in result.stdout
    assert "8 cards" in result.stderr


ON_NPUS = """
import os

import pytest
import torch

from zoo_common import device


@pytest.mark.device
def test_the_device():
    assert torch.ones(1, device=device.resolve(os.environ["ZOO_TEST_DEVICE"])).is_npu
    assert device.count("npu") == 8


def test_another():
    pass
"""


def test_simulated_npus_without_a_compiler_are_told_in_a_sentence(
    copy: Path, stub_venv: Path
) -> None:
    cache = str(copy.parent / "nothing built")
    result = run(copy / "ci" / "test_npu_sim.sh", NPU_SIM_CACHE=cache, CXX="no-such-compiler")
    assert result.returncode == 1
    assert "passed" not in result.stdout
    (told,) = result.stderr.splitlines()
    assert told.startswith("test_npu_sim: CXX is 'no-such-compiler', which is no program")


def test_help_on_simulated_npus(copy: Path) -> None:
    result = run(copy / "ci" / "test_npu_sim.sh", "--help")
    assert result.returncode == 0
    assert "--quick" in result.stdout and "#" not in result.stdout
    assert not (copy / ".venv").exists()
