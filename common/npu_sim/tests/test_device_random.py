"""Random numbers of the simulated cards."""

import os

import pytest
import torch
import torch.nn.functional as F

import npu_sim

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the simulated NPU: python -m npu_sim pytest", allow_module_level=True)

pytestmark = pytest.mark.device

npu_sim.install()


def draw(generator: torch.Generator | None = None) -> list[float]:
    numbers: list[float] = torch.rand(3, device="npu", generator=generator).tolist()
    return numbers


def test_a_seed_repeats() -> None:
    torch.manual_seed(5)
    first = draw()
    assert draw() != first
    torch.manual_seed(5)
    assert draw() == first


def test_each_card_draws_its_own() -> None:
    torch.manual_seed(5)
    first = draw()
    torch.manual_seed(5)
    torch.rand(3, device="npu:1")
    assert draw() == first


def test_the_generator_of_the_cpu_is_left_alone() -> None:
    state = torch.get_rng_state()
    draw()
    F.dropout(torch.ones(100, device="npu"), 0.5)
    torch.randperm(5, device="npu")
    torch.empty(4, device="npu").normal_()
    torch.bernoulli(torch.full((4,), 0.5, device="npu"))
    torch.multinomial(torch.ones(4, device="npu"), 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_draws_from_the_card() -> None:
    tensor = torch.ones(1000, device="npu")
    torch.manual_seed(1)
    first = F.dropout(tensor, 0.5)
    second = F.dropout(tensor, 0.5)
    torch.manual_seed(1)
    assert torch.equal(F.dropout(tensor, 0.5), first)
    assert not torch.equal(first, second)


def test_generators() -> None:
    generator = torch.Generator("npu")
    generator.manual_seed(3)
    assert generator.device == torch.device("npu:0")
    first = draw(generator)
    state = generator.get_state()
    second = draw(generator)
    generator.set_state(state)
    assert draw(generator) == second
    assert draw(generator.manual_seed(3)) == first


def test_fork_rng() -> None:
    torch.manual_seed(7)
    with torch.random.fork_rng(devices=[0], device_type="npu"):
        first = draw()
    assert draw() == first
