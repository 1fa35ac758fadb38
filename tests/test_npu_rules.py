"""tools/npu_rules.py: what operators and calls may take on an NPU."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("npu_rules", ROOT / "tools" / "npu_rules.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["npu_rules"] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "tools"))
    return module


def taking(name: str, *dtypes: str) -> SimpleNamespace:
    """An operator as npu_sim records one."""
    return SimpleNamespace(name=name, inputs=tuple((dtype, (2, 3)) for dtype in dtypes), outputs=())


@pytest.mark.parametrize(
    ("name", "dtypes", "said"),
    [
        ("aten::grid_sampler_2d", ["bfloat16", "bfloat16"], "documented for float16, float32"),
        ("aten::grid_sampler_2d_backward", ["bfloat16"], "grid_sample"),
        ("aten::index_copy", ["bfloat16"], "documented for float32"),
        ("aten::bernoulli_.float", ["bfloat16"], "torch.bernoulli"),
        ("aten::nll_loss_forward", ["float16", "int64"], "losses are computed in float32"),
        ("aten::_log_softmax", ["bfloat16"], "losses are computed in float32"),
        ("aten::smooth_l1_loss_backward", ["float32", "bfloat16"], "computed in float32"),
        ("aten::native_batch_norm", ["float16", "float16", "float16"], "statistics"),
        ("aten::native_batch_norm", ["bfloat16", "float32", "float32"], "functional.batch_norm"),
        ("aten::native_batch_norm_backward", ["float16"] * 3, "statistics"),
        ("aten::isposinf", ["float32"], "copies to the host"),
        ("aten::sort.stable", ["bool"], "torch.sort"),
        ("aten::bmm", ["int64", "int64"], "torch.bmm"),
        ("aten::max_pool2d_with_indices", ["float64"], "torch.nn.functional.max_pool2d"),
    ],
)  # fmt: skip
def test_a_format_that_the_rules_refuse(
    rules: ModuleType, name: str, dtypes: list[str], said: str
) -> None:
    broken = list(rules.broken_by(taking(name, *dtypes)))
    assert any(said in f"{one.what} {one.rule} {one.source}" for one in broken)


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("aten::grid_sampler_2d", ["float16", "float16"]),
        ("aten::nll_loss_forward", ["float32", "int64"]),
        ("aten::bmm", ["bfloat16", "bfloat16"]),  # left out by the newer documents
        ("aten::native_batch_norm", ["float16", "float32", "float32", "float32", "float32"]),
        ("aten::native_batch_norm_backward", ["float16"] * 2 + ["float32"] * 5),
        ("aten::threshold_backward", ["bfloat16", "bfloat16"]),  # of relu
        ("aten::as_strided", ["bfloat16"]),  # computes nothing
        ("aten::add.Tensor", ["int64", "int64"]),
        ("aten::empty.memory_format", []),
        ("npu::npu_swiglu", ["bfloat16"]),  # not in the documents of torch's functions
    ],
)
def test_a_format_that_they_admit(rules: ModuleType, name: str, dtypes: list[str]) -> None:
    assert list(rules.broken_by(taking(name, *dtypes))) == []


images = torch.zeros(1, 2, 4, 4)
query = torch.zeros(1, 2, 4, 8)
CALLS: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "scale_factor": (
        lambda: F.interpolate(images, scale_factor=2.0),
        lambda: F.interpolate(images, size=(8, 8)),
    ),
    "sorted=False": (
        lambda: images.flatten().topk(2, sorted=False),
        lambda: torch.topk(images.flatten(), 2),
    ),
    "dilation": (
        lambda: F.max_pool2d(images, 2, dilation=2),
        lambda: F.max_pool2d(images, 2),
    ),
    "attn_mask has to be bool": (
        lambda: F.scaled_dot_product_attention(query, query, query, torch.zeros(4, 4)),
        lambda: F.scaled_dot_product_attention(query, query, query, torch.ones(4, 4).bool()),
    ),
    "of shape (N, heads, length, channels)": (
        lambda: F.scaled_dot_product_attention(query[0], query[0], query[0]),
        lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True),
    ),
    "at most 512": (
        lambda: F.scaled_dot_product_attention(*[torch.zeros(1, 1, 2, 520)] * 3),
        lambda: F.scaled_dot_product_attention(*[torch.zeros(1, 1, 2, 512)] * 3),
    ),
}


@pytest.mark.parametrize("said", CALLS)
def test_a_call_that_the_documents_refuse_and_one_that_they_admit(
    rules: ModuleType, said: str
) -> None:
    refused, admitted = CALLS[said]
    with rules.CallWatch() as watch:
        refused()
        refused()
    (broken,) = watch.broken
    assert said in broken.rule and "2.7.1 to 2.13.0" in broken.source
    with rules.CallWatch() as watch:
        admitted()
    assert watch.broken == []
