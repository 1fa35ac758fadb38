"""Configs: dataclasses with a reason and bounds per field, filled from YAML and options.

A model's config is a dataclass of sections::

    @dataclass
    class Config:
        data: DataConfig = section(DataConfig)
        precision: PrecisionConfig = section(PrecisionConfig)
        run: RunConfig = section(RunConfig)

and ``load_config(Config, argv, CARD_OPTIONS)`` gives a checked instance. OmegaConf merges; this
module adds what a user needs beyond it: bounds, choices, option names, and errors that name the
option as it was written. It imports no torch, so that help texts come at once.

A name in CARD_OPTIONS that has no dashes (``SOLVER.MAX_ITER``) is a card key: another project's
name for a setting. It is taken on the command line and in YAML, with that project's value forms:
a text that is a Python literal, as ``"(1, 2)"``, means the literal.
"""

import ast
import copy
import dataclasses
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import omegaconf
import yaml
from omegaconf import OmegaConf

from zoo_common import yaml_text
from zoo_common.errors import UserError, one_line
from zoo_common.options import Assignment, Option, is_true, nearest, parse

T = TypeVar("T")
BASE_KEYS = ("_base_", "_BASE_")
"""How a YAML file names the file that it builds on: our spelling, and detectron2's."""

Given = Mapping[str, Any]
"""The values of all card keys that a run was given, the last written one last."""


@dataclass(frozen=True)
class CardKey:
    """Another project's name for settings of ours.

    Attributes:
        targets: the fields that it may set; none: a name that has the one meaning that we have.
        read: from its value, and the values of all card keys, to fields and what they become.
            It raises ValueError, with what is said behind the key, for a value without meaning.
        literal: whether a text that is a Python literal means the literal.
        bare: what it means on a command line without a value; empty: it needs one.
        help: what it is, in a few words; empty: the fields say it.
    """

    targets: tuple[str, ...]
    read: Callable[[Any, Given], Mapping[str, Any]]
    literal: bool = True
    bare: str = ""
    help: str = ""


CardOptions = Mapping[str, str | tuple[str, ...] | CardKey]
"""A model's own names, by name: a field, several ``field=value``, or a card key."""


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    kind: str = "",
    bare: str = "",
) -> Any:
    """A field of a config section.

    Args:
        default: the value when nothing sets it; a list is copied for each instance.
        help: what it is, with its unit, in a few words.
        at_least: smallest value allowed, of a list: for each number in it.
        more_than: bound that the value must exceed.
        at_most: largest value allowed.
        choices: the only texts allowed.
        kind: ``path`` for a file or directory, ``checkpoint`` for a weights file, ``weights`` for
            one that may also be a bare name or an address: the launcher makes relative ones
            absolute, checks checkpoints, and finds or fetches weights.
        bare: what the option means when it stands without a value (``--resume``).
    """
    metadata = {
        "help": help,
        "at_least": at_least,
        "more_than": more_than,
        "at_most": at_most,
        "choices": choices,
        "kind": kind,
        "bare": bare,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type[T]) -> T:
    """A nested section of a config, made anew for each instance."""
    made: T = dataclasses.field(default_factory=cls)
    return made


@dataclass
class PrecisionConfig:
    """Number formats, in apex's words."""

    opt_level: str = setting(
        "O0",
        "O0: float32. O1: autocast. O2: half-precision model, float32 norms and master weights",
        choices=("O0", "O1", "O2"),
    )
    dtype: str = setting(
        "auto",
        "half-precision format; auto: float16 on npu and cuda, bfloat16 on cpu",
        choices=("auto", "float16", "bfloat16"),
    )
    loss_scale: str = setting(
        "dynamic", "factor on the loss under float16: dynamic, or a positive number"
    )
    clip_grad: float = setting(
        0.0, "largest global gradient norm, in true units; 0: no clipping", at_least=0
    )
    accumulate: int = setting(
        1, "parts that a batch is cut into to save memory, one backward pass each", at_least=1
    )


