"""The output directory: one run at a time, nothing of the user's lost."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from zoo_common.errors import UserError
from zoo_common.outputs import occupy


def finish_a_run(directory: Path, text: str = "earlier") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(text)


def test_an_earlier_run_is_moved_aside_whole(tmp_path: Path) -> None:
    directory = tmp_path / "o u t" / "0"
    for text in ("first", "second"):
        finish_a_run(directory, text)
        with occupy(directory, keep=False) as aside:
            assert aside is not None
            assert (aside / "config.yaml").read_text() == text
            assert {item.name for item in directory.iterdir()} == {".lock", ".ranks"}
        assert list(directory.iterdir()) == []
    assert len(list(directory.parent.iterdir())) == 3


def test_what_a_killed_launcher_left_is_no_file_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "0" / ".ranks").mkdir(parents=True)
    (tmp_path / "0" / ".ranks" / "0.word").write_bytes(b"left")
    with occupy(tmp_path / "0", keep=False) as aside:
        assert aside is None
        assert list((tmp_path / "0" / ".ranks").iterdir()) == []


def test_a_resumed_run_finds_its_files(tmp_path: Path) -> None:
    finish_a_run(tmp_path / "0")
    with occupy(tmp_path / "0", keep=True) as aside:
        assert aside is None
        assert (tmp_path / "0" / "config.yaml").read_text() == "earlier"


def test_a_directory_of_the_users_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(UserError, match="holds files that no run wrote"),
        occupy(tmp_path, keep=False),
    ):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with occupy(tmp_path / "0", keep=False):
        script = (
            "import sys; from pathlib import Path; from zoo_common.outputs import occupy\n"
            "with occupy(Path(sys.argv[1]), keep=True): pass"
        )
        other = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "0"], capture_output=True, text=True
        )
    assert "Another run is writing to" in other.stderr
    with occupy(tmp_path / "0", keep=True):
        pass


def test_places_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (Path("/proc/zoo"), tmp_path / "file" / "0"):
        with pytest.raises(UserError, match="--output_dir"), occupy(directory, keep=False):
            pass


def test_a_full_disk_is_told_before_the_start(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match="free some room"), occupy(tmp_path, keep=True):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
