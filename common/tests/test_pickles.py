"""Pickles of arrays are read whole, and nothing else of a pickle is."""

import collections
import io
import pickle
import pickletools
import random
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from zoo_common import pickles
from zoo_common.errors import UserError


def content() -> dict[str, Any]:
    weight = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    return {
        "conv1_w": weight,
        "the same": weight,
        "columns first": np.asfortranarray(weight[:, :, 0]),
        "other end first": weight.astype(">f4"),
        "half": weight.astype(np.float16),
        "switches": weight > 0,
        "counts": np.arange(5),
        "empty": np.zeros((0, 3), np.float32),
        "single": np.array(2.5),
        "scalar": np.float32(0.5),
        "numbers": [1, -2, 300, -70000, 2**40, -(2**80), True, False, None, 1.5, (), (1,), (1, 2)],
        "texts": ["é", b"\xff\x00", b"", "line\nend", (1, 2, 3), (1, 2, 3, 4)],
        "ordered": collections.OrderedDict(first=np.ones(2), second=1),
    }


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert found.dtype == wanted.dtype.newbyteorder("=") and found.dtype.isnative
        assert found.flags.writeable and found.flags.c_contiguous
        np.testing.assert_array_equal(found, wanted)
    elif isinstance(wanted, dict):
        assert type(found) is dict and list(found) == list(wanted)
        for key, value in wanted.items():
            assert_same(found[key], value)
    else:
        assert found == wanted
        assert type(found) is (float if isinstance(wanted, np.floating) else type(wanted))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_plain_values_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps(content(), protocol=protocol)
    assert pickles.is_pickle(data[:16])
    found = pickles.load_arrays(write(tmp_path / "w.pkl", data))
    assert_same(found, content())
    assert found["the same"] is found["conv1_w"]


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes as Python 2 did: bytes and ASCII texts are of one type, others are unicode."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, raw: bytes) -> None:
        if self.proto == 0:
            literal = repr(raw)[1:]  # b'...' without the b
            self.write(pickle.STRING + literal.encode() + b"\n")
        elif len(raw) < 256:
            self.write(pickle.SHORT_BINSTRING + struct.pack("B", len(raw)) + raw)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize([raw])  # a list of its own: texts that are one object are saved twice

    def save_text(self, text: str) -> None:
        if text.isascii():
            self.save_bytes(text.encode())
        else:
            self.save_str(text)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_text


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_pickles_of_python_2(protocol: int, tmp_path: Path) -> None:
    stream = io.BytesIO()
    numbers = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    Python2(stream, protocol=protocol).dump(
        {"blobs": {"w": numbers, "scale": np.float64(3)}, "cfg": "it's\n\\ é", "quote": "\"'"}
    )
    data = stream.getvalue().replace(b"numpy._core", b"numpy.core")  # numpy 1's name
    assert b"numpy.core.multiarray" in data
    found = pickles.load_arrays(write(tmp_path / "w.pkl", data))
    np.testing.assert_array_equal(found["blobs"]["w"], numbers)
    assert found["blobs"]["scale"] == 3
    assert (found["cfg"], found["quote"]) == ("it's\n\\ é", "\"'")


