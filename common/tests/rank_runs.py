"""Starts a test's own file as the processes of a distributed run, and compares what they trained.

The file, started as a program, prints what its process found as JSON in its last line.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Trained = dict[str, Any]
"""``losses`` of the steps, and the checksum of each tensor by its name."""


def run_ranks(file: Path, ranks: int = 2, python: Sequence[str] = ()) -> list[Any]:
    """Starts a test file of a model ``ranks`` times, as torchrun would.

    Args:
        file: prints what it found.
        ranks: how many processes.
        python: options of the interpreter.

    Returns:
        What each process found.
    """
    file = file.resolve()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    paths = (str(file.parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    variables = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    started = [
        subprocess.Popen(
            [sys.executable, *python, str(file)],
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def checksums(model: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """A number for each tensor, which changes with each entry and with their order."""

    def checksum(tensor: Tensor) -> float:
        flat = tensor.detach().to(dtype).flatten()
        weights = torch.arange(1, 8, device=flat.device, dtype=dtype)
        return float((flat * weights.repeat(len(flat) // 7 + 1)[: len(flat)]).sum())

    return {name: checksum(tensor) for name, tensor in model.state_dict().items()}


def assert_trained_alike(ranks: Sequence[Trained], whole: Trained, tolerance: float) -> None:
    """The ranks hold one model: that of a process with the whole batch, whose loss is their mean.

    Args:
        ranks: what each of them trained.
        whole: what the one process did.
        tolerance: relative, and for tensors absolute too.
    """
    steps = zip(*(found["losses"] for found in ranks), strict=True)
    means = [sum(losses) / len(ranks) for losses in steps]
    assert means == pytest.approx(whole["losses"], rel=tolerance)
    assert all(found.keys() == whole.keys() for found in ranks)
    for name in whole.keys() - {"losses"}:
        tensor = ranks[0][name]
        assert all(found[name] == tensor for found in ranks), name
        assert tensor == pytest.approx(whole[name], rel=tolerance, abs=tolerance), name
