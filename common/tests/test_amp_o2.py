"""The half-precision model of O2 and its float32 masters."""

import dataclasses
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from zoo_common import device, distributed
from zoo_common.amp import Precision
from zoo_common.config import PrecisionConfig

pytestmark = pytest.mark.device

DEVICE = device.resolve(os.environ.get("ZOO_TEST_DEVICE", "cpu"))
BFLOAT16 = PrecisionConfig(opt_level="O2", dtype="bfloat16")


class Net(nn.Module):
    """A convolution and a linear layer, each with its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.ln = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.register_buffer("shift", torch.linspace(0, 1, 4))
        self.to(DEVICE)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BC = self.bn(self.conv(images_BCHW)).relu().mean((2, 3))
        return self.head(self.ln(x_BC)) + self.shift


def hand_written_forward(net: Net, half: dict[str, Tensor], images_BCHW: Tensor) -> Tensor:
    """Net's forward pass with every cast of O2 written out; ``half`` holds its leaves."""
    dtype = half["conv.weight"].dtype
    x = F.conv2d(images_BCHW.to(dtype), half["conv.weight"], half["conv.bias"])
    bn, ln = net.bn, net.ln
    x = F.batch_norm(x.float(), bn.running_mean, bn.running_var, bn.weight, bn.bias, True, 0.1)
    x = x.to(dtype).relu().mean((2, 3))
    x = F.layer_norm(x.float(), (8,), ln.weight, ln.bias).to(dtype)
    x = F.linear(x, half["head.weight"], half["head.bias"]) + net.shift.to(dtype)
    return x.float()


def optimizer_over(net: nn.Module, kind: str) -> torch.optim.Optimizer:
    """Two groups: matrices decay, the rest does not and has its own learning rate."""
    parameters = list(net.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0, "lr": 0.02},
    ]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.01)


def batch(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 8, 8, generator=generator).to(DEVICE)
    return images, torch.randint(4, (size,), generator=generator).to(DEVICE)


def train_step(network: nn.Module, precision: Precision, x: Tensor, y: Tensor) -> bool:
    with precision.autocast(network):
        loss = F.cross_entropy(network(x), y)
    return precision.step(loss)


def convert(model: nn.Module, config: PrecisionConfig = BFLOAT16, **options: Any) -> Precision:
    trained = [p for p in model.parameters() if p.requires_grad] or [torch.zeros(1)]
    return Precision(config, model, torch.optim.SGD(trained, lr=0.1), DEVICE, **options)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(("dtype", "scale", "steps"), [("bfloat16", 1.0, 6), ("float16", 256.0, 3)])
def test_equals_a_hand_written_master_weight_loop(
    kind: str, dtype: str, scale: float, steps: int
) -> None:
    net = Net()
    config = PrecisionConfig(opt_level="O2", dtype=dtype, loss_scale=str(scale))
    precision = Precision(config, net, optimizer_over(net, kind), DEVICE)

    masters = Net()
    optimizer = optimizer_over(masters, kind)
    for step in range(steps):
        x, y = batch(step)
        assert train_step(net, precision, x, y)

        half = {
            name: p.detach().to(getattr(torch, dtype)).requires_grad_()
            for name, p in masters.named_parameters()
            if name.startswith(("conv", "head"))
        }
        optimizer.zero_grad()
        (F.cross_entropy(hand_written_forward(masters, half, x), y) * scale).backward()
        for name, p in masters.named_parameters():
            gradient = half[name].grad.float() if name in half else p.grad
            p.grad = gradient / scale
        optimizer.step()

        expected = masters.state_dict()
        for key, value in precision.model_state_dict().items():
            if key != "bn.num_batches_tracked" and key != "shift":
                assert torch.equal(value, expected[key]), key
    for name, p in net.named_parameters():
        assert torch.equal(p, masters.get_parameter(name).to(p.dtype)), name


def test_groups_keep_their_settings_and_hold_masters() -> None:
    net = Net()
    optimizer = optimizer_over(net, "adamw")
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    precision = Precision(BFLOAT16, net, optimizer, DEVICE)
    assert precision.optimizer is optimizer
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert after == before
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 6]
    assert {p.dtype for g in optimizer.param_groups for p in g["params"]} == {torch.float32}