@dataclass
class RunConfig:
    """What a run is, apart from what it trains."""

    device: str = setting("auto", "npu, cuda, cpu, or auto: the first of them that is there")
    device_id: int = setting(0, "index of the first card to use", at_least=0)
    output_dir: str = setting(
        "", "directory of logs, records and checkpoints [test/output/DEVICE_ID]", kind="path"
    )
    resume: str = setting(
        "",
        "continue from a checkpoint file; alone: from the last one in the output directory",
        kind="checkpoint",
        bare="last",
    )
    auto_resume: bool = setting(
        False,
        "continue the run that the output directory holds; start one where it holds none",
    )
    id: str = setting("", "name of the run in its checkpoints, made by the launcher")
    seed: int = setting(0, "seed of weights, data order and augmentation", at_least=0)
    threads: int = setting(
        0, "CPU threads of each process; 0: its share of the cores, or OMP_NUM_THREADS", at_least=0
    )
    deterministic: bool = setting(False, "only operators that give the same bits every time")
    float32: str = setting(
        "auto",
        "arithmetic of float32 convolutions and matrix products; hf32 is TF32 on cuda",
        choices=("auto", "fp32", "hf32"),
    )
    jit_compile: str = setting(
        "auto",
        "compile operators for each new shape on an NPU; auto is off",
        choices=("auto", "on", "off"),
        bare="on",
    )
    internal_format: str = setting(
        "auto",
        "let an NPU keep tensors in layouts of its own; auto is off",
        choices=("auto", "on", "off"),
        bare="on",
    )
    max_steps: int = setting(0, "stop after this many optimizer steps; 0: no limit", at_least=0)
    warmup_steps: int = setting(10, "first steps that throughput leaves out", at_least=0)
    log_every: int = setting(10, "steps between two lines of the record", at_least=1)
    profile: int = setting(
        0, "trace this many steps after warm-up into OUTPUT_DIR/profile", at_least=0, bare="10"
    )
    save_every: int = setting(
        0, "steps between two checkpoints; 0: what the recipe says", at_least=0
    )
    keep_checkpoints: int = setting(
        2, "newest checkpoints to keep, beside the best one", at_least=1
    )
    save_in_background: bool = setting(
        True, "train on while a checkpoint is written; takes the memory of a copy"
    )
    on_save_error: str = setting(
        "stop",
        "a checkpoint that cannot be written: stop the run, or continue to the next one",
        choices=("stop", "continue"),
    )
    save_timeout_s: int = setting(
        900, "seconds that the disk may take to write a checkpoint", at_least=1
    )
    spike_factor: float = setting(
        20.0, "how far above its usual spread a loss stops the run; 0: never", at_least=0
    )
    skip_bad_steps: int = setting(
        0,
        "steps with a loss that is not finite or a spike to leave out before stopping; above 0, "
        "each step reads its loss",
        at_least=0,
    )
    hang_timeout_s: int = setting(
        1800, "seconds without a step or a batch before the run is ended as hung", at_least=1
    )
    timeout_s: int = setting(
        1900, "seconds that a collective may wait for the other ranks", at_least=1
    )
    stop_grace_s: int = setting(
        600, "seconds that a stopped run has to save its checkpoint", at_least=0
    )


@dataclass
class LaunchConfig:
    """Where the processes of a run are."""

    processes: int = setting(0, "processes on each node; 0: what the run says", at_least=0)
    nnodes: str = setting("1", "number of machines, or MIN:MAX for as many as come")
    node_rank: int = setting(0, "index of this machine, from 0", at_least=0)
    master_addr: str = setting("", "address of machine 0 [127.0.0.1]")
    master_port: int = setting(
        0, "port on machine 0; 0: a free one (one machine only)", at_least=0, at_most=65535
    )
    local_addr: str = setting(
        "", "address of this machine for HCCL and gloo [the one that reaches master_addr]"
    )
    max_restarts: int = setting(
        0, "times that a run goes on from its last checkpoint after a rank failed", at_least=0
    )
    join_timeout_s: int = setting(
        600, "seconds to wait for the other machines at the start", at_least=1
    )
    last_call_s: int = setting(
        30, "seconds to wait for machines beyond MIN of --nnodes=MIN:MAX", at_least=0
    )
    lost_after_s: int = setting(
        30, "seconds without a word of a machine before it is taken for lost", at_least=1
    )


