"""Reads off torch_npu's sources and documents what its releases run on the NPU, in which formats.

    python tools/npu_data.py --pytorch DIR --op-plugin DIR [--check]

DIR are git clones of Ascend/pytorch and Ascend/op-plugin with the branches of RELEASES. It writes
``torch_npu_ops_by_version.json`` and ``torch_npu_dtypes.json`` in ``common/npu_sim/npu_sim/data``,
whose README says what each file holds and where it comes from. To be run when there is a new
release; with --check it writes nothing, and the exit code is 1 if a file would change.

For 2.13 and 2.14, whose sources came from a development branch, the operators are those that the
installed package itself registers, recorded in ``torch_npu_2.14_native_ops.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from model_dirs import ROOT

DATA = ROOT / "common" / "npu_sim" / "npu_sim" / "data"
OPERATORS = DATA / "torch_npu_ops_by_version.json"
DTYPES = DATA / "torch_npu_dtypes.json"
INSTALLED = DATA / "torch_npu_2.14_native_ops.json"

# Of each torch version the newest release, by COMPATIBILITY.md of Ascend/pytorch.
RELEASES = {
    "2.1": "v2.1.0-7.2.0",
    "2.2": "v2.2.0-6.0.rc2",
    "2.3": "v2.3.1-7.0.0",
    "2.4": "v2.4.0-7.0.0",
    "2.5": "v2.5.1-7.1.0",
    "2.6": "v2.6.0-7.3.0",
    "2.7": "v2.7.1-26.1.0",
    "2.8": "v2.8.0-26.0.0",
    "2.9": "v2.9.0-26.1.0",
    "2.10": "v2.10.0-26.1.0",
    "2.11": "v2.11.0-26.1.0",
    "2.12": "v2.12.0-26.1.0",
}
OF_INSTALLED = ("2.13", "2.14")
VERSIONS = (*RELEASES, *OF_INSTALLED)

OWN_LIST = "torch_npu/csrc/aten/npu_native_functions.yaml"
PLUGIN_LIST = "op_plugin/config/op_plugin_functions.yaml"
OLD_PLUGIN_LIST = "op_plugin/config/v{}r{}/op_plugin_functions.yaml"
# Left out: "quant" is for quantized tensors, "tocpu" and "unsupported" are for torch before 2.1.
SECTIONS = {"official": "aten", "supported": "aten", "autograd": "aten", "custom": "npu"}

DOCUMENTS_BRANCH = "master"
DOCUMENTS = "docs/zh/api/native_api/pytorch_{}/{}.md"
DOCUMENTED = {"2.7": "2-7-1", "2.11": "2-11-0", "2.12": "2-12-0", "2.13": "2-13-0"}
CHAPTERS = ("torch", "torch-nn-functional")
CARD = "Atlas A2"
# "only supports", in the documents' words, of the first argument or of what is made.
ONLY = re.compile(r"`(?:input|self|dtype)`仅支持((?:[a-z]+\d*[，、,和\s]*)+)")
FORMATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


class SourceError(Exception):
    """The clones do not hold what is looked for; the text is for people."""


def git(clone: Path, *words: str) -> str:
    """What git prints about a clone.

    Raises:
        SourceError: git failed.
    """
    done = subprocess.run(["git", "-C", str(clone), *words], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["git failed"])[0]
        raise SourceError(f"{clone} does not have {words[-1]!r} ({reason}): fetch all branches.")
    return done.stdout


def plugin_list(op_plugin: Path, commit: str, version: str) -> dict[str, Any]:
    """op-plugin's list of operators; until early 2024 there was a file for each torch version."""
    old = OLD_PLUGIN_LIST.format(*version.split("."))
    names = git(op_plugin, "ls-tree", "-r", "--name-only", commit).splitlines()
    chosen = old if old in names else PLUGIN_LIST
    content: dict[str, Any] = yaml.load(git(op_plugin, "show", f"{commit}:{chosen}"), _loader())
    return content


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def operators(content: Mapping[str, Any], version: str) -> Iterator[str]:
    """The operators of a list that have a kernel for dense tensors with that torch version.

    Operators of the section ``symint`` that are torch's own stand without a namespace, since the
    list does not tell them from torch_npu's.
    """
    every = content.get("all_version")
    if isinstance(every, str):
        every = every.split(", ")
    for section, namespace in (*SECTIONS.items(), ("symint", "")):
        for entry in content.get(section) or ():
            entry = {"func": entry} if isinstance(entry, str) else entry
            name = entry["func"].partition("(")[0].strip()
            if _has_kernel(entry, version, every):
                yield f"{namespace}::{name}" if namespace else name


def _has_kernel(entry: Mapping[str, Any], version: str, every: Sequence[str] | None) -> bool:
    if every is None:  # a list for one version; op-plugin's old ones mark what is sparse alone
        return "sparse" not in entry or "impl_ns" in entry
    kernels = [entry[key] for key in ("acl_op", "op_api") if key in entry]
    return any(_holds(kernel, version, every) for kernel in kernels)


def _holds(said: str | Sequence[str], version: str, every: Sequence[str]) -> bool:
    """Whether an ``acl_op`` or ``op_api`` entry speaks of a version.

    It is ``all_version``, names with commas between them, or the first and last of a range.
    """
    if said == "all_version":
        return f"v{version}" in every
    if isinstance(said, str):
        return f"v{version}" in (name.strip() for name in said.split(","))
    if len(said) != 2:
        return f"v{version}" in said
    first, last = said
    numbers = [_number(name) for name in every]
    newest = max(numbers) if last == "newest" else _number(last)
    return _number(first) <= _number(version) <= newest


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.removeprefix("v").split("."))


