"""Lists the operators that a model dispatches on an NPU, and who runs them there.

    python tools/npu_ops.py MODEL_DIR [--version 2.14] [--json FILE] [--markdown]

The steps of ``<package>/static.py``, of training (``build``) and of evaluation (``evaluation``),
run on the simulated NPU in float32 and in bfloat16 and float16 autocast; on any other machine the
program starts itself anew there. For each version of torch_npu an operator

    is native           torch_npu has a kernel for it,
    is made of others   torch computes it by operators that are judged in turn, or
    falls back          it would be computed on the CPU, with copies there and back.

The tensors that operators take are held against ``npu_rules.py``: what torch_npu's documents and
the rules of this repository say about number formats and arguments. A fallback or a broken rule
is printed with the line that causes it.

``--json=MODEL_DIR/npu_operators.json`` writes what the table "operators" of the model's README is
made from. The exit code is 0 if there is no fallback on a supported version (with --version, on
that one) and no broken rule, 1 if there is one, and 2 if it could not be found out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import npu_simulator
from model_dirs import ROOT, ModelDir, choose_model

if TYPE_CHECKING:
    from npu_record import Survey

RECORD = "npu_operators.json"


def oldest_supported() -> str:
    """The oldest torch that zoo_common works with."""
    project = (ROOT / "common" / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'"torch>=([\d.]+)"', project)
    assert match is not None, "common/pyproject.toml names no torch"
    return match[1]


def is_supported(version: str) -> bool:
    """Whether the project supports a version of torch."""
    return _number(version) >= _number(oldest_supported())


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def as_record(model: ModelDir, survey: Survey) -> dict[str, Any]:
    """What is kept of a survey: names, phases and formats, and one entry a kind of version."""
    from npu_record import PRECISIONS

    kinds: list[dict[str, Any]] = []
    for version, found in survey.versions.items():
        kind = {
            "supported": is_supported(version),
            "native": sorted(found.native),
            "decomposed": {name: sorted(parts) for name, parts in sorted(found.decomposed.items())},
            "fallbacks": sorted({fallback.what for fallback in found.fallbacks}),
        }
        if kinds and all(kinds[-1][key] == value for key, value in kind.items()):
            kinds[-1]["versions"].append(version)
        else:
            kinds.append({"versions": [version], **kind})
    return {
        "model": model.name,
        "precisions": [" ".join(word for word in pair if word != "auto") for pair in PRECISIONS],
        "operators": {
            name: {"calls": dict(sorted(use.phases.items())), "dtypes": sorted(use.dtypes)}
            for name, use in sorted(survey.operators.items())
        },
        "versions": kinds,
        "broken_rules": [f"{rule.what}: {rule.rule} ({rule.source})" for rule in survey.broken],
    }


def describe(survey: Survey) -> str:
    """All operators, what each version makes of them, and all that is wrong with its place."""
    from npu_record import PHASES

    width = max(len(name) for name in survey.operators)
    lines = [f"{'operator':{width}} {' '.join(f'{phase:>10}' for phase in PHASES)}  dtypes"]
    for name, use in sorted(survey.operators.items()):
        counts = " ".join(f"{use.phases[phase] or '-':>10}" for phase in PHASES)
        lines.append(f"{name:{width}} {counts}  {' '.join(sorted(use.dtypes))}")
    lines.append("")
    for version, found in survey.versions.items():
        note = "supported" if is_supported(version) else "not supported"
        lines.append(
            f"torch_npu {version} ({note}): {len(found.native)} native, {len(found.decomposed)} "
            f"made of others, {len({item.what for item in found.fallbacks})} on the CPU"
        )
    newest = list(survey.versions)[-1]
    lines += ["", f"made of others by torch_npu {newest}:"]
    for name, parts in sorted(survey.versions[newest].decomposed.items()):
        lines.append(f"  {name}: {', '.join(sorted(parts)) or 'nothing that the device sees'}")
    for version, found in survey.versions.items():
        for item in sorted(found.fallbacks, key=str):
            where = f", {item.where}" if item.where else ""
            lines.append(f"falls back on torch_npu {version}: {item.what} ({item.phase}){where}")
    for rule, item in survey.broken.items():
        where = f", {item.where}" if item.where else ""
        lines.append(f"rule: {rule.what}, but {rule.rule} ({rule.source}): {item.phase}{where}")
    return "\n".join(lines)


def is_clean(survey: Survey, asked: str | None) -> bool:
    """Whether nothing falls back on the versions that count, and no rule is broken."""
    counting = [version for version in survey.versions if asked or is_supported(version)]
    return not survey.broken and not any(survey.versions[one].fallbacks for one in counting)


def survey_model(options: argparse.Namespace, model: ModelDir) -> int:
    """Records, prints and writes; the exit code."""
    from npu_record import take_survey
    from npu_sim.native import versions
    from tables import operators_markdown
    from zoo_common.errors import UserError

    known = versions()
    if options.version and options.version not in known:
        raise UserError(
            f"--version={options.version}: nothing is known of such a torch_npu; there is "
            f"{', '.join(known)}."
        )
    survey = take_survey(model, (options.version,) if options.version else known)
    record = as_record(model, survey)
    if options.markdown:
        print(operators_markdown(record))
    else:
        print(f"{model.name}: two training steps and one of evaluation, on a simulated NPU\n")
        print(describe(survey))
    if options.json:
        text = json.dumps(record, indent=1) + "\n"
        try:
            options.json.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--json={options.json} cannot be written: {error.strerror}."
            ) from error
    clean = is_clean(survey, options.version)
    if not options.markdown:
        count = len(survey.operators)
        print(f"npu_ops: {count} operators, {'all is well' if clean else 'see above'}")
    return 0 if clean else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description="List the operators that a model dispatches on an NPU, and who runs them.",
        epilog="Exit code: 0 all on the NPU, 1 a fallback or a broken rule, 2 not found out.",
    )
    parser.add_argument("model_dir", help="a model's directory or name")
    parser.add_argument("--version", help="one torch_npu, such as 2.6, instead of all")
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--markdown", action="store_true", help="print the README's table only")
    options = parser.parse_args(words)
    try:
        model = choose_model(options.model_dir)
    except LookupError as error:
        print(f"npu_ops: {error}", file=sys.stderr)
        return 2
    try:
        from zoo_common.errors import UserError
    except ImportError as error:
        print(
            f"npu_ops: {error.name} is not installed in {sys.executable}: use the environment "
            "that tools/quickstart.sh makes.",
            file=sys.stderr,
        )
        return 2
    if not npu_simulator.is_here():
        if not options.markdown:
            print("npu_ops: starting anew on the simulated NPU", file=sys.stderr)
        return npu_simulator.run_again(__file__, words)
    try:
        return survey_model(options, model)
    except UserError as error:
        print(f"npu_ops: {error}", file=sys.stderr)
    except Exception:  # of the steps: 1 would say that they had been recorded
        traceback.print_exc()
    return 2


if __name__ == "__main__":
    sys.exit(main())