def node_range(launch: LaunchConfig) -> tuple[int, int]:
    """The least and the most machines of ``launch.nnodes``.

    Raises:
        UserError: it is neither a number nor MIN:MAX.
    """
    parts = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", launch.nnodes, re.ASCII)
    least, most = (int(parts[1]), int(parts[2] or parts[1])) if parts else (0, 0)
    if not 1 <= least <= most:
        raise UserError(
            f"--nnodes={launch.nnodes} must be a number of machines from 1 on, or MIN:MAX with MIN "
            "not above MAX, as 2:4."
        )
    return least, most


COMMON_OPTIONS: dict[str, str | tuple[str, ...]] = {
    "--data_path": "data.path",
    "--batch_size": "data.batch_size",
    "--workers": "data.workers",
    "--device": "run.device",
    "--device_id": "run.device_id",
    "--output_dir": "run.output_dir",
    "--resume": "run.resume",
    "--auto_resume": "run.auto_resume",
    "--save_every": "run.save_every",
    "--keep_checkpoints": "run.keep_checkpoints",
    "--on_save_error": "run.on_save_error",
    "--skip_bad_steps": "run.skip_bad_steps",
    "--seed": "run.seed",
    "--max_steps": "run.max_steps",
    "--profile": "run.profile",
    "--deterministic": "run.deterministic",
    "--jit_compile": "run.jit_compile",
    "--internal_format": "run.internal_format",
    "--amp": "precision.opt_level",
    "--dtype": "precision.dtype",
    "--loss_scale": "precision.loss_scale",
    "--hf32": ("run.float32=hf32", "precision.opt_level=O0"),
    "--fp32": ("run.float32=fp32", "precision.opt_level=O0"),
    "--nnodes": "launch.nnodes",
    "--node_rank": "launch.node_rank",
    "--master_addr": "launch.master_addr",
    "--master_port": "launch.master_port",
    "--local_addr": "launch.local_addr",
    "--max_restarts": "launch.max_restarts",
    "--processes": "launch.processes",
}


@dataclass(frozen=True)
class Field:
    """A leaf of a config schema."""

    path: str
    type: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def help(self) -> str:
        """What the field is, in a few words."""
        return str(self.metadata.get("help", ""))


def fields_of(schema: type, prefix: str = "") -> list[Field]:
    """All leaves of a config schema, in the order of their definition."""
    hints = typing.get_type_hints(schema)
    leaves: list[Field] = []
    for item in dataclasses.fields(schema):
        path = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            leaves += fields_of(hints[item.name], path + ".")
            continue
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        else:
            default = item.default
        leaves.append(Field(path, hints[item.name], default, item.metadata))
    return leaves


def options_of(schema: type, card_options: CardOptions | None = None) -> list[Option]:
    """The options of a model: the common ones whose field it has, and those of its card.

    Args:
        schema: the model's config dataclass.
        card_options: the model's own names.
    """
    by_path = {field.path: field for field in fields_of(schema)}
    known: CardOptions = {
        name: targets
        for name, targets in COMMON_OPTIONS.items()
        if all(target.partition("=")[0] in by_path for target in _as_tuple(targets))
    }
    keys = _card_keys(card_options, by_path)
    table = {**known, **(card_options or {})}
    return [
        Option(name, keys[name].targets, "key", keys[name].bare, keys[name].help)
        if name in keys
        else _option(name, _as_tuple(targets), by_path)
        for name, targets in table.items()
    ]


def _as_tuple(targets: str | tuple[str, ...] | CardKey) -> tuple[str, ...]:
    if isinstance(targets, CardKey):
        return targets.targets
    return (targets,) if isinstance(targets, str) else targets


def _card_keys(
    card_options: CardOptions | None, by_path: Mapping[str, Field]
) -> dict[str, CardKey]:
    keys = {}
    for name, entry in (card_options or {}).items():
        if isinstance(entry, CardKey):
            keys[name] = entry
        elif isinstance(entry, str) and not name.startswith("--"):
            literal = by_path[entry].type is not str
            keys[name] = CardKey((entry,), partial(_as_it_is, entry), literal)
    return keys


def _as_it_is(path: str, value: Any, given: Given) -> Mapping[str, Any]:
    return {path: value}


def _option(name: str, targets: tuple[str, ...], by_path: Mapping[str, Field]) -> Option:
    if all("=" in target for target in targets):
        return Option(name, targets, "flag")
    field = by_path[targets[0].partition("=")[0]]
    if field.type is bool:
        return Option(name, targets, "switch")
    bare = str(field.metadata.get("bare", ""))
    return Option(name, targets, "optional" if bare else "value", bare)


