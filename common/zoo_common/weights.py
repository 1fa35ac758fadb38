"""Weights files of others and our own, by the names of a model of ours, and how they fit it.

A model's ``weights.py`` says which kinds of files there are for it: how each is told, which of
our names its tensors have, and the settings that its numbers belong to. What is done with them
is the same for every model and stands here. A name follows from a rule; nothing is guessed from
likeness. No file's code is run.

Pixel statistics and the like belong to weights as much as their numbers do: with others a network
computes without complaint, and badly. Where a file or its origin tells them, a config that
differs is an error.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo_common import checkpoint, pickles, yaml_text
from zoo_common.errors import UserError, one_line

_COUNTER = ".num_batches_tracked"  # changes no number: neither asked for nor reported


@dataclass(frozen=True)
class Content:
    """A file as it is.

    Attributes:
        path: the file.
        weights: tensors or arrays by the names that the file has for them.
        rest: what else stands in the file, by its keys.
    """

    path: Path
    weights: Mapping[str, "Tensor | np.ndarray[Any, Any]"]
    rest: Mapping[Any, Any]

    @property
    def is_zoo_checkpoint(self) -> bool:
        """Whether a run of this zoo wrote the file."""
        return "format" in self.rest and isinstance(self.rest.get("config"), str)

    def recorded(self, *names: str) -> dict[str, Any]:
        """Those settings of the section ``model`` that a checkpoint of this zoo has recorded."""
        try:
            section = (yaml_text.parse(self.rest["config"]) or {}).get("model", {})
            return {name: section[name] for name in names if name in section}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} has no readable config with its weights: give a checkpoint as the "
                "run wrote it."
            ) from error


@dataclass
class WeightsFile:
    """What a file holds, with our names.

    Attributes:
        path: the file.
        kind: the name of its kind.
        tensors: by the name in our state_dict.
        names: of each of them, the name in the file; none for those that the file only implies.
        implied: what the latter are, in words.
        left_over: names in the file that no model has a place for (an ImageNet classifier).
        settings: settings of the section ``model`` that the weights belong to, as far as known.
        fills: as its kind's.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    implied: str = ""
    left_over: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    fills: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of files with weights for a model.

    Attributes:
        name: stands in reports.
        is_of: whether a file is of this kind.
        rename: our name of a tensor; None where no model has a place for it, empty for constants
            that the config gives.
        fills: how our names begin of what a file must fill whole when a training starts from it;
            empty for all, but output layers of another shape.
        settings: settings of the section ``model`` that a file's weights belong to.
        finish: what is still to be done when all tensors have their names.
    """

    name: str
    is_of: Callable[[Content], bool]
    rename: Callable[[str], str | None]
    fills: str = ""
    settings: Callable[[Content], dict[str, Any]] = lambda content: {}
    finish: Callable[[WeightsFile], object] = lambda file: None


@dataclass
class Fit:
    """How a file fits a model; lists hold names of our state_dict, but ``left_over`` the file's.

    Attributes:
        file: the file.
        loaded: what the model takes.
        missing: what the file has not.
        left_over: what the model has not.
        other_shape: by name, the shapes in the file and in the model.
    """

    file: WeightsFile
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def renamed(self) -> list[str]:
        """The loaded ones that have another name in the file."""
        return [key for key in self.loaded if self.file.names.get(key, key) != key]

    @property
    def implied(self) -> list[str]:
        """The loaded ones that the file only implies."""
        return [key for key in self.loaded if key not in self.file.names]

    def describe(self) -> str:
        """One line with counts and examples."""
        implied, renamed = self.implied, self.renamed
        count = len(self.loaded) - len(implied)
        parts = [f"{self.file.path.name} ({self.file.kind}): {count} tensors loaded"]
        if renamed:
            example = f"{self.file.names[renamed[0]]} -> {renamed[0]}"
            parts[0] += f", {len(renamed)} of them renamed ({example})"
        if implied:
            parts.append(f"{len(implied)} {self.file.implied}")
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_groups(self.missing)})")
        if self.other_shape:
            parts.append(f"{len(self.other_shape)} of another shape ({self._shapes()})")
        if self.left_over:
            parts.append(f"{len(self.left_over)} left over ({_groups(self.left_over)})")
        return "; ".join(parts)

    def details(self) -> str:
        """Every tensor on a line of its own."""
        lines = [f"{self.file.path} ({self.file.kind})"]
        for key in self.loaded:
            lines.append(f"  loaded    {key} <- {self.file.names.get(key, '(implied)')}")
        lines += [f"  missing   {key}" for key in self.missing]
        lines += [
            f"  shape     {key}: {_shape(there)} in the file, {_shape(here)} in the model"
            for key, (there, here) in self.other_shape.items()
        ]
        lines += [f"  left over {name}" for name in self.left_over]
        return "\n".join(lines)

    def _shapes(self) -> str:
        key, (there, here) = next(iter(self.other_shape.items()))
        more = ", ..." if len(self.other_shape) > 1 else ""
        return f"{key}: {_shape(there)} in the file, {_shape(here)} in the model{more}"


@dataclass(frozen=True)
class Reader:
    """Reads the weights of one family of detectors.

    Attributes:
        kinds: what is read; a file is of the first of them that it fits.
        known: these kinds in words, for who gave another file.
        outputs: how our names begin of what may have another shape when a training starts.
        class_layer: our name of a tensor that has a row for each class.
        background: rows of it that stand for no class.
        network_settings: the settings that decide which weights fit, for messages.
        additions: parts of our names of what a network may have beside another's weights when a
            training starts, and which starts as initialised then.
    """

    kinds: tuple[Kind, ...]
    known: str
    outputs: tuple[str, ...]
    class_layer: str
    background: int
    network_settings: str
    additions: tuple[str, ...] = ()

    def read(self, path: Path) -> WeightsFile:
        """Reads a weights file of any kind that is known, and runs nothing in it.

        Raises:
            UserError: the file is absent, damaged or refused, or holds no weights of a known kind.
        """
        content = read_content(path)
        kind = next((kind for kind in self.kinds if kind.is_of(content)), None)
        if kind is None:
            raise UserError(
                f"{path} holds weights of no kind that is known here (its names begin with "
                f"{', '.join(list(content.weights)[:3]) or 'none'}): give {self.known}."
            )
        try:
            return _renamed(content, kind)
        except UserError:
            raise
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} has the names of {kind.name} and other shapes ({one_line(error)}): get a "
                "whole file."
            ) from error

    def load_start(
        self, model: nn.Module, path: str | Path, config: object, *, full: bool = False
    ) -> str:
        """Fills a model with the weights that its training starts from.

        What such a file is of, a backbone at least, must be filled whole. What else it has not,
        and output layers of another shape (for another number of classes), stay as initialised
        and are reported.

        Args:
            model: of our names.
            path: the file.
            config: section ``model`` of the config.
            full: report every tensor rather than counts and examples.

        Returns:
            What was loaded, renamed, missing or left over.

        Raises:
            UserError: the file cannot be used, belongs to other settings, or is of another
                network.
        """
        file = self.read(Path(path))
        check_settings(file, config)
        fit = match(file, model)
        own = model.state_dict()
        wrong = [key for key in fit.missing if not any(part in key for part in self.additions)]
        wrong += [key for key in file.tensors if key not in own]
        wrong = [key for key in wrong if key.startswith(file.fills)]
        wrong += [key for key in fit.other_shape if not key.startswith(self.outputs)]
        if wrong:
            raise UserError(
                f"{path} holds the weights of another network ({fit.describe()}): choose the file "
                f"or the settings {self.network_settings} that fit ({_groups(wrong)})."
            )
        fill(model, fit)
        notes = [fit.details() if full else fit.describe()]
        if fit.missing or fit.other_shape:
            reason = self._classes(fit)
            notes.append(
                f"{len(fit.missing) + len(fit.other_shape)} tensors stay as initialised"
                + (f" ({reason})" if reason else "")
            )
        return ("\n" if full else "; ").join(notes)

    def load_for_evaluation(
        self,
        model: nn.Module,
        path: str | Path,
        config: object | None = None,
        *,
        full: bool = False,
    ) -> str:
        """Fills a model whole, to evaluate it or to predict with it.

        Args:
            model: of our names.
            path: the file.
            config: section ``model`` of the config; None leaves its settings unchecked.
            full: report every tensor rather than counts and examples.

        Returns:
            What was loaded, renamed or left over.

        Raises:
            UserError: the file cannot be used, belongs to other settings, or does not fill the
                model exactly; the message names keys and class counts.
        """
        file = self.read(Path(path))
        if config is not None:
            check_settings(file, config)
        fit = match(file, model)
        if fit.missing or fit.other_shape or set(fit.left_over) != set(file.left_over):
            reason = self._classes(fit)
            raise UserError(
                f"{path} is not of this model: {fit.describe()}"
                + (f"; {reason}" if reason else "")
                + ": give the weights and the config that belong together."
            )
        fill(model, fit)
        return fit.details() if full else fit.describe()

    def count_classes(self, path: str | Path) -> int:
        """The classes that the detector in a file knows.

        Raises:
            UserError: the file cannot be used, or holds no detector.
        """
        rows = self.read(Path(path)).tensors.get(self.class_layer)
        if rows is None or rows.ndim == 0:
            raise UserError(f"{path} holds no detector, but a backbone: give a trained one.")
        return len(rows) - self.background

    def _classes(self, fit: Fit) -> str:
        """Both class counts, where they differ; empty otherwise."""
        if self.class_layer not in fit.other_shape:
            return ""
        there, here = (shape[0] - self.background for shape in fit.other_shape[self.class_layer])
        return f"the file has {there} classes, the model {here}"


def _renamed(content: Content, kind: Kind) -> WeightsFile:
    """A file's tensors under our names."""
    settings = kind.settings(content)
    file = WeightsFile(content.path, kind.name, settings=settings, fills=kind.fills)
    for name, value in content.weights.items():
        if name.endswith(_COUNTER):
            continue
        key = kind.rename(name)
        if key is None:
            file.left_over.append(name)
        elif key:
            file.tensors[key] = _tensor(value)
            file.names[key] = name
    kind.finish(file)
    return file


