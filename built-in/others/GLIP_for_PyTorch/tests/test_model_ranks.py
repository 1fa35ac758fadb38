"""Two processes that train a GLIP do what one does with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glip.model import GLIP
from glip.static import draw_batch, narrow_bert, narrow_config
from zoo_common import device, distributed

pytestmark = pytest.mark.device

DEVICE = device.resolve(
    os.environ.get("ZOO_TEST_DEVICE", "cpu"), index=int(os.environ.get("LOCAL_RANK", "0"))
)
# HCCL adds up no float64; losses are divided by counts that are added up in float32.
DTYPE, TOLERANCE = (torch.float32, 1e-3) if DEVICE.type == "npu" else (torch.float64, 1e-6)
MODEL_DIR = Path(__file__).resolve().parents[1]
IMAGES = 4


def without_noise() -> GLIP:
    """A narrow network that draws nothing in training."""
    config, bert = narrow_config(), narrow_bert()
    config.model.drop_path = config.model.drop_block = config.model.fusion_dropout = 0.0
    bert.hidden_dropout_prob = bert.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    return GLIP(config.model, config.loss, bert).to(DEVICE, DTYPE)


def train(ranks: int, rank: int) -> dict[str, list[float] | float]:
    """Trains on this rank's part of the batches; the losses and a number for each tensor."""
    model = without_noise()
    network = distributed.wrap(model, DEVICE)
    # AdamW would make a step of gradients that are nothing but rounding.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for seed in (2, 6):
        whole = draw_batch(seed, images=IMAGES, bucket=(96, 96))
        part = whole.chunk(ranks)[rank].to(DEVICE)
        total = torch.stack(list(network(part).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    weigh = torch.arange(1, 8, device=DEVICE, dtype=DTYPE)

    def number(value: Tensor) -> float:
        """Changes with each entry, and with their order."""
        flat = value.detach().to(DTYPE).flatten()
        return float((flat * weigh.repeat(len(flat) // 7 + 1)[: len(flat)]).sum())

    return {"losses": losses} | {name: number(value) for name, value in model.state_dict().items()}


def run_rank() -> None:
    """What each process does."""
    processes = distributed.start(DEVICE)
    found = train(processes.world_size, processes.rank)
    distributed.stop()
    print(json.dumps(found))


def test_two_processes_do_what_one_does_with_the_whole_batch() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    variables = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(MODEL_DIR), os.environ.get("PYTHONPATH")))),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    wanted = train(1, 0)
    ours, theirs = first.pop("losses"), second.pop("losses")
    assert ours != theirs
    mean = [(one + other) / 2 for one, other in zip(ours, theirs, strict=True)]
    assert mean == pytest.approx(wanted.pop("losses"), rel=TOLERANCE)
    assert first == second
    for name, value in wanted.items():
        assert first[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name


if __name__ == "__main__":
    run_rank()
