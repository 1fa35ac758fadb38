"""Proves that a training step reads nothing back to the host and has a fixed set of shapes.

    python tools/check_static.py MODEL_DIR [--steps 40] [--warmup 8] [--device npu]
    python tools/check_static.py --peer MODULE:BUILD ...

The module ``<package>/static.py`` of MODEL_DIR has

    build(device) -> step   ``step(i)`` runs training step i: forward and backward pass and
                            optimizer, as train.py does it on an accelerator, on images of many
                            sizes
    WARMUP                  after so many steps every size has been there; --warmup overrides it,
                            and without either it is 8

``static_recorder.py`` says what a host sync and an (operator, shapes) pair are, and what can be
seen of them on a CPU. With --device=npu the steps run on this machine's NPU, and where there is
none, on the simulated one, which sees what a CPU cannot: each copy between host and device, and
waits within torch (``npu_static.py``). Any sync, and any new pair after the warm-up, is printed
with the line that causes it. ``--peer`` takes any importable function like ``build``, to measure
other programs; the working directory is searched too.

The exit code is 0 if there are none, 1 if there are any, and 2 if it could not be found out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import npu_simulator
from model_dirs import choose_model

if TYPE_CHECKING:
    import torch

STEPS = 40
WARMUP = 8


def import_steps(place: str, title: str) -> ModuleType:
    """The module that builds a model's steps.

    Args:
        place: what Python calls it.
        title: what people call the model.

    Raises:
        UserError: it is not there.
    """
    from zoo_common.errors import UserError

    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and not f"{place}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"{title} has no module {place}, which would build the step: write it, as the head "
            "of tools/check_static.py says."
        ) from error


def find_build(options: argparse.Namespace) -> tuple[str, Callable[[torch.device], Any], int]:
    """The name for people, the function that builds the step, and its warm-up.

    Raises:
        UserError: There is no such model, module or function.
    """
    from zoo_common.errors import UserError

    if options.peer:
        place, _, name = options.peer.partition(":")
        title = options.peer
        sys.path.insert(0, str(Path.cwd()))
    else:
        try:
            model = choose_model(options.model_dir)
        except LookupError as error:
            raise UserError(str(error)) from error
        title, name = model.name, "build"
        place = f"{model.package.name}.static"
        sys.path.insert(0, str(model.path))
    module = import_steps(place, title)
    build = getattr(module, name, None)
    if not callable(build):
        raise UserError(f"the module {place} has no function {name or 'after the colon'!r}.")
    return title, build, getattr(module, "WARMUP", WARMUP)


def has_no_npu() -> bool:
    """Whether neither an NPU nor the simulated one is here."""
    from zoo_common import device as devices

    return not npu_simulator.is_here() and devices.count("npu") == 0


def check(options: argparse.Namespace) -> int:
    """Counts and prints; the exit code."""
    import static_recorder
    from zoo_common import device as devices
    from zoo_common.errors import UserError

    device = devices.resolve(options.device)
    simulated = device.type == "npu" and npu_simulator.is_here()
    title, build, warmup = find_build(options)
    warmup = warmup if options.warmup is None else options.warmup
    if not 0 <= warmup < options.steps:
        raise UserError(
            f"--steps={options.steps} leaves nothing after the warm-up of {warmup} steps: give "
            "more steps, or a smaller --warmup."
        )
    step = build(device)
    print(f"{title}: {options.steps} steps on {device}{' (simulated)' if simulated else ''}")
    if simulated:
        import npu_static

        report = npu_static.count(step, steps=options.steps, warmup=warmup)
    else:
        report = static_recorder.count(step, steps=options.steps, warmup=warmup, device=device)
    print(report.describe())
    syncs, pairs = sum(report.syncs), sum(report.late_pairs)
    print(f"check_static: {syncs} host syncs, {pairs} new pairs after the warm-up")
    return 0 if report.clean else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code."""
    parser = argparse.ArgumentParser(
        description="Count host syncs and new operator shapes of training steps.",
        epilog="Exit code: 0 none, 1 some, 2 it could not be found out.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model_dir", nargs="?", help="a model's directory or name")
    what.add_argument("--peer", metavar="MODULE:BUILD", help="a function that builds the step")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps (default {STEPS})")
    parser.add_argument("--warmup", type=int, help="steps until every size has been there")
    parser.add_argument("--device", default="cpu", help="auto, npu, cuda or cpu (default cpu)")
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(words)
    try:
        from zoo_common.errors import UserError
    except ImportError as error:
        print(
            f"check_static: {error.name} is not installed in {sys.executable}: use the "
            "environment that tools/quickstart.sh makes.",
            file=sys.stderr,
        )
        return 2
    try:
        if options.device == "npu" and has_no_npu():
            return npu_simulator.run_again(__file__, words)
        return check(options)
    except UserError as error:
        print(f"check_static: {error}", file=sys.stderr)
    except Exception:  # of the step: 1 would say that it had been measured
        traceback.print_exc()
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
