"""Steps, loss scaling, clipping and accumulation of zoo_common.amp under O0, O1 and O2."""

import copy
import io
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zoo_common import device
from zoo_common.amp import MOST_SKIPS_IN_A_ROW, SMALLEST_SCALE, Precision, resolve_dtype
from zoo_common.config import PrecisionConfig
from zoo_common.errors import TrainingError, UserError

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
LEVELS = [
    PrecisionConfig(opt_level="O0"),
    PrecisionConfig(opt_level="O1", dtype="bfloat16"),
    PrecisionConfig(opt_level="O2", dtype="bfloat16"),
    PrecisionConfig(opt_level="O1", dtype="float16", loss_scale="1024"),
    PrecisionConfig(opt_level="O2", dtype="float16", loss_scale="1024"),
]
BY_LEVEL = pytest.mark.parametrize("config", LEVELS, ids=lambda c: f"{c.opt_level}-{c.dtype}")


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))
    return model.to(DEVICE)


def make(
    config: PrecisionConfig,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    **options: Any,
) -> tuple[nn.Module, Precision]:
    model = make_model()
    options.setdefault("lr", 1.0)
    return model, Precision(config, model, optimizer(model.parameters(), **options), DEVICE)


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator).to(DEVICE)
    return x, torch.randint(3, (size,), generator=generator).to(DEVICE)


def train_step(model: nn.Module, precision: Precision, x: Tensor, y: Tensor) -> bool:
    with precision.autocast(model):
        output = model(x)
    return precision.step(F.cross_entropy(output.float(), y))


def weights(precision: Precision) -> dict[str, Tensor]:
    return copy.deepcopy(precision.model_state_dict())


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def replace(config: PrecisionConfig, **changes: Any) -> PrecisionConfig:
    return PrecisionConfig(**{**vars(config), **changes})


def true_gradient(*batches: tuple[Tensor, Tensor]) -> Tensor:
    """Float32 gradient of the mean loss over batches of one size, by autograd alone."""
    model = make_model()
    loss = torch.stack([F.cross_entropy(model(x), y) for x, y in batches]).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_auto_dtype_is_float16_on_accelerators_and_bfloat16_on_cpu() -> None:
    config = PrecisionConfig(opt_level="O1")
    assert resolve_dtype(config, torch.device("cpu")) is torch.bfloat16
    assert resolve_dtype(config, torch.device("cuda")) is torch.float16
    assert resolve_dtype(PrecisionConfig(), torch.device("cuda")) is torch.float32


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dtype": "float16", "loss_scale": "64", "clip_grad": 1.0}, "O0 float32, clip 1"),
        (
            {"opt_level": "O1", "dtype": "float16", "clip_grad": 5.0},
            "O1 float16, dynamic loss scale, clip 5",
        ),
        ({"opt_level": "O1", "dtype": "bfloat16", "loss_scale": "128"}, "O1 bfloat16"),
        (
            {"opt_level": "O2", "dtype": "float16", "loss_scale": "64", "accumulate": 4},
            "O2 float16, loss scale 64, 4 micro-batches per step",
        ),
    ],
)
def test_describe(settings: dict[str, Any], line: str) -> None:
    assert make(PrecisionConfig(**settings))[1].describe() == line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opt_level": "O3"}, "--amp=O3 is no precision level"),
        ({"opt_level": "O1", "dtype": "int8"}, "--dtype=int8 is no half-precision format"),
        *(
            ({"loss_scale": text}, f"--loss_scale={text} is no loss scale")
            for text in ("abc", "", "0", "-1", "inf", "nan", "1e300", "1e-300")
        ),
        ({"accumulate": 0}, "precision.accumulate=0 is no number of micro-batches"),
        ({"clip_grad": -1.0}, "precision.clip_grad=-1.0 is no gradient norm"),
        ({"clip_grad": float("nan")}, "precision.clip_grad=nan is no gradient norm"),
    ],
)
def test_bad_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(PrecisionConfig(**settings))
    assert str(caught.value).startswith(message)


def test_bfloat16_on_a_device_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.get_device_module(DEVICE)
    monkeypatch.setattr(module, "is_bf16_supported", lambda: False, raising=False)
    with pytest.raises(UserError, match="--dtype=bfloat16 is not supported"):
        make(PrecisionConfig(opt_level="O1", dtype="bfloat16"))


def test_o0_equals_a_plain_loop() -> None:
    model, precision = make(PrecisionConfig(), momentum=0.9, lr=0.1)
    plain = make_model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        x, y = batch(step)
        assert train_step(model, precision, x, y)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert precision.steps == 4
    assert precision.loss_scale == 1
    assert precision.grad_norm is None
    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_o1_autocasts_over_float32_weights(dtype: str) -> None:
    model, precision = make(PrecisionConfig(opt_level="O1", dtype=dtype))
    with precision.autocast():
        assert model(batch(0)[0]).dtype is getattr(torch, dtype)
    assert model(batch(0)[0]).dtype is torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@BY_LEVEL
