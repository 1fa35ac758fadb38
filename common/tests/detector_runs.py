"""Small COCO data sets, and a model's scripts as a user starts them; the detectors' tests share it.

A test directory puts this one on the path, see Faster_Mask_RCNN_for_PyTorch/tests/rcnn_runs.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

DEVICE = os.environ.get("ZOO_TEST_DEVICE", "cpu")
ABSENT = "cuda" if DEVICE == "npu" else "npu"  # a machine has one kind of card
CLASSES = {3: "cat", 7: "big dog"}
JSON = "annotations/instances_{}2017.json"

# ---------------------------------------------------------------------------- commands


def environment(**more: str) -> dict[str, str]:
    """This environment's python first on the path, as an activated one has it."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run_command(
    command: Sequence[str | Path], cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; ``more`` is added to the environment."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_script(
    model: Path, run: str, *words: str | Path, cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script of a model's test/ to its end; ``more`` is added to the environment."""
    return run_command(["bash", model / "test" / f"{run}.sh", *words], cwd, **more)


@dataclass(frozen=True)
class Case:
    """A command that is refused, and what is said.

    Attributes:
        run: the script.
        words: its options; {at} and the like are filled in, see :func:`run_cases`.
        said: texts that the message holds.
        environment: added to that of the script.
    """

    run: str
    words: Sequence[str]
    said: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Answer(NamedTuple):
    """What a case led to."""

    done: subprocess.CompletedProcess[str]
    said: Sequence[str]
    output: Path


def run_cases(
    model: Path, cases: Mapping[str, Case], names: Mapping[str, str], at: Path
) -> dict[str, Answer]:
    """Runs each case, a few at a time, since most of one is start-up.

    Args:
        model: the model's directory.
        cases: by what they are called.
        names: what {name} stands for in words, texts and environment.
        at: an empty directory; each case gets one of its own in it.
    """

    def run(number: int, case: Case) -> Answer:
        cwd = at / str(number)
        cwd.mkdir()
        words = [_fill(word, names) for word in ("--output_dir=out", *case.words)]
        more = {name: _fill(value, names) for name, value in case.environment.items()}
        said = [_fill(text, names) for text in case.said]
        return Answer(run_script(model, case.run, *words, cwd=cwd, **more), said, cwd / "out")

    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(run, range(len(cases)), cases.values())
        return dict(zip(cases, answers, strict=True))


def _fill(text: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        text = text.replace("{" + name + "}", value)
    return text


def assert_refused(answer: Answer) -> None:
    """One sentence, the code of a user's mistake, and no number in any report."""
    done, said, output = answer
    assert done.returncode == 2, done.stderr
    words = [line for line in done.stderr.splitlines() if not line.startswith("env_npu.sh")]
    assert words[0].startswith("error: "), done.stderr
    tree = words[0].endswith(("laid out as below, or", "Expected:", "sample data."))
    assert len(words) == 1 or tree, done.stderr
    for text in said:
        assert text in done.stderr, done.stderr
    assert "Final" not in done.stdout
    for report in output.glob("*.log"):
        assert "FPS" not in report.read_text()


# ---------------------------------------------------------------------------- data


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


# ---------------------------------------------------------------------------- results


def result_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in lines_of(output)]


def report_of(output: Path, case: str) -> dict[str, str]:
    """The report, its keys in order."""
    return dict(line.split(" = ") for line in (output / f"{case}.log").read_text().splitlines())


def detections_of(output: Path) -> list[dict[str, Any]]:
    found = json.loads((output / "coco_results.json").read_text())
    return sorted(found, key=lambda item: (item["image_id"], -item["score"], item["bbox"]))


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["model"]


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights_of(one), weights_of(other)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
