"""What the tests of faults share."""

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import TOY, run_to_end


def copy_of_toy(parent: Path) -> Path:
    directory = parent / "it's a; model"
    shutil.copytree(TOY, directory, ignore=shutil.ignore_patterns("__pycache__", "output"))
    return directory


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A copy of the toy model directory, in a path that quoting mistakes would break."""
    return copy_of_toy(tmp_path)


@pytest.fixture(scope="session")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Gives the output of a run of the toy in two processes that nothing happened to, by steps."""
    parent = tmp_path_factory.mktemp("left alone")
    directory = copy_of_toy(parent)

    def output_of(steps: int) -> Path:
        output = parent / f"{steps} steps"
        if not output.is_dir():
            words = ["train_2p", "--deterministic", f"--steps={steps}"]
            done = run_to_end(directory, *words, output=output)
            assert done.code == 0, done.err
        return output

    return output_of


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory for outputs that does not outlive the test: pytest keeps those of three runs."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def output(scratch: Path) -> Path:
    """The output directory of a test's only run."""
    return scratch / "output"


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
