"""What the tests of the models' configs share: settings by path, changes of trees, mistakes."""

import dataclasses
import subprocess
from collections.abc import Mapping
from typing import Any

DETECTOR_MISFITS = [
    ("model.pixel_mean=[1]", "model.pixel_mean must have 3 entries"),
    ("data.min_sizes=[]", "data.min_sizes is empty"),
    ("data.size_divisibility=16", "must be a multiple of 32"),
    ("data.buckets=[[800,1333]]", "multiples of 32"),
    ("data.buckets=[[800]]", r"a bucket is \[height, width\]"),
]
"""Words that fit no detector, and what is said of them (regular expressions)."""


def settings_of(config: Any) -> dict[str, Any]:
    """All settings of a config, each by its path: section.name."""
    return {
        f"{section}.{name}": value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
    }


def differing(config: Any, other: Any) -> set[str]:
    """Paths of the settings in which two configs differ."""
    others = settings_of(other)
    return {path for path, value in settings_of(config).items() if value != others[path]}


def put(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Sets entries of nested dictionaries by dotted paths; None removes one."""
    for path, value in changes.items():
        *sections, name = path.split(".")
        holder = tree
        for section in sections:
            holder = holder[section]
        holder[name] = value
        if value is None:
            del holder[name]


def words_in_help(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The options and settings that a script's --help lists."""
    assert done.returncode == 0, done.stderr
    return {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}


def assert_mistake_told(done: subprocess.CompletedProcess[str], said: str) -> None:
    """A script ended with the code of a user's mistake, and its last line says which."""
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert said in last, done.stderr
