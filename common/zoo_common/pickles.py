"""Reads pickles of numpy arrays without the power that a pickle has to run code.

Weights of Caffe2, Detectron and detectron2 are pickles: programs for a small stack machine, one
instruction of which calls any function of any module. Here the instructions are followed by a
machine of our own that has no such call. A name in the file stays a name: those few that numpy
and Python write for arrays, numbers, bytes and ordered dicts have a meaning below, and every
other one ends the reading. Neither numpy's nor Python's own unpickling code sees the file, so a
forged shape or type description cannot harm either. Torch-free.

The instructions are those of protocols 0 to 5, as Python's Lib/pickletools.py describes them.
"""

import ast
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo_common.errors import UserError

_NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_MEANINGS = {
    **{(module, "ndarray"): "ndarray" for module in _NUMPY},
    **{(module, "dtype"): "dtype" for module in _NUMPY},
    **{(module, "_reconstruct"): "array" for module in _NUMPY},
    **{(module, "scalar"): "scalar" for module in _NUMPY},
    **{(module, "_frombuffer"): "frombuffer" for module in _NUMERIC},
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",
    ("collections", "OrderedDict"): "dict",
}
"""All names that a file may use, and what they mean here."""

_DTYPES = {
    name: np.dtype(name)
    for name in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}
_MOST_AXES = 32
_TORCH_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's own files before 1.6
_OBJECT = "makes an object of a class, which could run code"
_PLAIN = (str, bytes, bool, int, float, type(None))


class _RefusedError(Exception):
    """The file asks for something that is not allowed; the text says what, as a clause."""


class _DamagedError(Exception):
    """The file is no whole pickle."""


@dataclass(frozen=True)
class _Name:
    """A global name of the file that has a meaning here."""

    meaning: str


@dataclass(eq=False)
class _Unbuilt:
    """An array or number type whose content is still to come, and where the memo holds it."""

    meaning: str
    name: str = ""
    memo_keys: list[int] = field(default_factory=list)


