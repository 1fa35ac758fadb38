"""From a bare machine to a trained and evaluated model; started by tools/quickstart.sh."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import environment
from model_dirs import ROOT, ModelDir, choose_model, find_models

HELP = """\
usage: bash tools/quickstart.sh [MODEL] [--option=value ...]

Makes a virtual environment in .venv (about 6 GB, once), draws the sample data set, trains the
model's smoke recipe on the CPU, evaluates it, and says where everything is.

  MODEL   {models} [twins]

Options go to the run: --data_path=digits trains on real handwriting, --device=npu on an Ascend
card, and "bash test/train_smoke_1p.sh --help" in the model's directory lists them all."""


def main(argv: list[str]) -> int:
    """Runs the quickstart; returns the exit code of the training run."""
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP.format(models=", ".join(model.name for model in find_models())))
        return 0
    named = bool(argv) and not argv[0].startswith("-") and "=" not in argv[0]
    options = argv[1:] if named else argv
    try:
        model = choose_model(argv[0] if named else "twins")
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    code = environment.ensure()
    if code:
        return code
    print(f"Training the smoke recipe of {model.path.name}.", flush=True)
    started = time.time()
    code = run_smoke(model, options)
    if code:
        print(f"The run ended with exit code {code}, see the messages above.", file=sys.stderr)
        return code
    print(table(model, output_dir(model, options), time.time() - started))
    return 0


def run_smoke(model: ModelDir, options: list[str]) -> int:
    """Runs the model's smoke script in the repository's environment; returns its exit code."""
    venv = ROOT / ".venv"
    variables = {**os.environ, "VIRTUAL_ENV": str(venv)}
    variables["PATH"] = f"{venv / 'bin'}{os.pathsep}{variables.get('PATH', '')}"
    variables.pop("PYTHONHOME", None)
    script = model.path / "test" / "train_smoke_1p.sh"
    words = ["--data_path=sample", "--device=cpu", *options]
    child = subprocess.Popen(["bash", str(script), *words], env=variables)
    # The terminal sends Ctrl-C to both; the run saves a checkpoint, and this waits for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    code = child.wait()
    return code if code >= 0 else 128 - code


def output_dir(model: ModelDir, options: list[str]) -> Path:
    """Where the run has written, by the rules of the launcher."""
    named = {"output_dir": "", "device_id": os.environ.get("ASCEND_DEVICE_ID", "0")}
    for index, word in enumerate(options):
        name, equals, value = word.partition("=")
        key = name.lstrip("-").replace("-", "_")
        if key in named:
            named[key] = value if equals else options[index + 1]
    return Path(named["output_dir"] or model.path / "test" / "output" / named["device_id"])


def table(model: ModelDir, directory: Path, seconds: float) -> str:
    """The end of the quickstart: what came out, and where it stands."""
    result: dict[str, Any] = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    metric, throughput = result.get("metric"), result.get("throughput")
    board = [str(ROOT / ".venv" / "bin" / "tensorboard"), "--logdir"]
    rows = [
        ("model", model.path.name),
        ("score on the held-out split", _number(metric)),
        ("images per second", f"{throughput['images_per_sec']:.1f}" if throughput else "-"),
        ("time of the run", f"{seconds:.0f} s"),
        ("output", directory),
        ("  report and logs", f"{result['network']}_*.log, train_0.log"),
        ("  records", "metrics.jsonl, evaluations.jsonl, result.json, config.yaml"),
        ("  weights", "checkpoints/best.pth, checkpoints/last.pth"),
        ("TensorBoard", shlex.join([*board, str(directory / "tensorboard")])),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    return "\n".join(["", *lines])


def _number(metric: dict[str, Any] | None) -> str:
    if not metric:
        return "-"
    unit = {"percent": "%"}.get(metric["unit"], metric["unit"])
    return f"{metric['name']} {metric['value']:.2f} {unit}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
