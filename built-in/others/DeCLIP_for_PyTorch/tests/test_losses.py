"""The losses and the queue: upstream's numbers, and what they do at the edges.

fixtures/losses.safetensors holds features, logits and queue that Sense-GVT/DeCLIP at 5d99a855
recorded in a training step (float64, stored in float32).
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from declip.batch import Batch, Masked
from declip.config import LossConfig
from declip.losses.contrastive import contrastive_loss
from declip.losses.masked_language import masked_language_loss
from declip.losses.nearest_neighbor import TextQueue
from declip.losses.simsiam import simsiam_loss
from declip.model import Features
from declip.objective import Objective
from zoo_common import device
from zoo_common.errors import UserError

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
DTYPE = torch.float64 if DEVICE.type == "cpu" else torch.float32
TOLERANCE = 2e-6 if DTYPE is torch.float64 else 1e-4
FIXTURE = Path(__file__).parent / "fixtures" / "losses.safetensors"
UPSTREAMS = {  # before their weights
    "clip": 1.7420744539812947,
    "nn_text": 2.675620077343349,
    "simsiam": -0.03065746955553709,
    "masked_language": 7.003689283661415,
}
WEIGHTS = {"clip": 0.4, "nn_text": 0.2, "simsiam": 0.2, "masked_language": 0.2}


@pytest.fixture
def recorded() -> dict[str, Tensor]:
    """Upstream's tensors, on the device and in the format of the losses there."""
    tensors = load_file(FIXTURE)
    return {
        name: tensor.to(DEVICE, DTYPE if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }


def features_of(recorded: dict[str, Tensor], length: float = 1.0) -> Features:
    return Features(
        images_VBD=length * recorded["images_VBD"],
        texts_UBD=length * recorded["texts_UBD"],
        scale=recorded["logit_scale"].exp(),
        projected_VBP=recorded["projected_VBP"],
        predicted_VBP=recorded["predicted_VBP"],
        words_MW=recorded["words_MW"],
    )


def batch_of(labels_M: Tensor, images: int = 4) -> Batch:
    empty = torch.zeros(0, dtype=torch.int64)
    masked = Masked(torch.zeros_like(labels_M), torch.zeros_like(labels_M), labels_M)
    return Batch(empty, empty, empty, masked, ["image"] * images, [])


def objective_of(config: LossConfig, dim: int = 32, dtype: torch.dtype = DTYPE) -> Objective:
    return Objective(config, dim, device=DEVICE, seed=0, rank=0, dtype=dtype)


@pytest.mark.parametrize("length", [1.0, 7.5])
def test_losses_and_queue_are_upstreams(recorded: dict[str, Tensor], length: float) -> None:
    objective = objective_of(LossConfig(queue_size=32, queue_wrap=False))
    assert objective.queue is not None
    position = torch.tensor(27)
    objective.queue.load_state_dict({"rows_ND": recorded["queue_before_ND"], "position": position})
    losses = objective(features_of(recorded, length), batch_of(recorded["labels_M"]))
    found = {name: loss.item() / WEIGHTS[name] for name, loss in losses.items()}
    assert found == pytest.approx(UPSTREAMS, rel=TOLERANCE)
    # Rows 27 to 30 take the augmented texts, row 31 a plain one; three are dropped.
    torch.testing.assert_close(
        objective.queue.rows_ND, recorded["queue_after_ND"], rtol=0, atol=TOLERANCE
    )
    assert objective.queue.position.item() == 0


def test_upstreams_nearest_texts_give_its_logits(recorded: dict[str, Tensor]) -> None:
    queue = TextQueue(32, 32, device=DEVICE, seed=0, rank=0, dtype=DTYPE)
    queue.load_state_dict({"rows_ND": recorded["queue_before_ND"], "position": torch.tensor(27)})
    nearest = torch.stack([queue.nearest(texts_BD) for texts_BD in recorded["texts_UBD"]])
    logits = recorded["logit_scale"].exp() * torch.einsum(
        "vbd,ucd->vubc", recorded["images_VBD"], nearest
    )
    torch.testing.assert_close(
        logits, recorded["nn_logits_VUBB"], rtol=TOLERANCE, atol=10 * TOLERANCE
    )


def test_a_weight_of_zero_leaves_a_part_out(recorded: dict[str, Tensor]) -> None:
    objective = objective_of(LossConfig(nn_text=0, simsiam=0, masked_language=0))
    assert objective.queue is None, "neither memory nor a part of checkpoints"
    plain = Features(
        recorded["images_VBD"][:1], recorded["texts_UBD"][:1], recorded["logit_scale"].exp()
    )
    losses = objective(plain, batch_of(recorded["labels_M"])._replace(masked=None))
    assert list(losses) == ["clip"]
    assert losses["clip"].item() == pytest.approx(0.4 * 1.539929438991568, rel=TOLERANCE)
    only_words = objective_of(LossConfig(clip=0, nn_text=0, simsiam=0))
    losses = only_words(features_of(recorded), batch_of(recorded["labels_M"]))
    assert list(losses) == ["masked_language"]


def test_losses_are_float32_in_autocast_and_of_half_precision_features(
    recorded: dict[str, Tensor],
) -> None:
    halves = Features(*(value.bfloat16() for value in features_of(recorded)))
    objective = objective_of(LossConfig(queue_size=32), dtype=torch.float32)
    assert objective.queue is not None and objective.queue.rows_ND.dtype is torch.float32
    wide = Features(*(value.float() for value in halves))
    expected = objective_of(LossConfig(queue_size=32), dtype=torch.float32)(
        wide, batch_of(recorded["labels_M"])
    )
    with torch.autocast(DEVICE.type, torch.bfloat16):
        losses = objective(halves, batch_of(recorded["labels_M"]))
    for name, loss in losses.items():
        assert loss.dtype is torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=0)


