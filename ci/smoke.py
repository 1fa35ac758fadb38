"""Runs what test/runs.yaml gives a score for, and asserts the score; see smoke.sh."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from zoo_common.runs import RunSpec, load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from model_dirs import ModelDir, choose_model, find_models  # noqa: E402


def main(words: list[str]) -> int:
    """Checks the named model directories, or all; returns 1 if any score was not reached."""
    try:
        models = [choose_model(word) for word in words] or find_models()
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    passed = [
        smoke(model, name, spec)
        for model in models
        for name, spec in load(model.path).runs.items()
        if spec.score
    ]
    print(f"smoke: {sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if passed and all(passed) else 1


def smoke(model: ModelDir, name: str, spec: RunSpec) -> bool:
    """Runs one and prints what came out; whether its score was reached."""
    started = time.monotonic()
    what = f"smoke: {model.path.name} {name}"
    with tempfile.TemporaryDirectory(prefix="zoo smoke ") as scratch:
        output = Path(scratch) / "output"
        script = model.path / "test" / f"{name}.sh"
        words = ["--device=cpu", f"--output_dir={output}"]
        code = subprocess.run(["bash", script, *words]).returncode
        if code:
            print(f"{what} ended with exit code {code}", flush=True)
            return False
        result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    seconds = time.monotonic() - started
    passed = True
    for metric, least in spec.score.items():
        score = result["metrics"][metric]
        good = score >= least
        passed = passed and good
        verdict = "reaches" if good else "is below"
        print(f"{what}: {metric} {score:.2f} {verdict} {least:g}, {seconds:.0f} s", flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
