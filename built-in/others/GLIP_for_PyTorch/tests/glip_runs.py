"""A narrow network, and the scripts of test/ as a user starts them."""

import subprocess
from pathlib import Path
from typing import Any

import yaml
from detector_runs import DEVICE, run_script

MODEL = Path(__file__).resolve().parents[1]
BERT = MODEL / "tests" / "fixtures" / "bert_tiny"

RECIPE: dict[str, dict[str, Any]] = {
    "model": {
        "swin_width": 8,
        "swin_depths": [1, 1, 1, 1],
        "swin_heads": [1, 1, 2, 2],
        "swin_window": 3,
        "drop_path": 0.0,
        "drop_block": 0.0,
        "channels": 32,
        "tower_blocks": 1,
        "fusion_width": 16,
        "fusion_heads": 2,
        "fusion_dropout": 0.0,
        "bert": str(BERT),
        "max_tokens": 32,
    },
    "test": {"score_thr": 0.0, "nms_pre": 50, "max_per_img": 10},
    "data": {
        "batch_size": 2,
        "workers": 0,
        "min_sizes": [48, 64],
        "max_size": 96,
        "min_size_test": 64,
        "max_size_test": 96,
    },
    "solver": {"base_lr": 1e-4, "lang_lr": 1e-4, "max_epoch": 2, "warmup_iters": 0},
    "weights": {"start": ""},
    "run": {"device": DEVICE, "threads": 1, "log_every": 1},
}
"""A network and a run so small that a script takes as long as its imports."""


def write_recipe(path: Path) -> Path:
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def script(
    run: str, *words: str | Path, cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script of test/ to its end; ``more`` is added to the environment."""
    return run_script(MODEL, run, *words, cwd=cwd, **more)