def test_only_normalisation_stays_float32() -> None:
    net = Net()
    convert(net)
    dtypes = {name: tensor.dtype for name, tensor in net.state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype is torch.float32} == {
        *("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"),
        *("ln.weight", "ln.bias"),
    }
    assert dtypes["bn.num_batches_tracked"] is torch.int64
    assert dtypes["shift"] is torch.bfloat16


NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm": lambda: nn.LayerNorm((4, 5, 5)),
    "RMSNorm": lambda: nn.RMSNorm((4, 5, 5)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_normalisation_computes_in_float32(name: str, training: bool) -> None:
    if name == "SyncBatchNorm" and training and DEVICE.type == "cpu":
        pytest.skip("SyncBatchNorm trains on accelerators only")
    reference = NORMS[name]().to(DEVICE).train(training)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[name](), nn.Conv2d(4, 2, 1)).to(DEVICE)
    convert(model)
    model.train(training)
    seen: list[Tensor] = []
    for conv in (model[0], model[2]):
        conv.register_forward_hook(lambda _module, args, output: seen.extend((args[0], output)))
    images = 100 + torch.randn(2, 3, 5, 5, device=DEVICE)
    assert model(images).dtype is torch.float32
    into_first, before_norm, after_norm, _ = seen
    assert into_first.dtype is before_norm.dtype is after_norm.dtype is torch.bfloat16
    assert torch.equal(after_norm, reference(before_norm.float()).bfloat16())
    for key, value in model[1].state_dict().items():
        assert torch.equal(value, reference.state_dict()[key])
        assert value.dtype in (torch.float32, torch.int64)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4, device=DEVICE)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = self.embed.weight  # moving to an NPU would untie them

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.embed(tokens))

    model = Tied()
    precision = convert(model)
    assert len(precision.optimizer.param_groups[0]["params"]) == 1
    tokens = torch.arange(6, device=DEVICE)
    before = model.embed.weight.clone()
    assert train_step(model, precision, tokens, tokens)
    assert model.out.weight is model.embed.weight
    assert not torch.equal(model.embed.weight, before)
    state = precision.model_state_dict()
    assert list(state) == ["embed.weight", "out.weight"]
    assert state["out.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_frozen_weights_stay_and_keep_their_float32_values() -> None:
    net = Net()
    net.conv.requires_grad_(False)
    original = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)  # frozen ones too
    precision = Precision(BFLOAT16, net, optimizer, DEVICE)
    train_step(net, precision, *batch(0))
    state = precision.model_state_dict()
    assert net.conv.weight.dtype is torch.bfloat16
    assert torch.equal(state["conv.weight"], original["conv.weight"])
    assert not torch.equal(state["head.weight"], original["head.weight"])


def test_model_state_dict_is_the_float32_model_s() -> None:
    net, original = Net(), Net()
    precision = convert(net)
    state = precision.model_state_dict()
    assert list(state) == list(original.state_dict())
    original.load_state_dict(state, strict=True)
    for key, value in Net().state_dict().items():
        assert torch.equal(
            original.state_dict()[key], value.bfloat16() if key == "shift" else value
        )
        assert state[key].dtype is value.dtype
    assert net.conv.weight.dtype is torch.bfloat16


def test_load_model_state_dict_fills_model_and_masters() -> None:
    net, other = Net(), Net()
    precision = convert(net)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.001)  # a change that bfloat16 alone would lose
    precision.load_model_state_dict(other.state_dict())
    for key, p in other.named_parameters():
        assert torch.equal(precision.model_state_dict()[key], p)
        assert torch.equal(net.get_parameter(key), p.to(net.get_parameter(key).dtype))

    partial = {"head.bias": torch.ones(4)}
    with pytest.raises(RuntimeError, match="Missing key"):
        precision.load_model_state_dict(partial)
    assert "conv.weight" in precision.load_model_state_dict(partial, strict=False).missing_keys
    assert torch.equal(net.head.bias.float(), torch.ones(4, device=DEVICE))
    assert train_step(net, precision, *batch(0))


def test_refuses_an_optimizer_that_has_stepped() -> None:
    net = Net()
    optimizer = optimizer_over(net, "adamw")
    net(batch(0)[0]).mean().backward()
    optimizer.step()
    with pytest.raises(AssertionError, match="state of earlier steps"):
        Precision(BFLOAT16, net, optimizer, DEVICE)


