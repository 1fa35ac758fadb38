"""Finds the model directories of the repository. Standard library only."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ("built-in", "contrib")
_NAME = re.compile(r'^name\s*=\s*"zoo-([a-z0-9-]+)"\s*$', re.MULTILINE)


@dataclass(frozen=True)
class ModelDir:
    """A model directory.

    Attributes:
        name: what people call it: the project's name without ``zoo-``, and its Python package.
        path: the directory, absolute.
    """

    name: str
    path: Path

    @property
    def package(self) -> Path:
        """The directory of its Python package."""
        return self.path / self.name.replace("-", "_")


def find_models(root: Path = ROOT) -> list[ModelDir]:
    """All directories two or three levels below ``built-in`` and ``contrib`` with a project."""
    found = []
    for group in GROUPS:
        for depth in ("*/*", "*/*/*"):
            for project in (root / group).glob(f"{depth}/pyproject.toml"):
                match = _NAME.search(project.read_text(encoding="utf-8"))
                if match:
                    found.append(ModelDir(match[1], project.parent))
    return sorted(found, key=lambda model: model.name)


def choose_model(word: str, root: Path = ROOT) -> ModelDir:
    """The model of that name, or in that directory.

    Args:
        word: ``twins``, ``Twins-ALTGVT-S``, or a path of the directory.
        root: the repository.

    Raises:
        LookupError: there is none; the message lists those that exist.
    """
    models = find_models(root)
    for model in models:
        if word in (model.name, model.path.name) or Path(word).resolve() == model.path:
            return model
    names = ", ".join(model.name for model in models) or "none yet"
    raise LookupError(f"There is no model {word!r} here; there is: {names}.")