def of_release(
    pytorch: Path, op_plugin: Path, version: str
) -> tuple[dict[str, str], frozenset[str]]:
    """A release's sources, and the operators that it registers."""
    branch = RELEASES[version]
    commit = git(pytorch, "ls-tree", branch, "third_party/op-plugin").split()[2]
    own: dict[str, Any] = yaml.load(git(pytorch, "show", f"{branch}:{OWN_LIST}"), _loader())
    found = {*operators(own, version), *operators(plugin_list(op_plugin, commit, version), version)}
    spaced = {name for name in found if "::" in name}
    # What torch_npu adds to torch's own names lies in its own namespace; see SECTIONS.
    for name in found - spaced:
        ours = f"npu::{name}" in spaced or name.startswith(("npu_", "_npu_"))
        spaced.add(f"{'npu' if ours else 'aten'}::{name}")
    source = {
        "branch": branch,
        "pytorch": git(pytorch, "rev-parse", branch).strip(),
        "op_plugin": commit,
    }
    return source, frozenset(spaced)


def of_installed() -> frozenset[str]:
    """The operators that torch_npu 2.13.0 and 2.14.0 register.

    The record also has torch_npu's operators under the name ``aten``, where there are none.
    """
    import torch

    record = json.loads(INSTALLED.read_text(encoding="utf-8"))
    known = set(torch._C._dispatch_get_all_op_names())
    names = {*record["P"], *record["A"]}
    return frozenset(
        name
        for name in names
        if name.startswith("npu::") or (name.startswith("aten::") and name in known)
    )


def structured() -> dict[str, str]:
    """Operators that torch computes by calling another, by its name: structured kernels.

    A backend that has ``aten::gelu.out`` alone thereby has ``aten::gelu`` too.
    """
    import torchgen

    place = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    found = {}
    for entry in yaml.load(place.read_text(encoding="utf-8"), _loader()):
        if "structured_delegate" in entry:
            name = entry["func"].partition("(")[0]
            found[f"aten::{name}"] = f"aten::{entry['structured_delegate']}"
    return found


def ranges(versions: Sequence[str]) -> str:
    """Versions as text such as ``2.1-2.6 2.8``."""
    parts: list[list[str]] = []
    for version in VERSIONS:
        before = VERSIONS[VERSIONS.index(version) - 1] if version != VERSIONS[0] else None
        if version not in versions:
            continue
        if parts and parts[-1][-1] == before:
            parts[-1].append(version)
        else:
            parts.append([version])
    return " ".join(part[0] if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def collect(pytorch: Path, op_plugin: Path) -> dict[str, Any]:
    """The content of the file."""
    sources: dict[str, Any] = {}
    by_version: dict[str, frozenset[str]] = {}
    for version in RELEASES:
        sources[version], by_version[version] = of_release(pytorch, op_plugin, version)
    for version in OF_INSTALLED:
        sources[version] = {"wheel": f"torch_npu {version}.0"}
        by_version[version] = of_installed()
    every = sorted(frozenset().union(*by_version.values()))
    spans = {name: ranges([v for v in VERSIONS if name in by_version[v]]) for name in every}
    through = {name: out for name, out in sorted(structured().items()) if out in spans}
    return {"sources": sources, "operators": spans, "structured": through}


def documented_dtypes(pytorch: Path) -> dict[str, Any]:
    """The number formats that the documents name, and the functions that they say are missing.

    A format counts when the documents of any version have it: later ones leave out formats that
    earlier ones have, bfloat16 of ``torch.matmul`` among them, which nobody has taken away.
    """
    formats: dict[str, set[str]] = {}
    there: dict[str, bool] = {}
    for version, chapter in itertools.product(DOCUMENTED.values(), CHAPTERS):
        text = git(pytorch, "show", f"{DOCUMENTS_BRANCH}:{DOCUMENTS.format(version, chapter)}")
        for part in text.split("\n### ")[1:]:
            name = part.partition("\n")[0].strip()
            mark = re.search(rf"{CARD}[^|]*\|\s*(\S)", part)
            if mark:
                there[name] = there.get(name, False) or mark[1] == "✔"
            if only := ONLY.search(part):
                words = re.findall(r"[a-z]+\d*", only[1])
                formats.setdefault(name, set()).update(FORMATS.get(word, word) for word in words)
    return {
        "source": {
            "branch": DOCUMENTS_BRANCH,
            "commit": git(pytorch, "rev-parse", DOCUMENTS_BRANCH).strip(),
            "documents": [DOCUMENTS.format(place, "*") for place in DOCUMENTED.values()],
        },
        "dtypes": {name: " ".join(sorted(found)) for name, found in sorted(formats.items())},
        "unsupported": sorted(name for name, there in there.items() if not there),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pytorch", type=Path, required=True, help="a clone of Ascend/pytorch")
    parser.add_argument("--op-plugin", type=Path, required=True, help="one of Ascend/op-plugin")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    try:
        made = {
            OPERATORS: collect(options.pytorch, options.op_plugin),
            DTYPES: documented_dtypes(options.pytorch),
        }
    except SourceError as error:
        print(f"npu_data: {error}", file=sys.stderr)
        return 2
    changed = False
    for file, content in made.items():
        text = json.dumps(content, indent=0) + "\n"
        changed |= not file.exists() or text != file.read_text(encoding="utf-8")
        if not options.check:
            file.write_text(text, encoding="utf-8")
    return int(changed and options.check)


if __name__ == "__main__":
    sys.exit(main())
