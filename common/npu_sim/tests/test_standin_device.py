"""torch.npu of the stand-in: what torch_npu does, and what it refuses."""

import importlib
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the stand-in: python -m npu_sim pytest", allow_module_level=True)

import torch_npu

pytestmark = pytest.mark.device

NPU = torch.device("npu", 0)
SECOND = pytest.mark.skipif(torch.npu.device_count() < 2, reason="needs two cards")


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    yield
    torch.npu.set_device(0)
    torch.npu.conv.allow_hf32 = True
    torch.npu.matmul.allow_hf32 = False
    torch.npu.set_compile_mode(False)


def test_the_card_says_that_it_is_simulated() -> None:
    assert torch.npu is torch_npu.npu is importlib.import_module("torch_npu.npu")
    assert torch.npu.get_device_name(0) == "Ascend910B2 (simulated)"
    properties = torch.npu.get_device_properties(NPU)
    assert properties.name == torch.npu.get_device_name()
    assert properties.total_memory == torch.npu.mem_get_info()[1]
    assert torch_npu.__version__ == "2.14.0+simulated"
    assert torch.version.cuda is None
    with pytest.raises(AssertionError, match=r"Invalid device id\n\[ERROR\].*ERR00003 PTA"):
        torch.npu.get_device_name(99)


def test_starts_at_its_first_use_only() -> None:
    done = run(
        "import torch, torch_npu\n"
        "torch.manual_seed(7); torch.npu.set_device(0)\n"
        "assert torch.npu.memory_allocated() == 0 and torch.npu.memory_stats() == {}\n"
        "print(torch.npu.is_initialized(), torch.npu.default_generators)\n"
        "torch.ones(2, device='npu')\n"
        "print(torch.npu.is_initialized(), len(torch.npu.default_generators))\n"
        "print(torch.npu.initial_seed())"
    )
    assert done.returncode == 0, done.stderr
    cards = torch.npu.device_count()
    assert done.stdout.splitlines() == ["False ()", f"True {cards}", "7"]


def use_npu(queue: "multiprocessing.SimpleQueue[str]") -> None:
    try:
        torch.ones(2, device="npu")
    except RuntimeError as error:
        queue.put(str(error))
    else:
        queue.put("worked")


def test_a_forked_child_may_not_use_it() -> None:
    torch.ones(2, device="npu")
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks of processes with threads, which this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=use_npu, args=(queue,))
        child.start()
    assert queue.get() == (
        "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you must "
        "use the 'spawn' start method"
    )
    child.join()
    assert torch.npu.is_initialized()


