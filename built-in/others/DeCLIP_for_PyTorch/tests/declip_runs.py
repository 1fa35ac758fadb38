"""A narrow network, a small data set, and the scripts of test/ as a user starts them."""

import gzip
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detector_runs import DEVICE, run_script
from PIL import Image

MODEL = Path(__file__).resolve().parents[1]
CLASSES = ("red circle", "blue square", "green star")
TRAIN_JSON, TRAIN_IMAGES = "yfcc15m_clean_open_data.json", "yfcc15m_clean_open_data"
VAL_IMAGES = "imagenet_val"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"

RECIPE: dict[str, dict[str, Any]] = {
    "model": {
        "embed_dim": 16,
        "input_size": 32,
        "image_width": 16,
        "image_layers": 1,
        "image_heads": 2,
        "patch": 16,
        "context_length": 16,
        "text_width": 16,
        "text_layers": 1,
        "text_heads": 2,
        "projector_width": 24,
        "predictor_width": 8,
    },
    "loss": {"queue_size": 8},
    "text": {"synonyms": False},
    "data": {"batch_size": 4, "workers": 0},
    "optimizer": {"warmup_steps": 2},
    "schedule": {"steps": 6, "save_every": 4},
    "evaluate": {"every": 4, "batch_size": 4, "prompts": "one"},
    "run": {"device": DEVICE, "threads": 1, "log_every": 1},
}
"""A network and a run so small that a script takes as long as its imports."""

RESNET = ("model.tower=resnet", "model.image_depths=[1,1,1,1]", "model.image_width=4")


def write_recipe(path: Path) -> Path:
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def draw_yfcc(root: Path, *, train: int = 8, val: int = 6) -> Path:
    """The card's tree: pictures of noise in the colour of their class."""
    dice = np.random.default_rng(0)
    for folder in (TRAIN_IMAGES, VAL_IMAGES):
        (root / folder).mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for number in range(train):
        name = f"ab/picture {number}.jpg"
        label = number % len(CLASSES)
        _draw(root / TRAIN_IMAGES / name, label, dice)
        caption = f"picture {number} shows a {CLASSES[label]}, seen from above"
        rows["train"].append({"filename": name, "caption": caption, "url": "u"})
    for number in range(val):
        name = f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        label = number % len(CLASSES)
        _draw(root / VAL_IMAGES / name, label, dice)
        rows["val"].append({"filename": name, "label": label, "label_name": CLASSES[label]})
    write_rows(root / TRAIN_JSON, rows["train"])
    write_rows(root / "val_official.json", rows["val"])
    merges = ["r e", "re d</w>", "s h", "sh o", "sho w", "show s</w>", "b l", "bl u"]
    with gzip.open(root / VOCABULARY, "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: tests", *merges]) + "\n")
    return root


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _draw(file: Path, label: int, dice: np.random.Generator) -> None:
    file.parent.mkdir(exist_ok=True)
    pixels = dice.integers(0, 100, (36, 48, 3), dtype=np.uint8)
    pixels[..., label] += 150
    Image.fromarray(pixels).save(file)


def script(
    run: str, *words: str | Path, cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script of test/ to its end; ``more`` is added to the environment."""
    return run_script(MODEL, run, *words, cwd=cwd, **more)
