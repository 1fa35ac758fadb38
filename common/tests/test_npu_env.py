"""The table of NPU variables, finding CANN, and test/env_npu.sh as a user sources it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoo_common import npu_env

REPOSITORY = Path(__file__).parents[2]
ENV_NPU = REPOSITORY / "contrib/cv/classification/Twins-ALTGVT-S/test/env_npu.sh"
NAMES = [variable.name for variable in npu_env.VARIABLES]


def make_cann(base: Path, package: str = "ascend-toolkit") -> Path:
    """A directory that looks like CANN; its script does what nounset and errexit forbid."""
    home = base / package
    (home / "latest").mkdir(parents=True)
    script = home / "set_env.sh"
    script.write_text(
        f'export ASCEND_HOME_PATH="{home}/latest"\n'
        'export LD_LIBRARY_PATH="$ASCEND_HOME_PATH/lib64:$LD_LIBRARY_PATH"\n'
        'export CANN_SAW_ARGUMENTS="$#"\n'
        "false\n"
        '[ -n "$NOT_SET_ANYWHERE" ]\n'
    )
    return script


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A stand-in for / with a space and a quote in its name."""
    path = tmp_path / "it's a root"
    path.mkdir()
    return path


def environment(root: Path, **more: str) -> dict[str, str]:
    """What a user's shell exports on a machine whose file system is ``root``."""
    base = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "HOME": str(root / "home"),
        npu_env.ROOT_VARIABLE: str(root),
    }
    return {**base, **more}


def bash(code: str, environ: dict[str, str], cwd: Path | None = None) -> list[str]:
    """Runs ``code`` with ``set -euo pipefail``; returns stdout's and stderr's lines apart."""
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{code}", "bash"],
        env=environ,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [done.stdout, done.stderr]


STATE = '{ compgen -v; declare -F; set +o; shopt; printf "%s\\n" "$-"; } | grep -v "^PIPESTATUS$"'


def test_tables_are_consistent() -> None:
    left_out = {item.name for item in npu_env.LEFT_OUT}
    assert len(set(NAMES)) == len(NAMES)
    assert not left_out & set(NAMES)
    assert {"PTCOPY_ENABLE", "TRI_COMBINED_ENABLE", "DYNAMIC_OP"} <= left_out
    assert all(v.value and v.reason and v.source for v in npu_env.VARIABLES)
    markdown = npu_env.markdown()
    assert all(f"| `{name}` |" in markdown for name in [*NAMES, *left_out])
    assert all(line.count("|") in (0, 4, 5) for line in markdown.splitlines())


def test_import_needs_no_torch_and_little_time() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import zoo_common.npu_env; "
        "print(time.perf_counter() - start, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    # The best of three, because a busy machine can stall any single start.
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(3)]
    assert all(run.split()[1:] == ["False", "False"] for run in runs)
    assert min(float(run.split()[0]) for run in runs) < 0.05


@pytest.mark.parametrize(
    ("package", "recorded", "base"),
    [
        ("ascend-toolkit", None, "usr/local/Ascend"),
        ("cann", None, "usr/local/Ascend"),
        ("nnae", None, "usr/local/Ascend"),
        ("ascend-toolkit", "/opt/my cann", "opt/my cann"),
        ("ascend-toolkit", None, "home/Ascend"),
    ],
)
def test_finds_cann(root: Path, package: str, recorded: str | None, base: str) -> None:
    environ = environment(root)
    assert npu_env.find_cann(environ) is None
    script = make_cann(root / base, package)
    if recorded:
        info = root / "etc/Ascend/ascend_cann_install.info"
        info.parent.mkdir(parents=True)
        info.write_text(f"UserName=root\nInstall_Path={recorded}\n")
    found = npu_env.find_cann(environ)
    assert found is not None
    assert found.set_env == script


def test_toolkit_goes_before_nnae_and_a_sourced_environment_before_both(root: Path) -> None:
    make_cann(root / "usr/local/Ascend", "nnae")
    script = make_cann(root / "usr/local/Ascend")
    found = npu_env.find_cann(environment(root))
    assert found is not None and found.set_env == script
    mine = root / "mine"
    mine.mkdir()
    assert npu_env.find_cann(environment(root, ASCEND_HOME_PATH=str(mine))) == (mine, None)
    gone = environment(root, ASCEND_HOME_PATH=str(root / "gone"))
    assert npu_env.find_cann(gone) == found


def test_toolkit_without_its_latest_link_is_passed_over(root: Path) -> None:
    script = make_cann(root / "usr/local/Ascend")
    (script.parent / "latest").rmdir()
    fallback = make_cann(root / "usr/local/Ascend", "nnae")
    found = npu_env.find_cann(environment(root))
    assert found is not None and found.set_env == fallback


def test_versions_are_read_from_the_installation(root: Path) -> None:
    environ = environment(root)
    assert npu_env.driver_version(environ) is None
    home = make_cann(root / "usr/local/Ascend").parent / "latest"
    found = npu_env.find_cann(environ)
    assert found is not None and npu_env.cann_version(found) is None
    info = home / "aarch64-linux/ascend_toolkit_install.info"
    info.parent.mkdir()
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.0.RC1\n")
    assert npu_env.cann_version(found) == "8.0.RC1"
    driver = root / "usr/local/Ascend/driver/version.info"
    driver.parent.mkdir()
    driver.write_text("Version=23.0.3\n")
    assert npu_env.driver_version(environ) == "23.0.3"


def test_sourcing_without_cann_says_so_in_one_line_and_changes_nothing(root: Path) -> None:
    code = f'before=; before=$({STATE}); source "{ENV_NPU}"; after=$({STATE})\n'
    code += 'diff <(echo "$before") <(echo "$after")'
    out, err = bash(code, environment(root))
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "no CANN found" in err and str(root / "usr/local/Ascend") in err