def test_update_is_the_true_gradient(config: PrecisionConfig) -> None:
    model, precision = make(config)
    before = flat(weights(precision))
    train_step(model, precision, *batch(0))
    update = before - flat(weights(precision))  # SGD with learning rate 1
    expected = true_gradient(batch(0))
    tolerance = 1e-5 if config.opt_level == "O0" else 2e-2
    assert (update - expected).norm() < tolerance * expected.norm()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_scaling_saves_gradients_that_float16_would_lose(level: str) -> None:
    def update(scale: str) -> Tensor:
        config = PrecisionConfig(opt_level=level, dtype="float16", loss_scale=scale)
        model, precision = make(config, lr=1e7)
        before = flat(weights(precision))
        x, y = batch(0)
        with precision.autocast():
            output = model(x)
        assert precision.step(F.cross_entropy(output.float(), y) * 1e-7)
        return before - flat(weights(precision))

    expected = true_gradient(batch(0))
    assert (update("65536") - expected).norm() < 2e-2 * expected.norm()
    assert (update("1") - expected).norm() > 0.2 * expected.norm()


@BY_LEVEL
def test_clipping_is_in_true_units(config: PrecisionConfig) -> None:
    true_norm = true_gradient(batch(0)).norm().item()
    for limit in (true_norm / 4, true_norm * 4):
        model, precision = make(replace(config, clip_grad=limit))
        before = flat(weights(precision))
        train_step(model, precision, *batch(0))
        assert precision.grad_norm is not None
        assert precision.grad_norm.device.type == DEVICE.type
        assert precision.grad_norm.item() == pytest.approx(true_norm, rel=1e-2)
        update = (before - flat(weights(precision))).norm().item()
        expected = min(limit, precision.grad_norm.item())
        assert update == pytest.approx(expected, rel=1e-4)


@BY_LEVEL
def test_micro_batches_equal_one_large_batch(config: PrecisionConfig) -> None:
    batches = [batch(seed) for seed in range(4)]
    limit = true_gradient(*batches).norm().item() / 2
    model, precision = make(replace(config, accumulate=4, clip_grad=limit))
    before = flat(weights(precision))
    stepped = []
    for x, y in batches:
        assert torch.equal(flat(weights(precision)), before)
        stepped.append(train_step(model, precision, x, y))
    assert stepped == [False, False, False, True]
    assert precision.steps == 1

    whole, at_once = make(replace(config, clip_grad=limit))
    train_step(
        whole, at_once, torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    )
    update, expected = (before - flat(weights(p)) for p in (precision, at_once))
    tolerance = 1e-5 if config.opt_level == "O0" else 2e-2
    assert (update - expected).norm() < tolerance * expected.norm()
    assert precision.grad_norm is not None
    assert precision.grad_norm.item() == pytest.approx(2 * limit, rel=1e-2)


def test_state_between_micro_batches_is_refused() -> None:
    model, precision = make(PrecisionConfig(accumulate=2))
    train_step(model, precision, *batch(0))
    assert not precision.at_boundary
    with pytest.raises(AssertionError, match="micro-batches"):
        precision.state_dict()
    train_step(model, precision, *batch(1))
    assert precision.at_boundary


def test_half_precision_loss_is_refused() -> None:
    model, precision = make(PrecisionConfig(opt_level="O1", dtype="bfloat16"))
    with precision.autocast():
        loss = model(batch(0)[0]).mean()
    with pytest.raises(AssertionError, match="float32"):
        precision.step(loss)


def overflow(model: nn.Module, precision: Precision) -> bool:
    x, y = batch(0)
    return train_step(model, precision, x * float("inf"), y)


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("fused", [False, True])
def test_dynamic_scale_skips_halves_and_grows(level: str, fused: bool) -> None:
    config = PrecisionConfig(opt_level=level, dtype="float16", clip_grad=1.0)
    model, precision = make(config, torch.optim.AdamW, lr=0.01, fused=fused)
    precision.scaler.set_growth_interval(2)
    assert precision.loss_scale == 65536
    assert train_step(model, precision, *batch(0))
    before = weights(precision)
    state = copy.deepcopy(precision.optimizer.state_dict())

    assert not overflow(model, precision)
    assert not overflow(model, precision)
    assert precision.loss_scale == 65536 / 4
    assert (precision.steps, precision.skipped_steps) == (1, 2)
    assert precision.grad_norm is not None and not precision.grad_norm.isfinite()
    for key, value in precision.model_state_dict().items():
        assert torch.equal(value, before[key])
    for old, new in zip(
        state["state"].values(), precision.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(old[key], new[key]) for key in old)

    for seed, scale in ((1, 65536 / 4), (2, 65536 / 2), (3, 65536 / 2), (4, 65536)):
        assert train_step(model, precision, *batch(seed))
        assert precision.loss_scale == scale
    assert (precision.steps, precision.skipped_steps) == (5, 2)
    assert precision.grad_norm.isfinite()


