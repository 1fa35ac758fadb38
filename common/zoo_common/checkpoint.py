"""Checkpoints: whole or absent, and never code.

A training checkpoint is a dict of plain containers and tensors::

    {"format": 1, "model": {key: tensor}, "step": int, "epoch": float, "best": float | None,
     "parts": {name: state_dict}, "rng": [one per rank], "config": yaml text}

``model`` has the published keys and float32 weights, so that a checkpoint is at the same time a
weights file for any tool that reads ``{"model": state_dict}``.

The file is torch.save's, a zip of one record a tensor with the CRC-32 of each. torch.load reads
past those; :func:`load` checks them first.
"""

import argparse
import contextlib
import copy
import errno
import math
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from zoo_common import flaky
from zoo_common.errors import TrainingError, UserError, one_line

T = TypeVar("T")

FORMAT = 1
_MODEL_KEYS = ("model", "state_dict", "model_state_dict")

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_BESIDE_WEIGHTS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"{module}.{name}" for module in _MULTIARRAY for name in ("_reconstruct", "scalar")),
)
"""What runners, OpenMMLab's among them, write beside the weights; an :class:`_Unread` is put in
place of each, so that none of it is run or built."""


class _Unread:
    """Stands for an object that nobody needs; takes what a pickle gives it and keeps nothing."""

    def __new__(cls, *arguments: object) -> "_Unread":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Nothing of it is kept."""


class SaveError(TrainingError):
    """A checkpoint could not be written; what was there before is untouched.

    Attributes:
        what: what happened and what is kept, without advice and full stop.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}: {advice} and continue with --resume.")
        self.what = what


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "let it be written to"),
}
_BYTES_BESIDE_A_TENSOR = 512
"""Of its record's head, padding and entry in the list of records, and of its pickle: at most."""


def save(
    path: Path, content: Mapping[str, Any], kept: str = "the one saved before, if any, is whole"
) -> None:
    """Writes a checkpoint so that a kill at any moment leaves the old or the new one, whole.

    Args:
        path: the file; a temporary one beside it is renamed over it at the end.
        content: plain containers and tensors only; tensors of any device are written as the
            CPU's, since torch reads others only where there is such a device.
        kept: what is there when this one cannot be written, for the message.

    Raises:
        SaveError: the disk has not the room, is full, read-only or gone.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        moved = _on_cpu(dict(content), {}, copies=False)
        check_space(path.parent, size_of(moved))
        with partial.open("wb") as stream:
            torch.save(moved, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        cause = _os_error(error)
        if cause is None:
            raise
        raise SaveError(
            f"Cannot write the checkpoint {path}: {cause.strerror}; {kept}",
            _ADVICE.get(cause.errno or 0, "look at the disk"),
        ) from error


def snapshot(content: Mapping[str, Any], unshared: Collection[str] = ()) -> dict[str, Any]:
    """A copy that training cannot change any more, with all tensors on the CPU.

    Args:
        content: plain containers and tensors.
        unshared: keys of it whose tensors nobody else holds, which are not copied.
    """
    moved: dict[object, Tensor] = {}
    return {
        name: _on_cpu(value, moved, copies=name not in unshared) for name, value in content.items()
    }


def size_of(content: Any) -> int:
    """Bytes that a checkpoint takes on the disk, tied weights counted once; slightly too many."""
    sizes: dict[int, int] = {}

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            else:  # of a storage there, only this part comes along
                sizes[leaf.data_ptr()] = leaf.numel() * leaf.element_size()
        return leaf

    _with_leaves(content, note)
    return sum(sizes.values()) + _BYTES_BESIDE_A_TENSOR * len(sizes)


def find_not_finite(weights: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite number; None: all are finite."""
    for name, value in weights.items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.numel()):
            continue
        # One pass, where torch.isfinite takes twenty times as long; NaN comes through.
        if not all(math.isfinite(limit) for limit in torch.aminmax(value)):
            return name
    return None


