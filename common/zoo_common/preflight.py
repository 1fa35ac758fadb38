"""What is checked before any process starts, cheap checks first."""

import contextlib
import dataclasses
import importlib
import os
import secrets
import socket
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.progress import Progress

from zoo_common import download, layouts, outputs, pickles, yfcc
from zoo_common.config import Field, flatten, node_range, read_yaml
from zoo_common.errors import UserError
from zoo_common.runs import Model, RunSpec

_COCO_LAYOUTS = ("coco", "grounding")


@dataclass(frozen=True)
class Place:
    """Where a run's processes are.

    Attributes:
        device: ``npu``, ``cuda`` or ``cpu``.
        processes: processes on this machine.
        nnodes: number of machines, the most where they may come and go.
        node_rank: index of this machine.
        master_addr: address of machine 0.
        master_port: port on machine 0.
        min_nodes: the fewest machines with which the run goes on; 0: all.
    """

    device: str
    processes: int
    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int
    min_nodes: int = 0

    @property
    def fewest(self) -> int:
        """The fewest machines with which the run goes on."""
        return self.min_nodes or self.nnodes

    @property
    def machines(self) -> str:
        """The number of machines as ``4`` or ``2 to 4``."""
        return str(self.nnodes) if self.fewest == self.nnodes else f"{self.fewest} to {self.nnodes}"

    @property
    def world_size(self) -> int:
        """Processes on all machines, with the most of them."""
        return self.processes * self.nnodes


def absolute_paths(model: Model, config: Any, caller: Path) -> None:
    """Makes the config's relative paths absolute, in place.

    They are meant from where the user stood; what is not there is looked for in the model's
    directory, from where the original's scripts started.
    """
    for item in model.fields():
        kind = item.metadata.get("kind")
        if kind not in ("path", "checkpoint", "weights"):
            continue
        *sections, name = item.path.split(".")
        holder = _at(config, sections)
        value = getattr(holder, name)
        if value in ("", item.metadata.get("bare"), *layouts.MADE):
            continue
        if kind == "weights" and "://" in value:
            continue
        try:
            path = caller / Path(value).expanduser()
            fallback = model.directory / value
            if not path.exists() and fallback.exists():
                path = fallback
            if kind == "weights" and Path(value).name == value and not path.is_file():
                continue  # a bare name, which fetch_weights looks for
        except (OSError, RuntimeError, ValueError) as error:  # too long, or nobody's home
            raise UserError(
                f"{item.path}={value!r:.100} is no path ({error!s:.100}): give another."
            ) from error
        setattr(holder, name, str(path))


def check_required(model: Model, spec: RunSpec, config: Any) -> None:
    """Checks that the settings are given without which a run has no meaning.

    Raises:
        UserError: one is not; the message names its option.
    """
    for path in spec.required:
        if not _at(config, path.split(".")):
            names = [option.name for option in model.options() if option.targets == (path,)]
            meaning = next(item.help for item in model.fields() if item.path == path)
            raise UserError(f"The run needs {(names or [path])[-1]}=VALUE: {meaning}.")


def name_run(model: Model, config: Any, directory: Path, *, keep: bool) -> None:
    """Sets, in place, the run's name, by which it knows its own checkpoints.

    Args:
        model: the model directory.
        config: the settings of the run.
        directory: its output directory.
        keep: the run goes on with what is there, under the name that it has there.

    Raises:
        UserError: ``--auto_resume`` would go on with a run of other settings.
    """
    run = config.run
    before: dict[str, Any] = {}
    if keep and outputs.holds_a_run(directory):
        before = dict(flatten(read_yaml(directory / "config.yaml")))
    if run.auto_resume and before:
        now = dict(flatten(dataclasses.asdict(config)))
        for item in model.fields():
            path = item.path
            if not _decides_training(item) or path not in before or before[path] == now[path]:
                continue
            raise UserError(
                f"--auto_resume: {directory} holds a run with {path}={before[path]}, but this one "
                f"has {now[path]}: give the same settings, or another --output_dir."
            )
    run.id = str(before.get("run.id") or "") or secrets.token_hex(8)


def _decides_training(item: Field) -> bool:
    """Whether a setting is part of what a run is, not of where, how long or how safely it runs."""
    section, _, name = item.path.partition(".")
    if section == "run":
        return name in ("seed", "deterministic", "float32")
    machine = ("path", "checkpoint", "weights")
    return section not in ("launch", "evaluate") and not (
        item.metadata.get("kind") in machine or name in ("workers", "prefetch_factor")
    )