def read_content(path: Path) -> Content:
    """Reads a checkpoint of torch, or a pickle of arrays, of any layout.

    Raises:
        UserError: the file is absent, damaged or refused, or holds no weights.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise UserError(f"Cannot read the weights {path}: {error.strerror}.") from error
    if pickles.is_pickle(head):
        rest = pickles.load_arrays(path)
        for name in ("model", "blobs"):
            if not isinstance(rest.get(name, {}), dict):
                raise UserError(f"{path} holds no dict of arrays under {name!r}: get a whole file.")
    else:
        rest = checkpoint.load(path)
    weights = {
        str(name): value
        for name, value in rest.get("model", rest.get("blobs", rest)).items()
        if isinstance(value, (Tensor, np.ndarray)) and not str(name).endswith("_momentum")
    }
    return Content(path, checkpoint.without_prefix(weights), rest)


def check_settings(file: WeightsFile, config: object) -> None:
    """Compares the section ``model`` of a config with what the weights belong to.

    Raises:
        UserError: they differ; the message gives the settings to write.
    """
    wrong = {
        name: value
        for name, value in file.settings.items()
        if not _same(getattr(config, name), value)
    }
    if wrong:
        wanted = " ".join(f"model.{name}={_written(value)}" for name, value in wrong.items())
        found = " ".join(f"model.{name}={_written(getattr(config, name))}" for name in wrong)
        raise UserError(
            f"{file.path} ({file.kind}) belongs to other settings than the config has ({found}): "
            f"set {wanted}, or choose other weights."
        )


def match(file: WeightsFile, model: nn.Module) -> Fit:
    """Compares names and shapes with a model's state_dict."""
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(_COUNTER)}
    fit = Fit(file, left_over=list(file.left_over))
    for key, value in own.items():
        found = file.tensors.get(key)
        if found is None:
            fit.missing.append(key)
        elif found.shape != value.shape:
            fit.other_shape[key] = (tuple(found.shape), tuple(value.shape))
        else:
            fit.loaded.append(key)
    fit.left_over += [name for key, name in file.names.items() if key not in own]
    return fit