def test_sourcing_sets_the_table_and_leaves_nothing_else_behind(root: Path) -> None:
    make_cann(root / "usr/local/Ascend")
    show_values = f'for name in {" ".join(NAMES)}; do printf "%s=%s\\n" $name "${{!name}}"; done'
    code = f'before=; before=$({STATE}); source "{ENV_NPU}" ; after=$({STATE})\n'
    code += f'diff <(echo "$before") <(echo "$after") | grep "^[<>]" || :\n{show_values}\n'
    code += "echo $CANN_SAW_ARGUMENTS; env | grep -c TASK_QUEUE_ENABLE"
    out, err = bash(code, environment(root))
    assert err == ""
    lines = out.splitlines()
    changed = {line[2:] for line in lines if line.startswith(("<", ">"))}
    cann = {"ASCEND_HOME_PATH", "LD_LIBRARY_PATH", "CANN_SAW_ARGUMENTS"}
    assert changed == {*NAMES, *cann}
    values = [line for line in lines if not line.startswith(("<", ">"))]
    assert values == [*(f"{v.name}={v.value}" for v in npu_env.VARIABLES), "0", "1"]


def test_values_of_the_user_are_kept(root: Path) -> None:
    make_cann(root / "usr/local/Ascend")
    # HCCL_CONNECT_TIMEOUT is set in the shell only, not exported.
    code = f'HCCL_CONNECT_TIMEOUT=300; source "{ENV_NPU}" --show; env'
    own = {"TASK_QUEUE_ENABLE": "a b'c", "COMBINED_ENABLE": "", "PYTORCH_ALLOC_CONF": "x:1"}
    out, err = bash(code, environment(root, **own))
    lines = out.splitlines()
    assert err == ""
    assert "kept: TASK_QUEUE_ENABLE=a b'c (yours)" in lines
    assert "kept: COMBINED_ENABLE= (yours)" in lines
    assert "kept: PYTORCH_ALLOC_CONF=x:1 (yours)" in lines
    assert any(line.startswith("HCCL_CONNECT_TIMEOUT=300  ") for line in lines)
    exported = [line for line in lines if "  " not in line]
    assert "HCCL_CONNECT_TIMEOUT=300" in exported
    assert "TASK_QUEUE_ENABLE=a b'c" in exported
    assert not any(line.startswith("PYTORCH_NPU_ALLOC_CONF") for line in exported)


def test_sourcing_twice_changes_nothing_more(root: Path) -> None:
    make_cann(root / "usr/local/Ascend")
    code = f'source "{ENV_NPU}"; first=$(env | sort); source "{ENV_NPU}" --show\n'
    code += '[ "$first" = "$(env | sort)" ]'
    out, err = bash(code, environment(root))
    assert err == ""
    assert "sourced already" in out
    assert "kept: TASK_QUEUE_ENABLE=2 (already set)" in out


def put_bare_python_first(environ: dict[str, str], directory: Path) -> None:
    """A python3 on the path that has no package installed."""
    bare = directory / "bare/python3"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    environ["PATH"] = f"{bare.parent}:{environ['PATH']}"


def test_repository_environment_is_used_when_the_active_python_lacks_the_zoo(
    root: Path, tmp_path: Path
) -> None:
    """From another directory, with spaces and a quote in every path."""
    repository = tmp_path / "my 'zoo'"
    script = repository / "contrib/x/test/env_npu.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ENV_NPU, script)
    python = repository / ".venv/bin/python3"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" > "$HOME.called"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    make_cann(root / "usr/local/Ascend")
    environ = environment(root, SCRIPT=str(script))
    put_bare_python_first(environ, tmp_path)
    out, err = bash('source "$SCRIPT"; echo $TASK_QUEUE_ENABLE', environ, cwd=tmp_path)
    assert (out, err) == ("2\n", "")
    assert (root / "home.called").read_text().strip() == "-m zoo_common.npu_env --shell"
    out, err = bash("source env_npu.sh; echo $TASK_QUEUE_ENABLE", environ, cwd=script.parent)
    assert (out, err) == ("2\n", "")


def test_python_without_zoo_common_is_told_how_to_get_it(root: Path, tmp_path: Path) -> None:
    make_cann(root / "usr/local/Ascend")
    script = tmp_path / "env_npu.sh"  # no repository above it
    shutil.copy(ENV_NPU, script)
    environ = environment(root)
    put_bare_python_first(environ, tmp_path)
    code = f'status=0; source "{script}" || status=$?; echo $status ${{TASK_QUEUE_ENABLE-unset}}'
    out, err = bash(code, environ)
    assert out == "1 unset\n"
    assert len(err.splitlines()) == 1
    assert "bash tools/quickstart.sh" in err


def test_module_prints_text_and_json(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment(root).items():
        monkeypatch.setenv(name, value)
    for name in [*NAMES, "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "PYTORCH_ALLOC_CONF"]:
        monkeypatch.delenv(name, raising=False)
    assert npu_env.main([]) == 0
    assert "no CANN found" in capsys.readouterr().out
    npu_env.main(["--json"])
    assert json.loads(capsys.readouterr().out)["cann"] is None
    script = make_cann(root / "usr/local/Ascend")
    npu_env.main(["--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["cann"]["source"] == str(script)
    assert document["exports"] == {v.name: v.value for v in npu_env.VARIABLES}
    npu_env.main([])
    assert "TASK_QUEUE_ENABLE=2  " in capsys.readouterr().out
    npu_env.main(["--markdown"])
    assert capsys.readouterr().out == npu_env.markdown()
    with pytest.raises(SystemExit):
        npu_env.main(["--json", "--shell"])
