"""What a model directory says of its runs: ``test/runs.yaml`` and the package's config.

``test/runs.yaml``::

    network: Twins-ALTGVT-S         # the name in reports
    package: twins                  # <package>.config: Config, CARD_OPTIONS, maybe check, ...
    runs:
      train_full_8p:                # one for each test/<run>.sh
        help: ...
        entry: twins.train          # module with main(argv)
        devices: 8
        kind: acc                   # acc | perf | eval
        config: configs/alt_gvt_small.yaml
        layout: imagenet            # what --data_path must look like
        settings: {data.batch_size: 128}
        required: [weights.finetune]                # settings that the user must give
        score: {top1: 85.0}         # least metrics, which ci/smoke.sh asserts
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo_common.config import (
    CardOptions,
    Field,
    build_config,
    fields_of,
    node_range,
    options_of,
    read_yaml,
    take_config_file,
)
from zoo_common.errors import UserError, first_line
from zoo_common.options import Assignment, Option, nearest, parse

CALLER_VARIABLE = "ZOO_CALLER_DIR"
"""The directory in which the user called a run's script."""

KINDS = ("acc", "perf", "eval")


@dataclass
class RunSpec:
    """One run of a model directory, see the module's docstring."""

    help: str
    entry: str
    devices: int
    kind: str
    config: str
    layout: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    required: list[str] = field(default_factory=list)
    score: dict[str, float] = field(default_factory=dict)


@dataclass
class _RunsFile:
    network: str
    package: str
    runs: dict[str, RunSpec]


@dataclass(frozen=True)
class Model:
    """A model directory: its runs, and its package's config schema and options."""

    directory: Path
    network: str
    runs: Mapping[str, RunSpec]
    schema: type
    card_options: CardOptions
    check: Callable[[Any, int, str], None] | None = None
    """Tells, before anything starts, a config whose settings do not fit one another, from the
    config, the number of processes on all machines, and the run's kind."""
    their_configs: Mapping[str, str] = field(default_factory=dict)
    """The original's Python configs by file name, and the file here that has the recipe of each."""
    for_world: Callable[[Any, int], Any] | None = None
    """The config for a number of processes other than the most, from both."""
    check_files: Callable[[Any, str], None] | None = None
    """Tells, before anything starts, what a run needs beside its data set and has not, from the
    config, whose data set was found, and the run's kind."""

    def run(self, name: str) -> RunSpec:
        """The run of that name.

        Raises:
            UserError: there is none; the message names the nearest.
        """
        if name in self.runs:
            return self.runs[name]
        guess = nearest(name, self.runs)
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(self.runs)}."
        raise UserError(f"{self.network} has no run {name!r}: {hint}")

    def options(self) -> list[Option]:
        """The options that every run of this model takes, and that set something."""
        return [option for option in self._words() if option.targets]

    def _words(self) -> list[Option]:
        return options_of(self.schema, self.card_options)

    def fields(self) -> list[Field]:
        """All settings of this model's config."""
        return fields_of(self.schema)

    def config(
        self, spec: RunSpec, words: list[str], environment: Mapping[str, str] | None = None
    ) -> Any:
        """The config of a run: its YAML file, its settings, then the user's words.

        Args:
            spec: the run.
            words: the user's options; ``--config FILE`` among them replaces the run's file.
            environment: where ASCEND_DEVICE_ID is looked up, as the original's scripts do.

        Raises:
            UserError: see :func:`zoo_common.config.load_config`; or settings that do not fit one
                another on one of the numbers of machines that ``--nnodes`` allows.
        """
        file, rest = take_config_file(words)
        own = [
            Assignment(path, str(value), f"{path} in test/runs.yaml")
            for path, value in spec.settings.items()
        ]
        device_id = (environment or {}).get("ASCEND_DEVICE_ID")
        if device_id:
            own.append(Assignment("run.device_id", device_id, "ASCEND_DEVICE_ID"))
        paths = [item.path for item in self.fields()]
        given = parse(rest, self._words(), paths)
        chosen = self._found(file, environment or {}) if file else self.directory / spec.config
        config: Any = build_config(self.schema, [chosen], own + given, self.card_options)
        config.launch.processes = config.launch.processes or spec.devices
        self._check_worlds(config, spec.kind)
        return config

    def _check_worlds(self, config: Any, kind: str) -> None:
        least, most = node_range(config.launch)
        processes, check = config.launch.processes, self.check
        if least < most and self.for_world is None and kind != "eval":
            raise UserError(
                f"--nnodes={config.launch.nnodes}: {self.network} has no recipe for a number of "
                "machines that changes: give one number."
            )
        if check is None:
            return
        check(config, processes * most, kind)
        for nodes in range(least, most):
            scaled = config
            if self.for_world is not None and kind != "eval":
                scaled = self.for_world(config, processes * nodes)
            check(scaled, processes * nodes, kind)

    def _found(self, file: Path, environment: Mapping[str, str]) -> Path:
        """A config file as the user names it: from where they stand, or from the model."""
        if file.suffix == ".py":
            ours = self.their_configs.get(file.name)
            advice = f"its recipe is {ours}" if ours else "give a YAML file, as those in configs"
            raise UserError(f"--config={file}: configs in Python are not run here: {advice}.")
        try:
            seen = Path(environment.get(CALLER_VARIABLE, ".")) / file.expanduser()
            return seen if seen.exists() else self.directory / file
        except (OSError, RuntimeError, ValueError) as error:  # too long, or nobody's home
            raise UserError(f"--config={str(file)[:100]} is no file ({error!s:.100}).") from error


def load(directory: Path) -> Model:
    """Reads a model directory.

    Raises:
        UserError: the directory has no ``test/runs.yaml`` or the file does not fit the schema.
    """
    file = directory / "test" / "runs.yaml"
    if not file.is_file():
        raise UserError(f"{directory} is no model directory: it has no test/runs.yaml.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(_RunsFile), read_yaml(file))
        content: _RunsFile = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except (
        OmegaConfBaseException,
        ArithmeticError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(f"{file} does not fit: {first_line(error):.200}.") from error
    for name, spec in content.runs.items():
        if spec.kind not in KINDS:
            raise UserError(f"{file}: kind of {name} must be one of {', '.join(KINDS)}.")
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    module = _config_of(content.package, file)
    return Model(
        directory,
        content.network,
        content.runs,
        module.Config,
        module.CARD_OPTIONS,
        getattr(module, "check", None),
        getattr(module, "THEIR_CONFIGS", {}),
        getattr(module, "for_world", None),
        getattr(module, "check_files", None),
    )


def _config_of(package: str, file: Path) -> ModuleType:
    """The module ``config`` of a model's package."""
    name = f"{package}.config"
    if package.isidentifier() and package.isascii():
        try:
            module = importlib.import_module(name)
            if hasattr(module, "Config") and hasattr(module, "CARD_OPTIONS"):
                return module
        except ModuleNotFoundError as error:
            if error.name not in (package, name):
                raise  # one that the package itself needs
    raise UserError(f"{file}: there is no package {package!r:.60} with a config of settings.")
