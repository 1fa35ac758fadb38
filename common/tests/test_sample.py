"""The sample data set: what is drawn, that it is reproducible, and how its directory is made."""

import dataclasses
import hashlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo_common import sample
from zoo_common.errors import UserError
from zoo_common.sample.__main__ import main
from zoo_common.sample.draw import boxes_xyxy, draw, visible_masks
from zoo_common.sample.scenes import COLOURS, TEXTURES, SceneObject, compose

SCENES = [compose(0, "train", index, 96, 96) for index in range(300)]


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def run(code: str) -> subprocess.Popen[str]:
    header = "import sys, time\nfrom pathlib import Path\nfrom zoo_common import sample\n"
    return subprocess.Popen(
        [sys.executable, "-c", header + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# What is drawn


def test_pixels_of_version_1_are_pinned():
    """Before JPEG compression, whose bytes depend on the library's version."""
    assert sample.VERSION == 1, "a new version needs a new digest"
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for index in range(20):
            digest.update(draw(compose(0, split, index, 224, 224)).tobytes())
            digest.update(draw(compose(7, split, index, 160, 120)).tobytes())
    assert digest.hexdigest() == "97f526103b876ad0e028d3ce78813a2fb8f7fea624465d1efbfcfc83ecf146b4"


def test_main_object_names_the_class_and_dominates():
    touching = covered = 0
    for scene in SCENES:
        areas = visible_masks(scene).sum(axis=(1, 2))
        main = max(range(len(scene.objects)), key=lambda i: scene.objects[i].scale)
        assert scene.objects[main].shape == scene.label
        assert all(o.shape != scene.label for i, o in enumerate(scene.objects) if i != main)
        others = np.delete(areas, main)
        assert areas[main] >= 2 * others.max()
        left, top, right, bottom = boxes_xyxy(visible_masks(scene))[main]
        touching += left == 0 or top == 0 or right == scene.width or bottom == scene.height
        alone = dataclasses.replace(scene, objects=(scene.objects[main],))
        covered += areas[main] < 0.98 * visible_masks(alone).sum()
    assert touching > 30
    assert covered > 90


def test_objects_vary():
    objects = [item for scene in SCENES for item in scene.objects]
    assert {item.shape for item in objects} == set(sample.CLASSES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.texture for item in objects} == set(TEXTURES)
    scales = [max(item.scale for item in scene.objects) for scene in SCENES]
    assert max(scales) > 1.35 * min(scales)
    beyond = [x < 0 or y < 0 or x > 96 or y > 96 for o in objects for x, y in o.polygon]
    assert any(beyond)


@pytest.mark.parametrize("shape", sample.CLASSES)
def test_every_shape_has_the_area_of_its_scale(shape):
    """So that the mean colour says nothing of the class; the ring's hole is left out."""
    item = dataclasses.replace(lone_object(), shape=shape, angle=0.7)
    scene = dataclasses.replace(SCENES[0], width=200, height=200, objects=(item,))
    mask = visible_masks(scene)[0]
    assert mask.sum() == pytest.approx(item.scale**2, rel=0.02)
    rows, columns = np.nonzero(mask)
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx(item.centre, abs=0.5)
    assert mask[100, 100] == (shape != "ring")


def lone_object() -> SceneObject:
    return dataclasses.replace(
        SCENES[0].objects[0],
        rgb=(200, 100, 50),
        texture="plain",
        centre=(100.0, 100.0),
        scale=80.0,
        aspect=1.0,
    )


def test_masks_and_boxes_are_those_of_the_picture():
    back = lone_object()
    front = dataclasses.replace(back, shape="square", rgb=(10, 200, 10), centre=(130.0, 100.0))
    background = dataclasses.replace(SCENES[0].background, noise=0)
    outside = dataclasses.replace(back, centre=(-300.0, 0.0))
    scene = dataclasses.replace(
        SCENES[0], width=200, height=160, background=background, objects=(outside, back, front)
    )
    pixels = draw(scene)
    masks = visible_masks(scene)
    assert masks.shape == (3, 160, 200)
    assert (masks.sum(axis=0) <= 1).all()
    for item, mask in zip(scene.objects[1:], masks[1:], strict=True):
        same = (pixels == item.rgb).all(axis=2)
        # Only pixels on the outline are mixed with what lies behind.
        assert (same & mask).sum() > 0.94 * mask.sum()
        assert not (same & ~mask).any()

    boxes = boxes_xyxy(masks)
    assert boxes[0].tolist() == [0, 0, 0, 0]
    rows, columns = np.nonzero(masks[1])
    tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert boxes[1].tolist() == tight


# That it is hard


def ridge_accuracy(
    features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, wanted: np.ndarray
) -> float:
    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, z = (features - mean) / spread, (held_out - mean) / spread
    targets = np.eye(len(sample.CLASSES))[labels] - 1 / len(sample.CLASSES)
    weights = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1]), x.T @ targets)
    return float(((z @ weights).argmax(axis=1) == wanted).mean())