def test_all_batches_are_of_one_size(recorded: dict[str, Tensor]) -> None:
    objective = objective_of(LossConfig(nn_text=0, simsiam=0, masked_language=0))
    features = features_of(recorded)
    objective(features, batch_of(recorded["labels_M"]))
    smaller = features._replace(
        images_VBD=features.images_VBD[:, :3], texts_UBD=features.texts_UBD[:, :3]
    )
    with pytest.raises(AssertionError, match="3 images after 4"):
        objective(smaller, batch_of(recorded["labels_M"], images=3))


def test_contrastive_loss_of_perfect_matches_is_small_and_of_none_is_log_n() -> None:
    rows = torch.eye(8, dtype=DTYPE, device=DEVICE)[None]
    scale = torch.tensor([100.0], dtype=DTYPE, device=DEVICE)
    assert contrastive_loss(rows, rows, scale).item() == pytest.approx(0, abs=1e-6)
    same = torch.ones(1, 8, 8, dtype=DTYPE, device=DEVICE) / 8**0.5
    assert contrastive_loss(same, same, scale).item() == pytest.approx(2.0794415, abs=1e-5)


def test_no_masked_word_gives_zero_and_zero_gradients() -> None:
    words = torch.randn(8, 11, dtype=DTYPE, device=DEVICE).requires_grad_()
    loss = masked_language_loss(words, torch.full((8,), -100, device=DEVICE))
    assert loss.item() == 0
    loss.backward()
    assert words.grad is not None and not words.grad.any()