def test_static_scale_skips_and_stays() -> None:
    config = PrecisionConfig(opt_level="O1", dtype="float16", loss_scale="128")
    model, precision = make(config)
    precision.scaler.set_growth_interval(1)
    stepped = []
    for step in range(6):
        finite = step not in (1, 4)
        stepped.append(
            train_step(model, precision, *batch(step)) if finite else overflow(model, precision)
        )
        assert precision.loss_scale == 128
    assert stepped == [True, False, True, True, False, True]
    assert (precision.steps, precision.skipped_steps) == (4, 2)


def test_dynamic_scale_has_a_floor() -> None:
    model, precision = make(PrecisionConfig(opt_level="O1", dtype="float16"))
    with pytest.raises(TrainingError, match="not finite even at a loss scale of"):
        for _ in range(100):
            overflow(model, precision)
    assert precision.skipped_steps == 31
    assert precision.loss_scale == SMALLEST_SCALE / 2


def test_static_scale_that_always_overflows_ends() -> None:
    model, precision = make(PrecisionConfig(opt_level="O1", dtype="float16", loss_scale="8"))
    for _ in range(MOST_SKIPS_IN_A_ROW - 1):
        overflow(model, precision)
    train_step(model, precision, *batch(0))
    for _ in range(MOST_SKIPS_IN_A_ROW - 1):
        overflow(model, precision)
    with pytest.raises(TrainingError, match="set --loss_scale=dynamic"):
        overflow(model, precision)


class CountReads(TorchDispatchMode):
    """Counts values that the host reads from tensors."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@BY_LEVEL
def test_reads_back_nothing_or_one_number_with_float16(config: PrecisionConfig) -> None:
    model, precision = make(replace(config, clip_grad=1.0, accumulate=2), momentum=0.9)
    for seed in (0, 1):
        train_step(model, precision, *batch(seed))
    with CountReads() as count:
        for seed in (2, 3):
            train_step(model, precision, *batch(seed))
    assert count.reads == (1 if config.dtype == "float16" else 0)


@pytest.mark.parametrize(
    "config",
    [
        PrecisionConfig(opt_level="O0", clip_grad=0.5),
        PrecisionConfig(opt_level="O2", dtype="bfloat16", clip_grad=0.5),
        PrecisionConfig(opt_level="O2", dtype="float16"),
    ],
    ids=lambda c: f"{c.opt_level}-{c.dtype}",
)
def test_saved_state_continues_to_the_same_bits(config: PrecisionConfig) -> None:
    def start() -> tuple[nn.Module, Precision]:
        model, precision = make(config, torch.optim.AdamW, lr=0.01)
        precision.scaler.set_growth_interval(2)
        return model, precision

    model, precision = start()
    scaled = config.dtype == "float16"
    if scaled:
        overflow(model, precision)
    for seed in range(3):
        train_step(model, precision, *batch(seed))
    file = io.BytesIO()
    states = {
        "model": precision.model_state_dict(),
        "precision": precision.state_dict(),
    }
    torch.save(states, file)
    file.seek(0)
    for seed in range(3, 6):
        train_step(model, precision, *batch(seed))

    loaded = torch.load(file, weights_only=True, map_location=DEVICE)
    resumed_model, resumed = start()
    resumed.load_model_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["precision"])
    for seed in range(3, 6):
        train_step(resumed_model, resumed, *batch(seed))
    assert torch.equal(flat(weights(resumed)), flat(weights(precision)))
    assert torch.equal(resumed_model(batch(9)[0]), model(batch(9)[0]))
    assert resumed.loss_scale == precision.loss_scale
    assert (resumed.steps, resumed.skipped_steps) == (6, int(scaled))


def test_saved_state_fits_another_precision() -> None:
    half = make(PrecisionConfig(opt_level="O1", dtype="float16"))[1]
    half.load_state_dict(make(PrecisionConfig())[1].state_dict())
    assert half.loss_scale == 65536
    static = make(PrecisionConfig(opt_level="O1", dtype="float16", loss_scale="8"))[1]
    static.load_state_dict(half.state_dict())
    assert static.loss_scale == 8