@dataclasses.dataclass(frozen=True)
class Sample:
    images: Tensor
    boxes: Tensor
    labels: Tensor
    name: str = "a"


Pair = namedtuple("Pair", ["images", "boxes"])


class Echo(nn.Module):
    """Returns its arguments, and notes which formats they had."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = args, kwargs
        return (*args, kwargs)


def test_nested_inputs_and_outputs_are_cast() -> None:
    floats, ints = torch.rand(2, device=DEVICE), torch.arange(2, device=DEVICE)
    echo = Echo()
    convert(echo, float32_inputs={"boxes"})
    sample = Sample(floats, floats, ints)
    given = {"x": [floats, (ints, floats)], "boxes": floats, "n": 3, "none": None}
    out = echo(sample, given, Pair(floats, floats), images=floats, boxes=floats)

    (seen, mapping, pair), kwargs = echo.seen
    assert (seen.images.dtype, seen.boxes.dtype) == (torch.bfloat16, torch.float32)
    assert seen.labels is ints and seen.name == "a"
    assert sample.images.dtype is torch.float32  # the caller's own is left alone
    assert mapping["x"][0].dtype is mapping["x"][1][1].dtype is torch.bfloat16
    assert mapping["x"][1][0] is ints and mapping["boxes"] is floats and mapping["n"] == 3
    assert isinstance(pair, Pair)
    assert (pair.images.dtype, pair.boxes.dtype) == (torch.bfloat16, torch.float32)
    assert (kwargs["images"].dtype, kwargs["boxes"].dtype) == (torch.bfloat16, torch.float32)

    assert out[0].images.dtype is out[1]["x"][0].dtype is out[2].images.dtype is torch.float32
    assert out[3]["images"].dtype is torch.float32


def card(rank: int) -> torch.device:
    """The device of a rank."""
    return device.resolve(DEVICE.type, index=rank)


def train_part(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """Three steps on one rank's share of the batches; weights by opt level, on the CPU."""
    own = card(rank)
    results = {}
    for level in ("O0", "O2"):
        torch.manual_seed(rank)  # rank 0's weights are everybody's
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.LayerNorm(16), nn.Linear(16, 4))
        net.to(own)
        share = 4 // world_size
        config = PrecisionConfig(opt_level=level, dtype="bfloat16", accumulate=share, clip_grad=0.5)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        precision = Precision(config, net, optimizer, own)
        network, exchanges = net, []
        if world_size > 1:
            network = distributed.wrap(net, own)
            network.register_comm_hook(exchanges, exchange)
        for step in range(3):
            for index in range(share):
                exchanges.clear()
                x, y = batch(step * 4 + rank * share + index)
                train_step(network, precision, x.to(own), y.to(own))
                assert bool(exchanges) == (world_size > 1 and precision.at_boundary)
            state = precision.model_state_dict()  # reading weights must not end the exchange
        results[level] = {key: value.cpu().clone() for key, value in state.items()}
    return results


def exchange(log: list[torch.dtype], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own all-reduce, noted in a log."""
    log.append(bucket.buffer().dtype)
    return allreduce_hook(dist.group.WORLD, bucket)


def overflow_on_the_last_rank(rank: int, world_size: int) -> None:
    own = card(rank)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).to(own)
    config = PrecisionConfig(opt_level="O2", dtype="float16", loss_scale="16")
    precision = Precision(config, net, torch.optim.SGD(net.parameters(), lr=0.1), own)
    x, y = (part.to(own) for part in batch(0))
    x = x * float("inf") if rank == world_size - 1 else x
    assert not train_step(distributed.wrap(net, own), precision, x, y)
    assert precision.skipped_steps == 1


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    own = card(rank)
    device.configure(own)
    dist.init_process_group(
        {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[own.type],
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        device_id=None if own.type == "cpu" else own,
    )
    torch.save(train_part(rank, world_size), folder / f"{rank}.pt")
    overflow_on_the_last_rank(rank, world_size)
    dist.destroy_process_group()


@pytest.mark.cards(2)
def test_two_processes_equal_one(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), "2", str(tmp_path)])
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    one = train_part(0, 1)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for level, tolerance in (("O0", 1e-5), ("O2", 1e-2)):
        for key, expected in one[level].items():
            assert torch.equal(first[level][key], second[level][key]), key
            difference = (first[level][key] - expected).norm()
            assert difference <= tolerance * expected.norm(), (level, key)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
