"""Two processes, each with a card of its own: HCCL, DDP, SyncBatchNorm."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import npu_sim

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the simulated NPU: python -m npu_sim pytest", allow_module_level=True)

pytestmark = pytest.mark.device

PROCESS = Path(__file__).with_name("device_processes.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes found, by rank."""
    meet = tmp_path_factory.mktemp("meet") / "store"
    environment = {**npu_sim.environment(cards=2), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROCESS), str(rank), str(meet)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [error for _, error in outputs] == ["", ""]
    return [json.loads(output) for output, _ in outputs]


def both(results: list[dict[str, Any]], name: str) -> Any:
    assert results[0][name] == results[1][name]
    return results[0][name]


def test_reductions(results: list[dict[str, Any]]) -> None:
    numbers = ("float32", "bfloat16", "float16", "int64", "int16", "uint8")
    assert both(results, "reductions") == {
        **{f"torch.{name}": [1, 1] for name in numbers},
        "torch.bool": [True, True],
        "AVG": [1.5, 1.5],
        "MAX": [2, 2],
        "MIN": [1, 1],
        "PRODUCT": [2, 2],
    }


def test_what_hccl_refuses(results: list[dict[str, Any]]) -> None:
    refused = "RuntimeError: HCCL {}: Unsupported data type {}"
    assert both(results, "float64") == refused.format("allreduce", "Double")
    assert both(results, "scattered_bytes") == refused.format("reduce_scatter", "Byte")
    assert both(results, "bitwise") == "RuntimeError: Cannot use ReduceOp.BOR with HCCL"
    assert "No backend type associated with device type cpu" in both(
        results, "host_tensors_on_hccl"
    )


def test_gathers(results: list[dict[str, Any]]) -> None:
    assert both(results, "gathers_take_all_types") == [[[0, 0], [1, 1]], [1, 1]]
    assert [result["into_one_tensor"] for result in results] == [
        [[[0, 0, 1, 1]], [0, 2]],
        [[[0, 0, 1, 1]], [4, 6]],
    ]


def test_asynchronous_work(results: list[dict[str, Any]]) -> None:
    assert both(results, "asynchronous") == [[0.5] * 3, [[1.0] * 3]]


def test_messages(results: list[dict[str, Any]]) -> None:
    assert [result["messages"] for result in results] == [[[0, 0], [0, 10]], [[0, 0], [1, 11]]]


def test_host_tensors_and_objects_travel_by_gloo(results: list[dict[str, Any]]) -> None:
    found = [[1, 1], [{"rank": 0}, {"rank": 1}]]
    assert both(results, "host_tensors_and_objects") == found


def test_data_parallel_equals_one_process(results: list[dict[str, Any]]) -> None:
    assert both(results, "data_parallel") == "equal"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sync_batch_norm_equals_batch_norm(results: list[dict[str, Any]], dtype: str) -> None:
    assert both(results, f"batch_norm torch.{dtype}") == "equal"


def test_kernels_of_torch_npu_s_sync_batch_norm() -> None:
    npu_sim.install()
    library = torch.library.Library("npu", "FRAGMENT")
    for name, schema in (
        ("batch_norm_reduce", "(Tensor input, float eps) -> (Tensor, Tensor)"),
        (
            "batch_norm_gather_stats_update",
            "(Tensor input, Tensor mean, Tensor invstd, Tensor? running_mean, "
            "Tensor? running_var, float momentum, float eps, Tensor counts) -> (Tensor, Tensor)",
        ),
    ):
        if not hasattr(torch.ops.npu, name):  # the stand-in torch_npu defines them
            library.define(name + schema)
    images = torch.randn(6, 3, 5, 5) * 2 + 1
    parts = [part.to("npu") for part in images.split([4, 2])]
    sums, squares = zip(*(torch.ops.npu.batch_norm_reduce(x, 1e-5) for x in parts), strict=True)
    mean, variance = torch.zeros(3, device="npu"), torch.ones(3, device="npu")
    found = torch.ops.npu.batch_norm_gather_stats_update(
        parts[0], torch.stack(sums), torch.stack(squares), mean, variance, 0.1, 1e-5,
        torch.tensor([100.0, 50.0], device="npu"),
    )  # fmt: skip
    usual = torch.nn.BatchNorm2d(3)
    usual(images)
    torch.testing.assert_close(found[0].cpu(), images.mean((0, 2, 3)))
    inverse = (images.var((0, 2, 3), unbiased=False) + 1e-5).rsqrt()
    torch.testing.assert_close(found[1].cpu(), inverse)
    torch.testing.assert_close(mean.cpu(), usual.running_mean)
    torch.testing.assert_close(variance.cpu(), usual.running_var)
