"""Fills the generated tables of the READMEs, which stand between markers.

    python tools/tables.py [--check] [--root DIR]

``<!-- options:begin -->`` and ``<!-- options:end -->`` hold the table ``options``; the names are
the keys of MODEL_TABLES and ROOT_TABLES. Options come from the config, runs from test/runs.yaml,
results from the records in results/*.json, operators from npu_operators.json, which
``npu_ops.py --json`` writes. What a card or a paper published stands in
results/published.yaml, and in columns of its own::

    source: the model card, 2023.03.02
    metric: Acc@1
    rows:
      - {name: 8p-NPU, score: 78.43, fps: 2026.39, epochs: 100, amp: O1, torch: "1.8",
         record: train_full_8p_npu.json}      # the record of the same run here, once there is one

With --check nothing is written, and the exit code is 1 if a table is stale.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from model_dirs import ROOT, ModelDir, find_models
from zoo_common import npu_env, runs
from zoo_common.config import Field, PrecisionConfig, RunConfig, fields_of, options_of, section
from zoo_common.device import SWITCHES

MARKED = re.compile(r"(<!-- ([\w-]+):begin -->\n)(.*?)(<!-- \2:end -->)", re.DOTALL)
NOT_RUN = "not run"

Row = Iterable[object]


@dataclass
class RunSchema:
    """The settings of every model that say how a device works."""

    precision: PrecisionConfig = section(PrecisionConfig)
    run: RunConfig = section(RunConfig)


def table(header: Row, rows: Iterable[Row]) -> str:
    """A Markdown table; None and empty cells become a dash."""
    names = list(header)
    lines: list[Row] = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    return " ".join(text.replace("|", "\\|").split()) or "-"


def options_table(model: ModelDir) -> str:
    """Every option of the model's runs, with the value that its first run gives it."""
    loaded = runs.load(model.path)
    first, values = _first_run(loaded)
    fields = {field.path: field for field in loaded.fields()}
    rows: list[Row] = []
    for option in loaded.options():
        names = f"`{option.name}`"
        targets = ", ".join(f"`{target}`" for target in option.targets)
        origin = "this model" if option.name in loaded.card_options else "every model"
        if option.kind == "flag":
            rows.append((names, targets, None, "takes no value", origin))
            continue
        field = fields[option.targets[0].partition("=")[0]]
        meaning = option.help or _meaning(field)
        rows.append((names, targets, values[field.path], meaning, origin))
    return table(("option", "sets", f"in {first}", "meaning", "known to"), rows)


def _first_run(loaded: runs.Model) -> tuple[str, dict[str, str | None]]:
    """The name of the first run of test/runs.yaml, and its settings as text."""
    name, run = next(iter(loaded.runs.items()))
    config = loaded.config(run, [])
    values: dict[str, str | None] = {}
    for field in loaded.fields():
        value = config
        for part in field.path.split("."):
            value = getattr(value, part)
        values[field.path] = None if value in ("", None) else f"`{value}`"
    return name, values


def settings_table(model: ModelDir) -> str:
    """The settings of the config that no option names."""
    loaded = runs.load(model.path)
    first, values = _first_run(loaded)
    named = {target.partition("=")[0] for option in loaded.options() for target in option.targets}
    rows = [
        (f"`{field.path}`", values[field.path], _meaning(field))
        for field in loaded.fields()
        if field.path not in named
    ]
    return table(("setting", f"in {first}", "meaning"), rows)


def _meaning(field: Field) -> str:
    choices = field.metadata.get("choices") or ()
    return f"{field.help} ({', '.join(choices)})" if choices else field.help


def runs_table(model: ModelDir) -> str:
    """The runs of test/runs.yaml."""
    rows = []
    for name, run in runs.load(model.path).runs.items():
        score = ", ".join(f"{metric} >= {least:g}" for metric, least in run.score.items())
        command = f"`bash test/{name}.sh`"
        rows.append((command, run.help, run.devices, f"`{run.config}`", score or None))
    return table(("command", "what it does", "processes", "config", "score that CI asserts"), rows)


def environment_table(model: ModelDir) -> str:
    """What test/env_npu.sh sets."""
    return npu_env.markdown()