class TouchesNpu(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(1, device="npu")


def test_a_data_loader_worker_may_not_use_it() -> None:
    """The loader starts the NPU before it forks, so this holds for a worker's first use too."""
    loader = torch.utils.data.DataLoader(TouchesNpu(), num_workers=1)
    with pytest.raises(RuntimeError, match="Cannot re-initialize NPU in forked subprocess"):
        next(iter(loader))


def test_no_cards() -> None:
    done = run(
        "import torch, torch_npu\n"
        "print(torch.npu.is_available(), torch.npu.device_count())\n"
        "torch.ones(2, device='npu')",
        NPU_SIM_CARDS="0",
    )
    assert done.stdout == "False 0\n"
    assert "RuntimeError: No NPUs are available" in done.stderr
    assert "ERR00009 PTA resource unavailable" in done.stderr


@SECOND
def test_choosing_a_card() -> None:
    torch.npu.set_device("npu:1")
    assert torch.npu.current_device() == 1
    with torch.npu.device(0):
        assert torch.ones(1, device="npu").device.index == 0
    with torch.npu.device(-1), torch.npu.device(None):
        assert torch.npu.current_device() == 1
    with torch.npu.device_of(torch.ones(1, device=NPU)):
        assert torch.npu.current_device() == 0
    assert torch.npu.can_device_access_peer(0, 1)
    for wrong in ("cpu", "cuda", torch.device("cpu")):
        with pytest.raises(ValueError, match="Expected a npu device, but got: c"):
            torch.npu.set_device(wrong)
    with pytest.raises(RuntimeError, match="there is no card 99"):
        torch.npu.set_device(99)
    assert torch.npu.current_device() == 1


def test_hf32_switches() -> None:
    assert torch.npu.conv.allow_hf32 is True
    assert torch.npu.matmul.allow_hf32 is False
    torch.npu.conv.allow_hf32 = False
    torch.npu.matmul.allow_hf32 = True
    assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (False, True)
    for switches in (torch.npu.conv, torch.npu.matmul):
        with pytest.raises(TypeError, match="allow_hf32 must be a bool, but got int"):
            switches.allow_hf32 = 1
        switches.allow_hf16 = True
        assert switches.allow_hf16 is None
    assert torch.npu.matmul.cube_math_type is None
    torch.npu.matmul.cube_math_type = torch.npu.CubeMathType.USE_HF32
    assert torch.npu.matmul.cube_math_type is torch.npu.CubeMathType.USE_HF32
    with pytest.raises(TypeError, match="one of Enum CubeMathType"):
        torch.npu.matmul.cube_math_type = 3


def test_config_can_be_written_not_read() -> None:
    torch.npu.config.allow_internal_format = False
    torch.npu.config.no_such_switch = 1
    for name in ("allow_internal_format", "no_such_switch"):
        with pytest.raises(AttributeError, match=name):
            getattr(torch.npu.config, name)


def test_options() -> None:
    assert torch.npu.is_jit_compile_false()
    torch.npu.set_compile_mode(jit_compile=True)
    assert not torch.npu.is_jit_compile_false()
    torch.npu.set_option({"jitCompile": "disable", "ACL_OP_DEBUG_LEVEL": 1})
    assert torch.npu.is_jit_compile_false()
    with pytest.raises(TypeError, match=r"npu option must be a dict\."):
        torch.npu.set_option([("jitCompile", "enable")])
    with pytest.raises(ValueError, match="ACL_PRECISION_MODE should be in"):
        torch.npu.set_option({"ACL_PRECISION_MODE": "half"})
    with pytest.raises(TypeError, match="jit"):
        torch.npu.set_compile_mode(jit=False)
    with pytest.raises(RuntimeError, match="invalid value of debug_mode"):
        torch.npu.set_sync_debug_mode("loud")
    with pytest.raises(NotImplementedError, match="set_sync_debug_mode"):
        torch.npu.set_sync_debug_mode("warn")
    assert torch.npu.get_task_queue_enable() in (0, 1, 2)
    with pytest.raises(RuntimeError, match="mode must be 0, 1, or 2, but got 3"):
        torch.npu.set_task_queue_enable(3)


def test_random_numbers() -> None:
    torch.npu.manual_seed(3)
    state = torch.npu.get_rng_state()
    first = torch.rand(5, device=NPU)
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(5, device=NPU), first)
    torch.npu.manual_seed_all(3)
    assert torch.equal(torch.rand(5, device=NPU), first)
    assert torch.npu.initial_seed() == 3
    states = torch.npu.get_rng_state_all()
    assert len(states) == torch.npu.device_count()
    torch.npu.seed_all()
    assert torch.npu.initial_seed() != 3
    torch.npu.set_rng_state_all(states)
    assert torch.equal(torch.npu.get_rng_state(0), states[0])
    with pytest.raises(ValueError, match="cpu doesn't match the current accelerator npu"):
        torch.npu.get_rng_state("cpu")


def test_memory() -> None:
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    tensor = torch.zeros(2**20, device=NPU)
    assert torch.npu.memory_allocated(NPU) - before == 2**22
    del tensor
    assert torch.npu.max_memory_allocated(0) - before >= 2**22
    torch.npu.reset_peak_memory_stats(NPU)
    assert torch.npu.max_memory_allocated() < before + 2**22
    stats = torch.npu.memory_stats()
    assert stats["allocated_bytes.all.current"] == torch.npu.memory_allocated()
    assert list(stats) == sorted(stats)
    assert "Allocated memory" in torch.npu.memory_summary(abbreviated=True)
    free, total = torch.npu.mem_get_info()
    assert 0 < free <= total
    torch.npu.empty_cache()
    with pytest.warns(DeprecationWarning, match="memory_reserved"):
        assert torch.npu.memory_cached() == torch.npu.memory_reserved()


def test_a_part_of_the_memory() -> None:
    with pytest.raises(TypeError, match="must be `float`"):
        torch.npu.set_per_process_memory_fraction(1)
    with pytest.raises(ValueError, match=r"Invalid fraction value: 1\.5"):
        torch.npu.set_per_process_memory_fraction(1.5)
    total = torch.npu.get_device_properties(0).total_memory
    torch.npu.set_per_process_memory_fraction(2**20 / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"NPU out of memory\. Tried to allocate"):
            torch.zeros(2**20, device=NPU)
        assert torch.npu.get_per_process_memory_fraction() == 2**20 / total
    finally:
        torch.npu.set_per_process_memory_fraction(1.0)
    torch.zeros(2**20, device=NPU)


def test_streams_and_events() -> None:
    stream = torch.npu.Stream()
    assert isinstance(stream, torch.Stream) and stream != torch.npu.current_stream()
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        event = stream.record_event()
    assert torch.npu.current_stream() == torch.npu.default_stream()
    torch.npu.current_stream().wait_event(event)
    torch.npu.current_stream().wait_stream(stream)
    stream.synchronize()
    assert stream.query() and event.query()
    with torch.npu.stream(None):
        assert torch.npu.current_stream() == torch.npu.default_stream()
    begin, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="Both events must be recorded"):
        begin.elapsed_time(end)
    begin.record()
    end.record()
    end.synchronize()
    assert begin.elapsed_time(end) >= 0
    with pytest.raises(RuntimeError, match="needs enable_timing=True"):
        event.elapsed_time(end)
    for make, wrong in ((torch.npu.Event, "enable_time"), (torch.npu.Stream, "stream")):
        with pytest.raises(TypeError, match=wrong):
            make(**{wrong: 1})


