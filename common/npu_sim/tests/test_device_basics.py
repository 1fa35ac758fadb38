"""The simulated device: its cards, numbers as on the CPU, what it refuses, autocast."""

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import npu_sim

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the simulated NPU: python -m npu_sim pytest", allow_module_level=True)

pytestmark = pytest.mark.device

npu_sim.install()
DATA = Path(npu_sim.__file__).parent / "data" / "torch_npu_2.14_native_ops.json"


def run(program: str, **variables: str) -> str:
    """What a Python program writes that has installed the device."""
    code = f"import torch, npu_sim\nnpu_sim.install()\n{program}"
    environment = {**npu_sim.environment(), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.stderr == "", done.stderr
    return done.stdout


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 4),
    )


def test_a_training_step_has_the_numbers_of_the_cpu() -> None:
    on_cpu = small_network()
    on_npu = copy.deepcopy(on_cpu).to("npu")
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
    loss = F.cross_entropy(on_cpu(images), labels)
    loss.backward()
    other = F.cross_entropy(on_npu(images.to("npu")), labels.to("npu"))
    other.backward()
    assert other.device == torch.device("npu:0")
    assert torch.equal(loss, other.cpu())
    for one, two in zip(on_cpu.parameters(), on_npu.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(two.grad.cpu(), one.grad)


def test_views_are_views_and_in_place_is_in_place() -> None:
    x = torch.arange(12.0, device="npu").reshape(3, 4)
    x.view(2, 6)[0].add_(100)
    x.t()[3].mul_(-1)
    assert x.tolist() == [[100, 101, 102, -103], [104, 105, 6, -7], [8, 9, 10, -11]]
    first, second = x.split(2)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    x.unsqueeze_(0)
    assert x.shape == (1, 3, 4)


def test_out_and_resize_change_the_tensor_itself() -> None:
    out = torch.empty(0, device="npu")
    torch.add(torch.ones(5, device="npu"), 1, out=out)
    assert out.tolist() == [2.0] * 5
    out.resize_(2, 3)
    assert out.shape == (2, 3)
    assert out.flatten()[:5].tolist() == [2.0] * 5


def test_inference_mode_takes_views_of_usual_tensors() -> None:
    x = torch.ones(2, 3, device="npu")
    with torch.inference_mode():
        assert (x @ x.mT).tolist() == [[3, 3], [3, 3]]


def test_channels_last_stays() -> None:
    convolution = nn.Conv2d(3, 4, 3).to("npu", memory_format=torch.channels_last)
    images = torch.randn(1, 3, 8, 8, device="npu").to(memory_format=torch.channels_last)
    assert convolution(images).is_contiguous(memory_format=torch.channels_last)


MIXED: dict[str, Callable[[], object]] = {
    "two devices": lambda: torch.ones(2, device="npu") + torch.ones(2),
    "a layer and its input": lambda: F.linear(torch.ones(2, 2), torch.ones(2, 2, device="npu")),
    "two cards": lambda: torch.ones(2, device="npu:0") + torch.ones(2, device="npu:1"),
    "a list": lambda: torch.cat([torch.ones(2), torch.ones(2, device="npu")]),
    "into the host": lambda: torch.ones(2).add_(torch.ones(2, device="npu")),
    "indices on the host": lambda: torch.ones(4, device="npu").index_select(0, torch.tensor([1])),
    "labels on the host": lambda: F.cross_entropy(
        torch.ones(4, 2, device="npu"), torch.zeros(4, dtype=torch.int64)
    ),
    "a generator of the CPU": lambda: torch.randn(2, generator=torch.Generator(), device="npu"),
    "numpy": lambda: torch.ones(2, device="npu").numpy(),
}


@pytest.mark.parametrize("what", MIXED)
def test_devices_do_not_mix(what: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"npu"):
        MIXED[what]()


def test_a_number_on_the_host_mixes() -> None:
    assert (torch.ones(2, device="npu") * torch.tensor(3.0)).tolist() == [3.0, 3.0]


def test_a_card_that_is_not_there() -> None:
    card = torch.accelerator.device_count()
    for use in (
        lambda: torch.ones(1, device=f"npu:{card}"),
        lambda: torch.accelerator.set_device_index(card),
        lambda: torch.Generator(f"npu:{card}"),
    ):
        with pytest.raises(RuntimeError, match=rf"npu:{card} is not there, this machine has \d"):
            use()


def test_no_card_at_all() -> None:
    program = """
print(torch.npu.is_available(), torch.npu.device_count())
print(torch.accelerator.current_accelerator(check_available=True))
for use in (lambda: torch.ones(1, device="npu"), lambda: torch.accelerator.set_device_index(0),
            lambda: torch.empty(3, device="npu:0"), lambda: torch.ones(1).to("npu")):
    try:
        use()
    except RuntimeError as error:
        print(str(error).startswith("No NPUs are available"))
"""
    assert run(program, NPU_SIM_CARDS="0").split() == ["False", "0", "None", *["True"] * 4]


def test_visible_cards() -> None:
    program = "print(torch.npu.device_count())"
    assert run(program, NPU_SIM_CARDS="8", ASCEND_RT_VISIBLE_DEVICES="1,3,2") == "2\n"


def test_a_number_of_cards_that_is_none() -> None:
    program = "import npu_sim\ntry:\n    npu_sim.install()\nexcept ValueError as e:\n    print(e)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "NPU_SIM_CARDS": "two"},
        check=True,
    )
    assert done.stdout == "NPU_SIM_CARDS=two is no whole number from 0 to 16: correct it.\n"


