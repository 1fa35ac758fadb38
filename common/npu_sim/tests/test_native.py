"""npu_sim.native: which operators torch_npu has kernels for, by version."""

import json

import pytest
import torch

from npu_sim.native import DATA, is_native, native_operators, versions

INSTALLED = DATA.parent / "torch_npu_2.14_native_ops.json"
RECORDED = json.loads(INSTALLED.read_text(encoding="utf-8"))


def test_the_versions_are_those_of_torch_npu_from_2_1_on() -> None:
    assert versions() == tuple(f"2.{minor}" for minor in range(1, 15))


def test_what_the_installed_package_registers_is_native() -> None:
    """Its record names its own operators under ``aten`` too, where torch has none of that name."""
    of_torch = set(torch._C._dispatch_get_all_op_names())
    registered = {name for name in RECORDED["P"] if name in of_torch or name.startswith("npu::")}
    registered = {name for name in registered if name.startswith(("aten::", "npu::"))}
    assert len(registered) > 1400
    assert registered <= native_operators("2.14")
    assert native_operators("2.13") == native_operators("2.14")


@pytest.mark.parametrize(
    "name",
    [
        "aten::empty.memory_format",
        "aten::empty_strided",
        "aten::copy_",
        "aten::as_strided",
        "aten::view",
        "aten::set_.source_Storage_storage_offset",
        "aten::resize_",
        "aten::_local_scalar_dense",
        "aten::record_stream",
        "aten::add.Tensor",
        "aten::convolution",
        "aten::native_layer_norm",
        "aten::sort.stable",
        "npu::npu_rotary_mul",
    ],
)
def test_the_groundwork_is_native_in_every_version(name: str) -> None:
    assert all(is_native(name, version) for version in versions())


def test_a_structured_operator_is_native_by_its_out_form() -> None:
    content = json.loads(DATA.read_text(encoding="utf-8"))
    assert content["structured"]["aten::gelu"] == "aten::gelu.out"
    assert "2.14" not in content["operators"].get("aten::gelu", "")
    assert is_native("aten::gelu.out", "2.14") and is_native("aten::gelu", "2.14")


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("aten::_fused_sgd_", "2.13", "2.14"),  # listed for all versions, released with 2.13
        ("aten::gelu.out", "2.7", "2.14"),
        ("aten::bitwise_left_shift.Tensor_out", "2.13", "2.14"),
    ],
)
def test_some_have_come_with_a_version(name: str, first: str, last: str) -> None:
    known = versions()
    since = known[known.index(first) : known.index(last) + 1]
    assert tuple(version for version in known if is_native(name, version)) == since


@pytest.mark.parametrize(
    "name",
    [
        "torchvision::nms",
        "aten::_safe_softmax",  # made of others
        "aten::_coalesce",  # of sparse tensors
        "aten::npu_rotary_mul",  # its namespace is npu
        "aten::gelu.nothing",
        "add.Tensor",
    ],
)
def test_these_are_native_in_no_version(name: str) -> None:
    assert not any(is_native(name, version) for version in versions())


def test_an_unknown_version_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"torch 1\.11: give one of the versions 2\.1 to 2\.14"):
        native_operators("1.11")