def test_masked_words_are_averaged_and_empty_slots_are_not() -> None:
    words = torch.randn(6, 11, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    labels = torch.tensor([3, 0, -100, 10, -100, -100], device=DEVICE)
    expected = F.cross_entropy(words[[0, 1, 3]], labels[[0, 1, 3]])
    torch.testing.assert_close(masked_language_loss(words, labels), expected)
    assert masked_language_loss(words.bfloat16(), labels).dtype is torch.float32


def test_simsiam_is_minus_one_at_the_best_and_stops_gradients() -> None:
    views = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    assert simsiam_loss(views.flip(0) * 3, views).item() == pytest.approx(-1)
    assert simsiam_loss(-views.flip(0), views).item() == pytest.approx(1)
    predicted, projected = views.clone().requires_grad_(), views.clone().requires_grad_()
    loss = simsiam_loss(predicted, projected)
    cosines = F.cosine_similarity(views[0], views[1], dim=-1)
    torch.testing.assert_close(loss.detach(), -cosines.mean())
    loss.backward()
    assert predicted.grad is not None and projected.grad is None


def unit_rows(count: int, seed: int) -> Tensor:
    rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1).to(DEVICE)


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("size", [8, 10])
def test_queue_takes_texts_in_order(wrap: bool, size: int) -> None:
    queue = TextQueue(size, 4, device=DEVICE, seed=0, rank=0, wrap=wrap)
    expected, position = queue.rows_ND.tolist(), 0
    where, given = queue.rows_ND.data_ptr(), queue.position.data_ptr()
    for step in range(9):
        texts = unit_rows(4, step)
        for offset, text in enumerate(texts.tolist()):
            if position + offset < size or wrap:
                expected[(position + offset) % size] = text
        position += 4
        position = position % size if wrap or position < size else 0
        queue.push(texts)
        assert queue.rows_ND.tolist() == expected
        assert queue.position.item() == position
    assert (queue.rows_ND.data_ptr(), queue.position.data_ptr()) == (where, given), "in place"


def test_more_texts_than_rows_are_refused() -> None:
    queue = TextQueue(3, 4, device=DEVICE, seed=0, rank=0)
    queue.push(unit_rows(3, 0))
    with pytest.raises(AssertionError, match="4 texts do not fit into a queue of 3"):
        queue.push(unit_rows(4, 0))


def test_nearest_text_is_the_one_with_the_largest_cosine() -> None:
    queue = TextQueue(16, 4, device=DEVICE, seed=0, rank=0)
    texts = 5 * unit_rows(6, 1)
    texts.requires_grad_()
    nearest = queue.nearest(texts)
    assert not nearest.requires_grad
    cosines = F.cosine_similarity(texts[:, None].detach(), queue.rows_ND[None], dim=-1)
    assert torch.equal(nearest, queue.rows_ND[cosines.argmax(dim=1)])
    queue.push(F.normalize(texts, dim=1))
    torch.testing.assert_close(queue.nearest(texts), F.normalize(texts.detach(), dim=1))


def test_queue_starts_with_random_directions_of_its_seed_and_rank() -> None:
    starts = [
        TextQueue(64, 8, device=DEVICE, seed=seed, rank=rank).rows_ND
        for seed, rank in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert torch.equal(starts[0], starts[1])
    assert not any(torch.allclose(starts[0], other) for other in starts[2:])
    torch.testing.assert_close(starts[0].norm(dim=1), torch.ones(64, device=DEVICE))
    assert starts[0].mean().abs() < 0.05


def test_queue_resumes_exactly() -> None:
    queue, other = (TextQueue(10, 4, device=DEVICE, seed=seed, rank=0) for seed in (0, 1))
    queue.push(unit_rows(4, 0))
    other.load_state_dict({name: value.cpu() for name, value in queue.state_dict().items()})
    for each in (queue, other):
        each.push(unit_rows(4, 1))
        each.push(unit_rows(4, 2))
    assert torch.equal(queue.rows_ND, other.rows_ND)
    assert queue.position.item() == other.position.item() == 2


def test_queue_of_another_size_is_told() -> None:
    small = TextQueue(10, 4, device=DEVICE, seed=0, rank=0)
    large = TextQueue(12, 4, device=DEVICE, seed=0, rank=0)
    with pytest.raises(UserError, match=r"10 texts of 4 features, .* are 12 and 4") as error:
        large.load_state_dict(small.state_dict())
    assert "\n" not in str(error.value)
