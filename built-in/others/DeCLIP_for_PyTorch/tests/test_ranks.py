"""Several processes: the losses' and batch norms' values and gradients are the whole batch's."""

import copy
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_runs import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from declip.batch import Batch
from declip.config import LossConfig
from declip.gather import gather_rows
from declip.losses.contrastive import contrastive_loss
from declip.losses.nearest_neighbor import TextQueue, nearest_neighbor_loss
from declip.model import Features
from declip.objective import TEXT_EPS, Objective
from declip.sync_batch_norm import SyncBatchNorm
from zoo_common import device, distributed
from zoo_common.errors import UserError

pytestmark = pytest.mark.device

DEVICE = device.resolve(
    os.environ.get("ZOO_TEST_DEVICE", "cpu"), index=int(os.environ.get("LOCAL_RANK", "0"))
)
# HCCL adds up no float64.
DTYPE = torch.float64 if DEVICE.type == "cpu" else torch.float32
TOLERANCE = 1e-12 if DTYPE is torch.float64 else 2e-5
MODEL_DIR = Path(__file__).resolve().parents[1]
LOCAL, VIEWS, TEXTS, DIM = 3, 2, 2, 8

# ------------------------------------------------------------------------------------------------
# What runs in each of the processes.


def rank() -> int:
    return dist.get_rank()


def ranks() -> int:
    return dist.get_world_size()


def draw(*shape: int, seed: int) -> Tensor:
    numbers = torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return numbers.to(DEVICE, DTYPE)


def own(whole: Tensor, dim: int = 0) -> Tensor:
    """This rank's part of a whole batch."""
    return whole.chunk(ranks(), dim=dim)[rank()]