def check_space(directory: Path, needed: int) -> None:
    """Looks whether a disk has so much room; a quota shows at the writing only.

    Args:
        directory: an existing one.
        needed: bytes.

    Raises:
        OSError: ENOSPC, with both numbers in its text.
    """
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}, it needs {_amount(needed)} and {_amount(free)} are free",
        )


def _amount(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size:,} bytes"


def _on_cpu(node: Any, moved: dict[object, Tensor], *, copies: bool) -> Any:
    """A copy of containers with all tensors on the CPU.

    Args:
        node: plain containers and tensors.
        moved: what was moved already, so that tied weights are written once and stay tied.
        copies: whether what is on the CPU already is copied too.
    """

    def move(leaf: Any) -> Any:
        on_cpu = isinstance(leaf, Tensor) and leaf.device.type == "cpu"
        if not isinstance(leaf, Tensor) or (on_cpu and not copies):
            return leaf
        key = (leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride(), leaf.device)
        if key not in moved:
            moved[key] = leaf.detach().clone() if on_cpu else leaf.detach().cpu()
        return moved[key]

    return _with_leaves(node, move)


def _with_leaves(node: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of plain containers with every leaf changed."""
    if isinstance(node, dict):
        held = copy.copy(node)  # a state_dict has an attribute with its modules' versions
        for name, value in node.items():
            held[name] = _with_leaves(value, change)
        return held
    if isinstance(node, (list, tuple)):
        return type(node)(_with_leaves(value, change) for value in node)
    return change(node)


def as_arrays(node: Any) -> Any:
    """A copy of plain containers with NumPy arrays for tensors, to travel between processes.

    Arrays do so by plain pickling: a tensor would go through torch.save, of which torch_npu has
    its own that warns.
    """

    def change(leaf: Any) -> Any:
        return leaf.detach().cpu().numpy() if isinstance(leaf, Tensor) else leaf

    return _with_leaves(node, change)


def as_tensors(node: Any) -> Any:
    """What :func:`as_arrays` was given, on the CPU, as :func:`save` wants it."""

    def change(leaf: Any) -> Any:
        return torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf

    return _with_leaves(node, change)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint file onto the CPU, without running code that may be in it.

    Returns:
        What was saved; a bare state_dict comes as ``{"model": state_dict}``. Arrays of NumPy and
        the like, as some runners write them beside the weights, are not read.

    Raises:
        UserError: no such file, truncated or damaged, holds more than plain data, or no weights.
    """
    try:
        flaky.retried(lambda: _check_sums(path), path)
        unread = [(_Unread, name) for name in _BESIDE_WEIGHTS]
        with (
            torch.serialization.safe_globals([argparse.Namespace, *unread]),  # DeiT-style "args"
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's, of pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"The checkpoint {path} is damaged ({one_line(error)}): give a whole .pth file."
        ) from error
    except OSError as error:
        why = error.strerror or "it is damaged"
        raise UserError(f"Cannot read the checkpoint {path}: {why}.") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The checkpoint {path} was refused: it is damaged or holds more than tensors and "
            "plain values, which could run code; save it again with its state_dict only."
        ) from error
    except MemoryError as error:
        raise UserError(
            f"The checkpoint {path} is damaged, or larger than this machine's memory: give a whole "
            ".pth file."
        ) from error
    except Exception as error:  # torch's unpickler follows a damaged file until anything fails
        raise UserError(
            f"The checkpoint {path} is damaged or no PyTorch checkpoint: give a whole .pth file."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"The checkpoint {path} holds no dict of weights, but a {type(content)}.")
    for key in _MODEL_KEYS:
        if isinstance(content.get(key), dict):
            if not all(map(_is_weight, content[key].items())):
                raise UserError(
                    f"The checkpoint {path} was refused: its weights are no tensors; save it again "
                    "with its state_dict only."
                )
            return {**content, "model": without_prefix(content[key])}
    tensors = content and all(isinstance(value, Tensor) for value in content.values())
    if tensors and all(map(_is_weight, content.items())):
        return {"model": without_prefix(content)}
    keys = ", ".join(f"{key!s:.40}" for key in list(content)[:10])
    more = ", ..." if len(content) > 10 else ""
    raise UserError(f"The checkpoint {path} holds no weights: it has the keys {keys}{more}.")