def fill(model: nn.Module, fit: Fit) -> None:
    """Gives a model what fits; the rest of it stays as it is.

    Raises:
        UserError: a tensor is there in name only.
    """
    empty = [key for key in fit.loaded if fit.file.tensors[key].is_meta]
    if empty:
        raise UserError(f"{fit.file.path} has no numbers for {_groups(empty)}: get a whole file.")
    own = model.state_dict()  # with the versions of its modules, which a new dict would lose
    own.update({key: fit.file.tensors[key] for key in fit.loaded})
    model.load_state_dict(own)


def _tensor(value: "Tensor | np.ndarray[Any, Any]") -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, list):
        try:
            return len(one) == len(other) and bool(np.allclose(one, other, rtol=0, atol=2e-3))
        except (TypeError, ValueError, OverflowError):  # the file has no numbers there
            return False
    return bool(one == other)


def _written(value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else f"{value!s:.200}"


def _shape(lengths: tuple[int, ...]) -> str:
    return "x".join(map(str, lengths)) or "a number"


def _groups(names: list[str]) -> str:
    """Names, cut to their first parts, a few of them."""
    heads = list(dict.fromkeys(re.sub(r"\.[a-z_]+$", "", name[:100]) for name in names))
    return ", ".join(heads[:4]) + (", ..." if len(heads) > 4 else "")