def check_data(spec: RunSpec, config: Any) -> None:
    """Resolves ``data.path`` in place: a made data set is made, a directory is checked."""
    if not spec.layout:
        return
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("making the data set", total=None, visible=False)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        if spec.layout == "yfcc":
            data = config.data
            parts = _yfcc_parts(spec, config.evaluate)
            data.path, data.val_path = layouts.resolve_yfcc(data.path, data.val_path, parts, show)
        else:
            files = _coco_files(spec, config.data) if spec.layout in _COCO_LAYOUTS else None
            config.data.path = str(layouts.resolve(spec.layout, config.data.path, show, files))
    if Path(config.data.path).resolve().is_relative_to(Path(config.run.output_dir).resolve()):
        raise UserError(
            f"--data_path={config.data.path} lies in --output_dir={config.run.output_dir}, which "
            "is moved aside when another run is started: give another --output_dir."
        )


def _coco_files(spec: RunSpec, data: Any) -> layouts.CocoFiles:
    """What a run reads of a COCO data set; an evaluation needs nothing to train on."""
    evaluates = spec.kind == "eval"
    return layouts.CocoFiles(
        None if evaluates else data.train_json,
        None if evaluates else data.train_images,
        data.val_json,
        data.val_images,
    )


def _yfcc_parts(spec: RunSpec, evaluate: Any) -> yfcc.Parts:
    """What a run reads of captioned pictures and of ImageNet's validation pictures."""
    if spec.kind == "eval":
        return yfcc.Parts(train=False)
    return yfcc.Parts(val=bool(evaluate.every or evaluate.at_end))


def check_weights(model: Model, config: Any) -> None:
    """Checks that each checkpoint that the config names is there and whole.

    What a run goes on from is read on machine 0 only.
    """
    for item in model.fields():
        if item.path == "run.resume" and config.launch.node_rank:
            continue
        value = _at(config, item.path.split("."))
        kind = item.metadata.get("kind")
        named = kind == "checkpoint" or (kind == "weights" and not _to_be_found(value))
        if named and value not in ("", item.metadata.get("bare")):
            check_checkpoint_file(Path(value), item.path)


def fetch_weights(model: Model, config: Any) -> None:
    """Finds or downloads, in place, the files that the settings of kind ``weights`` name.

    Such a setting holds a path, a bare name or a public address. Its section may have the
    settings ``url`` and ``sha256``; what may be secret in an address is gone afterwards, before
    the config is written anywhere. Where no address is given, the package's config module may
    know the published one by the file's name, in ``WEIGHT_ADDRESSES``. A download goes beside
    the data set, so this comes after :func:`check_data`.

    Raises:
        UserError: the file is nowhere and cannot be had, or is not what it should be.
    """
    module = importlib.import_module(model.schema.__module__)
    addresses: Mapping[str, str] = getattr(module, "WEIGHT_ADDRESSES", {})
    data_path = Path(config.data.path) if config.data.path else None
    for item in model.fields():
        *sections, name = item.path.split(".")
        holder = _at(config, sections)
        value = getattr(holder, name)
        if item.metadata.get("kind") != "weights" or not value:
            continue
        url, word = getattr(holder, "url", ""), download.shown(value) if "://" in value else value
        if url:
            holder.url = download.shown(url)
        if config.run.resume:  # the checkpoint has all weights
            setattr(holder, name, word)
            continue
        with _showing(f"{item.path}: downloading {word}") as show:
            path = download.find_or_fetch(
                value,
                data_path,
                url or addresses.get(value, ""),
                getattr(holder, "sha256", ""),
                show,
                model_directory=model.directory,
                check=partial(check_checkpoint_file, setting=item.path),
            )
        check_checkpoint_file(path, item.path)
        setattr(holder, name, str(path))


