"""What the README says of tests is so."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults"


def named_tests(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_fault_has_a_test_that_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    section = text.split("## When something breaks")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    faults = [row for row in rows if not row.startswith("| **")]
    named = {row: re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row) for row in faults}
    assert len(faults) > 20
    for row, tests in named.items():
        assert tests, row
        for file, test in tests:
            assert (FAULTS / file).is_file(), file
            assert not test or test in named_tests(FAULTS / file), f"{file} has no {test}"


def test_each_file_of_faults_is_in_the_table() -> None:
    text = (ROOT / "README.md").read_text()
    section = text.split("## When something breaks")[1].split("\n## ")[0]
    for file in FAULTS.glob("test_*.py"):
        assert file.name in section, file.name