_MARK = object()
"""Where on the stack a group of values begins."""


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins so is a plain pickle of a dict, rather than a file of torch.

    Args:
        head: the file's first 16 bytes.
    """
    if head[:1] == b"\x80":
        return not head.startswith(_TORCH_MAGIC)
    return head.startswith((b"(d", b"}", b"ccollections\n"))  # protocols 0 and 1: a dict


def load_arrays(path: Path) -> dict[Any, Any]:
    """Reads a pickled dict of arrays, numbers, texts and plain containers; runs nothing.

    Python 2's texts are read as latin-1. Arrays are writable, C-contiguous and of this machine's
    byte order; numpy's scalars become Python's; ordered dicts become dicts.

    Args:
        path: the file, of any pickle protocol.

    Raises:
        UserError: the file cannot be read, is truncated or no pickle, holds something else than
            a dict, or names anything that could run code.
    """
    try:
        content = _Machine(path.read_bytes()).run()
        _check_plain(content)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except _RefusedError as error:
        raise UserError(
            f"{path} was refused and nothing in it was run: it {error}; only arrays of numbers "
            "and plain values are read: get the file from its publisher or save its arrays anew."
        ) from error
    except _DamagedError as error:
        raise UserError(f"{path} is truncated, damaged or no pickle: get a whole file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dict of arrays, but a {type(content).__name__}.")
    return content


class _Machine:
    """A pickle's stack machine, without calls."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Follows the instructions up to STOP; returns what is then on the stack.

        Raises:
            _RefusedError: an instruction or a name is not allowed.
            _DamagedError: the instructions make no sense.
        """
        try:
            while (code := self.take(1)) != b".":
                if code in _FORBIDDEN:
                    raise _RefusedError(_FORBIDDEN[code])
                _STEPS[code](self)
            (result,) = self._stack
        except (ArithmeticError, LookupError, SyntaxError, TypeError, ValueError) as error:
            raise _DamagedError from error
        except struct.error as error:
            raise _DamagedError from error
        except MemoryError as error:
            raise _RefusedError("asks for more memory than there is") from error
        return result

    def take(self, count: int) -> bytes:
        """The next bytes of the file."""
        end = self._at + count
        if count < 0 or end > len(self._data):
            raise _DamagedError
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def number(self, layout: str) -> Any:
        """The next number of the file, in struct's layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def raw(self, layout: str) -> bytes:
        """The next bytes of the file, whose count stands before them."""
        return self.take(self.number(layout))

    def text(self, layout: str, encoding: str = "utf-8") -> str:
        """The next text of the file, whose count of bytes stands before it."""
        surrogates = "surrogatepass" if encoding == "utf-8" else "strict"
        return self.raw(layout).decode(encoding, surrogates)

    def line(self) -> str:
        """The rest of the line, for the instructions of protocol 0."""
        end = self._data.index(b"\n", self._at)
        line = self._data[self._at : end].decode("latin1")
        self._at = end + 1
        return line

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self._stack.append(value)

    def top(self) -> Any:
        """The last value of the stack, which stays there."""
        return self._stack[-1]

    def pop(self) -> Any:
        """Takes the last value off the stack."""
        return self._stack.pop()

    def last(self, count: int) -> list[Any]:
        """Takes that many values off the stack."""
        values = [self.pop() for _ in range(count)]
        if any(value is _MARK for value in values):
            raise _DamagedError
        return values[::-1]

    def since_mark(self) -> list[Any]:
        """Takes the values above the last mark off the stack, and the mark."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise _DamagedError
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def put(self, key: int) -> None:
        """Remembers the last value of the stack."""
        value = self.top()
        self._memo[key] = value
        if isinstance(value, _Unbuilt):
            value.memo_keys.append(key)

    def get(self, key: int) -> None:
        """Puts a remembered value on the stack."""
        self.push(self._memo[key])

    def memoize(self) -> None:
        """Remembers the last value of the stack under the next number."""
        self.put(len(self._memo))

    def append(self, values: Iterable[Any]) -> None:
        """Adds to the list on top of the stack."""
        _checked(self.top(), list).extend(values)

    def add(self, values: list[Any]) -> None:
        """Adds to the set on top of the stack."""
        _checked(self.top(), set).update(map(_key, values))

    def set_items(self, values: list[Any]) -> None:
        """Adds keys and values to the dict on top of the stack."""
        _checked(self.top(), dict).update(_dict_of(values))

    def name(self, module: Any, name: Any) -> None:
        """Puts a name on the stack, if it is one of those that have a meaning."""
        meaning = _MEANINGS.get((_checked(module, str), _checked(name, str)))
        if meaning is None:
            raise _RefusedError(f"names {f'{module}.{name}'[:100]!a}, which could run code")
        self.push(_Name(meaning))

    def instance(self) -> None:
        """INST, a name and a call at once, which no array needs."""
        self.name(self.line(), self.line())
        raise _RefusedError(_OBJECT)

    def reduce(self) -> None:
        """Puts what a name means for its arguments in their place."""
        callee, arguments = self.last(2)
        meaning = _checked(callee, _Name).meaning
        self.push(_MAKERS[meaning](*_checked(arguments, tuple)))

    def build(self) -> None:
        """Gives an array or a number type its content."""
        target, state = self.last(2)
        if type(target) is not dict:  # an ordered dict's further attributes are left out
            target = self._built(_checked(target, _Unbuilt), _checked(state, tuple))
        self.push(target)

    def _built(self, target: _Unbuilt, state: tuple[Any, ...]) -> Any:
        built = _dtype(target.name, state) if target.meaning == "dtype" else _array(state)
        for key in target.memo_keys:
            self._memo[key] = built
        return built


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _DamagedError
    return value


def _key(value: Any) -> Any:
    """A key of a dict or an item of a set; hashing a forged tuple of tuples could take for ever."""
    if type(value) not in _PLAIN:
        raise _RefusedError("has a dict or set whose keys are no texts or numbers")
    return value


def _dict_of(values: list[Any]) -> dict[Any, Any]:
    """A dict of keys and values in turn."""
    return dict(zip(map(_key, values[::2]), values[1::2], strict=True))


def _integer(text: str) -> int | bool:
    """INT of protocol 0, which has booleans too."""
    return text == "01" if text in ("00", "01") else int(text)


def _quoted(text: str) -> str:
    """STRING of protocol 0: a literal with escapes, as Python 2 prints it."""
    quote, inner = text[:1], text[1:-1]
    unescaped = inner.replace("\\\\", "").replace(f"\\{quote}", "")
    if quote not in ("'", '"') or not text.endswith(quote) or quote in unescaped:
        raise _DamagedError
    return str(_checked(ast.literal_eval(f"b{text}"), bytes).decode("latin1"))


def _signed(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    """How Python 2 writes an ordered dict: with a list of lists of two."""
    return {_key(key): value for key, value in pairs}


def _encoded(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes for protocols that Python 2 reads."""
    if encoding != "latin1":
        raise _DamagedError
    return bytes(_checked(text, str).encode("latin1"))


def _unbuilt_array(kind: Any, shape: Any, letter: Any) -> _Unbuilt:
    if kind != _Name("ndarray"):
        raise _DamagedError
    return _Unbuilt("array")


def _unbuilt_dtype(name: Any, align: Any = False, copy: Any = True) -> _Unbuilt:
    plain = _checked(name, str).lstrip("<>|=")
    if plain.startswith("O"):
        raise _RefusedError("holds an array of Python objects")
    if plain not in _DTYPES:
        raise _RefusedError(f"holds an array of the type {name[:30]!a}, which is no number")
    return _Unbuilt("dtype", plain)


def _dtype(name: str, state: tuple[Any, ...]) -> "np.dtype[Any]":
    """A number type from (version, byte order, and what only structures have)."""
    order, *structure = state[1:5]
    if order not in ("<", ">", "|", "=") or any(part is not None for part in structure):
        raise _RefusedError("holds an array of structures, which are no numbers")
    return _DTYPES[name].newbyteorder(order)


