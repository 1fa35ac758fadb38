"""Runs a command on a machine that seems to have NPUs.

    python -m npu_sim bash test/train_smoke_1p.sh --device=npu --max_steps=5
    python -m npu_sim --cards 1 --memory 16G python train.py --device=npu
    python -m npu_sim --native 2.6 pytest common/tests

The command and its children find a stand-in torch_npu. Nothing runs on hardware, and speed and
numerics are those of the CPU. ``python`` means the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from npu_sim import native
from npu_sim.machine import MOST_CARDS, environment

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DEFAULT_MEMORY = 64 * 2**30


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"npu_sim: {message}\n")


def _cards(text: str) -> int:
    if not text.isdecimal() or int(text) > MOST_CARDS:
        raise argparse.ArgumentTypeError(f"{text} is no number of cards from 0 to {MOST_CARDS}.")
    return int(text)


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory such as 64G or 512M.")
    return size


def _native(text: str) -> str:
    known = native.versions()
    if text not in known:
        raise argparse.ArgumentTypeError(
            f"{text} is no recorded version of torch_npu; choose one of {', '.join(known)}."
        )
    return text


def _find(name: str) -> str | None:
    """The program of a command's name; this interpreter's own come first."""
    if name in ("python", "python3"):
        return sys.executable
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    return (beside if os.sep not in name else None) or shutil.which(name)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Replaces this process with the command; ends with its exit code."""
    parser = _Parser(
        prog="python -m npu_sim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cards", type=_cards, default=2, help="simulated cards, 0 to 16 (default: 2)"
    )
    parser.add_argument(
        "--memory",
        type=_memory,
        default=_DEFAULT_MEMORY,
        help="memory of each card, such as 16G or 512M (default: 64G)",
    )
    parser.add_argument(
        "--native",
        type=_native,
        metavar="VERSION",
        help="let the cards have only the kernels of torch_npu for this version of torch; "
        "other operators are decomposed, or fall back to the CPU (default: all have one)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, with its arguments")
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        parser.error("no command was given; add one, as in: python -m npu_sim python train.py.")
    name, *rest = options.command
    program = _find(name)
    if program is None:
        parser.error(f"the command {name} was not found, or may not be executed; check its name.")
    plural = "card" if options.cards == 1 else "cards"
    size = f"{options.memory / 2**30:.4g} GB"
    print(
        f"simulated NPU: {options.cards} {plural} of {size}; nothing here ran on hardware",
        file=sys.stderr,
        flush=True,
    )
    variables = environment(options.cards, options.memory, options.native)
    try:
        os.execve(program, [name if program != sys.executable else program, *rest], variables)
    except OSError as error:
        parser.error(f"the command {name} cannot be started: {error.strerror}.")


if __name__ == "__main__":
    main()
