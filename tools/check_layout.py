"""Checks that the repository and every model directory are laid out as they should be.

    python tools/check_layout.py [--root DIR]

Each finding is printed as a file and what to do about it; the exit code is 1 if there is any.
The rules are the functions of the two tables at the end.
"""

import argparse
import ast
import fnmatch
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from model_dirs import ROOT, ModelDir, find_models
from scaffold import NOT_OF_MODELS, PACKAGE_LIST

SKIPPED_DIRS = (".git", ".venv*", "__pycache__", "*.egg-info", "*_cache", "build", "dist")
SKIPPED_PATHS = ("data", "*/test/output", "built-in/others/*_for_PyTorch/dataset")
TEXT_SUFFIXES = {".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".txt", ".json"}
MAX_FILE_BYTES = 5_000_000
MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = {"main": 120}
USUAL_FUNCTION_LINES = 80
MAX_SCRIPT_LINES = 14

REQUIRED_FILES = (
    "README.md",
    "LICENSE",
    "pyproject.toml",
    "requirements.txt",
    "public_address_statement.md",
    "modelzoo_level.txt",
    "configs/smoke.yaml",
    "test/env_npu.sh",
    "test/runs.yaml",
    "test/train_smoke_1p.sh",
)
REQUIRED_MODULES = ("__init__.py", "config.py", "train.py")
README_HEADINGS = (
    "概述",
    "准备训练环境",
    "准备数据集",
    "开始训练",
    "训练结果展示",
    "版本说明",
    "FAQ",
    "公网地址说明",
    "Differences from the original",
)
README_TABLES = ("options", "environment", "operators", "results")
LEVELS = {
    "GPUStatus": {"OK", "NOK"},
    "NPUMigrationStatus": {"OK", "POK", "NOK"},
    "FuncStatus": {"OK", "NOK"},
    "PrecisionStatus": {"OK", "POK", "NOK"},
    "AutoTune": {"OK", "POK", "NOK"},
    "PerfStatus": {"PERFECT", "OK", "POK", "NOK"},
}
LOG_TOOLS = re.compile(r"\b(sed|awk|grep)\b")
URL = re.compile(r"https?://(?!127\.0\.0\.1)[^\s)>\]\"'`|,]+")
HOME_PATH = re.compile(r"(?<![\w.])/(?:home/[\w.-]+|Users/[\w.-]+|root)/")
ABSOLUTE_PATH = re.compile(r"(?:^|[\s=:'\"(])/[\w.-]+/")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, and what to do."""

    file: Path
    advice: str


Findings = Iterator[Finding]


class Tree:
    """The repository: its files and models."""

    def __init__(self, root: Path) -> None:
        """Walks the tree, leaving out what is generated."""
        self.root = root
        self.models = find_models(root)
        self.files = sorted(self._walk())

    def _walk(self) -> Iterator[Path]:
        for folder, dirs, names in os.walk(self.root):
            dirs[:] = [name for name in dirs if not self._is_skipped(Path(folder, name))]
            yield from (Path(folder, name) for name in names)

    def _is_skipped(self, folder: Path) -> bool:
        relative = folder.relative_to(self.root).as_posix()
        return any(fnmatch.fnmatch(folder.name, pattern) for pattern in SKIPPED_DIRS) or any(
            fnmatch.fnmatch(relative, pattern) for pattern in SKIPPED_PATHS
        )

    def text_files(self) -> Iterator[tuple[Path, str]]:
        """Text files that people write, with their content."""
        for file in self.files:
            if file.suffix in TEXT_SUFFIXES or file == self.root / ".ci" / "run":
                yield file, file.read_bytes().decode("utf-8", errors="replace")

    def modules(self) -> Iterator[tuple[Path, ast.Module]]:
        """Python files, parsed."""
        for file in self.files:
            if file.suffix == ".py":
                yield file, ast.parse(file.read_text(encoding="utf-8"), str(file))


def check_sizes(tree: Tree) -> Findings:
    """Files that fit a reader and a clone."""
    for file in tree.files:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            yield Finding(file, f"has {size / 1e6:.1f} MB: keep it out of git, 5 MB is the limit")
    for file, text in tree.text_files():
        lines = text.count("\n")
        if file.suffix in (".py", ".sh") and lines > MAX_FILE_LINES:
            yield Finding(file, f"has {lines} lines: split it, {MAX_FILE_LINES} is the limit")


def check_functions(tree: Tree) -> Findings:
    """Functions that fit a screen."""
    for file, module in tree.modules():
        for node in ast.walk(module):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            limit = MAX_FUNCTION_LINES.get(node.name, USUAL_FUNCTION_LINES)
            if lines > limit:
                yield Finding(
                    file, f"{node.name} has {lines} lines: split it, the limit is {limit}"
                )


def check_text(tree: Tree) -> Findings:
    """Line ends that every shell reads, and no path that exists on one machine only."""
    own = [f"{path}{os.sep}" for path in (tree.root, Path.home()) if len(path.parts) > 2]
    for file, text in tree.text_files():
        if "\r" in text:
            yield Finding(file, "has CR line ends: save it with LF")
        for number, line in enumerate(text.splitlines(), 1):
            match = HOME_PATH.search(line)
            if match or any(path in line for path in own):
                yield Finding(file, f"line {number} names a path of one machine: write another")


def check_imports(tree: Tree) -> Findings:
    """What import-linter cannot say: detection stays apart from the rest of zoo_common."""
    common = tree.root / "common" / "zoo_common"
    for file, module in tree.modules():
        if not file.is_relative_to(common) or file.is_relative_to(common / "detection"):
            continue
        if any(name.startswith("zoo_common.detection") for name in _imported(module)):
            yield Finding(file, "imports zoo_common.detection: only models may")


def _imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def check_contracts(tree: Tree) -> Findings:
    """import-linter knows every model."""
    file = tree.root / "pyproject.toml"
    lists = [match[2] for match in PACKAGE_LIST.finditer(file.read_text(encoding="utf-8"))]
    for model in tree.models:
        quoted = f'"{model.package.name}"'
        if any(quoted not in names for names in lists if names not in NOT_OF_MODELS):
            yield Finding(file, f"[tool.importlinter] lacks {quoted} in a list of models")


def check_env_scripts(tree: Tree) -> Findings:
    """One env_npu.sh, byte for byte."""
    scripts = [model.path / "test" / "env_npu.sh" for model in tree.models]
    present = [script for script in scripts if script.is_file()]
    for script in present[1:]:
        if script.read_bytes() != present[0].read_bytes():
            yield Finding(
                script, f"differs from {present[0].relative_to(tree.root)}: copy that one"
            )


def check_files(model: ModelDir) -> Findings:
    """The files that every model directory has."""
    for name in REQUIRED_FILES:
        if not (model.path / name).is_file():
            yield Finding(model.path / name, "is missing")
    for name in REQUIRED_MODULES:
        if not (model.package / name).is_file():
            yield Finding(model.package / name, "is missing")
    if not list((model.path / "tests").glob("test_*.py")):
        yield Finding(model.path / "tests", "holds no test_*.py: write tests")


def check_scripts(model: ModelDir) -> Findings:
    """Run scripts are thin, and stop at the first error."""
    for script in _run_scripts(model):
        lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
        work = [line for line in lines if line and not line.startswith("#")]
        if len(work) > MAX_SCRIPT_LINES:
            yield Finding(script, f"has {len(work)} lines of work: move it to runs.yaml or Python")
        if "set -euo pipefail" not in work:
            yield Finding(script, "lacks the line 'set -euo pipefail': add it")
        if sum(line.startswith("exec ") for line in work) != 1:
            yield Finding(script, "must end in one exec of the launcher")
        if any(LOG_TOOLS.search(line) for line in work):
            yield Finding(script, "uses sed, awk or grep: read the run's records instead")


def _run_scripts(model: ModelDir) -> list[Path]:
    scripts = (model.path / "test").glob("*.sh")
    return sorted(script for script in scripts if script.name != "env_npu.sh")


def check_runs(model: ModelDir) -> Findings:
    """test/runs.yaml and the scripts name the same runs, with configs that exist."""
    file = model.path / "test" / "runs.yaml"
    if not file.is_file():
        return
    runs: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")).get("runs", {})
    scripts = _run_scripts(model)
    launching = {
        script.stem
        for script in scripts
        if "zoo_common.launch" in script.read_text(encoding="utf-8")
    }
    for name in sorted(runs.keys() - {script.stem for script in scripts}):
        yield Finding(file, f"describes {name}, but test/{name}.sh is missing")
    for name in sorted(launching - runs.keys()):
        yield Finding(file, f"lacks the run {name} of test/{name}.sh")
    for name, run in runs.items():
        if not (model.path / str(run.get("config"))).is_file():
            yield Finding(file, f"{name} names the config {run.get('config')}, which is missing")
        if not run.get("help"):
            yield Finding(file, f"{name} has no help: say in a sentence what it is")


def check_readme(model: ModelDir) -> Findings:
    """The card's sections, and the markers of generated tables."""
    file = model.path / "README.md"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    for wanted in README_HEADINGS:
        if not any(wanted in heading for heading in headings):
            yield Finding(file, f"has no section {wanted!r}: the card has it, write it")
    for table in README_TABLES:
        if f"<!-- {table}:begin -->" not in text or f"<!-- {table}:end -->" not in text:
            yield Finding(file, f"lacks the markers of the table {table!r} of tools/tables.py")


def check_requirements(model: ModelDir) -> Findings:
    """requirements.txt says what pyproject.toml says."""
    file, project = model.path / "requirements.txt", model.path / "pyproject.toml"
    if not file.is_file():
        return
    match = re.search(
        r"^dependencies = \[(.*?)\]$", project.read_text(encoding="utf-8"), re.M | re.S
    )
    named = re.findall(r'"([^"]+)"', match[1] if match else "")
    wanted = {name for name in named if not name.startswith("zoo-common")}
    lines = {line.strip() for line in file.read_text(encoding="utf-8").splitlines()}
    listed = {line for line in lines if line and not line.startswith(("#", "-"))}
    for name in sorted(wanted ^ listed):
        where = "pyproject.toml" if name in listed else "it"
        yield Finding(file, f"differs from pyproject.toml: {where} lacks {name}")


def check_results(model: ModelDir) -> Findings:
    """Records parse, and tell nothing about the machine that made them."""
    for file in sorted((model.path / "results").glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            yield Finding(file, f"is no JSON ({error}): copy the run's result.json again")
            continue
        if not isinstance(record, dict) or record.get("status") != "completed":
            yield Finding(file, "is not the record of a completed run: remove it")
            continue
        for key, value in _strings(record):
            if "host" in key.rsplit(".")[-1] or value == platform.node():
                yield Finding(file, f"{key} holds a host name: remove it")
            elif ABSOLUTE_PATH.search(value):
                yield Finding(file, f"{key} holds an absolute path: remove it")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str):
        yield key, value


def check_addresses(model: ModelDir) -> Findings:
    """Every address in the sources stands in public_address_statement.md."""
    statement = model.path / "public_address_statement.md"
    if not statement.is_file():
        return
    stated = set(URL.findall(statement.read_text(encoding="utf-8")))
    for file in sorted(model.path.rglob("*")):
        if file.suffix not in {".py", ".yaml", ".sh", ".toml", ".txt"} or "output" in file.parts:
            continue
        for url in URL.findall(file.read_text(encoding="utf-8")):
            if url.rstrip(".;:") not in stated:
                yield Finding(file, f"has the address {url}: add it to {statement.name}")


def check_level(model: ModelDir) -> Findings:
    """modelzoo_level.txt has the zoo's keys and values."""
    file = model.path / "modelzoo_level.txt"
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8").split()
    levels = dict(line.split(":", 1) for line in lines if ":" in line)
    for key, values in LEVELS.items():
        if levels.get(key) not in values:
            yield Finding(file, f"must have a line {key}:{'|'.join(sorted(values))}")


TREE_RULES: tuple[Callable[[Tree], Findings], ...] = (
    check_sizes,
    check_functions,
    check_text,
    check_imports,
    check_contracts,
    check_env_scripts,
)
MODEL_RULES: tuple[Callable[[ModelDir], Findings], ...] = (
    check_files,
    check_scripts,
    check_runs,
    check_readme,
    check_requirements,
    check_results,
    check_addresses,
    check_level,
)


def main(argv: list[str] | None = None) -> int:
    """Prints all findings; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository [this one]")
    tree = Tree(parser.parse_args(argv).root.resolve())
    findings = [finding for rule in TREE_RULES for finding in rule(tree)]
    for model in tree.models:
        findings += [finding for rule in MODEL_RULES for finding in rule(model)]
    for finding in findings:
        print(f"{finding.file.relative_to(tree.root)}: {finding.advice}")
    counted = f"{len(tree.models)} model directories and {len(tree.files)} files"
    print(f"layout: {len(findings)} findings in {counted}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