def _array(state: tuple[Any, ...]) -> "np.ndarray[Any, Any]":
    """An array from (version, shape, type, whether columns come first, bytes)."""
    shape, dtype, columns_first, data = state[-4:]
    return _from_bytes(data, dtype, shape, "F" if columns_first else "C")


def _from_bytes(data: Any, dtype: Any, shape: Any, order: Any = "C") -> "np.ndarray[Any, Any]":
    if isinstance(data, str):  # Python 2 writes bytes as text
        data = data.encode("latin1")
    lengths = _checked(shape, tuple)
    if not isinstance(dtype, np.dtype) or order not in ("C", "F") or len(lengths) > _MOST_AXES:
        raise _DamagedError
    if any(_checked(length, int) < 0 for length in lengths):
        raise _DamagedError
    if math.prod(lengths) * dtype.itemsize != len(_checked(data, bytes)):
        raise _DamagedError
    view: np.ndarray[Any, Any] = np.ndarray(lengths, dtype, data, order=order)
    return view.astype(dtype.newbyteorder("="), order="C")


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_bytes(data, dtype, ()).item()


_MAKERS: dict[str, Callable[..., Any]] = {
    "array": _unbuilt_array,
    "bytes": lambda: b"",  # how Python 3 writes empty ones for protocols that Python 2 reads
    "dict": _ordered_dict,
    "dtype": _unbuilt_dtype,
    "encode": _encoded,
    "frombuffer": _from_bytes,
    "scalar": _scalar,
}

_STEPS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda m: m.take(1),  # the protocol; instructions never changed their meaning
    b"\x95": lambda m: m.take(8),  # a frame's length, of use to streams only
    # the stack and the memo
    b"(": lambda m: m.push(_MARK),
    b"0": lambda m: m.pop(),
    b"1": lambda m: m.since_mark(),
    b"2": lambda m: m.push(m.top()),
    b"g": lambda m: m.get(int(m.line())),
    b"h": lambda m: m.get(m.number("B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"p": lambda m: m.put(int(m.line())),
    b"q": lambda m: m.put(m.number("B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.memoize(),
    # numbers
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer(m.line())),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"L": lambda m: m.push(int(m.line().removesuffix("L"))),
    b"\x8a": lambda m: m.push(_signed(m.raw("B"))),
    b"\x8b": lambda m: m.push(_signed(m.raw("<i"))),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(m.number(">d")),
    # texts and bytes
    b"S": lambda m: m.push(_quoted(m.line())),
    b"T": lambda m: m.push(m.text("<i", "latin1")),
    b"U": lambda m: m.push(m.text("B", "latin1")),
    b"V": lambda m: m.push(m.line().encode("latin1").decode("raw-unicode-escape")),
    b"X": lambda m: m.push(m.text("<I")),
    b"\x8c": lambda m: m.push(m.text("B")),
    b"\x8d": lambda m: m.push(m.text("<Q")),
    b"B": lambda m: m.push(m.raw("<I")),
    b"C": lambda m: m.push(m.raw("B")),
    b"\x8e": lambda m: m.push(m.raw("<Q")),
    b"\x96": lambda m: m.push(m.raw("<Q")),
    # containers
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.push(tuple(m.last(1))),
    b"\x86": lambda m: m.push(tuple(m.last(2))),
    b"\x87": lambda m: m.push(tuple(m.last(3))),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.since_mark()),
    b"a": lambda m: m.append(m.last(1)),
    b"e": lambda m: m.append(m.since_mark()),
    b"}": lambda m: m.push({}),
    b"d": lambda m: m.push(_dict_of(m.since_mark())),
    b"s": lambda m: m.set_items(m.last(2)),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"\x8f": lambda m: m.push(set()),
    b"\x90": lambda m: m.add(m.since_mark()),
    b"\x91": lambda m: m.push(frozenset(map(_key, m.since_mark()))),
    # names
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": lambda m: m.name(*m.last(2)),
    b"R": lambda m: m.reduce(),
    b"b": lambda m: m.build(),
    b"i": lambda m: m.instance(),
}
"""What each instruction does."""

_FORBIDDEN = {
    b"P": "refers to objects outside of the file (a persistent id)",
    b"Q": "refers to objects outside of the file (a persistent id)",
    b"\x97": "refers to memory outside of the file",
    b"\x98": "refers to memory outside of the file",
    b"\x82": "uses an extension code, which could run code",
    b"\x83": "uses an extension code, which could run code",
    b"\x84": "uses an extension code, which could run code",
    b"o": _OBJECT,
    b"\x81": _OBJECT,
    b"\x92": _OBJECT,
}


def _check_plain(content: Any) -> None:
    """Checks that no name or unbuilt array is left anywhere inside; any depth, circles too."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        elif not isinstance(value, (*_PLAIN, np.ndarray, np.dtype)):
            raise _DamagedError
        if not isinstance(value, _PLAIN):
            seen.add(id(value))
