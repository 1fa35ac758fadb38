"""The package itself: its import, its switches, its optimizers, its attention, its memory."""

import json

import pytest
from machine import ROOT, Machine, program

RECORDED = ROOT / "common/npu_sim/npu_sim/data/torch_npu_2.14_native_ops.json"


def test_import(machine: Machine) -> None:
    code = """
    import json, zoo_common, torch, torch_npu
    print(json.dumps([torch_npu.__version__, torch.npu.is_available(), torch.npu.device_count(),
                      torch.npu.get_device_name(1), torch.accelerator.current_accelerator().type]))
    """
    version, available, cards, name, kind = machine.python(program(code)).result()
    assert (version, available, cards, kind) == ("2.14.0", True, 2, "npu")
    assert name == "Ascend910B2"


def test_torch_loads_it_by_itself(machine: Machine) -> None:
    """Importing torch imports torch_npu where TORCH_DEVICE_BACKEND_AUTOLOAD does not forbid it."""
    code = "import torch; print(torch.ones(2, device='npu').sum().item())"
    done = machine.python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="")
    assert done.result() == 2.0


def test_message_without_set_env(machine: Machine) -> None:
    """Without set_env.sh the libraries are not found; zoo_common says what to do."""
    code = """
    import torch
    torch.version.cuda = None
    from zoo_common import device
    device.resolve("npu")
    """
    done = machine.run(["python3", "-c", program(code)])
    assert done.code != 0
    assert "UserError: Device npu cannot be used" in done.text
    assert "was not sourced; run: source test/env_npu.sh" in done.text


def test_message_where_a_part_of_cann_is_missing(machine: Machine) -> None:
    code = "from zoo_common import device; device.resolve('npu')"
    done = machine.python("import os; os.environ['ASCEND_OPP_PATH'] = '/nowhere'\n" + code)
    assert done.code != 0
    assert "UserError: Device npu cannot be used" in done.text
    assert "ASCEND_OPP_PATH" in done.text.strip().splitlines()[-1]


def test_message_without_cards(machine: Machine) -> None:
    code = "from zoo_common import device; device.resolve('npu')"
    done = machine.python(code, NPU_SIM_CARDS="0")
    assert done.code != 0
    assert "the driver shows no card; check npu-smi info" in done.text
    hidden = machine.python(code, ASCEND_RT_VISIBLE_DEVICES="1,0")
    assert hidden.code == 0, hidden.text
    one = machine.python(
        code.replace("'npu'", "'npu', 1"), ASCEND_RT_VISIBLE_DEVICES="1,0"
    )  # a list that does not ascend ends early
    assert "Device npu:1 is not there: this machine shows 1" in one.text


def test_native_operators_are_those_recorded(machine: Machine) -> None:
    """The data that tools/npu_ops.py judges by are what this torch_npu registers."""
    code = """
    import json, sys, npu_sim_cann
    npu_sim_cann.install = lambda: None
    import torch, torch_npu
    of = torch._C._dispatch_get_registrations_for_dispatch_key
    print(json.dumps(sorted(name for name in of("PrivateUse1"))))
    """
    native = set(machine.python(program(code)).result())
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert {name for name in native if name.startswith("aten::")} == {
        name for name in recorded["P"] if name.startswith("aten::")
    }


def test_an_operator_without_kernel_is_told(machine: Machine) -> None:
    """What torch_npu has no kernel for goes to the CPU with a warning, or is an error if asked."""
    code = """
    import torch, torch_npu, torchvision
    boxes, scores = torch.rand(4, 4, device="npu"), torch.rand(4, device="npu")
    print(len(torchvision.ops.nms(boxes, scores, 0.5)) > 0)
    """
    assert machine.python(program(code)).code != 0
    allowed = machine.python(program(code), TORCH_NPU_FALLBACK_CPU_DISABLE="")
    assert allowed.code == 0, allowed.text
    assert "CAUTION: The operator 'torchvision::nms' is not currently supported" in allowed.text


