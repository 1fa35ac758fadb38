"""Starts a run of a model directory: ``python3 -m zoo_common.launch RUN [OPTION ...]``.

Reads ``test/runs.yaml`` of the working directory, checks everything that can be checked, starts
the ranks, follows them, writes the report, and ends with the training's exit code. torch is
imported when the checks need it and not before: help comes at once.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo_common import config as configs
from zoo_common import report, runs
from zoo_common.config import Field
from zoo_common.errors import UserError
from zoo_common.runs import CALLER_VARIABLE, Model, RunSpec
from zoo_common.worker import LOG_VARIABLE, PIN_VARIABLE

if TYPE_CHECKING:
    from zoo_common.agent import Failure, Outcome
    from zoo_common.preflight import Place


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        model = runs.load(Path.cwd())
        if words and words[0] == "--list":
            print(_list(model), flush=True)
            return 0
        if not words or words[0] in ("-h", "--help"):
            print(f"usage: python3 -m zoo_common.launch RUN [OPTION ...]\n\n{_list(model)}")
            print("\n'RUN --help' lists the options of a run.", flush=True)
            return 0 if words else 2
        name, *rest = words
        spec = model.run(name)
        if "-h" in rest or "--help" in rest:
            print(_help(model, name, spec), flush=True)
            return 0
        return _launch(model, name, spec, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # --help | head: who read has gone, also for what Python still holds
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _launch(model: Model, name: str, spec: RunSpec, words: list[str]) -> int:
    started = time.time()
    config = model.config(spec, words, os.environ)

    from zoo_common import outputs, preflight

    caller = Path(os.environ.get(CALLER_VARIABLE, "."))
    preflight.absolute_paths(model, config, caller.absolute())
    preflight.check_required(model, spec, config)
    preflight.check_weights(model, config)
    run = config.run
    if not run.output_dir:
        run.output_dir = str(outputs.default_directory(model.directory, run.device_id, spec.kind))
    if config.launch.node_rank:
        run.output_dir += f"_node{config.launch.node_rank}"  # a shared disk is not written twice
    directory = Path(run.output_dir)
    if run.resume == "last" and config.launch.node_rank == 0:
        preflight.check_checkpoint_file(directory / "checkpoints" / "last.pth", "--resume")
    preflight.check_data(spec, config)
    if model.check_files is not None:
        model.check_files(config, spec.kind)
    preflight.fetch_weights(model, config)
    place = preflight.place(spec, config)
    run.device = place.device
    with outputs.occupy(directory, keep=bool(run.resume)) as aside:
        if aside is not None:
            print(f"earlier output moved to {aside}")
            preflight.follow_checkpoints(model, config, directory, aside)
        (directory / "result.json").unlink(missing_ok=True)
        _describe(model, name, config, place)
        outcome = _run_ranks(spec, config, place, directory)
        result = _result(directory, outcome) | {
            "run": name,
            "kind": spec.kind,
            "network": model.network,
            "e2e_seconds": round(time.time() - started, 3),
        }
        if place.node_rank == 0:
            _write(directory, _complete(result, config, place))
    return _exit_code(outcome, result)


def _run_ranks(spec: RunSpec, config: Any, place: "Place", directory: Path) -> "Outcome":
    from zoo_common import agent, preflight
    from zoo_common.console import Console

    file = directory / "config.yaml"
    file.write_text(configs.to_yaml(config), encoding="utf-8")
    first = config.run.device_id + place.node_rank * place.processes
    logs = [directory / f"train_{first + local}.log" for local in range(place.processes)]
    console = Console(logs[0], directory / "metrics.jsonl")
    try:
        return agent.run(
            [sys.executable, "-m", "zoo_common.worker", spec.entry, f"--config={file}"],
            place,
            environment={
                **share_of_cores(place, config.run.threads),
                **preflight.network(config.launch.local_addr),
                LOG_VARIABLE: "\n".join(map(str, logs)),
            },
            grace_s=config.run.stop_grace_s,
            join_timeout_s=config.launch.join_timeout_s,
            local_addr=config.launch.local_addr,
        )
    finally:
        console.stop()


def share_of_cores(place: "Place", threads: int) -> dict[str, str]:
    """Each rank computes with its share of the cores, or with as many threads as the user says.

    Pinning helps when a rank has several cores. NPUs are left to CPU_AFFINITY_CONF, which knows
    which cores are near a card and does nothing in a process that is pinned already.
    """
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    share = max(1, cores // place.processes)
    environment = {}
    if threads or "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(threads or share)
    if affinity and place.device != "npu" and place.processes > 1 and share > 1:
        environment[PIN_VARIABLE] = "1"
    return environment


def _result(directory: Path, outcome: "Outcome") -> dict[str, Any]:
    """What the first rank left, unless a rank failed: then no number of it can be trusted."""
    if outcome.failure is not None:
        return {"status": "failed"}
    file = directory / "result.json"
    if file.is_file():
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result
    if outcome.received:
        return {"status": "interrupted"}
    return {"status": "failed"}


def _complete(result: dict[str, Any], config: Any, place: "Place") -> dict[str, Any]:
    """A result with every key, whatever happened."""
    empty = {
        "metric": None,
        "metrics": {},
        "throughput": None,
        "final_loss": None,
        "batch_size": config.data.batch_size,
        "world_size": place.world_size,
        "nnodes": place.nnodes,
    }
    return empty | result


def _write(directory: Path, result: dict[str, Any]) -> None:
    """The record and the report; on a full disk the training's own error matters more."""
    with contextlib.suppress(OSError):
        partial = directory / ".result.json.partial"
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(directory / "result.json")
        for line in report.write(directory, result):
            print(line, flush=True)