def results_table(model: ModelDir) -> str:
    """What was published, what we ran of it, and what else we ran."""
    records = read_records(model)
    published = read_published(model)
    metric = published.get("metric", "score")
    header = ["NAME", "data", metric, "FPS", "Epochs", "AMP_Type", "Torch_Version"]
    header += ["hardware", "record"]
    shown: tuple[str, ...] = ("score", "fps", "epochs", "amp", "torch")
    titles = (metric, "FPS", "Epochs", "AMP_Type", "Torch_Version")
    rows: list[Row] = []
    if published:
        header += [f"{title} (published)" for title in titles]
    for row in published.get("rows", ()):
        ours = _record_cells(row.get("record"), records)
        rows.append([row["name"], *ours, *(row.get(key) for key in shown)])
    linked = {row.get("record") for row in published.get("rows", ())}
    for name, record in records.items():
        if name not in linked:
            blanks = [None] * len(shown) if published else []
            rows.append([f"`{record['run']}`", *_record_cells(name, records), *blanks])
    note = f"\nPublished: {published['source']}.\n" if published else ""
    return table(header, rows) + note


def _record_cells(name: str | None, records: Mapping[str, Mapping[str, Any]]) -> list[object]:
    if name is None:
        return [None, NOT_RUN, NOT_RUN, None, None, None, None, None]
    record = records[name]
    throughput = record.get("throughput")
    return [
        record.get("data"),
        score_text(record),
        f"{throughput['images_per_sec']:.2f}" if throughput else None,
        f"{record['epochs']:g}",
        record.get("precision"),
        record.get("versions", {}).get("torch"),
        f"{record['world_size']} x {record['device']}",
        f"[{name}](results/{name})",
    ]


def score_text(record: Mapping[str, Any]) -> str | None:
    """The score of a record, and that of its masks where it has one, with names and unit."""
    metric = record.get("metric")
    if not metric:
        return None
    unit = {"percent": "%"}.get(metric["unit"], metric["unit"])
    scores = {metric["name"]: metric["value"]}
    scores |= {
        name: value for name, value in record.get("metrics", {}).items() if name == "mask_AP"
    }
    return ", ".join(f"{name} {value:.2f} {unit}" for name, value in scores.items())


def read_records(model: ModelDir) -> dict[str, dict[str, Any]]:
    """The committed records by file name."""
    files = sorted((model.path / "results").glob("*.json"))
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def read_published(model: ModelDir) -> dict[str, Any]:
    """results/published.yaml, or nothing."""
    file = model.path / "results" / "published.yaml"
    content: dict[str, Any] = {}
    if file.is_file():
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def models_table(root: Path) -> str:
    """The index of the repository."""
    rows: list[Row] = []
    for model in find_models(root):
        place = model.path.relative_to(root).as_posix()
        project = (model.path / "pyproject.toml").read_text(encoding="utf-8")
        match = re.search(r'^description = "(.*)"$', project, re.MULTILINE)
        link = f"[{model.path.name}]({place}/README.md)"
        rows.append((link, f"`{model.name}`", match[1] if match else None, _state(model)))
    return table(("model", "name", "what it is", "runs on record"), rows)


def _state(model: ModelDir) -> str:
    records = read_records(model).values()
    lines = [f"`{item['run']}` {score_text(item) or ''} ({item['device']})" for item in records]
    if not any(str(item["device"]).startswith("npu") for item in records):
        lines.append(f"on NPUs {NOT_RUN}")
    return "; ".join(lines)


def switches_table(root: Path) -> str:
    """What the zoo sets on a device or leaves alone, how to change it, and why."""
    options = options_of(RunSchema)
    defaults = {field.path: field.default for field in fields_of(RunSchema)}
    rows: list[Row] = []
    for switch in SWITCHES:
        path = f"run.{switch.option}"
        names = [
            f"`{option.name}`"
            for option in options
            if any(target.partition("=")[0] == path for target in option.targets)
        ]
        value = switch.values.get(defaults[path])
        default = "the library's own" if value is None else f"`{value}`"
        changed = ", ".join([*names, f"`{path}`"])
        rows.append(
            (f"`{switch.target}`", changed, default, ", ".join(switch.kinds), switch.reason)
        )
    for variable in npu_env.VARIABLES:
        changed = "set the variable before the script; it is kept"
        rows.append((f"`{variable.name}`", changed, f"`{variable.value}`", "npu", variable.reason))
    return table(("setting", "how to change it", "default", "devices", "reason"), rows)


def operators_table(model: ModelDir) -> str:
    """Who runs the model's operators on an NPU, as ``npu_ops.py`` recorded it."""
    file = model.path / "npu_operators.json"
    if not file.is_file():
        return f"Not recorded: `python tools/npu_ops.py {model.name} --json={file.name}` does it.\n"
    return operators_markdown(json.loads(file.read_text(encoding="utf-8")))


