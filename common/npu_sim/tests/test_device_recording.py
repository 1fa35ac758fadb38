"""What npu_sim.record() and set_native_operators() say of a program."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

import npu_sim
from npu_sim import native

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the simulated NPU: python -m npu_sim pytest", allow_module_level=True)

pytestmark = pytest.mark.device

npu_sim.install()
TORCH_NPU = native.native_operators("2.14")


@pytest.fixture(autouse=True)
def as_torch_npu() -> Iterator[None]:
    npu_sim.set_native_operators(TORCH_NPU)
    yield
    npu_sim.set_native_operators(TORCH_NPU)


def names(recording: npu_sim.Recording) -> list[str]:
    return [operator.name for operator in recording.operators]


def test_operators_with_shapes_and_dtypes() -> None:
    one = torch.ones(2, 3, device="npu")
    two = torch.ones(3, device="npu", dtype=torch.bfloat16)
    with npu_sim.record() as recording:
        one + two
    one + two
    assert recording.operators == [
        npu_sim.Operator(
            name="aten::add.Tensor",
            inputs=(("float32", (2, 3)), ("bfloat16", (3,))),
            outputs=(("float32", (2, 3)),),
            parent=None,
            way="native",
            stack=(),
        )
    ]
    assert recording.copies == recording.syncs == []


def test_lists_are_taken_apart() -> None:
    tensors = [torch.ones(size, device="npu") for size in (1, 2)]
    with npu_sim.record() as recording:
        torch.cat(tensors)
        torch._foreach_add_(tensors, 1)
    assert names(recording) == ["aten::cat", "aten::_foreach_add_.Scalar"]
    assert recording.operators[0].inputs == (("float32", (1,)), ("float32", (2,)))


def test_operators_are_those_of_torch_npu() -> None:
    """Neither what the CPU makes of them, nor torch's decompositions."""
    x = torch.randn(1, 3, 4, 4, device="npu")
    weight = torch.randn(4, 3, 3, 3, device="npu")
    with npu_sim.record() as recording:
        y = F.conv2d(x, weight).view(4, 4)
        torch.matmul(y, y)
        F.gelu(y).softmax(-1)
    assert names(recording) == [
        "aten::convolution",
        "aten::view",
        "aten::matmul",
        "aten::gelu",
        "aten::softmax.int",
    ]
    assert {operator.way for operator in recording.operators} == {"native"}


def test_torch_takes_views_apart() -> None:
    x = torch.ones(2, 3, device="npu")
    with npu_sim.record() as recording:
        x.transpose(0, 1)
    assert [(o.name, o.way, o.parent) for o in recording.operators] == [
        ("aten::transpose.int", "decomposed", None),
        ("aten::as_strided", "native", "aten::transpose.int"),
    ]


def test_backward_passes_are_seen() -> None:
    weight = torch.ones(3, device="npu", requires_grad=True)
    with npu_sim.record() as recording:
        (weight * weight).sum().backward()
    assert names(recording).count("aten::mul.Tensor") == 3