def _exit_code(outcome: "Outcome", result: dict[str, Any]) -> int:
    if outcome.failure is not None:
        _tell(outcome.failure)
        code = outcome.failure.code
        return code if code > 0 else 128 - code
    received = outcome.received or result.get("signal")
    if result["status"] == "interrupted" and received:
        name = signal.Signals(received).name
        print(f"stopped by {name}; continue with --resume", file=sys.stderr)
        return 128 + int(received)
    return 0 if result["status"] == "completed" else 1


def _tell(failure: "Failure") -> None:
    """The failed rank's own words, last on the console."""
    sys.stdout.flush()
    if failure.code == 2 and not failure.traceback:
        print(f"error: {failure.message}", file=sys.stderr)
        return
    print(f"rank {failure.rank} failed: {failure.message}", file=sys.stderr)
    if failure.traceback:
        print(failure.traceback.rstrip(), file=sys.stderr)


def _describe(model: Model, name: str, config: Any, place: "Place") -> None:
    where = f" on {place.nnodes} machines" if place.nnodes > 1 else ""
    print(
        f"{model.network} {name}: {place.processes} {place.device} process(es){where}, "
        f"output in {config.run.output_dir}",
        flush=True,
    )


def _list(model: Model) -> str:
    width = max(len(name) for name in model.runs)
    rows = [f"  {name:{width}}  {spec.help}" for name, spec in model.runs.items()]
    return "\n".join([f"Runs of {model.network}:", *rows])


def _help(model: Model, name: str, spec: RunSpec) -> str:
    config = model.config(spec, [], os.environ)
    by_path = {item.path: item for item in model.fields()}
    lines = [
        f"usage: bash test/{name}.sh [OPTION ...]",
        f"\n{spec.help}. Config: {spec.config}\n",
        "Options (--name=VALUE or --name VALUE):",
    ]
    for option in model.options():
        path = option.targets[0].partition("=")[0]
        named = option.kind in ("flag", "key")  # said by what it sets
        note = option.help or (", ".join(option.targets) if named else by_path[path].help)
        default = "" if named else _default(config, path)
        lines.append(f"  {option.name:22} {note}{default}")
    lines.append("\nAny setting of the config (section.field=VALUE):")
    lines += [_setting_line(item, config) for item in by_path.values()]
    return "\n".join(lines)


def _setting_line(item: Field, config: Any) -> str:
    choices = item.metadata.get("choices") or ()
    allowed = f" ({' | '.join(choices)})" if choices else ""
    return f"  {item.path:28} {item.help}{allowed}{_default(config, item.path)}"


def _default(config: Any, path: str) -> str:
    for part in path.split("."):
        config = getattr(config, part)
    return "" if config == "" else f" [{config}]"


if __name__ == "__main__":
    sys.exit(main())