def test_mixed_precision() -> None:
    assert torch.npu.is_bf16_supported()
    assert torch.npu.get_amp_supported_dtype() == [torch.float16, torch.bfloat16, torch.float32]
    matrix = torch.ones(2, 2, device=NPU)
    with torch.npu.amp.autocast(dtype=torch.bfloat16):
        assert torch.npu.is_autocast_enabled()
        assert (matrix @ matrix).dtype is torch.npu.get_autocast_dtype() is torch.bfloat16
    assert not torch.npu.is_autocast_enabled()
    with pytest.warns(FutureWarning, match=r"torch\.amp\.custom_fwd"):
        torch.npu.amp.custom_fwd(lambda ctx: ctx)


@pytest.mark.parametrize("dynamic", [True, False])
def test_grad_scaler(dynamic: bool, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.nn.Parameter(torch.ones(2, device=NPU))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch_npu.npu.amp.GradScaler(init_scale=8.0, growth_interval=1, dynamic=dynamic)
    scaler.scale(weight.sum()).backward()
    assert weight.grad is not None and weight.grad.tolist() == [8.0, 8.0]
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.0, 0.0]
    assert scaler.get_scale() == (16.0 if dynamic else 8.0)
    optimizer.zero_grad()
    scaler.scale(weight.sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert ("Gradient overflow. Skipping step" in capsys.readouterr().out) is dynamic
    assert bool(weight.isfinite().all()) is dynamic
    assert scaler.state_dict()["dynamic"] is dynamic
    other = torch_npu.npu.amp.GradScaler()
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()


def test_grad_scaler_refuses() -> None:
    with pytest.raises(ValueError, match="The growth factor must be > 1"):
        torch_npu.npu.amp.GradScaler(growth_factor=1.0)
    with pytest.raises(ValueError, match="Device type of outputs should be npu"):
        torch_npu.npu.amp.GradScaler().scale(torch.ones(1))


def test_tensor_and_storage_types() -> None:
    assert isinstance(torch.ones(1, device=NPU), torch.npu.FloatTensor)
    assert not isinstance(torch.ones(1), torch.npu.FloatTensor)
    assert not isinstance(torch.ones(1, device=NPU), torch.npu.HalfTensor)
    assert torch.npu.IntTensor([1, 2]).dtype is torch.int32
    assert torch.npu.IntTensor(3).device.type == "npu"
    assert torch.npu.HalfStorage in torch._storage_classes


def test_process_group_options() -> None:
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = {"hccl_buffer_size": 200, "group_name": "data"}
    options.is_high_priority_stream = True
    with pytest.raises(TypeError, match="whole numbers or text"):
        options.hccl_config = {"hccl_buffer_size": 1.5}
    with pytest.raises(AttributeError, match="buffer_size"):
        options.buffer_size = 200
    with pytest.raises(NotImplementedError, match="ProcessGroupHCCL"):
        torch_npu._C._distributed_c10d.ProcessGroupHCCL()
    torch.distributed.init_process_group(
        "hccl", store=torch.distributed.HashStore(), rank=0, world_size=1, pg_options=options
    )
    try:
        values = torch.ones(3, device=NPU)
        torch.distributed.all_reduce(values)
        assert values.tolist() == [1.0, 1.0, 1.0]
    finally:
        torch.distributed.destroy_process_group()


def test_overflow_flags_are_of_older_chips() -> None:
    with pytest.raises(RuntimeError, match="please use npu_check_overflow"):
        torch.npu.get_npu_overflow_flag()
    with pytest.warns(UserWarning, match="is useless"):
        torch.npu.clear_npu_overflow_flag()
    with pytest.warns(UserWarning, match="TORCH_NPU_DEVICE_CAPABILITY"):
        assert torch.npu.get_device_capability() is None


def test_attention_takes_bool_masks_only() -> None:
    query = torch.randn(1, 2, 4, 8, device=NPU)
    attention = torch.nn.functional.scaled_dot_product_attention
    mask = torch.ones(4, 4, device=NPU, dtype=torch.bool).tril()
    masked = attention(query, query, query, attn_mask=mask)
    torch.testing.assert_close(masked, attention(query, query, query, is_causal=True))
    with pytest.raises(RuntimeError, match="takes a bool attn_mask, but got"):
        attention(query, query, query, attn_mask=mask.float())
