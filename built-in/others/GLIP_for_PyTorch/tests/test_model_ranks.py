"""Two processes that train a GLIP do what one does with the whole batch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from rank_runs import Trained, assert_trained_alike, checksums, run_ranks

from glip.model import GLIP
from glip.static import draw_batch, narrow_bert, narrow_config
from zoo_common import device, distributed

pytestmark = pytest.mark.device

DEVICE = device.resolve(
    os.environ.get("ZOO_TEST_DEVICE", "cpu"), index=int(os.environ.get("LOCAL_RANK", "0"))
)
# HCCL adds up no float64; losses are divided by counts that are added up in float32.
DTYPE, TOLERANCE = (torch.float32, 1e-3) if DEVICE.type == "npu" else (torch.float64, 1e-6)
IMAGES = 4


def without_noise() -> GLIP:
    """A narrow network that draws nothing in training."""
    config, bert = narrow_config(), narrow_bert()
    config.model.drop_path = config.model.drop_block = config.model.fusion_dropout = 0.0
    bert.hidden_dropout_prob = bert.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    return GLIP(config.model, config.loss, bert).to(DEVICE, DTYPE)


def train(ranks: int, rank: int) -> Trained:
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
    return {"losses": losses} | checksums(model, DTYPE)


def run_rank() -> None:
    """What each process does."""
    processes = distributed.start(DEVICE)
    found = train(processes.world_size, processes.rank)
    distributed.stop()
    print(json.dumps(found))


def test_two_processes_do_what_one_does_with_the_whole_batch() -> None:
    found = run_ranks(Path(__file__))
    assert_trained_alike(found, train(1, 0), TOLERANCE)
    assert found[0]["losses"] != found[1]["losses"]


if __name__ == "__main__":
    run_rank()
