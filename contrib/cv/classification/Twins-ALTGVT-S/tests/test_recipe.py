"""The recipe: learning rates, decay groups, optimizers, mixup and cutmix, losses."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from twins.model import Twins, build_model
from twins.recipe import (
    ClassificationLoss,
    Mixing,
    build_optimizer,
    lr_of_epoch,
    parameter_groups,
    scaled_lr,
    schedule_lr,
    step_seed,
)
from zoo_common import device
from zoo_common.errors import UserError

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
FIXTURE = Path(__file__).parent / "fixtures" / "twins_tiny.json"
MIRROR = [0, 5, 1, 4, 2, 3]  # neighbours in this order are mirror images in a batch of six


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


def images_and_labels(count: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 20, 31, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


def smoke_model() -> Twins:
    torch.manual_seed(0)
    return build_model("alt_gvt_smoke", num_classes=4).to(DEVICE)


def test_learning_rates_of_the_recorded_300_epochs(recorded: dict) -> None:
    rates = [lr_of_epoch(epoch, lr=1e-3, epochs=300) for epoch in range(300)]
    assert rates == pytest.approx(recorded["recipe"]["lr_per_epoch"], rel=1e-12)
    assert rates[0] == rates[1] == 1e-6


@pytest.mark.parametrize(("epochs", "warmup"), [(100, 5), (12, 3), (7, 0), (4, 5)])
def test_learning_rates_of_other_lengths_are_timms(epochs: int, warmup: int) -> None:
    """Upstream's loop: trains an epoch, then steps the scheduler with that epoch's number."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6
    )
    for epoch in range(epochs):
        expected = optimizer.param_groups[0]["lr"]
        rate = lr_of_epoch(epoch, lr=2e-3, epochs=epochs, warmup_epochs=warmup)
        assert rate == pytest.approx(expected, rel=1e-12), epoch
        scheduler.step(epoch)


def test_schedule_between_epochs() -> None:
    options = {"lr": 1.0, "epochs": 10, "warmup_epochs": 2, "warmup_lr": 0.0, "min_lr": 0.1}
    assert schedule_lr(0.5, **options) == pytest.approx(0.25)
    assert schedule_lr(5, **options) == pytest.approx(0.55)
    assert schedule_lr(10, **options) == schedule_lr(11, **options) == 0.1
    rates = [schedule_lr(t / 10, **options) for t in range(20, 101)]
    assert rates == sorted(rates, reverse=True)


def test_learning_rate_grows_with_the_global_batch() -> None:
    assert scaled_lr(5e-4, 2048) == pytest.approx(2e-3)
    assert scaled_lr(1e-3, 128) == pytest.approx(2.5e-4)


def test_decay_groups_are_the_recorded_ones(recorded: dict) -> None:
    config = recorded["config"]
    names = ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios")
    model = Twins(num_classes=10, windows=config["wss"], **{n: config[n] for n in names})
    groups = parameter_groups(model, 0.05)
    found = [{"weight_decay": g["weight_decay"], "names": g["names"]} for g in groups]
    assert found == recorded["recipe"]["weight_decay"]
    parameters = dict(model.named_parameters())
    for group in groups:
        assert all(p is parameters[n] for p, n in zip(group["params"], group["names"], strict=True))


