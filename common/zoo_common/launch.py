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
from typing import TYPE_CHECKING, Any, NoReturn

from zoo_common import config as configs
from zoo_common import report, runs
from zoo_common.config import Field
from zoo_common.errors import UserError
from zoo_common.runs import CALLER_VARIABLE, Model, RunSpec
from zoo_common.worker import LOG_VARIABLE, PIN_VARIABLE, REASON_VARIABLE

if TYPE_CHECKING:
    from zoo_common.agent import Outcome
    from zoo_common.meeting import Word
    from zoo_common.preflight import Place


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        model = runs.load(Path.cwd())
        if words and words[0] == "--list":
            _show(_list(model))
            return 0
        if not words or words[0] in ("-h", "--help"):
            _show(f"usage: python3 -m zoo_common.launch RUN [OPTION ...]\n\n{_list(model)}")
            _show("\n'RUN --help' lists the options of a run.")
            return 0 if words else 2
        name, *rest = words
        spec = model.run(name)
        if "-h" in rest or "--help" in rest:
            _show(_help(model, name, spec))
            return 0
        return _launch(model, name, spec, rest)
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _launch(model: Model, name: str, spec: RunSpec, words: list[str]) -> int:
    started = time.time()
    config = model.config(spec, words, os.environ)

    from zoo_common import outputs, preflight, rank_table

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
    keep = bool(run.resume) or (run.auto_resume and outputs.holds_a_run(directory))
    if run.resume == "last" and config.launch.node_rank == 0:
        preflight.check_checkpoint_there(directory / "checkpoints")
    preflight.name_run(model, config, directory, keep=keep)
    preflight.check_data(spec, config)
    if model.check_files is not None:
        model.check_files(config, spec.kind)
    preflight.fetch_weights(model, config)
    place = preflight.place(spec, config)
    rank_table.check(place, run.device_id, os.environ)
    run.device = place.device
    with outputs.occupy(directory, keep=keep) as aside:
        if aside is not None:
            _show(f"earlier output moved to {aside}")
            preflight.follow_checkpoints(model, config, directory, aside)
        (directory / "result.json").unlink(missing_ok=True)
        _describe(model, name, config, place)
        outcome = _run_ranks(model, spec, config, place, directory)
        result = _result(directory, outcome) | {
            "run": name,
            "kind": spec.kind,
            "network": model.network,
            "e2e_seconds": round(time.time() - started, 3),
        }
        if place.node_rank == 0:
            _write(directory, _complete(result, config, place, directory))
    return _exit_code(outcome, result, place.node_rank)


def _run_ranks(
    model: Model, spec: RunSpec, config: Any, place: "Place", directory: Path
) -> "Outcome":
    from zoo_common import agent, outputs, preflight, same
    from zoo_common.console import Console
    from zoo_common.meeting import Meeting

    launch = config.launch
    file = directory / "config.yaml"
    try:
        _put(file, configs.to_yaml(config))
    except OSError as error:
        raise UserError(
            f"Cannot write {file}: {error.strerror}; free some room or choose another --output_dir."
        ) from error
    first = config.run.device_id + place.node_rank * place.processes
    logs = [directory / f"train_{first + local}.log" for local in range(place.processes)]
    meeting = Meeting(
        place,
        same.facts(model, spec, config, place) if place.nnodes > 1 else {},
        local_addr=launch.local_addr,
        join_timeout_s=launch.join_timeout_s,
        last_call_s=launch.last_call_s,
        lost_after_s=launch.lost_after_s,
        elastic=place.nnodes > 1 and (launch.max_restarts > 0 or place.fewest < place.nnodes),
    )
    console = Console(logs[0], directory / "metrics.jsonl")

    def announce(round: int, machines: Sequence[int], reason: str) -> None:
        (directory / "result.json").unlink(missing_ok=True)  # of ranks that made room
        os.environ[REASON_VARIABLE] = reason
        if reason:
            where = f" on {len(machines)} of {place.nnodes} machines" if place.nnodes > 1 else ""
            _say(f"{reason}\nstart {round} of the ranks{where}")
            console.resume()

    plan = agent.Plan(
        command=[sys.executable, "-m", "zoo_common.worker", spec.entry, f"--config={file}"],
        environment={
            **share_of_cores(place, config.run.threads),
            **preflight.network(launch.local_addr),
            LOG_VARIABLE: "\n".join(map(str, logs)),
        },
        scratch=directory / outputs.RANKS,
        grace_s=config.run.stop_grace_s,
        hang_timeout_s=config.run.hang_timeout_s,
        max_restarts=launch.max_restarts,
        is_saving=lambda: any((directory / "checkpoints").glob(".*")),
        was_interrupted=lambda: _read_result(directory).get("status") == "interrupted",
        on_start=announce,
    )
    try:
        return agent.run(plan, place, meeting)
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
    return _read_result(directory) or {"status": "interrupted" if outcome.received else "failed"}


def _read_result(directory: Path) -> dict[str, Any]:
    file = directory / "result.json"
    content: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    return content


def _complete(
    result: dict[str, Any], config: Any, place: "Place", directory: Path
) -> dict[str, Any]:
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
    file = directory / "starts.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return empty | result | {"restarts": [json.loads(line) for line in lines[1:]]}


def _write(directory: Path, result: dict[str, Any]) -> None:
    """The record and the report; on a full disk the training's own error matters more."""
    with contextlib.suppress(OSError):
        _put(directory / "result.json", json.dumps(result, indent=1) + "\n")
        for line in report.write(directory, result):
            _show(line)


def _put(file: Path, text: str) -> None:
    """Writes a file whole, or leaves the one that is there."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _exit_code(outcome: "Outcome", result: dict[str, Any], machine: int) -> int:
    if outcome.started == 0 and outcome.failure is None and outcome.received is None:
        _say("the run ended on the other machines; this one was not needed")
        return 0
    if outcome.failure is not None:
        _tell(outcome.failure, machine)
        code = outcome.failure.code
        return code if code > 0 else 128 - code
    received = outcome.received or result.get("signal")
    if result["status"] == "interrupted" and received:
        name = signal.Signals(received).name
        _say(f"stopped by {name}; continue with --resume or --auto_resume")
        return 128 + int(received)
    return 0 if result["status"] == "completed" else 1


def _show(text: str) -> None:
    """Prints; when who read it has gone, as with ``| head``, the run and its exit code go on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # also for what Python still holds
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    """Prints on standard error, behind what stands on standard output."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def _tell(failure: "Word", machine: int) -> None:
    """The failed rank's own words, last on the console."""
    where = f"on machine {failure.machine}, " if failure.machine != machine else ""
    if failure.rank < 0:
        _say(f"the run failed: {where}{failure.message}")
        return
    if failure.code == 2 and not failure.traceback and not where:
        _say(f"error: {failure.message}")
        return
    _say(f"{where}rank {failure.rank} failed: {failure.message}")
    if failure.traceback:
        _say(failure.traceback.rstrip())


def _describe(model: Model, name: str, config: Any, place: "Place") -> None:
    where = f" on {place.machines} machines" if place.nnodes > 1 else ""
    _show(
        f"{model.network} {name}: {place.processes} {place.device} process(es){where}, "
        f"output in {config.run.output_dir}"
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


def _end(code: int) -> NoReturn:
    """Ends without taking the interpreter down.

    A thread that waits for a machine that is gone sits in torch's store, and would abort the
    process when it is torn down.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