def operators_markdown(record: Mapping[str, Any]) -> str:
    """The table of a record of ``npu_ops.py``, with a line on what is made of others."""
    rows = [
        (
            ", ".join(kind["versions"]),
            "yes" if kind["supported"] else "no",
            len(kind["native"]),
            len(kind["decomposed"]),
            ", ".join(f"`{name}`" for name in kind["fallbacks"]) or "none",
        )
        for kind in record["versions"]
    ]
    newest = record["versions"][-1]
    made = "; ".join(
        f"`{name}` of {', '.join(f'`{part}`' for part in parts) or 'nothing'}"
        for name, parts in newest["decomposed"].items()
    )
    return (
        table(("torch_npu", "supported here", "native", "made of others", "on the CPU"), rows)
        + f"\nRecorded in {', '.join(record['precisions'])}. Broken rules on number formats: "
        + f"{'; '.join(record['broken_rules']) or 'none'}. Made of others by torch_npu "
        + f"{newest['versions'][-1]}: {made or 'none'}.\n"
    )


def proven_table(root: Path) -> str:
    """What the committed records of the nightly runs say."""
    records = root / "common" / "npu_sim" / "records"
    rows: list[Row] = []
    for file in sorted(records.glob("torch_npu_*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        names = ("torch", "torch_npu", "cann", "python")
        versions = ", ".join(f"{name} {record['versions'][name]}" for name in names)
        total = record["passed"] + record["failed"]
        link = f"[{file.name}]({file.relative_to(root).as_posix()})"
        what = ", ".join(_checks(record["checks"]))
        rows.append((link, record["date"], versions, f"{record['passed']} of {total} passed", what))
    pins = records / "npu_pins.json"
    if pins.is_file():
        pairs = json.loads(pins.read_text(encoding="utf-8"))
        good = sum(pair["resolves"] for pair in pairs)
        torches = list(dict.fromkeys(pair["torch"] for pair in pairs))
        rows.append(
            (
                f"[{pins.name}]({pins.relative_to(root).as_posix()})",
                max(pair["date"] for pair in pairs),
                f"torch {', '.join(torches)}",
                f"{good} of {len(pairs)} resolve",
                "; ".join(_pin_sets(pairs)),
            )
        )
    return table(("record", "date", "versions", "result", "checks"), rows)


def _checks(checks: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of the checks in their order, each with what it was done for."""
    done: dict[str, list[str]] = {}
    for check in checks:
        done.setdefault(check["check"], []).extend([check["model"]] if "model" in check else [])
    return [
        name.replace("_", " ") + (f" ({', '.join(models)})" if models else "")
        for name, models in done.items()
    ]


def _pin_sets(pairs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Architectures, Python versions, and what stood in for torch's CPU build."""
    found: dict[str, set[str]] = {"arch": set(), "python": set(), "torch_cpu_build": set()}
    for pair in pairs:
        for key, values in found.items():
            values.add(pair[key])
    pythons = sorted(found["python"], key=lambda text: int(text.partition(".")[2]))
    builds = ", ".join(sorted(found["torch_cpu_build"]))
    return [
        ", ".join(sorted(found["arch"])),
        f"Python {', '.join(pythons)}",
        f"torch's CPU build: {builds}",
    ]


MODEL_TABLES: dict[str, Callable[[ModelDir], str]] = {
    "options": options_table,
    "settings": settings_table,
    "runs": runs_table,
    "environment": environment_table,
    "results": results_table,
    "operators": operators_table,
}
ROOT_TABLES: dict[str, Callable[[Path], str]] = {
    "models": models_table,
    "proven": proven_table,
    "switches": switches_table,
}


def fill_model(model: ModelDir, name: str) -> str:
    """One table of a model's README."""
    return MODEL_TABLES[name](model)


def fill_root(root: Path, name: str) -> str:
    """One table of the repository's README."""
    return ROOT_TABLES[name](root)


def filled(text: str, make: Callable[[str], str]) -> str:
    """The text with every marked table made anew."""
    return MARKED.sub(lambda match: match[1] + make(match[2]) + match[4], text)


def main(argv: list[str] | None = None) -> int:
    """Fills the tables, or says which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, tell what is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository [this one]")
    arguments = parser.parse_args(argv)
    root = arguments.root.resolve()
    makers: dict[Path, Callable[[str], str]] = {root / "README.md": partial(fill_root, root)}
    for model in find_models(root):
        makers[model.path / "README.md"] = partial(fill_model, model)
    stale = []
    for file, make in makers.items():
        before = file.read_text(encoding="utf-8")
        after = filled(before, make)
        if after != before:
            stale.append(str(file.relative_to(root)))
            if not arguments.check:
                file.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'stale' if arguments.check else 'rewritten'}: {', '.join(stale)}")
    if stale and arguments.check:
        print("Run python tools/tables.py and commit what it writes.")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