def nearest_mean_accuracy(
    features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, wanted: np.ndarray
) -> float:
    means = np.stack([features[labels == k].mean(axis=0) for k in range(len(sample.CLASSES))])
    distances = ((held_out[:, None] - means) ** 2).sum(axis=2)
    return float((distances.argmin(axis=1) == wanted).mean())


def coarse_histogram(picture: Image.Image) -> np.ndarray:
    """Parts of the picture in eight ranges of each channel."""
    return np.divide(picture.histogram(), 64 * 64).reshape(-1, 32).sum(axis=1)


def test_cheap_classifiers_stay_near_chance(tmp_path):
    root = sample.make(tmp_path, train=1500, val=500, size=64)
    pixels: dict[str, np.ndarray] = {}
    facts: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        paths = sorted((root / split).rglob("*.jpg"))
        labels[split] = np.array([sample.CLASSES.index(path.parent.name) for path in paths])
        pictures = [Image.open(io.BytesIO(path.read_bytes())).convert("RGB") for path in paths]
        small = [picture.resize((16, 16), Image.Resampling.BOX) for picture in pictures]
        pixels[split] = np.stack([np.asarray(p, dtype=np.float64).ravel() / 255 for p in small])
        facts[split] = np.stack(
            [
                [path.stat().st_size, *np.asarray(p).std((0, 1)), *coarse_histogram(p)]
                for path, p in zip(paths, pictures, strict=True)
            ]
        )
    for accuracy in (ridge_accuracy, nearest_mean_accuracy):
        for features, limit in ((pixels, 0.25), (facts, 0.18)):
            score = accuracy(features["train"], labels["train"], features["val"], labels["val"])
            assert score < limit, (accuracy.__name__, score)


# That it is the same everywhere


def test_bytes_do_not_depend_on_workers_place_or_count(tmp_path):
    one = contents(sample.make(tmp_path / "a", train=33, val=12, size=64))
    two = contents(sample.make(tmp_path / "b c", train=33, val=12, size=64, workers=3))
    assert one == two
    more = contents(sample.make(tmp_path, train=40, val=20, size=64))
    pictures = {name: data for name, data in one.items() if name.endswith(".jpg")}
    assert len(pictures) == 45
    assert all(more[name] == data for name, data in pictures.items())
    other_seed = contents(sample.make(tmp_path, train=33, val=12, size=64, seed=1))
    assert not set(pictures.values()) & set(other_seed.values())


def test_layout_balance_and_disjoint_splits(tmp_path):
    root = sample.make(tmp_path, train=64, val=20, size=(48, 40))
    seen = set()
    for split, least, most in (("train", 6, 7), ("val", 2, 2)):
        assert [path.name for path in sorted((root / split).iterdir())] == list(sample.CLASSES)
        for folder in (root / split).iterdir():
            files = list(folder.iterdir())
            assert least <= len(files) <= most
            for path in files:
                assert path.name.startswith(f"{folder.name}_") and path.suffix == ".jpg"
                with Image.open(path) as picture:
                    assert (picture.format, picture.mode) == ("JPEG", "RGB")
                    assert picture.size == (48, 40)
                    seen.add(picture.tobytes())
    assert len(seen) == 84


# How its directory is made