def load_config(
    schema: type[T],
    argv: Sequence[str],
    card_options: CardOptions | None = None,
) -> T:
    """Reads ``--config FILE`` and options into a checked config.

    Args:
        schema: the model's config dataclass.
        argv: the command line without the program's name.
        card_options: the model's own names.

    Raises:
        UserError: a file that cannot be read, an unknown key, a value of the wrong type or out
            of bounds; the message names the option or the file and key.
    """
    file, words = take_config_file(argv)
    files = [] if file is None else [file]
    paths = [field.path for field in fields_of(schema)]
    assignments = parse(words, options_of(schema, card_options), paths)
    return build_config(schema, files, assignments, card_options)


def take_config_file(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Splits a command line into the file that ``--config`` names and the other words.

    ``--config-file`` is the same, because two of the cards call it so.

    Raises:
        UserError: the option stands without a file.
    """
    rest = list(words)
    for index, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name not in ("--config", "--config-file", "--config_file"):
            continue
        if not equals and index + 1 == len(rest):
            raise UserError(f"{name} needs a value: write {name}=FILE.yaml.")
        chosen = value if equals else rest.pop(index + 1)
        del rest[index]
        return Path(chosen), rest
    return None, rest


def build_config(
    schema: type[T],
    files: Iterable[Path],
    assignments: Iterable[Assignment],
    card_options: CardOptions | None = None,
) -> T:
    """Merges the schema's defaults, YAML files and assignments, later ones winning.

    Raises:
        UserError: as :func:`load_config`.
    """
    by_path = {field.path: field for field in fields_of(schema)}
    keys = _card_keys(card_options, by_path)
    entries = _entries(files, assignments)
    for name, entry in entries.items():
        if name not in by_path and name not in keys:
            raise UserError(_unknown_setting(name, entry.origin, by_path, keys))
    given = {
        name: _literal(entry.value) if keys[name].literal else entry.value
        for name, entry in entries.items()
        if name in keys
    }
    written: dict[str, str] = {}
    merged = OmegaConf.structured(schema)
    for name, entry in entries.items():
        for path, value in _read(name, entry, by_path, keys, given):
            _set(merged, by_path[path], value, entry.origin)
            written[path] = entry.origin
    for field in by_path.values():
        value = OmegaConf.select(merged, field.path)
        _check_bounds(field, value, written.get(field.path, field.path))
    built: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    return built


@dataclass(frozen=True)
class _Entry:
    """What a file or a command line says of a name; ``origin`` is how messages call it."""

    value: Any
    origin: str
    is_text: bool = False


def _entries(files: Iterable[Path], assignments: Iterable[Assignment]) -> dict[str, _Entry]:
    """All that was written, by name; of several entries the last, at its place in the order."""
    entries: dict[str, _Entry] = {}

    def put(name: str, entry: _Entry) -> None:
        entries.pop(name, None)
        entries[name] = entry

    for file in files:
        for layer, tree in _layers(file):
            for name, value in flatten(tree):
                put(name, _Entry(value, f"{name:.200} in {layer}"))
    for assignment in assignments:
        put(assignment.path, _Entry(assignment.text, f"{assignment.written:.200}", is_text=True))
    return entries


def _read(
    name: str,
    entry: _Entry,
    by_path: Mapping[str, Field],
    keys: Mapping[str, CardKey],
    given: Given,
) -> Iterable[tuple[str, Any]]:
    """The fields that an entry sets, and to what."""
    if name not in keys:
        value = entry.value
        return [(name, _from_text(by_path[name], value, entry.origin) if entry.is_text else value)]
    try:
        return keys[name].read(given[name], given).items()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{entry.origin}: {one_line(error, 1000)}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise UserError(
            f"{entry.origin}: {entry.value!r:.60} is not of the form that this setting has; "
            "write it as the original's configs do."
        ) from error


def _literal(value: Any) -> Any:
    """The literal that a text may stand for, or the value itself; tuples become lists."""
    if not isinstance(value, str):
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\\d" in what is a path after all
            return _with_lists(ast.literal_eval(value.strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _with_lists(value: Any) -> Any:
    return [_with_lists(item) for item in value] if isinstance(value, tuple | list) else value


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, every field present."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML mapping; ``_base_: other.yaml`` names a file that it builds on.

    Raises:
        UserError: the file is absent, not YAML, not a mapping, or its bases form a circle.
    """
    content: dict[str, Any] = {}
    for _, tree in _layers(file):
        content = _merged(content, tree)
    return content


def _layers(file: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """A file and those that it builds on, the lowest first."""
    if file.resolve() in seen:
        raise UserError(f"{file} is its own {BASE_KEYS[0]}: remove the circle.")
    loaded = _load_yaml(file)
    bases = [str(loaded.pop(key)) for key in BASE_KEYS if loaded.get(key)]
    below: list[tuple[Path, dict[str, Any]]] = []
    for base in bases:
        try:
            above = file.parent / Path(base).expanduser()
            above.resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{file}: {BASE_KEYS[0]} {base!r:.60} is no file: {error}.") from error
        below += _layers(above, (*seen, file.resolve()))
    return [*below, (file, loaded)]


def _load_yaml(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml_text.parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the config {str(file)[:300]}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"The config {file} is not valid YAML: {error}.") from error
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise UserError(f"The config {file} holds no mapping of sections, but {loaded!r:.60}.")
    return loaded


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of nested mappings, with dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _unknown_setting(
    name: str, origin: str, by_path: Mapping[str, Field], keys: Mapping[str, CardKey]
) -> str:
    guess = nearest(name, [*by_path, *keys])
    hint = f"did you mean {guess}?" if guess else f"known are {', '.join(sorted(by_path))}."
    return f"Unknown setting {origin}: {hint}"


def _from_text(field: Field, text: str, written: str) -> Any:
    """A command line's text as the field's type; texts that are no such value fail later."""
    if _plain(field.type) is bool:
        truth = is_true(text)
        if truth is None:
            raise UserError(f"{written}: {text!r:.200} is neither true nor false.")
        return truth
    if _plain(field.type) is str:
        return text
    if typing.get_origin(field.type) is list:
        try:
            return yaml_text.parse(text if text.startswith("[") else f"[{text}]")
        except ValueError as error:
            raise UserError(f"{written}: {text!r:.60} is no list; write [a, b].") from error
    return text


def _plain(hint: Any) -> Any:
    """The type inside ``X | None``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _escaped(value: Any) -> Any:
    """A path may hold what OmegaConf would take for an environment variable to fill in."""
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value)


def _set(merged: Any, field: Field, value: Any, origin: str) -> None:
    if isinstance(value, bool) and "on" in field.metadata.get("choices", ()):
        value = "on" if value else "off"  # YAML takes these words for truth values
    try:
        OmegaConf.update(merged, field.path, _escaped(value))
        found = OmegaConf.select(merged, field.path)  # raises for a "${x}" that is no text
        if OmegaConf.is_config(found):
            OmegaConf.to_container(found, resolve=True)
    except (
        omegaconf.errors.OmegaConfBaseException,
        ArithmeticError,
        ValueError,
        TypeError,
    ) as error:
        plain = _plain(field.type)
        wanted = str(plain) if typing.get_origin(plain) else plain.__name__
        raise UserError(
            f"{origin}: {field.path} must be of type {wanted}, but got {value!r:.200}."
        ) from error


def _check_bounds(field: Field, value: Any, origin: str) -> None:
    meta = field.metadata
    name = origin if field.path in origin else f"{origin}: {field.path}"
    if meta.get("choices") and value not in meta["choices"]:
        guess = nearest(str(value), meta["choices"])
        hint = f" (did you mean {guess}?)" if guess else ""
        allowed = ", ".join(meta["choices"])
        raise UserError(f"{name} must be one of {allowed}, but is {value!r:.200}{hint}.")
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            _check_bounds(field, item, origin)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{name} must be a number that fits into 64 bits.")
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"{name} must be a finite number, but is {value}.")
    if meta.get("at_least") is not None and value < meta["at_least"]:
        raise UserError(f"{name} must be at least {meta['at_least']}, but is {value}.")
    if meta.get("more_than") is not None and value <= meta["more_than"]:
        raise UserError(f"{name} must be more than {meta['more_than']}, but is {value}.")
    if meta.get("at_most") is not None and value > meta["at_most"]:
        raise UserError(f"{name} must be at most {meta['at_most']}, but is {value}.")