def test_frozen_parameters_are_in_no_group() -> None:
    model = smoke_model()
    model.patch_embeds.requires_grad_(False)
    names = [name for group in parameter_groups(model, 0.05) for name in group["names"]]
    assert names
    assert not any(name.startswith("patch_embeds") for name in names)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_optimizers_take_the_step_of_their_plain_form(name: str) -> None:
    model, plain = smoke_model(), smoke_model()
    groups = param_groups_weight_decay(plain, 0.05, no_weight_decay_list=plain.no_weight_decay())
    if name == "adamw":
        reference = torch.optim.AdamW(groups, lr=0.01, eps=1e-8, foreach=False)
    elif name == "sgd":
        reference = torch.optim.SGD(groups, lr=0.01, momentum=0.8, nesterov=True, foreach=False)
    else:
        import timm.optim

        reference = timm.optim.Lamb(groups, lr=0.01)
    optimizer = build_optimizer(model, name=name, lr=0.01, weight_decay=0.05, momentum=0.8)
    for _ in range(3):
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            ours.grad = torch.sin(37 * ours.detach())
            theirs.grad = torch.sin(37 * theirs.detach())
        optimizer.step()
        reference.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_unknown_optimizer() -> None:
    with pytest.raises(UserError, match="no optimizer 'adamm'"):
        build_optimizer(smoke_model(), name="adamm", lr=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_mixes_are_the_recorded_ones(recorded: dict, seed: int) -> None:
    tensors = load_file(FIXTURE.with_suffix(".safetensors"))
    mix = recorded["recipe"][f"mixup_seed{seed}"]
    mixing = Mixing(10)
    images = tensors["recipe/mixup_in"].to(DEVICE)
    labels = tensors["inputs/labels"].to(DEVICE)
    mixed, targets = mixing(images, labels, seed=seed)
    draw = mixing.draw(seed, *images.shape[-2:])
    assert [draw.drawn_lam, draw.box is not None] == mix["params"]
    assert draw.lam == pytest.approx(mix["lam"])
    for ours, path in ((mixed, mix["images"]["tensor"]), (targets, mix["target"]["tensor"])):
        torch.testing.assert_close(ours.cpu(), tensors[path], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("probability", [1.0, 0.6])
def test_mixup_is_timms_with_neighbours_for_mirror_images(probability: float) -> None:
    images, labels = images_and_labels(6, 7)
    ours = Mixing(7, mixup=0.4, cutmix=0.0, probability=probability)
    theirs = Mixup(0.4, 0.0, prob=probability, label_smoothing=0.1, num_classes=7)
    for seed in range(20):
        np.random.seed(seed)
        expected_images, expected_targets = theirs(images.clone(), labels)
        mixed, targets = ours(images[MIRROR], labels[MIRROR], seed=seed)
        torch.testing.assert_close(mixed, expected_images[MIRROR])
        torch.testing.assert_close(targets, expected_targets[MIRROR])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.0, 1.0)])
def test_targets_tell_the_shares_of_pixels(mixup: float, cutmix: float) -> None:
    mixing = Mixing(2, mixup=mixup, cutmix=cutmix, smoothing=0.0)
    images = torch.stack([torch.zeros(3, 24, 40), torch.ones(3, 24, 40)]).to(DEVICE)
    kinds = set()
    for seed in range(40):
        mixed, targets = mixing(images, torch.tensor([0, 1], device=DEVICE), seed=seed)
        torch.testing.assert_close(mixed[0, 0].mean(), targets[0, 1])
        torch.testing.assert_close(mixed[1, 0].mean(), targets[1, 1])
        kinds.add(mixing.draw(seed, 24, 40).box is not None)
    assert kinds == ({True, False} if mixup else {True})


def test_mixes_do_not_depend_on_the_number_of_processes_or_the_global_generator() -> None:
    images, labels = images_and_labels(8, 5)
    mixing = Mixing(5)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    for seed in range(6):
        whole = mixing(images, labels, seed=seed)
        halves = [
            mixing(images[part], labels[part], seed=seed) for part in ([0, 1, 2, 3], [4, 5, 6, 7])
        ]
        for together, split in zip(whole, zip(*halves, strict=True), strict=True):
            assert torch.equal(together, torch.cat(split))
    assert (np.random.get_state()[1] == before).all()


def test_images_keep_their_type_and_are_not_written_to() -> None:
    images, labels = images_and_labels(4, 5)
    original = images.clone()
    mixed, targets = Mixing(5)(images.half(), labels, seed=0)
    assert (mixed.dtype, targets.dtype) == (torch.float16, torch.float32)
    Mixing(5)(images, labels, seed=0)
    assert torch.equal(images, original)


def test_odd_batches_cannot_be_mixed() -> None:
    images, labels = images_and_labels(3, 5)
    with pytest.raises(UserError, match="the batch has 3: take an even batch size"):
        Mixing(5)(images, labels, seed=0)


def test_step_seeds_differ() -> None:
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4000
    assert max(seeds) < 2**32


def test_losses_are_timms() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 9, device=DEVICE) * 3, torch.arange(6, device=DEVICE)
    soft = torch.rand(6, 9, device=DEVICE).softmax(1)
    loss = ClassificationLoss(smoothing=0.2)
    torch.testing.assert_close(
        loss(logits, labels), LabelSmoothingCrossEntropy(0.2)(logits, labels)
    )
    torch.testing.assert_close(loss(logits, soft), SoftTargetCrossEntropy()(logits, soft))
    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(ClassificationLoss(smoothing=0.0)(logits, labels), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_logits_are_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 9, device=DEVICE).to(dtype)
    soft = torch.rand(6, 9, device=DEVICE).softmax(1)
    for targets in (soft, torch.arange(6, device=DEVICE)):
        loss = ClassificationLoss()(logits, targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, ClassificationLoss()(logits.float(), targets))