def test_a_complete_set_is_used_again(tmp_path):
    calls = []
    options = {"train": 20, "val": 10, "size": 32, "progress": lambda *args: calls.append(args)}
    root = sample.make(tmp_path, **options)
    assert calls == [(done, 30) for done in range(1, 31)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    start = time.perf_counter()
    assert sample.make(tmp_path, **options) == root
    assert time.perf_counter() - start < 0.1
    assert len(calls) == 30
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_killed_make_leaves_nothing_in_the_way(tmp_path):
    process = run(
        f"sample.make(Path({str(tmp_path)!r}), train=30, val=10, size=32,"
        " progress=lambda done, total: time.sleep(0.1))"
    )
    deadline = time.monotonic() + 20
    while len(list(tmp_path.rglob("*.jpg"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left_over,) = tmp_path.iterdir()
    root = sample.make(tmp_path, train=30, val=10, size=32)
    assert root != left_over
    assert list(tmp_path.iterdir()) == [root]
    assert len(list(root.rglob("*.jpg"))) == 40


def test_processes_that_make_it_at_once_share_it(tmp_path):
    code = (
        f"print(sample.make(Path({str(tmp_path)!r}), train=30, val=10, size=32,"
        " progress=lambda done, total: time.sleep(0.01)))"
    )
    processes = [run(code) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    (root,) = tmp_path.iterdir()
    assert {out.strip() for out, _ in results} == {str(root)}
    assert len(list(root.rglob("*.jpg"))) == 40


def test_foreign_directories_are_left_alone(tmp_path):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="mine holds something else"):
        sample.make_at(foreign, train=10, val=10, size=32)
    with pytest.raises(UserError, match=r"notes.txt is not a directory"):
        sample.make_at(foreign / "notes.txt", train=10, val=10, size=32)
    assert contents(tmp_path) == {"mine/notes.txt": b"keep"}

    empty = tmp_path / "empty"
    empty.mkdir()
    assert sample.make_at(empty, train=10, val=10, size=32) == empty
    before = contents(empty)
    with pytest.raises(UserError, match="holds another data set"):
        sample.make_at(empty, train=10, val=10, size=32, seed=1)
    assert contents(empty) == before
    next(empty.rglob("*.jpg")).unlink()
    with pytest.raises(UserError, match=r"should hold 1 files and holds 0; delete"):
        sample.make_at(empty, train=10, val=10, size=32)
    (empty / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="holds another data set"):
        sample.make_at(empty, train=10, val=10, size=32)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_takes_no_more(tmp_path, workers):
    """A limit on the size of a file stands for the full disk: the same writes fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\)") as caught:
            sample.make(tmp_path, train=10, val=10, size=64, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*cannot be written \(Not a directory\)"):
        sample.make(tmp_path / "file" / "below", train=10, val=10, size=32)


def test_a_full_disk_is_called_full(tmp_path, monkeypatch):
    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(UserError, match=r"the disk of .* is full; free some space"):
        sample.make(tmp_path, train=10, val=10, size=32)
    assert not list(tmp_path.iterdir())


def test_a_killed_worker_ends_the_make(tmp_path):
    def kill_workers(done: int, total: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(UserError, match="was killed"):
        sample.make(tmp_path, train=2000, val=10, workers=2, progress=kill_workers)
    assert not list(tmp_path.iterdir())


def test_workers_end_before_the_directory_is_cleared(tmp_path, monkeypatch):
    drawing = []
    clear = shutil.rmtree

    def watched(*args: Any, **options: Any) -> None:
        drawing.append(len(multiprocessing.active_children()))
        clear(*args, **options)

    def stop(done: int, total: int) -> None:
        assert multiprocessing.active_children()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", watched)
    with pytest.raises(KeyboardInterrupt):
        sample.make(tmp_path, train=2000, val=10, workers=2, progress=stop)
    assert drawing == [0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "voc"}, "no layout 'voc'; choose one of imagenet, coco"),
        ({"train": 9}, "train=9 leaves .* without a picture of each class; ask for at least 10"),
        ({"val": 0}, "val=0 leaves .* without a picture of each class"),
        ({"layout": "coco", "val": 0}, "val=0 leaves .* without a picture; ask for at least 1"),
        ({"size": 8}, "cannot be 8 x 8 pixels"),
        ({"size": (224, 5000)}, "cannot be 224 x 5000 pixels"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        sample.make(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_default_root(tmp_path, monkeypatch):
    for name in ("ZOO_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sample.default_root() == tmp_path / "home" / ".cache" / "zoo_common"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert sample.default_root() == tmp_path / "home" / ".cache" / "zoo_common"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert sample.default_root() == tmp_path / "cache" / "zoo_common"
    monkeypatch.setenv("ZOO_DATA_DIR", "~/data")
    assert sample.default_root() == tmp_path / "home" / "data"
    root = sample.make(train=10, val=10, size=32)
    assert root.parent == tmp_path / "home" / "data"
    for fact in ("imagenet", f"v{sample.VERSION}", "seed0", "32x32", "train10", "val10"):
        assert fact in root.name


def test_no_home_directory(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("ZOO_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="set ZOO_DATA_DIR"):
        sample.default_root()


# The command line


def test_command_makes_and_shows_the_tree(tmp_path):
    out = tmp_path / "a 'b; c [d]"
    command = [sys.executable, "-m", "zoo_common.sample", "--out", str(out), "--size=40x32"]
    command += ["--train=20", "--val=10", "--workers=2", "--seed=5", "--layout", "imagenet"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == str(out)
    assert "    train/arrow/         2 files" in result.stdout.splitlines()
    with Image.open(next(out.rglob("*.jpg"))) as picture:
        assert picture.size == (40, 32)
    assert contents(out) == contents(
        sample.make_at(tmp_path / "same", train=20, val=10, size=(40, 32), seed=5)
    )


def test_command_without_a_directory_uses_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZOO_DATA_DIR", str(tmp_path))
    assert main(["--train=10", "--val=10", "--size=32"]) == 0
    (root,) = tmp_path.iterdir()
    assert capsys.readouterr().out.splitlines()[0] == str(root)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layout=voc"], "invalid choice: 'voc'"),
        (["--train=many"], "invalid int value: 'many'"),
        (["--size=64x"], "'64x' is no size"),
        (["--size=big"], "'big' is no size; write 224, or 500x375"),
        (["--trian=3"], "unrecognized arguments: --trian=3"),
        (["--val=3"], "error: val=3 leaves the sample data set without a picture of each class"),
        (["--out=/dev/null"], "/dev/null is not a directory"),
    ],
)
def test_command_line_mistakes(argv, message, capsys):
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "python3 -m zoo_common.sample --out ./shapes" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "zoo_common.sample", "--out", str(tmp_path / "set")]
    process = subprocess.Popen(
        [*command, "--train=200000", "--size=32", "--workers=2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not list(tmp_path.rglob("*.jpg")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "interrupted; nothing was left behind\n")
    assert not list(tmp_path.iterdir())


def test_torch_is_not_needed():
    process = run("import zoo_common.digits\nprint('torch' in sys.modules)")
    assert process.communicate(timeout=60)[0] == "False\n"