def _check_sums(path: Path) -> None:
    """Reads a zip file through and compares the CRC-32 of each record.

    Files of other formats have none, nor have those that torch was told to write without; these
    hold 0 for each.

    Raises:
        zipfile.BadZipFile: a record differs; other errors come of damaged heads.
    """
    with path.open("rb") as stream:
        if stream.read(len(_ZIP_HEAD)) != _ZIP_HEAD:
            return
        with zipfile.ZipFile(cast(BinaryIO, stream)) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):
                return
            for record in records:
                with archive.open(record) as content:
                    while content.read(_BLOCK_BYTES):
                        pass


_ZIP_HEAD = b"PK\x03\x04"
_BLOCK_BYTES = 1 << 20


def _is_weight(item: tuple[Any, Any]) -> bool:
    """Whether a name and what it stands for can be of a state_dict.

    Some runners have plain values among the tensors.
    """
    name, value = item
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not value.is_quantized
        return isinstance(name, str) and plain
    return isinstance(name, str) and not isinstance(value, _Unread)


@dataclass
class Fit:
    """How a checkpoint's weights fit a model; all lists hold keys of the state_dict."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    other_shape: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line: how many keys were loaded, and which were not."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        for name, keys in (
            ("missing", self.missing),
            ("left over", self.unexpected),
            ("of another shape", self.other_shape),
        ):
            if keys:
                parts.append(f"{len(keys)} {name} ({_some(keys)})")
        return ", ".join(parts)


def select(
    weights: Mapping[str, Tensor],
    model: nn.Module,
    path: Path,
    *,
    may_differ: Iterable[str] = (),
) -> tuple[dict[str, Tensor], Fit]:
    """Picks the weights that a model takes.

    Args:
        weights: a checkpoint's ``model``.
        model: what they are for.
        path: the checkpoint, for messages.
        may_differ: key prefixes that may be missing or of another shape (``head.`` when
            fine-tuning to another number of classes); they keep the model's own values.

    Returns:
        A state_dict that loads with ``strict=True``, and how it was made.

    Raises:
        UserError: other keys differ; the message names them.
    """
    own = model.state_dict()
    allowed = tuple(may_differ)
    fit = Fit(unexpected=[key for key in weights if key not in own])
    chosen: dict[str, Tensor] = {}
    for key, value in own.items():
        if key not in weights:
            fit.missing.append(key)
        elif getattr(weights[key], "shape", None) != value.shape or weights[key].is_meta:
            fit.other_shape.append(key)
        else:
            fit.loaded.append(key)
            chosen[key] = weights[key]
            continue
        chosen[key] = value
    bad = [
        key
        for key in (*fit.missing, *fit.other_shape, *fit.unexpected)
        if not key.startswith(allowed or ("\0",))
    ]
    if bad:
        raise UserError(
            f"The checkpoint {path} is of another model: {fit.describe()}; "
            "give the one that belongs to the model's name and class count."
        )
    return chosen, fit


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a training step draws from.

    Numbers are NumPy arrays, see :func:`as_arrays`; a checkpoint holds them :func:`as_tensors`.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = cast(Any, np.random.get_state())
    state = {
        "torch": torch.get_rng_state().numpy(),
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.astype(np.int64), position, has_gauss, cached],
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device).numpy()
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what :func:`rng_state` gave, as tensors."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def without_prefix(weights: Mapping[str, T]) -> dict[str, T]:
    """Drops ``module.``, which DistributedDataParallel puts before every key."""
    if weights and all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return dict(weights)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _os_error(error: BaseException) -> OSError | None:
    """The disk's own error below torch's, which names positions in a file instead."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def sync_directory(directory: Path) -> None:
    """Makes the rename itself last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)