@pytest.mark.parametrize(("float32", "on"), [("auto", "auto"), ("fp32", "off"), ("hf32", "on")])
def test_configure(machine: Machine, float32: str, on: str) -> None:
    """zoo_common's switches reach torch_npu's own."""
    code = """
    import json, sys, torch
    from zoo_common import device as devices
    float32, on = sys.argv[1:]
    device = devices.resolve("npu", 1)
    applied = devices.configure(device, float32=float32, deterministic=on == "on",
                                jit_compile=on, internal_format=on)
    text = devices.describe(device)
    (torch.ones(4, 4, device=device) @ torch.ones(4, 4, device=device)).sum().item()
    print(json.dumps([text, len(applied), torch.npu.current_device(),
                      torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32,
                      torch.npu.is_jit_compile_false(),
                      torch.are_deterministic_algorithms_enabled()]))
    """
    text, applied, card, conv, matmul, binary, same = machine.python(
        program(code), float32, on
    ).result()
    assert text == "npu:1 Ascend910B2, 64 GB"
    assert applied >= 2
    assert card == 1
    assert (conv, matmul) == {
        "auto": (True, False),
        "fp32": (False, False),
        "hf32": (True, True),
    }[float32]
    assert binary is (on != "on")
    assert same is (on == "on")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_optimizer(machine: Machine, name: str) -> None:
    """torch_npu's fused optimizers step as torch's do."""
    code = """
    import json, sys, torch, torch_npu
    name = sys.argv[1]
    options = {"lr": 0.1, "weight_decay": 0.01}
    options |= {"momentum": 0.9} if name == "SGD" else {}
    worst = 0.0
    torch.manual_seed(0)
    reference = torch.nn.Linear(8, 8)
    fused = torch.nn.Linear(8, 8).npu()
    fused.load_state_dict(reference.state_dict())
    torch_optimizer = getattr(torch.optim, name)(reference.parameters(), **options)
    npu_optimizer = getattr(torch_npu.optim, "NpuFused" + name)(fused.parameters(), **options)
    for _ in range(5):
        x = torch.randn(4, 8)
        for network, optimizer in ((reference, torch_optimizer), (fused, npu_optimizer)):
            optimizer.zero_grad()
            network(x.to(network.weight.device)).square().sum().backward()
            optimizer.step()
    for wanted, got in zip(reference.parameters(), fused.parameters()):
        worst = max(worst, (wanted - got.cpu()).abs().max().item())
    print(json.dumps(worst))
    """
    assert machine.python(program(code), name).result() < 1e-5


def test_attention(machine: Machine) -> None:
    """The real scaled_dot_product_attention: equal to the CPU's, with each kind of mask."""
    code = """
    import json, torch, torch_npu
    attention = torch.nn.functional.scaled_dot_product_attention
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 16, 8) for _ in range(3)]
    hidden = torch.rand(2, 1, 16, 16) > 0.3
    worst = 0.0
    for options in ({}, {"attn_mask": hidden}, {"is_causal": True},
                    {"attn_mask": torch.zeros(16, 16).masked_fill(~hidden[0, 0], -1e9)}):
        results = []
        for device in ("cpu", "npu"):
            moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value
                     for name, value in options.items()}
            inputs = [x.to(device, copy=True).requires_grad_() for x in given]
            out = attention(*inputs, **moved)
            out.square().sum().backward()
            results.append([out, *(x.grad for x in inputs)])
        for wanted, got in zip(*results):
            worst = max(worst, (wanted - got.cpu()).abs().max().item())
    refused = []
    q = given[0].npu()
    for options in ({"attn_mask": torch.ones(16, 16, dtype=torch.int32, device="npu")},
                    {"attn_mask": hidden.npu(), "is_causal": True}):
        try:
            attention(q, q, q, **options)
        except RuntimeError as error:
            refused.append(str(error).splitlines()[0])
    print(json.dumps([worst, refused]))
    """
    worst, refused = machine.python(program(code)).result()
    assert worst < 1e-4
    assert len(refused) == 2
    assert "attn_mask" in refused[0]


def test_out_of_memory(machine: Machine) -> None:
    code = """
    import json, torch, torch_npu
    kept = torch.empty(2 ** 26, device="npu")
    try:
        torch.empty(2 ** 28, device="npu")
    except torch.OutOfMemoryError as error:
        print(json.dumps([str(error).splitlines()[0], torch.npu.max_memory_allocated() >> 20]))
    """
    for segments in ("True", "False"):
        message, peak = machine.python(
            program(code),
            NPU_SIM_MEMORY=str(2**30),
            PYTORCH_NPU_ALLOC_CONF=f"expandable_segments:{segments}",
        ).result()
        assert message.startswith("NPU out of memory. Tried to allocate 1.00 GiB")
        assert peak == 256