FORK = """
import multiprocessing, sys
from torch.utils.data import DataLoader, TensorDataset

torch.ones(2, device="npu").add_(1)
on_npu = torch.zeros(4, device="npu")

class Data(torch.utils.data.Dataset):
    def __init__(self, touch): self.touch = touch
    def __len__(self): return 4
    def __getitem__(self, index):
        return torch.rand(2).to("npu") + on_npu[0] if self.touch else torch.rand(2)

def load(touch):
    return len(list(DataLoader(Data(touch), batch_size=2, num_workers=2,
                               multiprocessing_context="fork", pin_memory=True)))

print(load(False))
try:
    load(True)
except RuntimeError as error:
    print("Cannot re-initialize NPU in forked subprocess" in str(error))
"""


def test_forked_workers_may_load_data_but_not_use_the_device() -> None:
    assert run(FORK).split() == ["2", "True"]


def test_a_program_may_end_right_after_a_backward_pass() -> None:
    """Autograd's thread may still hold what is Python's then; it aborted one program in two."""
    program = "torch.ones(3, device='npu', requires_grad=True).exp().sum().backward()"
    assert [run(program) for _ in range(3)] == [""] * 3


def test_save_and_load() -> None:
    layer = nn.Linear(3, 3).to("npu")
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3, device="npu")).sum().backward()
    optimizer.step()
    for place, device in (("npu:1", "npu:1"), ("cpu", "cpu"), (None, "npu:0")):
        file = io.BytesIO()
        torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        state = torch.load(file, map_location=place, weights_only=True)
        assert state["model"]["weight"].device == torch.device(device)
        assert state["optimizer"]["state"][0]["exp_avg"].device == torch.device(device)
    layer.load_state_dict(state["model"])


def test_pinned_memory() -> None:
    tensor = torch.arange(4).pin_memory()
    assert tensor.is_pinned() and tensor[2:].is_pinned()
    assert not torch.ones(3).is_pinned()
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert tensor.to("npu", non_blocking=True).tolist() == [0, 1, 2, 3]


def test_events_and_streams() -> None:
    start = torch.Event("npu", enable_timing=True)
    end = torch.Event("npu", enable_timing=True)
    stream = torch.Stream("npu:1")
    start.record()
    with stream:
        assert torch.accelerator.current_stream() == stream
        assert torch.accelerator.current_device_index() == 1
        torch.ones(2, device="npu") + 1
        stream.wait_event(start)
        end.record(stream)
    end.synchronize()
    assert end.query() and stream.query()
    assert 0 < start.elapsed_time(end) < 1000
    assert torch.accelerator.current_device_index() == 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("way", ["foreach", "fused", "neither"])
def test_optimizers(optimizer: type[torch.optim.Optimizer], way: str) -> None:
    def step(device: str) -> Tensor:
        weight = nn.Parameter(torch.arange(4.0, device=device))
        # The CPU's own default is neither, so that fused kernels are held against plain ones.
        chosen = {way: True} if device == "npu" and way != "neither" else {"foreach": False}
        taken = optimizer([weight], lr=0.1, **chosen)  # type: ignore[call-arg]
        for _ in range(3):
            taken.zero_grad()
            (weight**2).sum().backward()
            taken.step()
        return weight.detach().cpu()

    torch.testing.assert_close(step("npu"), step("cpu"))


def test_fused_optimizers_refuse_a_scaler() -> None:
    weight = nn.Parameter(torch.ones(4, device="npu"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    scaler = torch.amp.GradScaler("npu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(RuntimeError, match=r"_fused_adamw_ on the NPU takes no (grad_scale|found)"):
        scaler.step(optimizer)


def test_attention_takes_bool_masks_only() -> None:
    query = torch.randn(1, 2, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    x = query.to("npu")
    result = F.scaled_dot_product_attention(x, x, x, attn_mask=mask.to("npu"))
    expected = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(result.cpu(), expected)
    with pytest.raises(RuntimeError, match="takes a bool attn_mask, but got float"):
        F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(5, 5, device="npu"))


def test_an_operator_without_any_kernel() -> None:
    with pytest.raises(NotImplementedError, match="cannot run the operator 'aten::_thnn_fused"):
        nn.LSTM(3, 3).to("npu")(torch.ones(2, 1, 3, device="npu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4).to("npu")
    with torch.autocast("npu", dtype=dtype):
        result = layer(torch.randn(2, 4, device="npu"))
        assert result.dtype == dtype
        assert torch.softmax(result, -1).dtype == torch.float32
        assert F.mse_loss(result, result).dtype == torch.float32
        # torch's table for other devices has these, torch_npu's has not.
        assert torch.vdot(result[0], result[0]).dtype == dtype
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(result.sigmoid(), result.sigmoid())
    result.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_autocast_has_the_operators_of_torch_npu() -> None:
    recorded = set(json.loads(DATA.read_text(encoding="utf-8"))["AC"])
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastPrivateUse1")
    assert {name for name in registered if name.startswith("aten::")} == recorded


def test_grad_scaler_skips_an_overflow() -> None:
    weight = nn.Parameter(torch.ones(3, device="npu"))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler("npu", init_scale=1024)
    for factor, expected, scale in ((1.0, 0.5, 1024), (float("inf"), 0.5, 512)):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [expected] * 3
        assert scaler.get_scale() == scale
