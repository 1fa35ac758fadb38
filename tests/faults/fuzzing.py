"""What the fuzz tests share: good inputs spoiled in many ways, and what may come of them.

A reader is given thousands of inputs. Each must be read, or refused with the error that the
reader documents, within a bound of processor time and memory, and without running anything: an
audit hook sees each start of a program, each connection, each text that is run as code, and each
file that is written elsewhere than in the test's own directory.

The inputs are the same in each run: hypothesis draws them from a seed, which the environment
variable ``ZOO_FUZZ_SEED`` can set to another number.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning
from hypothesis.internal.conjecture import providers
from hypothesis.strategies import DrawFn, SearchStrategy

from zoo_common.errors import UserError

QUICK, THOROUGH = 200, 10_000

amounts = pytest.mark.parametrize(
    "amount", [QUICK, pytest.param(THOROUGH, marks=[pytest.mark.thorough, pytest.mark.timeout(0)])]
)
"""Gives a test ``amount``: how many inputs it shall feed."""

_CPU_SECONDS = 20
_MEMORY_BYTES = 3 << 30
_LONGEST_MESSAGE = 5000

_FORBIDDEN = (
    "builtins.input",
    "code.__new__",
    "ctypes.dlopen",
    "marshal.load",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.posix_spawn",
    "os.putenv",
    "os.spawn",
    "os.startfile",
    "os.system",
    "pty.spawn",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
)
_WRITES = ("os.chmod", "os.remove", "os.rename", "os.truncate",
           "shutil.rmtree")  # fmt: skip


class ForbiddenError(BaseException):
    """What is read made the process do something; no reader's ``except Exception`` hides it."""


