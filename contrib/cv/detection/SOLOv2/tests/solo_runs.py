"""A narrow network, and the scripts of test/ as a user starts them."""

import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from detector_runs import DEVICE, run_script

MODEL = Path(__file__).resolve().parents[1]

RECIPE: dict[str, dict[str, Any]] = {
    "model": {
        "depth": 50,
        "stem_channels": 4,
        "base_channels": 4,
        "fpn_channels": 8,
        "frozen_stages": -1,
    },
    "head": {
        "stacked_convs": 1,
        "channels": 32,
        "kernel_channels": 32,
        "mask_channels": 32,
        "grids": [6, 5, 4, 3, 2],
        "scale_ranges": [[1, 16], [8, 32], [16, 48], [32, 64], [48, 96]],
        "pair_slots": [4, 64],
    },
    "test": {"score_thr": 0.0, "update_thr": 0.0, "nms_pre": 50, "max_per_img": 10},
    "data": {
        "batch_size": 2,
        "workers": 0,
        "min_sizes": [48, 64],
        "max_size": 96,
        "min_size_test": 64,
        "max_size_test": 96,
    },
    "solver": {"base_lr": 1e-3, "epochs": 2, "steps": [1], "warmup_iters": 0},
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


def write_resnet(path: Path) -> Path:
    """An ImageNet ResNet-50 as torchvision publishes it: its names, of RECIPE's widths."""
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def layer(conv: str, norm: str, inputs: int, outputs: int, kernel: int) -> None:
        shape = (outputs, inputs, kernel, kernel)
        tensors[f"{conv}.weight"] = torch.randn(shape, generator=draw) / (inputs * kernel**2) ** 0.5
        tensors[f"{norm}.weight"] = torch.rand(outputs, generator=draw)
        tensors[f"{norm}.bias"] = torch.zeros(outputs)
        tensors[f"{norm}.running_mean"] = torch.zeros(outputs)
        tensors[f"{norm}.running_var"] = torch.ones(outputs)
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    before = stem = RECIPE["model"]["stem_channels"]
    layer("conv1", "bn1", 3, stem, 7)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = RECIPE["model"]["base_channels"] << stage
        for number in range(blocks):
            at = f"layer{stage + 1}.{number}"
            if number == 0:
                layer(f"{at}.downsample.0", f"{at}.downsample.1", before, 4 * inner, 1)
            layer(f"{at}.conv1", f"{at}.bn1", before, inner, 1)
            layer(f"{at}.conv2", f"{at}.bn2", inner, inner, 3)
            layer(f"{at}.conv3", f"{at}.bn3", inner, 4 * inner, 1)
            before = 4 * inner
    tensors["fc.weight"], tensors["fc.bias"] = torch.zeros(1000, before), torch.zeros(1000)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path
