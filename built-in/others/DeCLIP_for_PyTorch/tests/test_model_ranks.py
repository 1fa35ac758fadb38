"""Two processes that train a CLIP do what one does with the whole batch.

So exact is plain CLIP: its contrastive loss is over all images and texts, and a ResNet may share
its batch statistics. DeCLIP's further losses are each process's own, as upstream's: SimSiam's batch
norms and the mean over masked words are of the local images and captions, and each process looks
for neighbours in its own queue.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from rank_runs import Trained, assert_trained_alike, checksums, run_ranks

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
STEPS, IMAGES = 2, 6


def train(tower: str, ranks: int, rank: int) -> Trained:
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
    return {"losses": losses} | checksums(model, DTYPE)


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
def in_two_processes() -> list[dict[str, Trained]]:
    return run_ranks(Path(__file__))


@pytest.mark.cards(2)
@pytest.mark.parametrize("tower", TOWERS)
def test_two_processes_are_one_with_the_whole_batch(
    tower: str, in_two_processes: list[dict[str, Trained]]
) -> None:
    whole = train(tower, ranks=1, rank=0)
    assert_trained_alike([found[tower] for found in in_two_processes], whole, TOLERANCE)
    first, second = whole["losses"]
    assert first != pytest.approx(second, rel=1e-3)


if __name__ == "__main__":
    run_rank()