def assert_equal(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


class Towers(nn.Module):
    """The smallest network that gives what the losses take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(DIM, DIM)
        self.text = nn.Linear(DIM, DIM)
        self.logit_scale = nn.Parameter(torch.tensor([2.5]))

    def forward(self, images_VBD: Tensor, texts_UBD: Tensor) -> Features:
        return Features(self.image(images_VBD), self.text(texts_UBD), self.logit_scale.exp())


def towers() -> Towers:
    return Towers().to(DEVICE, DTYPE)


def unit_texts(texts_UBD: Tensor) -> Tensor:
    """Of length 1, but for what upstream adds."""
    return texts_UBD / (texts_UBD.norm(dim=-1, keepdim=True) + TEXT_EPS)


def whole_contrastive(features: Features) -> Tensor:
    """The definition, over all pairs of a view and a text, in one process."""
    images, texts = F.normalize(features.images_VBD, dim=-1), unit_texts(features.texts_UBD)
    partners = torch.arange(images.shape[1], device=DEVICE)
    parts = []
    for view in images:
        for text in texts:
            logits = features.scale * view @ text.t()
            parts += [F.cross_entropy(logits, partners), F.cross_entropy(logits.t(), partners)]
    return torch.stack(parts).mean()


def whole_nearest(features: Features, neighbors_UND: Tensor) -> Tensor:
    images = F.normalize(features.images_VBD, dim=-1)
    partners = torch.arange(images.shape[1], device=DEVICE)
    parts = [
        F.cross_entropy(features.scale * view @ nearest.t(), partners)
        for view in images
        for nearest in neighbors_UND
    ]
    return torch.stack(parts).mean()


def mean_over_ranks(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / ranks()


def whole_inputs() -> tuple[Tensor, Tensor]:
    count = LOCAL * ranks()
    return draw(VIEWS, count, DIM, seed=1), draw(TEXTS, count, DIM, seed=2)


def assert_same_gradients(network: nn.Module, alone: nn.Module) -> None:
    for found, expected in zip(network.parameters(), alone.parameters(), strict=True):
        assert_equal(found.grad, expected.grad)


def check_rows_come_in_order_of_rank_and_gradients_are_summed() -> None:
    ours = own(draw(2, LOCAL * ranks(), DIM, seed=3), dim=1).clone().requires_grad_()
    other = own(draw(1, LOCAL * ranks(), DIM, seed=4), dim=1).clone().requires_grad_()
    gathered, others = gather_rows(ours, other)
    assert_equal(gathered.detach(), draw(2, LOCAL * ranks(), DIM, seed=3))
    assert_equal(others.detach(), draw(1, LOCAL * ranks(), DIM, seed=4))
    asked = [draw(2, LOCAL * ranks(), DIM, seed=10 + r) for r in range(ranks())]
    (gathered * asked[rank()]).sum().backward()
    assert_equal(ours.grad, own(torch.stack(asked).sum(dim=0), dim=1))
    assert_equal(other.grad, torch.zeros_like(other))


def check_features_get_the_gradient_of_the_whole_batch() -> None:
    whole = [part.requires_grad_() for part in whole_inputs()]
    scale = torch.full((1,), 12.0, dtype=DTYPE, device=DEVICE).requires_grad_()
    expected = whole_contrastive(Features(whole[0], whole[1], scale))
    expected.backward()
    ours = [own(part.detach(), dim=1).clone().requires_grad_() for part in whole]
    own_scale = scale.detach().clone().requires_grad_()
    images, texts = F.normalize(ours[0], dim=-1), unit_texts(ours[1])
    loss = contrastive_loss(images, texts, own_scale)
    loss.backward()
    assert_equal(mean_over_ranks(loss), expected.detach())
    for found, wanted in zip(ours, whole, strict=True):
        assert found.grad is not None and wanted.grad is not None
        # The mean over ranks is taken behind the features, of the weights' gradients.
        assert_equal(found.grad / ranks(), own(wanted.grad, dim=1))
    assert own_scale.grad is not None
    assert_equal(mean_over_ranks(own_scale.grad), scale.grad)


def check_contrastive_training_step_is_that_of_one_process() -> None:
    alone, model = towers(), towers()
    expected = whole_contrastive(alone(*whole_inputs()))
    expected.backward()
    network = distributed.wrap(model, DEVICE)
    config = LossConfig(clip=1, nn_text=0, simsiam=0, masked_language=0)
    objective = Objective(config, DIM, device=DEVICE, seed=0, rank=rank(), dtype=DTYPE)
    features = network(*(own(part, dim=1) for part in whole_inputs()))
    loss = objective(features, no_batch())["clip"]
    loss.backward()
    assert_equal(mean_over_ranks(loss), expected.detach())
    assert_same_gradients(model, alone)


def no_batch() -> Batch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(nothing, nothing, nothing, None, [], [])


def check_nearest_texts_training_step_is_that_of_one_process() -> None:
    queues = [
        TextQueue(16, DIM, device=DEVICE, seed=0, rank=r, dtype=DTYPE) for r in range(ranks())
    ]
    alone, model = towers(), towers()
    features = alone(*whole_inputs())
    texts = unit_texts(features.texts_UBD.detach())
    parts = zip(queues, texts.chunk(ranks(), dim=1), strict=True)
    nearest = [queue.nearest(part.flatten(0, 1)).view_as(part) for queue, part in parts]
    expected = whole_nearest(features, torch.cat(nearest, dim=1))
    expected.backward()

    network = distributed.wrap(model, DEVICE, find_unused=True)
    config = LossConfig(clip=0, nn_text=1, simsiam=0, masked_language=0, queue_size=16)
    objective = Objective(config, DIM, device=DEVICE, seed=0, rank=rank(), dtype=DTYPE)
    features = network(*(own(part, dim=1) for part in whole_inputs()))
    loss = objective(features, no_batch())["nn_text"]
    loss.backward()
    assert_equal(mean_over_ranks(loss), expected.detach())
    for found, wanted in zip(model.image.parameters(), alone.image.parameters(), strict=True):
        assert_equal(found.grad, wanted.grad)
    assert_equal(model.logit_scale.grad, alone.logit_scale.grad)
    # Only this rank's texts are in its queue: the second ones of each caption, then the first.
    assert objective.queue is not None
    pushed = own(texts, dim=1).flip(0).flatten(0, 1)
    assert_equal(objective.queue.rows_ND[: len(pushed)], pushed)
    assert objective.queue.position.item() == len(pushed)


def check_messages_of_a_step() -> None:
    """One message for all features, one back, and one for the neighbours."""
    calls: list[str] = []
    names = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "all_gather")
    names += ("reduce_scatter_tensor", "all_reduce", "barrier", "all_gather_object", "broadcast")
    from declip import gather

    before = {name: getattr(gather, name) for name in ("_all_gather", "_reduce_scatter")}
    others = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            calls.append(name)
            return function(*arguments, **options)

        return call

    try:
        for name, function in before.items():
            setattr(gather, name, counted(name, function))
        for name, function in others.items():
            setattr(dist, name, counted(name, function))
        images, texts = (F.normalize(own(part, dim=1), dim=-1) for part in whole_inputs())
        images.requires_grad_()
        scale = torch.ones(1, dtype=DTYPE, device=DEVICE)
        losses = [contrastive_loss(images, texts, scale)]
        losses.append(nearest_neighbor_loss(images, texts, scale))
        torch.stack(losses).sum().backward()
    finally:
        for name, function in before.items():
            setattr(gather, name, function)
        for name, function in others.items():
            setattr(dist, name, function)
    assert calls == ["_all_gather", "_all_gather", "_reduce_scatter"]


class Normed(nn.Module):
    """Two batch norms with a curve between them."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.one, self.two = norm(4), norm(4)
        for number, parameter in enumerate(self.parameters()):
            parameter.data += draw(4, seed=number).cpu() / 4

    def forward(self, images_BCHW: Tensor) -> Tensor:
        normalized: Tensor = self.two(self.one(images_BCHW).tanh())
        return normalized


def normed(norm: Callable[[int], nn.Module]) -> Normed:
    return Normed(norm).to(DEVICE, DTYPE)


def check_batch_norm_over_all_ranks_is_that_of_the_whole_batch() -> None:
    compare_norms(lambda channels: SyncBatchNorm(channels), ranks())
    compare_norms(lambda channels: SyncBatchNorm(channels, ranks=99), ranks())


def check_batch_norm_over_groups_is_that_of_a_groups_batch() -> None:
    for size in (2, 1):
        compare_norms(lambda channels, size=size: SyncBatchNorm(channels, ranks=size), size)
    if ranks() == 4:
        with pytest.raises(UserError, match=r"3 processes each do not divide the 4") as error:
            SyncBatchNorm(4, ranks=3)
        assert "\n" not in str(error.value)


def compare_norms(norm: Callable[[int], nn.Module], size: int) -> None:
    """Trains two steps in this rank's group of ``size`` and in one process."""
    alone, model = normed(nn.BatchNorm2d), normed(norm)
    assert list(model.state_dict()) == list(alone.state_dict())
    model.load_state_dict(alone.state_dict())
    # sync_buffers off: each group's statistics are looked at.
    network = distributed.wrap(model, DEVICE, sync_buffers=False)
    for step in range(2):
        whole = (3 + 2 * draw(2 * ranks(), 4, 5, 3, seed=20 + step)).requires_grad_()
        asked = draw(2 * ranks(), 4, 5, 3, seed=30 + step)
        alone.zero_grad()
        model.zero_grad()
        ours = own(whole.detach()).clone().requires_grad_()
        out = network(ours)
        (out * own(asked)).mean().backward()
        # One process goes through the groups; what belongs to this rank's is kept.
        outs = []
        for first in range(0, ranks(), size):
            copied = alone if rank() // size == first // size else copy.deepcopy(alone)
            part = whole[2 * first : 2 * (first + size)]
            outs.append(copied(part))
            loss = (outs[-1] * asked[2 * first : 2 * (first + size)]).mean()
            weight = size / ranks()
            gradients = torch.autograd.grad(
                loss * weight, [*copied.parameters(), whole], retain_graph=True
            )
            add_gradients(alone, whole, gradients)
        assert_equal(out, own(torch.cat(outs)))
        assert whole.grad is not None and ours.grad is not None
        assert_equal(ours.grad / ranks(), own(whole.grad))
        assert_same_gradients(model, alone)
        for found, expected in zip(model.buffers(), alone.buffers(), strict=True):
            assert_equal(found, expected)
    model.eval()
    alone.eval()
    assert_equal(model(whole), alone(whole))


def add_gradients(alone: nn.Module, whole: Tensor, gradients: tuple[Tensor, ...]) -> None:
    for leaf, gradient in zip([*alone.parameters(), whole], gradients, strict=True):
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def check_batch_norm_of_uneven_parts() -> None:
    layer, alone = (make(4).to(DEVICE, DTYPE) for make in (SyncBatchNorm, nn.BatchNorm2d))
    sizes = [r + 1 for r in range(ranks())]
    whole = draw(sum(sizes), 4, 3, 3, seed=40).requires_grad_()
    asked = draw(sum(sizes), 4, 3, 3, seed=41)
    ours = whole.detach().split(sizes)[rank()].clone().requires_grad_()
    out = layer(ours)
    (out * asked.split(sizes)[rank()]).sum().backward()
    expected = alone(whole)
    (expected * asked).sum().backward()
    assert whole.grad is not None
    assert_equal(out, expected.split(sizes)[rank()])
    assert_equal(ours.grad, whole.grad.split(sizes)[rank()])
    for found, wanted in zip(layer.parameters(), alone.parameters(), strict=True):
        assert found.grad is not None
        assert_equal(mean_over_ranks(found.grad) * ranks(), wanted.grad)


def check_batch_norm_keeps_float32_statistics_of_half_precision() -> None:
    layer, alone = (make(4).to(DEVICE) for make in (SyncBatchNorm, nn.BatchNorm2d))
    # Squares of such numbers have no digits left for a deviation of 1.
    whole = (512 + 4 * draw(2 * ranks(), 4, 9, 9, seed=50)).to(torch.bfloat16)
    out = layer(own(whole))
    assert out.dtype is torch.bfloat16
    alone(whole.float())
    for found, expected in zip(layer.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    far = (1e4 + draw(2 * ranks(), 4, 64, 64, seed=51)).float()
    expected = F.batch_norm(far.double(), None, None, training=True).float()
    torch.testing.assert_close(layer(own(far)), own(expected), rtol=0, atol=5e-3)


def check_synced_statistics_are_not_sent_again() -> None:
    def sends_buffers(norm: Callable[[int], nn.Module]) -> bool:
        wrapped = distributed.wrap(normed(norm), DEVICE)
        names = ("forward_sync_buffers", "broadcast_buffers")
        return bool(next(getattr(wrapped, name) for name in names if hasattr(wrapped, name)))

    assert not sends_buffers(SyncBatchNorm)
    assert sends_buffers(lambda channels: SyncBatchNorm(channels, ranks=1))
    assert sends_buffers(nn.BatchNorm2d)


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


def run_checks() -> None:
    device.configure(DEVICE)
    distributed.start(DEVICE, timeout_s=30)
    outcome = {}
    for name, check in CHECKS.items():
        try:
            check()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    distributed.stop()
    print(json.dumps(outcome))


# ------------------------------------------------------------------------------------------------
# The tests.


def run_group(world_size: int) -> list[dict[str, str]]:
    """What each check gave in each of so many processes."""
    return run_ranks(Path(__file__), world_size, ["-W", "error"])


@pytest.fixture(scope="module")
def outcomes_of_two() -> list[dict[str, str]]:
    return run_group(2)


@pytest.fixture(scope="module")
def outcomes_of_four() -> list[dict[str, str]]:
    return run_group(4)


def assert_passed(outcomes: list[dict[str, str]], check: str) -> None:
    failures = [f"rank {r}:\n{found[check]}" for r, found in enumerate(outcomes) if found[check]]
    assert not failures, "\n".join(failures)


@pytest.mark.cards(2)
@pytest.mark.parametrize("check", CHECKS)
def test_in_two_processes(outcomes_of_two: list[dict[str, str]], check: str) -> None:
    assert_passed(outcomes_of_two, check)


@pytest.mark.cards(4)
@pytest.mark.parametrize("check", CHECKS)
def test_in_four_processes(outcomes_of_four: list[dict[str, str]], check: str) -> None:
    assert_passed(outcomes_of_four, check)


def test_alone_a_rank_needs_no_group() -> None:
    rows = torch.randn(2, 3, 4, device=DEVICE)
    assert gather_rows(rows)[0] is rows
    layer, plain = SyncBatchNorm(4, ranks=32).to(DEVICE), nn.BatchNorm2d(4).to(DEVICE)
    images = torch.randn(2, 4, 3, 3, device=DEVICE)
    assert torch.equal(layer(images), plain(images))
    assert torch.equal(copy.deepcopy(layer).eval()(images), plain.eval()(images))


if __name__ == "__main__":
    run_checks()
