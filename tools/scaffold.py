"""Writes the skeleton of a new model directory.

    python tools/scaffold.py NAME DIRECTORY [--title TEXT]
    python tools/scaffold.py glip built-in/others/GLIP_for_PyTorch --title "GLIP detection"

The files come from tools/scaffold_files/, env_npu.sh from a model that is there. The package is
listed in [tool.importlinter] of pyproject.toml.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from model_dirs import GROUPS, ROOT, find_models

TEMPLATES = ROOT / "tools" / "scaffold_files"
SUFFIX = ".in"
PACKAGE_LIST = re.compile(
    r"^((?:root_packages|forbidden_modules|modules|source_modules) = \[)(.*)\]$", re.MULTILINE
)
NOT_OF_MODELS = ('"zoo_common"', '"npu_sim"', '"torch_npu"')


def refusal(name: str, place: Path, root: Path) -> str | None:
    """Why there can be no model of that name in that directory, or None."""
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        return f"The name {name!r} must be a Python package's: lower-case letters and digits."
    parts = place.parts
    if place.is_absolute() or ".." in parts or parts[0] not in GROUPS or len(parts) not in (3, 4):
        return f"{place} must be like contrib/cv/detection/SOLOv2 or built-in/others/Name."
    if (root / place).exists():
        return f"{place} is there already: choose another directory."
    if name in [model.name for model in find_models(root)]:
        return f"There is a model {name} already: choose another name."
    return None


def write_skeleton(name: str, place: Path, title: str, root: Path) -> list[Path]:
    """Writes the files of a model directory; returns them."""
    words = {
        "@NAME@": name,
        "@PACKAGE@": name,
        "@NETWORK@": place.name,
        "@TITLE@": title,
        "@UP@": "/".join([".."] * len(place.parts)),
    }
    target = root / place
    env_script = find_models(root)[0].path / "test" / "env_npu.sh"  # before this one is there
    written = []
    for template in sorted(TEMPLATES.rglob(f"*{SUFFIX}")):
        relative = template.relative_to(TEMPLATES).as_posix().removesuffix(SUFFIX)
        file = target / relative.replace("PACKAGE", name)
        text = template.read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(word, value)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        written.append(file)
    for source, file in ((root / "LICENSE", target / "LICENSE"), (env_script, target / "test")):
        written.append(Path(shutil.copy(source, file)))
    return written


def list_package(name: str, project: Path) -> None:
    """Adds a package to every list of models in [tool.importlinter]."""
    text = project.read_text(encoding="utf-8")

    def longer(match: re.Match[str]) -> str:
        if match[2] in NOT_OF_MODELS:
            return match[0]
        return f'{match[1]}{match[2]}, "{name}"]'

    project.write_text(PACKAGE_LIST.sub(longer, text), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Writes the skeleton and says what comes next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="what people and Python call it: glip")
    parser.add_argument("directory", type=Path, help="built-in/others/GLIP_for_PyTorch")
    parser.add_argument("--title", help="a few words for the README [the directory's name]")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository [this one]")
    arguments = parser.parse_args(argv)
    root = arguments.root.resolve()
    name, place = arguments.name, arguments.directory
    why_not = refusal(name, place, root)
    if why_not:
        print(why_not, file=sys.stderr)
        return 2
    for file in write_skeleton(name, place, arguments.title or place.name, root):
        print(file.relative_to(root))
    list_package(name, root / "pyproject.toml")
    print(
        f"\nNext: bash tools/quickstart.sh installs it; write {name}/config.py, model.py, data.py "
        "and train.py; python tools/tables.py; bash ci/lint.sh. CONTRIBUTING.md tells more."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
