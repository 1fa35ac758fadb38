"""What must be equal on all machines of a run, compared before the first step.

Each launcher gathers facts of its own machine: versions, code, settings, data set. A machine whose
facts differ would train, but not what the others train, and nothing would show it afterwards.
Paths, ports and addresses may differ, since they belong to a machine. Of a data set the lists and
the numbers of pictures are compared, not the pictures.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo_common import imagenet, yfcc
from zoo_common.preflight import Place
from zoo_common.runs import Model, RunSpec
from zoo_common.shard_names import expand, is_pattern

_OF_ONE_MACHINE = frozenset(
    {
        "data.workers",
        "launch.join_timeout_s",
        "launch.local_addr",
        "launch.master_addr",
        "launch.master_port",
        "launch.node_rank",
        "launch.processes",
        "run.device",
        "run.device_id",
        "run.id",
        "run.resume",
        "run.threads",
    }
)
"""Settings that may differ, or that are compared as what they mean."""

_FOUND = ("data.path", "data.val_path", "run.output_dir", "run.resume")
"""Paths whose content is compared by the data set's layout, or not at all."""

_PACKAGES = ("torch", "torch_npu")
_PART_BYTES, _PARTS = 256 * 1024, 32
_CHUNK_BYTES = 1 << 20
_NO_FILE = "no such file"

_ADVICE = {
    "version": "install the same versions on all machines",
    "code": "bring the code of all machines to the same state",
    "place": "start all machines with the same number of processes on the same kind of device",
    "setting": "start all machines with the same options",
    "data": "give each machine the same data set",
    "file": "give each machine the same file",
}


def facts(model: Model, spec: RunSpec, config: Any, place: Place) -> dict[str, Any]:
    """What this machine would train, flat and in JSON's types.

    It reads COCO's annotation files as a whole and of larger ones some parts, and takes under 2 s
    for COCO, ImageNet or YFCC on a local disk.

    Args:
        model: the model directory.
        spec: the run.
        config: its settings, whose data set was found.
        place: where its processes are.
    """
    found: dict[str, Any] = {"version python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        found[f"version {package}"] = _version(package)
    found |= _code(model)
    found |= {
        "place device": place.device,
        "place processes": place.processes,
        "setting run.resume": "given" if config.run.resume else "not given",
    }
    for item in model.fields():
        value: Any = config
        for name in item.path.split("."):
            value = getattr(value, name)
        kind = item.metadata.get("kind")
        if kind and item.path not in _FOUND:
            found[f"file {item.path}"] = _mark(Path(value)) if value else ""
        elif not kind and item.path not in _OF_ONE_MACHINE and not _is_absolute(value):
            found[f"setting {item.path}"] = value
    found |= _data_set(spec.layout, config.data)
    flat: dict[str, Any] = json.loads(json.dumps(found))
    return flat


def first_difference(
    mine: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]],
    own: str = "this machine",
) -> str | None:
    """One sentence that names the item and the machines that differ in it, or None.

    Args:
        mine: this machine's facts.
        others: the facts of other machines, by what a message calls them, as ``machine 1``.
        own: what a message calls this machine.
    """
    missing = object()
    items = dict.fromkeys(mine) | dict.fromkeys(key for each in others.values() for key in each)
    for item in items:
        value = mine.get(item, missing)
        differing = [name for name, each in others.items() if each.get(item, missing) != value]
        if not differing:
            continue
        theirs = others[differing[0]].get(item, missing)
        kind, _, name = item.partition(" ")
        what = f"{kind} of {name}" if kind in ("version", "file") else f"{kind} {name}"
        has = "has" if len(differing) == 1 else "have"
        texts = ["nothing" if each is missing else _shown(each) for each in (theirs, value)]
        return (
            f"The machines of this run differ in the {what}: {', '.join(differing)} {has} "
            f"{texts[0]}, {own} has {texts[1]}; {_ADVICE[kind]}."
        )
    return None


def _shown(value: Any) -> str:
    return repr(value) if value == "" else str(value)


def _is_absolute(value: Any) -> bool:
    """A name of a file below the data set may also be given as a path of this machine."""
    return isinstance(value, str) and Path(value).is_absolute()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _code(model: Model) -> dict[str, str]:
    """A hash of each Python file that a run may use: of zoo_common and of the model's package."""
    package = model.schema.__module__.partition(".")[0]
    found = {}
    for name in ("zoo_common", package):
        file = importlib.import_module(name).__file__
        assert file is not None
        root = Path(file).parent
        for path in sorted(root.rglob("*.py")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            found[f"code {path.relative_to(root.parent).as_posix()}"] = digest
    return found


def _data_set(layout: str, data: Any) -> dict[str, str]:
    """What identifies a data set, by the parts that a message can name."""
    if layout in ("coco", "grounding"):
        return _coco(data)
    if layout == "imagenet":
        return _imagenet(Path(data.path))
    return _yfcc(data) if layout == "yfcc" else {}


def _coco(data: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in ("train", "val", "grounding"):
        annotations = getattr(data, f"{part}_json", "")
        images = getattr(data, f"{part}_images", "")
        if annotations:
            found[f"data {part}_json"] = _mark(Path(data.path, annotations), whole=True)
        if images:
            found[f"data {part}_images"] = _count(Path(data.path, images))
    return found


def _imagenet(root: Path) -> dict[str, str]:
    found = {}
    for split in imagenet.SPLITS:
        try:
            folders = sorted(entry.name for entry in os.scandir(root / split) if entry.is_dir())
            counts = [(name, sum(1 for _ in os.scandir(root / split / name))) for name in folders]
        except OSError:
            found[f"data {split}"] = _NO_FILE
            continue
        digest = hashlib.sha256(os.fsencode(repr(counts))).hexdigest()[:12]
        pictures = sum(count for _, count in counts)
        found[f"data {split}"] = f"{len(folders)} classes with {pictures} files ({digest})"
    return found


def _yfcc(data: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    if is_pattern(data.path):
        shards = expand(data.path)
        sizes = [(path.name, path.stat().st_size) for path in shards]
        digest = hashlib.sha256(os.fsencode(repr(sizes))).hexdigest()[:12]
        total = sum(size for _, size in sizes)
        found["data shards"] = f"{len(shards)} shards of {total} bytes ({digest})"
    else:
        found["data captions"] = _mark(Path(data.path, yfcc.TRAIN_JSON))
    root = Path(data.val_path or data.path)
    found["data validation list"] = _mark(root / yfcc.VAL_JSON)
    images = yfcc.val_images(root)
    found["data validation pictures"] = _count(images) if images else _NO_FILE
    found["data vocabulary"] = _mark(root / yfcc.VOCABULARY)
    return found


def _count(directory: Path) -> str:
    """The number of entries that do not hide."""
    try:
        return f"{sum(not entry.name.startswith('.') for entry in os.scandir(directory))} files"
    except OSError:
        return _NO_FILE


def _mark(path: Path, *, whole: bool = False) -> str:
    """Size and hash of a file: of all of it, or of parts that are spread evenly over a large one.

    Args:
        path: the file, or something that is none.
        whole: hash a large one as a whole too.
    """
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if whole or size <= _PARTS * _PART_BYTES:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
            else:
                for part in range(_PARTS):
                    stream.seek((size - _PART_BYTES) * part // (_PARTS - 1))
                    digest.update(stream.read(_PART_BYTES))
    except OSError:
        return _NO_FILE
    return f"{size} bytes ({digest.hexdigest()[:12]})"
