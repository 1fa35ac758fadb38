"""Two processes that train a CLIP do what one does with the whole batch.

So exact is plain CLIP: its contrastive loss is over all images and texts, and a ResNet may share
its batch statistics. DeCLIP's further losses are each process's own, as upstream's: SimSiam's batch
norms and the mean over masked words are of the local images and captions, and each process looks
for neighbours in its own queue.
"""

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

from declip.batch import Batch
from declip.model import CLIP, build_model
from declip.objective import Objective
from declip.static import TOWERS, VOCABULARY, draw_batch, narrow_config
from zoo_common import device, distributed

pytestmark = pytest.mark.device

DEVICE = device.resolve(
    os.environ.get("ZOO_TEST_DEVICE", "cpu"), index=int(os.environ.get("LOCAL_RANK", "0"))
)
# HCCL adds up no float64.
DTYPE, TOLERANCE = (torch.float32, 1e-4) if DEVICE.type == "npu" else (torch.float64, 1e-9)
MODEL_DIR = Path(__file__).resolve().parents[1]
STEPS, IMAGES = 2, 6


def train(tower: str, ranks: int, rank: int) -> dict[str, list[float] | float]:
    """Trains on this rank's part of the batches; the losses and a number for each tensor."""
    config = narrow_config(tower)
    config.model.objective, config.model.sync_batch_norm = "clip", 0
    config.loss.clip = 1.0
    config.loss.nn_text = config.loss.simsiam = config.loss.masked_language = 0.0
    torch.manual_seed(0)
    model = build_model(config.model, config.loss, VOCABULARY).to(DEVICE, DTYPE)
    assert isinstance(model, CLIP)
    network = distributed.wrap(model, DEVICE)
    # AdamW would make a step of gradients that are nothing but rounding.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    objective = Objective(
        config.loss, config.model.embed_dim, device=DEVICE, seed=0, rank=rank, dtype=DTYPE
    )
    losses = []
    for seed in range(1, STEPS + 1):
        batch = _part(draw_batch(seed, images=IMAGES), ranks, rank).to(DEVICE)
        (loss,) = objective(network(batch), batch).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = torch.arange(1, 8, device=DEVICE, dtype=DTYPE)

    def number(value: Tensor) -> float:
        """Changes with each entry, and with their order."""
        flat = value.detach().to(DTYPE).flatten()
        return float((flat * weights.repeat(len(flat) // 7 + 1)[: len(flat)]).sum())

    return {"losses": losses} | {name: number(value) for name, value in model.state_dict().items()}


def _part(batch: Batch, ranks: int, rank: int) -> Batch:
    mine = slice(rank * IMAGES // ranks, (rank + 1) * IMAGES // ranks)
    return batch._replace(
        images_VBCHW=batch.images_VBCHW[:1, mine],
        tokens_UBT=batch.tokens_UBT[:1, mine],
        ends_UB=batch.ends_UB[:1, mine],
        masked=None,
    )


def run_rank() -> None:
    """What each process does."""
    processes = distributed.start(DEVICE)
    found = {tower: train(tower, processes.world_size, processes.rank) for tower in TOWERS}
    distributed.stop()
    print(json.dumps(found))


@pytest.fixture(scope="module")
def in_two_processes() -> list[dict[str, dict[str, list[float] | float]]]:
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
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.cards(2)
@pytest.mark.parametrize("tower", TOWERS)
def test_two_processes_are_one_with_the_whole_batch(
    tower: str, in_two_processes: list[dict[str, dict[str, list[float] | float]]]
) -> None:
    first, second = (found[tower] for found in in_two_processes)
    whole = train(tower, ranks=1, rank=0)
    halves = zip(first.pop("losses"), second.pop("losses"), strict=True)
    losses = whole.pop("losses")
    assert [(a + b) / 2 for a, b in halves] == pytest.approx(losses, rel=TOLERANCE)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    for name, value in whole.items():
        assert first[name] == second[name], name
        assert first[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name


if __name__ == "__main__":
    run_rank()
