"""The environment of a process that seems to run on a machine with NPUs."""

from __future__ import annotations

import os
from pathlib import Path

STANDIN = Path(__file__).parent / "standin"
MOST_CARDS = 16


def environment(
    cards: int = 2, memory: int | None = None, native: str | None = None
) -> dict[str, str]:
    """The variables of this process, changed for a child that sees simulated NPUs.

    Args:
        cards: how many, from 0 to 16.
        memory: bytes of each card; 64 GiB by default.
        native: a version of torch: the NPU then has kernels for those operators only that
            torch_npu of that version has; by default for all.

    Raises:
        ValueError: there can't be so many cards, or so little memory.
    """
    if not 0 <= cards <= MOST_CARDS:
        raise ValueError(f"cards={cards} must be from 0 to {MOST_CARDS}.")
    if memory is not None and memory <= 0:
        raise ValueError(f"memory={memory} must be over 0 bytes.")
    earlier = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(STANDIN), *(part for part in earlier if part and part != str(STANDIN))]
    variables = dict(os.environ)
    for name in ("NPU_SIM_MEMORY", "NPU_SIM_NATIVE"):
        variables.pop(name, None)
    variables |= {
        "PYTHONPATH": os.pathsep.join(path),
        "NPU_SIM_CARDS": str(cards),
        # zoo_common looks for torch_npu itself, and torch_npu wants to be the only accelerator.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "ZOO_TEST_DEVICE": "npu",
    }
    if memory is not None:
        variables["NPU_SIM_MEMORY"] = str(memory)
    if native is not None:
        variables["NPU_SIM_NATIVE"] = native
    return variables