class _Guard:
    """Where files may be written while a reader is watched, and what it did beside."""

    def __init__(self) -> None:
        self.directory: str | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.directory is not None and self._is_forbidden(event, arguments):
            self.seen.append(f"{event} {arguments!r:.200}")
            raise ForbiddenError(self.seen[-1])

    def _is_forbidden(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "exec":  # of a module that is imported it is a file's code
            text = getattr(arguments[0], "co_filename", "<").startswith(("<string", "<unknown"))
            return text and not _is_importing()
        if event in ("os.link", "os.symlink"):
            return not self._is_ours(arguments[1])
        if event in _WRITES:
            below = [a for a in arguments[1:] if isinstance(a, int) and a > 2]  # an open directory
            return not below and not self._is_ours(arguments[0])
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            return bool(writes) and not self._is_ours(path, follow=True)
        return event in _FORBIDDEN

    def _is_ours(self, path: Any, *, follow: bool = False) -> bool:
        """Whether a path, or with ``follow`` what it links to, lies in the test's directory."""
        if isinstance(path, int):
            return True
        assert self.directory is not None
        parent, name = os.path.split(os.fsdecode(path))
        full = f"{os.path.realpath(parent)}{os.sep}{name}"
        full = os.path.realpath(full) if follow else full
        return full == os.devnull or full.startswith(self.directory + os.sep)


def _is_importing() -> bool:
    """Whether a module of a library is being imported, as some are at their first use."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
    return False


_guard = _Guard()
sys.addaudithook(_guard)


@contextlib.contextmanager
def watched(directory: Path) -> Iterator[None]:
    """Raises ForbiddenError for what a reader must not do; files may be written in a directory."""
    _guard.directory, _guard.seen = os.path.realpath(directory), []
    try:
        yield
    finally:
        _guard.directory = None
    assert not _guard.seen, _guard.seen


def feed(
    read: Callable[[Any], object],
    inputs: SearchStrategy[Any],
    amount: int,
    directory: Path,
    errors: tuple[type[Exception], ...] = (UserError,),
    *,
    all_refused: bool = False,
    all_read: bool = False,
) -> Counter[str]:
    """Gives a reader many inputs.

    Args:
        read: reads one; writes in ``directory`` only.
        inputs: what is drawn.
        amount: how many.
        directory: the test's own.
        errors: what ``read`` documents.
        all_refused: none can be read to its end.
        all_read: nothing is refused.

    Returns:
        How many were ``read`` and how many ``refused``; both kinds occurred.
    """
    counts: Counter[str] = Counter()

    def check(given_input: Any) -> None:
        with watched(directory):
            signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
            try:
                read(given_input)
            except errors as error:
                counts["refused"] += 1
                assert 0 < len(str(error)) <= _LONGEST_MESSAGE, f"{len(str(error))} characters"
            else:
                counts["read"] += 1
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)

    fixed = seed(f"{read.__qualname__} {os.environ.get('ZOO_FUZZ_SEED', '0')}")
    run = settings(
        phases=[Phase.generate, Phase.shrink],
        max_examples=amount,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(fixed(given(inputs)(check)))
    with (
        _bounded(),
        # Hypothesis also draws what stands in the code of modules: of those that are there so far.
        mock.patch.object(providers, "_get_local_constants", providers.Constants),
        mock.patch("os.fsync"),  # no file here must outlast a loss of power
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", HypothesisWarning)  # that a failing input is long
        run()
    print(f"{read.__qualname__}: {counts['read']} read, {counts['refused']} refused")
    assert counts.total() >= amount, counts
    assert (counts["refused"] or all_read) and (counts["read"] or all_refused), counts
    return counts


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Little more memory than the process has, and an error for too much processor time."""

    def too_slow(*_: object) -> None:
        raise ForbiddenError(f"takes over {_CPU_SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, too_slow)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


# ---------------------------------------------------------------------------- bytes

_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1]
_BYTES = [
    *(number.to_bytes(size, order) for size in (4, 8) for number in _NUMBERS[:10]
      for order in ("little", "big")),
    b"", b"\0", b"\xff" * 8, b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"9" * 5000,
    b"[" * 100_000, b"{" * 500, b"../" * 20, b"-1", b"1e999", b"nan",
]  # fmt: skip
_places = st.integers(0, 1 << 20)
_lengths = st.sampled_from([1, 1, 2, 3, 4, 8, 16, 64, 512, 4096])


@st.composite
def spoiled(draw: DrawFn, valid: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """Good bytes with a few edits anywhere.

    Args:
        draw: hypothesis'.
        valid: good files.
        words: pieces of the format, which may be put in.
    """
    data = bytearray(draw(st.sampled_from(valid)))
    pieces = st.sampled_from([*words, *_BYTES]) | st.binary(min_size=1, max_size=8)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(_places) % (len(data) + 1)
        kind = draw(st.sampled_from(["flip", "set", "insert", "cut", "repeat", "splice", "end"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            piece = draw(pieces)
            data[at : at + len(piece)] = piece
        elif kind == "insert":
            data[at:at] = draw(pieces)
        elif kind == "cut":
            del data[at : at + draw(_lengths)]
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(_lengths)] * draw(st.integers(1, 3))
        elif kind == "splice":
            other = draw(st.sampled_from(valid))
            begin = draw(_places) % (len(other) + 1)
            data[at:] = other[begin:]
        else:
            del data[at:]
    return bytes(data)


# ---------------------------------------------------------------------------- trees

_SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30,
    10**400, 0.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"), "", " ",
    "0", "1.0", "-1", "nan", "a", "é", "人", "\ud800", "\0", "a\nb", "..", "../..", "/etc/passwd",
    "~root", "$(id)", "`id`", "a;b", "%s", "{}", "{0.__class__}", "${oc.env:HOME}", "\\${x", "!x",
    "&a", "*a", "a" * 3000, [], {}, [[]], [{}], {"": None}, {"a": {"b": [1]}}, [0] * 40,
]  # fmt: skip
_few = st.lists(st.sampled_from(_SCALARS), max_size=3)
odd_values: SearchStrategy[Any] = st.one_of(
    st.sampled_from(_SCALARS),
    st.integers(-5, 300),
    st.floats(),
    st.text(max_size=6),
    _few,
    st.dictionaries(st.text(max_size=3), st.sampled_from(_SCALARS) | _few, max_size=3),
)
"""What nobody expects where a number, a text or a list should be."""


@st.composite
def spoiled_tree(draw: DrawFn, valid: Sequence[Any]) -> Any:
    """Good lists and dicts with a few parts changed, left out, doubled or moved."""
    holder = {"root": copy.deepcopy(draw(st.sampled_from(valid)))}
    for _ in range(draw(st.integers(1, 4))):
        _change(draw, holder)
    return holder["root"]


def _change(draw: DrawFn, tree: dict[str, Any]) -> None:
    node: Any = tree
    key: Any = "root"
    while isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 5)):
        node = node[key]
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw(st.sampled_from(keys))
    kind = draw(st.sampled_from(["value", "value", "remove", "double", "rename"]))
    if kind == "remove" and node is not tree:
        del node[key]
    elif kind == "double" and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif kind == "rename" and isinstance(node, dict) and node is not tree:
        node[draw(st.sampled_from([*node, "", "id", "__class__"]))] = node.pop(key)
    else:
        node[key] = copy.deepcopy(draw(odd_values))


def as_json(tree: Any) -> bytes:
    """A tree as a file, also with what JSON has no word for."""
    return json.dumps(tree, default=str).encode("utf-8", "surrogatepass")


def spoiled_json(valid: Sequence[Any], words: Sequence[bytes] = ()) -> SearchStrategy[bytes]:
    """JSON files, spoiled as trees three times of four, and as bytes."""
    trees = spoiled_tree(valid).map(as_json)
    return st.one_of(trees, trees, trees, spoiled([as_json(tree) for tree in valid], words))
