"""Memory of the simulated cards: what is counted, where it ends, poison."""

import os
from collections.abc import Iterator

import pytest
import torch

import npu_sim

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the simulated NPU: python -m npu_sim pytest", allow_module_level=True)

pytestmark = pytest.mark.device

npu_sim.install()
MB = 2**20
used = torch.accelerator.memory_allocated


@pytest.fixture(autouse=True)
def usual_memory() -> Iterator[None]:
    yield
    npu_sim.set_memory_limit(0, None)
    npu_sim.set_poison(None)


def test_memory_is_counted_and_given_back() -> None:
    before = used()
    torch.accelerator.reset_peak_memory_stats()
    tensor = torch.empty(MB, device="npu")
    assert used() == before + 4 * MB
    view = tensor[1:]
    del tensor
    assert used() == before + 4 * MB
    del view
    assert used() == before
    assert torch.accelerator.max_memory_allocated() == before + 4 * MB


def test_results_of_kernels_are_counted() -> None:
    tensor = torch.ones(MB, device="npu")
    before = used()
    total = tensor + 1
    assert used() == before + 4 * MB
    numbers = torch.nonzero(tensor)
    assert used() == before + 12 * MB
    del total, numbers
    assert used() == before
    out = torch.empty(0, device="npu")
    torch.add(tensor, 1, out=out)
    assert used() == before + 4 * MB
    del out
    assert used() == before


def test_each_card_has_its_own() -> None:
    before = used(0), used(1)
    tensor = torch.empty(MB, device="npu:1")
    assert (used(0), used(1)) == (before[0], before[1] + 4 * MB)
    del tensor


def test_small_blocks_are_rounded_as_on_an_npu() -> None:
    before = used()
    tensor = torch.empty(3, device="npu")
    assert used() == before + 512
    statistics = torch.accelerator.memory_stats()
    assert statistics["requested_bytes.all.current"] <= statistics["allocated_bytes.all.current"]
    del tensor


def test_beyond_the_limit() -> None:
    npu_sim.set_memory_limit(0, used() + 2 * MB)
    tensor = torch.empty(MB // 4, device="npu")
    expected = (
        r"NPU out of memory\. Tried to allocate 4\.00 MiB \(NPU 0; .* total capacity; .* already "
        r"allocated; .* current active; 1024\.00 KiB free; .* reserved in total by PyTorch\)"
    )
    with pytest.raises(torch.OutOfMemoryError, match=expected):
        torch.empty(MB, device="npu")
    with pytest.raises(torch.OutOfMemoryError):  # a kernel's result counts too
        tensor.repeat(4)
    torch.empty(MB, device="npu:1")
    del tensor
    npu_sim.set_memory_limit(0, None)
    torch.empty(MB, device="npu")


def test_free_and_total() -> None:
    npu_sim.set_memory_limit(0, 2**30)
    assert torch.accelerator.get_memory_info(0) == (2**30 - used(0), 2**30)


def test_poison_shows_reads_of_fresh_memory() -> None:
    npu_sim.set_poison(255)
    assert torch.empty(3, device="npu").isnan().all()
    assert torch.empty_like(torch.ones(2, device="npu")).isnan().all()
    assert torch.zeros(3, device="npu").tolist() == [0, 0, 0]