def test_other_threads_are_seen() -> None:
    tensor = torch.ones(3, device="npu")
    with npu_sim.record() as recording:
        threads = [threading.Thread(target=tensor.abs) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert names(recording) == ["aten::abs"] * 4


def test_recordings_may_be_nested_and_read_early() -> None:
    tensor = torch.ones(3, device="npu")
    with npu_sim.record() as outer:
        tensor.abs()
        with npu_sim.record() as inner:
            tensor.neg()
            assert names(inner) == ["aten::neg"]
        tensor.exp()
    assert names(inner) == ["aten::neg"]
    assert names(outer) == ["aten::abs", "aten::neg", "aten::exp"]


def test_a_failed_call_does_not_hide_the_next() -> None:
    tensor, longer = torch.ones(3, device="npu"), torch.ones(4, device="npu")
    with npu_sim.record() as recording:
        with pytest.raises(RuntimeError):
            tensor + longer
        tensor.abs()
    assert names(recording) == ["aten::add.Tensor", "aten::abs"]
    assert recording.operators[0].outputs == ()


# ---- Copies and syncs


def test_copies() -> None:
    host = torch.ones(2, 3)
    pinned = torch.ones(4, dtype=torch.int64).pin_memory()
    with npu_sim.record() as recording:
        on_card = host.to("npu")
        pinned.to("npu", non_blocking=True)
        on_card.cpu()
        on_card.clone()
    assert [copy[:4] for copy in recording.copies] == [
        ("host_to_device", "float32", (2, 3), False),
        ("host_to_device", "int64", (4,), True),
        ("device_to_host", "float32", (2, 3), False),
        ("device_to_device", "float32", (2, 3), False),
    ]
    assert [(sync.kind, sync.operator) for sync in recording.syncs] == [
        ("copy", "aten::_to_copy"),
        ("copy", "aten::_to_copy"),
    ]


def test_an_unpinned_copy_waits_whatever_it_asks() -> None:
    with npu_sim.record() as recording:
        torch.ones(2).to("npu", non_blocking=True)
    assert [sync.kind for sync in recording.syncs] == ["copy"]


WAITS: dict[str, tuple[str, str, Callable[[torch.Tensor], object]]] = {
    "item": ("item", "aten::_local_scalar_dense", lambda x: x.sum().item()),
    "if": ("item", "aten::_local_scalar_dense", lambda x: bool((x > 0).all())),
    "equal": ("item", "aten::equal", lambda x: torch.equal(x, x)),
    "nonzero": ("data_dependent", "aten::nonzero", lambda x: x.nonzero()),
    "mask": ("data_dependent", "aten::index.Tensor", lambda x: x[x > 0]),
    "assign by mask": ("data_dependent", "aten::index_put_", lambda x: put(x)),
    "unique": ("data_dependent", "aten::_unique2", lambda x: x.unique()),
    "one_hot": ("data_dependent", "aten::one_hot", lambda x: F.one_hot(x.long())),
    "synchronize": ("synchronize", "", lambda x: torch.accelerator.synchronize()),
    "stream": ("stream", "", lambda x: torch.accelerator.current_stream().synchronize()),
    "event": ("event", "", lambda x: event().synchronize()),
}


def put(x: torch.Tensor) -> None:
    x[x > 1] = torch.zeros(1, device="npu")


def event() -> torch.Event:
    recorded = torch.Event("npu")
    recorded.record()
    return recorded


@pytest.mark.parametrize("what", WAITS)
def test_waits(what: str) -> None:
    kind, operator, wait = WAITS[what]
    x = torch.arange(4.0, device="npu")
    with npu_sim.record() as recording:
        wait(x)
    assert [(sync.kind, sync.operator) for sync in recording.syncs] == [(kind, operator)]


def test_what_does_not_wait() -> None:
    x = torch.arange(4, device="npu")
    with npu_sim.record() as recording:
        x[x.flip(0)]
        F.one_hot(x, 4)
        x.repeat_interleave(x, output_size=6)
        torch.where(x > 2, x, 0)
        event().record()
    assert recording.syncs == []


def test_stacks_name_the_line() -> None:
    x = torch.ones(2, device="npu")
    with npu_sim.record(stacks=True) as recording:
        x.sum().item()
        x.cpu()
    function = "test_stacks_name_the_line"
    for noted in (recording.syncs[0], recording.copies[0], recording.operators[0]):
        assert (noted.stack[0].file, noted.stack[0].function) == (__file__, function)
    assert recording.copies[0].stack[0].line == recording.syncs[0].stack[0].line + 1


def test_stacks_of_a_backward_pass() -> None:
    x = torch.ones(2, device="npu", requires_grad=True)
    with torch.autograd.set_multithreading_enabled(False), npu_sim.record(stacks=True) as recording:
        x.exp().sum().backward()
    function = "test_stacks_of_a_backward_pass"
    assert any(frame.function == function for frame in recording.operators[-1].stack)


# ---- Native operators


def test_an_operator_without_a_kernel_is_taken_apart() -> None:
    npu_sim.set_native_operators(TORCH_NPU - {"aten::native_layer_norm"})
    x = torch.randn(2, 4, device="npu")
    with npu_sim.record() as recording:
        result = F.layer_norm(x, (4,))
    first, *parts = recording.operators
    assert (first.name, first.way, first.parent) == ("aten::native_layer_norm", "decomposed", None)
    assert first.outputs[0] == ("float32", (2, 4))
    assert len(parts) > 3
    assert {part.parent for part in parts if part.parent} >= {"aten::native_layer_norm"}
    assert result.shape == (2, 4)


def test_whole_composites_are_taken_apart_too() -> None:
    npu_sim.set_native_operators(TORCH_NPU - {"aten::matmul"})
    x = torch.ones(2, 2, device="npu", requires_grad=True)
    with npu_sim.record() as recording:
        (x @ x).sum().backward()
    assert [(o.name, o.way, o.parent) for o in recording.operators[:2]] == [
        ("aten::matmul", "decomposed", None),
        ("aten::mm", "native", "aten::matmul"),
    ]
    assert x.grad is not None and x.grad.tolist() == [[4, 4], [4, 4]]


def test_an_operator_with_neither_falls_back_and_warns_once() -> None:
    npu_sim.set_native_operators(TORCH_NPU - {"aten::grid_sampler_2d"})
    image = torch.ones(1, 1, 4, 4, device="npu")
    grid = torch.zeros(1, 2, 2, 2, device="npu")
    expected = (
        "CAUTION: The operator 'aten::grid_sampler_2d' is not currently supported on the NPU "
        "backend and will fall back to run on the CPU."
    )
    with npu_sim.record() as recording:
        with pytest.warns(UserWarning, match=expected):
            F.grid_sample(image, grid, align_corners=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            F.grid_sample(image, grid, align_corners=False)
    assert [o.way for o in recording.operators] == ["cpu_fallback"] * 2
    kinds = [copy.kind for copy in recording.copies]
    assert kinds == ["device_to_host", "device_to_host", "host_to_device"] * 2


def test_a_warning_that_is_an_error_stops_a_backward_pass() -> None:
    npu_sim.set_native_operators(TORCH_NPU - {"aten::grid_sampler_2d_backward"})
    image = torch.ones(1, 1, 4, 4, device="npu", requires_grad=True)
    result = F.grid_sample(image, torch.zeros(1, 2, 2, 2, device="npu"), align_corners=False)
    with pytest.raises(UserWarning, match="grid_sampler_2d_backward"):
        result.sum().backward()


@pytest.mark.parametrize(
    ("name", "value"), [("TORCH_NPU_FALLBACK_CPU_DISABLE", "1"), ("NPU_SIM_FALLBACK", "error")]
)
def test_fallbacks_can_be_errors(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    npu_sim.set_native_operators(TORCH_NPU - {"aten::grid_sampler_2d"})
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"grid_sampler_2d.*fallback is disabled"):
        F.grid_sample(
            torch.ones(1, 1, 4, 4, device="npu"),
            torch.zeros(1, 2, 2, 2, device="npu"),
            align_corners=False,
        )


def test_operators_of_other_libraries_fall_back() -> None:
    ops = pytest.importorskip("torchvision.ops")
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2.1], [5, 5, 9, 9]], device="npu")
    with pytest.warns(UserWarning, match="torchvision::nms"), npu_sim.record() as recording:
        kept = ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7], device="npu"), 0.5)
    assert kept.tolist() == [0, 2]
    assert recording.operators[-1][0] == "torchvision::nms"
    assert recording.operators[-1].way == "cpu_fallback"


def test_without_a_list_all_are_native() -> None:
    npu_sim.set_native_operators(None)
    ops = pytest.importorskip("torchvision.ops")
    boxes = torch.tensor([[0.0, 0, 2, 2], [5, 5, 9, 9]], device="npu")
    with npu_sim.record() as recording:
        ops.nms(boxes, torch.ones(2, device="npu"), 0.5)
    assert {operator.way for operator in recording.operators} == {"native"}


def test_a_kernel_in_python_is_one_operator() -> None:
    x = torch.ones(2, device="npu")
    with npu_sim.record() as recording:
        with npu_sim.kernel("npu::npu_some", x) as results:
            results.append(x.exp().sum())
        x.abs()
    assert names(recording) == ["npu::npu_some", "aten::abs"]
    assert recording.operators[0].outputs == (("float32", ()),)