@contextlib.contextmanager
def _showing(what: str) -> Iterator[download.Progress]:
    """A line when a download begins and, on a terminal, a bar while it lasts."""
    begun = False
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(what, total=None, visible=False)

        def show(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                begun = True
                print(what, flush=True)
            progress.update(task, completed=done, total=total or None, visible=True)

        yield show


def follow_checkpoints(model: Model, config: Any, before: Path, after: Path) -> None:
    """Corrects, in place, the paths of checkpoints in an output directory that was moved."""
    for item in model.fields():
        *sections, name = item.path.split(".")
        holder = _at(config, sections)
        kind, value = item.metadata.get("kind"), getattr(holder, name)
        if kind not in ("checkpoint", "weights") or not value or _to_be_found(value):
            continue
        path = Path(value).resolve()
        if path.is_relative_to(before.resolve()):
            setattr(holder, name, str(after / path.relative_to(before.resolve())))


def check_checkpoint_file(file: Path, setting: str) -> None:
    """Tells a missing, truncated or foreign checkpoint file, a pickle that runs code among them.

    Raises:
        UserError: naming the file and the setting.
    """
    if not file.is_file():
        raise UserError(f"{setting}: there is no checkpoint file {file}.")
    with file.open("rb") as stream:
        head = stream.read(16)
    if pickles.is_pickle(head):
        pickles.load_arrays(file)
        return
    if head[:1] == b"\x80":
        return  # the format of torch before 1.6: only the restricted loader can judge it
    if head[:2] != b"PK" or not _is_zip(file):
        what = "is truncated" if head[:2] == b"PK" else "is no PyTorch checkpoint"
        raise UserError(f"{setting}: {file} {what}; give a whole .pth file.")


def check_checkpoint_there(directory: Path) -> None:
    """Tells early that there is nothing to resume from; the ranks find a whole one.

    Raises:
        UserError: there is no checkpoint in the directory.
    """
    if not any(directory.glob("step_*.pth")) and not (directory / "last.pth").is_file():
        raise UserError(
            f"--resume: there is no checkpoint in {directory}: start without it, or name a file."
        )


def _is_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # of several disks
        return False


def place(spec: RunSpec, config: Any) -> Place:
    """Finds the device and the ports of a run.

    Raises:
        UserError: the device is not there or has too few cards, the port is taken, or an address
            is not this machine's.
    """
    with _quiet_torch():
        from zoo_common import device as devices  # torch, from here on

    launch = config.launch
    processes = launch.processes or spec.devices
    first = config.run.device_id
    kind = devices.resolve(config.run.device, index=first).type
    if kind != "cpu":
        cards = devices.count(kind)
        if first + processes > cards:
            raise UserError(
                f"The run needs {processes} {kind} cards from card {first} on, but this machine "
                f"shows {cards}: choose a run with fewer (_1p), --device_id or --processes."
            )
    fewest, most = node_range(launch)
    if launch.node_rank >= most:
        raise UserError(f"--node_rank={launch.node_rank} must be below --nnodes={most}.")
    if most > 1 and not (launch.master_addr and launch.master_port):
        raise UserError(
            "A run on several machines needs --master_addr and --master_port, the same on each."
        )
    address = launch.master_addr or "127.0.0.1"
    if most > 1 and not launch.local_addr:
        launch.local_addr = _address_towards(address, launch.join_timeout_s)
    network(launch.local_addr)
    port = launch.master_port
    if launch.node_rank == 0:
        port = _free_port(launch.local_addr or address, port)
    return Place(kind, processes, most, launch.node_rank, address, port, fewest)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keeps torch's own C++ log out of this process when it is imported here; the ranks have it.

    Of a machine that does not answer it tells in pages of stack frames, we in a sentence.
    """
    name = "TORCH_CPP_LOG_LEVEL"
    given = name in os.environ
    os.environ.setdefault(name, "FATAL")
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


def network(local_addr: str) -> dict[str, str]:
    """Variables that tie HCCL and gloo to a network; the user's own win.

    Args:
        local_addr: this machine's address in a run of several, or an empty text.

    Raises:
        UserError: no interface of this machine has the address.
    """
    interfaces = _interfaces()
    if not local_addr:
        # One machine: its ranks talk over the loopback, whatever its name resolves to.
        own = interfaces.get("127.0.0.1")
        return {"GLOO_SOCKET_IFNAME": own} if own and "GLOO_SOCKET_IFNAME" not in os.environ else {}
    if local_addr not in interfaces:
        raise UserError(
            f"--local_addr={local_addr} is no address of this machine, which has "
            f"{', '.join(interfaces)}."
        )
    wanted = {"HCCL_IF_IP": local_addr, "GLOO_SOCKET_IFNAME": interfaces[local_addr]}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _interfaces() -> dict[str, str]:
    """The name of the interface that has an address, by the addresses of this machine."""
    return {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }


def _address_towards(address: str, patience_s: float) -> str:
    """This machine's own address on the way to another's; no packet is sent.

    Args:
        address: the other's name or address.
        patience_s: how long its name may not be known yet, as that of a pod that is just starting.

    Raises:
        UserError: the name means nothing, or there is no way.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            found = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
            family, kind, protocol, _, where = found
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(where)
                own: str = probe.getsockname()[0]
                return own
        except OSError as error:
            unknown = isinstance(error, socket.gaierror)
            if not unknown or time.monotonic() > deadline:
                raise UserError(
                    f"--master_addr={address} cannot be reached ({error.strerror}): give the "
                    "address of machine 0, the same on each machine."
                ) from error
        time.sleep(1)


def _free_port(address: str, port: int) -> int:
    """The port itself when it is free on that address, or a free one for 0."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            free: int = probe.getsockname()[1]
            return free
    except OSError as error:
        given = f"--master_port={port}" if port else f"--master_addr={address}"
        raise UserError(f"{given} cannot be used ({error.strerror}): choose another.") from error


def _to_be_found(value: str) -> bool:
    """Whether a weights setting holds a bare name or an address, for :func:`fetch_weights`."""
    return not Path(value).is_absolute()


def _at(config: Any, names: Iterable[str]) -> Any:
    for name in names:
        config = getattr(config, name)
    return config
