"""Trains a few steps in a copy of each model directory; see copy_out.sh."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from model_dirs import ModelDir, choose_model, find_models  # noqa: E402

STEPS = 4
LEAVE = ("output", "__pycache__", "*.egg-info", "build")
# Run in the copy: where the two packages come from.
WHERE = "import zoo_common, {package}; print(zoo_common.__file__); print({package}.__file__)"


def main(words: list[str]) -> int:
    """Checks the named model directories, or all; returns the exit code."""
    try:
        models = [choose_model(word) for word in words] or find_models()
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="zoo copy out ") as scratch:
        elsewhere = Path(scratch).resolve()
        environment = make_environment(elsewhere)
        for model in models:
            code = train_copy(model, elsewhere, environment)
            if code:
                print(f"{model.path.name} does not train away from the repository.")
                return code
            print(f"{model.path.name} trained {STEPS} steps away from the repository.", flush=True)
    return 0


def make_environment(elsewhere: Path) -> dict[str, str]:
    """A new virtual environment with zoo-common's wheel, and the variables that activate it.

    The other libraries are those of the running environment, appended by a .pth file. Python
    does not read the .pth files of a directory that is added so, hence the editable installs
    in it stay out of sight.
    """
    wheels, venv = elsewhere / "wheels", elsewhere / "venv"
    pip = [sys.executable, "-Im", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    source = elsewhere / "zoo-common"  # a build leaves files beside its sources
    shutil.copytree(ROOT / "common", source, ignore=shutil.ignore_patterns(*LEAVE, "tests"))
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", wheels, source], check=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)}))
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True)
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    variables = {**os.environ, "VIRTUAL_ENV": str(venv)}
    variables["PATH"] = f"{venv / 'bin'}{os.pathsep}{variables['PATH']}"
    for name in ("PYTHONPATH", "PYTHONHOME"):
        variables.pop(name, None)
    return variables


def train_copy(model: ModelDir, elsewhere: Path, environment: dict[str, str]) -> int:
    """Copies a model directory and trains a few steps there; returns the exit code."""
    copy = elsewhere / model.path.name
    shutil.copytree(model.path, copy, ignore=shutil.ignore_patterns(*LEAVE))
    python = Path(environment["VIRTUAL_ENV"]) / "bin" / "python"
    found = subprocess.run(
        [python, "-c", WHERE.format(package=model.package.name)],
        cwd=copy,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    strays = [file for file in found if not Path(file).is_relative_to(elsewhere)]
    if strays:
        print(f"The copy would import {', '.join(strays)}.")
        return 1
    script = copy / "test" / "train_smoke_1p.sh"
    words = ["--data_path=sample", "--device=cpu", f"--max_steps={STEPS}"]
    return subprocess.run(["bash", script, *words], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
