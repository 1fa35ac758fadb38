"""Small data sets, a narrow network, and the scripts of test/ as a user starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw

MODEL = Path(__file__).resolve().parents[1]
DEVICE = os.environ.get("ZOO_TEST_DEVICE", "cpu")
ABSENT = "cuda" if DEVICE == "npu" else "npu"  # a machine has one kind of card
CLASSES = {3: "cat", 7: "big dog"}
JSON = "annotations/instances_{}2017.json"

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


def environment(**more: str) -> dict[str, str]:
    """This environment's python first on the path, as an activated one has it."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def script(run: str, *words: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess:
    """Runs a script of test/ to its end; ``more`` is added to the environment."""
    return _run(["bash", str(MODEL / "test" / f"{run}.sh"), *map(str, words)], cwd, more)


def predict(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    return _run([sys.executable, "-m", "rcnn.predict", *map(str, words)], cwd, {})


def _run(
    command: list[str], cwd: Path, more: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=300
    )


def draw_coco(
    root: Path, *, train: int = 6, val: int = 4, classes: Mapping[int, str] = CLASSES
) -> Path:
    """A COCO 2017 tree of noise with rectangles; every other picture is higher than wide."""
    dice = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for number in range(count):
            width, height = (80, 64) if number % 2 else (64, 80)
            name, image_id = f"{split} {number}.jpg", 10 * number + len(split)
            picture = Image.fromarray(dice.integers(0, 120, (height, width, 3), dtype=np.uint8))
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for turn, (category, _) in zip(range(1 + number % 2), classes.items(), strict=False):
                left, top = 4 + 6 * turn, 6
                right, bottom = width - 8 - 20 * turn, height - 10
                colour = tuple(255 if (category + i) % 3 else 20 for i in range(3))
                ImageDraw.Draw(picture).rectangle((left, top, right, bottom), fill=colour)
                annotations.append(annotation(image_id, category, (left, top, right, bottom)))
                annotations[-1]["id"] = len(annotations)
            picture.save(root / f"{split}2017" / name)
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in classes.items()],
        }
        (root / JSON.format(split)).write_text(json.dumps(content))
    return root


def annotation(image_id: int, category: int, box: tuple[float, ...]) -> dict[str, Any]:
    """An object whose outline is its box, given as corners."""
    left, top, right, bottom = box
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": [left, top, right - left, bottom - top],
        "area": (right - left) * (bottom - top),
        "iscrowd": 0,
        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
    }


def edit(root: Path, split: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Changes the content of a JSON; gives the data set."""
    file = root / JSON.format(split)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return root


def snapshot(root: Path) -> dict[str, bytes]:
    """All files of the user's below a directory: not our caches, nor what a download left."""
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file() and not file.name.endswith((".zoo-cache", ".part"))
    }


def result_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in lines_of(output)]


def detections_of(output: Path) -> list[dict[str, Any]]:
    found = json.loads((output / "coco_results.json").read_text())
    return sorted(found, key=lambda item: (item["image_id"], -item["score"], item["bbox"]))


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["model"]
