"""Environment variables that Ascend NPUs want, and where CANN is: one table for all models.

``source test/env_npu.sh`` evaluates what ``python3 -m zoo_common.npu_env --shell`` prints. A value
that the user has set is never changed, and on a machine without CANN nothing is set at all. The
module imports no torch, so a shell waits for it some hundredths of a second.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT_VARIABLE = "ZOO_NPU_ENV_ROOT"
"""A directory that stands for ``/`` when CANN and the driver are looked for (a container's file
system seen from outside, a test's stand-in)."""

_HOME_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")

_TORCH_NPU = "torch_npu documentation, environment variable reference"
_CANN = "CANN documentation, environment variable reference"


class Variable(NamedTuple):
    """A variable that is set; left alone where the user has set it or one of ``instead``."""

    name: str
    value: str
    reason: str
    source: str
    instead: tuple[str, ...] = ()


class LeftOut(NamedTuple):
    """Something that the original zoo's env_npu.sh files do and this one does not."""

    name: str
    original: str
    reason: str


VARIABLES = (
    Variable(
        "TASK_QUEUE_ENABLE",
        "2",
        "Queues operators and moves their workspace handling off the Python thread; level 2 is "
        "what the documentation recommends. It may raise the memory peak: set 1 (the default, and "
        "the original's value) when memory runs out.",
        f"{_TORCH_NPU}: TASK_QUEUE_ENABLE",
    ),
    Variable(
        "CPU_AFFINITY_CONF",
        "1",
        "Gives each card's process an equal share of the cores, as the original's taskset did. "
        "It does nothing in a process that is pinned already. 2 pins single threads: documented "
        "as faster for some models and slower for others, so measure first.",
        f"{_TORCH_NPU}: CPU_AFFINITY_CONF",
    ),
    Variable(
        "PYTORCH_NPU_ALLOC_CONF",
        "expandable_segments:True",
        "Lets memory blocks grow instead of fragmenting when evaluation uses other shapes than "
        "training. Needs driver (HDK) 23.0 or newer. Not set beside PYTORCH_ALLOC_CONF, since "
        "torch_npu ends the process when it finds both.",
        f"{_TORCH_NPU}: PYTORCH_NPU_ALLOC_CONF",
        instead=("PYTORCH_ALLOC_CONF",),
    ),
    Variable(
        "COMBINED_ENABLE",
        "1",
        "Makes a tensor that two chained views left non-contiguous contiguous in one copy; off by "
        "default.",
        f"{_TORCH_NPU}: COMBINED_ENABLE",
    ),
    Variable(
        "HCCL_CONNECT_TIMEOUT",
        "1800",
        "Seconds that a rank waits for the others to connect; the default of 120 is too short when "
        "one rank still indexes a large data set. A rank that dies does not cost this wait: the "
        "launcher ends the run.",
        f"{_CANN}: HCCL_CONNECT_TIMEOUT",
    ),
    Variable(
        "HCCL_WHITELIST_DISABLE",
        "1",
        "No list of allowed host addresses is checked between the hosts of a run; the default by "
        "now, said for older releases.",
        f"{_CANN}: HCCL_WHITELIST_DISABLE",
    ),
    Variable(
        "ASCEND_SLOG_PRINT_TO_STDOUT",
        "0",
        "CANN's log goes to its own files, not between the lines of the training log.",
        f"{_CANN}: ASCEND_SLOG_PRINT_TO_STDOUT",
    ),
    Variable(
        "ASCEND_GLOBAL_LOG_LEVEL",
        "3",
        "CANN logs errors only (0 debug, 1 info, 2 warning, 3 error); lower levels slow the host.",
        f"{_CANN}: ASCEND_GLOBAL_LOG_LEVEL",
    ),
    Variable(
        "ASCEND_GLOBAL_EVENT_ENABLE",
        "0",
        "No event log, which is on by default and costs host time.",
        f"{_CANN}: ASCEND_GLOBAL_EVENT_ENABLE",
    ),
)

LEFT_OUT = (
    LeftOut("PTCOPY_ENABLE", "1", "torch_npu no longer reads it."),
    LeftOut("TRI_COMBINED_ENABLE", "1", "torch_npu no longer reads it."),
    LeftOut("DYNAMIC_OP", "ADD#MUL", "torch_npu no longer reads it."),
    LeftOut("SCALAR_TO_HOST_MEM", "1", "torch_npu no longer reads it."),
    LeftOut("ENABLE_RUNTIME_V2", "1", "torch_npu no longer reads it."),
    LeftOut(
        "ASCEND_ENHANCE_ENABLE", "1", "Only the profiler lists it; torch_npu does not act on it."
    ),
    LeftOut(
        "msnpureport -g error -d 0 ... 7",
        "log level of eight cards",
        "Needs root and the driver's tools, changes the cards for every user of the machine, and "
        "fails where there are fewer than eight. An administrator sets it once.",
    ),
    LeftOut(
        "msnpureport -e disable",
        "no event log on the cards",
        "The same: root, and it changes the machine, not this shell.",
    ),
    LeftOut(
        "ulimit -SHn 512000",
        "limit of open files",
        "Raising the hard limit needs root, and it fails without; the data loaders here keep few "
        "files open.",
    ),
)


class Cann(NamedTuple):
    """An installation of CANN.

    Attributes:
        home: the directory that ASCEND_HOME_PATH names.
        set_env: the script to source, or None when this environment has sourced it already.
    """

    home: Path
    set_env: Path | None


class Plan(NamedTuple):
    """What sourcing env_npu.sh does in one environment."""

    cann: Cann | None
    exports: tuple[Variable, ...]
    kept: tuple[tuple[Variable, str], ...]


def _system_root(environ: Mapping[str, str]) -> Path:
    return Path(environ.get(ROOT_VARIABLE) or "/")


def _entries(path: Path) -> dict[str, str]:
    """Reads ``key=value`` lines; an absent or unreadable file has none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines)
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def _install_directories(environ: Mapping[str, str]) -> list[Path]:
    """The directories that may hold CANN, the most explicit one first."""
    root = _system_root(environ)
    recorded = _entries(root / "etc/Ascend/ascend_cann_install.info").get("Install_Path")
    bases = [root / recorded.lstrip("/")] if recorded else []
    bases.append(root / "usr/local/Ascend")
    if home := environ.get("HOME"):
        bases.append(Path(home) / "Ascend")
    return list(dict.fromkeys(bases))


def find_cann(environ: Mapping[str, str] | None = None) -> Cann | None:
    """Finds CANN where the original zoo does, and where newer releases install themselves.

    An environment that has sourced set_env.sh is believed. Otherwise the directory recorded in
    /etc/Ascend/ascend_cann_install.info, /usr/local/Ascend and ~/Ascend are tried; in each the
    toolkit (``ascend-toolkit``, from CANN 8.5 on ``cann``) goes before the run-time only ``nnae``.

    Args:
        environ: the environment to judge; ``os.environ`` by default.
    """
    environ = os.environ if environ is None else environ
    for name in _HOME_VARIABLES:
        if environ.get(name) and Path(environ[name]).is_dir():
            return Cann(Path(environ[name]), None)
    layouts = (("ascend-toolkit", "latest"), ("cann", "."), ("nnae", "latest"))
    for base in _install_directories(environ):
        for package, home in layouts:
            set_env = base / package / "set_env.sh"
            if (base / package / home).is_dir() and set_env.is_file():
                return Cann(base / package / home, set_env)
    return None


def cann_version(cann: Cann) -> str | None:
    """The release of CANN as its installation records it, or None."""
    for pattern in ("ascend_*_install.info", "*-linux/ascend_*_install.info"):
        for path in sorted(cann.home.glob(pattern)):
            if version := _entries(path).get("version"):
                return version
    return _entries(cann.home / "compiler/version.info").get("Version")


def driver_version(environ: Mapping[str, str] | None = None, part: str = "driver") -> str | None:
    """The release of the NPU driver, or of the ``firmware``, as its installation records it."""
    root = _system_root(os.environ if environ is None else environ)
    recorded = _entries(root / "etc/ascend_install.info").get("Driver_Install_Path_Param")
    base = root / (recorded or "/usr/local/Ascend").lstrip("/")
    return _entries(base / part / "version.info").get("Version")


def make_plan(environ: Mapping[str, str] | None = None) -> Plan:
    """Decides what to source and to export; without CANN that is nothing.

    Args:
        environ: the environment to judge; ``os.environ`` by default.
    """
    environ = os.environ if environ is None else environ
    cann = find_cann(environ)
    if cann is None:
        return Plan(None, (), ())
    exports = []
    kept = []
    for variable in VARIABLES:
        name = next((n for n in (variable.name, *variable.instead) if n in environ), None)
        if name is None:
            exports.append(variable)
        else:
            kept.append((variable, f"{name}={environ[name]}"))
    return Plan(cann, tuple(exports), tuple(kept))


def no_cann_message(environ: Mapping[str, str] | None = None) -> str:
    """Says in one line where CANN was looked for."""
    environ = os.environ if environ is None else environ
    places = [str(base) for base in _install_directories(environ)]
    places += [environ[name] for name in _HOME_VARIABLES if environ.get(name)]
    return f"env_npu.sh: no CANN found in {', '.join(places)}; nothing was set."


def _kept_line(variable: Variable, text: str) -> str:
    whose = "already set" if text == f"{variable.name}={variable.value}" else "yours"
    return f"kept: {text} ({whose})"


def _source_line(cann: Cann) -> str:
    return f"CANN: {cann.set_env}" if cann.set_env else f"CANN: {cann.home}, sourced already"


def shell_code(plan: Plan, *, show: bool = False) -> str:
    """Bash code that carries the plan out; safe under ``set -euo pipefail``.

    Args:
        plan: what to do.
        show: also print each variable with its value and reason.
    """
    if plan.cann is None:
        return f"echo {shlex.quote(no_cann_message())} >&2\n"
    lines = []
    if plan.cann.set_env:
        # CANN's script reads unset variables and ends in failing tests. The function keeps the
        # caller's arguments from it.
        source = f"source {shlex.quote(str(plan.cann.set_env))} || :"
        lines += [
            "__zoo_source_cann() {",
            f"case $- in *u*) set +u; {source}; set -u ;; *) {source} ;; esac",
            "}",
            "__zoo_source_cann",
            "unset -f __zoo_source_cann",
        ]
    # ${X-value}: a shell variable that the user has set but not exported keeps its value as well.
    lines += [f"export {v.name}=${{{v.name}-{v.value}}}" for v in plan.exports]
    if show:
        lines.append(f"echo {shlex.quote(_source_line(plan.cann))}")
        lines += [
            f'printf "%s=%s  %s\\n" {v.name} "${v.name}" {shlex.quote(v.reason)}'
            for v in plan.exports
        ]
        lines += [f"echo {shlex.quote(_kept_line(*kept))}" for kept in plan.kept]
    return "\n".join(lines) + "\n"


def text(plan: Plan) -> str:
    """The plan for people: every variable with value and reason."""
    if plan.cann is None:
        return no_cann_message() + "\n"
    lines = [_source_line(plan.cann)]
    lines += [f"{v.name}={v.value}  {v.reason}" for v in plan.exports]
    lines += [_kept_line(*kept) for kept in plan.kept]
    return "\n".join(lines) + "\n"


def json_text(plan: Plan) -> str:
    """The plan and both tables as a JSON object."""
    import json

    cann = plan.cann
    document = {
        "cann": None
        if cann is None
        else {
            "home": str(cann.home),
            "source": str(cann.set_env) if cann.set_env else None,
            "version": cann_version(cann),
        },
        "driver": driver_version(),
        "exports": {v.name: v.value for v in plan.exports},
        "kept": [text for _, text in plan.kept],
        "variables": [v._asdict() for v in VARIABLES],
        "left_out": [item._asdict() for item in LEFT_OUT],
    }
    return json.dumps(document, indent=2) + "\n"


def markdown() -> str:
    """Both tables as Markdown, for the README."""
    lines = ["| variable | value | reason | source |", "| --- | --- | --- | --- |"]
    lines += [f"| `{v.name}` | `{v.value}` | {v.reason} | {v.source} |" for v in VARIABLES]
    lines += ["", "Left out of what the original's env_npu.sh files do:", ""]
    lines += ["| what | in the original | why not here |", "| --- | --- | --- |"]
    lines += [f"| `{item.name}` | {item.original} | {item.reason} |" for item in LEFT_OUT]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan for this environment in the form that the options ask for."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python3 -m zoo_common.npu_env",
        description="Shows what `source test/env_npu.sh` sets here, and why.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--shell", action="store_true", help="bash code that sets it")
    form.add_argument("--json", action="store_true", help="plan and tables as JSON")
    form.add_argument("--markdown", action="store_true", help="the tables for a README")
    parser.add_argument("--show", action="store_true", help="with --shell: code that tells, too")
    options = parser.parse_args(argv)
    if options.markdown:
        sys.stdout.write(markdown())
        return 0
    plan = make_plan()
    if options.shell:
        sys.stdout.write(shell_code(plan, show=options.show))
    elif options.json:
        sys.stdout.write(json_text(plan))
    else:
        sys.stdout.write(text(plan))
    return 0


if __name__ == "__main__":
    sys.exit(main())
