"""The stand-in torch_npu against the record of the real one: names, signatures, schemas."""

import ast
import enum
import importlib
import inspect
import os
import re
import sys
from pathlib import Path

import pytest
import torch

if "NPU_SIM_CARDS" not in os.environ:
    pytest.skip("needs the stand-in: python -m npu_sim pytest", allow_module_level=True)

import torch_npu

from npu_sim import recorded

pytestmark = pytest.mark.device

REPOSITORY = Path(__file__).parents[3]
MODULES = (
    "torch_npu",
    "torch_npu.npu",
    "torch_npu.npu.amp",
    "torch_npu.optim",
    "torch_npu.profiler",
)

# Signatures that differ from the recorded ones, by pattern, and why.
OTHER_SIGNATURES = {
    r"torch_npu\.(Format|npu\.CubeMathType|npu\.ErrCode|profiler\.ProfilerAction)": (
        "an enum's signature is Python's, and changes with its version"
    ),
    r"torch_npu\.npu\.(List|Tuple|Optional|Union|cast)": (
        "an import that torch_npu's module shows; it is Python's"
    ),
}


def resolve(name: str) -> object:
    module, _, short = name.rpartition(".")
    return getattr(sys.modules[module], short)


def parameters(text: str) -> list[tuple[str, object, str]]:
    return [
        (parameter.name, parameter.kind, str(parameter.default))
        for parameter in recorded.signature(text).parameters.values()
    ]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_recorded(name: str) -> None:
    module = importlib.import_module(name)
    public = {key for key in getattr(module, "__all__", vars(module)) if not key.startswith("_")}
    assert len(public) > 3
    assert {key for key in public if f"{name}.{key}" not in recorded.api()} == set()


def test_every_recorded_name_exists() -> None:
    assert len(recorded.api()) > 600
    assert [name for name in recorded.api() if not _exists(name)] == []
    names = [f"{module}.{key}" for module, keys in recorded.modules().items() for key in keys]
    assert len(names) > 250
    assert [name for name in names if not _exists(name)] == []
    for module in recorded.modules():
        importlib.import_module(module)


def _exists(name: str) -> bool:
    module, _, short = name.rpartition(".")
    return hasattr(sys.modules.get(module), short)


def test_names_that_the_real_one_lacks_are_not_there() -> None:
    for owner, name in ((torch.npu, "OutOfMemoryError"), (torch_npu, "npu_rmsnorm")):
        with pytest.raises(AttributeError, match=name):
            getattr(owner, name)
    with pytest.raises(ImportError):
        importlib.import_module("torch_npu.contrib.modules")


def test_signatures() -> None:
    wrong = {}
    used = set()
    for name, text in recorded.api().items():
        other = next((key for key in OTHER_SIGNATURES if re.fullmatch(key, name)), None)
        if other is not None:
            used.add(other)
        elif recorded.is_signature(text):
            found = str(inspect.signature(resolve(name)))
            if parameters(found) != parameters(text):
                wrong[name] = (found, text)
    assert wrong == {}
    assert used == set(OTHER_SIGNATURES)


def test_values_have_the_recorded_types() -> None:
    simple = ("int", "list", "module", "str", "tensortype", "tuple")
    wrong = {
        name: (type(resolve(name)).__name__, text)
        for name, text in recorded.api().items()
        if text in simple and type(resolve(name)).__name__ != text
    }
    assert wrong == {}
    assert {name: getattr(torch_npu, name) for name in recorded.constants()} == (
        recorded.constants()
    )


def test_methods_of_classes() -> None:
    checked = 0
    wrong = {}
    for name, members in recorded.classes().items():
        found = resolve(name) if _exists(name) else None
        if found is None or recorded.is_absent(found):
            continue
        if isinstance(found, enum.EnumMeta):
            found = next(iter(found))
        for member, text in members.items():
            if not hasattr(found, member):
                wrong[f"{name}.{member}"] = "is not there"
            elif recorded.is_signature(text):
                signature = str(inspect.signature(inspect.getattr_static(found, member)))
                checked += 1
                if parameters(signature) != parameters(text):
                    wrong[f"{name}.{member}"] = f"{signature} is not {text}"
    assert wrong == {}
    assert checked > 40


def test_operators_have_the_recorded_schemas() -> None:
    defined = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("npu::"):
            defined[f"{schema.name}.{schema.overload_name}"] = str(schema)
    # torch prints a result of None as (), or as a type that it can't read.
    expected = [text.replace("-> NoneType", "-> ()") for text in recorded.schemas()]
    assert sorted(defined.values()) == sorted(expected)
    assert len(defined) == 425


def used_names() -> set[str]:
    """Names of torch_npu that the zoo's programs use."""
    found = set()
    sources = [
        path
        for root in ("common/zoo_common", "built-in", "contrib", "tools")
        for path in (REPOSITORY / root).rglob("*.py")
        if "tests" not in path.parts
    ]
    assert len(sources) > 30
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ""
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            text = text.replace("torch_npu.npu.", "torch.npu.")
            if path.name == "device.py":
                # What it calls the module of the device, and of the profiler.
                text = re.sub(r"^(_module\(device\)|module)\.", "torch.npu.", text)
                text = re.sub(r"^api\.", "torch_npu.profiler.", text)
            if re.fullmatch(r"(torch\.npu|torch_npu)(\.[A-Za-z]\w*)+", text):
                found.add(text)
    return found


def test_what_the_zoo_uses_is_simulated() -> None:
    names = used_names()
    assert "torch.npu.set_compile_mode" in names and "torch_npu.profiler.profile" in names
    for name in sorted(names):
        value: object = torch if name.startswith("torch.") else torch_npu
        for part in name.split(".")[1:]:
            # This one can be written, not read.
            if name == "torch.npu.config.allow_internal_format" and part == "allow_internal_format":
                break
            value = getattr(value, part)
        assert not recorded.is_absent(value), name


def test_names_that_are_not_simulated_say_so() -> None:
    with pytest.raises(NotImplementedError, match=r"does not simulate torch_npu\.npu\.NPUGraph;"):
        torch.npu.NPUGraph()
    boxes = torch.zeros(3, 4, device="npu")
    with pytest.raises(NotImplementedError, match=r"does not simulate torch_npu\.npu_giou;"):
        torch_npu.npu_giou(boxes, boxes)
    with pytest.raises(NotImplementedError, match=r"torch_npu\.contrib\.ROIAlign;"):
        importlib.import_module("torch_npu.contrib.module.roi_align").ROIAlign()
    with pytest.raises(ImportError, match=r"does not simulate torch_npu\.contrib\.transfer_to_npu"):
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
    assert isinstance(torch_npu.npu_giou, torch._ops.OpOverloadPacket)
