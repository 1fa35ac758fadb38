"""A narrow network, and the scripts of test/ as a user starts them."""

import subprocess
from pathlib import Path

import yaml
from detector_runs import DEVICE, run_script

MODEL = Path(__file__).resolve().parents[1]

RECIPE = {
    "model": {
        "depth": 50,
        "stem_channels": 4,
        "res2_channels": 16,
        "width_per_group": 4,
        "fpn_channels": 8,
        "freeze_at": 0,
    },
    "anchors": {"sizes": [[8], [16], [32], [64], [128]]},
    "rpn": {
        "samples": 32,
        "pre_nms_train": 50,
        "pre_nms_test": 50,
        "post_nms_train": 20,
        "post_nms_test": 20,
    },
    "roi": {"samples": 16, "detections": 10, "score_thresh": 0.0},
    "box_head": {"fc_dim": 16, "sampling_ratio": 2},
    "mask_head": {"conv_dim": 8, "num_conv": 1, "sampling_ratio": 2},
    "data": {
        "batch_size": 2,
        "workers": 0,
        "min_sizes": [48, 64],
        "max_size": 96,
        "min_size_test": 64,
        "max_size_test": 96,
    },
    "solver": {"base_lr": 1e-3, "max_iter": 4, "steps": [3], "warmup_iters": 0},
    "precision": {"clip_grad": 1.0},
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