class Call:
    """Pickles to a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def reconstruct(tail: bytes) -> bytes:
    """An array to be built, on top of a stack, then ``tail``."""
    array = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray")
    return b"\x80\x02}U\x01a" + array + b"K\x00\x85U\x01b\x87R" + tail + b"s."


class Persistent(pickle.Pickler):
    """Refers to every text outside of the file."""

    def persistent_id(self, value: Any) -> str | None:
        return "storage 0" if isinstance(value, str) else None


def persistent() -> bytes:
    stream = io.BytesIO()
    Persistent(stream, protocol=2).dump({"a": 1})
    return stream.getvalue()


class Plain:
    """Has only attributes."""


def evil(command: str) -> dict[str, tuple[bytes, str]]:
    """Files that run the command when Python unpickles them or that are odd, and what is said."""
    import os
    import subprocess

    plain = Plain()
    plain.__dict__["inner"] = Call(os.system, command)
    touch = f"__import__('os').system({command!r})"
    nested = pickle.dumps({"w": np.array([Call(os.system, command)], dtype=object)})
    dtype = b"cnumpy\ndtype\nU\x02%sK\x00K\x01\x87R"
    return {
        "os.system": (pickle.dumps({"a": Call(os.system, command)}), r"'(posix|nt)\.system'"),
        "system, protocol 0": (pickle.dumps({"a": Call(os.system, command)}, 0), r"\.system'"),
        "eval": (pickle.dumps({"a": Call(eval, touch)}), r"'builtins\.eval'"),
        "exec, Python 2": (pickle.dumps({"a": Call(exec, touch)}, 2), r"'__builtin__\.exec'"),
        "getattr": (pickle.dumps({"a": Call(getattr, "", "x")}), r"'builtins\.getattr'"),
        "Popen": (pickle.dumps(Call(subprocess.Popen, ["sh", "-c", command])), "Popen'"),
        "numpy.load": (pickle.dumps({"a": Call(np.load, "/tmp/x.npy", None, True)}), r"'numpy\."),
        "numpy.fromfile": (pickle.dumps({"a": Call(np.fromfile, "/etc/passwd")}), "fromfile'"),
        "a dotted name": (
            b"\x80\x04}\x8c\x01a\x8c\x05numpy\x8c\x0cos.path.join\x93s.",
            r"'numpy\.os\.path\.join'",
        ),
        "an object": (pickle.dumps({"a": plain}), r"Plain'"),
        "object array": (nested, "names|Python objects"),
        "object dtype": (
            reconstruct(b"(K\x01K\x01\x85" + dtype % b"O8" + b"\x89U\x01xtb"),
            "array of Python objects",
        ),
        "structure": (
            pickle.dumps({"a": np.zeros(2, dtype=[("x", "f4")])}),
            "of the type 'V4', which is no number",
        ),
        "texts": (pickle.dumps({"a": np.array(["x"])}), "of the type 'U1'"),
        "persistent id": (persistent(), "persistent id"),
        "persistent id, protocol 0": (b"(dS'a'\nPstorage 0\ns.", "persistent id"),
        "INST": (f"(dS'a'\n(S'{command}'\nios\nsystem\ns.".encode(), r"'os\.system'"),
        "INST of a known class": (
            b"(dS'a'\n(icollections\nOrderedDict\ns.",
            "makes an object of a class",
        ),
        "OBJ": (b"}U\x01a(ccollections\nOrderedDict\nos.", "makes an object of a class"),
        "NEWOBJ": (b"\x80\x02}U\x01acnumpy\nndarray\n)\x81s.", "makes an object of a class"),
        "extension code": (b"\x80\x02}U\x01a\x82\x01s.", "extension code"),
        "out of band": (b"\x80\x05}U\x01a\x97s.", "memory outside of the file"),
        "key of tuples": (pickle.dumps({((1,), 2): 3}), "keys are no texts or numbers"),
    }


@pytest.mark.parametrize("case", sorted(evil("")))
def test_what_could_run_code_is_refused_and_nothing_runs(case: str, tmp_path: Path) -> None:
    data, said = evil(f"touch {tmp_path}/ran")[case]
    path = write(tmp_path / "evil.pkl", data)
    with pytest.raises(UserError, match=said) as error:
        pickles.load_arrays(path)
    message = str(error.value)
    assert message.startswith(f"{path} was refused and nothing in it was run: it ")
    assert message.count("\n") == 0 and not (tmp_path / "ran").exists()


def test_the_evil_file_would_run_with_python_s_own_reader(tmp_path: Path) -> None:
    data, _ = evil(f"touch {tmp_path}/ran")["os.system"]
    pickle.loads(data)
    assert (tmp_path / "ran").exists()


_FORGED_STATE = b"(K\x01K\x05\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
_FLOAT = b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
ODD = {
    "empty": b"",
    "no pickle": b"not a pickle at all\n",
    "a web page": b"<!DOCTYPE html><html>Please sign in</html>",
    "only a protocol": b"\x80\x04",
    "no stop": b"\x80\x02}",
    "nothing on the stack": b"\x80\x02.",
    "two on the stack": b"\x80\x02}}.",
    "only a mark": b"\x80\x02(.",
    "no mark": b"\x80\x02}U\x01aK\x01u.",
    "odd items": b"\x80\x02}(U\x01au.",
    "unknown instruction": b"\x80\x02}\xff.",
    "nothing to get": b"\x80\x02}h\x07.",
    "gigantic bytes": b"\x80\x04}C\x01a\x8e" + struct.pack("<Q", 2**63 - 1) + b"s.",
    "gigantic text": b"\x80\x04}X\xff\xff\xff\xffs.",
    "negative length": b"\x80\x02}T\xff\xff\xff\xffs.",
    "gigantic number": b"\x80\x02}U\x01a\x8b\xff\xff\xff\x7fs.",
    "endless digits": b"(dS'a'\nI" + b"9" * 100_000 + b"\ns.",
    "a name left": b"\x80\x02}U\x01acnumpy\ndtype\ns.",
    "an array left unbuilt": reconstruct(b""),
    "an array of nothing": reconstruct(b"Nb"),
    "a forged shape": reconstruct(_FORGED_STATE + _FLOAT + b"\x89U\x04abcdtb"),
    "a dtype left unbuilt": reconstruct(_FORGED_STATE + b"\x89U\x14" + b"a" * 20 + b"tb"),
    "a text to call": b"\x80\x02}U\x01aU\x01b)Rs.",
    "a list to build": b"\x80\x02}U\x01a]}bs.",
    "arguments too many": b"\x80\x02}U\x01a" + name("_codecs", "encode") + b"(K\x01K\x02K\x03tRs.",
    "another encoding": b"\x80\x02}U\x01a" + name("_codecs", "encode") + b"U\x01xU\x03hex\x86Rs.",
    "not a literal": b"(dS'a' + 'b'\nI1\ns.",
    "half a literal": b"(dS'a\nI1\ns.",
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files_are_told(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "odd.pkl", ODD[case])
    with pytest.raises(UserError, match=r"odd\.pkl is truncated, damaged or no pickle"):
        pickles.load_arrays(path)


def test_forged_descriptions_are_right_but_for_what_is_forged(tmp_path: Path) -> None:
    whole = reconstruct(_FORGED_STATE + _FLOAT + b"\x89U\x14" + b"\0" * 20 + b"tb")
    found = pickles.load_arrays(write(tmp_path / "w.pkl", whole))
    np.testing.assert_array_equal(found["a"], np.zeros(5, np.float32))


def test_a_gigantic_memo_number_costs_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pkl", b"\x80\x02}r\xff\xff\xff\x7fU\x01aK\x01s.")
    assert pickles.load_arrays(path) == {"a": 1}


def test_deep_and_circular_values_end(tmp_path: Path) -> None:
    deep = b"\x80\x02}U\x01a" + b"]" * 200_000 + b"a" * 199_999 + b"s."
    assert list(pickles.load_arrays(write(tmp_path / "deep.pkl", deep))) == ["a"]
    circle: dict[str, Any] = {}
    circle["me"] = circle
    found = pickles.load_arrays(write(tmp_path / "circle.pkl", pickle.dumps(circle)))
    assert found["me"] is found


def test_no_dict_no_file_and_a_directory(tmp_path: Path) -> None:
    for value, said in (([1], "but a list"), (np.ones(2), "but a ndarray"), ("x", "but a str")):
        with pytest.raises(UserError, match=said):
            pickles.load_arrays(write(tmp_path / "w.pkl", pickle.dumps(value)))
    with pytest.raises(UserError, match="No such file"):
        pickles.load_arrays(tmp_path / "none.pkl")
    with pytest.raises(UserError, match="Is a directory"):
        pickles.load_arrays(tmp_path)


def test_every_truncation_is_told(tmp_path: Path) -> None:
    path = tmp_path / "w.pkl"
    for protocol in (0, 2, 4, 5):
        data = pickle.dumps(content(), protocol=protocol)
        for length in range(0, len(data), 13):
            with pytest.raises(UserError):
                pickles.load_arrays(write(path, data[:length]))


def test_damaged_bytes_never_end_in_another_error(tmp_path: Path) -> None:
    path, chance = tmp_path / "w.pkl", random.Random(0)
    sources = [pickle.dumps(content(), protocol=protocol) for protocol in (0, 1, 2, 4, 5)]
    for _ in range(500):
        data = bytearray(chance.choice(sources))
        for _ in range(chance.choice((1, 1, 3, 20))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            found = pickles.load_arrays(write(path, bytes(data)))
        except UserError:
            continue
        assert type(found) is dict


def test_every_instruction_of_the_format_is_known() -> None:
    known = {*pickles._STEPS, *pickles._FORBIDDEN, b"."}
    assert known == {opcode.code.encode("latin1") for opcode in pickletools.opcodes}


def test_torch_files_are_no_plain_pickles(tmp_path: Path) -> None:
    import torch

    for zipped in (True, False):
        path = tmp_path / "w.pth"
        torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=zipped)
        assert not pickles.is_pickle(path.read_bytes()[:16])
    for text in (b"model:\n", b"# a config\n", b"class A:\n", b"PK\x03\x04", b""):
        assert not pickles.is_pickle(text)
